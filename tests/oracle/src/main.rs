//! `sparsed-oracle`: the slow forward on a file, with outputs as `sparsectl logits` writes them.

use anyhow::{Context, ensure};
use clap::Parser;
use npyz::WriterBuilder;
use sparsed_oracle::{Mistake, Model, Options, Output, Real, forward};
use std::fs::File;
use std::io::BufWriter;
use std::path::{Path, PathBuf};

/// Compute logits slowly and plainly.
#[derive(Debug, Parser)]
struct Arguments {
    /// GGUF file.
    #[arg(long)]
    model: PathBuf,
    /// JSON list of token ids.
    #[arg(long)]
    ids: PathBuf,
    /// Logits as .npy, f32 [L, vocab].
    #[arg(long)]
    out: PathBuf,
    /// Selections as .npy, i32 [index layers, L, k], ascending, -1 padded.
    #[arg(long)]
    topk_out: Option<PathBuf>,
    /// Gap between the last selected and the first rejected score as .npy, f64 [index layers, L].
    #[arg(long)]
    margins_out: Option<PathBuf>,
    /// Tokens selected instead of the file's number; 0 is dense.
    #[arg(long)]
    top_k: Option<usize>,
    /// Compute in f64 instead of f32.
    #[arg(long)]
    double: bool,
    /// Logits of the last so many rows only.
    #[arg(long)]
    last_rows: Option<usize>,
    /// Do one thing wrong: indexer-rope-style, no-relu or no-k-norm-bias.
    #[arg(long, value_parser = mistake)]
    mistake: Option<Mistake>,
}

fn mistake(name: &str) -> Result<Mistake, String> {
    match name {
        "indexer-rope-style" => Ok(Mistake::IndexerRopeStyle),
        "no-relu" => Ok(Mistake::NoRelu),
        "no-k-norm-bias" => Ok(Mistake::NoKNormBias),
        other => Err(format!("'{other}' is none of indexer-rope-style, no-relu, no-k-norm-bias")),
    }
}

fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    if arguments.double { run::<f64>(&arguments) } else { run::<f32>(&arguments) }
}

fn run<T: Real>(arguments: &Arguments) -> anyhow::Result<()> {
    let model = Model::open(&arguments.model)?;
    let text = std::fs::read_to_string(&arguments.ids).with_context(|| arguments.ids.display().to_string())?;
    let ids: Vec<u32> = serde_json::from_str(&text).with_context(|| arguments.ids.display().to_string())?;
    let (top_k, last_rows, mistake) = (arguments.top_k, arguments.last_rows, arguments.mistake);
    let options = Options { top_k, last_rows, mistake, attention: false };
    let Output { logits, selections, .. } = forward::<T>(&model, &ids, &options)?;
    let shape = [logits.len() as u64, logits.width() as u64];
    #[expect(clippy::cast_possible_truncation, reason = "the output is single precision")]
    write(&arguments.out, &shape, logits.values().iter().map(|&v| Into::<f64>::into(v) as f32))?;
    let layers = [selections.len() as u64, ids.len() as u64];
    ensure!(arguments.topk_out.is_none() || !selections.is_empty(), "--topk-out: nothing is selected");
    if let (Some(path), Some(indexer)) = (&arguments.topk_out, &model.config.indexer) {
        let k = arguments.top_k.unwrap_or(indexer.top_k);
        let rows = selections.iter().flat_map(|selection| &selection.positions);
        let padded = rows.flat_map(|row| (0..k).map(|i| row.get(i).map_or(-1, |&s| s as i32)));
        write(path, &[layers[0], layers[1], k as u64], padded)?;
    }
    if let Some(path) = &arguments.margins_out {
        write(path, &layers, selections.iter().flat_map(|selection| selection.margins.iter().copied()))?;
    }
    Ok(())
}

/// A .npy file of this shape.
fn write<T: npyz::AutoSerialize>(path: &Path, shape: &[u64], values: impl Iterator<Item = T>) -> anyhow::Result<()> {
    let file = BufWriter::new(File::create(path).with_context(|| path.display().to_string())?);
    let mut npy = npyz::WriteOptions::new().default_dtype().shape(shape).writer(file).begin_nd()?;
    npy.extend(values)?;
    npy.finish().with_context(|| path.display().to_string())
}
