//! How do large bytes come and go? In memfds: sealed, so that they stay what was checked and no read can wait.

use super::call::CallError;
use crate::refusal::{AtDoor, Refusal};
use rustix::fs::{MemfdFlags, SealFlags};
use std::fs::File;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;

/// What a memfd must be safe from.
const SEALS: SealFlags = SealFlags::WRITE.union(SealFlags::GROW).union(SealFlags::SHRINK);

/// The bytes of `fd`, which has at most `bytes_max`. Only memory can be sealed, so a file on a disk that hangs, or one
/// that another process serves, never gets as far as being read.
///
/// # Errors
/// Another kind of file, one without the seals, one that is too large.
pub(super) fn read(fd: OwnedFd, param: &str, bytes_max: usize) -> Result<Vec<u8>, CallError> {
    let wrong = |reason: String| CallError::from(Refusal::invalid(param, reason));
    let seals = rustix::fs::fcntl_get_seals(&fd).map_err(|_| wrong("is not a memfd".to_owned()))?;
    if !seals.contains(SEALS) {
        return Err(wrong("must be sealed against writing, growing and shrinking".to_owned()));
    }
    let file = File::from(fd);
    let length = file.metadata().map_err(|error| wrong(format!("cannot be read: {error}")))?.len();
    let length = usize::try_from(length).unwrap_or(usize::MAX);
    if length > bytes_max {
        let message = format!("the body has {length} bytes, the limit is {bytes_max} (limits.body)");
        return Err(Refusal::at_door(AtDoor::BodyTooLarge, None, message).into());
    }
    let mut bytes = vec![0; length];
    file.read_exact_at(&mut bytes, 0).map_err(|error| wrong(format!("cannot be read: {error}")))?;
    Ok(bytes)
}

/// Its length, before it is read.
///
/// # Errors
/// What cannot be asked.
pub(super) fn length(fd: &OwnedFd) -> Result<usize, CallError> {
    let stat = rustix::fs::fstat(fd).map_err(|error| CallError::system(&error.into()))?;
    Ok(usize::try_from(stat.st_size).unwrap_or(0))
}

/// A sealed memfd with `bytes`.
///
/// # Errors
/// No memory or no descriptors.
pub(super) fn write(name: &str, bytes: &[u8]) -> std::io::Result<OwnedFd> {
    let fd = rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    let mut file = File::from(fd);
    file.write_all(bytes)?;
    rustix::fs::fcntl_add_seals(&file, SEALS | SealFlags::SEAL)?;
    Ok(file.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_whatever_the_offset() {
        let fd = write("test", b"what was said").unwrap();
        assert_eq!(length(&fd).unwrap(), 13);
        assert_eq!(read(fd, "file", 13).unwrap(), b"what was said");
    }

    #[test]
    fn a_file_that_can_change_or_is_none_of_memory_is_not_read() {
        let open = rustix::fs::memfd_create("test", MemfdFlags::ALLOW_SEALING).unwrap();
        assert!(read(open, "body", 10).unwrap_err().to_string().contains("must be sealed"));
        let (pipe, _writer) = std::io::pipe().unwrap();
        assert!(read(pipe.into(), "body", 10).unwrap_err().to_string().contains("'body' is not a memfd"));
        let on_disk = File::open(concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml")).unwrap();
        assert!(read(on_disk.into(), "body", 1 << 20).is_err());
    }

    #[test]
    fn a_large_one_is_refused_by_its_length() {
        let fd = write("test", &[b'x'; 11]).unwrap();
        assert!(read(fd, "body", 10).unwrap_err().to_string().contains("11 bytes, the limit is 10"));
    }
}
