//! How are these files those of a file system?
//!
//! Everything is reached from the root's descriptor, name by name, without following a link: whoever can write into a
//! folder above cannot lead the store elsewhere.

use super::{Disk, DiskError, Entry, Place, ReadAt, Result};
use rustix::fs::{self, Advice, AtFlags, CWD, FileType, FlockOperation, Mode, OFlags};
use rustix::io::{self, Errno};
use std::num::NonZeroU64;
use std::os::fd::OwnedFd;
use std::path::Path;

const DIR_MODE: Mode = Mode::RWXU;
const FILE_MODE: Mode = Mode::RUSR.union(Mode::WUSR);
const ANY: OFlags = OFlags::CLOEXEC.union(OFlags::NOFOLLOW);
const FOLDER: OFlags = ANY.union(OFlags::DIRECTORY).union(OFlags::RDONLY);

/// A folder of the file system.
#[derive(Debug)]
pub struct OsDisk {
    root: OwnedFd,
    locks: Vec<OwnedFd>,
}

impl OsDisk {
    /// The folder `root`, which is there.
    ///
    /// # Errors
    /// When it cannot be opened, or is a link.
    pub fn open(root: &Path) -> Result<Self> {
        Ok(Self { root: fs::openat(CWD, root, FOLDER, Mode::empty())?, locks: Vec::new() })
    }

    fn folder(&self, dir: &Place) -> Result<OwnedFd> {
        let start = fs::openat(&self.root, ".", FOLDER, Mode::empty())?;
        dir.names().try_fold(start, |at, name| Ok(fs::openat(&at, name, FOLDER, Mode::empty())?))
    }

    /// The folder that has `place`, and its name there.
    fn parent<'a>(&self, place: &'a Place) -> Result<(OwnedFd, &'a str)> {
        let start = fs::openat(&self.root, ".", FOLDER, Mode::empty())?;
        let mut names = place.names();
        let name = names.next_back().ok_or(DiskError::NotFound)?;
        let folder = names.try_fold(start, |at, name| fs::openat(&at, name, FOLDER, Mode::empty()))?;
        Ok((folder, name))
    }

    fn file(&self, file: &Place, flags: OFlags) -> Result<OwnedFd> {
        let (folder, name) = self.parent(file)?;
        // A pipe or device in a file's place must not make the store wait.
        Ok(fs::openat(folder, name, ANY | OFlags::NONBLOCK | flags, FILE_MODE)?)
    }
}

impl Disk for OsDisk {
    fn list(&mut self, dir: &Place) -> Result<Vec<Entry>> {
        let folder = self.folder(dir)?;
        let mut entries = Vec::new();
        for entry in fs::Dir::read_from(&folder)? {
            let entry = entry?;
            let name = entry.file_name();
            if matches!(name.to_bytes(), b"." | b"..") {
                continue;
            }
            let is_dir = match entry.file_type() {
                FileType::Unknown => {
                    let stat = fs::statat(&folder, name, AtFlags::SYMLINK_NOFOLLOW)?;
                    FileType::from_raw_mode(stat.st_mode) == FileType::Directory
                }
                kind => kind == FileType::Directory,
            };
            entries.push(Entry { name: name.to_string_lossy().into_owned(), is_dir });
        }
        entries.sort_unstable();
        Ok(entries)
    }

    fn create_dir(&mut self, dir: &Place) -> Result<()> {
        let (folder, name) = self.parent(dir)?;
        Ok(fs::mkdirat(folder, name, DIR_MODE)?)
    }

    fn create(&mut self, file: &Place) -> Result<()> {
        self.file(file, OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL).map(drop)
    }

    fn len(&mut self, file: &Place) -> Result<u64> {
        let (folder, name) = self.parent(file)?;
        let stat = fs::statat(folder, name, AtFlags::SYMLINK_NOFOLLOW)?;
        u64::try_from(stat.st_size).map_err(|_| DiskError::Io(std::io::ErrorKind::InvalidData))
    }

    fn read_at(&mut self, file: &Place, offset: u64, bytes: &mut [u8]) -> Result<usize> {
        self.file(file, OFlags::RDONLY)?.read_at(offset, bytes)
    }

    fn open(&mut self, file: &Place) -> Result<Box<dyn ReadAt>> {
        Ok(Box::new(self.file(file, OFlags::RDONLY)?))
    }

    fn will_read(&mut self, file: &Place, offset: u64, n_bytes: u64) {
        if let Ok(file) = self.file(file, OFlags::RDONLY) {
            // What is wrong with the file, reading it says.
            let _advised = fs::fadvise(file, offset, NonZeroU64::new(n_bytes), Advice::WillNeed).is_ok();
        }
    }

    fn write_at(&mut self, file: &Place, offset: u64, bytes: &[u8]) -> Result<()> {
        let file = self.file(file, OFlags::WRONLY)?;
        let mut n_written = 0;
        while n_written < bytes.len() {
            match io::pwrite(&file, &bytes[n_written..], offset + n_written as u64) {
                Ok(0) => return Err(DiskError::Io(std::io::ErrorKind::WriteZero)),
                Ok(n) => n_written += n,
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    fn set_len(&mut self, file: &Place, n_bytes: u64) -> Result<()> {
        Ok(fs::ftruncate(self.file(file, OFlags::WRONLY)?, n_bytes)?)
    }

    fn sync(&mut self, file: &Place) -> Result<()> {
        // The length is part of it.
        Ok(fs::fdatasync(self.file(file, OFlags::WRONLY)?)?)
    }

    fn sync_dir(&mut self, dir: &Place) -> Result<()> {
        Ok(fs::fsync(self.folder(dir)?)?)
    }

    fn rename(&mut self, from: &Place, to: &Place) -> Result<()> {
        let ((from_folder, from), (to_folder, to)) = (self.parent(from)?, self.parent(to)?);
        Ok(fs::renameat(from_folder, from, to_folder, to)?)
    }

    fn remove(&mut self, file: &Place) -> Result<()> {
        let (folder, name) = self.parent(file)?;
        Ok(fs::unlinkat(folder, name, AtFlags::empty())?)
    }

    fn remove_dir(&mut self, dir: &Place) -> Result<()> {
        let (folder, name) = self.parent(dir)?;
        Ok(fs::unlinkat(folder, name, AtFlags::REMOVEDIR)?)
    }

    fn free_bytes(&mut self) -> Result<u64> {
        let stat = fs::fstatvfs(&self.root)?;
        Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
    }

    fn lock(&mut self, file: &Place) -> Result<()> {
        let file = self.file(file, OFlags::WRONLY | OFlags::CREATE)?;
        fs::flock(&file, FlockOperation::NonBlockingLockExclusive).map_err(|error| match error {
            Errno::WOULDBLOCK => DiskError::Locked,
            error => error.into(),
        })?;
        self.locks.push(file);
        Ok(())
    }
}

impl ReadAt for OwnedFd {
    fn read_at(&self, offset: u64, bytes: &mut [u8]) -> Result<usize> {
        let mut n_read = 0;
        while n_read < bytes.len() {
            match io::pread(self, &mut bytes[n_read..], offset + n_read as u64) {
                Ok(0) => break,
                Ok(n) => n_read += n,
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(n_read)
    }
}

impl From<Errno> for DiskError {
    fn from(error: Errno) -> Self {
        match error {
            Errno::NOENT => Self::NotFound,
            Errno::EXIST => Self::Exists,
            Errno::NOSPC | Errno::DQUOT | Errno::FBIG => Self::Full,
            error => Self::Io(error.kind()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{PermissionsExt, symlink};

    fn disk() -> (tempfile::TempDir, OsDisk) {
        let folder = tempfile::tempdir().unwrap();
        let disk = OsDisk::open(folder.path()).unwrap();
        (folder, disk)
    }

    #[test]
    fn files_are_private_and_say_what_was_written() {
        let (folder, mut disk) = disk();
        let dir = Place::root().child("dir");
        let file = dir.child("file");
        assert_eq!(disk.create(&file), Err(DiskError::NotFound));
        disk.create_dir(&dir).unwrap();
        disk.create(&file).unwrap();
        assert_eq!(disk.create(&file), Err(DiskError::Exists));
        disk.write_at(&file, 3, b"def").unwrap();
        let mut bytes = [1; 9];
        assert_eq!(disk.read_at(&file, 1, &mut bytes).unwrap(), 5);
        assert_eq!(&bytes[..5], b"\0\0def");
        let opened = disk.open(&file).unwrap();
        disk.set_len(&file, 4).unwrap();
        assert_eq!((disk.len(&file), opened.read_at(2, &mut bytes)), (Ok(4), Ok(2)));
        disk.sync(&file).unwrap();
        disk.rename(&file, &dir.child("other")).unwrap();
        disk.sync_dir(&dir).unwrap();
        assert_eq!(disk.list(&dir).unwrap(), [Entry { name: "other".into(), is_dir: false }]);
        let mode = |name: &str| std::fs::metadata(folder.path().join(name)).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode("dir"), mode("dir/other")), (0o700, 0o600));
        assert!(disk.remove_dir(&dir).is_err(), "a folder with a file was removed");
        disk.remove(&dir.child("other")).unwrap();
        disk.remove_dir(&dir).unwrap();
        assert!(disk.free_bytes().unwrap() > 0);
    }

    #[test]
    fn a_link_is_not_followed() {
        let (folder, mut disk) = disk();
        std::fs::create_dir(folder.path().join("real")).unwrap();
        std::fs::write(folder.path().join("real/file"), b"secret").unwrap();
        symlink("real", folder.path().join("link")).unwrap();
        symlink("real/file", folder.path().join("leaf")).unwrap();
        let root = Place::root();
        assert!(disk.read_at(&root.child("link").child("file"), 0, &mut [0]).is_err());
        assert!(disk.read_at(&root.child("leaf"), 0, &mut [0]).is_err());
        assert!(disk.write_at(&root.child("leaf"), 0, b"x").is_err());
        assert_eq!(disk.read_at(&root.child("real").child("file"), 0, &mut [0]), Ok(1));
    }

    #[test]
    fn a_second_lock_is_refused_until_the_first_is_gone() {
        let (folder, mut disk) = disk();
        let lock = Place::root().child("lock");
        disk.lock(&lock).unwrap();
        let mut other = OsDisk::open(folder.path()).unwrap();
        assert_eq!(other.lock(&lock), Err(DiskError::Locked));
        drop(disk);
        other.lock(&lock).unwrap();
    }

    #[test]
    #[should_panic(expected = "is no name of a file")]
    fn no_name_leads_up() {
        drop(Place::root().child(".."));
    }
}
