//! What can be asked of a loaded model without the engine? Prompts, grammars, and whether a request fits.

use crate::api::{
    ALTERNATIVES_MAX, ChatPrompt, Event, Failure, FinishReason, Finished, Generate, Reading, Refused, Sink, Timings,
    Usage,
};
use crate::grammar::{Compiler, Grammar, GrammarSpec, laid_out};
use sparsed_model::{ChatRequest, Model, ModelError};
use sparsed_session::ImageShape;

/// A model that answers.
#[derive(Debug)]
pub struct ServedModel {
    /// The file.
    pub model: Model,
    /// Tokens of prompt and answer together, in a session.
    pub max_context: u32,
    /// Of them, those that a request without a session may have: its rows may not be in the slow tier.
    pub stateless_context: u32,
    /// Bytes that one token holds in the KV pool.
    pub kv_bytes_per_token: u64,
    /// Tokens that attention selects, `None` when it reads all.
    pub top_k: Option<u32>,
    /// Seconds since 1970, when it was loaded.
    pub created: u64,
    /// Says which tokens there are: a session's tokens mean something to models with the same. The first is that of new
    /// sessions.
    pub(crate) vocabularies: [[u8; 32]; 2],
    /// Says which weights there are: others do not go on with an answer.
    pub(crate) weights: [u8; 32],
    /// What the host images of its blocks are.
    pub(crate) images: ImageShape,
    /// Of requests that say what the answer must be.
    pub(crate) grammars: Compiler,
}

impl ServedModel {
    /// The tokens of a conversation, up to where the next answer begins. Takes long for long texts: not for threads
    /// that must not wait.
    ///
    /// # Errors
    /// A model without tokenizer or chat format, the template's own refusal, text that is too long.
    pub fn chat_prompt(&self, request: &ChatRequest) -> Result<ChatPrompt, Failure> {
        let tokenizer = self.tokenizer("messages")?;
        let format = self.model.chat_format().ok_or_else(|| {
            Failure::invalid("messages", "cannot be used: the model has no chat template; use /v1/completions")
        })?;
        if !request.tools.is_empty() && !format.takes_tools() {
            return Err(Failure::invalid("tools", "cannot be used: the model's chat template has no place for them"));
        }
        let refused = |error: ModelError| Failure::invalid("messages", format!("cannot be rendered: {error}"));
        let prompt = format.render(request).map_err(refused)?;
        let tokens = tokenizer.encode_prompt(&prompt).map_err(refused)?;
        let reading = Reading { parser: prompt.parser(), visible: format.visible_tokens().to_vec() };
        Ok(ChatPrompt { tokens, reading })
    }

    /// Says which weights these are, and what is done with them: equal ones give the same rows.
    pub fn digest(&self) -> [u8; 32] {
        self.images.fingerprint
    }

    /// The tokens of plain text. Takes long for long texts: not for threads that must not wait.
    ///
    /// # Errors
    /// A model without tokenizer, text that is too long.
    pub fn text_prompt(&self, text: &str) -> Result<Vec<u32>, Failure> {
        let tokens = self.tokenizer("prompt")?.encode(text);
        tokens.map_err(|error| Failure::invalid("prompt", format!("cannot be tokenized: {error}")))
    }

    /// What an answer must be that calls one of `tools`, or the one that is called `only`.
    ///
    /// # Errors
    /// No such tool; a model whose calls cannot be enforced.
    pub fn call_grammar(&self, tools: &[serde_json::Value], only: Option<&str>) -> Result<GrammarSpec, Failure> {
        let name = |tool: &serde_json::Value| tool["function"]["name"].as_str().map(str::to_owned);
        let offered: Vec<_> = tools.iter().filter(|tool| only.is_none() || name(tool).as_deref() == only).collect();
        if offered.is_empty() {
            return Err(Failure::invalid("tool_choice", "names a function that is not among the tools"));
        }
        let format = self.model.chat_format().filter(|format| format.takes_tools());
        let grammar = format.and_then(|format| format.call_grammar(&offered));
        let none = || Failure::invalid("tool_choice", "cannot be enforced: this model does not write calls as JSON");
        grammar.map(GrammarSpec::Call).ok_or_else(none)
    }

    /// What an answer must be that may call `tools` and is JSON of `format` where it does not. For models that do not
    /// write calls as JSON it is `format` alone.
    pub fn call_or_json(&self, tools: &[serde_json::Value], format: GrammarSpec) -> GrammarSpec {
        let schema = match &format {
            GrammarSpec::JsonObject => serde_json::json!({ "type": "object" }),
            GrammarSpec::JsonSchema(schema) if schema.is_object() => schema.clone(),
            _ => return format,
        };
        let tools: Vec<_> = tools.iter().collect();
        let chat = self.model.chat_format().filter(|chat| chat.takes_tools());
        match chat.and_then(|chat| chat.call_or_json_grammar(&tools, &laid_out(&schema))) {
            Some(grammar) => GrammarSpec::CallOrJson { grammar, json: Box::new(format) },
            None => format,
        }
    }

    /// The text of tokens; what is not whole characters is replaced, and control tokens have their names.
    ///
    /// # Errors
    /// A model without tokenizer; a token that is not of its vocabulary.
    pub fn text_of(&self, tokens: &[u32]) -> Result<String, Failure> {
        let none = || Failure::invalid("tokens", "have no text: the model has no tokenizer");
        let tokenizer = self.model.tokenizer().ok_or_else(none)?;
        let mut bytes = Vec::new();
        for &token in tokens {
            let text = tokenizer.token_bytes(token);
            if text.is_empty() && token as usize >= tokenizer.vocab_size() {
                let reason = format!("has token {token}, the vocabulary ends at {}", tokenizer.vocab_size());
                return Err(Failure::invalid("tokens", reason));
            }
            let name = || tokenizer.token_name(token).unwrap_or_default().as_bytes();
            bytes.extend_from_slice(if text.is_empty() { name() } else { text });
        }
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    /// The grammar of an answer. Takes long, for some schemas: not for threads that must not wait.
    ///
    /// # Errors
    /// A model without tokenizer; a schema or grammar that is broken or too large, with its place.
    pub fn grammar(&self, spec: GrammarSpec) -> Result<Grammar, Failure> {
        let none = || Failure::invalid(spec.param(), "cannot be used: the model has no tokenizer");
        let tokenizer = self.model.tokenizer().ok_or_else(none)?;
        self.grammars.compile(spec, tokenizer)
    }

    fn tokenizer(&self, param: &str) -> Result<&sparsed_model::Tokenizer, Failure> {
        let none = || Failure::invalid(param, "cannot be text: the model has no tokenizer; send a list of token ids");
        self.model.tokenizer().ok_or_else(none)
    }

    /// That a request can be answered; more is asked of a turn of a session.
    pub(crate) fn check(&self, request: &Generate, is_turn: bool) -> Result<(), Failure> {
        if request.max_tokens == Some(0) && is_turn {
            return Err(Failure::invalid("max_tokens", "is 0, must be at least 1 in a session"));
        }
        let vocab = self.model.spec().vocab_size;
        if let Some((bad, _)) = request.sampling.logit_bias.iter().find(|(token, _)| *token >= vocab) {
            return Err(Failure::invalid("logit_bias", format!("has token {bad}, the vocabulary ends at {vocab}")));
        }
        if request.logprobs.is_some_and(|n| n > ALTERNATIVES_MAX) {
            return Err(Failure::invalid("top_logprobs", format!("must be 0 to {ALTERNATIVES_MAX}")));
        }
        self.check_prompt(&request.prompt, is_turn)
    }

    /// That a prompt has tokens, all of this model, and leaves room for an answer.
    pub(crate) fn check_prompt(&self, prompt: &[u32], is_turn: bool) -> Result<(), Failure> {
        if prompt.is_empty() {
            return Err(Failure::invalid("prompt", "is empty"));
        }
        let max_tokens = if is_turn { self.max_context } else { self.stateless_context };
        if prompt.len() >= max_tokens as usize {
            return Err(Failure::ContextTooLong { have_tokens: prompt.len(), max_tokens });
        }
        self.check_tokens("prompt", prompt)
    }

    /// That all tokens of what is called `what` are of this model.
    pub(crate) fn check_tokens(&self, what: &str, tokens: &[u32]) -> Result<(), Failure> {
        let vocab = self.model.spec().vocab_size;
        match tokens.iter().find(|&&token| token >= vocab) {
            Some(bad) => Err(Failure::invalid(what, format!("has token {bad}, the vocabulary ends at {vocab}"))),
            None => Ok(()),
        }
    }
}

/// Tells that an answer without tokens is over. Nobody need compute it, and its prompt is not read.
///
/// # Errors
/// There is no room for it.
pub(super) fn unanswered(request: &Generate, sink: &mut dyn Sink) -> Result<(), Failure> {
    let prompt_tokens = u32::try_from(request.prompt.len()).unwrap_or(u32::MAX);
    let (usage, timings) = (Usage { prompt_tokens, ..Usage::default() }, Timings::default());
    let finished = Finished { reason: FinishReason::Length, stopped_by: None, usage, timings };
    for event in [Event::Queued { ahead: 0 }, Event::Finished(finished)] {
        match sink.offer(event) {
            Err(Refused::Full(_) | Refused::Behind(_)) => return Err(Failure::CutOff),
            Ok(()) | Err(Refused::Closed) => {}
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Listener, request};

    #[test]
    fn an_answer_without_tokens_is_over_at_once() {
        let mut listener = Listener::with_room(2);
        let request = request(crate::api::Owner::Uid(1), None, vec![1, 2, 3], 0);
        unanswered(&request, &mut listener).unwrap();
        assert_eq!(unanswered(&request, &mut Listener::with_room(1)), Err(Failure::CutOff));
        let (tokens, end) = listener.heard();
        let Some(Event::Finished(finished)) = end else { panic!("{end:?}") };
        assert_eq!((tokens.len(), finished.reason, finished.usage.prompt_tokens), (0, FinishReason::Length, 3));
    }
}
