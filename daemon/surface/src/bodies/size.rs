//! How many tokens would a request give the model?

use super::ChatAsk;
use crate::refusal::Refusal;
use serde_json::{Value, json};
use sparsed_engine::Service;
use sparsed_engine::api::{Failure, Owner, Request};

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
    if ask.is_turn() {
        return Err(Refusal::invalid("session_id", "is not counted: send the whole conversation"));
    }
    match ask.prepare(service, owner, held).await?.request {
        Request::Here(request) => {
            Ok(json!({ "object": "response.input_tokens", "input_tokens": request.prompt.len() }))
        }
        Request::Elsewhere(relay) => Err(Failure::ComputedElsewhere { name: relay.model }.into()),
    }
}
