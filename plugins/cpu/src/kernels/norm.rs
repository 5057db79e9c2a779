//! Normalisation of a row.

use super::dot::{dot_body, fold};
use super::{Arithmetic, LANES, leveled};

leveled! {
    /// `y = x / sqrt(mean(x^2) + eps) * gain`; an empty gain is 1.
    fn rms(x: &[f32], gain: &[f32], eps: f32, y: &mut [f32]) = rms_body
}

leveled! {
    /// `y = (x - mean) / sqrt(variance + eps) * gain + bias`.
    fn layer(x: &[f32], gain: &[f32], bias: &[f32], eps: f32, y: &mut [f32]) = layer_body
}

#[inline(always)]
#[allow(clippy::cast_precision_loss, reason = "row lengths are far below 2^24")]
fn rms_body<A: Arithmetic>(x: &[f32], gain: &[f32], eps: f32, y: &mut [f32]) {
    let scale = 1.0 / (dot_body::<A>(x, x) / x.len() as f32 + eps).sqrt();
    if gain.is_empty() {
        y.iter_mut().zip(x).for_each(|(y, x)| *y = x * scale);
    } else {
        y.iter_mut().zip(x).zip(gain).for_each(|((y, x), g)| *y = x * scale * g);
    }
}

#[inline(always)]
#[allow(clippy::cast_precision_loss, reason = "row lengths are far below 2^24")]
fn layer_body<A: Arithmetic>(x: &[f32], gain: &[f32], bias: &[f32], eps: f32, y: &mut [f32]) {
    let mut sums = [0f32; LANES];
    for chunk in x.chunks(LANES) {
        sums.iter_mut().zip(chunk).for_each(|(sum, x)| *sum += x);
    }
    let mean = fold(sums) / x.len() as f32;
    y.iter_mut().zip(x).for_each(|(y, x)| *y = x - mean);
    let scale = 1.0 / (dot_body::<A>(y, y) / x.len() as f32 + eps).sqrt();
    for ((y, g), b) in y.iter_mut().zip(gain).zip(bias) {
        *y = *y * scale * g + b;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::Fused;
    use crate::kernels::inputs::{bits, cases, values};
    use crate::level::Level;
    use proptest::prelude::*;

    /// How far two levels are apart, of a value before the bias: what 300 squares' sums are rounded by.
    const CLOSE: f32 = 3e-6;

    #[test]
    fn a_layer_norm_has_mean_bias_and_unit_variance() {
        let x = [1.0, 2.0, 3.0, 6.0];
        let spread = (14.0f32 / 4.0).sqrt();
        let expected = [-2.0 / spread + 0.5, -1.0 / spread + 0.5, 0.5, 3.0 / spread + 0.5];
        for level in Level::all() {
            let mut y = [0.0; 4];
            layer(level, &x, &[1.0; 4], &[0.5; 4], 0.0, &mut y);
            assert!(y.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-6), "{level:?}: {y:?}");
        }
    }

    #[test]
    fn an_rms_norm_keeps_the_mean() {
        let scale = 1.0 / 12.5f32.sqrt();
        for level in Level::all() {
            let mut y = [0.0; 2];
            rms(level, &[3.0, 4.0], &[2.0, 1.0], 0.0, &mut y);
            assert!((y[0] - 6.0 * scale).abs() < 1e-6 && (y[1] - 4.0 * scale).abs() < 1e-6, "{level:?}: {y:?}");
        }
    }

    proptest! {
        #![proptest_config(cases(256))]
        #[test]
        fn every_level_is_close_to_scalar_and_has_the_bits_of_its_portable_twin(
            inputs in values(100.0), n in 1usize..300, eps in 1e-6f32..1e-4,
        ) {
            let mut row = inputs.rows();
            let (x, gain, bias) = (row(n), row(n), row(n));
            let run = |job: &dyn Fn(&mut [f32])| {
                let mut y = vec![0.0; x.len()];
                job(&mut y);
                y
            };
            let no_bias = vec![0.0; x.len()];
            let twins = [
                run(&|y| rms_body::<Fused>(&x, &gain, eps, y)),
                run(&|y| rms_body::<Fused>(&x, &[], eps, y)),
                run(&|y| layer_body::<Fused>(&x, &gain, &bias, eps, y)),
            ];
            let at = |level| [
                run(&|y| rms(level, &x, &gain, eps, y)),
                run(&|y| rms(level, &x, &[], eps, y)),
                run(&|y| layer(level, &x, &gain, &bias, eps, y)),
            ];
            let scalar = at(Level::Scalar);
            for level in Level::all() {
                let found = at(level);
                if level != Level::Scalar {
                    prop_assert_eq!(bits(&found.concat()), bits(&twins.concat()), "{:?}", level);
                }
                for ((found, scalar), bias) in found.iter().zip(&scalar).zip([&no_bias, &no_bias, &bias]) {
                    for ((found, scalar), bias) in found.iter().zip(scalar).zip(bias) {
                        // Adding the bias rounds once more, and what is subnormal on the way by more of itself.
                        let rounding = f32::EPSILON * (scalar.abs() + bias.abs()) + 1e-42;
                        let allowed = CLOSE * (scalar - bias).abs() + rounding;
                        prop_assert!((found - scalar).abs() <= allowed, "{level:?}: {found} {scalar}");
                    }
                }
            }
        }
    }
}
