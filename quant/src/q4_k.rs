//! Q4_K: 256 values in 8 sub-blocks of 32; value = d s q - dmin m, q of 4 bits, s and m of 6.
//!
//! Bytes: d; dmin; 12 of scales and minimums (see [`scale_and_minimum`]); 128 of codes: of each 32 bytes the low
//! nibbles are one sub-block, the high nibbles the next.

use crate::affine::{self, Fit};
use half::f16;

/// How ggml searches a sub-block: inverse scales of (15 + first + i / 10) / range, i = 0 ..= steps.
const SEARCH: affine::Search = affine::Search { code_max: 15, first: -1.0, steps: 20 };

pub(crate) fn decode(block: &[u8; 144], values: &mut [f32; 256]) {
    let d = f16::from_le_bytes([block[0], block[1]]).to_f32();
    let dmin = f16::from_le_bytes([block[2], block[3]]).to_f32();
    for (j, values) in values.chunks_exact_mut(32).enumerate() {
        let (s, m) = scale_and_minimum(&block[4..16], j);
        let (scale, minimum) = (d * f32::from(s), dmin * f32::from(m));
        for (value, byte) in values.iter_mut().zip(&block[16 + j / 2 * 32..]) {
            *value = scale * f32::from(byte >> (j % 2 * 4) & 15) - minimum;
        }
    }
}

pub(crate) fn encode(values: &[f32; 256], block: &mut [u8; 144]) {
    let fit = affine::fit(values, &SEARCH);
    put_head(&fit, block);
    for (i, byte) in block[16..].iter_mut().enumerate() {
        let low = i / 32 * 64 + i % 32;
        *byte = fit.codes[low] | fit.codes[low + 32] << 4;
    }
}

/// Scale and minimum of sub-block `j`, 6 bits each, from the 12 bytes; Q5_K has the same. For j < 4 they are the low
/// bits of bytes j and j + 4; for the others byte j + 4 holds both low nibbles, and the upper bits fill bytes j - 4, j.
pub(crate) fn scale_and_minimum(bytes: &[u8], j: usize) -> (u8, u8) {
    if j < 4 {
        (bytes[j] & 63, bytes[j + 4] & 63)
    } else {
        (bytes[j + 4] & 15 | bytes[j - 4] >> 6 << 4, bytes[j + 4] >> 4 | bytes[j] >> 6 << 4)
    }
}

/// The first 16 bytes of a block: d, dmin, and the inverse of [`scale_and_minimum`].
pub(crate) fn put_head(fit: &Fit, block: &mut [u8]) {
    block[..2].copy_from_slice(&fit.d.to_le_bytes());
    block[2..4].copy_from_slice(&fit.dmin.to_le_bytes());
    let (s, m, bytes) = (&fit.scales, &fit.minimums, &mut block[4..16]);
    for j in 0..4 {
        bytes[j] = s[j] | s[j + 4] >> 4 << 6;
        bytes[j + 4] = m[j] | m[j + 4] >> 4 << 6;
        bytes[j + 8] = s[j + 4] & 15 | (m[j + 4] & 15) << 4;
    }
}
