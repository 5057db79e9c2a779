//! `POST /v1/completions`: text or token ids in, their continuation out. Works for models without a tokenizer.

use super::Shared;
use super::body::Body;
use super::chat::StreamOptions;
use super::error::HttpError;
use super::generation::{Answer, Wire, answer};
use super::sampling::SamplingFields;
use axum::Extension;
use axum::extract::State;
use axum::response::Response;
use serde::Deserialize;
use serde_json::{Value, json};
use sparsed_engine::DEFAULT_MODEL;
use sparsed_engine::api::{Event, Failure, Generate, Owner};

/// Tokens of an answer when the request does not say, as OpenAI has it.
const MAX_TOKENS_DEFAULT: u32 = 16;

#[derive(Debug, Deserialize)]
pub(crate) struct CompletionRequest {
    model: Option<String>,
    prompt: Prompt,
    #[serde(default)]
    stream: Option<bool>,
    stream_options: Option<StreamOptions>,
    max_tokens: Option<u32>,
    /// llama.cpp's name: the answer's token ids come along.
    return_tokens: Option<bool>,
    echo: Option<bool>,
    suffix: Option<String>,
    best_of: Option<u32>,
}

#[derive(Debug, Deserialize)]
#[serde(untagged, expecting = "expected a string or a list of token ids (whole numbers from 0)")]
enum Prompt {
    Text(String),
    Tokens(Vec<u32>),
    Texts(Vec<String>),
    TokenLists(Vec<Vec<u32>>),
}

pub(crate) async fn create(
    State(shared): State<Shared>,
    Extension(owner): Extension<Owner>,
    body: Body,
) -> Result<Response, HttpError> {
    let (request, fields) = (body.parse::<CompletionRequest>()?, body.parse::<SamplingFields>()?);
    let share = body.into_share();
    request.refuse_what_is_missing()?;
    let (sampling, stops, grammar) = (fields.sampling()?, fields.stops()?, fields.grammar()?);
    let model = request.model.unwrap_or_else(|| DEFAULT_MODEL.to_owned());
    let served = shared.service.model(&model)?;
    let with_tokens = request.return_tokens == Some(true) || served.model.tokenizer().is_none();
    let prompt = request.prompt.single()?;
    let made = tokio::task::spawn_blocking(move || {
        let prompt = prompt.map_or_else(|text| served.text_prompt(&text), Ok)?;
        drop(share);
        Ok::<_, Failure>((prompt, grammar.map(|spec| served.grammar(spec)).transpose()?))
    });
    let (prompt, grammar) = made.await.map_err(|_| Failure::invalid("prompt", "could not be tokenized"))??;
    let generate = Generate {
        model,
        owner,
        prompt,
        max_tokens: Some(request.max_tokens.unwrap_or(MAX_TOKENS_DEFAULT)),
        sampling,
        grammar,
        stops,
        ignore_end: fields.ignore_end(),
        reading: None,
        urgency: fields.urgency()?,
        turn: None,
    };
    let reply = StreamOptions::reply(request.stream_options, request.stream);
    answer(&shared.service, generate, reply, CompletionWire { with_tokens }).await.map_err(HttpError::about_prompt)
}

impl CompletionRequest {
    fn refuse_what_is_missing(&self) -> Result<(), HttpError> {
        let asked = [
            ("echo", self.echo == Some(true)),
            ("suffix", self.suffix.as_ref().is_some_and(|suffix| !suffix.is_empty())),
            ("best_of", self.best_of.is_some_and(|n| n != 1)),
        ];
        match asked.iter().find(|(_, asked)| *asked) {
            Some((name, _)) => Err(HttpError::invalid(name, "is not served by this version")),
            None => Ok(()),
        }
    }
}

impl Prompt {
    /// The one prompt of the request: token ids, or else text.
    fn single(self) -> Result<Result<Vec<u32>, String>, HttpError> {
        let several = |n: usize| HttpError::invalid("prompt", format!("has {n} prompts, one is served per request"));
        match self {
            Self::Text(text) => Ok(Err(text)),
            Self::Tokens(tokens) => Ok(Ok(tokens)),
            Self::Texts(texts) => <[String; 1]>::try_from(texts).map(|[text]| Err(text)).map_err(|t| several(t.len())),
            Self::TokenLists(lists) => {
                <[Vec<u32>; 1]>::try_from(lists).map(|[tokens]| Ok(tokens)).map_err(|l| several(l.len()))
            }
        }
    }
}

struct CompletionWire {
    with_tokens: bool,
}

impl CompletionWire {
    fn written(&self, text: &str, tokens: &[u32], finish_reason: Option<&str>) -> Value {
        let mut choice = json!({ "index": 0, "text": text, "logprobs": null, "finish_reason": finish_reason });
        if self.with_tokens {
            choice["tokens"] = json!(tokens);
        }
        choice
    }
}

impl Wire for CompletionWire {
    const ID_PREFIX: &'static str = "cmpl";
    const OBJECT: &'static str = "text_completion";
    const CHUNK_OBJECT: &'static str = "text_completion";

    fn choice(&self, answer: &Answer, finish_reason: &str) -> Value {
        self.written(&answer.text, &answer.tokens, Some(finish_reason))
    }

    fn opening(&self) -> Option<Value> {
        None
    }

    fn piece(&self, event: &Event) -> Option<Value> {
        match event {
            // A token whose text is held back is nothing to send, unless its id is wanted.
            Event::Delta { text, .. } if text.is_empty() && !self.with_tokens => None,
            Event::Delta { text, tokens } => Some(self.written(text, tokens, None)),
            _ => None,
        }
    }

    fn last(&self, finish_reason: &str) -> Value {
        self.written("", &[], Some(finish_reason))
    }
}
