//! What do the NEON levels multiply words with? `smlal`, each product to a lane of its own: a pair is added at the end.

use super::{F, I, Neon};
use crate::simd::{LANES, Words};
#[allow(clippy::wildcard_imports, reason = "intrinsics: their names say whose they are")]
use std::arch::aarch64::*;

/// Each register of four lanes as two, whose lanes 2 i and 2 i + 1 are added in the end.
type Sums = [[int32x4_t; 2]; 4];

impl<P: Copy> Words for Neon<P> {
    type Sums = Sums;

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
        fn finish_ints(folded: &[I; 4]) -> I {{
            let [a, b, c, d] = *folded;
            each!(|a, b, c, d| vpaddq_s32(vpaddq_s32(a, b), vpaddq_s32(c, d)))
        }}
    }
}
