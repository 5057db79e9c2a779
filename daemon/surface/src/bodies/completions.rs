//! What is a completion? Text or token ids in, their continuation out. Works for models without a tokenizer.

use super::answer::{Answer, Asked, Wire};
use super::chat::StreamOptions;
use super::sampling::SamplingFields;
use super::{fields, logprobs, parse};
use crate::refusal::Refusal;
use serde::Deserialize;
use serde_json::{Value, json};
use sparsed_engine::api::{Event, Failure, Generate, Likelihood, Owner, Relay, RelayPrompt};
use sparsed_engine::{DEFAULT_MODEL, Service, Target, Wishes};

/// Tokens of an answer when the request does not say, as OpenAI has it.
const MAX_TOKENS_DEFAULT: u32 = 16;

#[derive(Debug, Deserialize)]
struct CompletionFields {
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

/// A text that was asked to be continued, read but not yet a prompt.
#[derive(Debug)]
pub(crate) struct CompletionAsk {
    fields: CompletionFields,
    wishes: Wishes,
    n: u32,
    logprobs: Option<u32>,
}

impl CompletionAsk {
    /// Reads a body.
    ///
    /// # Errors
    /// What is wrong with it, and where.
    pub(crate) fn read(body: &[u8]) -> Result<Self, Refusal> {
        let (fields, sampling) = (parse::<CompletionFields>(body)?, parse::<SamplingFields>(body)?);
        fields::check::<CompletionFields, SamplingFields>(body)?;
        let (n, logprobs) = (sampling.answers()?, sampling.logprobs_of_completion()?);
        fields.refuse_what_is_missing(logprobs.is_some())?;
        let wishes = sampling.wishes(Some(fields.max_tokens.unwrap_or(MAX_TOKENS_DEFAULT)))?;
        Ok(Self { fields, wishes, n, logprobs })
    }

    /// Makes a prompt of it, on a thread that may compute, and lets go of `held` then.
    ///
    /// # Errors
    /// The model's, or what is wrong with the request.
    pub(crate) async fn prepare(
        self,
        service: &Service,
        owner: Owner,
        held: impl Send + 'static,
    ) -> Result<Asked<CompletionWire>, Refusal> {
        let Self { fields, wishes, n, logprobs } = self;
        let reply = StreamOptions::reply(fields.stream_options, fields.stream);
        let model = fields.model.clone().unwrap_or_else(|| DEFAULT_MODEL.to_owned());
        let served = match service.target(&model)? {
            Target::Here(served) => served,
            Target::Elsewhere(_) => {
                let (prompt, echo) = fields.relayed()?;
                let relay = Relay { model, owner, prompt, wishes, logprobs };
                let siblings = (1..n).map(|nth| relay.sibling(nth).into()).collect();
                let wire = CompletionWire { with_tokens: false, echo };
                return Ok(Asked { request: relay.into(), siblings, reply, wire });
            }
        };
        let with_tokens = fields.return_tokens == Some(true) || served.model.tokenizer().is_none();
        let (prompt, spec, echoes) = (fields.prompt.single()?, wishes.grammar.clone(), fields.echo == Some(true));
        let made = tokio::task::spawn_blocking(move || {
            let echo = match &prompt {
                Err(text) if echoes => text.clone(),
                Ok(tokens) if echoes => served.text_of(tokens)?,
                _ => String::new(),
            };
            let prompt = prompt.map_or_else(|text| served.text_prompt(&text), Ok)?;
            drop(held);
            let grammar = spec.map(|spec| served.grammar(spec)).transpose()?;
            Ok::<_, Failure>((prompt, echo, grammar))
        });
        let (prompt, echo, grammar) =
            made.await.map_err(|_| Failure::invalid("prompt", "could not be tokenized"))??;
        let request = Generate { model, prompt, grammar, logprobs, ..wishes.request(owner) };
        let siblings = (1..n).map(|nth| request.sibling(nth).into()).collect();
        Ok(Asked { request: request.into(), siblings, reply, wire: CompletionWire { with_tokens, echo } })
    }
}

impl CompletionFields {
    /// The prompt as another engine hears it, and what comes before the answer.
    fn relayed(self) -> Result<(RelayPrompt, String), Refusal> {
        if self.return_tokens == Some(true) {
            return Err(Refusal::invalid("return_tokens", "is not served: another engine computes this model"));
        }
        let echoes = self.echo == Some(true);
        match self.prompt.single()? {
            Err(text) if text.is_empty() => Err(Refusal::invalid("prompt", "is empty")),
            Err(text) => {
                let echo = if echoes { text.clone() } else { String::new() };
                Ok((RelayPrompt::Text(text), echo))
            }
            Ok(tokens) if tokens.is_empty() => Err(Refusal::invalid("prompt", "is empty")),
            Ok(_) if echoes => {
                Err(Refusal::invalid("echo", "of token ids is not served: another engine has the vocabulary"))
            }
            Ok(tokens) => Ok((RelayPrompt::Tokens(tokens), String::new())),
        }
    }

    fn refuse_what_is_missing(&self, logprobs: bool) -> Result<(), Refusal> {
        if logprobs && self.echo == Some(true) {
            return Err(Refusal::invalid("logprobs", "beside echo is not served: a prompt's tokens have none"));
        }
        let asked = [
            ("suffix", self.suffix.as_ref().is_some_and(|suffix| !suffix.is_empty())),
            ("best_of", self.best_of.is_some_and(|n| n != 1)),
        ];
        match asked.iter().find(|(_, asked)| *asked) {
            Some((name, _)) => Err(Refusal::invalid(name, "is not served by this version")),
            None => Ok(()),
        }
    }
}

impl Prompt {
    /// The one prompt of the request: token ids, or else text.
    fn single(self) -> Result<Result<Vec<u32>, String>, Refusal> {
        let several = |n: usize| Refusal::invalid("prompt", format!("has {n} prompts, one is served per request"));
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

/// Writes answers as text completions.
#[derive(Clone, Debug)]
pub(crate) struct CompletionWire {
    with_tokens: bool,
    /// Comes before the answer: the prompt, if that is wanted.
    echo: String,
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
        self.written(&format!("{}{}", self.echo, answer.text), &answer.tokens, Some(finish_reason))
    }

    fn opening(&self) -> Option<Value> {
        (!self.echo.is_empty()).then(|| self.written(&self.echo, &[], None))
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

    fn logprobs(&self, likelihoods: &[Likelihood], n_chars: usize) -> Value {
        logprobs::of_completion(likelihoods, n_chars)
    }
}
