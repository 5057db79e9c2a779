//! What do users do with sessions, and is what they are told true?

use crate::client::End;
use crate::daemon::{CONTEXT, Live, OWNERS, World};
use crate::model::Found;
use crate::outline::Mistake;
use crate::run::{Checked, wrong};
use crate::start::answer_of;
use crate::talk::{Cut, Plain, Talk};
use sparsed_engine::api::{Failure, Generate, Turn};
use sparsed_engine::{ContextFull, Durability, Settings};
use sparsed_session::StoreError;
use std::sync::Arc;

const TALKS_MAX: usize = 5;

impl World {
    /// A session is made, or one that is idle gets a turn.
    pub(crate) fn talk(&mut self) -> Checked {
        if self.talks.is_empty() || self.talks.len() < TALKS_MAX && self.rng.u32(..6) == 0 {
            return self.make();
        }
        let at = self.rng.usize(..self.talks.len());
        self.settle(at)?;
        let (talk, live) = &self.talks[at];
        if live.is_some() || talk.doomed || talk.unseen.is_some() {
            return self.intrude(at);
        }
        match talk.said().cut() {
            Some(Cut::ByDaemon) => self.resume(at),
            Some(Cut::ByClient) if self.rng.bool() => self.resume(at),
            _ => self.begin(at),
        }
    }

    fn make(&mut self) -> Checked {
        let durability = [Durability::Token, Durability::Turn, Durability::None][self.rng.usize(..3)];
        let (owner, settings) =
            (OWNERS[self.rng.usize(..2)], Settings { durability, context_full: ContextFull::Error });
        match self.machine.create(owner, settings) {
            Ok(id) => self.talks.push((Talk::new(owner, id, durability, Plain::default()), None)),
            Err(_) => self.maybe.push((owner, Plain::default())),
        }
        Ok(())
    }

    fn begin(&mut self, at: usize) -> Checked {
        let talk = &self.talks[at].0;
        let (owner, id, mut said) = (talk.owner, talk.id, talk.said().clone());
        let all = said.tokens.len();
        let kept = match self.rng.u32(..4) {
            0 => self.rng.usize(..=all),
            _ => all,
        };
        let kept = if kept > CONTEXT as usize * 3 / 4 { 0 } else { kept };
        let new = self.tokens(1..80);
        let wishes = self.rng.u64(..);
        said.begin(kept, &new, &wishes.to_le_bytes());
        let (request, expected) = answer_of(owner, said.tokens.clone(), wishes, CONTEXT);
        let n_kept = u32::try_from(kept).expect("few");
        let turn = self.machine.begin(owner, id, n_kept, new, wishes.to_le_bytes().to_vec());
        // Not all of what an attempt has left behind need be on the disk.
        self.talks[at].0.answer(said, Arc::clone(&expected), 0);
        self.listen(at, turn, request, expected, false)
    }

    fn resume(&mut self, at: usize) -> Checked {
        let talk = &self.talks[at].0;
        let (owner, id, said) = (talk.owner, talk.id, talk.said().clone());
        match self.machine.resume(owner, id) {
            Ok((prompt, wishes, turn)) => {
                let n_tokens = said.tokens.len() - prompt.len();
                let wishes = u64::from_le_bytes(wishes.try_into().expect("as it was written"));
                let (request, expected) = answer_of(owner, prompt, wishes, CONTEXT);
                self.talks[at].0.answer(said, Arc::clone(&expected), n_tokens);
                self.listen(at, Ok(turn), request, expected, true)
            }
            Err(failure) => self.refused(at, &failure),
        }
    }

    fn listen(
        &mut self,
        at: usize,
        turn: Result<Turn, Failure>,
        request: Generate,
        expected: Arc<[u32]>,
        is_resumed: bool,
    ) -> Checked {
        match turn {
            Ok(turn) => {
                let client = self.client(expected);
                self.machine.generate(Generate { turn: Some(turn), ..request }, client.ear());
                self.talks[at].1 = Some(Live { client, is_resumed });
                Ok(())
            }
            Err(failure) => self.refused(at, &failure),
        }
    }

    /// A verb that failed for the disk's sake may have done something or nothing.
    fn refused(&mut self, at: usize, failure: &Failure) -> Checked {
        match failure {
            Failure::DiskFailed { .. } | Failure::SessionDamaged { .. } => self.observe(at, true),
            failure => wrong(format!("{} was refused: {failure}", self.talks[at].0.id)),
        }
    }

    /// Nobody gets a session that is another's, or that is being answered.
    fn intrude(&mut self, at: usize) -> Checked {
        let talk = &self.talks[at].0;
        let (owner, id) = (talk.owner, talk.id);
        let stranger = if owner == OWNERS[0] { OWNERS[1] } else { OWNERS[0] };
        if !matches!(self.machine.resume(stranger, id), Err(Failure::SessionNotFound { .. })) {
            return wrong(format!("a stranger has gone on with {id}"));
        }
        if self.talks[at].1.is_some() && !self.machine.is_free(id) {
            return match self.machine.truncate(owner, id, 0) {
                Err(Failure::SessionBusy { .. }) => Ok(()),
                other => wrong(format!("{id} was cut while it was answered: {other:?}")),
            };
        }
        Ok(())
    }

    /// Forks, cuts, pins, copies by way of a file, and deletions.
    pub(crate) fn verbs(&mut self) -> Checked {
        if self.talks.is_empty() {
            return Ok(());
        }
        let at = self.rng.usize(..self.talks.len());
        self.settle(at)?;
        let (talk, live) = &self.talks[at];
        if live.is_some() || talk.doomed || talk.unseen.is_some() {
            return Ok(());
        }
        let (owner, id, durability, mut said) = (talk.owner, talk.id, talk.durability, talk.said().clone());
        let n_turns = self.rng.usize(..=said.turns.len());
        let n = u32::try_from(n_turns).expect("few");
        match self.rng.u32(..8) {
            0 => match self.machine.delete(owner, id) {
                Ok(()) => {
                    self.gone.push(id);
                    drop(self.talks.swap_remove(at));
                }
                Err(Failure::DiskFailed { .. }) => self.talks[at].0.doomed = true,
                Err(failure) => return wrong(format!("{id} was not deleted: {failure}")),
            },
            1 | 2 => {
                said.truncate(n_turns);
                match self.machine.truncate(owner, id, n) {
                    Ok(()) => self.talks[at].0.commit(said),
                    Err(failure) => {
                        self.talks[at].0.may_become(said);
                        return self.refused(at, &failure);
                    }
                }
            }
            3 | 4 => return self.pin(at),
            _ if self.talks.len() >= TALKS_MAX => {}
            5 | 6 => return self.carry(at),
            _ => {
                said.truncate(n_turns);
                said.pinned = false;
                match self.machine.fork(owner, id, n) {
                    Ok(fork) => self.talks.push((Talk::new(owner, fork, durability, said), None)),
                    Err(_) => self.maybe.push((owner, said)),
                }
            }
        }
        Ok(())
    }

    /// A session's files are to be the last to go, or are not any more.
    fn pin(&mut self, at: usize) -> Checked {
        let (owner, id, mut said) = self.talks[at].0.name();
        said.pinned = self.rng.bool();
        match self.machine.pin(owner, id, said.pinned) {
            Ok(()) => self.talks[at].0.commit(said),
            Err(error) if is_disks(&error) => {
                self.talks[at].0.may_become(said);
                return self.observe(at, true);
            }
            Err(error) => return wrong(format!("{id} was not pinned: {error}")),
        }
        Ok(())
    }

    /// A session goes into a file, and from there to anybody, who has one of his own then. A file that is not as it was
    /// made is no session.
    fn carry(&mut self, at: usize) -> Checked {
        let (owner, id, mut said) = self.talks[at].0.name();
        let mut file = match self.machine.export(owner, id) {
            Ok(file) => file,
            Err(error) if is_disks(&error) => return Ok(()),
            Err(error) => return wrong(format!("{id} was not exported: {error}")),
        };
        let to = OWNERS[self.rng.usize(..2)];
        let is_damaged = self.rng.u32(..4) == 0;
        if is_damaged && self.rng.bool() {
            file.truncate(self.rng.usize(..file.len()));
        } else if is_damaged {
            let at = self.rng.usize(..file.len());
            file[at] ^= 1 << self.rng.u32(..8);
        }
        let before = std::mem::replace(&mut self.last_file, file.clone());
        if self.mistake == Mistake::OldFiles && !before.is_empty() {
            file = before;
        }
        match self.machine.import(to, file) {
            Ok(copy) if !is_damaged => {
                said.pinned = false;
                let durability = self.talks[at].0.durability;
                self.talks.push((Talk::new(to, copy, durability, said), None));
                self.outline.copies += 1;
                self.observe(self.talks.len() - 1, false)
            }
            Ok(copy) => wrong(format!("{copy} was made of a file that was not as it was exported")),
            Err(error) if is_disks(&error) && !is_damaged => {
                said.pinned = false;
                self.maybe.push((to, said));
                Ok(())
            }
            Err(_) if is_damaged => Ok(()),
            Err(error) => wrong(format!("{id} was not imported: {error}")),
        }
    }

    pub(crate) fn settle_all(&mut self) -> Checked {
        (0..self.talks.len()).try_for_each(|at| self.settle(at))
    }

    /// Looks at a session whose answer is over.
    fn settle(&mut self, at: usize) -> Checked {
        let (talk, live) = &self.talks[at];
        if let (None, Some(may_be_lost)) = (live, talk.unseen) {
            return self.observe(at, may_be_lost);
        }
        if live.is_none() || !self.machine.is_free(talk.id) {
            return Ok(());
        }
        self.hear()?;
        let live = self.talks[at].1.take().expect("it was there just now");
        self.count(&live.client);
        self.outline.resumed += u64::from(live.is_resumed && live.client.end() == Some(End::Finished));
        let may_be_lost = match live.client.end() {
            Some(End::Failed(Failure::DiskFailed { .. })) => true,
            // One that has said nothing is taken back.
            Some(End::Failed(_) | End::CutOff) | None => live.client.n_heard() == 0,
            // It may have heard all and left, and the journal its end not yet.
            Some(End::Finished) => false,
        };
        let is_gone = live.client.is_gone();
        if live.client.end().is_none() && !is_gone {
            // It is slow, and the session does not wait for it.
            self.go_on(live);
        }
        self.observe(at, may_be_lost || is_gone)
    }

    /// Reads what the store says of a session.
    fn observe(&mut self, at: usize, may_be_lost: bool) -> Checked {
        let (owner, id) = (self.talks[at].0.owner, self.talks[at].0.id);
        let found = match self.machine.history(owner, id) {
            Ok(history) => Plain::of(&history),
            Err(Failure::DiskFailed { .. }) => {
                self.talks[at].0.unseen = Some(may_be_lost);
                return Ok(());
            }
            // It was past its retention before anybody looked at it again.
            Err(Failure::SessionNotFound { .. }) if self.talks[at].0.doomed => return Ok(()),
            Err(failure) => return wrong(format!("{id} cannot be read: {failure}")),
        };
        let talk = &mut self.talks[at].0;
        if talk.settle(found.clone(), may_be_lost) {
            return Ok(());
        }
        wrong(format!("what it must not say (lost: {may_be_lost}): {}", talk.describe(&found)))
    }

    /// What clients have heard must be kept.
    pub(crate) fn hear(&mut self) -> Checked {
        for at in 0..self.talks.len() {
            let (talk, Some(live)) = &mut self.talks[at] else { continue };
            let client = live.client.clone();
            if client.n_heard() > 0 {
                talk.heard(client.n_heard(), client.end() == Some(End::Finished));
            }
            self.judge(&client)?;
        }
        Ok(())
    }

    /// All sessions are there, and say what they may.
    pub(crate) fn find(&mut self, how: Found) -> Checked {
        for owner in OWNERS {
            let mut found = match self.machine.histories(owner) {
                Ok(found) => found,
                Err(failure) => return wrong(format!("after a restart ({how:?}): {failure}")),
            };
            for at in (0..self.talks.len()).rev() {
                if self.talks[at].0.owner != owner {
                    continue;
                }
                let id = self.talks[at].0.id;
                let Some(index) = found.iter().position(|(found, _)| *found == id) else {
                    if !std::mem::take(&mut self.talks[at].0.doomed) {
                        return wrong(format!("{id} is gone ({how:?})"));
                    }
                    drop(self.talks.swap_remove(at));
                    continue;
                };
                let history = Plain::of(&found.swap_remove(index).1);
                self.talks[at].0.doomed = false;
                if !self.talks[at].0.is_found(history.clone(), how) {
                    return wrong(format!("{how:?}: {}", self.talks[at].0.describe(&history)));
                }
            }
            for (id, history) in found {
                let history = Plain::of(&history);
                if self.gone.contains(&id) {
                    return wrong(format!("{id} was deleted and is back ({how:?})"));
                }
                let maybe = self.maybe.iter().position(|(of, said)| *of == owner && *said == history);
                let Some(maybe) = maybe else { return wrong(format!("{id} was never made ({how:?})")) };
                self.maybe.swap_remove(maybe);
                self.talks.push((Talk::new(owner, id, Durability::None, history), None));
            }
        }
        if how == Found::AfterPowerCut {
            self.maybe.clear();
        }
        Ok(())
    }
}

/// Whether it is the disk that has failed, and not what was asked of it.
fn is_disks(error: &StoreError) -> bool {
    matches!(error, StoreError::DiskFull | StoreError::Io(_) | StoreError::Damaged { .. })
}
