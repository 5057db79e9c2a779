//! Does a daemon keep all that its clients have heard, and say what it should, whatever fails?
//!
//! Engine, KV pool, row cache, slow tier, sessions thread and session store are the daemon's own; device, disks, clock,
//! randomness and clients are not. Every step is somebody's turn: the engine thread, the sessions thread, the thread
//! that writes into the slow tier, a client, a user of sessions, or fate.

use crate::age::Age;
use crate::check::failed_starts;
use crate::client::{Client, End};
use crate::device::{CACHE_ROW_BYTES, CACHE_ROWS_MAX, FakeDevice, IMAGE_BYTES, VOCAB};
use crate::disk::{FakeDisk, Faults, Plant};
use crate::model::Found;
use crate::outline::{DaemonOutline, Mistake};
use crate::run::{Checked, Violation, wrong};
use crate::start::{answer_of, closed, open};
use crate::talk::{Plain, Talk};
use fastrand::Rng;
use sparsed_engine::api::{Failure, Owner};
use sparsed_engine::simulation::{Device, Machine, Setup};
use sparsed_engine::{Limits, SessionId};
use sparsed_kv::BLOCK_TOKENS;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;
use std::time::Duration;

pub(crate) const OWNERS: [Owner; 2] = [Owner::Uid(1000), Owner::Uid(1001)];
/// Tokens of a sequence; seven blocks.
pub(crate) const CONTEXT: u32 = 400;
const REQUESTS_MAX: usize = 6;

/// Makes `n_steps` steps.
///
/// # Errors
/// The first thing that a daemon must not do.
pub fn run_daemon(seed: u64, n_steps: u64, mistake: Mistake) -> Result<DaemonOutline, Violation> {
    let mut world = World::new(seed, mistake);
    for step in 0..n_steps {
        world.step().map_err(|Violation(what)| Violation(format!("seed {seed}, step {step}: {what}")))?;
    }
    world.rest().map_err(|Violation(what)| Violation(format!("seed {seed}, at the end: {what}")))?;
    world.drop_device();
    world.outline.steps = n_steps;
    world.outline.digest = world.log.finish() ^ world.disk.digest();
    Ok(world.outline)
}

/// A session's turn that is being answered.
pub(crate) struct Live {
    pub(crate) client: Client,
    pub(crate) is_resumed: bool,
}

pub(crate) struct World {
    pub(crate) rng: Rng,
    pub(crate) disk: FakeDisk,
    pub(crate) machine: Machine,
    pub(crate) device: Option<FakeDevice>,
    pub(crate) setup: Setup,
    pub(crate) now: Duration,
    /// Until then the sessions thread waits for the disk, and whoever wants something of it for that thread.
    pub(crate) busy_until: Duration,
    pub(crate) age: Age,
    pub(crate) talks: Vec<(Talk, Option<Live>)>,
    /// Sessions that could not be made, and may be there.
    pub(crate) maybe: Vec<(Owner, Plain)>,
    pub(crate) gone: Vec<SessionId>,
    /// What was exported last.
    pub(crate) last_file: Vec<u8>,
    requests: Vec<Client>,
    /// Whether nothing fails but by a client's own fault.
    pub(crate) is_calm: bool,
    /// How often somebody has looked at the memory: it is short, or was, where that is more than never.
    pub(crate) n_looks: u64,
    /// Rungs of the ladder may have been climbed and not left.
    pub(crate) is_pressed: bool,
    pub(crate) mistake: Mistake,
    pub(crate) outline: DaemonOutline,
    log: DefaultHasher,
}

impl World {
    fn new(seed: u64, mistake: Mistake) -> Self {
        let mut rng = Rng::with_seed(seed);
        let disk = FakeDisk::new(rng.u64(..));
        if mistake == Mistake::SomeSyncs {
            disk.set_plant(Plant::SomeSyncs(20));
        }
        let limits = Limits {
            max_running: rng.u32(1..5),
            max_waiting: 8,
            max_batched_tokens: rng.u32(16..120),
            slow_consumer: Duration::from_millis(50),
            slow_stateless: rng.bool(),
            per_user_running: rng.u32(1..5),
            tpot_target: rng.bool().then_some(Duration::from_millis(3)),
            ..Limits::default()
        };
        let n_blocks = rng.u32(7..20);
        // One step of the largest size, and one block more for each that runs.
        let least = limits.max_batched_tokens.div_ceil(64) + limits.max_running + 1;
        let n_fast = if rng.bool() { n_blocks } else { rng.u32(least..=n_blocks.max(least)).min(n_blocks) };
        let secret = [rng.u8(..); 32];
        let cache_bytes = [CACHE_ROWS_MAX, 1].map(|rows| (rows * CACHE_ROW_BYTES) as u64);
        let setup =
            Setup { limits, n_blocks, n_fast, max_context: CONTEXT, secret, block_bytes: IMAGE_BYTES, cache_bytes };
        let age = Age::new();
        let mut machine = open(&disk, &setup, &age.clock, rng.u64(..)).expect("an empty disk without faults");
        machine.sessions_turn(0);
        let is_calm = rng.u32(..4) == 0;
        let mut world = Self {
            rng,
            disk,
            machine,
            device: None,
            setup,
            now: Duration::ZERO,
            busy_until: Duration::ZERO,
            age,
            talks: Vec::new(),
            maybe: Vec::new(),
            gone: Vec::new(),
            last_file: Vec::new(),
            requests: Vec::new(),
            is_calm,
            n_looks: 0,
            is_pressed: false,
            mistake,
            outline: DaemonOutline::default(),
            log: DefaultHasher::new(),
        };
        world.new_device();
        world
    }

    fn step(&mut self) -> Checked {
        let turn = self.rng.u32(..1000);
        turn.hash(&mut self.log);
        let (is_busy, elapsed_us) = (self.now < self.busy_until, self.disk.elapsed_us());
        match turn {
            450..680 | 810..880 | 930..945 | 978..980 | 988.. if is_busy => self.outline.waits += 1,
            0..450 => self.engine_turn()?,
            450..680 => {
                let n_max = if self.rng.bool() { usize::MAX } else { self.rng.usize(1..12) };
                self.machine.sessions_turn(n_max);
            }
            680..760 => drop(self.slow_turn()),
            760..810 => self.ask()?,
            810..880 => self.talk()?,
            880..930 => self.clients(),
            930..945 => self.verbs()?,
            945..957 => self.plan_faults(),
            957..960 => self.lose_device(),
            960..964 => self.restart(Some(Found::AfterKill))?,
            964..968 => self.restart(Some(Found::AfterPowerCut))?,
            968..970 => self.restart(None)?,
            970..972 => self.storm(),
            972..978 => self.age.set(&mut self.rng, self.mistake),
            978..980 => self.age()?,
            980..982 => self.rest()?,
            982..988 => self.look()?,
            _ => self.settle_all()?,
        }
        if self.disk.is_off() {
            self.restart(Some(Found::AfterPowerCut))?;
        }
        let waited = Duration::from_micros(self.disk.elapsed_us() - elapsed_us);
        self.busy_until = self.busy_until.max(self.now) + waited;
        self.check()
    }

    fn engine_turn(&mut self) -> Checked {
        self.now += Duration::from_millis(self.rng.u64(..3));
        if self.device.is_none() && self.rng.bool() {
            self.new_device();
        }
        let device = self.device.as_mut().map(|device| device as &mut dyn Device);
        match self.machine.step(device, self.now) {
            Ok(has_computed) => self.outline.engine_steps += u64::from(has_computed),
            Err(error) if self.is_calm => return wrong(format!("a device that works was given up: {error}")),
            Err(_) => self.lose_device(),
        }
        Ok(())
    }

    fn slow_turn(&mut self) -> bool {
        if self.mistake == Mistake::LosesWrites && self.rng.u32(..10) == 0 {
            return self.machine.forget_slow_write();
        }
        self.machine.slow_turn()
    }

    fn lose_device(&mut self) {
        if self.drop_device() {
            self.outline.devices += 1;
            self.machine.lose();
        }
    }

    fn drop_device(&mut self) -> bool {
        let Some(device) = self.device.take() else { return false };
        self.outline.slow_rows += device.n_slow_rows;
        self.outline.images += device.n_images;
        true
    }

    fn new_device(&mut self) {
        let mut n_blocks = self.setup.n_blocks;
        if self.rng.u32(..4) == 0 {
            // Another device, with more memory or less.
            n_blocks = self.rng.u32(n_blocks.max(9) - 2..n_blocks + 3);
        }
        let mut device = FakeDevice::new(n_blocks, self.rng.u64(..));
        device.mistake = self.mistake;
        self.machine.attach(n_blocks, self.setup.n_fast.min(n_blocks));
        self.device = Some(device);
    }

    /// A request without a session.
    fn ask(&mut self) -> Checked {
        if self.requests.len() >= REQUESTS_MAX {
            return Ok(());
        }
        // Few beginnings, so that some are shared.
        let (beginning, n_tokens) = (self.rng.u32(..4), self.rng.u32(1..300));
        let mut prompt: Vec<u32> = (0..n_tokens).map(|at| (beginning * 13 + at * 7) % VOCAB).collect();
        prompt.extend(self.tokens(0..9));
        let wishes = self.rng.u64(..);
        let (request, expected) = answer_of(OWNERS[self.rng.usize(..2)], prompt, wishes, self.stateless_context());
        let client = self.client(expected);
        self.machine.generate(request, client.ear());
        self.requests.push(client);
        Ok(())
    }

    /// Tokens that a request without a session may come to.
    fn stateless_context(&self) -> u32 {
        let Setup { limits, n_fast, .. } = self.setup;
        if limits.slow_stateless { CONTEXT } else { CONTEXT.min(n_fast * BLOCK_TOKENS) }
    }

    /// A client, which may be slow to read.
    pub(crate) fn client(&mut self, expected: Arc<[u32]>) -> Client {
        let room = if self.rng.u32(..4) == 0 { self.rng.usize(..8) } else { usize::MAX };
        Client::new(expected, room)
    }

    pub(crate) fn tokens(&mut self, n: std::ops::Range<usize>) -> Vec<u32> {
        let n = self.rng.usize(n);
        std::iter::repeat_with(|| self.rng.u32(..VOCAB)).take(n).collect()
    }

    /// Somebody reads, or leaves.
    fn clients(&mut self) {
        let all = self.requests.iter();
        let all: Vec<Client> = all.chain(self.lives().map(|live| &live.client)).cloned().collect();
        let Some(client) = self.rng.choice(&all) else { return };
        match self.rng.u32(..12) {
            0 => client.leave(),
            1..4 => client.read(usize::MAX),
            _ => client.read(self.rng.usize(1..20)),
        }
    }

    /// Somebody whose session goes on without them.
    pub(crate) fn go_on(&mut self, live: Live) {
        self.requests.push(live.client);
    }

    fn lives(&self) -> impl Iterator<Item = &Live> {
        self.talks.iter().filter_map(|(_, live)| live.as_ref())
    }

    fn storm(&self) {
        self.requests.iter().for_each(Client::leave);
        self.lives().for_each(|live| live.client.leave());
    }

    /// The daemon dies, with or without the disk, or ends as it should; and is started again.
    fn restart(&mut self, how: Option<Found>) -> Checked {
        self.drop_device();
        if how.is_none() {
            self.machine.shut_down(self.now);
        }
        self.hear()?;
        // The power may have gone while it was ending.
        let how = if self.disk.is_off() { Some(Found::AfterPowerCut) } else { how };
        self.outline.restarts += 1;
        self.requests.clear();
        self.busy_until = self.now;
        self.talks.iter_mut().for_each(|(_, live)| *live = None);
        self.machine = closed(&self.setup);
        match how {
            Some(Found::AfterPowerCut) => self.disk.power_cut(),
            _ => self.disk.set_faults(Faults::NONE),
        }
        let how = failed_starts(&self.disk, &mut self.rng, how.unwrap_or(Found::AfterKill));
        self.setup.secret = [self.rng.u8(..); 32];
        self.machine = open(&self.disk, &self.setup, &self.age.clock, self.rng.u64(..))?;
        self.machine.sessions_turn(0);
        self.age.begin();
        self.new_device();
        self.find(how)
    }

    /// Everything works from now on, everybody reads: all answers come to their ends, and no block stays behind.
    fn rest(&mut self) -> Checked {
        self.forgive();
        self.relax()?;
        for round in 0.. {
            self.requests.iter().for_each(|client| client.read(usize::MAX));
            self.lives().for_each(|live| live.client.read(usize::MAX));
            self.engine_turn()?;
            self.forgive();
            self.slow_turn();
            self.machine.sessions_turn(usize::MAX);
            self.check()?;
            if self.device.is_some() && self.machine.is_at_rest() && round > 20 {
                break;
            }
            if round > 5000 {
                return wrong(format!("does not come to rest: {:?}", self.machine.load()));
            }
        }
        self.settle_all()?;
        if let Some(at) = self.requests.iter().position(|client| client.end().is_none()) {
            return wrong(format!("request {at} has no end"));
        }
        if let Some((talk, _)) = self.talks.iter().find(|(_, live)| live.is_some()) {
            return wrong(format!("the turn of {} has no end", talk.id));
        }
        let load = self.machine.load();
        if load.blocks_used > 0 {
            return wrong(format!("blocks are leaked: {load:?}"));
        }
        Ok(())
    }

    /// What must be true after every step.
    fn check(&mut self) -> Checked {
        self.machine.audit().map_err(Violation)?;
        if let Some(what) = self.device.as_ref().and_then(|device| device.violation.clone()) {
            return wrong(what);
        }
        self.hear()?;
        let load = self.machine.load();
        (load.running, load.waiting, load.blocks_used, load.blocks_cached, load.blocks_slow).hash(&mut self.log);
        let requests = std::mem::take(&mut self.requests);
        for client in requests {
            self.judge(&client)?;
            if client.end().is_none() && !client.is_gone() {
                self.requests.push(client);
                continue;
            }
            client.n_heard().hash(&mut self.log);
            self.count(&client);
        }
        Ok(())
    }

    pub(crate) fn count(&mut self, client: &Client) {
        self.outline.answers += u64::from(client.end() == Some(End::Finished));
        self.outline.failures += u64::from(matches!(client.end(), Some(End::Failed(_))));
    }

    /// Whether a client has heard nothing that it must not.
    pub(crate) fn judge(&self, client: &Client) -> Checked {
        if let Some(what) = client.violation() {
            return wrong(what);
        }
        let failure = match client.end() {
            Some(End::Failed(failure)) => failure,
            Some(End::CutOff) if !client.was_full() => return wrong("a client that reads was cut off"),
            _ => return Ok(()),
        };
        let may = match &failure {
            Failure::QueueFull { .. } | Failure::ShuttingDown => true,
            Failure::MemoryShort { .. } => self.n_looks > 0,
            Failure::SlowConsumer { .. } => client.was_full(),
            Failure::BackendFailed { .. } | Failure::DiskFailed { .. } => !self.is_calm,
            // At once, and only where the prompt could never fit.
            Failure::ContextTooLong { have_tokens, max_tokens } => {
                *max_tokens == self.stateless_context() && *have_tokens >= *max_tokens as usize && client.n_heard() == 0
            }
            _ => false,
        };
        if may { Ok(()) } else { wrong(format!("a request failed: {failure}")) }
    }
}
