//! What may a session's journal say, after all that was done with it and heard of it?
//!
//! The model keeps what the session was after each verb. Of a turn while it is answered it knows the whole answer,
//! which is the naive model's: a journal may have any beginning of it that is no shorter than what was heard, or
//! committed.

use crate::model::Found;
use sparsed_engine::api::Owner;
use sparsed_engine::{Durability, SessionId};
use sparsed_session::{History, Outcome, TurnHistory};
use std::sync::Arc;

/// A session without what nobody could know: times, and the messages that its answers make.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Plain {
    pub(crate) turns: Vec<PlainTurn>,
    pub(crate) tokens: Vec<u32>,
    pub(crate) pinned: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct PlainTurn {
    /// Tokens it kept, where its prompt ends, where its answer ends.
    places: [usize; 3],
    request: Arc<[u8]>,
    /// `Interrupted` is none: both mean that nobody goes on with it.
    outcome: Option<Outcome>,
}

impl Plain {
    pub(crate) fn of(history: &History) -> Self {
        let turns = history.turns.iter().map(PlainTurn::of).collect();
        Self { turns, tokens: history.tokens.clone(), pinned: history.pinned }
    }

    pub(crate) fn begin(&mut self, kept: usize, new: &[u32], request: &[u8]) {
        self.tokens.truncate(kept);
        self.tokens.extend_from_slice(new);
        let end = self.tokens.len();
        self.turns.push(PlainTurn { places: [kept, end, end], request: request.into(), outcome: None });
    }

    /// Only the first turns, and the tokens that no later one had replaced.
    pub(crate) fn truncate(&mut self, n_turns: usize) {
        let kept = self.turns.drain(n_turns..).map(|turn| turn.places[0]).min().unwrap_or(usize::MAX);
        let end = self.turns.last().map_or(0, |turn| turn.places[2]);
        self.tokens.truncate(end.min(kept));
    }

    /// How the last turn ended, if it may go on, and whether the daemon has cut it.
    pub(crate) fn cut(&self) -> Option<Cut> {
        let turn = self.turns.last().filter(|turn| turn.places[2] == self.tokens.len())?;
        match turn.outcome {
            None => Some(Cut::ByDaemon),
            Some(Outcome::Cancelled) => Some(Cut::ByClient),
            Some(_) => None,
        }
    }
}

impl PlainTurn {
    fn of(turn: &TurnHistory) -> Self {
        Self {
            places: [turn.first_token, turn.prompt_end, turn.end_token].map(|at| at as usize),
            request: turn.request.as_slice().into(),
            outcome: turn.outcome.filter(|outcome| *outcome != Outcome::Interrupted),
        }
    }
}

/// Who has cut an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Cut {
    ByDaemon,
    ByClient,
}

/// What a session was after a verb.
#[derive(Clone, Debug)]
struct Version {
    said: Plain,
    /// While its last turn is answered: the whole answer, and what of it was surely written, and committed.
    answer: Option<(Arc<[u32]>, [Surely; 2])>,
}

/// What is known of an answer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Surely {
    /// Whether it was begun: its turn is not taken back any more.
    is_begun: bool,
    n_tokens: usize,
    is_complete: bool,
}

/// A session as the model knows it.
#[derive(Clone, Debug)]
pub(crate) struct Talk {
    pub(crate) owner: Owner,
    pub(crate) id: SessionId,
    pub(crate) durability: Durability,
    versions: Vec<Version>,
    /// The first version that may be found after a kill, and after a power cut.
    floors: [usize; 2],
    /// Whether it was to be deleted and the disk failed.
    pub(crate) doomed: bool,
    /// Whether it is to be looked at again, which the disk did not allow; and whether its last turn may be lost.
    pub(crate) unseen: Option<bool>,
}

impl Talk {
    /// One that survives a power cut like this.
    pub(crate) fn new(owner: Owner, id: SessionId, durability: Durability, said: Plain) -> Self {
        let versions = vec![Version { said, answer: None }];
        Self { owner, id, durability, versions, floors: [0, 0], doomed: false, unseen: None }
    }

    /// What it is now; without the tokens of an answer that is under way.
    pub(crate) fn said(&self) -> &Plain {
        &self.last().said
    }

    /// Whose it is, what it is called, and what it is now.
    pub(crate) fn name(&self) -> (Owner, SessionId, Plain) {
        (self.owner, self.id, self.said().clone())
    }

    fn last(&self) -> &Version {
        self.versions.last().expect("there is always one")
    }

    /// A turn is answered, of which `answer` is expected and its first `n_tokens` are there.
    pub(crate) fn answer(&mut self, said: Plain, answer: Arc<[u32]>, n_tokens: usize) {
        let surely = Surely { is_begun: n_tokens > 0, n_tokens, is_complete: false };
        self.versions.push(Version { said, answer: Some((answer, [surely; 2])) });
    }

    /// A verb has made this of it and said that it is committed.
    pub(crate) fn commit(&mut self, said: Plain) {
        self.versions = vec![Version { said, answer: None }];
        self.floors = [0, 0];
    }

    /// A verb has failed that would have made this of it.
    pub(crate) fn may_become(&mut self, said: Plain) {
        let now = self.last().clone();
        self.versions.extend([Version { said, answer: None }, now]);
    }

    /// The client has heard so much of the answer.
    pub(crate) fn heard(&mut self, n_tokens: usize, is_complete: bool) {
        let at = self.versions.len() - 1;
        let Some((_, surely)) = &mut self.versions[at].answer else { return };
        // The death of the process loses nothing that was heard; a power cut what the session's durability says.
        let kept = match self.durability {
            Durability::Token => Some((n_tokens, is_complete)),
            Durability::Turn if is_complete => Some((n_tokens, true)),
            Durability::Turn => Some((0, false)),
            Durability::None => None,
        };
        let kept = [Some((n_tokens, is_complete)), kept];
        for ((surely, floor), kept) in surely.iter_mut().zip(&mut self.floors).zip(kept) {
            let Some((n_tokens, is_complete)) = kept else { continue };
            surely.is_begun = true;
            surely.n_tokens = surely.n_tokens.max(n_tokens);
            surely.is_complete |= is_complete;
            *floor = at;
        }
    }

    /// The answer is over, and the store says this of the session. Answers whether it may; `may_be_lost`: the turn, or
    /// what came last of it, could not be journaled.
    pub(crate) fn settle(&mut self, found: Plain, may_be_lost: bool) -> bool {
        let at = self.versions.len() - 1;
        let is_last = self.versions[at].is(&found, 0);
        let may = is_last || may_be_lost && self.is_one_of(&found, 0);
        if !may {
            return false;
        }
        self.versions.push(Version { said: found, answer: None });
        self.unseen = None;
        true
    }

    /// The store has this after it was killed, or after a power cut. Answers whether it may.
    pub(crate) fn is_found(&mut self, found: Plain, how: Found) -> bool {
        let which = usize::from(how == Found::AfterPowerCut);
        self.unseen = None;
        if !self.is_one_of(&found, which) {
            return false;
        }
        if how == Found::AfterPowerCut {
            self.commit(found);
        } else {
            // A power cut may still bring back what came before, or what was cut off.
            self.floors[0] = self.versions.len();
            self.versions.push(Version { said: found, answer: None });
        }
        true
    }

    fn is_one_of(&self, found: &Plain, which: usize) -> bool {
        self.versions[self.floors[which]..].iter().any(|version| version.is(found, which))
    }

    /// For reports.
    pub(crate) fn describe(&self, found: &Plain) -> String {
        let brief = |said: &Plain| {
            let turns: Vec<_> = said.turns.iter().map(|turn| (turn.places, turn.outcome)).collect();
            format!("{} tokens, pinned: {}, {turns:?}", said.tokens.len(), said.pinned)
        };
        let versions: Vec<String> = self
            .versions
            .iter()
            .map(|version| {
                format!("{} {:?}", brief(&version.said), version.answer.as_ref().map(|(a, s)| (a.len(), *s)))
            })
            .collect();
        let said = found.turns.last().map(|turn| &found.tokens[turn.places[1].min(found.tokens.len())..]);
        let expected = self.last().answer.as_ref().map(|(answer, _)| answer);
        let turn = format!("last answer {said:?} of {expected:?}");
        format!(
            "{:?} {:?} has {}; {turn}; floors {:?} of {versions:#?}",
            self.durability,
            self.id,
            brief(found),
            self.floors
        )
    }
}

impl Version {
    /// Whether a turn that has said nothing was taken back; the tokens that it had replaced are not there any more.
    fn is_taken_back(&self, found: &Plain) -> bool {
        let mut before = self.said.clone();
        before.truncate(before.turns.len() - 1);
        before == *found
    }

    fn is(&self, found: &Plain, which: usize) -> bool {
        let Some((answer, surely)) = &self.answer else { return self.said == *found };
        if !surely[which].is_begun && self.is_taken_back(found) {
            return true;
        }
        let (Some(last), Some(begun)) = (found.turns.last(), self.said.turns.last()) else { return false };
        let n_turns = self.said.turns.len();
        let [kept, prompt_end, end] = last.places;
        let Some(n_tokens) = end.checked_sub(prompt_end).filter(|n| *n <= answer.len()) else { return false };
        let is_complete = last.outcome == Some(Outcome::Complete);
        found.turns[..n_turns.min(found.turns.len()) - 1] == self.said.turns[..n_turns - 1]
            && found.turns.len() == n_turns
            && found.pinned == self.said.pinned
            && (kept, prompt_end, &last.request) == (begun.places[0], begun.places[1], &begun.request)
            && found.tokens.len() == end
            && found.tokens[..prompt_end] == self.said.tokens[..prompt_end]
            && found.tokens[prompt_end..] == answer[..n_tokens]
            && n_tokens >= surely[which].n_tokens
            && (is_complete || !surely[which].is_complete)
            && (!is_complete || n_tokens == answer.len())
    }
}
