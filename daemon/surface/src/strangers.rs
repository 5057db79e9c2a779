//! Who has come in and not said who it is? Few at a time, and not for long: who says it at once is never kept out.
//!
//! A connection without a key costs a descriptor and a buffer. So many may be without; when one more comes, the one
//! that has been so longest goes. Those who have shown a key are counted elsewhere, so however many strangers come, the
//! places of the others are not theirs to take.

use std::collections::VecDeque;
use std::future::Future;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::watch;

/// Connections that have not shown a key, the oldest first.
#[derive(Debug)]
pub(crate) struct Strangers {
    most: usize,
    /// How long a connection may be without a key.
    deadline: Duration,
    waiting: Mutex<VecDeque<Arc<Stranger>>>,
}

/// One of them. It may go on being one until its connection ends.
#[derive(Debug)]
pub(crate) struct Stranger {
    deadline: Duration,
    standing: watch::Sender<Standing>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Standing {
    Unknown,
    Known,
    /// It has to go, or has gone.
    Gone,
}

impl Strangers {
    /// Room for `most` of them, each for no longer than `deadline`.
    pub(crate) fn new(most: usize, deadline: Duration) -> Self {
        Self { most: most.max(1), deadline, waiting: Mutex::default() }
    }

    /// One more. The oldest one goes where there is no room.
    pub(crate) fn add(&self) -> Arc<Stranger> {
        let stranger = Arc::new(Stranger { deadline: self.deadline, standing: watch::Sender::new(Standing::Unknown) });
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        waiting.retain(|other| *other.standing.borrow() == Standing::Unknown);
        while waiting.len() >= self.most {
            if let Some(oldest) = waiting.pop_front() {
                log::debug!("a connection without a key is closed for a newer one");
                oldest.set(Standing::Gone);
            }
        }
        waiting.push_back(Arc::clone(&stranger));
        stranger
    }
}

impl Stranger {
    /// It has shown a key.
    pub(crate) fn is_known(&self) {
        self.set(Standing::Known);
    }

    /// Its connection has ended.
    pub(crate) fn has_gone(&self) {
        self.set(Standing::Gone);
    }

    /// Resolves when it has to go: others need the place, or it had all the time there is.
    pub(crate) fn must_go(&self) -> impl Future<Output = ()> + Send + use<> {
        let (mut standing, deadline) = (self.standing.subscribe(), self.deadline);
        async move {
            let news = standing.wait_for(|standing| *standing != Standing::Unknown);
            match tokio::time::timeout(deadline, news).await {
                Ok(Ok(standing)) if *standing == Standing::Known => {}
                _ => return,
            }
            std::future::pending().await
        }
    }

    fn set(&self, standing: Standing) {
        self.standing.send_replace(standing);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::FutureExt;

    fn runtime() -> tokio::runtime::Runtime {
        tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap()
    }

    #[test]
    fn the_oldest_stranger_goes_for_a_new_one_and_who_is_known_stays() {
        runtime().block_on(async {
            let strangers = Strangers::new(2, Duration::from_secs(600));
            let [first, second] = [strangers.add(), strangers.add()];
            let (first_goes, mut second_goes) = (first.must_go(), Box::pin(second.must_go()));
            second.is_known();
            let third = strangers.add();
            assert!(second_goes.as_mut().now_or_never().is_none(), "there was room: one of them is known");
            let _fourth = strangers.add();
            first_goes.await;
            assert!(second_goes.as_mut().now_or_never().is_none());
            third.has_gone();
            let fifth = strangers.add();
            assert!(fifth.must_go().now_or_never().is_none());
            assert_eq!(strangers.waiting.lock().unwrap().len(), 2);
        });
    }

    #[test]
    fn a_stranger_has_so_much_time_and_no_more() {
        runtime().block_on(async {
            let strangers = Strangers::new(8, Duration::ZERO);
            let [unknown, known] = [strangers.add(), strangers.add()];
            let known_goes = known.must_go();
            known.is_known();
            unknown.must_go().await;
            assert!(known_goes.now_or_never().is_none());
        });
    }
}
