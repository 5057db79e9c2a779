//! Who is next? A few places for work that may wait for a disk, and those who wait for one, user by user.
//!
//! A place that becomes free is for the user whose turn it is, and of what he wants for what came first. So however
//! much one of them wants, another one waits for as many places as there are users before him, not requests.

use sparsed_engine::api::Owner;
use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::oneshot;

/// The places, and who waits for one.
#[derive(Debug)]
pub(super) struct Places {
    line: Mutex<Line>,
}

#[derive(Debug)]
struct Line {
    free: usize,
    /// The user who is next in front; none has an empty line. `None` is the daemon itself.
    waiting: VecDeque<(Option<Owner>, VecDeque<oneshot::Sender<Place>>)>,
}

/// A place, until it is dropped.
#[derive(Debug)]
pub(super) struct Place(&'static Places);

impl Places {
    /// So many.
    pub(super) const fn new(n: usize) -> Self {
        Self { line: Mutex::new(Line { free: n, waiting: VecDeque::new() }) }
    }

    /// A place for `owner`, once it is his turn.
    ///
    /// # Errors
    /// When it was not within `patience`: how many wait for one, he among them.
    pub(super) async fn take(&'static self, owner: Option<Owner>, patience: Duration) -> Result<Place, usize> {
        let comes = {
            let mut line = self.line();
            if line.free > 0 {
                line.free -= 1;
                return Ok(Place(self));
            }
            line.join(owner)
        };
        match tokio::time::timeout(patience, comes).await {
            Ok(Ok(place)) => Ok(place),
            // He is not counted any more: what he listened on is gone with the time.
            _ => Err(self.line().n_waiting() + 1),
        }
    }

    /// Gives a place to whoever is next.
    fn pass_on(&'static self) {
        loop {
            let Some(next) = self.line().next() else { return };
            // Without the lock: a place that nobody takes comes back here.
            let Err(place) = next.send(Place(self)) else { return };
            std::mem::forget(place);
        }
    }

    fn line(&self) -> MutexGuard<'_, Line> {
        // Whole at any time.
        self.line.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Line {
    /// Behind what `owner` wants already.
    fn join(&mut self, owner: Option<Owner>) -> oneshot::Receiver<Place> {
        let (tell, comes) = oneshot::channel();
        match self.waiting.iter_mut().find(|(other, _)| *other == owner) {
            Some((_, his)) => {
                his.retain(|one| !one.is_closed());
                his.push_back(tell);
            }
            None => self.waiting.push_back((owner, VecDeque::from([tell]))),
        }
        comes
    }

    /// Who is next; `None`, and a place more is free, where nobody waits.
    fn next(&mut self) -> Option<oneshot::Sender<Place>> {
        while let Some((owner, mut his)) = self.waiting.pop_front() {
            let next = std::iter::from_fn(|| his.pop_front()).find(|one| !one.is_closed());
            if !his.is_empty() {
                self.waiting.push_back((owner, his));
            }
            if next.is_some() {
                return next;
            }
        }
        self.free += 1;
        None
    }

    fn n_waiting(&self) -> usize {
        self.waiting.iter().flat_map(|(_, his)| his).filter(|one| !one.is_closed()).count()
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.pass_on();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::future::Future;
    use std::pin::Pin;
    use std::task::{Context, Poll, Waker};

    const A: Option<Owner> = Some(Owner::Uid(1));
    const B: Option<Owner> = Some(Owner::Uid(2));
    const C: Option<Owner> = Some(Owner::Uid(3));
    const LONG: Duration = Duration::from_secs(1000);

    type Taking = Pin<Box<dyn Future<Output = Result<Place, usize>>>>;

    fn places(n: usize) -> &'static Places {
        Box::leak(Box::new(Places::new(n)))
    }

    fn look(taking: &mut Taking) -> Option<Result<Place, usize>> {
        match taking.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(taken) => Some(taken),
            Poll::Pending => None,
        }
    }

    /// Who has joined the line.
    fn waits(places: &'static Places, owner: Option<Owner>) -> Taking {
        let mut taking: Taking = Box::pin(places.take(owner, LONG));
        assert!(look(&mut taking).is_none());
        taking
    }

    #[tokio::test]
    async fn one_users_many_requests_have_another_user_wait_for_one_of_them_and_not_for_all() {
        let places = places(1);
        let mut held = places.take(A, LONG).await.unwrap();
        let mut waiting: Vec<(char, Taking)> = (0..4).map(|_| ('a', waits(places, A))).collect();
        waiting.extend([('b', waits(places, B)), ('c', waits(places, C)), ('b', waits(places, B))]);
        let mut order = String::new();
        while !waiting.is_empty() {
            drop(held);
            let taken = waiting.iter_mut().enumerate().find_map(|(at, (_, taking))| Some((at, look(taking)?.unwrap())));
            let (at, place) = taken.unwrap();
            order.push(waiting.remove(at).0);
            held = place;
        }
        assert_eq!(order, "abcabaa");
    }

    #[tokio::test]
    async fn who_is_gone_keeps_no_place_and_is_not_counted() {
        let places = places(2);
        let (first, second) = (places.take(A, LONG).await.unwrap(), places.take(A, LONG).await.unwrap());
        let gone = [waits(places, A), waits(places, B)];
        let mut stays = waits(places, A);
        let called = waits(places, A);
        drop(gone);
        assert_eq!(places.take(C, Duration::ZERO).await.map(drop), Err(3));
        drop(first);
        let place = look(&mut stays).unwrap().unwrap();
        // One that goes when it has been called, and has not seen it.
        drop(second);
        drop(called);
        drop(place);
        let line = places.line();
        assert_eq!((line.free, line.waiting.len()), (2, 0));
    }
}
