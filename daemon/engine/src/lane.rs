//! What does the engine hold of one model? The file, its requests, and its place on the device while there is one.

use crate::api::Failure;
use crate::attempt::Watched;
use crate::batch::Batch;
use crate::executor::{DeviceModel, ExecutorError, LoadOptions};
use crate::grammar::Compiler;
use crate::ladder::Conduct;
use crate::orders::Orders;
use crate::room::{Need, Room, SlowTier, least_fast};
use crate::scheduler::{Footprint, Limits, Scheduler};
use crate::sequence::{Sequence, Vocabulary};
use crate::service::{ServedModel, Slot, Stats};
use crate::step::{Done, step};
use sparsed_backend::Backend;
use sparsed_kv::{BLOCK_TOKENS, Pool, PrefixHasher};
use sparsed_model::{Model, ModelError, Program, ProgramOptions};
use sparsed_session::ImageShape;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

/// A model to serve.
#[derive(Clone, Debug)]
pub struct ModelOptions {
    /// What requests call it.
    pub name: String,
    /// The file.
    pub path: PathBuf,
    /// Most tokens of a sequence; `None`: as many as the model was trained for.
    pub max_context: Option<u32>,
    /// What its steps compute.
    pub program: ProgramOptions,
    /// Bytes of its KV pool.
    pub kv_bytes: u64,
    /// What may lie in a slow tier where that is too little; `None`: nothing.
    pub slow_tier: Option<SlowTier>,
}

/// A configured model.
pub(crate) struct Lane {
    pub(crate) slot: Arc<Slot>,
    /// `None` when it cannot be served.
    pub(crate) live: Option<Live>,
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
    stats: Stats,
}

impl Lane {
    /// Opens the model's file; `created` is the time in seconds since 1970.
    pub(crate) fn open(
        slot: Arc<Slot>,
        options: &ModelOptions,
        limits: Limits,
        created: u64,
        orders: &dyn Fn(ImageShape) -> Orders,
    ) -> Self {
        let mut lane = Self { slot, live: None };
        match Live::open(&lane.slot, options, limits, created, orders) {
            Ok(live) => lane.live = Some(live),
            Err(reason) => lane.refuse(reason),
        }
        lane
    }

    /// The model cannot be served, and was not yet.
    pub(crate) fn refuse(&mut self, reason: String) {
        log::error!(model:% = self.slot.name, reason:%; "model not served");
        self.live = None;
        self.slot.outcome.set(Err(reason)).expect("a model is refused before it is announced, and once");
    }

    /// Lets requests come.
    pub(crate) fn announce(&self) {
        if let Some(live) = &self.live {
            self.slot.outcome.set(Ok(Arc::clone(&live.served))).expect("models are announced once");
            self.slot.set_stats(live.stats);
        }
    }

    /// Puts the model on a device; it takes the place of the one in use with [`Live::attach`]. `None` for a model that
    /// is not served. `uploading` is called again and again meanwhile.
    pub(crate) fn load(
        &self,
        backend: &Backend,
        uploading: &mut dyn FnMut(),
    ) -> Result<Option<DeviceModel>, ExecutorError> {
        let Some(live) = &self.live else { return Ok(None) };
        let mut progress = |done: u64, total: u64| {
            self.slot.progress_permille.store(done * 1000 / total.max(1), Ordering::Relaxed);
            uploading();
        };
        let load = live.load_options(&self.slot, backend);
        let slow_dir = live.slow_dir.as_deref();
        DeviceModel::load_program(backend, Arc::clone(&live.program), load, slow_dir, &mut progress).map(Some)
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
}

impl Live {
    fn open(
        slot: &Slot,
        options: &ModelOptions,
        limits: Limits,
        created: u64,
        orders: &dyn Fn(ImageShape) -> Orders,
    ) -> Result<Self, String> {
        let text = |error: ModelError| error.to_string();
        let model = Model::open(&options.path).map_err(text)?;
        let program = Arc::new(model.program(&options.program).map_err(text)?);
        let top_k = program.top_k();
        let (latent_bytes, index_bytes) = program.kv.plane_bytes_per_token().map_err(text)?;
        let context = wanted_context(slot, &model, options);
        let layers = program.kv.n_layers.into();
        let need = Need { index_bytes, latent_bytes, layers, top_k: top_k.unwrap_or(0).into(), context };
        // Who reads everything at every token is not helped by a slow tier.
        let slow_tier = options.slow_tier.as_ref().filter(|_| top_k.is_some());
        let room = room(slot, &need, options.kv_bytes, limits, slow_tier)?;
        let Room { max_context, n_blocks, n_fast, cache_bytes } = room;
        let load = LoadOptions {
            program: options.program,
            max_context,
            max_step_tokens: limits.max_batched_tokens,
            max_seqs: limits.max_running,
            max_logits: limits.max_running,
            n_blocks,
            n_fast,
            slow_cache_bytes: cache_bytes,
        };
        let kv_bytes_per_token = latent_bytes + index_bytes;
        let block_bytes = u32::try_from(kv_bytes_per_token * u64::from(BLOCK_TOKENS));
        let block_bytes = block_bytes.map_err(|_| "its KV rows are too long".to_owned())?;
        let images = ImageShape { fingerprint: program.fingerprint(), block_bytes };
        let vocabulary = model.vocabulary_fingerprint();
        let grammars = Compiler::default();
        let served =
            ServedModel { model, max_context, kv_bytes_per_token, top_k, created, vocabulary, images, grammars };
        let mut secret = [0; 32];
        getrandom::fill(&mut secret).map_err(|error| format!("no random numbers: {error}"))?;
        let mut scheduler = Scheduler::new(limits, Pool::with_slow_tier(n_blocks, n_fast), PrefixHasher::new(secret));
        scheduler.weigh(Footprint {
            block_bytes: need.block_bytes(),
            latent_bytes: latent_bytes * u64::from(BLOCK_TOKENS),
            least_fast: least_fast(limits).min(n_fast),
            pool_bytes: need.bytes_of(&room),
        });
        let stats = Stats { load: scheduler.load(), ..Stats::default() };
        Ok(Self {
            served: Arc::new(served),
            program,
            load,
            device: None,
            scheduler,
            batch: Batch::default(),
            orders: orders(images),
            slow_dir: slow_tier.map(|tier| tier.dir.clone()),
            stats,
        })
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
        self.scheduler.requeue_on(Pool::with_slow_tier(device.n_blocks(), self.load.n_fast));
        self.device = Some(device);
    }

    /// Lets go of a device that is lost.
    pub(crate) fn detach(&mut self) {
        self.device = None;
        self.scheduler.requeue();
    }

    /// One step, if there is a device and something to do.
    pub(crate) fn turn(
        &mut self,
        conduct: &mut Conduct,
        clock: &dyn Fn() -> Duration,
    ) -> Result<Option<Done>, ExecutorError> {
        let Some(device) = &mut self.device else { return Ok(None) };
        let vocabulary = vocabulary(&self.served);
        let mut watched = Watched { device, conduct, clock };
        let done = step(&mut self.scheduler, &mut watched, &mut self.orders, &mut self.batch, vocabulary, clock)?;
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

/// Most tokens of a sequence that the configuration wants.
fn wanted_context(slot: &Slot, model: &Model, options: &ModelOptions) -> u32 {
    let trained = model.spec().context_length;
    let wanted = options.max_context.unwrap_or(trained);
    if wanted > trained {
        log::warn!(model:% = slot.name, max_context = wanted, trained; "longer than the model was trained for");
    }
    wanted
}

/// What fits the memory there is.
fn room(slot: &Slot, need: &Need, budget: u64, limits: Limits, slow: Option<&SlowTier>) -> Result<Room, String> {
    let room = match slow {
        Some(tier) => need.with_slow_tier(budget, limits, tier.hot_share)?,
        None => need.without_slow_tier(budget, limits),
    };
    let Room { max_context, n_blocks, n_fast, .. } = room;
    if n_blocks < 2 {
        let needed = 2 * need.block_bytes();
        return Err(format!("{budget} bytes are left for its KV cache, {needed} are the least; raise memory.budget"));
    }
    if max_context < need.context {
        log::warn!(model:% = slot.name, max_context, wanted = need.context; "memory.budget holds a shorter context");
    }
    log::info!(model:% = slot.name, max_context, kv_blocks = n_blocks, fast_blocks = n_fast; "model open");
    Ok(room)
}
