//! Where are a model's numbers? In its files, mapped; asked for by the name that a GGUF gives them.
//!
//! Two sources answer: GGUF files ([`gguf`]) and a Hugging Face folder ([`folder`]), whose names are translated. What a
//! source does not hold as asked is made from what it holds ([`reshape`]): the parts of an unsplit `attn_kv_b`, and the
//! experts of a layer as one tensor. Everything else stays where it is mapped.

mod folder;
mod fp8;
mod gguf;
mod names;
mod reshape;
mod safetensors;
mod stored;

pub(crate) use names::{expert_of, layer_of};
pub use safetensors::SafetensorsHeader;
pub(crate) use stored::{Coding, Stored, StoredError};

use crate::ModelError;
use bytes::Bytes;
use folder::Folder;
use gguf::GgufFiles;
use serde_json::{Map, Value};
use sparsed_quant::Format;
use sparsed_quant::gguf::{Gguf, Metadata};
use std::borrow::Cow;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// An opened model's tensors.
#[derive(Clone, Debug)]
pub(crate) struct Weights {
    source: Source,
    path: PathBuf,
    /// Whether tensors that are made have no bytes.
    outline: bool,
}

#[derive(Clone, Debug)]
enum Source {
    Gguf(GgufFiles),
    Folder(Folder),
}

/// A tensor where it lies, or as it was made.
#[derive(Clone, Debug)]
pub(crate) struct Tensor {
    pub(crate) format: Format,
    /// ggml's order, fastest first.
    pub(crate) dims: Vec<u64>,
    pub(crate) bytes: Bytes,
}

/// A tensor as a file's table has it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Listed {
    /// How it is stored.
    pub(crate) format: &'static str,
    /// Numbers in it.
    pub(crate) values: u64,
    /// Bytes in the file.
    pub(crate) bytes: u64,
}

/// A whole file, mapped.
#[derive(Clone, Debug)]
struct Mapped {
    file: Arc<File>,
    bytes: Bytes,
}

impl Mapped {
    /// The file and where in it `part` begins, if it is a piece of this mapping.
    fn place(&self, part: &Bytes) -> Option<(Arc<File>, u64)> {
        let offset = part.as_ptr().addr().checked_sub(self.bytes.as_ptr().addr())?;
        let end = offset.checked_add(part.len())?;
        (end <= self.bytes.len()).then(|| (Arc::clone(&self.file), offset as u64))
    }
}

impl Weights {
    /// Opens a GGUF file, the first of split ones with all of them, or a Hugging Face folder.
    pub(crate) fn open(path: &Path) -> Result<Self, ModelError> {
        let folder = std::fs::metadata(path).map_err(|source| io(path, source))?.is_dir();
        let source = if folder { Source::Folder(Folder::open(path)?) } else { Source::Gguf(GgufFiles::open(path)?) };
        Ok(Self { source, path: path.to_owned(), outline: false })
    }

    /// The same tensors; those that would be made of others have their formats and dimensions, but no bytes.
    pub(crate) fn outline(&self) -> Self {
        let mut outline = Self { outline: true, ..self.clone() };
        if let Source::Folder(folder) = &mut outline.source {
            folder.outline = true;
        }
        outline
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Bytes of all files.
    pub(crate) fn file_bytes(&self) -> u64 {
        match &self.source {
            Source::Gguf(files) => files.file_bytes(),
            Source::Folder(folder) => folder.file_bytes(),
        }
    }

    /// The file and the offset of a tensor's bytes, where they are mapped and not made.
    pub(crate) fn place(&self, bytes: &Bytes) -> Option<(Arc<File>, u64)> {
        match &self.source {
            Source::Gguf(files) => files.mapped().find_map(|file| file.place(bytes)),
            Source::Folder(folder) => folder.mapped().find_map(|file| file.place(bytes)),
        }
    }

    /// All its files with tensors.
    pub(crate) fn files(&self) -> Vec<&File> {
        match &self.source {
            Source::Gguf(files) => files.mapped().map(|file| &*file.file).collect(),
            Source::Folder(folder) => folder.mapped().map(|file| &*file.file).collect(),
        }
    }

    /// Where the tensor that the source calls `name` lies.
    pub(crate) fn stored(&self, name: &str) -> Result<Option<Stored>, ModelError> {
        match &self.source {
            Source::Gguf(files) => Ok(files.stored(name)),
            Source::Folder(folder) => folder.stored(name),
        }
    }

    /// The metadata of a GGUF.
    pub(crate) fn metadata(&self) -> Option<&Metadata> {
        match &self.source {
            Source::Gguf(files) => Some(files.metadata()),
            Source::Folder(_) => None,
        }
    }

    /// The configuration of a folder.
    pub(crate) fn config(&self) -> Option<&Map<String, Value>> {
        match &self.source {
            Source::Gguf(_) => None,
            Source::Folder(folder) => Some(folder.config()),
        }
    }

    /// A file beside a folder's weights, if it is there.
    pub(crate) fn side_file(&self, name: &str, limit: usize) -> Result<Option<Vec<u8>>, ModelError> {
        match &self.source {
            Source::Gguf(_) => Ok(None),
            Source::Folder(_) => folder::side_file(&self.path, name, limit),
        }
    }

    /// Names of the tensors of a GGUF, in the file's order.
    pub(crate) fn names(&self) -> Vec<&str> {
        match &self.source {
            Source::Gguf(files) => files.names().collect(),
            Source::Folder(_) => Vec::new(),
        }
    }

    /// All tensors by the source's name, each with that of the GGUF tensor that it is or goes into, if there is one.
    pub(crate) fn inventory(&self) -> Vec<(&str, Option<Cow<'_, str>>)> {
        match &self.source {
            Source::Gguf(files) => files.names().map(|name| (name, Some(Cow::Borrowed(name)))).collect(),
            Source::Folder(folder) => folder.inventory().map(|(name, ours)| (name, ours.map(Cow::Owned))).collect(),
        }
    }

    /// All tensors of all files.
    pub(crate) fn listed(&self) -> Vec<Listed> {
        match &self.source {
            Source::Gguf(files) => files.listed(),
            Source::Folder(folder) => folder.listed(),
        }
    }

    /// Whether a source holds the tensor `name` as it is.
    pub(crate) fn has(&self, name: &str) -> bool {
        self.dims(name).is_some()
    }

    /// Its dimensions, fastest first.
    pub(crate) fn dims(&self, name: &str) -> Option<Vec<u64>> {
        match &self.source {
            Source::Gguf(files) => files.dims(name),
            Source::Folder(folder) => folder.dims(name),
        }
    }

    /// The tensor `name`, if a source holds it as it is.
    pub(crate) fn find(&self, name: &str) -> Result<Option<Tensor>, ModelError> {
        match &self.source {
            Source::Gguf(files) => Ok(files.find(name)),
            Source::Folder(folder) => folder.find(name),
        }
    }

    /// The tensor `name` with just these dimensions (fastest first).
    pub(crate) fn get(&self, name: &str, dims: &[u32]) -> Result<Tensor, ModelError> {
        if self.has(name) {
            self.check_dims(name, dims)?;
        }
        let missing = || ModelError::Tensor { name: name.to_owned(), reason: "is missing".to_owned() };
        match self.find(name)? {
            Some(tensor) => Ok(tensor),
            None => self.made(name, dims)?.ok_or_else(missing),
        }
    }

    /// The tensor `name`, made of others.
    fn made(&self, name: &str, dims: &[u32]) -> Result<Option<Tensor>, ModelError> {
        if let Some(prefix) = name.strip_suffix("attn_k_b.weight")
            && let (Some(kv_b), &[nope, rank, heads]) = (self.find(&format!("{prefix}attn_kv_b.weight"))?, dims)
        {
            return reshape::key_part(name, &kv_b, [nope, rank, heads], self.outline).map(Some);
        }
        if let Some(prefix) = name.strip_suffix("attn_v_b.weight")
            && let (Some(kv_b), &[rank, value, heads]) = (self.find(&format!("{prefix}attn_kv_b.weight"))?, dims)
        {
            return reshape::value_part(name, &kv_b, [rank, value, heads], self.outline).map(Some);
        }
        match (&self.source, dims) {
            (Source::Folder(folder), &[cols, rows, experts]) => folder.experts(name, cols, rows, experts),
            _ => Ok(None),
        }
    }

    /// Refuses the tensor `name` if it has other dimensions.
    pub(crate) fn check_dims(&self, name: &str, dims: &[u32]) -> Result<(), ModelError> {
        let wanted: Vec<u64> = dims.iter().map(|&d| d.into()).collect();
        match self.dims(name) {
            Some(found) if found != wanted => {
                let reason = format!("has dimensions {found:?}, the model asks for {wanted:?}");
                Err(ModelError::Tensor { name: name.to_owned(), reason })
            }
            _ => Ok(()),
        }
    }

    /// The values of a vector, if there is one.
    pub(crate) fn vector(&self, name: &str, n: u32) -> Result<Option<Vec<f32>>, ModelError> {
        if self.has(name) { self.get(name, &[n])?.values(name).map(Some) } else { Ok(None) }
    }
}

impl Tensor {
    /// All values, decoded.
    pub(crate) fn values(&self, name: &str) -> Result<Vec<f32>, ModelError> {
        let quant = |source| ModelError::Quant { name: name.to_owned(), source };
        let row = usize::try_from(self.dims[0]).expect("its bytes are in memory");
        let row_bytes = self.format.row_bytes(row).map_err(quant)?;
        let mut values = vec![0.0; self.bytes.len() / row_bytes.max(1) * row];
        sparsed_quant::decode(self.format, &self.bytes, &mut values).map_err(quant)?;
        Ok(values)
    }

    /// The same values in single precision.
    pub(crate) fn single(self, name: &str) -> Result<Self, ModelError> {
        if self.format == Format::F32 {
            return Ok(self);
        }
        let bytes: Vec<u8> = self.values(name)?.iter().flat_map(|value| value.to_le_bytes()).collect();
        Ok(Self { format: Format::F32, bytes: bytes.into(), ..self })
    }
}

fn io(path: &Path, source: std::io::Error) -> ModelError {
    ModelError::Io { path: path.to_owned(), source }
}

/// Opens and maps a whole file.
fn open_mapped(path: &Path) -> Result<(File, Bytes), ModelError> {
    let handle = File::open(path).map_err(|source| io(path, source))?;
    if !handle.metadata().map_err(|source| io(path, source))?.is_file() {
        return Err(io(path, std::io::Error::new(std::io::ErrorKind::InvalidInput, "not a regular file")));
    }
    let file = map(&handle).map_err(|source| io(path, source))?;
    Ok((handle, file))
}

/// Opens and maps a GGUF file and reads its header.
pub(crate) fn open_gguf(path: &Path) -> Result<(File, Bytes, Gguf), ModelError> {
    let (handle, file) = open_mapped(path)?;
    let gguf = Gguf::parse(&file).map_err(|source| ModelError::File { path: path.to_owned(), source })?;
    Ok((handle, file, gguf))
}

#[allow(unsafe_code, reason = "a mapping is the only way to weights larger than memory")]
fn map(file: &File) -> std::io::Result<Bytes> {
    // SAFETY: the mapping is read-only and private. Another process that truncates the file under it raises SIGBUS;
    // model files belong to the operator and are replaced by rename, never rewritten.
    let map = unsafe { memmap2::Mmap::map(file) }?;
    Ok(Bytes::from_owner(map))
}
