//! The exact k best of many scores, in linear time.

/// Writes the positions of the `k = out.len()` greatest scores in ascending order. Of equal scores the lower position
/// wins; NaN counts as less than everything. Needs at least k scores; `keys` is scratch.
pub(crate) fn top_k(scores: &[f32], keys: &mut Vec<u64>, out: &mut [i32]) {
    let k = out.len();
    assert!(k <= scores.len(), "more selected than there are");
    keys.clear();
    keys.extend(
        scores
            .iter()
            .zip(0u32..)
            .map(|(&score, position)| u64::from(!ascending_bits(score)) << 32 | u64::from(position)),
    );
    if k < keys.len() {
        keys.select_nth_unstable(k);
        keys.truncate(k);
    }
    for (to, key) in out.iter_mut().zip(keys.iter()) {
        #[allow(clippy::cast_possible_truncation, reason = "the low half is the position")]
        let position = *key as u32;
        *to = position.cast_signed();
    }
    out.sort_unstable();
}

/// Bits that sort as the floats do, -0 with +0, NaN first.
fn ascending_bits(score: f32) -> u32 {
    if score.is_nan() {
        return 0;
    }
    let bits = (score + 0.0).to_bits();
    if bits >> 31 == 1 { !bits } else { bits | 1 << 31 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn ties_go_to_the_lower_position_and_nan_loses() {
        let mut out = [0; 3];
        top_k(&[1.0, f32::NAN, 2.0, 1.0, 1.0, -0.0], &mut Vec::new(), &mut out);
        assert_eq!(out, [0, 2, 3]);
    }

    proptest! {
        #[test]
        fn it_equals_a_stable_sort(scores in proptest::collection::vec(-3i8..3, 1..300), part in 0.0f64..1.0) {
            let scores: Vec<f32> = scores.into_iter().map(f32::from).collect();
            #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, clippy::cast_precision_loss, reason = "a share of a length")]
            let k = (scores.len() as f64 * part) as usize;
            let mut order: Vec<i32> = (0..i32::try_from(scores.len()).unwrap()).collect();
            order.sort_by(|a, b| scores[*b as usize].total_cmp(&scores[*a as usize]));
            let mut expected = order[..k].to_vec();
            expected.sort_unstable();
            let mut out = vec![0; k];
            top_k(&scores, &mut Vec::new(), &mut out);
            prop_assert_eq!(out, expected);
        }
    }
}
