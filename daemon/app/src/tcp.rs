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
}

impl TcpSockets {
    /// The service manager's sockets, or those that are configured, for whoever has one of these keys; `None` where
    /// nobody has.
    ///
    /// # Errors
    /// An address that is taken, or not of this box alone.
    pub fn open(config: &Tcp, passed: Vec<TcpListener>, keys: Option<ApiKeys>) -> anyhow::Result<Option<Self>> {
        let Some(keys) = keys else { return Ok(None) };
        let bind = |address: &SocketAddr| {
            TcpListener::bind(address).with_context(|| format!("cannot listen on tcp.listen {address}"))
        };
        let listeners = match &config.listen {
            _ if !passed.is_empty() => passed,
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
        Ok(Some(Self { listeners, keys }))
    }
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
}
