//! Which formats are there, and how large are they?

use crate::{
    f8_128, f8_e4m3, float, iq4_nl, iq4_xs, mxfp4, q2_k, q3_k, q4_0, q4_1, q4_k, q5_0, q5_1, q5_k, q6_0, q6_k, q8_0,
    w16,
};

/// A storage format, with ggml's number and layout where ggml has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
#[allow(non_camel_case_types, reason = "ggml's names")]
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
    /// 32 x 5 bit, one f16 scale, offset 16.
    Q5_0,
    /// 32 x 5 bit, f16 scale and f16 minimum.
    Q5_1,
    /// 16 sub-blocks of 16 x 2 bit, each with 4-bit scale and minimum.
    Q2_K,
    /// 16 sub-blocks of 16 x 3 bit, each with a 6-bit scale.
    Q3_K,
    /// 8 sub-blocks of 32 x 4 bit, each with 6-bit scale and minimum.
    Q4_K,
    /// 8 sub-blocks of 32 x 5 bit, each with 6-bit scale and minimum.
    Q5_K,
    /// 16 sub-blocks of 16 x 6 bit, each with an int8 scale.
    Q6_K,
    /// 32 x 4 bit of an uneven table, one f16 scale.
    IQ4_NL,
    /// 8 sub-blocks of 32 x 4 bit of an uneven table, each with a 6-bit scale.
    IQ4_XS,
    /// 32 x e2m1, one power of two.
    MXFP4,
    /// e4m3fn, one byte a value. Not in GGUF: ggml has no number for it.
    F8E4M3,
    /// 16-bit words, a power of two for a row; for KV rows. Not in GGUF.
    W16,
    /// e4m3fn, a power of two for each 128 values behind a row's codes; for KV rows. Not in GGUF.
    F8_128,
    /// 32 x 6 bit, one f16 scale, offset 32, as in ik_llama.cpp; for KV rows. Not in GGUF.
    Q6_0,
}

/// What is known about a format: number, name, values and bytes in a block.
struct Row(Format, u32, &'static str, usize, usize);

/// The first number that is the plugin ABI's own and not ggml's.
const OWN_IDS: u32 = 128;

const TABLE: [Row; 20] = [
    Row(Format::F32, 0, "F32", 1, 4),
    Row(Format::F16, 1, "F16", 1, 2),
    Row(Format::BF16, 30, "BF16", 1, 2),
    Row(Format::Q8_0, 8, "Q8_0", 32, 34),
    Row(Format::Q4_0, 2, "Q4_0", 32, 18),
    Row(Format::Q4_1, 3, "Q4_1", 32, 20),
    Row(Format::Q5_0, 6, "Q5_0", 32, 22),
    Row(Format::Q5_1, 7, "Q5_1", 32, 24),
    Row(Format::Q2_K, 10, "Q2_K", 256, 84),
    Row(Format::Q3_K, 11, "Q3_K", 256, 110),
    Row(Format::Q4_K, 12, "Q4_K", 256, 144),
    Row(Format::Q5_K, 13, "Q5_K", 256, 176),
    Row(Format::Q6_K, 14, "Q6_K", 256, 210),
    Row(Format::IQ4_NL, 20, "IQ4_NL", 32, 18),
    Row(Format::IQ4_XS, 23, "IQ4_XS", 256, 136),
    Row(Format::MXFP4, 39, "MXFP4", 32, 17),
    Row(Format::F8E4M3, 129, "F8E4M3", 1, 1),
    Row(Format::W16, 130, "W16", 32, w16::BYTES),
    // And one for each 128 values, see [`Format::row_bytes`].
    Row(Format::F8_128, 131, "F8_128", 32, 32),
    Row(Format::Q6_0, 132, "Q6_0", 32, 26),
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
    /// Only decoding is there.
    #[error("{} is read but not written", format.name())]
    NotEncoded {
        /// The format.
        format: Format,
    },
    /// GGUF has no number for it.
    #[error("{} cannot be in a GGUF file", format.name())]
    NotInGguf {
        /// The format.
        format: Format,
    },
    /// A matrix does not have the factors that its shape needs.
    #[error("{needed} factors are needed, there are {found}")]
    Factors {
        /// How many are needed.
        needed: usize,
        /// How many there are.
        found: usize,
    },
    /// Values do not lie inside a matrix as whole rows.
    #[error("{values} values from row {first} on are not whole rows of {cols} inside the matrix")]
    Rows {
        /// The first row.
        first: usize,
        /// How many values.
        values: usize,
        /// Columns of the matrix.
        cols: usize,
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
            Self::Q5_0 => &TABLE[6],
            Self::Q5_1 => &TABLE[7],
            Self::Q2_K => &TABLE[8],
            Self::Q3_K => &TABLE[9],
            Self::Q4_K => &TABLE[10],
            Self::Q5_K => &TABLE[11],
            Self::Q6_K => &TABLE[12],
            Self::IQ4_NL => &TABLE[13],
            Self::IQ4_XS => &TABLE[14],
            Self::MXFP4 => &TABLE[15],
            Self::F8E4M3 => &TABLE[16],
            Self::W16 => &TABLE[17],
            Self::F8_128 => &TABLE[18],
            Self::Q6_0 => &TABLE[19],
        }
    }

    /// ggml's number, or for a format that ggml lacks the plugin ABI's own, from 128 on. Also the dtype of that ABI.
    pub const fn ggml_id(self) -> u32 {
        self.row().1
    }

    /// The format with this number in a GGUF file, if this version reads it.
    pub fn from_ggml_id(id: u32) -> Option<Self> {
        Self::from_dtype(id).filter(|format| format.is_in_gguf())
    }

    /// The format with this dtype of the plugin ABI, if this version reads it.
    pub fn from_dtype(dtype: u32) -> Option<Self> {
        TABLE.iter().find(|row| row.1 == dtype).map(|row| row.0)
    }

    /// The format of this name, in either case.
    pub fn from_name(name: &str) -> Option<Self> {
        TABLE.iter().find(|row| row.2.eq_ignore_ascii_case(name)).map(|row| row.0)
    }

    /// True when ggml has it, so that a GGUF file may.
    pub const fn is_in_gguf(self) -> bool {
        self.ggml_id() < OWN_IDS
    }

    /// True when [`encode`] makes it.
    pub const fn is_encoded(self) -> bool {
        !matches!(self, Self::Q2_K | Self::Q3_K | Self::IQ4_NL | Self::IQ4_XS | Self::MXFP4 | Self::F8E4M3)
    }

    /// ggml's name.
    pub const fn name(self) -> &'static str {
        self.row().2
    }

    /// Values in a block.
    pub const fn block_values(self) -> usize {
        self.row().3
    }

    /// Bytes of a block; a row of F8_128 has more behind all of them.
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
        let extra = if self == Self::F8_128 { f8_128::extra_bytes(values) } else { 0 };
        let blocks = (values / self.block_values()).checked_mul(self.block_bytes());
        blocks.and_then(|bytes| bytes.checked_add(extra)).ok_or(QuantError::TooLarge { format: self, values })
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
        Format::Q5_0 => blocks(bytes, values, q5_0::decode),
        Format::Q5_1 => blocks(bytes, values, q5_1::decode),
        Format::Q2_K => blocks(bytes, values, q2_k::decode),
        Format::Q3_K => blocks(bytes, values, q3_k::decode),
        Format::Q4_K => blocks(bytes, values, q4_k::decode),
        Format::Q5_K => blocks(bytes, values, q5_k::decode),
        Format::Q6_K => blocks(bytes, values, q6_k::decode),
        Format::IQ4_NL => blocks(bytes, values, iq4_nl::decode),
        Format::IQ4_XS => blocks(bytes, values, iq4_xs::decode),
        Format::MXFP4 => blocks(bytes, values, mxfp4::decode),
        Format::F8E4M3 => f8_e4m3::decode(bytes, values),
        Format::W16 => blocks(bytes, values, w16::decode),
        Format::F8_128 => f8_128::decode(bytes, 0, values),
        Format::Q6_0 => blocks(bytes, values, q6_0::decode),
    }
    Ok(())
}

/// Decodes a part of a row: values from `first` on, as many as `values` has room for.
///
/// # Errors
/// When the part is not whole blocks of the row.
pub fn decode_part(format: Format, row: &[u8], first: usize, values: &mut [f32]) -> Result<(), QuantError> {
    let past = |needed, bytes| QuantError::Length { format, values: values.len(), needed, bytes };
    if format == Format::F8_128 {
        let (needed, width) = (first.saturating_add(values.len()), f8_128::width(row.len()));
        if needed > width {
            return Err(past(needed, width));
        }
        f8_128::decode(row, first, values);
        return Ok(());
    }
    let (at, length) = (format.row_bytes(first)?, format.row_bytes(values.len())?);
    let end = at.saturating_add(length);
    let part = row.get(at..end).ok_or_else(|| past(end, row.len()))?;
    decode(format, part, values)
}

/// Encodes `values` into `bytes`: F32, F16, BF16 and Q8_0 to ggml's own bits, Q6_0 to ik_llama.cpp's, the others with
/// an error no larger than that of ggml's reference quantiser. Values of W16 and F8_128 are one row.
///
/// # Errors
/// When the lengths do not belong together, or the format is only decoded.
pub fn encode(format: Format, values: &[f32], bytes: &mut [u8]) -> Result<(), QuantError> {
    check(format, values.len(), bytes.len())?;
    match format {
        Format::F32 => float::encode_f32(values, bytes),
        Format::F16 => float::encode_f16(values, bytes),
        Format::BF16 => float::encode_bf16(values, bytes),
        Format::Q8_0 => blocks_mut(values, bytes, q8_0::encode),
        Format::Q4_0 => blocks_mut(values, bytes, q4_0::encode),
        Format::Q4_1 => blocks_mut(values, bytes, q4_1::encode),
        Format::Q5_0 => blocks_mut(values, bytes, q5_0::encode),
        Format::Q5_1 => blocks_mut(values, bytes, q5_1::encode),
        Format::Q4_K => blocks_mut(values, bytes, q4_k::encode),
        Format::Q5_K => blocks_mut(values, bytes, q5_k::encode),
        Format::Q6_K => blocks_mut(values, bytes, q6_k::encode),
        Format::W16 => w16::encode(values, bytes),
        Format::F8_128 => f8_128::encode(values, bytes),
        Format::Q6_0 => blocks_mut(values, bytes, q6_0::encode),
        Format::Q2_K | Format::Q3_K | Format::IQ4_NL | Format::IQ4_XS | Format::MXFP4 | Format::F8E4M3 => {
            return Err(QuantError::NotEncoded { format });
        }
    }
    Ok(())
}

/// Encodes a row of a KV pool: as [`encode`] does, but Q4_0 to ggml's own bits. Rows are written in each step, and what
/// they are written as is part of the plugin ABI.
///
/// # Errors
/// As [`encode`].
pub fn encode_row(format: Format, values: &[f32], bytes: &mut [u8]) -> Result<(), QuantError> {
    if format != Format::Q4_0 {
        return encode(format, values, bytes);
    }
    check(format, values.len(), bytes.len())?;
    blocks_mut(values, bytes, q4_0::encode_plain);
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
            assert_eq!(Format::from_dtype(row.1), Some(row.0));
            assert_eq!(Format::from_name(row.2), Some(row.0));
        }
        assert_eq!(Format::from_ggml_id(9), None);
        assert_eq!(Format::from_ggml_id(129), None, "a GGUF file has no FP8");
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
            (Format::Q6_0, 2.0 * 3.0 / 32.0),
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

    /// The sum was computed with the `gguf` package 0.19.0 over the same values.
    #[test]
    fn a_row_of_q4_0_has_ggmls_bits() {
        let values = generated();
        let mut bytes = vec![0; Format::Q4_0.row_bytes(values.len()).unwrap()];
        encode_row(Format::Q4_0, &values, &mut bytes).unwrap();
        assert_eq!(fnv1a(&bytes), 0xe0c0_65e2_ab28_902b);
        let mut searched = bytes.clone();
        encode(Format::Q4_0, &values, &mut searched).unwrap();
        assert_ne!(searched, bytes, "a file's are searched for");
    }

    /// The sum was computed with `float8_e4m3fn` of the `ml_dtypes` package 0.6.0 over the same values in rows of 448,
    /// each 128 of them divided by the smallest power of two that leaves none above 448.
    #[test]
    fn f8_128_rows_have_the_codes_of_other_code() {
        let values = generated();
        let mut all = Vec::new();
        for row in values.as_chunks::<448>().0 {
            let mut bytes = vec![0; 452];
            encode(Format::F8_128, row, &mut bytes).unwrap();
            all.extend(bytes);
        }
        assert_eq!(fnv1a(&all), 0x2e8f_ab19_bee3_b131);
    }

    #[test]
    fn parts_of_rows_are_decoded_alone() {
        let values: Vec<f32> = (0..192u8).map(|i| f32::from(i) * 0.3 - 9.0).collect();
        for format in [Format::F16, Format::Q8_0, Format::W16, Format::F8_128, Format::Q6_0] {
            let mut bytes = vec![0; format.row_bytes(192).unwrap()];
            encode(format, &values, &mut bytes).unwrap();
            let (mut whole, mut part) = (vec![0.0; 192], vec![0.0; 64]);
            decode(format, &bytes, &mut whole).unwrap();
            decode_part(format, &bytes, 96, &mut part).unwrap();
            assert_eq!(part, whole[96..160], "{}", format.name());
            assert!(decode_part(format, &bytes, 160, &mut part).is_err(), "past the row");
        }
        assert!(decode_part(Format::Q8_0, &[0; 68], 16, &mut [0.0; 32]).is_err(), "half of a block");
    }

    /// The sums were computed with the `gguf` package 0.19.0 (llama.cpp's own Python quantisers) over the same values,
    /// those of Q6_0 with ik_llama.cpp's `quantize_row_q6_0_ref` and `dequantize_row_q6_0` (ggml-quants.c, 2026-11).
    #[test]
    fn formats_that_are_encoded_as_by_ggml_equal_it_bit_for_bit_both_ways() {
        let values = generated();
        for (format, encoded, decoded) in [
            (Format::F16, 0x54f8_1666_2b4c_dae7, 0xaeac_78ef_a769_bcdb),
            (Format::BF16, 0x17ea_b69e_7c68_decf, 0x7bf7_edc9_5687_e93f),
            (Format::Q8_0, 0x186e_8747_8e27_582d, 0x9663_066e_d973_60be),
            (Format::Q6_0, 0x17df_e111_d287_7ef5, 0xec46_2515_bc8e_94fe),
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
