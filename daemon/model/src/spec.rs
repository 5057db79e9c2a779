//! Which model is it? Hyperparameters, checked one by one.
//!
//! One [`ModelSpec`] covers what is served: MLA with a lightning indexer (DeepSeek-V3.2, GLM-5, GLM-5.1, GLM-5.2),
//! dense MLA (DeepSeek-V2, V2-Lite, V3, R1, V3.1, GLM-4.7-Flash), files made by `sparsectl convert` (DeepSeek-V3.2
//! with four extension keys), and Llama files as exact dense MLA: the latent row is all value heads side by side, the
//! rope row all rotated key heads, and each query head sees the slice of its group. A spec is read from a GGUF's
//! metadata (llama.cpp's keys) or from a Hugging Face `config.json`; formulas are DeepSeek-V3.2-Exp
//! `inference/model.py`.
//!
#![doc = include_str!("spec/decisions.md")]

mod config;
mod gguf_deepseek;
mod gguf_llama;
mod hf;
mod json;
mod keys;
mod parse;
mod write;
mod yarn;

pub(crate) use json::{CONFIG_BYTES_MAX, parse as parse_json};

/// Which family of files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Architecture {
    /// `deepseek2`: dense MLA.
    DeepSeek2,
    /// `deepseek32`: MLA with a lightning indexer.
    DeepSeek32,
    /// `glm-dsa`: the same with an indexer that rotates interleaved pairs and that layers may share.
    GlmDsa,
    /// `llama`: grouped-query attention, served as dense MLA.
    Llama,
}

/// Which values RoPE turns as a pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RopeLayout {
    /// `(x[2j], x[2j + 1])`
    Interleaved,
    /// `(x[j], x[j + P / 2])`
    HalfSplit,
}

/// A model's hyperparameters; names are DeepSeek's.
#[derive(Clone, Debug)]
pub struct ModelSpec {
    /// Which family of files.
    pub architecture: Architecture,
    /// Transformer layers that are run.
    pub n_layers: u32,
    /// Rows of the embedding.
    pub vocab_size: u32,
    /// Width of the residual stream.
    pub hidden_size: u32,
    /// Tokens the model was trained for.
    pub context_length: u32,
    /// Query heads.
    pub n_heads: u32,
    /// Width of the compressed query; `None`: queries come straight from the hidden state.
    pub q_lora_rank: Option<u32>,
    /// Width of a latent row.
    pub kv_lora_rank: u32,
    /// Per head, without position; 0 in the group form.
    pub qk_nope_head_dim: u32,
    /// Per head, with position.
    pub qk_rope_head_dim: u32,
    /// Width of a rope row: `qk_rope_head_dim` times the groups.
    pub rope_row: u32,
    /// Per head.
    pub v_head_dim: u32,
    /// KV groups; head h sees slice h G / H of each row. 1: genuine MLA.
    pub group_count: u32,
    /// Of attention scores, YaRN's factor included.
    pub softmax_scale: f32,
    /// Of RMS norms over the hidden state.
    pub rms_norm_eps: f32,
    /// Of RMS norms over the compressed query and the latent.
    pub latent_norm_eps: f32,
    /// Whether the latent is normalised before it is cached.
    pub kv_a_norm: bool,
    /// Angle per position of each pair of a rope row, `[rope_row / 2]`.
    pub rope_frequencies: Vec<f64>,
    /// Pairs of query and key rows.
    pub rope_layout: RopeLayout,
    /// YaRN's factor on every cosine and sine, the indexer's included; 1 without.
    pub rope_factor: f64,
    /// The indexer, if the model has one.
    pub indexer: Option<IndexerSpec>,
    /// Width of a dense feed-forward layer.
    pub feed_forward: u32,
    /// Experts, if the model has them.
    pub moe: Option<MoeSpec>,
    /// Whether logits come from the embedding.
    pub tied_embeddings: bool,
}

/// The lightning indexer.
#[derive(Clone, Debug, PartialEq)]
pub struct IndexerSpec {
    /// Index heads.
    pub n_heads: u32,
    /// Width of an index key.
    pub head_dim: u32,
    /// Tokens selected per query.
    pub top_k: u32,
    /// Values that are rotated, the first ones.
    pub rope_dim: u32,
    /// Their pairs.
    pub rope_layout: RopeLayout,
    /// Angle per position of each pair, `[rope_dim / 2]`.
    pub rope_frequencies: Vec<f64>,
    /// Of the key's LayerNorm.
    pub k_norm_eps: f32,
    /// Per layer: whether it selects, or takes the selection of the layer before it. The first selects.
    pub full: Vec<bool>,
}

impl IndexerSpec {
    /// Layers that select, and have an index row.
    pub fn n_full(&self) -> u32 {
        u32::try_from(self.full.iter().filter(|full| **full).count()).expect("at most as many as layers")
    }
}

/// How router logits become scores.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RouterScore {
    /// Each by itself.
    Sigmoid,
    /// Over all experts.
    Softmax,
}

/// How good a group of experts is for a token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GroupScore {
    /// The sum of its two best experts' scores.
    BestTwo,
    /// Its best expert's score.
    Best,
}

/// Mixture of experts with grouped selection.
#[derive(Clone, Debug, PartialEq)]
pub struct MoeSpec {
    /// Routed experts.
    pub n_experts: u32,
    /// Experts per token.
    pub n_active: u32,
    /// Width of an expert.
    pub feed_forward: u32,
    /// Shared experts, run for every token as one of this many times the width.
    pub n_shared: u32,
    /// Groups that experts are split into.
    pub n_groups: u32,
    /// Groups that a token may reach.
    pub n_groups_kept: u32,
    /// How logits become scores.
    pub score: RouterScore,
    /// How groups are compared.
    pub group_score: GroupScore,
    /// Whether a bias per expert takes part in the choice, not in the weights.
    pub correction_bias: bool,
    /// Whether the chosen weights are made to sum to 1.
    pub renormalise: bool,
    /// Factor on the weights.
    pub scale: f32,
    /// Per layer: whether it has experts or is dense.
    pub layers: Vec<bool>,
}

impl ModelSpec {
    /// What a user should know about how the model is served.
    pub fn label(&self) -> Option<&'static str> {
        if self.indexer.is_none() { Some("dense: no indexer") } else { None }
    }

    /// Whether layer `layer` has experts.
    pub fn is_moe_layer(&self, layer: u32) -> bool {
        self.moe.as_ref().is_some_and(|moe| moe.layers.get(layer as usize) == Some(&true))
    }
}
