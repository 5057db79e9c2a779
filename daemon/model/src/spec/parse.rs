//! Whose keys are these? Finds the reader for a file or folder, and checks what every reader's spec must hold.

use super::keys::{DIM_MAX, Keys};
use super::{Architecture, ModelSpec, gguf_deepseek, gguf_llama, hf};
use crate::ModelError;
use crate::weights::Weights;
use sparsed_quant::gguf::{GgufError, Metadata};

/// Most rows of an embedding.
pub(super) const VOCAB_MAX: u32 = DIM_MAX * 4;

impl ModelSpec {
    pub(crate) fn parse(weights: &Weights) -> Result<Self, ModelError> {
        let spec = match (weights.metadata(), weights.config()) {
            (Some(metadata), _) => from_metadata(weights, metadata)?,
            (None, Some(config)) => hf::parse(config)?,
            (None, None) => unreachable!("weights come from a GGUF or from a folder with a configuration"),
        };
        spec.check_rows()?;
        spec.check_kv_b(weights)?;
        Ok(spec)
    }

    /// The spec that the text of a Hugging Face `config.json` describes.
    ///
    /// # Errors
    /// What is missing, impossible or not served, by its key.
    pub fn from_config(text: &[u8]) -> Result<Self, ModelError> {
        let spec = hf::parse(&super::json::parse("config.json", text)?)?;
        spec.check_rows()?;
        Ok(spec)
    }

    /// An unsplit kv_b must hold each head's key and value part and nothing else: its split is by these widths.
    fn check_kv_b(&self, weights: &Weights) -> Result<(), ModelError> {
        for layer in 0..self.n_layers {
            let name = format!("blk.{layer}.attn_kv_b.weight");
            if weights.has(&name) && !weights.has(&format!("blk.{layer}.attn_k_b.weight")) {
                let rows = self.n_heads * (self.qk_nope_head_dim + self.v_head_dim);
                weights.check_dims(&name, &[self.kv_lora_rank, rows])?;
            }
        }
        Ok(())
    }
}

fn from_metadata(weights: &Weights, metadata: &Metadata) -> Result<ModelSpec, ModelError> {
    let missing = || ModelError::Metadata(GgufError::Missing("general.architecture".to_owned()));
    let deepseek = |architecture, prefix| gguf_deepseek::parse(weights, &Keys { metadata, prefix }, architecture);
    match metadata.str("general.architecture")?.ok_or_else(missing)? {
        "deepseek2" => deepseek(Architecture::DeepSeek2, "deepseek2"),
        "deepseek32" => deepseek(Architecture::DeepSeek32, "deepseek32"),
        "glm-dsa" => deepseek(Architecture::GlmDsa, "glm-dsa"),
        "llama" => gguf_llama::parse(weights, &Keys { metadata, prefix: "llama" }),
        other => Err(ModelError::Unsupported {
            what: format!("architecture '{other}'"),
            hint: ": deepseek2, deepseek32, glm-dsa and llama are",
        }),
    }
}

/// Refuses a factor that nothing says how to use: where a file names no kind of scaling, llama.cpp stretches linearly.
pub(super) fn unscaled(keys: &Keys<'_>) -> Result<(), ModelError> {
    let key = "rope.scaling.factor";
    // As in llama.cpp, 0 counts as absent.
    let factor = keys.metadata.f32(&keys.name(key))?.filter(|factor| *factor != 0.0).unwrap_or(1.0);
    if keys.str("rope.scaling.type")?.is_none() && factor.total_cmp(&1.0).is_ne() {
        return Err(keys.refuse(key, factor, "without rope.scaling.type it stretches linearly, which is not served"));
    }
    Ok(())
}

/// Divides each pair's frequency by the file's factor, if it has some.
pub(super) fn apply_factors(weights: &Weights, mut frequencies: Vec<f64>) -> Result<Vec<f64>, ModelError> {
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

/// Rows of the embedding, which must agree with the key if there is one.
pub(super) fn vocab_size(weights: &Weights, keys: &Keys<'_>, hidden: u32) -> Result<u32, ModelError> {
    let bad = |reason: String| ModelError::Tensor { name: "token_embd.weight".to_owned(), reason };
    let dims = weights.dims("token_embd.weight").ok_or_else(|| bad("is missing".to_owned()))?;
    let vocab = match dims[..] {
        [width, rows] if width == u64::from(hidden) => u32::try_from(rows).ok(),
        _ => None,
    };
    let vocab = vocab.filter(|&n| n > 0 && n <= VOCAB_MAX);
    let vocab = vocab.ok_or_else(|| bad(format!("has dimensions {dims:?}, expected [{hidden}, vocabulary]")))?;
    match keys.optional("vocab_size", u32::MAX)? {
        Some(said) if said != vocab => Err(keys.refuse("vocab_size", said, format!("the embedding has {vocab} rows"))),
        _ => Ok(vocab),
    }
}
