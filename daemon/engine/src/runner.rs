//! Where does the engine live? On one thread per device, which owns the device, its models and their KV pools.
//!
//! The thread turns: take requests from the inbox, give each model one step. With nothing to do it blocks in the inbox,
//! so an idle engine uses no CPU. Without a device it waits there too until the next one is due; opening it and giving
//! it the models is all that the thread does besides.
#![expect(clippy::disallowed_methods, reason = "the one place of this crate that knows the time")]

mod bring_up;
mod residents;

use crate::api::{Failure, UpstreamModel};
use crate::device::{DeviceSource, DeviceState, DeviceStatus, Devices};
use crate::ladder::Recovery;
use crate::lane::{Lane, Live, ModelOptions, Opened, Unopened};
use crate::memory::{Budget, Outlook};
use crate::orders::{Links, SlowWriter};
use crate::progress::Progress;
use crate::scheduler::{Company, Limits, Scheduler};
use crate::sequence::{Sequence, SequenceId};
use crate::service::{Command, Service, Shared, Slot, lock};
use crate::sessions::{self, Ask, Clocks, SessionStore};
use crate::tenants::Tenants;
use residents::Coming;
use rustix::time::{ClockId, clock_gettime};
use sparsed_backend::Backend;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TryRecvError, sync_channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Requests on their way to the engine thread.
const INBOX: u32 = 256;
/// Pause between looks at listeners that do not read, when nothing else is to do.
const PARKED_PAUSE: Duration = Duration::from_millis(10);

/// Starts the engine thread on the first of `devices`; the others take over in their order when it is lost for good.
/// The service answers at once; models that are loaded at the start appear in it when all of them are, the others when
/// somebody asks. The thread ends when it is told to, or when none of the models can be served and there are no
/// `upstreams`, which engines elsewhere compute.
///
/// # Errors
/// When no thread can be started.
///
/// # Panics
/// Without a device, or when `recovery` has no pause.
pub fn start(
    devices: Vec<Box<dyn DeviceSource>>,
    models: Vec<ModelOptions>,
    upstreams: Vec<UpstreamModel>,
    limits: Limits,
    recovery: &Recovery,
    store: Option<SessionStore>,
    budget: Budget,
) -> std::io::Result<(Service, JoinHandle<()>)> {
    let slot =
        |options: &ModelOptions| Arc::new(Slot::new(options.name.clone(), options.aliases.clone(), options.residence));
    let slots: Vec<_> = models.iter().map(slot).collect();
    let (sender, inbox) = sync_channel(INBOX as usize);
    let shared = Arc::new(Shared {
        stopping: AtomicBool::new(false),
        ending: AtomicBool::new(false),
        device: Mutex::new(DeviceStatus::new(devices[0].name(), devices[0].chosen())),
        progress: Mutex::new(Progress::new(recovery.watchdog)),
        outlook: Mutex::new(Outlook::default()),
        budget: Mutex::new(budget),
        limits: Mutex::new(limits),
        epoch: Instant::now(),
        tenants: Arc::new(Tenants::new(limits.per_user_requests)),
    });
    let writer = SlowWriter::spawn(sender.clone())?;
    let clocks = Clocks { date: Box::new(seconds), uptime: Box::new(uptime) };
    let keeper = store.map(|store| sessions::spawn(store, sender.clone(), clocks)).transpose()?;
    let sessions = keeper.as_ref().map(|(sessions, _)| sessions.clone());
    let has_upstreams = !upstreams.is_empty();
    let service = Service::new(slots.clone(), upstreams, sender.clone(), INBOX, Arc::clone(&shared), sessions);
    let devices = Devices::new(devices, recovery, Arc::clone(&shared));
    let links = Links { asks: keeper.as_ref().map(|(sessions, _)| sessions.asks()), writer };
    let run = move || {
        let lanes = slots.into_iter().zip(models).map(|(slot, options)| Lane::new(slot, options)).collect();
        let mut engine = Engine {
            lanes,
            devices,
            backend: None,
            inbox,
            sender,
            links,
            limits,
            shared,
            n_sequences: 0,
            announced: false,
            draining: false,
            coming: Coming::default(),
            relieved_at: 0,
            for_kv: u64::MAX,
        };
        engine.run();
        if has_upstreams {
            engine.await_end();
        }
        engine.close();
        if let Some((sessions, thread)) = keeper {
            sessions.asks().tell(Ask::Stop);
            // A thread that has panicked has said so.
            let _ended = thread.join().is_err();
        }
    };
    let thread = std::thread::Builder::new().name("engine".to_owned()).spawn(run)?;
    Ok((service, thread))
}

struct Engine {
    lanes: Vec<Lane>,
    devices: Devices,
    /// The device in use.
    backend: Option<Backend>,
    inbox: Receiver<Command>,
    /// For threads that have something to tell.
    sender: SyncSender<Command>,
    links: Links,
    limits: Limits,
    shared: Arc<Shared>,
    n_sequences: u64,
    /// Whether requests may come: once all models are loaded, since they would wait for those that are still to be.
    announced: bool,
    draining: bool,
    /// Bytes that KV caches were last allowed.
    for_kv: u64,
    coming: Coming,
    /// The last look at critically short memory that a model has left for.
    relieved_at: u64,
}

/// How long the inbox is waited for.
enum Wait {
    Not,
    For(Duration),
    Forever,
}

impl Engine {
    fn run(&mut self) {
        self.open_first();
        while self.lanes.iter().any(Lane::may_serve) {
            if !self.take_requests() {
                break;
            }
            let now = self.now();
            self.look(now);
            self.tune();
            match self.devices.due() {
                None if self.devices.prefer_at().is_some_and(|at| now >= at) && self.is_idle() => self.prefer(),
                None => self.turn(),
                Some(due) if now >= due => self.bring_up(),
                Some(_) => self.lives_mut().for_each(|live| live.scheduler.tend(now)),
            }
            self.reside();
            self.show();
        }
        // With nothing to serve there is nobody to tell either: whoever waits for the thread says why.
        let now = self.now();
        self.lives_mut().for_each(|live| live.scheduler.fail_all(&Failure::ShuttingDown, now));
    }

    /// Whoever waits for a model hears that none comes any more.
    fn close(&self) {
        self.shared.stopping.store(true, Ordering::Relaxed);
        self.lanes.iter().for_each(|lane| lane.slot.wake());
    }

    /// Opens what is to be loaded at the start. A model whose file is not what it must be is loaded when somebody asks
    /// and it is.
    fn open_first(&mut self) {
        let (created, now) = (seconds(), self.now());
        for (index, lane) in self.lanes.iter_mut().enumerate().filter(|(_, lane)| lane.slot.residence.at_start) {
            let opened = Opened::open(&lane.slot.name, &lane.options, self.limits, created).and_then(|opened| {
                let orders = self.links.orders(index, opened.images());
                lane.come(opened, self.limits, orders).map_err(Unopened::Unfit)
            });
            match opened {
                Ok(()) => {}
                Err(Unopened::NoFile(reason)) => lane.fail(reason, now),
                Err(Unopened::Unfit(reason)) => lane.refuse(reason),
            }
        }
    }

    /// Shows what models do on their boards.
    fn show(&mut self) {
        for lane in &mut self.lanes {
            if let Some(live) = &mut lane.live {
                lane.slot.set_stats(live.stats());
                live.scheduler.show(&mut lock(&lane.slot.board));
            }
        }
    }

    /// With no model of its own the thread stays for those who keep sessions, and until the daemon's end is asked for.
    fn await_end(&self) {
        if self.is_ending() || self.draining {
            return;
        }
        lock(&self.shared.device).state = DeviceState::Unused;
        while let Ok(command) = self.inbox.recv() {
            if matches!(command, Command::Drain | Command::Stop) {
                return;
            }
        }
    }

    /// Passes the last look at the memory on, to each model its part.
    fn look(&mut self, now: Duration) {
        let mut outlook = *lock(&self.shared.outlook);
        let n = i64::try_from(self.lives().count()).unwrap_or(1).max(1);
        outlook.headroom_bytes /= n;
        self.lives_mut().for_each(|live| live.scheduler.look(outlook, now));
    }

    /// Takes up what the operator has changed since the last turn.
    fn tune(&mut self) {
        self.limits = *lock(&self.shared.limits);
        let (limits, for_kv) = (self.limits, lock(&self.shared.budget).for_kv().unwrap_or(u64::MAX));
        self.lives_mut().for_each(|live| live.scheduler.set_limits(limits));
        if self.announced && for_kv != self.for_kv {
            self.allow(for_kv); // Before, the budget is an estimate, and `reckon` is still to come.
        }
    }

    /// One step of each model, which all their answers wait for.
    fn turn(&mut self) {
        let clock = clock(&self.shared);
        let all = self.lives().map(|live| live.company).fold(Company::default(), Company::with);
        for lane in &mut self.lanes {
            let Some(live) = &mut lane.live else { continue };
            if live.scheduler.has_work() {
                lock(&self.shared.progress).stepping(clock());
            }
            live.scheduler.run_beside(all.without(live.company));
            match live.turn(self.devices.conduct(), &clock) {
                Ok(None) => {}
                Ok(Some(done)) if done.computed == 0 => {
                    lock(&self.shared.progress).failed(clock());
                    self.devices.judge(false);
                }
                Ok(Some(_)) => {
                    lock(&self.shared.progress).done(clock());
                    self.devices.judge(true);
                }
                Err(error) => return self.lose(&error),
            }
        }
    }

    /// Empties the inbox, waiting in it while there is nothing to run. Answers false when the engine is to end.
    fn take_requests(&mut self) -> bool {
        loop {
            if (self.draining && self.is_idle() && self.is_saved()) || self.is_ending() {
                return false;
            }
            let received = match self.wait() {
                Wait::Not => self.inbox.try_recv(),
                Wait::Forever => self.inbox.recv().map_err(|_| TryRecvError::Disconnected),
                Wait::For(time) => self.inbox.recv_timeout(time).map_err(|error| match error {
                    RecvTimeoutError::Timeout => TryRecvError::Empty,
                    RecvTimeoutError::Disconnected => TryRecvError::Disconnected,
                }),
            };
            match received {
                // Without a service nobody can ask any more.
                Ok(Command::Stop) | Err(TryRecvError::Disconnected) => return false,
                Err(TryRecvError::Empty) => return true,
                Ok(command) => {
                    // Taken up in the turn that follows, though nobody has anything to do.
                    let is_for_now = matches!(command, Command::Look | Command::Opened { .. });
                    self.heed(command);
                    if is_for_now {
                        return true;
                    }
                }
            }
        }
    }

    /// Does what it is told; what ends it or only wakes it is for [`Self::take_requests`].
    fn heed(&mut self, command: Command) {
        match command {
            Command::Generate { slot, request, sink } => {
                let now = self.now();
                let sequence = Sequence::new(SequenceId(self.n_sequences), *request, sink, now);
                self.n_sequences += 1;
                self.lanes[slot].submit(sequence, now);
            }
            Command::Written { slot } => self.with(slot, |scheduler| scheduler.written()),
            Command::Demoted { slot, demoted } => self.with(slot, |scheduler| scheduler.demoted(demoted)),
            Command::Restored { slot, restored } => self.with(slot, |scheduler| scheduler.arrived(restored)),
            Command::Opened { slot, opened } => self.opened(slot, opened),
            Command::Drain => self.draining = true,
            Command::Look | Command::Stop => {}
        }
    }

    fn with(&mut self, slot: usize, tell: impl FnOnce(&mut Scheduler)) {
        if let Some(live) = &mut self.lanes[slot].live {
            tell(&mut live.scheduler);
        }
    }

    /// How long the inbox may be waited for.
    fn wait(&self) -> Wait {
        let now = self.now();
        let (is_busy, is_idle) = (self.lives().any(|live| live.scheduler.has_work()), self.is_idle());
        let until = |at: Duration| at.saturating_sub(now);
        let wait = match self.devices.due() {
            Some(due) if due <= now => Wait::Not,
            Some(due) if is_idle => Wait::For(until(due)),
            Some(due) => Wait::For(until(due).min(PARKED_PAUSE)),
            None if is_busy => Wait::Not,
            None => {
                lock(&self.shared.progress).idle(now);
                match self.devices.prefer_at() {
                    _ if !is_idle => Wait::For(PARKED_PAUSE),
                    Some(at) => Wait::For(until(at)),
                    None => Wait::Forever,
                }
            }
        };
        match (wait, self.reside_at()) {
            (Wait::Forever, Some(at)) => Wait::For(until(at)),
            (Wait::For(time), Some(at)) => Wait::For(time.min(until(at))),
            (wait, _) => wait,
        }
    }

    /// Whether nobody waits for anything.
    fn is_idle(&self) -> bool {
        self.lives().all(|live| live.scheduler.is_idle())
    }

    /// Whether all blocks of sessions are saved; without a device there is nothing more to save.
    fn is_saved(&self) -> bool {
        self.devices.due().is_some() || self.lives().all(|live| live.scheduler.is_saved())
    }

    fn lives(&self) -> impl Iterator<Item = &Live> {
        self.lanes.iter().filter_map(|lane| lane.live.as_ref())
    }

    fn lives_mut(&mut self) -> impl Iterator<Item = &mut Live> {
        self.lanes.iter_mut().filter_map(|lane| lane.live.as_mut())
    }

    fn now(&self) -> Duration {
        self.shared.epoch.elapsed()
    }
}

/// Seconds since 1970; before 1970 it is 1970. For dates only: a clock that is set may jump.
pub(crate) fn seconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// Time since the machine's start, that in which it slept included: an [`Instant`] stands still then, and a date that
/// is right would seem to have been set.
fn uptime() -> Duration {
    Duration::try_from(clock_gettime(ClockId::Boottime)).unwrap_or_default()
}

/// The engine's time.
fn clock(shared: &Shared) -> impl Fn() -> Duration + use<> {
    let epoch = shared.epoch;
    move || epoch.elapsed()
}
