//! How does a file that is open come into the store? It is copied, so that nobody changes it any more, and what is
//! hashed is the copy.

use super::partial::Partial;
use super::{Digest, Entry, Store, Watcher};
use std::fs::File;
use std::io::ErrorKind;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// Bytes that are copied at a time.
const CHUNK_BYTES: usize = 1 << 20;
/// What the copy of a file without a path is called: one at a time, so that what a power cut leaves is overwritten.
const KEY: &str = "descriptor";

/// Why a file was not copied.
#[derive(Debug, thiserror::Error)]
pub enum CopyError {
    /// A folder, a pipe or the like.
    #[error("it is no plain file; the store holds single files")]
    NoFile,
    /// The one who gave it has a disk that fails, or has not opened it for reading.
    #[error("it cannot be read: {0}")]
    Unreadable(std::io::Error),
    /// Somebody wrote into it meanwhile, or cut it.
    #[error("it was changed while it was read: {have} bytes have come of the {total} that it had")]
    Changed {
        /// Bytes that were read.
        have: u64,
        /// Its size at the beginning.
        total: u64,
    },
    /// It is larger than may be, or than the disk has room for.
    #[error("{0:#}")]
    NoRoom(anyhow::Error),
    /// The store could not be written, or the watcher wants an end.
    #[error("{0:#}")]
    Failed(anyhow::Error),
}

/// A file that was copied and has no name yet. Dropped, it is gone.
#[derive(Debug)]
pub struct Copied {
    store: Store,
    partial: Partial,
    digest: Digest,
    is_put: bool,
}

impl Store {
    /// Copies `from` from its beginning, wherever it stands, and hashes the copy. One at a time, of all processes.
    ///
    /// # Errors
    /// As [`CopyError`] has them; then nothing of it is left.
    pub fn copy(&self, from: &File, bytes_max: u64, watcher: &mut dyn Watcher) -> Result<Copied, CopyError> {
        self.make().map_err(CopyError::Failed)?;
        let partial = Partial::open(self, KEY).map_err(CopyError::Failed)?;
        let mut copied = Copied { store: self.clone(), partial, digest: Digest::default(), is_put: false };
        copy(&mut copied.partial, from, bytes_max, watcher)?;
        copied.digest = copied.partial.digest(watcher).map_err(CopyError::Failed)?;
        Ok(copied)
    }

    /// Removes the copy whose process has ended in the middle of it, if there is one.
    ///
    /// # Errors
    /// A file that cannot be removed.
    pub fn forget_copy(&self) -> anyhow::Result<()> {
        if !self.partial().join(KEY).with_extension("part").exists() {
            return Ok(());
        }
        Partial::open(self, KEY)?.discard()
    }
}

impl Copied {
    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.partial.path
    }

    /// What it is.
    pub fn digest(&self) -> Digest {
        self.digest
    }

    /// Puts it into its place, and has `name` stand for it.
    ///
    /// # Errors
    /// As [`Store::put`].
    pub fn put(mut self, name: &str, source: String) -> anyhow::Result<Entry> {
        let entry = self.store.put(name, &[(self.partial.path.clone(), self.digest)], source)?;
        self.is_put = true;
        Ok(entry)
    }
}

impl Drop for Copied {
    fn drop(&mut self) {
        if !self.is_put
            && let Err(error) = self.partial.discard()
        {
            log::debug!(reason:% = error; "a copy was not removed");
        }
    }
}

/// Copies all of `from` into `partial`.
pub(super) fn copy(
    partial: &mut Partial,
    from: &File,
    bytes_max: u64,
    watcher: &mut dyn Watcher,
) -> Result<(), CopyError> {
    partial.restart().map_err(CopyError::Failed)?;
    let meta = from.metadata().map_err(CopyError::Unreadable)?;
    if !meta.is_file() {
        return Err(CopyError::NoFile);
    }
    let total = meta.len();
    partial.check_room(total, bytes_max).map_err(CopyError::NoRoom)?;
    if total == 0 {
        // It may be no file of a disk, and have a read wait for ever.
        return Ok(());
    }
    let mut chunk = vec![0; CHUNK_BYTES];
    loop {
        // Not by its position, which whoever else has it open may move.
        match from.read_at(&mut chunk, partial.have) {
            Ok(0) => break,
            Ok(n) if partial.have + n as u64 > total => {
                return Err(CopyError::Changed { have: partial.have + n as u64, total });
            }
            Ok(n) => partial.write(&chunk[..n], bytes_max).map_err(CopyError::Failed)?,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(CopyError::Unreadable(error)),
        }
        watcher.fetched(partial.have, Some(total)).map_err(|error| CopyError::Failed(error.into()))?;
    }
    if partial.have < total {
        return Err(CopyError::Changed { have: partial.have, total });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Error, Write};

    /// Does something at each step, and may end it.
    struct At<F>(F);

    impl<F: FnMut(u64) -> std::io::Result<()>> Watcher for At<F> {
        fn fetched(&mut self, done: u64, _: Option<u64>) -> std::io::Result<()> {
            self.0(done)
        }
        fn hashed(&mut self, done: u64, _: u64) -> std::io::Result<()> {
            self.0(done)
        }
        fn note(&mut self, _: &str) {}
    }

    struct Bench {
        _dir: tempfile::TempDir,
        store: Store,
        file: tempfile::NamedTempFile,
    }

    /// Three chunks.
    const BYTES: u64 = 3 * CHUNK_BYTES as u64;

    impl Bench {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            let mut file = tempfile::NamedTempFile::new().unwrap();
            file.write_all(&vec![7; 3 * CHUNK_BYTES]).unwrap();
            Self { store: Store::at(&dir.path().join("models")), file, _dir: dir }
        }

        fn copy(&self, step: impl FnMut(u64) -> std::io::Result<()>) -> Result<Copied, CopyError> {
            self.store.copy(self.file.as_file(), 1 << 30, &mut At(step))
        }

        fn is_empty(&self) -> bool {
            let count = |dir: &Path| dir.read_dir().unwrap().count();
            count(&self.store.partial()) == 0
                && count(&self.store.blobs()) == 0
                && self.store.names().unwrap().is_empty()
        }
    }

    #[test]
    fn a_copy_is_the_whole_file_wherever_it_stands_and_whatever_becomes_of_it_later() {
        let bench = Bench::new();
        let copied = bench.copy(|_| Ok(())).unwrap();
        bench.file.as_file().set_len(0).unwrap();
        assert_eq!(copied.digest(), Digest::of(&vec![7; 3 * CHUNK_BYTES]));
        let entry = copied.put("m", "here".to_owned()).unwrap();
        assert_eq!((entry.bytes, bench.store.blob(&entry.sha256).metadata().unwrap().len()), (BYTES, BYTES));
        assert_eq!(bench.store.partial().read_dir().unwrap().count(), 0);
        bench.store.verify("m", &bench.store.entry("m").unwrap(), &mut |_| {}).unwrap();
    }

    #[test]
    fn a_copy_that_gets_no_name_is_gone() {
        let bench = Bench::new();
        drop(bench.copy(|_| Ok(())).unwrap());
        assert!(bench.is_empty());
    }

    #[test]
    fn a_file_that_grows_or_shrinks_is_refused_and_nothing_is_left() {
        for length in [BYTES - 1, CHUNK_BYTES as u64, 0, BYTES + 1, 2 * BYTES] {
            let bench = Bench::new();
            let changed = bench.copy(|_| bench.file.as_file().set_len(length)).unwrap_err();
            assert!(matches!(changed, CopyError::Changed { total: BYTES, .. }), "{length}: {changed}");
            assert!(bench.is_empty(), "{length}");
        }
    }

    #[test]
    fn who_watches_ends_it_at_any_piece_and_nothing_is_left() {
        // Three pieces are copied, then three are hashed.
        for last in 1..=6 {
            let (bench, mut n) = (Bench::new(), 0);
            let ended = bench.copy(|_| {
                n += 1;
                if n == last { Err(Error::other("enough")) } else { Ok(()) }
            });
            assert!(ended.unwrap_err().to_string().contains("enough"));
            assert!(n == last && bench.is_empty(), "{last}");
        }
    }

    #[test]
    fn what_is_no_file_or_not_to_be_read_or_too_large_is_refused() {
        let bench = Bench::new();
        let refused = |file: &File, bytes_max| bench.store.copy(file, bytes_max, &mut At(|_| Ok(()))).unwrap_err();
        let (pipe, _writer) = std::io::pipe().unwrap();
        let pipe = File::from(std::os::fd::OwnedFd::from(pipe));
        assert!(matches!(refused(&pipe, BYTES), CopyError::NoFile));
        assert!(matches!(refused(&File::open("/").unwrap(), BYTES), CopyError::NoFile));
        assert!(matches!(refused(&File::open("/dev/zero").unwrap(), BYTES), CopyError::NoFile));
        let written = File::options().write(true).open(bench.file.path()).unwrap();
        assert!(matches!(refused(&written, BYTES), CopyError::Unreadable(_)));
        assert!(matches!(refused(bench.file.as_file(), BYTES - 1), CopyError::NoRoom(_)));
        assert!(bench.is_empty());
    }

    #[test]
    fn two_do_not_copy_at_a_time_and_what_a_dead_process_has_left_is_removed() {
        let bench = Bench::new();
        let mut second = None;
        let first = bench.copy(|_| {
            second.get_or_insert_with(|| bench.copy(|_| Ok(())).unwrap_err().to_string());
            Ok(())
        });
        assert!(second.unwrap().contains("another process"));
        drop(first);
        let left = bench.store.partial().join("descriptor.part");
        std::fs::write(&left, "half").unwrap();
        bench.store.forget_copy().unwrap();
        assert!(bench.is_empty());
        std::fs::write(&left, "half").unwrap();
        assert_eq!(bench.copy(|_| Ok(())).unwrap().digest(), Digest::of(&vec![7; 3 * CHUNK_BYTES]));
    }
}
