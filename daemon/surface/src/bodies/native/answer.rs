//! How does an answer look to a client of llama.cpp's `/completion`? Pieces with `stop`, the last of which has all.

use super::Wanted;
use crate::bodies::answer::Asked;
use crate::bodies::figures::{Telling, prompt_progress, timings, timings_so_far};
use crate::bodies::listen::{self, Listening};
use crate::bodies::{CompletionWire, logprobs};
use crate::refusal::Refusal;
use serde_json::{Map, Value, json};
use sparsed_engine::api::{Event, FinishReason, Finished, Likelihood, RelayPrompt, Request};
use sparsed_engine::{Sampling, Service};

/// Answers on their way.
#[derive(Debug)]
pub(crate) struct Speaking {
    listening: Listening,
    model: String,
    telling: Telling,
    stream: bool,
    with_tokens: bool,
    response_fields: Vec<String>,
    said: Vec<Said>,
}

/// One of the answers.
#[derive(Debug, Default)]
struct Said {
    settings: Value,
    prompt: String,
    /// Tokens of the prompt; 0 where another engine counts them.
    n_prompt: u32,
    /// Whether tokens come with their text: those of other engines do not.
    has_tokens: bool,
    /// Most tokens of it; `None`: as many as the context has room for.
    max_tokens: Option<u32>,
    content: String,
    tokens: Vec<u32>,
    likelihoods: Vec<Likelihood>,
    /// Text behind the last token, which the last piece has.
    rest: String,
    has_new_line: bool,
    n_predicted: u32,
    timings: Option<Value>,
    /// It has ended: the last piece.
    last: Option<Value>,
}

impl Speaking {
    /// Hands the requests to the engine.
    ///
    /// # Errors
    /// The engine's.
    pub(crate) async fn begin(
        service: &Service,
        wanted: Wanted,
        asked: Asked<CompletionWire>,
    ) -> Result<Self, Refusal> {
        let Wanted { stream, with_tokens, response_fields, .. } = wanted;
        let Asked { request, siblings, per_prompt, reply, .. } = asked;
        let model = request.model().to_owned();
        let requests: Vec<Request> = std::iter::once(request).chain(siblings).collect();
        let said = requests.iter().map(|request| Said::of(service, request, stream)).collect();
        // Its answers have no name; the log has one.
        let id = listen::name("cmpl");
        let listening = Listening::begin(service, &id, requests, per_prompt).await?;
        Ok(Self { listening, model, telling: reply.telling, stream, with_tokens, response_fields, said })
    }

    /// The next piece of a stream; nothing after the last of the last answer, or a failure.
    pub(crate) async fn next(&mut self) -> Option<Result<Value, Refusal>> {
        while self.said.iter().any(|said| said.last.is_none()) {
            match self.hear().await {
                Ok(None) => {}
                Ok(Some(piece)) => return Some(Ok(piece)),
                Err(refusal) => {
                    self.said.clear();
                    return Some(Err(refusal));
                }
            }
        }
        None
    }

    /// The answer in one object, several in a list.
    ///
    /// # Errors
    /// Why there is none.
    pub(crate) async fn whole(mut self) -> Result<Value, Refusal> {
        while self.said.iter().any(|said| said.last.is_none()) {
            self.hear().await?;
        }
        let mut all: Vec<Value> = self.said.into_iter().filter_map(|said| said.last).collect();
        Ok(if all.len() == 1 { all.remove(0) } else { Value::Array(all) })
    }

    /// Takes an event in; what a stream says of it.
    async fn hear(&mut self) -> Result<Option<Value>, Refusal> {
        let (index, event) = self.listening.next().await;
        let (telling, stream) = (self.telling, self.stream);
        let said = &mut self.said[index];
        match event {
            Event::Failed(failure) => return Err(failure.into()),
            Event::Finished(finished) => {
                let last = self.last(index, &finished);
                self.said[index].last = Some(last.clone());
                return Ok(Some(last));
            }
            Event::Likelihood(likelihood) => said.likelihoods.push(*likelihood),
            Event::Progress(progress) => {
                said.timings = telling.timings().then(|| timings_so_far(&progress));
                if let Some(of_prompt) = prompt_progress(&progress).filter(|_| telling.progress()) {
                    let mut piece = said.piece(index, "", &[]);
                    piece["prompt_progress"] = of_prompt;
                    return Ok(Some(piece));
                }
            }
            Event::Delta { text, tokens } => {
                said.has_new_line |= text.contains('\n');
                if !stream {
                    said.content += &text;
                    said.tokens.extend(tokens);
                } else if tokens.is_empty() && said.has_tokens {
                    said.rest += &text;
                } else {
                    said.n_predicted += u32::try_from(tokens.len()).unwrap_or(u32::MAX);
                    let piece = said.piece(index, &text, &tokens);
                    return Ok(Some(piece));
                }
            }
            Event::Queued { .. } | Event::Sampled { .. } | Event::Reasoning { .. } | Event::ToolCall { .. } => {}
        }
        Ok(None)
    }

    fn last(&mut self, index: usize, finished: &Finished) -> Value {
        let (usage, said) = (finished.usage, &mut self.said[index]);
        let is_short = said.max_tokens.is_none_or(|max| usage.completion_tokens < max);
        let stop_type = match (finished.reason, &finished.stopped_by) {
            (FinishReason::Length, _) => "limit",
            (_, Some(_)) => "word",
            _ => "eos",
        };
        let content = if self.stream { std::mem::take(&mut said.rest) } else { std::mem::take(&mut said.content) };
        let mut last = json!({
            "index": index,
            "content": content,
            "tokens": if self.with_tokens { std::mem::take(&mut said.tokens) } else { Vec::new() },
            "id_slot": -1,
            "stop": true,
            "model": self.model,
            "tokens_predicted": usage.completion_tokens,
            "tokens_evaluated": usage.prompt_tokens,
            "generation_settings": said.settings,
            "prompt": said.prompt,
            "has_new_line": said.has_new_line,
            // The context was full.
            "truncated": finished.reason == FinishReason::Length && is_short,
            "stop_type": stop_type,
            "stopping_word": finished.stopped_by.clone().unwrap_or_default(),
            "tokens_cached": usage.cached_tokens,
            "timings": timings(finished),
        });
        if !said.likelihoods.is_empty() {
            last["completion_probabilities"] = logprobs::of_native(&std::mem::take(&mut said.likelihoods));
        }
        if self.response_fields.is_empty() { last } else { picked(&last, &self.response_fields) }
    }
}

impl Said {
    fn of(service: &Service, request: &Request, stream: bool) -> Self {
        let (prompt, n_prompt, settings, max_tokens) = match request {
            Request::Here(request) => {
                let text = service.model(&request.model).and_then(|served| served.text_of(&request.prompt));
                let limits = (request.max_tokens, request.ignore_end, request.logprobs);
                let settings = settings(&request.sampling, &request.stops, limits);
                let n_prompt = u32::try_from(request.prompt.len()).unwrap_or(u32::MAX);
                (text.unwrap_or_default(), n_prompt, settings, request.max_tokens)
            }
            Request::Elsewhere(relay) => {
                let wishes = &relay.wishes;
                let text = if let RelayPrompt::Text(text) = &relay.prompt { text.clone() } else { String::new() };
                let limits = (wishes.max_tokens, wishes.ignore_end, relay.logprobs);
                (text, 0, settings(&wishes.sampling, &wishes.stops, limits), wishes.max_tokens)
            }
        };
        let has_tokens = matches!(request, Request::Here(_));
        let mut said = Self { prompt, n_prompt, has_tokens, settings, max_tokens, ..Self::default() };
        said.settings["stream"] = json!(stream);
        said
    }

    fn piece(&mut self, index: usize, content: &str, tokens: &[u32]) -> Value {
        let mut piece = json!({
            "index": index,
            "content": content,
            "tokens": tokens,
            "stop": false,
            "id_slot": -1,
            "tokens_predicted": self.n_predicted,
            "tokens_evaluated": self.n_prompt,
        });
        if let Some(timings) = self.timings.take() {
            piece["timings"] = timings;
        }
        if !self.likelihoods.is_empty() {
            piece["completion_probabilities"] = logprobs::of_native(&std::mem::take(&mut self.likelihoods));
        }
        piece
    }
}

/// What the answer was asked to be, under llama.cpp's names.
fn settings(
    sampling: &Sampling,
    stops: &[String],
    (max_tokens, ignore_eos, logprobs): (Option<u32>, bool, Option<u32>),
) -> Value {
    let bias = |&(token, bias): &(u32, f32)| json!({ "token": token, "bias": bias });
    let n_predict = max_tokens.map_or(-1, i64::from);
    json!({
        "n_predict": n_predict,
        "max_tokens": n_predict,
        "seed": sampling.seed,
        "temperature": sampling.temperature,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
        "min_p": sampling.min_p,
        "repeat_penalty": sampling.repetition_penalty,
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
        "logit_bias": sampling.logit_bias.iter().map(bias).collect::<Vec<_>>(),
        "stop": stops,
        "ignore_eos": ignore_eos,
        "n_probs": logprobs.unwrap_or(0),
    })
}

/// The members of `names`; one inside another is named with a slash, and what is not there is left out.
fn picked(answer: &Value, names: &[String]) -> Value {
    let member = |name: &String| Some((name.clone(), answer.pointer(&format!("/{name}"))?.clone()));
    Value::Object(names.iter().filter_map(member).collect::<Map<_, _>>())
}
