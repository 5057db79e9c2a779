//! Is what a store says after a crash, and in between, what it may say?

use crate::disk::{FakeDisk, Faults};
use crate::model::{Chat, Found, Said};
use crate::run::{Checked, OWNERS, Run, Violation, open, wrong};
use fastrand::Rng;
use sparsed_session::{FindingKind, StoreError};

/// Starts that a failing disk, or the power, ends before they are over, and what is found then.
pub(crate) fn failed_starts(disk: &FakeDisk, rng: &mut Rng, mut how: Found) -> Found {
    while rng.u32(..3) == 0 {
        let off_after = rng.bool().then(|| rng.u64(..12));
        let fail_after = rng.bool().then(|| rng.u64(..30));
        disk.set_faults(Faults { off_after, fail_after, ..Faults::NONE });
        // Whatever it says: nobody has done anything with it.
        let _ended = open(disk, rng.u64(..)).is_err();
        if disk.is_off() || rng.u32(..4) == 0 {
            disk.power_cut();
            how = Found::AfterPowerCut;
        }
        disk.set_faults(Faults::NONE);
    }
    how
}

impl Run {
    /// The store dies, with or without the disk, and is opened again.
    pub(crate) fn crash(&mut self, how: Found) -> Checked {
        drop(self.store.take());
        self.outline.cuts += 1;
        match how {
            Found::AfterPowerCut => self.disk.power_cut(),
            Found::AfterKill => self.disk.set_faults(Faults::NONE),
        }
        let how = failed_starts(&self.disk, &mut self.rng, how);
        let opened = open(&self.disk, self.rng.u64(..));
        let (store, report) = opened.map_err(|error| Violation(format!("cannot be opened again: {error}")))?;
        self.store = Some(store);
        let is_loss = |kind| !matches!(kind, FindingKind::Swept | FindingKind::Torn { .. } | FindingKind::Cut { .. });
        if report.count(is_loss) > 0 {
            return wrong(format!("found after a crash: {:?}", report.findings));
        }
        for at in (0..self.chats.len()).rev() {
            let (owner, id, doomed) = (self.chats[at].owner, self.chats[at].id, self.chats[at].doomed);
            match self.store().summary(owner, id) {
                Err(StoreError::NotFound) if doomed => drop(self.chats.remove(at)),
                Err(error) => return wrong(format!("{id} after a crash: {error}")),
                Ok(_) => self.find(at, how)?,
            }
            // Whoever deletes again may, but nobody has to.
            if let Some(chat) = self.chats.get_mut(at).filter(|chat| chat.id == id) {
                chat.doomed = false;
            }
        }
        self.find_unknown(how)?;
        self.compare()
    }

    /// What the store has read from the disk must be one of the things it may have read.
    pub(crate) fn find(&mut self, at: usize, how: Found) -> Checked {
        let (owner, id) = (self.chats[at].owner, self.chats[at].id);
        let found = self.store().history(owner, id).map(Said::of);
        let Some(found) = self.done(found)? else { return wrong(format!("{id} cannot be read")) };
        self.outline.shortened += u64::from(found != *self.chats[at].said());
        if self.chats[at].is_found(&found, how) {
            return Ok(());
        }
        let (has, had) = (found.tokens.len(), self.chats[at].said().tokens.len());
        wrong(format!("{id} has {has} tokens of {had} in {} turns {how:?}, which it must not", found.turns.len()))
    }

    /// What nobody knows must be what somebody could not make.
    fn find_unknown(&mut self, how: Found) -> Checked {
        for owner in OWNERS {
            for summary in self.store().list(owner) {
                if self.chats.iter().any(|chat| chat.id == summary.id) {
                    continue;
                }
                if self.gone.contains(&summary.id) {
                    return wrong(format!("{} was deleted and is back", summary.id));
                }
                let found = self.store().history(owner, summary.id).map(Said::of);
                let Some(found) = self.done(found)? else { return wrong("an unknown session cannot be read") };
                let Some(at) = self.maybe.iter().position(|maybe| *maybe == (owner, found.clone())) else {
                    return wrong(format!("{} of {owner} was never made", summary.id));
                };
                self.maybe.remove(at);
                self.chats.push(Chat::new(owner, summary.id, found));
            }
        }
        if how == Found::AfterPowerCut {
            self.maybe.clear();
        }
        Ok(())
    }

    /// Store and model say the same, as far as nobody needs the disk to know.
    pub(crate) fn compare(&mut self) -> Checked {
        for owner in OWNERS {
            let listed = self.store().list(owner);
            let expected = self.chats.iter().filter(|chat| chat.owner == owner && !chat.doomed).count();
            if listed.len() != expected {
                return wrong(format!("{} sessions of {owner} instead of {expected}", listed.len()));
            }
            for summary in listed {
                let Some(chat) = self.chats.iter().find(|chat| chat.id == summary.id && chat.owner == owner) else {
                    return wrong(format!("{} is not {owner}'s", summary.id));
                };
                let said = chat.said();
                let (has, expected) = (
                    (
                        summary.n_tokens as usize,
                        summary.n_turns as usize,
                        summary.state,
                        summary.pinned,
                        &summary.title,
                    ),
                    (said.tokens.len(), said.turns.len(), chat.state(), said.pinned, &said.title),
                );
                if has != expected {
                    return wrong(format!("{} is {has:?} instead of {expected:?}", summary.id));
                }
            }
        }
        let Some(at) = self.any_chat() else { return Ok(()) };
        let (owner, id) = (self.chats[at].owner, self.chats[at].id);
        let store = self.store.as_mut().expect("it is open between steps");
        let is_same = store.history(owner, id).map(|history| self.chats[at].said().is(history));
        match self.done(is_same)? {
            Some(false) => wrong(format!("{id} says something else")),
            _ => Ok(()),
        }
    }
}
