//! Does a model find again what it has read? Prompts with notes scattered in other text, one asked for at the end.
//!
//! Perplexity cannot tell: most tokens are predicted well from those just before them, so a selection that has lost
//! every fact further back hardly shows in it. Here nothing but the fact helps, and a window without it must fail.

use super::loss::{LossError, cross_entropy, mean, standard_error};
use crate::sampler::greedy;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

/// Notes in a prompt; one of them is asked for.
const NOTES: usize = 4;
/// Digits of a code.
const CODE_DIGITS: u32 = 5;
/// Notes lie in this share of the filler, from its start, so that the question is far from all of them.
const NOTES_WITHIN: f64 = 0.7;

const ADJECTIVES: [&str; 16] = [
    "blue", "narrow", "copper", "quiet", "upper", "round", "wooden", "eastern", "heavy", "plain", "silver", "lower",
    "green", "double", "winter", "small",
];
const NOUNS: [&str; 16] = [
    "cabinet",
    "garage",
    "archive",
    "greenhouse",
    "workshop",
    "locker",
    "cellar",
    "office",
    "gate",
    "library",
    "kitchen",
    "harbour",
    "stable",
    "tower",
    "bakery",
    "museum",
];

/// What a prompt's text becomes.
pub trait Vocabulary {
    /// Tokens of plain text, with no begin token.
    ///
    /// # Errors
    /// Whatever the tokenizer says.
    fn encode(&self, text: &str) -> Result<Vec<u32>, String>;
    /// How many decimal digits the token writes.
    fn digits(&self, token: u32) -> u32;
}

/// Why prompts could not be made.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RecallError {
    /// The tokenizer's own.
    #[error("{0}")]
    Tokenizer(String),
    /// There is no room between the notes.
    #[error("recall prompts of {length} tokens are too short: notes and question take {taken}")]
    TooShort {
        /// Tokens of a prompt.
        length: usize,
        /// Tokens that are not filler.
        taken: usize,
    },
    /// The text runs out.
    #[error("the text has {have} tokens, the filler of one recall prompt takes {needed}")]
    TooLittleText {
        /// Tokens of text.
        have: usize,
        /// Tokens of filler.
        needed: usize,
    },
}

/// Which prompts are made.
#[derive(Clone, Debug)]
pub struct RecallShape {
    /// Tokens of a prompt, its answer included.
    pub length: usize,
    /// How many prompts.
    pub count: usize,
    /// Same seed, same prompts.
    pub seed: u64,
    /// What each begins with: the begin token, or nothing.
    pub prefix: Vec<u32>,
}

/// A question and its answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RecallPrompt {
    /// Everything up to and including the answer.
    pub tokens: Vec<u32>,
    /// Tokens of the answer, at the end.
    pub answer: usize,
    /// Digits that each token of the answer writes.
    pub digits: Vec<u32>,
}

/// What a model made of one prompt, teacher-forced.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Answered {
    /// Whether every token with a digit was the likeliest one.
    pub exact: bool,
    /// Share of the digits that were the likeliest ones.
    pub digits: f64,
    /// Mean log-probability of the tokens with a digit, in nats.
    pub log_probability: f64,
}

/// Many of them.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RecallSummary {
    /// Prompts answered.
    pub prompts: usize,
    /// Of these without a mistake.
    pub exact: usize,
    /// Share of digits that were right.
    pub digit_accuracy: f64,
    /// Mean over prompts, in nats.
    pub log_probability: f64,
    /// Of the mean log-probability, over prompts; `None` with one prompt.
    pub standard_error: Option<f64>,
}

impl RecallPrompt {
    /// Judges the `logits` of the tokens before each token of the answer, `[answer, vocab]`.
    ///
    /// # Errors
    /// Logits that are no numbers.
    ///
    /// # Panics
    /// When there is not a row for each token of the answer.
    pub fn judge(&self, logits: &[f32]) -> Result<Answered, LossError> {
        assert!(self.answer > 0 && logits.len().is_multiple_of(self.answer), "a row for each token of the answer");
        let rows = logits.chunks_exact(logits.len() / self.answer);
        let answer = &self.tokens[self.tokens.len() - self.answer..];
        let (mut right, mut losses) = (0, Vec::new());
        for ((row, &token), &digits) in rows.zip(answer).zip(&self.digits).filter(|(_, digits)| **digits > 0) {
            losses.push(cross_entropy(row, token)?);
            right += if greedy(row) == token { digits } else { 0 };
        }
        let all: u32 = self.digits.iter().sum();
        Ok(Answered { exact: right == all, digits: f64::from(right) / f64::from(all), log_probability: -mean(&losses) })
    }
}

impl RecallSummary {
    /// Sums up; `None` without any answer.
    pub fn new(answered: &[Answered]) -> Option<Self> {
        let logs: Vec<f64> = answered.iter().map(|one| one.log_probability).collect();
        (!answered.is_empty()).then(|| Self {
            prompts: answered.len(),
            exact: answered.iter().filter(|one| one.exact).count(),
            digit_accuracy: mean(&answered.iter().map(|one| one.digits).collect::<Vec<_>>()),
            log_probability: mean(&logs),
            standard_error: standard_error(&logs),
        })
    }
}

/// Makes prompts: filler from `documents` (tokens of each line, the line's end included), in it notes of the form
/// "The access code for the NAME is 12345.", and last "The access code for the NAME is" with its answer.
///
/// # Errors
/// Too little text, or no room.
pub fn recall_prompts(
    shape: &RecallShape,
    documents: &[Vec<Vec<u32>>],
    vocabulary: &dyn Vocabulary,
) -> Result<Vec<RecallPrompt>, RecallError> {
    let lines: Vec<&[u32]> = documents.iter().flatten().map(Vec::as_slice).filter(|line| !line.is_empty()).collect();
    let mut rng = ChaCha8Rng::seed_from_u64(shape.seed);
    (0..shape.count).map(|_| prompt(shape, &lines, vocabulary, &mut rng)).collect()
}

fn prompt(
    shape: &RecallShape,
    lines: &[&[u32]],
    vocabulary: &dyn Vocabulary,
    rng: &mut ChaCha8Rng,
) -> Result<RecallPrompt, RecallError> {
    let encode = |text: &str| vocabulary.encode(text).map_err(RecallError::Tokenizer);
    let names = names(rng);
    let codes: Vec<u32> = (0..NOTES).map(|_| 10_000 + below(rng, 90_000)).collect();
    let asked = below(rng, NOTES as u32) as usize;
    let mut notes = Vec::new();
    for (name, code) in names.iter().zip(&codes) {
        notes.push(encode(&format!("\nThe access code for the {name} is {code}.\n"))?);
    }
    let question = format!("\nThe access code for the {} is", names[asked]);
    let whole = encode(&format!("{question} {}", codes[asked]))?;
    // What the question and its answer have in common as tokens is the question.
    let shared = encode(&question)?.iter().zip(&whole).take_while(|(a, b)| a == b).count();
    let answer = whole.len() - shared;
    let digits: Vec<u32> = whole[shared..].iter().map(|&token| vocabulary.digits(token)).collect();
    if digits.iter().sum::<u32>() != CODE_DIGITS {
        return Err(RecallError::Tokenizer(format!("the tokenizer does not write {} with its digits", codes[asked])));
    }
    let taken = shape.prefix.len() + notes.iter().map(Vec::len).sum::<usize>() + whole.len();
    let too_short = RecallError::TooShort { length: shape.length, taken };
    let room = shape.length.checked_sub(taken).filter(|&room| room >= taken).ok_or(too_short)?;
    let filler = filler(lines, room, rng)?;
    let mut tokens = shape.prefix.clone();
    let starts = starts(&filler, rng);
    for (at, line) in filler.iter().enumerate() {
        for (note, _) in notes.iter().zip(&starts).filter(|(_, start)| **start == at) {
            tokens.extend(note);
        }
        tokens.extend_from_slice(line);
    }
    tokens.extend(&whole);
    Ok(RecallPrompt { tokens, answer, digits })
}

/// As many different names as there are notes, none sharing a word with another.
fn names(rng: &mut ChaCha8Rng) -> Vec<String> {
    let (mut adjectives, mut nouns) = (ADJECTIVES.to_vec(), NOUNS.to_vec());
    let mut take = |words: &mut Vec<&'static str>| words.swap_remove(below(rng, words.len() as u32) as usize);
    (0..NOTES).map(|_| format!("{} {}", take(&mut adjectives), take(&mut nouns))).collect()
}

/// Lines of just `room` tokens together, the last cut short, from a random line on.
fn filler<'a>(lines: &[&'a [u32]], room: usize, rng: &mut ChaCha8Rng) -> Result<Vec<&'a [u32]>, RecallError> {
    // Lines from which on there is enough text: all up to one.
    let mut have = 0;
    let enough = lines.iter().rev().position(|line| {
        have += line.len();
        have >= room
    });
    let too_little = RecallError::TooLittleText { have, needed: room };
    let starts = enough.and_then(|from_end| u32::try_from(lines.len() - from_end).ok()).ok_or(too_little)?;
    let (mut taken, mut left) = (Vec::new(), room);
    for line in &lines[below(rng, starts) as usize..] {
        let part = &line[..line.len().min(left)];
        left -= part.len();
        taken.push(part);
        if left == 0 {
            break;
        }
    }
    Ok(taken)
}

/// Before which line of the filler each note stands.
fn starts(filler: &[&[u32]], rng: &mut ChaCha8Rng) -> Vec<usize> {
    let room: usize = filler.iter().map(|line| line.len()).sum();
    let mut ends = 0;
    let early = filler.iter().take_while(|line| {
        ends += line.len();
        ends as f64 <= room as f64 * NOTES_WITHIN
    });
    let early = early.count().max(1) as u32;
    (0..NOTES).map(|_| below(rng, early) as usize).collect()
}

/// A random number below `n`; the bias of the remainder is below n / 2^64.
pub(super) fn below(rng: &mut ChaCha8Rng, n: u32) -> u32 {
    u32::try_from(rng.next_u64() % u64::from(n)).expect("the remainder is below n")
}

/// What a model sees of `tokens` that keeps only the first `sinks` and the last tokens, `size` in all, before it names
/// the last token: that one is not counted.
pub fn windowed(tokens: &[u32], sinks: usize, size: usize) -> Vec<u32> {
    let Some((last, seen)) = tokens.split_last() else { return Vec::new() };
    if seen.len() <= size {
        return tokens.to_vec();
    }
    let sinks = sinks.min(size);
    [&seen[..sinks], &seen[seen.len() - (size - sinks)..], &[*last]].concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One token for each byte.
    struct Bytes;

    impl Vocabulary for Bytes {
        fn encode(&self, text: &str) -> Result<Vec<u32>, String> {
            Ok(text.bytes().map(u32::from).collect())
        }

        fn digits(&self, token: u32) -> u32 {
            u32::from((48..58).contains(&token))
        }
    }

    fn made(length: usize, seed: u64) -> Result<Vec<RecallPrompt>, RecallError> {
        let line: Vec<u32> = "Nothing of note is in this line.\n".bytes().map(u32::from).collect();
        let documents = [vec![line.clone(); 100], vec![line; 50]];
        let shape = RecallShape { length, count: 20, seed, prefix: vec![1] };
        recall_prompts(&shape, &documents, &Bytes)
    }

    fn text(tokens: &[u32]) -> String {
        tokens.iter().map(|&token| char::from_u32(token).unwrap()).collect()
    }

    #[test]
    fn prompts_have_the_length_asked_for_and_hold_their_answer_once_more_far_back() {
        for prompt in made(1500, 3).unwrap() {
            assert_eq!((prompt.tokens.len(), prompt.tokens[0]), (1500, 1));
            let text = text(&prompt.tokens);
            let (before, question) = text.rsplit_once('\n').unwrap();
            assert!(before.find(&format!("{question}.")).unwrap() < 1100, "{text}");
            assert_eq!(text.matches("The access code for the ").count(), NOTES + 1);
            assert_eq!((prompt.answer, &prompt.digits[..]), (6, &[0, 1, 1, 1, 1, 1][..]));
        }
    }

    #[test]
    fn the_same_seed_makes_the_same_prompts_and_another_seed_others() {
        assert_eq!(made(1500, 3), made(1500, 3));
        assert_ne!(made(1500, 3), made(1500, 4));
        let prompts = made(1500, 3).unwrap();
        assert!(prompts.windows(2).all(|pair| pair[0] != pair[1]));
    }

    #[test]
    fn a_tokenizer_that_loses_digits_is_refused() {
        struct Deaf;
        impl Vocabulary for Deaf {
            fn encode(&self, text: &str) -> Result<Vec<u32>, String> {
                Ok(text.bytes().filter(|byte| !byte.is_ascii_digit()).map(u32::from).collect())
            }

            fn digits(&self, _: u32) -> u32 {
                0
            }
        }
        let shape = RecallShape { length: 1500, count: 1, seed: 1, prefix: Vec::new() };
        let refused = recall_prompts(&shape, &[vec![vec![9; 10]; 1000]], &Deaf).unwrap_err();
        assert!(refused.to_string().contains("digits"), "{refused}");
    }

    #[test]
    fn no_room_and_no_text_are_told_apart() {
        assert!(matches!(made(200, 3), Err(RecallError::TooShort { length: 200, .. })));
        assert!(matches!(made(9000, 3), Err(RecallError::TooLittleText { have: 4950, .. })));
    }

    #[test]
    fn a_text_of_just_the_tokens_needed_is_enough() {
        let lines: Vec<Vec<u32>> = vec![vec![1; 3], vec![2; 4]];
        let lines: Vec<&[u32]> = lines.iter().map(Vec::as_slice).collect();
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        assert_eq!(filler(&lines, 7, &mut rng).unwrap().concat(), [1, 1, 1, 2, 2, 2, 2]);
        let starts: Vec<u32> = (0..20).map(|_| filler(&lines, 4, &mut rng).unwrap()[0][0]).collect();
        assert!(starts.contains(&1) && starts.contains(&2), "{starts:?}");
        assert_eq!(filler(&lines, 8, &mut rng), Err(RecallError::TooLittleText { have: 7, needed: 8 }));
        assert!(filler(&[], 1, &mut rng).is_err());
    }

    #[test]
    fn answers_are_judged_digit_by_digit() {
        let prompt = RecallPrompt { tokens: vec![9, 0, 1, 2], answer: 3, digits: vec![0, 1, 3] };
        // The first token has no digit and does not count; the second, with 1 of the 4 digits, is right, the third not.
        let answered = prompt.judge(&[0., 5., 0., 0., 5., 0., 5., 0., 0.]).unwrap();
        assert_eq!((answered.exact, answered.digits), (false, 0.25));
        let likely = 5.0 - (5f64.exp() + 2.0).ln();
        let unlikely = -(5f64.exp() + 2.0).ln();
        assert!((answered.log_probability - f64::midpoint(likely, unlikely)).abs() < 1e-12);
        assert!(prompt.judge(&[0., 5., 0., 0., 5., 0., 0., 0., 5.]).unwrap().exact);
    }

    #[test]
    fn a_summary_counts_and_averages() {
        let answered = |exact, digits, log_probability| Answered { exact, digits, log_probability };
        let summary = RecallSummary::new(&[answered(true, 1.0, -1.0), answered(false, 0.5, -3.0)]).unwrap();
        assert_eq!((summary.prompts, summary.exact, summary.digit_accuracy), (2, 1, 0.75));
        assert_eq!((summary.log_probability, summary.standard_error), (-2.0, Some(1.0)));
        assert_eq!(RecallSummary::new(&[]), None);
    }

    #[test]
    fn a_window_keeps_the_sinks_the_end_and_the_token_to_name() {
        let tokens: Vec<u32> = (0..10).collect();
        assert_eq!(windowed(&tokens, 2, 5), [0, 1, 6, 7, 8, 9]);
        assert_eq!(windowed(&tokens, 2, 9), tokens);
        assert_eq!(windowed(&tokens, 4, 3), [0, 1, 2, 9]);
        assert_eq!(windowed(&[], 4, 3), [0u32; 0]);
    }
}
