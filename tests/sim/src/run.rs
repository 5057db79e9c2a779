//! Does a store do what the model does, whatever happens to the disk?

use crate::disk::{FakeDisk, Faults, Plant};
use crate::model::{Chat, Found, Said, image};
use fastrand::Rng;
use sparsed_session::{
    BLOCK_TOKENS, ContextFull, Durability, ImageShape, Limits, Loaded, MasterKey, NewSession, NewTurn, Outcome,
    SessionId, Settings, Store, StoreError,
};

/// What was wrong, at which step of which seed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation(pub String);

/// What a run was like.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Outline {
    /// Verbs made.
    pub steps: u64,
    /// Power cuts, and deaths of the store alone.
    pub cuts: u64,
    /// Verbs that the disk made fail.
    pub failures: u64,
    /// Sessions found again after a cut with fewer records than were made.
    pub shortened: u64,
    /// Images that came back.
    pub images: u64,
    /// Of all calls of the disk and their bytes.
    pub digest: u64,
}

pub(crate) type Checked = Result<(), Violation>;

pub(crate) const OWNERS: [u64; 2] = [1000, 1001];
const SHAPE: ImageShape = ImageShape { fingerprint: [5; 32], block_bytes: 700 };
const SESSIONS_MAX: usize = 5;

/// Makes `n_steps` random verbs, with power cuts between and within them.
///
/// # Errors
/// The first thing that a store must not do.
pub fn run(seed: u64, n_steps: u64, plant: Plant) -> Result<Outline, Violation> {
    let mut rng = Rng::with_seed(seed);
    let disk = FakeDisk::new(rng.u64(..));
    disk.set_plant(plant);
    let store = open(&disk, rng.u64(..)).map_err(|error| Violation(format!("seed {seed}: {error}")))?.0;
    let mut run = Run {
        rng,
        disk,
        store: Some(store),
        chats: Vec::new(),
        maybe: Vec::new(),
        gone: Vec::new(),
        outline: Outline::default(),
    };
    for step in 0..n_steps {
        run.step().map_err(|Violation(what)| Violation(format!("seed {seed}, step {step}: {what}")))?;
    }
    run.outline.steps = n_steps;
    run.outline.digest = run.disk.digest();
    Ok(run.outline)
}

pub(crate) struct Run {
    pub(crate) rng: Rng,
    pub(crate) disk: FakeDisk,
    /// `None` only while it is opened again.
    pub(crate) store: Option<Store<FakeDisk>>,
    pub(crate) chats: Vec<Chat>,
    /// What could not be made and may be found after a power cut.
    pub(crate) maybe: Vec<(u64, Said)>,
    /// What was deleted for good.
    pub(crate) gone: Vec<SessionId>,
    pub(crate) outline: Outline,
}

pub(crate) fn open(disk: &FakeDisk, seed: u64) -> Result<(Store<FakeDisk>, sparsed_session::Report), StoreError> {
    let mut rng = Rng::with_seed(seed);
    let random = Box::new(move |bytes: &mut [u8]| rng.fill(bytes));
    // Compacted early, so that it happens; images are evicted.
    let limits = Limits { kv_bytes: 60_000, compact_bytes: 1000, ..Limits::default() };
    Store::open(disk.other(), random, MasterKey::new([1; 32]), limits)
}

pub(crate) fn wrong<T>(what: impl Into<String>) -> Result<T, Violation> {
    Err(Violation(what.into()))
}

impl Run {
    fn step(&mut self) -> Checked {
        match self.rng.u32(..100) {
            0..3 => self.crash(Found::AfterPowerCut)?,
            3..5 => self.crash(Found::AfterKill)?,
            5..8 => self.plan_faults(),
            8..12 => self.make()?,
            12..14 => self.delete()?,
            14..16 => self.copy()?,
            16..18 => self.trespass()?,
            18..40 => self.flush()?,
            40..55 => self.images()?,
            55..58 => self.revert_or_commit()?,
            _ => self.talk()?,
        }
        if self.disk.is_off() {
            return self.crash(Found::AfterPowerCut);
        }
        self.compare()
    }

    pub(crate) fn store(&mut self) -> &mut Store<FakeDisk> {
        self.store.as_mut().expect("it is open between steps")
    }

    fn plan_faults(&mut self) {
        let off_after = self.rng.bool().then(|| self.rng.u64(..30));
        let one_in = [0, 0, 10, 40][self.rng.usize(..4)];
        let capacity_bytes = [usize::MAX, usize::MAX, 20_000, 60_000][self.rng.usize(..4)];
        self.disk.set_faults(Faults { one_in, capacity_bytes, off_after, ..Faults::NONE });
    }

    /// A verb's answer, of which only the disk's failures are counted.
    pub(crate) fn done<T>(&mut self, answer: Result<T, StoreError>) -> Result<Option<T>, Violation> {
        match answer {
            Ok(answer) => Ok(Some(answer)),
            Err(StoreError::DiskFull | StoreError::Io(_)) => {
                self.outline.failures += 1;
                Ok(None)
            }
            Err(error) => wrong(format!("refused: {error}")),
        }
    }

    fn settings(&mut self) -> Settings {
        let durability = [Durability::Token, Durability::Turn, Durability::None][self.rng.usize(..3)];
        Settings { durability, context_full: ContextFull::Error }
    }

    fn make(&mut self) -> Checked {
        if self.chats.len() >= SESSIONS_MAX {
            return Ok(());
        }
        let (owner, settings) = (OWNERS[self.rng.usize(..2)], self.settings());
        let chosen = Some(settings);
        let new = NewSession { model: "tiny", fingerprint: [9; 32], title: "new", settings: chosen, pinned: false };
        let answer = self.store().create(owner, &new, 5);
        self.is_made(owner, answer, Said::new("new", settings))
    }

    fn is_made(&mut self, owner: u64, answer: Result<SessionId, StoreError>, said: Said) -> Checked {
        match self.done(answer)? {
            Some(id) => self.chats.push(Chat::new(owner, id, said)),
            None => self.maybe.push((owner, said)),
        }
        Ok(())
    }

    pub(crate) fn any_chat(&mut self) -> Option<usize> {
        let usable: Vec<usize> = (0..self.chats.len()).filter(|&at| !self.chats[at].doomed).collect();
        (!usable.is_empty()).then(|| usable[self.rng.usize(..usable.len())])
    }

    fn idle_chat(&mut self) -> Option<usize> {
        self.any_chat().filter(|&at| !self.chats[at].answering)
    }

    fn copy(&mut self) -> Checked {
        let Some(at) = self.idle_chat().filter(|_| self.chats.len() < SESSIONS_MAX) else { return Ok(()) };
        let (owner, id, mut said) = (self.chats[at].owner, self.chats[at].id, self.chats[at].said().clone());
        said.pinned = false;
        if self.rng.bool() {
            let n_turns = self.rng.usize(..=said.turns.len());
            said.truncate(n_turns);
            said.leave();
            let answer = self.store().fork(owner, id, u32::try_from(n_turns).ok(), 6, &|_| {});
            return self.is_made(owner, answer, said);
        }
        said.leave();
        let exported = self.store().export(owner, id);
        let Some(file) = self.done(exported)? else { return Ok(()) };
        let other = OWNERS[self.rng.usize(..2)];
        let answer = self.store().import(other, &file, 6, &|_| {});
        self.is_made(other, answer, said)
    }

    fn delete(&mut self) -> Checked {
        // One that could not be deleted is tried again.
        let doomed = self.chats.iter().position(|chat| chat.doomed);
        let Some(at) = doomed.or_else(|| self.idle_chat()) else { return Ok(()) };
        let (owner, id) = (self.chats[at].owner, self.chats[at].id);
        let answer = self.store().delete(owner, id);
        match self.done(answer)? {
            Some(()) => self.gone.push(self.chats.remove(at).id),
            None => self.chats[at].doomed = true,
        }
        Ok(())
    }

    fn trespass(&mut self) -> Checked {
        let Some(at) = self.any_chat() else { return Ok(()) };
        let (other, id) = (OWNERS[usize::from(self.chats[at].owner == OWNERS[0])], self.chats[at].id);
        let store = self.store();
        let answers = [
            store.history(other, id).map(drop),
            store.rename(other, id, "stolen"),
            store.append_tokens(other, id, &[1]),
            store.export(other, id).map(drop),
            store.load_block(other, id, &SHAPE, 0, &mut Vec::new()).map(drop),
            store.delete(other, id),
        ];
        if answers == [Err(StoreError::NotFound); 6] { Ok(()) } else { wrong(format!("a trespasser got {answers:?}")) }
    }

    /// One verb that queues a record.
    fn talk(&mut self) -> Checked {
        let Some(at) = self.any_chat() else { return Ok(()) };
        let (owner, id) = (self.chats[at].owner, self.chats[at].id);
        if self.rng.u32(..12) == 0 {
            let released = self.store().release(owner, id);
            return self.done(released).map(drop);
        }
        if self.chats[at].answering { self.answer(at) } else { self.ask(at) }
    }

    fn answer(&mut self, at: usize) -> Checked {
        let (owner, id) = (self.chats[at].owner, self.chats[at].id);
        if self.rng.u32(..5) > 0 {
            // Often as long as each other: what is written again may then end where something older goes on.
            let n_tokens = if self.rng.bool() { 1 } else { self.rng.usize(..20) };
            let tokens: Vec<u32> = std::iter::repeat_with(|| self.rng.u32(..100)).take(n_tokens).collect();
            let answer = self.store().append_tokens(owner, id, &tokens);
            if self.done(answer)?.is_some() && n_tokens > 0 {
                self.chats[at].change(|said| said.grow(&tokens));
            }
            return Ok(());
        }
        let outcome =
            [Outcome::Complete, Outcome::Interrupted, Outcome::Cancelled, Outcome::Failed][self.rng.usize(..4)];
        let text = vec![self.rng.u8(..); self.rng.usize(..700)];
        let answer = self.store().end_turn(owner, id, outcome, &text, 8);
        if self.done(answer)?.is_some() {
            self.chats[at].change(|said| said.end(outcome, &text));
            self.chats[at].answering = false;
        }
        Ok(())
    }

    fn ask(&mut self, at: usize) -> Checked {
        let (owner, id) = (self.chats[at].owner, self.chats[at].id);
        let said = self.chats[at].said().clone();
        match self.rng.u32(..10) {
            0 => {
                let title = format!("title {}", self.rng.u32(..));
                let answer = self.store().rename(owner, id, &title);
                if self.done(answer)?.is_some() {
                    self.chats[at].change(|said| said.title = title);
                }
            }
            1 => {
                let (pinned, settings) = (self.rng.bool(), self.settings());
                let answer = self.store().pin(owner, id, pinned);
                if self.done(answer)?.is_some() {
                    self.chats[at].change(|said| said.pinned = pinned);
                }
                let answer = self.store().set_settings(owner, id, settings);
                if self.done(answer)?.is_some() {
                    self.chats[at].change(|said| said.settings = settings);
                }
            }
            2 => {
                let n_turns = self.rng.usize(..=said.turns.len());
                let answer = self.store().truncate(owner, id, u32::try_from(n_turns).expect("few"));
                if let Some(n_tokens) = self.done(answer)? {
                    self.chats[at].change(|said| said.truncate(n_turns));
                    if n_tokens as usize != self.chats[at].said().tokens.len() {
                        return wrong(format!("{n_tokens} tokens after a cut to {n_turns} turns"));
                    }
                }
            }
            3..6 if said.is_open() => {
                let answer = self.store().resume_turn(owner, id);
                self.chats[at].answering = self.done(answer)?.is_some();
            }
            _ => {
                // Sometimes much shorter, so that blocks change.
                let kept = if self.rng.u32(..4) > 0 { said.tokens.len() } else { self.rng.usize(..=said.tokens.len()) };
                let kept = kept.min(400);
                let n_tokens = self.rng.usize(..150);
                let prompt: Vec<u32> = std::iter::repeat_with(|| self.rng.u32(..300)).take(n_tokens).collect();
                let n_bytes = if self.rng.u32(..3) == 0 { 20_000 } else { 300 };
                let request = vec![self.rng.u8(..); self.rng.usize(..n_bytes)];
                let keep_tokens = u32::try_from(kept).expect("few");
                let turn = NewTurn { keep_tokens, prompt: &prompt, request: &request, sampling: b"greedy" };
                let answer = self.store().begin_turn(owner, id, &turn, 7);
                if self.done(answer)?.is_some() {
                    self.chats[at].change(|said| said.begin(kept, &prompt, &request));
                    self.chats[at].answering = true;
                }
            }
        }
        Ok(())
    }

    fn flush(&mut self) -> Checked {
        let flushed = self.store().flush();
        self.outline.failures += flushed.failed.len() as u64;
        for chat in &mut self.chats {
            let is_written = flushed.written.contains(&chat.id);
            let is_committed = flushed.committed.contains(&chat.id);
            if is_written && chat.must_commit() && !is_committed {
                return wrong(format!("{} was not committed after every token", chat.id));
            }
            if is_written {
                chat.is_written();
            }
            if is_committed {
                chat.is_committed();
            }
        }
        let failed = flushed.failed.first().map(|(id, _)| *id).filter(|_| !self.disk.is_off());
        failed.map_or(Ok(()), |id| self.after_failure(id))
    }

    /// What a failure has left behind shows later, if at all: makes for the moments in which it would.
    fn after_failure(&mut self, id: SessionId) -> Checked {
        let choice = self.rng.u32(..4);
        if choice == 0 {
            self.crash(Found::AfterKill)?;
        }
        let Some(at) = self.chats.iter().position(|chat| chat.id == id && !chat.doomed) else { return Ok(()) };
        match choice {
            0 => {
                self.commit(at)?;
                self.crash(Found::AfterPowerCut)
            }
            1 => self.revert(at),
            _ => Ok(()),
        }
    }

    fn revert_or_commit(&mut self) -> Checked {
        let Some(at) = self.any_chat() else { return Ok(()) };
        if self.rng.bool() { self.commit(at) } else { self.revert(at) }
    }

    fn commit(&mut self, at: usize) -> Checked {
        let (owner, id) = (self.chats[at].owner, self.chats[at].id);
        let answer = self.store().commit(owner, id);
        if self.done(answer)?.is_some() {
            self.chats[at].is_committed();
        }
        Ok(())
    }

    fn revert(&mut self, at: usize) -> Checked {
        let (owner, id) = (self.chats[at].owner, self.chats[at].id);
        let answer = self.store().revert(owner, id);
        // Also where the disk could not be asked.
        self.chats[at].answering = false;
        if self.done(answer)?.is_some() {
            self.find(at, Found::AfterKill)?;
        }
        Ok(())
    }

    /// Saves or loads a block.
    fn images(&mut self) -> Checked {
        let Some(at) = self.any_chat() else { return Ok(()) };
        let (owner, id, tokens) = (self.chats[at].owner, self.chats[at].id, self.chats[at].said().tokens.clone());
        let n_full = u32::try_from(tokens.len() / BLOCK_TOKENS).expect("few");
        let index = self.rng.u32(..=n_full);
        let has_block = tokens.len() >= (index as usize + 1) * BLOCK_TOKENS;
        let n_bytes = SHAPE.block_bytes as usize;
        if has_block && self.rng.bool() {
            let image = image(&tokens, index as usize, n_bytes);
            return match self.store().save_block(owner, id, &SHAPE, index, &image) {
                Err(StoreError::LimitReached { .. }) => Ok(()),
                answer => self.done(answer).map(drop),
            };
        }
        // A buffer that has had another image.
        let mut loaded = vec![0xEE; 2 * n_bytes];
        let answer = self.store().load_block(owner, id, &SHAPE, index, &mut loaded);
        if self.done(answer)? == Some(Loaded::Image) {
            self.outline.images += 1;
            if !has_block || loaded != image(&tokens, index as usize, n_bytes) {
                return wrong(format!("block {index} of {id} is that of other tokens"));
            }
        }
        Ok(())
    }
}
