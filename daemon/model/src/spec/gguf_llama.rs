//! What does a Llama GGUF say? Grouped-query attention, read as dense MLA without compression.

use super::keys::{CONTEXT_MAX, DIM_MAX, Keys, LAYERS_MAX};
use super::parse::{apply_factors, unscaled, vocab_size};
use super::yarn::Rope;
use super::{Architecture, ModelSpec, RopeLayout};
use crate::ModelError;
use crate::weights::Weights;

/// Keys that are read, or that change nothing here.
const KNOWN: &[&str] = &[
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.layer_norm_rms_epsilon",
    "attention.value_length",
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scaling.factor",
    "rope.scaling.type",
    "vocab_size",
];

pub(super) fn parse(weights: &Weights, keys: &Keys<'_>) -> Result<ModelSpec, ModelError> {
    keys.only(KNOWN)?;
    if !matches!(keys.str("rope.scaling.type")?, None | Some("none")) {
        // Stretched frequencies alone would be wrong: attention's factor is not applied on this path.
        return Err(ModelError::Unsupported { what: "rope scaling of a Llama file".to_owned(), hint: "" });
    }
    unscaled(keys)?;
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
    let head = keys.even("attention.key_length", head)?;
    let row = group_count.checked_mul(head).filter(|&n| n <= DIM_MAX);
    let row = row.ok_or_else(|| keys.refuse("attention.head_count_kv", group_count, "rows are too wide"))?;
    let rope = Rope { base: keys.float("rope.freq_base", Some(10000.0))?.into(), yarn: None };
    let per_head = apply_factors(weights, rope.frequencies(head))?;
    let rms_norm_eps = keys.float("attention.layer_norm_rms_epsilon", None)?;
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
        #[expect(clippy::cast_possible_truncation, reason = "a scale in single precision")]
        softmax_scale: (1.0 / f64::from(head).sqrt()) as f32,
        rms_norm_eps,
        latent_norm_eps: rms_norm_eps,
        kv_a_norm: false,
        rope_frequencies: per_head.repeat(group_count as usize),
        rope_layout: RopeLayout::Interleaved,
        rope_factor: 1.0,
        indexer: None,
        feed_forward: keys.count("feed_forward_length", DIM_MAX)?,
        moe: None,
        tied_embeddings: !weights.has("output.weight"),
    })
}
