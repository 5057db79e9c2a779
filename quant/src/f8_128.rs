//! F8_128: e4m3 values times a power of two that each 128 share, for KV rows. Not in GGUF: ggml has no number for it.
//!
//! A row is its codes, then one byte for each 128 values of it, the last of which may be fewer. DeepSeek's FlashMLA
//! cache has the same blocks and scales, as f32 of 4 bytes.

use crate::f8_e4m3;

/// Values that share a power of two.
const SHARED: usize = 128;
/// The power of two of zeros; that of a block with a value that is none, or infinite.
const ZEROS: u8 = 0;
const NO_NUMBER: u8 = 255;
/// Smallest and greatest power of two: all values are normal numbers, and finite.
const LEAST: u32 = 16;
const MOST: u32 = 246;
/// Largest magnitude of a code.
const CODE_MAX: f32 = 448.0;

/// Bytes of the powers of two of a row.
pub(crate) const fn extra_bytes(values: usize) -> usize {
    values.div_ceil(SHARED)
}

/// Values of a row of `bytes` bytes.
pub(crate) const fn width(bytes: usize) -> usize {
    bytes - bytes.div_ceil(SHARED + 1)
}

/// Encodes a row.
pub(crate) fn encode(values: &[f32], bytes: &mut [u8]) {
    let (codes, powers) = bytes.split_at_mut(values.len());
    for ((values, codes), power) in values.chunks(SHARED).zip(codes.chunks_mut(SHARED)).zip(powers) {
        *power = power_of(values);
        let inverse = match *power {
            ZEROS | NO_NUMBER => {
                codes.fill(0);
                continue;
            }
            power => f32::from_bits((254 - u32::from(power)) << 23),
        };
        for (value, code) in values.iter().zip(codes) {
            *code = f8_e4m3::code_of((value * inverse).clamp(-CODE_MAX, CODE_MAX));
        }
    }
}

/// The smallest power of two times which the values are codes; see `abi/OPS.md`.
fn power_of(values: &[f32]) -> u8 {
    let largest = values.iter().fold(0, |largest: u32, value| largest.max(value.to_bits() & 0x7fff_ffff));
    // 448 is 1.75 times 2 to the power of 8.
    let power = ((largest + 0x1f_ffff) >> 23).saturating_sub(8);
    match power {
        _ if largest >> 23 == u32::from(NO_NUMBER) => NO_NUMBER,
        ..LEAST => ZEROS,
        #[allow(clippy::cast_possible_truncation, reason = "at most MOST")]
        power => power.min(MOST) as u8,
    }
}

/// Decodes `values.len()` values of a row from value `first` on; nothing where the row has no such values.
pub(crate) fn decode(row: &[u8], first: usize, values: &mut [f32]) {
    let (codes, powers) = row.split_at(width(row.len()));
    for ((value, code), at) in values.iter_mut().zip(codes.iter().skip(first)).zip(first..) {
        let unit = match powers[at / SHARED] {
            NO_NUMBER => f32::NAN,
            power => f32::from_bits(u32::from(power) << 23),
        };
        *value = f8_e4m3::value_of(*code) * unit;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Format;

    fn encoded(values: &[f32]) -> Vec<u8> {
        let mut bytes = vec![0; Format::F8_128.row_bytes(values.len()).unwrap()];
        encode(values, &mut bytes);
        bytes
    }

    fn round_trip(values: &[f32]) -> Vec<f32> {
        let mut decoded = vec![0.0; values.len()];
        decode(&encoded(values), 0, &mut decoded);
        decoded
    }

    /// Widths with and without a tail.
    const WIDTHS: [usize; 5] = [32, 96, 128, 192, 512];

    #[test]
    fn a_value_is_within_a_sixteenth_of_itself_or_a_tiny_part_of_its_blocks_largest() {
        for (power, width) in [-80, -60, -3, 0, 5, 60, 126].into_iter().zip(WIDTHS.into_iter().cycle()) {
            let size = 2f32.powi(power);
            let values: Vec<f32> = (0..width).map(|i| ((i * 7919 % 997) as f32 / 997.0 - 0.5) * size).collect();
            for (values, found) in values.chunks(SHARED).zip(round_trip(&values).chunks(SHARED)) {
                let largest = values.iter().fold(0f32, |most, v| most.max(v.abs()));
                for (value, found) in values.iter().zip(found) {
                    // Half of the least code where the largest is at least 225 codes of one.
                    let allowed = (value.abs() / 16.0).max(largest / 224.0 / 1024.0);
                    assert!((value - found).abs() <= allowed, "2^{power}: {value} {found}");
                }
            }
        }
    }

    #[test]
    fn the_scale_is_the_smallest_with_which_the_largest_is_a_code() {
        for (largest, power) in [(448.0, 127), (448.0001, 128), (224.0, 126), (224.0001, 127), (1.75, 119), (1.0, 119)]
        {
            let mut values = [1e-3; 160];
            (values[77], values[130]) = (-largest, largest / 4.0);
            let bytes = encoded(&values);
            assert_eq!(bytes[160..], [power, power - 2], "{largest}");
            assert!((round_trip(&values)[77] + largest).abs() < 1e-3);
        }
    }

    #[test]
    fn corners() {
        assert_eq!(round_trip(&[0.0; 64]), [0.0; 64], "zeros stay zeros");
        assert_eq!(encoded(&[0.0; 64]), [0; 65]);
        assert_eq!(round_trip(&[2f32.powi(-104); 32]), [0.0; 32], "what has no scale is zeros");
        assert_eq!(round_trip(&[2f32.powi(-103); 32]), [2f32.powi(-103); 32]);
        assert_eq!(round_trip(&[f32::MAX; 32]), [448.0 * 2f32.powi(119); 32], "the largest that there is");
        for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut values = [1.0; 192];
            values[140] = value;
            let found = round_trip(&values);
            assert!(found[..128].iter().all(|v| *v == 1.0), "{value} in another block");
            assert!(found[128..].iter().all(|v| v.is_nan()), "{value} in a block");
        }
    }

    #[test]
    fn a_part_of_a_row_is_what_the_row_has_there() {
        let values: Vec<f32> = (0..192u16).map(|i| f32::from(i) * 0.31 - 7.0).collect();
        let (bytes, whole) = (encoded(&values), round_trip(&values));
        for (first, n) in [(0, 64), (64, 64), (128, 64), (96, 96), (32, 160)] {
            let mut part = vec![0.0; n];
            decode(&bytes, first, &mut part);
            assert_eq!(part, whole[first..first + n]);
        }
    }
}
