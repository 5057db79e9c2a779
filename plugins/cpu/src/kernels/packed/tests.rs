//! Every format at every level against the encoder's own decoder in f64.

use super::*;
use crate::kernels::activations::{BLOCK, round_row};
use proptest::prelude::*;

const FORMATS: [Format; 8] =
    [Format::Q8_0, Format::Q4_0, Format::Q4_1, Format::Q5_0, Format::Q5_1, Format::Q4_K, Format::Q5_K, Format::Q6_K];

/// A packed tile of 15 rows (the last is missing), and its rows decoded.
fn weight(format: Format, blocks: usize, seed: &[f32]) -> (Vec<u8>, Vec<Vec<f32>>) {
    let cols = blocks * BLOCK;
    let (mut encoded, mut decoded) = (Vec::new(), Vec::new());
    for r in 0..TILE_ROWS - 1 {
        let row: Vec<f32> = (0..cols).map(|i| seed[(i * 7 + r * 13) % seed.len()] * (1.0 + r as f32)).collect();
        let mut bytes = vec![0; format.row_bytes(cols).unwrap()];
        sparsed_quant::encode(format, &row, &mut bytes).unwrap();
        let mut back = vec![0.0; cols];
        sparsed_quant::decode(format, &bytes, &mut back).unwrap();
        encoded.push(bytes);
        decoded.push(back);
    }
    let mut tile = vec![0xff; tile_bytes(format, cols)];
    pack_tile(format, cols, |r| encoded.get(r).map(|row| &row[..]), &mut tile);
    (tile, decoded)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn levels_and_token_counts_agree_bit_for_bit_and_are_close_to_f64(
        blocks in 1usize..6, seed in proptest::collection::vec(-1f32..1.0, 50..150), n in 1usize..=TOKENS_MAX,
    ) {
        for (number, format) in FORMATS.into_iter().enumerate() {
            let blocks = blocks * (format.block_values() / BLOCK);
            let (tile, decoded) = weight(format, blocks, &seed);
            // Either rounding with every format in turn.
            let (rounding, close) =
                if (number + n).is_multiple_of(2) { (Rounding::Int16, 2e-4) } else { (Rounding::Int8, 3e-2) };
            let tokens: Vec<Vec<f32>> = (0..n)
                .map(|t| (0..blocks * BLOCK).map(|i| seed[(i * 3 + t * 5) % seed.len()] * 4.0).collect())
                .collect();
            let alone = |level, token: &[f32]| {
                let (mut x, mut sums) = (vec![Block::default(); blocks], [[0.0; TILE_ROWS]]);
                round_row(level, rounding, token, &mut x, 1);
                product(level, format, rounding, &tile, &x, &mut sums);
                sums[0]
            };
            for token in &tokens {
                let scalar = alone(Level::Scalar, token);
                for (row, found) in decoded.iter().zip(scalar) {
                    let exact: f64 = row.iter().zip(token).map(|(w, x)| f64::from(*w) * f64::from(*x)).sum();
                    let size: f64 = row.iter().zip(token).map(|(w, x)| f64::from(*w * x).abs()).sum();
                    prop_assert!((f64::from(found) - exact).abs() <= close * size + 1e-30, "{found} {exact}");
                }
                prop_assert_eq!(scalar[TILE_ROWS - 1], 0.0);
            }
            for level in Level::all() {
                let together = tokens_at_once(level, rounding, n);
                let mut x = vec![Block::default(); blocks * together];
                for (t, token) in tokens[..together].iter().enumerate() {
                    round_row(level, rounding, token, &mut x[t..], together);
                }
                let mut sums = vec![[0.0; TILE_ROWS]; together];
                product(level, format, rounding, &tile, &x, &mut sums);
                for (token, sums) in tokens.iter().zip(&sums) {
                    prop_assert_eq!(alone(Level::Scalar, token).map(f32::to_bits), sums.map(f32::to_bits));
                }
            }
        }
    }
}

proptest! {
    #[test]
    fn key_scores_are_the_same_at_every_level_and_close_to_f64(
        seed in proptest::collection::vec(-1f32..1.0, 50..150), blocks in 1usize..5, wanted in 1usize..=8,
        (format, rounding) in prop_oneof![
            Just((Format::Q8_0, Rounding::Int16)), Just((Format::Q4_0, Rounding::Int16)),
            Just((Format::Q8_0, Rounding::Int8)), Just((Format::Q4_0, Rounding::Int8)),
        ],
    ) {
        let width = blocks * BLOCK;
        let value = |i: usize| seed[i % seed.len()];
        let keys: Vec<Vec<f32>> = (0..TILE_ROWS).map(|r| (0..width).map(|i| value(i * 7 + r * 13)).collect()).collect();
        let mut rows = vec![vec![0; format.row_bytes(width).unwrap()]; TILE_ROWS];
        let mut stored = vec![vec![0.0; width]; TILE_ROWS];
        for ((row, key), stored) in rows.iter_mut().zip(&keys).zip(&mut stored) {
            sparsed_quant::encode_row(format, key, row).unwrap();
            sparsed_quant::decode(format, row, stored).unwrap();
        }
        let mut tile = vec![0; tile_bytes(format, width)];
        pack_tile(format, width, |lane| Some(&rows[lane]), &mut tile);
        let codes = if format == Format::Q8_0 { BLOCK } else { NIBBLES };
        if format == Format::Q8_0 {
            // A weight's codes have an offset, a key's have not.
            for block in tile.chunks_exact_mut(TILE_ROWS * (codes + 2)) {
                block[..TILE_ROWS * codes].iter_mut().for_each(|code| *code ^= 0x80);
            }
        }
        // No more than OPS.md's class T allows.
        let allowed = if rounding == Rounding::Int8 { 5e-3 } else { 4e-5 };
        let mut scalar = None;
        for level in Level::all() {
            let heads = [8, 4, 2, 1].into_iter().find(|&n| n <= wanted && is_compiled(n, 2)).unwrap();
            let mut x = vec![Block::default(); heads * blocks];
            let (mut exact, mut size) = ([0f64; TILE_ROWS], [0f64; TILE_ROWS]);
            let w: Vec<f32> = (0..heads).map(|h| value(h * 11)).collect();
            for (h, w) in w.iter().enumerate() {
                let q: Vec<f32> = (0..width).map(|i| value(i * 3 + h * 5)).collect();
                round_row(level, rounding, &q, &mut x[h..], heads);
                for (lane, key) in stored.iter().enumerate() {
                    let product: f64 = q.iter().zip(key).map(|(q, k)| f64::from(*q) * f64::from(*k)).sum();
                    exact[lane] += f64::from(*w) * product.max(0.0);
                    let length = |v: &[f32]| v.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>().sqrt();
                    size[lane] += length(&q) * length(key) * f64::from(w.abs());
                }
            }
            let mut twice = [Sums::default(); 2];
            let tiles = [&tile[..], &tile].concat();
            let keys = KeyTiles { codes, tiles: &tiles, ahead: &tile[..64] };
            score_keys(level, rounding, keys, &x, &w, &mut twice);
            prop_assert_eq!(twice[0].map(f32::to_bits), twice[1].map(f32::to_bits));
            let found = twice[0];
            for ((found, exact), size) in found.iter().zip(exact).zip(size) {
                prop_assert!((f64::from(*found) - exact).abs() <= allowed * size + 1e-6, "{found} {exact}");
            }
            let bits = found.map(f32::to_bits);
            prop_assert_eq!(*scalar.get_or_insert(bits), bits);
        }
    }
}
