//! How does an answer's text get to the listener? Tokens to characters, stop strings, reasoning and calls.

use crate::api::{Event, Generate, Reading};
use crate::stream::StopStrings;
use sha2::{Digest, Sha256};
use sparsed_model::{OutputEvent, OutputParser, TextStream, Tokenizer};
use std::collections::VecDeque;

/// Why nothing follows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    /// A stop string was reached, or the only call is made.
    Stopped,
    /// The model has ended it, or the grammar.
    Complete,
    /// A limit has cut it, and what is said of it need not stand in a conversation.
    CutOff,
}

/// The text of an answer on its way to the listener.
#[derive(Debug)]
pub(super) struct Answer {
    stream: TextStream,
    stops: StopStrings,
    parser: Option<OutputParser>,
    /// What ids of calls are made of: the seed and the length of the prompt.
    origin: (u64, usize),
    has_called: bool,
    /// Nothing follows the first call.
    one_call: bool,
    /// Tokens of reasoning and of the tags around it.
    n_reasoning: u32,
}

impl Answer {
    /// The answer to a prompt of so many tokens, which is drawn with this seed: its `origin`.
    pub(super) fn new(reading: Option<Reading>, stops: Vec<String>, origin: (u64, usize)) -> Self {
        let (parser, visible) = reading.map_or((None, Vec::new()), |r| (Some(r.parser), r.visible));
        let (stream, stops) = (TextStream::new(&visible), StopStrings::new(stops));
        Self { stream, stops, parser, origin, has_called: false, one_call: false, n_reasoning: 0 }
    }

    /// The same, which ends with its first call if it is to.
    pub(super) fn ending_with_a_call(self, one_call: bool) -> Self {
        Self { one_call, ..self }
    }

    /// Adds a token's text; an end token has none. Answers whether nothing may follow: a stop string was reached, or
    /// the only call is made.
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
                let was_reasoning = parser.is_reasoning();
                let events = parser.push(&piece.text);
                self.n_reasoning += u32::from(was_reasoning || parser.is_reasoning());
                self.tell(events, outbox);
            }
            None => outbox.push_back(Event::Delta { text: piece.text, tokens: vec![token] }),
        }
        piece.stopped || self.is_over()
    }

    /// Adds what was held back: half a character, the start of a stop string or of a tag; of a call that a limit has
    /// cut, what is there of it. In a session such a call stays text, since the conversation must be one that goes on.
    pub(super) fn finish(&mut self, end: End, outbox: &mut VecDeque<Event>) {
        let stopped = end == End::Stopped;
        let mut rest = String::new();
        if !stopped {
            rest = self.stops.push(&self.stream.finish()).text;
            rest += &self.stops.finish().text;
        }
        match &mut self.parser {
            Some(parser) => {
                let mut events = parser.push(&rest);
                events.extend(if end == End::CutOff { parser.cut_off() } else { parser.finish() });
                self.tell(events, outbox);
            }
            None if rest.is_empty() => {}
            None => outbox.push_back(Event::Delta { text: rest, tokens: Vec::new() }),
        }
    }

    fn tell(&mut self, events: Vec<OutputEvent>, outbox: &mut VecDeque<Event>) {
        for event in events {
            if self.is_over() {
                return;
            }
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

    /// The stop string that was reached.
    pub(super) fn stopped_by(&self) -> Option<String> {
        self.stops.reached().map(str::to_owned)
    }

    /// Tokens of reasoning so far, and of the tags around it.
    pub(super) fn n_reasoning(&self) -> u32 {
        self.n_reasoning
    }

    /// Whether the only call that there may be is made.
    fn is_over(&self) -> bool {
        self.one_call && self.has_called
    }

    /// Whether functions were called.
    pub(super) fn has_called(&self) -> bool {
        self.has_called
    }
}

/// What the listener of an answer to `n_prompt` tokens has heard, or was to hear, of its `tokens`.
pub(crate) fn retold(
    tokens: &[u32],
    n_prompt: usize,
    request: &Generate,
    reading: Option<Reading>,
    tokenizer: Option<&Tokenizer>,
) -> VecDeque<Event> {
    let (mut outbox, origin) = (VecDeque::new(), (request.sampling.seed, n_prompt));
    let mut answer = Answer::new(reading, request.stops.clone(), origin).ending_with_a_call(request.one_call);
    let is_end = |token| tokenizer.is_some_and(|tokenizer| tokenizer.end_tokens().contains(&token));
    let ends = |token| !request.ignore_end && is_end(token);
    let is_stopped = tokens.iter().any(|&token| answer.take(token, ends(token), tokenizer, &mut outbox));
    answer.finish(if is_stopped { End::Stopped } else { End::Complete }, &mut outbox);
    outbox
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
