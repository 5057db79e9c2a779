//! `[mqtt]`: which broker, who are we there, and what may its clients ask for?

use super::Bytes;
use serde::{Deserialize, Serialize};
use std::net::IpAddr;
use std::path::PathBuf;

/// Longest name of a node, pool or client.
const NAME_BYTES_MAX: usize = 64;
/// Ports when the broker's address does not say.
const PORT: u16 = 1883;
const PORT_TLS: u16 = 8883;

/// `[mqtt]`
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Mqtt {
    /// `mqtts://host[:port]` or `mqtt://host[:port]`; empty: no MQTT.
    pub broker: String,
    /// What all topics begin with.
    pub root: String,
    /// This node's segment of topics; `None`: the host's name.
    pub node: Option<String>,
    /// The pool that it works for.
    pub pool: Option<String>,
    /// Who it is to the broker; `None`: `sparsed-` and the node.
    pub client_id: Option<String>,
    /// Its name.
    pub username: Option<String>,
    /// The file with its secret; `None`: the credential `sparsed.mqtt-password`, if there is one.
    pub password_file: Option<PathBuf>,
    /// Certificates of authorities; `None`: the credential `sparsed.mqtt-ca`, or else the system's.
    pub ca_file: Option<PathBuf>,
    /// Its own certificate; `None`: the credential `sparsed.mqtt-cert`, if there is one.
    pub cert_file: Option<PathBuf>,
    /// The key to it; `None`: the credential `sparsed.mqtt-key`.
    pub key_file: Option<PathBuf>,
    /// Whether a broker elsewhere may be spoken to without TLS, or without saying who we are.
    pub allow_insecure: bool,
    /// Filters of further topics that answers may go to.
    pub reply_topics: Vec<String>,
    /// Seconds of silence after which the broker is asked whether it is there.
    pub keepalive_s: u64,
    /// Most bytes of a request.
    pub payload: Bytes,
    /// Most unanswered requests of a client.
    pub per_client: u32,
    /// Most unanswered requests.
    pub pending: u32,
    /// Most requests that are answered at a time.
    pub running: u32,
    /// Most bytes of requests and answers that are held.
    pub inbox: Bytes,
    /// Seconds that an answer is kept for those who ask again.
    pub keep_s: u64,
    /// Seconds that a request has which does not say.
    pub deadline_s: u64,
}

/// A broker's address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Broker {
    /// Whether it speaks TLS.
    pub tls: bool,
    /// Its name or address.
    pub host: String,
    /// Its port.
    pub port: u16,
}

impl Default for Mqtt {
    fn default() -> Self {
        Self {
            broker: String::new(),
            root: "sparsed/v1".to_owned(),
            node: None,
            pool: None,
            client_id: None,
            username: None,
            password_file: None,
            ca_file: None,
            cert_file: None,
            key_file: None,
            allow_insecure: false,
            reply_topics: Vec::new(),
            keepalive_s: 15,
            payload: Bytes(256 << 10),
            per_client: 16,
            pending: 256,
            running: 16,
            inbox: Bytes(64 << 20),
            keep_s: 900,
            deadline_s: 600,
        }
    }
}

impl Mqtt {
    /// The broker, if there is to be one.
    ///
    /// # Errors
    /// An address that is none.
    pub fn broker(&self) -> Result<Option<Broker>, String> {
        if self.broker.is_empty() {
            return Ok(None);
        }
        // The address itself is not repeated: it may hold a password.
        let wrong = || "must be mqtts://HOST[:PORT] or mqtt://HOST[:PORT]".to_owned();
        if self.broker.contains('@') {
            return Err("must have no user or password; these go into mqtt.username and mqtt.password_file".to_owned());
        }
        let (scheme, rest) = self.broker.split_once("://").ok_or_else(wrong)?;
        let tls = match scheme {
            "mqtts" => true,
            "mqtt" => false,
            _ => return Err(wrong()),
        };
        let rest = rest.strip_suffix('/').unwrap_or(rest);
        let has_port = rest.rfind(':').is_some_and(|at| !rest[at..].contains(']'));
        let (host, port) = match rest.rsplit_once(':').filter(|_| has_port) {
            Some((host, port)) => (host, port.parse().map_err(|_| wrong())?),
            None => (rest, if tls { PORT_TLS } else { PORT }),
        };
        if host.is_empty() || host.contains(['/', ' ']) {
            return Err(wrong());
        }
        Ok(Some(Broker { tls, host: host.to_owned(), port }))
    }

    /// The ranges of its numbers: key, value, least, greatest.
    pub(super) fn ranges(&self) -> Vec<(String, u64, u64, u64)> {
        [
            ("keepalive_s", self.keepalive_s, 5, 3600),
            ("payload", self.payload.0, 1024, 64 << 20),
            ("per_client", self.per_client.into(), 1, 65536),
            ("pending", self.pending.into(), 1, 65536),
            ("running", self.running.into(), 1, 1024),
            ("inbox", self.inbox.0, 1 << 20, 1 << 40),
            ("keep_s", self.keep_s, 1, 86_400),
            ("deadline_s", self.deadline_s, 1, 86_400),
        ]
        .map(|(key, value, least, greatest)| (format!("mqtt.{key}"), value, least, greatest))
        .into()
    }

    /// The first value that is none, and what it must be.
    pub(super) fn wrong_value(&self) -> Option<(String, String)> {
        let broker = match self.broker() {
            Ok(broker) => broker?,
            Err(reason) => return Some(("mqtt.broker".to_owned(), reason)),
        };
        let names = [("node", &self.node), ("pool", &self.pool), ("client_id", &self.client_id)];
        for (key, name) in names {
            if name.as_ref().is_some_and(|name| !is_name(name)) {
                let reason = "must have 1 to 64 letters, digits, '-', '_' or '.'".to_owned();
                return Some((format!("mqtt.{key}"), reason));
            }
        }
        // Levels of the tree that are none of a node's.
        if let Some(name @ ("pool" | "reply")) = self.node.as_deref() {
            return Some((
                "mqtt.node".to_owned(),
                format!("must not be '{name}', below which others have their topics"),
            ));
        }
        if !self.root.split('/').all(is_name) {
            return Some(("mqtt.root".to_owned(), "must be names with slashes between them".to_owned()));
        }
        if self.cert_file.is_some() != self.key_file.is_some() {
            return Some(("mqtt.cert_file".to_owned(), "and mqtt.key_file go together".to_owned()));
        }
        if self.allow_insecure || broker.is_here() {
            return None;
        }
        if !broker.tls {
            let reason = "is elsewhere and without TLS; use mqtts://, or set mqtt.allow_insecure".to_owned();
            return Some(("mqtt.broker".to_owned(), reason));
        }
        None
    }
}

impl Broker {
    /// Whether it is on this machine.
    pub fn is_here(&self) -> bool {
        let address = self.host.trim_start_matches('[').trim_end_matches(']');
        self.host == "localhost" || address.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
    }
}

fn is_name(text: &str) -> bool {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    !text.is_empty() && text.len() <= NAME_BYTES_MAX && text.chars().all(is_plain)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mqtt(broker: &str) -> Mqtt {
        Mqtt { broker: broker.to_owned(), ..Mqtt::default() }
    }

    #[test]
    fn a_brokers_address_has_a_scheme_and_may_have_a_port() {
        let parsed =
            |text: &str| mqtt(text).broker().map(|broker| broker.map(|broker| (broker.tls, broker.host, broker.port)));
        assert_eq!(parsed(""), Ok(None));
        assert_eq!(parsed("mqtt://localhost"), Ok(Some((false, "localhost".to_owned(), 1883))));
        assert_eq!(parsed("mqtts://b.example:9/"), Ok(Some((true, "b.example".to_owned(), 9))));
        assert_eq!(parsed("mqtts://[::1]"), Ok(Some((true, "[::1]".to_owned(), 8883))));
        assert_eq!(parsed("mqtt://[::1]:7"), Ok(Some((false, "[::1]".to_owned(), 7))));
        for wrong in ["localhost", "http://x", "mqtt://", "mqtt://x:y", "mqtt://u@x"] {
            assert!(parsed(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_broker_elsewhere_needs_tls_unless_the_operator_insists() {
        let key = |mqtt: Mqtt| mqtt.wrong_value().map(|(key, _)| key);
        for here in ["mqtt://localhost", "mqtt://127.0.0.1:1884", "mqtt://[::1]", "mqtts://b.example"] {
            assert_eq!(key(mqtt(here)), None, "{here}");
        }
        assert_eq!(key(mqtt("mqtt://b.example")).as_deref(), Some("mqtt.broker"));
        assert_eq!(key(Mqtt { allow_insecure: true, ..mqtt("mqtt://b.example") }), None);
    }

    #[test]
    fn names_are_plain_since_they_stand_in_topics() {
        let with = |edit: fn(&mut Mqtt)| {
            let mut mqtt = mqtt("mqtt://localhost");
            edit(&mut mqtt);
            mqtt.wrong_value().map(|(key, _)| key).unwrap_or_default()
        };
        assert_eq!(with(|mqtt| mqtt.node = Some("a/b".to_owned())), "mqtt.node");
        assert_eq!(with(|mqtt| mqtt.node = Some("pool".to_owned())), "mqtt.node");
        assert_eq!(with(|mqtt| mqtt.node = Some("reply".to_owned())), "mqtt.node");
        assert_eq!(with(|mqtt| mqtt.pool = Some("+".to_owned())), "mqtt.pool");
        assert_eq!(with(|mqtt| mqtt.root = "a//b".to_owned()), "mqtt.root");
        assert_eq!(with(|mqtt| mqtt.cert_file = Some("x".into())), "mqtt.cert_file");
    }
}
