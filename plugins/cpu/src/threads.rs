//! How do kernels run on several cores? A fixed team that spins for a moment, then sleeps.
//!
//! Every job is run by every thread with its own number; what a thread does is a function of that number alone, so
//! results never depend on timing. The caller is thread 0. [`Team::apart`] is for jobs that sleep between others.

use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
use std::marker::PhantomData;
use std::num::NonZero;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{JoinHandle, Thread};

/// How often a waiting thread looks before it sleeps: some 20 microseconds, more than the gap between two operators.
const SPINS: u32 = 4000;

type Job = *const (dyn Fn(usize) + Sync);

#[derive(Debug)]
struct Shared {
    /// Raised by one for every job; `u64::MAX` ends the team.
    epoch: AtomicU64,
    /// Threads that have not finished the current job.
    left: AtomicUsize,
    panicked: AtomicBool,
    /// Guards the pointer to the current job, which is valid while `left` is above zero.
    job: Mutex<Option<SendJob>>,
    /// The thread that waits in `run`.
    caller: Mutex<Option<Thread>>,
}

#[derive(Clone, Copy, Debug)]
struct SendJob(Job);
// SAFETY: the closure is Sync, and `run` does not return before every thread has let go of it.
unsafe impl Send for SendJob {}

/// A team of threads.
#[derive(Debug)]
pub(crate) struct Team {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    /// Processors that workers are bound to.
    taken: CpuSet,
    /// One job at a time.
    turn: Mutex<()>,
}

impl Team {
    /// A team of `n` threads, the caller's included; `cpus` are the processors to use, empty for any.
    pub(crate) fn new(n: usize, cpus: &[usize]) -> std::io::Result<Self> {
        let shared = Arc::new(Shared {
            epoch: AtomicU64::new(0),
            left: AtomicUsize::new(0),
            panicked: AtomicBool::new(false),
            job: Mutex::new(None),
            caller: Mutex::new(None),
        });
        let (mut workers, mut taken) = (Vec::new(), CpuSet::new());
        for number in 1..n.max(1) {
            let (shared, cpu) = (Arc::clone(&shared), cpus.get(number % cpus.len().max(1)).copied());
            cpu.into_iter().for_each(|cpu| taken.set(cpu));
            let builder = std::thread::Builder::new().name(format!("spd-cpu-{number}"));
            workers.push(builder.spawn(move || work(&shared, number, cpu))?);
        }
        Ok(Self { shared, workers, taken, turn: Mutex::new(()) })
    }

    /// Threads in the team.
    pub(crate) fn len(&self) -> usize {
        self.workers.len() + 1
    }

    /// Keeps the calling thread off the workers' processors as long as the answer lives, if it may run elsewhere.
    ///
    /// For a thread that sleeps between jobs, as one that reads does: it is woken where the disk's interrupt comes. If
    /// that is a worker's processor they run by turns from then on, and each looks in vain for the other one before it
    /// sleeps, at every job. Where nobody sleeps threads part by themselves.
    pub(crate) fn apart(&self) -> Apart {
        let nowhere = Apart { before: None, thread: PhantomData };
        let Ok(before) = sched_getaffinity(None) else { return nowhere };
        let mut free = before;
        (0..CpuSet::MAX_CPU).filter(|&cpu| self.taken.is_set(cpu)).for_each(|cpu| free.unset(cpu));
        if free == before || free.count() == 0 || sched_setaffinity(None, &free).is_err() {
            return nowhere;
        }
        Apart { before: Some(before), thread: PhantomData }
    }

    /// Runs `job(number)` on every thread and returns when all have finished. Panics if one of them did.
    pub(crate) fn run(&self, job: &(dyn Fn(usize) + Sync)) {
        if self.workers.is_empty() {
            return job(0);
        }
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        let shared = &*self.shared;
        // SAFETY: only the lifetime is forgotten; the wait below keeps `job` borrowed until no thread uses it.
        let forgotten: Job = unsafe { std::mem::transmute::<&(dyn Fn(usize) + Sync), Job>(job) };
        *lock(&shared.job) = Some(SendJob(forgotten));
        *lock(&shared.caller) = Some(std::thread::current());
        shared.left.store(self.workers.len(), Ordering::Relaxed);
        // Release: a worker that sees the new epoch sees the job and the count.
        shared.epoch.fetch_add(1, Ordering::Release);
        self.workers.iter().for_each(|worker| worker.thread().unpark());
        let own = catch_unwind(AssertUnwindSafe(|| job(0)));
        // Acquire: pairs with the workers' release, so their writes are seen after the wait.
        wait_until(|| shared.left.load(Ordering::Acquire) == 0);
        let theirs = shared.panicked.swap(false, Ordering::Relaxed);
        if let Err(panic) = own {
            std::panic::resume_unwind(panic);
        }
        assert!(!theirs, "a compute thread panicked");
    }
}

impl Drop for Team {
    fn drop(&mut self) {
        self.shared.epoch.store(u64::MAX, Ordering::Release);
        for worker in self.workers.drain(..) {
            worker.thread().unpark();
            drop(worker.join());
        }
    }
}

/// See [`Team::apart`].
#[derive(Debug)]
pub(crate) struct Apart {
    /// Where the thread might run before.
    before: Option<CpuSet>,
    /// It is this thread's: not to be dropped by another one.
    thread: PhantomData<*const ()>,
}

impl Drop for Apart {
    fn drop(&mut self) {
        // A refusal costs speed, not correctness.
        let _refused = self.before.map(|before| sched_setaffinity(None, &before));
    }
}

/// The part `number` of `n` of `total` units: contiguous, sizes differ by at most one.
pub(crate) fn part(total: usize, number: usize, n: usize) -> std::ops::Range<usize> {
    total * number / n..total * (number + 1) / n
}

/// The processors this process may run on.
pub(crate) fn allowed_cpus(mask: &[u64]) -> Vec<usize> {
    let own = sched_getaffinity(None).ok();
    let asked = |cpu: usize| mask.is_empty() || mask.get(cpu / 64).is_some_and(|word| word >> (cpu % 64) & 1 == 1);
    let here = |cpu: usize| own.as_ref().is_none_or(|set| set.is_set(cpu));
    let count = std::thread::available_parallelism().map_or(1, NonZero::get).max(CpuSet::MAX_CPU.min(1024));
    (0..count).filter(|&cpu| here(cpu) && asked(cpu)).collect()
}

fn work(shared: &Shared, number: usize, cpu: Option<usize>) {
    if let Some(cpu) = cpu {
        let mut set = CpuSet::new();
        set.set(cpu);
        // A refused affinity costs speed, not correctness.
        let _refused = sched_setaffinity(None, &set);
    }
    let mut seen = 0;
    loop {
        wait_until(|| shared.epoch.load(Ordering::Acquire) != seen);
        seen = shared.epoch.load(Ordering::Acquire);
        if seen == u64::MAX {
            return;
        }
        let job = lock(&shared.job).expect("set before the epoch was raised");
        // SAFETY: `run` keeps the closure alive until `left` is zero.
        let job = unsafe { &*job.0 };
        if catch_unwind(AssertUnwindSafe(|| job(number))).is_err() {
            shared.panicked.store(true, Ordering::Relaxed);
        }
        // Release: the caller sees this thread's writes.
        if shared.left.fetch_sub(1, Ordering::Release) == 1
            && let Some(caller) = lock(&shared.caller).as_ref()
        {
            caller.unpark();
        }
    }
}

fn wait_until(ready: impl Fn() -> bool) {
    for _ in 0..SPINS {
        if ready() {
            return;
        }
        std::hint::spin_loop();
    }
    while !ready() {
        std::thread::park();
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_thread_runs_every_job_once() {
        let team = Team::new(4, &[]).expect("threads");
        let counts: Vec<AtomicUsize> = (0..4).map(|_| AtomicUsize::new(0)).collect();
        for _ in 0..1000 {
            team.run(&|number| {
                counts[number].fetch_add(1, Ordering::Relaxed);
            });
        }
        assert!(counts.iter().all(|count| count.load(Ordering::Relaxed) == 1000));
    }

    /// The processors this thread may run on.
    fn here() -> Vec<usize> {
        let set = sched_getaffinity(None).expect("one may look at oneself");
        (0..CpuSet::MAX_CPU).filter(|&cpu| set.is_set(cpu)).collect()
    }

    #[test]
    fn a_caller_that_sleeps_stays_off_the_workers_processors_for_so_long() {
        let all = here();
        // With one processor a team has one thread.
        let team = Team::new(all.len().min(3), &all).expect("threads");
        let apart = team.apart();
        let rest: Vec<usize> = all.iter().copied().filter(|&cpu| !team.taken.is_set(cpu)).collect();
        assert_eq!((here(), rest.len()), (rest, all.len() - team.workers.len()));
        drop(apart);
        assert_eq!(here(), all);
    }

    #[test]
    fn a_caller_that_may_run_nowhere_else_stays() {
        let all = here();
        let last = all[all.len() - 1];
        let mut only = CpuSet::new();
        only.set(last);
        sched_setaffinity(None, &only).expect("a part of what was allowed");
        // The only worker is bound to the second of them.
        let team = Team::new(2, &[all[0], last]).expect("threads");
        let apart = team.apart();
        assert!(team.taken.is_set(last) && apart.before.is_none());
        assert_eq!(here(), [last]);
        team.run(&|_| {});
    }

    #[test]
    fn parts_cover_everything_once() {
        for total in [0, 1, 7, 64] {
            for n in 1..5 {
                let all: Vec<usize> = (0..n).flat_map(|number| part(total, number, n)).collect();
                assert_eq!(all, (0..total).collect::<Vec<_>>());
            }
        }
    }

    #[test]
    fn a_panic_in_a_thread_reaches_the_caller_and_the_team_goes_on() {
        let team = Team::new(2, &[]).expect("threads");
        let failed = catch_unwind(AssertUnwindSafe(|| team.run(&|number| assert!(number == 0, "planted"))));
        assert!(failed.is_err());
        team.run(&|_| {});
    }
}
