//! How much later than the engine gives a token out has a client it? The engine's side of such a measurement, the same
//! for each door.

use sparsed_engine::api::Event;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use tokio::runtime::{Builder, Runtime};
use tokio::sync::mpsc::Sender;

/// Tokens of an answer.
pub(crate) const TOKENS: usize = 2000;
/// What one takes to be computed.
const TOKEN_TIME: Duration = Duration::from_millis(2);

/// The daemon's runtime of surfaces.
pub(crate) fn runtime() -> Runtime {
    Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}

/// Gives tokens out from a thread that computes all the time, and says how late `reader` had them: it answers when.
pub(crate) fn measure(engine: Sender<(usize, Event)>, reader: JoinHandle<Vec<Instant>>) -> String {
    let compute = move || {
        let began = Instant::now();
        while began.elapsed() < TOKEN_TIME {
            std::hint::spin_loop();
        }
        let now = Instant::now();
        engine.try_send((0, Event::Delta { text: "word".to_owned(), tokens: vec![1] })).unwrap();
        now
    };
    let given = std::thread::spawn(move || (0..TOKENS).map(|_| compute()).collect::<Vec<Instant>>());
    let (given, read) = (given.join().unwrap(), reader.join().unwrap());
    let mut late: Vec<Duration> = given.iter().zip(&read).map(|(given, read)| *read - *given).collect();
    late.sort();
    assert_eq!(late.len(), TOKENS);
    format!("p50 {:?}, p90 {:?}, p99 {:?}", late[TOKENS / 2], late[TOKENS * 9 / 10], late[TOKENS * 99 / 100])
}
