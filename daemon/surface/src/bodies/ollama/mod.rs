//! What do Ollama's bodies say? Chats and generations in its words, as requests and answers of our own.
//!
//! A request is written as OpenAI's, so that it is checked and understood in one place; answers are written from the
//! engine's events.

mod answer;
mod request;

pub(crate) use answer::{Kind, Speaking, idle};
pub(crate) use request::{Wanted, chat, generate, renamed, tagged};
