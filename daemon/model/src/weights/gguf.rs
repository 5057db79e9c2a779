//! Which tensors do GGUF files hold? One file, or all parts of a split one (llama.cpp's `split.*` keys).

use super::stored::{Coding, Stored};
use super::{Listed, Mapped, Tensor, open_gguf};
use crate::ModelError;
use sparsed_quant::gguf::{Gguf, Metadata, TENSORS_MAX, TensorInfo};
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Most parts of a split file.
const PARTS_MAX: u32 = 1 << 10;

/// A GGUF and its further parts.
#[derive(Clone, Debug)]
pub(super) struct GgufFiles {
    /// The first has the metadata.
    parts: Vec<Part>,
    /// Part of each tensor; empty when there is only one.
    index: HashMap<String, usize>,
}

#[derive(Clone, Debug)]
struct Part {
    gguf: Gguf,
    file: Mapped,
}

impl Part {
    fn open(path: &Path) -> Result<Self, ModelError> {
        let (file, bytes, gguf) = open_gguf(path)?;
        Ok(Self { gguf, file: Mapped { file: Arc::new(file), bytes } })
    }
}

impl GgufFiles {
    pub(super) fn open(path: &Path) -> Result<Self, ModelError> {
        let first = Part::open(path)?;
        let count = first.gguf.metadata().u32("split.count")?.unwrap_or(1);
        if count <= 1 {
            return Ok(Self { parts: vec![first], index: HashMap::new() });
        }
        let split = |reason: String| ModelError::Split { path: path.to_owned(), reason };
        if count > PARTS_MAX {
            return Err(split(format!("has {count} parts, the limit is {PARTS_MAX}")));
        }
        let total = first.gguf.metadata().u64("split.tensors.count")?;
        let mut files = Self { parts: Vec::with_capacity(count as usize), index: HashMap::new() };
        files.add(first, path, 0, count)?;
        for n in 1..count {
            let part = part_path(path, n, count).ok_or_else(|| {
                split(format!("is part 1 of {count}: its name must end in -00001-of-{count:05}.gguf"))
            })?;
            files.add(Part::open(&part)?, &part, n, count)?;
        }
        let found = files.index.len() as u64;
        match total {
            Some(total) if total != found => Err(split(format!("the parts have {found} tensors, {total} were split"))),
            _ => Ok(files),
        }
    }

    /// Takes part `n`, counted from 0.
    fn add(&mut self, part: Part, path: &Path, n: u32, count: u32) -> Result<(), ModelError> {
        let split = |reason: String| ModelError::Split { path: path.to_owned(), reason };
        let metadata = part.gguf.metadata();
        let (no, of) = (metadata.u32("split.no")?, metadata.u32("split.count")?);
        if (no, of) != (Some(n), Some(count)) {
            let said = |n: Option<u32>| n.map_or_else(|| "nothing".to_owned(), |n| n.to_string());
            let reason = format!("says split.no {} of split.count {}, wanted {n} of {count}", said(no), said(of));
            return Err(split(format!("{reason}: open a split file by its first part")));
        }
        for tensor in part.gguf.tensors() {
            if self.index.insert(tensor.name.clone(), self.parts.len()).is_some() {
                return Err(split(format!("tensor {} is in two parts", tensor.name)));
            }
        }
        if self.index.len() as u64 > TENSORS_MAX {
            return Err(split(format!("the parts have more than {TENSORS_MAX} tensors")));
        }
        self.parts.push(part);
        Ok(())
    }

    pub(super) fn mapped(&self) -> impl Iterator<Item = &Mapped> {
        self.parts.iter().map(|part| &part.file)
    }

    pub(super) fn file_bytes(&self) -> u64 {
        self.parts.iter().map(|part| part.file.bytes.len() as u64).sum()
    }

    pub(super) fn metadata(&self) -> &Metadata {
        self.parts[0].gguf.metadata()
    }

    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        self.parts.iter().flat_map(|part| part.gguf.tensors()).map(|tensor| tensor.name.as_str())
    }

    pub(super) fn listed(&self) -> Vec<Listed> {
        let listed = |tensor: &TensorInfo| Listed {
            format: tensor.format.name(),
            values: tensor.values(),
            bytes: tensor.range.len() as u64,
        };
        self.parts.iter().flat_map(|part| part.gguf.tensors()).map(listed).collect()
    }

    fn place(&self, name: &str) -> Option<(&Part, &TensorInfo)> {
        let at = if self.parts.len() == 1 { 0 } else { *self.index.get(name)? };
        let part = &self.parts[at];
        Some((part, part.gguf.tensor(name)?))
    }

    pub(super) fn dims(&self, name: &str) -> Option<Vec<u64>> {
        self.place(name).map(|(_, info)| info.dims.clone())
    }

    pub(super) fn stored(&self, name: &str) -> Option<Stored> {
        let (part, info) = self.place(name)?;
        Some(Stored {
            file: Arc::clone(&part.file.file),
            start: info.range.start as u64,
            dims: info.dims.clone(),
            coding: Coding::Plain(info.format),
        })
    }

    pub(super) fn find(&self, name: &str) -> Option<Tensor> {
        let (part, info) = self.place(name)?;
        Some(Tensor { format: info.format, dims: info.dims.clone(), bytes: part.file.bytes.slice(info.range.clone()) })
    }
}

/// The path of part `n` (from 0) beside the first; `None` when the first is not named as one.
fn part_path(first: &Path, n: u32, count: u32) -> Option<PathBuf> {
    let stem = first.file_name()?.to_str()?.strip_suffix(&format!("-00001-of-{count:05}.gguf"))?;
    Some(first.with_file_name(format!("{stem}-{:05}-of-{count:05}.gguf", n + 1)))
}
