//! Where is the other engine? The base of its OpenAI interface, `https://host[:port]/v1`.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

/// Longest address in bytes.
const ADDRESS_BYTES_MAX: usize = 2048;
/// Ports when the address does not say.
const PORT: u16 = 80;
const PORT_TLS: u16 = 443;

/// A base address without secrets: no user, no password, no query.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Address {
    is_tls: bool,
    /// Without the brackets of an IPv6 address.
    host: String,
    port: u16,
    /// Begins with a slash and ends with none, or is empty.
    path: String,
}

impl Address {
    /// Whether it is encrypted.
    pub fn is_tls(&self) -> bool {
        self.is_tls
    }

    /// Its name or address.
    pub fn host(&self) -> &str {
        &self.host
    }

    /// Its port.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Whether it is on this machine.
    pub fn is_here(&self) -> bool {
        self.host == "localhost" || self.host.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
    }

    /// Host and port as the `Host` header has them.
    pub(crate) fn authority(&self) -> String {
        let host = if self.host.contains(':') { format!("[{}]", self.host) } else { self.host.clone() };
        format!("{host}:{}", self.port)
    }

    /// The path of `endpoint`, which begins with a slash.
    pub(crate) fn path_of(&self, endpoint: &str) -> String {
        format!("{}{endpoint}", self.path)
    }
}

/// Scheme, host and port: a path may be as good as a key.
impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}://{}", if self.is_tls { "https" } else { "http" }, self.authority())
    }
}

impl FromStr for Address {
    type Err = &'static str;

    /// # Errors
    /// What it must be; never what it is, since that may hold a password.
    fn from_str(text: &str) -> Result<Self, &'static str> {
        const WRONG: &str = "must be https://HOST[:PORT]/v1 or http://HOST[:PORT]/v1";
        const SECRET: &str = "must have no user, password, query or fragment; a key belongs into relay.key_file";
        let (is_tls, rest) = match text.split_once("://") {
            Some(("https", rest)) => (true, rest),
            Some(("http", rest)) => (false, rest),
            _ => return Err(WRONG),
        };
        if rest.contains(['@', '?', '#']) {
            return Err(SECRET);
        }
        let (authority, path) = rest.find('/').map_or((rest, ""), |at| rest.split_at(at));
        let is_plain = |byte: u8| byte.is_ascii_graphic();
        if text.len() > ADDRESS_BYTES_MAX || !rest.bytes().all(is_plain) {
            return Err(WRONG);
        }
        let (host, port) = match authority.strip_prefix('[') {
            Some(rest) => {
                let (host, port) = rest.split_once(']').ok_or(WRONG)?;
                if !host.parse::<IpAddr>().is_ok_and(|address| address.is_ipv6()) {
                    return Err(WRONG);
                }
                (host, if port.is_empty() { None } else { Some(port.strip_prefix(':').ok_or(WRONG)?) })
            }
            None => match authority.split_once(':') {
                Some((host, port)) => (host, Some(port)),
                None => (authority, None),
            },
        };
        let is_in_name = |c: char| c.is_ascii_alphanumeric() || "-._".contains(c);
        if host.is_empty() || !(host.contains(':') || host.chars().all(is_in_name)) {
            return Err(WRONG);
        }
        let default = if is_tls { PORT_TLS } else { PORT };
        let port = port.map_or(Ok(default), |port| port.parse().map_err(|_| WRONG))?;
        Ok(Self { is_tls, host: host.to_owned(), port, path: path.trim_end_matches('/').to_owned() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_has_a_scheme_and_may_have_port_and_path() {
        let said = |text: &str| {
            let address: Address = text.parse().unwrap();
            (address.to_string(), address.path_of("/models"), address.is_here())
        };
        let expected = |base: &str, path: &str, here| (base.to_owned(), path.to_owned(), here);
        assert_eq!(said("https://gpu.example/v1"), expected("https://gpu.example:443", "/v1/models", false));
        assert_eq!(said("http://127.0.0.1:8000/v1/"), expected("http://127.0.0.1:8000", "/v1/models", true));
        assert_eq!(said("http://[::1]:8000"), expected("http://[::1]:8000", "/models", true));
        assert_eq!(said("https://[2001:db8::1]/a/v1"), expected("https://[2001:db8::1]:443", "/a/v1/models", false));
    }

    #[test]
    fn what_is_none_is_refused_without_being_repeated() {
        for wrong in [
            "gpu.example",
            "ftp://gpu.example",
            "https://",
            "https:///v1",
            "https://gpu.example:x/v1",
            "https://gpu.example:70000",
            "https://gpu example/v1",
            "https://[gpu]/v1",
            "https://[::1]x/v1",
            "https://a:1:2/v1",
        ] {
            assert!(wrong.parse::<Address>().unwrap_err().starts_with("must be"), "{wrong}");
        }
        for secret in ["https://me:secret@gpu.example/v1", "https://gpu.example/v1?key=secret", "https://x/#y"] {
            assert!(secret.parse::<Address>().unwrap_err().contains("relay.key_file"), "{secret}");
        }
    }
}
