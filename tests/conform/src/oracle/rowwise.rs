//! Operators that work on one row at a time.

/// RMS_NORM of `s` (the sum with the residual, where there is one); no gain is 1.
pub(crate) fn rms_norm(s: &[f64], gain: Option<&[f64]>, eps: f64) -> Vec<f64> {
    let mean_square = s.iter().map(|x| x * x).sum::<f64>() / s.len() as f64;
    let root = (mean_square + eps).sqrt();
    s.iter().enumerate().map(|(c, x)| x / root * gain.map_or(1.0, |gain| gain[c])).collect()
}

/// LAYER_NORM.
pub(crate) fn layer_norm(x: &[f64], gain: &[f64], bias: &[f64], eps: f64) -> Vec<f64> {
    let n = x.len() as f64;
    let mean = x.iter().sum::<f64>() / n;
    let variance = x.iter().map(|x| (x - mean) * (x - mean)).sum::<f64>() / n;
    let root = (variance + eps).sqrt();
    x.iter().zip(gain).zip(bias).map(|((x, gain), bias)| (x - mean) / root * gain + bias).collect()
}

/// `W x` for one matrix of `x.len()` columns.
pub(crate) fn product(matrix: &[f64], x: &[f64]) -> Vec<f64> {
    matrix.chunks_exact(x.len()).map(|row| row.iter().zip(x).map(|(w, x)| w * x).sum()).collect()
}

/// ROPE of one head: `angles` holds P/2 cosines, then P/2 sines; values `first .. first + P` are turned.
pub(crate) fn rope(x: &[f64], angles: &[f64], first: usize, half_split: bool) -> Vec<f64> {
    let half = angles.len() / 2;
    let mut y = x.to_vec();
    for j in 0..half {
        let (a, b) = if half_split { (first + j, first + j + half) } else { (first + 2 * j, first + 2 * j + 1) };
        let (cos, sin) = (angles[j], angles[half + j]);
        y[a] = x[a] * cos - x[b] * sin;
        y[b] = x[b] * cos + x[a] * sin;
    }
    y
}

/// SILU_MUL.
pub(crate) fn silu_mul(gate: &[f64], up: &[f64]) -> Vec<f64> {
    gate.iter().zip(up).map(|(gate, up)| gate / (1.0 + (-gate).exp()) * up).collect()
}

/// HADAMARD of one head: entry (i, j) of Sylvester's matrix is -1 to the number of ones that i and j share.
pub(crate) fn hadamard(x: &[f64]) -> Vec<f64> {
    let norm = (x.len() as f64).sqrt();
    let sign = |i: usize, j: usize| if (i & j).count_ones().is_multiple_of(2) { 1.0 } else { -1.0 };
    (0..x.len()).map(|i| x.iter().enumerate().map(|(j, x)| sign(i, j) * x).sum::<f64>() / norm).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_quarter_turn_moves_the_first_of_a_pair_to_the_second() {
        let angles = [0.0, 0.0, 1.0, 1.0];
        assert_eq!(rope(&[9.0, 1.0, 2.0, 3.0, 4.0], &angles, 1, false), [9.0, -2.0, 1.0, -4.0, 3.0]);
        assert_eq!(rope(&[1.0, 2.0, 3.0, 4.0], &angles, 0, true), [-3.0, -4.0, 1.0, 2.0]);
    }

    #[test]
    fn norms_have_the_size_they_say() {
        assert_eq!(rms_norm(&[3.0, -3.0], None, 0.0), [1.0, -1.0]);
        assert_eq!(layer_norm(&[1.0, 3.0], &[2.0, 2.0], &[5.0, 5.0], 0.0), [3.0, 7.0]);
    }

    #[test]
    fn the_hadamard_matrix_is_its_own_inverse() {
        let x = [1.0, -2.0, 0.5, 3.0];
        let back = hadamard(&hadamard(&x));
        assert!(back.iter().zip(x).all(|(a, b)| (a - b).abs() < 1e-12), "{back:?}");
        assert_eq!(hadamard(&[2.0, 0.0, 0.0, 0.0]), [1.0; 4]);
    }
}
