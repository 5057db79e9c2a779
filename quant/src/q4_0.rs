//! Q4_0: 32 values as f16 scale d and 16 bytes of nibbles, the low ones first; value = d (q - 8).

use crate::block::{self, Fit};
use half::f16;

pub(crate) fn decode(block: &[u8; 18], values: &mut [f32; 32]) {
    let d = f16::from_le_bytes([block[0], block[1]]).to_f32();
    let (low, high) = values.split_at_mut(16);
    for ((low, high), byte) in low.iter_mut().zip(high).zip(&block[2..]) {
        *low = f32::from((byte & 15).cast_signed() - 8) * d;
        *high = f32::from((byte >> 4).cast_signed() - 8) * d;
    }
}

pub(crate) fn encode(values: &[f32; 32], block: &mut [u8; 18]) {
    pack(&block::symmetric(values, 8), block);
}

/// To ggml's own bits, without a search.
pub(crate) fn encode_plain(values: &[f32; 32], block: &mut [u8; 18]) {
    pack(&block::plain(values, 8), block);
}

fn pack(fit: &Fit, block: &mut [u8; 18]) {
    block[..2].copy_from_slice(&fit.d.to_le_bytes());
    for (i, byte) in block[2..].iter_mut().enumerate() {
        *byte = fit.codes[i] | fit.codes[i + 16] << 4;
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn codes_sit_where_ggml_puts_them() {
        let mut block = [0u8; 18];
        block[..2].copy_from_slice(&half::f16::from_f32(0.5).to_le_bytes());
        block[2] = 0xf0; // element 0 has code 0, element 16 code 15
        let mut values = [0.0; 32];
        super::decode(&block, &mut values);
        assert_eq!((values[0], values[16], values[1]), (-4.0, 3.5, -4.0));
    }
}
