//! Which numbers go with an answer? Tokens as OpenAI counts them, times and progress as llama.cpp's server tells them.

use serde_json::{Value, json};
use sparsed_engine::api::{Finished, Progress, Timings, Usage};

/// What a client wants to hear of a stream beside the answer, under llama.cpp's names.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Telling {
    /// How far the prompt is read.
    pub(super) return_progress: Option<bool>,
    /// How long it took, with each piece.
    pub(super) timings_per_token: Option<bool>,
}

impl Telling {
    /// Whether the engine has to say anything for it.
    pub(crate) fn is_any(self) -> bool {
        self.progress() || self.timings()
    }

    pub(crate) fn progress(self) -> bool {
        self.return_progress == Some(true)
    }

    pub(crate) fn timings(self) -> bool {
        self.timings_per_token == Some(true)
    }
}

/// Of all answers, so many of them to each prompt, which counts once.
pub(crate) fn usage(finished: &[Finished], per_prompt: usize) -> Value {
    let sum = |step: usize, of: fn(&Finished) -> u32| -> u64 {
        finished.iter().step_by(step).map(|finished| u64::from(of(finished))).sum()
    };
    let prompt = sum(per_prompt, |finished| finished.usage.prompt_tokens);
    let completion = sum(1, |finished| finished.usage.completion_tokens);
    json!({
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "completion_tokens_details": { "reasoning_tokens": sum(1, |finished| finished.usage.reasoning_tokens) },
        "prompt_tokens_details": { "cached_tokens": sum(per_prompt, |finished| finished.usage.cached_tokens) },
    })
}

/// As llama.cpp's server has them, and the time in the queue.
pub(crate) fn timings(finished: &Finished) -> Value {
    let (usage, timings) = (finished.usage, finished.timings);
    times(usage, timings, usage.prompt_tokens.saturating_sub(usage.cached_tokens))
}

/// The same of an answer that goes on, or has not begun.
pub(crate) fn timings_so_far(progress: &Progress) -> Value {
    let Progress { read_tokens, usage, timings } = *progress;
    times(usage, timings, read_tokens.saturating_sub(usage.cached_tokens))
}

/// `read`: tokens of the prompt that were computed in `prompt_ms`.
fn times(usage: Usage, timings: Timings, read: u32) -> Value {
    let rate = |n: u32, ms: f64| if ms > 0.0 { f64::from(n) * 1e3 / ms } else { 0.0 };
    let each = |n: u32, ms: f64| if n > 0 { ms / f64::from(n) } else { 0.0 };
    // The first token comes of the prompt's last step.
    let after_first = usage.completion_tokens.saturating_sub(1);
    json!({
        "queue_ms": timings.queue_ms,
        "cache_n": usage.cached_tokens,
        "prompt_n": read,
        "prompt_ms": timings.prompt_ms,
        "prompt_per_token_ms": each(read, timings.prompt_ms),
        "prompt_per_second": rate(read, timings.prompt_ms),
        "predicted_n": usage.completion_tokens,
        "predicted_ms": timings.predicted_ms,
        "predicted_per_token_ms": each(after_first, timings.predicted_ms),
        "predicted_per_second": rate(after_first, timings.predicted_ms),
    })
}

/// How far a prompt is read, as llama.cpp's server has it; nothing once the answer has begun.
pub(crate) fn prompt_progress(progress: &Progress) -> Option<Value> {
    let Progress { read_tokens, usage, timings } = *progress;
    (usage.completion_tokens == 0).then(|| {
        json!({
            "total": usage.prompt_tokens,
            "cache": usage.cached_tokens,
            "processed": read_tokens,
            "time_ms": timings.prompt_ms,
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_leave_the_first_token_out_and_nothing_is_divided_by_nothing() {
        let usage = Usage { prompt_tokens: 70, cached_tokens: 64, completion_tokens: 5, reasoning_tokens: 0 };
        let all = times(usage, Timings { queue_ms: 1.0, prompt_ms: 12.0, predicted_ms: 8.0 }, 6);
        assert_eq!((&all["prompt_per_token_ms"], &all["prompt_per_second"]), (&json!(2.0), &json!(500.0)));
        assert_eq!((&all["predicted_per_token_ms"], &all["predicted_per_second"]), (&json!(2.0), &json!(500.0)));
        let none = times(Usage::default(), Timings::default(), 0);
        assert!(none.as_object().unwrap().values().all(|value| value.as_f64() == Some(0.0)), "{none}");
    }

    #[test]
    fn progress_is_of_the_prompt_only() {
        let usage = Usage { prompt_tokens: 9, cached_tokens: 2, ..Usage::default() };
        let mut progress = Progress { read_tokens: 4, usage, timings: Timings::default() };
        let told = json!({ "total": 9, "cache": 2, "processed": 4, "time_ms": 0.0 });
        assert_eq!(prompt_progress(&progress), Some(told));
        assert_eq!(timings_so_far(&progress)["prompt_n"], 2);
        progress.usage.completion_tokens = 1;
        assert_eq!(prompt_progress(&progress), None);
    }
}
