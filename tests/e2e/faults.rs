//! Streams outlive the device they run on: the real daemon on a plugin with planted faults.
#![allow(clippy::unwrap_used, missing_docs, reason = "a test")]

use serde_json::{Value, json};
use sparsed_tests::daemon::{Daemon, read_answer, streamed_tokens, three_streams};
use std::collections::BTreeMap;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

const E_BUSY: i32 = -6;
const E_DATA: i32 = -9;
const E_STEP: i32 = -11;
const E_QUEUE_LOST: i32 = -12;
const E_DEVICE_LOST: i32 = -13;
const E_INTERNAL: i32 = -14;

fn tiny() -> PathBuf {
    sparsed_tests::root().join("tests/golden/tiny/v32/model.gguf")
}

/// A daemon on the plugin with planted faults.
fn faulty(environment: &[(&str, &Path)], sets: &[&str]) -> Daemon {
    faulty_with(&tiny(), environment, sets)
}

fn faulty_with(model: &Path, environment: &[(&str, &Path)], sets: &[&str]) -> Daemon {
    faulty_spawned(model, environment, sets).ready()
}

fn faulty_spawned(model: &Path, environment: &[(&str, &Path)], sets: &[&str]) -> Daemon {
    let release = sparsed_tests::root().join("target/release");
    let plugins = release.join("test-plugins");
    assert!(plugins.join("faulty").exists(), "{} is not there: run `make test`", plugins.display());
    let wrapped = plugins.join("faulty/libsparsed_plugin_cpu.so");
    let environment = [environment, &[("SPARSED_WRAPPED", wrapped.as_path())]].concat();
    let dir = format!("plugins.dir={}", plugins.display());
    let own = ["engine.plugin=faulty", "engine.isolation=none", "plugins.strikes=16", dir.as_str()];
    let sets = [&own[..], sets].concat();
    Daemon::spawn_in(&environment, Some(model), &sets)
}

/// Three requests; the last one is drawn with a seed.
fn requests() -> Vec<Value> {
    three_streams(80)
}

/// The tokens of each answer; all stream at a time.
fn streamed(daemon: &Daemon) -> Vec<Vec<u64>> {
    let streams: Vec<_> = requests().iter().map(|request| daemon.open("/v1/completions", request)).collect();
    streams.into_iter().map(|stream| streamed_tokens(&read_answer(stream).unwrap().body)).collect()
}

fn undisturbed() -> Vec<Vec<u64>> {
    let answers = streamed(&Daemon::start(&tiny(), &[]));
    assert!(answers.iter().all(|answer| answer.len() == 80), "{answers:?}");
    answers
}

#[test]
fn no_stream_is_lost_to_any_fault_and_none_changes() {
    let expected = undisturbed();
    for seed in 1..=3 {
        let mut random = fastrand::Rng::with_seed(seed);
        let kinds = [E_DEVICE_LOST, E_INTERNAL, E_STEP, E_DATA, E_BUSY, E_QUEUE_LOST];
        let mut statuses: Vec<i32> = kinds.into_iter().cycle().take(20).collect();
        random.shuffle(&mut statuses);
        // At most two in a row: a step that fails, and again, fails its sequence.
        let faults: BTreeMap<u64, i32> =
            (0..20).zip(statuses).map(|(i, s)| (2 + 4 * i + random.u64(0..4), s)).collect();
        let list: Vec<String> = faults.iter().map(|(run, status)| format!("{run}:{status}")).collect();
        let faults_set = format!("engine.set.faults={}", list.join(" "));
        let sets = [faults_set.as_str(), "engine.retry.backoff_ms=[1, 2, 3]", "engine.retry.forget_ms=0"];
        let daemon = faulty(&[], &sets);
        assert_eq!(streamed(&daemon), expected, "seed {seed}; {list:?}; log:\n{}", daemon.log());
        let log = daemon.log();
        let missed: Vec<_> =
            faults.keys().filter(|run| !log.contains(&format!("planted fault at run {run} "))).collect();
        assert!(missed.is_empty(), "seed {seed}: no fault at runs {missed:?}; log:\n{log}");
        let status = daemon.get("/v1/status").json();
        assert_eq!(status["device"]["backend_changed"], false, "{status}");
        // Eight times the device is lost; two queues in a row would be a device too.
        assert!(status["device"]["faults"].as_u64() >= Some(8), "{status}");
        // Counted a moment after the last event is delivered.
        daemon.wait_until("idle", || daemon.status()["running"] == 0);
        assert_eq!(daemon.get("/health").status, 200);
    }
}

#[test]
fn a_chat_says_the_same_although_its_device_is_lost_in_its_prompt_and_in_its_answer() {
    let model = sparsed_tests::model("smollm2-135m-dsa.gguf");
    let sets = ["engine.set.faults=1:-13 4:-14 6:-12 8:-11", "engine.retry.backoff_ms=[1, 1, 1]"];
    let daemon = faulty_with(&model, &[], &sets);
    let question = json!({ "role": "user", "content": "What is the capital of France?" });
    let request = json!({ "messages": [question], "temperature": 0, "stop": ["Paris."], "max_tokens": 40 });
    let answer = daemon.post("/v1/chat/completions", &request).json();
    assert_eq!(answer["choices"][0]["message"]["content"], "The capital of France is ", "{}", daemon.log());
    assert_eq!(daemon.log().matches("trying again").count(), 2, "{}", daemon.log());
    assert_eq!(daemon.get("/v1/status").json()["device"]["faults"], 2);
}

#[test]
fn arenas_lie_in_memory_of_the_device_or_where_it_gives_none_in_ordinary_memory() {
    let expected = undisturbed();
    for memory in ["only", "none"] {
        let daemon = faulty(&[], &[&format!("engine.set.host_memory={memory}")]);
        assert_eq!(streamed(&daemon), expected, "{memory}; log:\n{}", daemon.log());
        assert_eq!(daemon.get("/v1/status").json()["device"]["faults"], 0);
    }
}

#[test]
fn a_device_that_is_lost_for_good_hands_its_streams_to_the_cpu() {
    let daemon = faulty(&[], &["engine.set.broken_from=\"20\"", "engine.retry.backoff_ms=[1, 1]"]);
    assert_eq!(streamed(&daemon), undisturbed());
    let status = daemon.get("/v1/status").json();
    let device = &status["device"];
    assert_eq!(
        (&device["name"], &device["state"], &device["backend_changed"]),
        (&json!("cpu"), &json!("ready"), &json!(true))
    );
    assert!(device["last_fault"].as_str().unwrap().contains("broken"), "{status}");
    let health = daemon.get("/health");
    assert_eq!((health.status, &health.json()["status"]), (200, &json!("degraded")));
    let tool = std::process::Command::new(sparsed_tests::sparsectl())
        .args(["status", "--ready", "--socket"])
        .arg(daemon.socket())
        .output()
        .unwrap();
    let said = String::from_utf8(tool.stdout).unwrap();
    assert!(tool.status.success() && said.contains("device cpu, which took over: ready"), "{said}");
}

#[test]
fn a_spare_device_of_the_plugin_is_tried_before_the_cpu() {
    let sets = ["engine.set.broken_from=\"20\"", "engine.retry.backoff_ms=[1, 1]", "engine.spare_devices=[0]"];
    let daemon = faulty(&[], &sets);
    assert_eq!(streamed(&daemon), undisturbed());
    // Both computed, were lost and did not open again, twice.
    assert_eq!(cpu_took_over(&daemon)["faults"], 6, "{}", daemon.log());
}

/// What `/v1/status` says of the device once the CPU has taken over.
fn cpu_took_over(daemon: &Daemon) -> Value {
    let device = daemon.get("/v1/status").json()["device"].clone();
    assert_eq!((&device["name"], &device["backend_changed"]), (&json!("cpu"), &json!(true)), "{}", daemon.log());
    device
}

#[test]
fn a_device_that_fails_or_lies_at_every_step_hands_its_streams_to_the_cpu() {
    let expected = undisturbed();
    for bad in [None, Some("engine.set.bad_status=\"-11\""), Some("engine.set.bad_status=\"-1\"")] {
        let sets = [&["engine.set.bad_from=\"20\""][..], bad.as_slice()].concat();
        let daemon = faulty(&[], &sets);
        assert_eq!(streamed(&daemon), expected, "{bad:?}; {}", daemon.log());
        let device = cpu_took_over(&daemon);
        assert_eq!(device["faults"], 1);
        let fault = device["last_fault"].as_str().unwrap();
        assert!(fault.contains("steps failed for all their sequences (3 lately)"), "{fault}");
        assert_eq!(daemon.log().matches("strike against the plugin").count(), 1, "{}", daemon.log());
    }
}

#[test]
fn a_device_that_fails_its_own_test_is_opened_again_and_then_left() {
    let sets = ["engine.set.bad_from=\"20\"", "engine.set.honest=yes", "engine.retry.backoff_ms=[1, 1]"];
    let daemon = faulty(&[], &sets);
    assert_eq!(streamed(&daemon), undisturbed(), "{}", daemon.log());
    let device = cpu_took_over(&daemon);
    assert_eq!(device["faults"], 3, "once, and after each pause");
    assert!(device["last_fault"].as_str().unwrap().contains("it fails its test: self_test: two and two are five"));
}

#[test]
fn a_plugin_that_is_refused_memory_costs_no_stream() {
    let sets = [
        "engine.isolation=process",
        "engine.set.hog_at=\"30\"",
        "engine.retry.backoff_ms=[1, 2, 3]",
        "engine.retry.forget_ms=0",
    ];
    let daemon = faulty(&[], &sets);
    assert_eq!(streamed(&daemon), undisturbed(), "{}", daemon.log());
    let device = daemon.get("/v1/status").json()["device"].clone();
    let fault = device["last_fault"].as_str().unwrap();
    assert!(fault.contains("signal 6") && daemon.log().contains("memory allocation of"), "{fault}");
    // Each process dies at its thirtieth step.
    assert!(device["faults"].as_u64() >= Some(2) && device["name"] == "faulty", "{device}");
}

#[test]
fn a_step_that_no_device_can_compute_is_nobodys_strike() {
    let sets = ["engine.set.bad_from=\"1\"", "engine.failover=false", "plugins.step_failures=2"];
    let daemon = faulty(&[], &sets);
    // There is nobody to go to: the first request fails, the second one has the device opened again and fails then.
    for _ in 0..2 {
        let answer = daemon.post("/v1/completions", &requests()[0]);
        assert!(answer.body.contains("not a number"), "{}", answer.body);
    }
    assert_eq!(daemon.get("/v1/status").json()["device"]["faults"], 1, "{}", daemon.log());
    assert!(!daemon.log().contains("strike against the plugin"), "{}", daemon.log());
    // Calls that fail may be mended by another opening; once.
    let bad = ["engine.set.bad_from=\"1\"", "engine.set.bad_status=\"-11\"", "engine.failover=false"];
    let daemon = faulty(&[], &[&bad[..], &["engine.retry.backoff_ms=[1]"]].concat());
    let answer = daemon.post("/v1/completions", &requests()[0]);
    assert!(answer.body.contains("planted fault"), "{}", answer.body);
    assert_eq!(daemon.get("/v1/status").json()["device"]["faults"], 1, "{}", daemon.log());
}

#[test]
fn a_plugin_that_does_not_come_back_keeps_neither_clients_waiting_nor_the_daemon_from_stopping() {
    for isolation in ["none", "process"] {
        let isolation = format!("engine.isolation={isolation}");
        let mut daemon =
            faulty_spawned(&tiny(), &[], &["engine.set.hang_open=yes", &isolation, "limits.load_wait_s=1"]);
        let said = daemon.first_answer("/health");
        assert_eq!((said.status, &said.json()["status"]), (503, &json!("loading")), "{}", daemon.log());
        assert_eq!(daemon.get("/v1/models").json()["data"], json!([]));
        assert_eq!(daemon.get("/v1/status").json()["device"]["state"], "loading");
        let refused = daemon.post("/v1/completions", &requests()[0]);
        assert_eq!((refused.status, &refused.json()["error"]["code"]), (503, &json!("model_loading")));
        let asked = Instant::now();
        daemon.signal("TERM");
        assert_eq!(daemon.wait().code(), Some(0), "{}", daemon.log());
        assert!(asked.elapsed() < Duration::from_secs(10), "{:?} with {isolation}", asked.elapsed());
    }
}

#[test]
fn the_preferred_device_is_used_again_once_it_opens_and_nobody_is_served() {
    let sets = ["engine.set.broken_from=\"20\"", "engine.set.broken_opens=\"5\"", "engine.retry.backoff_ms=[1, 1]"];
    let daemon = faulty(&[], &sets);
    let expected = undisturbed();
    assert_eq!(streamed(&daemon), expected);
    daemon.wait_until("back", || daemon.get("/health").json()["status"] == "ok");
    let device = daemon.get("/v1/status").json()["device"].clone();
    assert_eq!((&device["name"], &device["backend_changed"]), (&json!("faulty"), &json!(false)));
    assert_eq!(streamed(&daemon), expected);
    // A loss and two openings; then the CPU, and not yet, three times.
    assert_eq!(device["faults"], 3, "{device}");
    assert_eq!(daemon.log().matches("preferred device is not back yet").count(), 3, "{}", daemon.log());
}

#[test]
fn requests_wait_while_there_is_no_device_and_the_daemon_can_be_stopped() {
    let sets =
        ["engine.set.broken_from=\"5\"", "engine.failover=false", "engine.retry.backoff_ms=[20]", "limits.stop_s=0"];
    let mut daemon = faulty(&[], &sets);
    let first = daemon.open("/v1/completions", &requests()[0]);
    daemon.wait_until("recovering", || daemon.get("/health").json()["status"] == "recovering");
    let second = daemon.open("/v1/completions", &requests()[1]);
    daemon.wait_until("waiting", || daemon.status()["waiting"] == 2);
    let status = daemon.get("/v1/status").json();
    assert_eq!((&status["device"]["state"], &status["models"][0]["state"]), (&json!("recovering"), &json!("ready")));
    drop(second);
    daemon.wait_until("one left", || daemon.status()["waiting"] == 1);
    daemon.signal("TERM");
    assert_eq!(daemon.wait().code(), Some(0), "{}", daemon.log());
    let answer = read_answer(first).unwrap();
    assert!(answer.body.contains("\"tokens\"") && !answer.body.contains("[DONE]"), "{}", answer.body);
}

/// What the daemon tells its service manager.
struct Manager {
    dir: tempfile::TempDir,
    socket: UnixDatagram,
}

impl Manager {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let socket = UnixDatagram::bind(dir.path().join("notify")).unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(120))).unwrap();
        Self { dir, socket }
    }

    /// A daemon that it watches, with looks at every 20 ms.
    fn start(&self, sets: &[&str]) -> Daemon {
        let path = self.dir.path().join("notify");
        faulty(&[("NOTIFY_SOCKET", path.as_path()), ("WATCHDOG_USEC", Path::new("80000"))], sets)
    }

    fn hear(&self) -> std::io::Result<String> {
        let mut bytes = [0; 512];
        self.socket.recv(&mut bytes).map(|n| String::from_utf8_lossy(&bytes[..n]).into_owned())
    }

    fn hear_until(&self, what: &str) -> String {
        let mut heard = Vec::new();
        while !heard.last().is_some_and(|last: &String| last.starts_with(what)) {
            heard.push(self.hear().unwrap_or_else(|_| panic!("no {what} after {heard:?}")));
        }
        heard.pop().unwrap()
    }

    fn hears_nothing(&self) {
        self.socket.set_read_timeout(Some(Duration::from_millis(400))).unwrap();
        assert!(self.hear().is_err(), "the watchdog is fed though nothing works");
        self.socket.set_read_timeout(Some(Duration::from_secs(120))).unwrap();
    }
}

#[test]
fn the_watchdog_is_fed_until_the_engine_has_had_no_device_for_too_long() {
    let manager = Manager::new();
    let sets = [
        "engine.set.broken_from=\"5\"",
        "engine.failover=false",
        "engine.retry.backoff_ms=[5]",
        "engine.watchdog_ms=300",
    ];
    let mut daemon = manager.start(&sets);
    manager.hear_until("READY=1");
    // Longer than the watchdog's time, at every 20 ms: an idle engine is a healthy one.
    (0..30).for_each(|_| drop(manager.hear_until("WATCHDOG=1")));
    let waiting = daemon.open("/v1/completions", &requests()[0]);
    manager.hear_until("STATUS=stuck: no device, faulty is next");
    manager.hears_nothing();
    drop(waiting);
    daemon.signal("TERM");
    let stop = manager.hear_until("STOPPING=1");
    // limits.stop_s and ten seconds, so that the service's own limit does not end running answers.
    assert!(stop.contains("EXTEND_TIMEOUT_USEC=30000000"), "{stop}");
    assert_eq!(daemon.wait().code(), Some(0), "{}", daemon.log());
}

/// Settings of a second model, loaded on demand.
fn second() -> [String; 2] {
    [format!("model.b.path={}", tiny().display()), "model.b.load=demand".to_owned()]
}

fn of_second(request: &Value) -> Value {
    let mut request = request.clone();
    request["model"] = json!("b");
    request
}

#[test]
fn a_models_answers_go_on_while_another_one_is_compiled() {
    for isolation in ["none", "process"] {
        let ([path, load], isolation) = (second(), format!("engine.isolation={isolation}"));
        let daemon = faulty(&[], &[&path, &load, &isolation, "engine.set.late_compile=\"200\""]);
        let expected = streamed_tokens(&daemon.post("/v1/completions", &requests()[0]).body);
        let asking = daemon.open("/v1/completions", &of_second(&requests()[0]));
        let is_there = || {
            let status = daemon.get("/v1/status").json();
            status["models"].as_array().unwrap().iter().any(|model| model["name"] == "b" && model["state"] == "ready")
        };
        let mut n_answers = 0;
        daemon.wait_until("compiled", || {
            let answer = daemon.post("/v1/completions", &requests()[0]);
            assert_eq!(streamed_tokens(&answer.body), expected, "{isolation}: {}", daemon.log());
            n_answers += 1;
            is_there()
        });
        // Each is 80 steps.
        assert!(n_answers > 2, "{isolation}: {n_answers}");
        assert_eq!(streamed_tokens(&read_answer(asking).unwrap().body), expected, "{isolation}");
    }
}

#[test]
fn a_compilation_that_hangs_stops_nobodys_answers_and_the_watchdogs_food_and_keeps_no_daemon_from_stopping() {
    let (manager, [path, load]) = (Manager::new(), second());
    let hangs = ["engine.set.hang_compile=yes", "engine.watchdog_ms=300", "limits.stop_s=0"];
    let mut daemon = manager.start(&[&hangs[..], &[&path, &load]].concat());
    manager.hear_until("READY=1");
    let expected = streamed_tokens(&daemon.post("/v1/completions", &requests()[0]).body);
    let waiting = daemon.open("/v1/completions", &of_second(&requests()[0]));
    manager.hear_until("STATUS=stuck: serving on faulty");
    let answer = daemon.post("/v1/completions", &requests()[0]);
    assert_eq!(streamed_tokens(&answer.body), expected, "{}", daemon.log());
    manager.hears_nothing();
    drop(waiting);
    daemon.signal("TERM");
    assert_eq!(daemon.wait().code(), Some(0), "{}", daemon.log());
}
