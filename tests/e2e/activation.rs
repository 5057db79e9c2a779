//! A socket of the service manager's is there before the daemon and while it restarts: nobody is refused.
#![allow(clippy::unwrap_used, missing_docs, reason = "a test")]

use sparsed_tests::chatty;
use sparsed_tests::daemon::{Answer, read_answer};
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::PermissionsExt;
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
    let log = File::create(folder.join("log")).unwrap();
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(log).spawn().unwrap()
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
    let log = std::fs::read_to_string(folder.path().join("log")).unwrap();
    assert!(log.contains("socket.path is not used: the service manager has opened another socket"), "{log}");
    let listening: Vec<&str> = log.lines().filter(|line| line.contains("listening")).collect();
    let where_it_is = format!("address={}", socket.display());
    assert!(!listening.is_empty() && listening.iter().all(|line| line.contains(&where_it_is)), "{listening:?}");
}

#[test]
fn who_waits_for_a_daemon_that_fails_hears_so_from_one_that_is_not_started_again_for_each() {
    let folder = tempfile::tempdir().unwrap();
    let mut manager = manager(folder.path(), &["engine.plugin=nowhere".to_owned()]);
    let mut pids = BufReader::new(manager.stdout.take().unwrap()).lines();
    // It listens.
    pids.next().unwrap().unwrap();
    for _ in 0..10 {
        let answer = ask(&folder.path().join("s"));
        assert_eq!((answer.status, &answer.json()["error"]["code"]), (503, &"not_started".into()));
    }
    drop(manager.stdin.take());
    manager.wait().unwrap();
    assert!(pids.map_while(Result::ok).count() < 5, "it is started again and again");
}

/// What two clients hear, one after the other, of daemons with these settings.
fn heard_twice(folder: &Path, sets: &[String]) -> Vec<(u16, String)> {
    let mut manager = manager(folder, sets);
    let mut pids = BufReader::new(manager.stdout.take().unwrap()).lines();
    // It listens.
    pids.next().unwrap().unwrap();
    let answers = (0..2).map(|_| ask(&folder.join("s")));
    let heard = answers.map(|answer| (answer.status, answer.json()["error"]["code"].as_str().unwrap().to_owned()));
    let heard = heard.collect();
    drop(manager.stdin.take());
    manager.wait().unwrap();
    heard
}

#[test]
fn who_waits_hears_whether_a_file_that_the_configuration_names_is_wrong_or_may_come_each_time() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("keys");
    let sets = ["tcp.listen=127.0.0.1:0".to_owned(), format!("tcp.keys={}", path.display())];
    let twice = |code: &str| vec![(503, code.to_owned()); 2];
    assert_eq!(heard_twice(folder.path(), &sets), twice("not_started"));
    std::fs::write(&path, "hall short\n").unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
    std::fs::remove_file(folder.path().join("s")).unwrap();
    assert_eq!(heard_twice(folder.path(), &sets), twice("misconfigured"));
}
