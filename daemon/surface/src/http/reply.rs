//! How does HTTP carry an answer? As one JSON body, or as server-sent events.

use crate::bodies::{Answering, Asked, Piece, Wire};
use crate::refusal::Refusal;
use axum::Json;
use axum::http::HeaderValue;
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures_util::{Stream, StreamExt, stream};
use sparsed_engine::Service;
use std::convert::Infallible;

/// Hands the request to the engine and answers as the client wants it.
///
/// # Errors
/// Why no answer has begun.
pub(crate) async fn reply<W: Wire>(service: &Service, asked: Asked<W>) -> Result<Response, Refusal> {
    let streams = asked.reply.stream;
    let answering = Answering::begin(service, asked).await?;
    let id = answering.id().to_owned();
    let response = if streams { pieces(answering) } else { Json(answering.whole().await?).into_response() };
    Ok(called(&id, response))
}

/// The answer with its name in the head, where OpenAI's clients look for it.
pub(crate) fn called(id: &str, mut response: Response) -> Response {
    if let Ok(id) = HeaderValue::from_str(id) {
        response.headers_mut().insert("x-request-id", id);
    }
    response
}

/// The answer as server-sent events.
fn pieces<W: Wire>(mut answering: Answering<W>) -> Response {
    answering.open();
    events(stream::unfold(Some(answering), |answering| async move {
        let mut answering = answering?;
        let (data, rest) = match answering.next().await {
            Some(Piece::Chunk(chunk)) => (chunk.to_string(), Some(answering)),
            Some(Piece::Failed(refusal)) => (refusal.body().to_string(), None),
            None => ("[DONE]".to_owned(), None),
        };
        Some((data, rest))
    }))
}

/// Server-sent events with this data.
pub(crate) fn events(data: impl Stream<Item = String> + Send + 'static) -> Response {
    let events = data.map(|data| Ok::<_, Infallible>(Event::default().data(data)));
    // Comments keep proxies awake during a long prefill.
    Sse::new(events).keep_alive(KeepAlive::default()).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::accept::{ServeOptions, serve};
    use crate::bodies::ChatWire;
    use crate::latency;
    use crate::unix::UnixDoor;
    use axum::Router;
    use axum::routing::get;
    use std::io::{BufRead, BufReader, Write};
    use std::sync::{Arc, Mutex};
    use std::time::{Duration, Instant};

    /// A measurement, as D-Bus has one: how much later than the engine gives a token out has a client its event?
    #[test]
    #[ignore = "a measurement; run it with --nocapture"]
    #[expect(clippy::print_stdout, reason = "a measurement says what it has measured")]
    fn measure_the_time_from_the_engine_to_the_client() {
        let (answering, engine) = Answering::of(ChatWire);
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("api.sock");
        let runtime = latency::runtime();
        let (answering, options) = (
            Arc::new(Mutex::new(Some(answering))),
            ServeOptions {
                connections_max: 4,
                connections_per_user: 4,
                body_bytes_max: 1024,
                background: 0,
                reader_patience: Duration::from_secs(60),
                stop_timeout: Duration::ZERO,
            },
        );
        let route = get(move || std::future::ready(pieces(answering.lock().unwrap().take().unwrap())));
        let listener = runtime.block_on(async { tokio::net::UnixListener::bind(&path).unwrap() });
        let door = UnixDoor::new(listener, options.connections_per_user);
        runtime.spawn(serve(door, Router::new().route("/", route), options, std::future::pending()));
        let mut stream = std::os::unix::net::UnixStream::connect(&path).unwrap();
        stream.write_all(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n").unwrap();
        let reader = std::thread::spawn(move || {
            let lines = BufReader::new(stream).lines().map(Result::unwrap);
            // The first event is the opening one.
            let events = lines.filter(|line| line.starts_with("data: ")).skip(1);
            events.map(|_| Instant::now()).take(latency::TOKENS).collect::<Vec<Instant>>()
        });
        println!("{}", latency::measure(engine, reader));
    }
}
