//! Products of block-quantised weights with int8 activations (operators with "int8 activations allowed").
//!
//! Per block of 32: an exact integer dot product, scaled in f32. Blocks are added in [`SUMS`] interleaved sums at the
//! scalar level and in 8 lanes at the others.

use crate::level::Level;
use half::f16;
use sparsed_quant::Format;

/// Values in a block.
pub(crate) const BLOCK: usize = 32;

/// One activation row, rounded to int8 per block of 32: `x[i] = d[i / 32] q[i]`, with the sum of each block's q.
#[derive(Clone, Copy, Debug)]
pub(crate) struct QuantisedRow<'a> {
    pub(crate) q: &'a [i8],
    pub(crate) d: &'a [f32],
    pub(crate) sums: &'a [i32],
}

/// Rounds a row to int8 per block of 32: scale = largest magnitude / 127, round to nearest (OPS.md, LINEAR).
pub(crate) fn quantise_row(x: &[f32], q: &mut [i8], d: &mut [f32], sums: &mut [i32]) {
    for (((x, q), d), sum) in x.chunks_exact(BLOCK).zip(q.chunks_exact_mut(BLOCK)).zip(d).zip(sums) {
        let largest = x.iter().fold(0f32, |m, v| m.max(v.abs()));
        *d = largest / 127.0;
        let inverse = if largest > 0.0 { 127.0 / largest } else { 0.0 };
        *sum = 0;
        for (q, x) in q.iter_mut().zip(x) {
            #[allow(clippy::cast_possible_truncation, reason = "within -127 ..= 127 by the scale; NaN becomes 0")]
            let rounded = (x * inverse).round_ties_even() as i8;
            *q = rounded;
            *sum += i32::from(rounded);
        }
    }
}

/// True when weights of this format have an int8 kernel.
pub(crate) fn has_kernel(format: Format) -> bool {
    matches!(format, Format::Q8_0 | Format::Q4_0 | Format::Q4_1)
}

/// `out[r] = w . x[r]` for up to four rows. The bits of a row do not depend on how many there are.
pub(crate) fn dots(level: Level, format: Format, w: &[u8], x: &[QuantisedRow<'_>], out: &mut [f32]) {
    debug_assert!(x.len() == out.len() && x.len() <= 4, "up to four rows");
    #[cfg(target_arch = "x86_64")]
    if level != Level::Scalar {
        // SAFETY: a Level above Scalar exists only where the CPU has its instructions.
        return unsafe { x86::dots(level, format, w, x, out) };
    }
    let _ = level;
    for (x, out) in x.iter().zip(out) {
        *out = dot_scalar(format, w, *x);
    }
}

/// The definition: one row, portable.
fn dot_scalar(format: Format, w: &[u8], x: QuantisedRow<'_>) -> f32 {
    let mut total = 0f32;
    for (i, block) in w.chunks_exact(format.block_bytes()).enumerate() {
        let q = &x.q[i * BLOCK..(i + 1) * BLOCK];
        let d = f16::from_le_bytes([block[0], block[1]]).to_f32() * x.d[i];
        let nibbles = |bytes: &[u8]| -> i32 {
            let low: i32 = bytes.iter().zip(q).map(|(b, q)| i32::from(b & 15) * i32::from(*q)).sum();
            let high: i32 = bytes.iter().zip(&q[16..]).map(|(b, q)| i32::from(b >> 4) * i32::from(*q)).sum();
            low + high
        };
        #[allow(clippy::cast_precision_loss, reason = "block sums stay below 2^24")]
        let value = match format {
            Format::Q8_0 => {
                let sum: i32 = block[2..].iter().zip(q).map(|(w, q)| i32::from(w.cast_signed()) * i32::from(*q)).sum();
                d * sum as f32
            }
            Format::Q4_0 => d * (nibbles(&block[2..]) - 8 * x.sums[i]) as f32,
            _ => {
                let m = f16::from_le_bytes([block[2], block[3]]).to_f32() * x.d[i];
                d * nibbles(&block[4..]) as f32 + m * x.sums[i] as f32
            }
        };
        total += value;
    }
    total
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    #![allow(clippy::cast_precision_loss, reason = "block sums stay below 2^24")]
    use super::{BLOCK, Format, Level, QuantisedRow};
    use std::arch::x86_64::{
        __m256, __m256i, _mm_add_ps, _mm_add_ss, _mm_and_si128, _mm_cvtph_ps, _mm_cvtsi32_si128, _mm_cvtss_f32,
        _mm_loadu_si128, _mm_movehl_ps, _mm_set1_epi8, _mm_shuffle_ps, _mm_srli_epi16, _mm256_abs_epi8,
        _mm256_add_epi32, _mm256_castps256_ps128, _mm256_cvtepi32_ps, _mm256_dpbusd_epi32, _mm256_extractf128_ps,
        _mm256_fmadd_ps, _mm256_loadu_si256, _mm256_madd_epi16, _mm256_maddubs_epi16, _mm256_set_m128i,
        _mm256_set1_epi16, _mm256_set1_ps, _mm256_setzero_ps, _mm256_setzero_si256, _mm256_sign_epi8,
        _mm256_zextsi128_si256,
    };

    /// # Safety
    /// The CPU has the instructions of `level`, which is not Scalar. `w` is whole blocks of `format`, and every row
    /// has as many.
    pub(super) unsafe fn dots(level: Level, format: Format, w: &[u8], x: &[QuantisedRow<'_>], out: &mut [f32]) {
        let blocks = w.len() / format.block_bytes();
        assert!(x.iter().all(|x| x.q.len() >= blocks * BLOCK && x.d.len() >= blocks && x.sums.len() >= blocks));
        macro_rules! choose {
            ($n:literal) => {{
                let rows: &[QuantisedRow<'_>; $n] = x.try_into().expect("matched by length");
                // SAFETY: the instructions are there by the caller's contract; sizes were checked above.
                let sums = unsafe {
                    match (level, format) {
                        (Level::Avx512, Format::Q8_0) => vnni::<$n, 8>(w, rows, blocks),
                        (Level::Avx512, Format::Q4_0) => vnni::<$n, 40>(w, rows, blocks),
                        (Level::Avx512, _) => vnni::<$n, 41>(w, rows, blocks),
                        (_, Format::Q8_0) => avx2::<$n, 8>(w, rows, blocks),
                        (_, Format::Q4_0) => avx2::<$n, 40>(w, rows, blocks),
                        _ => avx2::<$n, 41>(w, rows, blocks),
                    }
                };
                out.copy_from_slice(&sums);
            }};
        }
        match x.len() {
            1 => choose!(1),
            2 => choose!(2),
            3 => choose!(3),
            4 => choose!(4),
            _ => {}
        }
    }

    macro_rules! kernel {
        ($name:ident, $features:literal, |$u:ident, $s:ident, $start:ident| $dot:expr) => {
            /// KIND: 8 = Q8_0, 40 = Q4_0, 41 = Q4_1.
            ///
            /// # Safety
            /// `w` has `blocks` blocks, each row `blocks` blocks.
            #[target_feature(enable = $features)]
            unsafe fn $name<const N: usize, const KIND: u32>(
                w: &[u8],
                x: &[QuantisedRow<'_>; N],
                blocks: usize,
            ) -> [f32; N] {
                let bytes = match KIND {
                    8 => 34,
                    40 => 18,
                    _ => 20,
                };
                let mut sums = [_mm256_setzero_ps(); N];
                let mut minimums = [0f32; N];
                for i in 0..blocks {
                    // SAFETY: block i of `blocks`.
                    let block = unsafe { w.as_ptr().add(i * bytes) };
                    // SAFETY: every block begins with one f16, a Q4_1 block with two.
                    let (d, m) = unsafe { (half_at(block), if KIND == 41 { half_at(block.add(2)) } else { 0.0 }) };
                    let codes = if KIND == 8 {
                        // SAFETY: 32 bytes after the scale.
                        unsafe { _mm256_loadu_si256(block.add(2).cast()) }
                    } else {
                        // SAFETY: 16 bytes after the scale, and the minimum of Q4_1.
                        unsafe { unpack(block.add(if KIND == 41 { 4 } else { 2 })) }
                    };
                    for r in 0..N {
                        // SAFETY: every row has `blocks` blocks of 32 and as many scales and sums.
                        let (q, dx, sum) = unsafe {
                            (
                                _mm256_loadu_si256(x[r].q.as_ptr().add(i * 32).cast()),
                                *x[r].d.get_unchecked(i),
                                *x[r].sums.get_unchecked(i),
                            )
                        };
                        let $start = if KIND == 40 {
                            _mm256_zextsi128_si256(_mm_cvtsi32_si128(-8 * sum))
                        } else {
                            _mm256_setzero_si256()
                        };
                        let ($u, $s) =
                            if KIND == 8 { (_mm256_abs_epi8(codes), _mm256_sign_epi8(q, codes)) } else { (codes, q) };
                        let products: __m256i = $dot;
                        sums[r] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(products), _mm256_set1_ps(d * dx), sums[r]);
                        if KIND == 41 {
                            minimums[r] = (m * dx).mul_add(sum as f32, minimums[r]);
                        }
                    }
                }
                let mut out = [0f32; N];
                for r in 0..N {
                    out[r] = lanes(sums[r]) + minimums[r];
                }
                out
            }
        };
    }

    kernel!(vnni, "avx2,fma,f16c,avx512f,avx512vl,avx512vnni", |u, s, start| _mm256_dpbusd_epi32(start, u, s));
    kernel!(avx2, "avx2,fma,f16c", |u, s, start| {
        // u <= 128 and |s| <= 127, so a pair's sum stays inside i16.
        _mm256_add_epi32(start, _mm256_madd_epi16(_mm256_maddubs_epi16(u, s), _mm256_set1_epi16(1)))
    });

    /// # Safety
    /// Two readable bytes.
    #[target_feature(enable = "f16c")]
    unsafe fn half_at(at: *const u8) -> f32 {
        // SAFETY: the caller's contract.
        let bits = unsafe { at.cast::<u16>().read_unaligned() };
        _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(i32::from(bits))))
    }

    /// 16 bytes of nibbles as 32 bytes: the low ones first.
    ///
    /// # Safety
    /// 16 readable bytes.
    #[target_feature(enable = "avx2")]
    unsafe fn unpack(at: *const u8) -> __m256i {
        // SAFETY: the caller's contract.
        let packed = unsafe { _mm_loadu_si128(at.cast()) };
        let mask = _mm_set1_epi8(15);
        _mm256_set_m128i(_mm_and_si128(_mm_srli_epi16(packed, 4), mask), _mm_and_si128(packed, mask))
    }

    #[target_feature(enable = "avx2")]
    fn lanes(v: __m256) -> f32 {
        let four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
        let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
        _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Weights of `format` for `x`'s length, and a quantised copy of `x`.
    fn case(format: Format, w: &[f32], x: &[f32]) -> (Vec<u8>, Vec<i8>, Vec<f32>, Vec<i32>) {
        let mut bytes = vec![0; format.row_bytes(w.len()).unwrap()];
        sparsed_quant::encode(format, w, &mut bytes).unwrap();
        let blocks = x.len() / BLOCK;
        let (mut q, mut d, mut sums) = (vec![0; x.len()], vec![0.0; blocks], vec![0; blocks]);
        quantise_row(x, &mut q, &mut d, &mut sums);
        (bytes, q, d, sums)
    }

    proptest! {
        #[test]
        fn simd_levels_equal_the_scalar_twin(
            pairs in (1usize..6).prop_flat_map(|n| proptest::collection::vec((-4f32..4.0, -4f32..4.0), n * BLOCK)),
        ) {
            let (w, x): (Vec<f32>, Vec<f32>) = pairs.into_iter().unzip();
            for format in [Format::Q8_0, Format::Q4_0, Format::Q4_1] {
                let (bytes, q, d, sums) = case(format, &w, &x);
                let row = QuantisedRow { q: &q, d: &d, sums: &sums };
                let scalar = dot_scalar(format, &bytes, row);
                for level in [Level::Avx2, Level::Avx512] {
                    let Ok(level) = Level::forced(level.name()) else { continue };
                    let mut four = [0.0; 4];
                    dots(level, format, &bytes, &[row; 4], &mut four);
                    let mut one = [0.0];
                    dots(level, format, &bytes, &[row], &mut one);
                    prop_assert!(four.iter().all(|v| v.to_bits() == one[0].to_bits()), "depends on the number of rows");
                    prop_assert!((one[0] - scalar).abs() <= 1e-4 * (1.0 + scalar.abs()), "{level:?} {format:?}: {} {scalar}", one[0]);
                }
            }
        }
    }
}
