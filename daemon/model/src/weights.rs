//! Where are a model's numbers? In the file, mapped; nothing is copied.

use crate::ModelError;
use bytes::Bytes;
use sparsed_quant::Format;
use sparsed_quant::gguf::Gguf;
use std::fs::File;
use std::path::{Path, PathBuf};

/// A mapped GGUF file.
#[derive(Clone, Debug)]
pub(crate) struct Weights {
    pub(crate) gguf: Gguf,
    file: Bytes,
    path: PathBuf,
}

/// A tensor where it lies.
#[derive(Clone, Debug)]
pub(crate) struct Tensor {
    pub(crate) format: Format,
    /// ggml's order, fastest first.
    pub(crate) dims: Vec<u64>,
    pub(crate) bytes: Bytes,
}

impl Weights {
    pub(crate) fn open(path: &Path) -> Result<Self, ModelError> {
        let (_, file, gguf) = open_gguf(path)?;
        Ok(Self { gguf, file, path: path.to_owned() })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn file_bytes(&self) -> u64 {
        self.file.len() as u64
    }

    /// The tensor `name`, if the file has it.
    pub(crate) fn find(&self, name: &str) -> Option<Tensor> {
        let info = self.gguf.tensor(name)?;
        Some(Tensor { format: info.format, dims: info.dims.clone(), bytes: self.file.slice(info.range.clone()) })
    }

    /// The tensor `name` with just these dimensions (fastest first).
    pub(crate) fn get(&self, name: &str, dims: &[u32]) -> Result<Tensor, ModelError> {
        let missing = || ModelError::Tensor { name: name.to_owned(), reason: "is missing".to_owned() };
        let tensor = self.find(name).ok_or_else(missing)?;
        let wanted: Vec<u64> = dims.iter().map(|&d| d.into()).collect();
        if tensor.dims != wanted {
            let reason = format!("has dimensions {:?}, the metadata asks for {wanted:?}", tensor.dims);
            return Err(ModelError::Tensor { name: name.to_owned(), reason });
        }
        Ok(tensor)
    }

    /// The values of a f32 vector, if the file has it.
    pub(crate) fn vector(&self, name: &str, n: u32) -> Result<Option<Vec<f32>>, ModelError> {
        if self.gguf.tensor(name).is_none() {
            return Ok(None);
        }
        let tensor = self.get(name, &[n])?;
        let mut values = vec![0.0; n as usize];
        let source = sparsed_quant::decode(tensor.format, &tensor.bytes, &mut values);
        source.map_err(|source| ModelError::Quant { name: name.to_owned(), source })?;
        Ok(Some(values))
    }
}

/// Opens and maps a GGUF file and reads its header.
pub(crate) fn open_gguf(path: &Path) -> Result<(File, Bytes, Gguf), ModelError> {
    let io = |source| ModelError::Io { path: path.to_owned(), source };
    let handle = File::open(path).map_err(io)?;
    if !handle.metadata().map_err(io)?.is_file() {
        return Err(io(std::io::Error::new(std::io::ErrorKind::InvalidInput, "not a regular file")));
    }
    let file = map(&handle).map_err(io)?;
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
