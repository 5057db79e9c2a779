//! A real mosquitto on a port of its own.

use std::fmt::Write as _;
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// How long it may take to listen.
const PATIENCE: Duration = Duration::from_secs(60);
/// Pause between two looks; no test depends on its length.
const PAUSE: Duration = Duration::from_millis(3);

/// A running broker; killed when dropped.
#[derive(Debug)]
pub struct Broker {
    child: Child,
    dir: TempDir,
    port: u16,
}

impl Broker {
    /// Starts one that lets everybody in; `settings` are further lines of its configuration.
    ///
    /// # Panics
    /// When it does not listen.
    pub fn start(settings: &str) -> Self {
        Self::start_in(tempfile::tempdir().expect("a temporary folder"), &format!("allow_anonymous true\n{settings}"))
    }

    /// Starts one that has its certificates in `dir` as `ca.pem`, `server.pem` and `server.key`, lets in who has a
    /// certificate of the same authority, and lets them do what `acl` says.
    ///
    /// # Panics
    /// When it does not listen.
    pub fn start_with_tls(dir: TempDir, acl: &str) -> Self {
        std::fs::write(dir.path().join("acl"), acl).expect("a file");
        let path = |name: &str| dir.path().join(name).display().to_string();
        let settings = format!(
            "cafile {}\ncertfile {}\nkeyfile {}\nrequire_certificate true\nuse_identity_as_username true\nuse_username_as_clientid true\nacl_file {}\n",
            path("ca.pem"),
            path("server.pem"),
            path("server.key"),
            path("acl"),
        );
        Self::start_in(dir, &settings)
    }

    fn start_in(dir: TempDir, settings: &str) -> Self {
        let free = TcpListener::bind("127.0.0.1:0").and_then(|socket| socket.local_addr()).expect("a free port");
        let port = free.port();
        // Its database would be in the folder of whoever starts it, and shared with other brokers.
        let place = dir.path().display();
        let mut text = format!("user root\nlistener {port} 127.0.0.1\npersistence_location {place}/\n");
        write!(text, "{settings}\nlog_dest file {}\n", dir.path().join("log").display()).expect("a String takes all");
        std::fs::write(dir.path().join("conf"), text).expect("a file");
        let broker = Self { child: run(dir.path()), dir, port };
        broker.ready();
        broker
    }

    /// Its port on 127.0.0.1.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Its folder.
    pub fn dir(&self) -> PathBuf {
        self.dir.path().to_owned()
    }

    /// Kills it and starts another one in its place.
    ///
    /// # Panics
    /// When that does not listen.
    pub fn kill_and_restart(&mut self) {
        self.end();
        self.child = run(self.dir.path());
        self.ready();
    }

    /// Stops it as a hanging process stops, or lets it go on.
    ///
    /// # Panics
    /// When it cannot be signalled.
    pub fn signal(&self, name: &str) {
        let sent = Command::new("kill").arg(format!("-{name}")).arg(self.child.id().to_string()).status();
        assert!(sent.expect("kill runs").success(), "signal {name}");
    }

    fn ready(&self) {
        let deadline = Instant::now() + PATIENCE;
        while TcpStream::connect(("127.0.0.1", self.port)).is_err() {
            let log = std::fs::read_to_string(self.dir.path().join("log")).unwrap_or_default();
            assert!(Instant::now() < deadline, "the broker does not listen: {log}");
            std::thread::park_timeout(PAUSE);
        }
    }

    fn end(&mut self) {
        // Gone already is as good.
        let _ended = self.child.kill().is_err();
        let _reaped = self.child.wait().is_err();
    }
}

fn run(dir: &Path) -> Child {
    let path = ["/usr/sbin/mosquitto", "/usr/bin/mosquitto"].into_iter().find(|path| Path::new(path).exists());
    let mut command = Command::new(path.unwrap_or("mosquitto"));
    command.arg("-c").arg(dir.join("conf")).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command.spawn().expect("mosquitto is installed: run `make test`")
}

impl Drop for Broker {
    fn drop(&mut self) {
        self.end();
    }
}
