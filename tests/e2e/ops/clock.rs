//! A box without a clock of its own begins in 1970, is set when a network comes, and may be wrong: what becomes of
//! answers, conversations and certificates then? The daemon's date is libfaketime's, and nobody else's changes.

use serde_json::json;
use sparsed_tests::broker::Broker;
use sparsed_tests::chatty;
use sparsed_tests::daemon::Daemon;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{SystemTime, UNIX_EPOCH};
use tempfile::TempDir;

/// Seconds of a day.
const DAY: i64 = 86_400;

/// The date of one process.
struct Clock {
    dir: TempDir,
    preloaded: PathBuf,
}

impl Clock {
    fn new() -> Self {
        let folders = std::fs::read_dir("/usr/lib").unwrap().flatten().map(|entry| entry.path());
        let mut libraries = folders.map(|folder| folder.join("faketime/libfaketimeMT.so.1"));
        let library = libraries.find(|path| path.exists()).expect("libfaketime: run `make testneeds`");
        Self { dir: tempfile::tempdir().unwrap(), preloaded: library }
    }

    fn file(&self) -> PathBuf {
        self.dir.path().join("offset")
    }

    /// Sets it so many seconds before or after the real one, at once.
    fn set(&self, seconds: i64) {
        let new = self.dir.path().join("new");
        std::fs::write(&new, format!("{seconds:+}\n")).unwrap();
        std::fs::rename(new, self.file()).unwrap();
    }

    fn start(&self, sets: &[&str]) -> Daemon {
        let file = self.file();
        let environment = [
            ("LD_PRELOAD", self.preloaded.as_path()),
            ("FAKETIME_TIMESTAMP_FILE", file.as_path()),
            ("FAKETIME_NO_CACHE", Path::new("1")),
            ("FAKETIME_DONT_FAKE_MONOTONIC", Path::new("1")),
        ];
        Daemon::spawn_in(&environment, Some(&chatty::write(self.dir.path())), sets).ready()
    }
}

/// What brings the clock a quarter of an hour after the beginning of 1970.
fn to_1970() -> i64 {
    900 - i64::try_from(SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs()).unwrap()
}

/// An answer in the session, and the date that it bears.
fn said_at(daemon: &Daemon, session: &str) -> i64 {
    let body = json!({ "messages": [{ "role": "user", "content": "Hi" }], "max_tokens": 4, "session_id": session });
    let answer = daemon.post("/v1/chat/completions", &body);
    assert_eq!(answer.status, 200, "{}", answer.body);
    answer.json()["created"].as_i64().unwrap()
}

fn new_session(daemon: &Daemon) -> String {
    let made = daemon.post("/v1/sessions", &json!({}));
    assert_eq!(made.status, 201, "{}", made.body);
    made.json()["id"].as_str().unwrap().to_owned()
}

#[test]
fn a_clock_that_is_set_forwards_and_back_costs_no_answer_and_no_conversation() {
    let clock = Clock::new();
    clock.set(to_1970());
    let mut daemon = clock.start(&["sessions.retention_days=1"]);
    let early = new_session(&daemon);
    assert!(said_at(&daemon, &early) < DAY, "the clock is not in 1970");
    clock.set(0);
    assert!(said_at(&daemon, &early) > 20_000 * DAY, "the clock was not set");
    let late = new_session(&daemon);
    // A hundred years on, by mistake, and the look for old sessions that comes with whatever is done.
    clock.set(36_500 * DAY);
    let other = new_session(&daemon);
    assert!(said_at(&daemon, &other) > 56_000 * DAY);
    clock.set(to_1970());
    for session in [&early, &late, &other] {
        assert!(said_at(&daemon, session) < DAY);
    }
    // With the right date, after a start that finds dates of 1970 and of the next century.
    daemon.kill_and_restart(&["sessions.retention_days=1"]);
    for session in [&early, &late, &other] {
        said_at(&daemon, session);
    }
}

#[test]
fn a_broker_whose_certificate_is_not_valid_yet_is_reached_when_the_clock_is_set() {
    let clock = Clock::new();
    let dir = tempfile::tempdir().unwrap();
    let script = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout ca.key -out ca.pem \
                    -days 2 -subj /CN=authority -addext basicConstraints=critical,CA:TRUE &&
                  openssl req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout server.key -out server.csr \
                    -subj /CN=server &&
                  printf 'subjectAltName=DNS:localhost,IP:127.0.0.1\\nbasicConstraints=CA:FALSE\\n' > ext &&
                  openssl x509 -req -in server.csr -CA ca.pem -CAkey ca.key -CAcreateserial -out server.pem -days 2 \
                    -extfile ext";
    let made = Command::new("sh").args(["-c", script]).current_dir(dir.path()).output().unwrap();
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    let path = |name: &str| dir.path().join(name).display().to_string();
    let mut settings = String::new();
    writeln!(settings, "certfile {}", path("server.pem")).unwrap();
    writeln!(settings, "keyfile {}", path("server.key")).unwrap();
    let broker = Broker::start(&settings);
    let address = format!("mqtt.broker=mqtts://127.0.0.1:{}", broker.port());
    let authority = format!("mqtt.ca_file={}", path("ca.pem"));
    clock.set(to_1970());
    let daemon = clock.start(&[&address, &authority]);
    daemon.wait_until("the certificate is refused", || daemon.log().contains("no connection to the MQTT broker"));
    assert!(!daemon.log().contains("connected to the MQTT broker"), "{}", daemon.log());
    clock.set(0);
    daemon.wait_until("connected", || daemon.log().contains("connected to the MQTT broker"));
}
