//! Value by value: SiLU, and the exponentials of routing and of the plain attention.

use super::Arithmetic;
use super::blocked::exp2;
use crate::simd::{LANES, Lanes, on_level};

on_level! {
    /// `y = gate / (1 + exp(-gate)) * up`.
    fn silu_mul(gate: &[f32], up: &[f32], y: &mut [f32]) = silu_mul_body
}

#[inline(always)]
fn silu_mul_body<L: Lanes>(l: L, gate: &[f32], up: &[f32], y: &mut [f32]) {
    let ((gates, gate), (ups, up), (ys, y)) = (gate.as_chunks(), up.as_chunks(), y.as_chunks_mut());
    for ((y, g), u) in ys.iter_mut().zip(gates).zip(ups) {
        silu_vector(l, g, u, y);
    }
    if !y.is_empty() {
        let (mut g, mut u, mut to) = ([0.0; LANES], [0.0; LANES], [0.0; LANES]);
        g[..gate.len()].copy_from_slice(gate);
        u[..up.len()].copy_from_slice(up);
        silu_vector(l, &g, &u, &mut to);
        y.copy_from_slice(&to[..y.len()]);
    }
}

#[inline(always)]
fn silu_vector<L: Lanes>(l: L, gate: &[f32; LANES], up: &[f32; LANES], y: &mut [f32; LANES]) {
    /// Past it the factor is 0 in any case, and 2^x is not.
    const LARGEST: f32 = 126.0;
    let (g, zero) = (l.load(gate), l.splat(0.0));
    // Not above LARGEST; in this order a NaN stays.
    let x = l.max(l.splat(-LARGEST), l.mul(g, l.splat(std::f32::consts::LOG2_E)));
    let e = exp2(l, l.sub(zero, x));
    l.store(l.mul(l.div(g, l.add(l.splat(1.0), e)), l.load(up)), y);
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
    use crate::kernels::Fused;
    use crate::kernels::inputs::{bits, cases, values};
    use crate::level::Level;
    use crate::simd::Portable;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(cases(256))]
        /// Within 5e-6 of the value, and where e^-gate leaves f32's range 2e-38 of the product of both; the same bits
        /// at every level.
        #[test]
        fn silu_is_close_to_f64_and_the_same_at_every_level(
            inputs in values(1e3), n in 0usize..70, power in 0i32..8,
        ) {
            let mut row = inputs.rows();
            let gate: Vec<f32> = row(n).iter().map(|gate| gate * 2f32.powi(power)).collect();
            let up = row(n);
            let run = |level| {
                let mut y = vec![0.0; n];
                silu_mul(level, &gate, &up, &mut y);
                y
            };
            let scalar = run(Level::Scalar);
            for ((y, g), u) in scalar.iter().zip(&gate).zip(&up) {
                let (g, u) = (f64::from(*g), f64::from(*u));
                let exact = g / (1.0 + (-g).exp()) * u;
                let allowed = 5e-6 * exact.abs() + 2e-38 * (g * u).abs() + f64::from(f32::MIN_POSITIVE);
                prop_assert!((f64::from(*y) - exact).abs() <= allowed, "{g} {u}: {y}, not {exact}");
            }
            for level in Level::all() {
                prop_assert_eq!(bits(&run(level)), bits(&scalar), "{:?}", level);
            }
        }
    }

    #[test]
    fn silu_of_what_is_no_number_or_infinite_is_that() {
        for level in Level::all() {
            let (mut y, special) = ([0.0; 3], [f32::NAN, f32::INFINITY, f32::NEG_INFINITY]);
            silu_mul(level, &special, &[1.0; 3], &mut y);
            assert!(y[0].is_nan() && y[1] == f32::INFINITY, "{level:?}: {y:?}");
        }
    }

    #[test]
    fn exp_is_close_to_f64_over_its_range() {
        for i in -8700..8800 {
            let x = i as f32 * 0.01;
            let exact = f64::from(x).exp();
            let found = exp::<Portable>(x);
            assert!((f64::from(found) / exact - 1.0).abs() < 3e-7, "exp({x}) = {found}, not {exact}");
            assert_eq!(found.to_bits(), exp::<Fused>(x).to_bits(), "exp({x})");
        }
        assert_eq!(exp::<Portable>(-1000.0), 0.0);
        assert!(exp::<Portable>(f32::NAN).is_nan());
    }
}
