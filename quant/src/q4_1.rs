//! Q4_1: 32 values as f16 scale d, f16 minimum m and 16 bytes of nibbles, the low ones first; value = d q + m.

use crate::block;
use half::f16;

pub(crate) fn decode(block: &[u8; 20], values: &mut [f32; 32]) {
    let d = f16::from_le_bytes([block[0], block[1]]).to_f32();
    let m = f16::from_le_bytes([block[2], block[3]]).to_f32();
    let (low, high) = values.split_at_mut(16);
    for ((low, high), byte) in low.iter_mut().zip(high).zip(&block[4..]) {
        *low = f32::from(byte & 15) * d + m;
        *high = f32::from(byte >> 4) * d + m;
    }
}

pub(crate) fn encode(values: &[f32; 32], block: &mut [u8; 20]) {
    let fit = block::affine(values, 15);
    block[..2].copy_from_slice(&fit.d.to_le_bytes());
    block[2..4].copy_from_slice(&fit.m.to_le_bytes());
    for (i, byte) in block[4..].iter_mut().enumerate() {
        *byte = fit.codes[i] | fit.codes[i + 16] << 4;
    }
}
