//! What is a rendered conversation? Its text, with what came from the client marked, and how its answer is read.

use super::marks::Unmark;
use super::output::{OutputFormat, OutputParser};
use std::borrow::Cow;

/// A rendered conversation, ready for [`crate::Tokenizer::encode_prompt`].
#[derive(Clone, Debug)]
pub struct Prompt {
    pub(super) marked: String,
    pub(super) unmark: Unmark,
    pub(super) output: OutputFormat,
}

impl Prompt {
    /// The text for a reader. Encoding it again would take a client's text for control tokens: encode the prompt.
    pub fn text(&self) -> String {
        self.unmark.text(&self.marked).into_owned()
    }

    /// Reads the answer to this prompt.
    pub fn parser(&self) -> OutputParser {
        OutputParser::new(self.output.clone())
    }

    pub(crate) fn marked(&self) -> &str {
        &self.marked
    }

    pub(crate) fn unmark<'t>(&self, text: &'t str) -> Cow<'t, str> {
        self.unmark.text(text)
    }
}
