//! Q3_K: 256 values in 16 sub-blocks of 16; value = d (s - 32) (q - 4), q of 3 bits, s of 6.
//!
//! Bytes: 32 with the third bits (bit k of byte l: value 32k + l); 64 of the lower two bits, laid out as in Q2_K;
//! 12 of scales; d. Scales: byte j % 8 holds the low nibbles of s[j], low half for j < 8; bytes 8 .. 12 the upper two
//! bits, those of s[j] at bit j / 4 * 2 of byte j % 4.

use crate::q2_k::{first_byte, shift};
use half::f16;

pub(crate) fn decode(block: &[u8; 110], values: &mut [f32; 256]) {
    let (third, rest) = block.split_at(32);
    let (codes, rest) = rest.split_at(64);
    let d = f16::from_le_bytes([rest[12], rest[13]]).to_f32();
    for (j, values) in values.chunks_exact_mut(16).enumerate() {
        let low = rest[j % 8] >> (j / 8 * 4) & 15;
        let scale = low | (rest[8 + j % 4] >> (j / 4 * 2) & 3) << 4;
        let scale = d * f32::from(scale.cast_signed() - 32);
        for (l, value) in values.iter_mut().enumerate() {
            let low = codes[first_byte(j) + l] >> shift(j) & 3;
            let third = third[j % 2 * 16 + l] >> (j / 2) & 1;
            *value = scale * f32::from((low | third << 2).cast_signed() - 4);
        }
    }
}
