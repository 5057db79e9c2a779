//! What does the store know of one session?

use super::folder::Folder;
use super::report::Summary;
use crate::cipher::{KEY_FILE_BYTES, SessionKey};
use crate::disk::Disk;
use crate::error::{Result, StoreError};
use crate::history::{Durability, History, State};
use crate::id::SessionId;
use crate::image::{Digests, ImageShape};
use crate::journal::{self, Position, Replay, Tail, Unreadable};
use crate::limits::{DATE_MIN_S, Limits, RECORD_TOKENS_MAX};
use crate::record::Record;
use crate::suite::Suite;

/// One session.
pub(super) struct Session {
    pub(super) owner: u64,
    pub(super) id: SessionId,
    pub(super) key: SessionKey,
    pub(super) folder: Folder,
    /// Its history while it is in use.
    pub(super) history: Option<History>,
    /// What stays known of it while it is not.
    facts: Facts,
    pub(super) answering: bool,
    pub(super) journal: JournalFile,
    /// Records that are applied and not written.
    pub(super) pending: Vec<Record>,
    pending_bytes: u64,
    /// Whether the next flush must sync, whatever it writes.
    pub(super) must_sync: bool,
    pub(super) kv: KvFile,
    /// When it was last used, by the store's count.
    pub(super) last_use: u64,
    /// Its key may be destroyed: all that can be done is to delete it again.
    pub(super) doomed: bool,
}

/// A journal on the disk.
#[derive(Debug)]
pub(super) struct JournalFile {
    pub(super) position: Position,
    /// Whether all of its bytes survive a power cut.
    pub(super) is_synced: bool,
    /// Whether its name does.
    pub(super) is_named: bool,
    /// Whether nobody can say what is in it: it must be written again as a whole.
    pub(super) is_broken: bool,
    /// Whether something was cut from it.
    pub(super) is_cut: bool,
}

/// A KV file on the disk.
#[derive(Debug, Default)]
pub(super) struct KvFile {
    /// Its length; 0 when there is none.
    pub(super) n_bytes: u64,
    /// What is in it, once its header was read.
    pub(super) content: Option<KvContent>,
    /// Digests of the tokens in memory.
    pub(super) digests: Digests,
}

/// What is in a KV file.
#[derive(Debug)]
pub(super) struct KvContent {
    pub(super) shape: ImageShape,
    pub(super) suite: Suite,
    /// By block, whether there may be an image.
    pub(super) saved: Vec<bool>,
}

#[derive(Debug)]
struct Facts {
    title: String,
    model: String,
    created: u64,
    used: u64,
    n_tokens: u32,
    n_turns: u32,
    is_open: bool,
    pinned: bool,
    durability: Durability,
}

impl Facts {
    fn of(history: &History) -> Self {
        Self {
            title: history.title.clone(),
            model: history.model.clone(),
            created: history.created,
            used: history.used,
            n_tokens: count(history.tokens.len()),
            n_turns: count(history.turns.len()),
            is_open: history.is_open(),
            pinned: history.pinned,
            durability: history.settings.durability,
        }
    }

    /// What more tokens change.
    fn grow(&mut self, history: &History) {
        self.n_tokens = count(history.tokens.len());
        self.is_open = history.is_open();
    }
}

fn count(n: usize) -> u32 {
    u32::try_from(n).expect("limits of a history are below 2^32")
}

impl Session {
    /// A session with a journal of which nothing is known to be synced.
    pub(super) fn new(id: SessionId, key: SessionKey, history: History, position: Position) -> Self {
        Self {
            owner: history.owner,
            id,
            key,
            folder: Folder::of(history.owner, id),
            facts: Facts::of(&history),
            history: Some(history),
            answering: false,
            journal: JournalFile { position, is_synced: false, is_named: false, is_broken: false, is_cut: false },
            pending: Vec::new(),
            pending_bytes: 0,
            must_sync: false,
            kv: KvFile::default(),
            last_use: 0,
            doomed: false,
        }
    }

    pub(super) fn is_of(&self, owner: u64) -> bool {
        self.owner == owner && !self.doomed
    }

    pub(super) fn is_doomed(&self) -> bool {
        self.doomed
    }

    pub(super) fn pinned(&self) -> bool {
        self.facts.pinned
    }

    pub(super) fn used(&self) -> u64 {
        self.facts.used
    }

    /// Whether it may go, and was last used more than `retention` seconds before `now`.
    pub(super) fn is_old(&self, now: u64, retention: u64) -> bool {
        let is_old = now.checked_sub(self.used()).is_some_and(|seconds| seconds > retention);
        is_old && !self.pinned() && !self.answering
    }

    /// Takes it for used at `now` where its own date is none.
    pub(super) fn date(&mut self, now: u64) {
        if self.facts.used < DATE_MIN_S {
            self.facts.used = now;
        }
    }

    pub(super) fn durability(&self) -> Durability {
        self.facts.durability
    }

    pub(super) fn journal_bytes(&self) -> u64 {
        self.journal.position.n_bytes
    }

    pub(super) fn state(&self) -> State {
        match (self.answering, self.facts.is_open) {
            (true, _) => State::Answering,
            (false, true) => State::Interrupted,
            (false, false) => State::Idle,
        }
    }

    pub(super) fn summary(&self) -> Summary {
        Summary {
            id: self.id,
            title: self.facts.title.clone(),
            model: self.facts.model.clone(),
            created: self.facts.created,
            used: self.facts.used,
            n_tokens: self.facts.n_tokens,
            n_turns: self.facts.n_turns,
            state: self.state(),
            pinned: self.facts.pinned,
            disk_bytes: self.journal_bytes() + self.kv.n_bytes + KEY_FILE_BYTES as u64,
            damaged: self.journal.is_cut,
        }
    }

    /// The history, from the disk if need be.
    pub(super) fn load(&mut self, disk: &mut impl Disk) -> Result<&History> {
        if self.history.is_none() {
            self.read(disk)?;
        }
        self.history.as_ref().ok_or(StoreError::NotFound)
    }

    /// Takes history and position from the file, which loses what was not written.
    pub(super) fn read(&mut self, disk: &mut impl Disk) -> Result<()> {
        let file = self.folder.journal();
        let mut read = |offset, bytes: &mut [u8]| disk.read_at(&file, offset, bytes);
        let Replay { history, position, tail, rest } = journal::replay(&mut read, &self.key, self.owner, self.id)
            .map_err(|unreadable| match unreadable {
                Unreadable::Damaged => StoreError::Damaged { what: "the journal" },
                Unreadable::Version(version) => StoreError::UnknownVersion { what: "the journal", version },
                Unreadable::Record => StoreError::UnknownRecord { what: "the journal" },
                Unreadable::Disk(error) => error.into(),
            })?;
        cut_tail(disk, &self.folder, &rest, &position, tail)?;
        self.journal.is_cut |= tail == Tail::Damaged;
        self.facts = Facts::of(&history);
        self.history = Some(history);
        self.journal.position = position;
        self.journal.is_synced &= tail == Tail::Clean;
        self.pending.clear();
        self.pending_bytes = 0;
        self.kv.digests = Digests::default();
        self.kv.content = None;
        Ok(())
    }

    /// Lets go of the history if it can be read again; answers whether it can.
    pub(super) fn release(&mut self) -> bool {
        let is_written = self.pending.is_empty() && !self.journal.is_broken && !self.answering;
        if is_written {
            self.history = None;
            self.kv.digests = Digests::default();
        }
        is_written
    }

    /// Applies a record to the history, which is in memory, and queues it.
    pub(super) fn record(&mut self, record: Record, limits: &Limits) -> Result<()> {
        let history = self.history.as_mut().ok_or(StoreError::NotFound)?;
        if matches!(record, Record::Turn(_) | Record::Tokens(_)) {
            // Ends and cuts always find room: the limits are for what makes a session longer.
            let pending = self.pending_bytes.saturating_add(record.n_bytes());
            check("bytes that wait for a flush", pending, limits.pending_bytes)?;
            let journal = self.journal.position.n_bytes.saturating_add(pending);
            check("bytes of a journal", journal, limits.journal_bytes)?;
        }
        let durability = history.settings.durability;
        history.apply(&record).map_err(|misfit| StoreError::Invalid { what: misfit.0 })?;
        let n_valid = match &record {
            // Comes often and changes little.
            Record::Tokens(_) => {
                self.facts.grow(history);
                self.queue(record);
                return Ok(());
            }
            Record::Turn(turn) => turn.keep_tokens as usize,
            _ => history.tokens.len(),
        };
        self.facts = Facts::of(history);
        self.must_sync |= durability != Durability::None || self.facts.durability != Durability::None;
        self.queue(record);
        self.forget_images(n_valid);
        Ok(())
    }

    /// Forgets blocks whose tokens are not those of before, if there are any from `n_tokens` on.
    fn forget_images(&mut self, n_tokens: usize) {
        self.kv.digests.truncate(n_tokens);
        if let Some(content) = &mut self.kv.content {
            content.saved.truncate(n_tokens / crate::image::BLOCK_TOKENS);
        }
    }

    /// Queues a record; tokens become part of the record before them.
    fn queue(&mut self, record: Record) {
        self.pending_bytes = self.pending_bytes.saturating_add(record.n_bytes());
        if let (Some(Record::Tokens(before)), Record::Tokens(ids)) = (self.pending.last_mut(), &record)
            && before.len() + ids.len() <= RECORD_TOKENS_MAX
        {
            before.extend_from_slice(ids);
            return;
        }
        self.pending.push(record);
    }

    /// The pending records are in the file.
    pub(super) fn pending_is_written(&mut self, position: Position) {
        self.journal.position = position;
        self.pending.clear();
        self.pending_bytes = 0;
    }
}

impl std::fmt::Debug for Session {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Session").field("id", &self.id).field("journal", &self.journal).finish_non_exhaustive()
    }
}

/// Cuts `rest`, which makes no sense, off a journal; answers how many bytes of it are kept beside it.
///
/// Damage is kept as evidence first. A torn end is kept where there is room: it is what a power cut leaves.
pub(super) fn cut_tail(
    disk: &mut impl Disk,
    folder: &Folder,
    rest: &[u8],
    position: &Position,
    tail: Tail,
) -> Result<u64> {
    let n_kept = match tail {
        Tail::Clean => return Ok(0),
        Tail::Torn => folder.keep_torn(disk, rest).unwrap_or(0),
        Tail::Damaged => folder.keep_cut(disk, rest)?,
    };
    disk.set_len(&folder.journal(), position.n_bytes)?;
    Ok(n_kept)
}

/// As [`StoreError::LimitReached`] for more bytes than the limit.
pub(super) fn check(what: &'static str, n_bytes: u64, limit: u64) -> Result<()> {
    if n_bytes <= limit { Ok(()) } else { Err(StoreError::LimitReached { what, limit }) }
}
