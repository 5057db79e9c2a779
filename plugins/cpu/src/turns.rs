//! Who has the threads now? Steps and the packing of weights beside them take turns, in the order in which they came.
//!
//! The team's own lock is one operator long: who has hundreds of them would wait for whoever is there at each. And a
//! lock that is not fair would go to whoever lets go of it and takes it again.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

/// The turns of a device.
#[derive(Debug, Default)]
pub(crate) struct Turns {
    numbers: Mutex<Numbers>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Numbers {
    /// Of whoever has the turn, or will be the next to come.
    now: u64,
    /// Of whoever comes next.
    next: u64,
}

/// A turn, over when it is dropped.
#[derive(Debug)]
pub(crate) struct Turn<'a>(&'a Turns);

impl Turns {
    /// Waits until all are done who came before.
    pub(crate) fn take(&self) -> Turn<'_> {
        let mut numbers = self.lock();
        let own = numbers.next;
        numbers.next += 1;
        while numbers.now != own {
            numbers = self.changed.wait(numbers).unwrap_or_else(PoisonError::into_inner);
        }
        Turn(self)
    }

    /// How many have come so far.
    #[cfg(test)]
    pub(crate) fn n_taken(&self) -> u64 {
        self.lock().next
    }

    fn lock(&self) -> MutexGuard<'_, Numbers> {
        self.numbers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        let mut numbers = self.0.lock();
        numbers.now += 1;
        if numbers.now != numbers.next {
            self.0.changed.notify_all();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn turns_go_by_who_came_first_also_before_one_who_comes_again_at_once() {
        let (turns, order) = (Turns::default(), Mutex::new(Vec::new()));
        std::thread::scope(|scope| {
            let first = turns.take();
            for name in ["second", "third"] {
                let before = turns.n_taken();
                let (turns, order) = (&turns, &order);
                scope.spawn(move || {
                    let _turn = turns.take();
                    order.lock().expect("no panic").push(name);
                });
                while turns.n_taken() == before {
                    std::thread::yield_now();
                }
            }
            drop(first);
            let _again = turns.take();
            order.lock().expect("no panic").push("first");
        });
        assert_eq!(order.into_inner().expect("no panic"), ["second", "third", "first"]);
    }

    #[test]
    fn a_turn_that_ends_with_a_panic_is_over() {
        let turns = Turns::default();
        let panicked = std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                let _turn = turns.take();
                panic!("planted");
            });
            thread.join().is_err()
        });
        assert!(panicked);
        drop(turns.take());
    }
}
