//! What does the engine hold of one model? While it is in memory its file and requests, and its place on the device
//! while there is one; what it has done otherwise.

mod opened;

pub(crate) use opened::{Opened, Unopened};

use crate::api::Failure;
use crate::attempt::Watched;
use crate::batch::Batch;
use crate::executor::{self, DeviceModel, ExecutorError, LoadOptions};
use crate::ladder::Conduct;
use crate::orders::Orders;
use crate::residence::{Left, ModelSource, RETRY_AFTER, Residence, Resident, Take};
use crate::room::SlowTier;
use crate::scheduler::{Company, Limits, Load, Scheduler};
use crate::sequence::{Sequence, Vocabulary};
use crate::service::{ServedModel, Slot, Stats, lock};
use crate::step::{Done, step};
use crate::telemetry::Board;
use sparsed_backend::{Backend, Weight};
use sparsed_kv::{BLOCK_TOKENS, Pool, PrefixHasher};
use sparsed_model::{Program, ProgramOptions};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

/// A model to serve.
#[derive(Clone, Debug)]
pub struct ModelOptions {
    /// What requests call it.
    pub name: String,
    /// What they may call it too.
    pub aliases: Vec<String>,
    /// The file.
    pub source: Arc<dyn ModelSource>,
    /// When it is loaded, and when it goes.
    pub residence: Residence,
    /// Most tokens of a sequence; `None`: as many as the model was trained for.
    pub max_context: Option<u32>,
    /// What its steps compute.
    pub program: ProgramOptions,
    /// The number that the plugin's maker has given to how it computes: rows that another one has made are not used.
    pub arithmetic: u32,
    /// Bytes of its KV pool.
    pub kv_bytes: u64,
    /// What may lie in a slow tier where that is too little; `None`: nothing.
    pub slow_tier: Option<SlowTier>,
}

/// A configured model.
pub(crate) struct Lane {
    pub(crate) slot: Arc<Slot>,
    pub(crate) options: ModelOptions,
    /// `None` while it is not in memory.
    pub(crate) live: Option<Live>,
    /// It cannot be served as long as the daemon runs.
    is_refused: bool,
    /// When it could not be loaded.
    pub(crate) failed_at: Option<Duration>,
    /// Since when nobody has asked for it, as far as it may go.
    idle_since: Option<Duration>,
    /// What it had done when it left the memory.
    past: Stats,
}

/// A model that is served, whether or not there is a device at the moment.
pub(crate) struct Live {
    served: Arc<ServedModel>,
    program: Arc<Program>,
    load: LoadOptions,
    /// `None` while there is no device.
    device: Option<DeviceModel>,
    pub(crate) scheduler: Scheduler,
    batch: Batch,
    orders: Orders,
    /// Where the slow tier's file is, if there is one.
    slow_dir: Option<PathBuf>,
    /// What it does in a round of the models, for the others: as its last turn was.
    pub(crate) company: Company,
    stats: Stats,
    take: Take,
}

/// What it takes to put a model on a device, apart from the lane: the engine may go on meanwhile.
pub(crate) struct Upload {
    program: Arc<Program>,
    load: LoadOptions,
    slow_dir: Option<PathBuf>,
}

impl Lane {
    /// A model that is not in memory.
    pub(crate) fn new(slot: Arc<Slot>, options: ModelOptions) -> Self {
        let (is_refused, past) = (false, Stats::default());
        Self { slot, options, live: None, is_refused, failed_at: None, idle_since: None, past }
    }

    /// The model cannot be served as long as the daemon runs.
    pub(crate) fn refuse(&mut self, reason: String) {
        log::error!(model:% = self.slot.name, reason:%; "model not served");
        (self.live, self.is_refused) = (None, true);
        self.slot.failed(reason);
    }

    /// The model could not be loaded now.
    pub(crate) fn fail(&mut self, reason: String, now: Duration) {
        log::error!(model:% = self.slot.name, reason:%; "model not loaded");
        (self.live, self.failed_at) = (None, Some(now));
        self.slot.failed(reason);
    }

    /// Whether anybody may still be answered, though perhaps not now.
    pub(crate) fn may_serve(&self) -> bool {
        !self.is_refused
    }

    /// Whether the model ever leaves the memory, and comes back.
    pub(crate) fn may_leave(&self) -> bool {
        self.slot.residence.may_unload()
    }

    /// The model is open; it goes onto a device with [`Live::attach`].
    pub(crate) fn come(&mut self, opened: Opened, limits: Limits, orders: Orders) -> Result<(), String> {
        self.live = Some(Live::new(opened, limits, orders, self.past)?);
        (self.failed_at, self.idle_since) = (None, None);
        Ok(())
    }

    /// Lets requests come.
    pub(crate) fn announce(&self) {
        if let Some(live) = self.live.as_ref().filter(|live| live.device.is_some()) {
            self.slot.ready(&live.served);
            self.slot.set_stats(live.stats);
        }
    }

    /// What is to be put on a device, where it takes the place of the one in use with [`Live::attach`]. `None` for a
    /// model that is not in memory.
    pub(crate) fn upload(&self, backend: &Backend) -> Option<Upload> {
        let live = self.live.as_ref()?;
        let load = live.load_options(&self.slot, backend);
        Some(Upload { program: Arc::clone(&live.program), load, slow_dir: live.slow_dir.clone() })
    }

    /// Takes a request of this model.
    pub(crate) fn submit(&mut self, mut sequence: Sequence, now: Duration) {
        if let Some(live) = &mut self.live {
            let vocabulary = vocabulary(&live.served);
            live.scheduler.submit(sequence, vocabulary, now);
            live.stats.load = live.scheduler.load();
            return;
        }
        sequence
            .fail(Failure::ModelUnavailable { name: self.slot.name.clone(), reason: "it is not loaded".to_owned() });
        // The service lets no request pass to a model that is not served.
        let _ignored = sequence.deliver(now);
    }

    /// Looks whether anybody needs the model; the next who asks may have one loaded that failed a while ago.
    pub(crate) fn tend(&mut self, now: Duration) {
        if self.failed_at.is_some_and(|at| now.saturating_sub(at) >= RETRY_AFTER) {
            self.failed_at = None;
            self.slot.may_retry();
        }
        self.idle_since = if self.may_go_now() { self.idle_since.or(Some(now)) } else { None };
        self.slot.set_expires(self.resident().and_then(|resident| resident.expires()));
    }

    /// Whether nobody needs the model any more and that was not noticed yet.
    pub(crate) fn is_unnoticed(&self) -> bool {
        self.idle_since.is_none() && self.may_go_now()
    }

    fn may_go_now(&self) -> bool {
        let is_free = |live: &Live| live.device.is_some() && live.scheduler.is_quiet() && self.slot.is_free();
        self.may_leave() && self.live.as_ref().is_some_and(is_free)
    }

    /// The model, if it may leave the memory.
    pub(crate) fn resident(&self) -> Option<Resident> {
        Some(Resident { idle_since: self.idle_since?, keep: self.slot.keep_alive() })
    }

    /// Lets go of the model, unless somebody needs it meanwhile. Answers whether it is gone.
    pub(crate) fn leave(&mut self, why: Left) -> bool {
        self.idle_since = None;
        if !self.slot.leave(why) {
            return false;
        }
        if let Some(mut live) = self.live.take() {
            self.past = Stats { load: Load::default(), ..live.stats() };
        }
        self.slot.set_stats(self.past);
        *lock(&self.slot.board) = Board::default();
        log::info!(model:% = self.slot.name, reason = why.name(); "model unloaded");
        true
    }
}

impl Upload {
    /// Gives the device its weights. `progress` hears (bytes uploaded, bytes in all).
    pub(crate) fn weights(
        &self,
        backend: &Backend,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Vec<Weight>, ExecutorError> {
        executor::upload(backend, &self.program, progress)
    }

    /// Bytes that the device may read while it makes the rest.
    pub(crate) fn weights_bytes(&self) -> u64 {
        self.program.weights.iter().map(|weight| weight.bytes.len() as u64).sum()
    }

    /// Has the device make the rest, in calls that may take long.
    pub(crate) fn place(self, backend: &Backend, weights: &[Weight]) -> Result<DeviceModel, ExecutorError> {
        let mut model = DeviceModel::place(backend, self.program, weights, self.load, self.slow_dir.as_deref())?;
        model.provide();
        Ok(model)
    }
}

impl Live {
    fn new(opened: Opened, limits: Limits, orders: Orders, past: Stats) -> Result<Self, String> {
        let mut secret = [0; 32];
        getrandom::fill(&mut secret).map_err(|error| format!("no random numbers: {error}"))?;
        let take = opened.take();
        let LoadOptions { n_blocks, n_fast, .. } = opened.load;
        let mut scheduler = Scheduler::new(limits, Pool::with_slow_tier(n_blocks, n_fast), PrefixHasher::new(secret));
        scheduler.weigh(opened.footprint);
        scheduler.count_on(past.tally);
        let stats = Stats { load: scheduler.load(), ..past };
        Ok(Self {
            served: Arc::new(opened.served),
            program: opened.program,
            load: opened.load,
            device: None,
            scheduler,
            batch: Batch::default(),
            orders,
            slow_dir: opened.slow_dir,
            company: Company::default(),
            stats,
            take,
        })
    }

    /// What it takes of the memory.
    pub(crate) fn take(&self) -> Take {
        self.take
    }

    /// Bytes of its weights that are in memory whatever the device does.
    pub(crate) fn made_bytes(&self) -> u64 {
        self.program.made_bytes()
    }

    /// How it is put on a device, which may not have a slow tier.
    fn load_options(&self, slot: &Slot, backend: &Backend) -> LoadOptions {
        let info = backend.info();
        if self.load.n_fast == self.load.n_blocks || info.takes_slow_file() || info.takes_slow_memory() {
            return self.load;
        }
        let n_blocks = self.load.n_fast;
        let tokens = n_blocks * BLOCK_TOKENS;
        log::warn!(model:% = slot.name, tokens; "the device has no slow tier: no more tokens than these are answered at a time");
        LoadOptions { n_blocks, slow_cache_bytes: 0, ..self.load }
    }

    /// Goes on with `device`, whose KV pool is empty: what ran waits until its rows are computed again.
    pub(crate) fn attach(&mut self, device: DeviceModel) {
        let n_blocks = device.n_blocks();
        self.scheduler.requeue_on(Pool::with_slow_tier(n_blocks, self.load.n_fast.min(n_blocks)));
        self.device = Some(device);
    }

    /// Lets go of a device that is lost.
    pub(crate) fn detach(&mut self) {
        (self.device, self.company) = (None, Company::default());
        self.scheduler.requeue();
    }

    /// One step, if there is a device and something to do.
    pub(crate) fn turn(
        &mut self,
        conduct: &mut Conduct,
        clock: &dyn Fn() -> Duration,
    ) -> Result<Option<Done>, ExecutorError> {
        let Some(device) = &mut self.device else { return Ok(None) };
        let began = clock();
        let vocabulary = vocabulary(&self.served);
        let mut watched = Watched { device, conduct, clock };
        let done = step(&mut self.scheduler, &mut watched, &mut self.orders, &mut self.batch, vocabulary, clock)?;
        self.company = self.scheduler.as_company(clock().saturating_sub(began));
        if let Some(done) = done {
            self.stats.steps += 1;
            self.stats.computed_tokens += done.computed as u64;
            self.stats.sampled_tokens += done.sampled as u64;
        }
        Ok(done)
    }

    /// What it has done and holds.
    pub(crate) fn stats(&mut self) -> Stats {
        self.stats.load = self.scheduler.load();
        self.stats.tally = self.scheduler.tally();
        self.stats
    }
}

fn vocabulary(served: &ServedModel) -> Vocabulary<'_> {
    Vocabulary { tokenizer: served.model.tokenizer(), max_context: served.max_context }
}
