//! What do the NEON levels multiply words with? `smlal`, each product to a lane of its own: a pair is added at the end.

use super::{F, I, Neon};
use crate::simd::{LANES, Words};
#[allow(clippy::wildcard_imports, reason = "intrinsics: their names say whose they are")]
use std::arch::aarch64::*;

/// Each register of four lanes as two, whose lanes 2 i and 2 i + 1 are added in the end.
type Sums = [[int32x4_t; 2]; 4];

impl<P: Copy> Words for Neon<P> {
    type Sums = Sums;

    #[inline(always)]
    fn zipped_in_order(self, v: [F; 2]) -> [F; 2] {
        v
    }

    by_intrinsics! {
        fn load_ints(v: &[i32; LANES]) -> I {{
            let at = v.as_ptr();
            [vld1q_s32(at), vld1q_s32(at.add(4)), vld1q_s32(at.add(8)), vld1q_s32(at.add(12))]
        }}
        fn bits(v: F) -> I { each!(|v| vreinterpretq_s32_f32(v)) }
        fn pair_words(low: I, high: I) -> I { each!(|low, high| vsliq_n_s32::<16>(low, high)) }
        fn shift_right(v: I, by: i32) -> I { each!(|v| vshlq_s32(v, vdupq_n_s32(-by))) }
        fn max_magnitude_words(most: I, v: I) -> I {
            each!(|most, v| vreinterpretq_s32_u16(vmaxq_u16(
                vreinterpretq_u16_s32(most),
                vandq_u16(vreinterpretq_u16_s32(v), vdupq_n_u16(0x7fff)),
            )))
        }
        fn begin(start: I) -> Sums {{
            let zero = vdupq_n_s32(0);
            start.map(|v| [vzip1q_s32(v, zero), vzip2q_s32(v, zero)])
        }}
        fn dot_words(sums: Sums, a: I, b: I) -> Sums {
            each!(|sums, a, b| {
                let (a, b) = (vreinterpretq_s16_s32(a), vreinterpretq_s16_s32(b));
                [vmlal_s16(sums[0], vget_low_s16(a), vget_low_s16(b)), vmlal_high_s16(sums[1], a, b)]
            })
        }
        fn end(sums: Sums) -> I { each!(|sums| vpaddq_s32(sums[0], sums[1])) }
        fn fold_ints(vectors: &[I; 4]) -> I {{
            let v = *vectors;
            each!(|v| vaddq_s32(vaddq_s32(v[0], v[1]), vaddq_s32(v[2], v[3])))
        }}
        fn pair_up_ints(folded: &[I; 4]) -> [I; 2] {{
            let pair = |a: I, b: I| {
                each!(|a, b| {
                    let (a, b) = (vreinterpretq_s64_s32(a), vreinterpretq_s64_s32(b));
                    let (even, odd) = (vzip1q_s64(a, b), vzip2q_s64(a, b));
                    vaddq_s32(vreinterpretq_s32_s64(even), vreinterpretq_s32_s64(odd))
                })
            };
            [pair(folded[0], folded[1]), pair(folded[2], folded[3])]
        }}
        fn finish_pairs(a: I, b: I) -> I { each!(|a, b| vpaddq_s32(a, b)) }
        fn pack_words(a: I, b: I) -> I {{
            let words = |low, high| vreinterpretq_s32_s16(vcombine_s16(vmovn_s32(low), vmovn_s32(high)));
            [words(a[0], a[1]), words(a[2], a[3]), words(b[0], b[1]), words(b[2], b[3])]
        }}
        fn zip_words(a: I, b: I) -> [I; 2] {{
            let zip = |i: usize| {
                let (a, b) = (vreinterpretq_s16_s32(a[i]), vreinterpretq_s16_s32(b[i]));
                [vreinterpretq_s32_s16(vzip1q_s16(a, b)), vreinterpretq_s32_s16(vzip2q_s16(a, b))]
            };
            let ([a, b], [c, d], [e, f], [g, h]) = (zip(0), zip(1), zip(2), zip(3));
            [[a, b, c, d], [e, f, g, h]]
        }}
        fn shift_words(v: I, by: i32) -> I {{
            let (half, by) = (vdupq_n_s16(((1 << by) >> 1) as i16), vdupq_n_s16(-by as i16));
            each!(|v| vreinterpretq_s32_s16(vshlq_s16(vqaddq_s16(vreinterpretq_s16_s32(v), half), by)))
        }}
        fn as_float(v: I) -> F { each!(|v| vreinterpretq_f32_s32(v)) }
    }
}
