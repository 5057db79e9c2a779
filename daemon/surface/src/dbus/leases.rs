//! Who keeps a model in memory from the bus? Whoever holds the reading end of a pipe whose other end is here.
//!
//! The descriptor is the lease: it goes with the process that has it, whatever becomes of the bus. The model is loaded
//! meanwhile; where it cannot be, the daemon closes its end, and the reader sees the end of the pipe.

use super::stream::closed;
use crate::bodies::models;
use crate::refusal::Refusal;
use sparsed_engine::api::Owner;
use sparsed_engine::{Admission, Service, Tenants};
use std::sync::Arc;
use tokio::net::unix::pipe::Sender;

/// Most leases of a user at a time.
const PER_USER_MAX: u32 = 32;

/// Of which users have how many leases.
pub(super) fn all() -> Arc<Tenants> {
    Arc::new(Tenants::new(PER_USER_MAX))
}

/// Begins one of `uid`'s, which ends when what is returned is dropped.
///
/// # Errors
/// The user has too many.
pub(super) fn begin(leases: &Arc<Tenants>, uid: u32) -> Result<Admission, Refusal> {
    leases.admit(Owner::Uid(uid)).map_err(|_| Refusal::too_many_leases(PER_USER_MAX))
}

/// Keeps `model` in memory until nobody holds the other end of `pipe`.
pub(super) async fn keep(service: Service, model: String, pipe: Sender, uid: u32, _lease: Admission) {
    let held = tokio::select! {
        held = models::held(&service, Owner::Uid(uid), &model) => held,
        () = closed(&pipe) => return,
    };
    match held {
        Ok(held) => {
            log::info!(model:%, uid; "model leased");
            closed(&pipe).await;
            log::info!(model:%, uid; "lease of a model ended");
            drop(held);
        }
        Err(refusal) => log::warn!(model:%, uid, reason = refusal.message(); "model not leased"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_user_has_so_many_leases_and_another_one_has_its_own() {
        let leases = all();
        let mut held: Vec<Admission> = (0..PER_USER_MAX).map(|_| begin(&leases, 5).unwrap()).collect();
        assert!(begin(&leases, 5).is_err() && begin(&leases, 6).is_ok());
        held.pop();
        assert!(begin(&leases, 5).is_ok());
        held.clear();
        assert!(leases.is_empty());
    }
}
