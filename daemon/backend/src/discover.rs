//! Which plugins are there, and may they be trusted?
//!
//! A plugin is a folder `<id>/` with `plugin.toml` and the libraries it names. Folders come from the configuration,
//! from beside the executable and from `/usr/lib/sparsed/plugins`, in this order; the first folder that has an id wins.
//! Environment variables and the working directory are never asked.

use crate::BackendError;
use crate::manifest::{MANIFEST_BYTES_MAX, Manifest};
use rustix::fs::{FileType, Mode, OFlags};
use rustix::process::geteuid;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

/// Most folders looked at in one place.
const PLUGINS_MAX: usize = 64;

/// The folders in which plugins are looked for, in order.
#[derive(Clone, Debug)]
pub struct SearchPath(Vec<PathBuf>);

/// A plugin that may be loaded: its manifest has been read, its files are nobody else's.
#[derive(Clone, Debug)]
pub struct Found {
    /// The folder.
    pub dir: PathBuf,
    /// What it says about itself.
    pub manifest: Manifest,
}

/// A folder that looked like a plugin and was refused.
#[derive(Debug)]
pub struct Refusal {
    /// The folder.
    pub dir: PathBuf,
    /// Why.
    pub error: BackendError,
}

/// What a search found.
#[derive(Debug)]
pub struct Scan {
    /// The folders that were searched.
    pub searched: Vec<PathBuf>,
    /// Usable plugins, in order of the search path.
    pub found: Vec<Found>,
    /// The others.
    pub refused: Vec<Refusal>,
}

impl SearchPath {
    /// `configured` (key `plugins.dir`), then `plugins/` beside the executable, then `/usr/lib/sparsed/plugins`.
    pub fn standard(configured: Option<&Path>) -> Self {
        let beside = std::env::current_exe().ok().and_then(|exe| Some(exe.parent()?.join("plugins")));
        let system = PathBuf::from("/usr/lib/sparsed/plugins");
        Self(configured.map(Path::to_owned).into_iter().chain(beside).chain([system]).collect())
    }

    /// Just these folders.
    pub fn only(dirs: Vec<PathBuf>) -> Self {
        Self(dirs)
    }

    /// Looks at every folder; what cannot be used is in the answer with the reason.
    pub fn scan(&self) -> Scan {
        let mut scan = Scan { searched: self.0.clone(), found: Vec::new(), refused: Vec::new() };
        for root in &self.0 {
            let Ok(entries) = std::fs::read_dir(root) else { continue };
            let mut dirs: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).take(PLUGINS_MAX).collect();
            dirs.sort();
            for dir in dirs.into_iter().filter(|dir| dir.join("plugin.toml").exists()) {
                match check_trusted_dir(root).and_then(|()| inspect(&dir)) {
                    Ok(found) if scan.found.iter().any(|f| f.manifest.id == found.manifest.id) => {}
                    Ok(found) => scan.found.push(found),
                    Err(error) => scan.refused.push(Refusal { dir, error }),
                }
            }
        }
        scan
    }
}

impl Scan {
    /// The plugin with this id, or the first one.
    ///
    /// # Errors
    /// [`BackendError::NoPlugin`] with all that was looked at.
    pub fn select(&self, id: Option<&str>) -> Result<&Found, BackendError> {
        let wanted = |found: &&Found| id.is_none_or(|id| found.manifest.id == id);
        self.found.iter().find(wanted).ok_or_else(|| BackendError::NoPlugin {
            id: id.map(str::to_owned),
            searched: self.searched.iter().map(|dir| dir.display().to_string()).collect(),
            refused: self.refused.iter().map(|refusal| refusal.error.to_string()).collect(),
        })
    }
}

pub(crate) fn inspect(dir: &Path) -> Result<Found, BackendError> {
    check_trusted_dir(dir)?;
    let path = dir.join("plugin.toml");
    let io = |source| BackendError::Io { path: path.clone(), source };
    let mut text = String::new();
    let mut file = open_trusted(&path)?.take(MANIFEST_BYTES_MAX + 1);
    file.read_to_string(&mut text).map_err(io)?;
    if text.len() as u64 > MANIFEST_BYTES_MAX {
        let reason = format!("larger than {MANIFEST_BYTES_MAX} bytes");
        return Err(BackendError::Manifest { path, reason });
    }
    let name = dir.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let manifest = Manifest::parse(&path, &text, &name)?;
    Ok(Found { dir: dir.to_owned(), manifest })
}

/// Opens a regular file that is not a link, belongs to root or to us, and is writable by nobody else.
pub(crate) fn open_trusted(path: &Path) -> Result<File, BackendError> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::NONBLOCK;
    let opened = rustix::fs::open(path, flags, Mode::empty());
    let fd = opened.map_err(|errno| BackendError::Io { path: path.to_owned(), source: errno.into() })?;
    check_trusted(path, &fd, FileType::RegularFile)?;
    Ok(fd.into())
}

fn check_trusted_dir(path: &Path) -> Result<(), BackendError> {
    let flags = OFlags::PATH | OFlags::CLOEXEC | OFlags::DIRECTORY;
    let opened = rustix::fs::open(path, flags, Mode::empty());
    let fd = opened.map_err(|errno| BackendError::Io { path: path.to_owned(), source: errno.into() })?;
    check_trusted(path, &fd, FileType::Directory)
}

fn check_trusted(path: &Path, fd: &rustix::fd::OwnedFd, kind: FileType) -> Result<(), BackendError> {
    let refuse = |reason: String| Err(BackendError::Untrusted { path: path.to_owned(), reason });
    let stat =
        rustix::fs::fstat(fd).map_err(|errno| BackendError::Io { path: path.to_owned(), source: errno.into() })?;
    if FileType::from_raw_mode(stat.st_mode) != kind {
        return refuse("not a regular file or folder".to_owned());
    }
    if stat.st_uid != 0 && stat.st_uid != geteuid().as_raw() {
        return refuse(format!("belongs to uid {}", stat.st_uid));
    }
    if stat.st_mode & 0o022 != 0 {
        return refuse(format!("mode {:o} lets others write (chmod go-w)", stat.st_mode & 0o7777));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    const MANIFEST: &str = "manifest_version = 1\nid = \"a\"\nversion = \"1\"\nlicense = \"MIT\"\n[abi]\nmajor = [0]\n\
        arch = \"x86_64\"\n[[library]]\npath = \"a.so\"\nscore = 1\n\
        sha256 = \"0000000000000000000000000000000000000000000000000000000000000000\"\n";

    fn folder() -> tempfile::TempDir {
        let root = tempfile::tempdir().expect("a temporary folder");
        let dir = root.path().join("a");
        std::fs::create_dir(&dir).expect("a folder");
        std::fs::write(dir.join("plugin.toml"), MANIFEST).expect("a manifest");
        for path in [root.path(), &dir] {
            std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755)).expect("a mode");
        }
        std::fs::set_permissions(dir.join("plugin.toml"), std::fs::Permissions::from_mode(0o644)).expect("a mode");
        root
    }

    #[test]
    fn a_plugin_folder_is_found_by_its_id() {
        let root = folder();
        let scan = SearchPath::only(vec![root.path().to_owned()]).scan();
        assert_eq!(scan.select(Some("a")).expect("found").dir, root.path().join("a"));
        let error = scan.select(Some("b")).expect_err("there is no b").to_string();
        assert!(error.contains("'b'") && error.contains(&root.path().display().to_string()), "{error}");
    }

    #[test]
    fn a_manifest_that_others_may_write_is_refused() {
        let root = folder();
        let path = root.path().join("a/plugin.toml");
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o666)).expect("a mode");
        let scan = SearchPath::only(vec![root.path().to_owned()]).scan();
        let error = scan.select(None).expect_err("refused").to_string();
        assert!(error.contains("plugin.toml") && error.contains("666"), "{error}");
    }

    #[test]
    fn a_folder_that_others_may_write_is_refused() {
        let root = folder();
        std::fs::set_permissions(root.path().join("a"), std::fs::Permissions::from_mode(0o777)).expect("a mode");
        let scan = SearchPath::only(vec![root.path().to_owned()]).scan();
        assert!(matches!(scan.refused[0].error, BackendError::Untrusted { .. }));
    }

    #[test]
    fn a_manifest_that_is_a_link_is_refused() {
        let root = folder();
        let path = root.path().join("a/plugin.toml");
        std::fs::rename(&path, root.path().join("real.toml")).expect("moved");
        std::os::unix::fs::symlink(root.path().join("real.toml"), &path).expect("a link");
        let scan = SearchPath::only(vec![root.path().to_owned()]).scan();
        assert!(scan.found.is_empty() && scan.refused.len() == 1);
    }
}
