//! What do tests of the engine run on? A "model" that reads its whole history back, listeners with room for so many
//! events, and a scheduler between them.

mod disk;
mod paged;

pub(crate) use disk::{SmallDisk, Whims};
pub(crate) use paged::{Paged, next_token};

use crate::api::{Event, Generate, Owner, Refused, Sink};
use crate::batch::Batch;
use crate::device::DeviceStatus;
use crate::durable::{Files, Restore, Restored};
use crate::executor::ExecutorError;
use crate::progress::Progress;
use crate::residence::Residence;
use crate::scheduler::{Limits, Scheduler};
use crate::sequence::{Sequence, SequenceId, Vocabulary};
use crate::service::{Command, Service, Shared, Slot};
use crate::step::{Done, step};
use crate::tenants::Tenants;
use crate::warm::{Demoted, ReclaimJob, WriteJob};
use crate::{Grammar, Sampling, api, params};
use sparsed_kv::{BLOCK_TOKENS, FileId, Pool, PrefixHasher, Save};
use std::cell::Cell;
use std::collections::{HashMap, VecDeque};
use std::sync::atomic::AtomicBool;
use std::sync::mpsc::{Receiver, sync_channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

pub(crate) const VOCAB: usize = 97;
pub(crate) const BLOCK: usize = BLOCK_TOKENS as usize;
pub(crate) const CONTEXT: u32 = 400;
pub(crate) const VOCABULARY: Vocabulary<'static> = Vocabulary { tokenizer: None, max_context: CONTEXT };

/// What a test's listener has heard, and how much more it takes.
#[derive(Clone, Default)]
pub(crate) struct Listener(Arc<Mutex<(Vec<Event>, usize, bool)>>);

impl Listener {
    pub(crate) fn with_room(room: usize) -> Self {
        Self(Arc::new(Mutex::new((Vec::new(), room, false))))
    }

    pub(crate) fn set(&self, room: usize, gone: bool) {
        let mut state = self.0.lock().unwrap();
        (state.1, state.2) = (room, gone);
    }

    /// Tokens that were chosen, as a session's turn hears of them.
    pub(crate) fn sampled(&self) -> Vec<u32> {
        let events = &self.0.lock().unwrap().0;
        let token = |event: &Event| if let Event::Sampled { token } = event { Some(*token) } else { None };
        events.iter().filter_map(token).collect()
    }

    /// How far its request was, as it has heard.
    pub(crate) fn progress(&self) -> Vec<api::Progress> {
        let events = &self.0.lock().unwrap().0;
        let told = |event: &Event| if let Event::Progress(progress) = event { Some(*progress) } else { None };
        events.iter().filter_map(told).collect()
    }

    pub(crate) fn heard(&self) -> (Vec<u32>, Option<Event>) {
        let events = self.0.lock().unwrap().0.clone();
        let tokens = events.iter().filter_map(|event| match event {
            Event::Delta { tokens, .. } => Some(tokens.clone()),
            _ => None,
        });
        let end = events.iter().find(|event| matches!(event, Event::Finished(_) | Event::Failed(_))).cloned();
        (tokens.flatten().collect(), end)
    }
}

impl Sink for Listener {
    fn offer(&mut self, event: Event) -> Result<(), Refused> {
        let mut state = self.0.lock().unwrap();
        match *state {
            (_, _, true) => Err(Refused::Closed),
            (_, 0, _) => Err(Refused::Full(event)),
            _ => {
                state.1 -= 1;
                state.0.push(event);
                Ok(())
            }
        }
    }

    fn is_closed(&self) -> bool {
        self.0.lock().unwrap().2
    }
}

/// Sessions' files in memory. Answers come before the next step but `delay`.
#[derive(Default)]
pub(crate) struct Shelf {
    pub(crate) images: HashMap<(FileId, u32), Vec<u8>>,
    pub(crate) delay: usize,
    /// Writes to the slow tier that will fail from this one on.
    pub(crate) writes_left: Option<usize>,
    /// What was given to be used again.
    pub(crate) spare: Vec<Vec<u8>>,
    /// Blocks of each order to read, and the images whose memory it was given.
    pub(crate) windows: Vec<(u32, usize)>,
    orders: VecDeque<(usize, Answer)>,
    n_answered: usize,
}

/// What the shelf has to say.
enum Answer {
    Written,
    Restored(Restore),
    Demoted(Demoted),
}

impl Files for Shelf {
    fn save(&mut self, save: Save, image: Vec<u8>) {
        self.images.insert((save.file, save.index), image);
        self.orders.push_back((self.n_answered + self.delay, Answer::Written));
    }

    fn restore(&mut self, restore: Restore) {
        self.windows.push((restore.n, std::mem::take(&mut self.spare).len()));
        self.orders.push_back((self.n_answered + self.delay, Answer::Restored(restore)));
    }

    fn recycle(&mut self, images: Vec<Vec<u8>>) {
        self.spare = images;
    }

    fn write(&mut self, tag: u64, job: WriteJob) {
        let is_written = self.writes_left != Some(0) && job().is_ok();
        self.writes_left = self.writes_left.map(|n| n.saturating_sub(1));
        self.orders.push_back((self.n_answered + self.delay, Answer::Demoted(Demoted { tag, is_written })));
    }

    fn reclaim(&mut self, job: ReclaimJob) {
        job().unwrap();
    }
}

impl Shelf {
    /// Answers what is due.
    pub(crate) fn answer(&mut self, scheduler: &mut Scheduler) {
        self.n_answered += 1;
        while self.orders.front().is_some_and(|(due, _)| *due < self.n_answered) {
            match self.orders.pop_front().unwrap().1 {
                Answer::Written => scheduler.written(),
                Answer::Demoted(demoted) => scheduler.demoted(demoted),
                Answer::Restored(restore) => {
                    let indices = restore.first..restore.first + restore.n;
                    let images = indices.map_while(|index| self.images.get(&(restore.file, index)).cloned()).collect();
                    scheduler.arrived(Restored { restore, images });
                }
            }
        }
    }
}

pub(crate) struct Bench {
    pub(crate) scheduler: Scheduler,
    pub(crate) executor: Paged,
    pub(crate) files: Shelf,
    pub(crate) batch: Batch,
    pub(crate) now: Cell<Duration>,
    pub(crate) submitted: u64,
}

impl Bench {
    pub(crate) fn new(n_blocks: u32, limits: Limits) -> Self {
        Self::with_slow_tier(n_blocks, n_blocks, limits)
    }

    pub(crate) fn with_slow_tier(n_blocks: u32, n_fast: u32, limits: Limits) -> Self {
        let hasher = PrefixHasher::new([7; 32]);
        let executor = Paged { patience: vec![false; 1000], ..Paged::default() };
        let scheduler = Scheduler::new(limits, Pool::with_slow_tier(n_blocks, n_fast), hasher);
        Self {
            scheduler,
            executor,
            files: Shelf::default(),
            batch: Batch::default(),
            now: Cell::default(),
            submitted: 0,
        }
    }

    pub(crate) fn submit(&mut self, prompt: Vec<u32>, max_tokens: u32, listener: &Listener) {
        self.submit_under(None, prompt, max_tokens, listener);
    }

    pub(crate) fn submit_under(
        &mut self,
        grammar: Option<Grammar>,
        prompt: Vec<u32>,
        max_tokens: u32,
        listener: &Listener,
    ) {
        self.submit_of(Owner::Uid(1000), grammar, prompt, max_tokens, listener);
    }

    pub(crate) fn submit_of(
        &mut self,
        owner: Owner,
        grammar: Option<Grammar>,
        prompt: Vec<u32>,
        max: u32,
        to: &Listener,
    ) {
        self.submit_request(request(owner, grammar, prompt, max), to);
    }

    pub(crate) fn submit_request(&mut self, request: Generate, to: &Listener) {
        let id = SequenceId(self.submitted);
        self.submitted += 1;
        let sequence = Sequence::new(id, request, Box::new(to.clone()), self.now.get());
        self.scheduler.submit(sequence, VOCABULARY, self.now.get());
    }

    pub(crate) fn step(&mut self) -> Option<Done> {
        self.try_step().unwrap()
    }

    pub(crate) fn try_step(&mut self) -> Result<Option<Done>, ExecutorError> {
        self.files.answer(&mut self.scheduler);
        let clock = || self.now.get();
        step(&mut self.scheduler, &mut self.executor, &mut self.files, &mut self.batch, VOCABULARY, &clock)
    }

    /// As `run`, on a new device whenever one is lost; answers how many were.
    pub(crate) fn run_on_devices(&mut self) -> usize {
        let mut n_lost = 0;
        for _ in 0..10_000 {
            match self.try_step() {
                Ok(None) if self.scheduler.is_idle() => return n_lost,
                Ok(_) => {}
                Err(_) => {
                    n_lost += 1;
                    self.executor.rows.clear();
                    self.executor.slow.clear();
                    self.executor.poisoned = false;
                    self.scheduler.requeue();
                }
            }
            self.now.set(self.now.get() + Duration::from_millis(1));
        }
        panic!("the engine does not come to rest");
    }

    pub(crate) fn steps(&mut self, n: usize) {
        for _ in 0..n {
            self.step();
        }
    }

    pub(crate) fn run(&mut self) {
        for _ in 0..10_000 {
            if self.step().is_none() && self.scheduler.is_idle() {
                return;
            }
            self.now.set(self.now.get() + Duration::from_millis(1));
        }
        panic!("the engine does not come to rest");
    }
}

pub(crate) fn request(owner: Owner, grammar: Option<Grammar>, prompt: Vec<u32>, max_tokens: u32) -> Generate {
    Generate {
        model: "m".to_owned(),
        owner,
        prompt,
        max_tokens: Some(max_tokens),
        sampling: Sampling { temperature: 0.0, ..Sampling::default() },
        grammar,
        stops: params::checked_stops(Vec::new()).unwrap(),
        ignore_end: false,
        reading: None,
        logprobs: None,
        progress: false,
        urgency: api::Urgency::default(),
        cache_salt: None,
        turn: None,
        one_call: false,
        lease: None,
    }
}

pub(crate) fn limits() -> Limits {
    Limits {
        max_running: 4,
        max_waiting: 8,
        max_batched_tokens: 48,
        slow_consumer: Duration::from_millis(50),
        slow_stateless: true,
        ..Limits::default()
    }
}

pub(crate) fn prompt(seed: u32, n: u32) -> Vec<u32> {
    (0..n).map(|i| (seed * 13 + i * 7) % VOCAB as u32).collect()
}

/// The answer of a model without batches, blocks or schedules.
pub(crate) fn naive(mut tokens: Vec<u32>, n: u32) -> Vec<u32> {
    let start = tokens.len();
    for _ in 0..n.min(CONTEXT - start as u32) {
        tokens.push(next_token(tokens.iter().copied()));
    }
    tokens.split_off(start)
}

/// A service of one model `m` without an engine, and what the engine would be told.
#[expect(clippy::disallowed_methods, reason = "a service begins to count somewhere; nothing depends on where")]
pub(crate) fn service_of(residence: Residence) -> (Service, Receiver<Command>) {
    let (inbox, commands) = sync_channel(512);
    let shared = Arc::new(Shared {
        stopping: AtomicBool::new(false),
        ending: AtomicBool::new(false),
        device: Mutex::new(DeviceStatus::new("test", None)),
        progress: Mutex::new(Progress::new(Duration::from_secs(60))),
        outlook: Mutex::default(),
        budget: Mutex::default(),
        limits: Mutex::new(limits()),
        epoch: Instant::now(),
        tenants: Arc::new(Tenants::new(limits().per_user_requests)),
    });
    let slots = vec![Arc::new(Slot::new("m".to_owned(), Vec::new(), residence))];
    (Service::new(slots, Vec::new(), inbox, 512, shared, None), commands)
}
