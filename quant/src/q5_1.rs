//! Q5_1: 32 values as f16 scale d, f16 minimum m, then fifth bits and nibbles as in Q5_0; value = d q + m.

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
    let (min, max) = values.iter().fold((f32::MAX, f32::MIN), |(lo, hi), v| (lo.min(*v), hi.max(*v)));
    let d = (max - min) / 31.0;
    let inverse = if d == 0.0 { 0.0 } else { 1.0 / d };
    block[..2].copy_from_slice(&f16::from_f32(d).to_le_bytes());
    block[2..4].copy_from_slice(&f16::from_f32(min).to_le_bytes());
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "truncation is ggml's rounding here")]
    let codes = values.map(|value| (((value - min) * inverse + 0.5) as u8).min(31));
    pack(&codes, &mut block[4..]);
}
