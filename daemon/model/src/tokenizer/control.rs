//! Which strings stand for one token in a rendered template?
//!
//! Control tokens and other added tokens are found whole, the longest of those that begin together, in one pass.

use crate::ModelError;
use aho_corasick::{AhoCorasick, MatchKind};
use std::collections::{BTreeSet, HashSet};

/// Characters before or after the words of a control token that are looked at for its insides.
const FRAME_CHARS_MAX: usize = 3;

/// The control tokens of a vocabulary.
#[derive(Debug)]
pub(crate) struct ControlTokens {
    finder: AhoCorasick,
    /// By pattern of `finder`.
    ids: Vec<u32>,
    frame: Vec<char>,
    insides: HashSet<String>,
}

impl ControlTokens {
    /// # Errors
    /// More or longer names than the automaton takes.
    pub(crate) fn new(tokens: &[(&str, u32)]) -> Result<Self, ModelError> {
        let finder = AhoCorasick::builder()
            .match_kind(MatchKind::LeftmostLongest)
            .build(tokens.iter().map(|(name, _)| name))
            .map_err(|error| ModelError::Tokenizer(format!("control tokens: {error}")))?;
        let frame: BTreeSet<char> = tokens.iter().flat_map(|(name, _)| frame_of(name)).collect();
        let frame: Vec<char> = frame.into_iter().collect();
        let mut insides = HashSet::new();
        for (name, _) in tokens {
            let words = |inside: &&str| inside.contains(char::is_alphanumeric) && !inside.contains(&frame[..]);
            insides.extend(insides_of(name).filter(words).map(str::to_owned));
        }
        Ok(Self { finder, ids: tokens.iter().map(|(_, id)| *id).collect(), frame, insides })
    }

    /// Where control tokens stand in `text`, in order: begin, end, id.
    pub(crate) fn find<'s>(&'s self, text: &'s str) -> impl Iterator<Item = (usize, usize, u32)> + 's {
        self.finder.find_iter(text).map(|found| (found.start(), found.end(), self.ids[found.pattern().as_usize()]))
    }

    /// Characters of which each control token has one at its begin or end, ascending. A text in which none of them
    /// occurs holds no control token.
    pub(crate) fn frame(&self) -> &[char] {
        &self.frame
    }

    /// Whether `text` is what a control token is without its frame, as `im_end` of `<|im_end|>`.
    pub(crate) fn is_inside(&self, text: &str) -> bool {
        self.insides.contains(text)
    }
}

/// The first and the last character of a control token where they are punctuation; else its first that is not
/// whitespace. Characters that JSON escapes are left out: they must stay visible to a template's `tojson`.
fn frame_of(name: &str) -> Vec<char> {
    let usable = |c: &char| !c.is_whitespace() && !c.is_control() && !matches!(c, '"' | '\\');
    let ends = [name.chars().next(), name.chars().next_back()];
    let marks: Vec<char> = ends.into_iter().flatten().filter(|c| usable(c) && !c.is_alphanumeric()).collect();
    if marks.is_empty() { name.chars().find(usable).into_iter().collect() } else { marks }
}

/// `name` without some of the punctuation around it.
fn insides_of(name: &str) -> impl Iterator<Item = &str> {
    let marks = |chars: &mut dyn Iterator<Item = char>| -> Vec<usize> {
        let widths = chars.take_while(|c| !c.is_alphanumeric()).take(FRAME_CHARS_MAX);
        std::iter::once(0)
            .chain(widths.scan(0, |sum, c| {
                *sum += c.len_utf8();
                Some(*sum)
            }))
            .collect()
    };
    let (left, right) = (marks(&mut name.chars()), marks(&mut name.chars().rev()));
    left.into_iter().flat_map(move |from| {
        let right = right.clone();
        right.into_iter().filter_map(move |until| name.get(from..name.len().checked_sub(until)?))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_of_those_that_begin_together_is_found() {
        let control = ControlTokens::new(&[("<a>", 1), ("<a>>", 2), ("[b]", 3)]).unwrap();
        let found: Vec<_> = control.find("x<a>>[b]<a>").collect();
        assert_eq!(found, [(1, 5, 2), (5, 8, 3), (8, 11, 1)]);
        assert_eq!(ControlTokens::new(&[]).unwrap().find("<a>").count(), 0);
    }

    #[test]
    fn frames_and_insides() {
        let control = ControlTokens::new(&[("<|im_end|>", 1), ("/nothink", 2), ("EOT", 3), ("  ", 4)]).unwrap();
        assert_eq!(control.frame(), ['/', '<', '>', 'E']);
        assert!(["im_end", "|im_end", "im_end|", "nothink"].iter().all(|text| control.is_inside(text)));
        assert!(!["im", "", "|", "end"].iter().any(|text| control.is_inside(text)));
    }
}
