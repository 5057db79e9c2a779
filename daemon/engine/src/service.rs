//! What do surfaces hold? Names of models, a way to make prompts, and a way to ask for answers.
//!
//! A [`Service`] is shared by all surfaces. It never waits for the engine: requests go into a bounded inbox, answers
//! come back through each request's sink.

mod lease;
mod served;
mod slot;
mod targets;
mod turns;

pub use lease::{Arriving, Held, Lease};
pub use served::ServedModel;
pub use slot::Keeping;
pub(crate) use slot::Slot;

use crate::api::{Failure, Generate, Owner, Sink, UpstreamModel, UpstreamStatus};
use crate::device::DeviceStatus;
use crate::durable::Restored;
use crate::lane::Opened;
use crate::memory::{Budget, Outlook};
use crate::progress::Progress;
use crate::scheduler::{Limits, Load};
use crate::sessions::Sessions;
use crate::telemetry::{Board, Tally};
use crate::tenants::{Admission, Tenants};
use crate::warm::Demoted;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{SyncSender, TrySendError};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// The model of requests that name none.
pub const DEFAULT_MODEL: &str = "default";

/// Shared by all surfaces; cheap to clone.
#[derive(Clone, Debug)]
pub struct Service {
    slots: Arc<[Arc<Slot>]>,
    /// Models that engines elsewhere compute.
    upstreams: Arc<[UpstreamModel]>,
    inbox: SyncSender<Command>,
    shared: Arc<Shared>,
    /// Requests that the inbox holds.
    inbox_limit: u32,
    /// `None` where no sessions are kept.
    sessions: Option<Sessions>,
}

/// What the engine thread and the service tell each other beside requests.
#[derive(Debug)]
pub(crate) struct Shared {
    /// No new requests are taken.
    pub(crate) stopping: AtomicBool,
    /// Requests that are under way are given up too.
    pub(crate) ending: AtomicBool,
    /// Written by the engine when the device changes its state.
    pub(crate) device: Mutex<DeviceStatus>,
    /// Written by the engine at each turn.
    pub(crate) progress: Mutex<Progress>,
    /// The last look at the memory.
    pub(crate) outlook: Mutex<Outlook>,
    /// What KV caches may take; the engine knows the exact sizes of the rest once models are loaded.
    pub(crate) budget: Mutex<Budget>,
    /// What the scheduler may use; those of its parts that can change are looked at before each turn.
    pub(crate) limits: Mutex<Limits>,
    /// The engine's time begins here.
    pub(crate) epoch: Instant,
    /// Who has how many requests under way.
    pub(crate) tenants: Arc<Tenants>,
}

/// What the engine thread is told.
pub(crate) enum Command {
    /// Answer a request of the model `slot`.
    Generate { slot: usize, request: Box<Generate>, sink: Box<dyn Sink> },
    /// An image of the model `slot` is written, or could not be.
    Written { slot: usize },
    /// What has become of a block of the model `slot` on its way to the slow tier.
    Demoted { slot: usize, demoted: Demoted },
    /// Images of the model `slot` that were asked for.
    Restored { slot: usize, restored: Restored },
    /// The file of the model `slot` is open, or cannot be opened.
    Opened { slot: usize, opened: Result<Box<Opened>, String> },
    /// There is a new look at the memory, a model is wanted, or may go.
    Look,
    /// Take nothing new; end when nothing runs any more.
    Drain,
    /// End now.
    Stop,
}

impl std::fmt::Debug for Command {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // A prompt is what somebody said: it stays out of logs.
        f.write_str(match self {
            Self::Generate { .. } => "Generate",
            Self::Written { .. } => "Written",
            Self::Demoted { .. } => "Demoted",
            Self::Restored { .. } => "Restored",
            Self::Opened { .. } => "Opened",
            Self::Look => "Look",
            Self::Drain => "Drain",
            Self::Stop => "Stop",
        })
    }
}

/// What a model's engine has done and holds.
#[derive(Clone, Copy, Debug, Default)]
pub struct Stats {
    /// Now.
    pub load: Load,
    /// Prompt and answer tokens that went through the model, since the start.
    pub computed_tokens: u64,
    /// Tokens that were sampled, since the start.
    pub sampled_tokens: u64,
    /// Steps, since the start.
    pub steps: u64,
    /// What became of requests.
    pub tally: Tally,
}

/// What a configured model is doing.
#[derive(Clone, Debug)]
pub enum ModelState {
    /// Not in memory; whoever asks for it has it loaded.
    Unloaded,
    /// Being read and uploaded.
    Loading {
        /// Thousandths of the weights that are uploaded.
        progress_permille: u64,
    },
    /// Answers.
    Ready(Arc<ServedModel>),
    /// Does not, and why.
    Failed(String),
    /// Is computed by another engine, which is so.
    Elsewhere(UpstreamStatus),
}

impl ModelState {
    /// Whether requests for it would be answered, as far as is known.
    pub fn answers(&self) -> bool {
        match self {
            Self::Ready(_) => true,
            Self::Elsewhere(upstream) => upstream.is_up(),
            Self::Unloaded | Self::Loading { .. } | Self::Failed(_) => false,
        }
    }
}

/// A configured model.
#[derive(Clone, Debug)]
pub struct ModelStatus {
    /// Its name in the configuration.
    pub name: String,
    /// Other names that requests may have for it.
    pub aliases: Vec<String>,
    /// What it is doing.
    pub state: ModelState,
    /// What its engine has done.
    pub stats: Stats,
    /// Who waits and runs, and what was decided about it.
    pub board: Board,
    /// What keeps it in memory.
    pub keeping: Keeping,
}

/// Values behind these locks are whole at any time, so a panic elsewhere has spoilt nothing.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Service {
    pub(crate) fn new(
        slots: Vec<Arc<Slot>>,
        upstreams: Vec<UpstreamModel>,
        inbox: SyncSender<Command>,
        inbox_limit: u32,
        shared: Arc<Shared>,
        sessions: Option<Sessions>,
    ) -> Self {
        Self { slots: slots.into(), upstreams: upstreams.into(), inbox, shared, inbox_limit, sessions }
    }

    /// The device in use and how it is.
    pub fn device(&self) -> DeviceStatus {
        lock(&self.shared.device).clone()
    }

    /// Whether the engine gets anywhere, as of `now`: the service's watchdog is fed while it does.
    pub fn is_alive(&self, now: Instant) -> bool {
        lock(&self.shared.progress).is_alive(now.saturating_duration_since(self.shared.epoch))
    }

    /// Whether it has steps to do.
    pub fn is_stepping(&self) -> bool {
        lock(&self.shared.progress).is_stepping()
    }

    /// What KV caches may take, and why.
    pub fn budget(&self) -> Budget {
        lock(&self.shared.budget).clone()
    }

    /// Has the engine keep to other limits from its next turn on. The sizes of a step (`max_running`,
    /// `max_batched_tokens`) and who may use the slow tier stay those of the start: plans and pools were made for them.
    pub fn set_limits(&self, limits: Limits) {
        *lock(&self.shared.limits) = limits;
        self.wake();
    }

    /// Changes what the configuration has for memory: bytes of the whole process, and of its KV caches. Pools are
    /// bounded from the engine's next turn on, and never grow beyond their size at the start.
    pub fn set_memory(&self, total_bytes: Option<u64>, kv_bytes: Option<u64>) {
        lock(&self.shared.budget).configure(total_bytes, kv_bytes);
        self.wake();
    }

    /// Has an engine that waits in its inbox look again. One with a full inbox is awake, one that has ended needs
    /// nothing.
    fn wake(&self) {
        let _unheard = self.inbox.try_send(Command::Look).is_err();
    }

    /// The last look at the memory.
    pub fn outlook(&self) -> Outlook {
        *lock(&self.shared.outlook)
    }

    /// Time since the engine's start.
    pub fn uptime(&self, now: Instant) -> Duration {
        now.saturating_duration_since(self.shared.epoch)
    }

    /// Takes a new look at the memory; an engine that does nothing is woken by one that `matters`. Takes no memory.
    pub fn report(&self, outlook: Outlook, matters: bool) {
        *lock(&self.shared.outlook) = outlook;
        if matters {
            self.wake();
        }
    }

    /// Every configured model: those of this box, then those of engines elsewhere, each in the order of their names.
    pub fn models(&self) -> Vec<ModelStatus> {
        let status = |slot: &Arc<Slot>| ModelStatus {
            name: slot.name.clone(),
            aliases: slot.aliases.clone(),
            state: slot.state(),
            stats: *lock(&slot.stats),
            board: lock(&slot.board).clone(),
            keeping: slot.keeping(),
        };
        self.slots.iter().map(status).chain(self.upstream_statuses()).collect()
    }

    /// Plugins of others that were loaded, as `id version`; any marks the daemon as tainted.
    pub fn third_party_plugins(&self) -> Vec<String> {
        sparsed_backend::third_party()
    }

    /// The model `name` of this box, if it answers.
    ///
    /// # Errors
    /// Not configured, not loaded, failed, or computed elsewhere. [`Service::hold`] has it loaded and waits.
    pub fn model(&self, name: &str) -> Result<Arc<ServedModel>, Failure> {
        match self.slot(name)?.1.state() {
            ModelState::Ready(model) => Ok(model),
            ModelState::Unloaded => Err(Failure::ModelUnloaded { name: name.to_owned() }),
            ModelState::Loading { .. } => Err(Failure::ModelLoading { name: name.to_owned() }),
            ModelState::Failed(reason) => Err(Failure::ModelUnavailable { name: name.to_owned(), reason }),
            ModelState::Elsewhere(_) => Err(Failure::ComputedElsewhere { name: name.to_owned() }),
        }
    }

    /// Counts a request of `owner` as under way until what is given back is dropped. Doors ask before they read it.
    ///
    /// # Errors
    /// The owner has as many as it may.
    pub fn admit(&self, owner: Owner) -> Result<Admission, Failure> {
        self.shared.tenants.admit(owner)
    }

    /// Hands a request to the engine; its events go to `sink`.
    ///
    /// # Errors
    /// What is wrong with the request, or that it cannot be taken now. The sink has heard nothing then.
    pub fn generate(&self, mut request: Generate, mut sink: Box<dyn Sink>) -> Result<(), Failure> {
        if self.shared.stopping.load(Ordering::Relaxed) {
            return Err(Failure::ShuttingDown);
        }
        let (index, _) = self.slot(&request.model)?;
        // From here on it stays until the request has ended.
        let held = self.held_now(&request.model)?;
        held.model.check(&request, request.turn.is_some())?;
        if request.max_tokens == Some(0) {
            return served::unanswered(&request, &mut *sink);
        }
        request.lease = Some(held.lease);
        if let Some(recorder) = request.turn.as_mut().and_then(|turn| turn.recorder.take()) {
            sink = recorder.record(sink);
        }
        self.inbox.try_send(Command::Generate { slot: index, request: Box::new(request), sink }).map_err(|error| {
            match error {
                TrySendError::Full(_) => Failure::QueueFull { limit: self.inbox_limit, retry_after_s: 1 },
                TrySendError::Disconnected(_) => Failure::ShuttingDown,
            }
        })
    }

    /// Takes no more requests; the engine ends when those it has are answered.
    pub fn drain(&self) {
        self.shared.stopping.store(true, Ordering::Relaxed);
        self.slots.iter().for_each(|slot| slot.wake());
        self.tell(Command::Drain);
    }

    /// Ends the engine; requests that run hear [`Failure::ShuttingDown`], those of engines elsewhere too.
    pub fn stop(&self) {
        self.shared.stopping.store(true, Ordering::Relaxed);
        self.upstreams.iter().for_each(|upstream| upstream.engine.stop());
        self.shared.ending.store(true, Ordering::Relaxed);
        self.slots.iter().for_each(|slot| slot.wake());
        self.tell(Command::Stop);
    }

    /// Blocks while the inbox is full: for a step, or until models are loaded. Nobody to tell: it has ended already.
    fn tell(&self, command: Command) {
        let _ended = self.inbox.send(command).is_err();
    }

    /// The slot of model `name`, which may be another name of it. [`DEFAULT_MODEL`] is the first model where none is
    /// called so.
    fn slot(&self, asked: &str) -> Result<(usize, &Arc<Slot>), Failure> {
        let name = self.untagged(asked);
        let called = |slot: &Slot| slot.name == name || slot.aliases.iter().any(|alias| alias == name);
        let found = self.slots.iter().enumerate().find(|(_, slot)| called(slot));
        let first = || self.slots.first().filter(|_| name == DEFAULT_MODEL).map(|slot| (0, slot));
        found.or_else(first).ok_or_else(|| match self.upstream(name) {
            Some(upstream) => Failure::ComputedElsewhere { name: upstream.name.clone() },
            None => Failure::ModelNotFound { name: asked.to_owned(), known: self.known() },
        })
    }
}
