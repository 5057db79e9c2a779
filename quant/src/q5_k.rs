//! Q5_K: 256 values in 8 sub-blocks of 32; value = d s q - dmin m, q of 5 bits, s and m of 6.
//!
//! Bytes: d, dmin, scales and minimums as in Q4_K; 32 with the fifth bits (bit j of byte i: value i of sub-block j);
//! 128 of nibbles as in Q4_K.

use crate::affine;
use crate::q4_k::{put_head, scale_and_minimum};
use half::f16;

const SEARCH: affine::Search = affine::Search { code_max: 31, first: -0.5, steps: 15 };

pub(crate) fn decode(block: &[u8; 176], values: &mut [f32; 256]) {
    let d = f16::from_le_bytes([block[0], block[1]]).to_f32();
    let dmin = f16::from_le_bytes([block[2], block[3]]).to_f32();
    let (fifth, nibbles) = block[16..].split_at(32);
    for (j, values) in values.chunks_exact_mut(32).enumerate() {
        let (s, m) = scale_and_minimum(&block[4..16], j);
        let (scale, minimum) = (d * f32::from(s), dmin * f32::from(m));
        for ((value, byte), fifth) in values.iter_mut().zip(&nibbles[j / 2 * 32..]).zip(fifth) {
            let q = byte >> (j % 2 * 4) & 15 | (fifth >> j & 1) << 4;
            *value = scale * f32::from(q) - minimum;
        }
    }
}

pub(crate) fn encode(values: &[f32; 256], block: &mut [u8; 176]) {
    let fit = affine::fit(values, &SEARCH);
    put_head(&fit, block);
    let (fifth, nibbles) = block[16..].split_at_mut(32);
    for (i, byte) in nibbles.iter_mut().enumerate() {
        let low = i / 32 * 64 + i % 32;
        *byte = fit.codes[low] & 15 | (fit.codes[low + 32] & 15) << 4;
    }
    fifth.fill(0);
    for (i, code) in fit.codes.iter().enumerate() {
        fifth[i % 32] |= (code >> 4) << (i / 32);
    }
}
