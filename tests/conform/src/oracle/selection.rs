//! IDX_TOPK for one token.

/// The indexer's score of every position: `q` is `[heads][width]`, `w` a weight a head.
pub(crate) fn scores(q: &[f64], w: &[f64], scale: f64, keys: &[&[f64]]) -> Vec<f64> {
    let width = q.len() / w.len();
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    let score = |key: &&[f64]| q.chunks_exact(width).zip(w).map(|(q, w)| scale * w * dot(q, key).max(0.0)).sum::<f64>();
    keys.iter().map(score).collect()
}

/// The best k positions, ascending; of equal scores the lower position wins.
pub(crate) fn top_k(scores: &[f64], k: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..scores.len()).collect();
    order.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]).then(a.cmp(&b)));
    order.truncate(k);
    order.sort_unstable();
    order
}

/// Says what is wrong with the selection `sel` of one token, when scores may be off by `eps`.
///
/// # Errors
/// The first thing that is wrong with it.
pub(crate) fn accepts(sel: &[i32], scores: &[f64], eps: f64) -> Result<(), String> {
    let (k, wanted) = (sel.len(), sel.len().min(scores.len()));
    let chosen: Vec<usize> = sel.iter().take_while(|&&s| s >= 0).map(|s| s.unsigned_abs() as usize).collect();
    if chosen.len() != wanted || sel[wanted..].iter().any(|&s| s != -1) {
        return Err(format!("{sel:?} is not {wanted} positions, then -1"));
    }
    if !chosen.is_sorted_by(|a, b| a < b) {
        return Err(format!("{sel:?} is not ascending"));
    }
    if let Some(after) = chosen.iter().find(|&&s| s >= scores.len()) {
        return Err(format!("position {after} is after the token, at {}", scores.len() - 1));
    }
    if scores.len() <= k {
        return Ok(());
    }
    let mut sorted = scores.to_vec();
    sorted.sort_by(|a, b| b.total_cmp(a));
    let least = sorted[k - 1];
    if let Some(&low) = chosen.iter().find(|&&s| scores[s] < least - eps) {
        return Err(format!("position {low} with score {} is selected, the {k}-th best is {least}", scores[low]));
    }
    let missed = (0..scores.len()).find(|s| scores[*s] > least + eps && !chosen.contains(s));
    missed.map_or(Ok(()), |s| {
        Err(format!("position {s} with score {} is left out, the {k}-th best is {least}", scores[s]))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lower_of_equal_positions_wins() {
        assert_eq!(top_k(&[1.0, 2.0, 1.0, 1.0], 2), [0, 1]);
        assert_eq!(top_k(&[1.0], 3), [0]);
    }

    #[test]
    fn a_selection_may_be_wrong_by_eps_only() {
        let scores = [1.0, 2.0, 1.01, 0.0];
        assert!(accepts(&[1, 2], &scores, 0.001).is_ok());
        assert!(accepts(&[0, 1], &scores, 0.001).is_err());
        assert!(accepts(&[0, 1], &scores, 0.1).is_ok());
        assert!(accepts(&[2, 1], &scores, 0.1).is_err());
        assert!(accepts(&[1, 4], &scores, 0.1).is_err());
        assert!(accepts(&[0, 1, 2, 3, -1], &scores, 0.1).is_ok());
        assert!(accepts(&[0, 1, 2, 3, 4], &scores, 0.1).is_err());
    }

    #[test]
    fn a_negative_product_counts_as_zero() {
        let keys: [&[f64]; 2] = [&[1.0, 0.0], &[-1.0, 0.0]];
        assert_eq!(scores(&[2.0, 0.0, -3.0, 0.0], &[1.0, -1.0], 0.5, &keys), [1.0, -1.5]);
    }
}
