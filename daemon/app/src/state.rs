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
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

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

fn lock(dir: &Path) -> anyhow::Result<File> {
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

/// Whether the disk is at fault, which may come back or have room again.
pub(crate) fn may_mend_itself(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| {
        let of_store = matches!(cause.downcast_ref(), Some(StoreError::DiskFull | StoreError::Io(_)));
        of_store || cause.is::<std::io::Error>() || cause.is::<rustix::io::Errno>()
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
