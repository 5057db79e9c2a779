//! What do llama.cpp's clients say where OpenAI has no word? The bodies of its `/completion`.

mod answer;
mod request;

pub(crate) use answer::Speaking;
pub(crate) use request::{Wanted, wanted};
