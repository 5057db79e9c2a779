//! `sparsectl quantize`: a model becomes a smaller GGUF file.

use clap::builder::PossibleValuesParser;
use indicatif::{HumanBytes, ProgressBar, ProgressStyle};
use sparsed_model::quantize::{QuantizeOptions, QuantizeReport, Recipe, quantize};
use std::path::PathBuf;

/// Quantise a model into one GGUF file.
///
/// The model is a GGUF file, the first part of a split one, or a Hugging Face folder (safetensors in F32, F16, BF16 or
/// FP8). A folder gets llama.cpp's keys and tensor names, its tokenizer and chat template included; one that has
/// something that these keys do not say is refused, since the file would compute something else.
///
/// The type is what most matrices become. Stored with more bits than that, or as they are:
///
///   - vectors, norms, biases, the router (ffn_gate_inp, exp_probs_b) and the indexer's head weights (indexer.proj)
///     stay as they are, but BF16, and all of a folder, becomes F32 without loss
///   - the indexer's matrices: at least Q8_0, since what it selects decides what attention reads
///   - the output matrix, and an embedding that serves as one: at least Q6_K
///   - Q4_K_M and Q5_K_M: attn_v and ffn_down are Q6_K in the first and last eighth of the layers and every third
///     between; attn_kv_a likewise, and Q5_K in the other layers
///   - rows that are not a multiple of 256 take formats with blocks of 32: Q5_0 for Q4_K, Q5_1 for Q5_K, Q8_0 for Q6_K
///
/// Start from F16, BF16, F32 or FP8: errors of a file that was quantised before add up. Memory is 16 MiB a thread and
/// what the headers and the tokenizer take, whatever the model's size. The output appears whole or not at all, in place
/// of a file that was there.
#[derive(Debug, clap::Args)]
#[command(verbatim_doc_comment)]
pub(super) struct Quantize {
    /// The model: a GGUF file (the first part of a split one) or a Hugging Face folder.
    input: PathBuf,
    /// The new file.
    output: PathBuf,
    /// What most matrices become; from the largest to the smallest.
    #[arg(long = "type", value_name = "TYPE", ignore_case = true,
        value_parser = PossibleValuesParser::new(Recipe::names()))]
    recipe: String,
    /// Leave tensors of this name as they are; * stands for any run of characters. May be repeated.
    #[arg(long, value_name = "PATTERN")]
    keep: Vec<String>,
    /// Threads; 0: one for each processor.
    #[arg(short, long, default_value_t = 0)]
    threads: u8,
}

impl Quantize {
    pub(super) fn run(self) -> anyhow::Result<()> {
        let recipe = Recipe::from_name(&self.recipe).expect("clap lets only names of recipes pass");
        let options = QuantizeOptions { recipe, keep: self.keep, n_threads: self.threads.into() };
        let bar = ProgressBar::new(0);
        bar.set_style(ProgressStyle::with_template("{wide_bar} {bytes}/{total_bytes} {eta}")?);
        let mut progress = |done, total| {
            bar.set_length(total);
            bar.set_position(done);
        };
        let report = quantize(&self.input, &self.output, &options, &mut progress)?;
        bar.finish_and_clear();
        super::print(&text(&report))
    }
}

fn text(report: &QuantizeReport) -> String {
    let mut lines =
        vec![format!("{:<8} {:>8} {:>8} {:>12} {:>15}", "format", "tensors", "copied", "size", "relative error")];
    for (name, format) in &report.formats {
        let error = format.relative_error().map_or_else(|| "-".to_owned(), |error| format!("{error:.5}"));
        let size = HumanBytes(format.bytes).to_string();
        lines.push(format!("{name:<8} {:>8} {:>8} {size:>12} {error:>15}", format.tensors, format.copied));
    }
    lines.push(format!("{} -> {}", HumanBytes(report.bytes_before), HumanBytes(report.bytes_after)));
    lines.extend(report.notes.iter().map(|note| format!("note: {note}")));
    lines.join("\n")
}
