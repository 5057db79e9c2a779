//! The engine of `engine.py`, and daemons that have it compute their models.

use serde_json::{Value, json};
use sparsed_tests::daemon::{Answer, Daemon};
use sparsed_tests::root;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};

pub(crate) const KEY: &str = "relay-key-0123456789";

/// The engine of `engine.py`; killed when dropped.
pub(crate) struct Engine {
    child: Child,
    port: u16,
    /// Where it speaks TLS, if it does.
    pub(crate) tls_port: Option<u16>,
}

impl Engine {
    pub(crate) fn start(certificate: Option<(&Path, &Path)>) -> Self {
        let mut command = Command::new("python3");
        command.arg(root().join("tests/e2e/upstream/engine.py"));
        if let Some((certificate, key)) = certificate {
            command.arg(certificate).arg(key);
        }
        let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let mut ports = line.split_whitespace().map(|port| port.parse().unwrap());
        Self { child, port: ports.next().unwrap(), tls_port: ports.next() }
    }

    /// What it has seen of the requests of `name`.
    pub(crate) fn seen(&self, name: &str) -> Value {
        let mut stream = TcpStream::connect(("127.0.0.1", self.port)).unwrap();
        stream.write_all(b"GET /seen HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        let seen: Value = serde_json::from_str(text.split_once("\r\n\r\n").unwrap().1).unwrap();
        seen[name].clone()
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        // Gone already is as good.
        let _ended = self.child.kill().is_err();
        let _reaped = self.child.wait().is_err();
    }
}

/// A file with the key, as the daemon wants it.
pub(crate) fn key_file(dir: &Path, text: &str) -> String {
    let path = dir.join("key");
    std::fs::write(&path, text).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
    path.display().to_string()
}

pub(crate) fn strs(sets: &[String]) -> Vec<&str> {
    sets.iter().map(String::as_str).collect()
}

/// A daemon whose models `names` are computed by `engine`, each at its own path.
pub(crate) fn relaying(engine: &Engine, dir: &Path, names: &[&str], more: &[&str]) -> Daemon {
    let key = key_file(dir, KEY);
    let mut sets: Vec<String> = Vec::new();
    for name in names {
        sets.push(format!("model.{name}.upstream=http://127.0.0.1:{}/{name}/v1", engine.port));
        sets.push(format!("model.{name}.relay.key_file={key}"));
    }
    let sets: Vec<&str> = strs(&sets).into_iter().chain(more.iter().copied()).collect();
    let daemon = Daemon::spawn(None, &sets);
    daemon.first_answer("/v1/status");
    daemon
}

pub(crate) fn chat(model: &str) -> Value {
    json!({ "model": model, "messages": [{ "role": "user", "content": "Hi" }], "max_tokens": 12, "temperature": 0 })
}

pub(crate) fn ask(daemon: &Daemon, model: &str) -> Answer {
    daemon.post("/v1/chat/completions", &chat(model))
}

pub(crate) fn with(mut body: Value, name: &str, value: Value) -> Value {
    body[name] = value;
    body
}

/// An authority with a certificate for localhost, and another authority.
pub(crate) fn certificates(dir: &Path) {
    let script = "
        set -e
        for name in ca other; do
          openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout $name.key -out $name.pem \
            -days 2 -subj /CN=$name -addext basicConstraints=critical,CA:TRUE
        done
        openssl req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout server.key -out server.csr \
          -subj /CN=server
        printf 'subjectAltName=DNS:localhost\\nbasicConstraints=CA:FALSE\\n' > ext
        openssl x509 -req -in server.csr -CA ca.pem -CAkey ca.key -CAcreateserial -out server.pem -days 2 \
          -extfile ext";
    let done = Command::new("sh").args(["-c", script]).current_dir(dir).output().unwrap();
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
}
