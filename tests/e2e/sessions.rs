//! Conversations that the daemon keeps: they read only what is new, and survive its death, whenever it comes.
#![allow(clippy::unwrap_used, clippy::print_stdout, missing_docs, reason = "a test")]

mod foreign;
mod kills;

use serde_json::{Value, json};
use sparsed_tests::chatty;
use sparsed_tests::daemon::{Daemon, read_answer};
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};

const SETS: &[&str] = &["engine.threads=1", "model.default.max_context=4096"];

struct Bench {
    daemon: Daemon,
    sets: Vec<&'static str>,
    model: tempfile::TempDir,
}

impl Bench {
    fn start(sets: &[&'static str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let sets = [SETS, sets].concat();
        let daemon = Daemon::start(&chatty::write(folder.path()), &sets);
        Self { daemon, sets, model: folder }
    }

    fn create(&self, fields: &Value) -> String {
        let made = self.daemon.post("/v1/sessions", fields);
        assert_eq!(made.status, 201, "{}", made.body);
        made.json()["id"].as_str().unwrap().to_owned()
    }

    fn turn(&self, id: &str, text: &str, max_tokens: u32) -> Value {
        let answer = self.daemon.post("/v1/chat/completions", &wish(Some(id), &[user(text)], max_tokens));
        assert_eq!(answer.status, 200, "{}", answer.body);
        answer.json()
    }

    fn session(&self, id: &str) -> Value {
        self.daemon.get(&format!("/v1/sessions/{id}")).json()
    }

    fn restart(&mut self) {
        self.daemon.kill_and_restart(&self.sets);
    }
}

fn user(text: &str) -> Value {
    json!({ "role": "user", "content": text })
}

/// Draws letters only: other bytes would not come back from the text of an answer as the same tokens.
fn wish(id: Option<&str>, messages: &[Value], max_tokens: u32) -> Value {
    let biases = (0..259).filter(|byte| !(32..127).contains(byte)).map(|byte| (byte.to_string(), json!(-100)));
    let mut request = json!({
        "messages": messages, "max_tokens": max_tokens, "temperature": 0.8, "seed": 7, "ignore_eos": true,
        "logit_bias": serde_json::Map::from_iter(biases),
    });
    if let Some(id) = id {
        request["session_id"] = json!(id);
    }
    request
}

fn content(answer: &Value) -> String {
    answer["choices"][0]["message"]["content"].as_str().unwrap_or_else(|| panic!("{answer}")).to_owned()
}

fn cached(answer: &Value) -> u64 {
    answer["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap()
}

/// What a stream has said, as far as it went.
fn streamed(body: &str) -> String {
    let events = body.lines().filter_map(|line| line.strip_prefix("data: ")).filter(|event| *event != "[DONE]");
    // The last line may be cut.
    let events = events.filter_map(|event| serde_json::from_str::<Value>(event).ok());
    events.filter_map(|event| Some(event["choices"][0]["delta"]["content"].as_str()?.to_owned())).collect()
}

fn files_below(dir: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in fs::read_dir(dir).unwrap().flatten() {
        if entry.file_type().unwrap().is_dir() {
            files.extend(files_below(&entry.path()))
        } else {
            files.push(entry.path())
        }
    }
    files.sort();
    files
}

#[test]
fn a_session_says_what_it_would_if_the_client_kept_it_and_reads_only_what_is_new() {
    let bench = Bench::start(&[]);
    let id = bench.create(&json!({ "title": "first" }));
    let mut messages = Vec::new();
    for (at, text) in ["Begin.", "And then?", "Why so?"].into_iter().enumerate() {
        messages.push(user(text));
        let whole = content(&bench.daemon.post("/v1/chat/completions", &wish(None, &messages, 100)).json());
        let answer = bench.turn(&id, text, 100);
        assert_eq!(content(&answer), whole, "turn {at}");
        messages.push(json!({ "role": "assistant", "content": whole }));
    }
    let session = bench.session(&id);
    assert_eq!((&session["messages"], &session["turns"]), (&json!(messages), &json!(3)));
    assert_eq!((session["title"].as_str(), session["state"].as_str()), (Some("first"), Some("idle")));
}

#[test]
fn requests_without_a_session_leave_nothing_on_disk() {
    let bench = Bench::start(&[]);
    let before = files_below(&bench.daemon.state_dir());
    let answer = bench.daemon.post("/v1/chat/completions", &wish(None, &[user("Tell me a secret.")], 300));
    assert_eq!(answer.status, 200);
    assert_eq!(files_below(&bench.daemon.state_dir()), before);
}

#[test]
fn a_session_goes_on_after_a_restart_without_reading_everything_again() {
    let mut bench = Bench::start(&[]);
    let (id, twin) = (bench.create(&json!({})), bench.create(&json!({})));
    for id in [&id, &twin] {
        bench.turn(id, &"Once upon a time. ".repeat(20), 200);
    }
    let expected = content(&bench.turn(&twin, "Go on.", 50));
    bench.daemon.signal("TERM");
    assert!(bench.daemon.wait().success());
    bench.daemon.restart(&bench.sets);
    let answer = bench.turn(&id, "Go on.", 50);
    assert_eq!(content(&answer), expected);
    // 360 characters and some tokens around them, and 200 tokens of an answer.
    assert!(cached(&answer) >= 512, "{answer}");
}

#[test]
fn sessions_that_take_turns_on_a_budget_for_an_eighth_of_them_read_nothing_twice_and_wait_alike() {
    const SESSIONS: usize = 16;
    const TURNS: usize = 10;
    let text = |at: usize, turn: usize| format!("{at}, {turn}: {}", "tell. ".repeat(if turn == 0 { 40 } else { 1 }));
    let roomy = Bench::start(&["memory.budget=256MiB"]);
    let per_token = roomy.daemon.get("/v1/models").json()["data"][0]["meta"]["kv_bytes_per_token"].as_u64().unwrap();
    // At the end a session has some 800 tokens.
    let budget: &'static str = format!("memory.budget={}", SESSIONS as u64 / 8 * 832 * per_token).leak();
    let bench = Bench::start(&[budget, "memory.slow_tier=off", "limits.max_running=2", "limits.max_batched_tokens=64"]);
    let ids: Vec<String> = (0..SESSIONS).map(|_| bench.create(&json!({}))).collect();
    let n_done: Vec<AtomicUsize> = (0..SESSIONS).map(|_| AtomicUsize::new(0)).collect();
    let at_first_end: OnceLock<Vec<usize>> = OnceLock::new();
    let answers: Vec<Vec<Value>> = std::thread::scope(|scope| {
        let client = |at: usize| {
            let (ids, n_done, bench, at_first_end) = (&ids, &n_done, &bench, &at_first_end);
            scope.spawn(move || {
                let turn = |turn| {
                    let answer = bench.turn(&ids[at], &text(at, turn), 20);
                    n_done[at].fetch_add(1, Ordering::SeqCst);
                    answer
                };
                let answers = (0..TURNS).map(turn).collect();
                at_first_end.get_or_init(|| n_done.iter().map(|n| n.load(Ordering::SeqCst)).collect());
                answers
            })
        };
        let clients: Vec<_> = (0..SESSIONS).map(client).collect();
        clients.into_iter().map(|client| client.join().unwrap()).collect()
    });
    let n_at_end = at_first_end.into_inner().unwrap();
    assert!(n_at_end.iter().all(|&n| n * 5 >= TURNS * 4), "{n_at_end:?} turns when the first one had done all");
    let metrics = bench.daemon.get("/metrics").body;
    let value = |name: &str| -> u64 {
        let line = metrics.lines().find(|line| line.starts_with(name)).unwrap_or_else(|| panic!("{metrics}"));
        line.rsplit(' ').next().unwrap().parse().unwrap()
    };
    assert_eq!(value(r#"sparsed_decisions_total{model_name="default",decision="thrash"}"#), 0);
    // Each turn finds its full blocks, in memory or in its file.
    let cached: u64 = answers.iter().flatten().map(cached).sum();
    let prompts = answers.iter().flatten().map(|answer| answer["usage"]["prompt_tokens"].as_u64().unwrap());
    let n_tokens: u64 = prompts.sum();
    let (read, most) = (n_tokens - cached, (SESSIONS * (300 + TURNS * 110)) as u64);
    assert!(read <= most, "{read} of {n_tokens} tokens of prompts were computed, {most} at most are new");
    assert!(value("sparsed_restored_tokens_total") > n_tokens / 4, "{metrics}");
    for at in [0, SESSIONS - 1] {
        let id = roomy.create(&json!({}));
        let alone: Vec<String> = (0..TURNS).map(|turn| content(&roomy.turn(&id, &text(at, turn), 20))).collect();
        assert_eq!(answers[at].iter().map(content).collect::<Vec<_>>(), alone, "session {at}");
    }
}

#[test]
fn an_answer_that_was_cut_is_finished_before_the_next_turn() {
    let mut bench = Bench::start(&[]);
    let (id, twin) = (bench.create(&json!({})), bench.create(&json!({})));
    let expected = [content(&bench.turn(&twin, "One.", 400)), content(&bench.turn(&twin, "Two.", 20))];
    let mut request = wish(Some(&id), &[user("One.")], 400);
    request["stream"] = json!(true);
    let mut stream = bench.daemon.open("/v1/chat/completions", &request);
    stream.read_exact(&mut [0; 3000]).unwrap();
    bench.restart();
    assert_eq!(bench.session(&id)["state"], "interrupted");
    assert_eq!(content(&bench.turn(&id, "Two.", 20)), expected[1]);
    assert_eq!(bench.session(&id)["messages"][1]["content"], json!(expected[0]));
    // What nobody has asked for has a name in the log, too.
    assert!(bench.daemon.log().contains("request answered request=cut-"), "{}", bench.daemon.log());
}

#[test]
fn a_cut_answer_that_the_context_has_no_room_for_any_more_is_given_up_and_the_next_turn_begins() {
    let mut bench = Bench::start(&[]);
    let id = bench.create(&json!({ "context_full": "truncate-oldest" }));
    let long = user(&"One. ".repeat(140));
    let whole =
        content(&bench.daemon.post("/v1/chat/completions", &wish(None, std::slice::from_ref(&long), 400)).json());
    let mut request = wish(Some(&id), &[long], 400);
    request["stream"] = json!(true);
    let mut stream = bench.daemon.open("/v1/chat/completions", &request);
    stream.read_exact(&mut [0; 3000]).unwrap();
    bench.sets.push("model.default.max_context=512");
    bench.restart();
    assert_eq!(bench.session(&id)["state"], "interrupted");
    let alone = bench.daemon.post("/v1/chat/completions", &wish(None, &[user("Two.")], 20)).json();
    assert_eq!(content(&bench.turn(&id, "Two.", 20)), content(&alone));
    let session = bench.session(&id);
    let said = session["messages"][1]["content"].as_str().unwrap();
    assert!(!said.is_empty() && whole.starts_with(said), "{said:?}");
    assert_eq!((&session["state"], &session["turns"]), (&json!("idle"), &json!(2)));
}

#[test]
fn a_client_that_leaves_keeps_what_was_said_and_may_have_the_rest() {
    let bench = Bench::start(&[]);
    let (id, twin) = (bench.create(&json!({})), bench.create(&json!({})));
    let expected = content(&bench.turn(&twin, "One.", 900));
    let mut request = wish(Some(&id), &[user("One.")], 900);
    request["stream"] = json!(true);
    let mut stream = bench.daemon.open("/v1/chat/completions", &request);
    stream.read_exact(&mut [0; 3000]).unwrap();
    drop(stream);
    bench.daemon.wait_until("idle", || bench.session(&id)["state"] == "idle");
    let said = bench.session(&id)["messages"][1]["content"].as_str().unwrap().to_owned();
    assert!(!said.is_empty() && said.len() < expected.len() && expected.starts_with(&said), "{said:?}");
    let answer = bench.daemon.post(&format!("/v1/sessions/{id}/continue"), &json!({})).json();
    assert_eq!(content(&answer), expected);
}

#[test]
fn forks_cuts_and_deletions_do_what_they_say() {
    let bench = Bench::start(&[]);
    let id = bench.create(&json!({ "title": "a" }));
    let first = content(&bench.turn(&id, "One.", 30));
    let second = content(&bench.turn(&id, "Two.", 30));
    let fork = bench.daemon.post(&format!("/v1/sessions/{id}/fork"), &json!({ "turns": 1 })).json();
    let fork = fork["id"].as_str().unwrap();
    assert_eq!(bench.session(fork)["messages"], json!([user("One."), { "role": "assistant", "content": first }]));
    assert_eq!(content(&bench.turn(fork, "Two.", 30)), second);
    let cut = bench.daemon.post(&format!("/v1/sessions/{id}/truncate"), &json!({ "turns": 1 }));
    assert_eq!((cut.status, &cut.json()["turns"]), (200, &json!(1)));
    assert_eq!(content(&bench.turn(&id, "Two.", 30)), second);
    let path = format!("/v1/sessions/{id}");
    let changed = bench.daemon.post(&path, &json!({ "title": "b", "pinned": true, "durability": "token" })).json();
    assert_eq!((&changed["title"], &changed["pinned"]), (&json!("b"), &json!(true)));
    let exported = bench.daemon.fetch("GET", &format!("{path}/export"), &[]).unwrap();
    assert_eq!(bench.daemon.ask("DELETE", &path).json()["deleted"], true);
    assert_eq!(bench.daemon.get(&path).status, 404);
    let left = files_below(&bench.daemon.state_dir().join("store/sessions"));
    assert!(left.iter().all(|file| !file.display().to_string().contains(&id)), "{left:?}");
    assert_eq!(bench.daemon.get("/v1/sessions").json()["data"].as_array().unwrap().len(), 1);
    // To another daemon, which has another key.
    let other = Bench::start(&[]);
    let body = other.daemon.fetch("POST", "/v1/sessions/import", &exported).unwrap();
    let id = serde_json::from_slice::<Value>(&body).unwrap()["id"].as_str().unwrap().to_owned();
    let [said, answered] =
        [("One.", first), ("Two.", second)].map(|(q, a)| [user(q), json!({ "role": "assistant", "content": a })]);
    assert_eq!(other.session(&id)["messages"], json!([said, answered].concat()));
    let broken = other.daemon.fetch("POST", "/v1/sessions/import", &exported[..exported.len() - 1]).unwrap();
    assert_eq!(serde_json::from_slice::<Value>(&broken).unwrap()["error"]["param"], "file");
}

#[test]
fn what_is_pinned_and_what_is_checkpointed_is_so_after_a_kill() {
    let mut bench = Bench::start(&[]);
    let id = bench.create(&json!({ "durability": "none" }));
    let said = content(&bench.turn(&id, "One.", 20));
    let post = |bench: &Bench, verb: &str, body: &Value| {
        let answer = bench.daemon.post(&format!("/v1/sessions/{id}/{verb}"), body);
        assert_eq!(answer.status, 200, "{}", answer.body);
        answer.json()["pinned"].clone()
    };
    assert_eq!(post(&bench, "checkpoint", &json!({})), false);
    assert_eq!(post(&bench, "pin", &json!({})), true);
    bench.restart();
    let session = bench.session(&id);
    assert_eq!((&session["pinned"], &session["messages"][1]["content"]), (&json!(true), &json!(said)));
    assert_eq!(post(&bench, "pin", &json!({ "pinned": false })), false);
    bench.restart();
    assert_eq!(bench.session(&id)["pinned"], false);
    for verb in ["pin", "checkpoint"] {
        let strange = format!("/v1/sessions/0123456789abcdef0123456789abcdef/{verb}");
        assert_eq!(bench.daemon.post(&strange, &json!({})).status, 404);
    }
}

#[test]
fn what_makes_no_sense_is_refused_and_changes_nothing() {
    let bench = Bench::start(&[]);
    let id = bench.create(&json!({}));
    let path = format!("/v1/sessions/{id}");
    let code = |answer: sparsed_tests::daemon::Answer| {
        (answer.status, answer.json()["error"]["code"].as_str().unwrap().to_owned())
    };
    let absent = "sess_00000000000000000000000000000000";
    assert_eq!(code(bench.daemon.get(&format!("/v1/sessions/{absent}"))), (404, "session_not_found".to_owned()));
    assert_eq!(code(bench.daemon.get("/v1/sessions/nonsense")), (404, "session_not_found".to_owned()));
    let asked = bench.daemon.post("/v1/chat/completions", &wish(Some(absent), &[user("Hi")], 3));
    assert_eq!(code(asked), (404, "session_not_found".to_owned()));
    let refused = |path: &str, body: &Value| code(bench.daemon.post(path, body));
    assert_eq!(refused("/v1/sessions", &json!({ "durability": "always" })), (400, "invalid_value".to_owned()));
    assert_eq!(refused("/v1/sessions", &json!({ "titel": "x" })), (400, "invalid_value".to_owned()));
    assert_eq!(refused("/v1/sessions", &json!({ "model": "other" })), (404, "model_not_found".to_owned()));
    assert_eq!(refused(&format!("{path}/continue"), &json!({})), (409, "session_busy".to_owned()));
    assert_eq!(refused(&format!("{path}/truncate"), &json!({})), (400, "invalid_value".to_owned()));
    assert_eq!(refused(&format!("{path}/truncate"), &json!({ "turns": 3 })).0, 400);
    let long = wish(Some(&id), &[user(&"x".repeat(5000))], 3);
    assert_eq!(refused("/v1/chat/completions", &long), (400, "context_length_exceeded".to_owned()));
    assert_eq!(bench.session(&id)["turns"], 0);
}

#[test]
fn a_session_is_answered_once_at_a_time() {
    let bench = Bench::start(&[]);
    let id = bench.create(&json!({}));
    let mut request = wish(Some(&id), &[user("One.")], 2000);
    request["stream"] = json!(true);
    let mut stream = bench.daemon.open("/v1/chat/completions", &request);
    stream.read_exact(&mut [0; 1000]).unwrap();
    let second = bench.daemon.post("/v1/chat/completions", &wish(Some(&id), &[user("Two.")], 3));
    assert_eq!((second.status, second.json()["error"]["code"].as_str()), (409, Some("session_busy")));
    assert_eq!(bench.daemon.ask("DELETE", &format!("/v1/sessions/{id}")).status, 409);
    drop(read_answer(stream));
}

#[test]
fn a_full_context_is_refused_or_loses_its_oldest_turns_as_the_session_wishes() {
    let mut sets = SETS.to_vec();
    sets.push("model.default.max_context=512");
    let bench = Bench::start(&sets);
    let rules = json!({ "role": "system", "content": "Be brief." });
    let (strict, loose) = (bench.create(&json!({})), bench.create(&json!({ "context_full": "truncate-oldest" })));
    for id in [&strict, &loose] {
        let first = bench.daemon.post("/v1/chat/completions", &wish(Some(id), &[rules.clone(), user("One.")], 100));
        assert_eq!(first.status, 200);
        bench.turn(id, &"Two. ".repeat(20), 100);
    }
    let third = user(&"Three. ".repeat(20));
    let refused = bench.daemon.post("/v1/chat/completions", &wish(Some(&strict), std::slice::from_ref(&third), 50));
    assert_eq!(refused.json()["error"]["code"], "context_length_exceeded");
    assert_eq!(bench.session(&strict)["turns"], 2);
    let answer = content(&bench.turn(&loose, &"Three. ".repeat(20), 50));
    let alone = bench.daemon.post("/v1/chat/completions", &wish(None, &[rules, third], 50)).json();
    assert_eq!(answer, content(&alone), "the system prompt and what is new are left");
}

fn find(dir: &Path, id: &str, name: &str) -> PathBuf {
    let files = files_below(dir);
    let is_it = |file: &&PathBuf| file.ends_with(Path::new(id).join(name));
    files.iter().find(is_it).unwrap_or_else(|| panic!("no {name} of {id} among {files:?}")).clone()
}

/// `sparsectl` with these arguments, against this daemon.
fn tool(daemon: &Daemon, arguments: &[&str]) -> String {
    let mut command = std::process::Command::new(sparsed_tests::sparsectl());
    let done = command.args(arguments).arg("--socket").arg(daemon.socket()).output().unwrap();
    let said = String::from_utf8(done.stdout).unwrap();
    assert!(done.status.success(), "{arguments:?}: {said}{}", String::from_utf8_lossy(&done.stderr));
    said.trim_end().to_owned()
}

#[test]
fn the_tool_makes_continues_copies_and_deletes_sessions() {
    let bench = Bench::start(&[]);
    let id = tool(&bench.daemon, &["sessions", "new", "--title", "tea"]);
    let ask = ["run", "--session", &id[..12], "--max-tokens", "4", "--seed", "1"];
    tool(&bench.daemon, &[&ask[..], &["Is there tea, and which?"]].concat());
    tool(&bench.daemon, &[&ask[..], &["And what else is there?"]].concat());
    assert_eq!(bench.session(&id)["turns"], 2);
    assert!(tool(&bench.daemon, &["sessions", "show", &id]).contains("user:\nIs there tea, and which?"));
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("tea.session");
    let file = file.to_str().unwrap();
    tool(&bench.daemon, &["sessions", "export", &id, file]);
    let copy = tool(&bench.daemon, &["sessions", "import", file]);
    tool(&bench.daemon, &["sessions", "truncate", &copy, "1"]);
    assert_eq!((bench.session(&copy)["turns"].as_u64(), bench.session(&id)["turns"].as_u64()), (Some(1), Some(2)));
    assert_eq!(tool(&bench.daemon, &["sessions", "delete", &id, &copy]).lines().count(), 2);
    assert_eq!(tool(&bench.daemon, &["sessions", "--json"]), "[]");
}
