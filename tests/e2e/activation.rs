//! A socket of the service manager's is there before the daemon and while it restarts: nobody is refused.
#![allow(clippy::unwrap_used, missing_docs, reason = "a test")]

use sparsed_tests::chatty;
use sparsed_tests::daemon::{Answer, read_answer};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};

/// What `/health` answers, asked at once, however long it takes.
fn ask(socket: &Path) -> Answer {
    let mut stream = UnixStream::connect(socket).unwrap();
    stream.write_all(b"GET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").unwrap();
    read_answer(stream).unwrap()
}

fn health(socket: &Path) -> u16 {
    ask(socket).status
}

/// A service manager that listens on `folder/s` and starts a daemon with these settings again and again.
fn manager(folder: &Path, sets: &[String]) -> Child {
    let root = sparsed_tests::root();
    let state = format!("state_dir={}", folder.join("state").display());
    let mut command = Command::new("python3");
    command.arg(root.join("tests/e2e/activate.py")).arg(folder.join("s")).arg(root.join("target/release/sparsed"));
    // It is not listened on: the passed one is.
    let elsewhere = "socket.path=/nonexistent/sparsed/api.sock".to_owned();
    command.args([&state, &elsewhere].into_iter().chain(sets).flat_map(|set| ["--set", set]));
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap()
}

/// Asks until the model is loaded.
fn until_served(socket: &Path) {
    assert!((0..100_000).any(|_| health(socket) == 200), "the daemon does not come to serve");
}

#[test]
fn clients_that_come_before_the_daemon_or_while_it_restarts_are_answered() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("s");
    let model = format!("model.default.path={}", chatty::write(folder.path()).display());
    let mut manager = manager(folder.path(), &[model]);
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

#[test]
fn who_waits_for_a_daemon_whose_configuration_names_a_file_that_is_not_there_hears_so_each_time() {
    let folder = tempfile::tempdir().unwrap();
    let none = format!("tcp.keys={}", folder.path().join("keys").display());
    let mut manager = manager(folder.path(), &["tcp.listen=127.0.0.1:0".to_owned(), none]);
    let mut pids = BufReader::new(manager.stdout.take().unwrap()).lines();
    for _ in 0..3 {
        pids.next().unwrap().unwrap();
        let answer = ask(&folder.path().join("s"));
        assert_eq!((answer.status, &answer.json()["error"]["code"]), (503, &"misconfigured".into()));
    }
    drop(manager.stdin.take());
    manager.wait().unwrap();
}
