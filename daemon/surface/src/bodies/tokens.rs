//! Which tokens is a text, and which text are tokens? As llama.cpp's server asks and answers.

use super::{models, parse};
use crate::refusal::Refusal;
use serde::Deserialize;
use serde_json::{Value, json};
use sparsed_engine::api::{Failure, Owner};
use sparsed_engine::{DEFAULT_MODEL, ServedModel, Service};

#[derive(Debug, Deserialize)]
struct TokenizeFields {
    model: Option<String>,
    /// llama.cpp's name; vLLM's beside it.
    #[serde(alias = "prompt")]
    content: String,
    /// With the begin token, where a prompt has one. Off, as in llama.cpp.
    add_special: Option<bool>,
    with_pieces: Option<bool>,
}

#[derive(Debug, Deserialize)]
struct DetokenizeFields {
    model: Option<String>,
    tokens: Vec<u32>,
}

/// `{"tokens": [...]}`: ids, or with `with_pieces` objects with `id` and `piece`, which is text, or bytes where it is
/// not whole characters. Control tokens in the text are text, as in every prompt.
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
    on(service, owner, fields.model.clone(), "content", held, move |model| {
        let mut tokens = model.text_prompt(&fields.content)?;
        let begin = model.model.tokenizer().and_then(|tokenizer| tokenizer.bos());
        if fields.add_special != Some(true) && tokens.first().is_some_and(|first| Some(*first) == begin) {
            tokens.remove(0);
        }
        if fields.with_pieces != Some(true) {
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
