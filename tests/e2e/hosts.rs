//! A plugin's process is killed, stopped, crashed and corrupted while chats stream: no stream is lost and none changes.
//! `LONG=1` does it 200 times with the default model instead of 40 times with a tiny one, `LONG=n` n times.
#![allow(clippy::unwrap_used, missing_docs, reason = "a test")]

mod memory_group;

use memory_group::MemoryGroup;
use serde_json::{Value, json};
use sparsed_tests::chatty;
use sparsed_tests::daemon::{Daemon, read_answer, streamed_tokens, three_streams};
use std::fs;
use std::io::{Seek, SeekFrom, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

/// What is done to the process.
#[derive(Clone, Copy, Debug)]
enum Blow {
    /// As a person does.
    Kill,
    /// It hangs: only the step's time limit shows it.
    Stop,
    /// It ends itself, as a failed assertion of a driver does. (A SIGSEGV from outside is swallowed once by Rust's own
    /// handler; `Corrupt` crashes in earnest.)
    Abort,
    /// The plugin's code is overwritten.
    Corrupt,
    /// It gets no memory any more, so the kernel's OOM killer ends it; where a control group can be had. (A plugin
    /// whose allocator fails is in `faults.rs`.)
    Starve,
}
const BLOWS: [Blow; 4] = [Blow::Kill, Blow::Stop, Blow::Abort, Blow::Corrupt];

struct Plan {
    model: PathBuf,
    blows: usize,
    tokens: u32,
    /// Tokens of all streams between two blows, at most.
    pace: u64,
    /// Longer than a step takes on a busy machine: after it a process that is stopped is noticed.
    step_timeout_ms: u64,
}

fn plan() -> Plan {
    if let Some(long) = std::env::var_os("LONG") {
        let blows = long.to_str().and_then(|long| long.parse().ok()).filter(|&n| n > 1).unwrap_or(200);
        let model = sparsed_tests::model("smollm2-135m-dsa.gguf");
        return Plan { model, blows, tokens: 120, pace: 90, step_timeout_ms: 15_000 };
    }
    let model = sparsed_tests::root().join("tests/golden/tiny/v32/model.gguf");
    Plan { model, blows: 40, tokens: 1200, pace: 900, step_timeout_ms: 1000 }
}

const SETS: &[&str] = &[
    "engine.isolation=process",
    "engine.threads=1",
    "engine.retry.backoff_ms=[1]",
    // A blow is nobody's fault here; a strike is forgotten at once.
    "plugins.strike_window_ms=1",
];

fn strike(pid: u32, blow: Blow, group: Option<&MemoryGroup>) {
    let signal = |name: &str| drop(Command::new("kill").arg(format!("-{name}")).arg(pid.to_string()).output());
    match blow {
        Blow::Kill => signal("KILL"),
        Blow::Stop => signal("STOP"),
        Blow::Abort => signal("ABRT"),
        Blow::Corrupt => drop(corrupt(pid)),
        // Gone already is as good.
        Blow::Starve => drop(group.map(|group| group.take(pid))),
    }
}

/// Overwrites the code of the plugin, which lies in a memory file.
fn corrupt(pid: u32) -> std::io::Result<()> {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps"))?;
    let code = maps.lines().filter(|line| line.contains(" r-xp ") && line.contains("/memfd:"));
    let mut memory = fs::File::options().write(true).open(format!("/proc/{pid}/mem"))?;
    for line in code {
        let (start, end) = line.split_once(' ').and_then(|(range, _)| range.split_once('-')).unwrap();
        let (start, end) = (u64::from_str_radix(start, 16).unwrap(), u64::from_str_radix(end, 16).unwrap());
        memory.seek(SeekFrom::Start(start))?;
        memory.write_all(&vec![0xcc; usize::try_from(end - start).unwrap()])?;
    }
    Ok(())
}

/// What each client reads to the end of its stream.
type Streams = Vec<std::thread::JoinHandle<String>>;

fn begin(daemon: &Daemon, plan: &Plan) -> Streams {
    let streams = three_streams(plan.tokens).into_iter().map(|request| daemon.open("/v1/completions", &request));
    streams.map(|stream| std::thread::spawn(move || read_answer(stream).unwrap().body)).collect()
}

/// The tokens of each stream.
fn finish(streams: Streams, daemon: &Daemon) -> Vec<Vec<u64>> {
    let tokens = |stream: std::thread::JoinHandle<String>| {
        let body = stream.join().unwrap();
        let end = &body[body.len().saturating_sub(500)..];
        assert!(body.ends_with("data: [DONE]\n\n"), "a stream is lost: {end}\nlog:\n{}", daemon.log());
        streamed_tokens(&body)
    };
    streams.into_iter().map(tokens).collect()
}

fn sampled(daemon: &Daemon) -> u64 {
    daemon.status()["sampled_tokens"].as_u64().unwrap()
}

fn faults(daemon: &Daemon) -> u64 {
    daemon.get("/v1/status").json()["device"]["faults"].as_u64().unwrap()
}

/// Descriptors of the daemon and KiB of its memory.
fn footprint(daemon: &Daemon) -> (usize, u64) {
    let proc = PathBuf::from(format!("/proc/{}", daemon.pid()));
    let status = fs::read_to_string(proc.join("status")).unwrap();
    let resident = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap();
    let kib = resident.trim().trim_end_matches(" kB").parse().unwrap();
    (fs::read_dir(proc.join("fd")).unwrap().count(), kib)
}

#[test]
fn a_step_that_hangs_does_not_keep_the_daemon_from_stopping() {
    let model = sparsed_tests::root().join("tests/golden/tiny/v32/model.gguf");
    let sets = ["engine.isolation=process", "engine.step_timeout_ms=600000", "limits.stop_s=0"];
    let mut daemon = Daemon::start(&model, &sets);
    let stream = daemon.open("/v1/completions", &three_streams(100_000)[0]);
    daemon.wait_until("running", || sampled(&daemon) > 0);
    strike(daemon.plugin_host(), Blow::Stop, None);
    let asked = Instant::now();
    daemon.signal("TERM");
    assert_eq!(daemon.wait().code(), Some(0), "{}", daemon.log());
    assert!(asked.elapsed() < Duration::from_secs(10), "{:?}; log:\n{}", asked.elapsed(), daemon.log());
    let answer = read_answer(stream).unwrap().body;
    let end = &answer[answer.len().saturating_sub(400)..];
    assert!(end.contains("shutting_down"), "its client hears why: {end}; log:\n{}", daemon.log());
}

/// One long answer to a prompt of 2000 characters, by itself or in a session.
fn long_answer(daemon: &Daemon, in_session: bool) -> UnixStream {
    let words = "Once upon a time there was a box. ".repeat(60);
    let mut request = json!({
        "messages": [{ "role": "user", "content": words }],
        "max_tokens": 400, "temperature": 0, "ignore_eos": true, "stream": true,
    });
    if in_session {
        request["session_id"] = daemon.post("/v1/sessions", &json!({})).json()["id"].clone();
    }
    daemon.open("/v1/chat/completions", &request)
}

fn text(stream: UnixStream) -> String {
    let body = read_answer(stream).unwrap().body;
    assert!(body.ends_with("data: [DONE]\n\n"), "{body}");
    let events = body.lines().filter_map(|line| line.strip_prefix("data: ")?.parse::<Value>().ok());
    events.filter_map(|event| Some(event["choices"][0]["delta"]["content"].as_str()?.to_owned())).collect()
}

#[test]
fn when_its_plugins_process_dies_a_session_reads_its_blocks_from_its_file_instead_of_computing_them() {
    let folder = tempfile::tempdir().unwrap();
    let model = chatty::write(folder.path());
    let daemon = Daemon::start(&model, &[SETS, &["model.default.max_context=4096"]].concat());
    let computed = || daemon.status()["computed_tokens"].as_u64().unwrap();
    let expected = text(long_answer(&daemon, false));
    let whole = computed();
    assert!(whole > 2400);
    for in_session in [false, true] {
        // A prefix that was computed before would be taken from the pool.
        strike(daemon.plugin_host(), Blow::Kill, None);
        let (before, lost) = ((computed(), sampled(&daemon)), faults(&daemon));
        let stream = long_answer(&daemon, in_session);
        daemon.wait_until("half is said", || sampled(&daemon) >= before.1 + 200);
        assert_eq!(faults(&daemon), lost + 1, "the first loss shows with the first step");
        strike(daemon.plugin_host(), Blow::Kill, None);
        assert_eq!(text(stream), expected, "log:\n{}", daemon.log());
        assert_eq!(faults(&daemon), lost + 2);
        let again = computed() - before.0 - whole;
        assert_eq!(again < 600, in_session, "{again} tokens computed again; in a session: {in_session}");
    }
}

#[test]
fn whatever_happens_to_the_plugins_process_no_stream_is_lost_and_none_changes() {
    let plan = plan();
    let undisturbed = Daemon::start(&plan.model, &["engine.threads=1"]);
    let expected = finish(begin(&undisturbed, &plan), &undisturbed);
    drop(undisturbed);
    assert!(expected.iter().all(|answer| answer.len() == plan.tokens as usize));
    let step_timeout = format!("engine.step_timeout_ms={}", plan.step_timeout_ms);
    let daemon = Daemon::start(&plan.model, &[SETS, &[&step_timeout]].concat());
    let mut random = fastrand::Rng::with_seed(7);
    assert_eq!(finish(begin(&daemon, &plan), &daemon), expected, "without a blow; log:\n{}", daemon.log());
    daemon.wait_until("idle", || daemon.status()["running"] == 0);
    let base = footprint(&daemon);
    let (mut blows, mut starved) = (0, 0);
    let group = MemoryGroup::new();
    if group.is_none() {
        eprintln!("no control group for memory can be had here: the OOM killer is not tried");
    }
    let kinds = [&BLOWS[..], group.as_ref().map_or(&[], |_| &[Blow::Starve])].concat();
    while blows < plan.blows {
        let streams = begin(&daemon, &plan);
        let mut next = sampled(&daemon) + random.u64(1..plan.pace);
        while !streams.iter().all(|stream| stream.is_finished()) {
            if blows < plan.blows && sampled(&daemon) >= next {
                let before = faults(&daemon);
                let blow = kinds[random.usize(..kinds.len())];
                strike(daemon.plugin_host(), blow, group.as_ref());
                // Not twice upon the same process.
                let over = || streams.iter().all(|stream| stream.is_finished());
                daemon.wait_until("noticed", || faults(&daemon) > before || over());
                // After the last step of a round nobody notices: that blow does not count.
                let noticed = faults(&daemon) > before;
                blows += usize::from(noticed);
                starved += usize::from(noticed && matches!(blow, Blow::Starve));
                next = sampled(&daemon) + random.u64(1..plan.pace);
            }
            std::thread::yield_now();
        }
        let answers = finish(streams, &daemon);
        assert_eq!(answers, expected, "after {blows} blows; log:\n{}", daemon.log());
        daemon.wait_until("idle", || daemon.status()["running"] == 0);
    }
    let end = footprint(&daemon);
    assert!(end.0 <= base.0 + 1, "{} descriptors, {} before the blows", end.0, base.0);
    assert!(end.1 < base.1 + (16 << 10), "{} KiB, {} before the blows", end.1, base.1);
    let faults = faults(&daemon);
    assert!(starved > 0 || group.is_none(), "the seed gives each blow its turn");
    assert!(faults >= plan.blows as u64, "{faults} faults of {} blows", plan.blows);
}
