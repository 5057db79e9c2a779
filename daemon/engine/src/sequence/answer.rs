//! How does an answer's text get to the listener? Tokens to characters, stop strings, reasoning and calls.

use crate::api::{Event, Reading};
use crate::stream::StopStrings;
use sha2::{Digest, Sha256};
use sparsed_model::{OutputEvent, OutputParser, TextStream, Tokenizer};
use std::collections::VecDeque;

/// The text of an answer on its way to the listener.
#[derive(Debug)]
pub(super) struct Answer {
    stream: TextStream,
    stops: StopStrings,
    parser: Option<OutputParser>,
    /// What ids of calls are made of: the seed and the length of the prompt.
    origin: (u64, usize),
    has_called: bool,
}

impl Answer {
    /// The answer to a prompt of so many tokens, which is drawn with this seed: its `origin`.
    pub(super) fn new(reading: Option<Reading>, stops: Vec<String>, origin: (u64, usize)) -> Self {
        let (parser, visible) = reading.map_or((None, Vec::new()), |r| (Some(r.parser), r.visible));
        Self { stream: TextStream::new(&visible), stops: StopStrings::new(stops), parser, origin, has_called: false }
    }

    /// Adds a token's text; an end token has none. Answers whether a stop string was reached.
    pub(super) fn take(
        &mut self,
        token: u32,
        is_end: bool,
        tokenizer: Option<&Tokenizer>,
        outbox: &mut VecDeque<Event>,
    ) -> bool {
        let text = match tokenizer {
            Some(tokenizer) if !is_end => self.stream.push(tokenizer, token),
            _ => String::new(),
        };
        let piece = self.stops.push(&text);
        match &mut self.parser {
            Some(parser) => {
                let events = parser.push(&piece.text);
                self.tell(events, outbox);
            }
            None => outbox.push_back(Event::Delta { text: piece.text, tokens: vec![token] }),
        }
        piece.stopped
    }

    /// Adds what was held back: half a character, the start of a stop string or of a tag.
    pub(super) fn finish(&mut self, stopped: bool, outbox: &mut VecDeque<Event>) {
        let mut rest = String::new();
        if !stopped {
            rest = self.stops.push(&self.stream.finish()).text;
            rest += &self.stops.finish().text;
        }
        match &mut self.parser {
            Some(parser) => {
                let mut events = parser.push(&rest);
                events.extend(parser.finish());
                self.tell(events, outbox);
            }
            None if rest.is_empty() => {}
            None => outbox.push_back(Event::Delta { text: rest, tokens: Vec::new() }),
        }
    }

    fn tell(&mut self, events: Vec<OutputEvent>, outbox: &mut VecDeque<Event>) {
        for event in events {
            outbox.push_back(match event {
                OutputEvent::Content(text) => Event::Delta { text, tokens: Vec::new() },
                OutputEvent::Reasoning(text) => Event::Reasoning { text },
                OutputEvent::ToolCall { index, name, arguments } => {
                    self.has_called = true;
                    Event::ToolCall { index, id: call_id(self.origin, index), name, arguments }
                }
            });
        }
    }

    /// Whether functions were called.
    pub(super) fn has_called(&self) -> bool {
        self.has_called
    }
}

/// Names a call of the answer with this origin. No randomness: an answer that was cut is told again from its journal,
/// and its calls must be the same. Within a conversation no two calls have one name, since each prompt is longer than
/// the one before; that those of two conversations with the same seed may have, does not matter.
fn call_id((seed, n_prompt): (u64, usize), index: u32) -> String {
    let digest = Sha256::new().chain_update(seed.to_le_bytes()).chain_update((n_prompt as u64).to_le_bytes());
    let digest = digest.chain_update(index.to_le_bytes()).finalize();
    let head: String = digest[..8].iter().map(|byte| format!("{byte:02x}")).collect();
    format!("call_{head}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_is_named_alike_when_it_is_told_again_and_like_no_other() {
        assert_eq!(call_id((7, 40), 0), call_id((7, 40), 0));
        let ids: std::collections::BTreeSet<String> =
            [((7, 40), 0), ((7, 40), 1), ((7, 90), 0), ((8, 40), 0)].map(|(origin, n)| call_id(origin, n)).into();
        assert_eq!(ids.len(), 4, "{ids:?}");
        assert!(ids.iter().all(|id| id.len() == 21 && id.starts_with("call_")), "{ids:?}");
    }
}
