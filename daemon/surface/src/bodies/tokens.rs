//! Which tokens is a text, and which text are tokens? As llama.cpp's server asks and answers.

use super::{ChatAsk, models, parse, size};
use crate::refusal::Refusal;
use serde::Deserialize;
use serde::de::IgnoredAny;
use serde_json::{Value, json};
use sparsed_engine::api::{Failure, Owner};
use sparsed_engine::{DEFAULT_MODEL, ServedModel, Service};

#[derive(Debug, Deserialize)]
struct TokenizeFields {
    model: Option<String>,
    /// llama.cpp's name.
    content: Option<String>,
    /// vLLM's: a text, or a conversation.
    prompt: Option<String>,
    messages: Option<IgnoredAny>,
    /// With the begin token, where a prompt has one. Off, as in llama.cpp.
    add_special: Option<bool>,
    /// The same in vLLM's form, where it is on.
    add_special_tokens: Option<bool>,
    with_pieces: Option<bool>,
    return_token_strs: Option<bool>,
}

#[derive(Debug, Deserialize)]
struct DetokenizeFields {
    model: Option<String>,
    tokens: Vec<u32>,
}

/// Of `content` `{"tokens": [...]}`: ids, or with `with_pieces` objects with `id` and `piece`, which is text, or bytes
/// where it is not whole characters. Of `prompt` and `messages` vLLM's form: `tokens`, their `count` and
/// `max_model_len`. Control tokens in the text are text, as in every prompt.
///
/// # Errors
/// What is wrong with the request; a model without tokenizer.
pub(crate) async fn tokenize(
    service: &Service,
    owner: Owner,
    body: &[u8],
    held: impl Send + 'static,
) -> Result<Value, Refusal> {
    let fields: TokenizeFields = parse(body)?;
    let (with_pieces, with_names) = (fields.with_pieces == Some(true), fields.return_token_strs == Some(true));
    if fields.content.is_none() && fields.messages.is_some() {
        let request = size::prompted(service, owner, ChatAsk::read(body)?, held).await?;
        let tokens = request.prompt;
        return on(service, owner, Some(request.model), "messages", (), move |model| {
            counted(model, &tokens, with_names)
        })
        .await;
    }
    let is_vllms = fields.content.is_none();
    let Some(text) = fields.content.or(fields.prompt) else {
        return Err(Refusal::invalid("content", "is missing, and so are prompt and messages"));
    };
    let begins = if is_vllms { fields.add_special_tokens != Some(false) } else { fields.add_special == Some(true) };
    on(service, owner, fields.model, "content", held, move |model| {
        let mut tokens = model.text_prompt(&text)?;
        let begin = model.model.tokenizer().and_then(|tokenizer| tokenizer.bos());
        if !begins && tokens.first().is_some_and(|first| Some(*first) == begin) {
            tokens.remove(0);
        }
        if is_vllms {
            return counted(model, &tokens, with_names);
        }
        if !with_pieces {
            return Ok(json!({ "tokens": tokens }));
        }
        let piece = |id: u32| -> Value {
            let bytes = model.model.tokenizer().map_or(&[][..], |tokenizer| tokenizer.token_bytes(id));
            std::str::from_utf8(bytes).map_or_else(|_| json!(bytes), Value::from)
        };
        let pieces: Vec<Value> = tokens.iter().map(|&id| json!({ "id": id, "piece": piece(id) })).collect();
        Ok(json!({ "tokens": pieces }))
    })
    .await
}

/// Tokens as vLLM tells them.
fn counted(model: &ServedModel, tokens: &[u32], with_names: bool) -> Result<Value, Failure> {
    let names = || tokens.iter().map(|&id| model.text_of(&[id])).collect::<Result<Vec<_>, _>>();
    let names = with_names.then(names).transpose()?;
    Ok(json!({
        "count": tokens.len(), "max_model_len": model.stateless_context, "tokens": tokens, "token_strs": names,
    }))
}

/// `{"content": "..."}`.
///
/// # Errors
/// What is wrong with the request; a model without tokenizer, a token that is none of its.
pub(crate) async fn detokenize(
    service: &Service,
    owner: Owner,
    body: &[u8],
    held: impl Send + 'static,
) -> Result<Value, Refusal> {
    let fields: DetokenizeFields = parse(body)?;
    let text = move |model: &ServedModel| Ok(json!({ "content": model.text_of(&fields.tokens)? }));
    on(service, owner, fields.model.clone(), "tokens", held, text).await
}

/// Computes on a thread that may, and lets go of `held` then.
async fn on(
    service: &Service,
    owner: Owner,
    model: Option<String>,
    param: &'static str,
    held: impl Send + 'static,
    compute: impl FnOnce(&ServedModel) -> Result<Value, Failure> + Send + 'static,
) -> Result<Value, Refusal> {
    let model = models::held(service, owner, model.as_deref().unwrap_or(DEFAULT_MODEL)).await?;
    let made = tokio::task::spawn_blocking(move || {
        let made = compute(&model.model);
        drop(held);
        made
    });
    Ok(made.await.map_err(|_| Failure::invalid(param, "could not be worked on"))??)
}
