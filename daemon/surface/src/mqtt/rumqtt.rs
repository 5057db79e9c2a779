//! How does rumqttc carry a connection? With as little of its own memory as possible.
//!
//! Measured and read in 0.25: a request channel with room loses publishes when a connection ends, so it has none;
//! `poll` must not be dropped half-way, so a task of its own does nothing else; its state after a broken connection can
//! hold a collision for ever, so each connection has an event loop of its own, and the desk sends again what was not
//! acknowledged. A packet that is larger than the broker takes ends the connection, so the desk cuts answers first.

use super::desk::{Ack, Input, Line};
use super::link::{Command, Delta, MqttLink, Told, Wire};
use super::message::{Address, Publish};
use super::options::MqttOptions;
use rumqttc::v5::mqttbytes::QoS;
use rumqttc::v5::mqttbytes::v5::{
    ConnAck, Filter, LastWill, Packet, PubAckReason, Publish as Packed, PublishProperties, RetainForwardRule,
    SubscribeReasonCode,
};
use rumqttc::v5::{AsyncClient, ClientError, Event, EventLoop};
use rumqttc::{Outgoing, TlsConfiguration, Transport};
use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::mpsc;

/// Most publishes of ours that the broker may not have acknowledged.
const WINDOW_MAX: u16 = 16;
/// Numbers of packets that are used in turn; more than the window, since brokers may acknowledge out of turn.
const PACKET_NUMBERS: u16 = 64;
/// Publishes of the broker's that we may not have acknowledged: they wait for the disk only.
const UNACKED_NODE: u16 = 64;
/// Bytes of a packet beside its payload: topics and properties.
const PACKET_FRAME_BYTES: u32 = 4096;
/// How long the broker keeps the node's session, in seconds: what comes for a node that is away for less is not lost.
const SESSION_EXPIRY_S: u32 = 24 * 3600;
/// How long a connection may take to be made, in seconds.
const CONNECT_TIMEOUT_S: u64 = 10;
/// How long a goodbye may take.
const GOODBYE: Duration = Duration::from_secs(1);

/// rumqttc as a [`MqttLink`].
#[derive(Debug)]
pub(super) struct Rumqtt {
    options: MqttOptions,
    /// What the broker says when we are gone: topic and payload.
    will: (String, String),
}

/// Tokens of publishes on their way into the event loop, first ones first. It holds the lock for a push or a pop.
type Tokens = Arc<Mutex<VecDeque<u64>>>;

impl Rumqtt {
    pub(super) fn new(options: MqttOptions, will: (String, String)) -> Self {
        Self { options, will }
    }

    fn options(&self, line: Line) -> rumqttc::v5::MqttOptions {
        let mut options = Self::passing(&self.options, line);
        options.set_manual_acks(true);
        match line {
            Line::Pool => options.set_client_id(format!("{}-pool", self.options.client_id)),
            Line::Node => {
                let (topic, payload) = self.will.clone();
                options.set_last_will(LastWill::new(topic, payload, QoS::AtLeastOnce, true, None))
            }
        };
        options
    }

    /// What a client needs that has no will, and acknowledges what it hears.
    pub(super) fn passing(own: &MqttOptions, line: Line) -> rumqttc::v5::MqttOptions {
        let mut options = rumqttc::v5::MqttOptions::new(own.client_id.clone(), own.host.clone(), own.port);
        options.set_keep_alive(own.keepalive).set_connection_timeout(CONNECT_TIMEOUT_S);
        let packet_bytes_max = u32::try_from(own.payload_bytes_max).unwrap_or(u32::MAX);
        options.set_max_packet_size(Some(packet_bytes_max.saturating_mul(2).saturating_add(PACKET_FRAME_BYTES)));
        let mut network = options.network_options();
        network.set_tcp_nodelay(true); // a delta is a small packet, and is wanted now
        options.set_network_options(network);
        options.set_outgoing_inflight_upper_limit(PACKET_NUMBERS);
        // The pool's session ends with its connection, so that the broker gives its requests to somebody else; what one
        // node holds unanswered is what the others do not get.
        let (clean, expiry_s, receive_max) = match line {
            Line::Node => (false, SESSION_EXPIRY_S, UNACKED_NODE),
            Line::Pool => (true, 0, u16::try_from(own.running_max.max(1)).unwrap_or(u16::MAX)),
        };
        options.set_clean_start(clean).set_session_expiry_interval(Some(expiry_s));
        options.set_receive_maximum(Some(receive_max));
        if let Some(user) = &own.username {
            options.set_credentials(user, own.password.as_ref().map_or("", |password| password.as_str()));
        }
        if let Some(tls) = &own.tls {
            options.set_transport(Transport::tls_with_config(TlsConfiguration::Rustls(Arc::clone(tls))));
        }
        options
    }
}

impl MqttLink for Rumqtt {
    async fn carry(&self, wire: Wire) -> String {
        let Wire { line, epoch, desk, commands, deltas } = wire;
        // No room in the channel, see the module.
        let (client, eventloop) = AsyncClient::new(self.options(line), 0);
        let tokens = Tokens::default();
        let mut poll = tokio::spawn(poll(eventloop, line, epoch, desk, Arc::clone(&tokens)));
        let ended = tokio::select! {
            ended = &mut poll => Some(ended),
            () = write(client, commands, deltas, tokens) => tokio::time::timeout(GOODBYE, &mut poll).await.ok(),
        };
        poll.abort();
        match ended {
            Some(Ok(reason)) => reason,
            Some(Err(failure)) => failure.to_string(),
            None => "it was given up".to_owned(),
        }
    }
}

/// Turns commands and deltas into requests, one after the other, until it is to end.
async fn write(
    client: AsyncClient,
    mut commands: mpsc::Receiver<Command>,
    mut deltas: mpsc::Receiver<Delta>,
    tokens: Tokens,
) {
    let mut has_deltas = true;
    loop {
        let taken = tokio::select! {
            biased;
            command = commands.recv() => match command {
                Some(Command::Close) | None => {
                    let _gone = client.disconnect().await.is_err();
                    return;
                }
                Some(command) => obey(&client, command, &tokens).await,
            },
            delta = deltas.recv(), if has_deltas => match delta {
                None => {
                    has_deltas = false;
                    Ok(())
                }
                Some(Delta { address, payload }) => {
                    let properties = properties(&address, None);
                    client.publish_with_properties(address.topic, QoS::AtMostOnce, false, payload, properties).await
                }
            },
        };
        if taken.is_err() {
            return; // the event loop has ended, and says why
        }
    }
}

async fn obey(client: &AsyncClient, command: Command, tokens: &Tokens) -> Result<(), ClientError> {
    match command {
        Command::Subscribe(filters) => {
            let filter = |path| {
                let mut filter = Filter::new(path, QoS::AtLeastOnce);
                filter.retain_forward_rule = RetainForwardRule::Never;
                filter
            };
            client.subscribe_many(filters.into_iter().map(filter)).await
        }
        Command::Unsubscribe(filters) => {
            for filter in filters {
                client.unsubscribe(filter).await?;
            }
            Ok(())
        }
        Command::Publish { token, address, payload, retain, expiry_s } => {
            lock(tokens).push_back(token);
            let properties = properties(&address, expiry_s);
            client.publish_with_properties(address.topic, QoS::AtLeastOnce, retain, payload, properties).await
        }
        Command::Ack(pkid) => {
            let mut publish = Packed::new("", QoS::AtLeastOnce, "", None);
            publish.pkid = pkid;
            client.ack(&publish).await
        }
        Command::Close => client.disconnect().await,
    }
}

fn properties(address: &Address, expiry_s: Option<u32>) -> PublishProperties {
    PublishProperties {
        payload_format_indicator: Some(1),
        content_type: Some("application/json".to_owned()),
        correlation_data: address.correlation.clone().map(Into::into),
        message_expiry_interval: expiry_s,
        ..PublishProperties::default()
    }
}

/// Polls and tells the desk, until the connection ends; answers why.
async fn poll(mut eventloop: EventLoop, line: Line, epoch: u64, desk: mpsc::Sender<Told>, tokens: Tokens) -> String {
    // The desk's tokens by the numbers of their packets.
    let mut flying = HashMap::<u16, u64>::new();
    loop {
        let event = match eventloop.poll().await {
            Ok(event) => event,
            Err(error) => return error.to_string(),
        };
        let input = match event {
            Event::Incoming(Packet::ConnAck(ack)) => up(&ack, line, epoch),
            Event::Incoming(Packet::Publish(publish)) => heard(&publish, line, epoch),
            Event::Incoming(Packet::PubAck(ack)) => {
                let Some(token) = flying.remove(&ack.pkid) else { continue };
                let is_taken = matches!(ack.reason, PubAckReason::Success | PubAckReason::NoMatchingSubscribers);
                Input::Landed { token, refused: (!is_taken).then(|| format!("{:?}", ack.reason)) }
            }
            Event::Incoming(Packet::SubAck(ack)) => {
                if ack.return_codes.iter().any(|code| !matches!(code, SubscribeReasonCode::Success(_))) {
                    log::error!(codes:? = ack.return_codes; "the MQTT broker does not let us subscribe; see its ACL");
                }
                continue;
            }
            Event::Outgoing(Outgoing::Publish(pkid)) if pkid != 0 => {
                let Some(token) = lock(&tokens).pop_front() else { return "a publish that nobody made".to_owned() };
                flying.insert(pkid, token);
                continue;
            }
            // Two publishes would have one number: the broker has not acknowledged the one before for long.
            Event::Outgoing(Outgoing::AwaitAck(_)) => return "the broker acknowledges out of turn".to_owned(),
            Event::Outgoing(Outgoing::Disconnect) => return "goodbye".to_owned(),
            _ => continue,
        };
        if desk.send(Told::Input(input)).await.is_err() {
            return "the desk has ended".to_owned();
        }
    }
}

fn up(ack: &ConnAck, line: Line, epoch: u64) -> Input {
    let properties = ack.properties.as_ref();
    let receive_max = properties.and_then(|properties| properties.receive_max).unwrap_or(u16::MAX);
    let window = usize::from(WINDOW_MAX.min(receive_max.saturating_sub(2)).max(1));
    let packet_bytes_max = properties.and_then(|properties| properties.max_packet_size).map(|bytes| bytes as usize);
    log::info!(line:? = line, session_present = ack.session_present; "connected to the MQTT broker");
    Input::Up { line, epoch, window, packet_bytes_max }
}

fn heard(publish: &Packed, line: Line, epoch: u64) -> Input {
    let properties = publish.properties.clone().unwrap_or_default();
    let ack = (publish.qos != QoS::AtMostOnce).then_some(Ack { line, epoch, pkid: publish.pkid });
    let publish = Publish {
        // What is no text is no topic of ours.
        topic: String::from_utf8_lossy(&publish.topic).into_owned(),
        payload: publish.payload.to_vec(),
        response_topic: properties.response_topic,
        correlation: properties.correlation_data.map(|data| data.to_vec()),
        expiry_s: properties.message_expiry_interval,
    };
    Input::Publish { line, ack, publish }
}

fn lock(tokens: &Tokens) -> std::sync::MutexGuard<'_, VecDeque<u64>> {
    tokens.lock().unwrap_or_else(PoisonError::into_inner)
}
