//! How does D-Bus carry an answer? As lines of JSON through a pipe that the daemon has made.
//!
//! Never as signals: a bus keeps what a slow reader does not take, and one of them drops the sender for it. The pipe
//! holds
//! little; when it is full the engine's channel fills, and the sequence pauses.

use super::requests::Request;
use super::values::{self, Dict};
use crate::bodies::{Answering, Piece, Wire};
use crate::refusal::Refusal;
use serde_json::{Map, Value};
use sparsed_engine::api::Failure;
use std::io::ErrorKind;
use std::time::Duration;
use tokio::io::Interest;
use tokio::net::unix::pipe::Sender;

/// How an answer ended.
#[derive(Debug)]
pub(super) struct Ended {
    /// OpenAI's `finish_reason`, or why there is none.
    pub(super) reason: String,
    /// Tokens counted, when it is complete.
    pub(super) usage: Dict,
}

/// Why a pipe takes no more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Broken {
    /// Cancelled, or nobody holds the other end.
    Cancelled,
    /// Nobody reads.
    Stalled,
}

/// As [`carry`], of an answer that is on its way to the engine; why it does not get there is a line, too.
pub(super) async fn carry_once_begun<W: Wire>(
    beginning: impl Future<Output = Result<(Answering<W>, bool), Refusal>>,
    pipe: &Sender,
    request: &Request,
    patience: Duration,
) -> Ended {
    let begun = tokio::select! {
        begun = beginning => begun,
        () = gone(pipe, request) => return Ended::broken(Broken::Cancelled, patience),
    };
    match begun {
        Ok((answering, streams)) => {
            request.answers();
            carry(answering, streams, pipe, request, patience).await
        }
        Err(refusal) => match write(pipe, refusal.body().to_string(), request, patience).await {
            Ok(()) => Ended::failed(&refusal),
            Err(broken) => Ended::broken(broken, patience),
        },
    }
}

/// Writes the answer into `pipe` until it ends, is cancelled, or is not read for `patience`.
pub(super) async fn carry<W: Wire>(
    mut answering: Answering<W>,
    streams: bool,
    pipe: &Sender,
    request: &Request,
    patience: Duration,
) -> Ended {
    if !streams {
        let whole = tokio::select! {
            whole = answering.whole() => whole,
            () = gone(pipe, request) => return Ended::broken(Broken::Cancelled, patience),
        };
        let (line, ended) = match whole {
            Ok(object) => {
                let reason = object["choices"][0]["finish_reason"].as_str().unwrap_or("stop");
                (object.to_string(), Ended::complete(reason, &object["usage"]))
            }
            Err(refusal) => (refusal.body().to_string(), Ended::failed(&refusal)),
        };
        return match write(pipe, line, request, patience).await {
            Ok(()) => ended,
            Err(broken) => Ended::broken(broken, patience),
        };
    }
    answering.open();
    let mut failed = None;
    loop {
        let piece = tokio::select! {
            piece = answering.next() => piece,
            () = gone(pipe, request) => return Ended::broken(Broken::Cancelled, patience),
        };
        let line = match piece {
            None => break,
            Some(Piece::Chunk(chunk)) => chunk.to_string(),
            Some(Piece::Failed(refusal)) => {
                failed = Some(Ended::failed(&refusal));
                refusal.body().to_string()
            }
        };
        if let Err(broken) = write(pipe, line, request, patience).await {
            return Ended::broken(broken, patience);
        }
    }
    failed.unwrap_or_else(|| match answering.end() {
        Some((reason, usage)) => Ended::complete(reason, &usage),
        None => Ended::failed(&Failure::CutOff.into()),
    })
}

impl Ended {
    /// For OpenAI's `reason`, with the `usage` that all its answers have together.
    fn complete(reason: &str, usage: &Value) -> Self {
        let counts = [
            ("prompt_tokens", &usage["prompt_tokens"]),
            ("cached_tokens", &usage["prompt_tokens_details"]["cached_tokens"]),
            ("completion_tokens", &usage["completion_tokens"]),
        ];
        let usage: Map<String, Value> = counts.map(|(name, n)| (name.to_owned(), n.clone())).into_iter().collect();
        Self { reason: reason.to_owned(), usage: values::counts(&usage) }
    }

    /// For this reason.
    pub(super) fn failed(refusal: &Refusal) -> Self {
        Self { reason: refusal.name().code.to_owned(), usage: Dict::new() }
    }

    /// By its reader.
    pub(super) fn broken(broken: Broken, patience: Duration) -> Self {
        match broken {
            Broken::Cancelled => Self { reason: "cancelled".to_owned(), usage: Dict::new() },
            Broken::Stalled => Self::failed(&Failure::SlowConsumer { limit_s: patience.as_secs() }.into()),
        }
    }
}

/// Resolves when nobody wants the answer any more.
pub(super) async fn gone(pipe: &Sender, request: &Request) {
    tokio::select! {
        () = request.cancelled() => {}
        () = closed(pipe) => {}
    }
}

/// Resolves when the last reader has closed the pipe.
pub(super) async fn closed(pipe: &Sender) {
    loop {
        match pipe.ready(Interest::ERROR).await {
            Ok(ready) if !ready.is_error() && !ready.is_write_closed() => {}
            _ => return,
        }
    }
}

/// Writes a line as a whole, as fast as it is read.
pub(super) async fn write(
    pipe: &Sender,
    mut line: String,
    request: &Request,
    patience: Duration,
) -> Result<(), Broken> {
    line.push('\n');
    let mut rest = line.as_bytes();
    while !rest.is_empty() {
        match pipe.try_write(rest) {
            Ok(n) => rest = &rest[n..],
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                let writable = tokio::time::timeout(patience, pipe.writable());
                tokio::select! {
                    writable = writable => drop(writable.map_err(|_| Broken::Stalled)?),
                    () = gone(pipe, request) => return Err(Broken::Cancelled),
                }
            }
            Err(_) => return Err(Broken::Cancelled),
        }
    }
    request.count_line();
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bodies::ChatWire;
    use crate::dbus::requests::{Place, Requests};
    use crate::latency;
    use serde_json::json;
    use sparsed_engine::api::{Event, FinishReason, Finished, Timings, Usage};
    use std::io::{BufRead, BufReader};
    use std::sync::Arc;
    use std::time::Instant;

    const LONG: Duration = Duration::from_secs(60);

    fn place() -> Place {
        Arc::new(Requests::new()).begin(5, &":1.1".try_into().unwrap(), None, false).unwrap()
    }

    fn pipe() -> (Sender, std::fs::File) {
        let (sender, receiver) = tokio::net::unix::pipe::pipe().unwrap();
        (sender, receiver.into_blocking_fd().unwrap().into())
    }

    #[tokio::test]
    async fn a_line_that_is_larger_than_the_pipe_arrives_whole() {
        let (sender, file) = pipe();
        let reader = std::thread::spawn(move || BufReader::new(file).lines().next().unwrap().unwrap());
        write(&sender, "x".repeat(1 << 20), &place().request, LONG).await.unwrap();
        drop(sender);
        assert_eq!(reader.join().unwrap().len(), 1 << 20);
    }

    #[tokio::test]
    async fn a_reader_that_closes_is_noticed_before_anything_is_written() {
        let (sender, file) = pipe();
        drop(file);
        closed(&sender).await;
        assert_eq!(write(&sender, "x".to_owned(), &place().request, LONG).await, Err(Broken::Cancelled));
    }

    #[tokio::test]
    async fn a_reader_that_closes_while_the_pipe_is_full_ends_the_wait() {
        let (sender, file) = pipe();
        let place = place();
        let full = write(&sender, "x".repeat(1 << 20), &place.request, LONG);
        let close = async { drop(file) };
        let (written, ()) = tokio::join!(full, close);
        assert_eq!(written, Err(Broken::Cancelled));
    }

    #[tokio::test]
    async fn nobody_is_waited_for_without_end() {
        let (sender, _file) = pipe();
        let place = place();
        let short = Duration::from_millis(10);
        assert_eq!(write(&sender, "x".repeat(1 << 20), &place.request, short).await, Err(Broken::Stalled));
        assert_eq!(place.request.lines(), 0);
    }

    #[tokio::test]
    async fn cancel_ends_the_wait_for_a_reader() {
        let (sender, _file) = pipe();
        let place = place();
        place.request.cancel();
        assert_eq!(write(&sender, "x".repeat(1 << 20), &place.request, LONG).await, Err(Broken::Cancelled));
    }

    fn delta(text: &str) -> Event {
        Event::Delta { text: text.to_owned(), tokens: vec![1] }
    }

    #[tokio::test]
    async fn an_answer_is_a_line_for_each_chunk_and_one_for_its_failure() {
        let (answering, engine) = Answering::of(ChatWire);
        let (sender, file) = pipe();
        let place = place();
        for event in [delta("Par"), delta("is"), Event::Failed(Failure::ShuttingDown)] {
            engine.try_send((0, event)).unwrap();
        }
        let ended = carry(answering, true, &sender, &place.request, LONG).await;
        drop(sender);
        let lines: Vec<Value> =
            BufReader::new(file).lines().map(|line| serde_json::from_str(&line.unwrap()).unwrap()).collect();
        let text = |line: &Value| line["choices"][0]["delta"]["content"].as_str().unwrap_or_default().to_owned();
        assert_eq!(lines[..3].iter().map(text).collect::<String>(), "Paris");
        assert_eq!((lines.len(), &lines[3]["error"]["code"]), (4, &json!("shutting_down")));
        assert_eq!((ended.reason.as_str(), place.request.lines()), ("shutting_down", 4));
    }

    #[tokio::test]
    async fn an_answer_that_does_not_begin_is_one_line_and_a_wait_for_it_can_be_cancelled() {
        let (sender, file) = pipe();
        let place = place();
        let refused = std::future::ready(Err::<(Answering<ChatWire>, bool), Refusal>(Failure::ShuttingDown.into()));
        let ended = carry_once_begun(refused, &sender, &place.request, LONG).await;
        let never = std::future::pending::<Result<(Answering<ChatWire>, bool), Refusal>>();
        place.request.cancel();
        let cancelled = carry_once_begun(never, &sender, &place.request, LONG).await;
        assert_eq!((ended.reason.as_str(), cancelled.reason.as_str()), ("shutting_down", "cancelled"));
        drop(sender);
        let lines: Vec<String> = BufReader::new(file).lines().map(Result::unwrap).collect();
        assert!(lines.len() == 1 && lines[0].contains("shutting_down"), "{lines:?}");
    }

    /// A measurement: how much later than the engine gives a token out has a reader its line? The engine is a thread
    /// that computes all the time; the runtime is the daemon's.
    #[test]
    #[ignore = "a measurement; run it with --nocapture"]
    #[expect(clippy::print_stdout, reason = "a measurement says what it has measured")]
    fn measure_the_time_from_the_engine_to_the_reader() {
        let runtime = latency::runtime();
        let (answering, engine) = Answering::of(ChatWire);
        let (sender, file) = runtime.block_on(async { pipe() });
        let carried = runtime.spawn(async move {
            let place = place();
            carry(answering, true, &sender, &place.request, LONG).await
        });
        let reader = std::thread::spawn(move || {
            // The first line is the opening one.
            let lines = BufReader::new(file).lines().skip(1);
            lines.map(|_| Instant::now()).take(latency::TOKENS).collect::<Vec<Instant>>()
        });
        println!("{}", latency::measure(engine, reader));
        assert_eq!(runtime.block_on(carried).unwrap().reason, "cut_off");
    }

    /// The end of so many answers, each with five tokens to a prompt of seven, of which six were there; the second ends
    /// first, and the first one by its length.
    async fn end_of(n: usize, per_prompt: usize, streams: bool, include_usage: bool) -> (String, [u32; 3]) {
        let (answering, engine) = Answering::of_several(ChatWire, n, per_prompt, include_usage);
        for index in (0..n).rev() {
            let reason = if index == 0 { FinishReason::Length } else { FinishReason::Stop };
            let usage = Usage { prompt_tokens: 7, cached_tokens: 6, completion_tokens: 5, reasoning_tokens: 0 };
            let finished = Finished { reason, stopped_by: None, usage, timings: Timings::default() };
            engine.try_send((index, Event::Finished(finished))).unwrap();
        }
        let ((sender, _file), place) = (pipe(), place());
        let Ended { reason, usage } = carry(answering, streams, &sender, &place.request, LONG).await;
        let names = ["prompt_tokens", "cached_tokens", "completion_tokens"];
        (reason, names.map(|name| u32::try_from(&usage[name]).unwrap()))
    }

    #[tokio::test]
    async fn the_end_of_an_answer_is_the_same_however_it_was_carried() {
        for (streams, include_usage) in [(false, false), (true, false), (true, true)] {
            let end = async |n, per_prompt| end_of(n, per_prompt, streams, include_usage).await;
            let length = "length".to_owned();
            assert_eq!(end(1, 1).await, (length.clone(), [7, 6, 5]), "{streams} {include_usage}");
            assert_eq!(end(3, 3).await, (length.clone(), [7, 6, 15]), "a prompt counts once");
            assert_eq!(end(2, 1).await, (length, [14, 12, 10]), "of two prompts both");
        }
    }
}
