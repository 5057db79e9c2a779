//! How does a door hear the engine? One bounded channel for all answers to a request.
//!
//! When the client goes away and its door drops this, the engine sees the closed channel and frees the sequences. When
//! it does not read, the channel fills and all of them pause.

use super::answer::now;
use super::entry::Entry;
use crate::refusal::Refusal;
use sparsed_engine::Service;
use sparsed_engine::api::{Event, Failure, Refused, Request, Sink};
use tokio::sync::mpsc;
use tokio::sync::mpsc::error::TrySendError;

/// Events between engine and client; a client that reads slower than this pauses its sequence.
const CHANNEL: usize = 64;

/// A name for a request of this kind, for the client and the log.
pub(crate) fn name(kind: &str) -> String {
    format!("{kind}-{:016x}", getrandom::u64().unwrap_or_else(|_| now()))
}

struct ChannelSink {
    index: usize,
    events: mpsc::Sender<(usize, Event)>,
}

impl Sink for ChannelSink {
    fn offer(&mut self, event: Event) -> Result<(), Refused> {
        self.events.try_send((self.index, event)).map_err(|error| match error {
            TrySendError::Full((_, event)) => Refused::Full(event),
            TrySendError::Closed(_) => Refused::Closed,
        })
    }

    fn is_closed(&self) -> bool {
        self.events.is_closed()
    }
}

/// The receiving end of a request's answers.
#[derive(Debug)]
pub(crate) struct Listening {
    events: mpsc::Receiver<(usize, Event)>,
    /// Answers to each prompt.
    per_prompt: usize,
    entry: Entry,
}

#[cfg(test)]
impl Listening {
    /// One of which a test has the engine's end.
    pub(crate) fn of() -> (Self, mpsc::Sender<(usize, Event)>) {
        let (sender, events) = mpsc::channel(CHANNEL);
        (Self { events, per_prompt: 1, entry: Entry::default() }, sender)
    }
}

impl Listening {
    /// Hands a request and its siblings to the engine, which the log is to call `id`; so many of them in a row have one
    /// prompt. Their events are numbered in this order.
    ///
    /// # Errors
    /// The engine's, and that there is no room in its queue: that is known before the first byte of an answer is sent.
    pub(crate) async fn begin(
        service: &Service,
        id: &str,
        requests: impl IntoIterator<Item = Request>,
        per_prompt: usize,
    ) -> Result<Self, Refusal> {
        let requests: Vec<Request> = requests.into_iter().collect();
        // Answers without tokens say both that they are taken and that they are over before anybody listens.
        let (sender, mut events) = mpsc::channel(CHANNEL.max(2 * requests.len()));
        let mut entry = Entry::default();
        let hand_over = || {
            for (index, request) in requests.into_iter().enumerate() {
                entry.add(id, &request);
                service.submit(request, Box::new(ChannelSink { index, events: sender.clone() }))?;
            }
            Ok(())
        };
        let handed: Result<(), Failure> = hand_over();
        drop(sender);
        let refused = match handed {
            Err(failure) => failure,
            Ok(()) => match events.recv().await {
                Some((_, Event::Queued { .. })) => return Ok(Self { events, per_prompt, entry }),
                Some((_, Event::Failed(failure))) => failure,
                Some(_) => Failure::BackendFailed { reason: "an answer began before its turn".to_owned() },
                None => Failure::CutOff,
            },
        };
        entry.refused();
        Err(refused.into())
    }

    /// The next event, and of which answer it is. After the last event of the last answer, and when the engine has
    /// let go of it: [`Failure::CutOff`].
    pub(crate) async fn next(&mut self) -> (usize, Event) {
        let (index, event) = self.events.recv().await.unwrap_or((0, Event::Failed(Failure::CutOff)));
        self.entry.hear(&event, index.is_multiple_of(self.per_prompt));
        (index, event)
    }
}

/// Has the engine finish an answer that nobody hears.
///
/// # Errors
/// Why it could not be finished.
pub(crate) async fn finish(service: &Service, request: Request) -> Result<(), Refusal> {
    let mut listening = Listening::begin(service, &name("cut"), [request], 1).await?;
    loop {
        match listening.next().await.1 {
            Event::Finished(_) => return Ok(()),
            Event::Failed(failure) => return Err(failure.into()),
            _ => {}
        }
    }
}
