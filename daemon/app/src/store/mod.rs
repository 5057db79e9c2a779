//! Where do models lie that the tool has fetched? Whole files by their SHA-256, and names that stand for them.
//!
//! ```text
//! models_dir/blobs/<sha256>    a file; put there whole, by rename, and never written again
//! models_dir/names/<name>.json what a name stands for
//! models_dir/sets/<digest>/     of a model of several files links to them, by the names that they need
//! models_dir/partial/          what is being fetched
//! models_dir/lock              held by whoever changes names or removes files
//! ```
//!
//! A file has its place before its name, and loses its name before its place: whenever the power goes, a name stands
//! for a whole file, and at worst a file has no name, which `gc` removes. Another model under a name is another file:
//! who has the old one mapped keeps it.

mod copy;
mod digest;
mod fetch;
mod http;
mod partial;
mod parts;
mod place;
mod source;
mod verified;

pub use copy::{Copied, CopyError};
pub use digest::Digest;
pub use fetch::{FetchOptions, Fetched, Watcher, fetch};
pub(crate) use place::sync_dir;
pub use source::Source;
pub use verified::{ModelAtPath, StoredModel, named_by_content};

use crate::state::check_mounted;
use anyhow::{Context, bail, ensure};
use rustix::fs::FlockOperation;
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io::{ErrorKind, Read};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

/// Longest name.
const NAME_CHARS_MAX: usize = 64;
/// Largest file of a name.
const ENTRY_BYTES_MAX: u64 = 16 << 10;
/// Most names that are looked at.
const NAMES_MAX: usize = 4096;
/// What begins a path that is a name of the store.
const REFERENCE: &str = "store:";

/// A folder of models.
#[derive(Clone, Debug)]
pub struct Store {
    dir: PathBuf,
}

/// What a name stands for.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Entry {
    /// The form of this file.
    v: u32,
    /// The file, or the first of several.
    pub sha256: Digest,
    /// Its size.
    pub bytes: u64,
    /// The other files of a model of several.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub more: Vec<Piece>,
    /// Where it came from, without what might be a secret.
    pub source: String,
    /// Seconds since 1970, when it was put here.
    pub added: u64,
}

/// One file of a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Piece {
    /// The file.
    pub sha256: Digest,
    /// Its size.
    pub bytes: u64,
}

/// The store's lock, until it is dropped.
#[derive(Debug)]
pub struct Lock {
    _file: File,
}

/// A file that no name stands for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Garbage {
    /// The file.
    pub path: PathBuf,
    /// Its size.
    pub bytes: u64,
}

/// The name in a path that refers to the store: `store:NAME`.
pub fn reference(path: &Path) -> Option<&str> {
    path.to_str()?.strip_prefix(REFERENCE)
}

/// What is to be done to have the daemon serve the model `name`, for people.
pub fn how_to_serve(name: &str) -> String {
    let table = crate::config::dotted(&["model", name]);
    format!("in the configuration: [{table}] path = \"store:{name}\"; then restart sparsed")
}

/// That a name can be a file's, and cannot be a path.
///
/// # Errors
/// What is wrong with it.
pub fn check_name(name: &str) -> anyhow::Result<()> {
    let fits = |letter: u8| letter.is_ascii_alphanumeric() || b"._-".contains(&letter);
    ensure!(
        (1..=NAME_CHARS_MAX).contains(&name.len()) && name.bytes().all(fits) && !name.starts_with('.'),
        "'{name}' cannot be a model's name: 1 to {NAME_CHARS_MAX} of A-Z, a-z, 0-9, '.', '_' and '-', not '.' first"
    );
    Ok(())
}

impl Store {
    /// The store in `dir`, which need not be there yet.
    pub fn at(dir: &Path) -> Self {
        Self { dir: dir.to_owned() }
    }

    /// Its folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Where the file `digest` has its place.
    pub fn blob(&self, digest: &Digest) -> PathBuf {
        self.blobs().join(digest.to_string())
    }

    fn blobs(&self) -> PathBuf {
        self.dir.join("blobs")
    }

    fn partial(&self) -> PathBuf {
        self.dir.join("partial")
    }

    fn names_dir(&self) -> PathBuf {
        self.dir.join("names")
    }

    fn name_file(&self, name: &str) -> PathBuf {
        self.names_dir().join(format!("{name}.json"))
    }

    /// Makes what is missing of its folders. Files in them are for everybody to read, since the daemon is another user
    /// than who fetches; what is being fetched is not.
    ///
    /// # Errors
    /// A folder that cannot be made, or whose partition is away.
    pub fn make(&self) -> anyhow::Result<()> {
        check_mounted(&self.dir)?;
        for (dir, mode) in
            [(&self.dir, 0o755), (&self.blobs(), 0o755), (&self.names_dir(), 0o755), (&self.partial(), 0o700)]
        {
            place::make_dir(dir, mode)?;
        }
        Ok(())
    }

    /// Waits for the lock that whoever changes the store must have.
    ///
    /// # Errors
    /// A store that is not there or not the caller's to change.
    pub fn lock(&self) -> anyhow::Result<Lock> {
        let path = self.dir.join("lock");
        let file = File::options().create(true).append(true).open(&path).with_context(|| path.display().to_string())?;
        rustix::fs::flock(&file, FlockOperation::LockExclusive).with_context(|| path.display().to_string())?;
        Ok(Lock { _file: file })
    }

    /// All names, in their order; those that cannot be read with the reason.
    ///
    /// # Errors
    /// A folder that cannot be read.
    pub fn names(&self) -> anyhow::Result<Vec<(String, anyhow::Result<Entry>)>> {
        let dir = self.names_dir();
        let entries = match dir.read_dir() {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries.with_context(|| dir.display().to_string())?,
        };
        let mut names = Vec::new();
        for entry in entries {
            let file_name = entry?.file_name();
            let Some(name) = file_name.to_str().and_then(|name| name.strip_suffix(".json")) else { continue };
            if check_name(name).is_ok() {
                names.push(name.to_owned());
            }
            ensure!(names.len() <= NAMES_MAX, "{} has more than {NAMES_MAX} names", dir.display());
        }
        names.sort_unstable();
        Ok(names.into_iter().map(|name| (name.clone(), self.entry(&name))).collect())
    }

    /// The file of a configured path: of a name what it stands for, else the path itself.
    pub fn resolve(&self, path: &Path) -> PathBuf {
        let entry = reference(path).and_then(|name| self.entry(name).ok());
        entry.map_or_else(|| path.to_owned(), |entry| self.path(&entry))
    }

    /// What `name` stands for.
    ///
    /// # Errors
    /// No such name, or a file that is none.
    pub fn entry(&self, name: &str) -> anyhow::Result<Entry> {
        check_name(name)?;
        let path = self.name_file(name);
        let file = match File::open(&path) {
            Err(error) if error.kind() == ErrorKind::NotFound => {
                bail!("there is no model '{name}' in {}; `sparsectl model pull` fetches one", self.dir.display())
            }
            file => file.with_context(|| path.display().to_string())?,
        };
        let mut text = Vec::new();
        file.take(ENTRY_BYTES_MAX + 1).read_to_end(&mut text).with_context(|| path.display().to_string())?;
        ensure!(text.len() as u64 <= ENTRY_BYTES_MAX, "{} is longer than {ENTRY_BYTES_MAX} bytes", path.display());
        let entry: Entry = serde_json::from_slice(&text).with_context(|| path.display().to_string())?;
        ensure!(matches!(entry.v, 1 | 2), "{} has form {}, known are 1 and 2", path.display(), entry.v);
        ensure!(entry.more.len() < parts::PARTS_MAX, "{} has too many parts", path.display());
        Ok(entry)
    }

    /// Puts the files of a model, each with the digest of its content, in their places, and has `name` stand for them.
    /// Who has the same file already keeps it.
    ///
    /// # Errors
    /// A disk that fails. Then the name stands for what it stood for before, and files that are new here are where they
    /// were.
    pub fn put(&self, name: &str, files: &[(PathBuf, Digest)], source: String) -> anyhow::Result<Entry> {
        check_name(name)?;
        let _lock = self.lock()?;
        let mut new = Vec::new();
        let put = self.put_locked(name, files, source, &mut new);
        if put.is_err() {
            // Without a name it would only take room. The failure is told, not that of this.
            let _are_back = new.iter().rev().filter(|(blob, partial)| std::fs::rename(blob, partial).is_ok()).count();
        }
        put
    }

    /// As [`put`](Self::put); of the files that were not here before it tells where they are and were.
    fn put_locked(
        &self,
        name: &str,
        files: &[(PathBuf, Digest)],
        source: String,
        new: &mut Vec<(PathBuf, PathBuf)>,
    ) -> anyhow::Result<Entry> {
        let mut pieces = Vec::new();
        for (partial, digest) in files {
            let (bytes, blob) = (partial.metadata()?.len(), self.blob(digest));
            let is_new = !blob.exists();
            place::seal(partial)?;
            // A file that decayed is replaced by what has just been hashed.
            std::fs::rename(partial, &blob).with_context(|| blob.display().to_string())?;
            if is_new {
                new.push((blob, partial.clone()));
            }
            pieces.push(Piece { sha256: *digest, bytes });
        }
        sync_dir(&self.blobs())?;
        let added = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs());
        ensure!(!pieces.is_empty(), "a model has a file");
        let Piece { sha256, bytes } = pieces.remove(0);
        // An older version does not know of several files, and says so of another form.
        let v = if pieces.is_empty() { 1 } else { 2 };
        let entry = Entry { v, sha256, bytes, more: pieces, source, added };
        let is_new_set = self.make_set(&entry)?;
        let written = place::write(&self.name_file(name), &serde_json::to_vec(&entry)?, 0o644);
        if let (Err(_), true, Some(set)) = (&written, is_new_set, self.set_of(&entry)) {
            // Its links would keep the files.
            let _is_left = parts::remove_dir(&set).is_err();
        }
        written.map(|()| entry)
    }

    /// Takes `name` away; its file stays until [`sweep`](Self::sweep).
    ///
    /// # Errors
    /// No such name.
    pub fn remove(&self, name: &str) -> anyhow::Result<()> {
        check_name(name)?;
        let path = self.name_file(name);
        // Also one that cannot be read.
        ensure!(path.exists(), "there is no model '{name}' in {}", self.dir.display());
        let _lock = self.lock()?;
        std::fs::remove_file(&path).with_context(|| path.display().to_string())?;
        sync_dir(&self.names_dir())
    }

    /// Files that no name stands for and none of the `configured` paths leads to, and with `partial` what was begun to
    /// be fetched and is not being fetched now. A name that cannot be read might stand for any file: then there is no
    /// garbage.
    ///
    /// # Errors
    /// A folder or a name that cannot be read.
    pub fn garbage(&self, _lock: &Lock, partial: bool, configured: &[PathBuf]) -> anyhow::Result<Vec<Garbage>> {
        let led_to: Vec<PathBuf> = configured.iter().flat_map(|path| parts::files_at(path)).collect();
        let is_led_to =
            |path: &Path| path.canonicalize().is_ok_and(|path| led_to.iter().any(|file| file.starts_with(&path)));
        let (mut used, mut sets) = (Vec::new(), Vec::new());
        for (name, entry) in self.names()? {
            let entry = entry.with_context(|| format!("model {name}; `sparsectl model rm {name}` first"))?;
            used.extend(entry.pieces().map(|piece| self.blob(&piece.sha256)));
            sets.extend(self.set_of(&entry));
        }
        // Links take no room of their own.
        let strays = self.stray_sets(&sets)?.into_iter().filter(|set| !is_led_to(set));
        let mut garbage: Vec<Garbage> = strays.map(|path| Garbage { path, bytes: 0 }).collect();
        for entry in self.blobs().read_dir()? {
            let path = entry?.path();
            if !used.contains(&path) && !is_led_to(&path) {
                garbage.push(Garbage { bytes: path.metadata()?.len(), path });
            }
        }
        if partial {
            for entry in self.partial().read_dir()? {
                let path = entry?.path();
                if !partial::is_being_fetched(&path) {
                    garbage.push(Garbage { bytes: path.metadata()?.len(), path });
                }
            }
        }
        garbage.sort_unstable_by(|a, b| a.path.cmp(&b.path));
        Ok(garbage)
    }

    /// Removes `garbage`, but what is being fetched by now.
    ///
    /// # Errors
    /// A file that cannot be removed.
    pub fn sweep(&self, _lock: &Lock, garbage: &[Garbage]) -> anyhow::Result<()> {
        for Garbage { path, .. } in garbage {
            if path.parent() == Some(&self.partial()) {
                // Somebody may have begun with it since it was found.
                let _is_removed = partial::remove_unless_fetched(path)?;
            } else if path.is_dir() {
                parts::remove_dir(path)?;
            } else {
                std::fs::remove_file(path).with_context(|| path.display().to_string())?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn store() -> (tempfile::TempDir, Store) {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::at(&dir.path().join("models"));
        store.make().unwrap();
        (dir, store)
    }

    fn put(store: &Store, name: &str, text: &str) -> Entry {
        let partial = store.partial().join("x");
        std::fs::write(&partial, text).unwrap();
        store.put(name, &[(partial, Digest::of(text.as_bytes()))], "file:x".to_owned()).unwrap()
    }

    #[test]
    fn a_name_stands_for_its_last_file_and_the_one_before_is_garbage() {
        let (_dir, store) = store();
        let (first, other) = (put(&store, "a", "one"), put(&store, "b", "two"));
        put(&store, "a", "three");
        assert_eq!(std::fs::read(store.blob(&store.entry("a").unwrap().sha256)).unwrap(), b"three");
        let lock = store.lock().unwrap();
        let garbage = store.garbage(&lock, false, &[]).unwrap();
        assert_eq!(garbage, [Garbage { path: store.blob(&first.sha256), bytes: 3 }]);
        store.sweep(&lock, &garbage).unwrap();
        assert!(!store.blob(&first.sha256).exists() && store.blob(&other.sha256).exists());
    }

    #[test]
    fn a_file_that_a_path_of_the_configuration_leads_to_stays_without_a_name() {
        let (dir, store) = store();
        let (direct, linked, other) = (put(&store, "a", "one"), put(&store, "b", "two"), put(&store, "c", "three"));
        let links = ["m-00001-of-00002.gguf", "m-00002-of-00002.gguf"].map(|name| dir.path().join(name));
        for (link, entry) in links.iter().zip([&linked, &other]) {
            std::os::unix::fs::symlink(store.blob(&entry.sha256), link).unwrap();
        }
        let configured = [store.blob(&direct.sha256), links[0].clone(), dir.path().join("gone"), "store:x".into()];
        ["a", "b", "c"].iter().for_each(|name| store.remove(name).unwrap());
        let garbage = |configured: &[PathBuf]| store.garbage(&store.lock().unwrap(), true, configured).unwrap().len();
        assert_eq!((garbage(&configured), garbage(&configured[..1]), garbage(&[])), (0, 2, 3));
        let files = ["four", "five"].map(|text| {
            let path = store.partial().join(text);
            std::fs::write(&path, text).unwrap();
            (path, Digest::of(text.as_bytes()))
        });
        store.put("m", &files, "file:x".to_owned()).unwrap();
        let first = store.resolve(Path::new("store:m"));
        store.remove("m").unwrap();
        let garbage = store.garbage(&store.lock().unwrap(), true, std::slice::from_ref(&first)).unwrap();
        assert!(garbage.iter().all(|one| !first.starts_with(&one.path)), "{garbage:?}");
    }

    #[test]
    fn a_file_with_two_names_stays_until_both_are_gone() {
        let (_dir, store) = store();
        let entry = put(&store, "a", "one");
        put(&store, "b", "one");
        store.remove("a").unwrap();
        assert!(store.garbage(&store.lock().unwrap(), false, &[]).unwrap().is_empty());
        store.remove("b").unwrap();
        assert_eq!(store.garbage(&store.lock().unwrap(), false, &[]).unwrap()[0].path, store.blob(&entry.sha256));
        assert!(store.remove("b").unwrap_err().to_string().contains("no model 'b'"));
    }

    #[test]
    fn a_name_that_cannot_be_read_keeps_all_files_and_can_be_removed() {
        let (_dir, store) = store();
        put(&store, "a", "one");
        std::fs::write(store.name_file("b"), "{").unwrap();
        std::fs::write(store.name_file("c"), vec![b' '; 20_000]).unwrap();
        assert!(store.garbage(&store.lock().unwrap(), false, &[]).is_err());
        assert!(store.entry("c").unwrap_err().to_string().contains("longer than"));
        store.remove("b").unwrap();
        store.remove("c").unwrap();
        assert!(store.garbage(&store.lock().unwrap(), false, &[]).unwrap().is_empty());
    }

    #[test]
    fn a_model_of_several_files_is_found_by_the_first_and_leaves_with_its_links() {
        let (_dir, store) = store();
        put(&store, "single", "two");
        let files = ["one", "two", "three"].map(|text| {
            let path = store.partial().join(text);
            std::fs::write(&path, text).unwrap();
            (path, Digest::of(text.as_bytes()))
        });
        store.put("m", &files, "file:x".to_owned()).unwrap();
        let entry = store.entry("m").unwrap();
        assert_eq!((entry.total_bytes(), entry.more.len()), (11, 2));
        let first = store.resolve(Path::new("store:m"));
        assert!(first.ends_with("model-00001-of-00003.gguf"), "{}", first.display());
        let read = |name: &str| std::fs::read_to_string(first.with_file_name(name)).unwrap();
        assert_eq!(
            (read("model-00001-of-00003.gguf"), read("model-00003-of-00003.gguf")),
            ("one".into(), "three".into())
        );
        assert!(store.garbage(&store.lock().unwrap(), false, &[]).unwrap().is_empty());
        store.remove("m").unwrap();
        let lock = store.lock().unwrap();
        let garbage = store.garbage(&lock, false, &[]).unwrap();
        // Two files, and the folder; the third file is the other model's.
        assert_eq!((garbage.len(), garbage.iter().map(|one| one.bytes).sum::<u64>()), (3, 8), "{garbage:?}");
        store.sweep(&lock, &garbage).unwrap();
        assert!(!first.exists() && store.resolve(Path::new("store:single")).exists());
    }

    #[test]
    fn an_addition_that_fails_at_its_end_leaves_the_store_as_it_was_and_what_has_come_where_it_was() {
        let (_dir, store) = store();
        put(&store, "single", "two");
        // A name that cannot be written.
        std::fs::create_dir_all(store.name_file("m").join("x")).unwrap();
        let count = |dir: PathBuf| dir.read_dir().map_or(0, Iterator::count);
        let files = ["one", "two", "three"].map(|text| {
            let path = store.partial().join(text);
            std::fs::write(&path, text).unwrap();
            (path, Digest::of(text.as_bytes()))
        });
        for files in [&files[..1], &files] {
            store.put("m", files, "file:x".to_owned()).unwrap_err();
            assert_eq!((count(store.blobs()), count(store.sets())), (1, 0));
            assert_eq!(std::fs::read(&files[0].0).unwrap(), b"one");
        }
        std::fs::remove_dir_all(store.name_file("m")).unwrap();
        // What another model has was given to it.
        std::fs::write(&files[1].0, "two").unwrap();
        store.put("m", &files, "file:x".to_owned()).unwrap();
    }

    #[test]
    fn nothing_that_leads_elsewhere_is_a_name() {
        let (_dir, store) = store();
        for bad in ["", ".", "..", "../x", "a/b", ".hidden", "a b", "ü", &"x".repeat(65)] {
            assert!(check_name(bad).is_err() && store.entry(bad).is_err(), "{bad}");
        }
        assert!(check_name("Qwen2.5-0.5b_q8").is_ok());
        assert_eq!(reference(Path::new("store:a")), Some("a"));
        assert_eq!(reference(Path::new("/store:a")), None);
    }

    #[test]
    fn nobody_may_write_a_file_of_the_store() {
        use std::os::unix::fs::PermissionsExt;
        let (_dir, store) = store();
        let entry = put(&store, "a", "one");
        assert_eq!(store.blob(&entry.sha256).metadata().unwrap().permissions().mode() & 0o7777, 0o444);
    }
}
