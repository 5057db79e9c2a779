//! Q5_1: 32 values as f16 scale d, f16 minimum m, then fifth bits and nibbles as in Q5_0; value = d q + m.

use crate::block;
use crate::q5_0::{pack, unpack};
use half::f16;

pub(crate) fn decode(block: &[u8; 24], values: &mut [f32; 32]) {
    let d = f16::from_le_bytes([block[0], block[1]]).to_f32();
    let m = f16::from_le_bytes([block[2], block[3]]).to_f32();
    let mut codes = [0; 32];
    unpack(&block[4..], &mut codes);
    for (value, q) in values.iter_mut().zip(codes) {
        *value = f32::from(q) * d + m;
    }
}

pub(crate) fn encode(values: &[f32; 32], block: &mut [u8; 24]) {
    let fit = block::affine(values, 31);
    block[..2].copy_from_slice(&fit.d.to_le_bytes());
    block[2..4].copy_from_slice(&fit.m.to_le_bytes());
    pack(&fit.codes, &mut block[4..]);
}
