//! A socket of the service manager's is there before the daemon and while it restarts: nobody is refused.
#![allow(clippy::unwrap_used, missing_docs, reason = "a test")]

use sparsed_tests::chatty;
use sparsed_tests::daemon::read_answer;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};

/// The status of `/health`, asked at once, however long the answer takes.
fn health(socket: &Path) -> u16 {
    let mut stream = UnixStream::connect(socket).unwrap();
    stream.write_all(b"GET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").unwrap();
    read_answer(stream).unwrap().status
}

/// Asks until the model is loaded.
fn until_served(socket: &Path) {
    assert!((0..100_000).any(|_| health(socket) == 200), "the daemon does not come to serve");
}

#[test]
fn clients_that_come_before_the_daemon_or_while_it_restarts_are_answered() {
    let folder = tempfile::tempdir().unwrap();
    let (socket, state) = (folder.path().join("s"), folder.path().join("state"));
    let root = sparsed_tests::root();
    let mut manager = Command::new("python3")
        .arg(root.join("tests/e2e/activate.py"))
        .arg(&socket)
        .arg(root.join("target/release/sparsed"))
        .arg("--set")
        .arg(format!("state_dir={}", state.display()))
        // It is not listened on: the passed one is.
        .args(["--set", "socket.path=/nonexistent/sparsed/api.sock", "--set"])
        .arg(format!("model.default.path={}", chatty::write(folder.path()).display()))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut pids = BufReader::new(manager.stdout.take().unwrap()).lines();
    for _ in 0..4 {
        // The manager has just started it: nothing of it runs yet, but the socket is there.
        let pid = pids.next().unwrap().unwrap();
        let status = health(&socket);
        assert!([200, 503].contains(&status), "{status}");
        assert!(socket.exists());
        assert!(Command::new("kill").args(["-KILL", &pid]).status().unwrap().success());
    }
    // And in good order: the socket is not the daemon's to remove.
    let pid = pids.next().unwrap().unwrap();
    until_served(&socket);
    assert!(Command::new("kill").args(["-TERM", &pid]).status().unwrap().success());
    pids.next().unwrap().unwrap();
    until_served(&socket);
    drop(manager.stdin.take());
    manager.wait().unwrap();
}
