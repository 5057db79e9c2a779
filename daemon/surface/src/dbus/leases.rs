//! Who keeps a model in memory from the bus? Whoever holds the reading end of a pipe whose other end is here.
//!
//! The descriptor is the lease: it goes with the process that has it, whatever becomes of the bus. The model is loaded
//! meanwhile; where it cannot be, the daemon closes its end, and the reader sees the end of the pipe.

use super::stream::closed;
use crate::bodies::models;
use crate::refusal::Refusal;
use sparsed_engine::Service;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::net::unix::pipe::Sender;

/// Most leases of a user at a time.
const PER_USER_MAX: usize = 32;

/// How many leases each user has.
#[derive(Debug, Default)]
pub(super) struct Leases(Mutex<HashMap<u32, usize>>);

/// One of them; given back when it is dropped.
#[derive(Debug)]
pub(super) struct Place {
    leases: Arc<Leases>,
    uid: u32,
}

impl Leases {
    /// Begins one of `uid`'s.
    ///
    /// # Errors
    /// The user has too many.
    pub(super) fn begin(self: &Arc<Self>, uid: u32) -> Result<Place, Refusal> {
        let mut all = self.lock();
        let n = all.entry(uid).or_default();
        if *n >= PER_USER_MAX {
            return Err(Refusal::too_many_leases(PER_USER_MAX));
        }
        *n += 1;
        Ok(Place { leases: Arc::clone(self), uid })
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<u32, usize>> {
        // Whole at any time.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut all = self.leases.lock();
        if let Some(n) = all.get_mut(&self.uid) {
            *n -= 1;
            if *n == 0 {
                all.remove(&self.uid);
            }
        }
    }
}

/// Keeps `model` in memory until nobody holds the other end of `pipe`.
pub(super) async fn keep(service: Service, model: String, pipe: Sender, place: Place) {
    let held = tokio::select! {
        held = models::held(&service, &model) => held,
        () = closed(&pipe) => return,
    };
    match held {
        Ok(held) => {
            log::info!(model:%, uid = place.uid; "model leased");
            closed(&pipe).await;
            log::info!(model:%, uid = place.uid; "lease of a model ended");
            drop(held);
        }
        Err(refusal) => log::warn!(model:%, uid = place.uid, reason = refusal.message(); "model not leased"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_user_has_so_many_leases_and_another_one_has_its_own() {
        let leases = Arc::new(Leases::default());
        let mut held: Vec<Place> = (0..PER_USER_MAX).map(|_| leases.begin(5).unwrap()).collect();
        assert!(leases.begin(5).is_err() && leases.begin(6).is_ok());
        held.pop();
        assert!(leases.begin(5).is_ok());
        held.clear();
        assert!(leases.lock().is_empty());
    }
}
