//! Are the files right that the configuration names for its doors and for engines elsewhere? API keys, passwords,
//! certificates.
//!
//! The daemon reads them before it opens anything: what is wrong with them is a mistake of the configuration, and who
//! waits hears so. One that cannot be read may be on a disk that comes late, and is waited for: MQTT's by its door
//! alone. The tool reads them in the same way, as far as it may.

use crate::config::{Config, Paths};
use crate::state::may_mend_itself;
use crate::{mqtt, tcp, upstream};
use anyhow::Context;
use sparsed_surface::{ApiKeys, MqttOptions};
use sparsed_upstream::Client;
use std::path::Path;

/// What was read.
#[derive(Debug, Default)]
pub struct Named {
    /// Who may come in over TCP, where anybody may.
    pub(crate) keys: Option<ApiKeys>,
    /// With what MQTT's door opens, where there is to be one.
    pub(crate) mqtt: Option<MqttOptions>,
    /// Whether it opens later: a file of its own cannot be read.
    pub(crate) mqtt_comes: bool,
    /// A client for each model that an engine elsewhere computes.
    pub(crate) upstreams: Vec<(String, Client)>,
}

/// A table of the configuration with what is wrong with a file of it, or with one that it lacks.
#[derive(Debug)]
pub(crate) struct Trouble {
    /// As `[tcp]`.
    pub(crate) table: &'static str,
    pub(crate) error: anyhow::Error,
}

pub(crate) const TCP: &str = "[tcp]";
const MQTT: &str = "[mqtt]";
const RELAY: &str = "[model.NAME.relay]";

impl Named {
    /// Reads them for a daemon that was handed TCP sockets if it `has_tcp`.
    ///
    /// # Errors
    /// The first that is wrong.
    pub fn read(config: &Config, has_tcp: bool) -> anyhow::Result<Self> {
        let wants_keys = has_tcp || config.tcp.listen.is_some();
        let keys = wants_keys.then(|| tcp::keys(&config.tcp)).transpose().context(TCP)?;
        let upstreams = upstream::clients(config)?;
        let (mqtt, mqtt_comes) = match mqtt::options(config, &Paths::of(config)) {
            Err(error) if may_mend_itself(&error) => {
                log::error!(reason:% = format!("{error:#}"); "MQTT is not served until its files can be read");
                (None, true)
            }
            options => (options.context(MQTT)?, false),
        };
        Ok(Self { keys, mqtt, mqtt_comes, upstreams })
    }

    /// All that is wrong, for a daemon that will be handed TCP sockets if it `has_tcp`. Whoever names API keys means to
    /// have it handed some.
    pub(crate) fn troubles(config: &Config, has_tcp: bool) -> Vec<Trouble> {
        let wants_keys = has_tcp || config.tcp.listen.is_some() || config.tcp.keys.is_some();
        let keys = wants_keys.then(|| tcp::keys(&config.tcp)).transpose();
        let reads = [
            (TCP, keys.map(drop)),
            (MQTT, mqtt::options(config, &Paths::of(config)).map(drop)),
            (RELAY, upstream::clients(config).map(drop)),
        ];
        reads.into_iter().filter_map(|(table, read)| Some(Trouble { table, error: read.err()? })).collect()
    }
}

/// The files that `config` names for what is read above, and the keys that name them, dotted.
pub(crate) fn files(config: &Config) -> Vec<(String, &Path)> {
    let (tcp, mqtt) = (&config.tcp, &config.mqtt);
    let of_doors = [
        ("tcp.keys", tcp.keys.as_ref()),
        ("mqtt.password_file", mqtt.password_file.as_ref()),
        ("mqtt.ca_file", mqtt.ca_file.as_ref()),
        ("mqtt.cert_file", mqtt.cert_file.as_ref()),
        ("mqtt.key_file", mqtt.key_file.as_ref()),
    ];
    let has_broker = !mqtt.broker.is_empty();
    let of_doors = of_doors.into_iter().filter(|(key, _)| has_broker || !key.starts_with("mqtt."));
    let of_relays = config.model.iter().filter_map(|(name, model)| Some((name, model.relay.as_ref()?)));
    let of_relays = of_relays.flat_map(|(name, relay)| {
        let key = |key: &str| crate::config::dotted(&["model", name, "relay", key]);
        [(key("key_file"), relay.key_file.as_deref()), (key("ca_file"), relay.ca_file.as_deref())]
    });
    let of_doors = of_doors.map(|(key, path)| (key.to_owned(), path.map(std::path::PathBuf::as_path)));
    of_doors.chain(of_relays).filter_map(|(key, path)| Some((key, path?))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn what_the_start_would_stumble_over_is_found_without_one() {
        let dir = tempfile::tempdir().unwrap();
        let (keys, none) = (dir.path().join("keys"), dir.path().join("none"));
        std::fs::write(&keys, "hall 0123456789abcdef\n").unwrap();
        std::fs::set_permissions(&keys, std::fs::Permissions::from_mode(0o644)).unwrap();
        let set = |key: &str, path: &Path| format!("{key}={}", path.display());
        let (open, absent) = (set("tcp.keys", &keys), set("mqtt.password_file", &none));
        let (no_key, no_ca) = (set("model.big.relay.key_file", &none), set("model.big.relay.ca_file", &keys));
        let upstream = "model.big.upstream=https://127.0.0.1:9/v1";
        // The last word: whether another start may find it mended.
        let cases: [(&[&str], &str, &str, bool); 5] = [
            (&["tcp.listen=127.0.0.1:0"], "[tcp]", "a TCP socket needs API keys", false),
            (&["tcp.listen=127.0.0.1:0", &open], "[tcp]", "may be read by others", false),
            (&["mqtt.broker=mqtts://b.example"], "[mqtt]", "would not know who this is", false),
            (&[upstream, &no_ca], "[model.NAME.relay]", "has no certificate", false),
            (&["model.big.upstream=http://127.0.0.1:9/v1", &no_key], "[model.NAME.relay]", "No such file", true),
        ];
        for (sets, table, said, may_pass) in cases {
            let config = Config::of(sets);
            let troubles = Named::troubles(&config, false);
            assert_eq!(troubles.iter().map(|trouble| trouble.table).collect::<Vec<_>>(), [table], "{troubles:?}");
            let error = Named::read(&config, false).unwrap_err();
            let read = format!("{error:#}");
            assert!(read.contains(said) && read.ends_with(&format!("{:#}", troubles[0].error)), "{read}");
            assert_eq!(may_mend_itself(&error), may_pass, "{read}");
        }
        // A password that is not there keeps no other door shut.
        let without = Config::of(&["mqtt.broker=mqtt://localhost", &absent]);
        assert_eq!(Named::troubles(&without, false).len(), 1);
        let read = Named::read(&without, false).unwrap();
        assert!(read.mqtt_comes && read.mqtt.is_none());
        // What is switched off needs no file.
        let off = Config::of(&[&absent]);
        assert!(Named::troubles(&off, false).is_empty() && files(&off).is_empty());
    }

    #[test]
    fn the_keys_of_a_socket_that_the_service_manager_opens_are_looked_at_before_it_is_handed_over() {
        let dir = tempfile::tempdir().unwrap();
        let keys = dir.path().join("keys");
        std::fs::write(&keys, "hall 0123456789abcdef\n").unwrap();
        std::fs::set_permissions(&keys, std::fs::Permissions::from_mode(0o644)).unwrap();
        let named = Config::of(&[format!("tcp.keys={}", keys.display())]);
        let read = format!("{:#}", Named::read(&named, true).unwrap_err());
        // Whoever asks need not be told that there is such a socket.
        for has_tcp in [false, true] {
            let troubles = Named::troubles(&named, has_tcp);
            assert_eq!(troubles.iter().map(|trouble| trouble.table).collect::<Vec<_>>(), ["[tcp]"], "{troubles:?}");
            assert!(read.contains("may be read by others") && read.ends_with(&format!("{:#}", troubles[0].error)));
        }
        assert_eq!(files(&named), [("tcp.keys".to_owned(), keys.as_path())]);
        // Without a name they are a credential's, which such a socket wants alone.
        assert_eq!(
            (Named::troubles(&Config::default(), true).len(), Named::troubles(&Config::default(), false).len()),
            (1, 0)
        );
    }

    #[test]
    fn files_are_named_with_their_keys() {
        let config = Config::of(&[
            "mqtt.broker=mqtt://localhost",
            "mqtt.password_file=/k",
            "model.\"a.b\".upstream=http://127.0.0.1:9/v1",
            "model.\"a.b\".relay.key_file=/r",
        ]);
        let expected = [("mqtt.password_file", "/k"), ("model.\"a.b\".relay.key_file", "/r")];
        assert_eq!(files(&config), expected.map(|(key, path)| (key.to_owned(), Path::new(path))));
    }
}
