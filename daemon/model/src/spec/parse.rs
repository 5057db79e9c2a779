//! How does metadata become a spec? Every number is checked before it is used.

use super::{Architecture, IndexerSpec, ModelSpec, MoeSpec};
use crate::ModelError;
use crate::weights::Weights;
use sparsed_quant::gguf::Metadata;

/// Largest of any dimension, count of heads, experts or layers.
const DIM_MAX: u32 = 1 << 20;
/// Longest context.
const CONTEXT_MAX: u32 = 1 << 24;
/// Most layers.
const LAYERS_MAX: u32 = 1 << 10;
/// LayerNorm epsilon of index keys: DeepSeek's, Hugging Face's and llama.cpp's constant.
const K_NORM_EPS: f32 = 1e-6;

/// Metadata under one architecture's prefix.
struct Keys<'a> {
    metadata: &'a Metadata,
    prefix: &'static str,
}

impl Keys<'_> {
    fn name(&self, key: &str) -> String {
        format!("{}.{key}", self.prefix)
    }

    fn optional(&self, key: &str, max: u32) -> Result<Option<u32>, ModelError> {
        let Some(value) = self.metadata.u32(&self.name(key))? else { return Ok(None) };
        if value > max {
            return Err(self.refuse(key, value, format!("the limit is {max}")));
        }
        Ok(Some(value))
    }

    /// A number from 1 to `max` that must be there.
    fn count(&self, key: &str, max: u32) -> Result<u32, ModelError> {
        let missing = || ModelError::Metadata(sparsed_quant::gguf::GgufError::Missing(self.name(key)));
        match self.optional(key, max)?.ok_or_else(missing)? {
            0 => Err(self.refuse(key, 0, "must be at least 1".to_owned())),
            n => Ok(n),
        }
    }

    fn float(&self, key: &str, default: Option<f32>) -> Result<f32, ModelError> {
        let missing = || ModelError::Metadata(sparsed_quant::gguf::GgufError::Missing(self.name(key)));
        let value = self.metadata.f32(&self.name(key))?.or(default).ok_or_else(missing)?;
        if value.is_finite() && value > 0.0 {
            return Ok(value);
        }
        Err(self.refuse(key, value, "must be a positive number".to_owned()))
    }

    fn bool(&self, key: &str, default: bool) -> Result<bool, ModelError> {
        Ok(self.metadata.bool(&self.name(key))?.unwrap_or(default))
    }

    fn refuse(&self, key: &str, value: impl std::fmt::Display, reason: String) -> ModelError {
        ModelError::Hyperparameter { key: self.name(key), value: value.to_string(), reason }
    }

    /// Refuses a key that changes the mathematics and is not implemented.
    fn absent(&self, key: &str, hint: &'static str) -> Result<(), ModelError> {
        if self.metadata.get(&self.name(key)).is_none() {
            return Ok(());
        }
        Err(ModelError::Unsupported { what: format!("metadata '{}'", self.name(key)), hint })
    }
}

impl ModelSpec {
    pub(crate) fn parse(weights: &Weights) -> Result<Self, ModelError> {
        let metadata = weights.gguf.metadata();
        let missing =
            || ModelError::Metadata(sparsed_quant::gguf::GgufError::Missing("general.architecture".to_owned()));
        match metadata.str("general.architecture")?.ok_or_else(missing)? {
            "deepseek32" => deepseek(weights, &Keys { metadata, prefix: "deepseek32" }),
            "llama" => llama(weights, &Keys { metadata, prefix: "llama" }),
            other => Err(ModelError::Unsupported {
                what: format!("architecture '{other}'"),
                hint: ": this version reads deepseek32 and llama; deepseek2 and glm-dsa come next",
            }),
        }
    }
}

/// Frequencies of `dim / 2` pairs, stretched by YaRN when the file says so.
fn frequencies(keys: &Keys<'_>, dim: u32) -> Result<Vec<f64>, ModelError> {
    let base = f64::from(keys.float("rope.freq_base", Some(10000.0))?);
    let plain = |j: u32| base.powf(-2.0 * f64::from(j) / f64::from(dim));
    match keys.metadata.str(&keys.name("rope.scaling.type"))? {
        None | Some("none") => return Ok((0..dim / 2).map(plain).collect()),
        Some("yarn") => {}
        Some(other) => {
            return Err(ModelError::Unsupported { what: format!("rope scaling '{other}'"), hint: ": only yarn is" });
        }
    }
    let factor = f64::from(keys.float("rope.scaling.factor", None)?);
    let original = f64::from(keys.count("rope.scaling.original_context_length", CONTEXT_MAX)?);
    let fast = f64::from(keys.float("rope.scaling.yarn_beta_fast", Some(32.0))?);
    let slow = f64::from(keys.float("rope.scaling.yarn_beta_slow", Some(1.0))?);
    let turn = |r: f64| f64::from(dim) * (original / (r * std::f64::consts::TAU)).ln() / (2.0 * base.ln());
    let low = turn(fast).floor().max(0.0);
    let high = turn(slow).ceil().min(f64::from(dim) - 1.0);
    let width = (high - low).max(1e-3);
    let stretched = |j: u32| {
        let ramp = ((f64::from(j) - low) / width).clamp(0.0, 1.0);
        plain(j) / factor * ramp + plain(j) * (1.0 - ramp)
    };
    Ok((0..dim / 2).map(stretched).collect())
}

/// YaRN's factor on attention scores, squared as it is used: (log_multiplier ln factor + 1)^2.
fn yarn_scale(keys: &Keys<'_>) -> Result<f64, ModelError> {
    if keys.metadata.str(&keys.name("rope.scaling.type"))? != Some("yarn") {
        return Ok(1.0);
    }
    let factor = f64::from(keys.float("rope.scaling.factor", None)?);
    let multiplier = keys.metadata.f32(&keys.name("rope.scaling.yarn_log_multiplier"))?.unwrap_or(0.0);
    // The file stores a single; 0.1 is meant where 0.1 was written.
    let multiplier = (f64::from(multiplier) * 1e7).round() / 1e7;
    Ok((multiplier * factor.ln() + 1.0).powi(2))
}

/// Divides each pair's frequency by the file's factor, if it has some.
fn apply_factors(weights: &Weights, mut frequencies: Vec<f64>) -> Result<Vec<f64>, ModelError> {
    let n = u32::try_from(frequencies.len()).expect("a small dimension");
    if let Some(factors) = weights.vector("rope_freqs.weight", n)? {
        if factors.iter().any(|f| !f.is_finite() || *f <= 0.0) {
            let reason = "a factor is not a positive number".to_owned();
            return Err(ModelError::Tensor { name: "rope_freqs.weight".to_owned(), reason });
        }
        frequencies.iter_mut().zip(factors).for_each(|(frequency, factor)| *frequency /= f64::from(factor));
    }
    Ok(frequencies)
}

fn vocab_size(weights: &Weights, keys: &Keys<'_>, hidden: u32) -> Result<u32, ModelError> {
    let missing = || ModelError::Tensor { name: "token_embd.weight".to_owned(), reason: "is missing".to_owned() };
    let embedding = weights.gguf.tensor("token_embd.weight").ok_or_else(missing)?;
    let rows = embedding.dims.get(1).copied().unwrap_or(0);
    let vocab = u32::try_from(rows).ok().filter(|&n| n > 0 && n <= DIM_MAX * 4);
    let vocab = vocab.filter(|_| embedding.dims.first() == Some(&hidden.into()) && embedding.dims.len() == 2);
    let bad = || ModelError::Tensor {
        name: "token_embd.weight".to_owned(),
        reason: format!("has dimensions {:?}, expected [{hidden}, vocabulary]", embedding.dims),
    };
    let vocab = vocab.ok_or_else(bad)?;
    match keys.optional("vocab_size", u32::MAX)? {
        Some(said) if said != vocab => Err(keys.refuse("vocab_size", said, format!("the embedding has {vocab} rows"))),
        _ => Ok(vocab),
    }
}

fn even(keys: &Keys<'_>, key: &str, value: u32) -> Result<u32, ModelError> {
    if value.is_multiple_of(2) { Ok(value) } else { Err(keys.refuse(key, value, "must be even".to_owned())) }
}

fn llama(weights: &Weights, keys: &Keys<'_>) -> Result<ModelSpec, ModelError> {
    keys.absent("expert_count", ": Llama with experts")?;
    keys.absent("attention.sliding_window", ": sliding windows")?;
    if !matches!(keys.metadata.str(&keys.name("rope.scaling.type"))?, None | Some("none")) {
        // Stretched frequencies alone would be wrong: attention's factor is not applied on this path.
        return Err(ModelError::Unsupported { what: "rope scaling of a Llama file".to_owned(), hint: "" });
    }
    if weights.gguf.tensor("blk.0.attn_q.bias").is_some() || weights.gguf.tensor("blk.0.attn_q_norm.weight").is_some() {
        return Err(ModelError::Unsupported { what: "a bias or norm on queries".to_owned(), hint: "" });
    }
    let hidden_size = keys.count("embedding_length", DIM_MAX)?;
    let n_heads = keys.count("attention.head_count", DIM_MAX)?;
    let group_count = keys.optional("attention.head_count_kv", DIM_MAX)?.unwrap_or(n_heads);
    if group_count == 0 || !n_heads.is_multiple_of(group_count) {
        return Err(keys.refuse("attention.head_count_kv", group_count, format!("must divide {n_heads} heads")));
    }
    let head = match keys.optional("attention.key_length", DIM_MAX)? {
        Some(head) => head,
        None if hidden_size.is_multiple_of(n_heads) => hidden_size / n_heads,
        None => return Err(keys.refuse("attention.head_count", n_heads, format!("must divide {hidden_size}"))),
    };
    let value = keys.optional("attention.value_length", DIM_MAX)?.unwrap_or(head);
    let rope = keys.optional("rope.dimension_count", DIM_MAX)?.unwrap_or(head);
    if head == 0 || value != head || rope != head {
        return Err(keys.refuse(
            "rope.dimension_count",
            rope,
            format!("only heads rotated as a whole ({head}) are served"),
        ));
    }
    let head = even(keys, "attention.key_length", head)?;
    let row = group_count.checked_mul(head).filter(|&n| n <= DIM_MAX);
    let row = row.ok_or_else(|| keys.refuse("attention.head_count_kv", group_count, "rows are too wide".to_owned()))?;
    let per_head = apply_factors(weights, frequencies(keys, head)?)?;
    Ok(ModelSpec {
        architecture: Architecture::Llama,
        n_layers: keys.count("block_count", LAYERS_MAX)?,
        vocab_size: vocab_size(weights, keys, hidden_size)?,
        hidden_size,
        context_length: keys.count("context_length", CONTEXT_MAX)?,
        n_heads,
        q_lora_rank: None,
        kv_lora_rank: row,
        qk_nope_head_dim: 0,
        qk_rope_head_dim: head,
        rope_row: row,
        v_head_dim: head,
        group_count,
        softmax_scale: (1.0 / f64::from(head).sqrt()) as f32,
        rms_norm_eps: keys.float("attention.layer_norm_rms_epsilon", None)?,
        kv_a_norm: false,
        rope_frequencies: per_head.repeat(group_count as usize),
        indexer: None,
        feed_forward: keys.count("feed_forward_length", DIM_MAX)?,
        moe: None,
        n_dense_layers: 0,
    })
}

fn deepseek(weights: &Weights, keys: &Keys<'_>) -> Result<ModelSpec, ModelError> {
    keys.absent("attention.indexer.types", ": shared indexers come next")?;
    let hidden_size = keys.count("embedding_length", DIM_MAX)?;
    let n_heads = keys.count("attention.head_count", DIM_MAX)?;
    let group_count = keys.optional("attention.group_count", DIM_MAX)?.unwrap_or(1);
    let kv_lora_rank = keys.count("attention.kv_lora_rank", DIM_MAX)?;
    let rope_row = even(keys, "rope.dimension_count", keys.count("rope.dimension_count", DIM_MAX)?)?;
    let key_length = keys.count("attention.key_length_mla", DIM_MAX)?;
    let v_head_dim = keys.count("attention.value_length_mla", DIM_MAX)?;
    let divides = |n: u32| group_count > 0 && n.is_multiple_of(group_count);
    if !divides(n_heads) || !divides(kv_lora_rank) || !divides(rope_row) {
        let reason = format!("must divide {n_heads} heads and rows of {kv_lora_rank} and {rope_row}");
        return Err(keys.refuse("attention.group_count", group_count, reason));
    }
    let nope = key_length.checked_sub(rope_row);
    let nope =
        nope.ok_or_else(|| keys.refuse("attention.key_length_mla", key_length, format!("is below {rope_row}")))?;
    if group_count > 1 && (nope != 0 || v_head_dim != kv_lora_rank / group_count) {
        let reason = "the group form has no part without position, and heads as wide as a slice".to_owned();
        return Err(keys.refuse("attention.key_length_mla", key_length, reason));
    }
    let default_scale = yarn_scale(keys)? / f64::from(key_length).sqrt();
    let n_layers = keys.count("block_count", LAYERS_MAX)?;
    let skipped = keys.optional("nextn_predict_layers", LAYERS_MAX)?.unwrap_or(0);
    if skipped >= n_layers {
        return Err(keys.refuse("nextn_predict_layers", skipped, format!("leaves none of {n_layers} layers")));
    }
    let n_layers = n_layers - skipped;
    Ok(ModelSpec {
        architecture: Architecture::DeepSeek32,
        n_layers,
        vocab_size: vocab_size(weights, keys, hidden_size)?,
        hidden_size,
        context_length: keys.count("context_length", CONTEXT_MAX)?,
        n_heads,
        q_lora_rank: keys.optional("attention.q_lora_rank", DIM_MAX)?.filter(|&rank| rank > 0),
        kv_lora_rank,
        qk_nope_head_dim: nope,
        qk_rope_head_dim: rope_row / group_count,
        rope_row,
        v_head_dim,
        group_count,
        #[expect(clippy::cast_possible_truncation, reason = "a scale in single precision")]
        softmax_scale: keys.float("attention.scale", Some(default_scale as f32))?,
        rms_norm_eps: keys.float("attention.layer_norm_rms_epsilon", None)?,
        kv_a_norm: keys.bool("attention.kv_a_norm", true)?,
        rope_frequencies: apply_factors(weights, frequencies(keys, rope_row)?)?,
        indexer: Some(indexer(keys, rope_row)?),
        feed_forward: keys.count("feed_forward_length", DIM_MAX)?,
        moe: moe(keys)?,
        n_dense_layers: keys.optional("leading_dense_block_count", LAYERS_MAX)?.unwrap_or(0),
    })
}

fn indexer(keys: &Keys<'_>, rope_row: u32) -> Result<IndexerSpec, ModelError> {
    let head_dim = keys.count("attention.indexer.key_length", DIM_MAX)?;
    let key = "attention.indexer.rope_dimension_count";
    let rope_dim = even(keys, key, keys.optional(key, DIM_MAX)?.unwrap_or(rope_row))?;
    if rope_dim == 0 || rope_dim > head_dim {
        return Err(keys.refuse(key, rope_dim, format!("must be 2 to {head_dim}")));
    }
    Ok(IndexerSpec {
        n_heads: keys.count("attention.indexer.head_count", DIM_MAX)?,
        head_dim,
        top_k: keys.count("attention.indexer.top_k", CONTEXT_MAX)?,
        rope_dim,
        rope_frequencies: frequencies(keys, rope_dim)?,
        k_norm_eps: K_NORM_EPS,
    })
}

fn moe(keys: &Keys<'_>) -> Result<Option<MoeSpec>, ModelError> {
    let Some(n_experts) = keys.optional("expert_count", DIM_MAX)?.filter(|&n| n > 0) else { return Ok(None) };
    match keys.optional("expert_gating_func", u32::MAX)? {
        None | Some(2) => {}
        Some(other) => {
            return Err(keys.refuse("expert_gating_func", other, "only 2 (sigmoid) is served yet".to_owned()));
        }
    }
    let n_groups = keys.optional("expert_group_count", DIM_MAX)?.unwrap_or(1).max(1);
    let n_groups_kept = keys.optional("expert_group_used_count", DIM_MAX)?.unwrap_or(n_groups).max(1);
    let n_active = keys.count("expert_used_count", DIM_MAX)?;
    if !n_experts.is_multiple_of(n_groups) || n_groups_kept > n_groups {
        return Err(keys.refuse(
            "expert_group_count",
            n_groups,
            format!("must divide {n_experts} and hold the groups kept"),
        ));
    }
    if n_active > n_experts / n_groups * n_groups_kept {
        return Err(keys.refuse("expert_used_count", n_active, "more than a token can reach".to_owned()));
    }
    Ok(Some(MoeSpec {
        n_experts,
        n_active,
        feed_forward: keys.count("expert_feed_forward_length", DIM_MAX)?,
        n_shared: keys.optional("expert_shared_count", DIM_MAX)?.unwrap_or(0),
        n_groups,
        n_groups_kept,
        renormalise: keys.bool("expert_weights_norm", false)?,
        scale: keys.float("expert_weights_scale", Some(1.0))?,
    }))
}
