//! A box that gets warm has half of its processor in the middle of an answer: is the answer still spoken at the pace
//! that was wanted? A quota of a control group stands for the clock that is throttled.

use serde_json::{Value, json};
use sparsed_tests::daemon::Daemon;
use sparsed_tests::{root, skipped};
use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// Of the quota, in microseconds: short beside a step, so that it slows down and does not stop.
const PERIOD_US: u64 = 10_000;
/// What a token of a running answer may take.
const TARGET: Duration = Duration::from_millis(300);
/// Tokens of the answer that are timed after the quota was halved and the steps have shrunk.
const TIMED: usize = 20;

/// A control group that bounds the processor time of its members; removed when dropped.
struct Quota {
    dir: PathBuf,
    is_v1: bool,
}

impl Quota {
    /// Below this process's own; `None` where the system gives none to it.
    fn new() -> Option<Self> {
        let own = fs::read_to_string("/proc/self/cgroup").ok()?;
        let below = |mark: &str| own.lines().find_map(|line| Some(line.split_once(mark)?.1.trim_start_matches('/')));
        let v1 = below(":cpu:").map(|path| Path::new("/sys/fs/cgroup/cpu").join(path));
        let is_v1 = v1.is_some();
        let parent = v1.or_else(|| Some(Path::new("/sys/fs/cgroup").join(below("0::")?)))?;
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let n = COUNT.fetch_add(1, Ordering::Relaxed);
        let quota = Self { dir: parent.join(format!("sparsed-throttled-{}-{n}", std::process::id())), is_v1 };
        fs::create_dir(&quota.dir).ok()?;
        quota.set(100).then_some(quota)
    }

    /// So many hundredths of one processor.
    fn set(&self, percent: u64) -> bool {
        let quota = PERIOD_US * percent / 100;
        let write = |file: &str, text: String| fs::write(self.dir.join(file), text).is_ok();
        match self.is_v1 {
            true => write("cpu.cfs_period_us", PERIOD_US.to_string()) && write("cpu.cfs_quota_us", quota.to_string()),
            false => write("cpu.max", format!("{quota} {PERIOD_US}")),
        }
    }

    fn take(&self, pid: u32) {
        fs::write(self.dir.join("cgroup.procs"), pid.to_string()).unwrap();
    }

    /// Puts a process back where this one's group is.
    fn give_back(&self, pid: u32) {
        fs::write(self.dir.with_file_name("cgroup.procs"), pid.to_string()).unwrap();
    }
}

impl Drop for Quota {
    fn drop(&mut self) {
        // It has no members when the daemon is gone; one that is left behind harms nobody.
        let _left = fs::remove_dir(&self.dir).is_err();
    }
}

/// Prompt tokens of a step beside running answers, at most.
fn chunk(daemon: &Daemon) -> f64 {
    let metrics = daemon.get("/metrics").body;
    let line = metrics.lines().find(|line| line.starts_with("sparsed_prefill_chunk_tokens{")).unwrap();
    line.rsplit(' ').next().unwrap().parse().unwrap()
}

fn completion(prompt: &[u32], max_tokens: u32) -> Value {
    json!({ "prompt": prompt, "max_tokens": max_tokens, "ignore_eos": true, "stream": true })
}

/// Reads until the next piece of text; whether there was one.
fn piece(answer: &mut BufReader<UnixStream>) -> bool {
    let mut line = String::new();
    while answer.read_line(&mut line).unwrap() > 0 {
        if line.starts_with("data: {") && !line.contains("\"error\"") {
            return true;
        }
        line.clear();
    }
    false
}

#[test]
fn a_quota_of_one_processor_is_given_one_thread() {
    let Some(quota) = Quota::new() else {
        return skipped("a quota of processor time", "no control group for it here");
    };
    let own = std::process::id();
    quota.take(own);
    let daemon = Daemon::spawn(Some(&root().join("tests/golden/tiny/v32/model.gguf")), &["engine.threads=0"]);
    quota.give_back(own);
    let daemon = daemon.ready();
    assert!(daemon.log().contains("cpu device open: 1 threads"), "{}", daemon.log());
}

#[test]
fn a_thread_sleeps_while_a_quota_that_was_cut_keeps_one_busy_and_is_woken_when_it_is_given_back() {
    let Some(quota) = Quota::new() else {
        return skipped("a quota of processor time", "no control group for it here");
    };
    let n = std::thread::available_parallelism().unwrap().get() as u64;
    if n < 2 {
        return skipped("a quota of two processors", "there is one");
    }
    assert!(quota.set(100 * n), "the quota cannot be set");
    let daemon = Daemon::start(&root().join("models/smollm2-135m-dsa.gguf"), &["engine.threads=0"]);
    assert!(daemon.log().contains(&format!("cpu device open: {n} threads")), "{}", daemon.log());
    quota.take(daemon.pid());
    let mut answer = BufReader::new(daemon.open("/v1/completions", &completion(&[1, 2, 3], 8000)));
    for awake in [1, n] {
        assert!(quota.set(100 * awake), "the quota cannot be set");
        let told = format!("{awake} of {n} threads compute");
        while !daemon.log().contains(&told) {
            assert!(piece(&mut answer), "the answer ended before {told:?} was said: {}", daemon.log());
        }
    }
    assert!(piece(&mut answer), "{}", daemon.log());
}

#[test]
fn with_half_of_the_processor_an_answer_goes_on_at_its_pace_and_prompts_are_read_in_smaller_pieces() {
    // Declared before the daemon, so that its group is removed after it has ended.
    let Some(quota) = Quota::new() else {
        return skipped("a quota of processor time", "no control group for it here");
    };
    let model = root().join("models/smollm2-135m-dsa.gguf");
    let target = format!("limits.tpot_target_ms={}", TARGET.as_millis());
    let daemon = Daemon::start(&model, &[&target, "engine.threads=1"]);
    quota.take(daemon.pid());
    let mut answer = BufReader::new(daemon.open("/v1/completions", &completion(&[1, 2, 3], 4000)));
    assert!(piece(&mut answer), "{}", daemon.log());
    // Long prompts, one after another, each of other tokens.
    let mut n_prompts = 0;
    let mut prompt = || {
        n_prompts += 1;
        let tokens: Vec<u32> = (0..6000).map(|at| 1000 + (at * 7 + n_prompts * 131) % 40_000).collect();
        daemon.open("/v1/completions", &completion(&tokens, 1))
    };
    let mut reading = prompt();
    let full = chunk(&daemon);
    let mut settled = [full; 8];
    // Steps shrink to the target, and then stay about so large.
    let spread =
        |sizes: &[f64]| sizes.iter().fold(0.0_f64, |a, &b| a.max(b)) / sizes.iter().fold(f64::MAX, |a, &b| a.min(b));
    let mut at = 0;
    while settled[0] >= full || spread(&settled) > 1.5 {
        assert!(piece(&mut answer), "{}", daemon.log());
        settled[at % 8] = chunk(&daemon);
        at += 1;
        if daemon.status()["running"].as_u64().unwrap() < 2 {
            reading = prompt();
        }
        assert!(at < 400, "the steps do not settle: {settled:?}");
    }
    let whole = settled.iter().sum::<f64>() / 8.0;
    assert!(quota.set(50), "the quota cannot be halved");
    let (mut gaps, mut last, mut at) = (Vec::new(), Instant::now(), 0);
    while gaps.len() < TIMED {
        assert!(piece(&mut answer), "{}", daemon.log());
        let gap = last.elapsed();
        last = Instant::now();
        if chunk(&daemon) < whole * 0.75 {
            gaps.push(gap);
        }
        at += 1;
        assert!(at < 400, "steps are as large as with the whole processor: {} of {whole}", chunk(&daemon));
        if daemon.status()["running"].as_u64().unwrap() < 2 {
            reading = prompt();
        }
    }
    drop(reading);
    gaps.sort();
    let half = chunk(&daemon);
    eprintln!("prompt tokens of a step: {whole:.0}, then {half:.0}; a token took {:?} at the median", gaps[TIMED / 2]);
    // Half as much again for a machine that has other work.
    assert!(gaps[TIMED / 2] < TARGET * 3 / 2, "{gaps:?}");
    assert!(!daemon.log().contains(" ERROR "), "{}", daemon.log());
}
