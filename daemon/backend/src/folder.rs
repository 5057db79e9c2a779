//! May the file at this path be trusted? Folders are opened one name at a time from `/`, each below the one before.
//!
//! A name is opened relative to its folder's descriptor and never through a symbolic link, and owner and mode are those
//! of the descriptor: between check and use there is no path that somebody could turn elsewhere. One plain name with
//! `O_NOFOLLOW` needs no `openat2`, so this holds on every kernel.
//!
//! Trusted is what belongs to root or to the daemon's user and is writable by nobody else. Folders above the plugins'
//! may be writable by all if they are sticky, as `/tmp` is: nobody can rename what lies in them but its owner.

use crate::BackendError;
use rustix::fd::OwnedFd;
use rustix::fs::{CWD, Dir, FileType, Mode, OFlags, Stat};
use rustix::io::Errno;
use rustix::process::geteuid;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

/// Most entries of a folder that are looked at.
const NAMES_MAX: usize = 256;

/// The permission bits of group and others to write.
const WRITABLE_BY_OTHERS: u32 = 0o022;
/// The bit that leaves renaming in a folder to the owners of what lies in it.
const STICKY: u32 = 0o1000;

/// A folder that only root and the daemon's user can change, held open.
#[derive(Debug)]
pub(crate) struct Folder {
    fd: OwnedFd,
    path: PathBuf,
}

/// What is asked of a folder.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Place {
    /// Leads to the plugins.
    Above,
    /// Holds plugins, or is one.
    Plugins,
}

impl Folder {
    /// Opens the folder at `path`; `..` is taken from the text, not from the file system.
    ///
    /// # Errors
    /// [`BackendError::Io`] where the system refuses or a part is missing, [`BackendError::Untrusted`] for a link or a
    /// part of the path that somebody else could change.
    pub(crate) fn open(path: &Path) -> Result<Self, BackendError> {
        let whole = std::path::absolute(path).map_err(|source| BackendError::Io { path: path.to_owned(), source })?;
        let mut names: Vec<&OsStr> = Vec::new();
        for part in whole.components() {
            match part {
                Component::Normal(name) => names.push(name),
                Component::ParentDir => drop(names.pop()),
                Component::RootDir | Component::CurDir | Component::Prefix(_) => {}
            }
        }
        let place = |above: usize| if above == 0 { Place::Plugins } else { Place::Above };
        let mut folder = Self::step(CWD, OsStr::new("/"), PathBuf::from("/"), place(names.len()))?;
        for (index, name) in names.iter().enumerate() {
            let path = folder.path.join(name);
            folder = Self::step(&folder.fd, name, path, place(names.len() - 1 - index))?;
        }
        Ok(folder)
    }

    /// The folder `name` in this one.
    ///
    /// # Errors
    /// As [`Folder::open`].
    pub(crate) fn folder(&self, name: &OsStr) -> Result<Self, BackendError> {
        Self::step(&self.fd, plain(&self.path, name)?, self.path.join(name), Place::Plugins)
    }

    /// The regular file `name` in this folder, for reading.
    ///
    /// # Errors
    /// As [`Folder::open`].
    pub(crate) fn file(&self, name: &OsStr) -> Result<File, BackendError> {
        let path = self.path.join(name);
        // Non-blocking: a FIFO in its place is opened, seen and refused.
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::NONBLOCK;
        let opened = rustix::fs::openat(&self.fd, plain(&self.path, name)?, flags, Mode::empty());
        let fd = opened.map_err(|errno| refusal(&path, errno))?;
        check(&path, &stat(&path, &fd)?, FileType::RegularFile, Place::Plugins)?;
        Ok(fd.into())
    }

    /// The names in this folder, sorted, at most [`NAMES_MAX`] of them.
    ///
    /// # Errors
    /// [`BackendError::Io`] where the folder cannot be read.
    pub(crate) fn names(&self) -> Result<Vec<OsString>, BackendError> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let opened = rustix::fs::openat(&self.fd, c".", flags, Mode::empty()).and_then(Dir::new);
        let mut names = Vec::new();
        for entry in opened.map_err(|errno| refusal(&self.path, errno))?.take(NAMES_MAX) {
            let entry = entry.map_err(|errno| refusal(&self.path, errno))?;
            let name = entry.file_name().to_bytes();
            if name != b"." && name != b".." {
                names.push(OsStr::from_bytes(name).to_owned());
            }
        }
        names.sort();
        Ok(names)
    }

    /// Where it is.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    fn step(above: impl rustix::fd::AsFd, name: &OsStr, path: PathBuf, place: Place) -> Result<Self, BackendError> {
        let flags = OFlags::PATH | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let fd = rustix::fs::openat(above, name, flags, Mode::empty()).map_err(|errno| refusal(&path, errno))?;
        check(&path, &stat(&path, &fd)?, FileType::Directory, place)?;
        Ok(Self { fd, path })
    }
}

/// One name, so that `O_NOFOLLOW` speaks of all of it.
fn plain<'a>(folder: &Path, name: &'a OsStr) -> Result<&'a OsStr, BackendError> {
    let bytes = name.as_bytes();
    if bytes.is_empty() || bytes.contains(&b'/') || bytes == b"." || bytes == b".." {
        let reason = format!("'{}' is not a name", name.display());
        return Err(BackendError::Untrusted { path: folder.to_owned(), reason });
    }
    Ok(name)
}

fn refusal(path: &Path, errno: Errno) -> BackendError {
    let path = path.to_owned();
    match errno {
        Errno::LOOP => BackendError::Untrusted { path, reason: LINK.to_owned() },
        errno => BackendError::Io { path, source: errno.into() },
    }
}

const LINK: &str = "is a symbolic link; name what it points to";

fn stat(path: &Path, fd: &OwnedFd) -> Result<Stat, BackendError> {
    rustix::fs::fstat(fd).map_err(|errno| refusal(path, errno))
}

fn check(path: &Path, stat: &Stat, kind: FileType, place: Place) -> Result<(), BackendError> {
    let refuse = |reason: String| Err(BackendError::Untrusted { path: path.to_owned(), reason });
    match FileType::from_raw_mode(stat.st_mode) {
        found if found == kind => {}
        FileType::Symlink => return refuse(LINK.to_owned()),
        _ if kind == FileType::Directory => return refuse("is not a folder".to_owned()),
        _ => return refuse("is not a regular file".to_owned()),
    }
    if stat.st_uid != 0 && stat.st_uid != geteuid().as_raw() {
        return refuse(format!("belongs to uid {}", stat.st_uid));
    }
    let sticky = place == Place::Above && stat.st_mode & STICKY != 0;
    if stat.st_mode & WRITABLE_BY_OTHERS != 0 && !sticky {
        return refuse(format!("mode {:o} lets others write (chmod go-w)", stat.st_mode & 0o7777));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::Permissions;
    use std::os::unix::fs::{PermissionsExt, symlink};

    /// A temporary folder with `a/b` in it, whatever the umask is.
    fn tree() -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(root.path().join("a/b")).unwrap();
        for name in ["", "a", "a/b"] {
            set_mode(&root.path().join(name), 0o755);
        }
        root
    }

    fn set_mode(path: &Path, mode: u32) {
        std::fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
    }

    fn refused(path: &Path) -> String {
        Folder::open(path).unwrap_err().to_string()
    }

    #[test]
    fn a_folder_is_opened_by_its_text_with_dots() {
        let root = tree();
        let folder = Folder::open(&root.path().join("a/../a/./b")).unwrap();
        assert_eq!(folder.path(), root.path().join("a/b"));
        assert_eq!(Folder::open(&root.path().join("a")).unwrap().names().unwrap(), ["b"]);
    }

    #[test]
    fn a_link_anywhere_in_the_path_is_refused() {
        let root = tree();
        symlink(root.path().join("a"), root.path().join("link")).unwrap();
        for path in ["link", "link/b"] {
            let said = refused(&root.path().join(path));
            assert!(said.contains("/link: is a symbolic link"), "{said}");
        }
        symlink(root.path().join("a/b"), root.path().join("a/c")).unwrap();
        let folder = Folder::open(&root.path().join("a")).unwrap();
        assert!(folder.folder(OsStr::new("c")).unwrap_err().to_string().contains("symbolic link"));
        assert!(folder.file(OsStr::new("c")).unwrap_err().to_string().contains("symbolic link"));
    }

    #[test]
    fn a_part_that_others_may_write_is_refused_unless_it_is_above_and_sticky() {
        let root = tree();
        set_mode(&root.path().join("a"), 0o775);
        assert!(refused(&root.path().join("a/b")).contains("/a: mode 775 lets others write"));
        set_mode(&root.path().join("a"), 0o1777);
        assert!(Folder::open(&root.path().join("a/b")).is_ok());
        assert!(refused(&root.path().join("a")).contains("mode 1777"));
    }

    #[test]
    fn a_part_that_belongs_to_another_user_is_refused() {
        let root = tree();
        if !geteuid().is_root() {
            return; // only root can give a folder away
        }
        std::os::unix::fs::chown(root.path().join("a"), Some(4242), None).unwrap();
        assert!(refused(&root.path().join("a/b")).contains("/a: belongs to uid 4242"));
    }

    #[test]
    fn a_swapped_folder_does_not_change_what_was_opened() {
        let root = tree();
        let file = root.path().join("a/b/file");
        std::fs::write(&file, "checked").unwrap();
        set_mode(&file, 0o644);
        let folder = Folder::open(&root.path().join("a/b")).unwrap();
        std::fs::rename(root.path().join("a"), root.path().join("old")).unwrap();
        std::fs::create_dir_all(root.path().join("a/b")).unwrap();
        std::fs::write(&file, "another").unwrap();
        let read = std::io::read_to_string(folder.file(OsStr::new("file")).unwrap()).unwrap();
        assert_eq!(read, "checked");
    }

    #[test]
    fn what_is_not_a_regular_file_is_refused() {
        let root = tree();
        let folder = Folder::open(&root.path().join("a")).unwrap();
        assert!(folder.file(OsStr::new("b")).unwrap_err().to_string().contains("is not a regular file"));
        assert!(folder.file(OsStr::new("../a")).unwrap_err().to_string().contains("is not a name"));
        rustix::fs::mknodat(CWD, root.path().join("a/fifo"), FileType::Fifo, Mode::from_raw_mode(0o600), 0).unwrap();
        assert!(folder.file(OsStr::new("fifo")).unwrap_err().to_string().contains("is not a regular file"));
        std::fs::write(root.path().join("plain"), "").unwrap();
        assert!(refused(&root.path().join("plain")).contains("is not a folder"));
    }
}
