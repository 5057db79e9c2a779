//! What does each operator do to its rows? Leaf functions without state: slices in, slices out.
//!
//! Float kernels are written once, in lanes of [`LANES`], and compiled per level. All levels multiply and add with one
//! rounding, so that a row has the same bits at each: KV rows outlive the processor that they were made on.

pub(crate) mod activations;
pub(crate) mod attention;
#[cfg(test)]
mod bench;
pub(crate) mod blocked;
pub(crate) mod dot;
pub(crate) mod elementwise;
#[cfg(test)]
pub(crate) mod inputs;
pub(crate) mod norm;
pub(crate) mod packed;
pub(crate) mod route;
pub(crate) mod rows;
pub(crate) mod select;

use crate::simd::{Portable, portable_mul_add};

/// Independent sums of every float reduction: one AVX-512 register, two of AVX2, four of NEON.
pub(crate) const LANES: usize = 16;

/// How a level multiplies and adds: rounded once, to the same bits.
pub(crate) trait Arithmetic {
    fn mul_add(a: f32, b: f32, c: f32) -> f32;
}

/// By the FMA instruction.
pub(crate) struct Fused;

impl Arithmetic for Portable {
    #[inline(always)]
    fn mul_add(a: f32, b: f32, c: f32) -> f32 {
        portable_mul_add(a, b, c)
    }
}

impl Arithmetic for Fused {
    #[inline(always)]
    fn mul_add(a: f32, b: f32, c: f32) -> f32 {
        a.mul_add(b, c)
    }
}

/// Compiles the generic `$body::<Arithmetic>` once per level and chooses among them at run time.
macro_rules! leveled {
    ($(#[$meta:meta])* fn $name:ident($($arg:ident: $kind:ty),* $(,)?) $(-> $out:ty)? = $body:ident) => {
        $(#[$meta])*
        pub(crate) fn $name(level: $crate::level::Level, $($arg: $kind),*) $(-> $out)? {
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx2,fma,f16c")]
                fn avx2($($arg: $kind),*) $(-> $out)? {
                    $body::<$crate::kernels::Fused>($($arg),*)
                }
                #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma,f16c")]
                fn avx512($($arg: $kind),*) $(-> $out)? {
                    $body::<$crate::kernels::Fused>($($arg),*)
                }
                match level {
                    // SAFETY: a Level above Scalar exists only where the CPU has its instructions.
                    $crate::level::Level::Avx2 => return unsafe { avx2($($arg),*) },
                    // SAFETY: as above.
                    $crate::level::Level::Avx512 => return unsafe { avx512($($arg),*) },
                    _ => {}
                }
            }
            // The fused multiplication is in every aarch64; its levels differ in integers only.
            #[cfg(target_arch = "aarch64")]
            if level != $crate::level::Level::Scalar {
                return $body::<$crate::kernels::Fused>($($arg),*);
            }
            let _ = level;
            $body::<$crate::simd::Portable>($($arg),*)
        }
    };
}
pub(crate) use leveled;
