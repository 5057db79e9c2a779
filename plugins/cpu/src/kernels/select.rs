//! The exact k best of many scores, in linear time: a histogram finds the bin of the k-th best, only that bin is sorted
//! out.

use crate::simd::LANES;

/// Bins of the histogram.
const BINS: usize = 1024;

/// Room that is used again.
#[derive(Debug, Default)]
pub(crate) struct Scratch {
    /// Positions that are selected whatever the k-th best is.
    sure: Vec<u32>,
    /// Scores and positions in the bin of the k-th best, as one number: the best first.
    open: Vec<u64>,
}

/// Writes the positions of the `k = out.len()` greatest scores in ascending order. Of equal scores the lower position
/// wins; NaN counts as less than everything. Needs at least k scores.
pub(crate) fn top_k(scores: &[f32], scratch: &mut Scratch, out: &mut [i32]) {
    let k = out.len();
    assert!(k <= scores.len(), "more selected than there are");
    let bins = Bins::over(scores);
    let mut counts = [0usize; BINS];
    for &score in scores {
        counts[bins.of(score)] += 1;
    }
    // The bin that the k-th best is in: bins above it are selected whole.
    let (mut bin, mut above) = (BINS - 1, 0);
    while bin > 0 && above + counts[bin] < k {
        above += counts[bin];
        bin -= 1;
    }
    let Scratch { sure, open } = scratch;
    sure.clear();
    open.clear();
    for (&score, position) in scores.iter().zip(0u32..) {
        let own = bins.of(score);
        if own > bin {
            sure.push(position);
        } else if own == bin {
            open.push(u64::from(!ascending_bits(score)) << 32 | u64::from(position));
        }
    }
    let ascending = sure.len();
    let left = k - ascending;
    if left < open.len() {
        open.select_nth_unstable(left);
        open.truncate(left);
    }
    #[allow(clippy::cast_possible_truncation, reason = "the low half is the position")]
    sure.extend(open.iter().map(|key| *key as u32));
    sure[ascending..].sort_unstable();
    sure.sort(); // two ascending runs: a merge
    out.iter_mut().zip(sure).for_each(|(to, position)| *to = position.cast_signed());
}

/// Bins of equal width between the least and the greatest score.
struct Bins {
    least: f32,
    per_unit: f32,
}

impl Bins {
    fn over(scores: &[f32]) -> Self {
        // By lanes, so that it becomes vector code; a NaN compares false and is passed over.
        let (mut least, mut greatest) = ([f32::INFINITY; LANES], [f32::NEG_INFINITY; LANES]);
        let (chunks, rest) = scores.as_chunks::<LANES>();
        for chunk in chunks {
            for ((least, greatest), &score) in least.iter_mut().zip(&mut greatest).zip(chunk) {
                *least = if score < *least { score } else { *least };
                *greatest = if score > *greatest { score } else { *greatest };
            }
        }
        let least = least.iter().chain(rest).fold(f32::INFINITY, |a, &b| a.min(b));
        let greatest = greatest.iter().chain(rest).fold(f32::NEG_INFINITY, |a, &b| a.max(b));
        #[allow(clippy::cast_precision_loss, reason = "a small number")]
        let per_unit = (BINS - 2) as f32 / (greatest - least);
        // All equal, or an infinity among them: one bin is right, only slower.
        Self { least, per_unit: if per_unit.is_finite() { per_unit } else { 0.0 } }
    }

    /// Never falls as the score rises (a difference and a product round monotonically); NaN is in bin 0.
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "saturates; NaN becomes 0")]
    fn of(&self, score: f32) -> usize {
        (((score - self.least) * self.per_unit) as usize).min(BINS - 1)
    }
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
        top_k(&[1.0, f32::NAN, 2.0, 1.0, 1.0, -0.0], &mut Scratch::default(), &mut out);
        assert_eq!(out, [0, 2, 3]);
        let mut out = [0; 2];
        top_k(&[f32::NAN, f32::NEG_INFINITY, f32::NAN], &mut Scratch::default(), &mut out);
        assert_eq!(out, [0, 1]);
        let mut out = [0; 3];
        top_k(&[f32::NEG_INFINITY, 3.0, f32::INFINITY, f32::MAX, f32::MIN], &mut Scratch::default(), &mut out);
        assert_eq!(out, [1, 2, 3]);
    }

    /// Positions of the k best by a stable sort.
    fn sorted(scores: &[f32], k: usize) -> Vec<i32> {
        let mut order: Vec<i32> = (0..i32::try_from(scores.len()).unwrap()).collect();
        order.sort_by(|a, b| scores[*b as usize].total_cmp(&scores[*a as usize]));
        order.truncate(k);
        order.sort_unstable();
        order
    }

    proptest! {
        #[test]
        fn it_equals_a_stable_sort(
            few in proptest::collection::vec(-3i8..3, 1..300),
            many in proptest::collection::vec(-1e3f32..1e3, 1..3000),
            part in 0.0f64..1.0,
        ) {
            let few: Vec<f32> = few.into_iter().map(f32::from).collect();
            for scores in [few, many] {
                #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, clippy::cast_precision_loss, reason = "a share of a length")]
                let k = (scores.len() as f64 * part) as usize;
                let mut out = vec![0; k];
                top_k(&scores, &mut Scratch::default(), &mut out);
                prop_assert_eq!(out, sorted(&scores, k));
            }
        }
    }
}
