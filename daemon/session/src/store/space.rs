//! Who makes room, and what goes for good?

use super::folder::best_effort;
use super::session::{Session, check};
use super::{Store, find};
use crate::disk::Disk;
use crate::error::{Result, StoreError};
use crate::history::State;
use crate::id::SessionId;
use crate::limits::{DATE_MIN_S, Limits};

impl<D: Disk> Store<D> {
    /// Destroys a session's key, then removes its files.
    ///
    /// # Errors
    /// [`StoreError::NotFound`], [`StoreError::Busy`] while it is answering, or the disk: then the session cannot be
    /// used any more, and deleting it again goes on.
    pub fn delete(&mut self, owner: u64, id: SessionId) -> Result<()> {
        // One that is doomed already is found, too.
        let session = self.sessions.get_mut(&id).filter(|session| session.owner == owner);
        let session = session.ok_or(StoreError::NotFound)?;
        if session.state() == State::Answering {
            return Err(StoreError::Busy("answering"));
        }
        session.doomed = true;
        session.folder.unname(&mut self.disk)?;
        session.folder.destroy_key(&mut self.disk)?;
        // Without a key the rest is noise, which the next start sweeps if this fails.
        best_effort(session.folder.sweep(&mut self.disk));
        self.sessions.remove(&id);
        self.dirty.remove(&id);
        Ok(())
    }

    /// All unpinned, idle sessions that were last used more than the limits' retention before `now`. One that was used
    /// in the future is not old, one that was used before the clock was set has been used now, until the store is
    /// opened again, and by a clock that is not set none is. Whether `now` may be believed beyond that is the caller's
    /// to know.
    pub fn expired(&mut self, now: u64) -> Vec<(u64, SessionId)> {
        if self.limits.retention_seconds == 0 || now < DATE_MIN_S {
            return Vec::new();
        }
        self.sessions.values_mut().for_each(|session| session.date(now));
        let old = self.sessions.values().filter(|session| session.is_old(now, self.limits.retention_seconds));
        old.map(|session| (session.owner, session.id)).collect()
    }

    /// Whether a session is one of [`Store::expired`] still.
    pub fn is_expired(&self, owner: u64, id: SessionId, now: u64) -> bool {
        let session = self.sessions.get(&id).filter(|session| session.owner == owner);
        session.is_some_and(|session| session.is_old(now, self.limits.retention_seconds))
    }

    /// Removes images to make room for what is said, the least recently used first and those of pinned sessions last,
    /// until `n_bytes` are free again or there are none. Answers the bytes that went.
    ///
    /// # Errors
    /// The disk, where none could be removed.
    pub fn reclaim(&mut self, n_bytes: u64) -> Result<u64> {
        self.evict_until(n_bytes, None, true)
    }

    /// Removes images of other sessions to make room on the disk for those of session `id`, the least recently used
    /// first and those of pinned sessions for another pinned one only; none where all of them have fewer bytes than
    /// `n_bytes`. Answers the bytes that went.
    ///
    /// # Errors
    /// The disk, where none could be removed.
    pub fn make_space(&mut self, id: SessionId, n_bytes: u64) -> Result<u64> {
        let pinned_too = self.is_pinned(id);
        if self.victims(Some(id), None, pinned_too).map(|victim| victim.kv.n_bytes).sum::<u64>() < n_bytes {
            return Ok(0);
        }
        self.evict_until(n_bytes, Some(id), pinned_too)
    }

    /// Removes images as [`Self::evict`] does until `n_bytes` are free again or there are none; answers the bytes that
    /// went.
    fn evict_until(&mut self, n_bytes: u64, keep: Option<SessionId>, pinned_too: bool) -> Result<u64> {
        let before = self.usage().kv_bytes;
        loop {
            let freed = before - self.usage().kv_bytes;
            if freed >= n_bytes {
                return Ok(freed);
            }
            match self.evict_any(keep, None, pinned_too) {
                Ok(true) => {}
                Err(error) if freed == 0 => return Err(error),
                Ok(false) | Err(_) => return Ok(freed),
            }
        }
    }

    /// As [`StoreError::LimitReached`] when the journals of `owner`, or of all, may not grow by `n_bytes`.
    pub(super) fn check_journals(&self, owner: u64, n_bytes: u64) -> Result<()> {
        let (mut own, mut all) = (n_bytes, n_bytes);
        for session in self.sessions.values() {
            all = all.saturating_add(session.journal_bytes());
            own = own.saturating_add(if session.owner == owner { session.journal_bytes() } else { 0 });
        }
        let Limits { journals_bytes_per_owner, journals_bytes, .. } = self.limits;
        check("bytes of one owner's journals", own, journals_bytes_per_owner)?;
        check("bytes of all journals", all, journals_bytes)
    }

    /// Makes room for `grows_by` more bytes of images of a session, within the limits.
    pub(super) fn make_room(&mut self, owner: u64, id: SessionId, grows_by: u64) -> Result<()> {
        let (own, all) = (self.limits.kv_bytes_per_owner, self.limits.kv_bytes);
        find(&mut self.sessions, owner, id)?;
        while self.kv_bytes(Some(owner)).saturating_add(grows_by) > own {
            if !self.evict(id, Some(owner))? {
                return Err(StoreError::LimitReached { what: "bytes of one owner's KV files", limit: own });
            }
        }
        while self.kv_bytes(None).saturating_add(grows_by) > all {
            if !self.evict(id, None)? {
                return Err(StoreError::LimitReached { what: "bytes of all KV files", limit: all });
            }
        }
        Ok(())
    }

    /// Removes the least recently used images that are not those of `keep`, which needs the room; answers whether there
    /// were any. Those of pinned sessions go last, and for another pinned one only.
    ///
    /// # Errors
    /// The disk, where none could be removed.
    pub(super) fn evict(&mut self, keep: SessionId, owner: Option<u64>) -> Result<bool> {
        self.evict_any(Some(keep), owner, self.is_pinned(keep))
    }

    fn evict_any(&mut self, keep: Option<SessionId>, owner: Option<u64>, pinned_too: bool) -> Result<bool> {
        let of = |victim: &Session| (victim.pinned(), victim.last_use, victim.id);
        let mut victims: Vec<_> = self.victims(keep, owner, pinned_too).map(of).collect();
        victims.sort_unstable();
        let mut failed = None;
        // One whose file cannot be removed keeps nobody else's from going.
        for (.., id) in victims {
            let Some(victim) = self.sessions.get_mut(&id) else { continue };
            match victim.drop_kv(&mut self.disk) {
                Ok(()) => return Ok(true),
                Err(error) => failed = Some(error),
            }
        }
        failed.map_or(Ok(false), |error| Err(error.into()))
    }

    /// Sessions whose images may go.
    fn victims(
        &self,
        keep: Option<SessionId>,
        owner: Option<u64>,
        pinned_too: bool,
    ) -> impl Iterator<Item = &Session> + '_ {
        self.sessions.values().filter(move |session| {
            let is_other = keep != Some(session.id) && owner.is_none_or(|owner| session.owner == owner);
            is_other && session.kv.n_bytes > 0 && (pinned_too || !session.pinned()) && !session.answering
        })
    }

    fn is_pinned(&self, id: SessionId) -> bool {
        self.sessions.get(&id).is_some_and(Session::pinned)
    }

    fn kv_bytes(&self, owner: Option<u64>) -> u64 {
        let sessions = self.sessions.values().filter(|session| owner.is_none_or(|owner| session.owner == owner));
        sessions.map(|session| session.kv.n_bytes).sum()
    }
}
