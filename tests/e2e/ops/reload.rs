//! SIGHUP: what of a new configuration takes hold, and what is said of the rest.

use serde_json::{Value, json};
use sparsed_tests::broker::Broker;
use sparsed_tests::chatty;
use sparsed_tests::daemon::{Daemon, read_answer};
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::Command;
use tempfile::TempDir;

const OLD_KEY: &str = "old-key-0123456789";
const NEW_KEY: &str = "new-key-0123456789";

/// A daemon whose configuration is a file.
struct Operated {
    daemon: Daemon,
    file: PathBuf,
    _dir: TempDir,
    n_reloads: usize,
}

impl Operated {
    fn start(text: &str, sets: &[&str], environment: &[(&str, &Path)]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("sparsed.toml");
        std::fs::write(&file, text).unwrap();
        let argument = format!("--config={}", file.display());
        let sets: Vec<&str> = std::iter::once(argument.as_str()).chain(sets.iter().copied()).collect();
        let daemon = Daemon::spawn_in(environment, Some(&chatty::write(dir.path())), &sets).ready();
        Self { daemon, file, _dir: dir, n_reloads: 0 }
    }

    /// Lets it read `text`; answers what it says about it.
    fn reload(&mut self, text: &str) -> String {
        std::fs::write(&self.file, text).unwrap();
        self.daemon.signal("HUP");
        self.n_reloads += 1;
        let lines = |log: &str| {
            let told = log.lines().filter(|line| line.contains("configuration") && line.contains("reloaded"));
            told.map(str::to_owned).collect::<Vec<_>>()
        };
        self.daemon.wait_until("reloaded", || lines(&self.daemon.log()).len() == self.n_reloads);
        lines(&self.daemon.log()).pop().unwrap()
    }

    /// A request that runs or waits until it is dropped.
    fn endless(&self) -> std::os::unix::net::UnixStream {
        self.daemon.open("/v1/completions", &endless())
    }

    fn waits(&self, n: u64) {
        self.daemon.wait_until("waiting", || self.daemon.status()["waiting"] == n);
    }
}

fn endless() -> Value {
    json!({ "prompt": "x", "max_tokens": 100_000, "ignore_eos": true, "stream": true })
}

#[test]
fn a_limit_that_is_changed_holds_for_the_next_request_and_the_rest_waits_for_a_restart() {
    let text = |waiting: u32, threads: u32| {
        format!("[limits]\nmax_running = 1\nmax_waiting = {waiting}\n[engine]\nthreads = {threads}\n")
    };
    let mut here = Operated::start(&text(1, 1), &["model.default.max_context=200000"], &[]);
    let _running = here.endless();
    here.daemon.wait_until("running", || here.daemon.status()["running"] == 1);
    let _waiting = here.endless();
    here.waits(1);
    assert_eq!(here.daemon.post("/v1/completions", &endless()).status, 429);
    let said = here.reload(&text(2, 2));
    assert!(said.contains("limits.max_waiting = 2 (was 1)"), "{said}");
    assert!(said.contains("a restart is needed for engine.threads = 2 (was 1)"), "{said}");
    let _second = here.endless();
    here.waits(2);
    assert_eq!(here.daemon.post("/v1/completions", &endless()).status, 429);
    // What waits for a restart is said again, what was taken up is not.
    let said = here.reload(&text(2, 2));
    assert!(said.contains("nothing changed") && said.contains("engine.threads = 2 (was 1)"), "{said}");
    // A wrong file changes nothing and says where it is wrong.
    let said = here.reload("[limits]\nmax_waitin = 9\n");
    assert!(
        said.contains("not reloaded") && said.contains("sparsed.toml:2: unknown key 'limits.max_waitin'"),
        "{said}"
    );
    assert!(said.contains("did you mean 'limits.max_waiting'"), "{said}");
    assert_eq!(here.daemon.post("/v1/completions", &endless()).status, 429);
}

/// An engine elsewhere that lists a model and begins no answer; answers its port.
fn silent_engine() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    std::thread::spawn(move || {
        let mut held = Vec::new();
        for mut stream in listener.incoming().flatten() {
            let mut head = [0; 4096];
            if stream.read(&mut head).is_ok() && head.starts_with(b"GET ") {
                let list = r#"{"object":"list","data":[{"id":"m","object":"model"}]}"#;
                let head = format!("HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: {}\r\n\r\n", list.len());
                // Whoever asked may be gone.
                let _gone = stream.write_all((head + list).as_bytes()).is_err();
            } else {
                held.push(stream);
            }
        }
    });
    port
}

#[test]
fn a_limit_of_one_user_that_is_changed_holds_for_engines_elsewhere_too() {
    let text = |waiting: u32| format!("[limits]\nper_user_running = 1\nper_user_waiting = {waiting}\n");
    let upstream = format!("model.big.upstream=http://127.0.0.1:{}/v1", silent_engine());
    let mut here = Operated::start(&text(1), &[&upstream], &[]);
    let body = json!({ "model": "big", "messages": [{ "role": "user", "content": "Hi" }] });
    let runs = |here: &Operated, n: u64| {
        here.daemon.wait_until("under way", || {
            let status = here.daemon.get("/v1/status").json();
            let big = status["models"].as_array().unwrap().iter().find(|model| model["name"] == "big");
            big.is_some_and(|big| big["running"] == n)
        });
    };
    let ask = |here: &Operated| here.daemon.open("/v1/chat/completions", &body);
    let _first = [ask(&here), ask(&here)];
    runs(&here, 2);
    let refused = here.daemon.post("/v1/chat/completions", &body);
    assert_eq!(
        (refused.status, &refused.json()["error"]["code"]),
        (429, &json!("user_queue_full")),
        "{}",
        refused.body
    );
    let said = here.reload(&text(2));
    assert!(said.contains("limits.per_user_waiting = 2 (was 1)"), "{said}");
    let _third = ask(&here);
    runs(&here, 3);
}

#[test]
fn what_is_reloaded_before_mqtt_can_be_served_holds_once_it_is() {
    let (dir, broker) = (tempfile::tempdir().unwrap(), Broker::start(""));
    let (state, partition) = (dir.path().join("state"), dir.path().join("partition"));
    std::os::unix::fs::symlink(&partition, &state).unwrap();
    let password = dir.path().join("password");
    let state = format!("state_dir={}", state.display());
    let text = |more: &str| {
        let port = broker.port();
        let file = password.display();
        format!("[mqtt]\nbroker = \"mqtt://127.0.0.1:{port}\"\nusername = \"u\"\npassword_file = \"{file}\"\n{more}")
    };
    let mut here = Operated::start(&text(""), &[&state], &[]);
    let said = here.reload(&text("per_client = 5\n"));
    assert!(said.contains("mqtt.per_client = 5 (was 16)"), "{said}");
    // Its password comes, and the folder of its journal.
    std::fs::write(&password, "secret\n").unwrap();
    std::fs::create_dir(&partition).unwrap();
    here.daemon.wait_until("on MQTT", || here.daemon.log().contains("connected to the MQTT broker"));
    let info = Command::new("mosquitto_sub")
        .args(["-p", &broker.port().to_string(), "-t", "sparsed/v1/+/info", "-C", "1", "-W", "60"])
        .output()
        .unwrap();
    let info: Value = serde_json::from_slice(&info.stdout).unwrap();
    assert_eq!(info["limits"]["per_client"], 5, "{info}");
    // Of a door that is open a file that is gone is a mistake.
    std::fs::remove_file(&password).unwrap();
    let said = here.reload(&text("per_client = 6\n"));
    assert!(said.contains("not reloaded") && said.contains("the MQTT password in"), "{said}");
}

/// Where its log says that it listens.
fn port(daemon: &Daemon) -> u16 {
    let log = daemon.log();
    let port = log.split(" address=127.0.0.1:").nth(1).unwrap();
    port.chars().take_while(char::is_ascii_digit).collect::<String>().parse().unwrap()
}

/// What a request with this key is answered with.
fn status(port: u16, key: &str) -> String {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
    let head = "GET /v1/models HTTP/1.1\r\nconnection: close\r\nhost: localhost\r\nauthorization: Bearer";
    stream.write_all(format!("{head} {key}\r\n\r\n").as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer.split_whitespace().nth(1).unwrap().to_owned()
}

#[test]
fn api_keys_are_exchanged_without_a_restart_and_broken_ones_leave_the_old() {
    let dir = tempfile::tempdir().unwrap();
    let keys = dir.path().join("keys");
    let write = |text: &str| {
        std::fs::write(&keys, text).unwrap();
        std::fs::set_permissions(&keys, std::fs::Permissions::from_mode(0o600)).unwrap();
    };
    write(&format!("hall {OLD_KEY}\n"));
    let text = format!("[tcp]\nlisten = \"127.0.0.1:0\"\nkeys = \"{}\"\n", keys.display());
    let mut here = Operated::start(&text, &[], &[]);
    let port = port(&here.daemon);
    let status = |key: &str| status(port, key);
    assert_eq!((status(OLD_KEY), status(NEW_KEY)), ("200".to_owned(), "401".to_owned()));
    write("hall short\n");
    let said = here.reload(&text);
    assert!(said.contains("not reloaded") && said.contains("line 1: a key of 5 bytes"), "{said}");
    assert_eq!(status(OLD_KEY), "200");
    write(&format!("hall {NEW_KEY}\n"));
    let said = here.reload(&text);
    assert!(said.contains("1 API keys read") && !said.contains(NEW_KEY), "{said}");
    assert_eq!((status(OLD_KEY), status(NEW_KEY)), ("401".to_owned(), "200".to_owned()));
}

/// A service manager copies a credential when it starts the service; most leave that copy alone when it is reloaded.
#[test]
fn a_reload_does_not_claim_to_have_read_keys_of_a_credential_that_is_as_it_was() {
    let dir = tempfile::tempdir().unwrap();
    let keys = dir.path().join("sparsed.api-keys");
    let write = |key: &str| {
        std::fs::write(&keys, format!("hall {key}\n")).unwrap();
        std::fs::set_permissions(&keys, std::fs::Permissions::from_mode(0o400)).unwrap();
    };
    write(OLD_KEY);
    let text = |threads: u32| format!("[tcp]\nlisten = \"127.0.0.1:0\"\n[engine]\nthreads = {threads}\n");
    let mut here = Operated::start(&text(1), &[], &[("CREDENTIALS_DIRECTORY", dir.path())]);
    let port = port(&here.daemon);
    let said = here.reload(&text(1));
    let needs = "a restart is needed for API keys that are new in the credential sparsed.api-keys";
    assert!(said.contains(needs) && !said.contains("API keys read"), "{said}");
    let said = here.reload(&text(2));
    assert!(said.contains("for engine.threads = 2 (was 1), API keys that are new in"), "{said}");
    // A manager that refreshes it has other keys taken up.
    std::fs::remove_file(&keys).unwrap();
    write(NEW_KEY);
    let said = here.reload(&text(1));
    assert!(said.contains("1 API keys read") && !said.contains("restart"), "{said}");
    assert_eq!((status(port, OLD_KEY), status(port, NEW_KEY)), ("401".to_owned(), "200".to_owned()));
}

#[test]
fn less_memory_holds_at_once_and_more_than_at_the_start_does_not() {
    let budget = |mib: u32| format!("[memory]\nbudget = \"{mib}MiB\"\n");
    let mut here = Operated::start(&budget(8), &["model.default.max_context=2048"], &[]);
    let kv_mib = |here: &Operated| {
        let metrics = here.daemon.get("/metrics").body;
        let line = metrics.lines().find(|line| line.starts_with("sparsed_memory_kv_bytes ")).unwrap().to_owned();
        line.rsplit(' ').next().unwrap().parse::<u64>().unwrap() >> 20
    };
    assert_eq!(kv_mib(&here), 8);
    let said = here.reload(&budget(4));
    assert!(said.contains("memory.budget = 4194304 (was 8388608)") && !said.contains("do not grow"), "{said}");
    assert_eq!(kv_mib(&here), 4);
    let said = here.reload(&budget(16));
    assert!(said.contains("KV pools do not grow beyond their size at the start"), "{said}");
}

#[test]
fn the_level_of_the_log_changes_and_the_service_manager_hears_of_a_reload() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("notify");
    let socket = UnixDatagram::bind(&path).unwrap();
    let level = |level: &str| format!("[log]\nlevel = \"{level}\"\n[dbus]\nbus = \"off\"\n");
    let mut here = Operated::start(&level("warn"), &[], &[("NOTIFY_SOCKET", &path)]);
    assert!(!here.daemon.log().contains("model ready"), "{}", here.daemon.log());
    std::fs::write(&here.file, level("debug")).unwrap();
    here.daemon.signal("HUP");
    here.daemon.wait_until("reloaded", || here.daemon.log().contains("log.level = \"debug\" (was \"warn\")"));
    let _answer = here.daemon.get("/health");
    here.daemon.wait_until("logged", || here.daemon.log().contains("connected"));
    here.n_reloads += 1;
    let heard = || {
        let mut buffer = [0; 4096];
        let n = socket.recv(&mut buffer).unwrap();
        String::from_utf8_lossy(&buffer[..n]).into_owned()
    };
    let reloading = std::iter::repeat_with(heard).find(|text| text.contains("RELOADING=1")).unwrap();
    assert!(reloading.contains("MONOTONIC_USEC="), "{reloading}");
    std::iter::repeat_with(heard).find(|text| text.contains("READY=1")).unwrap();
    // A stream that is under way is not touched.
    let stream = here.daemon.open("/v1/completions", &json!({ "prompt": "x", "max_tokens": 40, "ignore_eos": true }));
    here.reload(&level("info"));
    assert_eq!(read_answer(stream).unwrap().json()["usage"]["completion_tokens"], 40);
}
