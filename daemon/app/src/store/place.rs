//! How does a file come into its place whole? Written beside it, synced, renamed, and the folder synced.

use anyhow::Context;
use std::fs::{File, Permissions};
use std::io::{ErrorKind, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

/// Of a file that is never written again.
const SEALED_MODE: u32 = 0o444;

/// Makes a folder with this mode, whatever the umask, and those above it; one that is there stays as it is.
///
/// # Errors
/// When it cannot be made.
pub(super) fn make_dir(dir: &Path, mode: u32) -> anyhow::Result<()> {
    let within = || format!("cannot make {}", dir.display());
    if let Some(parent) = dir.parent() {
        std::fs::create_dir_all(parent).with_context(within)?;
    }
    match std::fs::create_dir(dir) {
        Ok(()) => std::fs::set_permissions(dir, Permissions::from_mode(mode)).with_context(within),
        Err(error) if error.kind() == ErrorKind::AlreadyExists && dir.is_dir() => Ok(()),
        Err(error) => Err(error).with_context(within),
    }
}

/// Takes everybody's right to write a file away, and brings it to the disk.
///
/// # Errors
/// A disk that fails.
pub(super) fn seal(path: &Path) -> anyhow::Result<()> {
    let file = File::open(path).with_context(|| path.display().to_string())?;
    file.set_permissions(Permissions::from_mode(SEALED_MODE)).with_context(|| path.display().to_string())?;
    file.sync_all().with_context(|| path.display().to_string())
}

/// Writes a small file in the place of what is there.
///
/// # Errors
/// A disk that fails; what was there is there then.
pub(super) fn write(path: &Path, bytes: &[u8], mode: u32) -> anyhow::Result<()> {
    let dir = path.parent().context("a file has a folder")?;
    let mut file = tempfile::NamedTempFile::new_in(dir).with_context(|| dir.display().to_string())?;
    file.write_all(bytes)?;
    file.as_file().set_permissions(Permissions::from_mode(mode))?;
    file.as_file().sync_all()?;
    file.persist(path).with_context(|| path.display().to_string())?;
    sync_dir(dir)
}

/// Brings a folder's names to the disk.
///
/// # Errors
/// A disk that fails.
pub(crate) fn sync_dir(dir: &Path) -> anyhow::Result<()> {
    File::open(dir).and_then(|dir| dir.sync_all()).with_context(|| dir.display().to_string())
}
