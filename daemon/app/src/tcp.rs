//! Who may come in over TCP, and where? Loopback sockets of our own or the service manager's, and a file of API keys.

use crate::config::Tcp;
use crate::private::{self, FORBIDDEN_OF_CREDENTIAL, FORBIDDEN_OF_FILE, Missing};
use anyhow::{Context, bail};
use sparsed_surface::ApiKeys;
use std::net::{SocketAddr, TcpListener};

/// The credential's name.
pub(crate) const CREDENTIAL: &str = "sparsed.api-keys";
/// Most bytes of the keys' file.
const KEYS_BYTES_MAX: u64 = 256 << 10;

/// Sockets, non-blocking, and who may come in.
#[derive(Debug)]
pub struct TcpSockets {
    /// They listen; at least one.
    pub listeners: Vec<TcpListener>,
    /// The keys.
    pub keys: ApiKeys,
    /// The service manager has opened them: where they are, its unit decides.
    pub(crate) are_passed: bool,
}

impl TcpSockets {
    /// The service manager's sockets, or those that are configured, for whoever has one of these keys; `None` where
    /// nobody has. Says so where the former are not those that are configured: to open those too, the service would
    /// need a network, and one that is in a sandbox would not start.
    ///
    /// # Errors
    /// An address that is taken, or not of this box alone.
    pub fn open(config: &Tcp, passed: Vec<TcpListener>, keys: Option<ApiKeys>) -> anyhow::Result<Option<Self>> {
        let Some(keys) = keys else { return Ok(None) };
        let bind = |address: &SocketAddr| {
            TcpListener::bind(address).with_context(|| format!("cannot listen on tcp.listen {address}"))
        };
        let are_passed = !passed.is_empty();
        if are_passed {
            let held: Vec<SocketAddr> = passed.iter().filter_map(|socket| socket.local_addr().ok()).collect();
            if let Some((wanted, sockets)) = overruled(config, &held) {
                log::warn!(wanted, sockets; "tcp.listen is not used: the service manager has opened other TCP sockets");
            }
        }
        let listeners = match &config.listen {
            _ if are_passed => passed,
            Some(addresses) => addresses.all().iter().map(bind).collect::<anyhow::Result<_>>()?,
            None => return Ok(None),
        };
        let mut addresses = Vec::new();
        for listener in &listeners {
            let address = listener.local_addr()?;
            if !address.ip().is_loopback() {
                bail!("the TCP socket {address} may be reached from other boxes; only loopback addresses are served");
            }
            listener.set_nonblocking(true)?;
            addresses.push(address);
        }
        for address in addresses {
            log::info!(address:%; "listening");
        }
        Ok(Some(Self { listeners, keys, are_passed }))
    }
}

/// The addresses of `tcp.listen` that are none of `held`, which the service manager has opened, and the latter.
pub(crate) fn overruled(config: &Tcp, held: &[SocketAddr]) -> Option<(String, String)> {
    let wanted = config.listen.as_ref()?.all().iter().filter(|wanted| !held.contains(wanted));
    let [wanted, held] = [wanted.map(ToString::to_string).collect(), held.iter().map(ToString::to_string).collect()]
        .map(|addresses: Vec<String>| addresses.join(" and "));
    (!wanted.is_empty()).then_some((wanted, held))
}

/// The keys that the configuration names, or the service manager's credential.
///
/// # Errors
/// Keys that are missing, wrong, or may be read by others.
pub(crate) fn keys(config: &Tcp) -> anyhow::Result<ApiKeys> {
    let (path, forbidden) = match (&config.keys, private::credential(CREDENTIAL)) {
        (Some(path), _) => (path.clone(), FORBIDDEN_OF_FILE),
        (None, Some(path)) => (path, FORBIDDEN_OF_CREDENTIAL),
        (None, None) => bail!(Missing {
            said: format!("a TCP socket needs API keys: set tcp.keys, or pass the credential {CREDENTIAL}"),
            credential: CREDENTIAL.to_owned(),
        }),
    };
    let about = || format!("the API keys {}", path.display());
    let text = private::read(&path, forbidden, KEYS_BYTES_MAX).with_context(about)?;
    let text = String::from_utf8(text).with_context(about)?;
    ApiKeys::parse(&text).map_err(|reason| anyhow::anyhow!("{}: {reason}", about()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Addresses;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_socket_needs_keys_that_only_the_daemon_may_read() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("keys");
        let listen = Some(Addresses::One("127.0.0.1:0".parse().unwrap()));
        let config = Tcp { listen, keys: Some(path.clone()) };
        let error = |config: &Tcp| format!("{:#}", keys(config).unwrap_err());
        assert!(error(&config).contains("No such file"), "{}", error(&config));
        std::fs::write(&path, "hall 0123456789abcdef\n").unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)).unwrap();
        assert!(error(&config).contains("may be read by others"), "{}", error(&config));
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
        let open = |passed| TcpSockets::open(&config, passed, Some(keys(&config).unwrap()));
        assert!(open(Vec::new()).unwrap().is_some());
        assert!(TcpSockets::open(&config, Vec::new(), None).unwrap().is_none());
        let everywhere = TcpListener::bind("0.0.0.0:0").unwrap();
        let here = TcpListener::bind("127.0.0.1:0").unwrap();
        let refused = open(vec![here, everywhere]).unwrap_err();
        assert!(refused.to_string().contains("other boxes"));
    }

    #[test]
    fn addresses_that_are_configured_and_not_those_of_the_sockets_that_were_passed_are_told() {
        let held: Vec<SocketAddr> = ["127.0.0.1:11535", "[::1]:11535"].map(|address| address.parse().unwrap()).into();
        let said = |listen: &[&str]| {
            let listen = Addresses::Several(listen.iter().map(|address| address.parse().unwrap()).collect());
            overruled(&Tcp { listen: Some(listen), keys: None }, &held)
        };
        assert_eq!((said(&["127.0.0.1:11535"]), overruled(&Tcp::default(), &held)), (None, None));
        let expected = Some(("127.0.0.1:8080".to_owned(), "127.0.0.1:11535 and [::1]:11535".to_owned()));
        assert_eq!(said(&["[::1]:11535", "127.0.0.1:8080"]), expected);
    }
}
