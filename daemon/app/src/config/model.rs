//! Which file is a model, or which engine elsewhere, and how is it used?

use super::{KeepAlive, LoadWhen, Relay};
use serde::{Deserialize, Serialize};
use sparsed_engine::DEFAULT_MODEL;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// Most other names of a model.
const ALIASES_MAX: usize = 32;
/// Longest other name in bytes.
const ALIAS_BYTES_MAX: usize = 256;

/// `[model.<name>]`
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Model {
    /// The file, which is verified if it or what it leads to is named by its SHA-256; `store:NAME` is of the store.
    /// Empty where an engine elsewhere computes the model, and for the model `default` where it is the packaged one.
    #[serde(default, skip_serializing_if = "is_empty")]
    pub path: PathBuf,
    /// The OpenAI interface of the engine that computes it, `https://host[:port]/v1`; `None`: this box does.
    #[serde(default)]
    pub upstream: Option<String>,
    /// How that engine is asked.
    #[serde(default)]
    pub relay: Option<Relay>,
    /// Other names that requests may have for it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub aliases: Vec<String>,
    /// Most tokens of prompt and answer; `None`: as many as the model was trained for.
    #[serde(default)]
    pub max_context: Option<u32>,
    /// Tokens that attention selects; `None`: as many as the model was made for, 0: all.
    #[serde(default)]
    pub top_k: Option<u32>,
    /// How activations go into products.
    #[serde(default)]
    pub activations: Activations,
    /// How KV rows are stored; `None`: as [`Activations`] and the plugin have it.
    #[serde(default)]
    pub kv_dtype: Option<KvDtype>,
    /// How index rows are stored; `None`: as [`Activations`] has it.
    #[serde(default)]
    pub index_dtype: Option<IndexDtype>,
    /// When it is loaded.
    #[serde(default)]
    pub load: LoadWhen,
    /// How long it stays when nobody asks for it; `None`: as [`LoadWhen`] has it.
    #[serde(default)]
    pub keep_alive: Option<KeepAlive>,
}

impl Model {
    /// The model at `path`, all else as it is by default.
    pub fn at(path: PathBuf) -> Self {
        let (upstream, relay, max_context, top_k, keep_alive) = (None, None, None, None, None);
        let (activations, kv_dtype, index_dtype, load) = (Activations::default(), None, None, LoadWhen::default());
        let aliases = Vec::new();
        Self {
            path,
            upstream,
            relay,
            aliases,
            max_context,
            top_k,
            activations,
            kv_dtype,
            index_dtype,
            load,
            keep_alive,
        }
    }

    /// What of it does not go together.
    pub(super) fn wrong_value(&self, name: &str) -> Option<(String, String)> {
        let key = |key: &str| super::dotted(&["model", name, key]);
        let (has_path, relay) = (!is_empty(&self.path), self.relay.as_ref());
        match &self.upstream {
            Some(_) if has_path => Some((key("upstream"), format!("and {} exclude each other", key("path")))),
            Some(_) if self.top_k.is_some() => {
                Some((key("top_k"), "is the upstream engine's to choose; leave it out".to_owned()))
            }
            Some(upstream) => relay.cloned().unwrap_or_default().wrong_value(name, upstream),
            None if relay.is_some() => Some((key("relay"), format!("belongs to a model with {}", key("upstream")))),
            // The default model is the packaged one unless it is said where it is.
            None if !has_path && name != DEFAULT_MODEL => {
                Some((key("path"), format!("is missing or empty; set a path, or {}", key("upstream"))))
            }
            None => None,
        }
    }
}

/// The first name that is one of two models, or none.
pub(super) fn ambiguous_name(models: &BTreeMap<String, Model>) -> Option<(String, String)> {
    let mut taken: BTreeSet<&str> = models.keys().map(String::as_str).collect();
    for (name, model) in models {
        let wrong = |reason: String| Some((super::dotted(&["model", name, "aliases"]), reason));
        if model.aliases.len() > ALIASES_MAX {
            return wrong(format!("has {} names, {ALIASES_MAX} are allowed", model.aliases.len()));
        }
        for alias in &model.aliases {
            if alias.is_empty() || alias.len() > ALIAS_BYTES_MAX {
                return wrong(format!("has a name of {} bytes, must be 1 to {ALIAS_BYTES_MAX}", alias.len()));
            }
            if !taken.insert(alias) {
                return wrong(format!("has '{alias}', which is a model's name already"));
            }
        }
    }
    None
}

fn is_empty(path: &Path) -> bool {
    path.as_os_str().is_empty()
}

/// How latent and rope rows are stored; index rows are q8_0 in all, unless [`IndexDtype`] says otherwise.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum KvDtype {
    /// 2 bytes a value.
    #[value(name = "f16")]
    F16,
    /// 2 bytes a value: words times a power of two for a row.
    #[value(name = "w16")]
    W16,
    /// 129 bytes for 128 values: e4m3 times a power of two, as DeepSeek's own caches; larger errors than of `q8_0`.
    #[value(name = "fp8")]
    Fp8,
    /// 34 bytes for 32 values: nearly half the memory, and half of what a session's file has.
    #[value(name = "q8_0")]
    #[serde(rename = "q8_0")]
    Q8_0,
    /// Latent rows take 26 bytes for 32 values, rope rows are q8_0: the least memory, larger errors than of `q8_0`.
    #[value(name = "q6_0")]
    #[serde(rename = "q6_0")]
    Q6_0,
}

/// How index rows, by which tokens are selected, are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum IndexDtype {
    /// 34 bytes for 32 values.
    #[value(name = "q8_0")]
    #[serde(rename = "q8_0")]
    Q8_0,
    /// 18 bytes for 32 values, rotated by a Hadamard matrix before: some other tokens are selected.
    #[value(name = "q4_0")]
    #[serde(rename = "q4_0")]
    Q4_0,
}

/// How activations go into products with quantised weights.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Activations {
    /// Rounded to 16 bits per 32 values; KV rows in w16 (f16 where the CPU plugin does not compute) and q8_0.
    #[default]
    Int16,
    /// As f32, and KV rows in f32; for comparisons.
    F32,
    /// Rounded to int8 per 32 values, KV rows as with int16; near ties between tokens may fall otherwise, and prompts
    /// are read up to one and a half times as fast.
    Int8,
}
