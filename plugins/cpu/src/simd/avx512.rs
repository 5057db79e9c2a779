//! The lanes as one AVX-512 register each.

use super::products::BroadcastProducts;
use super::{E4M3_IN_HALF, LANES, Lanes, Words};
use std::arch::asm;
#[allow(clippy::wildcard_imports, reason = "intrinsics: their names say whose they are")]
use std::arch::x86_64::*;

/// AVX-512 F, BW, DQ, VL and VNNI.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Avx512(());

impl Avx512 {
    /// # Safety
    /// The CPU has AVX-512 F, BW, DQ, VL, VNNI, and AVX2, FMA and F16C.
    #[inline(always)]
    pub(crate) unsafe fn assume() -> Self {
        Self(())
    }
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

impl Lanes for Avx512 {
    const REGISTERS: usize = 1;
    type F = __m512;
    type I = __m512i;

    by_intrinsics! {
        fn splat(v: f32) -> __m512 { _mm512_set1_ps(v) }
        fn load(v: &[f32; LANES]) -> __m512 { _mm512_loadu_ps(v.as_ptr()) }
        fn store(v: __m512, to: &mut [f32; LANES]) { _mm512_storeu_ps(to.as_mut_ptr(), v) }
        fn load_half(v: &[u8; 2 * LANES]) -> __m512 { _mm512_cvtph_ps(_mm256_loadu_si256(v.as_ptr().cast())) }
        fn load_bytes(v: &[u8; LANES]) -> __m512 {
            _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(v.as_ptr().cast())))
        }
        fn load_signed_bytes(v: &[u8; LANES]) -> __m512 {
            _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(v.as_ptr().cast())))
        }
        fn load_e4m3(v: &[u8; LANES]) -> __m512 {{
            let codes = _mm256_slli_epi16::<7>(_mm256_cvtepi8_epi16(_mm_loadu_si128(v.as_ptr().cast())));
            _mm512_cvtph_ps(_mm256_and_si256(codes, _mm256_set1_epi16(E4M3_IN_HALF)))
        }}
        fn store_half(v: __m512, to: &mut [u8; 2 * LANES]) {
            _mm256_storeu_si256(to.as_mut_ptr().cast(), _mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(v))
        }
        fn add(a: __m512, b: __m512) -> __m512 { _mm512_add_ps(a, b) }
        fn sub(a: __m512, b: __m512) -> __m512 { _mm512_sub_ps(a, b) }
        fn mul(a: __m512, b: __m512) -> __m512 { _mm512_mul_ps(a, b) }
        fn div(a: __m512, b: __m512) -> __m512 { _mm512_div_ps(a, b) }
        fn mul_add(a: __m512, b: __m512, c: __m512) -> __m512 { _mm512_fmadd_ps(a, b, c) }
        fn max(a: __m512, b: __m512) -> __m512 { _mm512_max_ps(a, b) }
        fn splat_i(v: i32) -> __m512i { _mm512_set1_epi32(v) }
        fn load_i(v: &[u8; 4 * LANES]) -> __m512i { _mm512_loadu_si512(v.as_ptr().cast()) }
        fn prefetch(at: &u8) { _mm_prefetch::<_MM_HINT_T1>(std::ptr::from_ref(at).cast()) }
        fn store_i(v: __m512i, to: &mut [i32; LANES]) { _mm512_storeu_si512(to.as_mut_ptr().cast(), v) }
        fn add_i(a: __m512i, b: __m512i) -> __m512i { _mm512_add_epi32(a, b) }
        fn max_i(a: __m512i, b: __m512i) -> __m512i { _mm512_max_epi32(a, b) }
        fn offset_bytes(v: __m512i) -> __m512i { _mm512_xor_si512(v, _mm512_set1_epi8(-128)) }
        fn above(a: __m512, b: __m512) -> u16 { _mm512_cmp_ps_mask::<_CMP_GT_OQ>(a, b) }
        fn high_nibbles(v: __m512i) -> __m512i {
            _mm512_and_si512(_mm512_srli_epi16::<4>(v), _mm512_set1_epi8(15))
        }
        fn low_nibbles(v: __m512i) -> __m512i { _mm512_and_si512(v, _mm512_set1_epi8(15)) }
        fn with_fifth_bit(nibbles: __m512i, fifth: __m512i, at: usize) -> __m512i {{
            let bit = match at {
                0 => _mm512_slli_epi16::<4>(fifth),
                1 => _mm512_slli_epi16::<3>(fifth),
                2 => _mm512_slli_epi16::<2>(fifth),
                3 => _mm512_slli_epi16::<1>(fifth),
                4 => fifth,
                5 => _mm512_srli_epi16::<1>(fifth),
                6 => _mm512_srli_epi16::<2>(fifth),
                _ => _mm512_srli_epi16::<3>(fifth),
            };
            _mm512_or_si512(nibbles, _mm512_and_si512(bit, _mm512_set1_epi8(0x10)))
        }}
        fn with_upper_bits(nibbles: __m512i, upper: __m512i, at: usize) -> __m512i {{
            let bits = match at {
                0 => _mm512_slli_epi16::<4>(upper),
                1 => _mm512_slli_epi16::<2>(upper),
                2 => upper,
                _ => _mm512_srli_epi16::<2>(upper),
            };
            _mm512_or_si512(nibbles, _mm512_and_si512(bits, _mm512_set1_epi8(0x30)))
        }}
        fn to_float(v: __m512i) -> __m512 { _mm512_cvtepi32_ps(v) }
        fn round(v: __m512) -> __m512i { _mm512_cvtps_epi32(v) }
        fn magnitude_bits(v: __m512) -> __m512i {
            _mm512_and_si512(_mm512_castps_si512(v), _mm512_set1_epi32(0x7fff_ffff))
        }
        fn power_of_two(v: __m512) -> __m512 {
            _mm512_castsi512_ps(_mm512_slli_epi32::<23>(_mm512_add_epi32(
                _mm512_cvtps_epi32(v),
                _mm512_set1_epi32(127),
            )))
        }
        fn times_power_of_two(v: __m512, power: __m512) -> __m512 { _mm512_scalef_ps(v, power) }
        fn round_f(v: __m512) -> __m512 { _mm512_roundscale_ps::<_MM_FROUND_TO_NEAREST_INT>(v) }
        fn largest(v: __m512) -> f32 { _mm512_reduce_max_ps(v) }
    }

    #[inline(always)]
    fn split_bytes(self, low: __m512i, high: __m512i) -> ([u8; 2 * LANES], [u8; 2 * LANES]) {
        let (mut nearest, mut rest) = ([0; 2 * LANES], [0; 2 * LANES]);
        for (at, v) in [(0, low), (LANES, high)] {
            // SAFETY: `self` proves that the CPU has the instructions; 16 bytes from `at` on are inside the arrays.
            unsafe {
                let near = _mm512_srai_epi32::<8>(_mm512_add_epi32(v, _mm512_set1_epi32(128)));
                _mm_storeu_si128(nearest.as_mut_ptr().add(at).cast(), _mm512_cvtepi32_epi8(near));
                _mm_storeu_si128(rest.as_mut_ptr().add(at).cast(), _mm512_cvtepi32_epi8(v));
            }
        }
        (nearest, rest)
    }

    #[inline(always)]
    fn transpose(self, vectors: &[__m512; LANES]) -> [__m512; LANES] {
        let (mut two, mut four) = ([self.splat(0.0); LANES], [self.splat(0.0); LANES]);
        let (mut eight, mut all) = (two, two);
        // SAFETY: `self` proves that the CPU has the instructions.
        unsafe {
            // Of 2, 4, 8, then 16 vectors: two[2 i + b] has lanes 4 k + 2 b, 4 k + 2 b + 1 of vectors 2 i and 2 i + 1.
            for i in 0..8 {
                let (a, b) = (vectors[2 * i], vectors[2 * i + 1]);
                two[2 * i] = _mm512_unpacklo_ps(a, b);
                two[2 * i + 1] = _mm512_unpackhi_ps(a, b);
            }
            // four[4 i + j] has lanes 4 k + j of vectors 4 i .. 4 i + 4, k by its 128-bit lanes.
            for i in 0..4 {
                for b in 0..2 {
                    let (x, y) = (_mm512_castps_pd(two[4 * i + b]), _mm512_castps_pd(two[4 * i + 2 + b]));
                    four[4 * i + 2 * b] = _mm512_castpd_ps(_mm512_unpacklo_pd(x, y));
                    four[4 * i + 2 * b + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(x, y));
                }
            }
            // 128-bit lanes k of four vectors become one: first lanes 0 and 2, or 1 and 3, of two.
            for i in 0..2 {
                for j in 0..4 {
                    let (x, y) = (four[8 * i + j], four[8 * i + 4 + j]);
                    eight[8 * i + j] = _mm512_shuffle_f32x4::<0x88>(x, y);
                    eight[8 * i + 4 + j] = _mm512_shuffle_f32x4::<0xdd>(x, y);
                }
            }
            for j in 0..8 {
                let (x, y) = (eight[j], eight[8 + j]);
                all[j] = _mm512_shuffle_f32x4::<0x88>(x, y);
                all[8 + j] = _mm512_shuffle_f32x4::<0xdd>(x, y);
            }
        }
        all
    }

    #[inline(always)]
    fn fold(self, v: &[__m512; 4]) -> __m512 {
        // SAFETY: `self` proves that the CPU has the instructions.
        unsafe {
            // Lane i + 8 to lane i of two vectors at once, then i + 4 of all: 128-bit lane j is what is left of v[j].
            let a = _mm512_add_ps(_mm512_shuffle_f32x4::<0x44>(v[0], v[1]), _mm512_shuffle_f32x4::<0xee>(v[0], v[1]));
            let b = _mm512_add_ps(_mm512_shuffle_f32x4::<0x44>(v[2], v[3]), _mm512_shuffle_f32x4::<0xee>(v[2], v[3]));
            _mm512_add_ps(_mm512_shuffle_f32x4::<0x88>(a, b), _mm512_shuffle_f32x4::<0xdd>(a, b))
        }
    }

    #[inline(always)]
    fn maxima(self, v: &[__m512; LANES]) -> __m512 {
        let (mut four, mut two) = ([v[0]; 4], [v[0]; 2]);
        // SAFETY: `self` proves that the CPU has the instructions.
        unsafe {
            // As `fold` and `finish`.
            let halves = |a, b| _mm512_max_ps(_mm512_shuffle_f32x4::<0x44>(a, b), _mm512_shuffle_f32x4::<0xee>(a, b));
            for (j, four) in four.iter_mut().enumerate() {
                let (a, b) = (halves(v[j], v[j + 4]), halves(v[j + 8], v[j + 12]));
                *four = _mm512_max_ps(_mm512_shuffle_f32x4::<0x88>(a, b), _mm512_shuffle_f32x4::<0xdd>(a, b));
            }
            for (two, pair) in two.iter_mut().zip(four.as_chunks::<2>().0) {
                let (a, b) = (_mm512_castps_pd(pair[0]), _mm512_castps_pd(pair[1]));
                *two = _mm512_max_ps(
                    _mm512_castpd_ps(_mm512_unpacklo_pd(a, b)),
                    _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)),
                );
            }
            let [a, b] = two;
            _mm512_max_ps(_mm512_shuffle_ps::<0x88>(a, b), _mm512_shuffle_ps::<0xdd>(a, b))
        }
    }

    #[inline(always)]
    fn finish(self, folded: &[__m512; 4]) -> __m512 {
        // SAFETY: `self` proves that the CPU has the instructions.
        unsafe {
            // Lane i + 2 to lane i, then i + 1.
            let mut two = [folded[0]; 2];
            for (two, pair) in two.iter_mut().zip(folded.as_chunks::<2>().0) {
                let (a, b) = (_mm512_castps_pd(pair[0]), _mm512_castps_pd(pair[1]));
                *two = _mm512_add_ps(
                    _mm512_castpd_ps(_mm512_unpacklo_pd(a, b)),
                    _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)),
                );
            }
            let [a, b] = two;
            _mm512_add_ps(_mm512_shuffle_ps::<0x88>(a, b), _mm512_shuffle_ps::<0xdd>(a, b))
        }
    }
}

impl BroadcastProducts for Avx512 {
    by_intrinsics! {
        fn dot_small(acc: __m512i, w: __m512i, x: __m512i) -> __m512i { _mm512_dpbusd_epi32(acc, w, x) }
        fn dot_bytes(acc: __m512i, w: __m512i, x: __m512i) -> __m512i { _mm512_dpbusd_epi32(acc, w, x) }
        fn shl_byte(v: __m512i) -> __m512i { _mm512_slli_epi32::<8>(v) }
    }
}

impl Words for Avx512 {
    type Sums = __m512i;

    #[inline(always)]
    fn begin(self, start: __m512i) -> __m512i {
        start
    }
    #[inline(always)]
    fn end(self, sums: __m512i) -> __m512i {
        sums
    }

    by_intrinsics! {
        fn load_ints(v: &[i32; LANES]) -> __m512i { _mm512_loadu_si512(v.as_ptr().cast()) }
        fn bits(v: __m512) -> __m512i { _mm512_castps_si512(v) }
        fn pair_words(low: __m512i, high: __m512i) -> __m512i {
            _mm512_or_si512(_mm512_and_si512(low, _mm512_set1_epi32(0xffff)), _mm512_slli_epi32::<16>(high))
        }
        fn shift_right(v: __m512i, by: i32) -> __m512i { _mm512_srav_epi32(v, _mm512_set1_epi32(by)) }
        fn max_magnitude_words(most: __m512i, v: __m512i) -> __m512i {
            _mm512_max_epu16(most, _mm512_and_si512(v, _mm512_set1_epi16(0x7fff)))
        }
        fn fold_ints(v: &[__m512i; 4]) -> __m512i {{
            // As `fold`.
            let halves = |a, b| {
                _mm512_add_epi32(_mm512_shuffle_i32x4::<0x44>(a, b), _mm512_shuffle_i32x4::<0xee>(a, b))
            };
            let (a, b) = (halves(v[0], v[1]), halves(v[2], v[3]));
            _mm512_add_epi32(_mm512_shuffle_i32x4::<0x88>(a, b), _mm512_shuffle_i32x4::<0xdd>(a, b))
        }}
        fn pair_up_ints(folded: &[__m512i; 4]) -> [__m512i; 2] {{
            // As `finish`.
            let halves = |a, b| _mm512_add_epi32(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
            [halves(folded[0], folded[1]), halves(folded[2], folded[3])]
        }}
        fn finish_pairs(a: __m512i, b: __m512i) -> __m512i {{
            let (a, b) = (_mm512_castsi512_ps(a), _mm512_castsi512_ps(b));
            let (even, odd) = (_mm512_shuffle_ps::<0x88>(a, b), _mm512_shuffle_ps::<0xdd>(a, b));
            _mm512_add_epi32(_mm512_castps_si512(even), _mm512_castps_si512(odd))
        }}
        fn pack_words(a: __m512i, b: __m512i) -> __m512i {
            _mm512_inserti64x4::<1>(_mm512_castsi256_si512(_mm512_cvtepi32_epi16(a)), _mm512_cvtepi32_epi16(b))
        }
        fn zip_words(a: __m512i, b: __m512i) -> [__m512i; 2] {
            [_mm512_unpacklo_epi16(a, b), _mm512_unpackhi_epi16(a, b)]
        }
        fn zipped_in_order(v: [__m512; 2]) -> [__m512; 2] {{
            // Quarters 0, 2, 4 and 6 are in the first, the others in the second.
            let (low, high) = (
                _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11),
                _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15),
            );
            let (a, b) = (_mm512_castps_pd(v[0]), _mm512_castps_pd(v[1]));
            [
                _mm512_castpd_ps(_mm512_permutex2var_pd(a, low, b)),
                _mm512_castpd_ps(_mm512_permutex2var_pd(a, high, b)),
            ]
        }}
        fn shift_words(v: __m512i, by: i32) -> __m512i {{
            let half = _mm512_set1_epi16(((1 << by) >> 1) as i16);
            _mm512_sra_epi16(_mm512_adds_epi16(v, half), _mm_cvtsi32_si128(by))
        }}
        fn unit_bits(line: &[u8; 4 * LANES]) -> i32 {
            (_mm512_test_epi16_mask(_mm512_loadu_si512(line.as_ptr().cast()), _mm512_set1_epi16(1)) & 0xff) as i32
        }
        fn as_float(v: __m512i) -> __m512 { _mm512_castsi512_ps(v) }
        fn dot_words(sums: __m512i, a: __m512i, b: __m512i) -> __m512i { dpwssd(sums, a, b) }
    }
}

/// `vpdpwssd`: of its intrinsic the compiler makes two instructions.
#[inline]
#[target_feature(enable = "avx512f,avx512vnni")]
fn dpwssd(mut sums: __m512i, a: __m512i, b: __m512i) -> __m512i {
    // SAFETY: the caller has the instruction, and it touches registers only.
    unsafe {
        asm!("vpdpwssd {}, {}, {}", inout(zmm_reg) sums, in(zmm_reg) a, in(zmm_reg) b,
            options(pure, nomem, nostack, preserves_flags));
    }
    sums
}
