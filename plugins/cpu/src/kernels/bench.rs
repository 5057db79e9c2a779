//! How near are kernels to their limits? Each is measured right after a loop of nothing but what bounds it.
//!
//! The ratio of the two holds on a busy machine, the times do not. On one core, for `PERFORMANCE.md`:
//!
//! taskset -c 0 cargo test --release -p sparsed-plugin-cpu kernels::bench -- --ignored --nocapture

mod attention;
mod products;
mod rowwise;

use super::inputs::Values;
use crate::level::Level;
use crate::simd::{LANES, Lanes, Products, Words, on_level};
use memmap2::{Advice, MmapMut};
use std::hint::black_box;
use std::time::Instant;

/// A kernel's name, then what was measured.
type Found = (String, Measured);

#[derive(Clone, Copy, Debug)]
struct Measured {
    /// Of one call.
    ns: f64,
    /// Time of the limit's loop by time of the kernel.
    share: f64,
    /// What one call has to do at least, and of what.
    work: (usize, &'static str),
}

/// Calls `kernel`, which does `units` of what `limit` is a loop of.
fn measure(units: usize, mut limit: Limit<'_>, mut kernel: impl FnMut()) -> Measured {
    /// Shorter times would be the clock's.
    const SECONDS: f64 = 25e-6;
    let time = |job: &mut dyn FnMut()| {
        let begin = Instant::now();
        job();
        begin.elapsed().as_secs_f64()
    };
    let once = (0..3).map(|_| time(&mut kernel)).fold(f64::INFINITY, f64::min);
    let repeats = (SECONDS / once).ceil().max(1.0) as usize;
    let (mut times, mut ratios) = (Vec::new(), Vec::new());
    for _ in 0..if once > 4.0 * SECONDS { 60 } else { 400 } {
        let bound = time(&mut || (limit.run)(units * repeats));
        let own = time(&mut || (0..repeats).for_each(|_| kernel()));
        times.push(own / repeats as f64 * 1e9);
        ratios.push(bound / own);
    }
    let work = (units * limit.of_unit.0, limit.of_unit.1);
    Measured { ns: median(&mut times), share: median(&mut ratios), work }
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Nothing but what bounds a kernel.
struct Limit<'a> {
    /// As many units of work as it is told.
    run: Box<dyn FnMut(usize) + 'a>,
    /// What is in a unit, and of what.
    of_unit: (usize, &'static str),
}

impl<'a> Limit<'a> {
    fn new(of_unit: (usize, &'static str), run: impl FnMut(usize) + 'a) -> Self {
        Self { run: Box::new(run), of_unit }
    }
}

/// Chains of dependent instructions of a loop: with their operands they fit into the level's registers.
fn wide(level: Level) -> bool {
    level == Level::Avx512
}

/// Products of bytes, in [`Products::dot`]s of one plane: of 8 values of 16 rows each. `small`: of codes up to 63.
fn byte_products(level: Level, small: bool) -> Limit<'static> {
    Limit::new((8 * LANES, "byte products"), move |n| match (wide(level), small) {
        (true, true) => bytes::<12, true>(level, n),
        (true, false) => bytes::<12, false>(level, n),
        (false, true) => bytes::<3, true>(level, n),
        (false, false) => bytes::<3, false>(level, n),
    })
}

/// Products of words, two to each of 16 lanes.
fn word_products(level: Level) -> Limit<'static> {
    let run = move |n| if wide(level) { words::<12>(level, n) } else { words::<3>(level, n) };
    Limit::new((2 * LANES, "word products"), run)
}

/// Multiplications and additions of 16 floats.
fn float_products(level: Level) -> Limit<'static> {
    Limit::new((LANES, "FMAs"), move |n| if wide(level) { floats::<12>(level, n) } else { floats::<5>(level, n) })
}

/// Divisions of 16 floats.
fn divisions(level: Level) -> Limit<'static> {
    let run = move |n| if wide(level) { quotients::<8>(level, n) } else { quotients::<4>(level, n) };
    Limit::new((LANES, "divisions"), run)
}

/// Copies of a cache line, between buffers of `lines` of them.
fn copies(level: Level, lines: usize) -> Limit<'static> {
    let (from, mut to) = (vec![[7.0; LANES]; lines], vec![[0.0; LANES]; lines]);
    Limit::new((64, "bytes written"), move |n| {
        for _ in 0..n / lines {
            copy(level, black_box(&from), &mut to);
            black_box(&to);
        }
    })
}

/// Reads of cache lines, all of `data` as often as there are so many.
fn reads(level: Level, data: &[u8]) -> Limit<'_> {
    let lines = data.as_chunks::<64>().0;
    let run = move |n| (0..n / lines.len()).for_each(|_| read(level, black_box(lines)));
    Limit::new((64, "bytes read"), run)
}

on_level! {
    fn bytes<const K: usize, const SMALL: bool>(n: usize) = bytes_body
}
on_level! {
    fn words<const K: usize>(n: usize) = words_body
}
on_level! {
    fn floats<const K: usize>(n: usize) = floats_body
}
on_level! {
    fn quotients<const K: usize>(n: usize) = quotients_body
}
on_level! {
    fn read(lines: &[[u8; 64]]) = read_body
}
on_level! {
    fn copy(from: &[[f32; LANES]], to: &mut [[f32; LANES]]) = copy_body
}

#[inline(always)]
fn bytes_body<L: Products, const K: usize, const SMALL: bool>(l: L, n: usize) {
    let (codes, x) = (black_box([[3; 64]; 16]), black_box([[0x0102_0304; 4]; K]));
    let mut sums = [l.start::<1>(0); K];
    for i in 0..n / K {
        let codes = l.codes::<1>(l.load_i(&codes[2 * i % 16]), l.load_i(&codes[2 * i % 16 + 1]));
        for k in 0..K {
            sums[k] = l.dot::<1, SMALL>(sums[k], codes, &x[k]);
        }
    }
    for sums in sums {
        keep_ints(l, l.total::<1>(sums));
    }
}

#[inline(always)]
fn words_body<L: Words, const K: usize>(l: L, n: usize) {
    let (keys, q) = (black_box([[3; LANES]; 16]), black_box([[5; LANES]; K]));
    let (mut sums, mut queries) = ([l.begin(l.splat_i(0)); K], [l.splat_i(0); K]);
    for k in 0..K {
        queries[k] = l.load_ints(&q[k]);
    }
    for i in 0..n / K {
        let key = l.load_ints(&keys[i % 16]);
        for k in 0..K {
            sums[k] = l.dot_words(sums[k], queries[k], key);
        }
    }
    for sums in sums {
        keep_ints(l, l.end(sums));
    }
}

#[inline(always)]
fn floats_body<L: Lanes, const K: usize>(l: L, n: usize) {
    let (a, b) = (l.splat(black_box(1.0)), l.splat(black_box(0.5)));
    let mut sums = [l.splat(0.0); K];
    for _ in 0..n / K {
        for sum in &mut sums {
            *sum = l.mul_add(a, b, *sum);
        }
    }
    for sum in sums {
        keep(l, sum);
    }
}

#[inline(always)]
fn quotients_body<L: Lanes, const K: usize>(l: L, n: usize) {
    let a = l.splat(black_box(3.0));
    let mut quotients = [l.splat(2.0); K];
    for _ in 0..n / K {
        for quotient in &mut quotients {
            *quotient = l.div(a, *quotient);
        }
    }
    for quotient in quotients {
        keep(l, quotient);
    }
}

#[inline(always)]
fn read_body<L: Lanes>(l: L, lines: &[[u8; 64]]) {
    let mut sums = [l.splat_i(0); 4];
    for lines in lines.as_chunks::<4>().0 {
        for k in 0..4 {
            sums[k] = l.add_i(sums[k], l.load_i(&lines[k]));
        }
    }
    for sum in sums {
        keep_ints(l, sum);
    }
}

#[inline(always)]
fn copy_body<L: Lanes>(l: L, from: &[[f32; LANES]], to: &mut [[f32; LANES]]) {
    for (from, to) in from.iter().zip(to) {
        l.store(l.load(from), to);
    }
}

#[inline(always)]
fn keep<L: Lanes>(l: L, v: L::F) {
    let mut to = [0.0; LANES];
    l.store(v, &mut to);
    black_box(to);
}

#[inline(always)]
fn keep_ints<L: Lanes>(l: L, v: L::I) {
    let mut to = [0; LANES];
    l.store_i(v, &mut to);
    black_box(to);
}

/// Rows of values, encoded.
fn encoded(format: sparsed_quant::Format, width: usize, n: usize) -> Vec<Vec<u8>> {
    let mut values = Values::seeded(1).rows();
    let row = |_| {
        let mut bytes = vec![0; format.row_bytes(width).unwrap()];
        sparsed_quant::encode(format, &values(width), &mut bytes).unwrap();
        bytes
    };
    (0..n).map(row).collect()
}

/// `part` again and again, in huge pages where the system gives them.
fn in_memory(part: &[u8], bytes: usize) -> MmapMut {
    let mut map = MmapMut::map_anon(bytes / part.len() * part.len()).unwrap();
    let _refused = map.advise(Advice::HugePage);
    map.chunks_exact_mut(part.len()).for_each(|to| to.copy_from_slice(part));
    map
}

#[test]
#[ignore = "a measurement; run it with --nocapture"]
#[allow(clippy::print_stdout, reason = "a measurement")]
fn kernels_beside_their_limits() {
    let levels: Vec<Level> = Level::all().filter(|level| *level != Level::Scalar).rev().collect();
    for table in [products::all, products::keys, attention::all, rowwise::all] {
        let columns: Vec<Vec<Found>> = levels.iter().map(|level| table(*level)).collect();
        let names: Vec<&str> = levels.iter().map(|level| level.name()).collect();
        println!("\n| | {} |\n|---{}|", names.join(" | "), "|---".repeat(levels.len()));
        for (i, (kernel, _)) in columns[0].iter().enumerate() {
            let cell = |column: &Vec<Found>| {
                let Measured { ns, share, work: (n, of) } = column[i].1;
                format!("{n} {of}, {ns:.0} ns, {:.0} %", 100.0 * share)
            };
            println!("| {kernel} | {} |", columns.iter().map(cell).collect::<Vec<_>>().join(" | "));
        }
    }
}
