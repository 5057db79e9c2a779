//! Can the service reach a network, and which setting of its sandbox is in the way?

use super::service::{Service, drops_in};
use std::net::{IpAddr, ToSocketAddrs};

/// The drop-in that lets the service reach networks.
const NETWORK: &str = "/usr/share/sparsed/examples/network.conf";
/// The setting by which sockets may be opened, and nothing comes through.
pub(super) const DENIES: &str = "IPAddressDeny=";

impl Service {
    /// The setting by which it reaches nobody at `address`, its own box's included.
    pub(super) fn shuts(&self, address: IpAddr) -> Option<&'static str> {
        let family = if address.is_ipv4() { "AF_INET" } else { "AF_INET6" };
        let closes = |families: &String| match families.strip_prefix('~') {
            Some(closed) => closed.split_whitespace().any(|closed| closed == family),
            None => !families.split_whitespace().any(|open| open == family),
        };
        let is_among = |nets: &[String]| nets.iter().any(|net| holds(net, address));
        match () {
            () if self.is_offline => Some("PrivateNetwork=yes"),
            () if self.families.as_ref().is_some_and(closes) => Some("RestrictAddressFamilies="),
            // The manager lets through before it denies.
            () if is_among(&self.denied) && !is_among(&self.let_through) => Some(DENIES),
            () => None,
        }
    }

    /// The setting by which it has no way to `host`.
    pub(super) fn has_no_way_to(&self, host: &str, port: u16) -> Option<&'static str> {
        let mut shut = (host, port).to_socket_addrs().ok()?.map(|address| self.shuts(address.ip()));
        // One address that is open is a way.
        let first = shut.next()?;
        shut.fold(first, Option::and)
    }
}

/// What lets the service reach networks.
pub(super) fn opens_network() -> String {
    drops_in(NETWORK)
}

/// Whether `address` is one of a net, as `10.0.0.0/8`.
fn holds(net: &str, address: IpAddr) -> bool {
    let Some((start, bits)) = net.split_once('/') else { return net.parse() == Ok(address) };
    let bits = bits.parse().unwrap_or(u32::MAX);
    // Those of the first bits that are not the net's are what is left.
    match (start.parse(), address) {
        (Ok(IpAddr::V4(start)), IpAddr::V4(address)) => {
            bits <= 32 && (start.to_bits() ^ address.to_bits()).checked_shr(32 - bits).unwrap_or(0) == 0
        }
        (Ok(IpAddr::V6(start)), IpAddr::V6(address)) => {
            bits <= 128 && (start.to_bits() ^ address.to_bits()).checked_shr(128 - bits).unwrap_or(0) == 0
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_setting_that_shuts_a_network_is_known_and_named() {
        let shuts = |said: &str, address: &str| {
            let service = Service::parse(&format!("LoadState=loaded\nPrivateNetwork=no\n{said}")).unwrap();
            service.shuts(address.parse().unwrap())
        };
        let (families, denied) = (Some("RestrictAddressFamilies="), Some("IPAddressDeny="));
        let packaged = "RestrictAddressFamilies=AF_UNIX\nIPAddressDeny=::/0 0.0.0.0/0\n";
        let by_drop_in = "RestrictAddressFamilies=AF_UNIX AF_INET\nIPAddressAllow=127.0.0.0/8 ::1/128\n\
                          IPAddressDeny=::/0 0.0.0.0/0\n";
        for (said, address, shut) in [
            (packaged, "127.0.0.1", families),
            (by_drop_in, "127.0.0.1", None),
            (by_drop_in, "::1", families),
            (by_drop_in, "10.0.0.1", denied),
            ("RestrictAddressFamilies=~AF_INET6 AF_PACKET\n", "::1", families),
            ("RestrictAddressFamilies=~AF_INET6 AF_PACKET\n", "127.0.0.1", None),
            ("RestrictAddressFamilies=\n", "127.0.0.1", families),
            ("IPAddressDeny=10.0.0.0/8\n", "10.9.8.7", denied),
            ("IPAddressDeny=10.0.0.0/8 192.168.1.1\n", "11.0.0.1", None),
            ("IPAddressDeny=10.0.0.0/8 192.168.1.1/32\n", "192.168.1.1", denied),
            ("IPAddressDeny=fe80::/10\n", "fe80::1", denied),
            ("", "::1", None),
        ] {
            assert_eq!(shuts(said, address), shut, "{said} {address}");
        }
    }
}
