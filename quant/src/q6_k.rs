//! Q6_K: 256 values in 16 sub-blocks of 16; value = d s (q - 32), q of 6 bits, s int8.
//!
//! Bytes: 128 of lower nibbles; 64 of upper two bits; 16 scales; d. Each half of 128 values has 64 bytes of nibbles and
//! 32 of upper bits: value 32k + l of the half has its nibble in byte l (k even) or l + 32 (k odd), the low one for
//! k < 2, and bits 2k of upper byte l.

use crate::symmetric;
use half::f16;

pub(crate) fn decode(block: &[u8; 210], values: &mut [f32; 256]) {
    let d = f16::from_le_bytes([block[208], block[209]]).to_f32();
    for (i, value) in values.iter_mut().enumerate() {
        let place = Place::of(i);
        let q = block[place.nibble] >> place.nibble_shift & 15 | (block[place.upper] >> place.upper_shift & 3) << 4;
        let scale = d * f32::from(block[192 + i / 16].cast_signed());
        *value = scale * f32::from(q.cast_signed() - 32);
    }
}

pub(crate) fn encode(values: &[f32; 256], block: &mut [u8; 210]) {
    let fit = symmetric::fit(values);
    block.fill(0);
    block[208..].copy_from_slice(&fit.d.to_le_bytes());
    for (byte, scale) in block[192..208].iter_mut().zip(fit.scales) {
        *byte = scale.cast_unsigned();
    }
    for (i, code) in fit.codes.iter().enumerate() {
        let (place, q) = (Place::of(i), (code + 32).cast_unsigned());
        block[place.nibble] |= (q & 15) << place.nibble_shift;
        block[place.upper] |= (q >> 4) << place.upper_shift;
    }
}

/// Where the bits of a code lie.
struct Place {
    nibble: usize,
    nibble_shift: usize,
    upper: usize,
    upper_shift: usize,
}

impl Place {
    const fn of(i: usize) -> Self {
        let (half, k, l) = (i / 128, i % 128 / 32, i % 32);
        Self {
            nibble: 64 * half + k % 2 * 32 + l,
            nibble_shift: k / 2 * 4,
            upper: 128 + 32 * half + l,
            upper_shift: 2 * k,
        }
    }
}
