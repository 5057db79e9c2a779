//! What has come of a file so far? It lies in the folder of partial files, locked, with what is known of the whole.

use super::{Digest, Store, Watcher, place};
use anyhow::{Context, ensure};
use rustix::fs::FlockOperation;
use serde::{Deserialize, Serialize};
use std::fs::{File, Permissions};
use std::io::{ErrorKind, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

/// What the disk is to have left beside the model.
const RESERVE_BYTES: u64 = 64 << 20;
/// After so many bytes the disk is looked at again, which others fill as well.
const LOOK_BYTES: u64 = 16 << 20;
/// What makes room where there is none; what `gc` alone leaves is what has come of this file.
const HOW_TO_MAKE_ROOM: &str =
    "`sparsectl model gc --partial` removes what no name stands for and what was never fetched to its end";
/// Largest file of what is known of a partial one.
const KNOWN_BYTES_MAX: u64 = 16 << 10;

/// After so many bytes they are brought to the disk: what is fetched again where nobody could say that it is there.
const SYNC_BYTES: u64 = 16 << 20;
/// Of a file that is being fetched.
const PARTIAL_MODE: u32 = 0o600;

/// Whether somebody fetches the file `path` of the folder of partial ones, or what is known of it.
pub(super) fn is_being_fetched(path: &Path) -> bool {
    hold(path).is_none()
}

/// Removes such a file, unless somebody fetches it: nobody begins to before it is gone. Answers whether it did.
///
/// # Errors
/// A file that cannot be removed.
pub(super) fn remove_unless_fetched(path: &Path) -> anyhow::Result<bool> {
    let Some(_held) = hold(path) else { return Ok(false) };
    match std::fs::remove_file(path) {
        // Who fetched it meanwhile has put it into the store.
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(false),
        removed => removed.map(|()| true).with_context(|| path.display().to_string()),
    }
}

/// The lock of such a file, if nobody has it; there may be no file any more.
fn hold(path: &Path) -> Option<Option<File>> {
    let Ok(file) = File::open(path.with_extension("part")) else { return Some(None) };
    rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive).ok().map(|()| Some(file))
}

/// A file that is not whole yet, locked.
#[derive(Debug)]
pub(super) struct Partial {
    pub(super) path: PathBuf,
    pub(super) file: File,
    /// Its length.
    pub(super) have: u64,
    pub(super) known: Known,
    /// How often what had come was forgotten.
    pub(super) n_lost: u32,
    /// Bytes that are on the disk.
    synced: u64,
    /// Whether anything is noted beside it.
    is_noted: bool,
    /// Its length up to which there was room when the disk was looked at last.
    room_until: u64,
    /// Bytes that the disk of a file has left.
    free: fn(&File) -> std::io::Result<u64>,
}

/// What lies beside the file.
#[derive(Debug, Default, Deserialize, Serialize)]
#[serde(default)]
struct Note {
    #[serde(flatten)]
    known: Known,
    /// Bytes that were on the disk then.
    synced: u64,
}

/// What is known of the whole file.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
pub(super) struct Known {
    /// What the server calls this state of it, if it says so reliably.
    pub(super) etag: Option<String>,
    pub(super) total: Option<u64>,
}

impl Partial {
    /// The one that is called `key`, with what has come of it before.
    pub(super) fn open(store: &Store, key: &str) -> anyhow::Result<Self> {
        let path = store.partial().join(key).with_extension("part");
        unseal(&path).with_context(|| path.display().to_string())?;
        let file = File::options().create(true).truncate(false).read(true).write(true).open(&path);
        let file = file.with_context(|| path.display().to_string())?;
        let locked = rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive).is_ok();
        // Whoever had it may have put it into the store meanwhile.
        let is_there = path.metadata().is_ok_and(|meta| meta.ino() == file.metadata().map_or(0, |meta| meta.ino()));
        ensure!(locked && is_there, "another process fetches this file; try again when it has ended");
        let have = file.metadata()?.len();
        let (known, is_noted) = (Known::default(), false);
        let mut partial = Self { have, path, file, known, n_lost: 0, synced: 0, is_noted, room_until: 0, free };
        match partial.recall() {
            Some(note) => partial.go_on_from(note)?,
            None => partial.restart()?,
        }
        Ok(partial)
    }

    /// Keeps what was on the disk when that was noted. What came later may have a length and no bytes: the power may
    /// have gone, or the disk have dropped out and come back, which no file tells.
    fn go_on_from(&mut self, note: Note) -> anyhow::Result<()> {
        self.have = self.have.min(note.synced);
        self.file.set_len(self.have)?;
        (self.known, self.synced, self.is_noted) = (note.known, self.have, true);
        self.file.seek(SeekFrom::End(0))?;
        Ok(())
    }

    /// Has what has come stay for the next call, whatever becomes of the machine.
    pub(super) fn keep(&mut self) -> anyhow::Result<()> {
        if self.have == self.synced || !self.is_noted {
            return Ok(());
        }
        self.file.sync_data().with_context(|| self.path.display().to_string())?;
        self.synced = self.have;
        self.note()
    }

    pub(super) fn known_path(&self) -> PathBuf {
        self.path.with_extension("json")
    }

    fn recall(&self) -> Option<Note> {
        let mut text = Vec::new();
        File::open(self.known_path()).ok()?.take(KNOWN_BYTES_MAX).read_to_end(&mut text).ok()?;
        serde_json::from_slice(&text).ok()
    }

    /// Notes what is known of the whole file.
    pub(super) fn know(&mut self, etag: Option<String>, total: Option<u64>) -> anyhow::Result<()> {
        let known = Known { etag, total };
        if self.known != known || !self.is_noted {
            self.known = known;
            self.note()?;
        }
        Ok(())
    }

    fn note(&mut self) -> anyhow::Result<()> {
        let note = Note { known: self.known.clone(), synced: self.synced };
        place::write(&self.known_path(), &serde_json::to_vec(&note)?, 0o600)?;
        self.is_noted = true;
        Ok(())
    }

    /// Forgets what has come. On the disk, too: what is noted next is not to be said of old bytes after a power cut.
    pub(super) fn restart(&mut self) -> anyhow::Result<()> {
        self.n_lost += u32::from(self.have > 0);
        self.file.set_len(0)?;
        self.file.seek(SeekFrom::Start(0))?;
        self.file.sync_all()?;
        (self.have, self.synced, self.room_until) = (0, 0, 0);
        if self.is_noted { self.note() } else { Ok(()) }
    }

    pub(super) fn discard(&self) -> anyhow::Result<()> {
        std::fs::remove_file(&self.path)?;
        let _gone = std::fs::remove_file(self.known_path()).is_ok();
        Ok(())
    }

    pub(super) fn is_whole(&self) -> bool {
        self.known.total == Some(self.have)
    }

    /// Takes the next bytes of it, if there is room for them: a length may not be known, and others write as well.
    pub(super) fn write(&mut self, bytes: &[u8], bytes_max: u64) -> anyhow::Result<()> {
        let have = self.have.saturating_add(bytes.len() as u64);
        fits(have, bytes_max)?;
        if have > self.room_until {
            self.look(have - self.have)?;
        }
        self.file.write_all(bytes).with_context(|| self.path.display().to_string())?;
        self.have = have;
        // Of a copy nothing is noted: no other call goes on with it.
        if have - self.synced >= SYNC_BYTES { self.keep() } else { Ok(()) }
    }

    /// That the disk has room for `more` bytes; for how many it has, up to the next look.
    fn look(&mut self, more: u64) -> anyhow::Result<()> {
        let free = (self.free)(&self.file)?;
        let room = free.saturating_sub(RESERVE_BYTES);
        ensure!(
            more <= room,
            "{} has {} left, of which {} stay free; {HOW_TO_MAKE_ROOM}",
            self.folder().display(),
            size(free),
            size(RESERVE_BYTES)
        );
        self.room_until = self.have.saturating_add(room.min(LOOK_BYTES));
        Ok(())
    }

    fn folder(&self) -> &Path {
        self.path.parent().unwrap_or(&self.path)
    }

    /// The digest of what has come, as it lies on the disk.
    pub(super) fn digest(&self, watcher: &mut dyn Watcher) -> anyhow::Result<Digest> {
        self.file.sync_all().with_context(|| self.path.display().to_string())?;
        Ok(Digest::of_file(&self.file, &mut |done| watcher.hashed(done, self.have))?)
    }

    /// That the disk has room for the rest.
    pub(super) fn check_room(&self, total: u64, bytes_max: u64) -> anyhow::Result<()> {
        fits(total, bytes_max)?;
        let free = (self.free)(&self.file)?;
        let needed = total.saturating_sub(self.have).saturating_add(RESERVE_BYTES);
        ensure!(
            needed <= free,
            "{} has {} left, the rest of the model needs {}; {HOW_TO_MAKE_ROOM}",
            self.folder().display(),
            size(free),
            size(needed)
        );
        Ok(())
    }
}

fn fits(bytes: u64, limit: u64) -> anyhow::Result<()> {
    ensure!(bytes <= limit, "the file is larger than {limit} bytes; set models.max_bytes, or --max-bytes");
    Ok(())
}

/// Lets its owner write a file again that had come whole: whoever had it was killed before it got its place.
fn unseal(path: &Path) -> std::io::Result<()> {
    match path.symlink_metadata() {
        Ok(meta) if meta.is_file() && meta.mode() & 0o200 == 0 => {
            std::fs::set_permissions(path, Permissions::from_mode(PARTIAL_MODE))
        }
        _ => Ok(()),
    }
}

fn free(file: &File) -> std::io::Result<u64> {
    let disk = rustix::fs::fstatvfs(file)?;
    Ok(disk.f_bavail.saturating_mul(disk.f_frsize))
}

fn size(bytes: u64) -> String {
    indicatif::BinaryBytes(bytes).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    /// How many MiB are taken, one by one, of a file whose length nobody knows, on a disk that has so much left.
    fn taken(free: fn(&File) -> std::io::Result<u64>) -> (u64, String) {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::at(dir.path());
        store.make().unwrap();
        let mut partial = Partial { free, ..Partial::open(&store, "x").unwrap() };
        let mib = vec![0; 1 << 20];
        let error = (0..64).find_map(|_| partial.write(&mib, u64::MAX).err()).map(|error| format!("{error:#}"));
        assert_eq!(partial.path.metadata().unwrap().len(), partial.have, "what does not fit is not written");
        (partial.have / MIB, error.unwrap_or_default())
    }

    #[test]
    fn a_file_without_a_length_leaves_of_the_disk_what_is_to_stay_free() {
        let (mib, said) = taken(|file| Ok(RESERVE_BYTES + 5 * MIB - file.metadata()?.len()));
        assert!(mib == 5 && said.contains("has 64.00 MiB left, of which 64.00 MiB stay free"), "{mib}: {said}");
        assert!(said.contains("gc --partial"), "{said}");
        assert_eq!(taken(|_| Ok(0)).0, 0);
    }

    #[test]
    fn what_may_not_be_on_the_disk_is_fetched_again_by_the_next_call() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::at(dir.path());
        store.make().unwrap();
        let open = || Partial::open(&store, "x").unwrap();
        let mut partial = open();
        partial.know(Some("\"a\"".to_owned()), None).unwrap();
        let mib = vec![7; 1 << 20];
        (0..=SYNC_BYTES / MIB).for_each(|_| partial.write(&mib, u64::MAX).unwrap());
        drop(partial);
        let mut partial = open();
        assert_eq!((partial.have, partial.n_lost), (SYNC_BYTES, 0));
        assert_eq!(partial.path.metadata().unwrap().len(), SYNC_BYTES);
        assert_eq!(partial.known.etag.as_deref(), Some("\"a\""));
        partial.write(b"on", u64::MAX).unwrap();
        partial.keep().unwrap();
        drop(partial);
        let mut partial = open();
        assert_eq!((partial.have, partial.path.metadata().unwrap().len()), (SYNC_BYTES + 2, SYNC_BYTES + 2));
        // A note of an older version says nothing of the disk.
        partial.go_on_from(serde_json::from_str("{\"etag\":null,\"total\":9}").unwrap()).unwrap();
        assert_eq!((partial.have, partial.known.total), (0, Some(9)));
    }

    #[test]
    fn a_file_that_was_sealed_and_got_no_place_is_gone_on_with() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::at(dir.path());
        store.make().unwrap();
        let mut partial = Partial::open(&store, "x").unwrap();
        partial.know(None, Some(3)).unwrap();
        partial.write(b"all", u64::MAX).unwrap();
        partial.keep().unwrap();
        place::seal(&partial.path).unwrap();
        drop(partial);
        let partial = Partial::open(&store, "x").unwrap();
        assert!(partial.is_whole());
        // Root would be let in, whatever its mode.
        assert_eq!(partial.path.metadata().unwrap().permissions().mode() & 0o777, PARTIAL_MODE);
    }

    #[test]
    fn what_is_begun_again_between_the_look_and_the_removal_stays() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::at(dir.path());
        store.make().unwrap();
        for key in ["x", "y"] {
            Partial::open(&store, key).unwrap().know(None, Some(9)).unwrap();
        }
        let lock = store.lock().unwrap();
        let garbage = store.garbage(&lock, true, &[]).unwrap();
        assert_eq!(garbage.len(), 4);
        let fetched = Partial::open(&store, "x").unwrap();
        store.sweep(&lock, &garbage).unwrap();
        assert!(fetched.path.exists() && fetched.known_path().exists());
        assert_eq!(store.partial().read_dir().unwrap().count(), 2, "the other one is gone");
    }

    #[test]
    fn a_disk_that_others_fill_meanwhile_is_looked_at_again() {
        let (mib, said) = taken(|file| Ok(if file.metadata()?.len() < 2 * MIB { 1 << 40 } else { 3 * MIB }));
        assert!(mib == LOOK_BYTES / MIB && said.contains("has 3.00 MiB left"), "{mib}: {said}");
    }
}
