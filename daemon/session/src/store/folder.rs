//! Where do a session's files lie, and how does its folder come and go?
//!
//! `sessions/<owner>/<id>/{key,journal,kv}`. A folder is filled under the name `<id>.new` and gets its own when all in
//! it is on the disk, so that one that has its name is whole. It goes key first.

use crate::cipher::KEY_FILE_BYTES;
use crate::disk::{Disk, DiskError, Place};
use crate::id::SessionId;

/// Ends the name of a folder that is being filled.
pub(super) const NEW: &str = ".new";
/// Most bytes that are kept of what was cut from a journal.
const CUT_BYTES_MAX: usize = 1 << 20;
/// All that a session's folder may have.
const FILES: [&str; 6] = ["key", "journal", "journal.new", CUT, TORN, "kv"];
const CUT: &str = "journal.cut";
const TORN: &str = "journal.torn";

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
}

impl Folder {
    pub(super) fn of(owner: u64, id: SessionId) -> Self {
        let owner = of_owner(owner);
        Self { dir: owner.child(&id.to_string()), owner }
    }

    /// The one that is filled before it becomes [`Folder::of`] the same session.
    fn unfinished(owner: u64, id: SessionId) -> Self {
        let owner = of_owner(owner);
        Self { dir: owner.child(&format!("{id}{NEW}")), owner }
    }

    pub(super) fn key(&self) -> Place {
        self.dir.child("key")
    }

    pub(super) fn journal(&self) -> Place {
        self.dir.child("journal")
    }

    pub(super) fn kv(&self) -> Place {
        self.dir.child("kv")
    }

    pub(super) fn cut(&self) -> Place {
        self.dir.child(CUT)
    }

    /// Waits until the session is found again after a power cut.
    pub(super) fn sync_names(&self, disk: &mut impl Disk) -> Done {
        disk.sync_dir(&self.dir)?;
        disk.sync_dir(&self.owner)?;
        disk.sync_dir(&sessions())?;
        disk.sync_dir(&Place::root())
    }

    /// Puts a new journal in the place of the old one; the old one stays if that fails. Its name is not synced.
    pub(super) fn replace_journal(&self, disk: &mut impl Disk, bytes: &[u8]) -> Done {
        let new = self.dir.child("journal.new");
        ignore_missing(disk.remove(&new))?;
        let written = write_new(disk, &new, bytes).and_then(|()| disk.rename(&new, &self.journal()));
        if written.is_err() {
            // What stays in the way is removed before the next try, or at the next start.
            best_effort(disk.remove(&new));
        }
        written
    }

    /// Keeps what is cut from a journal, up to a limit.
    pub(super) fn keep_cut(&self, disk: &mut impl Disk, bytes: &[u8], is_damaged: bool) -> Done {
        let new = self.dir.child("journal.new");
        ignore_missing(disk.remove(&new))?;
        write_new(disk, &new, &bytes[..bytes.len().min(CUT_BYTES_MAX)])?;
        disk.rename(&new, &self.dir.child(if is_damaged { CUT } else { TORN }))?;
        disk.sync_dir(&self.dir)
    }

    /// Removes what a compaction left behind.
    pub(super) fn remove_unfinished(&self, disk: &mut impl Disk) -> Done {
        ignore_missing(disk.remove(&self.dir.child("journal.new")))
    }

    /// Destroys the key. From here on nobody can read the session, whatever else is left.
    pub(super) fn destroy_key(&self, disk: &mut impl Disk) -> Done {
        let key = self.key();
        match disk.write_at(&key, 0, &[0; KEY_FILE_BYTES]) {
            // A try before this one has come so far.
            Err(DiskError::NotFound) => return ignore_missing(disk.sync_dir(&self.dir)),
            written => written?,
        }
        disk.sync(&key)?;
        disk.remove(&key)?;
        disk.sync_dir(&self.dir)
    }

    /// Removes the folder with the store's files in it.
    pub(super) fn remove(&self, disk: &mut impl Disk) -> Done {
        FILES.iter().try_for_each(|name| ignore_missing(disk.remove(&self.dir.child(name))))?;
        ignore_missing(disk.remove_dir(&self.dir))?;
        disk.sync_dir(&self.owner)
    }
}

/// Makes the folder of a session on the disk, whole or not at all.
pub(super) fn build(
    disk: &mut impl Disk,
    owner: u64,
    id: SessionId,
    key_file: &[u8; KEY_FILE_BYTES],
    journal: &[u8],
) -> Done {
    let (unfinished, folder) = (Folder::unfinished(owner, id), Folder::of(owner, id));
    match disk.create_dir(&folder.owner) {
        Err(DiskError::Exists) => {}
        made => made?,
    }
    let filled = disk
        .create_dir(&unfinished.dir)
        .and_then(|()| write_new(disk, &unfinished.key(), key_file))
        .and_then(|()| write_new(disk, &unfinished.journal(), journal))
        .and_then(|()| disk.sync_dir(&unfinished.dir));
    if let Err(error) = filled {
        best_effort(unfinished.remove(disk));
        return Err(error);
    }
    let named = disk.rename(&unfinished.dir, &folder.dir).and_then(|()| folder.sync_names(disk));
    if let Err(error) = named {
        best_effort(unfinished.remove(disk));
        best_effort(folder.destroy_key(disk));
        best_effort(folder.remove(disk));
        return Err(error);
    }
    Ok(())
}

/// Removes a folder that never got its name.
pub(super) fn remove_unfinished(disk: &mut impl Disk, owner: u64, id: SessionId) -> Done {
    Folder::unfinished(owner, id).remove(disk)
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
