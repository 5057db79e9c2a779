//! Which keys may a configuration have? Those that are read, and those that change nothing; any other is refused.
//!
//! The lists are of what transformers 5.24 writes for the served model types, what 4.x wrote for every model, and what
//! the published configurations have besides. A key that is in neither is refused whatever its value, but for null,
//! which is how Python says that it is absent.

use super::super::Architecture;
use super::super::json::Object;
use super::super::keys::DIM_MAX;
use crate::ModelError;

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

/// Keys that change no logits: of training, of storage, of other engines' implementation, of layers that are not run.
const INERT: &[&str] = &[
    "_attn_implementation",
    "_attn_implementation_autoset",
    "_commit_hash",
    "_experts_implementation",
    "_name_or_path",
    "_pre_quantization_dtype",
    "attention_dropout",
    "attn_implementation",
    "aux_loss_alpha",
    "bos_token_id",
    "chunk_size_feed_forward",
    "dtype",
    "eos_token_id",
    "ep_size",
    "experts_implementation",
    "id2label",
    "index_share_for_mtp_iteration",
    "initializer_range",
    "label2id",
    "moe_router_dtype",
    "num_mtp_layers",
    "num_nextn_predict_layers",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "pad_token_id",
    "pretraining_tp",
    "problem_type",
    "return_dict",
    "router_aux_loss_coef",
    "scale_fmt",
    "seq_aux",
    "torch_dtype",
    "transformers_version",
    "unsloth_fixed",
    "unsloth_version",
    "use_cache",
];

/// Defaults of generation and tasks that transformers 4.x wrote into every configuration; a request says its own.
const GENERATION: &[&str] = &[
    "bad_words_ids",
    "begin_suppress_tokens",
    "decoder_start_token_id",
    "diversity_penalty",
    "do_sample",
    "early_stopping",
    "encoder_no_repeat_ngram_size",
    "exponential_decay_length_penalty",
    "finetuning_task",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "is_decoder",
    "length_penalty",
    "max_length",
    "min_length",
    "no_repeat_ngram_size",
    "num_beam_groups",
    "num_beams",
    "num_return_sequences",
    "output_scores",
    "prefix",
    "remove_invalid_values",
    "repetition_penalty",
    "return_dict_in_generate",
    "sep_token_id",
    "suppress_tokens",
    "task_specific_params",
    "temperature",
    "tf_legacy_loss",
    "tokenizer_class",
    "top_k",
    "top_p",
    "torchscript",
    "typical_p",
    "use_bfloat16",
];

/// Keys that say again what others say, or that something is not so: [`check_repeated`] looks at them.
const REPEATED: &[&str] = &[
    "add_cross_attention",
    "architectures",
    "auto_map",
    "cross_attention_hidden_size",
    "head_dim",
    "is_encoder_decoder",
    "model_type",
    "num_key_value_heads",
    "pruned_heads",
    "qk_head_dim",
    "tie_encoder_decoder",
];

/// Classes that compute what is served here.
const CLASSES: [&str; 5] = [
    "DeepseekV2ForCausalLM",
    "DeepseekV3ForCausalLM",
    "DeepseekV32ForCausalLM",
    "Glm4MoeLiteForCausalLM",
    "GlmMoeDsaForCausalLM",
];

/// Refuses what is not served, by its key.
pub(super) fn check(keys: Object<'_>, architecture: Architecture) -> Result<(), ModelError> {
    let known = |key: &str| [READ, INERT, GENERATION, REPEATED].iter().any(|list| list.contains(&key));
    if let Some(key) = keys.map.keys().find(|key| !known(key) && keys.get(key).is_some()) {
        return Err(keys.unknown(key));
    }
    check_repeated(keys)?;
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

/// Refuses what contradicts the keys that are read.
fn check_repeated(keys: Object<'_>) -> Result<(), ModelError> {
    let number = |key: &str| Ok::<_, ModelError>(keys.optional(key, DIM_MAX)?.unwrap_or(0));
    let (heads, rope) = (number("num_attention_heads")?, number("qk_rope_head_dim")?);
    let query = number("qk_nope_head_dim")?.saturating_add(rope);
    // transformers means the rotated part by head_dim, other engines the whole.
    for (key, wanted) in
        [("num_key_value_heads", &[heads][..]), ("qk_head_dim", &[query][..]), ("head_dim", &[rope, query][..])]
    {
        if let Some(n) = keys.optional(key, u32::MAX)?.filter(|n| !wanted.contains(n)) {
            return Err(keys.refuse(key, n, format!("the other keys make it {}", wanted[0])));
        }
    }
    for key in ["add_cross_attention", "is_encoder_decoder", "tie_encoder_decoder"] {
        if keys.bool(key)? == Some(true) {
            return Err(keys.refuse(key, true, "only decoders are served"));
        }
    }
    if let Some(n) = keys.get("cross_attention_hidden_size") {
        return Err(keys.refuse("cross_attention_hidden_size", n, "only decoders are served"));
    }
    if keys.object("pruned_heads", "pruned_heads.")?.is_some_and(|heads| !heads.map.is_empty()) {
        return Err(keys.refuse("pruned_heads", "not empty", "all heads are served"));
    }
    let classes = keys.strings("architectures")?.unwrap_or_default();
    if let Some(other) = classes.iter().find(|class| !CLASSES.contains(class)) {
        return Err(keys.refuse("architectures", other, format!("served are {}", CLASSES.join(", "))));
    }
    // Published DeepSeek models bring the code of a class that is known; any other code may compute anything.
    if classes.is_empty() && keys.get("auto_map").is_some() {
        return Err(keys.refuse("auto_map", "set", "without 'architectures' it is not known what its code computes"));
    }
    Ok(())
}
