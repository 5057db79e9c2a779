//! A real daemon on a socket of its own, and the least HTTP client that can look at it.

use serde_json::{Value, json};
use std::fmt::Write as _;
use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// How long anything may take before a test gives up.
const PATIENCE: Duration = Duration::from_secs(120);

/// Pause between two looks; no test depends on its length.
const PAUSE: Duration = Duration::from_millis(3);

/// A running `sparsed`; killed when dropped.
#[derive(Debug)]
pub struct Daemon {
    child: Child,
    home: TempDir,
    program: PathBuf,
    model: Option<PathBuf>,
}

/// An answer of the daemon.
#[derive(Clone, Debug)]
pub struct Answer {
    /// The HTTP status.
    pub status: u16,
    /// The head, line by line.
    pub head: String,
    /// The body.
    pub body: String,
}

impl Answer {
    /// The body as JSON.
    ///
    /// # Panics
    /// When it is none.
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error}: {}", self.body))
    }
}

impl Daemon {
    /// Starts a daemon for `model` and waits until it serves.
    ///
    /// # Panics
    /// When it does not.
    pub fn start(model: &Path, sets: &[&str]) -> Self {
        Self::spawn(Some(model), sets).ready()
    }

    /// Waits until it serves.
    ///
    /// # Panics
    /// When it does not.
    #[must_use]
    pub fn ready(self) -> Self {
        self.wait_until("ready", || self.try_get("/health").is_some_and(|answer| answer.status == 200));
        self
    }

    /// Starts a daemon and does not wait for it.
    ///
    /// # Panics
    /// When the executable cannot be run.
    pub fn spawn(model: Option<&Path>, sets: &[&str]) -> Self {
        Self::spawn_in(&[], model, sets)
    }

    /// As [`spawn`](Self::spawn), with these variables in its environment.
    ///
    /// # Panics
    /// When the executable cannot be run.
    pub fn spawn_in(environment: &[(&str, &Path)], model: Option<&Path>, sets: &[&str]) -> Self {
        Self::spawn_of(&crate::root().join("target/release/sparsed"), environment, model, sets)
    }

    /// As [`spawn_in`](Self::spawn_in), of this executable: its plugins lie beside it.
    ///
    /// # Panics
    /// When it cannot be run.
    pub fn spawn_of(program: &Path, environment: &[(&str, &Path)], model: Option<&Path>, sets: &[&str]) -> Self {
        let home = tempfile::tempdir().expect("a temporary folder");
        let child = run_at(home.path(), program, environment, model, sets);
        Self { child, home, program: program.to_owned(), model: model.map(Path::to_owned) }
    }

    /// Kills it, as a power cut would but for what the kernel has of its files, and starts another one in its place.
    /// Waits until that one serves.
    ///
    /// # Panics
    /// When it does not.
    pub fn kill_and_restart(&mut self, sets: &[&str]) {
        self.child.kill().expect("the child is ours");
        self.wait();
        self.restart(sets);
    }

    /// Starts another one in the place of one that has ended, and waits until it serves.
    ///
    /// # Panics
    /// When it does not, or the one before has not ended: that would answer in its place.
    pub fn restart(&mut self, sets: &[&str]) {
        self.restart_in(&[], sets);
    }

    /// As [`restart`](Self::restart), with these variables in its environment.
    ///
    /// # Panics
    /// As [`restart`](Self::restart).
    pub fn restart_in(&mut self, environment: &[(&str, &Path)], sets: &[&str]) {
        assert!(self.child.try_wait().is_ok_and(|ended| ended.is_some()), "the one before still runs");
        self.child = run_at(self.home.path(), &self.program, environment, self.model.as_deref(), sets);
        self.wait_until("ready", || self.try_get("/health").is_some_and(|answer| answer.status == 200));
    }

    /// Its socket.
    pub fn socket(&self) -> PathBuf {
        self.home.path().join("api.sock")
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The process of its plugin, once there is one.
    ///
    /// # Panics
    /// When none comes.
    pub fn plugin_host(&self) -> u32 {
        let mut found = None;
        self.wait_until("a plugin host runs", || {
            let processes = std::fs::read_dir("/proc").expect("a list of processes").flatten();
            let child = |entry: std::fs::DirEntry| {
                let pid: u32 = entry.file_name().to_str()?.parse().ok()?;
                let status = std::fs::read_to_string(entry.path().join("status")).ok()?;
                let line = |key: &str| status.lines().find_map(|line| line.strip_prefix(key)).map(str::trim);
                let is_alive = !line("State:")?.starts_with('Z');
                (line("PPid:")?.parse() == Ok(self.pid()) && is_alive).then_some(pid)
            };
            found = processes.filter_map(child).last();
            found.is_some()
        });
        found.expect("waited for")
    }

    /// Its state folder.
    pub fn state_dir(&self) -> PathBuf {
        self.home.path().join("state")
    }

    /// What it has logged.
    ///
    /// # Panics
    /// When the log cannot be read.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.log_file()).expect("a log file")
    }

    /// Where it logs.
    pub fn log_file(&self) -> PathBuf {
        self.home.path().join("log")
    }

    /// The answer to a GET.
    ///
    /// # Panics
    /// When there is none.
    pub fn get(&self, path: &str) -> Answer {
        self.try_get(path).unwrap_or_else(|| panic!("no answer; log:\n{}", self.log()))
    }

    /// The answer to a GET, once the daemon listens.
    ///
    /// # Panics
    /// When it does not.
    pub fn first_answer(&self, path: &str) -> Answer {
        let mut answer = None;
        self.wait_until("listening", || {
            answer = self.try_get(path);
            answer.is_some()
        });
        answer.expect("waited for")
    }

    /// The answer to a POST of JSON.
    ///
    /// # Panics
    /// When there is none.
    pub fn post(&self, path: &str, body: &Value) -> Answer {
        let stream = self.open(path, body);
        read_answer(stream).unwrap_or_else(|| panic!("no answer; log:\n{}", self.log()))
    }

    /// The answer to another method, without a body.
    ///
    /// # Panics
    /// When there is none.
    pub fn ask(&self, method: &str, path: &str) -> Answer {
        self.try_ask(method, path).unwrap_or_else(|| panic!("no answer; log:\n{}", self.log()))
    }

    /// The body of an answer as bytes; it is not in pieces.
    pub fn fetch(&self, method: &str, path: &str, body: &[u8]) -> Option<Vec<u8>> {
        let mut stream = UnixStream::connect(self.socket()).ok()?;
        let length = body.len();
        let head =
            format!("{method} {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {length}\r\n\r\n");
        stream.write_all(&[head.as_bytes(), body].concat()).ok()?;
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).ok()?;
        let at = answer.windows(4).position(|four| four == b"\r\n\r\n")?;
        Some(answer.split_off(at + 4))
    }

    /// Sends a POST of JSON and gives back the connection before anything is read from it.
    ///
    /// # Panics
    /// When nobody listens.
    pub fn open(&self, path: &str, body: &Value) -> UnixStream {
        let body = body.to_string();
        let mut head = format!("POST {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n");
        write!(head, "content-length: {}\r\n\r\n", body.len()).expect("a String takes all");
        let mut stream = UnixStream::connect(self.socket()).expect("the daemon listens");
        stream.write_all(head.as_bytes()).expect("the head is taken");
        // A body that is refused by its head is not read to its end; the answer says so.
        let _refused = stream.write_all(body.as_bytes()).is_err();
        stream
    }

    /// The default model's line of `/v1/status`.
    ///
    /// # Panics
    /// When there is none.
    pub fn status(&self) -> Value {
        self.get("/v1/status").json()["models"][0].clone()
    }

    /// Asks again and again until `condition` holds.
    ///
    /// # Panics
    /// When it does not come to hold.
    pub fn wait_until(&self, what: &str, mut condition: impl FnMut() -> bool) {
        let deadline = Instant::now() + PATIENCE;
        while !condition() {
            assert!(Instant::now() < deadline, "not {what} after {PATIENCE:?}; log:\n{}", self.log());
            std::thread::park_timeout(PAUSE);
        }
    }

    /// Sends a signal by its name.
    ///
    /// # Panics
    /// When it cannot be sent.
    pub fn signal(&self, name: &str) {
        let sent = Command::new("kill").arg(format!("-{name}")).arg(self.child.id().to_string()).status();
        assert!(sent.expect("kill runs").success(), "signal {name}");
    }

    /// Waits for its end.
    ///
    /// # Panics
    /// When it does not end.
    pub fn wait(&mut self) -> ExitStatus {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.child.try_wait().expect("the child is ours") {
                return status;
            }
            assert!(Instant::now() < deadline, "still running; log:\n{}", self.log());
            std::thread::park_timeout(PAUSE);
        }
    }

    fn try_get(&self, path: &str) -> Option<Answer> {
        self.try_ask("GET", path)
    }

    fn try_ask(&self, method: &str, path: &str) -> Option<Answer> {
        let mut stream = UnixStream::connect(self.socket()).ok()?;
        let head = format!("{method} {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
        stream.write_all(head.as_bytes()).ok()?;
        read_answer(stream)
    }
}

/// Runs a daemon that has everything in `home`; its log goes on where an earlier one's ended.
fn run_at(home: &Path, program: &Path, environment: &[(&str, &Path)], model: Option<&Path>, sets: &[&str]) -> Child {
    let mut command = Command::new(program);
    let mut set = |key: &str, value: &Path| {
        command.arg("--set").arg(format!("{key}={}", value.display()));
    };
    set("state_dir", &home.join("state"));
    set("socket.path", &home.join("api.sock"));
    if let Some(model) = model {
        set("model.default.path", model);
    }
    for set in sets {
        // An argument by itself, or a setting.
        if !set.starts_with("--") {
            command.arg("--set");
        }
        command.arg(set);
    }
    command.envs(environment.iter().copied());
    let log = File::options().create(true).append(true).open(home.join("log")).expect("a log file");
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
    command.spawn().expect("sparsed is built: run `make test`")
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // Gone already is as good.
        let _ended = self.child.kill().is_err();
        let _reaped = self.child.wait().is_err();
    }
}

/// Three streamed completions of token ids, `max_tokens` each; the last one is drawn with a seed.
pub fn three_streams(max_tokens: u32) -> Vec<Value> {
    let request = |first: u32, temperature: f64| {
        json!({
            "prompt": (0..30).map(|i| (first + 7 * i) % 131).collect::<Vec<u32>>(), "return_tokens": true,
            "max_tokens": max_tokens, "ignore_eos": true, "stream": true, "temperature": temperature, "seed": 11,
        })
    };
    vec![request(1, 0.0), request(2, 0.0), request(3, 0.9)]
}

/// The tokens of a streamed completion.
///
/// # Panics
/// When the stream does not end in order, or has something else in it.
pub fn streamed_tokens(body: &str) -> Vec<u64> {
    assert!(body.ends_with("data: [DONE]\n\n"), "the stream does not end in order: {body}");
    let events = body.lines().filter_map(|line| line.strip_prefix("data: ")).filter(|event| *event != "[DONE]");
    let events = events.map(|event| serde_json::from_str::<Value>(event).expect("an event is JSON"));
    let tokens = events.flat_map(|event| event["choices"][0]["tokens"].as_array().cloned().unwrap_or_default());
    tokens.map(|token| token.as_u64().expect("a token is a number")).collect()
}

/// Reads an answer to the end of the connection.
pub fn read_answer(mut stream: UnixStream) -> Option<Answer> {
    let mut bytes = Vec::new();
    // What came before a reset counts.
    let _reset = stream.read_to_end(&mut bytes).is_err();
    let text = String::from_utf8(bytes).ok()?;
    let (head, body) = text.split_once("\r\n\r\n")?;
    let status = head.split_whitespace().nth(1)?.parse().ok()?;
    let chunked = head.to_ascii_lowercase().contains("transfer-encoding: chunked");
    let body = if chunked { dechunk(body) } else { body.to_owned() };
    Some(Answer { status, head: head.to_owned(), body })
}

fn dechunk(mut rest: &str) -> String {
    let mut body = String::new();
    while let Some((size, after)) = rest.split_once("\r\n") {
        let Ok(size) = usize::from_str_radix(size.trim(), 16) else { break };
        if size == 0 || size > after.len() {
            break;
        }
        body += &after[..size];
        rest = after[size..].trim_start_matches("\r\n");
    }
    body
}
