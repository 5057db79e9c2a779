//! What does the store need of a file system?
//!
//! What a call changes is seen by every later call; it survives a power cut only after [`Disk::sync`] of the file, and
//! for a name (a creation, renaming or removal) only after [`Disk::sync_dir`] of the folder that has it.

mod os;

pub use os::OsDisk;

use std::fmt;
use std::io::ErrorKind;

/// Why the disk did not do what was asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DiskError {
    /// There is no such file or folder.
    #[error("not found")]
    NotFound,
    /// No space, or a quota.
    #[error("no space left")]
    Full,
    /// The name is taken.
    #[error("exists already")]
    Exists,
    /// Somebody else has the lock.
    #[error("locked by another process")]
    Locked,
    /// Anything else.
    #[error("{0}")]
    Io(ErrorKind),
}

type Result<T> = std::result::Result<T, DiskError>;

/// Where a file or folder lies below the root: names joined by `/`, the root itself is empty.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Place(String);

impl Place {
    /// The root.
    pub const fn root() -> Self {
        Self(String::new())
    }

    /// What is called `name` in this folder.
    ///
    /// # Panics
    /// When the name is none: names are 1 to 64 small letters, digits, `_` and `.`, and do not begin with a dot.
    #[must_use]
    pub fn child(&self, name: &str) -> Self {
        let fits = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'_' || byte == b'.';
        let is_name = (1..=64).contains(&name.len()) && name.bytes().all(fits) && !name.starts_with('.');
        assert!(is_name, "'{}' is no name of a file", name.escape_default());
        if self.0.is_empty() { Self(name.to_owned()) } else { Self(format!("{}/{name}", self.0)) }
    }

    /// The names on the way, the root's child first.
    pub fn names(&self) -> impl DoubleEndedIterator<Item = &str> {
        self.0.split('/').filter(|name| !name.is_empty())
    }
}

impl fmt::Debug for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}

/// What a folder has.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Entry {
    /// Its name, replacement characters in place of what is not UTF-8.
    pub name: String,
    /// Whether it is a folder.
    pub is_dir: bool,
}

/// A file that can be read apart from its disk, on any thread. It stays the file that it was when it was opened.
pub trait ReadAt: Send {
    /// As [`Disk::read_at`].
    ///
    /// # Errors
    /// [`DiskError`].
    fn read_at(&self, offset: u64, bytes: &mut [u8]) -> Result<usize>;
}

/// A folder of files that belongs to one store.
///
/// # Errors
/// [`DiskError`] by every method; a call that fails may have been carried out in part.
#[expect(clippy::missing_errors_doc, reason = "said once, above")]
pub trait Disk {
    /// What a folder has, sorted by name.
    fn list(&mut self, dir: &Place) -> Result<Vec<Entry>>;
    /// Makes a folder that only its owner may enter (0700).
    fn create_dir(&mut self, dir: &Place) -> Result<()>;
    /// Makes an empty file that only its owner may read (0600); [`DiskError::Exists`] when there is one.
    fn create(&mut self, file: &Place) -> Result<()>;
    /// Bytes of a file.
    fn len(&mut self, file: &Place) -> Result<u64>;
    /// Reads from byte `offset` on; answers how many bytes there were, fewer than `bytes` only at the file's end.
    fn read_at(&mut self, file: &Place, offset: u64, bytes: &mut [u8]) -> Result<usize>;
    /// The file, to be read elsewhere.
    fn open(&mut self, file: &Place) -> Result<Box<dyn ReadAt>>;
    /// So many bytes from `offset` on will be read soon: the disk may fetch them meanwhile. Nothing depends on it.
    fn will_read(&mut self, _file: &Place, _offset: u64, _n_bytes: u64) {}
    /// Writes all of `bytes` from byte `offset` on; the file grows as it must.
    fn write_at(&mut self, file: &Place, offset: u64, bytes: &[u8]) -> Result<()>;
    /// Cuts or grows (by zeros) a file.
    fn set_len(&mut self, file: &Place, n_bytes: u64) -> Result<()>;
    /// Waits until the file's bytes and length survive a power cut.
    fn sync(&mut self, file: &Place) -> Result<()>;
    /// Waits until the names in a folder survive a power cut.
    fn sync_dir(&mut self, dir: &Place) -> Result<()>;
    /// Renames a file or folder; a file that is called `to` is replaced in the same moment.
    fn rename(&mut self, from: &Place, to: &Place) -> Result<()>;
    /// Removes a file.
    fn remove(&mut self, file: &Place) -> Result<()>;
    /// Removes an empty folder.
    fn remove_dir(&mut self, dir: &Place) -> Result<()>;
    /// Bytes that can still be written.
    fn free_bytes(&mut self) -> Result<u64>;
    /// Takes the lock `file`, which is made if need be, for as long as this disk lives; [`DiskError::Locked`] when
    /// another one has it.
    fn lock(&mut self, file: &Place) -> Result<()>;
}

/// A disk of which nobody needs to know the type.
pub type AnyDisk = Box<dyn Disk + Send>;

impl Disk for AnyDisk {
    fn list(&mut self, dir: &Place) -> Result<Vec<Entry>> {
        (**self).list(dir)
    }

    fn create_dir(&mut self, dir: &Place) -> Result<()> {
        (**self).create_dir(dir)
    }

    fn create(&mut self, file: &Place) -> Result<()> {
        (**self).create(file)
    }

    fn len(&mut self, file: &Place) -> Result<u64> {
        (**self).len(file)
    }

    fn read_at(&mut self, file: &Place, offset: u64, bytes: &mut [u8]) -> Result<usize> {
        (**self).read_at(file, offset, bytes)
    }

    fn open(&mut self, file: &Place) -> Result<Box<dyn ReadAt>> {
        (**self).open(file)
    }

    fn will_read(&mut self, file: &Place, offset: u64, n_bytes: u64) {
        (**self).will_read(file, offset, n_bytes);
    }

    fn write_at(&mut self, file: &Place, offset: u64, bytes: &[u8]) -> Result<()> {
        (**self).write_at(file, offset, bytes)
    }

    fn set_len(&mut self, file: &Place, n_bytes: u64) -> Result<()> {
        (**self).set_len(file, n_bytes)
    }

    fn sync(&mut self, file: &Place) -> Result<()> {
        (**self).sync(file)
    }

    fn sync_dir(&mut self, dir: &Place) -> Result<()> {
        (**self).sync_dir(dir)
    }

    fn rename(&mut self, from: &Place, to: &Place) -> Result<()> {
        (**self).rename(from, to)
    }

    fn remove(&mut self, file: &Place) -> Result<()> {
        (**self).remove(file)
    }

    fn remove_dir(&mut self, dir: &Place) -> Result<()> {
        (**self).remove_dir(dir)
    }

    fn free_bytes(&mut self) -> Result<u64> {
        (**self).free_bytes()
    }

    fn lock(&mut self, file: &Place) -> Result<()> {
        (**self).lock(file)
    }
}
