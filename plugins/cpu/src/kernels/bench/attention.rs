//! Attention over a block of 64 rows in the second cache, what is made of such a block before, and rows from anywhere.

use super::{Found, Limit, copies, encoded, float_products, in_memory, measure, reads, word_products};
use crate::kernels::blocked::{
    Bytes, ColumnBlock, Formats, HEADS_MAX, Heads, Line, ROWS, Row, Softmax, StoredBlock, StoredUnits,
    WIDENED_HEADS_MAX, WORD_HEADS_MAX, Widened, Widths, WordBlock, WordHeads, attend, attend_columns, attend_stored,
    attend_widened, attend_words, round_query, round_stored_query,
};
use crate::kernels::inputs::Values;
use crate::level::Level;
use crate::simd::LANES;
use fastrand::Rng;
use sparsed_quant::Format;
use std::hint::black_box;

/// A head's slices of rows of the default model, and rows that all heads share.
const PLAIN: Widths = Widths { latent: 64, rope: 64, absorbed: false };
const MLA: Widths = Widths { latent: 512, rope: 64, absorbed: true };

fn name(widths: Widths) -> String {
    format!("{} + {}", widths.latent, widths.rope)
}

fn key_width(widths: Widths) -> usize {
    widths.rope + if widths.absorbed { widths.latent } else { 0 }
}

/// Vectors of 16 values that one head has to multiply with a block, for its scores and for its answer.
fn vectors(widths: Widths) -> usize {
    ROWS * (key_width(widths) + widths.latent) / LANES
}

/// A block of encoded rows and some heads.
struct Bed {
    /// Latent and rope part of each row, together.
    rows: Vec<Vec<u8>>,
    latent_bytes: usize,
    q: Vec<f32>,
    q_words: Vec<Line>,
    scales: Vec<f32>,
    states: Vec<Softmax>,
    out: Vec<f32>,
}

impl Bed {
    fn new(level: Level, [latent, rope]: Formats, widths: Widths, heads: usize) -> Self {
        let latent_rows = encoded(latent, widths.latent, ROWS);
        let rope_rows = encoded(rope, widths.rope, ROWS);
        let latent_bytes = latent_rows[0].len();
        let rows = latent_rows.into_iter().zip(rope_rows).map(|(latent, rope)| [latent, rope].concat()).collect();
        let (q, lines) = (Values::seeded(3).rows()(heads * key_width(widths)), widths.key_lines());
        let mut q_words = vec![Line::ZERO; heads * lines];
        let round = |(q, to): (&[f32], &mut [Line])| match latent {
            Format::W16 => round_stored_query(level, q, widths, to),
            _ => round_query(level, q, widths.rope, to),
        };
        let queries = q.chunks_exact(key_width(widths)).zip(q_words.chunks_exact_mut(lines));
        let scales = queries.map(|query| 0.1 * round(query)).collect();
        let (states, out) = (vec![Softmax::EMPTY; heads], vec![0.0; heads * widths.latent]);
        Self { rows, latent_bytes, q, q_words, scales, states, out }
    }

    fn bytes(&self) -> Vec<Bytes<'_>> {
        let parts = self.rows.iter().map(|row| row.split_at(self.latent_bytes));
        parts.map(|(latent, rope)| Bytes { latent, rope }).collect()
    }
}

/// Heads of `$bed` as words.
macro_rules! word_heads {
    ($bed:ident, $states:ident, $out:ident) => {
        &mut WordHeads { q: &$bed.q_words, scales: &$bed.scales, states: &mut $states, out: &mut $out }
    };
}

fn floats(level: Level, found: &mut Vec<Found>) {
    for heads in [3, HEADS_MAX] {
        let bed = Bed::new(level, [Format::F16; 2], PLAIN, heads);
        let rows = bed.bytes();
        let halves = |row: &Bytes<'_>| (row.latent.as_chunks().0.to_vec(), row.rope.as_chunks().0.to_vec());
        let rows: Vec<_> = rows.iter().map(halves).collect();
        let rows: Vec<Row<'_>> = rows.iter().map(|(latent, rope)| Row { latent, rope }).collect();
        let (mut states, mut out) = (bed.states.clone(), bed.out.clone());
        let measured = measure(heads * vectors(PLAIN), float_products(level), || {
            attend(level, &rows, &[], &mut Heads { q: &bed.q, scale: 0.1, states: &mut states, out: &mut out });
        });
        found.push((format!("attend, {heads} heads, {}", name(PLAIN)), measured));
        if heads == HEADS_MAX {
            let mut block = Widened::default();
            let measured = measure(ROWS * 2 * PLAIN.latent / LANES, copies(level, ROWS * 8), || {
                block.fill(level, &rows, PLAIN.rope);
            });
            found.push((format!("Widened::fill, {}", name(PLAIN)), measured));
            let heads = WIDENED_HEADS_MAX;
            let (states, out) = (&mut states[..heads], &mut out[..heads * PLAIN.latent]);
            let q = &bed.q[..heads * PLAIN.rope];
            let measured = measure(heads * vectors(PLAIN), float_products(level), || {
                attend_widened(
                    level,
                    &block,
                    ROWS,
                    &[],
                    &mut Heads { q, scale: 0.1, states: &mut *states, out: &mut *out },
                );
            });
            found.push((format!("attend_widened, {heads} heads, {}", name(PLAIN)), measured));
        }
    }
}

fn words(level: Level, found: &mut Vec<Found>) {
    for formats in [[Format::F16; 2], [Format::Q8_0; 2], [Format::F8_128; 2], [Format::Q6_0, Format::Q8_0]] {
        let bed = Bed::new(level, formats, MLA, WORD_HEADS_MAX);
        let (rows, mut block) = (bed.bytes(), WordBlock::default());
        // A line has 32 words: of the keys, and of the values again in pairs.
        let lines = ROWS * (key_width(MLA) + MLA.latent) / (2 * LANES);
        let measured = measure(lines, copies(level, lines), || block.fill(level, formats, &rows, (MLA, 0), &[]));
        found.push((format!("WordBlock::fill, {}, {}", formats[0].name(), name(MLA)), measured));
        if formats[0] == Format::F16 {
            let (mut states, mut out) = (bed.states.clone(), bed.out.clone());
            let measured = measure(WORD_HEADS_MAX * vectors(MLA) / 2, word_products(level), || {
                attend_words(level, &block, ROWS, &[], word_heads!(bed, states, out));
            });
            found.push((format!("attend_words, {WORD_HEADS_MAX} heads, {}", name(MLA)), measured));
        }
    }
}

fn stored(level: Level, found: &mut Vec<Found>) {
    for (widths, heads) in [(PLAIN, 3), (PLAIN, WORD_HEADS_MAX), (MLA, WORD_HEADS_MAX)] {
        let bed = Bed::new(level, [Format::W16; 2], widths, heads);
        let (rows, mut units, mut columns) = (bed.bytes(), StoredUnits::default(), ColumnBlock::default());
        let whole: Vec<&[u8]> = bed.rows.iter().map(|row| &row[..]).collect();
        units.take(level, &whole, bed.latent_bytes, widths);
        let (mut states, mut out) = (bed.states.clone(), bed.out.clone());
        let of_heads = heads * vectors(widths) / 2;
        let block = StoredBlock { rows: &rows, units: &units };
        let measured = measure(of_heads, word_products(level), || {
            attend_stored(level, &block, &[], word_heads!(bed, states, out));
        });
        found.push((format!("attend_stored, {heads} heads, {}", name(widths)), measured));
        if heads < WORD_HEADS_MAX {
            continue;
        }
        columns.fill(level, &block);
        let measured = measure(of_heads, word_products(level), || {
            attend_columns(level, &block, &columns, &[ROWS; WORD_HEADS_MAX], &[], word_heads!(bed, states, out));
        });
        found.push((format!("attend_columns, {heads} heads, {}", name(widths)), measured));
        let keys = if widths.absorbed { 0 } else { widths.rope };
        let lines = ROWS * (keys + widths.latent) / (2 * LANES);
        let measured = measure(lines, copies(level, lines), || columns.fill(level, &block));
        found.push((format!("ColumnBlock::fill, {}", name(widths)), measured));
        let all: Vec<u8> = bed.rows.concat();
        let mut taken = StoredUnits::default();
        // One line of each part has a unit.
        let measured = measure(2 * ROWS, reads(level, &all[..2 * ROWS * 64]), || {
            taken.take(level, black_box(&whole), bed.latent_bytes, widths);
        });
        found.push((format!("StoredUnits::take, {}", name(widths)), measured));
    }
}

/// 512 rows of three head groups, three heads each, from all over a pool, in order of their places: they are asked for
/// while those before them are computed. Beside a read of as many bytes that lie together.
fn gathered(level: Level, found: &mut Vec<Found>) {
    const GROUPS: usize = 3;
    const SELECTED: usize = 512;
    const POOL: usize = 512 << 20;
    let bed = Bed::new(level, [Format::W16; 2], PLAIN, GROUPS);
    let row: Vec<u8> = bed.rows[..2 * GROUPS].iter().flat_map(|row| row[..bed.latent_bytes].to_vec()).collect();
    let (pool, half) = (in_memory(&row, POOL), row.len() / 2);
    let (n_rows, mut random) = (pool.len() / row.len(), Rng::with_seed(4));
    let selections: Vec<Vec<usize>> = (0..64)
        .map(|_| {
            let mut rows: Vec<usize> = (0..SELECTED).map(|_| random.usize(..n_rows)).collect();
            rows.sort_unstable();
            rows
        })
        .collect();
    let at = |row_number: usize| &pool[row_number * row.len()..][..row.len()];
    let (mut units, mut turn, mut place) = (StoredUnits::default(), 0, 0);
    let (mut states, mut out) = (bed.states.clone(), bed.out.clone());
    let limit = Limit::new((64, "bytes read"), |n| {
        let bytes = n * 64;
        place = (place + 37 * bytes) % (pool.len() - bytes) / 64 * 64;
        (reads(level, &pool[place..place + bytes]).run)(n);
    });
    let measured = measure(SELECTED * row.len() / 64, limit, || {
        turn = (turn + 1) % selections.len();
        let rows: Vec<&[u8]> = selections[turn].iter().map(|&row| at(row)).collect();
        for (number, rows_now) in rows.chunks_exact(ROWS).enumerate() {
            let next = rows.chunks_exact(ROWS).nth(number + 1).unwrap_or_default();
            units.take(level, rows_now, half, PLAIN);
            for (group, ahead) in (0..GROUPS).zip(next.chunks(ROWS.div_ceil(GROUPS)).chain([&[][..]; GROUPS])) {
                let slice = |part: &[u8]| group * part.len() / GROUPS..(group + 1) * part.len() / GROUPS;
                let parts = rows_now.iter().map(|row| row.split_at(half));
                let parts = parts.map(|(a, b)| Bytes { latent: &a[slice(a)], rope: &b[slice(b)] });
                let rows: Vec<Bytes<'_>> = parts.collect();
                attend_stored(level, &StoredBlock { rows: &rows, units: &units }, ahead, word_heads!(bed, states, out));
            }
        }
    });
    found.push((format!("gather of {SELECTED} rows of {} bytes and attention", row.len()), measured));
}

pub(super) fn all(level: Level) -> Vec<Found> {
    let mut found = Vec::new();
    floats(level, &mut found);
    words(level, &mut found);
    stored(level, &mut found);
    gathered(level, &mut found);
    found
}
