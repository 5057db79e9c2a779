//! How is a request answered? Through the bodies that every door has, its pieces gathered to a result and told as
//! deltas on the way.

use super::link::{Delta, Deltas};
use super::message::{Request, delta};
use super::topics::Op;
use crate::bodies::{Answering, Asked, ChatAsk, CompletionAsk, Piece, Wire, parse, sessions, tokens};
use crate::refusal::Refusal;
use serde::Deserialize;
use serde_json::{Map, Value, json};
use sparsed_engine::Service;
use sparsed_engine::api::Owner;
use std::time::Duration;
use tokio::time::{Instant, sleep_until};

/// A delta is sent when it has so many bytes, however short the time since the last one. So much waits at most for a
/// connection that has no room: a broker that is slow makes neither the daemon nor the deltas grow.
const DELTA_BYTES: usize = 512;
/// Pause before a delta that found no room is tried again.
const FULL_PAUSE: Duration = Duration::from_millis(20);
/// The door's name among owners.
const DOOR: &str = "mqtt";

/// The session that a verb is about.
#[derive(Debug, Deserialize)]
struct VerbFields {
    verb: String,
    #[serde(alias = "session_id")]
    id: Option<String>,
}

/// Answers `request`; what it hears meanwhile goes to `deltas`.
///
/// # Errors
/// Why there is no answer.
pub(super) async fn answer(
    service: &Service,
    request: &Request,
    node: &str,
    deltas: &Deltas,
) -> Result<String, Refusal> {
    let owner = Owner::named(DOOR, &request.client);
    let _admission = service.admit(owner)?;
    let body = request.body.as_bytes();
    let result = match request.op {
        Op::Chat => {
            let asked = ChatAsk::read(&streamed(body)?)?.prepare(service, owner, ()).await?;
            return gather(service, asked, request, node, deltas).await;
        }
        Op::Complete => {
            let asked = CompletionAsk::read(&streamed(body)?)?.prepare(service, owner, ()).await;
            let asked = asked.map_err(Refusal::about_prompt)?;
            return gather(service, asked, request, node, deltas).await.map_err(Refusal::about_prompt);
        }
        Op::Tokenize => tokens::tokenize(service, owner, body, ()).await?,
        Op::Detokenize => tokens::detokenize(service, owner, body, ()).await?,
        Op::Session => {
            let VerbFields { verb, id } = parse(body)?;
            let missing = || Refusal::invalid("id", "is missing: which session");
            let id = if matches!(verb.as_str(), "create" | "list") { None } else { Some(id.ok_or_else(missing)?) };
            if let ("continue", Some(id)) = (verb.as_str(), &id) {
                let asked = sessions::resume(service, owner, id, parse(&streamed(body)?)?).await?;
                return gather(service, asked, request, node, deltas).await;
            }
            session(service, owner, &verb, id.as_deref().unwrap_or_default(), body).await?
        }
        Op::Cancel => return Err(Refusal::invalid("op", "cancel has no answer")),
    };
    Ok(json!({ "v": 1, "id": request.id, "kind": "final", "seq": 0, "result": result, "node": node }).to_string())
}

/// The body of an answer in pieces that tells its usage.
fn streamed(body: &[u8]) -> Result<Vec<u8>, Refusal> {
    let mut body: Map<String, Value> = parse(body)?;
    body.insert("stream".to_owned(), json!(true));
    body.insert("stream_options".to_owned(), json!({ "include_usage": true }));
    Ok(Value::Object(body).to_string().into_bytes())
}

/// A verb of sessions, with the fields that HTTP has for it.
async fn session(service: &Service, owner: Owner, verb: &str, id: &str, body: &[u8]) -> Result<Value, Refusal> {
    let mut fields: Map<String, Value> = parse(body)?;
    for name in ["verb", "id", "session_id"] {
        fields.remove(name);
    }
    let body = Value::Object(fields).to_string().into_bytes();
    match verb {
        "create" => sessions::create(service, owner, parse(&body)?).await,
        "list" => sessions::list(service, owner).await,
        "get" => sessions::get(service, owner, id).await,
        "change" => sessions::change(service, owner, id, parse(&body)?).await,
        "pin" => sessions::pin(service, owner, id, parse(&body)?).await,
        "delete" => sessions::delete(service, owner, id).await,
        "fork" => sessions::fork(service, owner, id, parse(&body)?).await,
        "truncate" => sessions::truncate(service, owner, id, parse(&body)?).await,
        "checkpoint" => sessions::checkpoint(service, owner, id).await,
        "export" | "import" => {
            let reason =
                format!("is '{verb}': a session's file does not go through a broker; take HTTP or D-Bus for it");
            Err(Refusal::invalid("verb", reason))
        }
        _ => {
            let verbs = "create, list, get, change, pin, delete, fork, truncate, checkpoint and continue";
            Err(Refusal::invalid("verb", format!("is '{verb}'; known are {verbs}")))
        }
    }
}

async fn gather<W: Wire>(
    service: &Service,
    asked: Asked<W>,
    request: &Request,
    node: &str,
    deltas: &Deltas,
) -> Result<String, Refusal> {
    if !asked.siblings.is_empty() {
        return Err(Refusal::invalid("prompt", "has several entries; here each is to be a message of its own"));
    }
    let answering = Answering::begin(service, asked).await?;
    tell(answering, request, node, deltas).await
}

/// Tells the deltas of an answer, and answers the final.
///
/// # Errors
/// Why there is no more of it.
pub(super) async fn tell<W: Wire>(
    mut answering: Answering<W>,
    request: &Request,
    node: &str,
    deltas: &Deltas,
) -> Result<String, Refusal> {
    let mut told = Told::default();
    let mut teller = request.min_ms.map(|min_ms| Teller::new(request, deltas, Duration::from_millis(min_ms)));
    loop {
        let due = teller.as_ref().and_then(Teller::due);
        let piece = tokio::select! {
            piece = answering.next() => piece,
            () = sleep_until(due.unwrap_or_else(Instant::now)), if due.is_some() => {
                teller.iter_mut().for_each(Teller::tell);
                continue;
            }
        };
        match piece {
            Some(Piece::Chunk(chunk)) => {
                let (kind, text) = told.hear(chunk);
                if let Some(teller) = &mut teller {
                    teller.hear(kind, &text);
                }
            }
            Some(Piece::Failed(refusal)) => return Err(refusal),
            None => break,
        }
    }
    if let Some(teller) = &mut teller {
        teller.tell();
    }
    Ok(told.finale(request, node, teller.map_or(0, |teller| teller.seq)))
}

/// What an answer has said.
#[derive(Debug, Default)]
struct Told {
    text: String,
    reasoning: String,
    calls: Vec<Value>,
    tokens: Vec<Value>,
    /// How likely the tokens were: OpenAI's lists by their names, of chats or of completions.
    logprobs: Map<String, Value>,
    /// What stands once in an answer: finish, usage, timings, model.
    rest: Map<String, Value>,
}

impl Told {
    /// Takes one of OpenAI's chunks in; answers what it says, and of which kind that is.
    fn hear(&mut self, mut chunk: Value) -> (&'static str, String) {
        for name in ["model", "usage", "timings"] {
            let value = chunk[name].take();
            if !value.is_null() {
                self.rest.insert(name.to_owned(), value);
            }
        }
        let Some(choice) = chunk.pointer_mut("/choices/0") else { return ("text", String::new()) };
        let finish = choice["finish_reason"].take();
        if !finish.is_null() {
            self.rest.insert("finish".to_owned(), finish);
        }
        if let Some(Value::Array(tokens)) = choice.get_mut("tokens") {
            self.tokens.append(tokens);
        }
        if let Some(Value::Object(logprobs)) = choice.get_mut("logprobs") {
            for (name, mut list) in std::mem::take(logprobs) {
                match (self.logprobs.get_mut(&name), &mut list) {
                    (Some(Value::Array(all)), Value::Array(more)) => all.append(more),
                    _ => drop(self.logprobs.insert(name, list)),
                }
            }
        }
        if let Some(Value::Array(calls)) = choice.pointer_mut("/delta/tool_calls") {
            self.calls.append(calls);
        }
        let mut string = |pointer: &str| match choice.pointer_mut(pointer).map(Value::take) {
            Some(Value::String(text)) => text,
            _ => String::new(),
        };
        let reasoning = string("/delta/reasoning_content");
        if !reasoning.is_empty() {
            self.reasoning += &reasoning;
            return ("reasoning", reasoning);
        }
        let text = string("/delta/content") + &string("/text");
        self.text += &text;
        ("text", text)
    }

    fn finale(self, request: &Request, node: &str, seq: u64) -> String {
        let mut finale = json!({ "v": 1, "id": request.id, "kind": "final", "seq": seq, "text": self.text });
        if !self.reasoning.is_empty() {
            finale["reasoning"] = json!(self.reasoning);
        }
        if !self.calls.is_empty() {
            finale["tool_calls"] = json!(self.calls);
        }
        if !self.tokens.is_empty() {
            finale["tokens"] = json!(self.tokens);
        }
        if !self.logprobs.is_empty() {
            finale["logprobs"] = json!(self.logprobs);
        }
        for (name, value) in self.rest {
            finale[name] = value;
        }
        finale["node"] = json!(node);
        finale.to_string()
    }
}

/// Tells an answer's deltas, not more often than its client wants.
#[derive(Debug)]
struct Teller<'a> {
    request: &'a Request,
    deltas: &'a Deltas,
    pause: Duration,
    last: Option<Instant>,
    kind: &'static str,
    text: String,
    seq: u64,
    /// There was no room for the last one.
    is_full: bool,
}

impl<'a> Teller<'a> {
    fn new(request: &'a Request, deltas: &'a Deltas, pause: Duration) -> Self {
        Self { request, deltas, pause, last: None, kind: "text", text: String::new(), seq: 0, is_full: false }
    }

    /// When the text that waits is to be told.
    fn due(&self) -> Option<Instant> {
        let pause = if self.is_full { self.pause.max(FULL_PAUSE) } else { self.pause };
        (!self.text.is_empty()).then(|| self.last.map_or_else(Instant::now, |last| last + pause))
    }

    fn hear(&mut self, kind: &'static str, text: &str) {
        if kind != self.kind {
            self.tell();
            self.lose();
            self.kind = kind;
        }
        if self.is_full && self.text.len() + text.len() > DELTA_BYTES {
            self.lose();
        }
        self.text += text;
        let is_long = self.text.len() >= DELTA_BYTES && !self.is_full;
        if is_long || self.due().is_some_and(|due| due <= Instant::now()) {
            self.tell();
        }
    }

    /// Gives up what waits: its number is missing then, and the final has it.
    fn lose(&mut self) {
        if !self.text.is_empty() {
            self.text.clear();
            self.seq += 1;
        }
    }

    /// Sends what waits. Where there is no room it waits longer; where nobody listens it is lost, and the final has it.
    fn tell(&mut self) {
        if self.text.is_empty() {
            return;
        }
        self.last = Some(Instant::now());
        let payload = delta(&self.request.id, self.seq, self.kind, &self.text);
        self.is_full = !self.deltas.tell(Delta { address: self.request.address(), payload });
        if !self.is_full {
            self.text.clear();
            self.seq += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mqtt::message::tests::request;

    #[tokio::test]
    async fn a_broker_that_takes_nothing_costs_a_delta_and_what_is_lost_has_a_number() {
        let (way, deltas) = Deltas::new();
        let (sender, mut taken) = tokio::sync::mpsc::channel(2);
        way.send_replace(Some(sender));
        let request = request(r#"{"id": "1", "stream": {"mode": "delta", "min_ms": 0}, "body": {}}"#);
        let mut said = String::new();
        let mut teller = Teller::new(&request, &deltas, Duration::ZERO);
        for n in 0..5000 {
            let word = format!("{n} ");
            teller.hear("text", &word);
            said += &word;
            assert!(teller.text.len() <= DELTA_BYTES, "{} bytes wait", teller.text.len());
        }
        let mut heard = Vec::new();
        let mut take = |delta: Delta| {
            let delta: Value = serde_json::from_str(&delta.payload).unwrap();
            heard.push((delta["seq"].as_u64().unwrap(), delta["text"].as_str().unwrap().to_owned()));
        };
        (0..2).for_each(|_| take(taken.try_recv().unwrap()));
        teller.tell();
        take(taken.try_recv().unwrap());
        assert_eq!(heard[..2], [(0, "0 ".to_owned()), (1, "1 ".to_owned())]);
        let (seq, last) = &heard[2];
        assert!(*seq > 2 && teller.seq == seq + 1, "a gap tells that something is missing: {seq}");
        assert!(said.ends_with(last.as_str()) && !last.is_empty());
        // What was thought is not told as what was said, either.
        (0..3).for_each(|_| teller.hear("reasoning", "hm"));
        teller.hear("text", "so");
        assert_eq!((teller.kind, teller.text.as_str()), ("text", "so"));
    }

    #[test]
    fn chunks_of_both_kinds_become_one_result() {
        let mut told = Told::default();
        let chunk = |choice: Value| json!({ "model": "m", "choices": [choice] });
        assert_eq!(told.hear(chunk(json!({ "delta": { "reasoning_content": "hm" } }))), ("reasoning", "hm".to_owned()));
        assert_eq!(told.hear(chunk(json!({ "delta": { "content": "a" } }))), ("text", "a".to_owned()));
        assert_eq!(told.hear(chunk(json!({ "text": "b", "tokens": [7] }))), ("text", "b".to_owned()));
        told.hear(chunk(json!({ "delta": { "tool_calls": [{ "index": 0 }] }, "finish_reason": "stop" })));
        told.hear(json!({ "model": "m", "choices": [], "usage": { "total_tokens": 3 } }));
        let request = request(r#"{"id": "1", "body": {}}"#);
        let finale: Value = serde_json::from_str(&told.finale(&request, "box", 4)).unwrap();
        let expected = json!({
            "v": 1, "id": "1", "kind": "final", "seq": 4, "text": "ab", "reasoning": "hm",
            "tool_calls": [{ "index": 0 }], "tokens": [7], "model": "m", "finish": "stop",
            "usage": { "total_tokens": 3 }, "node": "box",
        });
        assert_eq!(finale, expected);
    }

    #[test]
    fn how_likely_each_token_was_is_in_the_result() {
        let request = request(r#"{"id": "1", "body": {}}"#);
        let finale = |pieces: &[Value]| -> Value {
            let mut told = Told::default();
            for piece in pieces {
                told.hear(json!({ "choices": [{ "text": "x", "logprobs": piece }] }));
            }
            serde_json::from_str(&told.finale(&request, "box", 0)).unwrap()
        };
        let of_chat = |token: &str| json!({ "content": [{ "token": token, "logprob": -0.5 }], "refusal": null });
        let both = json!({
            "content": [{ "token": "a", "logprob": -0.5 }, { "token": "b", "logprob": -0.5 }], "refusal": null,
        });
        assert_eq!(finale(&[of_chat("a"), Value::Null, of_chat("b")])["logprobs"], both);
        let of_completion = |token: &str, at: u32| json!({ "tokens": [token], "text_offset": [at] });
        let both = json!({ "tokens": ["a", "b"], "text_offset": [0, 1] });
        assert_eq!(finale(&[of_completion("a", 0), of_completion("b", 1)])["logprobs"], both);
        assert!(finale(&[Value::Null]).get("logprobs").is_none());
    }
}
