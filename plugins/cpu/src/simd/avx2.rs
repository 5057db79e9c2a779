//! The lanes as two AVX2 registers each.

use super::products::BroadcastProducts;
use super::{E4M3_IN_HALF, LANES, Lanes, Words};
#[allow(clippy::wildcard_imports, reason = "intrinsics: their names say whose they are")]
use std::arch::x86_64::*;

/// AVX2, FMA and F16C.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Avx2(());

impl Avx2 {
    /// # Safety
    /// The CPU has AVX2, FMA and F16C.
    #[inline(always)]
    pub(crate) unsafe fn assume() -> Self {
        Self(())
    }
}

type F = [__m256; 2];
type I = [__m256i; 2];

/// Of each register, or for each number. No closure: it would be compiled without the level's instructions, and each
/// intrinsic be a call.
macro_rules! each {
    (|$v:ident| $body:expr, $of:expr) => {{
        let [a, b] = $of;
        [
            {
                let $v = a;
                $body
            },
            {
                let $v = b;
                $body
            },
        ]
    }};
}

/// Methods whose body is one expression of intrinsics.
macro_rules! by_intrinsics {
    ($(fn $name:ident $(<const $n:ident: $nt:ty>)? ($($arg:ident: $kind:ty),*) $(-> $out:ty)? { $body:expr })*) => {
        $(
            #[inline(always)]
            fn $name $(<const $n: $nt>)? (self, $($arg: $kind),*) $(-> $out)? {
                // SAFETY: `self` proves that the CPU has the instructions; references are valid for their whole array,
                // and every load and store here is an unaligned one of exactly that size.
                unsafe { $body }
            }
        )*
    };
}

impl Lanes for Avx2 {
    const REGISTERS: usize = 2;
    type F = F;
    type I = I;

    by_intrinsics! {
        fn splat(v: f32) -> F { [_mm256_set1_ps(v); 2] }
        fn load(v: &[f32; LANES]) -> F { [_mm256_loadu_ps(v.as_ptr()), _mm256_loadu_ps(v.as_ptr().add(8))] }
        fn store(v: F, to: &mut [f32; LANES]) {{
            _mm256_storeu_ps(to.as_mut_ptr(), v[0]);
            _mm256_storeu_ps(to.as_mut_ptr().add(8), v[1]);
        }}
        fn load_half(v: &[u8; 2 * LANES]) -> F {
            [
                _mm256_cvtph_ps(_mm_loadu_si128(v.as_ptr().cast())),
                _mm256_cvtph_ps(_mm_loadu_si128(v.as_ptr().add(16).cast())),
            ]
        }
        fn load_bytes(v: &[u8; LANES]) -> F {
            each!(|at| _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(v.as_ptr().add(at).cast()))), [0, 8])
        }
        fn load_signed_bytes(v: &[u8; LANES]) -> F {
            each!(|at| _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(v.as_ptr().add(at).cast()))), [0, 8])
        }
        fn load_e4m3(v: &[u8; LANES]) -> F {{
            let codes = _mm256_slli_epi16::<7>(_mm256_cvtepi8_epi16(_mm_loadu_si128(v.as_ptr().cast())));
            let halves = _mm256_and_si256(codes, _mm256_set1_epi16(E4M3_IN_HALF));
            [
                _mm256_cvtph_ps(_mm256_castsi256_si128(halves)),
                _mm256_cvtph_ps(_mm256_extracti128_si256::<1>(halves)),
            ]
        }}
        fn store_half(v: F, to: &mut [u8; 2 * LANES]) {{
            _mm_storeu_si128(to.as_mut_ptr().cast(), _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(v[0]));
            _mm_storeu_si128(to.as_mut_ptr().add(16).cast(), _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(v[1]));
        }}
        fn add(a: F, b: F) -> F { [_mm256_add_ps(a[0], b[0]), _mm256_add_ps(a[1], b[1])] }
        fn sub(a: F, b: F) -> F { [_mm256_sub_ps(a[0], b[0]), _mm256_sub_ps(a[1], b[1])] }
        fn mul(a: F, b: F) -> F { [_mm256_mul_ps(a[0], b[0]), _mm256_mul_ps(a[1], b[1])] }
        fn div(a: F, b: F) -> F { [_mm256_div_ps(a[0], b[0]), _mm256_div_ps(a[1], b[1])] }
        fn mul_add(a: F, b: F, c: F) -> F { [_mm256_fmadd_ps(a[0], b[0], c[0]), _mm256_fmadd_ps(a[1], b[1], c[1])] }
        fn max(a: F, b: F) -> F { [_mm256_max_ps(a[0], b[0]), _mm256_max_ps(a[1], b[1])] }
        fn splat_i(v: i32) -> I { [_mm256_set1_epi32(v); 2] }
        fn load_i(v: &[u8; 4 * LANES]) -> I {
            [_mm256_loadu_si256(v.as_ptr().cast()), _mm256_loadu_si256(v.as_ptr().add(32).cast())]
        }
        fn prefetch(at: &u8) { _mm_prefetch::<_MM_HINT_T1>(std::ptr::from_ref(at).cast()) }
        fn store_i(v: I, to: &mut [i32; LANES]) {{
            _mm256_storeu_si256(to.as_mut_ptr().cast(), v[0]);
            _mm256_storeu_si256(to.as_mut_ptr().add(8).cast(), v[1]);
        }}
        fn add_i(a: I, b: I) -> I { [_mm256_add_epi32(a[0], b[0]), _mm256_add_epi32(a[1], b[1])] }
        fn max_i(a: I, b: I) -> I { [_mm256_max_epi32(a[0], b[0]), _mm256_max_epi32(a[1], b[1])] }
        fn offset_bytes(v: I) -> I { each!(|v| _mm256_xor_si256(v, _mm256_set1_epi8(-128)), v) }
        fn above(a: F, b: F) -> u16 {{
            let [low, high] = each!(|i| _mm256_movemask_ps(_mm256_cmp_ps::<_CMP_GT_OQ>(a[i], b[i])), [0, 1]);
            low as u16 | (high as u16) << 8
        }}
        fn high_nibbles(v: I) -> I {{
            let mask = _mm256_set1_epi8(15);
            each!(|v| _mm256_and_si256(_mm256_srli_epi16::<4>(v), mask), v)
        }}
        fn low_nibbles(v: I) -> I { each!(|v| _mm256_and_si256(v, _mm256_set1_epi8(15)), v) }
        fn with_fifth_bit(nibbles: I, fifth: I, at: usize) -> I {{
            each!(|i| {
                let v = fifth[i];
                let shifted = match at {
                    0 => _mm256_slli_epi16::<4>(v),
                    1 => _mm256_slli_epi16::<3>(v),
                    2 => _mm256_slli_epi16::<2>(v),
                    3 => _mm256_slli_epi16::<1>(v),
                    4 => v,
                    5 => _mm256_srli_epi16::<1>(v),
                    6 => _mm256_srli_epi16::<2>(v),
                    _ => _mm256_srli_epi16::<3>(v),
                };
                _mm256_or_si256(nibbles[i], _mm256_and_si256(shifted, _mm256_set1_epi8(0x10)))
            }, [0, 1])
        }}
        fn with_upper_bits(nibbles: I, upper: I, at: usize) -> I {{
            each!(|i| {
                let v = upper[i];
                let shifted = match at {
                    0 => _mm256_slli_epi16::<4>(v),
                    1 => _mm256_slli_epi16::<2>(v),
                    2 => v,
                    _ => _mm256_srli_epi16::<2>(v),
                };
                _mm256_or_si256(nibbles[i], _mm256_and_si256(shifted, _mm256_set1_epi8(0x30)))
            }, [0, 1])
        }}
        fn to_float(v: I) -> F { [_mm256_cvtepi32_ps(v[0]), _mm256_cvtepi32_ps(v[1])] }
        fn round(v: F) -> I { [_mm256_cvtps_epi32(v[0]), _mm256_cvtps_epi32(v[1])] }
        fn magnitude_bits(v: F) -> I {{
            let mask = _mm256_set1_epi32(0x7fff_ffff);
            [_mm256_and_si256(_mm256_castps_si256(v[0]), mask), _mm256_and_si256(_mm256_castps_si256(v[1]), mask)]
        }}
        fn power_of_two(v: F) -> F {
            each!(|v| {
                let biased = _mm256_add_epi32(_mm256_cvtps_epi32(v), _mm256_set1_epi32(127));
                _mm256_castsi256_ps(_mm256_slli_epi32::<23>(biased))
            }, v)
        }
        fn round_f(v: F) -> F { each!(|v| _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(v), v) }
    }

    #[inline(always)]
    fn split_bytes(self, low: I, high: I) -> ([u8; 2 * LANES], [u8; 2 * LANES]) {
        super::portable::split_bytes(&ints(low), &ints(high))
    }

    #[inline(always)]
    fn fold(self, v: &[F; 4]) -> F {
        let mut out = v[0];
        // SAFETY: `self` proves that the CPU has the instructions.
        unsafe {
            for (out, v) in out.iter_mut().zip(v.as_chunks::<2>().0) {
                // Lane i + 8 to lane i, then i + 4 of two vectors at once.
                let (a, b) = (_mm256_add_ps(v[0][0], v[0][1]), _mm256_add_ps(v[1][0], v[1][1]));
                *out = _mm256_add_ps(_mm256_permute2f128_ps::<0x20>(a, b), _mm256_permute2f128_ps::<0x31>(a, b));
            }
        }
        out
    }

    #[inline(always)]
    fn finish(self, folded: &[F; 4]) -> F {
        let mut out = folded[0];
        // SAFETY: `self` proves that the CPU has the instructions.
        unsafe {
            for (half, out) in out.iter_mut().enumerate() {
                // Lane i + 2 to lane i, then i + 1.
                let mut two = [*out; 2];
                for (two, pair) in two.iter_mut().zip(folded.as_chunks::<2>().0) {
                    let (a, b) = (_mm256_castps_pd(pair[0][half]), _mm256_castps_pd(pair[1][half]));
                    *two = _mm256_add_ps(
                        _mm256_castpd_ps(_mm256_unpacklo_pd(a, b)),
                        _mm256_castpd_ps(_mm256_unpackhi_pd(a, b)),
                    );
                }
                *out =
                    _mm256_add_ps(_mm256_shuffle_ps::<0x88>(two[0], two[1]), _mm256_shuffle_ps::<0xdd>(two[0], two[1]));
            }
        }
        out
    }
}

impl BroadcastProducts for Avx2 {
    by_intrinsics! {
        fn dot_small(acc: I, w: I, x: I) -> I {{
            // A pair's sum is at most 2 * 63 * 128: nothing saturates.
            each!(|i| {
                let pairs = _mm256_maddubs_epi16(w[i], x[i]);
                _mm256_add_epi32(acc[i], _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))
            }, [0, 1])
        }}
        fn dot_bytes(acc: I, w: I, x: I) -> I {{
            // Even and odd bytes as words; products of neighbouring words are summed in 32 bits.
            each!(|i| {
                let even = _mm256_madd_epi16(
                    _mm256_and_si256(w[i], _mm256_set1_epi16(0xff)),
                    _mm256_srai_epi16::<8>(_mm256_slli_epi16::<8>(x[i])),
                );
                let odd = _mm256_madd_epi16(_mm256_srli_epi16::<8>(w[i]), _mm256_srai_epi16::<8>(x[i]));
                _mm256_add_epi32(acc[i], _mm256_add_epi32(even, odd))
            }, [0, 1])
        }}
        fn shl_byte(v: I) -> I { each!(|v| _mm256_slli_epi32::<8>(v), v) }
    }
}

impl Words for Avx2 {
    type Sums = I;

    #[inline(always)]
    fn begin(self, start: I) -> I {
        start
    }
    #[inline(always)]
    fn end(self, sums: I) -> I {
        sums
    }

    by_intrinsics! {
        fn load_ints(v: &[i32; LANES]) -> I {
            [_mm256_loadu_si256(v.as_ptr().cast()), _mm256_loadu_si256(v.as_ptr().add(8).cast())]
        }
        fn bits(v: F) -> I { each!(|v| _mm256_castps_si256(v), v) }
        fn pair_words(low: I, high: I) -> I {{
            each!(|i| _mm256_blend_epi16::<0xaa>(low[i], _mm256_slli_epi32::<16>(high[i])), [0, 1])
        }}
        fn shift_right(v: I, by: i32) -> I { each!(|v| _mm256_srav_epi32(v, _mm256_set1_epi32(by)), v) }
        fn max_magnitude_words(most: I, v: I) -> I {{
            each!(|i| _mm256_max_epu16(most[i], _mm256_and_si256(v[i], _mm256_set1_epi16(0x7fff))), [0, 1])
        }}
        fn dot_words(sums: I, a: I, b: I) -> I {
            [
                _mm256_add_epi32(sums[0], _mm256_madd_epi16(a[0], b[0])),
                _mm256_add_epi32(sums[1], _mm256_madd_epi16(a[1], b[1])),
            ]
        }
        fn fold_ints(v: &[I; 4]) -> I {{
            // As `fold`.
            each!(|i| {
                let (a, b) = (_mm256_add_epi32(v[i][0], v[i][1]), _mm256_add_epi32(v[i + 1][0], v[i + 1][1]));
                _mm256_add_epi32(_mm256_permute2x128_si256::<0x20>(a, b), _mm256_permute2x128_si256::<0x31>(a, b))
            }, [0, 2])
        }}
        fn pair_up_ints(folded: &[I; 4]) -> [I; 2] {{
            each!(|i| {
                let (a, b) = (folded[i], folded[i + 1]);
                each!(
                    |i| _mm256_add_epi32(_mm256_unpacklo_epi64(a[i], b[i]), _mm256_unpackhi_epi64(a[i], b[i])),
                    [0, 1]
                )
            }, [0, 2])
        }}
        fn finish_pairs(a: I, b: I) -> I {
            [_mm256_hadd_epi32(a[0], b[0]), _mm256_hadd_epi32(a[1], b[1])]
        }
        fn pack_words(a: I, b: I) -> I {{
            // Sign-extended low words never saturate.
            let a = each!(|v| _mm256_srai_epi32::<16>(_mm256_slli_epi32::<16>(v)), a);
            let b = each!(|v| _mm256_srai_epi32::<16>(_mm256_slli_epi32::<16>(v)), b);
            each!(|v| _mm256_permute4x64_epi64::<0xd8>(_mm256_packs_epi32(v[0], v[1])), [a, b])
        }}
        fn zip_words(a: I, b: I) -> [I; 2] {
            [
                [_mm256_unpacklo_epi16(a[0], b[0]), _mm256_unpackhi_epi16(a[0], b[0])],
                [_mm256_unpacklo_epi16(a[1], b[1]), _mm256_unpackhi_epi16(a[1], b[1])],
            ]
        }
        fn zipped_in_order(v: [F; 2]) -> [F; 2] {
            each!(|v| {
                [_mm256_permute2f128_ps::<0x20>(v[0], v[1]), _mm256_permute2f128_ps::<0x31>(v[0], v[1])]
            }, v)
        }
        fn shift_words(v: I, by: i32) -> I {{
            let (half, by) = (_mm256_set1_epi16(((1 << by) >> 1) as i16), _mm_cvtsi32_si128(by));
            each!(|v| _mm256_sra_epi16(_mm256_adds_epi16(v, half), by), v)
        }}
        fn as_float(v: I) -> F { each!(|v| _mm256_castsi256_ps(v), v) }
    }
}

/// The lanes as an array.
#[inline(always)]
fn ints(v: I) -> [i32; LANES] {
    // SAFETY: both are 64 bytes, and any bytes are integers.
    unsafe { std::mem::transmute(v) }
}
