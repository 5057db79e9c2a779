//! Which text is a model measured on? Files and folders, or token ids.

use anyhow::{Context, bail, ensure};
use serde_json::{Value, json};
use sparsed_model::{Model, Tokenizer};
use std::io::Read;
use std::path::{Path, PathBuf};

/// What of a file is read, from its start.
const FILE_BYTES_MAX: u64 = 4 << 20;
/// Most files.
const FILES_MAX: usize = 10_000;
/// Deepest folder in a folder.
const DEPTH_MAX: usize = 16;
/// Largest file of token ids.
const IDS_BYTES_MAX: u64 = 256 << 20;
/// What counts as text in a folder.
const EXTENSIONS: [&str; 4] = ["txt", "md", "rst", "pod"];

/// Documents as tokens.
#[derive(Debug)]
pub(super) struct Texts {
    /// Without a begin token.
    pub(super) documents: Vec<Vec<u32>>,
    /// The same, tokens of each line by itself; empty for token ids.
    pub(super) lines: Vec<Vec<Vec<u32>>>,
    /// What sequences begin with: the begin token, where the model's tokenizer says so.
    pub(super) prefix: Vec<u32>,
    names: Vec<String>,
}

impl Texts {
    /// Reads and encodes files and folders.
    ///
    /// # Errors
    /// A model without a tokenizer, a path that cannot be read, no text at all.
    pub(super) fn read(paths: &[PathBuf], model: &Model) -> anyhow::Result<Self> {
        let tokenizer = model.tokenizer().context("the model has no tokenizer; give token ids with --ids")?;
        let mut files = Vec::new();
        for path in paths {
            collect(path, 0, &mut files).with_context(|| path.display().to_string())?;
        }
        ensure!(!files.is_empty(), "no *.txt, *.md, *.rst or *.pod file in the folders of --text");
        ensure!(files.len() <= FILES_MAX, "more than {FILES_MAX} text files");
        let prefix = tokenizer.encode("")?;
        let mut texts = Self { documents: Vec::new(), lines: Vec::new(), prefix, names: Vec::new() };
        for file in files {
            let text = read_text(&file).with_context(|| file.display().to_string())?;
            texts.documents.push(texts.plain(tokenizer, &text)?);
            let lines = text.split_inclusive('\n').map(|line| texts.plain(tokenizer, line));
            let lines = lines.collect::<anyhow::Result<_>>()?;
            texts.lines.push(lines);
            texts.names.push(file.display().to_string());
        }
        Ok(texts)
    }

    /// Reads a JSON list of token ids, or a list of such lists.
    ///
    /// # Errors
    /// A file that is neither, or a token past the vocabulary.
    pub(super) fn of_ids(path: &Path, vocab: u32) -> anyhow::Result<Self> {
        let name = || path.display().to_string();
        let size = std::fs::metadata(path).with_context(name)?.len();
        ensure!(size <= IDS_BYTES_MAX, "{}: {size} bytes, the limit is {IDS_BYTES_MAX}", name());
        let json: Value = serde_json::from_slice(&std::fs::read(path).with_context(name)?).with_context(name)?;
        let nested = json.as_array().and_then(|list| list.first()).is_some_and(Value::is_array);
        let documents: Result<Vec<Vec<u32>>, _> =
            if nested { serde_json::from_value(json) } else { serde_json::from_value(json).map(|one| vec![one]) };
        let documents = documents.with_context(|| format!("{}: not a list of token ids", name()))?;
        if let Some(bad) = documents.iter().flatten().find(|&&id| id >= vocab) {
            bail!("{}: token {bad} is past the vocabulary of {vocab}", name());
        }
        Ok(Self { names: vec![name()], documents, lines: Vec::new(), prefix: Vec::new() })
    }

    /// How many files and tokens, and which.
    pub(super) fn json(&self) -> Value {
        let tokens: usize = self.documents.iter().map(Vec::len).sum();
        json!({ "documents": self.documents.len(), "tokens": tokens, "files": self.names })
    }

    fn plain(&self, tokenizer: &Tokenizer, text: &str) -> anyhow::Result<Vec<u32>> {
        Ok(tokenizer.encode(text)?.split_off(self.prefix.len()))
    }
}

/// Adds a file, or the text files below a folder in the order of their names.
fn collect(path: &Path, depth: usize, files: &mut Vec<PathBuf>) -> anyhow::Result<()> {
    if !path.metadata()?.is_dir() {
        files.push(path.to_owned());
        return Ok(());
    }
    ensure!(depth < DEPTH_MAX, "folders in folders, more than {DEPTH_MAX} deep");
    let mut entries = std::fs::read_dir(path)?.collect::<Result<Vec<_>, _>>()?;
    entries.sort_by_key(std::fs::DirEntry::file_name);
    for entry in entries {
        let (kind, path) = (entry.file_type()?, entry.path());
        let is_text = path.extension().is_some_and(|found| EXTENSIONS.iter().any(|known| found == *known));
        // Links are not followed: they may lead round in a circle.
        if kind.is_dir() || kind.is_file() && is_text {
            collect(&path, depth + 1, files)?;
        }
    }
    Ok(())
}

/// The file's text, from its start; a character that the limit cuts through is left out.
fn read_text(path: &Path) -> anyhow::Result<String> {
    let mut bytes = Vec::new();
    std::fs::File::open(path)?.take(FILE_BYTES_MAX).read_to_end(&mut bytes)?;
    if let Err(error) = std::str::from_utf8(&bytes) {
        let cut = error.error_len().is_none() && bytes.len() as u64 == FILE_BYTES_MAX;
        ensure!(cut, "is not UTF-8 from byte {} on", error.valid_up_to());
        bytes.truncate(error.valid_up_to());
    }
    Ok(String::from_utf8(bytes)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_give_their_text_files_in_order() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("b")).unwrap();
        for name in ["c.md", "a.txt", "b/d.rst", "b/e.png", "f"] {
            std::fs::write(dir.path().join(name), "x").unwrap();
        }
        std::os::unix::fs::symlink(dir.path(), dir.path().join("b/circle")).unwrap();
        let mut files = Vec::new();
        collect(dir.path(), 0, &mut files).unwrap();
        collect(&dir.path().join("f"), 0, &mut files).unwrap();
        let names: Vec<_> = files.iter().map(|file| file.strip_prefix(dir.path()).unwrap().to_str().unwrap()).collect();
        assert_eq!(names, ["a.txt", "b/d.rst", "c.md", "f"]);
    }

    #[test]
    fn text_that_is_not_utf_8_is_refused_but_not_for_a_cut_at_the_limit() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.txt");
        std::fs::write(&path, b"ab\xffc").unwrap();
        assert!(read_text(&path).unwrap_err().to_string().contains("from byte 2"));
        let long = format!("a{}", "\u{e9}".repeat(usize::try_from(FILE_BYTES_MAX / 2).unwrap()));
        std::fs::write(&path, &long).unwrap();
        assert_eq!(read_text(&path).unwrap().len() as u64, FILE_BYTES_MAX - 1);
        std::fs::write(&path, b"ab\xc3").unwrap();
        assert!(read_text(&path).is_err(), "the file itself ends in the middle");
    }

    #[test]
    fn ids_are_one_list_or_several_within_the_vocabulary() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ids.json");
        let read = |text: &str| {
            std::fs::write(&path, text).unwrap();
            Texts::of_ids(&path, 10).map(|texts| texts.documents)
        };
        assert_eq!(read("[1, 2]").unwrap(), [[1, 2]]);
        assert_eq!(read("[[1], [2, 9]]").unwrap(), [vec![1], vec![2, 9]]);
        for (text, why) in [("[1, 10]", "past"), ("[-1]", "token ids"), ("{}", "token ids"), ("[1", "ids.json")] {
            assert!(read(text).unwrap_err().to_string().contains(why), "{text}");
        }
    }
}
