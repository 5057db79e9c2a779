//! A daemon with little memory answers what one with much memory does: latent rows lie in the slow tier.
#![allow(clippy::unwrap_used, missing_docs, reason = "a test")]

use serde_json::{Value, json};
use sparsed_tests::chatty;
use sparsed_tests::daemon::{Daemon, read_answer};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;
use std::sync::LazyLock;

const SETS: &[&str] =
    &["engine.threads=1", "model.default.max_context=4096", "limits.max_running=4", "limits.max_batched_tokens=64"];

fn request(seed: u32, n: usize) -> Value {
    json!({
        "messages": [{ "role": "user", "content": format!("{seed} ").repeat(n) }],
        "max_tokens": 150, "temperature": 0.9, "seed": seed, "ignore_eos": true,
    })
}

fn said(body: &str) -> String {
    let answer: Value = serde_json::from_str(body).unwrap();
    answer["choices"][0]["message"]["content"].as_str().unwrap_or_else(|| panic!("{answer}")).to_owned()
}

/// Memory for a fraction of the latent rows.
const TIGHT: &[&str] = &["memory.budget=6656KiB", "memory.slow_tier=all"];

fn start(model: &Path, more: &[&str]) -> Daemon {
    Daemon::start(model, &[SETS, more].concat())
}

fn requests() -> Vec<Value> {
    (0..4).map(|seed| request(seed, 1700)).collect()
}

/// What a daemon says that has memory enough.
static EXPECTED: LazyLock<Vec<String>> = LazyLock::new(|| {
    let folder = tempfile::tempdir().unwrap();
    let roomy = start(&chatty::write(folder.path()), &["memory.budget=256MiB"]);
    let said = requests().iter().map(|request| said(&roomy.post("/v1/chat/completions", request).body)).collect();
    assert_eq!(roomy.status()["kv_blocks_slow"], 0);
    said
});

/// Open files of the daemon whose name has this in it.
fn open_files(daemon: &Daemon, name: &str) -> usize {
    let files = std::fs::read_dir(format!("/proc/{}/fd", daemon.pid())).unwrap().flatten();
    let has = |entry: &std::fs::DirEntry| {
        std::fs::read_link(entry.path()).is_ok_and(|target| target.to_string_lossy().contains(name))
    };
    files.filter(has).count()
}

/// All requests at a time, once blocks lie in the slow tier.
fn begin(daemon: &Daemon) -> Vec<UnixStream> {
    let streams = requests().iter().map(|request| daemon.open("/v1/chat/completions", request)).collect();
    daemon.wait_until("blocks are slow", || daemon.status()["kv_blocks_slow"].as_u64() > Some(20));
    streams
}

fn finish(streams: Vec<UnixStream>) -> Vec<String> {
    streams.into_iter().map(|stream| said(&read_answer(stream).unwrap().body)).collect()
}

#[test]
fn answers_are_the_same_where_most_rows_are_slow() {
    let folder = tempfile::tempdir().unwrap();
    let model = chatty::write(folder.path());
    for (isolation, hot_share) in [("none", "0"), ("none", "0.2"), ("process", "0")] {
        let (isolation, hot_share) = (format!("engine.isolation={isolation}"), format!("memory.hot_share={hot_share}"));
        let tight = start(&model, &[TIGHT, &[&isolation, &hot_share]].concat());
        let answers = finish(begin(&tight));
        assert!(answers == *EXPECTED, "{isolation}, {hot_share}: {answers:?} instead of {:?}", *EXPECTED);
    }
}

#[test]
fn a_device_that_reads_no_file_has_its_slow_tier_in_memory() {
    let folder = tempfile::tempdir().unwrap();
    let model = chatty::write(folder.path());
    let plugins = sparsed_tests::root().join("target/release/test-plugins");
    let dir = format!("plugins.dir={}", plugins.display());
    let own = ["engine.plugin=faulty", "engine.set.slow_host=yes", "memory.hot_share=0", &dir];
    let wrapped = plugins.join("faulty/libsparsed_plugin_cpu.so");
    for isolation in ["engine.isolation=none", "engine.isolation=process"] {
        let sets = [SETS, TIGHT, &own, &[isolation]].concat();
        let tight = Daemon::spawn_in(&[("SPARSED_WRAPPED", &wrapped)], Some(&model), &sets).ready();
        assert_eq!(finish(begin(&tight)), *EXPECTED, "{isolation}; log:\n{}", tight.log());
        assert_eq!(open_files(&tight, "/memfd:sparsed-slow"), 1, "{isolation}");
    }
}

#[test]
fn a_device_without_room_for_the_pool_that_memory_allows_gets_a_smaller_one_and_answers_the_same() {
    let folder = tempfile::tempdir().unwrap();
    let model = chatty::write(folder.path());
    let roomy = start(&model, &["memory.budget=256MiB"]).status()["kv_blocks_total"].as_u64().unwrap();
    for isolation in ["engine.isolation=none", "engine.isolation=process"] {
        let small = start(&model, &["memory.budget=256MiB", "engine.device_memory=4MiB", isolation]);
        let blocks = small.status()["kv_blocks_total"].as_u64().unwrap();
        assert!(blocks > 34 && blocks < roomy / 2, "{blocks} of {roomy} blocks; log:\n{}", small.log());
        assert!(small.log().contains("the device has no room"), "{}", small.log());
        let streams = requests().iter().map(|request| small.open("/v1/chat/completions", request)).collect();
        assert_eq!(finish(streams), *EXPECTED, "log:\n{}", small.log());
    }
}

#[test]
fn a_plugin_host_that_dies_with_blocks_in_the_slow_tier_costs_no_answer() {
    let folder = tempfile::tempdir().unwrap();
    let model = chatty::write(folder.path());
    let sets = ["engine.isolation=process", "engine.retry.backoff_ms=[1]", "plugins.strike_window_ms=1"];
    let tight = start(&model, &[TIGHT, &sets].concat());
    let streams = begin(&tight);
    let host = tight.plugin_host();
    assert!(Command::new("kill").args(["-KILL", &host.to_string()]).status().unwrap().success());
    tight.wait_until("the loss is noticed", || tight.get("/v1/status").json()["device"]["faults"] == 1);
    tight.wait_until("blocks are slow again", || tight.status()["kv_blocks_slow"].as_u64() > Some(20));
    assert_eq!(finish(streams), *EXPECTED, "log:\n{}", tight.log());
}

#[test]
fn with_little_memory_a_request_without_a_session_gets_the_context_that_is_published_for_it() {
    let folder = tempfile::tempdir().unwrap();
    let model = chatty::write(folder.path());
    let start = |budget: &str| {
        let sets = ["engine.threads=1", "limits.max_running=4", "limits.max_batched_tokens=64"];
        Daemon::start(&model, &[&sets[..], &["model.default.max_context=16384", budget]].concat())
    };
    let roomy = start("memory.budget=256MiB");
    let listed = |daemon: &Daemon| daemon.get("/v1/models").json()["data"][0].clone();
    let per_token = listed(&roomy)["meta"]["kv_bytes_per_token"].as_u64().unwrap();
    // Nine tenths of a context, and the slow tier as it is where nothing is configured.
    let small = start(&format!("memory.budget={}", 14_745 * per_token));
    let lengths =
        |daemon: &Daemon| ["max_model_len", "max_session_len"].map(|name| listed(daemon)[name].as_u64().unwrap());
    assert_eq!(lengths(&roomy), [16_384, 16_384]);
    let [limit, of_session] = lengths(&small);
    assert!(limit >= 14_745 / 2 - 64 && limit + 1024 < of_session, "{limit}, {of_session}; log:\n{}", small.log());

    let mut whole = request(5, usize::try_from(limit).unwrap() / 2 - 100);
    whole["max_tokens"] = json!(limit);
    let answer = small.post("/v1/chat/completions", &whole).json();
    assert_eq!(answer["usage"]["total_tokens"], limit, "{answer}");
    assert_eq!(answer["choices"][0]["finish_reason"], "length", "{answer}");
    whole["max_tokens"] = answer["usage"]["completion_tokens"].clone();
    let expected = roomy.post("/v1/chat/completions", &whole).json();
    assert_eq!(answer["choices"][0]["message"], expected["choices"][0]["message"]);

    let mut long = request(6, usize::try_from(limit).unwrap() / 2);
    let refused = small.post("/v1/chat/completions", &long);
    assert_eq!((refused.status, &refused.json()["error"]["code"]), (400, &json!("context_length_exceeded")));
    assert!(refused.body.contains(&format!("the context holds {limit}")), "{}", refused.body);
    long["session_id"] = small.post("/v1/sessions", &json!({})).json()["id"].clone();
    let in_session = said(&small.post("/v1/chat/completions", &long).body);
    long.as_object_mut().unwrap().remove("session_id");
    assert_eq!(in_session, said(&roomy.post("/v1/chat/completions", &long).body));

    let short: Vec<Value> = (1..5).map(|seed| request(seed, usize::try_from(limit).unwrap() / 10)).collect();
    let streams = short.iter().map(|request| small.open("/v1/chat/completions", request)).collect();
    let expected = short.iter().map(|request| said(&roomy.post("/v1/chat/completions", request).body));
    assert_eq!(finish(streams), expected.collect::<Vec<_>>());
    let metrics = small.get("/metrics").body;
    assert!(metrics.contains(r#"decision="preempt"} 0"#), "{metrics}");
}
