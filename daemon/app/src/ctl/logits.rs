//! `sparsectl logits`: what the model computes for given tokens, for comparison with other implementations.

use super::local::{Local, LocalOutputs, Needs};
use anyhow::{Context, ensure};
use npyz::WriterBuilder;
use sparsed_engine::{Lockstep, Rows};
use std::fs::File;
use std::io::BufWriter;
use std::path::{Path, PathBuf};

/// Most tokens of one run.
const TOKENS_MAX: usize = 1 << 22;

/// Write the logits of every position, and the tokens that attention selected.
#[derive(Debug, clap::Args)]
pub(super) struct Logits {
    #[command(flatten)]
    local: Local,
    /// JSON list of token ids.
    #[arg(long)]
    ids: PathBuf,
    /// Logits as .npy, f32 [L, vocab].
    #[arg(long)]
    out: PathBuf,
    /// Selections as .npy, i32 [index layers, L, k], ascending, -1 padded.
    #[arg(long)]
    topk_out: Option<PathBuf>,
    /// Tokens of one step.
    #[arg(long, default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..=8192))]
    chunk: u32,
}

impl Logits {
    pub(super) fn run(self) -> anyhow::Result<()> {
        ensure!(self.topk_out.as_ref() != Some(&self.out), "--out and --topk-out are the same file");
        let text = std::fs::read_to_string(&self.ids).with_context(|| self.ids.display().to_string())?;
        let ids: Vec<u32> =
            serde_json::from_str(&text).with_context(|| format!("{}: not a list of token ids", self.ids.display()))?;
        ensure!(!ids.is_empty() && ids.len() <= TOKENS_MAX, "{} tokens, 1 to {TOKENS_MAX} are allowed", ids.len());
        let (model, backend) = self.local.open()?;
        let vocab = model.spec().vocab_size;
        if let Some(bad) = ids.iter().find(|&&id| id >= vocab) {
            anyhow::bail!("token {bad} is past the vocabulary of {vocab}");
        }
        let length = u32::try_from(ids.len())?;
        let outputs = match self.topk_out {
            Some(_) => LocalOutputs::EverythingWithSelections,
            None => LocalOutputs::EveryRow,
        };
        let needs = Needs { context: length, step_tokens: self.chunk.min(length), sequences: 1, outputs };
        let mut device = self.local.load(&model, &backend, needs)?;
        let k = device.top_k();
        ensure!(self.topk_out.is_none() || k.is_some(), "--topk-out: the model reads all tokens, nothing is selected");
        let mut logits = npy(&self.out, &[u64::from(length), vocab.into()])?;
        let mut sequence = Lockstep::new(&device, 1);
        let mut selections: Vec<Vec<i32>> = Vec::new();
        for chunk in ids.chunks(self.chunk as usize) {
            let out = sequence.step(&mut device, chunk, Rows::All)?;
            logits.extend(out.logits)?;
            selections.resize(out.selections.len(), Vec::new());
            selections.iter_mut().zip(out.selections).for_each(|(all, new)| all.extend(new));
        }
        logits.finish().with_context(|| self.out.display().to_string())?;
        if let (Some(path), Some(k)) = (&self.topk_out, k) {
            let mut file = npy(path, &[selections.len() as u64, length.into(), k.into()])?;
            file.extend(selections.into_iter().flatten())?;
            file.finish().with_context(|| path.display().to_string())?;
        }
        Ok(())
    }
}

/// A .npy file of this shape, row-major, to be filled in order.
fn npy<T: npyz::AutoSerialize>(path: &Path, shape: &[u64]) -> anyhow::Result<npyz::NpyWriter<T, BufWriter<File>>> {
    let file = File::create(path).with_context(|| path.display().to_string())?;
    Ok(npyz::WriteOptions::new().default_dtype().shape(shape).writer(BufWriter::new(file)).begin_nd()?)
}
