//! `[tcp]`: is there a door for apps that cannot use a Unix socket?

use serde::{Deserialize, Serialize};
use std::net::SocketAddr;
use std::path::PathBuf;

/// Most addresses that are listened on.
const ADDRESSES_MAX: usize = 8;

/// `[tcp]`
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Tcp {
    /// Where; `None`: there is no such door.
    pub listen: Option<Addresses>,
    /// The file with the API keys; `None`: the service manager's credential `sparsed.api-keys`.
    pub keys: Option<PathBuf>,
}

/// Loopback addresses, each with a port.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(untagged, expecting = "expected an address and port, as \"127.0.0.1:11535\", or a list of them")]
pub enum Addresses {
    /// The only one.
    One(SocketAddr),
    /// As `localhost` has them: one of IPv4 and one of IPv6.
    Several(Vec<SocketAddr>),
}

impl Addresses {
    /// Each of them.
    pub fn all(&self) -> &[SocketAddr] {
        match self {
            Self::One(address) => std::slice::from_ref(address),
            Self::Several(addresses) => addresses,
        }
    }
}

impl Tcp {
    /// What is wrong with it.
    pub(super) fn wrong_value(&self) -> Option<(String, String)> {
        let addresses = self.listen.as_ref()?.all();
        let wrong = |reason| Some(("tcp.listen".to_owned(), reason));
        if !(1..=ADDRESSES_MAX).contains(&addresses.len()) {
            return wrong(format!("has {} addresses, must have 1 to {ADDRESSES_MAX}", addresses.len()));
        }
        let address = addresses.iter().find(|address| !address.ip().is_loopback())?;
        wrong(format!("is {address}, must be an address of this box alone, as 127.0.0.1"))
    }
}
