//! IQ4_XS: 256 values as f16 scale d, 8 scales of 6 bits and nibbles; value = d (s - 32) T[q], T that of IQ4_NL.
//!
//! Bytes: d; 2 with the upper two bits of the scales; 4 with their lower nibbles; 8 times 16 of nibbles as in IQ4_NL.

use crate::iq4_nl::levels;
use half::f16;

pub(crate) fn decode(block: &[u8; 136], values: &mut [f32; 256]) {
    let d = f16::from_le_bytes([block[0], block[1]]).to_f32();
    let high = u16::from_le_bytes([block[2], block[3]]);
    for (j, (values, nibbles)) in values.chunks_exact_mut(32).zip(block[8..].chunks_exact(16)).enumerate() {
        let low = block[4 + j / 2] >> (4 * (j % 2)) & 15;
        let scale = u16::from(low) | (high >> (2 * j) & 3) << 4;
        levels(d * (f32::from(scale) - 32.0), nibbles, values);
    }
}
