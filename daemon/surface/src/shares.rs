//! Whose body may come? Memory for bodies on their way, divided among those who send them.
//!
//! All bodies together have a bound, from the head of a request to its prompt. Where it is reached, the user who holds
//! most gives way: the oldest of his bodies that is still on its way is given up for one of a user who would hold no
//! more than he. So nobody's slow bodies have those of others refused. A door whose bodies come whole has none to give
//! up: there who holds some gets more as long as at least as much is left for others.

use sparsed_engine::api::Owner;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::oneshot;

/// What bodies may hold together.
#[derive(Debug)]
pub(crate) struct Shares {
    /// In KiB.
    most: u64,
    held: Mutex<Held>,
}

#[derive(Debug, Default)]
struct Held {
    total: u64,
    /// Numbers the shares.
    n_given: u64,
    /// By number.
    shares: HashMap<u64, Entry>,
}

#[derive(Debug)]
struct Entry {
    owner: Owner,
    kib: u64,
    /// Tells the body that it is given up; nothing once that has arrived.
    arriving: Option<oneshot::Sender<()>>,
}

/// A body's share, until it is dropped.
#[derive(Debug)]
pub(crate) struct Share {
    shares: Arc<Shares>,
    number: u64,
}

/// Hears that the body has to be given up: others needed the memory.
pub(crate) type GivenUp = oneshot::Receiver<()>;

impl Shares {
    /// For `most` KiB.
    pub(crate) fn new(most: usize) -> Self {
        Self { most: most as u64, held: Mutex::default() }
    }

    /// A share for a body of `kib` KiB of `owner`'s, if need be in the place of others. `None`: there is no room.
    pub(crate) fn take(self: &Arc<Self>, owner: Owner, kib: usize) -> Option<(Share, GivenUp)> {
        let (kib, mut held) = (kib as u64, self.lock());
        while held.total + kib > self.most {
            let number = held.next_to_go(owner, kib)?;
            if let Some(tell) = held.remove(number).and_then(|entry| entry.arriving) {
                // Who has ended meanwhile has nothing to give up.
                let _unheard = tell.send(()).is_err();
            }
        }
        let (arriving, given_up) = oneshot::channel();
        let number = held.add(Entry { owner, kib, arriving: Some(arriving) });
        Some((Share { shares: Arc::clone(self), number }, given_up))
    }

    /// A share for a body of `kib` KiB of `owner`'s that is there already, so that it is given up for nobody. His first
    /// one may be all that is left. `None`: there is no room, or it is for others.
    pub(crate) fn take_whole(self: &Arc<Self>, owner: Owner, kib: usize) -> Option<Share> {
        let (kib, mut held) = (kib as u64, self.lock());
        let his: u64 = held.shares.values().filter(|entry| entry.owner == owner).map(|entry| entry.kib).sum();
        let left = self.most.checked_sub(held.total)?.checked_sub(kib)?;
        if his > 0 && left < his + kib {
            return None;
        }
        let number = held.add(Entry { owner, kib, arriving: None });
        Some(Share { shares: Arc::clone(self), number })
    }

    fn lock(&self) -> MutexGuard<'_, Held> {
        // Whole at any time.
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Held {
    /// Answers its number.
    fn add(&mut self, entry: Entry) -> u64 {
        self.n_given += 1;
        self.total += entry.kib;
        self.shares.insert(self.n_given, entry);
        self.n_given
    }

    /// The share that is given up first for one of `kib` of `owner`'s.
    fn next_to_go(&self, owner: Owner, kib: u64) -> Option<u64> {
        let mut sums: HashMap<Owner, u64> = HashMap::new();
        for entry in self.shares.values() {
            *sums.entry(entry.owner).or_default() += entry.kib;
        }
        let wanted = sums.get(&owner).copied().unwrap_or(0) + kib;
        let (&most, &sum) = sums.iter().max_by_key(|&(other, sum)| (*sum, other.number()))?;
        let arriving = |&(_, entry): &(&u64, &Entry)| entry.owner == most && entry.arriving.is_some();
        let oldest = self.shares.iter().filter(arriving).map(|(number, _)| *number).min();
        oldest.filter(|_| most != owner && sum > wanted)
    }

    fn remove(&mut self, number: u64) -> Option<Entry> {
        let entry = self.shares.remove(&number)?;
        self.total -= entry.kib;
        Some(entry)
    }
}

impl Share {
    /// The body is there: from now on it is given up for nobody. Answers false where it was meanwhile.
    pub(crate) fn has_arrived(&self) -> bool {
        match self.shares.lock().shares.get_mut(&self.number) {
            Some(entry) => {
                entry.arriving = None;
                true
            }
            None => false,
        }
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        let _given_up_before = self.shares.lock().remove(self.number).is_none();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: Owner = Owner::Uid(1);
    const B: Owner = Owner::Uid(2);
    const C: Owner = Owner::Uid(3);

    fn shares() -> Arc<Shares> {
        Arc::new(Shares::new(8))
    }

    fn is_given_up(given_up: &mut GivenUp) -> bool {
        given_up.try_recv() == Ok(())
    }

    #[test]
    fn who_holds_most_gives_his_oldest_up_for_others_and_not_for_himself() {
        let shares = shares();
        let mut held: Vec<(Share, GivenUp)> = (0..8).map(|_| shares.take(A, 1).unwrap()).collect();
        assert!(shares.take(A, 1).is_none());
        let mut other = shares.take(B, 2).unwrap();
        let gone: Vec<bool> = held.iter_mut().map(|(_, given_up)| is_given_up(given_up)).collect();
        assert_eq!(gone, [true, true, false, false, false, false, false, false]);
        // Half and half is fair.
        let mut more = shares.take(B, 2).unwrap();
        assert!(shares.take(B, 1).is_none() && shares.take(A, 1).is_none());
        let _third = shares.take(C, 2).unwrap();
        assert!(is_given_up(&mut other.1) && !is_given_up(&mut more.1));
        assert!(!other.0.has_arrived() && more.0.has_arrived());
        drop(held);
        assert!(shares.take(A, 2).is_some());
    }

    #[test]
    fn of_whole_bodies_nobody_gets_so_many_that_less_is_left_for_others() {
        let shares = shares();
        let held: Vec<Share> = std::iter::from_fn(|| shares.take_whole(A, 1)).collect();
        assert_eq!(held.len(), 4);
        let others: Vec<Share> = std::iter::from_fn(|| shares.take_whole(B, 1)).collect();
        let third = shares.take_whole(C, 2).unwrap();
        assert_eq!(others.len(), 2);
        assert!(shares.take_whole(Owner::Uid(4), 1).is_none(), "there is no more");
        drop((held, others, third));
        assert!(shares.take_whole(A, 8).is_some(), "a first one may be all there is");
    }

    #[test]
    fn what_has_arrived_stays_and_nothing_is_left_behind() {
        let shares = shares();
        let (share, mut given_up) = shares.take(A, 8).unwrap();
        assert!(share.has_arrived());
        assert!(shares.take(B, 1).is_none());
        assert!(!is_given_up(&mut given_up));
        drop(share);
        drop(shares.take(B, 8).unwrap());
        assert!(shares.lock().shares.is_empty() && shares.lock().total == 0);
        assert!(shares.take(A, 9).is_none(), "more than there is");
    }
}
