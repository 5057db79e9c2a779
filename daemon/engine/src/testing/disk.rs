//! A real folder as a disk with little room, which can be made to fail.

use sparsed_session::{Disk, DiskError, Entry, OsDisk, Place, ReadAt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

type Result<T> = std::result::Result<T, DiskError>;

/// What a test changes about its disk.
#[derive(Clone, Debug, Default)]
pub(crate) struct Whims {
    /// Bytes that it holds; 0 for as many as are written.
    pub(crate) capacity: Arc<AtomicU64>,
    /// Whether it takes no writes.
    pub(crate) is_full: Arc<AtomicBool>,
    /// Files that it has synced.
    pub(crate) n_syncs: Arc<AtomicU64>,
    /// Whether whoever reads an opened file waits.
    pub(crate) holds: Arc<(Mutex<bool>, Condvar)>,
}

impl Whims {
    pub(crate) fn hold(&self, holds: bool) {
        *self.holds.0.lock().unwrap() = holds;
        self.holds.1.notify_all();
    }
}

/// Longest time that a reader waits: a test that is wrong comes to its end too.
const HOLD_MAX: Duration = Duration::from_secs(5);

struct Held(Box<dyn ReadAt>, Whims);

impl ReadAt for Held {
    fn read_at(&self, offset: u64, bytes: &mut [u8]) -> Result<usize> {
        let (holds, changed) = &*self.1.holds;
        drop(changed.wait_timeout_while(holds.lock().unwrap(), HOLD_MAX, |holds| *holds).unwrap());
        self.0.read_at(offset, bytes)
    }
}

pub(crate) struct SmallDisk {
    disk: OsDisk,
    dir: PathBuf,
    whims: Whims,
}

impl SmallDisk {
    pub(crate) fn open(dir: &Path, whims: &Whims) -> Self {
        Self { disk: OsDisk::open(dir).unwrap(), dir: dir.to_owned(), whims: whims.clone() }
    }
}

fn bytes_below(dir: &Path) -> u64 {
    let entries = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    entries.map(|path| if path.is_dir() { bytes_below(&path) } else { path.metadata().unwrap().len() }).sum()
}

impl Disk for SmallDisk {
    fn list(&mut self, dir: &Place) -> Result<Vec<Entry>> {
        self.disk.list(dir)
    }

    fn create_dir(&mut self, dir: &Place) -> Result<()> {
        self.disk.create_dir(dir)
    }

    fn create(&mut self, file: &Place) -> Result<()> {
        self.disk.create(file)
    }

    fn len(&mut self, file: &Place) -> Result<u64> {
        self.disk.len(file)
    }

    fn read_at(&mut self, file: &Place, offset: u64, bytes: &mut [u8]) -> Result<usize> {
        self.disk.read_at(file, offset, bytes)
    }

    fn open(&mut self, file: &Place) -> Result<Box<dyn ReadAt>> {
        Ok(Box::new(Held(self.disk.open(file)?, self.whims.clone())))
    }

    fn write_at(&mut self, file: &Place, offset: u64, bytes: &[u8]) -> Result<()> {
        let has_end = self.whims.capacity.load(Ordering::Relaxed) > 0;
        if self.whims.is_full.load(Ordering::Relaxed) || has_end && self.free_bytes()? < bytes.len() as u64 {
            return Err(DiskError::Full);
        }
        self.disk.write_at(file, offset, bytes)
    }

    fn set_len(&mut self, file: &Place, n_bytes: u64) -> Result<()> {
        self.disk.set_len(file, n_bytes)
    }

    fn sync(&mut self, file: &Place) -> Result<()> {
        self.whims.n_syncs.fetch_add(1, Ordering::Relaxed);
        self.disk.sync(file)
    }

    fn sync_dir(&mut self, dir: &Place) -> Result<()> {
        self.disk.sync_dir(dir)
    }

    fn rename(&mut self, from: &Place, to: &Place) -> Result<()> {
        self.disk.rename(from, to)
    }

    fn remove(&mut self, file: &Place) -> Result<()> {
        self.disk.remove(file)
    }

    fn remove_dir(&mut self, dir: &Place) -> Result<()> {
        self.disk.remove_dir(dir)
    }

    fn free_bytes(&mut self) -> Result<u64> {
        Ok(self.whims.capacity.load(Ordering::Relaxed).saturating_sub(bytes_below(&self.dir)))
    }

    fn lock(&mut self, file: &Place) -> Result<()> {
        self.disk.lock(file)
    }
}
