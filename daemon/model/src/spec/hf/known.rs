//! Which keys may a configuration have? Those that are read, those that change nothing, and no other that sounds like
//! mathematics.
//!
//! Configurations carry all sorts of bookkeeping, so a key is refused by what it sounds like: one that is not listed
//! here, is not switched off (null, false, 0, empty) or private (`_...`), and contains a word such as `attn`, `rope`
//! or `expert`.

use super::super::Architecture;
use super::super::json::Object;
use crate::ModelError;
use serde_json::Value;

/// Keys that are read.
const READ: &[&str] = &[
    "attention_bias",
    "first_k_dense_replace",
    "hidden_act",
    "hidden_size",
    "index_head_dim",
    "index_n_heads",
    "index_skip_topk_offset",
    "index_topk",
    "index_topk_freq",
    "index_topk_pattern",
    "indexer_rope_interleave",
    "indexer_types",
    "intermediate_size",
    "kv_lora_rank",
    "layer_types",
    "max_position_embeddings",
    "mlp_bias",
    "mlp_layer_types",
    "moe_intermediate_size",
    "moe_layer_freq",
    "n_group",
    "n_routed_experts",
    "n_shared_experts",
    "norm_topk_prob",
    "num_attention_heads",
    "num_experts",
    "num_experts_per_tok",
    "num_hidden_layers",
    "num_local_experts",
    "partial_rotary_factor",
    "q_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "quantization_config",
    "rms_norm_eps",
    "rope_interleave",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "routed_scaling_factor",
    "scoring_func",
    "tie_word_embeddings",
    "topk_group",
    "topk_method",
    "v_head_dim",
    "vocab_size",
];

/// Keys that sound like mathematics and are none: of training, of other engines, or implied by those that are read.
const INERT: &[&str] = &[
    "add_cross_attention",
    "attention_dropout",
    "attn_implementation",
    "aux_loss_alpha",
    "cross_attention_hidden_size",
    "ep_size",
    "experts_implementation",
    "head_dim",
    "index_share_for_mtp_iteration",
    "moe_router_dtype",
    "num_key_value_heads",
    "num_mtp_layers",
    "num_nextn_predict_layers",
    "output_attentions",
    "output_router_logits",
    "qk_head_dim",
    "router_aux_loss_coef",
    "scale_fmt",
    "top_k",
];

/// What a key sounds like that may change what is computed.
const SOUNDS: &[&str] = &[
    "activation",
    "attention",
    "attn",
    "bias",
    "compress",
    "conv",
    "expert",
    "gate",
    "gating",
    "hash",
    "hc_",
    "head",
    "index",
    "kda",
    "kpool",
    "layer",
    "linear",
    "logit",
    "lora",
    "mlp",
    "moe",
    "multiplier",
    "norm",
    "original_max",
    "residual",
    "rope",
    "rotary",
    "router",
    "scal",
    "sink",
    "sliding",
    "softcap",
    "sparse",
    "swiglu",
    "temperature_",
    "top_k",
    "topk",
    "window",
];

/// Refuses what is not served, by its key.
pub(super) fn check(keys: Object<'_>, architecture: Architecture) -> Result<(), ModelError> {
    let listed = |key: &str| READ.contains(&key) || INERT.contains(&key);
    let off = |value: &Value| match value {
        Value::Null | Value::Bool(false) => true,
        Value::Number(number) => number.as_f64() == Some(0.0),
        Value::String(text) => text.is_empty(),
        Value::Array(list) => list.is_empty(),
        Value::Object(map) => map.is_empty(),
        Value::Bool(true) => false,
    };
    let strange = |(key, value): &(&String, &Value)| {
        !listed(key) && !key.starts_with('_') && !off(value) && SOUNDS.iter().any(|sound| key.contains(sound))
    };
    if let Some((key, _)) = keys.map.iter().find(strange) {
        return Err(keys.unknown(key));
    }
    if architecture == Architecture::DeepSeek2
        && let Some(key) = keys.map.keys().find(|key| key.starts_with("index") && keys.get(key).is_some())
    {
        return Err(keys.refuse(key, "set", "a model of this type has no indexer"));
    }
    for key in ["attention_bias", "mlp_bias"] {
        if keys.bool(key)? == Some(true) {
            return Err(keys.refuse(key, true, "biases are not served"));
        }
    }
    if let Some(other) = keys.str("hidden_act")?.filter(|act| !matches!(*act, "silu" | "swish")) {
        return Err(keys.refuse("hidden_act", other, "only 'silu' is served"));
    }
    if let Some(n) = keys.optional("moe_layer_freq", u32::MAX)?.filter(|&n| n != 1) {
        return Err(keys.refuse("moe_layer_freq", n, "only 1 is served"));
    }
    if keys.bool("rope_interleave")? == Some(false) && architecture != Architecture::DeepSeek2 {
        let reason = "with an indexer, transformers rotates interleaved pairs whatever it says";
        return Err(keys.refuse("rope_interleave", false, reason));
    }
    let attention = |kind: &&str| {
        matches!((architecture, *kind), (Architecture::DeepSeek2, "full_attention"))
            || architecture != Architecture::DeepSeek2
                && matches!(*kind, "indexed_attention" | "deepseek_sparse_attention")
    };
    if let Some(other) = keys.strings("layer_types")?.unwrap_or_default().iter().find(|kind| !attention(kind)) {
        return Err(keys.refuse("layer_types", other, "is not served with this model type"));
    }
    Ok(())
}
