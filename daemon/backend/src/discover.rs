//! Which plugins are there, and may they be trusted?
//!
//! A plugin is a folder `<id>/` with `plugin.toml` and the libraries it names. Folders come from the configuration,
//! from beside the executable and from `/usr/lib/sparsed/plugins`, in this order; the first folder that has an id wins.
//! Environment variables and the working directory are never asked.

use crate::BackendError;
use crate::folder::Folder;
use crate::library::Library;
use crate::manifest::{LibrarySection, MANIFEST_BYTES_MAX, Manifest};
use std::ffi::OsStr;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// The manifest's file name.
const MANIFEST: &str = "plugin.toml";

/// Where packages put plugins.
const SYSTEM: &str = "/usr/lib/sparsed/plugins";

/// The folders in which plugins are looked for, in order.
#[derive(Clone, Debug)]
pub struct SearchPath {
    dirs: Vec<PathBuf>,
    /// Of these, the folders that are installed with the daemon: who can write there can replace the daemon.
    own: Vec<PathBuf>,
}

/// A plugin that may be loaded: its manifest has been read, its files are nobody else's.
#[derive(Clone, Debug)]
pub struct Found {
    /// The folder.
    pub dir: PathBuf,
    /// What it says about itself.
    pub manifest: Manifest,
    /// Held open: the library is taken from the folder that was checked.
    folder: Arc<Folder>,
    /// Whether it lies in a folder that is installed with the daemon.
    is_installed: bool,
}

/// A folder of plugins, or one plugin, that was refused.
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
        let own: Vec<PathBuf> = beside.into_iter().chain([PathBuf::from(SYSTEM)]).collect();
        let dirs = configured.map(Path::to_owned).into_iter().chain(own.iter().cloned()).collect();
        Self { dirs, own }
    }

    /// Just these folders, none of them the daemon's own.
    pub fn only(dirs: Vec<PathBuf>) -> Self {
        Self { dirs, own: Vec::new() }
    }

    /// Just this folder, as if it were installed with the daemon.
    #[cfg(test)]
    pub(crate) fn installed(dir: PathBuf) -> Self {
        Self { dirs: vec![dir.clone()], own: vec![dir] }
    }

    /// Looks at every folder; what cannot be used is in the answer with the reason.
    pub fn scan(&self) -> Scan {
        let mut scan = Scan { searched: self.dirs.clone(), found: Vec::new(), refused: Vec::new() };
        for root in &self.dirs {
            // A configured folder may be one of our own by another spelling.
            let is_same = |own: &PathBuf| {
                own == root || own.canonicalize().ok().zip(root.canonicalize().ok()).is_some_and(|(a, b)| a == b)
            };
            let is_installed = self.own.iter().any(is_same);
            if let Err(error) = scan.look_into(root, is_installed) {
                scan.refused.push(Refusal { dir: root.clone(), error });
            }
        }
        scan
    }
}

impl Scan {
    /// Looks at all folders in `root`; a root that does not exist has none.
    fn look_into(&mut self, root: &Path, is_installed: bool) -> Result<(), BackendError> {
        let folder = match Folder::open(root) {
            Err(error) if error.is_missing_file() => return Ok(()),
            opened => opened?,
        };
        for name in folder.names()? {
            let dir = folder.path().join(&name);
            if !dir.join(MANIFEST).exists() {
                continue;
            }
            match folder.folder(&name).and_then(|folder| read_plugin(folder, is_installed)) {
                Ok(Some(found)) if self.found.iter().any(|f| f.manifest.id == found.manifest.id) => {}
                Ok(Some(found)) => self.found.push(found),
                Ok(None) => {}
                Err(error) => self.refused.push(Refusal { dir, error }),
            }
        }
        Ok(())
    }

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

impl Found {
    /// The plugin in the folder `dir`.
    ///
    /// # Errors
    /// Why it is refused, or that there is none.
    pub(crate) fn open(dir: &Path) -> Result<Self, BackendError> {
        let none = || BackendError::Manifest { path: dir.join(MANIFEST), reason: "is not there".to_owned() };
        read_plugin(Folder::open(dir)?, false)?.ok_or_else(none)
    }

    /// True when the plugin comes with this release: it lies in the daemon's own folder, which the files of a plugin
    /// cannot feign, and says so.
    pub fn is_ours(&self) -> bool {
        self.is_installed && self.manifest.claims_to_be_ours()
    }

    /// The library for this machine.
    ///
    /// # Errors
    /// As [`Manifest::choose`].
    pub fn variant(&self) -> Result<&LibrarySection, BackendError> {
        self.manifest.choose(&self.dir.join(MANIFEST))
    }

    /// Checks the library for this machine as loading does, and runs none of it.
    ///
    /// # Errors
    /// Why it would not be loaded.
    pub fn verify(&self) -> Result<(), BackendError> {
        self.open_library(self.variant()?).map(drop)
    }

    pub(crate) fn open_library(&self, section: &LibrarySection) -> Result<Library, BackendError> {
        Library::open(&self.folder, section)
    }
}

fn read_plugin(folder: Folder, is_installed: bool) -> Result<Option<Found>, BackendError> {
    let file = match folder.file(OsStr::new(MANIFEST)) {
        Ok(file) => file,
        // A folder of something else.
        Err(error) if error.is_missing_file() => return Ok(None),
        Err(error) => return Err(error),
    };
    let (dir, path) = (folder.path().to_owned(), folder.path().join(MANIFEST));
    let mut text = String::new();
    let read = file.take(MANIFEST_BYTES_MAX + 1).read_to_string(&mut text);
    read.map_err(|source| BackendError::Io { path: path.clone(), source })?;
    if text.len() as u64 > MANIFEST_BYTES_MAX {
        let reason = format!("larger than {MANIFEST_BYTES_MAX} bytes");
        return Err(BackendError::Manifest { path, reason });
    }
    let name = dir.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let manifest = Manifest::parse(&path, &text, &name)?;
    Ok(Some(Found { dir, manifest, folder: Arc::new(folder), is_installed }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::Fixture;
    use std::os::unix::fs::symlink;

    /// A plugin folder whose library is never read.
    fn folder() -> Fixture {
        let fixture = Fixture::empty("a");
        fixture.write_manifest("1", "");
        fixture
    }

    fn refusal(fixture: &Fixture) -> String {
        let scan = fixture.scan();
        assert!(scan.found.is_empty() && scan.refused.len() == 1, "{scan:?}");
        scan.select(None).expect_err("refused").to_string()
    }

    #[test]
    fn a_plugin_folder_is_found_by_its_id() {
        let fixture = folder();
        std::fs::create_dir(fixture.root().join("something-else")).unwrap();
        let scan = fixture.scan();
        assert!(scan.refused.is_empty());
        assert_eq!(scan.select(Some("a")).expect("found").dir, fixture.dir());
        let error = scan.select(Some("b")).expect_err("there is no b").to_string();
        assert!(error.contains("'b'") && error.contains(&fixture.root().display().to_string()), "{error}");
    }

    #[test]
    fn the_first_folder_that_has_an_id_wins() {
        let (first, second, nowhere) = (folder(), folder(), PathBuf::from("/nowhere"));
        let scan = SearchPath::only(vec![nowhere, second.root().to_owned(), first.root().to_owned()]).scan();
        assert!(scan.refused.is_empty());
        assert_eq!(scan.found.iter().map(|found| &found.dir).collect::<Vec<_>>(), [&second.dir()]);
    }

    #[test]
    fn a_plugin_is_ours_by_the_folder_it_lies_in_and_not_by_its_word() {
        let fixture = Fixture::empty("cpu");
        fixture.write_manifest(env!("CARGO_PKG_VERSION"), "");
        let is_ours = |path: SearchPath| path.scan().select(Some("cpu")).unwrap().is_ours();
        let (root, detour) = (fixture.root().to_owned(), fixture.root().join("cpu/.."));
        assert!(!is_ours(SearchPath::only(vec![root.clone()])));
        assert!(is_ours(SearchPath::installed(root.clone())));
        assert!(is_ours(SearchPath { dirs: vec![detour], own: vec![root.clone()] }), "the same folder by another path");
        fixture.write_manifest("0.0.1", "");
        assert!(!is_ours(SearchPath::installed(root)), "another release's");
    }

    #[test]
    fn a_manifest_that_others_may_write_is_refused() {
        let fixture = folder();
        fixture.set_mode("plugin.toml", 0o666);
        let error = refusal(&fixture);
        assert!(error.contains("plugin.toml") && error.contains("666"), "{error}");
    }

    #[test]
    fn a_folder_that_others_may_write_is_refused() {
        let fixture = folder();
        fixture.set_mode("", 0o777);
        assert!(refusal(&fixture).contains("mode 777"));
        fixture.set_mode("", 0o755);
        fixture.set_mode("..", 0o775);
        assert!(refusal(&fixture).contains(&format!("{}: mode 775", fixture.root().display())));
    }

    #[test]
    fn a_manifest_or_a_plugin_that_is_a_link_is_refused() {
        let fixture = folder();
        let path = fixture.dir().join("plugin.toml");
        std::fs::rename(&path, fixture.root().join("real.toml")).unwrap();
        symlink(fixture.root().join("real.toml"), &path).unwrap();
        assert!(refusal(&fixture).contains("plugin.toml: is a symbolic link"));
        std::fs::remove_file(&path).unwrap();
        std::fs::rename(fixture.root().join("real.toml"), &path).unwrap();
        let elsewhere = tempfile::tempdir().unwrap();
        std::fs::rename(fixture.dir(), elsewhere.path().join("a")).unwrap();
        symlink(elsewhere.path().join("a"), fixture.dir()).unwrap();
        assert!(refusal(&fixture).contains("/a: is a symbolic link"));
    }

    #[test]
    fn a_large_manifest_is_refused() {
        let fixture = folder();
        let path = fixture.dir().join("plugin.toml");
        let limit = usize::try_from(MANIFEST_BYTES_MAX).unwrap();
        std::fs::write(&path, vec![b'#'; limit + 1]).unwrap();
        assert!(refusal(&fixture).contains("larger than 65536 bytes"));
    }
}
