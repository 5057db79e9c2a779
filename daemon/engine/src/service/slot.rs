//! What do the engine and the surfaces know of a configured model together? Whether it is in memory, and who needs it.

use super::{ModelState, ServedModel, Stats, lock};
use crate::api::Owner;
use crate::residence::{KeepAlive, Left, Residence};
use crate::telemetry::Board;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::task::Waker;
use std::time::Duration;

/// A configured model, loaded or not.
#[derive(Debug)]
pub(crate) struct Slot {
    pub(crate) name: String,
    pub(crate) aliases: Vec<String>,
    pub(crate) residence: Residence,
    standing: Mutex<Standing>,
    /// Bytes uploaded, in thousandths of all.
    progress_permille: AtomicU64,
    /// The engine thread writes it after each step, status pages read it.
    pub(crate) stats: Mutex<Stats>,
    /// As `stats`: who waits, and what was decided.
    pub(crate) board: Mutex<Board>,
}

/// Guarded together: whoever finds a model ready and takes a lease must not find it gone.
#[derive(Debug)]
struct Standing {
    phase: Phase,
    /// What keeps it in memory: requests under way, and whoever asked for it.
    n_leases: u32,
    /// The engine is to load it.
    is_wanted: bool,
    /// What a client has asked for, until the model goes.
    keep: Option<KeepAlive>,
    /// In no order.
    waiting: Vec<Waiting>,
    n_tickets: u64,
    /// When it goes if nobody asks for it, in the engine's time.
    expires: Option<Duration>,
    n_loads: u64,
    n_left: [u64; Left::ALL.len()],
}

/// Somebody who waits for a model.
#[derive(Debug)]
struct Waiting {
    ticket: u64,
    owner: Owner,
    waker: Waker,
}

/// How a model is.
#[derive(Clone, Debug)]
enum Phase {
    Unloaded,
    Loading,
    Ready(Arc<ServedModel>),
    Failed { reason: String, may_retry: bool },
}

/// What keeps a model in memory, for status pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Keeping {
    /// Loaded at the start; otherwise when somebody asks.
    pub at_start: bool,
    /// Leases and requests.
    pub n_leases: u32,
    /// How long it stays when nobody asks; `None`: for ever.
    pub keep_alive: Option<Duration>,
    /// When it goes, in the engine's time; `None` while it is needed, or does not go.
    pub expires: Option<Duration>,
    /// Times that it was loaded since the start.
    pub n_loads: u64,
    /// Times that it has left the memory since the start, by [`Left`].
    pub n_left: [u64; Left::ALL.len()],
}

/// What somebody finds who asks for a model.
pub(super) enum Found {
    /// It is there, and one lease more is held.
    Ready(Arc<ServedModel>),
    /// It will be; whoever asked is woken. `is_news`: the engine does not know yet.
    Later {
        is_news: bool,
    },
    /// So many wait already, or so many of the same user that the other places are for others.
    Full(u32),
    Failed(String),
}

impl Standing {
    /// Whoever waits for a model that has come has yet to see it, and takes a lease then.
    fn is_free(&self) -> bool {
        self.n_leases == 0 && self.waiting.is_empty()
    }

    /// Whether the owner may wait as one more of so many: who has several places needs more free ones than that, so
    /// that one user alone takes half of them, the next one half of the rest, and there is one for who has none.
    fn has_place(&self, owner: Owner, waiting_max: u32) -> bool {
        let own = self.waiting.iter().filter(|one| one.owner == owner).count();
        self.waiting.len() + own < waiting_max as usize
    }
}

impl Slot {
    pub(crate) fn new(name: String, aliases: Vec<String>, residence: Residence) -> Self {
        let phase = if residence.at_start { Phase::Loading } else { Phase::Unloaded };
        let standing = Standing {
            phase,
            n_leases: 0,
            is_wanted: false,
            keep: None,
            waiting: Vec::new(),
            n_tickets: 0,
            expires: None,
            n_loads: 0,
            n_left: [0; Left::ALL.len()],
        };
        Self {
            name,
            aliases,
            residence,
            standing: Mutex::new(standing),
            progress_permille: AtomicU64::new(0),
            stats: Mutex::new(Stats::default()),
            board: Mutex::new(Board::default()),
        }
    }

    pub(crate) fn set_stats(&self, stats: Stats) {
        *lock(&self.stats) = stats;
    }

    pub(crate) fn uploaded(&self, done: u64, total: u64) {
        self.progress_permille.store(done.saturating_mul(1000) / total.max(1), Ordering::Relaxed);
    }

    pub(super) fn state(&self) -> ModelState {
        match &lock(&self.standing).phase {
            Phase::Unloaded => ModelState::Unloaded,
            Phase::Loading => ModelState::Loading { progress_permille: self.progress_permille.load(Ordering::Relaxed) },
            Phase::Ready(model) => ModelState::Ready(Arc::clone(model)),
            Phase::Failed { reason, .. } => ModelState::Failed(reason.clone()),
        }
    }

    pub(super) fn keeping(&self) -> Keeping {
        let standing = lock(&self.standing);
        Keeping {
            at_start: self.residence.at_start,
            n_leases: standing.n_leases,
            keep_alive: standing.keep.unwrap_or(self.residence.keep_alive).time(),
            expires: standing.expires,
            n_loads: standing.n_loads,
            n_left: standing.n_left,
        }
    }

    /// A lease, if the model is there; has it loaded if it is not. `ticket` is the caller's number once it waits.
    pub(super) fn ask(&self, owner: Owner, ticket: &mut Option<u64>, waker: &Waker, waiting_max: u32) -> Found {
        let mut standing = lock(&self.standing);
        let has_asked = ticket.is_some();
        match &standing.phase {
            Phase::Ready(model) => {
                let model = Arc::clone(model);
                standing.n_leases += 1;
                return Found::Ready(model);
            }
            Phase::Failed { reason, may_retry } if !may_retry || has_asked => return Found::Failed(reason.clone()),
            Phase::Loading | Phase::Unloaded | Phase::Failed { .. } => {}
        }
        if !has_asked && !standing.has_place(owner, waiting_max) {
            return Found::Full(waiting_max);
        }
        let is_news = !matches!(standing.phase, Phase::Loading);
        if is_news {
            self.progress_permille.store(0, Ordering::Relaxed);
            (standing.phase, standing.is_wanted) = (Phase::Loading, true);
        }
        let number = *ticket.get_or_insert(standing.n_tickets);
        match standing.waiting.iter_mut().find(|one| one.ticket == number) {
            Some(one) => one.waker.clone_from(waker),
            None => standing.waiting.push(Waiting { ticket: number, owner, waker: waker.clone() }),
        }
        standing.n_tickets = standing.n_tickets.max(number.wrapping_add(1));
        Found::Later { is_news }
    }

    /// Whoever had this number does not wait any more. Answers whether the engine should look whether the model may go.
    pub(super) fn forget(&self, ticket: u64) -> bool {
        let mut standing = lock(&self.standing);
        let at = standing.waiting.iter().position(|one| one.ticket == ticket);
        let waiting = at.map(|at| standing.waiting.swap_remove(at));
        let may_go = standing.is_free() && self.residence.may_unload();
        // What goes with a waker may ask for something.
        drop(standing);
        drop(waiting);
        may_go
    }

    /// A lease of a model that is there.
    pub(super) fn lease(&self) -> Option<Arc<ServedModel>> {
        let mut standing = lock(&self.standing);
        let Phase::Ready(model) = &standing.phase else { return None };
        let model = Arc::clone(model);
        standing.n_leases += 1;
        Some(model)
    }

    pub(super) fn lease_again(&self) {
        lock(&self.standing).n_leases += 1;
    }

    /// Gives a lease back. Answers whether the engine should look whether the model may go.
    pub(super) fn release(&self) -> bool {
        let mut standing = lock(&self.standing);
        standing.n_leases -= 1;
        standing.is_free() && self.residence.may_unload()
    }

    /// A client wants it to stay for so long from now on; of one that is not there nothing is remembered.
    pub(super) fn keep(&self, keep: KeepAlive) {
        let mut standing = lock(&self.standing);
        if self.residence.may_unload() && !matches!(standing.phase, Phase::Unloaded) {
            // When it goes now is for the engine to say; until it has looked nothing is, rather than what was.
            (standing.keep, standing.expires) = (Some(keep), None);
        }
    }

    /// Wakes all who wait, to look again.
    pub(crate) fn wake(&self) {
        // Woken without the lock: whoever wakes may ask at once.
        let waiting: Vec<Waker> = lock(&self.standing).waiting.iter().map(|one| one.waker.clone()).collect();
        waiting.into_iter().for_each(Waker::wake);
    }

    // What the engine thread says and asks.

    /// Whether the model is to be loaded.
    pub(crate) fn is_wanted(&self) -> bool {
        lock(&self.standing).is_wanted
    }

    /// It is being loaded.
    pub(crate) fn taken_up(&self) {
        lock(&self.standing).is_wanted = false;
    }

    /// It answers from now on; says so once.
    pub(crate) fn ready(&self, model: &Arc<ServedModel>) {
        let mut standing = lock(&self.standing);
        if matches!(standing.phase, Phase::Ready(_)) {
            return;
        }
        standing.phase = Phase::Ready(Arc::clone(model));
        standing.n_loads += 1;
        drop(standing);
        self.wake();
    }

    pub(crate) fn failed(&self, reason: String) {
        lock(&self.standing).phase = Phase::Failed { reason, may_retry: false };
        self.wake();
    }

    /// The next who asks has it loaded again.
    pub(crate) fn may_retry(&self) {
        if let Phase::Failed { may_retry, .. } = &mut lock(&self.standing).phase {
            *may_retry = true;
        }
    }

    /// Whether it answers.
    pub(crate) fn is_ready(&self) -> bool {
        matches!(lock(&self.standing).phase, Phase::Ready(_))
    }

    /// Whether nobody has a lease, or is about to take one.
    pub(crate) fn is_free(&self) -> bool {
        lock(&self.standing).is_free()
    }

    pub(crate) fn keep_alive(&self) -> KeepAlive {
        lock(&self.standing).keep.unwrap_or(self.residence.keep_alive)
    }

    pub(crate) fn set_expires(&self, expires: Option<Duration>) {
        lock(&self.standing).expires = expires;
    }

    /// The model goes, unless somebody needs it meanwhile. Answers whether it goes.
    pub(crate) fn leave(&self, why: Left) -> bool {
        let mut standing = lock(&self.standing);
        if !standing.is_free() {
            return false;
        }
        let index = Left::ALL.iter().position(|&other| other == why).expect("all are listed");
        standing.n_left[index] += 1;
        (standing.phase, standing.keep, standing.expires) = (Phase::Unloaded, None, None);
        true
    }
}
