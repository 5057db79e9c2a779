//! What is a completion? Text or token ids in, their continuation out. Works for models without a tokenizer.

use super::answer::{Answer, Asked, StreamOptions, Wire};
use super::figures::Telling;
use super::forms::FormFields;
use super::missing::{MissingFields, refuse_asked};
use super::sampling::{SamplingFields, limit};
use super::whole::whole;
use super::{fields, logprobs, models, parse};
use crate::refusal::Refusal;
use serde::Deserialize;
use serde_json::{Value, json};
use sparsed_engine::api::{Event, Failure, Generate, Likelihood, Owner, Relay, RelayPrompt, Request};
use sparsed_engine::{DEFAULT_MODEL, Held, ServedModel, Service, Wishes};

/// Tokens of an answer when the request does not say, as OpenAI has it.
const MAX_TOKENS_DEFAULT: i64 = 16;
/// Most prompts of a request; each waits for the engine as a request of its own.
const PROMPTS_MAX: usize = 32;

#[derive(Debug, Deserialize)]
struct CompletionFields {
    model: Option<String>,
    prompt: Prompt,
    #[serde(default)]
    stream: Option<bool>,
    stream_options: Option<StreamOptions>,
    #[serde(default, deserialize_with = "whole")]
    max_tokens: Option<i64>,
    /// llama.cpp's name.
    #[serde(default, deserialize_with = "whole")]
    n_predict: Option<i64>,
    /// llama.cpp's name: the answer's token ids come along.
    return_tokens: Option<bool>,
    echo: Option<bool>,
    suffix: Option<String>,
    #[serde(default, deserialize_with = "whole")]
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
    is_seeded: bool,
    telling: Telling,
}

impl CompletionAsk {
    /// Reads a body.
    ///
    /// # Errors
    /// What is wrong with it, and where.
    pub(crate) fn read(body: &[u8]) -> Result<Self, Refusal> {
        let (fields, sampling) = (parse::<CompletionFields>(body)?, parse::<SamplingFields>(body)?);
        fields::check::<CompletionFields, SamplingFields, FormFields, MissingFields>(body)?;
        parse::<MissingFields>(body)?.refuse()?;
        let form = parse::<FormFields>(body)?.spec()?;
        let (n, logprobs) = (sampling.answers()?, sampling.logprobs_of_completion()?);
        fields.refuse_what_is_missing(n, logprobs.is_some())?;
        let max_tokens = match fields.limit() {
            // The prompt alone, as OpenAI has it: with echo it is told, without nothing is.
            ("max_tokens", Some(0)) => Some(0),
            (name, max_tokens) => limit(name, max_tokens)?,
        };
        let wishes = sampling.wishes(max_tokens, form)?;
        let (is_seeded, telling) = (sampling.is_seeded(), sampling.telling());
        Ok(Self { fields, wishes, n, logprobs, is_seeded, telling })
    }

    /// Whether [`Self::prepare`] may take longer than somebody waits who hears nothing: the model is to be loaded.
    pub(crate) fn waits(&self, service: &Service) -> bool {
        models::is_absent(service, self.fields.model.as_deref().unwrap_or(DEFAULT_MODEL))
    }

    /// Makes prompts of it, on a thread that may compute, and lets go of `held` then.
    ///
    /// # Errors
    /// The model's, or what is wrong with the request.
    pub(crate) async fn prepare(
        self,
        service: &Service,
        owner: Owner,
        held: impl Send + 'static,
    ) -> Result<Asked<CompletionWire>, Refusal> {
        let Self { fields, mut wishes, n, logprobs, is_seeded, telling } = self;
        let reply = StreamOptions::reply(fields.stream_options, fields.stream, telling);
        wishes.progress = reply.telling.is_any();
        let model = fields.model.clone().unwrap_or_else(|| DEFAULT_MODEL.to_owned());
        // The numbers of the answers to a prompt. With a seed each prompt has those that it would have alone; without
        // one two prompts that are the same are answered differently.
        let numbers = |at: usize| {
            let first = if is_seeded { 0 } else { u32::try_from(at).unwrap_or(0) * n };
            first..first + n
        };
        let asked = |requests: Vec<Request>, with_tokens: bool, echoes: Vec<String>| {
            let (mut requests, per_prompt) = (requests.into_iter(), n as usize);
            let request = requests.next().ok_or_else(|| Refusal::invalid("prompt", "is empty"))?;
            let wire = CompletionWire { with_tokens, echoes, per_prompt };
            Ok(Asked { request, siblings: requests.collect(), per_prompt, reply, wire })
        };
        if service.elsewhere(&model).is_some() {
            let (prompts, echoes): (Vec<_>, Vec<_>) = fields.relayed()?.into_iter().unzip();
            let relay = |(at, prompt): (usize, RelayPrompt)| {
                let relay = Relay { model: model.clone(), owner, prompt, wishes: wishes.clone(), logprobs };
                numbers(at).map(move |nth| relay.sibling(nth).into())
            };
            return asked(prompts.into_iter().enumerate().flat_map(relay).collect(), false, echoes);
        }
        let Held { model: served, lease } = models::held(service, owner, &model).await?;
        let with_tokens = fields.return_tokens == Some(true) || served.model.tokenizer().is_none();
        let (prompts, asked_for, echoes) = (fields.prompt.all()?, wishes.clone(), fields.echo == Some(true));
        let made = tokio::task::spawn_blocking(move || {
            let read = |prompt: Single| {
                let echo = match &prompt {
                    Single::Text(text) if echoes => text.clone(),
                    Single::Tokens(tokens) if echoes => served.text_of(tokens)?,
                    _ => String::new(),
                };
                Ok((prompt.tokens(&served)?, echo))
            };
            let (prompts, echoes): (Vec<_>, Vec<_>) =
                prompts.into_iter().map(read).collect::<Result<Vec<_>, Failure>>()?.into_iter().unzip();
            drop(held);
            Ok::<_, Failure>((prompts, echoes, asked_for.compiled(&served)?))
        });
        let (prompts, echoes, grammar) =
            made.await.map_err(|_| Failure::invalid("prompt", "could not be tokenized"))??;
        let generate = |(at, prompt): (usize, Vec<u32>)| {
            let (model, lease, grammar) = (model.clone(), Some(lease.clone()), grammar.clone());
            let request = Generate { model, prompt, grammar, logprobs, lease, ..wishes.clone().request(owner) };
            numbers(at).map(move |nth| request.sibling(nth).into())
        };
        asked(prompts.into_iter().enumerate().flat_map(generate).collect(), with_tokens, echoes)
    }
}

impl CompletionFields {
    /// The prompts as another engine hears them, and what comes before the answers to each.
    fn relayed(self) -> Result<Vec<(RelayPrompt, String)>, Refusal> {
        if self.return_tokens == Some(true) {
            return Err(Refusal::invalid("return_tokens", "is not served: another engine computes this model"));
        }
        let echoes = self.echo == Some(true);
        let relayed = |prompt: Single| match prompt {
            Single::Text(text) if text.is_empty() => Err(Refusal::invalid("prompt", "is empty")),
            Single::Text(text) => {
                let echo = if echoes { text.clone() } else { String::new() };
                Ok((RelayPrompt::Text(text), echo))
            }
            Single::Tokens(tokens) if tokens.is_empty() => Err(Refusal::invalid("prompt", "is empty")),
            Single::Tokens(_) if echoes => {
                Err(Refusal::invalid("echo", "of token ids is not served: another engine has the vocabulary"))
            }
            Single::Tokens(tokens) => Ok((RelayPrompt::Tokens(tokens), String::new())),
        };
        self.prompt.all()?.into_iter().map(relayed).collect()
    }

    /// Most tokens of an answer, and the field that says so.
    fn limit(&self) -> (&'static str, Option<i64>) {
        match (self.max_tokens, self.n_predict) {
            (None, Some(n)) => ("n_predict", Some(n)),
            (max_tokens, _) => ("max_tokens", max_tokens.or(Some(MAX_TOKENS_DEFAULT))),
        }
    }

    fn refuse_what_is_missing(&self, n: u32, logprobs: bool) -> Result<(), Refusal> {
        if logprobs && self.echo == Some(true) {
            return Err(Refusal::invalid("logprobs", "beside echo is not served: a prompt's tokens have none"));
        }
        let asked = [
            ("suffix", self.suffix.as_ref().is_some_and(|suffix| !suffix.is_empty())),
            // As many as are told are no choice.
            ("best_of", self.best_of.is_some_and(|best| best != n)),
        ];
        refuse_asked(&asked, "is not served by this version")
    }
}

/// One prompt.
#[derive(Debug)]
enum Single {
    Text(String),
    Tokens(Vec<u32>),
}

impl Single {
    fn tokens(self, served: &ServedModel) -> Result<Vec<u32>, Failure> {
        match self {
            Self::Text(text) => served.text_prompt(&text),
            Self::Tokens(tokens) => Ok(tokens),
        }
    }
}

impl Prompt {
    /// All prompts of the request, at least one.
    fn all(self) -> Result<Vec<Single>, Refusal> {
        let prompts: Vec<Single> = match self {
            Self::Text(text) => vec![Single::Text(text)],
            Self::Tokens(tokens) => vec![Single::Tokens(tokens)],
            Self::Texts(texts) => texts.into_iter().map(Single::Text).collect(),
            Self::TokenLists(lists) => lists.into_iter().map(Single::Tokens).collect(),
        };
        match prompts.len() {
            1..=PROMPTS_MAX => Ok(prompts),
            n => Err(Refusal::invalid("prompt", format!("has {n} prompts, 1 to {PROMPTS_MAX} are served per request"))),
        }
    }
}

/// Writes answers as text completions.
#[derive(Clone, Debug)]
pub(crate) struct CompletionWire {
    with_tokens: bool,
    /// What comes before the answers to each prompt: the prompt, if that is wanted.
    echoes: Vec<String>,
    per_prompt: usize,
}

impl CompletionWire {
    /// What comes before the `index`th answer.
    fn echo(&self, index: usize) -> &str {
        self.echoes.get(index / self.per_prompt).map_or("", String::as_str)
    }

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

    fn choice(&self, index: usize, answer: &Answer, finish_reason: &str) -> Value {
        self.written(&format!("{}{}", self.echo(index), answer.text), &answer.tokens, Some(finish_reason))
    }

    fn opening(&self, index: usize) -> Option<Value> {
        let echo = self.echo(index);
        (!echo.is_empty()).then(|| self.written(echo, &[], None))
    }

    fn piece(&self, event: &Event) -> Option<Value> {
        match event {
            // A token whose text is held back is nothing to send, unless its id is wanted.
            Event::Delta { text, .. } if text.is_empty() && !self.with_tokens => None,
            Event::Delta { text, tokens } => Some(self.written(text, tokens, None)),
            _ => None,
        }
    }

    fn silence(&self) -> Value {
        self.written("", &[], None)
    }

    fn last(&self, finish_reason: &str) -> Value {
        self.written("", &[], Some(finish_reason))
    }

    fn logprobs(&self, likelihoods: &[Likelihood], n_chars: usize) -> Value {
        logprobs::of_completion(likelihoods, n_chars)
    }
}
