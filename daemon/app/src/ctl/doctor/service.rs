//! What does the service manager say of the service: does it run, where, and which devices does its sandbox let it see?

use std::path::Path;
use std::process::{Command, Stdio};

/// The unit.
const UNIT: &str = "sparsed.service";
/// The drop-in that lets the service reach networks.
const NETWORK: &str = "/usr/share/sparsed/examples/network.conf";
/// Where there is systemd.
const MANAGER: &str = "run/systemd/system";
/// What is asked. A property that the manager does not know is left out of its answer.
const PROPERTIES: &str = "--property=LoadState,ActiveState,MainPID,ControlGroup,PrivateDevices,PrivateNetwork,DevicePolicy,\
                          DeviceAllow,SupplementaryGroups";

/// The unit as its manager has it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Service {
    pub(super) is_active: bool,
    /// The daemon's process, while it runs.
    pub(super) pid: Option<u32>,
    /// Path of its control group, while it runs.
    pub(super) group: Option<String>,
    /// `PrivateDevices=`: it has a `/dev` without devices.
    pub(super) hides_devices: bool,
    /// `PrivateNetwork=`: it reaches nobody but by sockets that are files.
    pub(super) is_offline: bool,
    /// Only the devices of `allowed` can be opened.
    pub(super) is_closed: bool,
    /// `DeviceAllow=`: paths, or `char-` and a driver's name in `/proc/devices`.
    pub(super) allowed: Vec<String>,
    /// `SupplementaryGroups=`.
    pub(super) groups: Vec<String>,
}

impl Service {
    /// Asks for it; `None` where there is no systemd, or it does not know the service.
    pub(super) fn ask(root: &Path) -> Option<Self> {
        if !root.join(MANAGER).is_dir() {
            return None;
        }
        let mut command = Command::new("systemctl");
        command.args(["show", "--no-pager", PROPERTIES, UNIT]).stdin(Stdio::null());
        let answer = command.output().ok().filter(|answer| answer.status.success())?;
        Self::parse(&String::from_utf8_lossy(&answer.stdout))
    }

    /// From lines of `NAME=VALUE`, which may come in any order and more than once.
    pub(super) fn parse(text: &str) -> Option<Self> {
        let mut found = Self::default();
        let mut is_loaded = false;
        for (name, value) in text.lines().filter_map(|line| line.split_once('=')) {
            let value = value.trim();
            match name {
                "LoadState" => is_loaded = value == "loaded",
                // A reload ends as active.
                "ActiveState" => found.is_active = matches!(value, "active" | "reloading"),
                "MainPID" => found.pid = value.parse().ok().filter(|&pid| pid > 0),
                "ControlGroup" => found.group = Some(value.to_owned()).filter(|path| path.starts_with('/')),
                "PrivateDevices" => found.hides_devices = value == "yes",
                "PrivateNetwork" => found.is_offline = value == "yes",
                "DevicePolicy" => found.is_closed |= matches!(value, "closed" | "strict"),
                // `auto` is closed as well once one is named.
                "DeviceAllow" => {
                    found.is_closed |= !value.is_empty();
                    found.allowed.extend(value.split_whitespace().next().map(str::to_owned));
                }
                "SupplementaryGroups" => found.groups.extend(value.split_whitespace().map(str::to_owned)),
                _ => {}
            }
        }
        is_loaded.then_some(found)
    }

    /// What must be typed before it reaches anything on a network, if so.
    pub(super) fn opens_network(&self) -> Option<String> {
        self.is_offline.then(|| drops_in(NETWORK))
    }

    /// Whether its device policy lets it open `/dev/{node}`, whose driver is called so in `/proc/devices`.
    pub(super) fn allows(&self, node: &str, driver: Option<&str>) -> bool {
        let matches = |allowed: &String| match allowed.strip_prefix("char-") {
            Some(pattern) => driver.is_some_and(|driver| is_like(driver, pattern)),
            None => allowed.strip_prefix("/dev/").is_some_and(|path| path == node),
        };
        !self.is_closed || self.allowed.iter().any(matches)
    }
}

/// What gives the service a drop-in that is shipped.
pub(super) fn drops_in(file: &str) -> String {
    format!(
        "sudo install -D -m 0644 -t /etc/systemd/system/sparsed.service.d {file} && sudo systemctl daemon-reload && \
         sudo systemctl restart sparsed"
    )
}

/// Whether `name` is one of a pattern that may end in `*`, as the drop-ins' do. What else a pattern may have, the
/// manager knows: it passes here.
fn is_like(name: &str, pattern: &str) -> bool {
    let (start, rest) = pattern.split_at(pattern.find(['*', '?', '[']).unwrap_or(pattern.len()));
    match rest {
        "" => name == start,
        _ => name.starts_with(start),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_managers_answer_is_read_in_any_order() {
        let said = "DeviceAllow=/dev/nvidiactl rw\nDeviceAllow=char-nvhost* rw\nMainPID=12\nLoadState=loaded\n\
                    ActiveState=active\nControlGroup=/system.slice/sparsed.service\nPrivateDevices=no\n\
                    PrivateNetwork=yes\nDevicePolicy=closed\nSupplementaryGroups=video render\n";
        let service = Service::parse(said).unwrap();
        assert!(service.is_active && !service.hides_devices, "{service:?}");
        assert!(service.opens_network().unwrap().contains("/network.conf && "), "{service:?}");
        assert_eq!((service.pid, service.group.as_deref()), (Some(12), Some("/system.slice/sparsed.service")));
        assert_eq!(service.groups, ["video", "render"]);
        let allows = |node, driver| service.allows(node, driver);
        assert!(allows("nvidiactl", None) && allows("nvhost-gpu", Some("nvhost-gpu")));
        assert!(!allows("nvmap", Some("nvmap")) && !allows("nvhost-gpu", None));
    }

    #[test]
    fn a_service_that_is_not_there_is_none_and_one_that_does_not_run_has_no_process() {
        assert_eq!(Service::parse("LoadState=not-found\nActiveState=inactive\n"), None);
        let stopped = Service::parse("LoadState=loaded\nActiveState=inactive\nMainPID=0\nControlGroup=\n").unwrap();
        assert_eq!((stopped.is_active, stopped.pid, stopped.group.as_deref()), (false, None, None));
        // Nothing is closed there.
        assert_eq!(stopped.opens_network(), None);
        assert!(stopped.allows("anything", None));
        assert_eq!(Service::ask(Path::new("/nowhere")), None);
    }
}
