//! Which tensors does a Hugging Face folder hold? `config.json` and safetensors, one file or several with an index.

use super::safetensors::{Entry, SafetensorsHeader, TENSORS_MAX, dtype_name};
use super::stored::{Coding, Stored, StoredError};
use super::{Listed, Mapped, Tensor, fp8, io, names, open_mapped, reshape};
use crate::ModelError;
use crate::spec::{CONFIG_BYTES_MAX, parse_json};
use safetensors::Dtype;
use serde_json::{Map, Value};
use sparsed_quant::Format;
use std::collections::{BTreeSet, HashMap};
use std::fs::File;
use std::io::Read;
use std::path::{Component, Path};
use std::sync::Arc;

/// Largest index in bytes.
const INDEX_BYTES_MAX: usize = 64 << 20;
/// Most files with tensors.
const SHARDS_MAX: usize = 1 << 12;
/// Largest side of an FP8 block.
const BLOCK_MAX: u64 = 1 << 16;
/// What follows a tensor's name in that of its FP8 scales.
const SCALE: &str = "_scale_inv";
/// Sides of an FP8 block when the configuration names none.
const BLOCK: [usize; 2] = [128, 128];

/// An opened folder.
#[derive(Clone, Debug)]
pub(super) struct Folder {
    config: Map<String, Value>,
    shards: Vec<Mapped>,
    /// By Hugging Face's name.
    tensors: HashMap<String, (usize, Entry)>,
    /// Rows and columns under one FP8 scale.
    block: [usize; 2],
    /// Whether tensors that are made have no bytes.
    pub(super) outline: bool,
}

impl Folder {
    pub(super) fn open(dir: &Path) -> Result<Self, ModelError> {
        if !dir.join("config.json").exists() {
            let reason = "is missing: a model folder has one, beside model.safetensors or an index of such files";
            return Err(ModelError::Config {
                file: dir.join("config.json").display().to_string(),
                reason: reason.into(),
            });
        }
        let config = parse_json("config.json", &read(&dir.join("config.json"), CONFIG_BYTES_MAX)?)?;
        let block = fp8_block(&config)?;
        let mut folder = Self { config, shards: Vec::new(), tensors: HashMap::new(), block, outline: false };
        let whole = "model.safetensors";
        if dir.join(whole).exists() {
            folder.add(dir, whole)?;
            return Ok(folder);
        }
        if !dir.join(Index::FILE).exists() {
            let reason = format!("is missing, and so is {}", Index::FILE);
            return Err(ModelError::Config { file: whole.to_owned(), reason });
        }
        let index = Index::open(dir)?;
        for shard in &index.files() {
            folder.add(dir, shard)?;
        }
        index.check(&folder)?;
        Ok(folder)
    }

    fn add(&mut self, dir: &Path, file: &str) -> Result<(), ModelError> {
        let (handle, bytes) = open_mapped(&dir.join(file))?;
        let shard = self.shards.len();
        let refuse = |reason: String| ModelError::Config { file: file.to_owned(), reason };
        for entry in SafetensorsHeader::parse(file, &bytes)?.entries {
            let name = entry.name.clone();
            if self.tensors.insert(name, (shard, entry)).is_some() {
                return Err(refuse("a tensor of it is in another file too".to_owned()));
            }
        }
        if self.tensors.len() > TENSORS_MAX {
            return Err(refuse(format!("more than {TENSORS_MAX} tensors so far")));
        }
        self.shards.push(Mapped { file: Arc::new(handle), bytes });
        Ok(())
    }

    pub(super) fn config(&self) -> &Map<String, Value> {
        &self.config
    }

    pub(super) fn mapped(&self) -> impl Iterator<Item = &Mapped> {
        self.shards.iter()
    }

    pub(super) fn file_bytes(&self) -> u64 {
        self.shards.iter().map(|shard| shard.bytes.len() as u64).sum()
    }

    pub(super) fn listed(&self) -> Vec<Listed> {
        let listed = |(_, entry): &(usize, Entry)| Listed {
            format: dtype_name(entry.dtype),
            // Scales are part of how other numbers are stored.
            values: if entry.name.ends_with(SCALE) { 0 } else { entry.shape.iter().product() },
            bytes: entry.range.len() as u64,
        };
        self.tensors.values().map(listed).collect()
    }

    /// All tensors by the folder's names, each with the GGUF tensor that it goes into. Scales go with their FP8 tensor.
    pub(super) fn inventory(&self) -> impl Iterator<Item = (&str, Option<String>)> {
        let is_fp8 = |name: &&str| self.tensors.get(*name).is_some_and(|(_, entry)| entry.dtype == Dtype::F8_E4M3);
        self.tensors.keys().map(move |name| {
            let scaled = name.strip_suffix(SCALE).filter(is_fp8);
            (name.as_str(), names::ours(scaled.unwrap_or(name)))
        })
    }

    /// Dimensions of the tensor that a GGUF calls `name`, fastest first.
    pub(super) fn dims(&self, name: &str) -> Option<Vec<u64>> {
        let (_, entry) = self.tensors.get(&names::plain(name)?)?;
        Some(entry.shape.iter().rev().copied().collect())
    }

    /// The tensor that a GGUF calls `name`.
    pub(super) fn find(&self, name: &str) -> Result<Option<Tensor>, ModelError> {
        names::plain(name).map_or(Ok(None), |name| self.tensor(&name))
    }

    /// The experts of a layer as the tensor that a GGUF calls `name`: `count` of `[rows, cols]`.
    pub(super) fn experts(&self, name: &str, cols: u32, rows: u32, count: u32) -> Result<Option<Tensor>, ModelError> {
        let Some((before, after)) = names::experts(name) else { return Ok(None) };
        let mut parts = Vec::new();
        for expert in 0..count {
            let name = format!("{before}{expert}{after}");
            let refuse = |reason: String| ModelError::Tensor { name: name.clone(), reason };
            let part = self.tensor(&name)?.ok_or_else(|| refuse("is missing".to_owned()))?;
            if part.dims != [u64::from(cols), u64::from(rows)] {
                return Err(refuse(format!("has dimensions {:?}, the model asks for {:?}", part.dims, [cols, rows])));
            }
            parts.push(part);
        }
        if self.tensors.contains_key(&format!("{before}{count}{after}")) {
            let reason = format!("there are more than the {count} experts of the configuration");
            return Err(ModelError::Tensor { name: format!("{before}{count}{after}"), reason });
        }
        reshape::stack(name, parts, self.outline).map(Some)
    }

    /// The tensor that the folder calls `name`.
    fn tensor(&self, name: &str) -> Result<Option<Tensor>, ModelError> {
        let Some((shard, entry)) = self.tensors.get(name) else { return Ok(None) };
        let refuse = |reason: String| ModelError::Tensor { name: name.to_owned(), reason };
        if entry.shape.is_empty() || entry.shape.contains(&0) {
            return Err(refuse(format!("has shape {:?}", entry.shape)));
        }
        let bytes = self.shards[*shard].bytes.slice(entry.range.clone());
        let dims: Vec<u64> = entry.shape.iter().rev().copied().collect();
        let format = match entry.dtype {
            Dtype::F32 => Format::F32,
            Dtype::F16 => Format::F16,
            Dtype::BF16 => Format::BF16,
            Dtype::F8_E4M3 if self.outline => {
                // The scales are read, not mapped: a pass over all of them leaves nothing in memory.
                let stored = self.stored(name)?.expect("it was found above");
                let format = stored.exact().map_err(|error| match error {
                    StoredError::Io(source) => io(Path::new(name), source),
                    StoredError::Quant(source) => ModelError::Quant { name: name.to_owned(), source },
                })?;
                return Ok(Some(Tensor { format, dims, bytes: bytes::Bytes::new() }));
            }
            Dtype::F8_E4M3 => return self.fp8(name, entry, &bytes).map(Some),
            other => return Err(refuse(format!("is {other:?}: F32, F16, BF16 and F8_E4M3 are read"))),
        };
        Ok(Some(Tensor { format, dims, bytes }))
    }

    /// Where the tensor that the folder calls `name` lies.
    pub(super) fn stored(&self, name: &str) -> Result<Option<Stored>, ModelError> {
        let Some((shard, entry)) = self.tensors.get(name) else { return Ok(None) };
        let coding = match entry.dtype {
            Dtype::F8_E4M3 => {
                let scales = self.scales(name, entry)?;
                let scales = self.stored(&scales)?.expect("its name was found");
                Coding::Fp8 { scales: Box::new(scales), block: self.block }
            }
            _ => Coding::Plain(self.tensor(name)?.expect("it was found above").format),
        };
        Ok(Some(Stored {
            file: Arc::clone(&self.shards[*shard].file),
            start: entry.range.start as u64,
            dims: entry.shape.iter().rev().copied().collect(),
            coding,
        }))
    }

    /// The name of the scales of an FP8 tensor, which are there and have the right shape.
    fn scales(&self, name: &str, entry: &Entry) -> Result<String, ModelError> {
        let refuse = |reason: String| ModelError::Tensor { name: name.to_owned(), reason };
        let scale_name = format!("{name}{SCALE}");
        let Some(scales) = self.tensors.get(&scale_name).filter(|(_, scales)| scales.dtype != Dtype::F8_E4M3) else {
            return Err(refuse(format!("is F8_E4M3, but {scale_name} is missing")));
        };
        let &[rows, cols] = &entry.shape[..] else { return Err(refuse("is F8_E4M3 and no matrix".to_owned())) };
        let side = |n: u64, block: usize| n.div_ceil(block as u64);
        let wanted = [side(rows, self.block[0]), side(cols, self.block[1])];
        if scales.1.shape != wanted {
            return Err(refuse(format!("needs scales of shape {wanted:?}, {scale_name} has {:?}", scales.1.shape)));
        }
        Ok(scale_name)
    }

    fn fp8(&self, name: &str, entry: &Entry, bytes: &[u8]) -> Result<Tensor, ModelError> {
        let scales = self.scales(name, entry)?;
        let scales = self.tensor(&scales)?.expect("its name was found").values(&scales)?;
        let side = |at: usize| usize::try_from(entry.shape[at]).expect("its bytes are in memory");
        Ok(fp8::decode(bytes, &scales, side(0), side(1), self.block))
    }
}

/// Sides of an FP8 block; refuses quantisation of another kind.
fn fp8_block(config: &Map<String, Value>) -> Result<[usize; 2], ModelError> {
    let Some(quantisation) = config.get("quantization_config").filter(|value| !value.is_null()) else {
        return Ok(BLOCK);
    };
    let refuse = |key: &str, value: &Value, reason: &str| ModelError::Hyperparameter {
        key: format!("quantization_config.{key}"),
        value: value.to_string(),
        reason: reason.to_owned(),
    };
    for (key, wanted) in [("quant_method", "fp8"), ("fmt", "e4m3"), ("activation_scheme", "dynamic")] {
        match quantisation.get(key) {
            None if key != "quant_method" => {}
            Some(Value::String(text)) if text == wanted => {}
            other => return Err(refuse(key, other.unwrap_or(&Value::Null), &format!("only '{wanted}' is served"))),
        }
    }
    let Some(block) = quantisation.get("weight_block_size").filter(|value| !value.is_null()) else { return Ok(BLOCK) };
    let side = |n: &Value| n.as_u64().filter(|&n| n > 0 && n <= BLOCK_MAX).and_then(|n| usize::try_from(n).ok());
    let sides: Option<Vec<usize>> = block.as_array().and_then(|sides| sides.iter().map(side).collect());
    match sides.as_deref() {
        Some(&[rows, cols]) => Ok([rows, cols]),
        _ => Err(refuse("weight_block_size", block, "must be two whole numbers up to 65536")),
    }
}

/// Which tensor is in which file.
struct Index {
    map: Vec<(String, String)>,
}

impl Index {
    const FILE: &'static str = "model.safetensors.index.json";

    fn open(dir: &Path) -> Result<Self, ModelError> {
        let text = read(&dir.join(Self::FILE), INDEX_BYTES_MAX)?;
        let refuse = |reason: String| ModelError::Config { file: Self::FILE.to_owned(), reason };
        let index: Value = serde_json::from_slice(&text).map_err(|error| refuse(error.to_string()))?;
        let map = index.get("weight_map").and_then(Value::as_object);
        let map = map.ok_or_else(|| refuse("has no weight_map".to_owned()))?;
        if map.len() > TENSORS_MAX {
            return Err(refuse(format!("{} tensors, the limit is {TENSORS_MAX}", map.len())));
        }
        let pair = |(name, file): (&String, &Value)| match file.as_str() {
            Some(file) if is_plain_name(file) => Ok((name.clone(), file.to_owned())),
            _ => Err(refuse(format!("{name} is in {file}, which is no file of this folder"))),
        };
        let index = Self { map: map.iter().map(pair).collect::<Result<_, _>>()? };
        let n = index.files().len();
        if n == 0 || n > SHARDS_MAX {
            return Err(refuse(format!("names {n} files, 1 to {SHARDS_MAX} are allowed")));
        }
        Ok(index)
    }

    fn files(&self) -> BTreeSet<&str> {
        self.map.iter().map(|(_, file)| file.as_str()).collect()
    }

    /// Refuses an index that names tensors the files do not have.
    fn check(&self, folder: &Folder) -> Result<(), ModelError> {
        match self.map.iter().find(|(name, _)| !folder.tensors.contains_key(name)) {
            None => Ok(()),
            Some((name, file)) => Err(ModelError::Config {
                file: file.clone(),
                reason: format!("lacks {name}, which the index promises"),
            }),
        }
    }
}

/// Whether `name` can only be a file of the folder itself.
fn is_plain_name(name: &str) -> bool {
    let mut parts = Path::new(name).components();
    matches!((parts.next(), parts.next()), (Some(Component::Normal(part)), None) if part == name)
}

/// The file `name` of the folder, if it is there.
pub(super) fn side_file(dir: &Path, name: &str, limit: usize) -> Result<Option<Vec<u8>>, ModelError> {
    let path = dir.join(name);
    if path.exists() { read(&path, limit).map(Some) } else { Ok(None) }
}

/// Reads a file of at most `limit` bytes.
fn read(path: &Path, limit: usize) -> Result<Vec<u8>, ModelError> {
    let mut text = Vec::new();
    let file = File::open(path).map_err(|source| io(path, source))?;
    file.take(limit as u64 + 1).read_to_end(&mut text).map_err(|source| io(path, source))?;
    if text.len() > limit {
        let file = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        return Err(ModelError::Config { file, reason: format!("more than {limit} bytes") });
    }
    Ok(text)
}
