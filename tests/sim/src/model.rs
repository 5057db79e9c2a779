//! What would a session store answer that never loses anything, and what may one answer after a power cut?

use sparsed_session::{Durability, History, Outcome, SessionId, Settings, State, TurnHistory};
use std::sync::Arc;

/// Everything of a session that a client could see.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Said {
    /// What it is about.
    pub title: String,
    /// Whether its files are the last to go.
    pub pinned: bool,
    /// What its owner chose.
    pub settings: Settings,
    /// All tokens.
    pub tokens: Vec<u32>,
    /// All turns.
    pub turns: Vec<SaidTurn>,
}

/// One turn.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SaidTurn {
    /// Tokens it kept, where its prompt ends, where its answer ends.
    pub places: [usize; 3],
    /// The request and the answer.
    pub texts: [Arc<[u8]>; 2],
    /// How it ended.
    pub outcome: Option<Outcome>,
}

/// A session as the model knows it.
#[derive(Clone, Debug)]
pub struct Chat {
    /// Whose it is.
    pub owner: u64,
    /// Its name.
    pub id: SessionId,
    /// What it was after each verb, since it was last known to be committed.
    states: Vec<Said>,
    /// Which of them was surely written, and which surely survives a power cut.
    floors: [usize; 2],
    /// What it was before it was reverted: a power cut may bring it back.
    reverted: Vec<Said>,
    /// Whether tokens are coming.
    pub answering: bool,
    /// Whether it was to be deleted and the disk failed.
    pub doomed: bool,
}

impl Said {
    /// A session that was just made.
    pub fn new(title: &str, settings: Settings) -> Self {
        Self { title: title.to_owned(), pinned: false, settings, tokens: Vec::new(), turns: Vec::new() }
    }

    /// What the store says.
    pub fn of(history: &History) -> Self {
        let turns = history.turns.iter().map(|turn| SaidTurn {
            places: [turn.first_token, turn.prompt_end, turn.end_token].map(|at| at as usize),
            texts: [turn.request.as_slice().into(), turn.answer.as_slice().into()],
            outcome: turn.outcome,
        });
        Self {
            title: history.title.clone(),
            pinned: history.pinned,
            settings: history.settings,
            tokens: history.tokens.clone(),
            turns: turns.collect(),
        }
    }

    /// Whether that is what the store says.
    pub fn is(&self, history: &History) -> bool {
        let is_same = |(said, turn): (&SaidTurn, &TurnHistory)| {
            said.outcome == turn.outcome
                && said.places == [turn.first_token, turn.prompt_end, turn.end_token].map(|at| at as usize)
                && said.texts.each_ref().map(|text| &**text) == [turn.request.as_slice(), turn.answer.as_slice()]
        };
        self.title == history.title
            && self.pinned == history.pinned
            && self.settings == history.settings
            && self.tokens == history.tokens
            && self.turns.len() == history.turns.len()
            && self.turns.iter().zip(&history.turns).all(is_same)
    }

    /// A turn begins.
    pub fn begin(&mut self, kept: usize, prompt: &[u32], request: &[u8]) {
        self.leave();
        self.tokens.truncate(kept);
        self.tokens.extend_from_slice(prompt);
        let end = self.tokens.len();
        self.turns.push(SaidTurn { places: [kept, end, end], texts: [request.into(), Arc::default()], outcome: None });
    }

    /// Tokens come.
    pub fn grow(&mut self, tokens: &[u32]) {
        self.tokens.extend_from_slice(tokens);
        let (end, turn) = (self.tokens.len(), self.turns.last_mut().expect("a turn is being answered"));
        turn.places[2] = end;
        turn.outcome = None;
    }

    /// The turn ends.
    pub fn end(&mut self, outcome: Outcome, answer: &[u8]) {
        let turn = self.turns.last_mut().expect("a turn is being answered");
        turn.outcome = Some(outcome);
        turn.texts[1] = answer.into();
    }

    /// Later turns are forgotten.
    pub fn truncate(&mut self, n_turns: usize) {
        // The tokens of before a turn are those that it kept.
        while self.turns.len() > n_turns {
            let turn = self.turns.pop().expect("there are more");
            self.tokens.truncate(turn.places[0]);
        }
        let end = self.turns.last().map_or(0, |turn| turn.places[2]);
        self.tokens.truncate(end);
    }

    /// Nobody goes on with the last turn.
    pub fn leave(&mut self) {
        if let Some(turn) = self.turns.last_mut() {
            turn.outcome.get_or_insert(Outcome::Interrupted);
        }
    }

    /// Whether the last turn may go on.
    pub fn is_open(&self) -> bool {
        let may = |turn: &SaidTurn| matches!(turn.outcome, None | Some(Outcome::Interrupted));
        self.turns.last().is_some_and(|turn| may(turn) && turn.places[2] == self.tokens.len())
    }
}

impl Chat {
    /// A session that survives a power cut like this.
    pub fn new(owner: u64, id: SessionId, said: Said) -> Self {
        let states = vec![said];
        Self { owner, id, states, floors: [0, 0], reverted: Vec::new(), answering: false, doomed: false }
    }

    /// What it is now.
    pub fn said(&self) -> &Said {
        self.states.last().expect("there is always one")
    }

    /// What the store should say may be done with it.
    pub fn state(&self) -> State {
        match (self.answering, self.said().is_open()) {
            (true, _) => State::Answering,
            (false, true) => State::Interrupted,
            (false, false) => State::Idle,
        }
    }

    /// A verb has changed it.
    pub fn change(&mut self, change: impl FnOnce(&mut Said)) {
        let mut said = self.said().clone();
        change(&mut said);
        self.states.push(said);
    }

    /// A flush has written all of it.
    pub fn is_written(&mut self) {
        self.floors[0] = self.states.len() - 1;
    }

    /// A flush has committed all of it.
    pub fn is_committed(&mut self) {
        let said = self.said().clone();
        (self.states, self.floors, self.reverted) = (vec![said], [0, 0], Vec::new());
    }

    /// Whether a flush must commit it.
    pub fn must_commit(&self) -> bool {
        self.said().settings.durability == Durability::Token
    }

    /// The store has this of it after it was killed, after a power cut, or after it was reverted. Answers whether it
    /// may.
    pub fn is_found(&mut self, found: &Said, how: Found) -> bool {
        let floor = self.floors[usize::from(how == Found::AfterPowerCut)];
        let at = self.states.iter().rposition(|said| said == found);
        if at.is_none_or(|at| at < floor) && !self.reverted.contains(found) {
            return false;
        }
        self.answering = false;
        if how == Found::AfterPowerCut {
            *self = Self { doomed: self.doomed, ..Self::new(self.owner, self.id, found.clone()) };
            return true;
        }
        match at {
            Some(at) => self.reverted.extend(self.states.drain(at + 1..)),
            None => self.states.push(found.clone()),
        }
        self.floors[0] = self.states.len() - 1;
        true
    }
}

/// Why a session was read from the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found {
    /// The store died; the disk did not.
    AfterKill,
    /// The disk was without power.
    AfterPowerCut,
}

/// The image of a block: another one for any other token up to its end.
pub fn image(tokens: &[u32], index: usize, n_bytes: usize) -> Vec<u8> {
    let sum =
        tokens[..(index + 1) * sparsed_session::BLOCK_TOKENS].iter().fold(0x9e37_79b9_7f4a_7c15, |sum, &token| {
            (sum ^ u64::from(token)).wrapping_mul(0x0100_0000_01b3_u64).rotate_left(17)
        });
    let mut rng = fastrand::Rng::with_seed(sum);
    std::iter::repeat_with(|| rng.u8(..)).take(n_bytes).collect()
}
