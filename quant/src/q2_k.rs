//! Q2_K: 256 values in 16 sub-blocks of 16; value = d s q - dmin m, q of 2 bits, s and m of 4.
//!
//! Bytes: 16 with s in the low and m in the high nibble; 64 of codes; d; dmin. Each half of 128 values has 32 bytes of
//! codes: bits 2k of byte l belong to value 32k + l of the half.

use half::f16;

pub(crate) fn decode(block: &[u8; 84], values: &mut [f32; 256]) {
    let d = f16::from_le_bytes([block[80], block[81]]).to_f32();
    let dmin = f16::from_le_bytes([block[82], block[83]]).to_f32();
    for (j, values) in values.chunks_exact_mut(16).enumerate() {
        let (scale, minimum) = (d * f32::from(block[j] & 15), dmin * f32::from(block[j] >> 4));
        for (value, q) in values.iter_mut().zip(&block[16 + first_byte(j)..]) {
            *value = scale * f32::from(q >> shift(j) & 3) - minimum;
        }
    }
}

/// Where the codes of sub-block `j` begin among the 64 bytes of 2-bit codes; Q3_K has the same.
pub(crate) const fn first_byte(j: usize) -> usize {
    j / 8 * 32 + j % 2 * 16
}

/// How far they are shifted in their bytes.
pub(crate) const fn shift(j: usize) -> usize {
    j % 8 / 2 * 2
}
