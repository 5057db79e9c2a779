//! Does a model find again what it has read? Contexts with notes scattered in other text, each asked for at the end.
//!
//! Perplexity cannot tell: most tokens are predicted well from those just before them, so a selection that has lost
//! every fact further back hardly shows in it. Here nothing but the fact helps, and a window without it must fail.

use super::loss::{LossError, cross_entropy, mean, standard_error};
use crate::sampler::greedy;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

/// Most notes in a context: no two share a word of their names.
pub const RECALL_NOTES_MAX: usize = ADJECTIVES.len();
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

/// Which contexts are made, and how often they are asked.
#[derive(Clone, Debug)]
pub struct RecallShape {
    /// Tokens of the longest prompt of each context, its answer included.
    pub length: usize,
    /// How many prompts: contexts are made until they have as many notes.
    pub count: usize,
    /// Notes in a context, 1 to [`RECALL_NOTES_MAX`]; each is asked for, in the last context as many as are left.
    pub notes: usize,
    /// Same seed, same contexts.
    pub seed: u64,
    /// What each begins with: the begin token, or nothing.
    pub prefix: Vec<u32>,
}

/// A text with notes, and what is asked about it: each question alone, right behind the text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RecallContext {
    /// What all prompts of the context begin with.
    pub tokens: Vec<u32>,
    /// Never empty.
    pub questions: Vec<RecallQuestion>,
}

/// A question and its answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RecallQuestion {
    /// What comes behind the context, up to and including the answer.
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
    /// Of that, over contexts: the questions about one text are not independent. `None` with one context.
    pub digit_accuracy_error: Option<f64>,
    /// Mean over prompts, in nats.
    pub log_probability: f64,
    /// Of that, over contexts.
    pub log_probability_error: Option<f64>,
}

impl RecallContext {
    /// The whole prompt that ends with `question` and its answer.
    pub fn prompt(&self, question: &RecallQuestion) -> Vec<u32> {
        [&self.tokens[..], &question.tokens].concat()
    }
}

impl RecallQuestion {
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
    /// Sums up what came of each context's questions; `None` without any answer.
    pub fn new(contexts: &[Vec<Answered>]) -> Option<Self> {
        let prompts: usize = contexts.iter().map(Vec::len).sum();
        if prompts == 0 {
            return None;
        }
        let of = |value: fn(&Answered) -> f64| {
            let all: Vec<f64> = contexts.iter().flatten().map(value).collect();
            let means: Vec<f64> = contexts
                .iter()
                .filter(|context| !context.is_empty())
                .map(|context| mean(&context.iter().map(value).collect::<Vec<_>>()))
                .collect();
            (mean(&all), standard_error(&means))
        };
        let (digit_accuracy, digit_accuracy_error) = of(|one| one.digits);
        let (log_probability, log_probability_error) = of(|one| one.log_probability);
        Some(Self {
            prompts,
            exact: contexts.iter().flatten().filter(|one| one.exact).count(),
            digit_accuracy,
            digit_accuracy_error,
            log_probability,
            log_probability_error,
        })
    }
}

/// Makes contexts: filler from `documents` (tokens of each line, the line's end included), in it notes of the form
/// "The access code for the NAME is 12345.", and for each note the question "The access code for the NAME is" with its
/// answer.
///
/// # Errors
/// Too little text, or no room.
///
/// # Panics
/// When `notes` is 0 or more than [`RECALL_NOTES_MAX`].
pub fn recall_contexts(
    shape: &RecallShape,
    documents: &[Vec<Vec<u32>>],
    vocabulary: &dyn Vocabulary,
) -> Result<Vec<RecallContext>, RecallError> {
    assert!((1..=RECALL_NOTES_MAX).contains(&shape.notes), "names for 1 to {RECALL_NOTES_MAX} notes");
    let lines: Vec<&[u32]> = documents.iter().flatten().map(Vec::as_slice).filter(|line| !line.is_empty()).collect();
    let mut rng = ChaCha8Rng::seed_from_u64(shape.seed);
    let mut contexts = Vec::new();
    let mut left = shape.count;
    while left > 0 {
        let mut context = context(shape, &lines, vocabulary, &mut rng)?;
        context.questions.truncate(left);
        left -= context.questions.len();
        contexts.push(context);
    }
    Ok(contexts)
}

/// One context, all its notes asked for. Their names are in random order, so any of them are a random choice.
fn context(
    shape: &RecallShape,
    lines: &[&[u32]],
    vocabulary: &dyn Vocabulary,
    rng: &mut ChaCha8Rng,
) -> Result<RecallContext, RecallError> {
    let names = names(shape.notes, rng);
    let codes: Vec<u32> = (0..shape.notes).map(|_| 10_000 + below(rng, 90_000)).collect();
    let (mut notes, mut questions) = (Vec::new(), Vec::new());
    for (name, &code) in names.iter().zip(&codes) {
        let note = vocabulary.encode(&format!("\nThe access code for the {name} is {code}.\n"));
        notes.push(note.map_err(RecallError::Tokenizer)?);
        questions.push(question(name, code, vocabulary)?);
    }
    let longest = questions.iter().map(|question| question.tokens.len()).max().unwrap_or(0);
    let taken = shape.prefix.len() + notes.iter().map(Vec::len).sum::<usize>() + longest;
    let too_short = RecallError::TooShort { length: shape.length, taken };
    let room = shape.length.checked_sub(taken).filter(|&room| room >= taken).ok_or(too_short)?;
    let filler = filler(lines, room, rng)?;
    let mut tokens = shape.prefix.clone();
    let starts = starts(&filler, shape.notes, rng);
    for (at, line) in filler.iter().enumerate() {
        for (note, _) in notes.iter().zip(&starts).filter(|(_, start)| **start == at) {
            tokens.extend(note);
        }
        tokens.extend_from_slice(line);
    }
    Ok(RecallContext { tokens, questions })
}

/// What asks for a note.
fn question(name: &str, code: u32, vocabulary: &dyn Vocabulary) -> Result<RecallQuestion, RecallError> {
    let encode = |text: &str| vocabulary.encode(text).map_err(RecallError::Tokenizer);
    let question = format!("\nThe access code for the {name} is");
    let tokens = encode(&format!("{question} {code}"))?;
    // What the question and its answer have in common as tokens is the question.
    let shared = encode(&question)?.iter().zip(&tokens).take_while(|(a, b)| a == b).count();
    let digits: Vec<u32> = tokens[shared..].iter().map(|&token| vocabulary.digits(token)).collect();
    if digits.iter().sum::<u32>() != CODE_DIGITS {
        return Err(RecallError::Tokenizer(format!("the tokenizer does not write {code} with its digits")));
    }
    Ok(RecallQuestion { answer: tokens.len() - shared, tokens, digits })
}

/// As many different names as there are notes, none sharing a word with another.
fn names(notes: usize, rng: &mut ChaCha8Rng) -> Vec<String> {
    let (mut adjectives, mut nouns) = (ADJECTIVES.to_vec(), NOUNS.to_vec());
    let mut take = |words: &mut Vec<&'static str>| words.swap_remove(below(rng, words.len() as u32) as usize);
    (0..notes).map(|_| format!("{} {}", take(&mut adjectives), take(&mut nouns))).collect()
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
fn starts(filler: &[&[u32]], notes: usize, rng: &mut ChaCha8Rng) -> Vec<usize> {
    let room: usize = filler.iter().map(|line| line.len()).sum();
    let mut ends = 0;
    let early = filler.iter().take_while(|line| {
        ends += line.len();
        ends as f64 <= room as f64 * NOTES_WITHIN
    });
    let early = early.count().max(1) as u32;
    (0..notes).map(|_| below(rng, early) as usize).collect()
}

/// A random number below `n`; the bias of the remainder is below n / 2^64.
pub(super) fn below(rng: &mut ChaCha8Rng, n: u32) -> u32 {
    u32::try_from(rng.next_u64() % u64::from(n)).expect("the remainder is below n")
}

/// What a model sees of `tokens` that keeps only the first `sinks` and the last, `size` in all.
pub fn windowed(tokens: &[u32], sinks: usize, size: usize) -> Vec<u32> {
    if tokens.len() <= size {
        return tokens.to_vec();
    }
    let sinks = sinks.min(size);
    [&tokens[..sinks], &tokens[tokens.len() - (size - sinks)..]].concat()
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

    fn made(length: usize, seed: u64) -> Result<Vec<RecallContext>, RecallError> {
        let line: Vec<u32> = "Nothing of note is in this line.\n".bytes().map(u32::from).collect();
        let documents = [vec![line.clone(); 100], vec![line; 50]];
        let shape = RecallShape { length, count: 18, notes: 4, seed, prefix: vec![1] };
        recall_contexts(&shape, &documents, &Bytes)
    }

    fn text(tokens: &[u32]) -> String {
        tokens.iter().map(|&token| char::from_u32(token).unwrap()).collect()
    }

    #[test]
    fn every_note_is_asked_for_once_and_the_last_context_as_often_as_prompts_are_left() {
        let contexts = made(1500, 3).unwrap();
        assert_eq!(contexts.iter().map(|context| context.questions.len()).collect::<Vec<_>>(), [4, 4, 4, 4, 2]);
        for context in &contexts {
            assert_eq!(text(&context.tokens).matches("The access code for the ").count(), 4);
            let longest = context.questions.iter().map(|question| context.prompt(question).len()).max();
            assert!(context.tokens[0] == 1 && longest <= Some(1500), "{longest:?}");
            let asked: Vec<String> = context.questions.iter().map(|question| text(&question.tokens)).collect();
            assert!((1..asked.len()).all(|i| !asked[..i].contains(&asked[i])), "{asked:?}");
        }
        // The longest question of all four makes the length.
        let longest = |context: &RecallContext| context.questions.iter().map(|one| context.prompt(one).len()).max();
        assert!(contexts[..4].iter().all(|context| longest(context) == Some(1500)));
    }

    #[test]
    fn prompts_hold_their_answer_once_more_far_back() {
        for context in made(1500, 3).unwrap() {
            for asked in &context.questions {
                let text = text(&context.prompt(asked));
                let (before, question) = text.rsplit_once('\n').unwrap();
                assert!(before.find(&format!("{question}.")).unwrap() < 1100, "{text}");
                assert_eq!((asked.answer, &asked.digits[..]), (6, &[0, 1, 1, 1, 1, 1][..]));
            }
        }
    }

    #[test]
    fn the_same_seed_makes_the_same_contexts_and_another_seed_others() {
        assert_eq!(made(1500, 3), made(1500, 3));
        assert_ne!(made(1500, 3), made(1500, 4));
        let contexts = made(1500, 3).unwrap();
        assert!(contexts.windows(2).all(|pair| pair[0] != pair[1]));
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
        let shape = RecallShape { length: 1500, count: 1, notes: 1, seed: 1, prefix: Vec::new() };
        let refused = recall_contexts(&shape, &[vec![vec![9; 10]; 1000]], &Deaf).unwrap_err();
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
        let prompt = RecallQuestion { tokens: vec![9, 0, 1, 2], answer: 3, digits: vec![0, 1, 3] };
        // The first token has no digit and does not count; the second, with 1 of the 4 digits, is right, the third not.
        let answered = prompt.judge(&[0., 5., 0., 0., 5., 0., 5., 0., 0.]).unwrap();
        assert_eq!((answered.exact, answered.digits), (false, 0.25));
        let likely = 5.0 - (5f64.exp() + 2.0).ln();
        let unlikely = -(5f64.exp() + 2.0).ln();
        assert!((answered.log_probability - f64::midpoint(likely, unlikely)).abs() < 1e-12);
        assert!(prompt.judge(&[0., 5., 0., 0., 5., 0., 0., 0., 5.]).unwrap().exact);
    }

    #[test]
    fn a_summary_counts_and_averages_prompts_with_errors_over_contexts() {
        let answered = |exact, digits, log_probability| Answered { exact, digits, log_probability };
        let first = vec![answered(true, 1.0, -1.0), answered(false, 0.5, -2.0)];
        let summary = RecallSummary::new(&[first.clone(), vec![answered(false, 0.0, -6.0)]]).unwrap();
        assert_eq!((summary.prompts, summary.exact, summary.digit_accuracy), (3, 1, 0.5));
        assert_eq!((summary.log_probability, summary.log_probability_error), (-3.0, Some(2.25)));
        assert_eq!(summary.digit_accuracy_error, Some(0.375));
        let one = RecallSummary::new(&[first]).unwrap();
        assert_eq!((one.log_probability, one.log_probability_error), (-1.5, None));
        assert_eq!(RecallSummary::new(&[]), None);
    }

    #[test]
    fn a_window_keeps_the_sinks_and_the_end() {
        let tokens: Vec<u32> = (0..10).collect();
        assert_eq!(windowed(&tokens, 2, 5), [0, 1, 7, 8, 9]);
        assert_eq!(windowed(&tokens, 2, 10), tokens);
        assert_eq!(windowed(&tokens, 4, 3), [0, 1, 2]);
        assert_eq!(windowed(&[], 4, 3), [0u32; 0]);
    }
}
