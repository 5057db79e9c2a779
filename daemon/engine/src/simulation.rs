//! How does the engine behave where nothing is real? One model's scheduler, its sessions and the way to its slow tier,
//! turned by hand: what the daemon leaves to three threads and a clock is a call here, and a caller decides whose turn
//! it is. So a seed is a run. The code that is turned is the daemon's own; only the loops around it are not.
//!
//! Behind the feature `simulation`, which the product does not have: what is here is no interface.

mod device;

pub use device::{Device, DeviceFault, StepView};

use crate::api::{Failure, Generate, Owner, Sink, Turn};
use crate::batch::Batch;
use crate::executor::ExecutorError;
use crate::ladder::{Conduct, Recovery};
use crate::memory::Outlook;
use crate::orders::{Links, Orders, SlowWrite, SlowWriter};
use crate::room::least_fast;
use crate::sampler::Sampler;
use crate::scheduler::{Footprint, Limits, Load, Scheduler};
use crate::sequence::{Sequence, SequenceId, Vocabulary};
use crate::service::Command;
use crate::sessions::{Ask, Asks, Clocks, CutTurn, Keeper};
use crate::step::step;
use crate::{Change, Sampling, SessionId, SessionSummary};
use device::Watched;
use sparsed_kv::{Pool, PrefixHasher};
use sparsed_session::{AnyDisk, History, ImageShape, NewSession, NewTurn, Outcome, Settings, Store, StoreError};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::Duration;

/// Commands on their way to the engine: far more than there ever are, since nobody could wait.
const INBOX: usize = 1 << 16;

/// What a daemon is made with.
#[derive(Clone, Copy, Debug)]
pub struct Setup {
    /// Of the scheduler.
    pub limits: Limits,
    /// Blocks of the pool.
    pub n_blocks: u32,
    /// Of them, those that may be in fast memory.
    pub n_fast: u32,
    /// Tokens of a sequence.
    pub max_context: u32,
    /// Keys the names of blocks.
    pub secret: [u8; 32],
    /// Bytes of a block's image, half of them latent rows.
    pub block_bytes: u32,
    /// Bytes of the cache of rows in the slow tier: all of them, and those that a step cannot do without.
    pub cache_bytes: [u64; 2],
}

/// A daemon's engine, sessions thread and slow writer, none of which runs by itself.
pub struct Machine {
    scheduler: Scheduler,
    batch: Batch,
    orders: Orders,
    conduct: Conduct,
    max_context: u32,
    n_sequences: u64,
    inbox: SyncSender<Command>,
    commands: Receiver<Command>,
    writes: Receiver<SlowWrite>,
    keeper: Keeper,
    asks: Asks,
    asked: Receiver<Ask>,
    shape: ImageShape,
}

impl std::fmt::Debug for Machine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Machine").field("load", &self.load()).finish_non_exhaustive()
    }
}

impl Machine {
    /// A daemon that has just been started; `date` tells seconds since 1970, `uptime` those since some start.
    pub fn new(
        setup: &Setup,
        recovery: &Recovery,
        store: Store<AnyDisk>,
        date: impl Fn() -> u64 + Send + 'static,
        uptime: impl Fn() -> Duration + Send + 'static,
    ) -> Self {
        let (inbox, commands) = sync_channel(INBOX);
        let (writer, writes) = SlowWriter::new();
        let (asks, asked) = Asks::new();
        let clocks = Clocks { date: Box::new(date), uptime: Box::new(uptime) };
        let keeper = Keeper::new(store, asks.clone(), inbox.clone(), clocks);
        let shape = ImageShape { fingerprint: [5; 32], block_bytes: setup.block_bytes };
        let orders = Links { asks: Some(asks.clone()), writer }.orders(0, shape);
        let pool = Pool::with_slow_tier(setup.n_blocks, setup.n_fast);
        let mut conduct = Conduct::new(recovery);
        conduct.begin(false);
        let mut scheduler = Scheduler::new(setup.limits, pool, PrefixHasher::new(setup.secret));
        let block_bytes = u64::from(setup.block_bytes);
        let [cache_bytes, least_cache_bytes] = setup.cache_bytes;
        scheduler.weigh(Footprint {
            block_bytes,
            latent_bytes: block_bytes / 2,
            least_fast: least_fast(setup.limits).min(setup.n_fast),
            pool_bytes: u64::from(setup.n_blocks) * block_bytes + cache_bytes,
            cache_bytes,
            least_cache_bytes,
        });
        Self {
            scheduler,
            batch: Batch::default(),
            orders,
            conduct,
            max_context: setup.max_context,
            n_sequences: 0,
            inbox,
            commands,
            writes,
            keeper,
            asks,
            asked,
            shape,
        }
    }

    /// Takes a request, as [`Service::generate`](crate::Service::generate) does once it has checked it.
    pub fn generate(&mut self, mut request: Generate, mut sink: Box<dyn Sink>) {
        if let Some(recorder) = request.turn.as_mut().and_then(|turn| turn.recorder.take()) {
            sink = recorder.record(sink);
        }
        self.tell(Command::Generate { slot: 0, request: Box::new(request), sink });
    }

    fn tell(&self, command: Command) {
        self.inbox.try_send(command).expect("the other end is here, and the inbox is larger than all that may wait");
    }

    /// The engine thread takes what has come and does a step on `device`, or only looks at its listeners without one.
    /// Answers whether there was a step.
    ///
    /// # Errors
    /// The device is lost: [`Machine::lose`] is to follow.
    pub fn step(&mut self, device: Option<&mut dyn Device>, now: Duration) -> Result<bool, ExecutorError> {
        let vocabulary = Vocabulary { tokenizer: None, max_context: self.max_context };
        for command in self.commands.try_iter() {
            match command {
                Command::Generate { request, sink, .. } => {
                    let sequence = Sequence::new(SequenceId(self.n_sequences), *request, sink, now);
                    self.n_sequences += 1;
                    self.scheduler.submit(sequence, vocabulary, now);
                }
                Command::Written { .. } => self.scheduler.written(),
                Command::Demoted { demoted, .. } => self.scheduler.demoted(demoted),
                Command::Restored { restored, .. } => self.scheduler.arrived(restored),
                Command::Opened { .. } | Command::Look | Command::Drain | Command::Stop => {}
            }
        }
        let Some(device) = device else {
            self.scheduler.tend(now);
            return Ok(false);
        };
        let mut watched = Watched { device, conduct: &mut self.conduct, now };
        let clock = || now;
        let done = step(&mut self.scheduler, &mut watched, &mut self.orders, &mut self.batch, vocabulary, &clock)?;
        Ok(done.is_some())
    }

    /// Somebody has looked at the memory.
    pub fn look(&mut self, outlook: Outlook, now: Duration) {
        self.scheduler.look(outlook, now);
    }

    /// The device is lost.
    pub fn lose(&mut self) {
        self.scheduler.requeue();
    }

    /// There is a new device, with so many blocks.
    pub fn attach(&mut self, n_blocks: u32, n_fast: u32) {
        self.conduct.begin(false);
        self.scheduler.requeue_on(Pool::with_slow_tier(n_blocks, n_fast));
    }

    /// The sessions thread turns once, and does at most `n_max` of the things that were asked of it.
    pub fn sessions_turn(&mut self, n_max: usize) {
        self.keeper.round(&self.asked, n_max);
    }

    /// Whether sessions were found that are past their retention: one of them goes in each turn.
    pub fn is_expiring(&self) -> bool {
        self.keeper.is_expiring()
    }

    /// The slow tier's thread writes a block; answers whether there was one.
    pub fn slow_turn(&mut self) -> bool {
        let Ok(write) = self.writes.try_recv() else { return false };
        if let Some(command) = write.carry_out() {
            self.tell(command);
        }
        true
    }

    /// As [`Machine::slow_turn`], but the block is not written, and nobody hears of it: a mistake to be found.
    pub fn forget_slow_write(&mut self) -> bool {
        self.writes.try_recv().is_ok()
    }

    /// The daemon is told to end: who is still answered hears it, and sessions are written.
    pub fn shut_down(&mut self, now: Duration) {
        self.scheduler.fail_all(&Failure::ShuttingDown, now);
        self.keeper.round(&self.asked, usize::MAX);
        self.keeper.finish();
    }

    /// As the scheduler says.
    pub fn load(&self) -> Load {
        self.scheduler.load()
    }

    /// Whether nobody waits for an answer, and no block for its file.
    pub fn is_at_rest(&self) -> bool {
        self.scheduler.is_idle() && self.scheduler.is_saved()
    }

    /// Whether each block has exactly the holders that are known.
    ///
    /// # Errors
    /// The first that has not.
    pub fn audit(&self) -> Result<(), String> {
        self.scheduler.audit()
    }

    /// Makes a session.
    ///
    /// # Errors
    /// The store's.
    pub fn create(&mut self, owner: Owner, settings: Settings) -> Result<SessionId, StoreError> {
        self.verb(move |keeper| {
            let settings = Some(settings);
            let new = NewSession { model: "m", fingerprint: [9; 32], title: "", settings, pinned: false };
            keeper.create(owner.number(), &new)
        })
    }

    /// As [`Sessions::fork`](crate::Sessions::fork).
    ///
    /// # Errors
    /// The store's.
    pub fn fork(&mut self, owner: Owner, id: SessionId, n_turns: u32) -> Result<SessionId, StoreError> {
        self.verb(move |keeper| keeper.fork(owner.number(), id, Some(n_turns)))
    }

    /// As [`Sessions::truncate`](crate::Sessions::truncate).
    ///
    /// # Errors
    /// The store's, or that it is being answered.
    pub fn truncate(&mut self, owner: Owner, id: SessionId, n_turns: u32) -> Result<(), Failure> {
        self.verb(move |keeper| keeper.truncate(owner.number(), id, n_turns).map(drop))
    }

    /// As [`Sessions::change`](crate::Sessions::change), of whether the session is pinned.
    ///
    /// # Errors
    /// The store's.
    pub fn pin(&mut self, owner: Owner, id: SessionId, pinned: bool) -> Result<(), StoreError> {
        let change = Change { pinned: Some(pinned), ..Change::default() };
        self.verb(move |keeper| keeper.change(owner.number(), id, &change).map(drop))
    }

    /// As [`Sessions::export`](crate::Sessions::export).
    ///
    /// # Errors
    /// The store's.
    pub fn export(&mut self, owner: Owner, id: SessionId) -> Result<Vec<u8>, StoreError> {
        self.verb(move |keeper| keeper.export(owner.number(), id))
    }

    /// As [`Sessions::import`](crate::Sessions::import).
    ///
    /// # Errors
    /// The store's.
    pub fn import(&mut self, owner: Owner, file: Vec<u8>) -> Result<SessionId, StoreError> {
        self.verb(move |keeper| keeper.import(owner.number(), &file))
    }

    /// As [`Sessions::delete`](crate::Sessions::delete).
    ///
    /// # Errors
    /// The store's, or that it is being answered.
    pub fn delete(&mut self, owner: Owner, id: SessionId) -> Result<(), Failure> {
        self.verb(move |keeper| keeper.delete(owner.number(), id))
    }

    /// Takes a session and journals a turn: the first `n_kept` of its tokens, `new` ones, and `request` for whoever
    /// goes on with it.
    ///
    /// # Errors
    /// The store's, or that it is being answered.
    pub fn begin(
        &mut self,
        owner: Owner,
        id: SessionId,
        n_kept: u32,
        new: Vec<u32>,
        request: Vec<u8>,
    ) -> Result<Turn, Failure> {
        let shape = self.shape;
        self.verb(move |keeper| {
            let turn = NewTurn { keep_tokens: n_kept, prompt: &new, request: &request, sampling: &[] };
            taken(keeper, owner, id, |keeper| keeper.begin(owner.number(), id, &shape, &turn))
        })
    }

    /// Takes a session and goes on with its last turn, which was cut; answers its prompt and `request` as well.
    ///
    /// # Errors
    /// The store's, that it is being answered, or that nothing was cut.
    pub fn resume(&mut self, owner: Owner, id: SessionId) -> Result<(Vec<u32>, Vec<u8>, Turn), Failure> {
        let shape = self.shape;
        self.verb(move |keeper| {
            taken(keeper, owner, id, |keeper| {
                let history = keeper.history(owner.number(), id)?;
                let last = history.turns.last().filter(|turn| turn.end_token as usize == history.tokens.len());
                let cut = last.filter(|turn| !matches!(turn.outcome, Some(Outcome::Complete | Outcome::Failed)));
                let none = || Failure::SessionBusy { id: id.to_string(), state: "idle" };
                let turn = cut.ok_or_else(none)?;
                let (prompt, answered) = history.tokens.split_at(turn.prompt_end as usize);
                let cut = CutTurn {
                    n_prompt: turn.prompt_end,
                    answered: answered.to_vec(),
                    said: turn.answer.clone(),
                    is_cancelled: turn.outcome == Some(Outcome::Cancelled),
                };
                let (prompt, request) = (prompt.to_vec(), turn.request.clone());
                Ok((prompt, request, keeper.resume(owner.number(), id, &shape, cut)?))
            })
        })
    }

    /// Whether nobody has the session for itself.
    pub fn is_free(&mut self, id: SessionId) -> bool {
        self.verb(move |keeper| keeper.check_free(id).is_ok())
    }

    /// What the store says of a session.
    ///
    /// # Errors
    /// The store's.
    pub fn history(&mut self, owner: Owner, id: SessionId) -> Result<History, Failure> {
        self.verb(move |keeper| keeper.history(owner.number(), id))
    }

    /// What the store says of all sessions of `owner`: their names and histories.
    ///
    /// # Errors
    /// The store's.
    pub fn histories(&mut self, owner: Owner) -> Result<Vec<(SessionId, History)>, Failure> {
        self.verb(move |keeper| keeper.histories(owner.number()))
    }

    /// What lists show of the sessions of `owner`.
    pub fn summaries(&mut self, owner: Owner) -> Vec<SessionSummary> {
        self.verb(move |keeper| keeper.summaries(owner.number()))
    }

    /// Has the sessions thread carry out a verb, after all that was asked of it before.
    fn verb<T: Send + 'static>(&mut self, verb: impl FnOnce(&mut Keeper) -> T + Send + 'static) -> T {
        let (answer, answered) = sync_channel(1);
        self.asks.tell(Ask::Do(Box::new(move |keeper| {
            assert!(answer.try_send(verb(keeper)).is_ok(), "the other end waits");
        })));
        self.keeper.round(&self.asked, usize::MAX);
        answered.try_recv().expect("a round does all that was asked")
    }
}

/// As `Sessions::open`: has a session for itself, unless nothing comes of it.
fn taken<T>(
    keeper: &mut Keeper,
    owner: Owner,
    id: SessionId,
    begin: impl FnOnce(&mut Keeper) -> Result<T, Failure>,
) -> Result<T, Failure> {
    keeper.take_session(owner.number(), id)?;
    begin(keeper).inspect_err(|_| keeper.let_go(owner.number(), id))
}

/// What a model answers that has all its context to itself: `logits` of everything so far, sampled.
///
/// # Panics
/// When nothing can be sampled from its logits.
pub fn naive_answer(
    prompt: &[u32],
    sampling: Sampling,
    n_tokens: usize,
    logits: impl Fn(&[u32]) -> Vec<f32>,
) -> Vec<u32> {
    let (mut sampler, mut tokens) = (Sampler::new(sampling, None, prompt), prompt.to_vec());
    for _ in 0..n_tokens {
        tokens.push(sampler.next(&mut logits(&tokens)).expect("a token has a finite logit"));
    }
    tokens.split_off(prompt.len())
}
