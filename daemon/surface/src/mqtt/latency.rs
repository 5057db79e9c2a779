//! How much later than the engine gives a token out has a client its delta, by a broker? A measurement with mosquitto.

use super::MqttOptions;
use super::desk::{Input, Line};
use super::link::{Deltas, Told, keep};
use super::message::tests::request;
use super::rumqtt::Rumqtt;
use super::work;
use crate::bodies::{Answering, ChatWire};
use crate::latency;
use rumqttc::v5::mqttbytes::QoS;
use rumqttc::v5::mqttbytes::v5::Packet;
use rumqttc::v5::{AsyncClient, Event};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::{mpsc, oneshot, watch};
use zeroize::Zeroizing;

fn options(port: u16, client_id: &str, dir: &Path) -> MqttOptions {
    let long = Duration::from_secs(60);
    MqttOptions {
        host: "127.0.0.1".to_owned(),
        port,
        tls: None,
        client_id: client_id.to_owned(),
        username: None,
        password: None,
        root: "s".to_owned(),
        node: "box".to_owned(),
        pool: None,
        reply_topics: Vec::new(),
        keepalive: long,
        payload_bytes_max: 1 << 18,
        per_client: 4,
        pending_max: 4,
        running_max: 4,
        held_bytes_max: 1 << 20,
        keep: long,
        deadline: long,
        stop_timeout: Duration::ZERO,
        dir: dir.to_owned(),
        key: Zeroizing::new([1; 32]),
    }
}

/// A broker on a free port, once it listens.
fn mosquitto() -> (std::process::Child, u16) {
    let port = TcpListener::bind("127.0.0.1:0").and_then(|free| free.local_addr()).unwrap().port();
    let mut command = std::process::Command::new("mosquitto");
    let broker = command.args(["-p", &port.to_string()]).stderr(std::process::Stdio::null()).spawn().unwrap();
    while TcpStream::connect(("127.0.0.1", port)).is_err() {
        std::thread::yield_now();
    }
    (broker, port)
}

/// Says in `ready` that it listens, then when each delta came.
async fn read(options: MqttOptions, topic: String, ready: oneshot::Sender<()>) -> Vec<Instant> {
    let (client, mut eventloop) = AsyncClient::new(Rumqtt::passing(&options, Line::Pool), 4);
    client.subscribe(topic, QoS::AtMostOnce).await.unwrap();
    let (mut ready, mut times) = (Some(ready), Vec::new());
    while times.len() < latency::TOKENS {
        match eventloop.poll().await.unwrap() {
            Event::Incoming(Packet::SubAck(_)) => ready.take().unwrap().send(()).unwrap(),
            Event::Incoming(Packet::Publish(_)) => times.push(Instant::now()),
            _ => {}
        }
    }
    times
}

#[test]
#[ignore = "a measurement; needs mosquitto, run it with --nocapture"]
#[expect(clippy::print_stdout, reason = "a measurement says what it has measured")]
fn measure_the_time_from_the_engine_to_the_client() {
    let dir = tempfile::tempdir().unwrap();
    let (mut broker, port) = mosquitto();
    let request = request(r#"{"id": "1", "stream": {"mode": "delta", "min_ms": 0}, "body": {}}"#);
    let (subscriber, topic) = (options(port, "lamp", dir.path()), request.reply.clone());
    let (ready, is_ready) = oneshot::channel();
    let reader = std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(read(subscriber, topic, ready))
    });
    is_ready.blocking_recv().unwrap();
    let runtime = latency::runtime();
    let (answering, engine) = Answering::of(ChatWire);
    let (way, deltas) = Deltas::new();
    let (desk, mut told) = mpsc::channel(64);
    let (_stop, stopped) = watch::channel(false);
    let link = Arc::new(Rumqtt::new(options(port, "box", dir.path()), ("s/box/status".to_owned(), "gone".to_owned())));
    runtime.spawn(keep(link, Line::Node, desk, Some(way), stopped));
    let commands = runtime.block_on(async {
        let mut commands = None;
        loop {
            match told.recv().await.unwrap() {
                Told::Opening(_, opened) => commands = Some(opened),
                Told::Input(Input::Up { .. }) => break commands,
                Told::Input(other) => panic!("{other:?}"),
            }
        }
    });
    runtime.spawn(async move { work::tell(answering, &request, "box", &deltas).await.is_ok() });
    println!("{}", latency::measure(engine, reader));
    // The connection would have ended, had nobody been there to command it.
    drop(commands);
    broker.kill().unwrap();
    broker.wait().unwrap();
}
