//! IQ4_NL: 32 values as f16 scale d and 16 bytes of nibbles, the low ones first; value = d T[q], T not evenly spaced.

use half::f16;

/// What a code stands for; IQ4_XS has the same table.
pub(crate) const LEVELS: [i8; 16] = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];

pub(crate) fn decode(block: &[u8; 18], values: &mut [f32; 32]) {
    levels(f16::from_le_bytes([block[0], block[1]]).to_f32(), &block[2..], values);
}

/// 32 values `d T[q]` from 16 bytes of nibbles.
pub(crate) fn levels(d: f32, nibbles: &[u8], values: &mut [f32]) {
    let (low, high) = values.split_at_mut(16);
    for ((low, high), byte) in low.iter_mut().zip(high).zip(nibbles) {
        *low = d * f32::from(LEVELS[usize::from(byte & 15)]);
        *high = d * f32::from(LEVELS[usize::from(byte >> 4)]);
    }
}
