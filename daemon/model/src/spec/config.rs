//! What must hold for every model, wherever its numbers come from? Checks shared by both readers, and layer patterns.

use super::keys::{LAYERS_MAX, ROW_MAX};
use super::{GroupScore, ModelSpec, MoeSpec, RouterScore};
use crate::ModelError;

/// LayerNorm epsilon of index keys (D5).
pub(super) const K_NORM_EPS: f32 = 1e-6;
/// Frequency and offset of GLM-5.2's selecting layers, for files that do not say.
pub(super) const GLM_5_2_SCHEDULE: (u32, u32) = (4, 3);
/// Offset of a schedule that does not name one (D11).
pub(super) const SCHEDULE_OFFSET: u32 = 2;

/// Which layers select: layer i when max(i - offset + 1, 0) is a multiple of the frequency.
pub(super) fn schedule(n_layers: u32, frequency: u32, offset: u32) -> Vec<bool> {
    let past = |i: u32| (i + 1).saturating_sub(offset);
    (0..n_layers).map(|i| past(i).is_multiple_of(frequency.max(1))).collect()
}

/// What is wrong with a list of selecting layers, if anything is.
pub(super) fn check_full(full: &[bool], n_layers: u32) -> Result<(), String> {
    if full.len() != n_layers as usize {
        return Err(format!("has {} entries for {n_layers} layers", full.len()));
    }
    if full.first() == Some(&true) {
        Ok(())
    } else {
        Err("the first layer has none before it to share with".to_owned())
    }
}

/// What is wrong with a router's numbers, if anything is.
/// The first part of the answer says whether it is the number of active experts.
pub(super) fn check_moe(moe: &MoeSpec) -> Result<(), (bool, String)> {
    let (experts, groups, kept) = (moe.n_experts, moe.n_groups, moe.n_groups_kept);
    if groups == 0 || kept == 0 || kept > groups || !experts.is_multiple_of(groups) {
        return Err((
            false,
            format!("{experts} experts, {groups} groups of which {kept} are kept: these do not divide"),
        ));
    }
    if moe.n_active > experts / groups * kept {
        return Err((true, format!("{} experts per token, {} can be reached", moe.n_active, experts / groups * kept)));
    }
    Ok(())
}

/// How groups are compared (D13).
pub(super) fn group_score(score: RouterScore) -> GroupScore {
    match score {
        RouterScore::Softmax => GroupScore::Best,
        RouterScore::Sigmoid => GroupScore::BestTwo,
    }
}

impl ModelSpec {
    /// Refuses rows that are wider than an activation may be, so that no product of dimensions overflows later.
    pub(super) fn check_rows(&self) -> Result<(), ModelError> {
        let shared = self.moe.as_ref().map_or((0, 0), |moe| (moe.n_shared, moe.feed_forward));
        let active = self.moe.as_ref().map_or((0, 0), |moe| (moe.n_active, moe.feed_forward.max(self.hidden_size)));
        let index = self.indexer.as_ref().map_or((0, 0), |index| (index.n_heads, index.head_dim));
        let query = self.qk_nope_head_dim.saturating_add(self.qk_rope_head_dim);
        let rows = [
            ("queries", self.n_heads, query),
            ("absorbed queries", self.n_heads, self.kv_lora_rank),
            ("keys and values of all heads", self.n_heads, self.qk_nope_head_dim.saturating_add(self.v_head_dim)),
            ("index queries", index.0, index.1),
            ("shared experts", shared.0, shared.1),
            ("active experts", active.0, active.1),
            ("latent and rope rows", self.kv_lora_rank.saturating_add(self.rope_row), 1),
        ];
        for (what, n, width) in rows {
            if n.checked_mul(width).is_none_or(|row| row > ROW_MAX) {
                let what = format!("{what}: a row of {n} times {width} values");
                return Err(ModelError::Unsupported { what, hint: ": a row has at most 16777216" });
            }
        }
        debug_assert!(self.n_layers <= LAYERS_MAX, "readers check their own limits");
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn glm_5_2_selects_in_the_published_layers() {
        let full = schedule(78, GLM_5_2_SCHEDULE.0, GLM_5_2_SCHEDULE.1);
        let at: Vec<usize> = full.iter().enumerate().filter(|(_, full)| **full).map(|(i, _)| i).collect();
        assert_eq!(at.len(), 21);
        assert_eq!((&at[..6], at[20]), (&[0, 1, 2, 6, 10, 14][..], 74));
    }

    #[test]
    fn a_schedule_without_sharing_selects_everywhere() {
        assert!(schedule(5, 1, SCHEDULE_OFFSET).into_iter().all(|full| full));
        assert_eq!(schedule(6, 3, 2), [true, true, false, false, true, false]);
    }

    #[test]
    fn a_first_layer_that_shares_is_refused() {
        assert!(check_full(&[false, true], 2).unwrap_err().contains("first layer"));
        assert!(check_full(&[true], 2).unwrap_err().contains("1 entries for 2"));
    }
}
