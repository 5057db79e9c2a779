//! Does the listener still listen, and has it room? Its sink never waits, so this does.

use crate::trouble::Trouble;
use sparsed_engine::api::{Event, Failure, Refused, Sink};
use std::time::Duration;
use tokio::time::{Instant, sleep};

/// Pause before an event is offered again.
const FULL_PAUSE: Duration = Duration::from_millis(5);

/// Why a request ends before its answer does.
#[derive(Debug, PartialEq)]
pub(crate) enum End {
    /// Nobody listens any more.
    Gone,
    /// Something went wrong.
    Trouble(Trouble),
}

impl From<Trouble> for End {
    fn from(trouble: Trouble) -> Self {
        Self::Trouble(trouble)
    }
}

/// A listener.
pub(crate) struct Ear {
    sink: Box<dyn Sink>,
    /// How long it may take nothing.
    patience: Duration,
    is_queued: bool,
}

impl Ear {
    pub(crate) fn new(sink: Box<dyn Sink>, patience: Duration) -> Self {
        Self { sink, patience, is_queued: false }
    }

    pub(crate) fn is_gone(&self) -> bool {
        self.sink.is_closed()
    }

    /// Has it hear that its request is taken, once.
    ///
    /// # Errors
    /// As [`Ear::tell`].
    pub(crate) async fn queued(&mut self, ahead: u32) -> Result<(), End> {
        if std::mem::replace(&mut self.is_queued, true) {
            return Ok(());
        }
        self.tell(Event::Queued { ahead }).await
    }

    /// Has it hear an event. While it has no room nothing is read from the other engine either.
    ///
    /// # Errors
    /// It is gone, or does not read.
    pub(crate) async fn tell(&mut self, mut event: Event) -> Result<(), End> {
        let since = Instant::now();
        loop {
            event = match self.sink.offer(event) {
                Ok(()) => return Ok(()),
                Err(Refused::Closed) => return Err(End::Gone),
                Err(Refused::Full(event) | Refused::Behind(event)) => event,
            };
            if since.elapsed() >= self.patience {
                let failure = Failure::SlowConsumer { limit_s: self.patience.as_secs() };
                return Err(Trouble::Here(failure).into());
            }
            sleep(FULL_PAUSE).await;
        }
    }

    /// The last word. One who does not read loses it, and finds the channel closed.
    pub(crate) fn fail(&mut self, failure: Failure) {
        let _unheard = self.sink.offer(Event::Failed(failure)).is_err();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{Arc, Mutex};

    /// Takes `room` events.
    struct Narrow {
        room: usize,
        heard: Arc<Mutex<Vec<Event>>>,
    }

    impl Sink for Narrow {
        fn offer(&mut self, event: Event) -> Result<(), Refused> {
            let mut heard = self.heard.lock().unwrap();
            if heard.len() == self.room {
                return Err(Refused::Full(event));
            }
            heard.push(event);
            Ok(())
        }

        fn is_closed(&self) -> bool {
            false
        }
    }

    #[tokio::test]
    async fn who_does_not_read_loses_the_answer_and_hears_once_that_it_is_taken() {
        let heard = Arc::default();
        let sink = Box::new(Narrow { room: 1, heard: Arc::clone(&heard) });
        let mut ear = Ear::new(sink, Duration::ZERO);
        assert_eq!((ear.queued(3).await, ear.queued(3).await), (Ok(()), Ok(())));
        let slow = ear.tell(Event::Reasoning { text: "x".to_owned() }).await;
        assert_eq!(slow, Err(End::Trouble(Trouble::Here(Failure::SlowConsumer { limit_s: 0 }))));
        assert_eq!(*heard.lock().unwrap(), [Event::Queued { ahead: 3 }]);
    }
}
