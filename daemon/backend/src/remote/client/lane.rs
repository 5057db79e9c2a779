//! How does a step reach the host and come back? Through shared memory, with a doorbell each way.
//!
//! A lane carries one job at a time.

use super::link::Link;
use crate::remote::arena::{Arena, Layout};
use crate::remote::bell::{Patience, Rhythm, was_rung};
use crate::remote::timespec;
use crate::remote::wire::{Failure, Object, Request};
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use sparsed_abi::{E_DEVICE_LOST, E_NOMEM_HOST, E_STEP, OK};
use sparsed_plugin_kit::{PluginError, Result};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// Pause between looks at the caller's cancel flag, where there is one.
const CANCEL_PAUSE: Duration = Duration::from_millis(1);

/// A lane that is open in the host.
#[derive(Debug)]
pub(super) struct Lane {
    link: Arc<Link>,
    id: u32,
    arena: Arena,
    to_host: OwnedFd,
    from_host: OwnedFd,
    /// The number of the last job.
    turn: u32,
    patience: Patience,
    rhythm: Rhythm,
}

/// A step or a list of KV operations.
#[derive(Debug)]
pub(super) struct Job<'a> {
    /// `KIND_*`
    pub(super) kind: u32,
    /// The plan or the pool.
    pub(super) object: u32,
    /// The step or the operations.
    pub(super) first: &'a [u8],
    pub(super) input: &'a [u8],
    pub(super) output: &'a mut [u8],
    /// Whether what is in `output` matters to the host.
    pub(super) output_goes_in: bool,
    /// Not 0 once the caller wants it to end.
    pub(super) cancel: Option<&'a AtomicU32>,
}

impl Job<'_> {
    pub(super) fn layout(&self) -> Result<Layout> {
        let layout = Layout::of([self.first.len(), self.input.len(), self.output.len()]);
        layout.ok_or_else(|| PluginError::invalid("the arenas of a step are longer than memory"))
    }
}

impl Lane {
    /// Opens one with room for `bytes`.
    pub(super) fn open(link: &Arc<Link>, device: u32, bytes: usize) -> Result<Self> {
        let none =
            |error: std::io::Error| PluginError::new(E_NOMEM_HOST, format!("memory shared with the host: {error}"));
        let bell = || eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).map_err(|errno| none(errno.into()));
        let (arena, file) = Arena::create(bytes).map_err(none)?;
        let (to_host, from_host, id) = (bell()?, bell()?, link.new_id());
        let request = Request::Lane { device, lane: id, arena_bytes: bytes as u64 };
        link.tell(&request, &[file.as_fd(), to_host.as_fd(), from_host.as_fd()])?;
        let (link, patience, rhythm) = (Arc::clone(link), Patience::default(), Rhythm::default());
        Ok(Self { link, id, arena, to_host, from_host, turn: 0, patience, rhythm })
    }

    pub(super) fn capacity(&self) -> usize {
        self.arena.capacity()
    }

    /// Has the host do a job, within its time.
    pub(super) fn run(&mut self, job: &mut Job<'_>) -> Result<()> {
        self.link.alive()?;
        let layout = job.layout()?;
        self.arena.write(&layout, 0, job.first);
        self.arena.write(&layout, 1, job.input);
        if job.output_goes_in {
            self.arena.write(&layout, 2, job.output);
        }
        let header = self.arena.header();
        // A flag that is set already keeps the plugin from taking the work, as it would in this process.
        let is_cancelled = job.cancel.is_some_and(|flag| flag.load(Ordering::Relaxed) != 0);
        header.cancel.store(is_cancelled.into(), Ordering::Relaxed);
        header.kind.store(job.kind, Ordering::Relaxed);
        header.object.store(job.object, Ordering::Relaxed);
        for (to, length) in header.lengths.iter().zip([job.first.len(), job.input.len(), job.output.len()]) {
            to.store(length as u64, Ordering::Relaxed);
        }
        self.turn = self.turn.wrapping_add(1);
        header.submitted.raise(self.turn, self.to_host.as_fd());
        let was_late = self.wait(job.cancel)?;
        let status = self.arena.header().status.load(Ordering::Relaxed);
        if status == OK {
            self.arena.read(&layout, 2, job.output);
            return Ok(());
        }
        if was_late {
            return Err(PluginError::new(E_STEP, self.late()));
        }
        if status > OK {
            return Err(self.link.nonsense());
        }
        // The host may change its status between two looks; the one that was checked counts.
        Err(Failure { status, ..self.arena.failure() }.into())
    }

    fn is_done(&self) -> bool {
        self.arena.header().completed.value() == self.turn
    }

    fn late(&self) -> String {
        format!("the step took longer than {} ms", self.link.options().step_timeout.as_millis())
    }

    /// Waits until the job is done, and says whether it was late. A job past its time is cancelled, which is told; one
    /// that does not end then costs the host its life.
    fn wait(&mut self, cancel: Option<&AtomicU32>) -> Result<bool> {
        let began = Instant::now();
        let napped = match self.rhythm.nap() {
            Some(nap) => self.sleep(began, Some(began + nap.min(self.link.options().step_timeout)), cancel)?,
            None => None,
        };
        let was_late = match napped {
            Some(was_late) => was_late,
            None if self.look() => false,
            None => self.sleep(began, None, cancel)?.unwrap_or(false),
        };
        self.rhythm.took(began.elapsed());
        Ok(was_late)
    }

    fn look(&mut self) -> bool {
        let (completed, turn) = (&self.arena.header().completed, self.turn);
        self.patience.look(|| completed.value() == turn)
    }

    /// Sleeps until the host rings, and says whether that was late; `None` when it has not by `until`.
    fn sleep(&self, began: Instant, until: Option<Instant>, cancel: Option<&AtomicU32>) -> Result<Option<bool>> {
        let completed = &self.arena.header().completed;
        completed.will_sleep();
        let outcome = if self.is_done() { Ok(Some(false)) } else { self.sleep_on(began, until, cancel) };
        completed.is_awake();
        outcome
    }

    fn sleep_on(&self, began: Instant, until: Option<Instant>, cancel: Option<&AtomicU32>) -> Result<Option<bool>> {
        let options = self.link.options();
        let (mut deadline, mut is_late) = (began + options.step_timeout, false);
        loop {
            let left = until.unwrap_or(deadline).min(deadline).saturating_duration_since(Instant::now());
            let pause = if cancel.is_some() { left.min(CANCEL_PAUSE) } else { left };
            let mut fds = [
                PollFd::new(&self.from_host, PollFlags::IN),
                PollFd::from_borrowed_fd(self.link.pidfd(), PollFlags::IN),
            ];
            // An interrupted wait is one that was short.
            let _woken = poll(&mut fds, Some(&timespec(pause))).is_err();
            let has_ended = !fds[1].revents().is_empty();
            let is_rung = was_rung(self.from_host.as_fd());
            if self.is_done() {
                // A host without its doorbell would make every job as late as it may be.
                let is_mute = !is_rung && !has_ended && cancel.is_none() && Instant::now() >= deadline;
                return if is_mute { Err(self.link.lose("has closed its doorbell")) } else { Ok(Some(is_late)) };
            }
            if has_ended {
                return Err(self.link.lose("ended during a step"));
            }
            if cancel.is_some_and(|flag| flag.load(Ordering::Relaxed) != 0) {
                self.arena.header().cancel.store(1, Ordering::Relaxed);
            }
            if until.is_some_and(|until| Instant::now() >= until) {
                return Ok(None);
            }
            if Instant::now() < deadline {
                continue;
            }
            if is_late {
                return Err(PluginError::new(E_DEVICE_LOST, self.link.lose(&self.hung()).message));
            }
            self.arena.header().cancel.store(1, Ordering::Relaxed);
            (deadline, is_late) = (Instant::now() + options.grace, true);
        }
    }

    fn hung(&self) -> String {
        format!("hangs: {} and did not heed its cancellation", self.late())
    }
}

impl Drop for Lane {
    fn drop(&mut self) {
        self.link.discard(Object::Lane(self.id));
    }
}
