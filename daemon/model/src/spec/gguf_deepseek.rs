//! What does a GGUF of DeepSeek's family say? llama.cpp's keys for `deepseek2`, `deepseek32` and `glm-dsa`, and those
//! of the converted form.

use super::config::{GLM_5_2_SCHEDULE, K_NORM_EPS, check_full, check_moe, group_score, schedule};
use super::keys::{CONTEXT_MAX, DIM_MAX, Keys, LAYERS_MAX};
use super::parse::{apply_factors, unscaled, vocab_size};
use super::yarn::{Rope, Yarn, magnitude};
use super::{Architecture, IndexerSpec, ModelSpec, MoeSpec, RopeLayout, RouterScore};
use crate::ModelError;
use crate::weights::Weights;
use sparsed_quant::gguf::{Array, Value};

/// Contexts from which a `glm-dsa` file without indexer types is GLM-5.2 (llama.cpp's rule).
const GLM_5_2_CONTEXT: u32 = 1_048_576;

/// Keys that are read, or that change nothing here.
const KNOWN: &[&str] = &[
    "attention.group_count",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.indexer.head_count",
    "attention.indexer.key_length",
    "attention.indexer.rope_dimension_count",
    "attention.indexer.rope_interleave",
    "attention.indexer.top_k",
    "attention.indexer.types",
    "attention.key_length",
    "attention.key_length_mla",
    "attention.kv_a_norm",
    "attention.kv_lora_rank",
    "attention.layer_norm_epsilon",
    "attention.layer_norm_rms_epsilon",
    "attention.q_lora_rank",
    "attention.scale",
    "attention.value_length",
    "attention.value_length_mla",
    "block_count",
    "context_length",
    "embedding_length",
    "expert_count",
    "expert_feed_forward_length",
    "expert_gating_func",
    "expert_group_count",
    "expert_group_used_count",
    "expert_shared_count",
    "expert_used_count",
    "expert_weights_norm",
    "expert_weights_scale",
    "feed_forward_length",
    "leading_dense_block_count",
    "nextn_predict_layers",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scaling.factor",
    "rope.scaling.finetuned",
    "rope.scaling.original_context_length",
    "rope.scaling.type",
    "rope.scaling.yarn_attn_factor",
    "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow",
    "rope.scaling.yarn_ext_factor",
    "rope.scaling.yarn_log_multiplier",
    "vocab_size",
];

/// Widths of a head.
struct Heads {
    n: u32,
    groups: u32,
    nope: u32,
    rope_row: u32,
    value: u32,
    kv_lora_rank: u32,
}

/// How far the frequencies of two groups may be apart, relative: single-precision factors leave 1e-7.
const SLICES_APART_MAX: f64 = 1e-6;

/// The frequencies, if every group turns alike: all heads' queries are turned by those of the first group.
fn equal_slices(frequencies: Vec<f64>, groups: u32) -> Result<Vec<f64>, ModelError> {
    let first = &frequencies[..frequencies.len() / groups as usize];
    let apart = |(at, frequency): (usize, &f64)| (frequency / first[at % first.len()] - 1.0).abs() > SLICES_APART_MAX;
    match frequencies.iter().enumerate().position(apart) {
        None => Ok(frequencies),
        Some(pair) => Err(ModelError::Tensor {
            name: "rope_freqs.weight".to_owned(),
            reason: format!("must give all {groups} groups the same frequencies; pair {pair} differs from the first's"),
        }),
    }
}

pub(super) fn parse(weights: &Weights, keys: &Keys<'_>, architecture: Architecture) -> Result<ModelSpec, ModelError> {
    keys.only(KNOWN)?;
    let hidden_size = keys.count("embedding_length", DIM_MAX)?;
    let heads = heads(keys, architecture)?;
    let block_count = keys.count("block_count", LAYERS_MAX)?;
    let skipped = keys.optional("nextn_predict_layers", LAYERS_MAX)?.unwrap_or(0);
    if skipped >= block_count {
        return Err(keys.refuse("nextn_predict_layers", skipped, format!("leaves none of {block_count} layers")));
    }
    let n_layers = block_count - skipped;
    let rope = rope(keys, architecture)?;
    #[expect(clippy::cast_possible_truncation, reason = "a scale in single precision")]
    let scale = (rope.score_factor() / f64::from(heads.nope + heads.rope_row).sqrt()) as f32;
    let rms_norm_eps = keys.float("attention.layer_norm_rms_epsilon", None)?;
    let vocab_size = vocab_size(weights, keys, hidden_size)?;
    Ok(ModelSpec {
        architecture,
        n_layers,
        vocab_size,
        hidden_size,
        context_length: keys.count("context_length", CONTEXT_MAX)?,
        n_heads: heads.n,
        q_lora_rank: keys.optional("attention.q_lora_rank", DIM_MAX)?.filter(|&rank| rank > 0),
        kv_lora_rank: heads.kv_lora_rank,
        qk_nope_head_dim: heads.nope,
        qk_rope_head_dim: heads.rope_row / heads.groups,
        rope_row: heads.rope_row,
        v_head_dim: heads.value,
        group_count: heads.groups,
        softmax_scale: keys.float("attention.scale", Some(scale))?,
        rms_norm_eps,
        latent_norm_eps: rms_norm_eps,
        kv_a_norm: keys.bool("attention.kv_a_norm", true)?,
        rope_frequencies: equal_slices(apply_factors(weights, rope.frequencies(heads.rope_row))?, heads.groups)?,
        rope_layout: RopeLayout::Interleaved,
        rope_factor: rope.attention_factor(),
        indexer: match architecture {
            Architecture::DeepSeek2 => no_indexer(keys)?,
            _ => Some(indexer(keys, &rope, heads.rope_row, (n_layers, block_count), architecture)?),
        },
        feed_forward: keys.count_of_layers("feed_forward_length", DIM_MAX)?,
        moe: moe(weights, keys, n_layers, vocab_size, architecture)?,
        tied_embeddings: !weights.has("output.weight"),
    })
}

fn heads(keys: &Keys<'_>, architecture: Architecture) -> Result<Heads, ModelError> {
    let n = keys.count("attention.head_count", DIM_MAX)?;
    let groups = keys.optional("attention.group_count", DIM_MAX)?.unwrap_or(1);
    let kv_lora_rank = keys.count("attention.kv_lora_rank", DIM_MAX)?;
    let rope_row = keys.even("rope.dimension_count", keys.count("rope.dimension_count", DIM_MAX)?)?;
    // deepseek2 files from before the split of kv_b give the widths of a head under the plain names.
    let or_legacy = |key: &'static str, legacy: &'static str| match keys.optional(key, DIM_MAX)? {
        None if architecture == Architecture::DeepSeek2 => keys.count(legacy, DIM_MAX),
        _ => keys.count(key, DIM_MAX),
    };
    let key_length = or_legacy("attention.key_length_mla", "attention.key_length")?;
    let value = or_legacy("attention.value_length_mla", "attention.value_length")?;
    let divides = |n: u32| groups > 0 && n.is_multiple_of(groups);
    if !divides(n) || !divides(kv_lora_rank) || !divides(rope_row) || !divides(rope_row / 2) {
        let reason = format!("must divide {n} heads and rows of {kv_lora_rank} and {rope_row}, in whole pairs");
        return Err(keys.refuse("attention.group_count", groups, reason));
    }
    let nope = key_length.checked_sub(rope_row);
    let nope =
        nope.ok_or_else(|| keys.refuse("attention.key_length_mla", key_length, format!("is below {rope_row}")))?;
    if (groups > 1 && nope != 0) || (nope == 0 && value != kv_lora_rank / groups) {
        let reason = "the group form has no part without position, and values as wide as a slice";
        return Err(keys.refuse("attention.key_length_mla", key_length, reason));
    }
    Ok(Heads { n, groups, nope, rope_row, value, kv_lora_rank })
}

fn rope(keys: &Keys<'_>, architecture: Architecture) -> Result<Rope, ModelError> {
    let base = f64::from(keys.float("rope.freq_base", Some(10000.0))?);
    if base <= 1.0 {
        return Err(keys.refuse("rope.freq_base", base, "must be above 1"));
    }
    match keys.str("rope.scaling.type")? {
        None | Some("none") => {
            unscaled(keys)?;
            return Ok(Rope { base, yarn: None });
        }
        Some("yarn") => {}
        Some(other) => return Err(keys.refuse("rope.scaling.type", other, "only 'none' and 'yarn' are served")),
    }
    for key in ["rope.scaling.yarn_attn_factor", "rope.scaling.yarn_ext_factor"] {
        let value = keys.float(key, Some(1.0))?;
        if value.total_cmp(&1.0).is_ne() {
            return Err(keys.refuse(key, value, "only 1 is served"));
        }
    }
    let factor = f64::from(keys.float("rope.scaling.factor", None)?);
    // The file stores a single of a tenth of mscale_all_dim; 0.1 is meant where 0.1 was written.
    let multiplier = keys.metadata.f32(&keys.name("rope.scaling.yarn_log_multiplier"))?.unwrap_or(0.0);
    if !multiplier.is_finite() || multiplier < 0.0 {
        return Err(keys.refuse("rope.scaling.yarn_log_multiplier", multiplier, "must not be negative"));
    }
    let all_dim = (f64::from(multiplier) * 1e7).round() / 1e6;
    let (attention_factor, score_factor) = if all_dim > 0.0 {
        let mscale = if architecture == Architecture::DeepSeek2 { all_dim } else { 1.0 };
        (magnitude(factor, mscale) / magnitude(factor, all_dim), magnitude(factor, all_dim).powi(2))
    } else {
        (magnitude(factor, 1.0), 1.0)
    };
    let yarn = Yarn {
        factor,
        original_context: keys.count("rope.scaling.original_context_length", CONTEXT_MAX)?.into(),
        beta_fast: keys.float("rope.scaling.yarn_beta_fast", Some(32.0))?.into(),
        beta_slow: keys.float("rope.scaling.yarn_beta_slow", Some(1.0))?.into(),
        truncate: true,
        attention_factor,
        score_factor,
    };
    Ok(Rope { base, yarn: Some(yarn) })
}

fn no_indexer(keys: &Keys<'_>) -> Result<Option<IndexerSpec>, ModelError> {
    for key in KNOWN.iter().filter(|key| key.starts_with("attention.indexer.")) {
        keys.absent(key)?;
    }
    Ok(None)
}

fn indexer(
    keys: &Keys<'_>,
    rope: &Rope,
    rope_row: u32,
    layers: (u32, u32),
    architecture: Architecture,
) -> Result<IndexerSpec, ModelError> {
    let head_dim = keys.count("attention.indexer.key_length", DIM_MAX)?;
    let key = "attention.indexer.rope_dimension_count";
    let rope_dim = keys.even(key, keys.optional(key, DIM_MAX)?.unwrap_or(rope_row))?;
    if rope_dim == 0 || rope_dim > head_dim {
        return Err(keys.refuse(key, rope_dim, format!("must be 2 to {head_dim}")));
    }
    let eps = keys.float("attention.layer_norm_epsilon", Some(K_NORM_EPS))?;
    if eps.total_cmp(&K_NORM_EPS).is_ne() {
        return Err(keys.refuse("attention.layer_norm_epsilon", eps, format!("only {K_NORM_EPS} is served (D5)")));
    }
    let interleaved = keys.bool("attention.indexer.rope_interleave", architecture == Architecture::GlmDsa)?;
    Ok(IndexerSpec {
        n_heads: keys.count("attention.indexer.head_count", DIM_MAX)?,
        head_dim,
        top_k: keys.count("attention.indexer.top_k", CONTEXT_MAX)?,
        rope_dim,
        rope_layout: if interleaved { RopeLayout::Interleaved } else { RopeLayout::HalfSplit },
        rope_frequencies: rope.frequencies(rope_dim),
        k_norm_eps: K_NORM_EPS,
        full: indexer_types(keys, layers, architecture)?,
    })
}

/// Which layers select: the file's list, which may count skipped layers too; else llama.cpp's rule.
fn indexer_types(
    keys: &Keys<'_>,
    (n_layers, block_count): (u32, u32),
    architecture: Architecture,
) -> Result<Vec<bool>, ModelError> {
    let key = "attention.indexer.types";
    let bits = |numbers: &[i64]| {
        let odd = numbers.iter().find(|n| !(0..=1).contains(*n));
        match odd {
            Some(n) => Err(keys.refuse(key, n, "each must be 0 or 1")),
            None => Ok(numbers.iter().map(|&n| n == 1).collect::<Vec<bool>>()),
        }
    };
    let mut full = match keys.metadata.get(&keys.name(key)) {
        None if architecture == Architecture::GlmDsa
            && keys.count("context_length", CONTEXT_MAX)? >= GLM_5_2_CONTEXT =>
        {
            schedule(n_layers, GLM_5_2_SCHEDULE.0, GLM_5_2_SCHEDULE.1)
        }
        None => vec![true; n_layers as usize],
        Some(Value::Array(Array::Bool(full))) => full.clone(),
        Some(Value::Array(Array::U8(n))) => bits(&n.iter().map(|&n| n.into()).collect::<Vec<i64>>())?,
        Some(Value::Array(Array::U32(n))) => bits(&n.iter().map(|&n| n.into()).collect::<Vec<i64>>())?,
        Some(Value::Array(Array::I32(n))) => bits(&n.iter().map(|&n| n.into()).collect::<Vec<i64>>())?,
        Some(other) => return Err(keys.refuse(key, other.kind(), "must be a list of true and false")),
    };
    if full.len() == block_count as usize {
        full.truncate(n_layers as usize);
    }
    check_full(&full, n_layers).map_err(|reason| keys.refuse(key, "a list", reason))?;
    Ok(full)
}

fn moe(
    weights: &Weights,
    keys: &Keys<'_>,
    n_layers: u32,
    vocab_size: u32,
    architecture: Architecture,
) -> Result<Option<MoeSpec>, ModelError> {
    let Some(n_experts) = keys.optional("expert_count", DIM_MAX)?.filter(|&n| n > 0) else { return Ok(None) };
    // Files of V2 have no key for it; llama.cpp tells GLM-4.7-Flash among them by its size.
    let glm_flash = (n_layers == 47 || n_layers == 48) && vocab_size == 154_880;
    let score = match keys.optional("expert_gating_func", u32::MAX)? {
        None | Some(0) if architecture == Architecture::DeepSeek2 && !glm_flash => RouterScore::Softmax,
        Some(1) => RouterScore::Softmax,
        None | Some(0 | 2) => RouterScore::Sigmoid,
        Some(other) => {
            return Err(keys.refuse("expert_gating_func", other, "only 1 (softmax) and 2 (sigmoid) are served"));
        }
    };
    let n_groups = keys.optional("expert_group_count", DIM_MAX)?.unwrap_or(1).max(1);
    let n_groups_kept = keys.optional("expert_group_used_count", DIM_MAX)?.unwrap_or(n_groups).max(1);
    let dense = keys.optional("leading_dense_block_count", LAYERS_MAX)?.unwrap_or(0);
    let layers: Vec<bool> = (0..n_layers).map(|layer| layer >= dense).collect();
    let scale = keys.metadata.f32(&keys.name("expert_weights_scale"))?.filter(|scale| *scale != 0.0);
    let moe = MoeSpec {
        n_experts,
        n_active: keys.count("expert_used_count", DIM_MAX)?,
        feed_forward: keys.count_of_layers("expert_feed_forward_length", DIM_MAX)?,
        // No default, as in llama.cpp: a file that has shared experts and does not say so would lose them.
        n_shared: keys.required("expert_shared_count", DIM_MAX)?,
        n_groups,
        n_groups_kept,
        score,
        group_score: group_score(score),
        correction_bias: (0..n_layers).any(|layer| weights.has(&format!("blk.{layer}.exp_probs_b.bias"))),
        renormalise: keys.bool("expert_weights_norm", false)?,
        scale: if scale.is_some() { keys.float("expert_weights_scale", None)? } else { 1.0 },
        layers,
    };
    check_moe(&moe).map_err(|(active, reason)| match active {
        true => keys.refuse("expert_used_count", moe.n_active, reason),
        false => keys.refuse("expert_count", n_experts, reason),
    })?;
    Ok(Some(moe))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_that_turn_differently_are_refused() {
        assert!(equal_slices(vec![1.0, 0.1, 1.0, 0.1 + 1e-9], 2).is_ok());
        assert!(equal_slices(vec![1.0, 0.1, 0.01, 0.001], 1).is_ok());
        let refused = equal_slices(vec![1.0, 0.1, 0.01, 0.001], 2).unwrap_err().to_string();
        assert!(refused.contains("rope_freqs.weight") && refused.contains("pair 2"), "{refused}");
    }
}
