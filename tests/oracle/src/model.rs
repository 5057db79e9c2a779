//! What does a GGUF file say about its model? Metadata and decoded tensors, under llama.cpp's names.
//!
//! Read here again, and not through the daemon's reader, so that a mistake there shows as a difference.

use crate::rope::{Rope, Yarn};
use crate::rows::{Real, Rows};
use anyhow::{Context, bail, ensure};
use sparsed_quant::gguf::{Array, Gguf, Metadata, Value};
use std::path::Path;

/// Largest dimension or count in a file that is believed.
const COUNT_MAX: u32 = 1 << 22;

/// An opened file.
#[derive(Debug)]
pub struct Model {
    file: Vec<u8>,
    gguf: Gguf,
    /// What its metadata says.
    pub config: Config,
}

/// Shapes and constants. The letters are those of [`crate::forward`].
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// Tensors are called as in a Llama file.
    pub llama: bool,
    /// Layers without those of multi-token prediction.
    pub n_layers: usize,
    /// Rows of the embedding.
    pub vocab: usize,
    /// D
    pub hidden: usize,
    /// H
    pub n_heads: usize,
    /// G: heads of one group see one slice of the latent and of the rope key.
    pub groups: usize,
    /// Slices of the latent are values as they are: there are no `attn_k_b` and `attn_v_b`.
    pub group_form: bool,
    /// Width of the compressed query, in models that have it.
    pub q_lora: Option<usize>,
    /// C
    pub latent: usize,
    /// N
    pub nope: usize,
    /// P
    pub rope_head: usize,
    /// V
    pub v_head: usize,
    /// Factor on attention scores.
    pub scale: f64,
    /// Of every RMSNorm.
    pub eps: f64,
    /// The latent is normalised.
    pub kv_a_norm: bool,
    /// Of the whole rope row, `G P` wide.
    pub rope: Rope,
    /// The lightning indexer.
    pub indexer: Option<Indexer>,
    /// Width of a dense feed-forward.
    pub feed_forward: usize,
    /// Experts.
    pub moe: Option<Moe>,
}

/// The lightning indexer.
#[derive(Clone, Debug, PartialEq)]
pub struct Indexer {
    /// Index heads.
    pub n_heads: usize,
    /// Width of an index key.
    pub width: usize,
    /// Tokens selected.
    pub top_k: usize,
    /// Of the first values of a key.
    pub rope: Rope,
    /// Pairs are neighbours.
    pub interleaved: bool,
    /// Layers with an indexer of their own; the others use the selection of the last one before.
    pub full: Vec<bool>,
}

/// Mixture of experts.
#[derive(Clone, Debug, PartialEq)]
pub struct Moe {
    /// Layers before this one are dense.
    pub first_layer: usize,
    /// Routed experts.
    pub n_experts: usize,
    /// Experts per token.
    pub n_active: usize,
    /// Shared experts.
    pub n_shared: usize,
    /// Width of one expert.
    pub feed_forward: usize,
    /// Groups of experts.
    pub n_groups: usize,
    /// Groups a token may reach.
    pub n_groups_kept: usize,
    /// Scores are softmax, and a group counts by its best; otherwise sigmoid, by the sum of its best two.
    pub softmax: bool,
    /// Weights are divided by their sum.
    pub renormalise: bool,
    /// Factor on the weights.
    pub scale: f64,
}

impl Model {
    /// Opens a GGUF file of the architectures deepseek2, deepseek32, glm-dsa and llama.
    ///
    /// # Errors
    /// It cannot be read, or says something that is not understood.
    pub fn open(path: &Path) -> anyhow::Result<Self> {
        let file = std::fs::read(path).with_context(|| path.display().to_string())?;
        let gguf = Gguf::parse(&file).with_context(|| path.display().to_string())?;
        let config = Config::parse(&gguf).with_context(|| path.display().to_string())?;
        let mut model = Self { file, gguf, config };
        if model.has("rope_freqs.weight") {
            // A Llama file has the factors of one head, a converted one those of the whole row.
            let pairs = if model.config.llama { model.config.rope_head } else { model.config.rope.width() } / 2;
            let factors = model.vector::<f64>("rope_freqs.weight", pairs)?;
            let frequencies = &mut model.config.rope.frequencies;
            frequencies.iter_mut().zip(factors.iter().cycle()).for_each(|(frequency, factor)| *frequency /= factor);
        }
        Ok(model)
    }

    /// Whether there is such a tensor.
    pub fn has(&self, name: &str) -> bool {
        self.gguf.tensor(name).is_some()
    }

    /// A decoded vector of `n` values.
    ///
    /// # Errors
    /// It is missing, of another shape or in a format that is not known.
    pub fn vector<T: Real>(&self, name: &str, n: usize) -> anyhow::Result<Vec<T>> {
        Ok(self.matrix(name, 1, n)?.values().to_vec())
    }

    /// A decoded matrix `[rows, columns]`; a stack of matrices counts as one with all their rows.
    ///
    /// # Errors
    /// As [`Self::vector`].
    pub fn matrix<T: Real>(&self, name: &str, rows: usize, columns: usize) -> anyhow::Result<Rows<T>> {
        let tensor = self.gguf.tensor(name).with_context(|| format!("tensor '{name}' is missing"))?;
        let count = rows.checked_mul(columns).context("a tensor is too large")?;
        let shape = (tensor.dims.first().copied(), tensor.values());
        ensure!(
            shape == (Some(columns as u64), count as u64),
            "tensor '{name}' is {:?}, not {columns} x {rows}",
            tensor.dims
        );
        let mut values = vec![0.0; count];
        sparsed_quant::decode(tensor.format, &self.file[tensor.range.clone()], &mut values)?;
        Ok(Rows::new(columns, values.into_iter().map(<T as From<f32>>::from).collect()))
    }
}

/// Metadata under the architecture's prefix.
pub(crate) struct Keys<'a> {
    pub(crate) metadata: &'a Metadata,
    pub(crate) arch: &'a str,
}

impl Keys<'_> {
    pub(crate) fn name(&self, key: &str) -> String {
        format!("{}.{key}", self.arch)
    }

    pub(crate) fn optional(&self, key: &str) -> anyhow::Result<Option<usize>> {
        let value = self.metadata.u32(&self.name(key))?;
        ensure!(value.is_none_or(|n| n <= COUNT_MAX), "{} is {value:?}, above {COUNT_MAX}", self.name(key));
        Ok(value.map(|n| n as usize))
    }

    /// A number that must be there and not be 0.
    pub(crate) fn count(&self, key: &str) -> anyhow::Result<usize> {
        let value = self.optional(key)?.filter(|&n| n > 0);
        value.with_context(|| format!("{} must be at least 1", self.name(key)))
    }

    pub(crate) fn float(&self, key: &str, default: f64) -> anyhow::Result<f64> {
        Ok(self.metadata.f32(&self.name(key))?.map_or(default, f64::from))
    }

    pub(crate) fn bool(&self, key: &str, default: bool) -> anyhow::Result<bool> {
        Ok(self.metadata.bool(&self.name(key))?.unwrap_or(default))
    }
}

impl Config {
    fn parse(gguf: &Gguf) -> anyhow::Result<Self> {
        let metadata = gguf.metadata();
        let arch = metadata.str("general.architecture")?.context("general.architecture is missing")?;
        let keys = Keys { metadata, arch };
        let embedding = gguf.tensor("token_embd.weight").context("tensor 'token_embd.weight' is missing")?;
        let vocab = usize::try_from(embedding.dims.get(1).copied().unwrap_or(0))?;
        ensure!(vocab > 0, "tensor 'token_embd.weight' has no rows");
        match arch {
            "llama" => Self::llama(&keys, vocab),
            "deepseek2" | "deepseek32" | "glm-dsa" => Self::mla(&keys, vocab),
            other => bail!("architecture '{other}' is not known"),
        }
    }

    /// A Llama file is the group form whose latent is the values and whose rope row is the keys.
    fn llama(keys: &Keys<'_>, vocab: usize) -> anyhow::Result<Self> {
        let hidden = keys.count("embedding_length")?;
        let n_heads = keys.count("attention.head_count")?;
        let groups = keys.optional("attention.head_count_kv")?.unwrap_or(n_heads);
        let head = keys.optional("attention.key_length")?.unwrap_or(hidden / n_heads);
        ensure!(groups > 0 && n_heads.is_multiple_of(groups), "{groups} KV heads for {n_heads} heads");
        ensure!(head > 0 && head.is_multiple_of(2), "heads are {head} wide");
        let one = Rope::parse(keys, head)?;
        let rope = Rope { frequencies: one.frequencies.repeat(groups), magnitude: one.magnitude };
        Ok(Self {
            llama: true,
            n_layers: keys.count("block_count")?,
            vocab,
            hidden,
            n_heads,
            groups,
            group_form: true,
            q_lora: None,
            latent: groups * head,
            nope: 0,
            rope_head: head,
            v_head: head,
            scale: (head as f64).powf(-0.5),
            eps: keys.float("attention.layer_norm_rms_epsilon", 1e-5)?,
            kv_a_norm: false,
            rope,
            indexer: None,
            feed_forward: keys.count("feed_forward_length")?,
            moe: None,
        })
    }

    fn mla(keys: &Keys<'_>, vocab: usize) -> anyhow::Result<Self> {
        let n_heads = keys.count("attention.head_count")?;
        let groups = keys.optional("attention.group_count")?.unwrap_or(1);
        let rope_row = keys.count("rope.dimension_count")?;
        let key = keys.count("attention.key_length_mla")?;
        let latent = keys.count("attention.kv_lora_rank")?;
        let v_head = keys.count("attention.value_length_mla")?;
        let nope = key.checked_sub(rope_row).context("keys are narrower than their part with a position")?;
        let whole = |n: usize| groups > 0 && n.is_multiple_of(groups);
        ensure!(rope_row.is_multiple_of(2), "rope.dimension_count is {rope_row}, pairs are rotated");
        ensure!(whole(n_heads) && whole(latent) && whole(rope_row / 2), "{groups} groups do not divide the rows");
        let group_form = groups > 1 || nope == 0;
        let slices = nope == 0 && v_head == latent / groups;
        ensure!(!group_form || slices, "in the group form a value is a slice of the latent");
        let predicted = keys.optional("nextn_predict_layers")?.unwrap_or(0);
        let n_layers = keys.count("block_count")?.checked_sub(predicted).filter(|&n| n > 0);
        let n_layers = n_layers.context("no layer is left without those of multi-token prediction")?;
        let rope = Rope::parse(keys, rope_row)?;
        let yarn = Yarn::parse(keys)?.map_or(1.0, |yarn| yarn.scale);
        Ok(Self {
            llama: false,
            n_layers,
            vocab,
            hidden: keys.count("embedding_length")?,
            n_heads,
            groups,
            group_form,
            q_lora: keys.optional("attention.q_lora_rank")?.filter(|&rank| rank > 0),
            latent,
            nope,
            rope_head: rope_row / groups,
            v_head,
            scale: keys.float("attention.scale", yarn * yarn / (key as f64).sqrt())?,
            eps: keys.float("attention.layer_norm_rms_epsilon", 1e-6)?,
            kv_a_norm: keys.bool("attention.kv_a_norm", true)?,
            indexer: Indexer::parse(keys, n_layers, &rope)?,
            rope,
            feed_forward: keys.count("feed_forward_length")?,
            moe: Moe::parse(keys)?,
        })
    }
}

impl Indexer {
    fn parse(keys: &Keys<'_>, n_layers: usize, attention: &Rope) -> anyhow::Result<Option<Self>> {
        if keys.arch == "deepseek2" || keys.optional("attention.indexer.head_count")?.is_none() {
            return Ok(None);
        }
        let width = keys.count("attention.indexer.key_length")?;
        let rope = match keys.optional("attention.indexer.rope_dimension_count")? {
            Some(own) => Rope::parse(keys, own)?,
            None => attention.clone(),
        };
        ensure!((2..=width).contains(&rope.width()), "index keys of {width} have {} rotated", rope.width());
        let full = Self::full(keys, n_layers)?;
        ensure!(full.first() == Some(&true), "the first layer must have an indexer of its own");
        Ok(Some(Self {
            n_heads: keys.count("attention.indexer.head_count")?,
            width,
            top_k: keys.count("attention.indexer.top_k")?,
            rope,
            interleaved: keys.arch == "glm-dsa",
            full,
        }))
    }

    /// Which layers own an indexer. A GLM file without the list is GLM-5.2 when its context is a million tokens.
    fn full(keys: &Keys<'_>, n_layers: usize) -> anyhow::Result<Vec<bool>> {
        let listed = match keys.metadata.get(&keys.name("attention.indexer.types")) {
            Some(Value::Array(Array::Bool(list))) => list.clone(),
            Some(Value::Array(Array::I32(list))) => list.iter().map(|&n| n != 0).collect(),
            Some(Value::Array(Array::U32(list))) => list.iter().map(|&n| n != 0).collect(),
            Some(_) => bail!("attention.indexer.types is not a list of bools"),
            None if keys.arch == "glm-dsa" && keys.count("context_length")? >= 1 << 20 => {
                (0..n_layers).map(|i| (i + 1).saturating_sub(3).is_multiple_of(4)).collect()
            }
            None => vec![true; n_layers],
        };
        ensure!(listed.len() >= n_layers, "attention.indexer.types has {} layers of {n_layers}", listed.len());
        Ok(listed[..n_layers].to_vec())
    }
}

impl Moe {
    fn parse(keys: &Keys<'_>) -> anyhow::Result<Option<Self>> {
        let Some(n_experts) = keys.optional("expert_count")?.filter(|&n| n > 0) else { return Ok(None) };
        let n_groups = keys.optional("expert_group_count")?.unwrap_or(1).max(1);
        let n_groups_kept = keys.optional("expert_group_used_count")?.unwrap_or(n_groups);
        let n_active = keys.count("expert_used_count")?;
        let reached = n_experts / n_groups * n_groups_kept;
        ensure!(n_experts.is_multiple_of(n_groups) && n_groups_kept <= n_groups, "{n_groups} groups of {n_experts}");
        ensure!(n_active <= reached, "{n_active} active experts of {reached} that a token may reach");
        let softmax = match keys.optional("expert_gating_func")? {
            Some(1) => true,
            Some(2) => false,
            // DeepSeek-V2 files are older than the key.
            None => keys.arch == "deepseek2",
            Some(other) => bail!("expert_gating_func {other} is not known"),
        };
        Ok(Some(Self {
            first_layer: keys.optional("leading_dense_block_count")?.unwrap_or(0),
            n_experts,
            n_active,
            n_shared: keys.optional("expert_shared_count")?.unwrap_or(0),
            feed_forward: keys.count("expert_feed_forward_length")?,
            n_groups,
            n_groups_kept,
            softmax,
            renormalise: keys.bool("expert_weights_norm", false)?,
            scale: keys.float("expert_weights_scale", 1.0)?,
        }))
    }
}
