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
    use crate::kernels::inputs::{bits, cases, values};
    use crate::level::Level;
    use proptest::prelude::*;

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
        fn norms_have_the_same_bits_at_every_level(
            inputs in values(100.0), n in 1usize..300, eps in 1e-6f32..1e-4,
        ) {
            let mut row = inputs.rows();
            let (x, gain, bias) = (row(n), row(n), row(n));
            let run = |job: &dyn Fn(&mut [f32])| {
                let mut y = vec![0.0; x.len()];
                job(&mut y);
                bits(&y)
            };
            let at = |level| [
                run(&|y| rms(level, &x, &gain, eps, y)),
                run(&|y| rms(level, &x, &[], eps, y)),
                run(&|y| layer(level, &x, &gain, &bias, eps, y)),
            ];
            let scalar = at(Level::Scalar);
            for level in Level::all() {
                prop_assert_eq!(&at(level), &scalar, "{:?}", level);
            }
        }
    }
}
