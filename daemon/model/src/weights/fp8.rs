//! What is an FP8 weight worth? e4m3 values times one scale per block of rows and columns, decoded without loss.
//!
//! DeepSeek's `weight_dequant`: value times `weight_scale_inv` of its block, blocks at the edges partial. A product
//! with a power of two needs 4 bits of mantissa, so such a tensor (DeepSeek-V3.1 and later) becomes BF16, any other
//! F32: 2 or 4 bytes of memory per byte of the file.

use super::Tensor;
use sparsed_quant::Format;

/// Exponents of scales whose products with any e4m3 value are normal BF16 numbers: 2^-9 to 448 times these.
const EXPONENTS: std::ops::RangeInclusive<u32> = (1 + 9)..=(254 - 8);

/// The value of an e4m3fn number: bias 7, no infinities, 0x7f and 0xff not a number.
fn e4m3(bits: u8) -> f32 {
    let (exponent, mantissa) = (i32::from(bits >> 3 & 15), f32::from(bits & 7));
    let magnitude = match (exponent, bits & 7) {
        (15, 7) => f32::NAN,
        (0, _) => mantissa / 512.0,
        _ => (1.0 + mantissa / 8.0) * 2f32.powi(exponent - 7),
    };
    if bits & 0x80 == 0 { magnitude } else { -magnitude }
}

/// The format that numbers with these scales are decoded to.
pub(super) fn decoded_format(scales: &[f32]) -> Format {
    let exact = |scale: &f32| {
        let bits = scale.to_bits();
        bits & 0x7f_ffff == 0 && EXPONENTS.contains(&(bits >> 23 & 0xff))
    };
    if scales.iter().all(exact) { Format::BF16 } else { Format::F32 }
}

/// Decodes `bytes` `[rows, cols]`; `scales` is `[ceil(rows / block[0]), ceil(cols / block[1])]`, and the caller has
/// checked both lengths.
pub(super) fn decode(bytes: &[u8], scales: &[f32], rows: usize, cols: usize, block: [usize; 2]) -> Tensor {
    let table: [f32; 256] = std::array::from_fn(|bits| e4m3(u8::try_from(bits).expect("256 of them")));
    let format = decoded_format(scales);
    let per_row = cols.div_ceil(block[1]).max(1);
    let mut out = Vec::with_capacity(bytes.len() * format.block_bytes());
    for (row, values) in bytes.chunks_exact(cols.max(1)).enumerate() {
        let scales = &scales[row / block[0] * per_row..][..per_row];
        for (values, scale) in values.chunks(block[1]).zip(scales) {
            for &bits in values {
                let value = (table[usize::from(bits)] * scale).to_le_bytes();
                // The upper half is the whole of it.
                out.extend_from_slice(if format == Format::BF16 { &value[2..] } else { &value });
            }
        }
    }
    Tensor { format, dims: vec![cols as u64, rows as u64], bytes: out.into() }
}

/// Decodes a part of a matrix with rows of `cols` values, the part that begins with value `first` of it; `scales` and
/// `block` are the whole matrix's. `bytes` and `values` have one length.
pub(super) fn decode_part(
    bytes: &[u8],
    scales: &[f32],
    first: usize,
    cols: usize,
    block: [usize; 2],
    values: &mut [f32],
) {
    let table: [f32; 256] = std::array::from_fn(|bits| e4m3(u8::try_from(bits).expect("256 of them")));
    let per_row = cols.div_ceil(block[1]).max(1);
    for (at, (value, &bits)) in (first..).zip(values.iter_mut().zip(bytes)) {
        let (row, col) = (at / cols.max(1), at % cols.max(1));
        *value = table[usize::from(bits)] * scales[row / block[0] * per_row + col / block[1]];
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_part_of_a_matrix_is_what_it_is_in_the_whole() {
        let scales = [1.0, 0.3, 4.0, 8.0, 16.0, -32.0];
        let bytes: Vec<u8> = (0..15).map(|n| 7 * n + 3).collect();
        let whole = decode(&bytes, &scales, 3, 5, [2, 2]).values("t").unwrap();
        for (first, n) in [(0, 15), (4, 3), (9, 6), (14, 1), (7, 0)] {
            let mut values = vec![0.0; n];
            decode_part(&bytes[first..first + n], &scales, first, 5, [2, 2], &mut values);
            assert_eq!(values, whole[first..first + n], "{n} from {first}");
        }
    }

    #[test]
    fn the_values_are_those_of_e4m3fn() {
        for (bits, value) in [
            (0x00, 0.0),
            (0x01, 2f32.powi(-9)),
            (0x07, 7.0 / 512.0),
            (0x08, 2f32.powi(-6)),
            (0x38, 1.0),
            (0x39, 1.125),
            (0x7e, 448.0),
            (0xfe, -448.0),
            (0xb8, -1.0),
        ] {
            assert_eq!(e4m3(bits).to_bits(), f32::to_bits(value), "{bits:#x}");
        }
        assert!(e4m3(0x7f).is_nan() && e4m3(0xff).is_nan());
    }

    #[test]
    fn blocks_have_their_own_scale_and_edges_are_partial() {
        // 3 x 5 in blocks of 2 x 2: 2 x 3 scales.
        let scales = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0];
        let tensor = decode(&[0x38; 15], &scales, 3, 5, [2, 2]);
        let wanted = [[1., 1., 2., 2., 4.], [1., 1., 2., 2., 4.], [8., 8., 16., 16., 32.]].concat();
        assert_eq!((tensor.format, &tensor.dims[..]), (Format::BF16, &[5, 3][..]));
        assert_eq!(tensor.values("t").unwrap(), wanted);
    }

    #[test]
    fn no_bit_is_lost_whatever_the_scale() {
        let all: Vec<u8> = (0..=255).filter(|bits| bits & 0x7f != 0x7f).collect();
        for scale in [2f32.powi(-117), 2f32.powi(-140), 2f32.powi(119), 0.1, 1.0, -0.5, 0.0] {
            let tensor = decode(&all, &[scale], 1, all.len(), [128, 256]);
            for (bits, value) in all.iter().zip(tensor.values("t").unwrap()) {
                assert_eq!(value.to_bits(), (e4m3(*bits) * scale).to_bits(), "{bits:#x} times {scale}");
            }
        }
    }
}
