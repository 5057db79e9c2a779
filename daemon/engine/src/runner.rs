//! Where does the engine live? On one thread per device, which owns the device, its models and their KV pools.
//!
//! The thread loads the configured models one after another, then turns: take requests from the inbox, give each model
//! one step. With nothing to do it blocks in the inbox, so an idle engine uses no CPU.
#![expect(clippy::disallowed_methods, reason = "the one place of this crate that knows the time")]

use crate::api::Failure;
use crate::batch::Batch;
use crate::executor::{DeviceModel, ExecutorError, LoadOptions};
use crate::grammar::Compiler;
use crate::scheduler::{Limits, Scheduler};
use crate::sequence::{Sequence, SequenceId, Vocabulary};
use crate::service::{Command, ServedModel, Service, Slot, Stats};
use crate::step::step;
use sparsed_backend::Backend;
use sparsed_kv::{BLOCK_TOKENS, PrefixHasher, blocks_for};
use sparsed_model::{Model, ProgramOptions, Selection};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, RecvTimeoutError, TryRecvError, sync_channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Requests on their way to the engine thread.
const INBOX: u32 = 256;
/// Pause between looks at listeners that do not read, when nothing else is to do.
const PARKED_PAUSE: Duration = Duration::from_millis(10);

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

/// Starts the engine thread on `backend`. The service answers at once; models appear in it as they are loaded. The
/// thread ends when it is told to, or when none of the models can be served.
///
/// # Errors
/// When no thread can be started.
pub fn start(
    backend: Backend,
    models: Vec<ModelOptions>,
    limits: Limits,
) -> std::io::Result<(Service, JoinHandle<()>)> {
    let slots: Vec<_> = models.iter().map(|options| Arc::new(Slot::new(options.name.clone()))).collect();
    let (sender, inbox) = sync_channel(INBOX as usize);
    let service = Service::new(slots.clone(), sender, INBOX);
    let watched = service.clone();
    let run = move || {
        let mut lanes = Vec::new();
        for (slot, options) in slots.into_iter().zip(models) {
            if watched.is_stopping() {
                return;
            }
            lanes.push(Lane::load(&backend, slot, &options, limits));
        }
        // Requests would wait for the models that are still to be loaded, so none is called ready before.
        lanes.iter().for_each(Lane::announce);
        drop(watched);
        if lanes.iter().all(|lane| lane.live.is_none()) {
            return; // nothing to serve: whoever waits for the thread says why
        }
        Engine { lanes, inbox, epoch: Instant::now(), n_sequences: 0, draining: false }.run();
    };
    let thread = std::thread::Builder::new().name("engine".to_owned()).spawn(run)?;
    Ok((service, thread))
}

/// One model with its scheduler.
struct Lane {
    slot: Arc<Slot>,
    /// `None` when the model could not be loaded or its device was lost.
    live: Option<Live>,
}

struct Live {
    served: Arc<ServedModel>,
    device: DeviceModel,
    scheduler: Scheduler,
    batch: Batch,
    stats: Stats,
}

struct Engine {
    lanes: Vec<Lane>,
    inbox: Receiver<Command>,
    epoch: Instant,
    n_sequences: u64,
    draining: bool,
}

impl Lane {
    fn load(backend: &Backend, slot: Arc<Slot>, options: &ModelOptions, limits: Limits) -> Self {
        let began = Instant::now();
        let loaded = Live::load(backend, &slot, options, limits);
        let live = match loaded {
            Ok(live) => {
                let took_ms = u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX);
                let (context, blocks) = (live.served.max_context, live.device.n_blocks());
                log::info!(model:% = slot.name, took_ms, max_context = context, kv_blocks = blocks; "model ready");
                slot.set_stats(live.stats);
                Some(live)
            }
            Err(reason) => {
                log::error!(model:% = slot.name, reason:%; "model not served");
                slot.outcome.set(Err(reason)).expect("a model is loaded once");
                None
            }
        };
        Self { slot, live }
    }

    /// Lets requests come.
    fn announce(&self) {
        if let Some(live) = &self.live {
            self.slot.outcome.set(Ok(Arc::clone(&live.served))).expect("a model is loaded once");
        }
    }

    /// Takes the model out of service: its device is of no more use.
    fn lose(&mut self, error: &ExecutorError, now: Duration) {
        log::error!(model:% = self.slot.name, reason:% = error; "device lost, model not served any more");
        if let Some(mut live) = self.live.take() {
            live.scheduler.fail_all(&Failure::BackendFailed { reason: error.to_string() }, now);
        }
        self.slot.lost.set(error.to_string()).expect("a live model is lost once");
    }
}

impl Live {
    fn load(backend: &Backend, slot: &Slot, options: &ModelOptions, limits: Limits) -> Result<Self, String> {
        let model = Model::open(&options.path).map_err(|error| error.to_string())?;
        let dense = options.program.selection == Selection::Dense;
        let kv = model.kv_bytes_per_token(&options.program.kv, dense).map_err(|error| error.to_string())?;
        let trained = model.spec().context_length;
        let wanted = options.max_context.unwrap_or(trained);
        if wanted > trained {
            log::warn!(model:% = slot.name, max_context = wanted, trained; "longer than the model was trained for");
        }
        let room = options.kv_bytes / (kv * u64::from(BLOCK_TOKENS)).max(1);
        let all = u64::from(limits.max_running) * u64::from(blocks_for(wanted));
        let n_blocks = u32::try_from(room.min(all)).unwrap_or(u32::MAX).min(u32::MAX / BLOCK_TOKENS);
        if n_blocks < 2 {
            let needed = 2 * kv * u64::from(BLOCK_TOKENS);
            return Err(format!(
                "{} bytes are left for its KV cache, {needed} are the least; raise memory.budget",
                options.kv_bytes
            ));
        }
        let max_context = wanted.min(n_blocks * BLOCK_TOKENS);
        if max_context < wanted {
            log::warn!(model:% = slot.name, max_context, wanted; "memory.budget holds a shorter context");
        }
        let load = LoadOptions {
            program: options.program,
            max_context,
            max_step_tokens: limits.max_batched_tokens,
            max_seqs: limits.max_running,
            max_logits: limits.max_running,
            n_blocks,
        };
        let mut progress = |done: u64, total: u64| {
            slot.progress_permille.store(done * 1000 / total.max(1), Ordering::Relaxed);
        };
        let device = DeviceModel::load(backend, &model, load, &mut progress).map_err(|error| error.to_string())?;
        let created = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        let top_k = device.top_k();
        let grammars = Compiler::default();
        let served = ServedModel { model, max_context, kv_bytes_per_token: kv, top_k, created, grammars };
        let served = Arc::new(served);
        let mut secret = [0; 32];
        getrandom::fill(&mut secret).map_err(|error| format!("no random numbers: {error}"))?;
        let scheduler = Scheduler::new(limits, n_blocks, PrefixHasher::new(secret));
        let stats = Stats { load: scheduler.load(), ..Stats::default() };
        Ok(Self { served, device, scheduler, batch: Batch::default(), stats })
    }

    /// One step, if there is something to do.
    fn turn(&mut self, clock: &dyn Fn() -> Duration) -> Result<(), ExecutorError> {
        let model = &self.served.model;
        let vocabulary = Vocabulary { tokenizer: model.tokenizer(), max_context: self.served.max_context };
        let done = step(&mut self.scheduler, &mut self.device, &mut self.batch, vocabulary, clock)?;
        if let Some(done) = done {
            self.stats.steps += 1;
            self.stats.computed_tokens += done.computed as u64;
            self.stats.sampled_tokens += done.sampled as u64;
        }
        self.stats.load = self.scheduler.load();
        Ok(())
    }
}

impl Engine {
    fn run(mut self) {
        loop {
            if !self.take_requests() {
                break;
            }
            let epoch = self.epoch;
            let clock = move || epoch.elapsed();
            for lane in &mut self.lanes {
                let Some(live) = &mut lane.live else { continue };
                match live.turn(&clock) {
                    Ok(()) => lane.slot.set_stats(live.stats),
                    Err(error) => lane.lose(&error, clock()),
                }
            }
            if self.lanes.iter().all(|lane| lane.live.is_none()) {
                return; // every device is lost: a restart is all that helps
            }
        }
        let now = self.epoch.elapsed();
        for live in self.lanes.iter_mut().filter_map(|lane| lane.live.as_mut()) {
            live.scheduler.fail_all(&Failure::ShuttingDown, now);
        }
    }

    /// Empties the inbox, waiting in it while there is nothing to run. Answers false when the engine is to end.
    fn take_requests(&mut self) -> bool {
        loop {
            let idle = self.lives().all(|live| live.scheduler.is_idle());
            let busy = self.lives().any(|live| live.scheduler.has_work());
            if idle && self.draining {
                return false;
            }
            let received = if busy {
                self.inbox.try_recv()
            } else if idle {
                self.inbox.recv().map_err(|_| TryRecvError::Disconnected)
            } else {
                self.inbox.recv_timeout(PARKED_PAUSE).map_err(|error| match error {
                    RecvTimeoutError::Timeout => TryRecvError::Empty,
                    RecvTimeoutError::Disconnected => TryRecvError::Disconnected,
                })
            };
            match received {
                Ok(Command::Generate { slot, request, sink }) => {
                    let now = self.epoch.elapsed();
                    let sequence = Sequence::new(SequenceId(self.n_sequences), *request, sink, now);
                    self.n_sequences += 1;
                    self.submit(slot, sequence, now);
                }
                Ok(Command::Drain) => self.draining = true,
                // Without a service nobody can ask any more.
                Ok(Command::Stop) | Err(TryRecvError::Disconnected) => return false,
                Err(TryRecvError::Empty) => return true,
            }
        }
    }

    fn submit(&mut self, slot: usize, mut sequence: Sequence, now: Duration) {
        let lane = &mut self.lanes[slot];
        if let Some(live) = &mut lane.live {
            live.scheduler.submit(sequence, now);
            return;
        }
        let reason = lane.slot.lost.get().cloned().unwrap_or_default();
        sequence.fail(Failure::ModelUnavailable { name: lane.slot.name.clone(), reason });
        // The service lets no request pass to a model that is not loaded: this one was under way when it was lost.
        let _ignored = sequence.deliver(now);
    }

    fn lives(&self) -> impl Iterator<Item = &Live> {
        self.lanes.iter().filter_map(|lane| lane.live.as_ref())
    }
}
