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
    limits: Limits,
    /// Requests that wait or are under way.
    counts: Mutex<Counts>,
}

#[derive(Clone, Copy, Debug)]
struct Limits {
    running: u32,
    waiting: u32,
    per_owner: u32,
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
        let limits =
            Limits { running: options.running_max, waiting: options.waiting_max, per_owner: options.per_owner_max };
        let seats = Arc::new(Semaphore::new(limits.running as usize));
        Arc::new(Self { seats, limits, counts: Mutex::default() })
    }

    /// Takes a place, with a seat where one is free.
    ///
    /// # Errors
    /// No room.
    pub(crate) fn enter(self: &Arc<Self>, owner: Owner) -> Result<Place, Failure> {
        let mut counts = self.lock();
        let of_owner = counts.of_owner.get(&owner).copied().unwrap_or(0);
        if of_owner >= self.limits.per_owner {
            return Err(Failure::UserQueueFull { limit: self.limits.per_owner, retry_after_s: RETRY_AFTER_S });
        }
        let seat = Arc::clone(&self.seats).try_acquire_owned().ok();
        if seat.is_none() && counts.waiting >= self.limits.waiting {
            return Err(Failure::QueueFull { limit: self.limits.waiting, retry_after_s: RETRY_AFTER_S });
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

    fn line(running: u32, waiting: u32, per_owner: u32) -> Arc<Line> {
        let seats = Arc::new(Semaphore::new(running as usize));
        Arc::new(Line { seats, limits: Limits { running, waiting, per_owner }, counts: Mutex::default() })
    }

    #[tokio::test]
    async fn who_waits_sits_when_a_seat_is_free_and_who_finds_no_room_is_refused() {
        let line = line(1, 1, 8);
        let (first, mut second) = (line.enter(Owner::Uid(1)).unwrap(), line.enter(Owner::Uid(2)).unwrap());
        assert!(first.has_seat() && !second.has_seat() && second.ahead == 0);
        assert!(matches!(line.enter(Owner::Uid(3)), Err(Failure::QueueFull { limit: 1, .. })));
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
        let line = line(8, 8, 2);
        let _held = (line.enter(Owner::Uid(1)).unwrap(), line.enter(Owner::Uid(1)).unwrap());
        assert!(matches!(line.enter(Owner::Uid(1)), Err(Failure::UserQueueFull { limit: 2, .. })));
        assert!(line.enter(Owner::Uid(2)).is_ok());
    }
}
