//! May the daemon trust a file to be secret? Reads keys that nobody else may read.

use anyhow::{Context, bail};
use rustix::fs::{Mode, OFlags};
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// Mode bits that a secret file must not have.
pub(crate) const FORBIDDEN_OF_FILE: u32 = 0o077;
/// Those of a credential: systemd lets the daemon's user in by an ACL, whose mask shows as the group's bits.
pub(crate) const FORBIDDEN_OF_CREDENTIAL: u32 = 0o007;

/// Where the service manager has put the credential `name`, if it has.
pub(crate) fn credential(name: &str) -> Option<PathBuf> {
    let path = PathBuf::from(std::env::var_os("CREDENTIALS_DIRECTORY")?).join(name);
    path.exists().then_some(path)
}

/// A secret that is missing: the configuration names no file, and the service manager hands over no credential.
#[derive(Debug, thiserror::Error)]
#[error("{said}")]
pub(crate) struct Missing {
    pub(crate) said: String,
    /// The credential that would do.
    pub(crate) credential: String,
}

/// The bytes of a file that is no link and has none of the mode bits `forbidden`.
///
/// # Errors
/// A file that cannot be read, that others may read, or with more than `bytes_max` bytes.
pub(crate) fn read(path: &Path, forbidden: u32, bytes_max: u64) -> anyhow::Result<Vec<u8>> {
    let fd = rustix::fs::open(path, OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())?;
    let file = File::from(fd);
    if file.metadata()?.mode() & forbidden != 0 {
        bail!("may be read by others; `chmod 600 {}`, or what it protects is not private", path.display());
    }
    let mut bytes = Vec::new();
    file.take(bytes_max + 1).read_to_end(&mut bytes).context("cannot be read")?;
    if bytes.len() as u64 > bytes_max {
        bail!("has more than {bytes_max} bytes");
    }
    Ok(bytes)
}
