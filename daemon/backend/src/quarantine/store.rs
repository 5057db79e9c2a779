//! Where is the quarantine kept? `plugins/quarantine.json` under the state folder, shared by all processes.
//!
//! Every change reads the file, applies itself and writes it anew, under a lock on its folder: the daemon and
//! `sparsectl` may change it at once. It is replaced whole: a crash leaves the old one or the new one. A file that
//! cannot be understood is kept aside as `quarantine.json.bad`; the quarantine then begins empty.

use super::{
    ID_BYTES_MAX, Outcome, Quarantine, QuarantinePolicy, Quarantined, REASON_BYTES_MAX, RECORDS_MAX, Record,
    STRIKES_MAX, is_sha256,
};
use crate::{BackendError, Found};
use rustix::fd::OwnedFd;
use rustix::fs::{FlockOperation, Mode, OFlags};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs::{DirBuilder, File};
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

/// Largest file in bytes: as many records as there may be, each at its longest, have a quarter of it.
const FILE_BYTES_MAX: u64 = 256 << 10;
/// The format's number.
const VERSION: u32 = 1;
/// The quarantine on disk.
#[derive(Clone, Debug)]
pub struct QuarantineStore {
    dir: PathBuf,
    policy: QuarantinePolicy,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Document {
    version: u32,
    libraries: BTreeMap<String, Record>,
}

impl QuarantineStore {
    /// The quarantine of a daemon with this state folder. Nothing is read or made yet.
    pub fn new(state_dir: &Path, policy: QuarantinePolicy) -> Self {
        Self { dir: state_dir.join("plugins"), policy }
    }

    /// Where it is kept.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Notes a failure of the library `sha256` of `plugin`; see [`Quarantine::strike`].
    ///
    /// # Errors
    /// [`BackendError::Io`] when the file cannot be read or written.
    pub fn strike(&self, plugin: &str, sha256: &str, reason: &str, now_ms: u64) -> Result<Outcome, BackendError> {
        let made = DirBuilder::new().recursive(true).mode(0o700).create(&self.dir);
        made.map_err(|error| self.io(error))?;
        let strike = |quarantine: &mut Quarantine| quarantine.strike(&self.policy, plugin, sha256, reason, now_ms);
        let outcome = self.change(now_ms, strike)?;
        outcome.ok_or_else(|| self.io(ErrorKind::NotFound.into()))
    }

    /// The quarantine that the library is in.
    ///
    /// # Errors
    /// As [`QuarantineStore::strike`].
    pub fn check(&self, sha256: &str, now_ms: u64) -> Result<Option<Quarantined>, BackendError> {
        Ok(self.look(now_ms)?.check(sha256, now_ms))
    }

    /// Every library in quarantine.
    ///
    /// # Errors
    /// As [`QuarantineStore::strike`].
    pub fn quarantined(&self, now_ms: u64) -> Result<Vec<Quarantined>, BackendError> {
        Ok(self.look(now_ms)?.quarantined(now_ms))
    }

    /// Forgets the libraries that `name` means, and answers with them; see [`Quarantine::clear`].
    ///
    /// # Errors
    /// As [`QuarantineStore::strike`].
    pub fn clear(&self, name: &str, now_ms: u64) -> Result<Vec<String>, BackendError> {
        Ok(self.change(now_ms, |quarantine| quarantine.clear(name))?.unwrap_or_default())
    }

    /// Whether a plugin may be loaded.
    ///
    /// # Errors
    /// [`BackendError::Quarantined`] with the way out; no library for this machine; as [`QuarantineStore::strike`].
    pub fn admit(&self, found: &Found, now_ms: u64) -> Result<(), BackendError> {
        let quarantined = self.check(&found.variant()?.sha256, now_ms)?;
        quarantined.map_or(Ok(()), |library| Err(library.refusal(now_ms)))
    }

    /// The file.
    pub fn path(&self) -> PathBuf {
        self.dir.join("quarantine.json")
    }

    /// What is remembered at this time; nothing is written, so that a full disk refuses no plugin.
    fn look(&self, now_ms: u64) -> Result<Quarantine, BackendError> {
        let Some(_folder) = self.lock()? else { return Ok(Quarantine::default()) };
        let mut quarantine = self.read()?;
        quarantine.settle(&self.policy, now_ms);
        Ok(quarantine)
    }

    fn change<T>(&self, now_ms: u64, apply: impl FnOnce(&mut Quarantine) -> T) -> Result<Option<T>, BackendError> {
        let Some(folder) = self.lock()? else { return Ok(None) };
        let mut quarantine = self.read()?;
        quarantine.settle(&self.policy, now_ms);
        let answer = apply(&mut quarantine);
        let written = self.replace(&quarantine).and_then(|()| Ok(rustix::fs::fsync(&folder)?));
        written.map_err(|error| self.io(error))?;
        Ok(Some(answer))
    }

    /// Holds the folder until it is closed; `None` where there is none, since only a strike makes it.
    fn lock(&self) -> Result<Option<OwnedFd>, BackendError> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let folder = match rustix::fs::open(&self.dir, flags, Mode::empty()) {
            Err(Errno::NOENT) => return Ok(None),
            opened => opened.map_err(|errno| self.io(errno.into()))?,
        };
        rustix::fs::flock(&folder, FlockOperation::LockExclusive).map_err(|errno| self.io(errno.into()))?;
        Ok(Some(folder))
    }

    fn read(&self) -> Result<Quarantine, BackendError> {
        let mut bytes = Vec::new();
        match File::open(self.path()) {
            Ok(file) => file.take(FILE_BYTES_MAX + 1).read_to_end(&mut bytes).map_err(|error| self.io(error))?,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Quarantine::default()),
            Err(error) => return Err(self.io(error)),
        };
        match parse(&bytes) {
            Ok(quarantine) => Ok(quarantine),
            Err(reason) => {
                let aside = self.dir.join("quarantine.json.bad");
                std::fs::rename(self.path(), &aside).map_err(|error| self.io(error))?;
                log::warn!(file:% = self.path().display(), aside:% = aside.display(), reason = reason.as_str();
                    "the quarantine of plugins cannot be read and begins empty");
                Ok(Quarantine::default())
            }
        }
    }

    /// Writes a new file and puts it in the old one's place. Readable by all who get into the folder: root may have
    /// written what the daemon's user must read.
    fn replace(&self, quarantine: &Quarantine) -> io::Result<()> {
        let new = self.dir.join("quarantine.json.new");
        match std::fs::remove_file(&new) {
            Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
        let mut file = File::from(rustix::fs::open(&new, flags, Mode::from_raw_mode(0o600))?);
        // Said in so many words: the umask of whoever writes it does not count.
        rustix::fs::fchmod(&file, Mode::from_raw_mode(0o644))?;
        let document = Document { version: VERSION, libraries: quarantine.records.clone() };
        file.write_all(&serde_json::to_vec_pretty(&document)?)?;
        file.sync_all()?;
        std::fs::rename(&new, self.path())
    }

    fn io(&self, source: io::Error) -> BackendError {
        BackendError::Io { path: self.path(), source }
    }
}

/// The records of a file, or what is wrong with it.
fn parse(bytes: &[u8]) -> Result<Quarantine, String> {
    if bytes.len() as u64 > FILE_BYTES_MAX {
        return Err(format!("more than {FILE_BYTES_MAX} bytes"));
    }
    let document: Document = serde_json::from_slice(bytes).map_err(|error| error.to_string())?;
    if document.version != VERSION {
        return Err(format!("version {}, only {VERSION} is known", document.version));
    }
    if document.libraries.len() > RECORDS_MAX {
        return Err(format!("more than {RECORDS_MAX} libraries"));
    }
    let wrong = |(sha256, record): (&String, &Record)| {
        let short = record.plugin.len() <= ID_BYTES_MAX && record.reason.len() <= REASON_BYTES_MAX;
        let sound = is_sha256(sha256) && short && record.strikes_ms.len() <= STRIKES_MAX as usize;
        (!sound || record.since_ms > record.until_ms).then(|| format!("a wrong entry '{sha256}'"))
    };
    let found = document.libraries.iter().find_map(wrong);
    found.map_or(Ok(Quarantine { records: document.libraries }), Err)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::Fixture;
    use std::os::unix::fs::PermissionsExt;

    const POLICY: QuarantinePolicy = QuarantinePolicy { strikes: 3, window_ms: 100, first_ms: 1000, max_ms: 4000 };

    fn sha(n: usize) -> String {
        format!("{n:064x}")
    }

    fn store() -> (tempfile::TempDir, QuarantineStore) {
        let dir = tempfile::tempdir().unwrap();
        let store = QuarantineStore::new(dir.path(), POLICY);
        (dir, store)
    }

    fn strike_out(store: &QuarantineStore, sha256: &str) {
        for _ in 0..3 {
            store.strike("acme", sha256, "it hung", 0).unwrap();
        }
    }

    #[test]
    fn strikes_and_quarantines_outlive_the_process() {
        let (dir, store) = store();
        assert_eq!(store.check(&sha(1), 0).unwrap(), None);
        assert!(!store.path().exists(), "looking makes no file");
        store.strike("acme", &sha(1), "it hung", 0).unwrap();
        let again = QuarantineStore::new(dir.path(), POLICY);
        strike_out(&again, &sha(1));
        assert_eq!(store.check(&sha(1), 999).unwrap().unwrap().until_ms, 1000);
        assert_eq!(store.quarantined(999).unwrap().len(), 1);
        assert_eq!(store.check(&sha(1), 1000).unwrap(), None);
        assert_eq!(again.clear("acme", 500).unwrap(), [sha(1)]);
        assert_eq!(store.check(&sha(1), 500).unwrap(), None);
    }

    #[test]
    fn a_quarantined_plugin_is_refused_with_the_reason_and_the_way_out() {
        let (_dir, store) = store();
        let fixture = Fixture::build(&[]);
        let found = fixture.found();
        store.admit(&found, 0).unwrap();
        strike_out(&store, &found.variant().unwrap().sha256);
        let said = store.admit(&found, 1).unwrap_err().to_string();
        assert!(said.contains("plugin acme is quarantined for another 1 s (time 1): it hung"), "{said}");
        assert!(said.contains("`sparsectl plugins unquarantine acme`"), "{said}");
        store.admit(&found, 1000).unwrap();
        // A new build has another sha256.
        strike_out(&store, &found.variant().unwrap().sha256);
        fixture.compile(&["-DVERSION=\"1.2.4\""]);
        fixture.write_manifest("1.2.4", "");
        store.admit(&fixture.found(), 1).unwrap();
    }

    #[test]
    fn a_file_that_is_not_understood_is_kept_aside() {
        let record = "{\"plugin\":\"a\",\"strikes_ms\":[],\"reason\":\"\",\"times\":1,\"since_ms\":0,\"until_ms\":9}";
        let document = |sha256: &str, record: &str| {
            format!("{{\"version\":1,\"libraries\":{{\"{sha256}\":{record}}}}}").into_bytes()
        };
        let good = document(&sha(1), record);
        assert_eq!(parse(&good).unwrap().quarantined(0).len(), 1);
        let mut large = good;
        large.resize(FILE_BYTES_MAX as usize + 1, b' ');
        let long = format!("\"reason\":\"{}\"", "x".repeat(REASON_BYTES_MAX + 1));
        let many = format!("\"strikes_ms\":{:?}", [0; STRIKES_MAX as usize + 1]);
        let libraries = (0..=RECORDS_MAX).map(|n| format!("\"{}\":{record}", sha(n))).collect::<Vec<_>>().join(",");
        let bad = [
            b"{".to_vec(),
            Vec::new(),
            large,
            b"{\"version\":2,\"libraries\":{}}".to_vec(),
            b"{\"version\":1,\"libraries\":{},\"more\":0}".to_vec(),
            document("short", record),
            document(&sha(0xabc).to_uppercase(), record),
            document(&sha(1), &record.replace("\"since_ms\":0", "\"since_ms\":10")),
            document(&sha(1), &record.replace("\"times\":1", "\"times\":-1")),
            document(&sha(1), &record.replace("\"reason\":\"\"", &long)),
            document(&sha(1), &record.replace("\"strikes_ms\":[]", &many)),
            format!("{{\"version\":1,\"libraries\":{{{libraries}}}}}").into_bytes(),
        ];
        for bytes in bad {
            let (_dir, store) = store();
            std::fs::create_dir(&store.dir).unwrap();
            std::fs::write(store.path(), &bytes).unwrap();
            assert_eq!(store.quarantined(0).unwrap(), [], "{}", String::from_utf8_lossy(&bytes));
            assert!(!store.path().exists());
            assert_eq!(std::fs::read(store.dir.join("quarantine.json.bad")).unwrap(), bytes);
            strike_out(&store, &sha(1));
            assert!(store.check(&sha(1), 0).unwrap().is_some());
        }
    }

    #[test]
    fn the_largest_file_that_is_written_can_be_read() {
        let (_dir, store) = store();
        let store =
            QuarantineStore { policy: QuarantinePolicy { strikes: 16, window_ms: u64::MAX, ..POLICY }, ..store };
        let mut quarantine = Quarantine::default();
        for n in 0..RECORDS_MAX {
            let (plugin, reason) = ("p".repeat(ID_BYTES_MAX), "\"".repeat(REASON_BYTES_MAX));
            let (strikes_ms, times) = (vec![u64::MAX; 16], u32::MAX);
            let record = Record { plugin, strikes_ms, reason, times, since_ms: u64::MAX, until_ms: u64::MAX };
            quarantine.records.insert(sha(n), record);
        }
        std::fs::create_dir(&store.dir).unwrap();
        store.replace(&quarantine).unwrap();
        assert_eq!(store.read().unwrap(), quarantine);
    }

    #[test]
    fn a_crash_while_writing_leaves_the_old_file() {
        let (_dir, store) = store();
        strike_out(&store, &sha(1));
        std::fs::write(store.dir.join("quarantine.json.new"), "{\"versi").unwrap();
        assert!(store.check(&sha(1), 0).unwrap().is_some());
        store.strike("acme", &sha(2), "", 0).unwrap();
        assert!(store.check(&sha(1), 0).unwrap().is_some());
        assert!(!store.dir.join("quarantine.json.new").exists());
        assert_eq!(std::fs::metadata(store.path()).unwrap().permissions().mode() & 0o777, 0o644);
    }

    #[test]
    fn strikes_from_several_processes_are_all_counted() {
        let (dir, _) = store();
        let policy = QuarantinePolicy { strikes: 16, ..POLICY };
        std::thread::scope(|scope| {
            for _ in 0..4 {
                // As another process would: with a store and a descriptor of its own.
                scope.spawn(|| {
                    let store = QuarantineStore::new(dir.path(), policy);
                    (0..3).for_each(|_| drop(store.strike("acme", &sha(1), "", 0).unwrap()));
                });
            }
        });
        let next = QuarantineStore::new(dir.path(), policy).strike("acme", &sha(1), "", 0).unwrap();
        assert_eq!(next, Outcome::Struck { strikes: 13, limit: 16 });
    }

    #[test]
    fn a_store_that_cannot_be_read_is_an_error_with_its_path() {
        let (_dir, store) = store();
        std::fs::create_dir(&store.dir).unwrap();
        std::fs::create_dir(store.path()).unwrap();
        let said = store.check(&sha(1), 0).unwrap_err().to_string();
        assert!(said.contains("quarantine.json"), "{said}");
    }
}
