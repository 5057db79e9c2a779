//! `sparsectl eval`: what does a model lose by selecting? Measured on text and on recall prompts.

mod mass;
mod perplexity;
mod recall;
mod report;
mod texts;

use super::local::{LocalDevice, LocalOutputs, Needs};
use anyhow::ensure;
use indicatif::{ProgressBar, ProgressStyle};
use perplexity::Perplexity;
use recall::Recall;
use serde_json::json;
use sparsed_backend::Backend;
use sparsed_engine::DeviceModel;
use sparsed_engine::eval::{RECALL_NOTES_MAX, RecallError};
use sparsed_model::Model;
use std::path::PathBuf;
use texts::Texts;

/// Most tokens of a sequence.
const CONTEXT_MAX: u32 = 1 << 22;
/// Largest k.
const TOP_K_MAX: u32 = 1 << 24;
/// Queries of a window whose attention is looked at, without the option.
const MASS_QUERIES: u32 = 64;
/// Most of them.
const MASS_QUERIES_MAX: u32 = 1 << 16;
/// Most tokens that are scored for one perplexity.
const TOKENS_MAX: u32 = 1 << 24;

/// Measure a model's quality: dense against sparse.
///
/// Perplexity: the text is cut into windows of each --context, from as many files as there are, and each window is read
/// from its first token as it would be served: every query selects k of the tokens before it, in every layer. "late" is
/// the second half of each window, where a selection leaves most out. RATIO is the perplexity over dense attention's;
/// +- is the standard error over windows, of a ratio from each window's own difference.
///
/// Recall: notes "The access code for the NAME is 12345." lie in the first 70 % of other text, and one is asked for
/// at the end; each note is asked for by a prompt of its own. The text they share is read once and each question put
/// right behind it, which gives the same figures as reading each prompt alone (--recall-alone). The answer is
/// teacher-forced: a digit counts as right if it is the likeliest token after the right ones before it. +- is the
/// standard error over texts. Perplexity hardly shows that a selection has lost this; look at both. The control that
/// must fail is "window": the model is given only the first 4 and the last tokens, question included, k in all, and reads
/// them densely. (A real sliding window could carry a little more from layer to layer. This one cannot.)
/// Rows are written to standard error as they come.
///
/// Attention mass: how much of the softmax weight of full attention, over all tokens up to the query's own, lies on
/// the k selected ones, in the run that selects. It is looked at for --mass-queries queries of each window's second
/// half, in every layer; a token's weight is the mean over the heads, which share the selection. Beside it what other
/// choices of k tokens keep of the same attention: the "oracle" those of greatest weight, the "window" the first 4 and
/// the last, "random" ones on average. SHARE is selection over oracle; the worst layer is the one where it is least.
/// A high share does not prove recall: a fact far back is one token of many.
///
/// A k of the context's length or more reads everything, as dense does, and is left out; so is a window that is
/// shorter than the recall question.
#[derive(Debug, clap::Args)]
#[command(verbatim_doc_comment)]
pub(super) struct Eval {
    /// The model: a GGUF file (the first part of a split one) or a Hugging Face folder.
    model: PathBuf,
    /// Text files, and folders of *.txt, *.md, *.rst and *.pod files.
    #[arg(long, num_args = 1.., required_unless_present = "ids", conflicts_with = "ids")]
    text: Vec<PathBuf>,
    /// Token ids instead of text: a JSON list for each document, or one list. No recall.
    #[arg(long)]
    ids: Option<PathBuf>,
    /// Tokens selected, a row for each. Default: 64, 128, 256, 512, 1024; nothing for a model without an indexer.
    #[arg(long, value_delimiter = ',', value_parser = clap::value_parser!(u32).range(1..=i64::from(TOP_K_MAX)))]
    top_k: Option<Vec<u32>>,
    /// Tokens of a window, a table for each; 0: no perplexity.
    #[arg(long, value_delimiter = ',', default_value = "2048")]
    context: Vec<u32>,
    /// Tokens that are read for each row of a table: as many whole windows as it takes, if the text has so many.
    #[arg(long, default_value_t = 20_480, value_parser = clap::value_parser!(u32).range(1..=i64::from(TOKENS_MAX)))]
    tokens: u32,
    /// Queries of each window whose attention mass is compared, at most half the window; 0: none. Takes memory for a
    /// copy of the window's KV cache. Default: 64, none for a model without an indexer.
    #[arg(long, value_parser = clap::value_parser!(u32).range(0..=i64::from(MASS_QUERIES_MAX)))]
    mass_queries: Option<u32>,
    /// Tokens of a recall prompt, a table for each; 0: no recall. Default: 1024, 2048, 4096 and 8192, as far as
    /// the model was trained and the text suffices.
    #[arg(long, value_delimiter = ',')]
    recall_lengths: Option<Vec<u32>>,
    /// Recall prompts of each length.
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    recall_prompts: u32,
    /// Notes in a text, and so prompts that share it.
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=RECALL_NOTES_MAX as i64))]
    recall_notes: u32,
    /// Read every recall prompt from its first token.
    #[arg(long)]
    recall_alone: bool,
    /// Same seed, same recall prompts, same queries for the attention mass.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Tokens of one step.
    #[arg(long, default_value_t = 128, value_parser = clap::value_parser!(u32).range(1..=8192))]
    chunk: u32,
    #[command(flatten)]
    device: LocalDevice,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// What attention reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Attention {
    /// Everything.
    Dense,
    /// k selected tokens.
    Sparse(u32),
    /// The first and the last tokens, this many, densely.
    Window(u32),
}

impl std::fmt::Display for Attention {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Dense => f.write_str("dense"),
            Self::Sparse(k) => write!(f, "k = {k}"),
            Self::Window(size) => write!(f, "window {size}"),
        }
    }
}

/// A model with the device it is put on, once for each kind of attention.
struct Bench<'a> {
    model: &'a Model,
    backend: &'a Backend,
    eval: &'a Eval,
    progress: ProgressBar,
}

impl Bench<'_> {
    /// The model on the device, for sequences of up to `context` tokens.
    /// With `queries`, attention's are given out where there are selections to compare.
    fn load(&self, attention: Attention, context: u32, queries: bool) -> anyhow::Result<DeviceModel> {
        let top_k = match attention {
            Attention::Dense | Attention::Window(_) => Some(0),
            Attention::Sparse(k) => Some(k),
        };
        let chunk = self.eval.chunk.min(context);
        let outputs = match attention {
            Attention::Sparse(_) if queries => LocalOutputs::EverythingWithQueries,
            _ => LocalOutputs::EveryRow,
        };
        let needs = Needs { context, step_tokens: chunk, sequences: 1, outputs };
        self.eval.device.load(self.model, self.backend, top_k, needs)
    }

    fn chunk(&self) -> usize {
        self.eval.chunk as usize
    }

    /// Says a result before the table is whole, so that a run that is cut leaves what it has.
    #[expect(clippy::print_stderr, reason = "a command-line tool speaks on standard error")]
    fn say(&self, line: &str) {
        self.progress.suspend(|| eprintln!("{line}"));
    }

    /// Says how far it is: in the bar, or as a line where no bar is drawn.
    fn step(&self, line: &str) {
        if self.progress.is_hidden() { self.say(line) } else { self.progress.set_message(line.to_owned()) }
    }
}

impl Eval {
    pub(super) fn run(self: Box<Self>) -> anyhow::Result<()> {
        let contexts = checked(&self.context, "--context")?;
        let (model, backend) = self.device.open(&self.model)?;
        let lengths = self.recall_lengths(&model)?;
        let top_k = self.top_k(&model)?;
        ensure!(!contexts.is_empty() || !lengths.is_empty(), "nothing to measure: --context 0 and --recall-lengths 0");
        let texts = match &self.ids {
            Some(ids) => Texts::of_ids(ids, model.spec().vocab_size)?,
            None => Texts::read(&self.text, &model)?,
        };
        let perplexities: Vec<Perplexity> = contexts
            .iter()
            .map(|&context| Perplexity::plan(&texts, context, self.tokens, &top_k))
            .collect::<Result<_, _>>()?;
        let asked = self.mass_queries.unwrap_or(0) > 0;
        let possible = perplexities.iter().any(Perplexity::selects);
        ensure!(!asked || possible, "--mass-queries: no window of --context is read with fewer tokens than it has");
        let (recalls, mut notes) = self.plan_recalls(&lengths, &texts, &model, &top_k)?;
        notes.extend(self.dropped(&contexts, &lengths, model.spec().context_length));
        ensure!(!perplexities.is_empty() || !recalls.is_empty(), "nothing to measure: {}", notes.join("; "));
        let progress = ProgressBar::new(
            perplexities.iter().map(Perplexity::n_tokens).chain(recalls.iter().map(|one| one.n_tokens(&self))).sum(),
        );
        progress.set_style(ProgressStyle::with_template("{msg} {wide_bar} {human_pos}/{human_len} tokens {eta}")?);
        let bench = Bench { model: &model, backend: &backend, eval: &self, progress };
        let perplexities = perplexities.iter().map(|one| one.measure(&bench)).collect::<Result<Vec<_>, _>>()?;
        let recalls = recalls.iter().map(|one| one.measure(&bench)).collect::<Result<Vec<_>, _>>()?;
        bench.progress.finish_and_clear();
        let result = json!({
            "model": model.name(),
            "file_bytes": model.file_bytes(),
            "activations": self.device.activations(),
            "kv_dtype": self.device.kv,
            "index_dtype": self.device.index,
            "context_length": model.spec().context_length,
            "top_k": model.spec().indexer.as_ref().map(|indexer| indexer.top_k),
            "seed": self.seed,
            "texts": texts.json(),
            "perplexity": perplexities,
            "recall": recalls,
            "notes": notes,
        });
        if self.json { super::print_json(&result) } else { super::print(&report::table(&result)) }
    }

    /// The prompts of each length, and what is left out: a length that was not asked for and that the text does
    /// not fill.
    fn plan_recalls(
        &self,
        lengths: &[u32],
        texts: &Texts,
        model: &Model,
        top_k: &[u32],
    ) -> anyhow::Result<(Vec<Recall>, Vec<String>)> {
        let (mut recalls, mut notes) = (Vec::new(), Vec::new());
        for &length in lengths {
            match Recall::plan(self, texts, model, length, top_k) {
                Err(error) if self.recall_lengths.is_none() && is_too_little_text(&error) => {
                    notes.push(format!("recall at {length} tokens is left out: {error}"));
                }
                planned => recalls.push(planned?),
            }
        }
        Ok((recalls, notes))
    }

    /// What was asked for and is not measured, or measured past what the model was trained for.
    fn dropped(&self, contexts: &[u32], lengths: &[u32], trained: u32) -> Vec<String> {
        let mut notes = Vec::new();
        for &length in contexts.iter().chain(lengths) {
            for k in self.top_k.iter().flatten().filter(|&&k| k >= length) {
                notes.push(format!("--top-k {k} at {length} tokens reads everything, as dense does: left out"));
            }
            if length > trained {
                notes.push(format!("{length} tokens are beyond the {trained} that the model was trained for"));
            }
        }
        notes
    }

    fn mass_queries(&self) -> u32 {
        self.mass_queries.unwrap_or(MASS_QUERIES)
    }

    fn top_k(&self, model: &Model) -> anyhow::Result<Vec<u32>> {
        let has_indexer = model.spec().indexer.is_some();
        ensure!(has_indexer || self.top_k.is_none(), "--top-k: the model has no indexer, it reads everything");
        let default = || if has_indexer { vec![64, 128, 256, 512, 1024] } else { Vec::new() };
        let mut top_k = self.top_k.clone().unwrap_or_else(default);
        top_k.sort_unstable();
        top_k.dedup();
        Ok(top_k)
    }

    fn recall_lengths(&self, model: &Model) -> anyhow::Result<Vec<u32>> {
        if self.ids.is_some() || model.tokenizer().is_none() {
            let asked = self.recall_lengths.iter().flatten().any(|&length| length > 0);
            ensure!(!asked, "--recall-lengths: prompts are made of text, which takes --text and a tokenizer");
            return Ok(Vec::new());
        }
        let trained = model.spec().context_length;
        let default = || [1024, 2048, 4096, 8192].into_iter().filter(|&length| length <= trained).collect();
        checked(&self.recall_lengths.clone().unwrap_or_else(default), "--recall-lengths")
    }
}

fn is_too_little_text(error: &anyhow::Error) -> bool {
    matches!(error.downcast_ref(), Some(RecallError::TooLittleText { .. }))
}

/// The lengths asked for; 0 stands for none.
fn checked(lengths: &[u32], what: &str) -> anyhow::Result<Vec<u32>> {
    let lengths: Vec<u32> = lengths.iter().copied().filter(|&length| length > 0).collect();
    let bad = lengths.iter().find(|&&length| !(2..=CONTEXT_MAX).contains(&length));
    ensure!(bad.is_none(), "{what}: lengths are 2 to {CONTEXT_MAX}, or 0 for none");
    Ok(lengths)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_length_of_0_stands_for_none_and_1_is_refused() {
        assert_eq!(checked(&[0], "--context").unwrap(), Vec::<u32>::new());
        assert_eq!(checked(&[2, 8192], "--context").unwrap(), [2, 8192]);
        assert!(checked(&[1], "--context").unwrap_err().to_string().starts_with("--context"));
    }
}
