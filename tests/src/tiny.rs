//! What must the tiny models answer? Hugging Face's outputs in `tests/golden/tiny`.

use crate::{npy, root};
use sparsed_quant::gguf::{Gguf, Metadata, Writer};
use sparsed_quant::{Format, decode, encode};
use std::path::{Path, PathBuf};

/// Largest difference of a logit.
pub const TOLERANCE: f32 = 1e-4;
/// Below this gap of scores another selection would be no mistake.
const MARGIN: f32 = 1e-5;

/// A tiny model and what Hugging Face transformers answers.
#[derive(Debug)]
pub struct Tiny {
    folder: PathBuf,
    /// The prompt.
    pub ids: Vec<u32>,
    /// `[L, vocabulary]` of the Hugging Face folder.
    pub logits: Vec<f32>,
    /// The same of the GGUF file, whose norms inside attention have the file's eps (tests/golden/README.md).
    pub logits_of_gguf: Vec<f32>,
    /// `[index layers, L, k]`, ascending, -1 padded; empty without an indexer.
    pub selections: Vec<i32>,
    /// Tokens selected.
    pub k: usize,
    /// The gap between the last selected and the first rejected score, `[index layers, L]`.
    pub margins: Vec<f32>,
}

impl Tiny {
    /// Reads `tests/golden/tiny/{name}`.
    ///
    /// # Panics
    /// When it is not there, or has a selection that is nearly tied.
    pub fn open(name: &str) -> Self {
        let folder = root().join("tests/golden/tiny").join(name);
        let file = |name: &str| folder.join(name);
        let logits: Vec<f32> = npy(&file("logits.npy")).1;
        let (mut selections, mut margins, mut k) = (Vec::new(), Vec::new(), 0);
        if file("topk.npy").exists() {
            let shape;
            (shape, selections) = npy(&file("topk.npy"));
            k = usize::try_from(shape[2]).unwrap_or(0);
            margins = npy(&file("margins.npy")).1;
        }
        assert!(margins.iter().all(|&margin| margin > MARGIN), "{name}: a selection is nearly tied");
        let own_eps = file("logits_file_eps.npy");
        let logits_of_gguf = if own_eps.exists() { npy(&own_eps).1 } else { logits.clone() };
        Self { ids: npy(&file("ids.npy")).1, logits, logits_of_gguf, selections, k, margins, folder }
    }

    /// The GGUF file.
    pub fn gguf(&self) -> PathBuf {
        self.folder.join("model.gguf")
    }

    /// The Hugging Face folder.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// In how many of the rows `[index layers, L]` the selection is another.
    ///
    /// # Panics
    /// When there are not as many.
    pub fn other_selections(&self, found: &[i32]) -> usize {
        assert_eq!(found.len(), self.selections.len(), "as many selected tokens");
        let k = self.k.max(1);
        found.chunks_exact(k).zip(self.selections.chunks_exact(k)).filter(|(a, b)| a != b).count()
    }
}

/// A tensor of a GGUF file that a test changes.
#[derive(Clone, Debug)]
pub struct Tensor {
    /// Its name.
    pub name: String,
    /// The fastest dimension first.
    pub dims: Vec<u64>,
    /// How it is stored.
    pub format: Format,
    /// Decoded.
    pub values: Vec<f32>,
}

/// Writes the GGUF file `from` again as `to`, with its tensors changed.
///
/// # Panics
/// When it cannot be read or written, or a tensor's parts do not belong together.
pub fn rewrite(from: &Path, to: &Path, change: impl FnOnce(Vec<Tensor>) -> Vec<Tensor>) {
    rewrite_with(from, to, |_, tensors| change(tensors));
}

/// As [`rewrite`], with its metadata too.
///
/// # Panics
/// When it cannot be read or written, or a tensor's parts do not belong together.
pub fn rewrite_with(from: &Path, to: &Path, change: impl FnOnce(&mut Metadata, Vec<Tensor>) -> Vec<Tensor>) {
    let checked = || -> Result<(), Box<dyn std::error::Error>> {
        let file = std::fs::read(from)?;
        let gguf = Gguf::parse(&file)?;
        let mut tensors = Vec::new();
        for info in gguf.tensors() {
            let mut values = vec![0.0; usize::try_from(info.values())?];
            decode(info.format, &file[info.range.clone()], &mut values)?;
            tensors.push(Tensor { name: info.name.clone(), dims: info.dims.clone(), format: info.format, values });
        }
        let mut metadata = gguf.metadata().clone();
        let tensors = change(&mut metadata, tensors);
        let mut writer = Writer::new(metadata);
        let mut encoded = Vec::new();
        for tensor in tensors {
            let mut bytes = vec![0; writer.add(&tensor.name, &tensor.dims, tensor.format)?];
            encode(tensor.format, &tensor.values, &mut bytes)?;
            encoded.push(bytes);
        }
        let mut out = writer.begin(std::fs::File::create(to)?)?;
        encoded.iter().try_for_each(|bytes| out.tensor(bytes))?;
        out.finish()?;
        Ok(())
    };
    checked().unwrap_or_else(|error| panic!("{}: {error}", from.display()));
}
