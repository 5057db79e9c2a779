//! FP8 e4m3fn: sign, 4 bits of exponent (bias 7), 3 of fraction; no infinity, NaN is S1111111.
//!
//! Alone one byte a value. DeepSeek's safetensors add one f32 factor per 128 x 128 weights, `weight_scale_inv`:
//! value = e4m3 * factor ([`ScaledF8`]). Source: OCP 8-bit Floating Point Specification 1.0; DeepSeek-V3 `kernel.py`.

use crate::{Format, QuantError};

/// Rows and columns that share a factor.
const TILE: usize = 128;

pub(crate) fn decode(bytes: &[u8], values: &mut [f32]) {
    for (value, byte) in values.iter_mut().zip(bytes) {
        *value = value_of(*byte);
    }
}

/// What a code stands for.
pub(crate) fn value_of(byte: u8) -> f32 {
    let (exponent, fraction) = (byte >> 3 & 15, byte & 7);
    let magnitude = match (exponent, fraction) {
        (15, 7) => f32::NAN,
        (0, _) => f32::from(fraction) / 512.0,
        // The exponent and the fraction move to their places in a single, whose bias is 127.
        _ => f32::from_bits((u32::from(exponent) + 120) << 23 | u32::from(fraction) << 20),
    };
    if byte & 0x80 == 0 { magnitude } else { -magnitude }
}

/// The code nearest to a value of at most 448, ties to the even one.
pub(crate) fn code_of(value: f32) -> u8 {
    /// Exponent of the least normal number; that of what lies below has the same distance.
    const LEAST: u32 = 121 << 23;
    let exponent = (value.to_bits() & 0x7f80_0000).max(LEAST);
    // Three bits of fraction are left of what this is added to.
    let coarse = 1.5 * f32::from_bits(exponent + (20 << 23));
    let magnitude = ((value + coarse) - coarse).abs();
    let bits = if magnitude.to_bits() >= LEAST {
        (magnitude.to_bits() - (120 << 23)) >> 20
    } else {
        // A multiple of 2 to the power of -9, the last bit of this sum.
        (magnitude + 16384.0).to_bits() & 7
    };
    #[allow(clippy::cast_possible_truncation, reason = "7 bits for a value of at most 448, and the sign")]
    let code = (bits | value.to_bits() >> 24 & 0x80) as u8;
    code
}

/// A matrix `[rows, cols]` of e4m3 with factors `[ceil(rows / 128), ceil(cols / 128)]`, both row-major.
#[derive(Clone, Copy, Debug)]
pub struct ScaledF8<'a> {
    bytes: &'a [u8],
    factors: &'a [f32],
    cols: usize,
}

impl<'a> ScaledF8<'a> {
    /// Puts a matrix and its factors together.
    ///
    /// # Errors
    /// When the shape, the bytes and the factors do not belong together.
    pub fn new(rows: usize, cols: usize, bytes: &'a [u8], factors: &'a [f32]) -> Result<Self, QuantError> {
        let format = Format::F8E4M3;
        let values = rows.checked_mul(cols).ok_or(QuantError::TooLarge { format, values: usize::MAX })?;
        if values != bytes.len() {
            return Err(QuantError::Length { format, values, needed: values, bytes: bytes.len() });
        }
        let needed = rows.div_ceil(TILE) * cols.div_ceil(TILE);
        if factors.len() != needed {
            return Err(QuantError::Factors { needed, found: factors.len() });
        }
        Ok(Self { bytes, factors, cols })
    }

    /// Decodes the rows from `first` on, as many as `values` has room for.
    ///
    /// # Errors
    /// When `values` is not whole rows, or they reach past the matrix.
    pub fn decode_rows(&self, first: usize, values: &mut [f32]) -> Result<(), QuantError> {
        let length = values.len();
        let wrong = || QuantError::Rows { first, values: length, cols: self.cols };
        if self.cols == 0 || !length.is_multiple_of(self.cols) {
            return Err(wrong());
        }
        let end = first.checked_add(length / self.cols).filter(|end| *end <= self.bytes.len() / self.cols);
        let end = end.ok_or_else(wrong)?;
        let bytes = self.bytes[first * self.cols..end * self.cols].chunks_exact(self.cols);
        for ((row, bytes), values) in (first..).zip(bytes).zip(values.chunks_exact_mut(self.cols)) {
            let factors = &self.factors[row / TILE * self.cols.div_ceil(TILE)..];
            for ((bytes, values), factor) in bytes.chunks(TILE).zip(values.chunks_mut(TILE)).zip(factors) {
                values.iter_mut().zip(bytes).for_each(|(value, byte)| *value = value_of(*byte) * factor);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_corners_of_the_format_are_where_the_standard_has_them() {
        for (byte, value) in [(0x00, 0.0), (0x01, 2f32.powi(-9)), (0x08, 2f32.powi(-6)), (0x38, 1.0), (0x7e, 448.0)] {
            assert_eq!(value_of(byte), value);
            assert_eq!(value_of(byte | 0x80).to_bits(), (-value).to_bits());
        }
        assert!(value_of(0x7f).is_nan() && value_of(0xff).is_nan());
    }

    #[test]
    fn a_value_becomes_the_nearest_code_and_a_tie_the_even_one() {
        for code in 0..0x7e_u8 {
            let (low, high) = (value_of(code), value_of(code + 1));
            let middle = low.midpoint(high);
            let even = code + (code & 1);
            for (value, expected) in [
                (low, code),
                (middle.next_down(), code),
                (middle, even),
                (middle.next_up(), code + 1),
                (high, code + 1),
            ] {
                assert_eq!(code_of(value), expected, "{value}");
                assert_eq!(code_of(-value), expected | 0x80, "-{value}");
            }
        }
    }

    #[test]
    fn each_tile_has_its_own_factor_at_ragged_edges_too() {
        let (rows, cols) = (130, 257);
        let bytes = vec![0x38; rows * cols];
        let factors = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0];
        let matrix = ScaledF8::new(rows, cols, &bytes, &factors).unwrap();
        let mut two = vec![0.0; 2 * cols];
        matrix.decode_rows(127, &mut two).unwrap();
        assert_eq!((two[0], two[127], two[128], two[256]), (1.0, 1.0, 2.0, 3.0));
        assert_eq!((two[cols], two[cols + 255], two[cols + 256]), (4.0, 5.0, 6.0));
        assert!(matrix.decode_rows(129, &mut two).is_err(), "past the last row");
        assert!(matrix.decode_rows(0, &mut two[1..]).is_err(), "not whole rows");
        assert!(matrix.decode_rows(usize::MAX, &mut two).is_err());
    }

    #[test]
    fn what_does_not_belong_together_is_refused() {
        assert!(ScaledF8::new(2, 2, &[0; 3], &[1.0]).is_err());
        assert!(ScaledF8::new(2, 2, &[0; 4], &[1.0, 1.0]).is_err());
        assert!(ScaledF8::new(usize::MAX, 2, &[0; 4], &[1.0]).is_err());
        assert!(ScaledF8::new(0, 0, &[], &[]).unwrap().decode_rows(0, &mut []).is_err());
    }
}
