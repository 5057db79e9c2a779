//! Where are sessions kept, and under which key? Opens the store below the state folder.
//!
//! The master key comes from systemd's credentials (`LoadCredentialEncrypted=sparsed.master-key:...`, then it is not on
//! this disk in the clear), or from a file that only the daemon's user may read, which is made at the first start, but
//! not where sessions are that have another one. Whoever loses it loses all sessions. Where both are there and differ,
//! the credential goes before, unless sessions were written with the file's: nobody would see them any more.

use crate::assemble::make_dir;
use crate::config::{ContextFull, Durability, Sessions};
use crate::private::{self, FORBIDDEN_OF_CREDENTIAL, FORBIDDEN_OF_FILE};
use crate::store::sync_dir;
use anyhow::{Context, anyhow, bail};
use rustix::fs::{Mode, OFlags};
use sparsed_session::{AnyDisk, Finding, FindingKind, Limits, MasterKey, OsDisk, Report, Settings, Store};
use std::fs::File;
use std::io::{ErrorKind, Write};
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use zeroize::Zeroizing;

/// The credential's name.
const CREDENTIAL: &str = "sparsed.master-key";
/// The key's file in the state folder.
const KEY_FILE: &str = "master.key";
/// The store's folder in the state folder.
const STORE_DIR: &str = "store";
/// Names of sessions that a line has at most.
const NAMES_MAX: usize = 5;
/// Bytes of the key.
const KEY_BYTES: usize = 32;
/// Of a file that is no key, only so much is read.
const FILE_BYTES_MAX: u64 = 4096;
/// Seconds of a day.
const DAY: u64 = 86_400;

/// Opens the store, if sessions are to be kept.
///
/// # Errors
/// A key that cannot be read or made, or that is not the sessions'; a store of another process, a disk that fails.
pub fn open(config: &Sessions, state_dir: &Path) -> anyhow::Result<Option<Store<AnyDisk>>> {
    if !config.enabled {
        return Ok(None);
    }
    open_under(&Keys::of(state_dir)?, config, state_dir).map(Some)
}

fn open_under(keys: &Keys, config: &Sessions, state_dir: &Path) -> anyhow::Result<Store<AnyDisk>> {
    let dir = state_dir.join(STORE_DIR);
    make_dir(&dir, 0o700)?;
    let disk: AnyDisk = Box::new(OsDisk::open(&dir).with_context(|| dir.display().to_string())?);
    let random = Box::new(|bytes: &mut [u8]| getrandom::fill(bytes).expect("the system gave random bytes before"));
    let (mut store, report) = Store::open(disk, random, MasterKey::new(*keys.used), limits(config))
        .with_context(|| format!("sessions in {}", dir.display()))?;
    if let Some(other) = &keys.other {
        let file = state_dir.join(KEY_FILE);
        let theirs = store.of_key(&report, &MasterKey::new(**other));
        if !theirs.is_empty() {
            bail!("{}", needs_file(&theirs, report.sessions, &file, &dir));
        }
        crate::mqtt::change_key(state_dir, other, &keys.used)?;
        log::warn!(file:% = file.display(); "the credential is another key than the file's, which nothing needs that is kept");
    }
    tell(&report, &dir);
    Ok(store)
}

/// The key of what is not sessions; made if there is none.
///
/// # Errors
/// A key that cannot be read or made.
pub(crate) fn master_key(state_dir: &Path) -> anyhow::Result<Zeroizing<[u8; KEY_BYTES]>> {
    let Keys { used, other } = Keys::of(state_dir)?;
    // Where there are sessions it is they who say whether the credential is the right one.
    if let Some(other) = other
        && !has_sessions(&state_dir.join(STORE_DIR))?
    {
        crate::mqtt::change_key(state_dir, &other, &used)?;
    }
    Ok(used)
}

/// The key of all that is kept.
struct Keys {
    used: Zeroizing<[u8; KEY_BYTES]>,
    /// The state folder's, where the service manager hands over another one, which is used.
    other: Option<Zeroizing<[u8; KEY_BYTES]>>,
}

impl Keys {
    /// Those that there are; one is made if there is none.
    fn of(state_dir: &Path) -> anyhow::Result<Self> {
        match private::credential(CREDENTIAL) {
            Some(path) => Self::of_credential(&path, state_dir),
            None => Ok(Self { used: Zeroizing::new(key_of(state_dir)?), other: None }),
        }
    }

    /// With the key that the service manager has put at `path`.
    fn of_credential(path: &Path, state_dir: &Path) -> anyhow::Result<Self> {
        let used = Zeroizing::new(read_key(path, FORBIDDEN_OF_CREDENTIAL)?);
        let file = state_dir.join(KEY_FILE);
        if let Err(error) = file.symlink_metadata()
            && error.kind() == ErrorKind::NotFound
        {
            return Ok(Self { used, other: None });
        }
        // Who else may read it is no matter here: nothing is written with it.
        let old = private::read(&file, 0, FILE_BYTES_MAX).map(Zeroizing::new);
        let old = old.with_context(|| file.display().to_string())?;
        // What is no key has written nothing.
        let other = <[u8; KEY_BYTES]>::try_from(&old[..]).ok().map(Zeroizing::new);
        Ok(Self { other: other.filter(|other| **other != *used), used })
    }
}

/// Why the daemon does not start with the credential: `theirs` have the file's key, and `n_own` have the credential's.
/// Whatever is done of what this says, no key is lost.
fn needs_file(theirs: &[&Finding], n_own: u32, file: &Path, store: &Path) -> String {
    let name = |finding: &&Finding| format!("{}/{}", finding.owner.unwrap_or_default(), finding.name);
    let mut names = theirs.iter().take(NAMES_MAX).map(name).collect::<Vec<_>>().join(", ");
    if theirs.len() > NAMES_MAX {
        names.push_str(", ...");
    }
    format!(
        "the credential {CREDENTIAL} is another key than {file}. Sessions of the file's key: {n} ({names}, in {store}); \
         of the credential's: {n_own}. Nobody would see the former, so nothing was begun or changed. To go on with the \
         former, take the credential's line out of the unit and restart. To go on with the latter, move {file} to a \
         safe place and restart: the others stay on the disk for the day it is put back. Keep both keys, and let no \
         command write over either (man sparsed, CREDENTIALS)",
        n = theirs.len(),
        file = file.display(),
        store = store.display()
    )
}

/// What the store keeps to.
pub(crate) fn limits(config: &Sessions) -> Limits {
    let durability = match config.durability {
        Durability::Token => sparsed_session::Durability::Token,
        Durability::Turn => sparsed_session::Durability::Turn,
        Durability::None => sparsed_session::Durability::None,
    };
    let context_full = match config.context_full {
        ContextFull::Error => sparsed_session::ContextFull::Error,
        ContextFull::TruncateOldest => sparsed_session::ContextFull::TruncateOldest,
    };
    Limits {
        sessions_per_owner: config.max_per_user,
        sessions: config.max,
        journals_bytes_per_owner: config.journals_per_user.0,
        journals_bytes: config.journals.0,
        kv_bytes_per_owner: config.kv_per_user.0,
        kv_bytes: config.kv.0,
        retention_seconds: config.retention_days * DAY,
        settings: Settings { durability, context_full },
        ..Limits::default()
    }
}

/// Says what was found; what was odd is said for each session.
fn tell(report: &Report, dir: &Path) {
    log::info!(
        sessions = report.sessions, interrupted = report.interrupted, dir:% = dir.display();
        "sessions found"
    );
    let n_foreign = report.findings.iter().filter(|finding| finding.kind == FindingKind::ForeignKey).count();
    if n_foreign > 0 {
        log::error!(
            sessions = n_foreign, dir:% = dir.display();
            "sessions have another master key and are not listed; start with the key that they were written with"
        );
    }
    for finding in &report.findings {
        let owner = finding.owner.map_or_else(|| "-".to_owned(), |owner| owner.to_string());
        match finding.kind {
            // A file was being made, or removed: nothing that was promised is lost.
            FindingKind::Swept => {
                log::info!(owner:%, session:% = finding.name, what:? = finding.kind; "session tidied");
            }
            // A death or a power cut leaves this; so would damage to the last record.
            FindingKind::Torn { .. } => log::info!(
                owner:%, session:% = finding.name, what:? = finding.kind;
                "the last record of a session was not whole and is cut off"
            ),
            // Said of all of them at once: nothing is wrong with any.
            FindingKind::ForeignKey => log::debug!(owner:%, session:% = finding.name; "session of another master key"),
            FindingKind::UnknownVersion { .. } | FindingKind::UnknownRecord => log::warn!(
                owner:%, session:% = finding.name, what:? = finding.kind;
                "session of another version of this program: it is kept as it is, for that one, and not listed"
            ),
            kind => log::warn!(owner:%, session:% = finding.name, what:? = kind; "session is not as it was written"),
        }
    }
}

/// The key in the state folder, which is made if there is none: once, though sessions and MQTT look for it at the same
/// time where the folder comes late. One of two keys would be lost, and all that was written with it.
///
/// # Errors
/// A key that cannot be read or made; none where sessions are, which another key would never open.
fn key_of(state_dir: &Path) -> anyhow::Result<[u8; KEY_BYTES]> {
    static MAKING: Mutex<()> = Mutex::new(());
    let _alone = MAKING.lock().unwrap_or_else(PoisonError::into_inner);
    let path = state_dir.join(KEY_FILE);
    match path.symlink_metadata() {
        Ok(_) => read_key(&path, FORBIDDEN_OF_FILE),
        Err(error) if error.kind() == ErrorKind::NotFound => {
            let store = state_dir.join(STORE_DIR);
            if has_sessions(&store)? {
                bail!(
                    "the key of the sessions in {} is missing: there is no {}, and no credential {CREDENTIAL}. Put it \
                     back from its backup; without it nobody can read them. To begin anew, move {} away",
                    store.display(),
                    path.display(),
                    store.display()
                );
            }
            make_key(&path)
        }
        Err(error) => Err(error).with_context(|| path.display().to_string()),
    }
}

/// Whether anybody has a session in the store's folder.
fn has_sessions(store: &Path) -> anyhow::Result<bool> {
    let names = |dir: &Path| match dir.read_dir() {
        Ok(entries) => entries.map(|entry| Ok(entry?.path())).collect::<std::io::Result<Vec<_>>>(),
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => Ok(Vec::new()),
        Err(error) => Err(error),
    };
    let about = |dir: &Path| dir.display().to_string();
    let dir = store.join("sessions");
    for owner in names(&dir).with_context(|| about(&dir))? {
        if !names(&owner).with_context(|| about(&owner))?.is_empty() {
            return Ok(true);
        }
    }
    Ok(false)
}

fn read_key(path: &Path, forbidden: u32) -> anyhow::Result<[u8; KEY_BYTES]> {
    let about = || format!("the sessions' key {}", path.display());
    let bytes = private::read(path, forbidden, FILE_BYTES_MAX).map_err(|error| anyhow!("{}: {error:#}", about()))?;
    <[u8; KEY_BYTES]>::try_from(bytes).map_err(|bytes| {
        let n = bytes.len();
        anyhow!(
            "{} has {n} bytes, {KEY_BYTES} are a key; put the right one there, or move it away to begin anew",
            about()
        )
    })
}

/// Makes a key, whole or not at all.
fn make_key(path: &Path) -> anyhow::Result<[u8; KEY_BYTES]> {
    let about = || format!("cannot make the sessions' key {}", path.display());
    let mut key = [0; KEY_BYTES];
    getrandom::fill(&mut key).map_err(|error| anyhow!("no random numbers: {error}"))?;
    let new = path.with_extension("new");
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::TRUNC | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let fd = rustix::fs::open(&new, flags, Mode::RUSR | Mode::WUSR).with_context(about)?;
    let mut file = File::from(fd);
    file.write_all(&key).and_then(|()| file.sync_all()).with_context(about)?;
    std::fs::rename(&new, path).with_context(about)?;
    sync_dir(path.parent().unwrap_or_else(|| Path::new("/"))).with_context(about)?;
    log::info!(key:% = path.display(); "made the key of all sessions; back it up with them");
    Ok(key)
}

#[cfg(test)]
mod tests {
    use super::*;
    use sparsed_session::NewSession;
    use std::os::unix::fs::{MetadataExt, PermissionsExt};

    fn new() -> NewSession<'static> {
        NewSession { model: "m", fingerprint: [0; 32], title: "", settings: None, pinned: false }
    }

    #[test]
    fn a_key_is_made_once_and_only_its_owner_may_read_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(KEY_FILE);
        let key = key_of(dir.path()).unwrap();
        assert_eq!((key_of(dir.path()).unwrap(), path.metadata().unwrap().mode() & 0o777), (key, 0o600));
        assert_ne!(key, [0; KEY_BYTES]);
    }

    #[test]
    fn all_who_look_for_a_key_at_once_have_the_one_that_stays() {
        for _ in 0..20 {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join(KEY_FILE);
            let ready = std::sync::Barrier::new(4);
            let look = || {
                ready.wait();
                key_of(dir.path()).unwrap()
            };
            let keys: Vec<_> = std::thread::scope(|scope| {
                let looking: Vec<_> = (0..4).map(|_| scope.spawn(look)).collect();
                looking.into_iter().map(|one| one.join().unwrap()).collect()
            });
            let stays = read_key(&path, FORBIDDEN_OF_FILE).unwrap();
            assert!(keys.iter().all(|key| *key == stays));
        }
    }

    #[test]
    fn no_key_is_made_beside_sessions_that_have_another_one() {
        let dir = tempfile::tempdir().unwrap();
        let state = || open(&Sessions::default(), dir.path());
        let mut store = state().unwrap().unwrap();
        let id = store.create(1000, &new(), 5).unwrap();
        drop(store);
        let key = dir.path().join(KEY_FILE);
        std::fs::rename(&key, dir.path().join("aside")).unwrap();
        let refused = state().unwrap_err();
        assert!(refused.to_string().contains(&key.display().to_string()), "{refused:#}");
        assert!(!crate::state::may_mend_itself(&refused) && !key.exists(), "{refused:#}");
        std::fs::rename(dir.path().join("aside"), &key).unwrap();
        let mut store = state().unwrap().unwrap();
        store.delete(1000, id).unwrap();
        drop(store);
        // The folder of a user who has no session any more is no reason.
        std::fs::remove_file(&key).unwrap();
        assert_eq!(state().unwrap().unwrap().usage().sessions, 0);
    }

    /// The keys with this one as the credential.
    fn with_credential(dir: &Path, key: [u8; KEY_BYTES]) -> Keys {
        let credential = dir.join(CREDENTIAL);
        std::fs::write(&credential, key).unwrap();
        std::fs::set_permissions(&credential, std::fs::Permissions::from_mode(0o440)).unwrap();
        Keys::of_credential(&credential, dir).unwrap()
    }

    fn opened(dir: &Path, keys: &Keys) -> anyhow::Result<Store<AnyDisk>> {
        open_under(keys, &Sessions::default(), dir)
    }

    #[test]
    fn a_credential_beside_another_key_is_taken_where_no_session_has_that_one() {
        let dir = tempfile::tempdir().unwrap();
        let first = with_credential(dir.path(), [7; KEY_BYTES]);
        assert!(first.other.is_none(), "there is no file");
        let file = key_of(dir.path()).unwrap();
        assert!(with_credential(dir.path(), file).other.is_none(), "it is the same one");
        // As on a box whose first start has made a key before the operator has given one.
        let keys = with_credential(dir.path(), [7; KEY_BYTES]);
        assert_eq!((*keys.used, **keys.other.as_ref().unwrap()), ([7; KEY_BYTES], file));
        let mut store = opened(dir.path(), &keys).unwrap();
        store.create(1000, &new(), 5).unwrap();
        drop(store);
        // And where the credential has the sessions and the file was made by nobody knows whom.
        assert_eq!(opened(dir.path(), &keys).unwrap().usage().sessions, 1);
        std::fs::write(dir.path().join(KEY_FILE), "no key").unwrap();
        assert!(with_credential(dir.path(), [7; KEY_BYTES]).other.is_none());
        // A third key's sessions are told of, and are no reason to keep the others down.
        std::fs::write(dir.path().join(KEY_FILE), file).unwrap();
        let usage = opened(dir.path(), &with_credential(dir.path(), [8; KEY_BYTES])).unwrap().usage();
        assert_eq!((usage.sessions, usage.of_other_key), (0, 1));
    }

    #[test]
    fn a_credential_is_refused_where_sessions_have_the_files_key_and_what_it_says_to_do_loses_none() {
        let dir = tempfile::tempdir().unwrap();
        let file = Keys { used: Zeroizing::new(key_of(dir.path()).unwrap()), other: None };
        let mut store = opened(dir.path(), &file).unwrap();
        let ids: Vec<String> = (0..7).map(|_| store.create(1000, &new(), 5).unwrap().to_string()).collect();
        drop(store);
        let refused = opened(dir.path(), &with_credential(dir.path(), [7; KEY_BYTES])).unwrap_err();
        let said = refused.to_string();
        assert!(said.contains("of the file's key: 7 (1000/") && said.contains("of the credential's: 0."), "{said}");
        assert_eq!(ids.iter().filter(|id| said.contains(&format!("1000/{id}"))).count(), NAMES_MAX, "{said}");
        assert!(!said.contains("systemd-creds") && !said.contains("  ") && !said.contains("remove"), "{said}");
        assert!(!crate::state::may_mend_itself(&refused), "{refused:#}");
        // The first thing that it says.
        assert_eq!(opened(dir.path(), &file).unwrap().usage().sessions, 7);
        // The second, and back again.
        std::fs::rename(dir.path().join(KEY_FILE), dir.path().join("safe")).unwrap();
        let keys = with_credential(dir.path(), [7; KEY_BYTES]);
        let mut store = opened(dir.path(), &keys).unwrap();
        assert_eq!((store.usage().sessions, store.usage().of_other_key), (0, 7));
        store.create(1000, &new(), 5).unwrap();
        drop(store);
        std::fs::rename(dir.path().join("safe"), dir.path().join(KEY_FILE)).unwrap();
        let said = opened(dir.path(), &with_credential(dir.path(), [7; KEY_BYTES])).unwrap_err().to_string();
        assert!(said.contains("of the file's key: 7 (") && said.contains("of the credential's: 1."), "{said}");
        assert_eq!(opened(dir.path(), &file).unwrap().usage().sessions, 7);
    }

    #[test]
    fn a_credential_may_have_the_bits_of_an_acls_mask_but_none_of_others() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(CREDENTIAL);
        std::fs::write(&path, [7; KEY_BYTES]).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o440)).unwrap();
        assert_eq!(read_key(&path, FORBIDDEN_OF_CREDENTIAL).unwrap(), [7; KEY_BYTES]);
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o444)).unwrap();
        assert!(read_key(&path, FORBIDDEN_OF_CREDENTIAL).is_err());
    }

    #[test]
    fn a_key_that_others_may_read_or_that_is_none_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(KEY_FILE);
        key_of(dir.path()).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o640)).unwrap();
        assert!(key_of(dir.path()).unwrap_err().to_string().contains("chmod 600"));
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
        std::fs::write(&path, "short").unwrap();
        assert!(key_of(dir.path()).unwrap_err().to_string().contains("5 bytes"));
        std::fs::remove_file(&path).unwrap();
        std::os::unix::fs::symlink("elsewhere", &path).unwrap();
        assert!(key_of(dir.path()).is_err());
    }
}
