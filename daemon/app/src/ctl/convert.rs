//! `sparsectl convert`: a Llama GGUF and a trained indexer become a DSA GGUF.

use indicatif::{ProgressBar, ProgressStyle};
use sparsed_model::convert::{ConvertOptions, convert};
use sparsed_quant::Format;
use std::path::PathBuf;

/// Convert a Llama-family GGUF to a DSA GGUF; no number of the base changes.
#[derive(Debug, clap::Args)]
pub(super) struct Convert {
    /// The base model.
    base: PathBuf,
    /// Trained indexer, safetensors with GGUF tensor names.
    #[arg(long)]
    indexer: PathBuf,
    /// How the indexer's matrices are stored.
    #[arg(long, value_enum, default_value = "q8_0")]
    indexer_type: IndexerType,
    /// Tokens that attention selects.
    #[arg(long, default_value_t = 512, value_parser = clap::value_parser!(u32).range(1..=1 << 24))]
    top_k: u32,
    /// The new file.
    #[arg(short, long)]
    output: PathBuf,
}

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum IndexerType {
    F16,
    #[value(name = "q8_0")]
    Q8,
}

impl Convert {
    pub(super) fn run(self) -> anyhow::Result<()> {
        let format = match self.indexer_type {
            IndexerType::F16 => Format::F16,
            IndexerType::Q8 => Format::Q8_0,
        };
        let options = ConvertOptions { indexer_format: format, top_k: self.top_k };
        let bar = ProgressBar::new(0);
        bar.set_style(ProgressStyle::with_template("{wide_bar} {bytes}/{total_bytes}")?);
        let mut progress = |done, total| {
            bar.set_length(total);
            bar.set_position(done);
        };
        convert(&self.base, &self.indexer, &options, &self.output, &mut progress)?;
        bar.finish_and_clear();
        Ok(())
    }
}
