//! A daemon with little memory answers what one with much memory does: latent rows lie in the slow tier.
#![allow(clippy::unwrap_used, missing_docs, reason = "a test")]

use serde_json::{Value, json};
use sparsed_tests::chatty;
use sparsed_tests::daemon::{Daemon, read_answer};

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

#[test]
fn answers_are_the_same_where_most_rows_are_slow() {
    let folder = tempfile::tempdir().unwrap();
    let model = chatty::write(folder.path());
    let start = |more: &[&str]| Daemon::start(&model, &[SETS, more].concat());
    let requests: Vec<Value> = (0..4).map(|seed| request(seed, 1700)).collect();
    let roomy = start(&["memory.budget=256MiB"]);
    let expected: Vec<String> =
        requests.iter().map(|request| said(&roomy.post("/v1/chat/completions", request).body)).collect();
    assert_eq!(roomy.status()["kv_blocks_slow"], 0);
    for hot_share in ["0", "0.2"] {
        let tight = start(&["memory.budget=6656KiB", "memory.slow_tier=all", &format!("memory.hot_share={hot_share}")]);
        let streams: Vec<_> = requests.iter().map(|request| tight.open("/v1/chat/completions", request)).collect();
        tight.wait_until("blocks are slow", || tight.status()["kv_blocks_slow"].as_u64() > Some(20));
        let answers: Vec<String> = streams.into_iter().map(|stream| said(&read_answer(stream).unwrap().body)).collect();
        assert!(answers == expected, "hot share {hot_share}: {answers:?} instead of {expected:?}");
    }
}
