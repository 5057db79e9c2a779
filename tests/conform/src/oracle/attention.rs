//! SPARSE_MLA and DENSE_MLA for one head of one token.

/// Softmax attention over `rows` = (latent slice, rope slice) of the positions that the token reads; without a latent
/// query its term of the score is 0.
pub(crate) fn attend(q_latent: Option<&[f64]>, q_rope: &[f64], rows: &[(&[f64], &[f64])], scale: f64) -> Vec<f64> {
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    let score =
        |(latent, rope): &(&[f64], &[f64])| scale * (q_latent.map_or(0.0, |q| dot(q, latent)) + dot(q_rope, rope));
    let scores: Vec<f64> = rows.iter().map(score).collect();
    let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let weights: Vec<f64> = scores.iter().map(|score| (score - largest).exp()).collect();
    let sum: f64 = weights.iter().sum();
    let mut out = vec![0.0; rows.first().map_or(0, |(latent, _)| latent.len())];
    for (weight, (latent, _)) in weights.iter().zip(rows) {
        out.iter_mut().zip(*latent).for_each(|(out, value)| *out += weight / sum * value);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_scores_give_the_mean_and_a_large_one_its_row() {
        let rows: [(&[f64], &[f64]); 2] = [(&[1.0, 0.0], &[1.0]), (&[3.0, 4.0], &[-1.0])];
        assert_eq!(attend(None, &[0.0], &rows, 1.0), [2.0, 2.0]);
        let out = attend(None, &[-100.0], &rows, 1.0);
        assert!((out[0] - 3.0).abs() < 1e-9 && (out[1] - 4.0).abs() < 1e-9, "{out:?}");
    }
}
