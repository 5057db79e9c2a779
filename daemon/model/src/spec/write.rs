//! Which keys of a GGUF say what a folder's configuration says? llama.cpp's; what they cannot say is found when they
//! are read again.

use super::yarn::{Rope, magnitude};
use super::{Architecture, IndexerSpec, ModelSpec, MoeSpec, RopeLayout, RouterScore, hf};
use crate::ModelError;
use serde_json::{Map, Value as Json};
use sparsed_quant::gguf::{Array, Metadata, Value};

/// How far apart numbers may be that went through single precision, relative.
const APART_MAX: f64 = 1e-6;

impl ModelSpec {
    /// Writes the keys of this spec, which `config` describes.
    ///
    /// # Errors
    /// A configuration that cannot be read.
    pub(crate) fn write_metadata(&self, config: &Map<String, Json>, metadata: &mut Metadata) -> Result<(), ModelError> {
        let architecture = match self.architecture {
            Architecture::DeepSeek32 => "deepseek32",
            Architecture::GlmDsa => "glm-dsa",
            Architecture::DeepSeek2 | Architecture::Llama => "deepseek2",
        };
        metadata.set("general.architecture", Value::String(architecture.to_owned()));
        let mut set = |key: &str, value: Value| metadata.set(format!("{architecture}.{key}"), value);
        for (key, n) in [
            ("block_count", self.n_layers),
            ("context_length", self.context_length),
            ("embedding_length", self.hidden_size),
            ("feed_forward_length", self.feed_forward),
            ("vocab_size", self.vocab_size),
            ("attention.head_count", self.n_heads),
            // As one key and one value row for all heads.
            ("attention.head_count_kv", 1),
            ("attention.kv_lora_rank", self.kv_lora_rank),
            ("attention.key_length", self.kv_lora_rank + self.rope_row),
            ("attention.value_length", self.kv_lora_rank),
            ("attention.key_length_mla", self.qk_nope_head_dim + self.qk_rope_head_dim),
            ("attention.value_length_mla", self.v_head_dim),
            ("rope.dimension_count", self.rope_row),
        ] {
            set(key, Value::U32(n));
        }
        if let Some(rank) = self.q_lora_rank {
            set("attention.q_lora_rank", Value::U32(rank));
        }
        set("attention.layer_norm_rms_epsilon", Value::F32(self.rms_norm_eps));
        rope(&hf::rope_of(config, self.context_length)?, &mut set);
        moe(self.moe.as_ref(), self.n_layers, &mut set);
        if let Some(index) = &self.indexer {
            indexer(index, self.architecture, &mut set);
        }
        Ok(())
    }

    /// The first thing that `other`, read from a GGUF, says differently. The eps of the latent norms has no key of its
    /// own there (D3) and is left out.
    pub(crate) fn difference(&self, other: &Self) -> Option<&'static str> {
        let near = |a: f64, b: f64| (a - b).abs() <= APART_MAX * a.abs().max(b.abs());
        let all_near = |a: &[f64], b: &[f64]| a.len() == b.len() && a.iter().zip(b).all(|(&a, &b)| near(a, b));
        let integers = |spec: &Self| {
            let sizes = [spec.n_layers, spec.vocab_size, spec.hidden_size, spec.context_length, spec.feed_forward];
            let heads = [spec.n_heads, spec.kv_lora_rank, spec.qk_nope_head_dim, spec.qk_rope_head_dim];
            (sizes, heads, spec.rope_row, spec.v_head_dim, spec.group_count, spec.q_lora_rank)
        };
        let plain_indexer = |spec: &Self| {
            let plain = |index: &IndexerSpec| IndexerSpec { rope_frequencies: Vec::new(), ..index.clone() };
            spec.indexer.as_ref().map(plain)
        };
        let frequencies = |spec: &Self| spec.indexer.as_ref().map_or_else(Vec::new, |i| i.rope_frequencies.clone());
        let checks = [
            ("architecture", self.architecture == other.architecture),
            ("sizes", integers(self) == integers(other)),
            ("rms_norm_eps", near(self.rms_norm_eps.into(), other.rms_norm_eps.into())),
            ("norm of the latent", self.kv_a_norm == other.kv_a_norm),
            ("rope_interleave", self.rope_layout == other.rope_layout),
            ("RoPE frequencies", all_near(&self.rope_frequencies, &other.rope_frequencies)),
            ("YaRN's mscale (D14, D15)", near(self.rope_factor, other.rope_factor)),
            ("scale of attention scores", near(self.softmax_scale.into(), other.softmax_scale.into())),
            ("indexer", plain_indexer(self) == plain_indexer(other)),
            ("the indexer's frequencies", all_near(&frequencies(self), &frequencies(other))),
            ("experts", self.moe == other.moe),
            ("tied embeddings", self.tied_embeddings == other.tied_embeddings),
        ];
        checks.into_iter().find(|(_, same)| !same).map(|(what, _)| what)
    }
}

#[expect(clippy::cast_possible_truncation, reason = "GGUF has single precision here")]
fn rope(rope: &Rope, set: &mut impl FnMut(&str, Value)) {
    set("rope.freq_base", Value::F32(rope.base as f32));
    let Some(yarn) = &rope.yarn else { return };
    set("rope.scaling.type", Value::String("yarn".to_owned()));
    set("rope.scaling.original_context_length", Value::U32(yarn.original_context as u32));
    for (key, value) in
        [("factor", yarn.factor), ("yarn_beta_fast", yarn.beta_fast), ("yarn_beta_slow", yarn.beta_slow)]
    {
        set(&format!("rope.scaling.{key}"), Value::F32(value as f32));
    }
    // score factor = magnitude(factor, mscale_all_dim)^2, and the key holds a tenth of mscale_all_dim.
    let per_mscale = magnitude(yarn.factor, 1.0) - 1.0;
    if yarn.score_factor > 1.0 && per_mscale > 0.0 {
        let all_dim = (yarn.score_factor.sqrt() - 1.0) / per_mscale;
        set("rope.scaling.yarn_log_multiplier", Value::F32((0.1 * all_dim) as f32));
    }
}

fn moe(moe: Option<&MoeSpec>, n_layers: u32, set: &mut impl FnMut(&str, Value)) {
    let Some(moe) = moe else {
        set("leading_dense_block_count", Value::U32(n_layers));
        set("expert_count", Value::U32(0));
        return;
    };
    let dense = moe.layers.iter().take_while(|moe| !**moe).count();
    for (key, n) in [
        ("leading_dense_block_count", u32::try_from(dense).expect("at most as many as layers")),
        ("expert_count", moe.n_experts),
        ("expert_used_count", moe.n_active),
        ("expert_shared_count", moe.n_shared),
        ("expert_feed_forward_length", moe.feed_forward),
        ("expert_gating_func", if moe.score == RouterScore::Softmax { 1 } else { 2 }),
    ] {
        set(key, Value::U32(n));
    }
    if moe.n_groups > 1 {
        set("expert_group_count", Value::U32(moe.n_groups));
        set("expert_group_used_count", Value::U32(moe.n_groups_kept));
    }
    set("expert_weights_scale", Value::F32(moe.scale));
    set("expert_weights_norm", Value::Bool(moe.renormalise));
}

fn indexer(index: &IndexerSpec, architecture: Architecture, set: &mut impl FnMut(&str, Value)) {
    for (key, n) in [("head_count", index.n_heads), ("key_length", index.head_dim), ("top_k", index.top_k)] {
        set(&format!("attention.indexer.{key}"), Value::U32(n));
    }
    let glm = architecture == Architecture::GlmDsa;
    let interleaved = index.rope_layout == RopeLayout::Interleaved;
    if interleaved != glm {
        set("attention.indexer.rope_interleave", Value::Bool(interleaved));
    }
    if glm {
        set("attention.indexer.types", Value::Array(Array::Bool(index.full.clone())));
    }
}
