//! How does an answer's text get to the listener? Tokens to characters, stop strings, reasoning and calls.

use crate::api::{Event, Reading};
use crate::stream::StopStrings;
use sparsed_model::{OutputEvent, OutputParser, TextStream, Tokenizer};
use std::collections::VecDeque;

/// The text of an answer on its way to the listener.
#[derive(Debug)]
pub(super) struct Answer {
    stream: TextStream,
    stops: StopStrings,
    parser: Option<OutputParser>,
    has_called: bool,
}

impl Answer {
    pub(super) fn new(reading: Option<Reading>, stops: Vec<String>) -> Self {
        let (parser, visible) = reading.map_or((None, Vec::new()), |r| (Some(r.parser), r.visible));
        Self { stream: TextStream::new(&visible), stops: StopStrings::new(stops), parser, has_called: false }
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
                    Event::ToolCall { index, name, arguments }
                }
            });
        }
    }

    /// Whether functions were called.
    pub(super) fn has_called(&self) -> bool {
        self.has_called
    }
}
