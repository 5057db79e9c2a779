//! `[tcp]`: is there a door for apps that cannot use a Unix socket?

use serde::{Deserialize, Serialize};
use std::net::SocketAddr;
use std::path::PathBuf;

/// `[tcp]`
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Tcp {
    /// A loopback address and a port; `None`: there is no such door.
    pub listen: Option<SocketAddr>,
    /// The file with the API keys; `None`: the service manager's credential `sparsed.api-keys`.
    pub keys: Option<PathBuf>,
}

impl Tcp {
    /// What is wrong with it.
    pub(super) fn wrong_value(&self) -> Option<(String, String)> {
        let address = self.listen.filter(|address| !address.ip().is_loopback())?;
        Some(("tcp.listen".to_owned(), format!("is {address}, must be an address of this box alone, as 127.0.0.1")))
    }
}
