//! What does the engine hold of one model? The file, its requests, and its place on the device while there is one.

use crate::api::Failure;
use crate::attempt::Watched;
use crate::batch::Batch;
use crate::durable::{Files, NoFiles};
use crate::executor::{DeviceModel, ExecutorError, LoadOptions};
use crate::grammar::Compiler;
use crate::ladder::Conduct;
use crate::scheduler::{Limits, Scheduler};
use crate::sequence::{Sequence, Vocabulary};
use crate::service::{ServedModel, Slot, Stats};
use crate::sessions::{Asks, ImagesOf};
use crate::step::{Done, step};
use sparsed_backend::Backend;
use sparsed_kv::{BLOCK_TOKENS, PrefixHasher, blocks_for};
use sparsed_model::{Model, Program, ProgramOptions, Selection};
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
    files: Box<dyn Files>,
    stats: Stats,
}

impl Lane {
    /// Opens the model's file; `created` is the time in seconds since 1970.
    pub(crate) fn open(slot: Arc<Slot>, options: &ModelOptions, limits: Limits, created: u64) -> Self {
        let mut lane = Self { slot, live: None };
        match Live::open(&lane.slot, options, limits, created) {
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
        DeviceModel::load_program(backend, Arc::clone(&live.program), live.load, &mut progress).map(Some)
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
    /// Where its sessions' images go, and come from.
    pub(crate) fn keep_images(&mut self, asks: &Asks, slot: usize) {
        self.files = Box::new(ImagesOf { asks: asks.clone(), slot, shape: self.served.images });
    }

    fn open(slot: &Slot, options: &ModelOptions, limits: Limits, created: u64) -> Result<Self, String> {
        let model = Model::open(&options.path).map_err(|error| error.to_string())?;
        let dense = options.program.selection == Selection::Dense;
        let kv = model.kv_bytes_per_token(&options.program.kv, dense).map_err(|error| error.to_string())?;
        let (max_context, n_blocks) = room(slot, &model, options, limits, kv)?;
        let load = LoadOptions {
            program: options.program,
            max_context,
            max_step_tokens: limits.max_batched_tokens,
            max_seqs: limits.max_running,
            max_logits: limits.max_running,
            n_blocks,
        };
        let program = Arc::new(model.program(&options.program).map_err(|error| error.to_string())?);
        let (top_k, grammars) = (program.top_k(), Compiler::default());
        let block_bytes =
            u32::try_from(kv * u64::from(BLOCK_TOKENS)).map_err(|_| "its KV rows are too long".to_owned())?;
        let images = ImageShape { fingerprint: program.fingerprint(), block_bytes };
        let vocabulary = model.vocabulary_fingerprint();
        let served =
            ServedModel { model, max_context, kv_bytes_per_token: kv, top_k, created, vocabulary, images, grammars };
        let served = Arc::new(served);
        let mut secret = [0; 32];
        getrandom::fill(&mut secret).map_err(|error| format!("no random numbers: {error}"))?;
        let scheduler = Scheduler::new(limits, n_blocks, PrefixHasher::new(secret));
        let stats = Stats { load: scheduler.load(), ..Stats::default() };
        Ok(Self {
            served,
            program,
            load,
            device: None,
            scheduler,
            batch: Batch::default(),
            files: Box::new(NoFiles),
            stats,
        })
    }

    /// Goes on with `device`, whose KV pool is empty: what ran waits until its rows are computed again.
    pub(crate) fn attach(&mut self, device: DeviceModel) {
        self.scheduler.requeue();
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
        let done = step(&mut self.scheduler, &mut watched, self.files.as_mut(), &mut self.batch, vocabulary, clock)?;
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
        self.stats
    }
}

fn vocabulary(served: &ServedModel) -> Vocabulary<'_> {
    Vocabulary { tokenizer: served.model.tokenizer(), max_context: served.max_context }
}

/// Tokens of the longest sequence, and blocks of the pool, that fit the memory there is.
fn room(
    slot: &Slot,
    model: &Model,
    options: &ModelOptions,
    limits: Limits,
    kv_bytes_per_token: u64,
) -> Result<(u32, u32), String> {
    let trained = model.spec().context_length;
    let wanted = options.max_context.unwrap_or(trained);
    if wanted > trained {
        log::warn!(model:% = slot.name, max_context = wanted, trained; "longer than the model was trained for");
    }
    let room = options.kv_bytes / (kv_bytes_per_token * u64::from(BLOCK_TOKENS)).max(1);
    let all = u64::from(limits.max_running) * u64::from(blocks_for(wanted));
    let n_blocks = u32::try_from(room.min(all)).unwrap_or(u32::MAX).min(u32::MAX / BLOCK_TOKENS);
    if n_blocks < 2 {
        let needed = 2 * kv_bytes_per_token * u64::from(BLOCK_TOKENS);
        return Err(format!(
            "{} bytes are left for its KV cache, {needed} are the least; raise memory.budget",
            options.kv_bytes
        ));
    }
    let max_context = wanted.min(n_blocks * BLOCK_TOKENS);
    if max_context < wanted {
        log::warn!(model:% = slot.name, max_context, wanted; "memory.budget holds a shorter context");
    }
    log::info!(model:% = slot.name, max_context, kv_blocks = n_blocks; "model open");
    Ok((max_context, n_blocks))
}
