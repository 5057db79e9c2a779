//! Responses that are kept: what is told of them is what their sessions say, whoever has changed those meanwhile.

use super::strangers::{error, start};
use serde_json::{Value, json};
use sparsed_tests::daemon::Daemon;

/// A response in the background, asked for with `fields` beside the usual ones.
fn begun(daemon: &Daemon, fields: &Value) -> Value {
    let mut body = json!({ "input": "Hello", "background": true, "temperature": 0.9, "ignore_eos": true });
    for (name, value) in fields.as_object().unwrap() {
        body[name] = value.clone();
    }
    let answer = daemon.post("/v1/responses", &body);
    assert_eq!(answer.status, 200, "{}", answer.body);
    answer.json()
}

fn path(response: &Value) -> String {
    format!("/v1/responses/{}", response["id"].as_str().unwrap())
}

/// The name of the session that the first response of it is kept in.
fn session(response: &Value) -> String {
    let digits = response["id"].as_str().unwrap().strip_prefix("resp_").unwrap();
    format!("sess_{}", digits.strip_suffix("_0").unwrap())
}

/// The response when it is over.
fn over(daemon: &Daemon, response: &Value) -> Value {
    let ask = || daemon.get(&path(response)).json();
    daemon.wait_until("the response is over", || ask()["status"] != "in_progress");
    ask()
}

fn text(response: &Value) -> &str {
    response["output"][0]["content"][0]["text"].as_str().unwrap_or_else(|| panic!("{response}"))
}

#[test]
fn a_response_goes_with_its_session_though_it_was_answered_not_long_ago() {
    let (daemon, _dir) = start();
    let response = over(&daemon, &begun(&daemon, &json!({ "max_output_tokens": 20 })));
    assert!(!text(&response).is_empty());
    assert_eq!(daemon.ask("DELETE", &format!("/v1/sessions/{}", session(&response))).status, 200);
    assert_eq!(error(&daemon.get(&path(&response))).1, "response_not_found");
    assert_eq!(error(&daemon.ask("DELETE", &path(&response))).1, "response_not_found");
}

#[test]
fn a_turn_that_was_truncated_and_asked_for_anew_is_told_as_it_is_now() {
    let (daemon, _dir) = start();
    let old = over(&daemon, &begun(&daemon, &json!({ "max_output_tokens": 20, "seed": 1 })));
    let session = session(&old);
    assert_eq!(daemon.post(&format!("/v1/sessions/{session}/truncate"), &json!({ "turns": 0 })).status, 200);
    assert_eq!(error(&daemon.get(&path(&old))).1, "response_not_found");
    let chat = json!({
        "session_id": session, "messages": [{ "role": "user", "content": "Hello" }], "max_tokens": 20, "seed": 2,
        "temperature": 0.9, "ignore_eos": true,
    });
    let anew = daemon.post("/v1/chat/completions", &chat).json();
    let now = daemon.get(&path(&old)).json();
    assert_eq!(text(&now), anew["choices"][0]["message"]["content"], "{now}");
    assert_ne!(text(&now), text(&old));
}

#[test]
fn a_response_that_was_cancelled_and_is_continued_is_told_to_its_end() {
    let (daemon, _dir) = start();
    let begun = begun(&daemon, &json!({ "max_output_tokens": 3000, "seed": 5 }));
    let session = format!("/v1/sessions/{}", session(&begun));
    daemon.wait_until("it has said something", || daemon.get(&session).json()["tokens"].as_u64() > Some(60));
    let cancelled = daemon.post(&(path(&begun) + "/cancel"), &json!({})).json();
    assert_eq!(cancelled["status"], "cancelled", "{cancelled}");
    assert_eq!(daemon.get(&path(&begun)).json(), cancelled);
    daemon.wait_until("its session is free", || daemon.get(&session).json()["state"] == "idle");
    let whole = daemon.post(&(session + "/continue"), &json!({})).json();
    let now = daemon.get(&path(&begun)).json();
    assert_eq!((&now["status"], &now["usage"]["output_tokens"]), (&json!("incomplete"), &json!(3000)), "{now}");
    assert_eq!(text(&now), whole["choices"][0]["message"]["content"]);
    assert!(text(&now).len() > text(&cancelled).len());
}
