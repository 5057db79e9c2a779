//! A partition for the state that comes late, or is full: what is served meanwhile, and what is lost?

use serde_json::{Value, json};
use sparsed_tests::broker::Broker;
use sparsed_tests::chatty;
use sparsed_tests::daemon::{Answer, Daemon, read_answer};
use sparsed_tests::skipped;
use sparsed_tests::small_disk::SmallDisk;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};

fn chat(daemon: &Daemon, session: Option<&str>) -> Answer {
    let body = json!({ "messages": [{ "role": "user", "content": "Hi" }], "max_tokens": 4, "session_id": session });
    daemon.post("/v1/chat/completions", &body)
}

fn new_session(daemon: &Daemon) -> Answer {
    daemon.post("/v1/sessions", &json!({}))
}

fn code(answer: &Answer) -> (u16, Value) {
    (answer.status, answer.json()["error"]["code"].clone())
}

/// Waits for a session, and answers its name.
fn first_session(daemon: &Daemon) -> String {
    let mut made = None;
    daemon.wait_until("sessions are kept", || {
        made = Some(new_session(daemon)).filter(|answer| answer.status == 201);
        made.is_some()
    });
    made.unwrap().json()["id"].as_str().unwrap().to_owned()
}

#[test]
fn a_state_folder_that_comes_late_is_taken_up_without_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let (state, partition) = (dir.path().join("state"), dir.path().join("partition"));
    std::os::unix::fs::symlink(&partition, &state).unwrap();
    let broker = Broker::start("");
    let sets = [format!("state_dir={}", state.display()), format!("mqtt.broker=mqtt://127.0.0.1:{}", broker.port())];
    let sets: Vec<&str> = sets.iter().map(String::as_str).collect();
    let mut daemon = Daemon::start(&chatty::write(dir.path()), &sets);
    assert!(daemon.log().contains("the state folder cannot be used: no sessions, no MQTT"), "{}", daemon.log());
    assert_eq!(chat(&daemon, None).status, 200);
    let refused = new_session(&daemon);
    assert_eq!(code(&refused), (503, json!("sessions_away")), "{}", refused.body);
    assert!(refused.head.to_ascii_lowercase().contains("retry-after: "), "{}", refused.head);
    assert_eq!(daemon.get("/v1/status").json()["sessions_away"], true);
    assert!(!daemon.log().contains("connected to the MQTT broker"), "{}", daemon.log());
    std::fs::create_dir(&partition).unwrap();
    let session = first_session(&daemon);
    assert_eq!(daemon.get("/v1/status").json()["sessions_away"], false);
    assert_eq!(chat(&daemon, Some(&session)).status, 200);
    daemon.wait_until("on MQTT", || daemon.log().contains("connected to the MQTT broker"));
    daemon.kill_and_restart(&sets);
    let said = daemon.get(&format!("/v1/sessions/{session}")).json();
    assert_eq!(said["messages"].as_array().map(Vec::len), Some(2), "{said}\n{}", daemon.log());
}

/// The daemon's threads of this name.
fn threads(daemon: &Daemon, name: &str) -> Vec<String> {
    let tasks = std::fs::read_dir(format!("/proc/{}/task", daemon.pid())).unwrap();
    let is_named = |path: &std::path::Path| std::fs::read_to_string(path.join("comm")).is_ok_and(|c| c.trim() == name);
    let tasks = tasks.filter_map(|task| Some(task.ok()?.path())).filter(|path| is_named(path));
    tasks.map(|path| path.file_name().unwrap().to_str().unwrap().to_owned()).collect()
}

/// Holds one thread of a process, as a disk that does not answer does, until its input ends: PTRACE_SEIZE, then
/// PTRACE_INTERRUPT. With the tracer's end the thread goes on.
const HOLD: &str = "import ctypes, sys
trace = ctypes.CDLL(None, use_errno=True).ptrace
trace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
for request in (0x4206, 0x4207):
    if trace(request, int(sys.argv[1]), None, None):
        sys.exit('ptrace: error %d' % ctypes.get_errno())
print('held', flush=True)
sys.stdin.read()";

/// A thread that stands still until this is dropped; `None` where the system allows no tracing.
fn hold(thread: &str) -> Option<Child> {
    let mut command = Command::new("python3");
    let mut child = command.args(["-c", HOLD, thread]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut said = String::new();
    BufReader::new(child.stdout.as_mut().unwrap()).read_line(&mut said).unwrap();
    (said == "held\n").then_some(child)
}

#[test]
fn while_the_disk_of_sessions_does_not_answer_requests_without_one_are_served() {
    let dir = tempfile::tempdir().unwrap();
    let daemon = Daemon::start(&chatty::write(dir.path()), &[]);
    let session = first_session(&daemon);
    // It does all that waits for the disk.
    let [thread] = threads(&daemon, "sessions").try_into().unwrap();
    let Some(mut held) = hold(&thread) else {
        return skipped("a disk that does not answer", "this user may not hold a thread of another process");
    };
    let request = format!("GET /v1/sessions/{session} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
    let ask = |_| {
        let mut stream = UnixStream::connect(daemon.socket()).unwrap();
        stream.write_all(request.as_bytes()).unwrap();
        stream
    };
    let waiting: Vec<UnixStream> = (0..20).map(ask).collect();
    // Two of them carry bytes.
    daemon.wait_until("verbs have their threads", || threads(&daemon, "surface").len() >= 4);
    assert_eq!(chat(&daemon, None).status, 200);
    drop(held.stdin.take());
    assert!(held.wait().unwrap().success());
    for stream in waiting {
        let answer = read_answer(stream).unwrap();
        assert_eq!(answer.status, 200, "{}", answer.body);
    }
    assert_eq!(chat(&daemon, Some(&session)).status, 200);
}

#[test]
fn a_state_folder_that_comes_and_hangs_holds_up_neither_the_doors_nor_the_end() {
    let dir = tempfile::tempdir().unwrap();
    let (state, partition) = (dir.path().join("state"), dir.path().join("partition"));
    std::os::unix::fs::symlink(&partition, &state).unwrap();
    let sets = [format!("state_dir={}", state.display()), "mqtt.broker=mqtt://127.0.0.1:9".to_owned()];
    let sets: Vec<&str> = sets.iter().map(String::as_str).collect();
    let mut daemon = Daemon::start(&chatty::write(dir.path()), &sets);
    // Who opens this lock waits until somebody reads, as on a disk that does not answer.
    std::fs::create_dir(dir.path().join("new")).unwrap();
    let made = Command::new("mkfifo").arg(dir.path().join("new/lock")).status().unwrap();
    assert!(made.success());
    std::fs::rename(dir.path().join("new"), &partition).unwrap();
    daemon.wait_until("waiting for the disk", || threads(&daemon, "mqtt-open").len() == 1);
    assert_eq!(daemon.get("/health").status, 200);
    assert_eq!(chat(&daemon, None).status, 200);
    assert_eq!(code(&new_session(&daemon)), (503, json!("sessions_away")));
    daemon.signal("TERM");
    assert!(daemon.wait().success(), "{}", daemon.log());
}

#[test]
fn sessions_under_another_key_are_told_of_once_and_are_there_again_with_theirs() {
    let dir = tempfile::tempdir().unwrap();
    let mut daemon = Daemon::start(&chatty::write(dir.path()), &[]);
    (0..3).for_each(|_| drop(first_session(&daemon)));
    let key = daemon.state_dir().join("master.key");
    let old = std::fs::read(&key).unwrap();
    let n_listed = |daemon: &Daemon| daemon.get("/v1/sessions").json()["data"].as_array().map(Vec::len);
    std::fs::write(&key, [7; 32]).unwrap();
    daemon.kill_and_restart(&[]);
    let log = daemon.log();
    let lines: Vec<&str> = log.lines().filter(|line| line.contains("another master key")).collect();
    assert!(lines.len() == 1 && lines[0].contains("sessions=3"), "{lines:?}");
    assert!(!log.contains("not as it was written"), "{log}");
    assert_eq!(n_listed(&daemon), Some(0));
    assert_eq!(daemon.get("/v1/status").json()["sessions_of_other_key"], 3);
    assert!(daemon.get("/metrics").body.contains("sparsed_sessions_of_other_key 3\n"));
    std::fs::write(&key, old).unwrap();
    daemon.kill_and_restart(&[]);
    assert_eq!((n_listed(&daemon), &daemon.get("/v1/status").json()["sessions_of_other_key"]), (Some(3), &json!(0)));
}

/// Takes all of a disk's room.
fn fill(disk: &SmallDisk) {
    let mut filler = std::fs::File::create(disk.path().join("filler")).unwrap();
    while filler.write_all(&[1; 4096]).is_ok() {}
}

fn empty(disk: &SmallDisk) {
    std::fs::remove_file(disk.path().join("filler")).unwrap();
}

#[test]
fn a_disk_that_is_full_refuses_conversations_serves_the_rest_and_loses_nothing() {
    let Some(disk) = SmallDisk::mount(1024) else {
        return skipped("full disk", "this user may not mount a disk");
    };
    let dir = tempfile::tempdir().unwrap();
    let state = format!("state_dir={}", disk.path().join("state").display());
    let model = chatty::write(dir.path());
    // Full from the start: not even a key can be made.
    fill(&disk);
    let mut daemon = Daemon::start(&model, &[&state]);
    assert_eq!(chat(&daemon, None).status, 200, "{}", daemon.log());
    let refused = new_session(&daemon);
    assert_eq!(code(&refused), (503, json!("sessions_away")), "{}", refused.body);
    empty(&disk);
    let session = first_session(&daemon);
    assert_eq!(chat(&daemon, Some(&session)).status, 200);
    // Full in between.
    fill(&disk);
    assert_eq!(chat(&daemon, None).status, 200);
    let refused = new_session(&daemon);
    assert_eq!(code(&refused), (507, json!("disk_failed")), "{}", refused.body);
    // Killed and started with a full disk: what was said can be read.
    daemon.kill_and_restart(&[&state]);
    let said = daemon.get(&format!("/v1/sessions/{session}")).json();
    assert_eq!(said["messages"].as_array().unwrap().len(), 2, "{said}");
    assert_eq!(chat(&daemon, None).status, 200);
    empty(&disk);
    assert_eq!(chat(&daemon, Some(&session)).status, 200);
    daemon.kill_and_restart(&[&state]);
    let said = daemon.get(&format!("/v1/sessions/{session}")).json();
    assert_eq!(said["messages"].as_array().unwrap().len(), 4, "{said}");
}
