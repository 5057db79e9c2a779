//! Where does the engine live? On one thread per device, which owns the device, its models and their KV pools.
//!
//! The thread turns: take requests from the inbox, give each model one step. With nothing to do it blocks in the inbox,
//! so an idle engine uses no CPU. Without a device it waits there too until the next one is due; opening it and giving
//! it the models is all that the thread does besides.
#![expect(clippy::disallowed_methods, reason = "the one place of this crate that knows the time")]

use crate::api::Failure;
use crate::device::{DeviceSource, DeviceStatus, Devices};
use crate::executor::{DeviceModel, ExecutorError};
use crate::ladder::Recovery;
use crate::lane::{Lane, Live, ModelOptions};
use crate::memory::{Budget, Limit, Outlook};
use crate::orders::{Links, SlowWriter};
use crate::progress::Progress;
use crate::scheduler::{Limits, Scheduler};
use crate::sequence::{Sequence, SequenceId};
use crate::service::{Command, Service, Shared, Slot, lock};
use crate::sessions::{self, Ask, Sessions};
use crate::tenants::Tenants;
use sparsed_backend::{Backend, Fault};
use sparsed_session::{AnyDisk, Store};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, TryRecvError, sync_channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Requests on their way to the engine thread.
const INBOX: u32 = 256;
/// Pause between looks at listeners that do not read, when nothing else is to do.
const PARKED_PAUSE: Duration = Duration::from_millis(10);

/// Starts the engine thread on the first of `devices`; the others take over in their order when it is lost for good.
/// The service answers at once; models appear in it when all are loaded. The thread ends when it is told to, or when
/// none of the models can be served.
///
/// # Errors
/// When no thread can be started.
///
/// # Panics
/// Without a device, or when `recovery` has no pause.
pub fn start(
    devices: Vec<Box<dyn DeviceSource>>,
    models: Vec<ModelOptions>,
    limits: Limits,
    recovery: &Recovery,
    store: Option<Store<AnyDisk>>,
    budget: Budget,
) -> std::io::Result<(Service, JoinHandle<()>)> {
    let slots: Vec<_> = models.iter().map(|options| Arc::new(Slot::new(options.name.clone()))).collect();
    let (sender, inbox) = sync_channel(INBOX as usize);
    let shared = Arc::new(Shared {
        stopping: AtomicBool::new(false),
        ending: AtomicBool::new(false),
        device: Mutex::new(DeviceStatus::new(devices[0].name())),
        progress: Mutex::new(Progress::new(recovery.watchdog)),
        outlook: Mutex::new(Outlook::default()),
        budget: Mutex::new(budget),
        epoch: Instant::now(),
        tenants: Arc::new(Tenants::new(limits.per_user_requests)),
    });
    let writer = SlowWriter::spawn(sender.clone())?;
    let keeper = store.map(|store| sessions::spawn(store, sender.clone(), Box::new(seconds))).transpose()?;
    let sessions = keeper.as_ref().map(|(asks, _)| Sessions::new(asks.clone()));
    let service = Service::new(slots.clone(), sender, INBOX, Arc::clone(&shared), sessions);
    let devices = Devices::new(devices, recovery, Arc::clone(&shared));
    let links = Links { asks: keeper.as_ref().map(|(asks, _)| asks.clone()), writer };
    let run = move || {
        let created = seconds();
        let open = |(index, (slot, options)): (_, (_, &ModelOptions))| {
            Lane::open(slot, options, limits, created, &|shape| links.orders(index, shape))
        };
        let lanes = slots.into_iter().zip(&models).enumerate().map(open).collect();
        drop(links);
        Engine { lanes, devices, inbox, shared, n_sequences: 0, announced: false, draining: false }.run();
        if let Some((asks, thread)) = keeper {
            asks.tell(Ask::Stop);
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
    inbox: Receiver<Command>,
    shared: Arc<Shared>,
    n_sequences: u64,
    /// Whether requests may come: once all models are loaded, since they would wait for those that are still to be.
    announced: bool,
    draining: bool,
}

/// How long the inbox is waited for.
enum Wait {
    Not,
    For(Duration),
    Forever,
}

/// Why a device is not up.
enum NotUp {
    Failed(ExecutorError),
    /// It refuses what the installation asks of it, and would again.
    Refused(ExecutorError),
    /// The engine is to end.
    Ending,
}

impl Engine {
    fn run(mut self) {
        while !self.lanes.iter().all(|lane| lane.live.is_none()) {
            if !self.take_requests() {
                break;
            }
            let now = self.now();
            self.look(now);
            match self.devices.due() {
                None if self.devices.prefer_at().is_some_and(|at| now >= at) && self.is_idle() => self.prefer(),
                None => self.turn(),
                Some(due) if now >= due => self.bring_up(),
                Some(_) => self.lives_mut().for_each(|live| live.scheduler.tend(now)),
            }
            for lane in &mut self.lanes {
                if let Some(live) = &mut lane.live {
                    lane.slot.set_stats(live.stats());
                    live.scheduler.show(&mut lock(&lane.slot.board));
                }
            }
        }
        // With nothing to serve there is nobody to tell either: whoever waits for the thread says why.
        let now = self.now();
        self.lives_mut().for_each(|live| live.scheduler.fail_all(&Failure::ShuttingDown, now));
    }

    /// Passes the last look at the memory on, to each model its part.
    fn look(&mut self, now: Duration) {
        let mut outlook = *lock(&self.shared.outlook);
        let n = i64::try_from(self.lives().count()).unwrap_or(1).max(1);
        outlook.headroom_bytes /= n;
        self.lives_mut().for_each(|live| live.scheduler.look(outlook, now));
    }

    /// Reckons the budget with what weights and workspace take indeed: where less is left than was thought, pools are
    /// bounded.
    fn reckon(&mut self, models: &[Option<DeviceModel>]) {
        let Some(Ok(memory)) = models.iter().flatten().next().map(DeviceModel::memory) else { return };
        let mut budget = lock(&self.shared.budget);
        budget.weights_bytes = memory.used_weights;
        budget.workspace_bytes = memory.used_workspace;
        budget.bind(Limit::Device, memory.total);
        let for_kv = budget.for_kv().unwrap_or(u64::MAX);
        drop(budget);
        let n = self.lives().count().max(1) as u64;
        self.lives_mut().for_each(|live| live.scheduler.allow(for_kv / n));
    }

    /// One step of each model.
    fn turn(&mut self) {
        let clock = clock(&self.shared);
        for lane in &mut self.lanes {
            let Some(live) = &mut lane.live else { continue };
            if live.scheduler.has_work() {
                lock(&self.shared.progress).stepping(clock());
            }
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

    /// The device in use is lost: everything waits, and the device is let go of.
    fn lose(&mut self, error: &ExecutorError) {
        self.lives_mut().for_each(Live::detach);
        let now = self.now();
        lock(&self.shared.progress).lost(now);
        self.devices.lost(error, now);
    }

    /// Opens the device that is due and gives it the models.
    fn bring_up(&mut self) {
        let device = self.devices.current();
        match self.open(device) {
            Ok(models) => self.go_on(device, models),
            Err(NotUp::Failed(error)) => self.lose(&error),
            Err(NotUp::Refused(error)) => {
                let live = self.lanes.iter_mut().filter(|lane| lane.live.is_some());
                live.for_each(|lane| lane.refuse(error.to_string()));
            }
            Err(NotUp::Ending) => {}
        }
    }

    /// Tries to go back to the preferred device, while nobody needs the other one.
    fn prefer(&mut self) {
        match self.open(0) {
            Ok(models) => self.go_on(0, models),
            Err(NotUp::Failed(error) | NotUp::Refused(error)) => self.devices.not_yet(&error, self.now()),
            Err(NotUp::Ending) => {}
        }
        lock(&self.shared.progress).uploaded();
    }

    fn go_on(&mut self, device: usize, models: Vec<Option<DeviceModel>>) {
        self.reckon(&models);
        for (lane, model) in self.lanes.iter_mut().zip(models) {
            if let (Some(live), Some(model)) = (&mut lane.live, model) {
                live.attach(model);
            }
        }
        let now = self.now();
        lock(&self.shared.progress).uploaded();
        self.devices.up(device, now);
        if !std::mem::replace(&mut self.announced, true) {
            self.lanes.iter().for_each(Lane::announce);
        }
    }

    /// Opens a device and puts every model on it. A model that the last of the devices does not take is not served if
    /// that shows before any was; otherwise it is the device's failure, since there is another one to try, or there may
    /// be requests that wait.
    fn open(&mut self, device: usize) -> Result<Vec<Option<DeviceModel>>, NotUp> {
        let clock = clock(&self.shared);
        let began = clock();
        let backend = self.devices.open(device).map_err(|error| match error.fault() {
            // Another device would only hide that.
            Fault::Caller if self.devices.is_untried() => NotUp::Refused(error),
            _ => NotUp::Failed(error),
        })?;
        if self.is_ending() {
            return Err(NotUp::Ending);
        }
        let mut models = Vec::with_capacity(self.lanes.len());
        for index in 0..self.lanes.len() {
            if self.is_ending() {
                return Err(NotUp::Ending);
            }
            let lane = &mut self.lanes[index];
            let mut uploading = || lock(&self.shared.progress).uploading(clock());
            let is_first = !self.announced && self.devices.is_last(device);
            match lane.load(&backend, &mut uploading) {
                Ok(model) => models.push(model),
                Err(error) if is_first && !concerns_device(&error) => {
                    lane.refuse(error.to_string());
                    models.push(None);
                }
                Err(error) => return Err(NotUp::Failed(error)),
            }
        }
        // A device that was lost is believed once it has passed its own test.
        if let Some(model) = models.iter().flatten().next().filter(|_| self.announced) {
            model.examine().map_err(NotUp::Failed)?;
        }
        self.log_up(&backend, clock().saturating_sub(began));
        Ok(models)
    }

    fn log_up(&self, backend: &Backend, took: Duration) {
        let took_ms = u64::try_from(took.as_millis()).unwrap_or(u64::MAX);
        for lane in self.lanes.iter().filter(|lane| lane.live.is_some()) {
            log::info!(model:% = lane.slot.name, device:% = backend.info().name, took_ms; "model ready");
        }
    }

    /// Whether a device that is being brought up would have nobody to serve.
    fn is_ending(&self) -> bool {
        let is = |flag: &AtomicBool| flag.load(Ordering::Relaxed);
        is(&self.shared.ending) || (is(&self.shared.stopping) && !self.announced)
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
                Ok(Command::Generate { slot, request, sink }) => {
                    let now = self.now();
                    let sequence = Sequence::new(SequenceId(self.n_sequences), *request, sink, now);
                    self.n_sequences += 1;
                    self.lanes[slot].submit(sequence, now);
                }
                Ok(Command::Written { slot }) => self.with(slot, |scheduler| scheduler.written()),
                Ok(Command::Demoted { slot, demoted }) => self.with(slot, |scheduler| scheduler.demoted(demoted)),
                Ok(Command::Restored { slot, restored }) => self.with(slot, |scheduler| scheduler.arrived(restored)),
                // Taken up in the turn that follows, though nobody has anything to do.
                Ok(Command::Look) => return true,
                Ok(Command::Drain) => self.draining = true,
                // Without a service nobody can ask any more.
                Ok(Command::Stop) | Err(TryRecvError::Disconnected) => return false,
                Err(TryRecvError::Empty) => return true,
            }
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
        match self.devices.due() {
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

/// The engine's time.
fn clock(shared: &Shared) -> impl Fn() -> Duration + use<> {
    let epoch = shared.epoch;
    move || epoch.elapsed()
}

/// Whether loading failed for the device's sake and not the model's.
fn concerns_device(error: &ExecutorError) -> bool {
    matches!(error.fault(), Fault::Device | Fault::Queue | Fault::Step | Fault::Cancelled)
}
