//! What is in the folder when a store is opened?
//!
//! Every journal is read once, for what a list of sessions shows; one history is in memory at a time. A session that
//! cannot be used is reported and left alone, and keeps no other from being used. A folder that cannot be listed ends
//! it: its sessions would seem to be gone.

use super::folder::{self, Folder, UNNAMED};
use super::report::{Finding, FindingKind, Report};
use super::session::{Session, check, cut_tail};
use super::{Random, Store};
use crate::cipher::{KEY_FILE_BYTES, KeyFault, MasterKey, SessionKey};
use crate::disk::{Disk, DiskError, Entry, Place};
use crate::error::{Result, StoreError};
use crate::history::State;
use crate::id::SessionId;
use crate::journal::{self, Replay, Tail, Unreadable};
use crate::limits::Limits;
use std::collections::{BTreeMap, BTreeSet};
use std::io::ErrorKind;

impl<D: Disk> Store<D> {
    /// Opens the store in `disk`, which is locked, with the sessions that are there.
    ///
    /// # Errors
    /// [`StoreError::Locked`] when another store has the folder, or a folder that cannot be listed. A session that
    /// cannot be read is no error: the report has it.
    pub fn open(
        mut disk: D,
        random: Box<dyn Random + Send>,
        master: MasterKey,
        limits: Limits,
    ) -> Result<(Self, Report)> {
        disk.lock(&Place::root().child("lock"))?;
        match disk.create_dir(&folder::sessions()) {
            Err(DiskError::Exists) => {}
            made => made?,
        }
        let mut scan =
            Scan { disk: &mut disk, master: &master, limits: &limits, found: Vec::new(), report: Report::default() };
        scan.owners()?;
        let Scan { mut found, mut report, .. } = scan;
        // The order of their last uses, as far as the clock was right.
        found.sort_by_key(|session| (session.used(), session.id));
        report.sessions = found.len().try_into().unwrap_or(u32::MAX);
        let is_interrupted = |session: &&Session| session.state() == State::Interrupted;
        report.interrupted = found.iter().filter(is_interrupted).count().try_into().unwrap_or(u32::MAX);
        let n_uses = found.len() as u64;
        let mut sessions = BTreeMap::new();
        for (at, mut session) in (1..).zip(found) {
            session.last_use = at;
            sessions.insert(session.id, session);
        }
        let store = Self {
            disk,
            random,
            master,
            limits,
            sessions,
            dirty: BTreeSet::new(),
            n_uses,
            n_of_other_key: report.count(|kind| kind == FindingKind::ForeignKey) as u64,
            journal_bytes_written: 0,
            kv_bytes_written: 0,
            dropped: Vec::new(),
            scratch: Vec::new(),
        };
        Ok((store, report))
    }

    /// Those of the sessions that the report says have another master key which have this one.
    pub fn of_key<'a>(&mut self, report: &'a Report, master: &MasterKey) -> Vec<&'a Finding> {
        let mut is_of_key = |finding: &&Finding| {
            let Some((owner, id)) = finding.owner.zip(finding.name.parse().ok()) else { return false };
            finding.kind == FindingKind::ForeignKey && key(&mut self.disk, master, owner, id).is_ok()
        };
        report.findings.iter().filter(|finding| is_of_key(finding)).collect()
    }
}

struct Scan<'a, D> {
    disk: &'a mut D,
    master: &'a MasterKey,
    limits: &'a Limits,
    found: Vec<Session>,
    report: Report,
}

/// Why a session's folder gives no session.
struct Unusable(FindingKind);

impl<D: Disk> Scan<'_, D> {
    fn owners(&mut self) -> Result<()> {
        for entry in self.disk.list(&folder::sessions())? {
            match parse_owner(&entry) {
                Some(owner) => self.owner(owner)?,
                None => self.note(None, entry.name, FindingKind::Strange),
            }
        }
        Ok(())
    }

    fn owner(&mut self, owner: u64) -> Result<()> {
        for entry in self.disk.list(&folder::of_owner(owner))? {
            let name = entry.name;
            let (stem, is_finished) = name.strip_suffix(UNNAMED).map_or((name.as_str(), true), |stem| (stem, false));
            let kind = match stem.parse::<SessionId>() {
                Ok(id) if entry.is_dir && is_finished => self.session(owner, id),
                Ok(id) if entry.is_dir => Some(swept(Folder::of(owner, id).sweep(self.disk))),
                _ => Some(FindingKind::Strange),
            };
            if let Some(kind) = kind {
                self.note(Some(owner), name, kind);
            }
        }
        Ok(())
    }

    /// Takes a session in, and says what is odd about it.
    fn session(&mut self, owner: u64, id: SessionId) -> Option<FindingKind> {
        let folder = Folder::of(owner, id);
        match self.read(owner, id, &folder) {
            Ok((session, kind)) => {
                self.found.push(session);
                kind
            }
            Err(Unusable(kind)) => Some(kind),
        }
    }

    fn read(
        &mut self,
        owner: u64,
        id: SessionId,
        folder: &Folder,
    ) -> std::result::Result<(Session, Option<FindingKind>), Unusable> {
        let key = key(self.disk, self.master, owner, id)?;
        let file = folder.journal();
        check("bytes of a file", self.disk.len(&file)?, self.limits.journal_file_bytes())?;
        let replayed = journal::replay(&mut |offset, bytes| self.disk.read_at(&file, offset, bytes), &key, owner, id);
        let Replay { history, position, tail, rest } = replayed.map_err(|unreadable| match unreadable {
            Unreadable::Damaged => Unusable(FindingKind::Unreadable),
            Unreadable::Version(version) => Unusable(FindingKind::UnknownVersion { version }),
            Unreadable::Record => Unusable(FindingKind::UnknownRecord),
            Unreadable::Disk(error) => error.into(),
        })?;
        folder.remove_unfinished(self.disk)?;
        let n_kept = cut_tail(self.disk, folder, &rest, &position, tail)?;
        // What was cut would be back after a power cut, in the place of what is said from now on.
        let is_cut_for_good = tail == Tail::Clean || self.disk.sync(&folder.journal()).is_ok();
        let n_bytes = rest.len() as u64;
        let kind = match tail {
            Tail::Clean => None,
            Tail::Torn => Some(FindingKind::Torn { n_bytes, n_kept }),
            Tail::Damaged => Some(FindingKind::Cut { n_bytes, n_kept }),
        };
        let mut session = Session::new(id, key, history, position);
        session.journal.is_cut = length(self.disk, &folder.cut())? > 0;
        session.kv.n_bytes = length(self.disk, &folder.kv())?;
        session.release();
        session.journal.is_broken = folder.is_unsure(self.disk)? || !is_cut_for_good;
        Ok((session, kind))
    }

    fn note(&mut self, owner: Option<u64>, name: String, kind: FindingKind) {
        self.report.findings.push(Finding { owner, name, kind });
    }
}

impl From<StoreError> for Unusable {
    fn from(error: StoreError) -> Self {
        Self(match error {
            StoreError::LimitReached { .. } => FindingKind::TooLarge,
            StoreError::Io(ErrorKind::NotFound) => FindingKind::Unreadable,
            StoreError::Io(kind) => FindingKind::Io(kind),
            StoreError::DiskFull => FindingKind::Io(ErrorKind::StorageFull),
            _ => FindingKind::Unreadable,
        })
    }
}

impl From<DiskError> for Unusable {
    fn from(error: DiskError) -> Self {
        StoreError::from(error).into()
    }
}

/// A session's key, unwrapped.
fn key(
    disk: &mut impl Disk,
    master: &MasterKey,
    owner: u64,
    id: SessionId,
) -> std::result::Result<SessionKey, Unusable> {
    // One byte more, to see that there is none.
    let mut file = [0; KEY_FILE_BYTES + 1];
    let n_bytes = disk.read_at(&Folder::of(owner, id).key(), 0, &mut file)?;
    SessionKey::unwrap(&file[..n_bytes], master, owner, id).map_err(|fault| match fault {
        KeyFault::Foreign => Unusable(FindingKind::ForeignKey),
        KeyFault::Version(version) => Unusable(FindingKind::UnknownVersion { version }),
        KeyFault::Damaged => Unusable(FindingKind::Unreadable),
    })
}

/// A folder named by a number as the store writes it.
fn parse_owner(entry: &Entry) -> Option<u64> {
    let owner = entry.name.parse::<u64>().ok()?;
    (entry.is_dir && owner.to_string() == entry.name).then_some(owner)
}

fn swept(done: std::result::Result<(), DiskError>) -> FindingKind {
    match done {
        Ok(()) => FindingKind::Swept,
        // Something else lies in it.
        Err(DiskError::Io(ErrorKind::DirectoryNotEmpty)) => FindingKind::Strange,
        Err(DiskError::Io(kind)) => FindingKind::Io(kind),
        Err(_) => FindingKind::Io(ErrorKind::Other),
    }
}

/// Bytes of a file, 0 when there is none.
fn length(disk: &mut impl Disk, file: &Place) -> std::result::Result<u64, DiskError> {
    match disk.len(file) {
        Err(DiskError::NotFound) => Ok(0),
        length => length,
    }
}
