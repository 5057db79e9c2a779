//! Every format against other code: decoding to the bit (tests/golden/make_quant_vectors.py made the files with the
//! `gguf` package 0.19.0, and ggml agreed), encoding against the error of ggml's own encoders.
#![allow(clippy::unwrap_used, missing_docs, reason = "a test")]

use sparsed_quant::{Format, QuantError, decode, encode};

/// Blocks, then their values.
fn check(name: &str, file: &[u8]) {
    let format = Format::from_name(name).unwrap();
    let per_block = format.block_bytes() + 4 * format.block_values();
    assert!(!file.is_empty() && file.len().is_multiple_of(per_block), "{name}: {} bytes", file.len());
    let n = file.len() / per_block;
    let (blocks, expected) = file.split_at(n * format.block_bytes());
    let mut values = vec![0.0; n * format.block_values()];
    decode(format, blocks, &mut values).unwrap();
    for (i, (value, expected)) in values.iter().zip(expected.as_chunks::<4>().0).enumerate() {
        let expected = f32::from_le_bytes(*expected);
        let same = value.to_bits() == expected.to_bits() || value.is_nan() && expected.is_nan();
        let (block, at) = (i / format.block_values(), i % format.block_values());
        assert!(same, "{name}: value {at} of block {block} is {value:e}, not {expected:e}");
    }
}

const NAMES: [&str; 14] = [
    "q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_nl", "iq4_xs", "mxfp4",
    "f8e4m3",
];

fn read(name: &str) -> Vec<u8> {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/quant");
    std::fs::read(folder.join(name).with_extension("bin")).unwrap()
}

#[test]
fn every_format_decodes_to_the_bits_of_the_reference() {
    for name in NAMES {
        check(name, &read(name));
    }
}

#[test]
#[should_panic(expected = "value 5 of block 0")]
fn a_single_wrong_bit_would_be_found() {
    let mut file = read("q4_k");
    let n = file.len() / (144 + 1024);
    file[n * 144 + 4 * 5] ^= 1;
    check("q4_k", &file);
}

/// Sums of four 16-bit draws, every 97th four times as large, scaled by powers of two; as in the script.
fn sample() -> Vec<f32> {
    let mut state = 0x2545_f491_u32;
    let mut draw = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        i32::from(u16::try_from(state >> 16).unwrap())
    };
    let value = |i: i32| {
        let total = (0..4).map(|_| draw()).sum::<i32>() - 131_070;
        #[expect(clippy::cast_precision_loss, reason = "20 bits are exact in f32")]
        let value = (total * if i % 97 == 0 { 4 } else { 1 }) as f32;
        value / 2f32.powi(20 + i / 256 % 8)
    };
    (0..1 << 16).map(value).collect()
}

fn encoded(format: Format, values: &[f32]) -> Vec<u8> {
    let mut bytes = vec![0; format.row_bytes(values.len()).unwrap()];
    encode(format, values, &mut bytes).unwrap();
    bytes
}

/// Root of the mean squared error over that of the mean square.
fn rms_error(format: Format, values: &[f32]) -> f64 {
    let mut back = vec![0.0; values.len()];
    decode(format, &encoded(format, values), &mut back).unwrap();
    let square = |v: f64| v * v;
    let error: f64 = values.iter().zip(&back).map(|(a, b)| square(f64::from(*a) - f64::from(*b))).sum();
    (error / values.iter().map(|v| square(f64::from(*v))).sum::<f64>()).sqrt()
}

/// The figures are ggml's `quantize_*` (llama.cpp of November 2026) on the same values; the script prints them.
#[test]
fn encoding_errs_no_more_than_ggml() {
    let values = sample();
    for (format, ggml) in [
        (Format::Q8_0, 6.406_794e-3),
        (Format::Q4_0, 1.019_532e-1),
        (Format::Q4_1, 8.300_080e-2),
        (Format::Q5_0, 5.050_784e-2),
        (Format::Q5_1, 3.993_151e-2),
        (Format::Q4_K, 7.669_561e-2),
        (Format::Q5_K, 3.872_218e-2),
        (Format::Q6_K, 2.036_592e-2),
    ] {
        let ours = rms_error(format, &values);
        assert!(ours <= ggml * (1.0 + 1e-6), "{}: {ours:e}, ggml has {ggml:e}", format.name());
        assert!(ours > ggml * 0.8, "{}: {ours:e} is too good to be true", format.name());
    }
}

#[test]
fn blocks_without_a_range_decode_to_themselves() {
    for format in [Format::Q4_K, Format::Q5_K, Format::Q6_K, Format::Q5_0, Format::Q5_1, Format::Q8_0, Format::Q4_0] {
        for constant in [0.0f32, -0.0, 1e-38, 63.0, -63.0] {
            let values = [constant; 256];
            let mut back = [0.0; 256];
            decode(format, &encoded(format, &values), &mut back).unwrap();
            let worst = back.iter().map(|v| (v - constant).abs()).fold(0.0, f32::max);
            // What no f16 scale reaches becomes 0.
            assert!(worst <= constant.abs() * 2e-2 + 1e-37, "{}: {constant} becomes {}", format.name(), back[0]);
        }
    }
}

#[test]
fn values_that_are_not_finite_do_not_panic() {
    for poison in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::MAX, f32::MIN_POSITIVE] {
        let mut values = [0.5; 256];
        values[77] = poison;
        for name in NAMES {
            let format = Format::from_name(name).unwrap();
            if format.is_encoded() {
                assert_eq!(encoded(format, &values).len(), format.row_bytes(256).unwrap());
            }
        }
    }
}

#[test]
fn formats_that_are_only_read_are_refused_by_name() {
    let mut bytes = [0; 84];
    let error = encode(Format::Q2_K, &[0.0; 256], &mut bytes).unwrap_err();
    assert_eq!(error, QuantError::NotEncoded { format: Format::Q2_K });
    assert_eq!(error.to_string(), "Q2_K is read but not written");
}
