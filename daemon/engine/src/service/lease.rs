//! How does somebody get a model, and keep it? By waiting for it, and holding a lease.

use super::slot::{Found, Slot};
use super::{Command, ServedModel, Service, Shared};
use crate::api::{Failure, Owner};
use crate::residence::KeepAlive;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::SyncSender;
use std::task::{Context, Poll};
use std::time::Duration;

/// Most who wait for one model to be loaded: see `Standing::has_place` for how users share them.
const WAITING_MAX: u32 = 256;

/// Keeps a model in memory until it is dropped.
pub struct Lease {
    slot: Arc<Slot>,
    engine: SyncSender<Command>,
}

/// A model that answers, and stays.
#[derive(Debug)]
pub struct Held {
    /// The model.
    pub model: Arc<ServedModel>,
    /// Keeps it.
    pub lease: Lease,
}

/// A model on its way: resolves when it answers, or why it does not. Dropped, nobody waits any more.
#[derive(Debug)]
pub struct Arriving {
    owner: Owner,
    slot: Arc<Slot>,
    engine: SyncSender<Command>,
    shared: Arc<Shared>,
    ticket: Option<u64>,
}

impl std::fmt::Debug for Lease {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Lease").field("model", &self.slot.name).finish_non_exhaustive()
    }
}

impl Clone for Lease {
    fn clone(&self) -> Self {
        self.slot.lease_again();
        Self { slot: Arc::clone(&self.slot), engine: self.engine.clone() }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        if self.slot.release() {
            // An engine with a full inbox is awake; one that has ended needs nothing.
            let _unheard = self.engine.try_send(Command::Look).is_err();
        }
    }
}

impl Arriving {
    /// How long it is to be waited for.
    pub fn patience(&self) -> Duration {
        self.slot.residence.patience
    }
}

impl Future for Arriving {
    type Output = Result<Held, Failure>;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.get_mut();
        if this.shared.stopping.load(Ordering::Relaxed) {
            return Poll::Ready(Err(Failure::ShuttingDown));
        }
        let name = || this.slot.name.clone();
        Poll::Ready(match this.slot.ask(this.owner, &mut this.ticket, context.waker(), WAITING_MAX) {
            Found::Ready(model) => {
                let lease = Lease { slot: Arc::clone(&this.slot), engine: this.engine.clone() };
                Ok(Held { model, lease })
            }
            Found::Failed(reason) => Err(Failure::ModelUnavailable { name: name(), reason }),
            Found::Full(limit) => Err(Failure::QueueFull { limit, retry_after_s: 1 }),
            Found::Later { is_news } => {
                if is_news {
                    // An engine with a full inbox is awake, and looks.
                    let _unheard = this.engine.try_send(Command::Look).is_err();
                }
                return Poll::Pending;
            }
        })
    }
}

impl Drop for Arriving {
    fn drop(&mut self) {
        if self.ticket.is_some_and(|ticket| self.slot.forget(ticket)) {
            let _unheard = self.engine.try_send(Command::Look).is_err();
        }
    }
}

impl Service {
    /// The model `name` for `owner`, which is loaded if it is not there.
    ///
    /// # Errors
    /// Not configured.
    pub fn hold(&self, owner: Owner, name: &str) -> Result<Arriving, Failure> {
        let slot = Arc::clone(self.slot(name)?.1);
        Ok(Arriving { owner, slot, engine: self.inbox.clone(), shared: Arc::clone(&self.shared), ticket: None })
    }

    /// Has the model `name` stay for so long after its last request, until it goes; it is not loaded for that. What is
    /// loaded at the start without an end stays whatever a client says.
    ///
    /// # Errors
    /// Not configured.
    pub fn keep(&self, name: &str, keep: KeepAlive) -> Result<(), Failure> {
        self.slot(name)?.1.keep(keep);
        let _unheard = self.inbox.try_send(Command::Look).is_err();
        Ok(())
    }

    /// The model `name`, if it answers now; it is not loaded for that.
    pub(super) fn held_now(&self, name: &str) -> Result<Held, Failure> {
        let slot = self.slot(name)?.1;
        match slot.lease() {
            Some(model) => Ok(Held { model, lease: Lease { slot: Arc::clone(slot), engine: self.inbox.clone() } }),
            None => Err(self.model(name).err().unwrap_or_else(|| Failure::ModelLoading { name: slot.name.clone() })),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::residence::{Left, Residence};
    use crate::testing::service_of;
    use std::sync::mpsc::Receiver;
    use std::task::{Wake, Waker};

    const ALICE: Owner = Owner::Uid(1000);

    /// Counts how often it is woken.
    #[derive(Default)]
    struct Counter(std::sync::atomic::AtomicU32);

    impl Wake for Counter {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn on_demand() -> (Service, Receiver<Command>) {
        service_of(Residence { at_start: false, ..Residence::default() })
    }

    fn poll(arriving: &mut Arriving, waker: &Waker) -> Poll<Result<Held, Failure>> {
        Pin::new(arriving).poll(&mut Context::from_waker(waker))
    }

    fn looks(inbox: &Receiver<Command>) -> usize {
        inbox.try_iter().filter(|command| matches!(command, Command::Look)).count()
    }

    #[test]
    fn the_first_who_asks_has_the_model_loaded_and_all_hear_that_it_failed() {
        let (service, inbox) = on_demand();
        let counter = Arc::new(Counter::default());
        let waker = Waker::from(Arc::clone(&counter));
        let slot = Arc::clone(service.slot("m").unwrap().1);
        let mut asking: Vec<Arriving> = (0..3).map(|_| service.hold(ALICE, "m").unwrap()).collect();
        assert!(asking.iter_mut().all(|one| poll(one, &waker).is_pending()));
        assert_eq!((looks(&inbox), slot.is_wanted()), (1, true));
        slot.taken_up();
        drop(asking.pop());
        slot.failed("no file".to_owned());
        assert_eq!(counter.0.load(Ordering::Relaxed), 2, "one does not wait any more");
        for one in &mut asking {
            assert!(matches!(poll(one, &waker), Poll::Ready(Err(Failure::ModelUnavailable { .. }))));
        }
        assert!(poll(&mut service.hold(ALICE, "m").unwrap(), &waker).is_ready(), "it is not tried again at once");
        slot.may_retry();
        assert!(poll(&mut service.hold(ALICE, "m").unwrap(), &waker).is_pending());
        assert!(slot.is_wanted());
    }

    #[test]
    fn a_user_takes_half_of_the_free_places_so_that_another_finds_one_and_a_stop_ends_the_waiting() {
        let (service, _inbox) = on_demand();
        let waker = Waker::noop();
        let mut waiting = Vec::new();
        let mut taken = |uid: u32| {
            let before = waiting.len();
            loop {
                let mut one = service.hold(Owner::Uid(uid), "m").unwrap();
                match poll(&mut one, waker) {
                    Poll::Pending => waiting.push(one),
                    Poll::Ready(Err(Failure::QueueFull { limit: WAITING_MAX, .. })) => break waiting.len() - before,
                    Poll::Ready(other) => panic!("{other:?}"),
                }
            }
        };
        let places: Vec<_> = (0..5).map(&mut taken).collect();
        assert_eq!(places, [128, 64, 32, 16, 8]);
        assert_eq!(taken(0), 0, "no more for the first");
        let others: usize = (5..20).map(taken).sum();
        assert_eq!(others, 8, "as many as there are places, one at a time");
        service.stop();
        assert!(matches!(poll(&mut waiting[0], waker), Poll::Ready(Err(Failure::ShuttingDown))));
    }

    #[test]
    fn what_has_a_lease_does_not_leave_and_the_engine_hears_of_the_last_one() {
        let (service, inbox) = on_demand();
        let slot = Arc::clone(service.slot("m").unwrap().1);
        slot.lease_again();
        let lease = Lease { slot: Arc::clone(&slot), engine: service.inbox };
        let second = lease.clone();
        assert!(!slot.leave(Left::Idle) && !slot.is_free());
        drop(lease);
        assert_eq!((looks(&inbox), slot.is_free()), (0, false));
        drop(second);
        assert_eq!((looks(&inbox), slot.is_free()), (1, true));
        assert!(slot.leave(Left::Room));
        assert_eq!(slot.keeping().n_left, [0, 1, 0]);
    }

    #[test]
    fn a_model_does_not_leave_before_those_have_seen_it_who_waited() {
        let (service, inbox) = on_demand();
        let slot = Arc::clone(service.slot("m").unwrap().1);
        let mut asking = service.hold(ALICE, "m").unwrap();
        assert!(poll(&mut asking, Waker::noop()).is_pending());
        assert!(!slot.leave(Left::Idle) && !slot.is_free());
        assert_eq!(looks(&inbox), 1);
        drop(asking);
        assert_eq!((looks(&inbox), slot.is_free()), (1, true));
    }

    #[test]
    fn a_client_says_how_long_a_model_stays_that_may_go_and_no_other() {
        let (service, _inbox) = on_demand();
        service.keep("m", KeepAlive::for_time(Duration::ZERO)).unwrap();
        assert_eq!(service.models()[0].keeping.keep_alive, None, "it is not there");
        assert!(poll(&mut service.hold(ALICE, "m").unwrap(), Waker::noop()).is_pending());
        service.keep("m", KeepAlive::for_time(Duration::ZERO)).unwrap();
        assert_eq!(service.models()[0].keeping.keep_alive, Some(Duration::ZERO));
        let (service, _inbox) = service_of(Residence::default());
        service.keep("m", KeepAlive::for_time(Duration::ZERO)).unwrap();
        assert_eq!(service.models()[0].keeping.keep_alive, None);
    }
}
