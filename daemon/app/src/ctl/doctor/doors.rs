//! Can what else the daemon speaks to be reached, and may it listen where it is to? TCP, the MQTT broker, the message
//! bus, and the socket's path.

use super::network::{DENIES, opens_network};
use super::service::Service;
use super::{Check, OPERATORS_FILE, sets};
use crate::config::{Config, Mqtt, Tcp};
use crate::ctl::bus;
use crate::door::is_same;
use crate::tcp::overruled;
use serde_json::Value;
use sparsed_surface::Bus;
use std::net::{TcpStream, ToSocketAddrs};
use std::path::Path;
use std::time::Duration;

/// How long a broker or a bus may take to answer.
const PATIENCE: Duration = Duration::from_secs(3);
/// What shows why the daemon is not on a bus: its own line says the bus's answer.
const LOOK: &str = "journalctl -u sparsed -b -g D-Bus; busctl status org.sparsed1; \
                    ls /usr/share/dbus-1/system.d/org.sparsed1.conf";
/// Where the system's bus is.
const SYSTEM_BUS: &str = "run/dbus/system_bus_socket";

/// That the path that is configured for the socket is not the service's, where it is another one: its manager opens the
/// socket.
pub(super) fn socket_path(config: &Config, service: Option<&Service>) -> Option<Check> {
    let (wanted, socket) = (config.socket.path.as_deref()?, service?.socket.as_deref()?);
    let found = format!(
        "{} is not used: ListenStream= of sparsed.socket decides, which is {}",
        wanted.display(),
        socket.display()
    );
    let fix = format!(
        "sudoedit {OPERATORS_FILE}: no socket.path; to listen there, sudo systemctl edit sparsed.socket: [Socket], \
         ListenStream= and ListenStream={}, each on its line; then sudo systemctl stop sparsed && sudo systemctl \
         restart sparsed.socket && sudo systemctl start sparsed, and SPARSED_SOCKET={} for sparsectl",
        wanted.display(),
        wanted.display()
    );
    (!is_same(wanted, socket)).then(|| Check::warn("socket.path", found, fix))
}

/// That addresses that are configured for TCP are not the service's, where its manager opens others.
pub(super) fn tcp_unused(tcp: &Tcp, service: Option<&Service>) -> Option<Check> {
    let service = service.filter(|service| service.has_tcp_socket)?;
    let (wanted, sockets) = overruled(tcp, &service.tcp_addresses)?;
    let found = format!("{wanted} is not used: ListenStream= of sparsed-tcp.socket decides, which is {sockets}");
    let lines: Vec<String> =
        tcp.listen.as_ref()?.all().iter().map(|address| format!("ListenStream={address}")).collect();
    let fix = format!(
        "sudoedit {OPERATORS_FILE}: no tcp.listen; to listen there, sudo systemctl edit sparsed-tcp.socket: [Socket], \
         ListenStream= and {}, each on its line; then sudo systemctl stop sparsed && sudo systemctl restart \
         sparsed-tcp.socket && sudo systemctl start sparsed",
        lines.join(" and ")
    );
    Some(Check::warn("tcp.listen", found, fix))
}

/// Whether the service may open the TCP sockets that are configured; nothing where none is, or the manager opens one.
pub(super) fn tcp(tcp: &Tcp, service: Option<&Service>) -> Option<Check> {
    let service = service.filter(|service| !service.has_tcp_socket)?;
    let shut = tcp.listen.as_ref()?.all().iter().find_map(|address| Some((address, service.shuts(address.ip())?)));
    let other = "another way, without a network: sparsed-tcp.socket in the place of tcp.listen, `systemctl cat \
                 sparsed-tcp.socket` says how";
    Some(match shut {
        Some((address, DENIES)) => {
            let found = format!("whom sparsed.service hears at {address} it may not answer ({DENIES})");
            Check::fail("tcp.listen", found, format!("{}; {other}", opens_network()))
        }
        Some((_, setting)) => {
            let found =
                format!("sparsed.service may open no TCP socket ({setting}), and does not start with tcp.listen");
            Check::fail("tcp.listen", found, format!("{}; {other}", opens_network()))
        }
        None => Check::ok("tcp.listen", "sparsed.service may open TCP sockets"),
    })
}

/// Whether the broker that is configured takes connections, and the service may make some; nothing without a broker.
pub(super) fn broker(mqtt: &Mqtt, service: Option<&Service>) -> Option<Check> {
    const NAME: &str = "MQTT broker";
    let broker = mqtt.broker().ok()??;
    let host = broker.host.trim_start_matches('[').trim_end_matches(']');
    let shown = format!("{}:{}", broker.host, broker.port);
    let connect = || {
        let addresses = (host, broker.port).to_socket_addrs()?;
        let mut refused = std::io::Error::from(std::io::ErrorKind::AddrNotAvailable);
        for address in addresses {
            match TcpStream::connect_timeout(&address, PATIENCE) {
                Ok(_) => return Ok(()),
                Err(error) => refused = error,
            }
        }
        Err(refused)
    };
    Some(match connect() {
        Ok(()) if let Some(setting) = service.and_then(|service| service.has_no_way_to(host, broker.port)) => {
            let found = format!("{shown} takes connections from here, sparsed.service has no network ({setting})");
            Check::fail(NAME, found, opens_network())
        }
        Ok(()) => Check::ok(NAME, format!("{shown} takes connections; `sparsectl mqtt test` asks a question by it")),
        Err(error) => {
            let looks = format!("sudo systemctl status mosquitto; nc -vz {host} {}", broker.port);
            let fix = format!("{looks}; {}", sets("mqtt.broker"));
            Check::warn(NAME, format!("{shown}: {error}; requests come when it is there"), fix)
        }
    })
}

/// Whether the daemon answers on its bus. `auto` is the system's, as the service has it, where there is one. A service
/// that is at rest is not called, which would start it.
///
/// # Errors
/// A runtime that cannot be started.
pub(super) fn message_bus(root: &Path, config: &Config, service: Option<&Service>) -> anyhow::Result<Option<Check>> {
    const NAME: &str = "D-Bus";
    let is_auto = config.dbus.bus == "auto";
    let bus = match config.dbus.bus(None) {
        Ok(None) if is_auto && root.join(SYSTEM_BUS).exists() => Bus::System,
        Ok(None) if is_auto => {
            let found = format!("there is no bus at /{SYSTEM_BUS}: the other doors serve");
            return Ok(Some(Check::ok(NAME, found)));
        }
        Ok(Some(bus)) => bus,
        // Switched off, or wrong, which is the configuration's check.
        _ => return Ok(None),
    };
    if service.is_some_and(|service| service.rest.is_some()) {
        let found = "not called, since the service does not run, and a call starts it where it is enabled";
        return Ok(Some(Check::ok(NAME, found)));
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let health = runtime
        .block_on(async { tokio::time::timeout(PATIENCE, bus::ask(&bus, "GET", "/health", &Value::Null)).await });
    let said = match health {
        Ok(Ok(health)) => {
            let state = health["status"].as_str().map_or_else(|| Value::Null.to_string(), str::to_owned);
            return Ok(Some(Check::ok(NAME, format!("org.sparsed1 answers: {state}"))));
        }
        Ok(Err(error)) => format!("{error:#}"),
        Err(_) => format!("no answer within {} s", PATIENCE.as_secs()),
    };
    // A daemon that is not run as the service is on no bus by itself.
    let is_expected = !is_auto || service.is_some_and(|service| service.is_active);
    Ok(Some(match is_expected {
        false => Check::ok(NAME, format!("not on the system's bus ({said})")),
        true if is_auto => Check::warn(NAME, format!("the service runs, and is not on the system's bus: {said}"), LOOK),
        true => Check::warn(NAME, said, LOOK),
    }))
}

#[cfg(test)]
mod tests {
    use super::super::Verdict;
    use super::super::service::Rest;
    use super::*;
    use crate::config::Addresses;
    use std::net::TcpListener;

    #[test]
    fn a_broker_is_connected_to_and_one_that_is_not_there_is_told() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let mqtt = Mqtt { broker: format!("mqtt://127.0.0.1:{port}"), ..Mqtt::default() };
        assert_eq!(broker(&mqtt, None).unwrap().verdict, Verdict::Ok);
        let shut = Service { is_offline: true, ..Service::default() };
        let unanswered = Service { denied: vec!["0.0.0.0/0".to_owned()], ..Service::default() };
        for (shut, setting) in [(shut, "(PrivateNetwork=yes)"), (unanswered, "(IPAddressDeny=)")] {
            let said = broker(&mqtt, Some(&shut)).unwrap();
            assert!(said.verdict == Verdict::Fail && said.found.ends_with(setting), "{said:?}");
            assert!(said.fix.as_ref().unwrap().contains("network.conf"), "{said:?}");
        }
        drop(listener);
        let gone = broker(&mqtt, None).unwrap();
        assert!(gone.verdict == Verdict::Warn && gone.found.contains("refused"), "{gone:?}");
        assert_eq!(broker(&Mqtt::default(), None), None);
    }

    #[test]
    fn a_path_that_is_configured_for_a_socket_that_the_manager_opens_elsewhere_is_told() {
        let service = Service { socket: Some("/run/sparsed/api.sock".into()), ..Service::default() };
        let said = |sets: &[&str], service| socket_path(&Config::of(sets), service);
        let told = said(&["socket.path=/run/x.sock"], Some(&service)).unwrap();
        assert!(told.verdict == Verdict::Warn && told.found.ends_with("which is /run/sparsed/api.sock"), "{told:?}");
        assert!(told.fix.as_ref().unwrap().contains("ListenStream=/run/x.sock, each"), "{told:?}");
        assert_eq!(said(&["socket.path=/run/sparsed/api.sock"], Some(&service)), None);
        assert_eq!(said(&[], Some(&service)), None);
        assert_eq!(said(&["socket.path=/run/x.sock"], None), None, "a daemon that is somebody's own opens its own");
    }

    #[test]
    fn addresses_that_are_configured_for_tcp_beside_the_managers_are_told() {
        let addresses = vec!["127.0.0.1:11535".parse().unwrap()];
        let service = Service { has_tcp_socket: true, tcp_addresses: addresses, ..Service::default() };
        let without = Service::default();
        let said = |sets: &[&str], service| tcp_unused(&Config::of(sets).tcp, service);
        let told = said(&["tcp.listen=127.0.0.1:8080"], Some(&service)).unwrap();
        assert!(told.verdict == Verdict::Warn && told.found.ends_with("which is 127.0.0.1:11535"), "{told:?}");
        assert!(told.fix.as_ref().unwrap().contains("ListenStream=127.0.0.1:8080, each"), "{told:?}");
        assert_eq!(said(&["tcp.listen=127.0.0.1:11535"], Some(&service)), None);
        assert_eq!(said(&["tcp.listen=127.0.0.1:8080"], Some(&without)), None);
        assert_eq!((said(&[], Some(&service)), said(&["tcp.listen=127.0.0.1:8080"], None)), (None, None));
    }

    #[test]
    fn a_tcp_socket_that_the_service_may_not_open_is_told_unless_its_manager_opens_one() {
        let listen = Tcp { listen: Some(Addresses::One("127.0.0.1:1".parse().unwrap())), keys: None };
        let service = |is_offline, has_tcp_socket| Service { is_offline, has_tcp_socket, ..Service::default() };
        let said = tcp(&listen, Some(&service(true, false))).unwrap();
        assert!(said.verdict == Verdict::Fail && said.fix.as_ref().unwrap().contains("network.conf"), "{said:?}");
        assert_eq!(tcp(&listen, Some(&service(false, false))).unwrap().verdict, Verdict::Ok);
        let of_files = Service { families: Some("AF_UNIX".to_owned()), ..Service::default() };
        let said = tcp(&listen, Some(&of_files)).unwrap();
        assert!(said.verdict == Verdict::Fail && said.found.contains("(RestrictAddressFamilies=)"), "{said:?}");
        assert_eq!(tcp(&listen, Some(&service(true, true))), None);
        assert_eq!(tcp(&listen, None), None, "a daemon that is somebody's own is in no sandbox");
        assert_eq!(tcp(&Tcp::default(), Some(&service(true, false))), None);
    }

    #[test]
    fn a_bus_that_is_configured_and_not_there_is_told_and_a_box_without_one_is_well() {
        let root = tempfile::tempdir().unwrap();
        let mut config = Config::default();
        assert_eq!(message_bus(root.path(), &config, None).unwrap().unwrap().verdict, Verdict::Ok);
        config.dbus.bus = format!("unix:path={}", root.path().join("none").display());
        assert_eq!(message_bus(root.path(), &config, None).unwrap().unwrap().verdict, Verdict::Warn);
        let stopped = Service { rest: Some(Rest::Stopped), ..Service::default() };
        assert_eq!(message_bus(root.path(), &config, Some(&stopped)).unwrap().unwrap().verdict, Verdict::Ok);
        "off".clone_into(&mut config.dbus.bus);
        assert_eq!(message_bus(root.path(), &config, None).unwrap(), None);
    }
}
