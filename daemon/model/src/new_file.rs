//! How does a file appear whole or not at all? It is written beside its place, synced, and moved there.

use std::fs::{File, OpenOptions};
use std::io::{self, BufWriter};
use std::path::{Path, PathBuf};

/// A file on its way; deleted unless it arrives.
#[derive(Debug)]
pub(crate) struct NewFile {
    part: PathBuf,
    out: PathBuf,
    arrived: bool,
}

impl NewFile {
    /// Begins the file that will be `out`.
    pub(crate) fn create(out: &Path) -> io::Result<(Self, BufWriter<File>)> {
        let no_name = || io::Error::new(io::ErrorKind::InvalidInput, "the path has no file name");
        let mut name = out.file_name().ok_or_else(no_name)?.to_owned();
        name.push(format!(".{}.part", std::process::id()));
        let part = out.with_file_name(name);
        let file = OpenOptions::new().write(true).create_new(true).open(&part)?;
        Ok((Self { part, out: out.to_owned(), arrived: false }, BufWriter::with_capacity(1 << 20, file)))
    }

    /// Where it is until it arrives.
    pub(crate) fn path(&self) -> &Path {
        &self.part
    }

    /// Syncs it and moves it to its place, replacing what was there. Answers its size in bytes.
    pub(crate) fn arrive(mut self, sink: BufWriter<File>) -> io::Result<u64> {
        let file = sink.into_inner().map_err(io::IntoInnerError::into_error)?;
        file.sync_all()?;
        let bytes = file.metadata()?.len();
        std::fs::rename(&self.part, &self.out)?;
        self.arrived = true;
        // The move itself survives a loss of power only when the folder is synced too.
        File::open(folder(&self.out))?.sync_all()?;
        Ok(bytes)
    }
}

impl Drop for NewFile {
    fn drop(&mut self) {
        if !self.arrived {
            drop(std::fs::remove_file(&self.part));
        }
    }
}

/// The folder that `path` is in.
pub(crate) fn folder(path: &Path) -> &Path {
    path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or_else(|| Path::new("."))
}
