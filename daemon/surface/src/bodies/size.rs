//! What would a request give the model? How many tokens, and which text.

use super::ChatAsk;
use crate::refusal::Refusal;
use serde_json::{Value, json};
use sparsed_engine::Service;
use sparsed_engine::api::{Failure, Generate, Owner, Request};

/// `{"object": "response.input_tokens", "input_tokens": ...}`, as OpenAI counts for responses and llama.cpp for chats.
///
/// # Errors
/// What is wrong with the request; the model's, which must be of this box.
pub(crate) async fn of_chat(
    service: &Service,
    owner: Owner,
    ask: ChatAsk,
    held: impl Send + 'static,
) -> Result<Value, Refusal> {
    let request = prompted(service, owner, ask, held).await?;
    Ok(json!({ "object": "response.input_tokens", "input_tokens": request.prompt.len() }))
}

/// `{"prompt": "...", "tokens": [...]}`, as llama.cpp's `/apply-template` writes a conversation down. Only as tokens can
/// it be a prompt again: what looks like a control token in a text is text here.
///
/// # Errors
/// What is wrong with the request; the model's, which must be of this box.
pub(crate) async fn text_of_chat(
    service: &Service,
    owner: Owner,
    ask: ChatAsk,
    held: impl Send + 'static,
) -> Result<Value, Refusal> {
    let request = prompted(service, owner, ask, held).await?;
    let served = service.model(&request.model)?;
    let made = tokio::task::spawn_blocking(move || {
        served.text_of(&request.prompt).map(|text| json!({ "prompt": text, "tokens": request.prompt }))
    });
    Ok(made.await.map_err(|_| Failure::invalid("messages", "could not be written down"))??)
}

/// The prompt of a chat that is not answered.
///
/// # Errors
/// What is wrong with the request; the model's, which must be of this box.
pub(super) async fn prompted(
    service: &Service,
    owner: Owner,
    ask: ChatAsk,
    held: impl Send + 'static,
) -> Result<Box<Generate>, Refusal> {
    if ask.is_turn() {
        return Err(Refusal::invalid("session_id", "is not known here: send the whole conversation"));
    }
    match ask.prepare(service, owner, held).await?.request {
        Request::Here(request) => Ok(request),
        Request::Elsewhere(relay) => Err(Failure::ComputedElsewhere { name: relay.model }.into()),
    }
}
