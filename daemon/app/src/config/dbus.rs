//! `[dbus]`: on which bus are we?

use serde::{Deserialize, Serialize};
use sparsed_surface::Bus;
use std::ffi::OsStr;
use std::path::Path;

/// `[dbus]`
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Dbus {
    /// `auto`, `off`, `system`, `session` or the address of a bus.
    pub bus: String,
}

impl Default for Dbus {
    fn default() -> Self {
        Self { bus: "auto".to_owned() }
    }
}

impl Dbus {
    /// The bus, if any. `auto` is that of the service manager that has started this process, which is at
    /// `notify_socket`: a service is where services are looked for, and a daemon that somebody tries out is not.
    ///
    /// # Errors
    /// What is wrong with `bus`.
    pub fn bus(&self, notify_socket: Option<&OsStr>) -> Result<Option<Bus>, String> {
        let manager = notify_socket.map(Path::new);
        Ok(match self.bus.as_str() {
            "off" => None,
            "auto" if manager.is_some_and(|path| path.starts_with("/run/systemd")) => Some(Bus::System),
            "auto" if manager.is_some_and(|path| path.starts_with("/run/user")) => Some(Bus::Session),
            "auto" => None,
            other => Some(other.parse::<Bus>()?),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bus(bus: &str, manager: Option<&str>) -> Result<Option<Bus>, String> {
        Dbus { bus: bus.to_owned() }.bus(manager.map(OsStr::new))
    }

    #[test]
    fn a_service_is_on_its_managers_bus_and_a_process_on_none() {
        assert_eq!(bus("auto", Some("/run/systemd/notify")), Ok(Some(Bus::System)));
        assert_eq!(bus("auto", Some("/run/user/1000/systemd/notify")), Ok(Some(Bus::Session)));
        assert_eq!(bus("auto", Some("/tmp/notify")), Ok(None));
        assert_eq!(bus("auto", None), Ok(None));
        assert_eq!(bus("off", Some("/run/systemd/notify")), Ok(None));
    }

    #[test]
    fn a_bus_has_a_known_name_or_an_address() {
        assert_eq!(bus("system", None), Ok(Some(Bus::System)));
        assert_eq!(bus("unix:path=/tmp/bus", None), Ok(Some(Bus::Address("unix:path=/tmp/bus".to_owned()))));
        for wrong in ["", "sytem", "tcp:host=localhost,port=1", "unix:pth=/x"] {
            assert!(bus(wrong, None).is_err(), "{wrong}");
        }
    }
}
