//! What does a daemon cost that nobody asks anything? On all doors, with a service manager to tell and a broker to
//! hear.

use serde_json::json;
use sparsed_tests::broker::Broker;
use sparsed_tests::bus::{self, Bus};
use sparsed_tests::chatty;
use sparsed_tests::daemon::Daemon;
use std::collections::BTreeMap;
use std::ffi::OsString;
use std::os::unix::net::UnixDatagram;
use std::time::{Duration, Instant};

/// How long it is looked at: a rate takes time, and nothing else here waits for a clock. It is a multiple of its
/// timers' times but for the keepalive's 15 s.
const SPAN: Duration = Duration::from_secs(20);
const SPANS_MAX: usize = 3;
/// And before that in such pieces until one is quiet: what a start or an answer leaves to do is over then. In each the
/// doors look around once, and may have something to announce.
const SETTLING: Duration = Duration::from_secs(5);
const SETTLINGS_MAX: usize = 8;
/// Which thread sleeps how often is in `tests/bench/RESULTS.md`.
const WAKEUPS_PER_S_MAX: f64 = 2.0;
const CPU_SHARE_MAX: f64 = 0.001;
/// Without a loaded model.
const RSS_KIB_MAX: u64 = 30 << 10;

/// Voluntary switches of each thread: each is a sleep that something ended.
fn wakeups(pid: u32) -> BTreeMap<OsString, u64> {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).unwrap().flatten();
    let of = |task: std::fs::DirEntry| -> Option<(OsString, u64)> {
        let status = std::fs::read_to_string(task.path().join("status")).ok()?;
        let count = status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"))?;
        Some((task.file_name(), count.trim().parse().ok()?))
    };
    tasks.filter_map(of).collect()
}

/// Time on processors of all threads.
fn cpu(pid: u32) -> Duration {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).unwrap().flatten();
    let of = |task: std::fs::DirEntry| -> Option<u64> {
        std::fs::read_to_string(task.path().join("schedstat")).ok()?.split_whitespace().next()?.parse().ok()
    };
    Duration::from_nanos(tasks.filter_map(of).sum())
}

fn resident_kib(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

/// Wakeups a second and share of a processor within `span`.
fn looked(pid: u32, span: Duration) -> (f64, f64) {
    let (begun, woken, used) = (Instant::now(), wakeups(pid), cpu(pid));
    while let Some(rest) = span.checked_sub(begun.elapsed()).filter(|rest| !rest.is_zero()) {
        std::thread::park_timeout(rest);
    }
    // A thread that ends meanwhile, as one of tokio's does that nobody needs, takes its count along.
    let since = |(thread, now): (OsString, u64)| now - woken.get(&thread).copied().unwrap_or(0);
    let (woken, used) = (wakeups(pid).into_iter().map(since).sum::<u64>(), cpu(pid).saturating_sub(used));
    let seconds = begun.elapsed().as_secs_f64();
    (woken as f64 / seconds, used.as_secs_f64() / seconds)
}

/// Looks whether it sleeps, once it has settled.
fn sleeps(daemon: &Daemon) {
    let mut settling = Vec::new();
    while settling.len() < SETTLINGS_MAX && settling.last().is_none_or(|&(woken, _)| woken > WAKEUPS_PER_S_MAX) {
        settling.push(looked(daemon.pid(), SETTLING));
    }
    // A processor that others keep busy takes three times as long for the same; that it is so quiet once is what
    // counts.
    let is_quiet = |&(woken, used): &(f64, f64)| woken <= WAKEUPS_PER_S_MAX && used <= CPU_SHARE_MAX;
    let mut looks = Vec::new();
    while looks.len() < SPANS_MAX && !looks.last().is_some_and(is_quiet) {
        looks.push(looked(daemon.pid(), SPAN));
    }
    eprintln!("wakeups/s and CPU share {looks:?}; while it settled {settling:?}");
    assert!(looks.iter().any(is_quiet), "wakeups/s and CPU share: {looks:?}");
}

#[test]
fn a_daemon_that_nobody_asks_sleeps() {
    let dir = tempfile::tempdir().unwrap();
    let notify = dir.path().join("notify");
    let _manager = UnixDatagram::bind(&notify).unwrap();
    let (broker, bus) = (Broker::start(""), Bus::start(bus::Broker::DbusDaemon));
    let sets = [
        format!("mqtt.broker=mqtt://127.0.0.1:{}", broker.port()),
        format!("dbus.bus={}", bus.address()),
        "memory.budget=8MiB".to_owned(),
        format!("model.default.path={}", chatty::write(dir.path()).display()),
        "model.default.load=demand".to_owned(),
    ];
    let sets: Vec<&str> = sets.iter().map(String::as_str).collect();
    let daemon = Daemon::spawn_in(&[("NOTIFY_SOCKET", &notify)], None, &sets).ready();
    daemon.wait_until("on all doors", || {
        let log = daemon.log();
        log.contains("connected to the MQTT broker") && log.contains("on D-Bus")
    });
    let rss = resident_kib(daemon.pid());
    // With a model it has more to watch.
    let body = json!({ "messages": [{ "role": "user", "content": "Hello!" }], "max_tokens": 4 });
    assert_eq!(daemon.post("/v1/chat/completions", &body).status, 200);
    sleeps(&daemon);
    eprintln!("{rss} KiB resident");
    assert!(rss <= RSS_KIB_MAX, "{rss} KiB resident");
}

#[test]
fn a_daemon_of_models_elsewhere_that_nobody_asks_sleeps() {
    let dir = tempfile::tempdir().unwrap();
    let notify = dir.path().join("notify");
    let _manager = UnixDatagram::bind(&notify).unwrap();
    // The engine there may be away.
    let sets = ["model.big.upstream=http://127.0.0.1:9/v1"];
    let daemon = Daemon::spawn_in(&[("NOTIFY_SOCKET", &notify)], None, &sets);
    daemon.wait_until("it listens", || daemon.log().contains("listening"));
    let state = || daemon.get("/v1/status").json()["device"]["state"].clone();
    daemon.wait_until("it needs no device", || state() == "unused");
    sleeps(&daemon);
}
