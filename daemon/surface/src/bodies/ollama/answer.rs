//! How does an answer look to a client of Ollama's? Lines of JSON, or one object.

use crate::bodies::answer::Answer;
use crate::bodies::listen::{self, Listening};
use crate::bodies::logprobs;
use crate::refusal::Refusal;
use serde_json::{Value, json};
use sparsed_engine::api::{Event, FinishReason, Finished, Likelihood, Request};
use sparsed_engine::{Service, ToolCall};

/// Whose words an answer is in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// `/api/chat`.
    Chat,
    /// `/api/generate`.
    Generate,
}

/// An answer on its way.
#[derive(Debug)]
pub(crate) struct Speaking {
    /// What the log calls it.
    id: String,
    kind: Kind,
    model: String,
    listening: Listening,
    likelihoods: Vec<Likelihood>,
    has_ended: bool,
}

impl Speaking {
    /// Hands the request to the engine. `model` is the name that the client knows it by.
    ///
    /// # Errors
    /// The engine's.
    pub(crate) async fn begin(service: &Service, kind: Kind, model: String, request: Request) -> Result<Self, Refusal> {
        let id = listen::name("ollama");
        let listening = Listening::begin(service, &id, [request], 1).await?;
        Ok(Self { id, kind, model, listening, likelihoods: Vec::new(), has_ended: false })
    }

    /// What the log calls it.
    pub(crate) fn id(&self) -> &str {
        &self.id
    }

    /// The next line; nothing after the last, which has `done` or is the failure.
    pub(crate) async fn next(&mut self) -> Option<Result<Value, Refusal>> {
        while !self.has_ended {
            let mut part = Answer::default();
            match self.listening.next().await.1 {
                Event::Finished(finished) => {
                    self.has_ended = true;
                    return Some(Ok(self.last(&Answer::default(), &finished)));
                }
                Event::Failed(failure) => {
                    self.has_ended = true;
                    return Some(Err(failure.into()));
                }
                Event::Likelihood(likelihood) => self.likelihoods.push(*likelihood),
                Event::Queued { .. } | Event::Sampled { .. } | Event::Progress(_) => {}
                Event::Delta { text, .. } if text.is_empty() => {}
                event => {
                    part.hear(event);
                    return Some(Ok(self.line(&part)));
                }
            }
        }
        None
    }

    /// The answer in one object.
    ///
    /// # Errors
    /// Why there is none.
    pub(crate) async fn whole(mut self) -> Result<Value, Refusal> {
        let mut answer = Answer::default();
        loop {
            match self.listening.next().await.1 {
                Event::Finished(finished) => return Ok(self.last(&answer, &finished)),
                Event::Failed(failure) => return Err(failure.into()),
                Event::Likelihood(likelihood) => self.likelihoods.push(*likelihood),
                event => answer.hear(event),
            }
        }
    }

    fn line(&mut self, part: &Answer) -> Value {
        let mut line = head(self.kind, &self.model, part);
        if !self.likelihoods.is_empty() {
            line["logprobs"] = logprobs::of_chat(&std::mem::take(&mut self.likelihoods))["content"].take();
        }
        line
    }

    fn last(&mut self, answer: &Answer, finished: &Finished) -> Value {
        let mut line = self.line(answer);
        let (usage, timings) = (finished.usage, finished.timings);
        line["done"] = json!(true);
        line["done_reason"] = json!(match finished.reason {
            FinishReason::Length => "length",
            FinishReason::Stop | FinishReason::ToolCalls => "stop",
        });
        line["total_duration"] = json!(nanoseconds(timings.queue_ms + timings.prompt_ms + timings.predicted_ms));
        line["load_duration"] = json!(0);
        line["prompt_eval_count"] = json!(usage.prompt_tokens);
        line["prompt_eval_duration"] = json!(nanoseconds(timings.prompt_ms));
        line["eval_count"] = json!(usage.completion_tokens);
        line["eval_duration"] = json!(nanoseconds(timings.predicted_ms));
        line
    }
}

/// What is answered where there is nothing to say: the model is there, or may go (`unload`).
pub(crate) fn idle(kind: Kind, model: &str, unload: bool) -> Value {
    let mut line = head(kind, model, &Answer::default());
    line["done"] = json!(true);
    line["done_reason"] = json!(if unload { "unload" } else { "load" });
    line
}

fn head(kind: Kind, model: &str, answer: &Answer) -> Value {
    let mut line = json!({ "model": model, "created_at": jiff::Timestamp::now().to_string(), "done": false });
    match kind {
        Kind::Generate => {
            line["response"] = json!(answer.text);
            if !answer.reasoning.is_empty() {
                line["thinking"] = json!(answer.reasoning);
            }
        }
        Kind::Chat => {
            line["message"] = json!({ "role": "assistant", "content": answer.text });
            if !answer.reasoning.is_empty() {
                line["message"]["thinking"] = json!(answer.reasoning);
            }
            // A call that the limit has cut could only be told with other arguments than the model meant.
            let call = |ToolCall { id, name, arguments }: &ToolCall| {
                let arguments: Value = serde_json::from_str(arguments).ok()?;
                Some(json!({ "id": id, "function": { "name": name, "arguments": arguments } }))
            };
            let calls: Vec<Value> = answer.calls.iter().filter_map(call).collect();
            if !calls.is_empty() {
                line["message"]["tool_calls"] = json!(calls);
            }
        }
    }
    line
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "times are positive and far shorter")]
fn nanoseconds(ms: f64) -> u64 {
    (ms * 1e6) as u64
}
