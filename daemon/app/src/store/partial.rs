//! What has come of a file so far? It lies in the folder of partial files, locked, with what is known of the whole.

use super::{Digest, Store, Watcher, place};
use anyhow::{Context, ensure};
use rustix::fs::FlockOperation;
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// What the disk is to have left beside the model.
const RESERVE_BYTES: u64 = 64 << 20;
/// Largest file of what is known of a partial one.
const KNOWN_BYTES_MAX: u64 = 16 << 10;

/// Whether somebody fetches the file `path` of the folder of partial ones, or what is known of it.
pub(super) fn is_being_fetched(path: &Path) -> bool {
    let Ok(file) = File::open(path.with_extension("part")) else { return false };
    rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive).is_err()
}

/// A file that is not whole yet, locked.
#[derive(Debug)]
pub(super) struct Partial {
    pub(super) path: PathBuf,
    pub(super) file: File,
    /// Its length.
    pub(super) have: u64,
    pub(super) known: Known,
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
        let file = File::options().create(true).truncate(false).read(true).write(true).open(&path);
        let file = file.with_context(|| path.display().to_string())?;
        let locked = rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive).is_ok();
        // Whoever had it may have put it into the store meanwhile.
        let is_there = path.metadata().is_ok_and(|meta| meta.ino() == file.metadata().map_or(0, |meta| meta.ino()));
        ensure!(locked && is_there, "another process fetches this file; try again when it has ended");
        let mut partial = Self { have: file.metadata()?.len(), path, file, known: Known::default() };
        match partial.recall() {
            Some(known) => partial.known = known,
            None => partial.restart()?,
        }
        partial.file.seek(SeekFrom::End(0))?;
        Ok(partial)
    }

    pub(super) fn known_path(&self) -> PathBuf {
        self.path.with_extension("json")
    }

    fn recall(&self) -> Option<Known> {
        let mut text = Vec::new();
        File::open(self.known_path()).ok()?.take(KNOWN_BYTES_MAX).read_to_end(&mut text).ok()?;
        serde_json::from_slice(&text).ok()
    }

    /// Notes what is known of the whole file.
    pub(super) fn know(&mut self, known: Known) -> anyhow::Result<()> {
        if self.known != known {
            place::write(&self.known_path(), &serde_json::to_vec(&known)?, 0o600)?;
            self.known = known;
        }
        Ok(())
    }

    /// Forgets what has come.
    pub(super) fn restart(&mut self) -> anyhow::Result<()> {
        self.file.set_len(0)?;
        self.file.seek(SeekFrom::Start(0))?;
        self.have = 0;
        Ok(())
    }

    pub(super) fn discard(&self) -> anyhow::Result<()> {
        std::fs::remove_file(&self.path)?;
        let _gone = std::fs::remove_file(self.known_path()).is_ok();
        Ok(())
    }

    pub(super) fn is_whole(&self) -> bool {
        self.known.total == Some(self.have)
    }

    pub(super) fn write(&mut self, bytes: &[u8], bytes_max: u64) -> anyhow::Result<()> {
        self.have = self.have.saturating_add(bytes.len() as u64);
        fits(self.have, bytes_max)?;
        self.file.write_all(bytes).with_context(|| self.path.display().to_string())
    }

    /// The digest of what has come, as it lies on the disk.
    pub(super) fn digest(&self, watcher: &mut dyn Watcher) -> anyhow::Result<Digest> {
        self.file.sync_all().with_context(|| self.path.display().to_string())?;
        Ok(Digest::of_file(&self.file, &mut |done| watcher.hashed(done, self.have))?)
    }

    /// That the disk has room for the rest.
    pub(super) fn check_room(&self, total: u64, bytes_max: u64) -> anyhow::Result<()> {
        fits(total, bytes_max)?;
        let disk = rustix::fs::fstatvfs(&self.file)?;
        let free = disk.f_bavail.saturating_mul(disk.f_frsize);
        let needed = total.saturating_sub(self.have).saturating_add(RESERVE_BYTES);
        let size = |bytes| indicatif::BinaryBytes(bytes).to_string();
        ensure!(
            needed <= free,
            "{} has {} left, the rest of the model needs {}; `sparsectl model gc` removes what no name stands for",
            self.path.parent().unwrap_or(&self.path).display(),
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
