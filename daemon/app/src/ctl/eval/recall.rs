//! Is what was read found again? Recall prompts under each kind of attention, and under windows, which must fail.

use super::texts::Texts;
use super::{Attention, Bench};
use anyhow::Context;
use serde_json::{Value, json};
use sparsed_engine::eval::{
    Answered, RecallPrompt, RecallShape, RecallSummary, SINKS, Vocabulary, recall_prompts, windowed,
};
use sparsed_engine::{DeviceModel, Rows, SoleSequence};
use sparsed_model::{Model, Tokenizer};

/// Prompts of one length, to be answered under several kinds of attention.
#[derive(Debug)]
pub(super) struct Recall {
    length: u32,
    prompts: Vec<RecallPrompt>,
    rows: Vec<Attention>,
}

/// The model's tokenizer without a begin token.
struct Plain<'a> {
    tokenizer: &'a Tokenizer,
    prefix: usize,
}

impl Vocabulary for Plain<'_> {
    fn encode(&self, text: &str) -> Result<Vec<u32>, String> {
        let mut tokens = self.tokenizer.encode(text).map_err(|error| error.to_string())?;
        Ok(tokens.split_off(self.prefix))
    }

    fn digits(&self, token: u32) -> u32 {
        let digits = self.tokenizer.token_bytes(token).iter().filter(|byte| byte.is_ascii_digit()).count();
        u32::try_from(digits).expect("a token is short")
    }
}

impl Recall {
    /// Makes the prompts.
    ///
    /// # Errors
    /// Too little text, or prompts too short to hold the notes.
    pub(super) fn plan(
        texts: &Texts,
        model: &Model,
        length: u32,
        count: u32,
        seed: u64,
        top_k: &[u32],
    ) -> anyhow::Result<Self> {
        let tokenizer = model.tokenizer().context("recall takes a tokenizer")?;
        let shape = RecallShape { length: length as usize, count: count as usize, seed, prefix: texts.prefix.clone() };
        let vocabulary = Plain { tokenizer, prefix: texts.prefix.len() };
        let prompts = recall_prompts(&shape, &texts.lines, &vocabulary)?;
        let shorter = || top_k.iter().copied().filter(|&k| k < length);
        let rows = std::iter::once(Attention::Dense).chain(shorter().map(Attention::Sparse));
        let rows = rows.chain(shorter().map(Attention::Window)).collect();
        Ok(Self { length, prompts, rows })
    }

    /// Tokens that go through the model.
    pub(super) fn n_tokens(&self) -> u64 {
        let tokens = |row: &Attention| {
            let prompts = self.prompts.iter();
            prompts.map(|prompt| seen(prompt, *row).len() as u64 - 1).sum::<u64>()
        };
        self.rows.iter().map(tokens).sum()
    }

    /// Answers the prompts under each kind of attention.
    ///
    /// # Errors
    /// The device's.
    pub(super) fn measure(&self, bench: &Bench<'_>) -> anyhow::Result<Value> {
        let rows = self.rows.iter().map(|&row| self.row(bench, row)).collect::<Result<Vec<_>, _>>()?;
        Ok(json!({ "length": self.length, "prompts": self.prompts.len(), "rows": rows }))
    }

    fn row(&self, bench: &Bench<'_>, attention: Attention) -> anyhow::Result<Value> {
        let mut device = bench.load(attention, self.length)?;
        let answers = self.prompts.iter().map(|prompt| answer(bench, &mut device, prompt, attention));
        let answers = answers.collect::<anyhow::Result<Vec<_>>>()?;
        let summary = RecallSummary::new(&answers).context("no recall prompts")?;
        let (kind, size) = match attention {
            Attention::Dense => ("dense", None),
            Attention::Sparse(k) => ("sparse", Some(k)),
            Attention::Window(size) => ("window", Some(size)),
        };
        Ok(json!({
            "attention": kind,
            "size": size,
            "exact": summary.exact,
            "digit_accuracy": summary.digit_accuracy,
            "log_probability": summary.log_probability,
            "log_probability_error": summary.standard_error,
        }))
    }
}

/// The prompt's tokens that this kind of attention gets to see, the answer's last token at the end.
fn seen(prompt: &RecallPrompt, attention: Attention) -> Vec<u32> {
    match attention {
        Attention::Dense | Attention::Sparse(_) => prompt.tokens.clone(),
        // Whole prompts in, so that the answer's first tokens do not push out what its last ones still see.
        Attention::Window(size) => windowed(&prompt.tokens, SINKS, size as usize),
    }
}

/// Reads a prompt from its first token and judges the rows before each token of its answer.
fn answer(
    bench: &Bench<'_>,
    device: &mut DeviceModel,
    prompt: &RecallPrompt,
    attention: Attention,
) -> anyhow::Result<Answered> {
    let seen = seen(prompt, attention);
    let (question, rest) = seen[..seen.len() - 1].split_at(seen.len().saturating_sub(prompt.answer + 1));
    let mut sequence = SoleSequence::new(device);
    for chunk in question.chunks(bench.chunk()) {
        sequence.step(device, chunk, Rows::None)?;
        bench.progress.inc(chunk.len() as u64);
    }
    let mut logits = Vec::new();
    for chunk in rest.chunks(bench.chunk()) {
        logits.extend(sequence.step(device, chunk, Rows::All)?.logits);
        bench.progress.inc(chunk.len() as u64);
    }
    Ok(prompt.judge(&logits)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_window_sees_the_sinks_and_the_question_but_no_note_far_back() {
        let prompt = RecallPrompt { tokens: (0..100).collect(), answer: 3, digits: vec![0, 1, 1] };
        let tokens = seen(&prompt, Attention::Window(16));
        assert_eq!(tokens, [&[0, 1, 2, 3][..], &(87..100).collect::<Vec<u32>>()].concat());
        assert_eq!(seen(&prompt, Attention::Sparse(16)), prompt.tokens);
    }
}
