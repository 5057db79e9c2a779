//! How many of something may one owner have at a time: requests under way by all doors, connections to one, leases?
//!
//! A request is counted from its arrival, before its body is read, to the end of its answer: who floods the daemon does
//! not take the threads that read prompts from others.

use crate::api::{Failure, Owner};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// When a refused request may come again: answers that are under way end at any time.
const RETRY_S: u32 = 1;

/// How many each owner has.
#[derive(Debug)]
pub struct Tenants {
    limit: u32,
    open: Mutex<HashMap<Owner, u32>>,
}

/// Counts until it is dropped.
#[derive(Debug)]
#[must_use = "it counts as long as this lives"]
pub struct Admission {
    tenants: Arc<Tenants>,
    owner: Owner,
}

impl Tenants {
    /// None, of which an owner may have `limit` at a time.
    pub fn new(limit: u32) -> Self {
        Self { limit, open: Mutex::default() }
    }

    /// Counts one more of `owner`'s.
    ///
    /// # Errors
    /// [`Failure::TooManyRequests`].
    pub fn admit(self: &Arc<Self>, owner: Owner) -> Result<Admission, Failure> {
        let mut open = self.lock();
        let n = open.entry(owner).or_default();
        if *n >= self.limit {
            return Err(Failure::TooManyRequests { limit: self.limit, retry_after_s: RETRY_S });
        }
        *n += 1;
        Ok(Admission { tenants: Arc::clone(self), owner })
    }

    /// Whether nobody has any.
    pub fn is_empty(&self) -> bool {
        self.lock().is_empty()
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Owner, u32>> {
        // Whole at any time.
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Admission {
    fn drop(&mut self) {
        let mut open = self.tenants.lock();
        let Some(n) = open.get_mut(&self.owner) else { return };
        *n -= 1;
        if *n == 0 {
            open.remove(&self.owner);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_owner_has_so_many_requests_until_one_ends_and_leaves_nothing_behind() {
        let tenants = Arc::new(Tenants::new(2));
        let mut held = vec![tenants.admit(Owner::Uid(1)).unwrap(), tenants.admit(Owner::Uid(1)).unwrap()];
        let refused = Failure::TooManyRequests { limit: 2, retry_after_s: RETRY_S };
        assert_eq!(tenants.admit(Owner::Uid(1)).unwrap_err(), refused);
        held.push(tenants.admit(Owner::named("mqtt", "lamp")).unwrap());
        drop(held.remove(0));
        held.push(tenants.admit(Owner::Uid(1)).unwrap());
        assert!(tenants.admit(Owner::Uid(1)).is_err());
        drop(held);
        assert!(tenants.is_empty());
    }
}
