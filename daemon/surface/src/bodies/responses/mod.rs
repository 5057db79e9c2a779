//! What do OpenAI's responses say? A request becomes a chat's, an answer a script of numbered events.
//!
//! A response that is stored is a turn of a session (`stored`), so it survives what a session survives. One in the
//! background is answered by a task of its own (`runs`), and by another one when the daemon was cut (`unfinished`).

mod items;
mod request;
mod runs;
mod script;
mod stored;
mod unfinished;

pub(crate) use items::{Page, list as input_items};
pub(crate) use runs::{Found, Heard, Run, Runs};
pub(crate) use script::Script;
pub(crate) use stored::{ResponseId, count, delete, not_found, prepare};
pub(crate) use unfinished::finish_all;
