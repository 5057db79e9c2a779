//! Is there a state folder, and is it ours alone? A partition may come late, be full, or not come at all.
//!
//! Then the daemon begins without it, says so, and serves what needs none: no sessions, no MQTT, whose journal lies
//! there, and no slow tier. Sessions and MQTT are there as soon as the folder is. A folder that another daemon has, or
//! a key that is none, is a mistake of the installation, and the daemon does not begin.

use crate::assemble::make_dir;
use crate::config::{Config, Paths};
use anyhow::{Context, bail};
use rustix::fs::FlockOperation;
use sparsed_engine::{LateStore, SessionStore};
use sparsed_session::StoreError;
use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

/// What is to be mounted on this machine, below its root.
const MOUNTS: &str = "etc/fstab";

/// The lock of the folder, once it is there; dropped with its last clone. One daemon per state folder.
#[derive(Clone, Debug, Default)]
pub(crate) struct StateLock(Arc<Mutex<Option<File>>>);

/// The state folder as it was found at the start.
#[derive(Debug)]
pub(crate) struct State {
    pub(crate) lock: StateLock,
    /// What is kept of conversations, if that is to be.
    pub(crate) sessions: Option<SessionStore>,
    /// Whether it can be used.
    pub(crate) is_there: bool,
}

impl State {
    /// Locks the folder, which is made if need be, and opens what is in it.
    ///
    /// # Errors
    /// What waiting does not mend.
    pub(crate) fn open(config: &Config, paths: &Paths) -> anyhow::Result<Self> {
        let lock = StateLock::default();
        let opened =
            lock.take(&paths.state_dir).and_then(|()| crate::sessions::open(&config.sessions, &paths.state_dir));
        match opened {
            Ok(store) => {
                Ok(Self { lock, sessions: store.map(|store| SessionStore::Open(Box::new(store))), is_there: true })
            }
            Err(error) if may_mend_itself(&error) => {
                let (dir, reason) = (paths.state_dir.display(), format!("{error:#}"));
                log::error!(
                    dir:%, reason;
                    "the state folder cannot be used: no sessions, no MQTT and no slow tier until it can"
                );
                let sessions = config.sessions.enabled.then(|| late(config, paths, format!("{error:#}"), lock.clone()));
                Ok(Self { lock, sessions, is_there: false })
            }
            Err(error) => Err(error),
        }
    }
}

/// A store that is tried again; another reason than the last one is told.
fn late(config: &Config, paths: &Paths, mut told: String, lock: StateLock) -> SessionStore {
    let (sessions, dir) = (config.sessions.clone(), paths.state_dir.clone());
    let open = move || match lock.take(&dir).and_then(|()| crate::sessions::open(&sessions, &dir)) {
        Ok(store) => store,
        Err(error) => {
            let reason = format!("{error:#}");
            if reason != told {
                log::error!(reason; "the state folder cannot be used yet");
                told = reason;
            }
            None
        }
    };
    SessionStore::Late(LateStore(Box::new(open)))
}

impl StateLock {
    /// Takes it, if it is not taken yet.
    ///
    /// # Errors
    /// A folder that cannot be made or written, or that another daemon has.
    pub(crate) fn take(&self, dir: &Path) -> anyhow::Result<()> {
        let mut held = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if held.is_none() {
            *held = Some(lock(dir)?);
        }
        Ok(())
    }
}

/// That whatever is to be mounted at `dir` or above it is. What is written below a mount point is hidden as soon as
/// something is mounted there, and has taken the room of another disk.
///
/// # Errors
/// The mount that is away.
pub(crate) fn check_mounted(dir: &Path) -> io::Result<()> {
    let Some(point) = unmounted(Path::new("/"), dir) else { return Ok(()) };
    Err(io::Error::new(io::ErrorKind::NotFound, is_away(&point)))
}

/// The mount point at `dir` or above it where nothing is mounted although the machine with this root has a line for it.
pub(crate) fn unmounted(root: &Path, dir: &Path) -> Option<PathBuf> {
    bare_mount_point(&std::fs::read_to_string(root.join(MOUNTS)).unwrap_or_default(), dir)
}

/// What is wrong with a mount point that is [`unmounted`].
pub(crate) fn is_away(point: &Path) -> String {
    format!("{} is not mounted, which /{MOUNTS} has", point.display())
}

fn lock(dir: &Path) -> anyhow::Result<File> {
    check_mounted(dir)?;
    make_dir(dir, 0o700)?;
    let path = dir.join("lock");
    let file = File::create(&path).with_context(|| path.display().to_string())?;
    match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(file),
        Err(rustix::io::Errno::WOULDBLOCK) => {
            bail!("another sparsed uses the state folder {}; stop it, or set another state_dir", dir.display())
        }
        Err(error) => Err(error).with_context(|| path.display().to_string()),
    }
}

/// The mount point at `dir` or above it that a text of `fstab` has, and where nothing is mounted. A folder that is
/// mounted at a second place does not show by its device, so such lines do not count.
fn bare_mount_point(fstab: &str, dir: &Path) -> Option<PathBuf> {
    let dir = dir.canonicalize().unwrap_or_else(|_| dir.to_owned());
    let points = fstab.lines().filter_map(|line| {
        let mut fields = line.split_whitespace().skip(1);
        let (point, _, options) = (fields.next()?, fields.next()?, fields.next().unwrap_or_default());
        let is_second_place = options.split(',').any(|option| matches!(option, "bind" | "rbind"));
        let counts = !line.trim_start().starts_with('#') && !is_second_place;
        counts.then(|| PathBuf::from(point.replace("\\040", " ").replace("\\011", "\t").replace("\\134", "\\")))
    });
    let device = |path: &Path| path.metadata().ok().map(|found| found.dev());
    // What is mounted has another device than the folder above it; nothing is above the root.
    let is_bare = |point: &PathBuf| {
        point.parent().is_some_and(|above| device(point).is_none_or(|own| device(above) == Some(own)))
    };
    points.filter(|point| dir.starts_with(point)).find(is_bare)
}

/// Whether the disk is at fault, which may come back or have room again.
pub(crate) fn may_mend_itself(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| {
        let of_store = matches!(cause.downcast_ref(), Some(StoreError::DiskFull | StoreError::Io(_)));
        of_store || cause.is::<io::Error>() || cause.is::<rustix::io::Errno>()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_daemon_on_one_state_folder_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let (first, second) = (StateLock::default(), StateLock::default());
        first.take(dir.path()).unwrap();
        first.take(dir.path()).unwrap();
        let refused = second.take(dir.path()).unwrap_err();
        assert!(refused.to_string().contains("another sparsed") && !may_mend_itself(&refused), "{refused:#}");
        drop(first);
        second.take(dir.path()).unwrap();
    }

    #[test]
    fn a_mount_point_without_its_mount_is_waited_for_wherever_above_the_folder_it_is() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().canonicalize().unwrap();
        let state = root.join("a b/state");
        std::fs::create_dir_all(&state).unwrap();
        let bare = |line: &str| bare_mount_point(&line.replace("TOP", root.to_str().unwrap()), &state);
        assert_eq!(bare("/dev/sdb1 TOP/a\\040b ext4 nofail 0 2\n"), Some(root.join("a b")));
        assert_eq!(bare("LABEL=x / ext4\n LABEL=state\tTOP/a\\040b/state ext4\n"), Some(state.clone()));
        for other in [
            "",
            "# /dev/sdb1 TOP/a\\040b ext4\n",
            "/dev/sdb1 TOP/a ext4\n/dev/sdb2 none swap sw\n",
            "/srv/state TOP/a\\040b none bind 0 0\n",
            "/dev/sda1\n",
        ] {
            assert_eq!(bare(other), None, "{other}");
        }
        assert_eq!(bare_mount_point("proc /proc proc defaults 0 0", Path::new("/proc/sys")), None);
        // A folder that is not there yet, nor its mount point.
        let away = root.join("away/state");
        assert_eq!(bare_mount_point(&format!("x {}/away ext4", root.display()), &away), Some(root.join("away")));
    }

    #[test]
    fn a_folder_that_is_not_there_yet_is_waited_for_and_a_key_that_is_none_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let state = dir.path().join("state");
        std::os::unix::fs::symlink(dir.path().join("partition"), &state).unwrap();
        let (config, paths) = (Config::default(), Paths { state_dir: state.clone(), ..Paths::of(&Config::default()) });
        let opened = State::open(&config, &paths).unwrap();
        let Some(SessionStore::Late(LateStore(mut late))) = opened.sessions else { panic!("{opened:?}") };
        assert!(!opened.is_there && late().is_none());
        std::fs::create_dir(dir.path().join("partition")).unwrap();
        drop(late().unwrap());
        drop((late, opened.lock));
        std::fs::write(state.join("master.key"), "short").unwrap();
        assert!(State::open(&config, &paths).unwrap_err().to_string().contains("the sessions' key"));
    }
}
