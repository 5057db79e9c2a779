//! Value by value: SiLU, and the exponential that attention shares.

use super::{Arithmetic, leveled};

leveled! {
    /// `y = gate / (1 + exp(-gate)) * up`.
    fn silu_mul(gate: &[f32], up: &[f32], y: &mut [f32]) = silu_mul_body
}

#[inline(always)]
fn silu_mul_body<A: Arithmetic>(gate: &[f32], up: &[f32], y: &mut [f32]) {
    for ((y, g), u) in y.iter_mut().zip(gate).zip(up) {
        *y = g / (1.0 + exp::<A>(-g)) * u;
    }
}

/// e^x without branches, so that loops over it become vector code: x = n ln 2 + r, a polynomial of degree 6 in r, then
/// n goes into the exponent. Relative error below 3e-7 for x in -87 .. 88; below that range 0, above it f32's e^88.
#[inline(always)]
pub(super) fn exp<A: Arithmetic>(x: f32) -> f32 {
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    let inside = x.clamp(-87.0, 88.0);
    let n = (inside * std::f32::consts::LOG2_E).round_ties_even();
    let r = A::mul_add(n, -LN2_LOW, A::mul_add(n, -LN2_HIGH, inside));
    let mut p = 1.0 / 720.0;
    for c in [1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
        p = A::mul_add(p, r, c);
    }
    #[allow(clippy::cast_possible_truncation, reason = "n is between -126 and 127")]
    let power = f32::from_bits((((n as i32) + 127) << 23).cast_unsigned());
    let value = p * power;
    if x < -87.0 { 0.0 } else { value }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::{Fused, Plain};

    #[test]
    fn exp_is_close_to_f64_over_its_range() {
        for i in -8700..8800 {
            let x = i as f32 * 0.01;
            let exact = f64::from(x).exp();
            for found in [exp::<Plain>(x), exp::<Fused>(x)] {
                assert!((f64::from(found) / exact - 1.0).abs() < 3e-7, "exp({x}) = {found}, not {exact}");
            }
        }
        assert_eq!(exp::<Plain>(-1000.0), 0.0);
        assert!(exp::<Plain>(f32::NAN).is_nan());
    }
}
