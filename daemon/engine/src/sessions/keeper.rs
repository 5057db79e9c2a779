//! What does the sessions thread do? It owns the store: journals what answers say before their clients hear it, carries
//! out verbs, writes images and reads them.
//!
//! What has come since the last flush is journaled together, with one write (and one sync, where a session wants it) for
//! each session; then listeners hear what they may. Images are written one at a time while nothing else is to do, so an
//! answer never waits for more than one of them.

use super::listener::{Ending, Listener};
use super::recorded::{Flow, Recorder, TurnId};
use crate::api::{Event, Failure, Sink, Turn};
use crate::durable::{Restore, Restored};
use crate::service::Command;
use sparsed_kv::{BLOCK_TOKENS, FileId, Save};
use sparsed_session::{ImageShape, Loaded, NewTurn, OsDisk, Outcome, SessionId, Store, StoreError};
use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, SyncSender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Things done between two flushes at most.
const BATCH: usize = 256;
/// Pause between looks at clients while answers are under way.
const LOOK: Duration = Duration::from_millis(10);
/// Pause between looks for sessions that are past their retention.
const EXPIRY: Duration = Duration::from_secs(600);

/// A verb, carried out on the thread.
type Verb = Box<dyn FnOnce(&mut Keeper) + Send>;

/// What the thread is asked for.
pub(crate) enum Ask {
    /// Carry out a verb of a surface, which waits for it.
    Do(Verb),
    /// A turn's answer has a listener.
    Listen { turn: TurnId, sink: Box<dyn Sink>, flow: Arc<Flow> },
    /// A turn's answer goes on.
    Event { turn: TurnId, event: Event },
    /// Nothing more comes of a turn.
    Gone { turn: TurnId },
    /// A session was opened and no turn was begun.
    Close { file: FileId },
    /// Write an image for the model `slot`.
    Save { slot: usize, shape: ImageShape, save: Save, image: Vec<u8> },
    /// Read images for the model `slot`.
    Restore { slot: usize, shape: ImageShape, restore: Restore },
    /// Write what there is and end.
    Stop,
}

/// The way to the thread. Its queue is bounded by what waits for answers from it: a verb for each surface thread, and
/// so many events and images for each turn and model.
#[derive(Clone, Debug)]
pub(crate) struct Asks(Sender<Ask>);

impl Asks {
    /// Asks for something. A thread that has ended does nothing any more, and nobody waits for it then.
    pub(crate) fn tell(&self, ask: Ask) {
        let _ended = self.0.send(ask).is_err();
    }
}

/// The files of one model's sessions, for its engine.
#[derive(Debug)]
pub(crate) struct ImagesOf {
    pub(crate) asks: Asks,
    pub(crate) slot: usize,
    pub(crate) shape: ImageShape,
}

impl ImagesOf {
    /// Writes an image.
    pub(crate) fn save(&self, save: Save, image: Vec<u8>) {
        self.asks.tell(Ask::Save { slot: self.slot, shape: self.shape, save, image });
    }

    /// Reads images.
    pub(crate) fn restore(&self, restore: Restore) {
        self.asks.tell(Ask::Restore { slot: self.slot, shape: self.shape, restore });
    }
}

/// All sessions, and the turns that are being answered.
pub(crate) struct Keeper {
    pub(super) store: Store<OsDisk>,
    asks: Asks,
    engine: SyncSender<Command>,
    /// By number.
    files: Vec<(u64, SessionId)>,
    numbers: HashMap<SessionId, FileId>,
    /// Sessions that are open, or being answered.
    taken: HashSet<FileId>,
    answers: BTreeMap<TurnId, Answer>,
    n_turns: u64,
    /// Waits until nothing else is to do.
    images: VecDeque<(usize, ImageShape, Save, Vec<u8>)>,
    stopping: bool,
}

/// A turn while it is answered.
struct Answer {
    file: FileId,
    /// `None` until the engine has the turn.
    listener: Option<Listener>,
    /// Whether it was cut before and goes on: it is never taken back.
    is_resumed: bool,
    /// Whether the journal has its end.
    is_closed: bool,
}

/// Starts the thread.
///
/// # Errors
/// When no thread can be started.
pub(crate) fn spawn(store: Store<OsDisk>, engine: SyncSender<Command>) -> std::io::Result<(Asks, JoinHandle<()>)> {
    let (sender, receiver) = channel();
    let asks = Asks(sender);
    let keeper = Keeper {
        store,
        asks: asks.clone(),
        engine,
        files: Vec::new(),
        numbers: HashMap::new(),
        taken: HashSet::new(),
        answers: BTreeMap::new(),
        n_turns: 0,
        images: VecDeque::new(),
        stopping: false,
    };
    let run = move || keeper.run(&receiver);
    let thread = std::thread::Builder::new().name("sessions".to_owned()).spawn(run)?;
    Ok((asks, thread))
}

impl Keeper {
    fn run(mut self, asks: &Receiver<Ask>) {
        while !self.stopping {
            if self.images.is_empty() {
                let pause = if self.answers.is_empty() { EXPIRY } else { LOOK };
                match asks.recv_timeout(pause) {
                    Ok(ask) => self.take(ask),
                    Err(RecvTimeoutError::Timeout) if self.answers.is_empty() => self.expire(),
                    Err(RecvTimeoutError::Timeout) => {}
                    Err(RecvTimeoutError::Disconnected) => return,
                }
            }
            asks.try_iter().take(BATCH).for_each(|ask| self.take(ask));
            self.flush();
            self.deliver();
            self.write_image();
        }
        while !self.images.is_empty() {
            self.write_image();
        }
        self.flush();
        self.deliver();
    }

    fn take(&mut self, ask: Ask) {
        match ask {
            Ask::Do(verb) => verb(self),
            Ask::Listen { turn, sink, flow } => {
                if let Some(answer) = self.answers.get_mut(&turn) {
                    answer.listener = Some(Listener::new(sink, flow));
                }
            }
            Ask::Event { turn, event } => self.event(turn, event),
            Ask::Gone { turn } => self.gone(turn),
            Ask::Close { file } => self.let_go(file),
            Ask::Save { slot, shape, save, image } => self.images.push_back((slot, shape, save, image)),
            Ask::Restore { slot, shape, restore } => self.restore(slot, &shape, restore),
            Ask::Stop => self.stopping = true,
        }
    }

    /// An answer goes on.
    fn event(&mut self, turn: TurnId, event: Event) {
        let Some(answer) = self.answers.get_mut(&turn) else { return };
        let Some(listener) = &mut answer.listener else { return };
        if let Event::Sampled { token } = event {
            listener.journaled();
            let (owner, id) = self.files[index(answer.file)];
            let journaled = self.store.append_tokens(owner, id, &[token]);
            if let Err(error) = journaled {
                self.fail(turn, &error);
            }
            return;
        }
        listener.hear(event);
        if let Some(ending) = listener.ending(answer.is_resumed) {
            self.close(turn, ending);
        }
    }

    /// The engine has let go of a turn: its client is gone, or the answer has ended.
    fn gone(&mut self, turn: TurnId) {
        let Some(answer) = self.answers.get_mut(&turn) else { return };
        if answer.is_closed {
            return;
        }
        let ending = match &answer.listener {
            None if answer.is_resumed => Ending::Of(Outcome::Interrupted),
            Some(listener) if answer.is_resumed || listener.n_tokens > 0 => Ending::Of(Outcome::Cancelled),
            _ => Ending::TakenBack,
        };
        self.close(turn, ending);
        self.forget(turn);
    }

    /// Journals the end of a turn; one that has said nothing is taken back.
    fn close(&mut self, turn: TurnId, ending: Ending) {
        let Some(answer) = self.answers.get_mut(&turn).filter(|answer| !answer.is_closed) else { return };
        answer.is_closed = true;
        let (owner, id) = self.files[index(answer.file)];
        let message = answer.listener.as_ref().map_or_else(Vec::new, Listener::answer);
        let ended = match ending {
            Ending::Of(outcome) => self.store.end_turn(owner, id, outcome, &message, seconds()),
            Ending::TakenBack => self.take_back(owner, id),
        };
        if let Err(error) = ended {
            self.fail(turn, &error);
        }
    }

    fn take_back(&mut self, owner: u64, id: SessionId) -> Result<(), StoreError> {
        self.store.end_turn(owner, id, Outcome::Failed, &[], seconds())?;
        let n_turns = self.store.summary(owner, id)?.n_turns;
        self.store.truncate(owner, id, n_turns.saturating_sub(1)).map(drop)
    }

    /// A turn's tokens could not be journaled: its client hears why, and nothing that the journal does not have.
    fn fail(&mut self, turn: TurnId, error: &StoreError) {
        let Some(answer) = self.answers.get_mut(&turn) else { return };
        let (owner, id) = self.files[index(answer.file)];
        log::error!(session:% = id, reason:% = error; "answer could not be journaled, it ends");
        answer.is_closed = true;
        if let Some(listener) = &mut answer.listener {
            listener.fail(failure(id, error));
        }
        if let Err(error) = self.store.revert(owner, id) {
            log::error!(session:% = id, reason:% = error; "session cannot be read again");
        }
    }

    fn flush(&mut self) {
        for (id, error) in self.store.flush().failed {
            let file = self.numbers.get(&id).copied();
            let turn = self.answers.iter().find(|(_, answer)| Some(answer.file) == file).map(|(turn, _)| *turn);
            match turn {
                Some(turn) => self.fail(turn, &error),
                None => log::error!(session:% = id, reason:% = error; "session could not be written, trying again"),
            }
        }
    }

    /// Passes on what may be heard, and lets go of answers that are at their end.
    fn deliver(&mut self) {
        let mut over = Vec::new();
        for (&turn, answer) in &mut self.answers {
            // The next turn may begin as soon as the client has heard the end of this one.
            if answer.is_closed {
                self.taken.remove(&answer.file);
            }
            let Some(listener) = &mut answer.listener else { continue };
            listener.look();
            if listener.deliver() && answer.is_closed {
                over.push(turn);
            }
        }
        over.into_iter().for_each(|turn| self.forget(turn));
    }

    fn forget(&mut self, turn: TurnId) {
        if let Some(answer) = self.answers.remove(&turn) {
            self.let_go(answer.file);
        }
    }

    fn write_image(&mut self) {
        let Some((slot, shape, save, image)) = self.images.pop_front() else { return };
        let (owner, id) = self.files[index(save.file)];
        match self.store.save_block(owner, id, &shape, save.index, &image) {
            Ok(()) => {}
            // It was deleted, or cut, meanwhile.
            Err(StoreError::NotFound | StoreError::Invalid { .. }) => {}
            Err(error) => {
                log::warn!(session:% = id, block = save.index, reason:% = error; "block not saved, it would be computed again");
            }
        }
        self.tell_engine(Command::Written { slot });
    }

    fn restore(&mut self, slot: usize, shape: &ImageShape, restore: Restore) {
        let (owner, id) = self.files[index(restore.file)];
        let mut images = Vec::new();
        for block in restore.first..restore.first.saturating_add(restore.n) {
            let mut image = Vec::new();
            match self.store.load_block(owner, id, shape, block, &mut image) {
                Ok(Loaded::Image) => images.push(image),
                Ok(Loaded::Missing) => break,
                Err(error) => {
                    log::warn!(session:% = id, block, reason:% = error; "block cannot be read, it is computed again");
                    break;
                }
            }
        }
        self.tell_engine(Command::Restored { slot, restored: Restored { restore, images } });
    }

    /// Waits while the engine's inbox is full, for a step. An engine that has ended needs nothing any more.
    fn tell_engine(&self, command: Command) {
        let _ended = self.engine.send(command).is_err();
    }

    fn expire(&mut self) {
        match self.store.expire(seconds()) {
            Ok(gone) if gone.is_empty() => {}
            Ok(gone) => log::info!(sessions = gone.len(); "sessions past their retention are deleted"),
            Err(error) => log::warn!(reason:% = error; "sessions past their retention could not be deleted"),
        }
    }

    /// Takes a session for one caller.
    pub(super) fn take_session(&mut self, owner: u64, id: SessionId) -> Result<FileId, Failure> {
        self.store.summary(owner, id).map_err(|error| failure(id, &error))?;
        let file = *self.numbers.entry(id).or_insert_with(|| {
            self.files.push((owner, id));
            FileId(self.files.len() as u64 - 1)
        });
        if self.taken.insert(file) { Ok(file) } else { Err(busy(id)) }
    }

    /// Lets a session go that was taken; what is in memory of it can be read again.
    pub(super) fn let_go(&mut self, file: FileId) {
        self.taken.remove(&file);
        let (owner, id) = self.files[index(file)];
        // One that was deleted has nothing in memory either.
        let _gone = self.store.release(owner, id).is_err();
    }

    /// That nobody has taken a session.
    pub(super) fn check_free(&self, id: SessionId) -> Result<(), Failure> {
        let is_taken = self.numbers.get(&id).is_some_and(|file| self.taken.contains(file));
        if is_taken { Err(busy(id)) } else { Ok(()) }
    }

    /// A turn that the journal has begun, or gone on with: `resumed` is its answer so far. The first `n_kept` tokens of
    /// the session have not changed.
    pub(super) fn turn(&mut self, file: FileId, shape: &ImageShape, n_kept: u32, resumed: Option<Vec<u32>>) -> Turn {
        let turn = TurnId(self.n_turns);
        self.n_turns += 1;
        self.answers.insert(turn, Answer { file, listener: None, is_resumed: resumed.is_some(), is_closed: false });
        let (owner, id) = self.files[index(file)];
        let n_saved = self.store.saved_blocks(owner, id, shape).unwrap_or_else(|error| {
            log::warn!(session:% = id, reason:% = error; "blocks cannot be read, they are computed again");
            0
        });
        let recorder = Recorder::new(self.asks.clone(), turn);
        let n_saved = n_saved.min(n_kept / BLOCK_TOKENS);
        Turn { file, n_saved, resumed: resumed.unwrap_or_default(), recorder: Some(recorder) }
    }

    /// A turn that its client has left is one that goes on.
    pub(super) fn reopen(
        &mut self,
        owner: u64,
        id: SessionId,
        prompt: &[u32],
        answered: &[u32],
        request: &[u8],
        sampling: &[u8],
    ) -> Result<(), StoreError> {
        let n_turns = self.store.summary(owner, id)?.n_turns;
        let n_kept = self.store.truncate(owner, id, n_turns.saturating_sub(1))?;
        let (_, new) = prompt.split_at((n_kept as usize).min(prompt.len()));
        let turn = NewTurn { keep_tokens: n_kept, prompt: new, request, sampling };
        self.store.begin_turn(owner, id, &turn, seconds())?;
        self.store.append_tokens(owner, id, answered)
    }
}

/// Seconds since 1970; before 1970 it is 1970.
#[expect(clippy::disallowed_methods, reason = "sessions carry dates; nothing depends on the order of two of them")]
pub(super) fn seconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// What a surface hears of a store's error.
pub(super) fn failure(id: SessionId, error: &StoreError) -> Failure {
    match *error {
        StoreError::NotFound => Failure::SessionNotFound { id: id.to_string() },
        StoreError::Busy(state) => Failure::SessionBusy { id: id.to_string(), state },
        StoreError::LimitReached { what, limit } => Failure::SessionLimit { what, limit },
        StoreError::Invalid { what } => Failure::invalid("session", what),
        StoreError::Damaged { .. } | StoreError::UnknownVersion { .. } => {
            Failure::SessionDamaged { reason: error.to_string() }
        }
        _ => Failure::DiskFailed { reason: error.to_string() },
    }
}

fn busy(id: SessionId) -> Failure {
    Failure::SessionBusy { id: id.to_string(), state: "being answered" }
}

fn index(file: FileId) -> usize {
    usize::try_from(file.0).expect("files are numbered from 0 as they are opened")
}
