//! What does a slow row cost? Lookup, checks and reads on this machine, for `tests/bench/RESULTS.md`.
//!
//! `cargo run --release -p sparsed-plugin-kit --example slow_tier -- FOLDER [MIB]` writes a file of MIB MiB (1024) into
//! FOLDER, which says what is measured: its file system and device, past the page cache where `O_DIRECT` is taken.
#![allow(clippy::print_stdout, reason = "a program that prints its figures")]

use fastrand::Rng;
use rustix::time::{ClockId, clock_gettime};
use sparsed_plugin_kit::slow::rowcache::{
    Cipher, Lookup, PAGE_BYTES, Policy, READ_PAGES_MAX, Read, RowCache, RowKey, SLOT_OVERHEAD_BYTES, Seal, SlowKey,
    SlowLayout,
};
use sparsed_plugin_kit::slow::{Method, ReadError, Reader};
use std::fs::File;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::Instant;

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

const RUNS: usize = 9;

fn main() -> Result<()> {
    let mut arguments = std::env::args().skip(1);
    let folder = arguments.next().ok_or("which folder?")?;
    let file_bytes = arguments.next().map_or(Ok(1024), |mib| mib.parse::<usize>())? << 20;
    // The default model's f16 and Q8_0 rows (3 heads of 64 + 64), and those of DeepSeek-V3.2's shape.
    for (name, row_bytes) in [("768 (384 x f16)", 768), ("408 (384 x Q8_0)", 408), ("1152 (576 x f16)", 1152)] {
        for cipher in [None, Some(Cipher::Aes256Gcm), Some(Cipher::ChaCha20Poly1305)] {
            println!(
                "rows of {name} bytes, {}:",
                cipher.map_or_else(|| "plain".to_owned(), |cipher| format!("{cipher:?}"))
            );
            cache_costs(row_bytes, &Seal::new(cipher.map(|cipher| SlowKey::new(cipher, [1; 32])).as_ref()))?;
        }
    }
    read_rates(Path::new(&folder), file_bytes)
}

/// CPU time of this thread in nanoseconds.
fn cpu_ns() -> f64 {
    clock_ns(ClockId::ThreadCPUTime)
}

fn clock_ns(clock: ClockId) -> f64 {
    let time = clock_gettime(clock);
    time.tv_sec as f64 * 1e9 + time.tv_nsec as f64
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Selections of 512 of 8192 tokens in 30 layers, as one decoded token makes them.
fn cache_costs(row_bytes: usize, seal: &Seal) -> Result<()> {
    const LAYERS: u32 = 30;
    const K: usize = 512;
    let layout = SlowLayout::new(row_bytes, 64, LAYERS)?;
    let mut random = Rng::with_seed(1);
    let plane: Vec<u8> = (0..layout.plane_bytes()).map(|_| random.u8(..)).collect();
    let mut image = vec![0; layout.block_bytes()];
    let n_slots = 2 * K * LAYERS as usize;
    let limit = n_slots * (row_bytes + SLOT_OVERHEAD_BYTES);
    // All blocks have the same image: only offsets inside a block differ.
    let area = layout.block_bytes() as u64 * 128;
    let mut cache = RowCache::new((layout, seal.clone()), Policy::Clock, 128, area, limit)?;
    for block in 0..128 {
        cache.attach(block, layout.block_bytes() as u64 * u64::from(block), 9)?;
    }
    let mut buffer = [0; READ_PAGES_MAX as usize * PAGE_BYTES];
    let mut select = |layer| {
        let mut tokens: Vec<u32> = random.choose_multiple(0..8192, K);
        tokens.sort_unstable();
        tokens.iter().map(|token| RowKey { block: token / 64, layer, token: token % 64 }).collect::<Vec<_>>()
    };
    let mut lookup = Lookup::with_capacity(K);
    let [mut encoded, mut missing, mut pages, mut present] = [const { Vec::new() }; 4];
    for _ in 0..RUNS {
        let start = cpu_ns();
        layout.encode_block(seal, &plane, 9, &mut image)?;
        encoded.push((cpu_ns() - start) / f64::from(layout.block_pages()));
        let [mut plan_ns, mut admit_ns, mut present_ns] = [0.0; 3];
        let before = cache.counters();
        for layer in 0..LAYERS {
            let keys = select(layer);
            let start = cpu_ns();
            cache.lookup(&keys, &mut lookup)?;
            let planned = cpu_ns();
            for at in 0..lookup.reads().len() {
                let read = lookup.reads()[at];
                let inside = usize::try_from(read.offset)? % layout.block_bytes();
                // As a read does, and counted with it.
                let bytes = &mut buffer[..read.len_bytes()];
                bytes.copy_from_slice(&image[inside..inside + read.len_bytes()]);
                cache.admit(&mut lookup, at, bytes)?;
            }
            let admitted = cpu_ns();
            cache.release();
            cache.lookup(&keys, &mut lookup)?;
            present_ns += cpu_ns() - admitted;
            admit_ns += admitted - planned;
            plan_ns += planned - start;
            cache.release();
        }
        let now = cache.counters();
        missing.push(plan_ns / (now.misses - before.misses) as f64);
        pages.push(admit_ns / (now.pages - before.pages) as f64);
        present.push(present_ns / (K * LAYERS as usize) as f64);
    }
    println!("  {} rows a page, {n_slots} slots", layout.rows_per_page());
    println!("  lookup of a present row  {:6.1} ns", median(present));
    println!("  lookup of a missing row  {:6.1} ns", median(missing));
    println!("  admission of a page      {:6.0} ns", median(pages));
    println!("  encoding of a page       {:6.0} ns", median(encoded));
    Ok(())
}

/// Bytes per second and reads per second of each method.
fn read_rates(folder: &Path, file_bytes: usize) -> Result<()> {
    let path = folder.join("sparsed-slow-tier.tmp");
    let mut file = File::create(&path)?;
    let mut random = Rng::with_seed(2);
    let chunk: Vec<u8> = (0..1 << 20).map(|_| random.u8(..)).collect();
    for _ in 0..file_bytes >> 20 {
        file.write_all(&chunk)?;
    }
    file.sync_all()?;
    let flags = rustix::fs::OFlags::DIRECT.bits().cast_signed();
    let direct = File::options().read(true).custom_flags(flags).open(&path);
    println!(
        "{}: {} MiB, {}",
        folder.display(),
        file_bytes >> 20,
        if direct.is_ok() { "O_DIRECT" } else { "buffered" }
    );
    let file = direct.or_else(|_| File::open(&path))?;
    std::fs::remove_file(&path)?;
    // The first is what a decoded token of 30 layers misses with twice the selected rows cached: a list per layer.
    for (what, n_pages, n_reads, n_lists) in
        [("30 x 12 x 4 KiB", 1, 12, 30), ("2048 x 4 KiB", 1, 2048, 1), ("256 x 64 KiB", 16, 256, 1)]
    {
        let mut list = |_: usize| {
            let slots = file_bytes / PAGE_BYTES / n_pages as usize;
            let mut firsts: Vec<usize> = random.choose_multiple(0..slots, n_reads);
            firsts.sort_unstable();
            let read = |first| Read { block: 0, offset: (first * n_pages as usize * PAGE_BYTES) as u64, n_pages };
            firsts.into_iter().map(read).collect::<Vec<_>>()
        };
        let runs: Vec<Vec<Vec<Read>>> = (0..RUNS).map(|_| (0..n_lists).map(&mut list).collect()).collect();
        println!("{what}, random, each list sorted: ms in all, MB/s, CPU of the process per read");
        let rings = [1, 4, 8, 16, 32, 64, 128].map(|depth| Method::Uring { depth });
        let threads = [1, 2, 4, 8, 16, 32].map(|n_threads| Method::Threads { n_threads });
        for method in rings.into_iter().chain(threads) {
            let mut reader = match Reader::by(method, file.try_clone()?, 0) {
                Ok(reader) => reader,
                Err(error) => {
                    println!("  {method:?}: {error}");
                    continue;
                }
            };
            let (mut seconds, mut cpu) = (Vec::new(), Vec::new());
            for lists in &runs {
                let (start, start_cpu) = (Instant::now(), clock_ns(ClockId::ProcessCPUTime));
                for list in lists {
                    reader.read(list, |_, _| Ok::<(), ReadError>(()))?;
                }
                seconds.push(start.elapsed().as_secs_f64());
                cpu.push((clock_ns(ClockId::ProcessCPUTime) - start_cpu) / (n_lists * n_reads) as f64);
            }
            let (seconds, bytes) = (median(seconds), n_lists * n_reads * n_pages as usize * PAGE_BYTES);
            let (all_ms, rate, cpu_us) = (seconds * 1e3, bytes as f64 / seconds / 1e6, median(cpu) / 1e3);
            println!("  {:<26} {all_ms:7.1} {rate:7.0} {cpu_us:6.1} us", format!("{method:?}"));
        }
    }
    Ok(())
}
