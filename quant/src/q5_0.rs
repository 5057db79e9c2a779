//! Q5_0: 32 values as f16 scale d, 4 bytes of fifth bits and 16 of nibbles, the low ones first; value = d (q - 16).

use crate::block;
use half::f16;

pub(crate) fn decode(block: &[u8; 22], values: &mut [f32; 32]) {
    let d = f16::from_le_bytes([block[0], block[1]]).to_f32();
    let mut codes = [0; 32];
    unpack(&block[2..], &mut codes);
    for (value, q) in values.iter_mut().zip(codes) {
        *value = f32::from(q.cast_signed() - 16) * d;
    }
}

pub(crate) fn encode(values: &[f32; 32], block: &mut [u8; 22]) {
    let fit = block::symmetric(values, 16);
    block[..2].copy_from_slice(&fit.d.to_le_bytes());
    pack(&fit.codes, &mut block[2..]);
}

/// 32 codes of 5 bits from 4 bytes of fifth bits (bit i: element i) and 16 bytes of nibbles; Q5_1 has the same.
pub(crate) fn unpack(bytes: &[u8], codes: &mut [u8; 32]) {
    let (fifth, nibbles) = bytes.split_at(4);
    for (i, code) in codes.iter_mut().enumerate() {
        let nibble = if i < 16 { nibbles[i] & 15 } else { nibbles[i - 16] >> 4 };
        *code = nibble | (fifth[i / 8] >> (i % 8) & 1) << 4;
    }
}

/// The inverse of [`unpack`].
pub(crate) fn pack(codes: &[u8; 32], bytes: &mut [u8]) {
    let (fifth, nibbles) = bytes.split_at_mut(4);
    fifth.fill(0);
    for i in 0..16 {
        nibbles[i] = codes[i] & 15 | (codes[i + 16] & 15) << 4;
    }
    for (i, code) in codes.iter().enumerate() {
        fifth[i / 8] |= (code >> 4) << (i % 8);
    }
}
