//! Is what was read found again? Recall prompts under each kind of attention, and under windows, which must fail.

use super::texts::Texts;
use super::{Attention, Bench, Eval};
use anyhow::Context;
use serde_json::{Value, json};
use sparsed_engine::eval::{
    Answered, RecallContext, RecallShape, RecallSummary, SINKS, Vocabulary, recall_contexts, windowed,
};
use sparsed_engine::{DeviceModel, Lockstep, Rows};
use sparsed_model::{Model, Tokenizer};

/// Prompts of one length, to be answered under several kinds of attention.
#[derive(Debug)]
pub(super) struct Recall {
    length: u32,
    contexts: Vec<RecallContext>,
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
    /// Makes the prompts of `eval` that have `length` tokens.
    ///
    /// # Errors
    /// Too little text, or prompts too short to hold the notes.
    pub(super) fn plan(eval: &Eval, texts: &Texts, model: &Model, length: u32, top_k: &[u32]) -> anyhow::Result<Self> {
        let tokenizer = model.tokenizer().context("recall takes a tokenizer")?;
        let shape = RecallShape {
            length: length as usize,
            count: eval.recall_prompts as usize,
            notes: eval.recall_notes as usize,
            seed: eval.seed,
            prefix: texts.prefix.clone(),
        };
        let vocabulary = Plain { tokenizer, prefix: texts.prefix.len() };
        let contexts = recall_contexts(&shape, &texts.lines, &vocabulary)?;
        let shorter = || top_k.iter().copied().filter(|&k| k < length);
        let rows = std::iter::once(Attention::Dense).chain(shorter().map(Attention::Sparse));
        // A window that does not hold the question would be asked nothing.
        let questions = contexts.iter().flat_map(|context| &context.questions);
        let longest = questions.map(|question| question.tokens.len()).max().unwrap_or(0);
        let windows = shorter().filter(|&k| k as usize >= longest).map(Attention::Window);
        let rows = rows.chain(windows).collect();
        Ok(Self { length, contexts, rows })
    }

    /// Tokens that go through the model.
    pub(super) fn n_tokens(&self, eval: &Eval) -> u64 {
        let one = |context: &RecallContext, row: Attention| {
            let times = if eval.recall_alone { context.questions.len() } else { 1 };
            // The last token of each prompt is not read.
            let asked = context.questions.iter().map(|question| question.tokens.len() - 1).sum::<usize>();
            before(context, row).len() * times + asked
        };
        let all = self.rows.iter().flat_map(|&row| self.contexts.iter().map(move |context| one(context, row)));
        all.sum::<usize>() as u64
    }

    /// Answers the prompts under each kind of attention.
    ///
    /// # Errors
    /// The device's.
    pub(super) fn measure(&self, bench: &Bench<'_>) -> anyhow::Result<Value> {
        let mut rows = Vec::new();
        for &attention in &self.rows {
            let row = self.row(bench, attention)?;
            bench.say(&format!("recall at {} tokens, {}", self.length, super::report::recall_row(&row)));
            rows.push(row);
        }
        let prompts = self.contexts.iter().map(|context| context.questions.len()).sum::<usize>();
        Ok(json!({ "length": self.length, "prompts": prompts, "contexts": self.contexts.len(), "rows": rows }))
    }

    fn row(&self, bench: &Bench<'_>, attention: Attention) -> anyhow::Result<Value> {
        let mut device = bench.load(attention, self.length, false)?;
        let mut answered = Vec::new();
        for context in &self.contexts {
            answered.push(answers(bench, &mut device, context, attention)?);
            let (done, all) = (answered.len(), self.contexts.len());
            bench.step(&format!("recall at {} tokens, {attention}: {done} of {all} contexts", self.length));
        }
        let summary = RecallSummary::new(&answered).context("no recall prompts")?;
        let (kind, size) = match attention {
            Attention::Dense => ("dense", None),
            Attention::Sparse(k) => ("sparse", Some(k)),
            Attention::Window(size) => ("window", Some(size)),
        };
        Ok(json!({
            "attention": kind,
            "size": size,
            "prompts": summary.prompts,
            "exact": summary.exact,
            "digit_accuracy": summary.digit_accuracy,
            "digit_accuracy_error": summary.digit_accuracy_error,
            "log_probability": summary.log_probability,
            "log_probability_error": summary.log_probability_error,
        }))
    }
}

/// What this kind of attention gets to see of a text before a question.
fn before(context: &RecallContext, attention: Attention) -> Vec<u32> {
    match attention {
        Attention::Dense | Attention::Sparse(_) => context.tokens.clone(),
        // With the longest question and its answer, so that no answer pushes out what its last tokens still see.
        Attention::Window(size) => {
            let longest = context.questions.iter().map(|question| question.tokens.len()).max().unwrap_or(0);
            windowed(&context.tokens, SINKS, (size as usize).saturating_sub(longest))
        }
    }
}

/// Answers all questions about one text. It is read once: each question is put behind it in place of the one before,
/// and a row's bits do not depend on what was in the cache behind it, nor on how its tokens came in steps.
fn answers(
    bench: &Bench<'_>,
    device: &mut DeviceModel,
    context: &RecallContext,
    attention: Attention,
) -> anyhow::Result<Vec<Answered>> {
    let mut sequence = Lockstep::new(device, 1);
    let mut answered = Vec::new();
    let before = before(context, attention);
    for question in &context.questions {
        let keep = if bench.eval.recall_alone { 0 } else { before.len() };
        sequence.truncate(sequence.n_tokens().min(u32::try_from(keep)?));
        for chunk in before[sequence.n_tokens() as usize..].chunks(bench.chunk()) {
            sequence.step(device, chunk, Rows::None)?;
            bench.progress.inc(chunk.len() as u64);
        }
        let mut logits = Vec::new();
        for chunk in question.tokens[..question.tokens.len() - 1].chunks(bench.chunk()) {
            logits.extend(sequence.step(device, chunk, Rows::All)?.logits);
            bench.progress.inc(chunk.len() as u64);
        }
        // A row for each token but the last; the question's own are not judged.
        let row = logits.len() / (question.tokens.len() - 1);
        let judged = logits.len().saturating_sub(question.answer * row);
        answered.push(question.judge(&logits[judged..])?);
    }
    Ok(answered)
}

#[cfg(test)]
mod tests {
    use super::*;
    use sparsed_engine::eval::RecallQuestion;

    #[test]
    fn a_window_sees_the_sinks_and_the_question_but_no_note_far_back() {
        let question = RecallQuestion { tokens: (90..100).collect(), answer: 3, digits: vec![0, 1, 1] };
        let shorter = RecallQuestion { tokens: (90..98).collect(), ..question.clone() };
        let context = RecallContext { tokens: (0..90).collect(), questions: vec![shorter, question] };
        assert_eq!(before(&context, Attention::Window(16)), [0, 1, 2, 3, 88, 89]);
        assert_eq!(before(&context, Attention::Window(12)), [0, 1]);
        assert!(before(&context, Attention::Window(10)).is_empty());
        assert_eq!(before(&context, Attention::Sparse(16)), context.tokens);
    }
}
