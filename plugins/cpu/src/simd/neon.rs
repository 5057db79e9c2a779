//! The lanes as four NEON registers each, and what the three levels multiply bytes with.

mod products;

use super::{E4M3_IN_HALF, LANES, Lanes};
#[allow(clippy::wildcard_imports, reason = "intrinsics: their names say whose they are")]
use std::arch::aarch64::*;
use std::arch::asm;
use std::marker::PhantomData;

/// NEON, which every aarch64 has, and the byte products that P names.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Neon<P>(PhantomData<P>);

/// Byte products: widening multiplications.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Base;
/// Byte products: `sdot`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Dotprod;
/// Byte products: `smmla`, and `sdot` where activations have one byte.
#[derive(Clone, Copy, Debug)]
pub(crate) struct I8mm;

impl<P> Neon<P> {
    /// # Safety
    /// The CPU has what P needs.
    #[inline(always)]
    pub(crate) unsafe fn assume() -> Self {
        Self(PhantomData)
    }
}

type F = [float32x4_t; 4];
/// Bytes or 32-bit lanes.
type I = [int32x4_t; 4];

/// An expression of each register of vectors.
macro_rules! each {
    (|$($v:ident),+| $body:expr) => {
        std::array::from_fn(|register| {
            $(let $v = $v[register];)+
            $body
        })
    };
}

/// Methods whose body is one expression of intrinsics.
macro_rules! by_intrinsics {
    ($(fn $name:ident ($($arg:ident: $kind:ty),*) $(-> $out:ty)? { $body:expr })*) => {
        $(
            #[inline(always)]
            fn $name(self, $($arg: $kind),*) $(-> $out)? {
                // SAFETY: NEON is part of the target; references are valid for their whole array, and every load and
                // store here is an unaligned one inside it.
                unsafe { $body }
            }
        )*
    };
}

// Uses the macros above.
mod words;

impl<P: Copy> Lanes for Neon<P> {
    const REGISTERS: usize = 4;
    type F = F;
    type I = I;

    by_intrinsics! {
        fn splat(v: f32) -> F { [vdupq_n_f32(v); 4] }
        fn load(v: &[f32; LANES]) -> F {{
            let at = v.as_ptr();
            [vld1q_f32(at), vld1q_f32(at.add(4)), vld1q_f32(at.add(8)), vld1q_f32(at.add(12))]
        }}
        fn store(v: F, to: &mut [f32; LANES]) {{
            for (to, v) in to.as_chunks_mut::<4>().0.iter_mut().zip(v) {
                vst1q_f32(to.as_mut_ptr(), v);
            }
        }}
        fn load_half(v: &[u8; 2 * LANES]) -> F {{
            let low = vreinterpretq_f16_u8(vld1q_u8(v.as_ptr()));
            let high = vreinterpretq_f16_u8(vld1q_u8(v.as_ptr().add(16)));
            [
                vcvt_f32_f16(vget_low_f16(low)),
                vcvt_high_f32_f16(low),
                vcvt_f32_f16(vget_low_f16(high)),
                vcvt_high_f32_f16(high),
            ]
        }}
        fn load_bytes(v: &[u8; LANES]) -> F {{
            let v = vld1q_u8(v.as_ptr());
            let (low, high) = (vmovl_u8(vget_low_u8(v)), vmovl_high_u8(v));
            [
                vcvtq_f32_u32(vmovl_u16(vget_low_u16(low))),
                vcvtq_f32_u32(vmovl_high_u16(low)),
                vcvtq_f32_u32(vmovl_u16(vget_low_u16(high))),
                vcvtq_f32_u32(vmovl_high_u16(high)),
            ]
        }}
        fn load_signed_bytes(v: &[u8; LANES]) -> F {{
            let v = vreinterpretq_s8_u8(vld1q_u8(v.as_ptr()));
            let (low, high) = (vmovl_s8(vget_low_s8(v)), vmovl_high_s8(v));
            [
                vcvtq_f32_s32(vmovl_s16(vget_low_s16(low))),
                vcvtq_f32_s32(vmovl_high_s16(low)),
                vcvtq_f32_s32(vmovl_s16(vget_low_s16(high))),
                vcvtq_f32_s32(vmovl_high_s16(high)),
            ]
        }}
        fn load_e4m3(v: &[u8; LANES]) -> F {{
            let (v, kept) = (vreinterpretq_s8_u8(vld1q_u8(v.as_ptr())), vdupq_n_s16(E4M3_IN_HALF));
            let low = vreinterpretq_f16_s16(vandq_s16(vshll_n_s8::<7>(vget_low_s8(v)), kept));
            let high = vreinterpretq_f16_s16(vandq_s16(vshll_high_n_s8::<7>(v), kept));
            [
                vcvt_f32_f16(vget_low_f16(low)),
                vcvt_high_f32_f16(low),
                vcvt_f32_f16(vget_low_f16(high)),
                vcvt_high_f32_f16(high),
            ]
        }}
        fn store_half(v: F, to: &mut [u8; 2 * LANES]) {{
            let low = vcvt_high_f16_f32(vcvt_f16_f32(v[0]), v[1]);
            let high = vcvt_high_f16_f32(vcvt_f16_f32(v[2]), v[3]);
            vst1q_u8(to.as_mut_ptr(), vreinterpretq_u8_f16(low));
            vst1q_u8(to.as_mut_ptr().add(16), vreinterpretq_u8_f16(high));
        }}
        fn add(a: F, b: F) -> F { each!(|a, b| vaddq_f32(a, b)) }
        fn sub(a: F, b: F) -> F { each!(|a, b| vsubq_f32(a, b)) }
        fn mul(a: F, b: F) -> F { each!(|a, b| vmulq_f32(a, b)) }
        fn div(a: F, b: F) -> F { each!(|a, b| vdivq_f32(a, b)) }
        fn mul_add(a: F, b: F, c: F) -> F {
            each!(|a, b, c| vfmaq_f32(c, a, b))
        }
        // Not `fmax`: of zeros and NaNs it takes others than the other levels do.
        fn max(a: F, b: F) -> F { each!(|a, b| vbslq_f32(vcgtq_f32(a, b), a, b)) }
        fn splat_i(v: i32) -> I { [vdupq_n_s32(v); 4] }
        fn load_i(v: &[u8; 4 * LANES]) -> I {{
            let at = v.as_ptr();
            let v = [vld1q_u8(at), vld1q_u8(at.add(16)), vld1q_u8(at.add(32)), vld1q_u8(at.add(48))];
            each!(|v| vreinterpretq_s32_u8(v))
        }}
        fn store_i(v: I, to: &mut [i32; LANES]) {{
            for (to, v) in to.as_chunks_mut::<4>().0.iter_mut().zip(v) {
                vst1q_s32(to.as_mut_ptr(), v);
            }
        }}
        fn add_i(a: I, b: I) -> I { each!(|a, b| vaddq_s32(a, b)) }
        fn max_i(a: I, b: I) -> I { each!(|a, b| vmaxq_s32(a, b)) }
        fn offset_bytes(v: I) -> I { each!(|v| veorq_s32(v, vreinterpretq_s32_u8(vdupq_n_u8(0x80)))) }
        fn above(a: F, b: F) -> u16 {{
            let above: [uint32x4_t; 4] = each!(|a, b| vcgtq_f32(a, b));
            let words = |a, b| vuzp1q_u16(vreinterpretq_u16_u32(a), vreinterpretq_u16_u32(b));
            let (low, high) = (words(above[0], above[1]), words(above[2], above[3]));
            let bytes = vuzp1q_u8(vreinterpretq_u8_u16(low), vreinterpretq_u8_u16(high));
            // Each byte's own bit of its half; the sum of a half is its eight bits.
            let bits = vandq_u8(bytes, vreinterpretq_u8_u64(vdupq_n_u64(0x8040_2010_0804_0201)));
            let two = vpaddq_u8(bits, bits);
            let four = vpaddq_u8(two, two);
            vgetq_lane_u16::<0>(vreinterpretq_u16_u8(vpaddq_u8(four, four)))
        }}
        fn high_nibbles(v: I) -> I {
            each!(|v| vreinterpretq_s32_u8(vshrq_n_u8::<4>(vreinterpretq_u8_s32(v))))
        }
        fn low_nibbles(v: I) -> I { each!(|v| vandq_s32(v, vreinterpretq_s32_u8(vdupq_n_u8(15)))) }
        fn with_fifth_bit(nibbles: I, fifth: I, at: usize) -> I {
            each!(|nibbles, fifth| vorrq_s32(nibbles, vandq_s32(
                shifted(fifth, 4 - at as i8),
                vreinterpretq_s32_u8(vdupq_n_u8(0x10)),
            )))
        }
        fn with_upper_bits(nibbles: I, upper: I, at: usize) -> I {
            each!(|nibbles, upper| vorrq_s32(nibbles, vandq_s32(
                shifted(upper, 4 - 2 * at as i8),
                vreinterpretq_s32_u8(vdupq_n_u8(0x30)),
            )))
        }
        fn to_float(v: I) -> F { each!(|v| vcvtq_f32_s32(v)) }
        fn round(v: F) -> I { each!(|v| vcvtnq_s32_f32(v)) }
        fn magnitude_bits(v: F) -> I { each!(|v| vandq_s32(vreinterpretq_s32_f32(v), vdupq_n_s32(0x7fff_ffff))) }
        fn power_of_two(v: F) -> F {
            each!(|v| vreinterpretq_f32_s32(vshlq_n_s32::<23>(vaddq_s32(vcvtnq_s32_f32(v), vdupq_n_s32(127)))))
        }
        fn round_f(v: F) -> F { each!(|v| vrndnq_f32(v)) }
    }

    #[inline(always)]
    fn prefetch(self, at: &u8) {
        // SAFETY: a hint; it reads nothing.
        unsafe { asm!("prfm pldl2keep, [{at}]", at = in(reg) at, options(nostack, preserves_flags, readonly)) }
    }

    #[inline(always)]
    fn split_bytes(self, low: I, high: I) -> ([u8; 2 * LANES], [u8; 2 * LANES]) {
        let (mut nearest, mut rest) = ([0; 2 * LANES], [0; 2 * LANES]);
        for (at, v) in [(0, low), (LANES, high)] {
            // SAFETY: NEON is part of the target; 16 bytes from `at` on are inside the arrays.
            unsafe {
                let near: I = each!(|v| vrshrq_n_s32::<8>(v));
                vst1q_u8(nearest.as_mut_ptr().add(at), low_bytes(near));
                vst1q_u8(rest.as_mut_ptr().add(at), low_bytes(v));
            }
        }
        (nearest, rest)
    }

    #[inline(always)]
    fn fold(self, v: &[F; 4]) -> F {
        let mut out = v[0];
        for (out, v) in out.iter_mut().zip(v) {
            // SAFETY: NEON is part of the target.
            // Lane i + 8 to lane i, then i + 4.
            *out = unsafe { vaddq_f32(vaddq_f32(v[0], v[2]), vaddq_f32(v[1], v[3])) };
        }
        out
    }

    #[inline(always)]
    fn finish(self, folded: &[F; 4]) -> F {
        let mut out = folded[0];
        for (i, out) in out.iter_mut().enumerate() {
            let [a, b, c, d] = *folded;
            // SAFETY: NEON is part of the target.
            // Lane i + 2 to lane i of two vectors at once, then i + 1 of four.
            *out = unsafe { vpaddq_f32(halves(a[i], b[i]), halves(c[i], d[i])) };
        }
        out
    }
}

/// Lanes 0 and 1 plus lanes 2 and 3, of `a` and then of `b`.
#[inline(always)]
fn halves(a: float32x4_t, b: float32x4_t) -> float32x4_t {
    // SAFETY: NEON is part of the target.
    unsafe {
        let (a, b) = (vreinterpretq_f64_f32(a), vreinterpretq_f64_f32(b));
        vaddq_f32(vreinterpretq_f32_f64(vzip1q_f64(a, b)), vreinterpretq_f32_f64(vzip2q_f64(a, b)))
    }
}

/// The low byte of each 32-bit lane.
#[inline(always)]
fn low_bytes(v: I) -> uint8x16_t {
    // SAFETY: NEON is part of the target.
    unsafe {
        let v = v.map(|v| vreinterpretq_u16_s32(v));
        let (low, high) = (vuzp1q_u16(v[0], v[1]), vuzp1q_u16(v[2], v[3]));
        vuzp1q_u8(vreinterpretq_u8_u16(low), vreinterpretq_u8_u16(high))
    }
}

/// Each byte moved up by so many bits, down where negative.
#[inline(always)]
fn shifted(v: int32x4_t, by: i8) -> int32x4_t {
    // SAFETY: NEON is part of the target.
    unsafe { vreinterpretq_s32_u8(vshlq_u8(vreinterpretq_u8_s32(v), vdupq_n_s8(by))) }
}
