//! How does a model of several files lie in the store? Each file by its SHA-256 as any other, and a folder that has
//! them under the names by which the parts of a GGUF find one another.
//!
//! The folder's files are hard links, its name is a digest of theirs: it is made whole and takes its place by rename.

use super::{Digest, Entry, Piece, Store, place};
use anyhow::{Context, bail, ensure};
use rustix::fs::{CWD, RenameFlags, renameat_with};
use rustix::io::Errno;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

/// Most parts of a model.
pub(super) const PARTS_MAX: usize = 512;
/// What the names in a folder begin with.
const STEM: &str = "model";

/// The names of all parts of the model whose first one is called `file`: of a name that ends in `-00001-of-0000N.gguf`
/// the `N` of its kind, of another one itself. And what they have in common.
///
/// # Errors
/// A part that is not the first, or more parts than [`PARTS_MAX`].
pub(super) fn names(file: &str) -> anyhow::Result<(String, Vec<String>)> {
    let stem = file.strip_suffix(".gguf").unwrap_or(file);
    let Some((stem, number, count)) = numbered(file) else { return Ok((stem.to_owned(), vec![file.to_owned()])) };
    ensure!(number == 1, "'{file}' is part {number} of {count}; name the first one, and all are taken");
    ensure!(count <= PARTS_MAX, "'{file}' has {count} parts, at most {PARTS_MAX} are taken");
    Ok((stem.to_owned(), (1..=count).map(|number| name(stem, number, count)).collect()))
}

fn name(stem: &str, number: usize, count: usize) -> String {
    format!("{stem}-{number:05}-of-{count:05}.gguf")
}

/// Stem, number and count of a part's name.
fn numbered(file: &str) -> Option<(&str, usize, usize)> {
    let (rest, count) = file.strip_suffix(".gguf")?.rsplit_once("-of-")?;
    let (stem, number) = rest.rsplit_once('-')?;
    let digits =
        |text: &str| (text.len() == 5 && text.bytes().all(|digit| digit.is_ascii_digit())).then(|| text.parse());
    let (number, count) = (digits(number)?.ok()?, digits(count)?.ok()?);
    (1 <= number && number <= count).then_some((stem, number, count))
}

/// The files that lie at `path` and, if that is a first part, beside it; links are followed, what is not there is left
/// out.
pub(super) fn files_at(path: &Path) -> Vec<PathBuf> {
    let file = path.file_name().and_then(|file| file.to_str()).unwrap_or_default();
    let names = names(file).map_or_else(|_| vec![file.to_owned()], |(_, names)| names);
    names.iter().filter_map(|name| path.with_file_name(name).canonicalize().ok()).collect()
}

impl Entry {
    /// All files, in their order.
    pub(super) fn pieces(&self) -> impl Iterator<Item = Piece> + '_ {
        std::iter::once(Piece { sha256: self.sha256, bytes: self.bytes }).chain(self.more.iter().copied())
    }

    /// The size of all files together.
    pub fn total_bytes(&self) -> u64 {
        self.pieces().fold(0, |sum, piece| sum.saturating_add(piece.bytes))
    }
}

impl Store {
    pub(super) fn sets(&self) -> PathBuf {
        self.dir().join("sets")
    }

    /// The folder of a model of several files.
    pub(super) fn set_of(&self, entry: &Entry) -> Option<PathBuf> {
        let digests: String = entry.pieces().map(|piece| piece.sha256.to_string()).collect();
        (!entry.more.is_empty()).then(|| self.sets().join(Digest::of(digests.as_bytes()).to_string()))
    }

    /// The files of a model, in their order, with what each must be.
    pub(super) fn files(&self, entry: &Entry) -> Vec<(PathBuf, Piece)> {
        let count = 1 + entry.more.len();
        let path = |number: usize, piece: &Piece| match self.set_of(entry) {
            Some(set) => set.join(name(STEM, number, count)),
            None => self.blob(&piece.sha256),
        };
        (1..).zip(entry.pieces()).map(|(number, piece)| (path(number, &piece), piece)).collect()
    }

    /// The file that is opened for a model: its only one, or the first of its parts.
    pub fn path(&self, entry: &Entry) -> PathBuf {
        self.files(entry).swap_remove(0).0
    }

    /// That the store's disk has hard links, of which the folder of a model of several files is made; FAT and exFAT
    /// have none. No copy is made in their place: it would take the model's room twice. `link` is the system's.
    ///
    /// # Errors
    /// A disk that has none.
    pub(super) fn check_links(&self, link: impl Fn(&Path, &Path) -> std::io::Result<()>) -> anyhow::Result<()> {
        let dir = self.partial();
        let file = tempfile::NamedTempFile::new_in(&dir).with_context(|| dir.display().to_string())?;
        let beside = file.path().with_extension("link");
        link(file.path(), &beside).with_context(|| {
            format!(
                "the disk of {} has no hard links, which a model of several files needs; set models.dir to a folder of \
                 another disk, or have its parts made one file",
                self.dir().display()
            )
        })?;
        Ok(std::fs::remove_file(&beside)?)
    }

    /// Makes the folder of a model of several files anew, from the files that are in their places. Answers whether
    /// there was none before; where there was one, whoever looks finds that one or the new one.
    ///
    /// # Errors
    /// A disk that fails, or that has no hard links.
    pub(super) fn make_set(&self, entry: &Entry) -> anyhow::Result<bool> {
        let Some(set) = self.set_of(entry) else { return Ok(false) };
        place::make_dir(&self.sets(), 0o755)?;
        let new = set.with_extension("new");
        remove_dir(&new)?;
        place::make_dir(&new, 0o755)?;
        for (path, piece) in self.files(entry) {
            let link = new.join(path.file_name().context("a file has a name")?);
            let blob = self.blob(&piece.sha256);
            std::fs::hard_link(&blob, &link).with_context(|| format!("{} cannot be linked", blob.display()))?;
        }
        place::sync_dir(&new)?;
        let was_there = replace_dir(&new, &set).with_context(|| set.display().to_string())?;
        place::sync_dir(&self.sets())?;
        // Links to files that have been replaced since, if any.
        remove_dir(&new)?;
        Ok(!was_there)
    }

    /// Folders of models of several files that are none of `used`.
    ///
    /// # Errors
    /// A folder that cannot be read.
    pub(super) fn stray_sets(&self, used: &[PathBuf]) -> anyhow::Result<Vec<PathBuf>> {
        let entries = match self.sets().read_dir() {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries?,
        };
        let paths = entries.map(|entry| Ok(entry?.path())).collect::<anyhow::Result<Vec<_>>>()?;
        Ok(paths.into_iter().filter(|path| !used.contains(path)).collect())
    }
}

/// Gives `dir` the place of the folder `new`, and `new` what was there, if anything was; answers whether.
fn replace_dir(new: &Path, dir: &Path) -> std::io::Result<bool> {
    match renameat_with(CWD, new, CWD, dir, RenameFlags::EXCHANGE) {
        Ok(()) => Ok(true),
        Err(Errno::NOENT) => std::fs::rename(new, dir).map(|()| false),
        // A file system that cannot exchange names.
        Err(Errno::INVAL | Errno::NOSYS) => {
            let was_there = dir.exists();
            if was_there {
                std::fs::remove_dir_all(dir)?;
            }
            std::fs::rename(new, dir).map(|()| was_there)
        }
        Err(error) => Err(error.into()),
    }
}

/// Removes a folder of links, if it is there.
pub(super) fn remove_dir(dir: &Path) -> anyhow::Result<()> {
    match std::fs::remove_dir_all(dir) {
        Err(error) if error.kind() != ErrorKind::NotFound => bail!("{} cannot be removed: {error}", dir.display()),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicBool, Ordering};

    #[test]
    fn a_disk_without_hard_links_is_told_before_anything_comes() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::at(dir.path());
        store.make().unwrap();
        store.check_links(|from, to| std::fs::hard_link(from, to)).unwrap();
        let said = store.check_links(|_, _| Err(Errno::PERM.into())).unwrap_err();
        assert!(said.to_string().contains("has no hard links") && said.to_string().contains("models.dir"), "{said}");
        assert_eq!(store.partial().read_dir().unwrap().count(), 0);
    }

    #[test]
    fn a_model_of_several_files_that_is_fetched_again_is_there_at_every_moment() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::at(dir.path());
        store.make().unwrap();
        let put = || {
            let files = ["one", "two"].map(|text| {
                let path = store.partial().join(text);
                std::fs::write(&path, text).unwrap();
                (path, Digest::of(text.as_bytes()))
            });
            store.put("m", &files, "file:x".to_owned()).unwrap()
        };
        let second = store.files(&put()).remove(1).0;
        let is_over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let looks = scope.spawn(|| {
                let n_missed = || u32::from(std::fs::read(&second).is_err());
                let mut n = 0;
                while !is_over.load(Ordering::Relaxed) {
                    n += n_missed();
                }
                n
            });
            (0..200).for_each(|_| drop(put()));
            is_over.store(true, Ordering::Relaxed);
            assert_eq!(looks.join().unwrap(), 0, "times it was not there");
        });
        assert_eq!(store.sets().read_dir().unwrap().count(), 1);
        let lock = store.lock().unwrap();
        assert!(store.garbage(&lock, true, &[]).unwrap().is_empty());
    }

    #[test]
    fn a_first_part_names_all_and_any_other_name_itself() {
        let (stem, all) = names("m-Q4-00001-of-00003.gguf").unwrap();
        assert_eq!((stem.as_str(), all.len(), all[2].as_str()), ("m-Q4", 3, "m-Q4-00003-of-00003.gguf"));
        for single in
            ["m.gguf", "m", "m-1-of-2.gguf", "m-00001-of-00002", "00001-of-00002.gguf", "m-00003-of-00002.gguf"]
        {
            assert_eq!(names(single).unwrap().1, [single], "{single}");
        }
        assert!(names("m-00002-of-00003.gguf").unwrap_err().to_string().contains("part 2 of 3"));
        assert!(names("m-00001-of-99999.gguf").unwrap_err().to_string().contains("at most 512"));
    }
}
