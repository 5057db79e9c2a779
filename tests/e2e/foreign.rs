//! Sessions of a model that is not there any more: refused by name, whole when it comes back; and rows of another
//! arithmetic.

use super::{Bench, cached, content, user, wish};
use serde_json::{Value, json};
use sparsed_tests::chatty;
use std::fs;
use std::io::Read;

#[test]
fn a_session_is_refused_by_a_model_with_other_tokens_and_goes_on_when_its_own_is_back() {
    let mut bench = Bench::start(&[]);
    let (id, twin) = (bench.create(&json!({ "title": "kept" })), bench.create(&json!({})));
    let said = content(&bench.turn(&id, "One.", 200));
    assert_eq!(content(&bench.turn(&twin, "One.", 200)), said);
    let expected = content(&bench.turn(&twin, "Two.", 30));
    // An answer that the daemon's end cuts cannot go on with other tokens either.
    let cut = bench.create(&json!({}));
    let mut request = wish(Some(&cut), &[user("One.")], 2000);
    request["stream"] = json!(true);
    let mut stream = bench.daemon.open("/v1/chat/completions", &request);
    stream.read_exact(&mut [0; 3000]).unwrap();
    let model = bench.model.path().join("chatty.gguf");
    let own = fs::read(&model).unwrap();
    // The file is replaced as an installation does it: the daemon that runs has the old one mapped.
    let replace = |bytes: &[u8]| {
        let next = model.with_extension("next");
        fs::write(&next, bytes).unwrap();
        fs::rename(&next, &model).unwrap();
    };
    let elsewhere = tempfile::tempdir().unwrap();
    replace(&fs::read(chatty::write_with_other_tokens(elsewhere.path())).unwrap());
    bench.restart();
    let refused = |path: &str, body: &Value| {
        let answer = bench.daemon.post(path, body);
        let error = answer.json()["error"].clone();
        assert_eq!((answer.status, error["code"].as_str()), (409, Some("session_of_other_model")), "{error}");
        error["message"].as_str().unwrap().to_owned()
    };
    let message = refused("/v1/chat/completions", &wish(Some(&id), &[user("Two.")], 30));
    assert!(message.contains(&id) && message.contains("default"), "{message}");
    refused("/v1/chat/completions", &wish(Some(&cut), &[user("Two.")], 30));
    refused(&format!("/v1/sessions/{cut}/continue"), &json!({}));
    // All that needs no model is as it was.
    let session = bench.session(&id);
    assert_eq!((&session["turns"], &session["messages"][1]["content"]), (&json!(1), &json!(said)));
    assert_eq!(bench.session(&cut)["state"], "interrupted");
    let fresh = bench.create(&json!({}));
    assert_eq!(content(&bench.turn(&fresh, "One.", 5)).len(), 5, "its own sessions are answered");
    replace(&own);
    bench.restart();
    assert_eq!(content(&bench.turn(&id, "Two.", 30)), expected);
    let answer = bench.daemon.post(&format!("/v1/sessions/{cut}/continue"), &json!({})).json();
    assert!(content(&answer).starts_with(&said), "it is the answer to the same question");
    assert_eq!(bench.daemon.post("/v1/chat/completions", &wish(Some(&fresh), &[user("Two.")], 5)).status, 409);
}

#[test]
fn rows_of_another_arithmetic_are_not_used_again() {
    let mut bench = Bench::start(&[]);
    let id = bench.create(&json!({}));
    bench.turn(&id, &"Once upon a time. ".repeat(20), 200);
    let (plugins, ours) = (tempfile::tempdir().unwrap(), sparsed_tests::root().join("target/release/plugins/cpu"));
    let folder = plugins.path().join("cpu");
    fs::create_dir(&folder).unwrap();
    for file in fs::read_dir(ours).unwrap().map(|entry| entry.unwrap().path()) {
        fs::copy(&file, folder.join(file.file_name().unwrap())).unwrap();
    }
    let manifest = folder.join("plugin.toml");
    let text = fs::read_to_string(&manifest).unwrap();
    fs::write(&manifest, text.replace("\narithmetic = ", "\narithmetic = 1")).unwrap();
    let dir = format!("plugins.dir={}", plugins.path().display());
    bench.daemon.kill_and_restart(&[&bench.sets[..], &[&dir]].concat());
    let answer = bench.turn(&id, "Go on.", 50);
    assert_eq!(cached(&answer), 0, "{answer}");
    // Nor is it the other's fault: what it has made itself it goes on with.
    bench.daemon.kill_and_restart(&[&bench.sets[..], &[&dir]].concat());
    assert!(cached(&bench.turn(&id, "Go on.", 50)) >= 512);
}
