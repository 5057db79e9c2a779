//! What was said in a session, and where is it in the tokens?
//!
//! [`History`] is what a replay of a journal gives. Live verbs change it by the same records, so that memory and disk
//! cannot come to differ in what a record means.

use crate::limits::{MESSAGE_BYTES_MAX, RECORD_TOKENS_MAX, SAMPLING_BYTES_MAX, SESSION_TOKENS_MAX, SESSION_TURNS_MAX};
use crate::record::{Create, Record, Turn};
use serde::{Deserialize, Serialize};

/// When is what was journaled on the disk for good?
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Durability {
    /// After every flush: a power cut loses nothing that was sent.
    Token,
    /// After the flush of a turn's begin and of its end: a power cut may lose the tokens of a running turn.
    #[default]
    Turn,
    /// When the system gets to it: a power cut may lose everything since the session was made.
    None,
}

/// What happens when the context is full? The store only keeps the answer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum ContextFull {
    /// The request is refused.
    #[default]
    Error,
    /// The oldest turns are left out of the prompt, the system prompt stays.
    TruncateOldest,
}

/// What a session's owner may choose.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Settings {
    /// What a power cut may lose.
    pub durability: Durability,
    /// What to do when the context is full.
    pub context_full: ContextFull,
}

/// How did a turn end?
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Outcome {
    /// The answer is whole.
    Complete,
    /// It was cut and may be resumed.
    Interrupted,
    /// Nobody wanted the rest.
    Cancelled,
    /// It could not be computed.
    Failed,
}

/// What may be done with a session?
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// A turn may begin.
    Idle,
    /// Tokens of the last turn are coming.
    Answering,
    /// The last turn was cut; it may be resumed.
    Interrupted,
}

/// One turn: what was asked, and what became of it.
///
/// Positions are those of the time of the turn: a later turn that keeps fewer tokens replaces tokens from there on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TurnHistory {
    /// When it began, seconds since 1970.
    pub at: u64,
    /// Tokens before it that it has kept.
    pub first_token: u32,
    /// Where its prompt ends.
    pub prompt_end: u32,
    /// Where its answer ends.
    pub end_token: u32,
    /// The request, as the caller wrote it.
    pub request: Vec<u8>,
    /// The sampling parameters, as the caller wrote them.
    pub sampling: Vec<u8>,
    /// How it ended; `None` while it is answered, or where it was cut.
    pub outcome: Option<Outcome>,
    /// The answer, as the caller wrote it at the end.
    pub answer: Vec<u8>,
}

impl TurnHistory {
    /// That it can have been one: an imported file may say anything.
    fn check(&self) -> Result<(), Misfit> {
        let Self { first_token, prompt_end, end_token, request, sampling, answer, .. } = self;
        let is_in_order = first_token <= prompt_end && prompt_end <= end_token;
        let is_small = request.len().max(answer.len()) <= MESSAGE_BYTES_MAX && sampling.len() <= SAMPLING_BYTES_MAX;
        match is_in_order && *end_token as usize <= SESSION_TOKENS_MAX && is_small {
            true => Ok(()),
            false => Err(Misfit("a turn is larger than one can be, or ends before it begins")),
        }
    }
}

/// Everything of a session.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct History {
    /// Whose it is.
    pub owner: u64,
    /// When it was made, seconds since 1970.
    pub created: u64,
    /// When a turn last began or ended, seconds since 1970.
    pub used: u64,
    /// The model's name.
    pub model: String,
    /// Which model it is.
    pub fingerprint: [u8; 32],
    /// What it is about.
    pub title: String,
    /// What its owner chose.
    pub settings: Settings,
    /// Whether its files are the last to go.
    pub pinned: bool,
    /// All tokens, the first one first.
    pub tokens: Vec<u32>,
    /// All turns, the first one first.
    pub turns: Vec<TurnHistory>,
}

/// A record that makes no sense after those before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Misfit(pub(crate) &'static str);

impl History {
    /// Whether the last turn was cut, or is being answered, and may go on.
    pub fn is_open(&self) -> bool {
        self.turns.last().is_some_and(|turn| {
            matches!(turn.outcome, None | Some(Outcome::Interrupted)) && turn.end_token as usize == self.tokens.len()
        })
    }

    /// Whether more may come of the last turn: it is open, or whoever asked has left it.
    pub(crate) fn may_go_on(&self) -> bool {
        let is_left = |turn: &TurnHistory| turn.outcome == Some(Outcome::Cancelled);
        let is_last = |turn: &TurnHistory| turn.end_token as usize == self.tokens.len();
        self.is_open() || self.turns.last().is_some_and(|turn| is_left(turn) && is_last(turn))
    }

    /// Tokens that stay valid when only the first `n_turns` turns are kept: what no later turn has replaced.
    pub(crate) fn tokens_after(&self, n_turns: usize) -> usize {
        let end = n_turns.checked_sub(1).and_then(|last| self.turns.get(last)).map_or(0, |turn| turn.end_token);
        let kept = self.turns.iter().skip(n_turns).map(|turn| turn.first_token).min().unwrap_or(u32::MAX);
        (end.min(kept) as usize).min(self.tokens.len())
    }

    /// The first record's history.
    pub(crate) fn new(create: Create) -> Self {
        let Create { owner, created, used, model, fingerprint, title, settings, pinned } = create;
        Self {
            owner,
            created,
            used,
            model,
            fingerprint,
            title,
            settings,
            pinned,
            tokens: Vec::new(),
            turns: Vec::new(),
        }
    }

    /// What `record` makes of it.
    ///
    /// # Errors
    /// When the record does not fit; nothing has changed then.
    pub(crate) fn apply(&mut self, record: &Record) -> Result<(), Misfit> {
        match record {
            Record::Create(_) => return Err(Misfit("a session is made once")),
            Record::Turn(turn) => self.begin(turn)?,
            Record::Tokens(ids) => {
                self.check_room(ids.len())?;
                let n_tokens = self.tokens.len() + ids.len();
                let turn = self.open_turn()?;
                turn.end_token = position(n_tokens);
                turn.outcome = None;
                self.tokens.extend_from_slice(ids);
            }
            Record::End { at, outcome, answer } => {
                let turn = self.open_turn()?;
                turn.outcome = Some(*outcome);
                turn.answer.clone_from(answer);
                self.used = *at;
            }
            Record::Truncate { n_turns, n_tokens } => {
                let (n_turns, n_tokens) = (*n_turns as usize, *n_tokens as usize);
                if n_turns > self.turns.len() || n_tokens > self.tokens.len() {
                    return Err(Misfit("there is less than is to be kept"));
                }
                self.turns.truncate(n_turns);
                self.tokens.truncate(n_tokens);
            }
            Record::Rename { title } => self.title.clone_from(title),
            Record::Pin { pinned } => self.pinned = *pinned,
            Record::Settings(settings) => self.settings = *settings,
            Record::Kept(ids) => {
                if !self.turns.is_empty() {
                    return Err(Misfit("kept tokens come before kept turns"));
                }
                self.check_room(ids.len())?;
                self.tokens.extend_from_slice(ids);
            }
            Record::Past(turn) => {
                self.check_turns()?;
                turn.check()?;
                self.turns.push(turn.clone());
            }
        }
        Ok(())
    }

    /// The shortest list of records that gives this history.
    pub(crate) fn records(&self) -> Vec<Record> {
        let mut records = vec![Record::Create(Create {
            owner: self.owner,
            created: self.created,
            used: self.used,
            model: self.model.clone(),
            fingerprint: self.fingerprint,
            title: self.title.clone(),
            settings: self.settings,
            pinned: self.pinned,
        })];
        records.extend(self.tokens.chunks(RECORD_TOKENS_MAX).map(|ids| Record::Kept(ids.to_vec())));
        records.extend(self.turns.iter().cloned().map(Record::Past));
        records
    }

    fn begin(&mut self, turn: &Turn) -> Result<(), Misfit> {
        let kept = turn.keep_tokens as usize;
        if kept > self.tokens.len() {
            return Err(Misfit("there are fewer tokens than are to be kept"));
        }
        self.check_turns()?;
        if kept + turn.prompt.len() > SESSION_TOKENS_MAX {
            return Err(Misfit("too many tokens"));
        }
        if let Some(last) = self.turns.last_mut() {
            last.outcome.get_or_insert(Outcome::Interrupted);
        }
        self.tokens.truncate(kept);
        self.tokens.extend_from_slice(&turn.prompt);
        let prompt_end = position(self.tokens.len());
        self.turns.push(TurnHistory {
            at: turn.at,
            first_token: turn.keep_tokens,
            prompt_end,
            end_token: prompt_end,
            request: turn.request.clone(),
            sampling: turn.sampling.clone(),
            outcome: None,
            answer: Vec::new(),
        });
        self.used = turn.at;
        Ok(())
    }

    fn open_turn(&mut self) -> Result<&mut TurnHistory, Misfit> {
        if !self.may_go_on() {
            return Err(Misfit("no turn is being answered"));
        }
        self.turns.last_mut().ok_or(Misfit("there is no turn"))
    }

    fn check_room(&self, n_more: usize) -> Result<(), Misfit> {
        let fits = self.tokens.len().checked_add(n_more).is_some_and(|n_tokens| n_tokens <= SESSION_TOKENS_MAX);
        if fits { Ok(()) } else { Err(Misfit("too many tokens")) }
    }

    fn check_turns(&self) -> Result<(), Misfit> {
        if self.turns.len() < SESSION_TURNS_MAX { Ok(()) } else { Err(Misfit("too many turns")) }
    }
}

fn position(n_tokens: usize) -> u32 {
    u32::try_from(n_tokens).expect("SESSION_TOKENS_MAX is below 2^32")
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn empty() -> History {
        History::new(Create {
            owner: 1000,
            created: 1,
            used: 1,
            model: "tiny".into(),
            fingerprint: [9; 32],
            title: "a title".into(),
            settings: Settings::default(),
            pinned: false,
        })
    }

    pub(crate) fn turn(keep_tokens: u32, prompt: &[u32]) -> Record {
        let (request, sampling) = (b"request".to_vec(), b"sampling".to_vec());
        Record::Turn(Turn { at: 5, keep_tokens, prompt: prompt.to_vec(), request, sampling })
    }

    pub(crate) fn end(outcome: Outcome) -> Record {
        Record::End { at: 6, outcome, answer: b"answer".to_vec() }
    }

    fn after(records: &[Record]) -> History {
        let mut history = empty();
        records.iter().for_each(|record| history.apply(record).unwrap());
        history
    }

    #[test]
    fn a_turn_knows_where_its_tokens_are() {
        let first = [turn(0, &[1, 2]), Record::Tokens(vec![3, 4]), end(Outcome::Complete)];
        let second = [turn(3, &[5]), Record::Tokens(vec![6])];
        let history = after(&[first.as_slice(), &second].concat());
        assert_eq!(history.tokens, [1, 2, 3, 5, 6]);
        let places = |at: usize| {
            let turn = &history.turns[at];
            (turn.first_token, turn.prompt_end, turn.end_token, turn.outcome)
        };
        assert_eq!((places(0), places(1)), ((0, 2, 4, Some(Outcome::Complete)), (3, 4, 5, None)));
        assert!(history.is_open());
    }

    #[test]
    fn after_a_cut_only_tokens_that_no_later_turn_replaced_are_valid() {
        let one = [turn(0, &[1, 2]), Record::Tokens(vec![3, 4]), end(Outcome::Complete)];
        let two = [turn(3, &[5]), end(Outcome::Complete), turn(4, &[6]), end(Outcome::Complete)];
        let history = after(&[one.as_slice(), &two].concat());
        let kept: Vec<usize> = (0..=3).map(|n_turns| history.tokens_after(n_turns)).collect();
        assert_eq!(kept, [0, 3, 4, 5]);
    }

    #[test]
    fn a_cut_turn_may_go_on_and_an_ended_one_may_not() {
        let mut history = after(&[turn(0, &[1]), Record::Tokens(vec![2]), end(Outcome::Interrupted)]);
        assert!(history.is_open());
        history.apply(&Record::Tokens(vec![3])).unwrap();
        history.apply(&end(Outcome::Complete)).unwrap();
        let before = history.clone();
        assert!(history.apply(&Record::Tokens(vec![4])).is_err() && history.apply(&end(Outcome::Failed)).is_err());
        assert!(history.apply(&turn(4, &[4])).is_err() && history.apply(&Record::Kept(vec![1])).is_err());
        assert!(history.apply(&Record::Truncate { n_turns: 2, n_tokens: 0 }).is_err());
        let past = |first_token, prompt_end, end_token, sampling| {
            let turn = before.turns[0].clone();
            Record::Past(TurnHistory { first_token, prompt_end, end_token, sampling, ..turn })
        };
        for (first, prompt, end, n_sampling) in [(2, 1, 3, 0), (0, 3, 2, 0), (0, 1, u32::MAX, 0), (0, 1, 2, 2 << 20)] {
            assert!(
                history.apply(&past(first, prompt, end, vec![b' '; n_sampling])).is_err(),
                "{first} {prompt} {end}"
            );
        }
        assert_eq!(history, before, "a refused record has changed something");
    }

    #[test]
    fn the_shortest_records_give_the_same_history() {
        let one = [turn(0, &[1, 2]), Record::Tokens(vec![3, 4]), end(Outcome::Complete), turn(1, &[7])];
        let two = [Record::Pin { pinned: true }, Record::Rename { title: "é".into() }, Record::Tokens(vec![8])];
        let history = after(&[one.as_slice(), &two].concat());
        let records = history.records();
        let Record::Create(create) = &records[0] else { panic!("{records:?}") };
        let mut again = History::new(create.clone());
        records[1..].iter().for_each(|record| again.apply(record).unwrap());
        assert_eq!(again, history);
    }
}
