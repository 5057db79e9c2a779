//! Which model is it? Hyperparameters, checked one by one.
//!
//! One [`ModelSpec`] covers what is served: genuine DeepSeek-V3.2 files (`deepseek32`), files made by
//! `sparsectl convert` (the same architecture with four extension keys), and Llama files as exact dense MLA: the
//! latent row is all value heads side by side, the rope row all rotated key heads, and each query head sees the slice
//! of its group. Formulas: DeepSeek-V3.2-Exp `inference/model.py`, YaRN as in its `precompute_freqs_cis`.

mod parse;

/// Which family of files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Architecture {
    /// `deepseek32`: MLA with a lightning indexer.
    DeepSeek32,
    /// `llama`: grouped-query attention, served as dense MLA.
    Llama,
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
    /// Of RMS norms.
    pub rms_norm_eps: f32,
    /// Whether the latent is normalised before it is cached.
    pub kv_a_norm: bool,
    /// Angle per position of each pair of a rope row, `[rope_row / 2]`.
    pub rope_frequencies: Vec<f64>,
    /// The indexer, if the model has one.
    pub indexer: Option<IndexerSpec>,
    /// Width of a dense feed-forward layer.
    pub feed_forward: u32,
    /// Experts, if the model has them.
    pub moe: Option<MoeSpec>,
    /// First layers that are dense although the model has experts.
    pub n_dense_layers: u32,
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
    /// Values that are rotated, the first ones, half-split.
    pub rope_dim: u32,
    /// Angle per position of each pair, `[rope_dim / 2]`.
    pub rope_frequencies: Vec<f64>,
    /// Of the key's LayerNorm.
    pub k_norm_eps: f32,
}

/// Mixture of experts with sigmoid scores and grouped selection.
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
    /// Whether the chosen weights are made to sum to 1.
    pub renormalise: bool,
    /// Factor on the weights.
    pub scale: f32,
}

impl ModelSpec {
    /// What a user should know about how the model is served.
    pub fn label(&self) -> Option<&'static str> {
        if self.indexer.is_none() { Some("dense: no indexer") } else { None }
    }

    /// Whether layer `layer` has experts.
    pub fn is_moe_layer(&self, layer: u32) -> bool {
        self.moe.is_some() && layer >= self.n_dense_layers
    }
}
