//! How much of full attention does a selection keep? The softmax mass on the selected tokens, against the best ones.
//!
//! The mass of a cached token is its softmax weight in full attention, over every token up to the query's own, as the
//! mean over the heads of the layer: a selection is shared by the heads. It is the distribution that DeepSeek-V3.2
//! trains its indexer to follow (report, section 2.1: main attention summed over heads, then normalised). The oracle is
//! the k tokens of greatest mass; no other k tokens keep more.

use super::loss::mean;
use super::recall::below;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;

/// First tokens that a window keeps, as StreamingLLM does (arXiv 2309.17453).
pub const SINKS: usize = 4;

/// Partial sums of a dot product: wide enough for the vector units, folded in f64.
const LANES: usize = 16;

/// Why a mass could not be computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MassError {
    /// A query or a cached row holds something that is no number.
    #[error("an attention score is not a finite number")]
    NotFinite,
    /// Not the `min(k, tokens)` positions, ascending and then -1, that the operator must give.
    #[error("a selection of {k} is not {expected} different positions below {tokens}, ascending, then -1")]
    Selection {
        /// Places of the selection.
        k: usize,
        /// How many of them must be filled.
        expected: usize,
        /// Tokens to select from.
        tokens: usize,
    },
}

/// Attention of one layer, in the letters of `abi/OPS.md`: head h of H sees slice h G / H of the rows.
#[derive(Clone, Copy, Debug)]
pub struct AttentionShape {
    /// H.
    pub n_heads: usize,
    /// G.
    pub group_count: usize,
    /// Of the scores.
    pub softmax_scale: f32,
}

/// What one token asks of one layer.
#[derive(Clone, Copy, Debug)]
pub struct Query<'a> {
    /// `[H, Rk/G]`; empty in the group form.
    pub latent: &'a [f32],
    /// `[H, P/G]`
    pub rope: &'a [f32],
}

/// What a query may read: the rows of every token up to its own.
#[derive(Clone, Copy, Debug)]
pub struct Keys<'a> {
    /// n.
    pub n_tokens: usize,
    /// `[n, Rk]`
    pub latent: &'a [f32],
    /// `[n, P]`
    pub rope: &'a [f32],
}

/// The mass of each token, `[n]`; they sum to 1.
///
/// # Errors
/// A score that is not finite.
///
/// # Panics
/// When query and keys are not of this shape, or there are no keys.
pub fn attention_mass(shape: &AttentionShape, query: &Query<'_>, keys: &Keys<'_>) -> Result<Vec<f64>, MassError> {
    let n = keys.n_tokens;
    let mut mass = vec![0.0; n];
    for head in 0..shape.n_heads {
        let mut scores = vec![0.0; n];
        add_scores(shape, head, query.rope, keys.rope, &mut scores);
        if !query.latent.is_empty() {
            add_scores(shape, head, query.latent, keys.latent, &mut scores);
        }
        if !scores.iter().all(|score| score.is_finite()) {
            return Err(MassError::NotFinite);
        }
        let greatest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        scores.iter_mut().for_each(|score| *score = (*score - greatest).exp());
        let heads_sum = scores.iter().sum::<f64>() * shape.n_heads as f64;
        mass.iter_mut().zip(scores).for_each(|(mass, weight)| *mass += weight / heads_sum);
    }
    Ok(mass)
}

/// Adds `scale (query[head] . row[s, group])` to each score.
fn add_scores(shape: &AttentionShape, head: usize, query: &[f32], rows: &[f32], scores: &mut [f64]) {
    let width = query.len() / shape.n_heads;
    let row = width * shape.group_count;
    assert!(query.len() == width * shape.n_heads && rows.len() == row * scores.len(), "rows do not fit the queries");
    let query = &query[head * width..][..width];
    let slice = head * shape.group_count / shape.n_heads * width;
    for (score, row) in scores.iter_mut().zip(rows.chunks_exact(row)) {
        *score += f64::from(shape.softmax_scale) * dot(query, &row[slice..][..width]);
    }
}

fn dot(a: &[f32], b: &[f32]) -> f64 {
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<LANES>(), b.as_chunks::<LANES>());
    let mut lanes = [0.0f32; LANES];
    for (a, b) in a.iter().zip(b) {
        lanes.iter_mut().zip(a.iter().zip(b)).for_each(|(lane, (&a, &b))| *lane += a * b);
    }
    let rest = a_rest.iter().zip(b_rest).map(|(&a, &b)| f64::from(a) * f64::from(b));
    lanes.into_iter().map(f64::from).sum::<f64>() + rest.sum::<f64>()
}

/// The mass that k tokens keep, by who chose them. With no more than k tokens all of it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Kept {
    /// The model's indexer.
    pub selection: f64,
    /// Who knows the masses.
    pub oracle: f64,
    /// A sliding window: the first [`SINKS`] tokens and the last, the query's own among them.
    pub window: f64,
    /// Chance: what k random tokens keep on average, which is their share of the tokens.
    pub random: f64,
}

impl Kept {
    /// What is kept of `mass`, as [`attention_mass`] gives it, by `selection`: k places, ascending, -1 padded.
    ///
    /// # Errors
    /// A selection that is not as it must be.
    ///
    /// # Panics
    /// When there is no mass.
    pub fn new(mass: &[f64], selection: &[i32]) -> Result<Self, MassError> {
        let (n, k) = (mass.len(), selection.len());
        assert!(n > 0, "a query reads itself at least");
        let bad = || MassError::Selection { k, expected: k.min(n), tokens: n };
        let chosen = chosen(selection, n).ok_or_else(bad)?;
        if k >= n {
            return Ok(Self { selection: 1.0, oracle: 1.0, window: 1.0, random: 1.0 });
        }
        let mut best = mass.to_vec();
        best.select_nth_unstable_by(k, |a, b| b.total_cmp(a));
        let sinks = SINKS.min(k);
        Ok(Self {
            selection: chosen.iter().map(|&s| mass[s]).sum(),
            oracle: best[..k].iter().sum(),
            window: mass[..sinks].iter().sum::<f64>() + mass[n - (k - sinks)..].iter().sum::<f64>(),
            random: k as f64 / n as f64,
        })
    }

    /// The mean of each.
    ///
    /// # Panics
    /// When there is none.
    pub fn mean(all: &[Self]) -> Self {
        let of = |part: fn(&Self) -> f64| mean(&all.iter().map(part).collect::<Vec<_>>());
        Self {
            selection: of(|kept| kept.selection),
            oracle: of(|kept| kept.oracle),
            window: of(|kept| kept.window),
            random: of(|kept| kept.random),
        }
    }
}

/// The positions of a selection from `n` tokens, if it is one.
fn chosen(selection: &[i32], n: usize) -> Option<Vec<usize>> {
    let (filled, padding) = selection.split_at(selection.len().min(n));
    let chosen: Vec<usize> = filled.iter().filter_map(|&s| usize::try_from(s).ok()).collect();
    let ascending = chosen.is_sorted_by(|a, b| a < b) && chosen.last().is_none_or(|&last| last < n);
    let whole = chosen.len() == filled.len() && padding.iter().all(|&s| s == -1);
    (ascending && whole).then_some(chosen)
}

/// Positions of the queries that are looked at in window number `window` of `length` tokens: at most `count`,
/// ascending, one at random from each of so many equal stretches of the second half, where a selection leaves most out.
pub fn query_positions(length: usize, count: usize, seed: u64, window: u64) -> Vec<usize> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    rng.set_stream(window);
    let (start, late) = (length / 2, length - length / 2);
    let count = count.min(late);
    let edge = |i: usize| start + late * i / count;
    let pick = |i: usize| {
        let stretch = u32::try_from(edge(i + 1) - edge(i)).expect("a window is shorter than 2^32");
        edge(i) + below(&mut rng, stretch) as usize
    };
    (0..count).map(pick).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const LN_2: f32 = std::f32::consts::LN_2;

    fn near(found: &[f64], expected: &[f64]) {
        assert_eq!(found.len(), expected.len());
        let far = found.iter().zip(expected).any(|(a, b)| (a - b).abs() > 1e-7);
        assert!(!far, "{found:?} is not {expected:?}");
    }

    fn seeded(n: usize, seed: u64) -> Vec<f32> {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        (0..n).map(|_| below(&mut rng, 2001) as f32 / 1000.0 - 1.0).collect()
    }

    #[test]
    fn latent_and_rope_scores_add_up_and_heads_are_averaged() {
        // Head 0 scores ln 2 times (1 + 0, 0 + 1, 0 + 0): weights 2, 2, 1 of 5. Head 1 scores nothing: thirds.
        let shape = AttentionShape { n_heads: 2, group_count: 1, softmax_scale: LN_2 };
        let query = Query { latent: &[1.0, 0.0, 0.0, 0.0], rope: &[0.5, 0.0] };
        let keys = Keys { n_tokens: 3, latent: &[1.0, 7.0, 0.0, 7.0, 0.0, 7.0], rope: &[0.0, 2.0, 0.0] };
        let mass = attention_mass(&shape, &query, &keys).unwrap();
        near(&mass, &[0.4, 0.4, 0.2].map(|one: f64| f64::midpoint(one, 1.0 / 3.0)));
    }

    #[test]
    fn heads_of_a_group_see_its_slice_of_the_rows_only() {
        // Heads 0 and 1 are of group 0, heads 2 and 3 of group 1; rows are [2 groups, 2 values].
        let shape = AttentionShape { n_heads: 4, group_count: 2, softmax_scale: LN_2 };
        let query = Query { latent: &[], rope: &[1.0, 0.0, 1.0, 0.0, 0.0, 1.0, 0.0, 1.0] };
        // Group 0 scores 0 and 1 (weights 1, 2 of 3), group 1 scores 2 and 0 (4, 1 of 5).
        let keys = Keys { n_tokens: 2, latent: &[9.0; 8], rope: &[0.0, 5.0, 5.0, 2.0, 1.0, 5.0, 5.0, 0.0] };
        let mass = attention_mass(&shape, &query, &keys).unwrap();
        near(&mass, &[f64::midpoint(1.0 / 3.0, 0.8), f64::midpoint(2.0 / 3.0, 0.2)]);
    }

    #[test]
    fn rows_of_odd_widths_are_summed_to_their_end() {
        let shape = AttentionShape { n_heads: 1, group_count: 1, softmax_scale: LN_2 };
        let (mut query, mut rows) = (vec![0.0; 37], vec![0.0; 2 * 37]);
        (query[36], query[15], rows[37 + 36], rows[37 + 15]) = (2.0, 1.0, 1.0, -1.0);
        let keys = Keys { n_tokens: 2, latent: &[], rope: &rows };
        let mass = attention_mass(&shape, &Query { latent: &[], rope: &query }, &keys).unwrap();
        near(&mass, &[1.0 / 3.0, 2.0 / 3.0]);
    }

    #[test]
    fn scores_beyond_the_range_of_exp_are_weighed_and_what_is_no_number_is_an_error() {
        let shape = AttentionShape { n_heads: 1, group_count: 1, softmax_scale: 1.0 };
        let mass = |rows: &[f32]| {
            attention_mass(&shape, &Query { latent: &[], rope: &[1e4] }, &Keys { n_tokens: 2, latent: &[], rope: rows })
        };
        near(&mass(&[1.0, -1.0]).unwrap(), &[1.0, 0.0]);
        assert_eq!(mass(&[f32::NAN, 0.0]), Err(MassError::NotFinite));
        assert_eq!(mass(&[f32::INFINITY, 0.0]), Err(MassError::NotFinite));
    }

    #[test]
    fn what_is_kept_is_the_sum_over_those_chosen() {
        let mass = [0.01, 0.02, 0.03, 0.04, 0.3, 0.05, 0.25, 0.1, 0.15, 0.05];
        let kept = Kept::new(&mass, &[2, 4, 6, 8, 9]).unwrap();
        near(
            &[kept.selection, kept.oracle, kept.window, kept.random],
            &[0.03 + 0.3 + 0.25 + 0.15 + 0.05, 0.3 + 0.25 + 0.15 + 0.1 + 0.05, 0.1 + 0.05, 0.5],
        );
        // A window of fewer than four is the first tokens.
        let kept = Kept::new(&mass, &[4, 6]).unwrap();
        near(&[kept.selection, kept.oracle, kept.window, kept.random], &[0.55, 0.55, 0.03, 0.2]);
    }

    #[test]
    fn a_selection_of_everything_keeps_everything() {
        let all = Kept { selection: 1.0, oracle: 1.0, window: 1.0, random: 1.0 };
        assert_eq!(Kept::new(&[0.25; 4], &[0, 1, 2, 3]), Ok(all));
        assert_eq!(Kept::new(&[0.5; 2], &[0, 1, -1, -1, -1]), Ok(all));
    }

    #[test]
    fn what_is_no_selection_is_an_error() {
        for bad in [[0, 0, 1], [2, 1, 3], [0, 1, 5], [0, 1, -1], [-1, 0, 1], [-2, 1, 2]] {
            let error = MassError::Selection { k: 3, expected: 3, tokens: 5 };
            assert_eq!(Kept::new(&[0.2; 5], &bad), Err(error), "{bad:?}");
        }
        assert!(Kept::new(&[0.5; 2], &[0, 1, 2]).is_err() && Kept::new(&[0.5; 2], &[0, -1, -1]).is_err());
    }

    #[test]
    fn the_oracle_keeps_more_than_any_other_and_chance_keeps_its_share() {
        let (n, k, seeds) = (200, 40, 50);
        let (mut chance, mut shares) = (Vec::new(), Vec::new());
        for seed in 0..seeds {
            let shape = AttentionShape { n_heads: 3, group_count: 1, softmax_scale: 2.0 };
            let (query, rows) = (seeded(3 * 24, seed), seeded(n * 24, seed + 1000));
            let keys = Keys { n_tokens: n, latent: &[], rope: &rows };
            let mass = attention_mass(&shape, &Query { latent: &[], rope: &query }, &keys).unwrap();
            near(&[mass.iter().sum()], &[1.0]);
            let mut order: Vec<usize> = (0..n).collect();
            order.sort_by(|&a, &b| mass[b].total_cmp(&mass[a]));
            let kept = |mut picked: Vec<usize>| {
                picked.sort_unstable();
                Kept::new(&mass, &picked.iter().map(|&s| i32::try_from(s).unwrap()).collect::<Vec<_>>()).unwrap()
            };
            let best = kept(order[..k].to_vec());
            near(&[best.selection], &[best.oracle]);
            assert!(best.oracle > best.window && best.oracle > 0.3);
            // One of the best exchanged for the next in line is worse already.
            let next = kept([&order[..k - 1], &order[k..=k]].concat());
            assert!(next.selection < best.selection);
            // A selection that belongs to another query is as good as chance.
            let other = kept((0..k).map(|i| (i * 5 + seed as usize) % n).collect());
            assert!(other.selection < best.oracle);
            chance.push(other.selection);
            shares.push(other.random);
        }
        assert!((mean(&chance) - mean(&shares)).abs() < 0.02, "{} {}", mean(&chance), mean(&shares));
    }

    #[test]
    fn means_are_taken_of_each_part() {
        let kept = |n: f64| Kept { selection: n, oracle: 2.0 * n, window: 3.0 * n, random: 4.0 * n };
        assert_eq!(Kept::mean(&[kept(1.0), kept(3.0)]), kept(2.0));
    }

    #[test]
    fn positions_are_spread_over_the_second_half_and_come_from_the_seed() {
        let found = query_positions(2049, 16, 7, 3);
        assert_eq!((found.len(), &found), (16, &query_positions(2049, 16, 7, 3)));
        assert!(found.is_sorted_by(|a, b| a < b) && found[0] >= 1024 && found[15] < 2049);
        assert!(found.iter().enumerate().all(|(i, &p)| p >= 1024 + 1025 * i / 16 && p < 1024 + 1025 * (i + 1) / 16));
        assert!(found != query_positions(2049, 16, 7, 4) && found != query_positions(2049, 16, 8, 3));
        assert_eq!(query_positions(9, 100, 1, 0), [4, 5, 6, 7, 8], "no more than there are");
        assert!(query_positions(9, 0, 1, 0).is_empty());
    }
}
