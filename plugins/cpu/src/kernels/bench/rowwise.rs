//! What is done to a row: norms, SiLU, rounding, how it is stored, the best of many scores.

use super::{Found, copies, divisions, encoded, float_products, measure, reads};
use crate::kernels::activations::{BLOCK, Block, Rounding, round_row};
use crate::kernels::dot::dots;
use crate::kernels::elementwise::silu_mul;
use crate::kernels::inputs::Values;
use crate::kernels::norm::rms;
use crate::kernels::rows::{encode, hadamard, rope};
use crate::kernels::select::{Scratch, top_k};
use crate::level::Level;
use crate::memory::Pool;
use crate::simd::LANES;
use sparsed_abi::{DT_F16, DT_Q4_0, DT_Q8_0, SpdKvDesc, SpdRow};
use sparsed_plugin_kit::Usage;
use sparsed_quant::Format;
use std::hint::black_box;
use std::sync::Arc;

/// Values of a row of the base model, of its hidden layer, and of a row of DeepSeek-V3.2's cache.
const WIDTH: usize = 576;
const HIDDEN: usize = 1536;

fn floats(level: Level, found: &mut Vec<Found>) {
    let mut values = Values::seeded(5).rows();
    let (x, gain, mut y) = (values(WIDTH), values(WIDTH), vec![0.0; WIDTH]);
    let lines = WIDTH / LANES;
    let measured = measure(lines, copies(level, lines), || {
        rms(level, black_box(&x), &gain, 1e-5, &mut y);
    });
    found.push((format!("rms, {WIDTH} values, beside copies"), measured));
    let mut blocks = vec![Block::default(); WIDTH / BLOCK];
    let measured = measure(lines, copies(level, lines), || {
        round_row(level, Rounding::Int16, black_box(&x), &mut blocks, 1);
    });
    found.push((format!("round_row, {WIDTH} values, beside copies"), measured));
    let (gate, up, mut y) = (values(HIDDEN), values(HIDDEN), vec![0.0; HIDDEN]);
    let measured = measure(HIDDEN / LANES, divisions(level), || {
        silu_mul(level, black_box(&gate), &up, &mut y);
    });
    found.push((format!("silu_mul, {HIDDEN} values, beside divisions"), measured));
    let scores = values(32768);
    let bytes: Vec<u8> = scores.iter().flat_map(|score| score.to_le_bytes()).collect();
    let (mut scratch, mut selected) = (Scratch::default(), vec![0; 512]);
    let measured = measure(bytes.len() / 64, reads(level, &bytes), || {
        top_k(level, black_box(&scores), &mut scratch, &mut selected);
    });
    found.push(("top_k, 512 of 32768, beside reads".to_owned(), measured));
}

/// One row of a weight in f32 against as many rows as go together; heads' slices that are rotated.
fn products(level: Level, found: &mut Vec<Found>) {
    const ROWS: usize = 4;
    const HEAD: usize = 64;
    let mut values = Values::seeded(7).rows();
    let (w, x, mut out) = (values(WIDTH), values(ROWS * WIDTH), [0.0; ROWS]);
    let rows: Vec<&[f32]> = x.chunks_exact(WIDTH).collect();
    let measured = measure(ROWS * WIDTH / LANES, float_products(level), || dots(level, black_box(&w), &rows, &mut out));
    found.push((format!("dots, {ROWS} rows of {WIDTH} values"), measured));
    let (head, key, angles) = (values(HEAD), values(2 * HEAD), values(HEAD));
    let (mut y, mut rotated) = (vec![0.0; HEAD], vec![0.0; 2 * HEAD]);
    for (half_split, layout) in [(false, "interleaved"), (true, "half-split")] {
        let lines = HEAD / LANES;
        let measured = measure(lines, copies(level, lines), || rope(black_box(&head), &angles, 0, half_split, &mut y));
        found.push((format!("rope, {HEAD} values, {layout}, beside copies"), measured));
    }
    let lines = 2 * HEAD / LANES;
    let measured = measure(lines, copies(level, lines), || hadamard(black_box(&key), &mut rotated));
    found.push((format!("hadamard, {} values, beside copies", 2 * HEAD), measured));
}

fn stored(level: Level, found: &mut Vec<Found>) {
    let values = Values::seeded(6).rows()(WIDTH);
    let lines = WIDTH / LANES;
    for format in [Format::W16, Format::F16, Format::Q8_0, Format::F8_128, Format::Q6_0] {
        let mut bytes = vec![0; format.row_bytes(WIDTH).unwrap()];
        let measured = measure(lines, copies(level, lines), || {
            encode(level, format, black_box(&values), &mut bytes);
        });
        found.push((format!("encode, {WIDTH} values in {}, beside copies", format.name()), measured));
    }
    for (format, dtype) in [(Format::Q8_0, DT_Q8_0), (Format::Q4_0, DT_Q4_0)] {
        const KEY: usize = 128;
        let desc = SpdKvDesc {
            block_tokens: 64,
            n_blocks: 8,
            n_layers: 1,
            n_index_layers: 1,
            latent: SpdRow { dtype: DT_F16, width: 32 },
            rope: SpdRow { dtype: DT_F16, width: 32 },
            index: SpdRow { dtype, width: KEY as u32 },
            ..SpdKvDesc::default()
        };
        let (pool, keys) =
            (Pool::create(&desc, None, &Arc::new(Usage::default())).unwrap().0, encoded(format, KEY, 64));
        let (mut slot, lines) = (0, KEY / LANES);
        let measured = measure(lines, copies(level, lines), || {
            slot = (slot + 1) % 512;
            // SAFETY: this thread alone has the pool.
            unsafe { pool.put_key(0, slot, &keys[slot % 64]) };
        });
        found.push((format!("put_key, {KEY} values in {}, beside copies", format.name()), measured));
    }
}

pub(super) fn all(level: Level) -> Vec<Found> {
    let mut found = Vec::new();
    floats(level, &mut found);
    products(level, &mut found);
    stored(level, &mut found);
    found
}
