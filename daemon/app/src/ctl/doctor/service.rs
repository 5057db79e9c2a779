//! What does the service manager say of the service: does it run, where, and which devices does its sandbox let it see?

use super::people::shut_at;
use crate::ctl::system::said;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

/// The unit.
const UNIT: &str = "sparsed.service";
/// The socket that the manager opens for it.
const SOCKET: &str = "sparsed.socket";
/// The socket that the manager opens for those who want TCP.
const TCP_SOCKET: &str = "sparsed-tcp.socket";
/// Where an operator's drop-ins of it are.
const DROP_INS: &str = "/etc/systemd/system/sparsed.service.d";
/// Where there is systemd.
const MANAGER: &str = "run/systemd/system";
/// What is asked. A property that the manager does not know is left out of its answer.
const PROPERTIES: &str = "--property=LoadState,ActiveState,MainPID,ControlGroup,PrivateDevices,PrivateNetwork,DevicePolicy,\
                          DeviceAllow,SupplementaryGroups,ProtectHome,PrivateTmp,InaccessiblePaths,\
                          BindPaths,BindReadOnlyPaths,ProtectSystem,ReadWritePaths,StateDirectory,\
                          RestrictAddressFamilies,IPAddressAllow,IPAddressDeny";
/// What `ProtectHome=` hides.
const HOMES: [&str; 3] = ["/home", "/root", "/run/user"];
/// What `PrivateTmp=` hides.
const TEMPORARY: [&str; 2] = ["/tmp", "/var/tmp"];

/// Below it are the folders of `StateDirectory=`.
const STATES: &str = "/var/lib";

/// Why a service does not run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Rest {
    /// Nobody has asked for it, or it was stopped.
    Stopped,
    /// It ended in a way after which it is not started again by itself.
    Failed,
}

/// The unit as its manager has it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Service {
    pub(super) is_active: bool,
    /// Why nothing runs and nothing is being started, if so. Whoever connects to its socket or calls it on the bus has
    /// it started.
    pub(super) rest: Option<Rest>,
    /// The daemon's process, while it runs.
    pub(super) pid: Option<u32>,
    /// Path of its control group, while it runs.
    pub(super) group: Option<String>,
    /// `PrivateDevices=`: it has a `/dev` without devices.
    pub(super) hides_devices: bool,
    /// `PrivateNetwork=`: it reaches nobody but by sockets that are files.
    pub(super) is_offline: bool,
    /// `RestrictAddressFamilies=`: the only families of sockets, or, behind a `~`, those that it may not open.
    pub(super) families: Option<String>,
    /// `IPAddressDeny=` but for `IPAddressAllow=`: with whom packets are not exchanged.
    pub(super) denied: Vec<String>,
    pub(super) let_through: Vec<String>,
    /// Where `sparsed.socket` listens, which is handed over: the daemon serves there, whatever `socket.path` says.
    pub(super) socket: Option<PathBuf>,
    /// `sparsed-tcp.socket` listens, and is handed over.
    pub(super) has_tcp_socket: bool,
    /// Where it listens.
    pub(super) tcp_addresses: Vec<SocketAddr>,
    /// Only the devices of `allowed` can be opened.
    pub(super) is_closed: bool,
    /// `DeviceAllow=`: paths, or `char-` and a driver's name in `/proc/devices`.
    pub(super) allowed: Vec<String>,
    /// `SupplementaryGroups=`.
    pub(super) groups: Vec<String>,
    /// Folders and files that are not there for it, and the setting that hides each.
    pub(super) hidden: Vec<(PathBuf, String)>,
    /// What is there all the same: `BindPaths=` and `BindReadOnlyPaths=`.
    pub(super) shown: Vec<PathBuf>,
    /// `ProtectSystem=strict`: only what is below `writable` can be written.
    pub(super) is_read_only: bool,
    /// `ReadWritePaths=`, `StateDirectory=` and `BindPaths=`.
    pub(super) writable: Vec<PathBuf>,
    /// Names of the credentials that it is handed.
    pub(super) credentials: Vec<String>,
}

impl Service {
    /// Asks for it; `None` where there is no systemd, or it does not know the service.
    pub(super) fn ask(root: &Path) -> Option<Self> {
        if !root.join(MANAGER).is_dir() {
            return None;
        }
        let said = |arguments: &[&str]| said("systemctl", arguments).ok();
        let mut service = Self::parse(&said(&["show", "--no-pager", PROPERTIES, UNIT])?)?;
        let sockets = said(&["show", "--no-pager", "--property=Listen", SOCKET]).unwrap_or_default();
        service.socket = listens(&sockets).map(PathBuf::from).find(|path| path.is_absolute());
        service.has_tcp_socket = said(&["is-active", TCP_SOCKET]).is_some();
        let tcp = said(&["show", "--no-pager", "--property=Listen", TCP_SOCKET]).unwrap_or_default();
        service.tcp_addresses = listens(&tcp).filter_map(|address| address.parse().ok()).collect();
        // Not every version shows them among the properties.
        service.credentials = credentials(&said(&["cat", "--no-pager", UNIT]).unwrap_or_default());
        Some(service)
    }

    /// From lines of `NAME=VALUE`, which may come in any order and more than once.
    pub(super) fn parse(text: &str) -> Option<Self> {
        let mut found = Self::default();
        let mut is_loaded = false;
        for (name, value) in text.lines().filter_map(|line| line.split_once('=')) {
            let value = value.trim();
            match name {
                "LoadState" => is_loaded = value == "loaded",
                "ActiveState" => {
                    // A reload ends as active.
                    found.is_active = matches!(value, "active" | "reloading");
                    found.rest = match value {
                        "inactive" => Some(Rest::Stopped),
                        "failed" => Some(Rest::Failed),
                        _ => None,
                    };
                }
                "MainPID" => found.pid = value.parse().ok().filter(|&pid| pid > 0),
                "ControlGroup" => found.group = Some(value.to_owned()).filter(|path| path.starts_with('/')),
                "PrivateDevices" => found.hides_devices = value == "yes",
                "PrivateNetwork" => found.is_offline = value == "yes",
                "RestrictAddressFamilies" => found.families = Some(value.to_owned()),
                "IPAddressDeny" => found.denied.extend(value.split_whitespace().map(str::to_owned)),
                "IPAddressAllow" => found.let_through.extend(value.split_whitespace().map(str::to_owned)),
                "DevicePolicy" => found.is_closed |= matches!(value, "closed" | "strict"),
                // `auto` is closed as well once one is named.
                "DeviceAllow" => {
                    found.is_closed |= !value.is_empty();
                    found.allowed.extend(value.split_whitespace().next().map(str::to_owned));
                }
                // Read-only, homes are there.
                "ProtectHome" if matches!(value, "yes" | "tmpfs") => found.hide(&HOMES, name, value),
                "PrivateTmp" if value != "no" => found.hide(&TEMPORARY, name, value),
                "InaccessiblePaths" => {
                    let paths = paths(value).map(|path| (path, format!("{name}=")));
                    found.hidden.extend(paths);
                }
                // Each is SOURCE:DESTINATION:OPTIONS.
                "BindPaths" | "BindReadOnlyPaths" => {
                    let destinations = value.split_whitespace().filter_map(|bind| bind.split(':').nth(1));
                    let destinations: Vec<PathBuf> = destinations.map(PathBuf::from).collect();
                    if name == "BindPaths" {
                        found.writable.extend(destinations.iter().cloned());
                    }
                    found.shown.extend(destinations);
                }
                "ProtectSystem" => found.is_read_only = value == "strict",
                "ReadWritePaths" => found.writable.extend(paths(value)),
                // Newer versions have links to it behind a colon.
                "StateDirectory" => {
                    let names = value.split_whitespace().filter_map(|names| names.split(':').next());
                    found.writable.extend(names.map(|name| Path::new(STATES).join(name)));
                }
                "SupplementaryGroups" => found.groups.extend(value.split_whitespace().map(str::to_owned)),
                _ => {}
            }
        }
        is_loaded.then_some(found)
    }

    fn hide(&mut self, paths: &[&str], name: &str, value: &str) {
        self.hidden.extend(paths.iter().map(|path| (PathBuf::from(path), format!("{name}={value}"))));
    }

    /// The setting by which `path`, links followed, is not there for it.
    pub(super) fn hides(&self, path: &Path) -> Option<&str> {
        let hidden = self.hidden.iter().find(|(hidden, _)| is_below(path, hidden));
        hidden.filter(|_| !self.shown.iter().any(|shown| is_below(path, shown))).map(|(_, setting)| setting.as_str())
    }

    /// Whether its sandbox lets it write below `folder`, links followed.
    pub(super) fn may_write(&self, folder: &Path) -> bool {
        !self.is_read_only || self.writable.iter().any(|writable| is_below(folder, writable))
    }

    /// What keeps its user from reading `file`, as a sentence's end.
    pub(super) fn keeps_from(&self, root: &Path, file: &Path) -> Option<String> {
        if let Some(setting) = self.hides(file) {
            return Some(format!("is not there for sparsed.service ({setting})"));
        }
        let file = file.canonicalize().unwrap_or_else(|_| file.to_owned());
        let at = shut_at(root, &file, &self.groups)?;
        Some(format!("cannot be read by the daemon's user, whom {} is shut to", at.display()))
    }

    /// Whether it is handed the credential `name`.
    pub(super) fn is_handed(&self, name: &str) -> bool {
        self.credentials.iter().any(|start| name.starts_with(start))
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

/// The paths and addresses at which a socket's unit listens.
fn listens(said: &str) -> impl Iterator<Item = &str> {
    said.lines().filter_map(|line| match line.split_once('=')? {
        ("Listen", value) => value.strip_suffix(" (Stream)"),
        // As older versions have it.
        ("ListenStream", value) => Some(value),
        _ => None,
    })
}

/// The paths of a setting, each of which may begin with signs.
fn paths(value: &str) -> impl Iterator<Item = PathBuf> {
    value.split_whitespace().map(|path| PathBuf::from(path.trim_start_matches(['-', '+'])))
}

/// Whether `path` is `folder` or lies below it, links of either followed.
fn is_below(path: &Path, folder: &Path) -> bool {
    let path = path.canonicalize().unwrap_or_else(|_| path.to_owned());
    path.starts_with(folder) || folder.canonicalize().is_ok_and(|folder| path.starts_with(folder))
}

/// The credentials that lines of a unit hand over, by their names or the beginnings of such.
fn credentials(unit: &str) -> Vec<String> {
    let settings = unit.lines().filter_map(|line| line.trim().split_once('='));
    let handed = settings.filter(|(key, _)| {
        matches!(
            key.trim(),
            "LoadCredential"
                | "LoadCredentialEncrypted"
                | "SetCredential"
                | "SetCredentialEncrypted"
                | "ImportCredential"
        )
    });
    let names = handed.filter_map(|(_, value)| value.trim().split([':', '*']).next());
    names.filter(|name| !name.is_empty()).map(str::to_owned).collect()
}

/// What lets the service write below `folder`, a word for the shell.
pub(super) fn lets_write(folder: &str) -> String {
    // What is not there is left out: the service starts without it, as it does where a disk is away.
    format!(
        "sudo install -d {DROP_INS} && printf '[Service]\\nReadWritePaths=\"-%s\"\\n' {folder} | \
         sudo tee {DROP_INS}/state.conf && sudo systemctl daemon-reload && sudo systemctl restart sparsed"
    )
}

/// What gives the service a drop-in that is shipped.
pub(super) fn drops_in(file: &str) -> String {
    format!(
        "sudo install -D -m 0644 -t {DROP_INS} {file} && sudo systemctl daemon-reload && \
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
        assert_eq!(service.shuts([127, 0, 0, 1].into()), Some("PrivateNetwork=yes"));
        assert_eq!((service.pid, service.group.as_deref()), (Some(12), Some("/system.slice/sparsed.service")));
        assert_eq!(service.groups, ["video", "render"]);
        let allows = |node, driver| service.allows(node, driver);
        assert!(allows("nvidiactl", None) && allows("nvhost-gpu", Some("nvhost-gpu")));
        assert!(!allows("nvmap", Some("nvmap")) && !allows("nvhost-gpu", None));
    }

    #[test]
    fn a_units_socket_is_known_as_each_version_of_the_manager_shows_it() {
        let listens = |said| listens(said).collect::<Vec<_>>();
        assert_eq!(
            listens("Listen=127.0.0.1:1 (Stream)\nListen=/run/a b.sock (Stream)\n"),
            ["127.0.0.1:1", "/run/a b.sock"]
        );
        assert_eq!(listens("ListenDatagram=/x\nListenStream=/run/a b.sock\n"), ["/run/a b.sock"]);
        assert_eq!((listens("Listen=/run/x (FIFO)\n").len(), listens("").len()), (0, 0));
    }

    #[test]
    fn what_the_sandbox_hides_is_known_by_its_setting() {
        let service = |said: &str| Service::parse(&format!("LoadState=loaded\n{said}")).unwrap();
        let shut = service("ProtectHome=yes\nPrivateTmp=yes\nInaccessiblePaths=-/mnt /no/such\n");
        let hides = |path: &str| shut.hides(Path::new(path)).map(str::to_owned);
        assert_eq!(hides("/root/m.gguf").as_deref(), Some("ProtectHome=yes"));
        assert_eq!(hides("/var/tmp/m.gguf").as_deref(), Some("PrivateTmp=yes"));
        assert_eq!(hides("/no/such/m.gguf").as_deref(), Some("InaccessiblePaths="));
        let bound = service("BindReadOnlyPaths=/home/models:/home/models:rbind\nProtectHome=yes\n");
        assert_eq!(bound.hides(Path::new("/home/models/m.gguf")), None);
        assert!(bound.hides(Path::new("/home/m.gguf")).is_some());
        assert_eq!(hides("/var/lib/m.gguf"), None);
        assert_eq!(hides("/home2/m.gguf"), None);
        let open = service("ProtectHome=read-only\nPrivateTmp=no\nInaccessiblePaths=\n");
        assert!(open.hidden.is_empty(), "{open:?}");
        // A link leads there as well.
        let dir = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink("/root", dir.path().join("models")).unwrap();
        let elsewhere = service("ProtectHome=tmpfs\n");
        assert_eq!(elsewhere.hides(&dir.path().join("models")), Some("ProtectHome=tmpfs"));
    }

    #[test]
    fn what_the_sandbox_lets_it_write_is_known_by_any_of_its_settings() {
        let service = |said: &str| Service::parse(&format!("LoadState=loaded\n{said}")).unwrap();
        let may = |said: &str, folder: &str| service(said).may_write(Path::new(folder));
        let packaged = "ReadWritePaths=-/var/lib/sparsed\nProtectSystem=strict\n";
        assert!(may(packaged, "/var/lib/sparsed") && may(packaged, "/var/lib/sparsed/mqtt"));
        assert!(!may(packaged, "/var/lib/sparsed2") && !may(packaged, "/srv/sparsed"));
        for (more, folder) in [
            ("ReadWritePaths=+/srv\n", "/srv/sparsed"),
            ("StateDirectory=x:y\n", "/var/lib/x"),
            ("BindPaths=/data:/srv:rbind\n", "/srv/sparsed"),
        ] {
            assert!(may(&format!("{packaged}{more}"), folder), "{more}");
        }
        assert!(!may(&format!("{packaged}BindReadOnlyPaths=/data:/srv:rbind\n"), "/srv"));
        assert!(may("ProtectSystem=full\n", "/srv") && may("", "/srv"));
    }

    #[test]
    fn credentials_are_known_by_the_lines_that_hand_them_over() {
        let unit = "# LoadCredential=sparsed.no:/x\n[Service]\nLoadCredential=sparsed.api-keys:/etc/keys\n\
                    ImportCredential=sparsed.mqtt-*\n";
        let service = Service { credentials: credentials(unit), ..Service::default() };
        assert!(service.is_handed("sparsed.api-keys") && service.is_handed("sparsed.mqtt-password"));
        assert!(!service.is_handed("sparsed.no") && !service.is_handed("sparsed.upstream-big-key"));
    }

    #[test]
    fn a_service_that_is_not_there_is_none_and_one_that_does_not_run_has_no_process() {
        assert_eq!(Service::parse("LoadState=not-found\nActiveState=inactive\n"), None);
        let stopped = Service::parse("LoadState=loaded\nActiveState=inactive\nMainPID=0\nControlGroup=\n").unwrap();
        assert_eq!((stopped.is_active, stopped.pid, stopped.group.as_deref()), (false, None, None));
        let rest = |state: &str| Service::parse(&format!("LoadState=loaded\nActiveState={state}\n")).unwrap().rest;
        assert_eq!((stopped.rest, rest("failed"), rest("activating")), (Some(Rest::Stopped), Some(Rest::Failed), None));
        // Nothing is closed there.
        assert_eq!(stopped.shuts([127, 0, 0, 1].into()), None);
        assert!(stopped.allows("anything", None));
        assert_eq!(Service::ask(Path::new("/nowhere")), None);
    }
}
