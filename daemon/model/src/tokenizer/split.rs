//! How is text cut before BPE? By the patterns of the models' own tokenizers, in linear time.
//!
//! The published patterns end in `\s+(?!\S)|\s+`: whitespace, but not its last character when a word follows. The
//! crate `regex` has no look-around, and engines that have it backtrack: a megabyte of spaces exceeds their limits.
//! So the two alternatives become one `\s+`, and what look-ahead would have left is given back here by hand.

use crate::ModelError;
use regex::Regex;

/// GPT-2's pattern; also what `ByteLevel` with `use_regex` means.
pub(super) const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
/// Each digit for itself: `Digits` with `individual_digits`.
pub(super) const DIGITS: &str = r"\p{N}";
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const DEEPSEEK3: [&str; 3] = [
    r"\p{N}{1,3}",
    r"[一-龥぀-ゟ゠-ヿ]+",
    r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"##,
];

const LOOK_AHEAD: &str = r"\s+(?!\S)|\s+";

/// The patterns behind a GGUF file's `tokenizer.ggml.pre`, in the order in which they cut; `None` for unknown names.
pub(super) fn named(pre: &str) -> Option<&'static [&'static str]> {
    Some(match pre {
        "default" | "gpt-2" | "gpt2" => &[GPT2],
        "smollm" => &[DIGITS, GPT2],
        // The pattern of GLM-4 and GLM-5 is Llama 3's.
        "llama-bpe" | "llama3" | "llama-v3" | "glm4" | "glm5" | "chatglm-bpe" => &[LLAMA3],
        "qwen2" | "deepseek-r1-qwen" => &[QWEN2],
        "deepseek-v3" => &DEEPSEEK3,
        _ => return None,
    })
}

/// What else the name of a pre-tokenizer means, since a GGUF does not say it: as the models' own `tokenizer.json` have
/// it. Whether text is normalised (NFC), and whether a piece that is a token stays one although no merges lead to it.
pub(super) fn habits(pre: &str) -> (bool, bool) {
    let whole_pieces = ["llama-bpe", "llama3", "llama-v3", "glm4", "glm5"];
    (matches!(pre, "qwen2" | "deepseek-r1-qwen"), whole_pieces.contains(&pre))
}

/// Cuts text, one pattern after the other; what a pattern does not match is a piece as well.
#[derive(Debug, PartialEq)]
pub(super) struct Splitter {
    steps: Vec<Step>,
}

#[derive(Debug)]
struct Step {
    regex: Regex,
    /// Whether the pattern ended in [`LOOK_AHEAD`].
    look_ahead: bool,
    /// Whether runs of whitespace up to a newline have an alternative of their own.
    newlines: bool,
}

/// Steps are the same when they cut by the same pattern.
impl PartialEq for Step {
    fn eq(&self, other: &Self) -> bool {
        let own = |step: &Self| (step.look_ahead, step.newlines);
        own(self) == own(other) && self.regex.as_str() == other.regex.as_str()
    }
}

impl Splitter {
    /// # Errors
    /// A pattern that needs another look-around than the one at the end.
    pub(super) fn new<'p>(patterns: impl IntoIterator<Item = &'p str>) -> Result<Self, ModelError> {
        let steps = patterns.into_iter().map(Step::new).collect::<Result<_, _>>()?;
        Ok(Self { steps })
    }

    /// Calls `emit` with each piece of `text`, in order and without gaps.
    pub(super) fn split<E>(&self, text: &str, emit: &mut dyn FnMut(&str) -> Result<(), E>) -> Result<(), E> {
        split(&self.steps, text, emit)
    }
}

fn split<E>(steps: &[Step], text: &str, emit: &mut dyn FnMut(&str) -> Result<(), E>) -> Result<(), E> {
    let Some((step, later)) = steps.split_first() else {
        return if text.is_empty() { Ok(()) } else { emit(text) };
    };
    let mut done = 0;
    while let Some((start, end)) = step.find(text, done) {
        split(later, &text[done..start], emit)?;
        split(later, &text[start..end], emit)?;
        done = end;
    }
    split(later, &text[done..], emit)
}

impl Step {
    fn new(pattern: &str) -> Result<Self, ModelError> {
        // DeepSeek's tokenizer.json has the characters themselves.
        let pattern = &pattern.replace('\r', r"\r").replace('\n', r"\n");
        let look_ahead = pattern.ends_with(LOOK_AHEAD);
        let plain = pattern.strip_suffix(LOOK_AHEAD).map_or_else(|| pattern.to_owned(), |rest| format!(r"{rest}\s+"));
        let regex = Regex::new(&plain).map_err(|error| ModelError::Tokenizer(format!("pattern {pattern}: {error}")))?;
        Ok(Self { regex, look_ahead, newlines: pattern.contains(r"\s*[\r\n]+") })
    }

    /// The next match at or after `from`; never empty.
    fn find(&self, text: &str, from: usize) -> Option<(usize, usize)> {
        let found = self.regex.find_at(text, from)?;
        let (start, end) = (found.start(), found.end());
        let last = found.as_str().chars().next_back()?;
        let by_newline = self.newlines && matches!(last, '\r' | '\n');
        let word_follows = text[end..].chars().next().is_some_and(|c| !c.is_whitespace());
        let shorter = end - last.len_utf8();
        let gives_back = self.look_ahead
            && word_follows
            && !by_newline
            && shorter > start
            && found.as_str().chars().all(char::is_whitespace);
        Some((start, if gives_back { shorter } else { end }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pieces(pre: &str, text: &str) -> Vec<String> {
        let mut pieces = Vec::new();
        let splitter = Splitter::new(named(pre).unwrap().iter().copied()).unwrap();
        let emitted: Result<(), ()> = splitter.split(text, &mut |piece| {
            pieces.push(piece.to_owned());
            Ok(())
        });
        emitted.unwrap();
        pieces
    }

    #[test]
    fn the_last_space_goes_with_the_word_that_follows() {
        assert_eq!(pieces("gpt-2", "a   b  "), ["a", "  ", " b", "  "]);
        assert_eq!(pieces("gpt-2", "a\n\n b"), ["a", "\n\n", " b"]);
        assert_eq!(pieces("llama-bpe", "a  \n\n  b"), ["a", "  \n\n", " ", " b"]);
        assert_eq!(pieces("gpt-2", "x\u{3000}\u{3000}y"), ["x", "\u{3000}", "\u{3000}", "y"]);
    }

    #[test]
    fn a_newline_in_a_pattern_is_read_however_it_is_written() {
        let literal = named("llama-bpe").unwrap()[0].replace(r"\r", "\r").replace(r"\n", "\n");
        let splitter = Splitter::new([literal.as_str()]).unwrap();
        let mut pieces = Vec::new();
        let emitted: Result<(), ()> = splitter.split("a,\n\nb", &mut |piece| {
            pieces.push(piece.to_owned());
            Ok(())
        });
        assert_eq!((emitted, pieces), (Ok(()), vec!["a".to_owned(), ",\n\n".to_owned(), "b".to_owned()]));
        let step = &splitter.steps[0];
        assert!(step.newlines && step.look_ahead);
    }

    #[test]
    fn digits_are_cut_as_each_model_cuts_them() {
        assert_eq!(pieces("smollm", "in 2024"), ["in", " ", "2", "0", "2", "4"]);
        assert_eq!(pieces("glm4", "in 2024"), ["in", " ", "202", "4"]);
        assert_eq!(pieces("deepseek-v3", "12345世界！ foo_bar"), ["123", "45", "世界", "！", " foo", "_bar"]);
    }

    #[test]
    fn a_megabyte_of_one_kind_is_cut_in_one_pass() {
        for c in [" ", "\n", "a", "1", "，", "\t x"] {
            let text = c.repeat((1 << 20) / c.len());
            assert_eq!(pieces("llama-bpe", &text).concat().len(), text.len());
            assert_eq!(pieces("deepseek-v3", &text).concat().len(), text.len());
        }
    }

    #[test]
    fn other_look_around_is_refused() {
        assert!(Splitter::new(["(?<=a)b"]).unwrap_err().to_string().contains("(?<=a)b"));
        assert_eq!(named("kimi-k2"), None);
    }
}
