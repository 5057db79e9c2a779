//! What is made of a stream that lies in a file? For the fuzz target and its seeds.

use crate::answer::Answer;
use crate::events::Events;
use crate::trouble::Trouble;
use sparsed_engine::api::{Event, FinishReason, Usage};

/// What a request would hear of a stream that comes in `pieces`, and how it would end: nothing of it is sent anywhere.
/// Calls have the names that the stream gives them, or none, where a request would make one up.
///
/// # Errors
/// What is wrong with the stream, or that it is cut.
pub fn stream<'s>(pieces: impl IntoIterator<Item = &'s [u8]>) -> (Vec<Event>, Result<(FinishReason, Usage), String>) {
    let (mut events, mut answer, mut heard) = (Events::default(), Answer::new(Some(5), false, Some("key")), Vec::new());
    let read = || {
        for piece in pieces {
            events.push(piece, |data| answer.read(data, |event| heard.push(event)))?;
        }
        answer.end()
    };
    let end = read().map_err(|trouble: Trouble| format!("{trouble:?}"));
    for event in &mut heard {
        if let Event::ToolCall { id, .. } = event
            && id.len() == MADE_UP_LEN
            && id.starts_with("call_")
        {
            id.clear();
        }
    }
    (heard, end)
}

/// Characters of a name that was made up.
const MADE_UP_LEN: usize = "call_".len() + 16;
