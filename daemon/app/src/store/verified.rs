//! May a file of the store be mapped? Only one that nobody else can change, and that is what its name says. So is any
//! other file that is named by its SHA-256, as the packaged model's.
//!
//! A file that was cut or has decayed would end the daemon (SIGBUS) or answer wrongly; so it is hashed before it is
//! used, all of it, once for each (device, inode, size, times), which a write or a copy changes. That is remembered in
//! the state folder. What remains: a disk that decays under a file which was read well before, and does not tell; for
//! that there is `sparsectl model verify`, which always reads everything.

use super::{Digest, Entry, Piece, Store, place};
use crate::state::check_mounted;
use anyhow::{Context, ensure};
use sparsed_engine::ModelSource;
use std::fs::{File, Metadata};
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// Files that are remembered, the last ones.
const REMEMBERED_MAX: usize = 256;
/// Largest file of what is remembered.
const REMEMBERED_BYTES_MAX: u64 = 64 << 10;

/// A model of the store, as the daemon uses it.
#[derive(Clone, Debug)]
pub struct StoredModel {
    store: Store,
    name: String,
    /// Where it is remembered which files were hashed; `None`: nowhere.
    remembered: Option<PathBuf>,
}

impl StoredModel {
    /// The model `name`.
    pub fn new(store: Store, name: &str, remembered: Option<PathBuf>) -> Self {
        Self { store, name: name.to_owned(), remembered }
    }

    /// Its file, which is what its name says. Reads all of it where that was not done before; `progress` hears bytes.
    ///
    /// # Errors
    /// No such model; a file that others may change; one that is not what it was.
    pub fn verify(&self, progress: &mut dyn FnMut(u64)) -> anyhow::Result<PathBuf> {
        let entry = self.store.entry(&self.name)?;
        let me = rustix::process::geteuid().as_raw();
        check_folders(&self.store, &entry, me)?;
        verify_files(&self.name, &self.store.files(&entry), self.remembered.as_deref(), progress)?;
        Ok(self.store.path(&entry))
    }
}

/// A model at a path, as the daemon uses it.
#[derive(Clone, Debug)]
pub struct ModelAtPath {
    path: PathBuf,
    name: String,
    /// As a [`StoredModel`]'s.
    remembered: Option<PathBuf>,
}

impl ModelAtPath {
    /// The model `name`, which is at `path`.
    pub fn new(path: &Path, name: &str, remembered: Option<PathBuf>) -> Self {
        Self { path: path.to_owned(), name: name.to_owned(), remembered }
    }

    /// Its file or folder. One that is named by its SHA-256, itself or behind links, is what its name says; reads all
    /// of it as [`StoredModel::verify`] does.
    ///
    /// # Errors
    /// As [`StoredModel::verify`].
    pub fn verify(&self, progress: &mut dyn FnMut(u64)) -> anyhow::Result<PathBuf> {
        let Some((file, sha256)) = named_by_content(&self.path) else { return Ok(self.path.clone()) };
        file.parent().map_or(Ok(()), |dir| check_folder(dir, rustix::process::geteuid().as_raw()))?;
        let bytes = file.metadata().with_context(|| file.display().to_string())?.len();
        verify_files(&self.name, &[(file.clone(), Piece { sha256, bytes })], self.remembered.as_deref(), progress)?;
        Ok(file)
    }
}

/// The file that `path` leads to and its SHA-256, if that is its name.
pub fn named_by_content(path: &Path) -> Option<(PathBuf, Digest)> {
    let file = path.canonicalize().ok()?;
    let digest = file.file_name()?.to_str()?.parse().ok()?;
    Some((file, digest))
}

impl Store {
    /// Reads all of the files of `entry`, whatever was read before.
    ///
    /// # Errors
    /// As [`StoredModel::verify`].
    pub fn verify(&self, name: &str, entry: &Entry, progress: &mut dyn FnMut(u64)) -> anyhow::Result<()> {
        let owner = self.owner();
        check_folders(self, entry, owner)?;
        let mut done = 0;
        for (path, piece) in self.files(entry) {
            hash(&open(&path, name, &piece, owner)?, name, &piece, &mut |read| progress(done + read))?;
            done += piece.bytes;
        }
        Ok(())
    }
}

impl Store {
    /// Who may write it besides root: whoever asks, or the daemon's user, whose store it is, where root asks.
    fn owner(&self) -> u32 {
        let me = rustix::process::geteuid();
        let owner = || self.dir().metadata().map_or(0, |meta| meta.uid());
        if me.is_root() { owner() } else { me.as_raw() }
    }
}

impl ModelSource for StoredModel {
    fn locate(&self) -> Result<PathBuf, String> {
        self.verify(&mut |_| {}).map_err(|error| format!("{error:#}"))
    }
}

impl ModelSource for ModelAtPath {
    fn locate(&self) -> Result<PathBuf, String> {
        self.verify(&mut |_| {}).map_err(|error| format!("{error:#}"))
    }
}

/// That the files of the model `name` are what they must be; those that are not `remembered` are read, and then are.
fn verify_files(
    name: &str,
    files: &[(PathBuf, Piece)],
    remembered: Option<&Path>,
    progress: &mut dyn FnMut(u64),
) -> anyhow::Result<()> {
    let mut all = remembered.map(recall).unwrap_or_default();
    let (n_known, mut done) = (all.len(), 0);
    let me = rustix::process::geteuid().as_raw();
    for (path, piece) in files {
        let file = open(path, name, piece, me)?;
        let known = mark(&file.metadata()?, &piece.sha256);
        if !all.contains(&known) {
            hash(&file, name, piece, &mut |read| progress(done + read))?;
            done += piece.bytes;
            log::info!(model:% = name, digest:% = piece.sha256; "model file verified");
            all.push(known);
        }
    }
    if let Some(remembered) = remembered.filter(|_| all.len() > n_known) {
        let first = all.len().saturating_sub(REMEMBERED_MAX);
        if let Err(error) = remember(remembered, &all[first..]) {
            log::warn!(reason:% = error; "that a model's file was verified is not remembered");
        }
    }
    Ok(())
}

/// Writes marks down, on the partition where they belong.
fn remember(path: &Path, marks: &[String]) -> anyhow::Result<()> {
    path.parent().map_or(Ok(()), check_mounted)?;
    place::write(path, (marks.join("\n") + "\n").as_bytes(), 0o600)
}

/// That only root or `owner` can have put files into the folders of a model.
fn check_folders(store: &Store, entry: &Entry, owner: u32) -> anyhow::Result<()> {
    let set = store.set_of(entry).map(|set| [store.sets(), set]);
    let mut dirs = [store.dir().to_owned(), store.blobs()].into_iter().chain(set.into_iter().flatten());
    dirs.try_for_each(|dir| check_folder(&dir, owner))
}

fn check_folder(dir: &Path, owner: u32) -> anyhow::Result<()> {
    let meta = dir.metadata().with_context(|| dir.display().to_string())?;
    ensure!(is_safe(&meta, owner), "{} may be written by others; chown root: and chmod go-w it", dir.display());
    Ok(())
}

/// Opens a file of a model: a plain one of the right size that only root or `owner` can have written.
fn open(path: &Path, name: &str, piece: &Piece, owner: u32) -> anyhow::Result<File> {
    let file = File::open(path).with_context(|| format!("model '{name}': {}", path.display()))?;
    let meta = file.metadata()?;
    ensure!(meta.is_file() && !path.is_symlink(), "model '{name}': {} is no plain file", path.display());
    ensure!(
        is_safe(&meta, owner),
        "model '{name}': {} may be written by others, who could change it while it is used",
        path.display()
    );
    ensure!(
        meta.len() == piece.bytes,
        "model '{name}' is damaged: {} has {} bytes, it had {}; pull or install it again",
        path.display(),
        meta.len(),
        piece.bytes
    );
    Ok(file)
}

fn hash(file: &File, name: &str, piece: &Piece, progress: &mut dyn FnMut(u64)) -> anyhow::Result<()> {
    let mut hear = |done| {
        progress(done);
        Ok(())
    };
    let found = Digest::of_file(file, &mut hear).with_context(|| format!("model '{name}' cannot be read"))?;
    ensure!(found == piece.sha256, "model '{name}' is damaged: its SHA-256 is {found}; pull or install it again");
    Ok(())
}

/// Whether only root or `owner` may write it.
fn is_safe(meta: &Metadata, owner: u32) -> bool {
    (meta.uid() == 0 || meta.uid() == owner) && meta.mode() & 0o022 == 0
}

/// What tells that a file is still the one that was hashed.
fn mark(meta: &Metadata, digest: &Digest) -> String {
    let times = [meta.mtime(), meta.mtime_nsec(), meta.ctime(), meta.ctime_nsec()].map(|time| time.to_string());
    format!("{digest} {} {} {} {}", meta.dev(), meta.ino(), meta.len(), times.join(" "))
}

/// The marks that are remembered; none where there is no such file, or one that is none.
fn recall(path: &Path) -> Vec<String> {
    let mut text = String::new();
    let read = File::open(path).and_then(|file| file.take(REMEMBERED_BYTES_MAX).read_to_string(&mut text));
    // The worst that comes of it is that files are hashed once more.
    if read.is_err() { Vec::new() } else { text.lines().map(str::to_owned).collect() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::{self, Permissions};
    use std::os::unix::fs::PermissionsExt;

    struct Bench {
        dir: tempfile::TempDir,
        store: Store,
        blob: PathBuf,
    }

    impl Bench {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            let store = Store::at(&dir.path().join("models"));
            store.make().unwrap();
            let partial = dir.path().join("x");
            fs::write(&partial, "weights").unwrap();
            let entry = store.put("m", &[(partial, Digest::of(b"weights"))], "file:x".to_owned()).unwrap();
            Self { blob: store.blob(&entry.sha256), store, dir }
        }

        /// Whether the model may be used, and how many bytes were read for the answer.
        fn verify(&self) -> (Result<PathBuf, String>, u64) {
            let remembered = Some(self.dir.path().join("verified"));
            let (model, mut read) = (StoredModel::new(self.store.clone(), "m", remembered), 0);
            let verified = model.verify(&mut |done| read = done);
            (verified.map_err(|error| format!("{error:#}")), read)
        }

        fn refused(&self, why: &str) {
            let said = self.verify().0.unwrap_err();
            assert!(said.contains(why), "{said}");
        }

        fn rewrite(&self, text: &str) {
            fs::set_permissions(&self.blob, Permissions::from_mode(0o644)).unwrap();
            fs::write(&self.blob, text).unwrap();
            fs::set_permissions(&self.blob, Permissions::from_mode(0o444)).unwrap();
        }
    }

    #[test]
    fn a_file_is_read_once_for_as_long_as_it_is_the_same() {
        let bench = Bench::new();
        assert_eq!(bench.verify(), (Ok(bench.blob.clone()), 7));
        assert_eq!(bench.verify(), (Ok(bench.blob.clone()), 0));
        bench.rewrite("weights");
        assert_eq!(bench.verify().1, 7, "it was written again");
    }

    #[test]
    fn a_file_that_was_cut_or_has_decayed_is_refused_though_it_was_good() {
        let bench = Bench::new();
        assert!(bench.verify().0.is_ok());
        bench.rewrite("weigh");
        bench.refused("has 5 bytes, it had 7");
        bench.rewrite("weightz");
        bench.refused("SHA-256");
        bench.refused("SHA-256");
    }

    #[test]
    fn a_file_that_others_could_change_is_refused() {
        let bench = Bench::new();
        fs::set_permissions(&bench.blob, Permissions::from_mode(0o664)).unwrap();
        bench.refused("may be written by others");
        fs::set_permissions(&bench.blob, Permissions::from_mode(0o444)).unwrap();
        fs::set_permissions(bench.store.blobs(), Permissions::from_mode(0o777)).unwrap();
        bench.refused("may be written by others");
        fs::set_permissions(bench.store.blobs(), Permissions::from_mode(0o755)).unwrap();
        let elsewhere = bench.dir.path().join("elsewhere");
        fs::rename(&bench.blob, &elsewhere).unwrap();
        std::os::unix::fs::symlink(&elsewhere, &bench.blob).unwrap();
        bench.refused("no plain file");
    }

    #[test]
    fn root_verifies_what_the_daemons_user_has_and_does_not_serve_it() {
        if !rustix::process::geteuid().is_root() {
            return;
        }
        let bench = Bench::new();
        let give = |path: &Path| std::os::unix::fs::chown(path, Some(65_534), None).unwrap();
        [bench.store.dir(), &bench.store.blobs(), &bench.blob].into_iter().for_each(give);
        let verify = || bench.store.verify("m", &bench.store.entry("m").unwrap(), &mut |_| {});
        verify().unwrap();
        bench.refused("may be written by others");
        // Somebody else's again.
        std::os::unix::fs::chown(&bench.blob, Some(1), None).unwrap();
        assert!(verify().unwrap_err().to_string().contains("may be written by others"));
    }

    #[test]
    fn a_file_at_a_path_is_verified_if_a_link_to_its_digest_or_its_own_name_says_what_it_is() {
        let bench = Bench::new();
        let link = bench.dir.path().join("model.gguf");
        std::os::unix::fs::symlink(&bench.blob, &link).unwrap();
        let remembered = Some(bench.dir.path().join("verified"));
        let verify = |path: &Path| {
            let (mut read, model) = (0, ModelAtPath::new(path, "m", remembered.clone()));
            (model.verify(&mut |done| read = done).map_err(|error| error.to_string()), read)
        };
        let blob = bench.blob.canonicalize().unwrap();
        assert_eq!(verify(&link), (Ok(blob.clone()), 7));
        assert_eq!(verify(&bench.blob), (Ok(blob), 0), "it was read");
        bench.rewrite("weightz");
        assert!(verify(&link).0.unwrap_err().contains("is damaged: its SHA-256"));
        fs::set_permissions(bench.store.blobs(), Permissions::from_mode(0o777)).unwrap();
        assert!(verify(&link).0.unwrap_err().contains("may be written by others"));
        // What says nothing of its content is used as it is, and what is not there is not there.
        let plain = bench.dir.path().join("plain.gguf");
        assert_eq!(verify(&plain), (Ok(plain.clone()), 0));
        fs::rename(&bench.blob, &plain).unwrap();
        assert_eq!(verify(&plain), (Ok(plain), 0));
        assert_eq!(verify(&link), (Ok(link), 0));
    }

    #[test]
    fn what_is_remembered_may_be_lost_or_spoilt() {
        let bench = Bench::new();
        let remembered = bench.dir.path().join("verified");
        fs::write(&remembered, [0xff; 100]).unwrap();
        assert_eq!(bench.verify().1, 7);
        assert_eq!(bench.verify().1, 0);
        fs::remove_file(&remembered).unwrap();
        assert_eq!(bench.verify().1, 7);
    }
}
