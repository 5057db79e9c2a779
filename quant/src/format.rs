//! Which formats are there, and how large are they?

use crate::{float, q4_0, q4_1, q8_0};

/// A storage format, with ggml's number and layout.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Format {
    /// IEEE single.
    F32,
    /// IEEE half.
    F16,
    /// The upper half of an IEEE single.
    BF16,
    /// 32 x int8, one f16 scale.
    Q8_0,
    /// 32 x 4 bit, one f16 scale, offset 8.
    Q4_0,
    /// 32 x 4 bit, f16 scale and f16 minimum.
    Q4_1,
}

/// What is known about a format: number, name, values and bytes in a block.
struct Row(Format, u32, &'static str, usize, usize);

const TABLE: [Row; 6] = [
    Row(Format::F32, 0, "F32", 1, 4),
    Row(Format::F16, 1, "F16", 1, 2),
    Row(Format::BF16, 30, "BF16", 1, 2),
    Row(Format::Q8_0, 8, "Q8_0", 32, 34),
    Row(Format::Q4_0, 2, "Q4_0", 32, 18),
    Row(Format::Q4_1, 3, "Q4_1", 32, 20),
];

/// Why values could not be decoded or encoded.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum QuantError {
    /// A row must be whole blocks.
    #[error("{values} values are not whole {} blocks of {}", format.name(), format.block_values())]
    PartialBlock {
        /// The format.
        format: Format,
        /// How many values there are.
        values: usize,
    },
    /// The byte count of a row does not fit a usize.
    #[error("{values} values of {} do not fit into memory", format.name())]
    TooLarge {
        /// The format.
        format: Format,
        /// How many values there are.
        values: usize,
    },
    /// Bytes and values do not belong together.
    #[error("{values} values of {} need {needed} bytes, there are {bytes}", format.name())]
    Length {
        /// The format.
        format: Format,
        /// How many values there are.
        values: usize,
        /// How many bytes they need.
        needed: usize,
        /// How many bytes there are.
        bytes: usize,
    },
}

impl Format {
    const fn row(self) -> &'static Row {
        match self {
            Self::F32 => &TABLE[0],
            Self::F16 => &TABLE[1],
            Self::BF16 => &TABLE[2],
            Self::Q8_0 => &TABLE[3],
            Self::Q4_0 => &TABLE[4],
            Self::Q4_1 => &TABLE[5],
        }
    }

    /// ggml's number, which is also the dtype of the plugin ABI.
    pub const fn ggml_id(self) -> u32 {
        self.row().1
    }

    /// The format with this ggml number, if this version reads it.
    pub fn from_ggml_id(id: u32) -> Option<Self> {
        TABLE.iter().find(|row| row.1 == id).map(|row| row.0)
    }

    /// ggml's name.
    pub const fn name(self) -> &'static str {
        self.row().2
    }

    /// Values in a block.
    pub const fn block_values(self) -> usize {
        self.row().3
    }

    /// Bytes of a block.
    pub const fn block_bytes(self) -> usize {
        self.row().4
    }

    /// Bytes of a row of `values` values.
    ///
    /// # Errors
    /// When they are not whole blocks, or too many to count.
    pub fn row_bytes(self, values: usize) -> Result<usize, QuantError> {
        if !values.is_multiple_of(self.block_values()) {
            return Err(QuantError::PartialBlock { format: self, values });
        }
        let bytes = (values / self.block_values()).checked_mul(self.block_bytes());
        bytes.ok_or(QuantError::TooLarge { format: self, values })
    }
}

fn check(format: Format, values: usize, bytes: usize) -> Result<(), QuantError> {
    let needed = format.row_bytes(values)?;
    if needed == bytes { Ok(()) } else { Err(QuantError::Length { format, values, needed, bytes }) }
}

/// Decodes `bytes` into `values`, bit-exact with ggml's scalar decoder.
///
/// # Errors
/// When the lengths do not belong together.
pub fn decode(format: Format, bytes: &[u8], values: &mut [f32]) -> Result<(), QuantError> {
    check(format, values.len(), bytes.len())?;
    match format {
        Format::F32 => float::decode_f32(bytes, values),
        Format::F16 => float::decode_f16(bytes, values),
        Format::BF16 => float::decode_bf16(bytes, values),
        Format::Q8_0 => blocks(bytes, values, q8_0::decode),
        Format::Q4_0 => blocks(bytes, values, q4_0::decode),
        Format::Q4_1 => blocks(bytes, values, q4_1::decode),
    }
    Ok(())
}

/// Encodes `values` into `bytes` as ggml's reference quantiser does.
///
/// # Errors
/// When the lengths do not belong together.
pub fn encode(format: Format, values: &[f32], bytes: &mut [u8]) -> Result<(), QuantError> {
    check(format, values.len(), bytes.len())?;
    match format {
        Format::F32 => float::encode_f32(values, bytes),
        Format::F16 => float::encode_f16(values, bytes),
        Format::BF16 => float::encode_bf16(values, bytes),
        Format::Q8_0 => blocks_mut(values, bytes, q8_0::encode),
        Format::Q4_0 => blocks_mut(values, bytes, q4_0::encode),
        Format::Q4_1 => blocks_mut(values, bytes, q4_1::encode),
    }
    Ok(())
}

fn blocks<const V: usize, const B: usize>(bytes: &[u8], values: &mut [f32], decode: fn(&[u8; B], &mut [f32; V])) {
    for (block, values) in bytes.as_chunks::<B>().0.iter().zip(values.as_chunks_mut::<V>().0) {
        decode(block, values);
    }
}

fn blocks_mut<const V: usize, const B: usize>(values: &[f32], bytes: &mut [u8], encode: fn(&[f32; V], &mut [u8; B])) {
    for (values, block) in values.as_chunks::<V>().0.iter().zip(bytes.as_chunks_mut::<B>().0) {
        encode(values, block);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_in_order_of_the_enum() {
        for row in &TABLE {
            assert_eq!(row.0.row().1, row.1);
            assert_eq!(Format::from_ggml_id(row.1), Some(row.0));
        }
        assert_eq!(Format::from_ggml_id(12), None);
    }

    #[test]
    fn lengths_must_fit() {
        assert_eq!(Format::Q4_0.row_bytes(33), Err(QuantError::PartialBlock { format: Format::Q4_0, values: 33 }));
        assert_eq!(
            Format::F32.row_bytes(usize::MAX),
            Err(QuantError::TooLarge { format: Format::F32, values: usize::MAX })
        );
        assert!(decode(Format::Q8_0, &[0; 33], &mut [0.0; 32]).is_err());
    }

    #[test]
    fn encoding_then_decoding_stays_within_the_step() {
        let values: Vec<f32> = (0..64u8).map(|i| (f32::from(i) * 0.7).sin() * 3.0).collect();
        for (format, step) in [
            (Format::F32, 0.0),
            (Format::F16, 2e-3),
            (Format::BF16, 2e-2),
            (Format::Q8_0, 3.0 / 127.0),
            (Format::Q4_0, 2.0 * 3.0 / 8.0), // the far end is clipped by a whole step
            (Format::Q4_1, 6.0 / 15.0),
        ] {
            let mut bytes = vec![0; format.row_bytes(64).unwrap()];
            encode(format, &values, &mut bytes).unwrap();
            let mut back = vec![0.0; 64];
            decode(format, &bytes, &mut back).unwrap();
            let worst = values.iter().zip(&back).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(worst <= step * 0.56, "{}: {worst}", format.name());
        }
    }

    /// 2048 blocks at eight scales from a small generator; some hold one value throughout, some only zeros.
    fn generated() -> Vec<f32> {
        let mut state = 0x2545_f491_u32;
        let value = |i: u32| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let block = i / 32;
            #[expect(clippy::cast_precision_loss, reason = "24 bits are exact in f32")]
            let signed = (state >> 8) as f32 - 8_388_608.0;
            match block % 128 {
                127 => 0.0,
                63 => 0.75,
                _ => signed / (1u32 << (20 + block % 8)) as f32,
            }
        };
        (0..2048 * 32).map(value).collect()
    }

    fn fnv1a(bytes: &[u8]) -> u64 {
        bytes.iter().fold(0xcbf2_9ce4_8422_2325, |h, b| (h ^ u64::from(*b)).wrapping_mul(0x0100_0000_01b3))
    }

    /// The sums were computed with the `gguf` package 0.19.0 (llama.cpp's own Python quantisers) over the same values.
    #[test]
    fn both_directions_equal_the_reference_quantiser_bit_for_bit() {
        let values = generated();
        for (format, encoded, decoded) in [
            (Format::F16, 0x54f8_1666_2b4c_dae7, 0xaeac_78ef_a769_bcdb),
            (Format::BF16, 0x17ea_b69e_7c68_decf, 0x7bf7_edc9_5687_e93f),
            (Format::Q8_0, 0x186e_8747_8e27_582d, 0x9663_066e_d973_60be),
            (Format::Q4_0, 0xe0c0_65e2_ab28_902b, 0x2374_5318_25f2_b19a),
            (Format::Q4_1, 0x0922_5f9b_2ea8_ced5, 0x348d_ad33_6f89_4fbf),
        ] {
            let mut bytes = vec![0; format.row_bytes(values.len()).unwrap()];
            encode(format, &values, &mut bytes).unwrap();
            assert_eq!(fnv1a(&bytes), encoded, "{} encodes otherwise", format.name());
            let mut back = vec![0.0; values.len()];
            decode(format, &bytes, &mut back).unwrap();
            let bits: Vec<u8> = back.iter().flat_map(|v: &f32| v.to_le_bytes()).collect();
            assert_eq!(fnv1a(&bits), decoded, "{} decodes otherwise", format.name());
        }
    }
}
