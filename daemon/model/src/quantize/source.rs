//! Which tensors does the new file have, and where do their numbers come from? Those of a GGUF as they are; those of a
//! Hugging Face folder under llama.cpp's names, experts stacked and `kv_b` in its two parts, the key part transposed.

use crate::model::Model;
use crate::weights::{Stored, StoredError, Weights, expert_of, layer_of};
use crate::{ModelError, ModelSpec, ProgramOptions};
use sparsed_quant::Format;
use sparsed_quant::gguf::Metadata;
use std::collections::BTreeMap;
use std::sync::Arc;

/// Most values of a head's key part of `kv_b`, which is transposed in memory.
const TRANSPOSED_MAX: u64 = 1 << 24;

/// A tensor of the new file before its format is chosen.
#[derive(Clone, Debug)]
pub(super) struct Source {
    pub(super) name: String,
    /// Fastest first.
    pub(super) dims: Vec<u64>,
    /// What holds its numbers exactly.
    pub(super) format: Format,
    /// Its numbers, piece after piece.
    pub(super) pieces: Vec<Piece>,
}

/// A run of numbers of a tensor in a file; whole rows.
#[derive(Clone, Debug)]
pub(super) struct Piece {
    pub(super) stored: Arc<Stored>,
    /// The first of them, counted from the start of what is stored.
    pub(super) first: u64,
    pub(super) values: u64,
    /// Rows and columns that change places.
    pub(super) transposed: Option<[usize; 2]>,
}

/// The tensors of a GGUF, in the order of its files.
pub(super) fn of_gguf(weights: &Weights) -> Result<Vec<Source>, ModelError> {
    weights.names().into_iter().map(|name| plain(weights, name, name)).collect()
}

/// What a folder says in keys, which the reader of GGUFs must read as the same model, and its tensors in the order of
/// its layers.
pub(super) fn of_folder(weights: &Weights) -> Result<(Metadata, ModelSpec, Vec<Source>), ModelError> {
    // Names what is missing, what has other dimensions and what nobody would read.
    let model = Model::open(weights.path())?;
    model.outline(&ProgramOptions::default())?;
    let spec = model.spec().clone();
    let mut metadata = Metadata::new();
    let config = weights.config().expect("a folder has a configuration");
    spec.write_metadata(config, &mut metadata)?;
    metadata.set("general.name", sparsed_quant::gguf::Value::String(model.name().to_owned()));
    drop(model);
    crate::language::write_metadata(weights, spec.vocab_size, &mut metadata)?;
    // By place in the model: the embedding, the layers, the output.
    let mut sources: BTreeMap<(u32, String), Vec<(u32, &str)>> = BTreeMap::new();
    for (theirs, ours) in weights.inventory() {
        let Some(ours) = ours.filter(|ours| is_needed(&spec, theirs, ours)) else { continue };
        let place = match layer_of(&ours) {
            Some(layer) => layer + 1,
            None if ours.starts_with("output") => u32::MAX,
            None => 0,
        };
        let expert = expert_of(theirs).map_or(0, |(expert, _)| expert);
        sources.entry((place, ours.into_owned())).or_default().push((expert, theirs));
    }
    let mut tensors = Vec::new();
    for ((_, ours), mut theirs) in sources {
        theirs.sort_unstable();
        match ours.strip_suffix("attn_kv_b.weight") {
            Some(prefix) => tensors.extend(split(weights, &spec, prefix, theirs[0].1)?),
            None if expert_of(theirs[0].1).is_some() => tensors.push(stacked(weights, &ours, &theirs)?),
            None => tensors.push(plain(weights, &ours, theirs[0].1)?),
        }
    }
    Ok((metadata, spec, tensors))
}

/// Whether the folder's tensor `theirs` has numbers that go into the tensor `ours`.
fn is_needed(spec: &ModelSpec, theirs: &str, ours: &str) -> bool {
    let shares = |layer: u32| {
        let full = spec.indexer.as_ref().and_then(|indexer| indexer.full.get(layer as usize));
        ours.contains(".indexer.") && full != Some(&true)
    };
    // Scales are read with the tensor they belong to.
    let is_scale = theirs.ends_with("_scale_inv");
    let is_left_out = match layer_of(ours) {
        Some(layer) => layer >= spec.n_layers || shares(layer),
        None => spec.tied_embeddings && ours == "output.weight",
    };
    !is_scale && !is_left_out
}

fn plain(weights: &Weights, ours: &str, theirs: &str) -> Result<Source, ModelError> {
    let stored = stored(weights, theirs)?;
    let (dims, format) = (stored.dims.clone(), exact(theirs, &stored)?);
    let piece = Piece { values: dims.iter().product(), first: 0, transposed: None, stored: Arc::new(stored) };
    Ok(Source { name: ours.to_owned(), dims, format, pieces: vec![piece] })
}

/// Experts of one layer, in ascending order and of one shape.
fn stacked(weights: &Weights, ours: &str, theirs: &[(u32, &str)]) -> Result<Source, ModelError> {
    let experts = theirs.iter().map(|(_, name)| plain(weights, ours, name)).collect::<Result<Vec<_>, _>>()?;
    let first = experts.first().expect("at least one expert was found");
    let same = experts.iter().all(|expert| expert.format == first.format);
    let format = if same { first.format } else { Format::F32 };
    let dims = first.dims.iter().copied().chain([experts.len() as u64]).collect();
    let pieces = experts.into_iter().flat_map(|expert| expert.pieces).collect();
    Ok(Source { name: ours.to_owned(), dims, format, pieces })
}

/// `kv_b` `[rank, heads (nope + value)]` as `attn_k_b` `[nope, rank, heads]` and `attn_v_b` `[rank, value, heads]`.
fn split(weights: &Weights, spec: &ModelSpec, prefix: &str, theirs: &str) -> Result<[Source; 2], ModelError> {
    let stored = Arc::new(stored(weights, theirs)?);
    let format = exact(theirs, &stored)?;
    let [rank, nope, value] = [spec.kv_lora_rank, spec.qk_nope_head_dim, spec.v_head_dim].map(u64::from);
    let key_values = nope.saturating_mul(rank);
    if key_values > TRANSPOSED_MAX {
        let reason = format!("a head's key part has {key_values} values, the limit is {TRANSPOSED_MAX}");
        return Err(ModelError::Tensor { name: theirs.to_owned(), reason });
    }
    let heads = || 0..u64::from(spec.n_heads);
    let piece = |first: u64, rows: u64, transposed| Piece {
        stored: Arc::clone(&stored),
        first: first * rank,
        values: rows * rank,
        transposed,
    };
    let swap = Some([spec.qk_nope_head_dim as usize, spec.kv_lora_rank as usize]);
    let keys = heads().map(|head| piece(head * (nope + value), nope, swap)).collect();
    let values = heads().map(|head| piece(head * (nope + value) + nope, value, None)).collect();
    let source = |part: &str, dims: [u64; 3], pieces| Source {
        name: format!("{prefix}{part}.weight"),
        dims: dims.to_vec(),
        format,
        pieces,
    };
    let n = u64::from(spec.n_heads);
    Ok([source("attn_k_b", [nope, rank, n], keys), source("attn_v_b", [rank, value, n], values)])
}

fn stored(weights: &Weights, name: &str) -> Result<Stored, ModelError> {
    let missing = || ModelError::Tensor { name: name.to_owned(), reason: "is missing".to_owned() };
    weights.stored(name)?.ok_or_else(missing)
}

fn exact(name: &str, stored: &Stored) -> Result<Format, ModelError> {
    stored.exact().map_err(|error| failed(name, error))
}

/// What could not be read of the tensor `name`.
pub(super) fn failed(name: &str, error: StoredError) -> ModelError {
    match error {
        StoredError::Io(source) => ModelError::Tensor { name: name.to_owned(), reason: source.to_string() },
        StoredError::Quant(source) => ModelError::Quant { name: name.to_owned(), source },
    }
}
