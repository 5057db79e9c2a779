//! Where do a session's files lie, and how does its folder come and go?
//!
//! `sessions/<owner>/<id>/{key,journal,kv}`. A folder is filled under the name `<id>.tmp`, gets its own when all in it
//! is on the disk, and loses it again before its key is destroyed: one that has its name is whole.

use crate::cipher::KEY_FILE_BYTES;
use crate::disk::{Disk, DiskError, Place};
use crate::id::SessionId;

/// Ends the name of a folder that is being filled or emptied.
pub(super) const UNNAMED: &str = ".tmp";
/// Most bytes that are kept of the torn end of a journal; the next one takes its place.
const TORN_BYTES_MAX: usize = 1 << 20;
/// Most bytes that are kept of what damage has cut from a journal, by all cuts together.
const CUT_BYTES_MAX: u64 = 16 << 20;
/// Most cuts of which something is kept.
const CUTS_MAX: u32 = 16;
/// All that a session's folder may have, beside what [`cut_name`] calls.
const FILES: [&str; 7] = [KEY, JOURNAL, JOURNAL_NEW, TORN, UNSURE, TRIES, KV];
const KEY: &str = "key";
const JOURNAL: &str = "journal";
const JOURNAL_NEW: &str = "journal.new";
const KV: &str = "kv";
const CUT: &str = "journal.cut";
const TORN: &str = "journal.torn";
const UNSURE: &str = "journal.unsure";
const TRIES: &str = "tries";
/// Bytes of what the file [`TRIES`] says: turns, tokens, tries, each a `u32`.
const TRIES_BYTES: usize = 12;

type Done = Result<(), DiskError>;

/// Of what belongs to nobody.
pub(super) fn sessions() -> Place {
    Place::root().child("sessions")
}

/// Of one owner's sessions.
pub(super) fn of_owner(owner: u64) -> Place {
    sessions().child(&owner.to_string())
}

/// Of one session.
#[derive(Clone, Debug)]
pub(super) struct Folder {
    owner: Place,
    dir: Place,
    /// The same folder while it is filled or emptied.
    unnamed: Place,
}

impl Folder {
    pub(super) fn of(owner: u64, id: SessionId) -> Self {
        let owner = of_owner(owner);
        let (dir, unnamed) = (owner.child(&id.to_string()), owner.child(&format!("{id}{UNNAMED}")));
        Self { owner, dir, unnamed }
    }

    pub(super) fn key(&self) -> Place {
        self.dir.child(KEY)
    }

    pub(super) fn journal(&self) -> Place {
        self.dir.child(JOURNAL)
    }

    pub(super) fn kv(&self) -> Place {
        self.dir.child(KV)
    }

    /// What the first damage has cut from the journal.
    pub(super) fn cut(&self) -> Place {
        self.dir.child(&cut_name(0))
    }

    /// Waits until the session is found again after a power cut.
    pub(super) fn sync_names(&self, disk: &mut impl Disk) -> Done {
        disk.sync_dir(&self.dir)?;
        disk.sync_dir(&self.owner)?;
        disk.sync_dir(&sessions())?;
        disk.sync_dir(&Place::root())
    }

    /// Writes a journal that is to replace the one there is, which stays.
    pub(super) fn write_journal(&self, disk: &mut impl Disk, bytes: &[u8]) -> Done {
        let new = self.dir.child(JOURNAL_NEW);
        ignore_missing(disk.remove(&new))?;
        let written = write_new(disk, &new, bytes);
        if written.is_err() {
            best_effort(disk.remove(&new));
        }
        written
    }

    /// Puts it in the place of the old one. When that fails nobody knows which is there. The name is not synced.
    pub(super) fn replace_journal(&self, disk: &mut impl Disk) -> Done {
        disk.rename(&self.dir.child(JOURNAL_NEW), &self.journal())
    }

    /// Keeps the torn end of a journal, up to a limit. Answers the bytes that are kept.
    pub(super) fn keep_torn(&self, disk: &mut impl Disk, bytes: &[u8]) -> Result<u64, DiskError> {
        self.keep(disk, &bytes[..bytes.len().min(TORN_BYTES_MAX)], TORN)
    }

    /// Keeps what damage cuts from a journal, beside what earlier damage has cut, as far as the limits go. Answers the
    /// bytes that are kept.
    pub(super) fn keep_cut(&self, disk: &mut impl Disk, bytes: &[u8]) -> Result<u64, DiskError> {
        let mut left = CUT_BYTES_MAX;
        for number in 0..CUTS_MAX {
            match disk.len(&self.dir.child(&cut_name(number))) {
                Ok(n_bytes) => left = left.saturating_sub(n_bytes),
                Err(DiskError::NotFound) if left == 0 => break,
                Err(DiskError::NotFound) => {
                    let n_bytes = usize::try_from(left).unwrap_or(usize::MAX).min(bytes.len());
                    return self.keep(disk, &bytes[..n_bytes], &cut_name(number));
                }
                Err(error) => return Err(error),
            }
        }
        Ok(0)
    }

    fn keep(&self, disk: &mut impl Disk, bytes: &[u8], name: &str) -> Result<u64, DiskError> {
        let new = self.dir.child(JOURNAL_NEW);
        ignore_missing(disk.remove(&new))?;
        write_new(disk, &new, bytes)?;
        disk.rename(&new, &self.dir.child(name))?;
        disk.sync_dir(&self.dir)?;
        Ok(bytes.len() as u64)
    }

    /// Tells whoever opens the store next that the journal may look better than it is: a sync has failed, after which
    /// the system shows bytes that it may have given up writing.
    pub(super) fn mark_unsure(&self, disk: &mut impl Disk) {
        best_effort(disk.create(&self.dir.child(UNSURE)));
    }

    /// The journal was written again.
    pub(super) fn unmark_unsure(&self, disk: &mut impl Disk) {
        best_effort(disk.remove(&self.dir.child(UNSURE)));
    }

    /// Whether somebody has called [`Folder::mark_unsure`].
    pub(super) fn is_unsure(&self, disk: &mut impl Disk) -> Result<bool, DiskError> {
        match disk.len(&self.dir.child(UNSURE)) {
            Err(DiskError::NotFound) => Ok(false),
            length => length.map(|_| true),
        }
    }

    /// Counts a try to go on from `n_tokens` in turn `n_turns`; answers how many there were from there, this one
    /// included. Not synced: a power cut may take it back, the death of the process does not.
    pub(super) fn note_try(&self, disk: &mut impl Disk, n_turns: u32, n_tokens: u32) -> Result<u32, DiskError> {
        let found = self.tries(disk)?;
        if found.is_none() {
            disk.create(&self.dir.child(TRIES))?;
        }
        let n_tries = match found {
            Some([turns, tokens, n_tries]) if (turns, tokens) == (n_turns, n_tokens) => n_tries.saturating_add(1),
            _ => 1,
        };
        self.write_tries(disk, [n_turns, n_tokens, n_tries])?;
        Ok(n_tries)
    }

    /// Takes the last try back.
    pub(super) fn forget_try(&self, disk: &mut impl Disk) -> Done {
        match self.tries(disk)? {
            Some([n_turns, n_tokens, n_tries]) => {
                self.write_tries(disk, [n_turns, n_tokens, n_tries.saturating_sub(1)])
            }
            None => Ok(()),
        }
    }

    /// What the file of tries says, zeros where it is shorter; `None` without a file.
    fn tries(&self, disk: &mut impl Disk) -> Result<Option<[u32; 3]>, DiskError> {
        let mut bytes = [0; TRIES_BYTES];
        match disk.read_at(&self.dir.child(TRIES), 0, &mut bytes) {
            Err(DiskError::NotFound) => Ok(None),
            Ok(TRIES_BYTES) => {
                let (numbers, _) = bytes.as_chunks::<4>();
                Ok(Some(std::array::from_fn(|at| numbers.get(at).map_or(0, |bytes| u32::from_le_bytes(*bytes)))))
            }
            read => read.map(|_| Some([0; 3])),
        }
    }

    fn write_tries(&self, disk: &mut impl Disk, tries: [u32; 3]) -> Done {
        let bytes: Vec<u8> = tries.into_iter().flat_map(u32::to_le_bytes).collect();
        disk.write_at(&self.dir.child(TRIES), 0, &bytes)
    }

    /// Removes what a compaction left behind.
    pub(super) fn remove_unfinished(&self, disk: &mut impl Disk) -> Done {
        ignore_missing(disk.remove(&self.dir.child(JOURNAL_NEW)))
    }

    /// Makes the folder on the disk, whole or not at all.
    pub(super) fn build(&self, disk: &mut impl Disk, key_file: &[u8; KEY_FILE_BYTES], journal: &[u8]) -> Done {
        match disk.create_dir(&self.owner) {
            Err(DiskError::Exists) => {}
            made => made?,
        }
        let built = disk
            .create_dir(&self.unnamed)
            .and_then(|()| write_new(disk, &self.unnamed.child(KEY), key_file))
            .and_then(|()| write_new(disk, &self.unnamed.child(JOURNAL), journal))
            .and_then(|()| disk.sync_dir(&self.unnamed))
            .and_then(|()| disk.rename(&self.unnamed, &self.dir))
            .and_then(|()| self.sync_names(disk));
        if built.is_err() {
            best_effort(self.unname(disk));
            best_effort(self.sweep(disk));
        }
        built
    }

    /// Takes the folder's name away, so that nobody finds a session with half a key. May be tried again.
    pub(super) fn unname(&self, disk: &mut impl Disk) -> Done {
        ignore_missing(disk.rename(&self.dir, &self.unnamed))?;
        disk.sync_dir(&self.owner)
    }

    /// Destroys the key in a folder without a name. Nobody can read the session then, whatever else is left. May be
    /// tried again.
    pub(super) fn destroy_key(&self, disk: &mut impl Disk) -> Done {
        let key = self.unnamed.child(KEY);
        match disk.write_at(&key, 0, &[0; KEY_FILE_BYTES]) {
            // A try before this one has come so far.
            Err(DiskError::NotFound) => return ignore_missing(disk.sync_dir(&self.unnamed)),
            written => written?,
        }
        disk.sync(&key)?;
        disk.remove(&key)?;
        disk.sync_dir(&self.unnamed)
    }

    /// Removes what is left of a folder without a name, its key first.
    pub(super) fn sweep(&self, disk: &mut impl Disk) -> Done {
        self.destroy_key(disk)?;
        let cuts: Vec<String> = (0..CUTS_MAX).map(cut_name).collect();
        let names = FILES.into_iter().chain(cuts.iter().map(String::as_str));
        names.into_iter().try_for_each(|name| ignore_missing(disk.remove(&self.unnamed.child(name))))?;
        ignore_missing(disk.remove_dir(&self.unnamed))?;
        disk.sync_dir(&self.owner)
    }
}

/// Where what damage has cut from a journal is kept, the first time and later.
fn cut_name(number: u32) -> String {
    if number == 0 { CUT.to_owned() } else { format!("{CUT}.{number}") }
}

fn write_new(disk: &mut impl Disk, file: &Place, bytes: &[u8]) -> Done {
    disk.create(file)?;
    disk.write_at(file, 0, bytes)?;
    disk.sync(file)
}

pub(super) fn ignore_missing(done: Done) -> Done {
    match done {
        Err(DiskError::NotFound) => Ok(()),
        done => done,
    }
}

/// What a caller would do about it is done elsewhere, or later.
pub(super) fn best_effort<E>(_: Result<(), E>) {}
