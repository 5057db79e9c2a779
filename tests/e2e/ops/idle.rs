//! What does a daemon cost that nobody asks anything? On all doors, with a service manager to tell and a broker to
//! hear.

use sparsed_tests::broker::Broker;
use sparsed_tests::bus::{self, Bus};
use sparsed_tests::chatty;
use sparsed_tests::daemon::Daemon;
use std::os::unix::net::UnixDatagram;
use std::time::{Duration, Instant};

/// How long it is looked at: a rate takes time, and nothing else here waits for a clock.
const SPAN: Duration = Duration::from_secs(10);
/// The goal is 2 a second; 3.4 were measured once, before some looks became rarer. MQTT's clock alone was 10 before.
const WAKEUPS_PER_S_MAX: f64 = 4.0;
/// The goal is 0.1 %.
const CPU_SHARE_MAX: f64 = 0.005;
/// Without weights to speak of. The goal is 30 MiB.
const RSS_KIB_MAX: u64 = 40 << 10;

/// Voluntary switches of all threads: each is a sleep that something ended.
fn wakeups(pid: u32) -> u64 {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).unwrap().flatten();
    let of = |task: std::fs::DirEntry| -> Option<u64> {
        let status = std::fs::read_to_string(task.path().join("status")).ok()?;
        status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"))?.trim().parse().ok()
    };
    tasks.filter_map(of).sum()
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
    ];
    let sets: Vec<&str> = sets.iter().map(String::as_str).collect();
    let daemon = Daemon::spawn_in(&[("NOTIFY_SOCKET", &notify)], Some(&chatty::write(dir.path())), &sets).ready();
    daemon.wait_until("on all doors", || {
        let log = daemon.log();
        log.contains("connected to the MQTT broker") && log.contains("on D-Bus")
    });
    let look = || (Instant::now(), wakeups(daemon.pid()), cpu(daemon.pid()));
    // The least of a few spans: what a start leaves to do is over by then.
    let spans = (0..3).map(|_| {
        let (begun, woken, used) = look();
        while begun.elapsed() < SPAN / 3 {
            std::thread::park_timeout(SPAN / 3 - begun.elapsed().min(SPAN / 3));
        }
        let (ended, woken_then, used_then) = look();
        let seconds = (ended - begun).as_secs_f64();
        ((woken_then - woken) as f64 / seconds, (used_then - used).as_secs_f64() / seconds)
    });
    let spans: Vec<(f64, f64)> = spans.collect();
    let least = spans.iter().copied().reduce(|a, b| (a.0.min(b.0), a.1.min(b.1))).unwrap();
    let rss = resident_kib(daemon.pid());
    eprintln!("wakeups/s and CPU share: {spans:?}; {rss} KiB resident");
    assert!(least.0 <= WAKEUPS_PER_S_MAX, "{spans:?} wakeups/s and CPU share");
    assert!(least.1 <= CPU_SHARE_MAX, "{spans:?} wakeups/s and CPU share");
    assert!(rss <= RSS_KIB_MAX, "{rss} KiB resident");
}
