//! Who has the threads now? Steps and the packing of weights beside them take turns, in the order in which they came.
//!
//! The team's own lock is one operator long: who has hundreds of them would wait for whoever is there at each. And a
//! lock that is not fair would go to whoever lets go of it and takes it again. Nor are turns enough: one small piece of
//! work to each step would take as long as all those steps.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

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

/// The turns of whoever has much to do in small pieces: each is as long as it was waited for, where so much is left to
/// do. So it has half of the time at least, and whoever comes meanwhile waits for a piece at most and as long as it has
/// waited itself.
pub(crate) struct Shift<'a> {
    turns: &'a Turns,
    clock: &'a dyn Fn() -> Duration,
    turn: Option<Turn<'a>>,
    began: Duration,
    waited: Duration,
}

impl Turns {
    /// Waits until all are done who came before.
    pub(crate) fn take(&self) -> Turn<'_> {
        self.take_by(&|| Duration::ZERO).0
    }

    /// As [`Self::take`]; answers also how long it waited for others.
    fn take_by(&self, clock: &dyn Fn() -> Duration) -> (Turn<'_>, Duration) {
        let mut numbers = self.lock();
        let own = numbers.next;
        numbers.next += 1;
        if numbers.now == own {
            return (Turn(self), Duration::ZERO);
        }
        let began = clock();
        while numbers.now != own {
            numbers = self.changed.wait(numbers).unwrap_or_else(PoisonError::into_inner);
        }
        (Turn(self), clock().saturating_sub(began))
    }

    /// How many have come so far.
    #[cfg(test)]
    pub(crate) fn n_taken(&self) -> u64 {
        self.lock().next
    }

    /// How many wait for whoever has the turn.
    #[cfg(test)]
    fn n_waiting(&self) -> u64 {
        let numbers = self.lock();
        (numbers.next - numbers.now).saturating_sub(1)
    }

    fn lock(&self) -> MutexGuard<'_, Numbers> {
        self.numbers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<'a> Shift<'a> {
    pub(crate) fn new(turns: &'a Turns, clock: &'a dyn Fn() -> Duration) -> Self {
        Self { turns, clock, turn: None, began: Duration::ZERO, waited: Duration::ZERO }
    }

    /// Before each piece: goes on with its turn, or lets others have theirs.
    pub(crate) fn next_piece(&mut self) {
        if self.turn.is_some() && (self.clock)().saturating_sub(self.began) < self.waited {
            return;
        }
        self.turn = None;
        let (turn, waited) = self.turns.take_by(self.clock);
        (self.turn, self.waited, self.began) = (Some(turn), waited, (self.clock)());
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
    use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

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
    fn whoever_has_many_small_pieces_to_do_has_as_long_as_the_steps_between_them() {
        let (turns, ms, is_done) = (Turns::default(), AtomicU64::new(0), AtomicBool::new(false));
        let clock = || Duration::from_millis(ms.load(Ordering::Relaxed));
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !is_done.load(Ordering::Relaxed) {
                    let _step = turns.take();
                    while turns.n_waiting() == 0 && !is_done.load(Ordering::Relaxed) {
                        std::thread::yield_now();
                    }
                    ms.fetch_add(if is_done.load(Ordering::Relaxed) { 0 } else { 100 }, Ordering::Relaxed);
                }
            });
            while turns.n_taken() == 0 {
                std::thread::yield_now();
            }
            let mut shift = Shift::new(&turns, &clock);
            for _ in 0..300 {
                shift.next_piece();
                while turns.n_waiting() == 0 {
                    std::thread::yield_now();
                }
                ms.fetch_add(1, Ordering::Relaxed);
            }
            is_done.store(true, Ordering::Relaxed);
        });
        assert_eq!(ms.into_inner(), 300 + 300, "three steps, and not one for each piece");
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
