//! W16: 16-bit words times a power of two that a whole row shares, for KV rows. Not in GGUF: ggml has no number for it.
//!
//! The lowest bits of the first eight words of each block of 32 are not the value's: they say the power of two, the
//! same in all blocks of a row, so that a row takes two bytes a value and a block is decoded by itself. They belong to
//! the words nevertheless: what a block decodes to has them.

/// Bytes of a block.
pub(crate) const BYTES: usize = 64;
const VALUES: usize = 32;
/// Words that carry a bit of the exponent.
const EXPONENT_BITS: usize = 8;
/// Largest magnitude that is rounded to.
const WORD_MAX: f32 = 32767.0;
/// The exponent of a row with a value that is none, or infinite.
const NO_NUMBER: u32 = 255;

/// Encodes a row of whole blocks.
pub(crate) fn encode(values: &[f32], bytes: &mut [u8]) {
    let largest = values.iter().fold(0, |largest: u32, value| largest.max(value.to_bits() & 0x7fff_ffff));
    // Magnitudes are below 2 to the power of 15 in the unit.
    let exponent = match largest >> 23 {
        NO_NUMBER => NO_NUMBER,
        largest => largest.saturating_sub(14),
    };
    let inverse = match exponent {
        0 | NO_NUMBER => 0.0,
        exponent => f32::from_bits((254 - exponent) << 23),
    };
    for (values, block) in values.as_chunks::<VALUES>().0.iter().zip(bytes.as_chunks_mut::<BYTES>().0) {
        for (i, (value, word)) in values.iter().zip(block.as_chunks_mut::<2>().0).enumerate() {
            let value = if exponent == NO_NUMBER { 0.0 } else { value * inverse };
            #[allow(clippy::cast_possible_truncation, reason = "at most WORD_MAX")]
            let n = value.round_ties_even().clamp(-WORD_MAX, WORD_MAX) as i16;
            let n = if i < EXPONENT_BITS { n & !1 | ((exponent >> i) & 1) as i16 } else { n };
            *word = n.to_le_bytes();
        }
    }
}

/// Decodes a block.
pub(crate) fn decode(block: &[u8; BYTES], values: &mut [f32; VALUES]) {
    let words = block.as_chunks::<2>().0;
    let exponent = (0..EXPONENT_BITS).fold(0, |bits, i| bits | u32::from(words[i][0] & 1) << i);
    let unit = match exponent {
        NO_NUMBER => f32::NAN,
        exponent => f32::from_bits(exponent << 23),
    };
    for (value, word) in values.iter_mut().zip(words) {
        *value = f32::from(i16::from_le_bytes(*word)) * unit;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn round_trip(values: &[f32]) -> Vec<f32> {
        let (mut bytes, mut decoded) = (vec![0; 2 * values.len()], vec![0.0; values.len()]);
        encode(values, &mut bytes);
        for (block, values) in bytes.as_chunks().0.iter().zip(decoded.as_chunks_mut().0) {
            decode(block, values);
        }
        decoded
    }

    #[test]
    fn a_value_is_within_a_unit_and_a_half_of_the_rows_largest() {
        for power in [-111, -60, -3, 0, 5, 60, 127] {
            let size = 2f32.powi(power);
            let values: Vec<f32> = (0..96u16).map(|i| (f32::from(i * 7919 % 997) / 997.0 - 0.5) * size).collect();
            let largest = values.iter().fold(0f32, |most, v| most.max(v.abs()));
            let decoded = round_trip(&values);
            for (i, (value, found)) in values.iter().zip(&decoded).enumerate() {
                let allowed = if i % 32 < EXPONENT_BITS { 1.5 } else { 0.5 } * largest / 16384.0;
                assert!((value - found).abs() <= allowed, "2^{power}: {value} {found}");
            }
        }
    }

    #[test]
    fn corners() {
        assert_eq!(round_trip(&[0.0; 64]), [0.0; 64], "zeros stay zeros");
        assert_eq!(round_trip(&[2f32.powi(-113); 32]), [0.0; 32], "a row without a normal unit is zeros");
        for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut values = [1.0; 64];
            values[40] = value;
            assert!(round_trip(&values).iter().all(|v| v.is_nan()), "{value} in a row");
        }
        // What rounds up past the largest word stays below it.
        let below = f32::from_bits(2f32.to_bits() - 1);
        let found = round_trip(&[below; 32])[31];
        assert_eq!(found, 32767.0 / 16384.0);
        assert!(round_trip(&[f32::MAX; 32]).iter().all(|v| v.is_finite()));
        // A block of zeros in the bytes is one of zeros.
        let mut values = [1.0; 32];
        decode(&[0; BYTES], &mut values);
        assert_eq!(values, [0.0; 32]);
    }

    #[test]
    fn all_blocks_of_a_row_have_its_unit() {
        let mut values = [1e-3; 64];
        values[63] = 8.0;
        let mut bytes = [0; 128];
        encode(&values, &mut bytes);
        let bits = |block: &[u8]| -> Vec<u8> { (0..8).map(|i| block[2 * i] & 1).collect() };
        assert_eq!(bits(&bytes[..64]), bits(&bytes[64..]));
    }
}
