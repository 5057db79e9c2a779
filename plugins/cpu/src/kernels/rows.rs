//! Rows of the KV pool and of weights: decode, encode, rotate.

use crate::level::Level;
use crate::simd::{LANES, Lanes, Words, on_level};
use half::f16;
use sparsed_quant::Format;

/// Decodes a whole row; exact at every level.
pub(crate) fn decode(level: Level, format: Format, bytes: &[u8], out: &mut [f32]) {
    if format == Format::F16 {
        return decode_f16(level, bytes, out);
    }
    sparsed_quant::decode(format, bytes, out).expect("row sizes were checked when the weight or pool was made");
}

/// Decodes `out.len()` values from value `start` on; both are multiples of the format's block.
pub(crate) fn decode_slice(level: Level, format: Format, bytes: &[u8], start: usize, out: &mut [f32]) {
    if format == Format::F16 {
        return decode_f16(level, &bytes[2 * start..2 * (start + out.len())], out);
    }
    sparsed_quant::decode_part(format, bytes, start, out).expect("slices were checked when the plan was compiled");
}

/// Encodes a row as the pool stores it; the same at every level.
pub(crate) fn encode(level: Level, format: Format, values: &[f32], bytes: &mut [u8]) {
    if format == Format::F16 {
        return encode_f16(level, values, bytes);
    }
    if format == Format::W16 {
        return encode_w16(level, values, bytes);
    }
    sparsed_quant::encode_row(format, values, bytes).expect("row sizes were checked when the pool was made");
}

on_level! {
    fn decode_f16(bytes: &[u8], out: &mut [f32]) = decode_f16_body
}
on_level! {
    fn encode_w16(values: &[f32], bytes: &mut [u8]) = encode_w16_body
}
on_level! {
    fn encode_f16(values: &[f32], bytes: &mut [u8]) = encode_f16_body
}

#[inline(always)]
fn decode_f16_body<L: Lanes>(l: L, bytes: &[u8], out: &mut [f32]) {
    let (from, from_rest) = bytes.as_chunks();
    let (to, to_rest) = out.as_chunks_mut();
    from.iter().zip(to).for_each(|(from, to)| l.store(l.load_half(from), to));
    for (from, to) in from_rest.as_chunks::<2>().0.iter().zip(to_rest) {
        *to = f16::from_le_bytes(*from).to_f32();
    }
}

#[inline(always)]
fn encode_f16_body<L: Lanes>(l: L, values: &[f32], bytes: &mut [u8]) {
    let (from, from_rest) = values.as_chunks();
    let (to, to_rest) = bytes.as_chunks_mut();
    from.iter().zip(to).for_each(|(from, to)| l.store_half(l.load(from), to));
    for (from, to) in from_rest.iter().zip(to_rest.as_chunks_mut::<2>().0) {
        *to = f16::from_f32(*from).to_le_bytes();
    }
}

/// OPS.md, W16; the bits of `sparsed_quant`.
#[inline(always)]
fn encode_w16_body<L: Words>(l: L, values: &[f32], bytes: &mut [u8]) {
    const WORD_MAX: f32 = 32767.0;
    const NO_NUMBER: i32 = 255;
    let mut most = l.splat_i(0);
    for v in values.as_chunks().0 {
        most = l.max_i(most, l.magnitude_bits(l.load(v)));
    }
    let mut lanes = [0; LANES];
    l.store_i(most, &mut lanes);
    let unit = match lanes.into_iter().fold(0, i32::max) >> 23 {
        NO_NUMBER => NO_NUMBER,
        largest => (largest - 14).max(0),
    };
    if unit == 0 || unit == NO_NUMBER {
        return sparsed_quant::encode(Format::W16, values, bytes).expect("row sizes were checked");
    }
    let inverse = l.splat(f32::from_bits(((254 - unit) << 23).cast_unsigned()));
    let (zero, lowest) = (l.splat(0.0), l.splat(-WORD_MAX));
    for (v, to) in values.as_chunks::<{ 2 * LANES }>().0.iter().zip(bytes.as_chunks_mut::<{ 4 * LANES }>().0) {
        let halves = v.as_chunks().0;
        let mut line = [0; LANES];
        let mut words = [l.splat_i(0); 2];
        // A closure would be compiled without the level's instructions.
        for (words, v) in words.iter_mut().zip(halves) {
            let v = l.max(lowest, l.mul(l.load(v), inverse));
            *words = l.round(l.sub(zero, l.max(lowest, l.sub(zero, v))));
        }
        l.store_i(l.pack_words(words[0], words[1]), &mut line);
        for (i, pair) in line[..4].iter_mut().enumerate() {
            *pair = *pair & !0x0001_0001 | unit >> (2 * i) & 1 | (unit >> (2 * i + 1) & 1) << 16;
        }
        to.as_chunks_mut().0.iter_mut().zip(line).for_each(|(to, pair)| *to = pair.to_le_bytes());
    }
}

/// Rotates values `start .. start + width` of `x` into `y` and copies the others. `angles` holds width / 2 cosines,
/// then as many sines (OPS.md, ROPE).
pub(crate) fn rope(x: &[f32], angles: &[f32], start: usize, half_split: bool, y: &mut [f32]) {
    y.copy_from_slice(x);
    let (cosines, sines) = angles.split_at(angles.len() / 2);
    let half = cosines.len();
    let (x, y) = (&x[start..start + 2 * half], &mut y[start..start + 2 * half]);
    for (j, (c, s)) in cosines.iter().zip(sines).enumerate() {
        let (a, b) = if half_split { (j, j + half) } else { (2 * j, 2 * j + 1) };
        y[a] = x[a] * c - x[b] * s;
        y[b] = x[b] * c + x[a] * s;
    }
}

/// `y = H x / sqrt(n)`, H the Sylvester matrix of size n = x.len(), a power of two.
pub(crate) fn hadamard(x: &[f32], y: &mut [f32]) {
    y.copy_from_slice(x);
    let mut half = 1;
    while half < y.len() {
        for chunk in y.chunks_exact_mut(2 * half) {
            let (low, high) = chunk.split_at_mut(half);
            for (a, b) in low.iter_mut().zip(high) {
                (*a, *b) = (*a + *b, *a - *b);
            }
        }
        half *= 2;
    }
    #[allow(clippy::cast_precision_loss, reason = "a small power of two")]
    let scale = 1.0 / (y.len() as f32).sqrt();
    y.iter_mut().for_each(|v| *v *= scale);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::inputs::{bits, cases, values};
    use proptest::prelude::*;

    #[test]
    fn rope_turns_pairs_of_either_layout() {
        let (x, angles) = ([9.0, 1.0, 2.0, 3.0, 4.0], [0.0, 1.0, 1.0, 0.0]); // 90 degrees, then none
        let mut y = [0.0; 5];
        rope(&x, &angles, 1, false, &mut y);
        assert_eq!(y, [9.0, -2.0, 1.0, 3.0, 4.0]);
        rope(&x, &angles, 1, true, &mut y);
        assert_eq!(y, [9.0, -3.0, 2.0, 1.0, 4.0]);
    }

    #[test]
    fn hadamard_is_its_own_inverse() {
        let x: Vec<f32> = (0..8u8).map(f32::from).collect();
        let (mut y, mut z) = (vec![0.0; 8], vec![0.0; 8]);
        hadamard(&x, &mut y);
        assert!((y[1] - -4.0 / 8f32.sqrt()).abs() < 1e-6);
        hadamard(&y, &mut z);
        assert!(x.iter().zip(&z).all(|(a, b)| (a - b).abs() < 1e-5));
    }

    /// What all of a row may be, or one value of it.
    fn special() -> impl Strategy<Value = Option<(f32, bool)>> {
        let below_two = f32::from_bits(2f32.to_bits() - 1);
        let value = proptest::sample::select(vec![below_two, -f32::MAX, 0.0, f32::NAN, f32::NEG_INFINITY]);
        proptest::option::of((value, any::<bool>()))
    }

    proptest! {
        #![proptest_config(cases(256))]
        /// The same bytes.
        #[test]
        fn w16_rows_are_those_of_the_definition_at_every_level(
            inputs in values(2.0), lines in 1usize..5, power in -150i32..127, special in special(),
        ) {
            let mut values = inputs.rows()(32 * lines);
            // In f64: the smaller powers are subnormal.
            values.iter_mut().for_each(|v| *v = (f64::from(*v) * 2f64.powi(power)) as f32);
            match special {
                Some((value, true)) => values.fill(value),
                Some((value, false)) => values[13 * lines] = value,
                None => {}
            }
            let mut reference = vec![0; 64 * lines];
            sparsed_quant::encode(Format::W16, &values, &mut reference).unwrap();
            for level in Level::all() {
                let mut bytes = vec![0; 64 * lines];
                encode(level, Format::W16, &values, &mut bytes);
                prop_assert_eq!(&bytes, &reference, "{:?}", level);
            }
        }

        /// The same bytes, and of them the same values.
        #[test]
        fn f16_rows_are_those_of_the_definition_at_every_level(
            inputs in values(8.0), n in 0usize..70, power in -30i32..20,
        ) {
            let values: Vec<f32> = inputs.rows()(n).iter().map(|v| v * 2f32.powi(power)).collect();
            let (mut reference, mut decoded) = (vec![0; 2 * n], vec![0.0; n]);
            sparsed_quant::encode(Format::F16, &values, &mut reference).unwrap();
            sparsed_quant::decode(Format::F16, &reference, &mut decoded).unwrap();
            for level in Level::all() {
                let (mut bytes, mut back) = (vec![0; 2 * n], vec![0.0; n]);
                encode(level, Format::F16, &values, &mut bytes);
                prop_assert_eq!(&bytes, &reference, "{:?}", level);
                decode(level, Format::F16, &bytes, &mut back);
                prop_assert_eq!(bits(&back), bits(&decoded), "{:?}", level);
            }
        }
    }
}
