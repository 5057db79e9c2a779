//! How do apps and devices reach us? By OpenAI-compatible HTTP over a Unix socket and loopback TCP, by D-Bus, and by
//! MQTT.
//!
//! The only crate that knows wire formats. It translates: requests become [`sparsed_engine::api`] values, events become
//! bytes. It computes nothing; what takes long (templates, tokenizing) goes to tokio's blocking pool.
#![forbid(unsafe_code)]

mod accept;
mod additions;
mod beat;
mod bodies;
mod dbus;
mod http;
#[cfg(test)]
mod latency;
mod mqtt;
mod patience;
mod refusal;
mod shares;
mod strangers;
mod tcp;
mod unix;
mod unread;

pub use accept::ServeOptions;
pub use additions::{AddFailure, AddStage, AddStep, AddedModel, ModelStore, NewModel};
pub use bodies::sessions::VERBS_AT_A_TIME;
pub use dbus::{Bus, DbusOptions, sealed, serve_dbus};
pub use mqtt::{
    MqttDoor, MqttOptions, MqttProbe, MqttProbeError, MqttSettings, TlsError, mqtt_probe, seal_journal_anew, tls_config,
};
pub use tcp::{ApiKeys, TcpDoor};

use sparsed_engine::Service;
use std::future::Future;
use tokio::net::UnixListener;

/// Serves HTTP/1.1 on `listener`, and on `tcp` if there is one, until what `stop` makes resolves, then lets running
/// requests end. Responses in the background that the end of another daemon has cut go on meanwhile.
pub async fn serve<S: Future<Output = ()>>(
    listener: UnixListener,
    tcp: Option<TcpDoor>,
    service: Service,
    options: ServeOptions,
    stop: impl Fn() -> S,
) {
    let runs = bodies::responses::Runs::default();
    let router = http::router(service.clone(), runs.clone(), options.body_bytes_max);
    let unix =
        accept::serve(unix::UnixDoor::new(listener, options.connections_per_user), router.clone(), options, stop());
    let tcp = async {
        if let Some(door) = tcp {
            let door = tcp::CountedDoor::new(door, options.connections_max, options.connections_per_user);
            accept::serve(door, router, options, stop()).await;
        }
    };
    let unfinished = async {
        tokio::select! {
            () = bodies::responses::finish_all(&service, &runs, options.background) => {}
            () = stop() => {}
        }
    };
    tokio::join!(unix, tcp, unfinished);
}
