//! Who may ask the other engine now? So many requests at a time, so many further ones that wait, in the order of their
//! arrival; and of nobody all of them.

use crate::options::Options;
use sparsed_engine::api::{Failure, Owner};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// When to try again at a full line, in seconds.
const RETRY_AFTER_S: u32 = 1;

/// All requests of one model.
#[derive(Debug)]
pub(crate) struct Line {
    seats: Arc<Semaphore>,
    waiting_max: u32,
    /// Requests that wait or are under way.
    counts: Mutex<Counts>,
}

#[derive(Debug, Default)]
struct Counts {
    of_owner: HashMap<Owner, u32>,
    waiting: u32,
    running: u32,
}

/// A request's place; it is free when this is dropped.
#[derive(Debug)]
pub(crate) struct Place {
    line: Arc<Line>,
    owner: Owner,
    seat: Option<OwnedSemaphorePermit>,
    /// Requests that waited when it came.
    pub(crate) ahead: u32,
}

impl Line {
    pub(crate) fn new(options: &Options) -> Arc<Self> {
        let seats = Arc::new(Semaphore::new(options.running_max as usize));
        Arc::new(Self { seats, waiting_max: options.waiting_max, counts: Mutex::default() })
    }

    /// Takes a place, with a seat where one is free, for an owner who may have `per_owner_max` of them.
    ///
    /// # Errors
    /// No room.
    pub(crate) fn enter(self: &Arc<Self>, owner: Owner, per_owner_max: u32) -> Result<Place, Failure> {
        let mut counts = self.lock();
        let of_owner = counts.of_owner.get(&owner).copied().unwrap_or(0);
        if of_owner >= per_owner_max {
            return Err(Failure::UserQueueFull { limit: per_owner_max, retry_after_s: RETRY_AFTER_S });
        }
        let seat = Arc::clone(&self.seats).try_acquire_owned().ok();
        if seat.is_none() && counts.waiting >= self.waiting_max {
            return Err(Failure::QueueFull { limit: self.waiting_max, retry_after_s: RETRY_AFTER_S });
        }
        counts.of_owner.insert(owner, of_owner + 1);
        let ahead = counts.waiting;
        *(if seat.is_some() { &mut counts.running } else { &mut counts.waiting }) += 1;
        drop(counts);
        Ok(Place { line: Arc::clone(self), owner, seat, ahead })
    }

    /// Requests under way, and those that wait.
    pub(crate) fn load(&self) -> (u32, u32) {
        let counts = self.lock();
        (counts.running, counts.waiting)
    }

    fn lock(&self) -> MutexGuard<'_, Counts> {
        // Whole at any time.
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Place {
    pub(crate) fn has_seat(&self) -> bool {
        self.seat.is_some()
    }

    /// Waits for a seat.
    pub(crate) async fn sit(&mut self) {
        // Nobody closes the seats: an error never comes.
        let Ok(seat) = Arc::clone(&self.line.seats).acquire_owned().await else { return };
        let mut counts = self.line.lock();
        counts.waiting -= 1;
        counts.running += 1;
        self.seat = Some(seat);
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut counts = self.line.lock();
        *(if self.seat.is_some() { &mut counts.running } else { &mut counts.waiting }) -= 1;
        if let Some(n) = counts.of_owner.get_mut(&self.owner) {
            *n -= 1;
            if *n == 0 {
                counts.of_owner.remove(&self.owner);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(running: u32, waiting_max: u32) -> Arc<Line> {
        let seats = Arc::new(Semaphore::new(running as usize));
        Arc::new(Line { seats, waiting_max, counts: Mutex::default() })
    }

    #[tokio::test]
    async fn who_waits_sits_when_a_seat_is_free_and_who_finds_no_room_is_refused() {
        let line = line(1, 1);
        let (first, mut second) = (line.enter(Owner::Uid(1), 8).unwrap(), line.enter(Owner::Uid(2), 8).unwrap());
        assert!(first.has_seat() && !second.has_seat() && second.ahead == 0);
        assert!(matches!(line.enter(Owner::Uid(3), 8), Err(Failure::QueueFull { limit: 1, .. })));
        assert_eq!(line.load(), (1, 1));
        drop(first);
        second.sit().await;
        assert!(second.has_seat() && line.load() == (1, 0));
        drop(second);
        assert_eq!(line.load(), (0, 0));
        assert!(line.lock().of_owner.is_empty(), "owners that ask no more are forgotten");
    }

    #[tokio::test]
    async fn nobody_has_all_places() {
        let line = line(8, 8);
        let _held = (line.enter(Owner::Uid(1), 2).unwrap(), line.enter(Owner::Uid(1), 2).unwrap());
        assert!(matches!(line.enter(Owner::Uid(1), 2), Err(Failure::UserQueueFull { limit: 2, .. })));
        assert!(line.enter(Owner::Uid(2), 2).is_ok());
    }
}
