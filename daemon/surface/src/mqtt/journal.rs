//! How do records survive a power cut? A file that only grows, sealed and checksummed, synced before anybody is told.
//!
//! The file begins with [`MAGIC`]; each record is its length, the CRC32C of what follows (both u32, little-endian), a
//! nonce, and the record under XChaCha20-Poly1305 with its place in the file as associated data: a record that is
//! moved, or comes from another file, does not open. What follows the first record whose checksum is wrong is a torn
//! tail and is cut off; one whose checksum is right and that does not open is an error, since another key may have
//! written it. After a failed write or sync nothing is appended until the file is written anew as a whole: what the
//! page cache calls clean then need not be on the disk.

use chacha20poly1305::aead::{AeadInPlace, KeyInit};
use chacha20poly1305::{Key, Tag, XChaCha20Poly1305, XNonce};
use std::fs::{File, OpenOptions};
use std::io::{Error, ErrorKind, Read, Result, Seek, SeekFrom, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// What the file begins with; the last byte is its version.
const MAGIC: &[u8; 8] = b"SPDMQTT\x01";
/// Largest record in bytes, without its frame.
const RECORD_BYTES_MAX: usize = 64 << 20;
const NONCE_BYTES: usize = 24;
const TAG_BYTES: usize = 16;
/// Length and checksum.
const HEAD_BYTES: usize = 8;
const FILE_NAME: &str = "journal";
const NEW_NAME: &str = "journal.new";

/// The key of the file.
pub(super) struct Seal {
    cipher: XChaCha20Poly1305,
}

impl std::fmt::Debug for Seal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Seal")
    }
}

impl Seal {
    pub(super) fn new(key: &[u8; 32]) -> Self {
        Self { cipher: XChaCha20Poly1305::new(Key::from_slice(key)) }
    }

    /// Appends `record` with its frame to `out`, which will stand at `place`.
    fn write(&self, record: &[u8], place: u64, out: &mut Vec<u8>) -> Result<()> {
        let sealed_bytes = NONCE_BYTES + record.len() + TAG_BYTES;
        let length = u32::try_from(sealed_bytes).ok().filter(|_| record.len() <= RECORD_BYTES_MAX);
        let length = length.ok_or_else(|| Error::other("the record is too large"))?;
        let place = place + out.len() as u64;
        let mut nonce = [0; NONCE_BYTES];
        getrandom::fill(&mut nonce).map_err(Error::other)?;
        let mut sealed = Vec::with_capacity(sealed_bytes);
        sealed.extend_from_slice(&nonce);
        sealed.extend_from_slice(record);
        let nonce = XNonce::from_slice(&nonce);
        let tag = self.cipher.encrypt_in_place_detached(nonce, &place.to_le_bytes(), &mut sealed[NONCE_BYTES..]);
        sealed.extend_from_slice(&tag.map_err(|_| Error::other("the record is too large to be sealed"))?);
        out.extend_from_slice(&length.to_le_bytes());
        out.extend_from_slice(&crc32c::crc32c(&sealed).to_le_bytes());
        out.extend_from_slice(&sealed);
        Ok(())
    }

    /// What [`sealed`] has found at `place`; `None` when it was not written there with this key.
    fn open(&self, sealed: &[u8], place: u64) -> Option<Vec<u8>> {
        let (nonce, sealed) = sealed.split_at_checked(NONCE_BYTES)?;
        let (text, tag) = sealed.split_at_checked(sealed.len().checked_sub(TAG_BYTES)?)?;
        let (mut text, nonce, tag) = (text.to_vec(), XNonce::from_slice(nonce), Tag::from_slice(tag));
        self.cipher.decrypt_in_place_detached(nonce, &place.to_le_bytes(), &mut text, tag).ok()?;
        Some(text)
    }
}

/// The sealed record that `bytes` begin with; `None` where none is whole.
fn sealed(bytes: &[u8]) -> Option<&[u8]> {
    let (head, rest) = bytes.split_at_checked(HEAD_BYTES)?;
    let sealed = rest.get(..u32::from_le_bytes(head[..4].try_into().ok()?) as usize)?;
    // A length of zeros with a checksum of zeros is what a file system may leave after a power cut.
    (!sealed.is_empty() && crc32c::crc32c(sealed).to_le_bytes() == head[4..]).then_some(sealed)
}

/// The file.
#[derive(Debug)]
pub(super) struct Journal {
    dir: PathBuf,
    file: File,
    seal: Seal,
    /// Bytes of the file that are good.
    length: u64,
    /// What is in the file may not be on the disk.
    is_doubtful: bool,
}

impl Journal {
    /// Opens the file below `dir`, or makes it; answers its records.
    ///
    /// # Errors
    /// The disk's, and a file of another version or key.
    pub(super) fn open(dir: &Path, seal: Seal) -> Result<(Self, Vec<Vec<u8>>)> {
        let mut file = options().read(true).open(dir.join(FILE_NAME))?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)?;
        let mut journal = Self { dir: dir.to_owned(), file, seal, length: 0, is_doubtful: false };
        if bytes.len() < MAGIC.len() {
            // A new file, or one that a power cut left before its first record.
            journal.rewrite([])?;
            return Ok((journal, Vec::new()));
        }
        if !bytes.starts_with(MAGIC) {
            return Err(Error::other(format!("{} is of another version, or damaged", dir.join(FILE_NAME).display())));
        }
        let (mut records, mut at) = (Vec::new(), MAGIC.len());
        while let Some(sealed) = sealed(&bytes[at..]) {
            let foreign = || {
                Error::other("the MQTT journal was written with another key; restore the key, or move the journal away")
            };
            records.push(journal.seal.open(sealed, at as u64).ok_or_else(foreign)?);
            at += HEAD_BYTES + sealed.len();
        }
        journal.length = at as u64;
        if at < bytes.len() {
            log::warn!(bytes = bytes.len() - at; "the end of the MQTT journal was torn and is cut off");
            journal.cut()?;
        }
        Ok((journal, records))
    }

    /// Appends `records` and syncs them; none is there after an error.
    ///
    /// # Errors
    /// The disk's. The file is to be written anew then.
    pub(super) fn append(&mut self, records: &[Vec<u8>]) -> Result<()> {
        if self.is_doubtful {
            return Err(Error::other("the journal is to be written anew after a failure"));
        }
        let mut bytes = Vec::new();
        for record in records {
            self.seal.write(record, self.length, &mut bytes)?;
        }
        let written = self.file.write_all_at(&bytes, self.length).and_then(|()| self.file.sync_data());
        if let Err(error) = written {
            self.is_doubtful = true;
            // The old end is in the file; whether this one comes off is seen at the next opening.
            let _kept = self.cut().is_err();
            return Err(error);
        }
        self.length += bytes.len() as u64;
        Ok(())
    }

    /// Writes the file anew with `records` only; the old one stays until the new one is on the disk.
    ///
    /// # Errors
    /// The disk's; the old file is in its place then.
    pub(super) fn rewrite(&mut self, records: impl IntoIterator<Item = Vec<u8>>) -> Result<()> {
        let path = self.dir.join(NEW_NAME);
        let mut file = options().read(true).truncate(true).open(&path)?;
        let written = self.write_all(&mut file, records).and_then(|length| file.sync_all().map(|()| length));
        let length = match written {
            Ok(length) => length,
            Err(error) => {
                // Its bytes are what the disk has no room for.
                let _remains = std::fs::remove_file(&path).is_err();
                return Err(error);
            }
        };
        std::fs::rename(&path, self.dir.join(FILE_NAME))?;
        File::open(&self.dir)?.sync_all()?;
        (self.file, self.length, self.is_doubtful) = (file, length, false);
        Ok(())
    }

    /// Bytes of the file.
    pub(super) fn length(&self) -> u64 {
        self.length
    }

    /// Whether it must be written anew before anything can be appended.
    pub(super) fn is_doubtful(&self) -> bool {
        self.is_doubtful
    }

    /// From now on nothing can be written, here or anew.
    #[cfg(test)]
    pub(super) fn break_disk(&mut self) {
        self.file = File::open(self.dir.join(FILE_NAME)).expect("the file is there");
        self.dir.push("gone");
    }

    /// From now on the file can be written anew.
    #[cfg(test)]
    pub(super) fn mend_disk(&mut self) {
        self.dir.pop();
    }

    fn write_all(&self, file: &mut File, records: impl IntoIterator<Item = Vec<u8>>) -> Result<u64> {
        file.write_all(MAGIC)?;
        let (mut length, mut bytes) = (MAGIC.len() as u64, Vec::new());
        for record in records {
            bytes.clear();
            self.seal.write(&record, length, &mut bytes)?;
            file.write_all(&bytes)?;
            length += bytes.len() as u64;
        }
        Ok(length)
    }

    fn cut(&mut self) -> Result<()> {
        self.file.set_len(self.length)?;
        self.file.seek(SeekFrom::Start(self.length))?;
        self.file.sync_all()
    }
}

/// Writes the file below `dir` anew for another key, if what it has is `from`'s; any other file is left as it is.
///
/// # Errors
/// The disk's: the file is as it was then, or has the other key already.
pub(super) fn seal_anew(dir: &Path, from: Seal, to: Seal) -> Result<()> {
    let bytes = match std::fs::read(dir.join(FILE_NAME)) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        bytes => bytes?,
    };
    let first = bytes.strip_prefix(MAGIC).and_then(sealed);
    if first.and_then(|first| from.open(first, MAGIC.len() as u64)).is_none() {
        return Ok(());
    }
    let (mut journal, records) = Journal::open(dir, from)?;
    journal.seal = to;
    journal.rewrite(records)
}

/// Only the daemon's user may read what was said.
fn options() -> OpenOptions {
    let mut options = OpenOptions::new();
    options.write(true).create(true).truncate(false).mode(0o600);
    options
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(dir: &Path) -> (Journal, Vec<Vec<u8>>) {
        Journal::open(dir, Seal::new(&[7; 32])).unwrap()
    }

    fn record(i: u8) -> Vec<u8> {
        vec![i; 5 * usize::from(i)]
    }

    #[test]
    fn a_file_that_is_cut_at_any_length_has_the_whole_records_before_the_cut() {
        let dir = tempfile::tempdir().unwrap();
        let (mut log, none) = open(dir.path());
        assert!(none.is_empty());
        let mut ends = vec![log.length()];
        for i in 1..=4 {
            log.append(&[record(i)]).unwrap();
            ends.push(log.length());
        }
        let path = dir.path().join(FILE_NAME);
        let whole = std::fs::read(&path).unwrap();
        for length in 0..=whole.len() {
            std::fs::write(&path, &whole[..length]).unwrap();
            let (mut log, records) = open(dir.path());
            let n = ends.iter().filter(|end| **end <= length as u64).count().saturating_sub(1);
            assert_eq!(
                records,
                (1..=n).map(|i| record(u8::try_from(i).unwrap())).collect::<Vec<_>>(),
                "cut at {length}"
            );
            // What comes after a torn tail is found again.
            log.append(&[record(9)]).unwrap();
            assert_eq!(open(dir.path()).1.len(), n + 1);
        }
    }

    #[test]
    fn a_flipped_bit_ends_the_file_there() {
        let dir = tempfile::tempdir().unwrap();
        let (mut log, _) = open(dir.path());
        let before = log.length();
        log.append(&[record(1), record(2)]).unwrap();
        let path = dir.path().join(FILE_NAME);
        let whole = std::fs::read(&path).unwrap();
        let second = usize::try_from(before).unwrap() + HEAD_BYTES + NONCE_BYTES + TAG_BYTES + record(1).len();
        for at in second..whole.len() {
            let mut bytes = whole.clone();
            bytes[at] ^= 1;
            std::fs::write(&path, &bytes).unwrap();
            assert_eq!(open(dir.path()).1, [record(1)], "flipped at {at}");
        }
    }

    #[test]
    fn records_of_another_key_or_place_do_not_open_and_nothing_lies_there_in_the_clear() {
        let dir = tempfile::tempdir().unwrap();
        let (mut log, _) = open(dir.path());
        log.append(&[b"what somebody said".to_vec(), b"what somebody said".to_vec()]).unwrap();
        let bytes = std::fs::read(dir.path().join(FILE_NAME)).unwrap();
        assert!(!bytes.windows(8).any(|window| window == b"somebody"));
        let length = (bytes.len() - MAGIC.len()) / 2;
        let (first, second) = bytes[MAGIC.len()..].split_at(length);
        std::fs::write(dir.path().join(FILE_NAME), [MAGIC, second, first].concat()).unwrap();
        assert!(Journal::open(dir.path(), Seal::new(&[7; 32])).is_err());
        std::fs::write(dir.path().join(FILE_NAME), &bytes).unwrap();
        assert!(Journal::open(dir.path(), Seal::new(&[8; 32])).is_err());
        assert_eq!(open(dir.path()).1.len(), 2);
    }

    #[test]
    fn a_file_gets_another_key_only_from_the_one_it_has_and_loses_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let seal = |key| Seal::new(&[key; 32]);
        seal_anew(dir.path(), seal(7), seal(8)).unwrap();
        assert!(!dir.path().join(FILE_NAME).exists());
        open(dir.path()).0.append(&[record(1), record(2)]).unwrap();
        let before = std::fs::read(dir.path().join(FILE_NAME)).unwrap();
        seal_anew(dir.path(), seal(9), seal(8)).unwrap();
        assert_eq!(std::fs::read(dir.path().join(FILE_NAME)).unwrap(), before);
        seal_anew(dir.path(), seal(7), seal(8)).unwrap();
        assert!(Journal::open(dir.path(), seal(7)).is_err());
        // A second time there is nothing to do.
        seal_anew(dir.path(), seal(7), seal(8)).unwrap();
        assert_eq!(Journal::open(dir.path(), seal(8)).unwrap().1, [record(1), record(2)]);
    }

    #[test]
    fn writing_anew_leaves_what_is_wanted_and_only_its_user_may_read_it() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let (mut log, _) = open(dir.path());
        log.append(&[record(1), record(2)]).unwrap();
        log.rewrite([record(2)]).unwrap();
        log.append(&[record(3)]).unwrap();
        assert_eq!(open(dir.path()).1, [record(2), record(3)]);
        let mode = dir.path().join(FILE_NAME).metadata().unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }

    #[test]
    fn a_file_of_another_version_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join(FILE_NAME), b"SPDMQTT\x02and more").unwrap();
        assert!(Journal::open(dir.path(), Seal::new(&[7; 32])).is_err());
    }

    #[test]
    fn after_a_failed_write_the_file_is_written_anew_first() {
        let dir = tempfile::tempdir().unwrap();
        let (mut log, _) = open(dir.path());
        log.append(&[record(1)]).unwrap();
        log.file = File::open(dir.path().join(FILE_NAME)).unwrap(); // cannot be written to
        assert!(log.append(&[record(2)]).is_err() && log.is_doubtful());
        assert!(log.append(&[record(2)]).is_err());
        log.rewrite([record(1), record(2)]).unwrap();
        log.append(&[record(3)]).unwrap();
        assert_eq!(open(dir.path()).1, [record(1), record(2), record(3)]);
    }
}
