//! Q6_0: 32 values as f16 scale d, 8 bytes of two upper bits for four values each and 16 of nibbles, the low ones
//! first; value = d (q - 32). For KV rows. Not in ggml but in ik_llama.cpp, whose layout and bits these are.

use crate::block;
use half::f16;

pub(crate) fn decode(block: &[u8; 26], values: &mut [f32; 32]) {
    let d = f16::from_le_bytes([block[0], block[1]]).to_f32();
    let (upper, nibbles) = block[2..].split_at(8);
    let (low, high) = values.split_at_mut(16);
    for (i, nibble) in nibbles.iter().enumerate() {
        let upper = upper[i % 8] >> (i / 8 * 4);
        let value = |code: u8| f32::from(code.cast_signed() - 32) * d;
        (low[i], high[i]) = (value(nibble & 15 | (upper & 3) << 4), value(nibble >> 4 | (upper & 12) << 2));
    }
}

/// The value of greatest magnitude has code 0; then d is what fits these codes best, errors weighed with the squares of
/// the values.
pub(crate) fn encode(values: &[f32; 32], block: &mut [u8; 26]) {
    let fit = block::plain(values, 32);
    let d = refined(values, &fit.codes).map_or(fit.d, f16::from_f32);
    block[..2].copy_from_slice(&d.to_le_bytes());
    let (upper, nibbles) = block[2..].split_at_mut(8);
    upper.fill(0);
    for (i, nibble) in nibbles.iter_mut().enumerate() {
        let (low, high) = (fit.codes[i], fit.codes[i + 16]);
        *nibble = low & 15 | (high & 15) << 4;
        upper[i % 8] |= (low >> 4 | high >> 4 << 2) << (i / 8 * 4);
    }
}

/// Nothing for zeros and what is nearly that. The order of the sums is that of ik_llama.cpp, to its bits.
fn refined(values: &[f32; 32], codes: &[u8; 32]) -> Option<f32> {
    let inverse = 1.0 / (block::extreme(values) / -32.0);
    let (mut qx, mut qq) = (0f32, 0f32);
    for i in 0..16 {
        let of = |i: usize| {
            let (x, q) = (values[i], f32::from(codes[i]) - 32.0);
            let weight = (x * inverse) * (x * inverse);
            (weight * x * q, weight * q * q)
        };
        let (a, b) = (of(i), of(i + 16));
        qx += a.0 + b.0;
        qq += a.1 + b.1;
    }
    (inverse.is_finite() && qq > 0.0).then(|| qx / qq)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_sit_where_ik_llama_cpp_puts_them() {
        let mut block = [0u8; 26];
        block[..2].copy_from_slice(&f16::from_f32(0.5).to_le_bytes());
        // Upper bits of values 0, 16, 8 and 24 (from the lowest on), then nibbles of values 0 and 16, of 8 and 24.
        (block[2], block[10], block[18]) = (0b01_10_11_00, 0x5f, 0xa0);
        let mut values = [0.0; 32];
        decode(&block, &mut values);
        let codes = [values[0], values[16], values[8], values[24]].map(|v| v / 0.5 + 32.0);
        assert_eq!(codes, [15.0, 53.0, 32.0, 26.0]);
        assert_eq!(values[1], -16.0);
    }

    #[test]
    fn zeros_stay_zeros_and_a_tiny_value_does_not_become_infinite() {
        for size in [0.0, f32::from_bits(1), f32::MIN_POSITIVE, 1e-30] {
            let (mut block, mut values) = ([0; 26], [0.0; 32]);
            for others in [0.0, size] {
                let mut given = [others; 32];
                given[7] = size;
                encode(&given, &mut block);
                decode(&block, &mut values);
                assert_eq!(values, [0.0; 32], "{size}, {others}");
            }
        }
    }

    #[test]
    fn values_come_back_within_half_a_step_and_at_the_far_end_a_whole_one() {
        let values: [f32; 32] = std::array::from_fn(|i| ((i * 7919 % 997) as f32 / 997.0 - 0.5) * 3.0);
        let (mut block, mut back) = ([0; 26], [0.0; 32]);
        encode(&values, &mut block);
        decode(&block, &mut back);
        let step = block::extreme(&values).abs() / 32.0;
        for (value, back) in values.iter().zip(back) {
            assert!((value - back).abs() < step * 1.02, "{value} {back}");
        }
        let square: f32 = values.iter().zip(back).map(|(v, b)| (v - b) * (v - b)).sum();
        assert!(square / 32.0 < step * step / 10.0, "a twelfth is that of rounding");
    }
}
