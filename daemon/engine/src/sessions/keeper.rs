//! What does the sessions thread do? It owns the store: journals what answers say before their clients hear it, carries
//! out verbs, writes images and has them read by others.
//!
//! What has come since the last flush is journaled together, with one write (and one sync, where a session wants it)
//! for each session; then listeners hear what they may. Images are written one at a time while nothing else is to do,
//! so an answer never waits for more than one of them.

use super::Sessions;
use super::answers::Answer;
use super::asks::{Ask, Asks};
use super::images::RESERVE_BYTES;
use super::late::{Absence, SessionStore};
use super::listener::Listener;
use super::readers::{Hearers, Readers};
use super::recorded::{Recorder, TurnId};
use super::retention::{EXPIRY, Retention};
use super::standing::Standings;
use super::trial::OnTrial;
use super::usage::{Board, Posts};
use crate::api::{Failure, Turn};
use crate::service::Command;
use sparsed_kv::{BLOCK_TOKENS, FileId, Save};
use sparsed_session::{AnyDisk, ImageShape, SessionId, Store, StoreError};
use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender};
use std::thread::JoinHandle;
use std::time::Duration;

/// Things done between two flushes at most.
const BATCH: usize = 256;
/// Pause between looks at clients while answers are under way.
const LOOK: Duration = Duration::from_millis(10);
/// Pause between tries to write what could not be written, while nothing else is to do.
const RETRY: Duration = Duration::from_secs(5);

/// All sessions, and the turns that are being answered.
pub(crate) struct Keeper {
    pub(super) store: Store<AnyDisk>,
    asks: Asks,
    engine: SyncSender<Command>,
    /// The files of the sessions' last turns: each turn numbers its file anew, so that an image of what the session no
    /// longer says is known by its number.
    pub(super) files: HashMap<FileId, (u64, SessionId)>,
    numbers: HashMap<SessionId, FileId>,
    /// Sessions that are open, or being answered.
    pub(super) taken: HashSet<SessionId>,
    pub(super) answers: BTreeMap<TurnId, Answer>,
    n_turns: u64,
    /// Waits until nothing else is to do.
    pub(super) images: VecDeque<(usize, ImageShape, Save, Vec<u8>)>,
    pub(super) readers: Readers,
    stopping: bool,
    pub(super) clocks: Clocks,
    /// Sessions whose last answer goes on by itself: a try of it is counted.
    pub(super) alone: HashSet<SessionId>,
    /// Sessions that were made for a turn which may not come.
    pub(super) on_trial: HashMap<SessionId, OnTrial>,
    /// Sessions that could not be written by the last flush, and are not answered.
    failing: HashSet<SessionId>,
    /// Sessions that were let go of before they were written, with their owners.
    unwritten: HashSet<(u64, SessionId)>,
    /// Blocks have found no room beside what is left for what is said, and not enough more since.
    pub(super) is_tight: bool,
    /// Sessions whose last block has found no room within the quotas.
    pub(super) over_quota: HashSet<SessionId>,
    /// Turns that are kept in memory elsewhere.
    pub(super) standings: Standings,
    pub(super) retention: Retention,
    pub(super) posts: Posts,
}

/// What tells the time.
pub(crate) struct Clocks {
    /// Seconds since 1970; may jump.
    pub(crate) date: Box<dyn Fn() -> u64 + Send>,
    /// Time since some start; goes on, also while the machine sleeps.
    pub(crate) uptime: Box<dyn Fn() -> Duration + Send>,
}

/// What a turn was before it goes on.
pub(super) struct Resumed {
    /// Its answer so far.
    pub(super) tokens: Vec<u32>,
    /// How it had ended.
    pub(super) before: Before,
}

/// How a turn that goes on had ended.
#[derive(Clone, Debug)]
pub(super) struct Before {
    /// Whether its client went away; otherwise the daemon did.
    pub(super) is_cancelled: bool,
    /// The message of its answer so far.
    pub(super) said: Vec<u8>,
}

/// Ends the daemon with this thread: without it no session would answer, and nobody would know.
struct Alarm(SyncSender<Command>);

impl Drop for Alarm {
    fn drop(&mut self) {
        if std::thread::panicking() {
            // An engine that has ended ends the daemon too.
            let _ended = self.0.send(Command::Stop).is_err();
        }
    }
}

/// Starts the thread, and those that read for it.
///
/// # Errors
/// When no thread can be started.
pub(crate) fn spawn(
    store: SessionStore,
    engine: SyncSender<Command>,
    clocks: Clocks,
) -> std::io::Result<(Sessions, JoinHandle<()>)> {
    let (asks, receiver) = Asks::new();
    let absence = Absence::of(&store);
    let board = Board::default();
    let sessions = Sessions::new(asks.clone(), absence.clone(), board.clone());
    let readers = Readers::two()?;
    let run = move || {
        let _alarm = Alarm(engine.clone());
        let Some((store, verbs)) = store.wait(&receiver, &absence) else { return };
        let mut keeper = Keeper { readers, ..Keeper::new(store, asks, engine, clocks) };
        keeper.posts.board = board;
        keeper.post();
        verbs.into_iter().for_each(|verb| verb(&mut keeper));
        keeper.run(&receiver);
    };
    let thread = std::thread::Builder::new().name("sessions".to_owned()).spawn(run)?;
    Ok((sessions, thread))
}

impl Keeper {
    /// A keeper that is asked by `asks`.
    pub(crate) fn new(store: Store<AnyDisk>, asks: Asks, engine: SyncSender<Command>, clocks: Clocks) -> Self {
        Self {
            store,
            asks,
            engine,
            files: HashMap::new(),
            numbers: HashMap::new(),
            taken: HashSet::new(),
            answers: BTreeMap::new(),
            n_turns: 0,
            images: VecDeque::new(),
            readers: Readers::default(),
            stopping: false,
            clocks,
            alone: HashSet::new(),
            on_trial: HashMap::new(),
            failing: HashSet::new(),
            unwritten: HashSet::new(),
            is_tight: false,
            over_quota: HashSet::new(),
            standings: Standings::default(),
            retention: Retention::default(),
            posts: Posts::default(),
        }
    }

    fn run(mut self, asks: &Receiver<Ask>) {
        while !self.stopping {
            if self.images.is_empty() && !self.is_expiring() {
                let pause = match (self.answers.is_empty(), self.failing.is_empty()) {
                    (false, _) => LOOK,
                    (true, false) => RETRY,
                    (true, true) => EXPIRY,
                };
                match asks.recv_timeout(pause) {
                    Ok(ask) => self.take(ask),
                    Err(RecvTimeoutError::Timeout) => {}
                    Err(RecvTimeoutError::Disconnected) => return,
                }
            }
            self.round(asks, BATCH);
        }
        self.finish();
    }

    /// Does what was asked for, `n_max` things at most; answers hear what the journal has then.
    pub(crate) fn round(&mut self, asks: &Receiver<Ask>, n_max: usize) {
        asks.try_iter().take(n_max).for_each(|ask| self.take(ask));
        self.flush();
        self.deliver();
        self.write_image();
        self.expire();
        self.post();
    }

    /// Writes what there is.
    pub(crate) fn finish(&mut self) {
        while !self.images.is_empty() {
            self.write_image();
        }
        self.flush();
        self.deliver();
    }

    /// Seconds since 1970.
    pub(super) fn seconds(&self) -> u64 {
        (self.clocks.date)()
    }

    fn take(&mut self, ask: Ask) {
        match ask {
            Ask::Do(verb) => verb(self),
            Ask::Listen { turn, sink, flow } => self.listen(turn, Listener::new(sink, flow)),
            Ask::Event { turn, event } => self.event(turn, event),
            Ask::Gone { turn } => self.gone(turn),
            Ask::Close { owner, id } => self.let_go(owner, id),
            Ask::Save { slot, shape, save, image } => self.images.push_back((slot, shape, save, image)),
            Ask::Restore { slot, shape, restore, spare } => self.restore(slot, &shape, restore, spare),
            Ask::Missing { file, block } => self.missing(file, block),
            Ask::Stop => self.stopping = true,
        }
    }

    fn flush(&mut self) {
        let mut failed = self.store.flush().failed;
        if failed.iter().any(|(_, error)| *error == StoreError::DiskFull) && self.reclaim() {
            failed = self.store.flush().failed;
        }
        let failing = std::mem::take(&mut self.failing);
        for (id, error) in failed {
            match self.live(id) {
                Some(turn) => self.fail(turn, &error),
                None => {
                    if !failing.contains(&id) {
                        log::error!(session:% = id, reason:% = error; "session could not be written, trying again");
                    }
                    self.failing.insert(id);
                }
            }
        }
        for (owner, id) in std::mem::take(&mut self.unwritten) {
            self.rest(owner, id);
        }
    }

    /// Makes room on a full disk: blocks can be computed again, what was said cannot. Answers whether there is some.
    fn reclaim(&mut self) -> bool {
        let freed = self.store.reclaim(RESERVE_BYTES).unwrap_or(0);
        log::warn!(bytes = freed; "the disk is full: blocks of sessions are dropped");
        freed > 0
    }

    /// Has the store do something; on a full disk once more, with the room that blocks have left.
    pub(super) fn with_room<T>(
        &mut self,
        mut verb: impl FnMut(&mut Store<AnyDisk>) -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        match verb(&mut self.store) {
            Err(StoreError::DiskFull) if self.reclaim() => verb(&mut self.store),
            done => done,
        }
    }

    /// Waits while the engine's inbox is full, for a step. An engine that has ended needs nothing any more.
    pub(super) fn tell_engine(&self, command: Command) {
        let _ended = self.engine.send(command).is_err();
    }

    /// Who hears of images that are read.
    pub(super) fn hearers(&self) -> Hearers {
        Hearers { asks: self.asks.clone(), engine: self.engine.clone() }
    }

    /// Takes a session for one caller.
    pub(crate) fn take_session(&mut self, owner: u64, id: SessionId) -> Result<(), Failure> {
        self.store.summary(owner, id).map_err(|error| failure(id, &error))?;
        if self.taken.insert(id) { Ok(()) } else { Err(busy(id)) }
    }

    /// Lets a session go that was taken; what is in memory of it can be read again.
    pub(crate) fn let_go(&mut self, owner: u64, id: SessionId) {
        self.taken.remove(&id);
        self.judge(owner, id);
        // One that was deleted has nothing in memory either.
        if self.store.release(owner, id) == Ok(false) {
            self.unwritten.insert((owner, id));
        }
    }

    /// Forgets what was read of a session, unless somebody has taken it: it can be read again.
    pub(super) fn rest(&mut self, owner: u64, id: SessionId) {
        if !self.taken.contains(&id) {
            self.let_go(owner, id);
        }
    }

    /// The turn of the session that is on its way.
    pub(super) fn live(&self, id: SessionId) -> Option<TurnId> {
        self.answers.iter().find(|(_, answer)| answer.id == id && answer.holds).map(|(turn, _)| *turn)
    }

    /// That nobody has taken a session.
    pub(crate) fn check_free(&self, id: SessionId) -> Result<(), Failure> {
        if self.taken.contains(&id) { Err(busy(id)) } else { Ok(()) }
    }

    /// What is still on its way to the session's file is not what the session says any more.
    pub(super) fn forget_file(&mut self, id: SessionId) {
        if let Some(file) = self.numbers.remove(&id) {
            self.files.remove(&file);
        }
    }

    /// A turn that the journal has begun, or gone on with. The first `n_kept` tokens of the session have not changed.
    pub(super) fn turn(
        &mut self,
        owner: u64,
        id: SessionId,
        shape: &ImageShape,
        n_kept: u32,
        resumed: Option<Resumed>,
    ) -> Turn {
        self.forget_file(id);
        let (turn, file) = (TurnId(self.n_turns), FileId(self.n_turns));
        self.n_turns += 1;
        self.files.insert(file, (owner, id));
        self.numbers.insert(id, file);
        let (tokens, before) = resumed.map_or((Vec::new(), None), |resumed| (resumed.tokens, Some(resumed.before)));
        let answer =
            Answer { owner, id, holds: true, listener: None, resumed: before, is_closed: false, failure: None };
        self.answers.insert(turn, answer);
        let n_saved = self.store.saved_blocks(owner, id, shape).unwrap_or_else(|error| {
            log::warn!(session:% = id, reason:% = error; "blocks cannot be read, they are computed again");
            0
        });
        for (session, fault) in self.store.take_dropped() {
            log::info!(session:%, reason:% = fault; "blocks of a session are of no use here, they are computed again");
        }
        let number = self.store.summary(owner, id).map_or(0, |summary| summary.n_turns.saturating_sub(1));
        let standing = self.standings.begin(id, number);
        let recorder = Recorder::new(self.asks.clone(), turn, id, standing);
        Turn { file, n_saved: n_saved.min(n_kept / BLOCK_TOKENS), resumed: tokens, recorder: Some(recorder) }
    }
}

/// What a surface hears of a store's error.
pub(super) fn failure(id: SessionId, error: &StoreError) -> Failure {
    match *error {
        StoreError::NotFound => Failure::SessionNotFound { id: id.to_string() },
        StoreError::Busy(state) => Failure::SessionBusy { id: id.to_string(), state },
        StoreError::LimitReached { what, limit } => Failure::SessionLimit { what, limit },
        StoreError::Invalid { what } => Failure::invalid("session", what),
        StoreError::Damaged { .. } | StoreError::UnknownVersion { .. } | StoreError::UnknownRecord { .. } => {
            Failure::SessionDamaged { reason: error.to_string() }
        }
        _ => Failure::DiskFailed { reason: error.to_string() },
    }
}

fn busy(id: SessionId) -> Failure {
    Failure::SessionBusy { id: id.to_string(), state: "being answered" }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::Owner;
    use crate::durable::Restore;
    use crate::sessions::Trial;
    use crate::sessions::wishes::{Asked, Wishes};
    use crate::sessions::{CutTurn, Durability};
    use crate::testing::{SmallDisk, Whims};
    use crate::{Change, ChatRequest};
    use sparsed_session::{Limits, Loaded, MasterKey, NewSession, NewTurn, OsDisk, Outcome, State};
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU64, Ordering};
    use std::sync::mpsc::sync_channel;

    const SHAPE: ImageShape = ImageShape { fingerprint: [1; 32], block_bytes: 8 };

    /// A keeper without a thread, and a session.
    fn keeper(dir: &std::path::Path) -> (Keeper, SessionId, Receiver<Command>) {
        keeper_on(Box::new(OsDisk::open(dir).unwrap()))
    }

    fn keeper_on(disk: AnyDisk) -> (Keeper, SessionId, Receiver<Command>) {
        let (mut keeper, commands) = keeper_of(disk);
        let new = NewSession { model: "m", fingerprint: [0; 32], title: "", settings: None, pinned: false };
        let id = keeper.store.create(1, &new, 0).unwrap();
        (keeper, id, commands)
    }

    /// A keeper of what is there.
    fn keeper_of(disk: AnyDisk) -> (Keeper, Receiver<Command>) {
        let (engine, commands) = sync_channel(16);
        let mut n = 7_u64;
        let random = Box::new(move |bytes: &mut [u8]| {
            bytes.fill_with(|| {
                n = n.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                (n >> 56) as u8
            })
        });
        let (store, _) = Store::open(disk, random, MasterKey::new([7; 32]), Limits::default()).unwrap();
        let clocks = Clocks { date: Box::new(|| 0), uptime: Box::new(|| Duration::ZERO) };
        (Keeper::new(store, Asks::new().0, engine, clocks), commands)
    }

    fn begin(keeper: &mut Keeper, id: SessionId, keep_tokens: u32, prompt: &[u32]) -> Turn {
        keeper.take_session(1, id).unwrap();
        let turn = NewTurn { keep_tokens, prompt, request: b"", sampling: b"" };
        keeper.store.begin_turn(1, id, &turn, 0).unwrap();
        keeper.turn(1, id, &SHAPE, keep_tokens, None)
    }

    fn end(keeper: &mut Keeper, id: SessionId) {
        keeper.store.end_turn(1, id, Outcome::Complete, b"", 0).unwrap();
        keeper.let_go(1, id);
    }

    #[test]
    fn an_image_of_what_a_session_no_longer_says_is_not_kept() {
        let dir = tempfile::tempdir().unwrap();
        let (mut keeper, id, commands) = keeper(dir.path());
        let first = begin(&mut keeper, id, 0, &[1; 128]);
        let save = |turn: &Turn, index| Save { file: turn.file, index, block: sparsed_kv::BlockId(0) };
        let image = |keeper: &mut Keeper, save| {
            keeper.take(Ask::Save { slot: 0, shape: SHAPE, save, image: vec![9; 8] });
            keeper.write_image();
        };
        image(&mut keeper, save(&first, 0));
        assert_eq!(keeper.store.saved_blocks(1, id, &SHAPE).unwrap(), 1);
        end(&mut keeper, id);
        // Other tokens from the second block on; the first turn's image of it comes late.
        let second = begin(&mut keeper, id, 64, &[2; 64]);
        assert_eq!(second.n_saved, 1);
        image(&mut keeper, save(&first, 1));
        assert_eq!(keeper.store.saved_blocks(1, id, &SHAPE).unwrap(), 1, "it was sealed under other tokens");
        image(&mut keeper, save(&second, 1));
        assert_eq!(keeper.store.saved_blocks(1, id, &SHAPE).unwrap(), 2);
        assert_eq!(commands.try_iter().count(), 3, "the engine hears of each");
    }

    #[test]
    fn on_a_disk_that_is_almost_full_the_oldest_images_go_for_new_ones() {
        let dir = tempfile::tempdir().unwrap();
        let whims = Whims::default();
        let (mut keeper, first, _commands) = keeper_on(Box::new(SmallDisk::open(dir.path(), &whims)));
        let set = |capacity| whims.capacity.store(capacity, Ordering::Relaxed);
        set(4 * RESERVE_BYTES);
        let new = NewSession { model: "m", fingerprint: [0; 32], title: "", settings: None, pinned: false };
        let ids = [first, keeper.create(1, &new).unwrap(), keeper.create(1, &new).unwrap()];
        let save = |keeper: &mut Keeper, id: SessionId| {
            let turn = begin(keeper, id, 0, &[1; 64]);
            let save = Save { file: turn.file, index: 0, block: sparsed_kv::BlockId(0) };
            keeper.take(Ask::Save { slot: 0, shape: SHAPE, save, image: vec![9; 8] });
            end(keeper, id);
            keeper.flush();
            keeper.write_image();
            ids.map(|id| keeper.store.saved_blocks(1, id, &SHAPE).unwrap())
        };
        assert_eq!(save(&mut keeper, ids[0]), [1, 0, 0]);
        assert_eq!(save(&mut keeper, ids[1]), [1, 1, 0]);
        // Just as much is left as what is said may want.
        let used = 4 * RESERVE_BYTES - keeper.store.free_bytes().unwrap();
        set(RESERVE_BYTES + used);
        assert_eq!(save(&mut keeper, ids[2]), [0, 1, 1]);
        // What others have filled the disk with: nothing is gained by removing all there is.
        set(RESERVE_BYTES / 2);
        assert_eq!(save(&mut keeper, ids[0]), [0, 1, 1]);
    }

    #[test]
    fn a_session_that_finds_no_room_within_its_quota_says_so_once_until_there_was_some() {
        let dir = tempfile::tempdir().unwrap();
        let (mut keeper, id, _commands) = keeper(dir.path());
        let turn = begin(&mut keeper, id, 0, &[1; 64]);
        let full = Err(StoreError::LimitReached { what: "bytes of all KV files", limit: 1 });
        for (kv_bytes, is_over) in [(1, true), (1, true), (1 << 20, false)] {
            keeper.store.set_limits(Limits { kv_bytes, ..Limits::default() });
            let save = Save { file: turn.file, index: 0, block: sparsed_kv::BlockId(0) };
            keeper.take(Ask::Save { slot: 0, shape: SHAPE, save, image: vec![9; 8] });
            keeper.write_image();
            assert_eq!(keeper.over_quota.contains(&id), is_over, "{kv_bytes}");
        }
        assert_eq!(
            [full, full, Ok(()), full].map(|saved| keeper.is_news(id, saved, false)),
            [true, false, false, true]
        );
        let failed = Err(StoreError::Io(std::io::ErrorKind::Other));
        assert!(keeper.is_news(id, failed, false) && keeper.is_news(id, failed, false), "the disk is another matter");
        end(&mut keeper, id);
        keeper.delete(1, id).unwrap();
        assert!(keeper.over_quota.is_empty());
    }

    #[test]
    fn what_is_to_survive_a_power_cut_has_the_room_of_images_on_a_full_disk() {
        let dir = tempfile::tempdir().unwrap();
        let whims = Whims::default();
        let (mut keeper, id, _commands) = keeper_on(Box::new(SmallDisk::open(dir.path(), &whims)));
        whims.capacity.store(4 * RESERVE_BYTES, Ordering::Relaxed);
        // Larger than the journal, which is written anew after a write that failed.
        let shape = ImageShape { block_bytes: 4096, ..SHAPE };
        let new = NewSession { model: "m", fingerprint: [0; 32], title: "", settings: None, pinned: false };
        let idle = keeper.create(1, &new).unwrap();
        let turn = begin(&mut keeper, idle, 0, &[1; 64]);
        let save = Save { file: turn.file, index: 0, block: sparsed_kv::BlockId(0) };
        keeper.take(Ask::Save { slot: 0, shape, save, image: vec![9; 4096] });
        end(&mut keeper, idle);
        begin(&mut keeper, id, 0, &[1; 64]);
        keeper.flush();
        keeper.write_image();
        assert_eq!(keeper.store.saved_blocks(1, idle, &shape).unwrap(), 1);
        let used = 4 * RESERVE_BYTES - keeper.store.free_bytes().unwrap();
        whims.capacity.store(used, Ordering::Relaxed);
        keeper.store.append_tokens(1, id, &[4]).unwrap();
        assert_eq!(keeper.checkpoint(1, id), Ok(()));
        assert_eq!(keeper.store.saved_blocks(1, idle, &shape).unwrap(), 0, "it can be computed again");
        assert_eq!(keeper.store.history(1, id).unwrap().tokens.len(), 65);
    }

    #[test]
    fn a_change_that_could_not_be_written_is_taken_back() {
        let dir = tempfile::tempdir().unwrap();
        let whims = Whims::default();
        let (mut keeper, id, _commands) = keeper_on(Box::new(SmallDisk::open(dir.path(), &whims)));
        begin(&mut keeper, id, 0, &[1; 3]);
        end(&mut keeper, id);
        keeper.flush();
        let before = keeper.store.summary(1, id).unwrap();
        whims.is_full.store(true, Ordering::Relaxed);
        let change = Change { title: Some("other".to_owned()), pinned: Some(true), ..Change::default() };
        assert_eq!(keeper.change(1, id, &change), Err(StoreError::DiskFull));
        assert!(matches!(keeper.truncate(1, id, 0), Err(Failure::DiskFailed { .. })));
        whims.is_full.store(false, Ordering::Relaxed);
        keeper.flush();
        assert_eq!(keeper.store.summary(1, id).unwrap(), before);
        assert_eq!(keeper.change(1, id, &change).unwrap().title, "other");
    }

    #[test]
    fn an_answer_that_is_sent_again_is_on_the_disk_for_good_unless_its_session_does_without() {
        for (durability, n_expected) in [(Durability::Token, 1), (Durability::Turn, 1), (Durability::None, 0)] {
            let (dir, whims) = (tempfile::tempdir().unwrap(), Whims::default());
            let open = || Box::new(SmallDisk::open(dir.path(), &whims));
            let (mut keeper, id, _) = keeper_on(open());
            let change = Change { durability: Some(durability), ..Change::default() };
            keeper.change(1, id, &change).unwrap();
            begin(&mut keeper, id, 0, &[1; 3]);
            keeper.store.append_tokens(1, id, &[4, 5]).unwrap();
            keeper.flush();
            drop(keeper);
            let (mut keeper, _) = keeper_of(open());
            let n_before = whims.n_syncs.load(Ordering::Relaxed);
            keeper.take_session(1, id).unwrap();
            let cut = CutTurn { n_prompt: 3, answered: vec![4, 5], said: Vec::new(), is_cancelled: false };
            keeper.resume(1, id, &SHAPE, cut).unwrap();
            assert_eq!(whims.n_syncs.load(Ordering::Relaxed) - n_before, n_expected, "{durability:?}");
        }
    }

    #[test]
    fn a_block_that_is_still_to_be_written_can_be_restored() {
        let dir = tempfile::tempdir().unwrap();
        let (mut keeper, id, commands) = keeper(dir.path());
        let turn = begin(&mut keeper, id, 0, &[1; 128]);
        let other = FileId(turn.file.0 + 1);
        for (file, index, image) in [(turn.file, 0, [1; 8]), (turn.file, 1, [2; 8]), (other, 2, [3; 8])] {
            let save = Save { file, index, block: sparsed_kv::BlockId(0) };
            keeper.take(Ask::Save { slot: 0, shape: SHAPE, save, image: image.to_vec() });
        }
        // None written, the first one, both.
        for _ in 0..3 {
            assert_eq!(brought(&mut keeper, &turn, 3, &commands), [[1; 8], [2; 8]]);
            keeper.write_image();
        }
    }

    /// What a restore of blocks `0 .. n` brings.
    fn brought(keeper: &mut Keeper, turn: &Turn, n: u32, commands: &Receiver<Command>) -> Vec<Vec<u8>> {
        let restore = Restore { sequence: crate::sequence::SequenceId(0), file: turn.file, first: 0, n };
        keeper.take(Ask::Restore { slot: 0, shape: SHAPE, restore, spare: vec![vec![7; 5], Vec::new()] });
        let brought = commands.iter().find_map(|command| match command {
            Command::Restored { restored, .. } => Some(restored.images),
            _ => None,
        });
        brought.unwrap()
    }

    #[test]
    fn two_threads_bring_what_one_does_and_stop_at_the_first_hole() {
        const N: u32 = 40;
        let dir = tempfile::tempdir().unwrap();
        let (mut keeper, id, commands) = keeper(dir.path());
        let (asks, asked) = Asks::new();
        keeper.asks = asks;
        let turn = begin(&mut keeper, id, 0, &[1; 64 * N as usize]);
        let image = |index: u32| vec![index as u8; 8];
        let save = |keeper: &mut Keeper, index| {
            keeper.store.save_block(1, id, &SHAPE, index, &image(index)).unwrap();
        };
        (0..N).for_each(|index| save(&mut keeper, index));
        for is_helped in [false, true] {
            spoil(dir.path(), 17);
            keeper.readers = if is_helped { Readers::two().unwrap() } else { Readers::default() };
            let whole: Vec<_> = (0..17).map(image).collect();
            assert_eq!(brought(&mut keeper, &turn, N, &commands), whole);
            asked.try_iter().for_each(|ask| keeper.take(ask));
            assert_eq!(keeper.store.saved_blocks(1, id, &SHAPE).unwrap(), 17, "the hole is known now");
            save(&mut keeper, 17);
            // Nothing of the last window is left over for this one.
            let all: Vec<_> = (0..N).map(image).collect();
            assert_eq!(brought(&mut keeper, &turn, N, &commands), all);
        }
    }

    #[test]
    fn while_one_session_is_read_from_a_slow_disk_the_answer_of_another_goes_on() {
        let (dir, whims) = (tempfile::tempdir().unwrap(), Whims::default());
        let (mut keeper, slow, commands) = keeper_on(Box::new(SmallDisk::open(dir.path(), &whims)));
        keeper.readers = Readers::two().unwrap();
        let new = NewSession { model: "m", fingerprint: [0; 32], title: "", settings: None, pinned: false };
        let other = keeper.create(1, &new).unwrap();
        let turn = begin(&mut keeper, slow, 0, &[1; 128]);
        (0..2).for_each(|at| keeper.store.save_block(1, slow, &SHAPE, at, &[9; 8]).unwrap());
        begin(&mut keeper, other, 0, &[2; 3]);
        let listener = crate::testing::Listener::with_room(9);
        let (sink, flow) = (Box::new(listener.clone()), Arc::default());
        keeper.take(Ask::Listen { turn: TurnId(1), sink, flow });
        whims.hold(true);
        let restore = Restore { sequence: crate::sequence::SequenceId(0), file: turn.file, first: 0, n: 2 };
        keeper.take(Ask::Restore { slot: 0, shape: SHAPE, restore, spare: Vec::new() });
        let delta = crate::api::Event::Delta { text: String::new(), tokens: vec![7] };
        keeper.event(TurnId(1), crate::api::Event::Sampled { token: 7 });
        keeper.event(TurnId(1), delta);
        keeper.flush();
        keeper.deliver();
        assert_eq!(listener.heard().0, [7]);
        assert!(commands.try_recv().is_err(), "the disk has given nothing yet");
        whims.hold(false);
        let Ok(Command::Restored { restored, .. }) = commands.recv() else { panic!("something else was told") };
        assert_eq!(restored.images, [[9; 8]; 2]);
    }

    /// Overwrites place `index` of the only session's images.
    fn spoil(dir: &std::path::Path, index: u64) {
        let entries = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
        for path in entries {
            if path.is_dir() {
                spoil(&path, index);
            } else if path.ends_with("kv") {
                let file = std::fs::File::options().write(true).open(path).unwrap();
                std::os::unix::fs::FileExt::write_all_at(&file, &[9; 64], 4096 * (1 + index)).unwrap();
            }
        }
    }

    #[test]
    fn a_turn_that_could_not_be_journaled_says_so_to_whoever_comes_to_hear_it() {
        let dir = tempfile::tempdir().unwrap();
        let (mut keeper, id, _commands) = keeper(dir.path());
        let _turn = begin(&mut keeper, id, 0, &[1; 3]);
        keeper.fail(TurnId(0), &StoreError::DiskFull);
        let listener = crate::testing::Listener::with_room(9);
        let (sink, flow) = (Box::new(listener.clone()), Arc::default());
        keeper.take(Ask::Listen { turn: TurnId(0), sink, flow });
        keeper.deliver();
        let (_, end) = listener.heard();
        assert!(matches!(end, Some(crate::api::Event::Failed(Failure::DiskFailed { .. }))), "{end:?}");
        keeper.take_session(1, id).unwrap();
    }

    #[test]
    fn an_answer_that_was_cut_is_still_that_when_nobody_had_time_to_go_on_with_it() {
        let dir = tempfile::tempdir().unwrap();
        let (mut keeper, id, _commands) = keeper(dir.path());
        let full = || Failure::QueueFull { limit: 1, retry_after_s: 1 };
        let impossible = || Failure::GrammarFailed { reason: String::new() };
        let too_long = || Failure::ContextTooLong { have_tokens: 3, max_tokens: 2 };
        let broken = || Failure::BackendFailed { reason: String::new() };
        for (is_cancelled, failure, state) in [
            (false, full(), State::Interrupted),
            (true, full(), State::Idle),
            (false, impossible(), State::Idle),
            (false, too_long(), State::Idle),
            (true, too_long(), State::Idle),
            (false, broken(), State::Idle),
        ] {
            let before = Before { is_cancelled, said: b"Some words".to_vec() };
            keeper.take_session(1, id).unwrap();
            let turn = NewTurn { keep_tokens: 0, prompt: &[1; 3], request: b"", sampling: b"" };
            keeper.store.begin_turn(1, id, &turn, 0).unwrap();
            keeper.store.append_tokens(1, id, &[4, 5]).unwrap();
            keeper.store.end_turn(1, id, Outcome::Interrupted, b"", 0).unwrap();
            keeper.store.resume_turn(1, id).unwrap();
            keeper.turn(1, id, &SHAPE, 5, Some(Resumed { tokens: vec![4, 5], before }));
            let turn = TurnId(keeper.n_turns - 1);
            let sink = Box::new(crate::testing::Listener::with_room(9));
            keeper.take(Ask::Listen { turn, sink, flow: Arc::default() });
            // Of what it had said a part may be on its way again.
            keeper.event(turn, crate::api::Event::Delta { text: "Some".to_owned(), tokens: Vec::new() });
            keeper.event(turn, crate::api::Event::Failed(failure.clone()));
            keeper.deliver();
            assert_eq!(keeper.store.summary(1, id).unwrap().state, state, "{failure}");
            let history = keeper.store.history(1, id).unwrap();
            assert_eq!(history.tokens, [1, 1, 1, 4, 5], "{failure}");
            let answer = String::from_utf8_lossy(&history.turns.last().unwrap().answer);
            // One that is to be finished is told from its tokens.
            assert!(state == State::Interrupted || answer == "Some words", "{failure}: {answer}");
            keeper.store.release(1, id).unwrap();
        }
    }

    #[test]
    fn a_cut_answer_that_would_fail_again_is_ended_with_what_it_has_said_and_the_next_turn_begins() {
        let dir = tempfile::tempdir().unwrap();
        let (mut keeper, id, _commands) = keeper(dir.path());
        begin(&mut keeper, id, 0, &[1; 3]);
        keeper.store.append_tokens(1, id, &[4, 5]).unwrap();
        keeper.store.end_turn(1, id, Outcome::Interrupted, b"", 0).unwrap();
        assert_eq!(keeper.store.summary(1, id).unwrap().state, State::Interrupted);
        keeper.give_up(1, id, b"Some words").unwrap();
        let history = keeper.store.history(1, id).unwrap();
        let last = history.turns.last().unwrap();
        assert_eq!((last.outcome, last.answer.as_slice()), (Some(Outcome::Cancelled), b"Some words".as_slice()));
        assert_eq!((history.tokens.len(), history.is_open()), (5, false));
        keeper.let_go(1, id);
        begin(&mut keeper, id, 5, &[6]);
        assert_eq!(keeper.give_up(1, id, b"").map_err(|failure| failure.may_pass()), Err(true), "it is being answered");
    }

    #[test]
    fn an_image_of_a_turn_that_could_not_be_journaled_is_not_kept_as_one_of_what_was_said_before() {
        let dir = tempfile::tempdir().unwrap();
        let (mut keeper, id, _commands) = keeper(dir.path());
        begin(&mut keeper, id, 0, &[1; 64]);
        end(&mut keeper, id);
        keeper.flush();
        let turn = begin(&mut keeper, id, 0, &[2; 64]);
        let save = Save { file: turn.file, index: 0, block: sparsed_kv::BlockId(0) };
        keeper.take(Ask::Save { slot: 0, shape: SHAPE, save, image: vec![9; 8] });
        keeper.fail(TurnId(1), &StoreError::DiskFull);
        assert_eq!(keeper.store.history(1, id).unwrap().tokens, [1; 64]);
        keeper.write_image();
        assert_eq!(keeper.store.load_block(1, id, &SHAPE, 0, &mut Vec::new()), Ok(Loaded::Missing));
        keeper.deliver();
    }

    #[test]
    fn an_answer_in_the_background_goes_on_alone_until_that_has_failed_too_often() {
        let dir = tempfile::tempdir().unwrap();
        let (mut keeper, id, _commands) = keeper(dir.path());
        for in_background in [false, true] {
            let wishes = Wishes { in_background, ..Wishes::default() };
            let (request, sampling) = Asked { chat: ChatRequest::default(), wishes, n_left_out: 0 }.encode();
            let turn = NewTurn { keep_tokens: 0, prompt: &[1; 3], request: &request, sampling: &sampling };
            keeper.take_session(1, id).unwrap();
            keeper.store.begin_turn(1, id, &turn, 0).unwrap();
            assert_eq!(keeper.goes_on_alone(1, id), Ok(None), "somebody has it");
            keeper.store.end_turn(1, id, Outcome::Interrupted, b"", 0).unwrap();
            keeper.let_go(1, id);
            if !in_background {
                assert_eq!(keeper.goes_on_alone(1, id), Ok(None), "its client may ask for it");
            }
        }
        for _ in 0..3 {
            assert_eq!(keeper.goes_on_alone(1, id), Ok(Some(1)));
        }
        assert_eq!(keeper.goes_on_alone(1, id), Ok(None));
        keeper.store.resume_turn(1, id).unwrap();
        keeper.store.append_tokens(1, id, &[5]).unwrap();
        keeper.store.end_turn(1, id, Outcome::Interrupted, b"", 0).unwrap();
        assert_eq!(keeper.goes_on_alone(1, id), Ok(Some(1)), "it has got on");
        // A copy of it has somebody else behind it, or nobody.
        let fork = keeper.fork(1, id, None).unwrap();
        let file = keeper.store.export(1, id).unwrap();
        let import = keeper.import(1, &file).unwrap();
        for copy in [fork, import] {
            assert_eq!(keeper.store.summary(1, copy).unwrap().state, State::Interrupted);
            assert_eq!(keeper.goes_on_alone(1, copy), Ok(None));
        }
        keeper.store.resume_turn(1, id).unwrap();
        end(&mut keeper, id);
        assert_eq!(keeper.goes_on_alone(1, id), Ok(None), "it is over");
    }

    #[test]
    fn an_answer_that_there_was_no_time_for_has_not_ended_the_daemon() {
        let dir = tempfile::tempdir().unwrap();
        let (mut keeper, id, _commands) = keeper(dir.path());
        let wishes = Wishes { in_background: true, ..Wishes::default() };
        let (request, sampling) = Asked { chat: ChatRequest::default(), wishes, n_left_out: 0 }.encode();
        let turn = NewTurn { keep_tokens: 0, prompt: &[1; 3], request: &request, sampling: &sampling };
        keeper.store.begin_turn(1, id, &turn, 0).unwrap();
        keeper.store.append_tokens(1, id, &[4]).unwrap();
        keeper.store.end_turn(1, id, Outcome::Interrupted, b"", 0).unwrap();
        let again = |keeper: &mut Keeper, failure: Option<Failure>| {
            assert_eq!(keeper.goes_on_alone(1, id), Ok(Some(0)));
            keeper.take_session(1, id).unwrap();
            keeper.store.resume_turn(1, id).unwrap();
            let before = Before { is_cancelled: false, said: Vec::new() };
            keeper.turn(1, id, &SHAPE, 4, Some(Resumed { tokens: vec![4], before }));
            let turn = TurnId(keeper.n_turns - 1);
            if let Some(failure) = failure {
                let sink = Box::new(crate::testing::Listener::with_room(9));
                keeper.take(Ask::Listen { turn, sink, flow: Arc::default() });
                keeper.event(turn, crate::api::Event::Failed(failure));
            }
            keeper.gone(turn);
            keeper.deliver();
        };
        for _ in 0..5 {
            again(&mut keeper, Some(Failure::MemoryShort { retry_after_s: 1 }));
            again(&mut keeper, None);
            again(&mut keeper, Some(Failure::ShuttingDown));
        }
        // Those of daemons that have died at it count.
        for _ in 0..3 {
            assert_eq!(keeper.goes_on_alone(1, id), Ok(Some(0)));
        }
        assert_eq!(keeper.goes_on_alone(1, id), Ok(None));
    }

    #[test]
    fn only_sessions_that_somebody_has_taken_stay_in_memory() {
        let dir = tempfile::tempdir().unwrap();
        let (mut keeper, id, _commands) = keeper(dir.path());
        keeper.rest(1, id);
        let new = NewSession { model: "m", fingerprint: [0; 32], title: "", settings: None, pinned: false };
        let made: Vec<SessionId> = (0..5).map(|_| keeper.create(1, &new).unwrap()).collect();
        assert_eq!(keeper.store.usage().loaded, 0);
        let turn = begin(&mut keeper, id, 0, &[1; 128]);
        let other = begin(&mut keeper, made[0], 0, &[2; 64]);
        assert_eq!(keeper.store.usage().loaded, 2, "two are being answered");
        for (file, index) in [(turn.file, 0), (other.file, 0), (turn.file, 1)] {
            let save = Save { file, index, block: sparsed_kv::BlockId(0) };
            keeper.take(Ask::Save { slot: 0, shape: SHAPE, save, image: vec![9; 8] });
        }
        [id, made[0]].into_iter().for_each(|id| end(&mut keeper, id));
        keeper.flush();
        let loaded: Vec<u64> = std::iter::repeat_with(|| {
            keeper.write_image();
            keeper.store.usage().loaded
        })
        .take(3)
        .collect();
        assert_eq!(loaded, [1, 1, 0], "each is let go of with its last image");
        let fork = keeper.fork(1, id, None).unwrap();
        keeper.truncate(1, fork, 0).unwrap();
        let file = keeper.store.export(1, id).unwrap();
        keeper.rest(1, id);
        begin(&mut keeper, id, 128, &[3]);
        keeper.gone(TurnId(keeper.n_turns - 1));
        assert_eq!(keeper.store.usage().loaded, 1, "it is not written");
        keeper.flush();
        keeper.import(1, &file).unwrap();
        assert_eq!(keeper.goes_on_alone(1, id), Ok(None));
        assert_eq!(keeper.store.usage().loaded, 0);
    }

    #[test]
    fn what_a_list_shows_of_a_session_is_told_without_reading_what_was_said() {
        let dir = tempfile::tempdir().unwrap();
        let (mut keeper, id, _commands) = keeper(dir.path());
        keeper.rest(1, id);
        let Keeper { store, engine, clocks, .. } = keeper;
        let (sessions, thread) = spawn(SessionStore::Open(Box::new(store)), engine, clocks).unwrap();
        remove_journals(dir.path());
        let owner = Owner::numbered(1).unwrap();
        assert_eq!(sessions.summary(owner, id).unwrap().model, "m");
        assert!(matches!(sessions.get(owner, id), Err(Failure::DiskFailed { .. })));
        sessions.asks().tell(Ask::Stop);
        thread.join().unwrap();
    }

    fn remove_journals(dir: &std::path::Path) {
        for path in std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()) {
            if path.is_dir() {
                remove_journals(&path);
            } else if path.ends_with("journal") {
                std::fs::remove_file(path).unwrap();
            }
        }
    }

    #[test]
    fn nothing_is_left_of_a_session_that_is_past_its_retention() {
        let dir = tempfile::tempdir().unwrap();
        let (mut keeper, id, _commands) = keeper(dir.path());
        keeper.store.set_limits(Limits { retention_seconds: 100, ..Limits::default() });
        let (now, day) = (Arc::new(AtomicU64::new(0)), sparsed_session::DATE_MIN_S);
        let [date, uptime] = [&now, &now].map(Arc::clone);
        keeper.clocks = Clocks {
            date: Box::new(move || day + date.load(Ordering::Relaxed)),
            uptime: Box::new(move || Duration::from_secs(uptime.load(Ordering::Relaxed))),
        };
        begin(&mut keeper, id, 0, &[1; 3]);
        end(&mut keeper, id);
        keeper.flush();
        keeper.deliver();
        keeper.alone.insert(id);
        let kept = keeper.standings.begin(id, 0);
        // The clock is believed after an hour; the session was used before it was set, which is then.
        for (at, is_there) in [(0, true), (4000, true), (4700, false)] {
            now.store(at, Ordering::Relaxed);
            keeper.expire();
            assert_eq!([keeper.store.summary(1, id).is_ok(), kept.lasts()], [is_there; 2], "{at}");
        }
        assert!(keeper.numbers.is_empty() && keeper.files.is_empty() && keeper.alone.is_empty());
    }

    #[test]
    fn what_somebody_keeps_of_a_turn_ends_with_it() {
        let dir = tempfile::tempdir().unwrap();
        let (mut keeper, id, _commands) = keeper(dir.path());
        let answered = |keeper: &mut Keeper| {
            let turn = begin(keeper, id, 0, &[1; 3]);
            keeper.store.append_tokens(1, id, &[4]).unwrap();
            keeper.store.end_turn(1, id, Outcome::Cancelled, b"", 0).unwrap();
            keeper.let_go(1, id);
            turn.recorder.unwrap().standing()
        };
        let first = answered(&mut keeper);
        let second = answered(&mut keeper);
        keeper.truncate(1, id, 1).unwrap();
        assert_eq!([&first, &second].map(|turn| turn.lasts()), [true, false]);
        let second = answered(&mut keeper);
        let cut = CutTurn { n_prompt: 3, answered: vec![4], said: Vec::new(), is_cancelled: true };
        let resumed = keeper.resume(1, id, &SHAPE, cut).unwrap().recorder.unwrap().standing();
        assert_eq!([&first, &second, &resumed].map(|turn| turn.lasts()), [true, false, true]);
        keeper.gone(TurnId(keeper.n_turns - 1));
        assert!(keeper.delete(2, id).is_err() && first.lasts(), "it is not theirs");
        keeper.delete(1, id).unwrap();
        assert!(!first.lasts() && !resumed.lasts());
    }

    #[test]
    fn what_is_written_can_be_looked_at_without_waiting_for_the_thread() {
        let dir = tempfile::tempdir().unwrap();
        let (mut keeper, id, _commands) = keeper(dir.path());
        let (board, (_, asked)) = (keeper.posts.board.clone(), Asks::new());
        let now = Arc::new(AtomicU64::new(0));
        let uptime = Arc::clone(&now);
        keeper.clocks.uptime = Box::new(move || Duration::from_millis(uptime.load(Ordering::Relaxed)));
        assert!(board.look().is_none(), "there is no store yet");
        keeper.round(&asked, 1);
        let made = board.look().unwrap();
        assert_eq!((made.sessions, made.kv_bytes_written), (1, 0));
        let turn = begin(&mut keeper, id, 0, &[1; 64]);
        let save = Save { file: turn.file, index: 0, block: sparsed_kv::BlockId(0) };
        keeper.take(Ask::Save { slot: 0, shape: SHAPE, save, image: vec![9; 8] });
        keeper.round(&asked, 1);
        assert_eq!(board.look(), Some(made), "more is to come in a moment");
        now.store(1000, Ordering::Relaxed);
        keeper.round(&asked, 1);
        let later = board.look().unwrap();
        assert!(later.journal_bytes_written > made.journal_bytes_written && later.kv_bytes_written >= 8, "{later:?}");
        keeper.gone(TurnId(0));
        keeper.round(&asked, 1);
        assert!(board.look().unwrap().journal_bytes_written > later.journal_bytes_written, "nobody is answered");
    }

    /// A session that was made for a turn of another one, or for its first, and who waits for the turn.
    fn on_trial(keeper: &mut Keeper, of: Option<SessionId>) -> (SessionId, Trial, Receiver<Ask>) {
        let new = NewSession { model: "m", fingerprint: [0; 32], title: "", settings: None, pinned: false };
        let made = match of {
            Some(id) => keeper.fork(1, id, None),
            None => keeper.create(1, &new),
        };
        let (id, (asks, receiver)) = (made.unwrap(), Asks::new());
        let trial = Trial::begin(keeper, asks, Owner::Uid(1), id).unwrap();
        (id, trial, receiver)
    }

    fn give_up(keeper: &mut Keeper, (trial, asks): (Trial, Receiver<Ask>)) {
        drop(trial);
        asks.try_iter().for_each(|ask| keeper.take(ask));
    }

    #[test]
    fn a_session_that_was_made_for_a_turn_goes_again_when_there_is_none() {
        let dir = tempfile::tempdir().unwrap();
        let (mut keeper, origin, _commands) = keeper(dir.path());
        begin(&mut keeper, origin, 0, &[1; 3]);
        end(&mut keeper, origin);
        for of in [None, Some(origin)] {
            let is_there = |keeper: &Keeper, id| keeper.store.summary(1, id).is_ok();
            let (id, trial, asks) = on_trial(&mut keeper, of);
            assert!(is_there(&keeper, id));
            give_up(&mut keeper, (trial, asks));
            assert!(!is_there(&keeper, id), "nothing was begun");

            // It is let go of while its model is loaded, and taken again.
            let (id, trial, asks) = on_trial(&mut keeper, of);
            keeper.take_session(1, id).unwrap();
            keeper.let_go(1, id);
            keeper.take_session(1, id).unwrap();
            give_up(&mut keeper, (trial, asks));
            assert!(is_there(&keeper, id), "somebody begins a turn");
            keeper.let_go(1, id);
            assert!(!is_there(&keeper, id), "and has not");

            // The engine has refused it, or its client went away before the first token.
            let (id, trial, asks) = on_trial(&mut keeper, of);
            begin(&mut keeper, id, 0, &[1; 3]);
            give_up(&mut keeper, (trial, asks));
            keeper.gone(TurnId(keeper.n_turns - 1));
            keeper.flush();
            keeper.deliver();
            assert!(!is_there(&keeper, id), "it was taken back");

            let (id, trial, asks) = on_trial(&mut keeper, of);
            begin(&mut keeper, id, 0, &[1; 3]);
            keeper.store.append_tokens(1, id, &[4]).unwrap();
            give_up(&mut keeper, (trial, asks));
            end(&mut keeper, id);
            assert!(is_there(&keeper, id), "it was answered");
        }
        assert!(keeper.on_trial.is_empty() && keeper.store.summary(1, origin).is_ok());
    }

    #[test]
    fn of_two_that_go_on_from_one_turn_the_second_is_told_and_what_was_gone_on_from_is_not_forgotten() {
        let dir = tempfile::tempdir().unwrap();
        let (mut keeper, id, _commands) = keeper(dir.path());
        let went_on = || Err(Failure::SessionWentOn { id: id.to_string() });
        begin(&mut keeper, id, 0, &[1; 3]);
        end(&mut keeper, id);
        // Both have seen one turn; so has who deletes it.
        for expected in [Ok(()), went_on()] {
            keeper.take_session(1, id).unwrap();
            let checked = keeper.check_next(1, id, Some(1));
            assert_eq!(checked, expected);
            keeper.let_go(1, id);
            if checked.is_ok() {
                begin(&mut keeper, id, 3, &[2; 3]);
                end(&mut keeper, id);
            }
        }
        assert_eq!(keeper.forget_turn(1, id, 0), Ok(false));
        assert_eq!(keeper.check_next(1, id, None), Ok(()), "who does not mind");
        assert_eq!(keeper.store.summary(1, id).unwrap().n_turns, 2);
        assert_eq!(keeper.forget_turn(1, id, 1), Ok(true));
        assert_eq!(keeper.forget_turn(1, id, 1), Ok(false), "it is gone");
        assert_eq!(keeper.store.history(1, id).unwrap().tokens.len(), 3);
        assert_eq!(keeper.forget_turn(1, id, 0), Ok(true));
        assert!(keeper.store.summary(1, id).is_err(), "with its only turn");
    }

    #[test]
    fn a_session_is_taken_once_and_let_go_once() {
        let dir = tempfile::tempdir().unwrap();
        let (mut keeper, id, _commands) = keeper(dir.path());
        assert!(matches!(keeper.take_session(2, id), Err(Failure::SessionNotFound { .. })));
        keeper.take_session(1, id).unwrap();
        assert!(matches!(keeper.take_session(1, id), Err(Failure::SessionBusy { .. })));
        keeper.let_go(1, id);
        keeper.take_session(1, id).unwrap();
    }
}
