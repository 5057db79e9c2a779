//! Several models: fetched into the store, loaded when somebody asks, gone when nobody does.
#![allow(clippy::unwrap_used, missing_docs, reason = "a test")]

use serde_json::{Value, json};
use sparsed_tests::chatty;
use sparsed_tests::daemon::{Answer, Daemon, read_answer};
use std::path::Path;
use std::process::{Command, Output};

/// A daemon with the models `a` and `b`, which are loaded on demand.
fn start(folder: &Path, sets: &[&str]) -> Daemon {
    let (a, b) = (chatty::write(folder), chatty::write_with_tools(folder));
    let models = [
        format!("model.a.path={}", a.display()),
        format!("model.b.path={}", b.display()),
        "model.a.load=demand".to_owned(),
        "model.a.max_context=4096".to_owned(),
        "model.b.max_context=4096".to_owned(),
        "model.b.load=demand".to_owned(),
    ];
    let all: Vec<&str> = models.iter().map(String::as_str).chain(sets.iter().copied()).collect();
    Daemon::spawn(None, &all).ready()
}

fn question(model: &str) -> Value {
    json!({ "model": model, "messages": [{ "role": "user", "content": "Hello!" }], "max_tokens": 8, "temperature": 0 })
}

fn endless(model: &str) -> Value {
    json!({ "model": model, "prompt": "x", "max_tokens": 100_000, "ignore_eos": true, "stream": true })
}

fn chat(daemon: &Daemon, model: &str) -> Answer {
    daemon.post("/v1/chat/completions", &question(model))
}

fn content(answer: &Answer) -> String {
    assert_eq!(answer.status, 200, "{}", answer.body);
    answer.json()["choices"][0]["message"]["content"].as_str().unwrap().to_owned()
}

/// A model's line of `/v1/status`.
fn of(daemon: &Daemon, model: &str) -> Value {
    let status = daemon.get("/v1/status").json();
    status["models"].as_array().unwrap().iter().find(|line| line["name"] == model).unwrap().clone()
}

#[test]
fn a_model_is_loaded_by_the_first_who_asks_and_all_who_come_meanwhile_are_answered() {
    let folder = tempfile::tempdir().unwrap();
    let daemon = start(folder.path(), &[]);
    assert_eq!((&of(&daemon, "a")["state"], &of(&daemon, "b")["state"]), (&json!("unloaded"), &json!("unloaded")));
    let listed = daemon.get("/v1/models").json();
    assert_eq!((&listed["data"][0]["id"], &listed["data"][0]["status"]["value"]), (&json!("a"), &json!("unloaded")));
    let asking: Vec<_> =
        ["a", "b"].repeat(8).into_iter().map(|m| daemon.open("/v1/chat/completions", &question(m))).collect();
    let answers: Vec<String> = asking.into_iter().map(|stream| content(&read_answer(stream).unwrap())).collect();
    assert!(answers.iter().step_by(2).all(|answer| *answer == answers[0] && !answer.is_empty()), "{answers:?}");
    for model in ["a", "b"] {
        let line = of(&daemon, model);
        assert_eq!((&line["state"], &line["keeping"]["loads"]), (&json!("ready"), &json!(1)), "{line}");
        assert!(line["keeping"]["keep_alive_s"] == 300.0, "{line}");
    }
    assert_eq!(chat(&daemon, "c").status, 404);
}

#[test]
fn without_its_models_file_a_daemon_serves_says_what_is_missing_and_loads_it_when_it_comes() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("later.gguf");
    let daemon = Daemon::spawn(Some(&path), &[]);
    daemon.wait_until("the socket", || daemon.socket().exists());
    daemon.wait_until("it was looked for", || daemon.first_answer("/health").body.contains("later.gguf"));
    let health = daemon.get("/health");
    assert_eq!(health.status, 503, "{}", health.body);
    let refused = chat(&daemon, "default");
    assert!(refused.status == 503 && refused.body.contains("No such file"), "{} {}", refused.status, refused.body);
    std::fs::rename(chatty::write(folder.path()), &path).unwrap();
    daemon.wait_until("it is loaded", || daemon.get("/health").status == 200);
    assert!(!content(&chat(&daemon, "default")).is_empty());
    assert_eq!(of(&daemon, "default")["keeping"]["keep_alive_s"], Value::Null, "it stays, as one of the start");
}

#[test]
fn a_model_whose_name_has_a_slash_is_found_by_its_address() {
    let folder = tempfile::tempdir().unwrap();
    let path = sparsed_tests::root().join("tests/golden/tiny/v32/model.gguf");
    let sets = [format!("model.\"maker/tiny\".path={}", path.display()), "model.\"maker/tiny\".load=demand".to_owned()];
    let daemon = start(folder.path(), &[&sets[0], &sets[1]]);
    for address in ["/v1/models/maker/tiny", "/v1/models/maker%2Ftiny"] {
        let answer = daemon.get(address);
        assert_eq!((answer.status, &answer.json()["id"]), (200, &json!("maker/tiny")), "{address}");
    }
    assert_eq!(daemon.get("/v1/models/maker/other").status, 404);
}

#[test]
fn what_was_made_of_a_models_files_is_counted_as_memory_in_the_daemon_and_in_a_plugins_host() {
    let folder = sparsed_tests::root().join("tests/golden/tiny/v32");
    let inspected = Command::new(sparsed_tests::sparsectl()).args(["inspect", "--json"]).arg(&folder).output().unwrap();
    let inspected: Value = serde_json::from_slice(&inspected.stdout).unwrap();
    let made = inspected["memory"]["weights_made_bytes"].as_u64().unwrap();
    assert!(made > 0, "experts are stacked");
    // Nothing of it is packed: single precision. A host has a copy of its own.
    for (isolation, copies) in [("none", 1), ("process", 2)] {
        let daemon = Daemon::start(&folder, &[&format!("engine.isolation={isolation}")]);
        let memory = daemon.get("/v1/status").json()["memory"].clone();
        assert_eq!(memory["weights_bytes"].as_u64(), Some(copies * made), "{isolation}: {memory}");
        let line = format!("\nsparsed_memory_weights_bytes {}\n", copies * made);
        assert!(daemon.get("/metrics").body.contains(&line), "{line}");
    }
}

#[test]
fn a_model_leaves_when_its_time_is_over_and_comes_back_with_its_counts() {
    let folder = tempfile::tempdir().unwrap();
    let daemon = start(folder.path(), &[]);
    let first = content(&chat(&daemon, "a"));
    let tokens = of(&daemon, "a")["sampled_tokens"].as_u64().unwrap();
    let running = daemon.get("/api/ps").json()["models"].clone();
    assert_eq!((running.as_array().unwrap().len(), &running[0]["name"]), (1, &json!("a:latest")));
    assert!(running[0]["expires_at"].as_str().unwrap() < "9999");
    let kept = daemon.post("/api/generate", &json!({ "model": "a", "keep_alive": -1 }));
    assert_eq!(kept.json()["done_reason"], "load", "{}", kept.body);
    assert!(daemon.get("/api/ps").json()["models"][0]["expires_at"].as_str().unwrap() > "9999");
    let gone = daemon.post("/api/generate", &json!({ "model": "a", "keep_alive": 0 }));
    assert_eq!(gone.json()["done_reason"], "unload", "{}", gone.body);
    daemon.wait_until("unloaded", || of(&daemon, "a")["state"] == "unloaded");
    assert_eq!(daemon.get("/api/ps").json()["models"], json!([]));
    assert_eq!(daemon.get("/api/tags").json()["models"].as_array().unwrap().len(), 2);
    assert!(daemon.log().contains("model unloaded"), "{}", daemon.log());
    assert_eq!(content(&chat(&daemon, "a")), first);
    assert!(of(&daemon, "a")["sampled_tokens"].as_u64().unwrap() > tokens);
    let metrics = daemon.get("/metrics").body;
    for line in [
        "sparsed_model_loads_total{model_name=\"a\"} 2",
        "sparsed_model_unloads_total{model_name=\"a\",reason=\"idle\"} 1",
    ] {
        assert!(metrics.contains(line), "{metrics}");
    }
}

#[test]
fn a_session_goes_on_after_its_model_was_away() {
    let folder = tempfile::tempdir().unwrap();
    let daemon = start(folder.path(), &["model.a.keep_alive=0"]);
    let session = daemon.post("/v1/sessions", &json!({ "model": "a" })).json()["id"].clone();
    let turn = || {
        let mut turn = question("a");
        turn["session_id"] = session.clone();
        content(&daemon.post("/v1/chat/completions", &turn));
        daemon.wait_until("unloaded", || of(&daemon, "a")["state"] == "unloaded");
    };
    (0..3).for_each(|_| turn());
    let said = daemon.get(&format!("/v1/sessions/{}", session.as_str().unwrap())).json();
    assert_eq!(said["turns"], 3, "{said}");
}

#[test]
fn the_model_used_least_recently_makes_way_and_one_in_use_never_does() {
    let folder = tempfile::tempdir().unwrap();
    // One pool takes all that there is.
    let daemon = start(folder.path(), &["memory.total=8MiB", "limits.load_wait_s=2"]);
    let alone = content(&chat(&daemon, "a"));
    content(&chat(&daemon, "b"));
    assert_eq!(
        (&of(&daemon, "a")["state"], &of(&daemon, "a")["keeping"]["unloads"]["room"]),
        (&json!("unloaded"), &json!(1))
    );
    let mut stream = daemon.open("/v1/completions", &endless("b"));
    let mut some = [0; 256];
    std::io::Read::read_exact(&mut stream, &mut some).unwrap();
    let refused = chat(&daemon, "a");
    assert_eq!((refused.status, &of(&daemon, "b")["state"]), (503, &json!("ready")), "{}", refused.body);
    let waiting = daemon.open("/v1/chat/completions", &question("a"));
    drop(stream);
    let answer = read_answer(waiting).unwrap();
    // Refused once more where the first refusal had only just been noted.
    assert!(answer.status == 503 || content(&answer) == alone, "{}", answer.body);
    daemon.wait_until("answered", || chat(&daemon, "a").status == 200);
    assert_eq!(of(&daemon, "b")["state"], "unloaded");
}

/// `sparsectl model` on a store in `folder`.
fn tool(folder: &Path, arguments: &[&str]) -> Output {
    tool_of(folder, arguments).output().unwrap()
}

fn tool_of(folder: &Path, arguments: &[&str]) -> Command {
    let dir = format!("models.dir={}", folder.join("models").display());
    let empty = folder.join("empty.toml");
    std::fs::write(&empty, "").unwrap();
    let mut command = Command::new(sparsed_tests::sparsectl());
    command.arg("model").args(arguments).arg("--config").arg(empty).args(["--set", &dir]);
    command
}

fn done(folder: &Path, arguments: &[&str]) -> String {
    let output = tool(folder, arguments);
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn a_model_of_the_store_is_served_and_one_that_decays_is_refused_while_the_daemon_lives() {
    let folder = tempfile::tempdir().unwrap();
    let model = chatty::write(folder.path());
    let source = format!("file:{}", model.display());
    let said = done(folder.path(), &["pull", &source, "--name", "tiny"]);
    assert!(said.contains("path = \"store:tiny\"") && !said.contains("cannot serve"), "{said}");
    std::fs::remove_file(&model).unwrap();
    let listed: Value = serde_json::from_str(&done(folder.path(), &["list", "--json"])).unwrap();
    let path = listed[0]["path"].as_str().unwrap();
    assert!(done(folder.path(), &["verify"]).contains("tiny: whole"));
    let dir = format!("models.dir={}", folder.path().join("models").display());
    let sets = [dir.as_str(), "model.m.path=store:tiny", "model.m.load=demand", "model.m.keep_alive=0"];
    let daemon = Daemon::spawn(None, &sets).ready();
    content(&chat(&daemon, "m"));
    daemon.wait_until("unloaded", || of(&daemon, "m")["state"] == "unloaded");
    // A disk that changes a byte, where the file's times do not tell it apart from a write.
    let mut bytes = std::fs::read(path).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::remove_file(path).unwrap();
    std::fs::write(path, &bytes).unwrap();
    let refused = chat(&daemon, "m");
    assert_eq!(refused.status, 503, "{}", refused.body);
    assert!(refused.body.contains("damaged"), "{}", refused.body);
    assert!(!tool(folder.path(), &["verify"]).status.success());
    std::fs::write(path, &bytes[..middle]).unwrap();
    assert_eq!((chat(&daemon, "m").status, &of(&daemon, "m")["state"]), (503, &json!("failed")));
    assert_eq!(daemon.get("/v1/status").status, 200);
}

#[test]
fn nothing_is_put_into_a_store_whose_disk_is_away() {
    let folder = tempfile::tempdir().unwrap();
    let models = folder.path().canonicalize().unwrap().join("models");
    std::fs::create_dir(&models).unwrap();
    let source = format!("file:{}", chatty::write(folder.path()).display());
    let pull = tool_of(folder.path(), &["pull", &source, "--name", "tiny"]);
    // A machine whose list of mounts has this folder.
    let list = folder.path().join("fstab");
    std::fs::write(&list, format!("/dev/sdz1 {} ext4 nofail 0 2\n", models.display())).unwrap();
    let script = "mount --bind \"$0\" /etc/fstab || exit 77; exec \"$@\"";
    let mut command = Command::new("unshare");
    command.args(["-m", "sh", "-c", script]).arg(list).arg(pull.get_program()).args(pull.get_args());
    let Some(output) = command.output().ok().filter(|output| output.status.code() != Some(77)) else {
        return sparsed_tests::skipped("a store whose disk is away", "this user may not mount a file");
    };
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && said.contains("is not mounted"), "{said}");
    assert_eq!(models.read_dir().unwrap().count(), 0);
}

#[test]
fn a_file_that_is_not_what_its_name_says_is_refused_at_the_start_and_the_model_comes_when_it_is() {
    let folder = tempfile::tempdir().unwrap();
    let source = format!("file:{}", chatty::write(folder.path()).display());
    done(folder.path(), &["pull", &source, "--name", "tiny"]);
    let listed: Value = serde_json::from_str(&done(folder.path(), &["list", "--json"])).unwrap();
    let file = Path::new(listed[0]["path"].as_str().unwrap());
    // As a package has it.
    let link = folder.path().join("packaged.gguf");
    std::os::unix::fs::symlink(file, &link).unwrap();
    let (whole, mut bytes) = (folder.path().join("whole"), std::fs::read(file).unwrap());
    std::fs::rename(file, &whole).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(file, &bytes).unwrap();
    let run = Command::new(sparsed_tests::sparsectl()).arg("run").arg(&link).arg("Hello!").output().unwrap();
    let said = String::from_utf8_lossy(&run.stderr);
    assert!(!run.status.success() && said.contains("damaged"), "{said}");
    let daemon = Daemon::spawn(Some(&link), &[]);
    daemon.wait_until("refused", || daemon.log().contains("is damaged: its SHA-256"));
    let refused = chat(&daemon, "default");
    assert!(refused.status == 503 && refused.body.contains("damaged"), "{}", refused.body);
    std::fs::rename(&whole, file).unwrap();
    daemon.wait_until("answered", || chat(&daemon, "default").status == 200);
    assert_eq!(of(&daemon, "default")["state"], "ready");
}
