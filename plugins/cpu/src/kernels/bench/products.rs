//! Products of bytes: weights with activations, index keys with queries.

use super::{Found, byte_products, encoded, in_memory, measure, reads};
use crate::kernels::activations::{BLOCK, Block, Rounding, round_row};
use crate::kernels::inputs::Values;
use crate::kernels::packed::{
    KeyTiles, NIBBLES, Sums, TILE_ROWS, TOKENS_MAX, pack_tile, product, score_keys, tile_bytes, tokens_at_once,
};
use crate::level::Level;
use fastrand::Rng;
use sparsed_quant::Format;
use std::hint::black_box;

const FORMATS: [Format; 8] =
    [Format::Q4_0, Format::Q4_1, Format::Q5_0, Format::Q5_1, Format::Q8_0, Format::Q4_K, Format::Q5_K, Format::Q6_K];

/// A row's values: the activations of eight tokens stay in a core's first cache.
const COLUMNS: usize = 768;
/// A weight of so many tiles is in the second cache.
const TILES: usize = 24;
/// Of a weight in memory.
const BYTES: usize = 96 << 20;

fn rounded(level: Level, rounding: Rounding, tokens: usize, columns: usize) -> Vec<Block> {
    let mut values = Values::seeded(2).rows();
    let mut x = vec![Block::default(); tokens * columns / BLOCK];
    for t in 0..tokens {
        round_row(level, rounding, &values(columns), &mut x[t..], tokens);
    }
    x
}

fn planes(rounding: Rounding) -> usize {
    if rounding == Rounding::Int8 { 1 } else { 2 }
}

fn tile(format: Format) -> Vec<u8> {
    let rows = encoded(format, COLUMNS, TILE_ROWS);
    let mut tile = vec![0; tile_bytes(format, COLUMNS)];
    pack_tile(format, COLUMNS, |r| Some(&rows[r]), &mut tile);
    tile
}

/// `packed::product` of each format.
pub(super) fn all(level: Level) -> Vec<Found> {
    let mut found = Vec::new();
    for format in FORMATS {
        let tile = tile(format);
        let near = tile.repeat(TILES);
        for (rounding, wanted) in [(Rounding::Int16, 1), (Rounding::Int16, 8), (Rounding::Int8, 1), (Rounding::Int8, 8)]
        {
            let tokens = tokens_at_once(level, rounding, wanted);
            let (x, mut sums) = (rounded(level, rounding, tokens, COLUMNS), vec![Sums::default(); tokens]);
            let units = TILES * COLUMNS / 8 * tokens * planes(rounding);
            let measured = measure(units, byte_products(level, format != Format::Q8_0), || {
                for tile in near.chunks_exact(tile.len()) {
                    product(level, format, rounding, tile, &x, &mut sums);
                    black_box(&sums);
                }
            });
            let many = if wanted == 1 { "1 token" } else { "all tokens that go together" };
            found.push((format!("{}, {rounding:?}, {many}, weight in L2", format.name()), measured));
        }
        let far = in_memory(&tile, BYTES);
        let (x, mut sums) = (rounded(level, Rounding::Int16, 1, COLUMNS), [Sums::default()]);
        let measured = measure(far.len() / 64, reads(level, &far), || {
            for tile in far.chunks_exact(tile.len()) {
                product(level, format, Rounding::Int16, tile, &x, &mut sums);
                black_box(&sums);
            }
        });
        found.push((format!("{}, Int16, 1 token, weight in memory", format.name()), measured));
    }
    found.extend([1, 2, 8].map(|tokens| experts(level, tokens)));
    found
}

/// As MOE_LINEAR: weights of many experts in memory, each read for the few of 256 tokens that go to it, whose blocks
/// are put beside each other before.
fn experts(level: Level, tokens: usize) -> Found {
    const EXPERTS: usize = 64;
    const BATCH: usize = 256;
    const HALF_CACHE: usize = 512 << 10;
    let tile = tile(Format::Q4_K);
    let experts = in_memory(&tile, BYTES);
    let (x, mut random) = (rounded(level, Rounding::Int16, BATCH, COLUMNS), Rng::with_seed(11));
    let lists: Vec<Vec<usize>> = (0..EXPERTS).map(|_| (0..tokens).map(|_| random.usize(..BATCH)).collect()).collect();
    let tiles = experts.len() / tile.len() / EXPERTS;
    let (mut beside, mut sums) = (Vec::new(), [Sums::default(); TOKENS_MAX]);
    let (units, limit, what) = match tokens {
        1 => (experts.len() / 64, reads(level, &experts), "reads"),
        _ => (EXPERTS * tiles * COLUMNS / 8 * tokens * planes(Rounding::Int16), byte_products(level, true), "products"),
    };
    let measured = measure(units, limit, || {
        let expert = |(expert, list)| {
            let parts = <[u8]>::chunks(expert, HALF_CACHE / tile.len() * tile.len());
            parts.map(move |part| (part, list))
        };
        for (part, list) in experts.chunks_exact(tiles * tile.len()).zip(&lists).flat_map(expert) {
            let mut list = &list[..];
            while !list.is_empty() {
                let now;
                (now, list) = list.split_at(tokens_at_once(level, Rounding::Int16, list.len()));
                beside.clear();
                let blocks = (0..COLUMNS / BLOCK).flat_map(|block| now.iter().map(move |token| block * BATCH + token));
                beside.extend(blocks.map(|block| x[block]));
                for tile in part.chunks_exact(tile.len()) {
                    product(level, Format::Q4_K, Rounding::Int16, tile, &beside, &mut sums[..now.len()]);
                    black_box(&sums);
                }
            }
        }
    });
    (format!("Q4_K, Int16, {EXPERTS} experts in memory, {tokens} of the tokens each, beside {what}"), measured)
}

/// `packed::score_keys` of 64 keys.
pub(super) fn keys(level: Level) -> Vec<Found> {
    const N_TILES: usize = 4;
    let mut found = Vec::new();
    for (wanted, width) in [(8, 128), (4, 64)] {
        for (format, codes) in [(Format::Q8_0, BLOCK), (Format::Q4_0, NIBBLES)] {
            let rows = encoded(format, width, TILE_ROWS);
            let mut tile = vec![0; tile_bytes(format, width)];
            pack_tile(format, width, |r| Some(&rows[r]), &mut tile);
            let tiles = tile.repeat(N_TILES);
            for rounding in [Rounding::Int16, Rounding::Int8] {
                // As `execute/select.rs` groups them, whatever the rounding.
                let heads = tokens_at_once(level, Rounding::Int16, wanted);
                let (x, w) = (rounded(level, rounding, heads, width), vec![1.0; heads]);
                let mut scores = [Sums::default(); N_TILES];
                let units = wanted * width / 8 * N_TILES * planes(rounding);
                let measured = measure(units, byte_products(level, codes == NIBBLES), || {
                    for _ in 0..wanted / heads {
                        let keys = KeyTiles { codes, tiles: &tiles, ahead: &[] };
                        score_keys(level, rounding, keys, &x, &w, &mut scores);
                        black_box(&scores);
                    }
                });
                let name = format!("{wanted} heads of {width}, keys in {}, {rounding:?}", format.name());
                found.push((name, measured));
            }
        }
    }
    found
}
