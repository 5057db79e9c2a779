//! Is the node there? A client of the broker that asks it something, as `sparsectl mqtt test` does.

use super::desk::Line;
use super::options::MqttOptions;
use super::rumqtt::Rumqtt;
use rumqttc::v5::mqttbytes::QoS;
use rumqttc::v5::mqttbytes::v5::{Filter, Packet, SubscribeReasonCode};
use rumqttc::v5::{AsyncClient, Event, EventLoop};
use serde_json::{Value, json};
use std::time::{Duration, Instant};

/// Requests that the client holds for its event loop, which is polled by the same task.
const REQUESTS: usize = 8;

/// What a probe has found.
#[derive(Clone, Debug)]
pub struct MqttProbe {
    /// The node's retained status, if it came before the answer.
    pub status: Option<Value>,
    /// From the beginning until the broker had let us in and taken our subscriptions.
    pub connected: Duration,
    /// From the request until its answer.
    pub answered: Duration,
    /// The answer.
    pub answer: Value,
}

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MqttProbeError {
    /// The connection failed.
    #[error("the broker {host}:{port}: {reason}")]
    Broker {
        /// Its name.
        host: String,
        /// Its port.
        port: u16,
        /// What happened.
        reason: String,
    },
    /// The broker's ACL is in the way.
    #[error("the broker lets '{client}' not subscribe to {topic}; see the ACL in packaging/mqtt.md")]
    Denied {
        /// Who we are.
        client: String,
        /// Where the answer would come.
        topic: String,
    },
    /// Nobody answered.
    #[error("no answer from node '{node}' within {} s; is it online, and does the ACL let '{client}' ask it?", patience.as_secs())]
    Silence {
        /// The node.
        node: String,
        /// Who we are.
        client: String,
        /// How long was waited.
        patience: Duration,
    },
}

/// Asks the node of `options` for the completion of `prompt`, by its broker, as the client with `-test` behind its
/// name.
///
/// # Errors
/// Why there is no answer.
pub async fn mqtt_probe(options: &MqttOptions, prompt: &str, patience: Duration) -> Result<MqttProbe, MqttProbeError> {
    let client_id = format!("{}-test", options.client_id);
    let own = MqttOptions { client_id: client_id.clone(), ..options.clone() };
    let silence = || MqttProbeError::Silence { node: own.node.clone(), client: client_id.clone(), patience };
    let asked = tokio::time::timeout(patience, ask(&own, prompt)).await;
    asked.unwrap_or_else(|_| Err(silence()))
}

async fn ask(options: &MqttOptions, prompt: &str) -> Result<MqttProbe, MqttProbeError> {
    let begun = Instant::now();
    let MqttOptions { root, node, client_id, .. } = options;
    let id = format!("{:016x}", getrandom::u64().unwrap_or_default());
    let (status_topic, reply) = (format!("{root}/{node}/status"), format!("{root}/{node}/res/{client_id}/{id}"));
    let wires = Rumqtt::passing(options, Line::Pool);
    let (client, mut eventloop) = AsyncClient::new(wires, REQUESTS);
    let filters = [&status_topic, &reply].map(|topic| Filter::new(topic.as_str(), QoS::AtLeastOnce));
    let broker = |reason: String| MqttProbeError::Broker { host: options.host.clone(), port: options.port, reason };
    client.try_subscribe_many(filters).map_err(|error| broker(error.to_string()))?;
    let (mut status, mut connected, mut sent) = (None, Duration::ZERO, begun);
    loop {
        match next(&mut eventloop).await.map_err(broker)? {
            Packet::SubAck(ack) => {
                if !matches!(ack.return_codes.last(), Some(SubscribeReasonCode::Success(_))) {
                    return Err(MqttProbeError::Denied { client: client_id.clone(), topic: reply });
                }
                (connected, sent) = (begun.elapsed(), Instant::now());
                let body = json!({ "prompt": prompt, "max_tokens": 16, "temperature": 0 });
                let topic = format!("{root}/{node}/req/{client_id}/complete");
                let payload = json!({ "id": id, "body": body }).to_string();
                client
                    .try_publish(topic, QoS::AtLeastOnce, false, payload)
                    .map_err(|error| broker(error.to_string()))?;
            }
            Packet::Publish(publish) => {
                let payload = serde_json::from_slice(&publish.payload).unwrap_or(Value::Null);
                if publish.topic == status_topic.as_bytes() {
                    status = Some(payload);
                } else {
                    return Ok(MqttProbe { status, connected, answered: sent.elapsed(), answer: payload });
                }
            }
            _ => {}
        }
    }
}

/// The next packet of the broker's.
async fn next(eventloop: &mut EventLoop) -> Result<Packet, String> {
    loop {
        if let Event::Incoming(packet) = eventloop.poll().await.map_err(|error| error.to_string())? {
            return Ok(packet);
        }
    }
}
