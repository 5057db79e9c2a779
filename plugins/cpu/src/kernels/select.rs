//! The exact k best of many scores, in linear time.
//!
//! Of long lists a sample says which score somewhat more than k are above; one pass picks those, in order, and the k
//! best of them are found. Where the sample was wrong, and for short lists, a histogram finds the bin of the k-th best,
//! and only that bin is sorted out. Both give the same answer.

use crate::level::Level;
use crate::simd::{LANES, Lanes, on_level};

/// Bins of the histogram.
const BINS: usize = 1024;

/// Room that is used again.
#[derive(Debug, Default)]
pub(crate) struct Scratch {
    /// Positions that are selected whatever the k-th best is.
    sure: Vec<u32>,
    /// Scores and positions that may be among the k best, as one number: the best first.
    open: Vec<u64>,
    /// Of those, the scores alone.
    order: Vec<u64>,
}

/// From this many scores for each selected one a sample is worth its time.
const SAMPLED_FROM: usize = 4;
/// Every so-manieth score is in the sample; odd, so that it is not in step with what repeats.
const SAMPLE_STRIDE: usize = 17;

/// Writes the positions of the `k = out.len()` greatest scores in ascending order. Of equal scores the lower position
/// wins; NaN counts as less than everything. Needs at least k scores.
pub(crate) fn top_k(level: Level, scores: &[f32], scratch: &mut Scratch, out: &mut [i32]) {
    let k = out.len();
    assert!(k <= scores.len(), "more selected than there are");
    if k > 0 && scores.len() / k >= SAMPLED_FROM && by_sample(level, scores, scratch, out) {
        return;
    }
    by_histogram(scores, scratch, out);
}

/// As [`top_k`] where the sample is right; else false, and nothing is written.
fn by_sample(level: Level, scores: &[f32], scratch: &mut Scratch, out: &mut [i32]) -> bool {
    let (k, Scratch { open, order, .. }) = (out.len(), scratch);
    order.clear();
    order.extend(scores.iter().step_by(SAMPLE_STRIDE).map(|&score| u64::from(!ascending_bits(score))));
    // As many of the sample as k of all, and three standard deviations more.
    let share = k * order.len() / scores.len();
    let rank = share + 3 * share.isqrt() + 3;
    if rank >= order.len() {
        return false;
    }
    let (_, limit, _) = order.select_nth_unstable(rank);
    #[allow(clippy::cast_possible_truncation, reason = "32 bits were widened")]
    let limit = from_ascending_bits(!(*limit as u32));
    open.clear();
    pick(level, scores, limit, open);
    if open.len() < k {
        return false;
    }
    order.clone_from(open);
    let (_, last, _) = order.select_nth_unstable(k - 1);
    #[allow(clippy::cast_possible_truncation, reason = "the low half is the position")]
    let best = open.iter().filter(|key| *key <= last).map(|key| (*key as u32).cast_signed());
    out.iter_mut().zip(best).for_each(|(to, position)| *to = position);
    true
}

on_level! {
    /// Appends scores above `limit` with their positions, as [`Scratch`] has them.
    fn pick(scores: &[f32], limit: f32, to: &mut Vec<u64>) = pick_body
}

#[inline(always)]
fn pick_body<L: Lanes>(l: L, scores: &[f32], limit: f32, to: &mut Vec<u64>) {
    let (chunks, rest) = scores.as_chunks::<LANES>();
    let mut key = |position: usize, score: f32| {
        to.push(u64::from(!ascending_bits(score)) << 32 | position as u64);
    };
    for (i, chunk) in chunks.iter().enumerate() {
        let mut above = l.above(l.load(chunk), l.splat(limit));
        while above != 0 {
            let lane = above.trailing_zeros() as usize;
            key(i * LANES + lane, chunk[lane]);
            above &= above - 1;
        }
    }
    for (i, &score) in rest.iter().enumerate().filter(|(_, score)| **score > limit) {
        key(chunks.len() * LANES + i, score);
    }
}

on_level! {
    /// Which of 16 scores each are above `limit`: bit i of a mask for score i. A NaN is not.
    fn above(scores: &[[f32; LANES]], limit: f32, masks: &mut Vec<u16>) = above_body
}

#[inline(always)]
fn above_body<L: Lanes>(l: L, scores: &[[f32; LANES]], limit: f32, masks: &mut Vec<u16>) {
    // No closure: it would be compiled without the level's instructions.
    masks.resize(scores.len(), 0);
    for (mask, scores) in masks.iter_mut().zip(scores) {
        *mask = l.above(l.load(scores), l.splat(limit));
    }
}

fn by_histogram(scores: &[f32], scratch: &mut Scratch, out: &mut [i32]) {
    let k = out.len();
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
    let Scratch { sure, open, .. } = scratch;
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

/// The inverse of [`ascending_bits`]; of 0 a NaN.
fn from_ascending_bits(bits: u32) -> f32 {
    if bits == 0 {
        return f32::NAN;
    }
    f32::from_bits(if bits >> 31 == 1 { bits & !(1 << 31) } else { !bits })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::inputs::{cases, values};
    use proptest::prelude::*;

    #[test]
    fn ties_go_to_the_lower_position_and_nan_loses() {
        let mut out = [0; 3];
        top_k(Level::Scalar, &[1.0, f32::NAN, 2.0, 1.0, 1.0, -0.0], &mut Scratch::default(), &mut out);
        assert_eq!(out, [0, 2, 3]);
        let mut out = [0; 2];
        top_k(Level::Scalar, &[f32::NAN, f32::NEG_INFINITY, f32::NAN], &mut Scratch::default(), &mut out);
        assert_eq!(out, [0, 1]);
        let mut out = [0; 3];
        top_k(
            Level::Scalar,
            &[f32::NEG_INFINITY, 3.0, f32::INFINITY, f32::MAX, f32::MIN],
            &mut Scratch::default(),
            &mut out,
        );
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

    #[test]
    fn long_lists_are_sampled_and_a_wrong_sample_is_noticed() {
        let mut random = fastrand::Rng::with_seed(3);
        let scores: Vec<f32> = (0..5000).map(|_| random.f32() - 0.5).collect();
        let mut out = vec![0; 300];
        assert!(by_sample(Level::detect(), &scores, &mut Scratch::default(), &mut out));
        assert_eq!(out, sorted(&scores, 300));
        // All of the sample is great, nothing else is.
        let scores: Vec<f32> = (0..5000).map(|i| if i % SAMPLE_STRIDE == 0 { 2.0 } else { (i % 7) as f32 }).collect();
        let mut again = vec![0; 300];
        top_k(Level::detect(), &scores, &mut Scratch::default(), &mut again);
        assert_eq!(again, sorted(&scores, 300));
        let ties = vec![1.0; 5000];
        assert!(!by_sample(Level::detect(), &ties, &mut Scratch::default(), &mut out));
        top_k(Level::detect(), &ties, &mut Scratch::default(), &mut out);
        assert_eq!(out, (0..300).collect::<Vec<_>>());
    }

    proptest! {
        #![proptest_config(cases(256))]
        #[test]
        fn masks_say_which_scores_are_above_a_limit(
            inputs in values(1e3), n in 0usize..5, limit in prop_oneof![-1f32..1.0, Just(0.0), Just(f32::NAN)],
        ) {
            let mut scores = inputs.rows()(n * LANES);
            scores.iter_mut().skip(3).step_by(41).for_each(|score| *score = f32::NAN);
            let scores = scores.as_chunks::<LANES>().0;
            let mask = |scores: &[f32; LANES]| (0..LANES).fold(0, |bits, i| bits | u16::from(scores[i] > limit) << i);
            let expected: Vec<u16> = scores.iter().map(mask).collect();
            for level in Level::all() {
                let mut masks = vec![7; 2];
                above(level, scores, limit, &mut masks);
                prop_assert_eq!(&masks, &expected, "{:?}", level);
            }
        }

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
                for level in Level::all() {
                    let mut out = vec![0; k];
                    top_k(level, &scores, &mut Scratch::default(), &mut out);
                    prop_assert_eq!(out, sorted(&scores, k));
                }
            }
        }
    }
}
