//! Dot products and scaled sums of f32 rows.

use super::{Arithmetic, LANES, leveled};

leveled! {
    /// `sum a[i] b[i]`, in [`LANES`] interleaved sums that are added pairwise at the end.
    fn dot(a: &[f32], b: &[f32]) -> f32 = dot_body
}

leveled! {
    /// One row of a matrix against several rows: `out[r] = w . x[r]`, each as [`dot`] would have it.
    fn dots(w: &[f32], x: &[&[f32]], out: &mut [f32]) = dots_body
}

#[inline(always)]
pub(super) fn dot_body<A: Arithmetic>(a: &[f32], b: &[f32]) -> f32 {
    let mut sums = [0f32; LANES];
    let (a_lanes, a_rest) = a.as_chunks::<LANES>();
    let (b_lanes, b_rest) = b.as_chunks::<LANES>();
    for (a, b) in a_lanes.iter().zip(b_lanes) {
        for i in 0..LANES {
            sums[i] = A::mul_add(a[i], b[i], sums[i]);
        }
    }
    for (i, (a, b)) in a_rest.iter().zip(b_rest).enumerate() {
        sums[i] = A::mul_add(*a, *b, sums[i]);
    }
    fold(sums)
}

#[inline(always)]
fn dots_body<A: Arithmetic>(w: &[f32], x: &[&[f32]], out: &mut [f32]) {
    for (x, out) in x.iter().zip(out) {
        *out = dot_body::<A>(w, x);
    }
}

#[inline(always)]
pub(super) fn add_scaled_body<A: Arithmetic>(y: &mut [f32], scale: f32, x: &[f32]) {
    for (y, x) in y.iter_mut().zip(x) {
        *y = A::mul_add(scale, *x, *y);
    }
}

/// The sum of the lanes in a fixed tree order.
#[inline(always)]
pub(super) fn fold(mut sums: [f32; LANES]) -> f32 {
    let mut width = LANES / 2;
    while width > 0 {
        for i in 0..width {
            sums[i] += sums[i + width];
        }
        width /= 2;
    }
    sums[0]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::inputs::{cases, values};
    use crate::level::Level;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(cases(256))]
        /// Within 1e-5 of the sum of magnitudes from f64, and the same bits at every level.
        #[test]
        fn every_level_agrees_with_f64_and_has_the_bits_of_scalar(inputs in values(1e6), n in 0usize..200) {
            let mut row = inputs.rows();
            let (a, b) = (row(n), row(n));
            let exact: f64 = a.iter().zip(&b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
            let size: f64 = a.iter().zip(&b).map(|(a, b)| (f64::from(*a) * f64::from(*b)).abs()).sum();
            let scalar = dot(Level::Scalar, &a, &b);
            for level in Level::all() {
                let found = dot(level, &a, &b);
                prop_assert!((f64::from(found) - exact).abs() <= 1e-5 * size + 1e-30, "{level:?}: {found} {exact}");
                prop_assert_eq!(found.to_bits(), scalar.to_bits(), "{:?}", level);
                let mut several = [0.0; 3];
                dots(level, &a, &[&b, &a, &b], &mut several);
                let alone = [found, dot(level, &a, &a), found];
                prop_assert_eq!(several.map(f32::to_bits), alone.map(f32::to_bits), "{:?}", level);
            }
        }
    }
}
