//! How are the jobs of a lane done? By a thread of its own with a queue of its own.

use super::objects::{JobObjects, refuse};
use crate::remote::arena::{Arena, KIND_KV, KIND_RUN, Layout};
use crate::remote::bell::{Patience, ring, was_rung};
use crate::remote::timespec;
use crate::remote::wire::Failure;
use crate::{BackendError, Queue};
use rustix::event::{PollFd, PollFlags, poll};
use sparsed_abi::{Blob, E_INTERNAL, E_INVALID, OK, SpdKvOp, read_exact};
use std::io::Error;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

/// How long one sleep lasts; only a pause between looks.
const SLEEP: Duration = Duration::from_secs(3600);

/// A lane's thread; ends when it is dropped.
#[derive(Debug)]
pub(super) struct LaneThread {
    shared: Arc<Lane>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Lane {
    arena: Arena,
    bell: OwnedFd,
    answer: OwnedFd,
    stops: AtomicBool,
}

impl LaneThread {
    /// Starts the thread of a lane whose memory and doorbells the daemon has made.
    pub(super) fn start(
        arena: &OwnedFd,
        bytes: u64,
        bell: OwnedFd,
        answer: OwnedFd,
        queue: Queue,
        jobs: Arc<JobObjects>,
    ) -> Result<Self, Error> {
        let bytes = usize::try_from(bytes).map_err(|_| std::io::ErrorKind::InvalidData)?;
        let arena = Arena::open(arena, bytes)?;
        let shared = Arc::new(Lane { arena, bell, answer, stops: AtomicBool::new(false) });
        let theirs = Arc::clone(&shared);
        let thread = std::thread::Builder::new().name("lane".to_owned()).spawn(move || theirs.work(queue, &jobs))?;
        Ok(Self { shared, thread: Some(thread) })
    }
}

impl Drop for LaneThread {
    fn drop(&mut self) {
        self.shared.stops.store(true, Ordering::Release);
        ring(self.shared.bell.as_fd());
        if let Some(thread) = self.thread.take() {
            // A panic there has been reported by its thread.
            let _panicked = thread.join().is_err();
        }
    }
}

impl Lane {
    fn work(&self, mut queue: Queue, jobs: &JobObjects) {
        let (mut turn, mut patience) = (0u32, Patience::default());
        while let Some(next) = self.next(turn, &mut patience) {
            turn = next;
            let outcome = self.job(&mut queue, jobs);
            let header = self.arena.header();
            match &outcome {
                Ok(()) => header.status.store(OK, Ordering::Relaxed),
                Err(error) => self.arena.set_failure(&Failure::of(error, E_INTERNAL)),
            }
            header.completed.raise(turn, self.answer.as_fd());
        }
    }

    /// Waits for the job after number `turn`; `None` when the lane is dropped.
    fn next(&self, turn: u32, patience: &mut Patience) -> Option<u32> {
        let submitted = &self.arena.header().submitted;
        let has_work = || submitted.value() != turn || self.stops.load(Ordering::Acquire);
        if !patience.look(has_work) {
            submitted.will_sleep();
            while !has_work() {
                // An interrupted sleep is one that was short.
                let _woken = poll(&mut [PollFd::new(&self.bell, PollFlags::IN)], Some(&timespec(SLEEP))).is_err();
                let _rung = was_rung(self.bell.as_fd());
            }
            submitted.is_awake();
        }
        let next = submitted.value();
        (next != turn).then_some(next)
    }

    fn job(&self, queue: &mut Queue, jobs: &JobObjects) -> Result<(), BackendError> {
        let header = self.arena.header();
        let length = |n: usize| usize::try_from(header.lengths[n].load(Ordering::Relaxed)).ok();
        let lengths = length(0).zip(length(1)).zip(length(2)).map(|((a, b), c)| [a, b, c]);
        let layout = lengths.and_then(Layout::of).filter(|layout| layout.total <= self.arena.capacity());
        let layout = layout.ok_or_else(|| refuse(E_INVALID, "a job that does not fit its lane".to_owned()))?;
        // SAFETY: the daemon has submitted this job, which `work` completes after this call; one thread does them all.
        let (first, input, output) = unsafe { self.arena.job(&layout) };
        let object = header.object.load(Ordering::Relaxed);
        match header.kind.load(Ordering::Relaxed) {
            KIND_RUN => {
                // A copy: what the plugin has checked must not change any more.
                let (plan, step) = (jobs.plan(object)?, Blob::copied(first));
                queue.run_cancellable(&plan, &step, input, output, Some(&header.cancel))
            }
            KIND_KV => {
                let ops = first.chunks(size_of::<SpdKvOp>()).map(read_exact::<SpdKvOp>).collect::<Option<Vec<_>>>();
                let ops = ops.ok_or_else(|| refuse(E_INVALID, "a list of KV operations that is cut".to_owned()))?;
                queue.kv(&jobs.pool(object)?, &ops, output)
            }
            kind => Err(refuse(E_INVALID, format!("a job of the unknown kind {kind}"))),
        }
    }
}
