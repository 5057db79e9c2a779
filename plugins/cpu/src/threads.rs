//! How do kernels run on several cores? A fixed team that spins for a moment, then sleeps.
//!
//! A job has as many parts as the team has threads, or units that are dealt to whoever is free. What a part or a unit
//! does is a function of its number alone, so results never depend on timing. The caller does part 0, then those that
//! nobody has begun: on a machine with other work a thread may not be running when there is a part for it, and waiting
//! for it costs more than the part.

use crate::turns::Turns;
use std::any::Any;
use std::num::NonZero;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{JoinHandle, Thread};

/// How often a waiting thread looks before it sleeps: some 20 microseconds, more than the gap between two operators.
const SPINS: u32 = 4000;

/// Low bits of [`Shared::state`], for the number of a part.
const PART_BITS: u32 = 16;
/// Most threads of a team.
pub(crate) const THREADS_MAX: usize = 256;
const _: () = assert!(THREADS_MAX < 1 << PART_BITS, "every part has a number");
/// The state that ends the team.
const END: u64 = u64::MAX;

type Job = *const (dyn Fn(usize) + Sync);

#[derive(Debug)]
struct Shared {
    /// The current job's number, and in the low [`PART_BITS`] its first part that nobody has begun.
    state: AtomicU64,
    /// Parts of a job.
    parts: usize,
    /// Threads that may do parts, the caller's included: the others sleep.
    awake: AtomicUsize,
    /// Parts of the current job that are not done.
    left: AtomicUsize,
    /// What a part of the current job panicked with.
    panicked: Mutex<Option<Box<dyn Any + Send>>>,
    /// Guards the pointer to the current job, which is valid while `left` is above zero.
    job: Mutex<Option<SendJob>>,
    /// The thread that waits in `run`.
    caller: Mutex<Option<Thread>>,
}

#[derive(Clone, Copy, Debug)]
struct SendJob(Job);
// SAFETY: the closure is Sync, and `run` does not return before every part of it is done.
unsafe impl Send for SendJob {}

impl Shared {
    fn new(parts: usize) -> Self {
        Self {
            state: AtomicU64::new(0),
            parts,
            awake: AtomicUsize::new(parts),
            left: AtomicUsize::new(0),
            panicked: Mutex::new(None),
            job: Mutex::new(None),
            caller: Mutex::new(None),
        }
    }

    /// The next part of job `number` that nobody has begun; whoever gets it must do it. None when there is no more, or
    /// another job.
    fn take(&self, number: u64) -> Option<usize> {
        let next = |state: u64| (state >> PART_BITS == number && part_of(state) < self.parts).then_some(state + 1);
        // Acquire: whoever gets a part sees its job.
        self.state.fetch_update(Ordering::Acquire, Ordering::Acquire, next).ok().map(part_of)
    }

    /// What the thread `worker` has to look at after job `seen`: a later job, where it may do parts of one, or the end.
    fn news(&self, worker: usize, seen: u64) -> Option<u64> {
        let state = self.state.load(Ordering::Acquire);
        let may = state == END || worker < self.awake.load(Ordering::Relaxed);
        (may && state >> PART_BITS != seen).then_some(state)
    }

    /// Does a part, and says whether it was the last.
    fn do_part(&self, job: &(dyn Fn(usize) + Sync), part: usize) -> bool {
        if let Err(panic) = catch_unwind(AssertUnwindSafe(|| job(part))) {
            *lock(&self.panicked) = Some(panic);
        }
        // Release: the caller sees this thread's writes.
        self.left.fetch_sub(1, Ordering::Release) == 1
    }
}

fn part_of(state: u64) -> usize {
    (state & ((1 << PART_BITS) - 1)) as usize
}

/// A team of threads.
#[derive(Debug)]
pub(crate) struct Team {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    /// One job at a time.
    turn: Mutex<()>,
    /// For whoever has many jobs, one after another.
    pub(crate) turns: Turns,
}

impl Team {
    /// A team of `n` threads, at most [`THREADS_MAX`], the caller's included. Those that are started here may run on
    /// any of `cpus`; empty: where the caller may. None is bound to one of them: the caller may be on the same one, and
    /// the kernel could not part them.
    pub(crate) fn new(n: usize, cpus: &[usize]) -> std::io::Result<Self> {
        let parts = n.clamp(1, THREADS_MAX);
        let mut set = rustix::thread::CpuSet::new();
        cpus.iter().for_each(|&cpu| set.set(cpu));
        let set = (!cpus.is_empty()).then_some(set);
        // Where one cannot be started, those that were end with the team.
        let shared = Arc::new(Shared::new(parts));
        let mut team = Self { shared, workers: Vec::new(), turn: Mutex::new(()), turns: Turns::default() };
        for number in 1..parts {
            let shared = Arc::clone(&team.shared);
            let builder = std::thread::Builder::new().name(format!("spd-cpu-{number}"));
            team.workers.push(builder.spawn(move || work(&shared, number, set))?);
        }
        Ok(team)
    }

    /// Threads in the team.
    pub(crate) fn len(&self) -> usize {
        self.workers.len() + 1
    }

    /// Has at most `n` of its threads do anything from the next job on, the caller at least. Parts stay as many, and so
    /// what each of them computes: the rest is done by whoever is awake.
    pub(crate) fn keep_awake(&self, n: usize) {
        self.shared.awake.store(n.clamp(1, self.shared.parts), Ordering::Relaxed);
    }

    /// Threads that do parts.
    pub(crate) fn awake(&self) -> usize {
        self.shared.awake.load(Ordering::Relaxed)
    }

    /// Runs `job(part)` for every part below [`len`](Self::len); returns when all are done. Panics as one of them did.
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
        shared.left.store(shared.parts, Ordering::Relaxed);
        let number = (shared.state.load(Ordering::Relaxed) >> PART_BITS) + 1;
        // Release: whoever sees the new number sees the job and the count. Part 0 is taken.
        shared.state.store(number << PART_BITS | 1, Ordering::Release);
        self.workers.iter().take(self.awake() - 1).for_each(|worker| worker.thread().unpark());
        let mut part = Some(0);
        while let Some(own) = part {
            shared.do_part(job, own);
            part = shared.take(number);
        }
        // Acquire: pairs with the release of whoever did a part, so their writes are seen after the wait.
        wait_for(|| (shared.left.load(Ordering::Acquire) == 0).then_some(()));
        let panic = lock(&shared.panicked).take();
        if let Some(panic) = panic {
            std::panic::resume_unwind(panic);
        }
    }
}

impl Team {
    /// Deals `0 .. n` out: each thread's `job` gets the next number that nobody has, until there is none. What it does
    /// for a number must not depend on who does it.
    pub(crate) fn deal(&self, n: usize, job: &(dyn Fn(&mut dyn Iterator<Item = usize>) + Sync)) {
        let next = AtomicUsize::new(0);
        // Relaxed: `run` orders what is done for one number against all after it.
        let unit = || Some(next.fetch_add(1, Ordering::Relaxed)).filter(|&unit| unit < n);
        self.run(&|_| job(&mut std::iter::from_fn(unit)));
    }
}

impl Drop for Team {
    fn drop(&mut self) {
        self.shared.state.store(END, Ordering::Release);
        for worker in self.workers.drain(..) {
            worker.thread().unpark();
            drop(worker.join());
        }
    }
}

/// The part `number` of `n` of `total` units: contiguous, sizes differ by at most one.
pub(crate) fn part(total: usize, number: usize, n: usize) -> std::ops::Range<usize> {
    total * number / n..total * (number + 1) / n
}

/// Threads for so many processors: no more than the control group's quota keeps busy. Threads beyond it would be
/// stopped for the rest of each period while others wait for their parts.
pub(crate) fn threads_for(cpus: usize) -> usize {
    within(cpus, std::thread::available_parallelism().ok())
}

/// `quota`: how many threads the control group keeps busy, if that can be known.
fn within(cpus: usize, quota: Option<NonZero<usize>>) -> usize {
    quota.map_or(cpus, |quota| cpus.min(quota.get()))
}

/// The processors this process may run on.
pub(crate) fn allowed_cpus(mask: &[u64]) -> Vec<usize> {
    let own = rustix::thread::sched_getaffinity(None).ok();
    let asked = |cpu: usize| mask.is_empty() || mask.get(cpu / 64).is_some_and(|word| word >> (cpu % 64) & 1 == 1);
    let here = |cpu: usize| own.as_ref().is_none_or(|set| set.is_set(cpu));
    let count =
        std::thread::available_parallelism().map_or(1, NonZero::get).max(rustix::thread::CpuSet::MAX_CPU.min(1024));
    (0..count).filter(|&cpu| here(cpu) && asked(cpu)).collect()
}

fn work(shared: &Shared, number: usize, cpus: Option<rustix::thread::CpuSet>) {
    if let Some(set) = cpus {
        // A refused affinity costs speed, not correctness.
        let _refused = rustix::thread::sched_setaffinity(None, &set);
    }
    let mut seen = 0;
    loop {
        let state = wait_for(|| shared.news(number, seen));
        if state == END {
            return;
        }
        seen = state >> PART_BITS;
        while let Some(part) = shared.take(seen) {
            let job = lock(&shared.job).expect("set before its number");
            // SAFETY: `run` keeps the closure alive while a part that was taken is not done.
            let job = unsafe { &*job.0 };
            if shared.do_part(job, part)
                && let Some(caller) = lock(&shared.caller).as_ref()
            {
                caller.unpark();
            }
        }
    }
}

/// Looks until there is something: spins for a moment, then sleeps between looks.
fn wait_for<T>(mut look: impl FnMut() -> Option<T>) -> T {
    for _ in 0..SPINS {
        if let Some(found) = look() {
            return found;
        }
        std::hint::spin_loop();
    }
    loop {
        if let Some(found) = look() {
            return found;
        }
        std::thread::park();
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn every_part_of_every_job_is_done_once() {
        let team = Team::new(4, &[]).expect("threads");
        let counts: Vec<AtomicUsize> = (0..4).map(|_| AtomicUsize::new(0)).collect();
        for _ in 0..1000 {
            team.run(&|part| {
                counts[part].fetch_add(1, Ordering::Relaxed);
            });
        }
        assert!(counts.iter().all(|count| count.load(Ordering::Relaxed) == 1000));
    }

    #[test]
    fn every_unit_is_dealt_once_however_many_there_are() {
        for (threads, n) in [(1, 5), (3, 0), (3, 2), (4, 1000)] {
            let team = Team::new(threads, &[]).expect("threads");
            let counts: Vec<AtomicUsize> = (0..n).map(|_| AtomicUsize::new(0)).collect();
            team.deal(n, &|units| {
                units.for_each(|unit| {
                    counts[unit].fetch_add(1, Ordering::Relaxed);
                });
            });
            assert!(counts.iter().all(|count| count.load(Ordering::Relaxed) == 1), "{threads} threads, {n} units");
        }
    }

    #[test]
    fn the_caller_does_what_a_thread_that_never_runs_has_not_begun() {
        let shared = Arc::new(Shared::new(3));
        let asleep = Arc::clone(&shared);
        let worker =
            std::thread::spawn(move || wait_for(|| (asleep.state.load(Ordering::Acquire) == END).then_some(())));
        let team = Team { shared, workers: vec![worker], turn: Mutex::new(()), turns: Turns::default() };
        let done = Mutex::new(Vec::new());
        team.run(&|part| lock(&done).push((part, std::thread::current().id())));
        let own = std::thread::current().id();
        assert_eq!(*lock(&done), [(0, own), (1, own), (2, own)]);
    }

    #[test]
    fn threads_that_are_kept_asleep_leave_their_parts_to_the_others_until_they_are_woken() {
        let team = Team::new(3, &[]).expect("threads");
        let who = || {
            let done = Mutex::new(Vec::new());
            team.run(&|part| lock(&done).push((part, std::thread::current().id())));
            done.into_inner().expect("no panic")
        };
        let own = std::thread::current().id();
        for (asked, awake) in [(1, 1), (0, 1), (2, 2), (9, 3), (1, 1)] {
            team.keep_awake(asked);
            assert_eq!(team.awake(), awake);
            for _ in 0..100 {
                let done = who();
                let mut parts: Vec<usize> = done.iter().map(|&(part, _)| part).collect();
                parts.sort_unstable();
                assert_eq!(parts, [0, 1, 2]);
                let others: HashSet<_> = done.iter().map(|&(_, id)| id).filter(|&id| id != own).collect();
                assert!(others.len() < awake, "{others:?} of {awake} with the caller");
            }
        }
        // One that slept through jobs does parts again: this one is done by a thread that the caller waits for.
        team.keep_awake(3);
        let met = std::sync::Barrier::new(3);
        team.run(&|_| {
            met.wait();
        });
    }

    #[test]
    fn a_part_of_an_old_job_is_not_given_out() {
        let shared = Shared::new(3);
        shared.state.store(7 << PART_BITS | 1, Ordering::Relaxed);
        assert_eq!((shared.take(6), shared.take(7), shared.take(7), shared.take(7)), (None, Some(1), Some(2), None));
        shared.state.store(END, Ordering::Relaxed);
        assert_eq!(shared.take(7), None);
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
    fn threads_are_no_more_than_processors_and_no_more_than_the_quota() {
        for (cpus, quota, n) in [(8, Some(2), 2), (8, Some(8), 8), (1, Some(4), 1), (2, Some(1), 1), (3, None, 3)] {
            assert_eq!(within(cpus, quota.and_then(NonZero::new)), n, "{cpus} processors, quota {quota:?}");
        }
        let here = std::thread::available_parallelism().expect("of Linux").get();
        assert_eq!((threads_for(1), threads_for(here), threads_for(here + 7)), (1, here, here));
    }

    #[test]
    fn a_thread_that_is_bound_to_one_processor_is_allowed_that_one() {
        let all = allowed_cpus(&[]);
        let mask = |cpu: usize| (0..=cpu / 64).map(move |word| if word == cpu / 64 { 1 << (cpu % 64) } else { 0 });
        for &cpu in &all {
            assert_eq!(allowed_cpus(&mask(cpu).collect::<Vec<u64>>()), [cpu]);
        }
        let last = *all.last().expect("this one runs somewhere");
        let bound = std::thread::spawn(move || {
            let mut set = rustix::thread::CpuSet::new();
            set.set(last);
            rustix::thread::sched_setaffinity(None, &set).expect("one of its own");
            let others: Vec<u64> = mask(last).map(|word| !word).collect();
            (allowed_cpus(&[]), allowed_cpus(&[u64::MAX; 16]), allowed_cpus(&others), threads_for(1000))
        });
        assert_eq!(bound.join().expect("no panic"), (vec![last], vec![last], Vec::new(), 1));
        assert_eq!(allowed_cpus(&[]), all, "this thread is bound to none");
    }

    #[test]
    fn a_panic_in_a_thread_reaches_the_caller_and_the_team_goes_on() {
        let team = Team::new(2, &[]).expect("threads");
        let failed = catch_unwind(AssertUnwindSafe(|| team.run(&|number| assert!(number == 0, "planted"))));
        assert!(failed.is_err());
        team.run(&|_| {});
    }
}
