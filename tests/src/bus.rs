//! A message bus of our own, as a distribution's system bus but for what it knows of other services.

use crate::root;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// How long a bus may take to listen.
const PATIENCE: Duration = Duration::from_secs(60);
/// Pause between two looks; no test depends on its length.
const PAUSE: Duration = Duration::from_millis(3);

/// Whose message bus it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Broker {
    /// The reference implementation.
    DbusDaemon,
    /// dbus-broker under its launcher, in a mount namespace of its own: needs root.
    DbusBroker,
}

/// A running bus; killed when dropped.
#[derive(Debug)]
pub struct Bus {
    broker: Broker,
    child: Option<Child>,
    folder: TempDir,
}

impl Bus {
    /// A place for a bus that does not run yet.
    ///
    /// # Panics
    /// When there is none.
    pub fn new(broker: Broker) -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        // Other users come to the socket.
        std::fs::set_permissions(folder.path(), PermissionsExt::from_mode(0o755)).expect("the folder is ours");
        let bus = Self { broker, child: None, folder };
        let template = root().join("tests/e2e/dbus/bus.conf.in");
        let config = std::fs::read_to_string(template).expect("the bus's configuration");
        // Here the group's members are all.
        let policy = std::fs::read_to_string(root().join("packaging/dbus/org.sparsed1.conf")).expect("the policy");
        let (policy_path, group) = (bus.folder.path().join("policy.conf"), "<policy group=\"sparsed\">");
        assert!(policy.contains(group), "the policy is another one");
        std::fs::write(&policy_path, policy.replace(group, "<policy context=\"default\">"))
            .expect("the folder is ours");
        let config = config.replace("@SOCKET@", &bus.socket().display().to_string());
        let config = config.replace("@POLICY@", &policy_path.display().to_string());
        std::fs::write(bus.config(), config).expect("the folder is ours");
        bus
    }

    /// One that runs.
    ///
    /// # Panics
    /// When it does not.
    pub fn start(broker: Broker) -> Self {
        let mut bus = Self::new(broker);
        bus.run();
        bus
    }

    /// Starts it and waits until it listens.
    ///
    /// # Panics
    /// When it does not.
    pub fn run(&mut self) {
        let mut command = match self.broker {
            Broker::DbusDaemon => {
                let mut command = Command::new("dbus-daemon");
                command.args(["--nofork", "--nopidfile", "--nosyslog", "--config-file"]).arg(self.config());
                command
            }
            Broker::DbusBroker => {
                let mut command = Command::new("unshare");
                command.args(["--mount", "--kill-child", "python3"]).arg(root().join("tests/e2e/dbus/broker.py"));
                command.arg(self.config()).arg(self.socket());
                command
            }
        };
        let log = std::fs::File::create(self.folder.path().join("log")).expect("the folder is ours");
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        self.child = Some(command.spawn().expect("the bus is installed: packaging/needs.sh test"));
        let deadline = Instant::now() + PATIENCE;
        while UnixStream::connect(self.socket()).is_err() {
            let log = || std::fs::read_to_string(self.folder.path().join("log")).unwrap_or_default();
            assert!(Instant::now() < deadline, "the bus does not listen: {}", log());
            std::thread::park_timeout(PAUSE);
        }
    }

    /// Ends it; its place stays.
    pub fn stop(&mut self) {
        if let Some(mut child) = self.child.take() {
            // Gone already is as good.
            let _ended = child.kill().is_err();
            let _reaped = child.wait().is_err();
        }
        let _removed = std::fs::remove_file(self.socket()).is_err();
    }

    /// Its address.
    pub fn address(&self) -> String {
        format!("unix:path={}", self.socket().display())
    }

    /// Has a client go through `scenario`, a function of `tests/e2e/dbus/client.py`; gives what it prints.
    ///
    /// # Panics
    /// When it fails.
    pub fn client(&self, scenario: &str, arguments: &[&str]) -> String {
        let Output { status, stdout, stderr } =
            self.client_command(scenario, arguments).output().expect("python3 runs");
        let (said, why) = (String::from_utf8_lossy(&stdout), String::from_utf8_lossy(&stderr));
        assert!(status.success(), "{scenario} on {:?}: {said}\n{why}", self.broker);
        said.into_owned()
    }

    /// The same, not started yet.
    pub fn client_command(&self, scenario: &str, arguments: &[&str]) -> Command {
        let mut path = root().join(".venv/python").into_os_string();
        if let Some(more) = std::env::var_os("PYTHONPATH") {
            path.push(":");
            path.push(more);
        }
        let mut command = Command::new("python3");
        command.env("PYTHONPATH", path).arg("-B").arg(root().join("tests/e2e/dbus/client.py")).arg(self.address());
        command.arg(scenario).args(arguments);
        command
    }

    fn socket(&self) -> PathBuf {
        self.folder.path().join("bus")
    }

    fn config(&self) -> PathBuf {
        self.folder.path().join("bus.conf")
    }

    /// Its folder, which other users may enter.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }
}

impl Drop for Bus {
    fn drop(&mut self) {
        self.stop();
    }
}
