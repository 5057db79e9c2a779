//! The daemon dies while it answers, and files are damaged: `LONG=1` kills it 2000 times instead of 50.

use super::{Bench, content, files_below, find, streamed, user, wish};
use serde_json::json;
use sparsed_tests::daemon::Daemon;
use std::fs;
use std::io::Read;
use std::path::Path;

/// Memory for a part of a long conversation: the rest of it lies in the slow tier. Nothing is kept for requests without
/// a session: they would have all of so little.
const TIGHT: &[&str] = &[
    "limits.max_running=4",
    "limits.max_batched_tokens=64",
    "memory.budget=5632KiB",
    "memory.hot_share=0",
    "memory.slow_tier=all",
];

#[test]
fn every_kill_leaves_all_that_was_sent_and_the_answer_goes_on_alike() {
    let n_slow = kill(Bench::start(&[]), 3, if is_long() { 1000 } else { 40 }, 1..20);
    assert_eq!(n_slow, 0);
}

#[test]
fn every_kill_of_a_daemon_whose_rows_are_on_disk_leaves_all_that_was_sent() {
    let n_slow = kill(Bench::start(TIGHT), 4, if is_long() { 1000 } else { 10 }, 120..170);
    assert!(n_slow > 0, "nothing was slow");
}

fn is_long() -> bool {
    std::env::var_os("LONG").is_some()
}

/// Kills a daemon so often while it answers, in conversations that begin with so many words; answers how many blocks
/// were in the slow tier at most.
fn kill(mut bench: Bench, seed: u64, kills: usize, words: std::ops::Range<usize>) -> u64 {
    let mut random = fastrand::Rng::with_seed(seed);
    let (mut done, mut n_slow) = (0, 0);
    while done < kills {
        let durability = ["token", "turn", "none"][random.usize(..3)];
        let id = bench.create(&json!({ "durability": durability }));
        bench.turn(&id, &"Some words before. ".repeat(random.usize(words.clone())), 20);
        let fork = bench.daemon.post(&format!("/v1/sessions/{id}/fork"), &json!({})).json();
        let whole = bench.turn(fork["id"].as_str().unwrap(), "Tell me all.", 300);
        let (expected, n_prompt) = (content(&whole), whole["usage"]["prompt_tokens"].as_u64().unwrap());
        let mut request = wish(Some(&id), &[user("Tell me all.")], 300);
        request["stream"] = json!(true);
        let mut heard = String::new();
        // Cut in the first answer, and again when it goes on.
        for round in 0..random.usize(1..4) {
            let path = format!("/v1/sessions/{id}/continue");
            let mut stream = match round {
                0 => bench.daemon.open("/v1/chat/completions", &request),
                _ => bench.daemon.open(&path, &json!({ "stream": true })),
            };
            let mut bytes = vec![0; random.usize(1..40_000)];
            let mut n = 0;
            while let Ok(more @ 1..) = stream.read(&mut bytes[n..]) {
                n += more;
            }
            heard = streamed(&String::from_utf8_lossy(&bytes[..n]));
            n_slow = n_slow.max(bench.daemon.status()["kv_blocks_slow"].as_u64().unwrap());
            bench.daemon.signal("KILL");
            bench.daemon.wait();
            if random.u8(..3) == 0 {
                // Images are a cache: without them the blocks are computed again.
                let files = files_below(&bench.daemon.state_dir());
                let images = files.iter().filter(|file| file.ends_with(Path::new(&id).join("kv")));
                images.for_each(|file| fs::remove_file(file).unwrap());
            }
            bench.daemon.restart(&bench.sets);
            done += 1;
            assert!(expected.starts_with(&heard), "kill {done}: {heard:?} is not how {expected:?} begins");
            let found = bench.session(&id);
            // The process is dead, not the system: what was written is there, synced or not. A token is a byte here.
            let n_answered = found["tokens"].as_u64().unwrap().saturating_sub(n_prompt);
            assert!(heard.len() as u64 <= n_answered, "kill {done}, {durability}: {heard:?} was sent, but {found}");
            if found["state"] != "interrupted" {
                break;
            }
        }
        let session = bench.session(&id);
        let answer = match session["state"].as_str().unwrap() {
            "interrupted" => content(&bench.daemon.post(&format!("/v1/sessions/{id}/continue"), &json!({})).json()),
            // It had ended before the kill, or nothing of it was journaled.
            _ if session["turns"] == 2 => session["messages"][3]["content"].as_str().unwrap().to_owned(),
            _ => content(&bench.turn(&id, "Tell me all.", 300)),
        };
        assert!(answer == expected, "kill {done}, {durability}: {answer:?} instead of {expected:?}, heard {heard:?}");
        bench.daemon.ask("DELETE", &format!("/v1/sessions/{id}"));
        bench.daemon.ask("DELETE", &format!("/v1/sessions/{}", fork["id"].as_str().unwrap()));
        if is_long() {
            println!("{done} kills");
        }
    }
    n_slow
}

#[test]
fn a_second_daemon_on_the_state_folder_of_one_that_runs_is_refused() {
    let bench = Bench::start(&[]);
    let id = bench.create(&json!({}));
    let state = format!("state_dir={}", bench.daemon.state_dir().display());
    let mut second = Daemon::spawn(None, &[&state]);
    assert!(!second.wait().success());
    assert!(second.log().contains("another sparsed uses the state folder"), "{}", second.log());
    bench.turn(&id, "Are you still there?", 5);
}

#[test]
fn damaged_journals_lose_what_is_damaged_and_nothing_else() {
    let mut bench = Bench::start(&[]);
    let mut random = fastrand::Rng::with_seed(1);
    let other = bench.create(&json!({}));
    bench.turn(&other, "What is not damaged.", 10);
    for round in 0..6 {
        let id = bench.create(&json!({}));
        let said: Vec<String> = (0..3).map(|_| content(&bench.turn(&id, "Go on.", 30))).collect();
        bench.daemon.signal("TERM");
        bench.daemon.wait();
        let name = if round % 3 == 2 { "key" } else { "journal" };
        let file = find(&bench.daemon.state_dir(), &id, name);
        let mut bytes = fs::read(&file).unwrap();
        match round % 2 {
            0 => bytes.truncate(random.usize(..bytes.len())),
            _ => *random.choice(&mut bytes).unwrap() ^= 1 << random.u8(..8),
        }
        fs::write(&file, bytes).unwrap();
        bench.daemon.restart(&bench.sets);
        let found = bench.daemon.get(&format!("/v1/sessions/{id}"));
        if found.status == 200 {
            let messages = found.json()["messages"].clone();
            for (answer, expected) in messages.as_array().unwrap().iter().skip(1).step_by(2).zip(&said) {
                assert!(expected.starts_with(answer["content"].as_str().unwrap()), "round {round}: {messages}");
            }
        } else {
            assert!([404, 500].contains(&found.status), "round {round}: {} {}", found.status, found.body);
        }
        assert_eq!(bench.session(&other)["turns"], 1, "round {round}");
    }
}

#[test]
fn damaged_images_cost_time_and_nothing_else() {
    let mut bench = Bench::start(&[]);
    let (id, twin) = (bench.create(&json!({})), bench.create(&json!({})));
    for id in [&id, &twin] {
        bench.turn(id, &"Once upon a time. ".repeat(20), 200);
    }
    let expected = content(&bench.turn(&twin, "Go on.", 50));
    let mut random = fastrand::Rng::with_seed(1);
    for round in 0..8 {
        bench.daemon.signal("TERM");
        bench.daemon.wait();
        let kv = find(&bench.daemon.state_dir(), &id, "kv");
        let mut bytes = fs::read(&kv).unwrap();
        match round % 4 {
            0 => (0..20).for_each(|_| *random.choice(&mut bytes).unwrap() ^= 1 << random.u8(..8)),
            1 => bytes.truncate(random.usize(..bytes.len())),
            2 => bytes.fill(0),
            _ => bytes[..4096].fill(0xff),
        }
        fs::write(&kv, bytes).unwrap();
        bench.daemon.restart(&bench.sets);
        assert_eq!(content(&bench.turn(&id, "Go on.", 50)), expected, "round {round}");
        bench.daemon.post(&format!("/v1/sessions/{id}/truncate"), &json!({ "turns": 1 }));
    }
}
