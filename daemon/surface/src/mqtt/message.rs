//! What do payloads say? From a publish to a request, and from an answer to payloads.
//!
//! A client of MQTT 5 names its reply topic and correlation data as properties, one of 3.1.1 writes `reply_to` and `id`
//! into the payload.

use super::envelope::Envelope;
use super::topics::{Op, Place, Topics, is_segment};
use crate::bodies::parse;
use crate::refusal::Refusal;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

/// Most bytes of correlation data.
const CORRELATION_BYTES_MAX: usize = 256;
/// The longest time that a request may have, in milliseconds.
const DEADLINE_MS_MAX: u64 = 24 * 3600 * 1000;

/// A publish that came in.
#[derive(Clone, Debug, Default)]
pub(super) struct Publish {
    /// Its topic.
    pub(super) topic: String,
    /// Its payload.
    pub(super) payload: Vec<u8>,
    /// The property Response Topic.
    pub(super) response_topic: Option<String>,
    /// The property Correlation Data.
    pub(super) correlation: Option<Vec<u8>>,
    /// Seconds that are left of the property Message Expiry Interval.
    pub(super) expiry_s: Option<u32>,
}

/// A request, as it is journaled.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Request {
    /// Who asks.
    pub(super) client: String,
    /// What.
    pub(super) op: Op,
    /// Of the pool: the broker keeps it until it is answered.
    pub(super) pool: bool,
    /// What the client calls it.
    pub(super) id: String,
    /// Where answers go.
    pub(super) reply: String,
    /// Goes back as it came.
    pub(super) correlation: Option<Vec<u8>>,
    /// JSON.
    pub(super) body: String,
    /// Milliseconds between two deltas; `None`: no deltas.
    pub(super) min_ms: Option<u64>,
    /// Most bytes of an answer's payload.
    pub(super) max_bytes: Option<usize>,
    /// Milliseconds since 1970.
    pub(super) deadline_ms: u64,
    /// Of what is asked.
    pub(super) digest: [u8; 32],
}

/// Which request is it? The same client, reply topic and id are the same request.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub(super) struct Key {
    /// Who asks.
    pub(super) client: String,
    /// Where answers go.
    pub(super) reply: String,
    /// What the client calls it.
    pub(super) id: String,
}

/// Where something is published, and with which properties.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Address {
    /// The topic.
    pub(super) topic: String,
    /// Goes back as it came.
    pub(super) correlation: Option<Vec<u8>>,
}

/// A request that is none, and whom to tell.
#[derive(Debug)]
pub(super) struct Unread {
    /// What is wrong.
    pub(super) refusal: Refusal,
    /// What the client calls it, if that could be read.
    pub(super) id: Option<String>,
    /// Where the refusal may go.
    pub(super) address: Address,
}

impl Request {
    /// Reads a publish that came in at `place`. `default_ms` is the time that a request has which does not say.
    ///
    /// # Errors
    /// What is wrong with it.
    pub(super) fn read(
        publish: &Publish,
        place: &Place,
        topics: &Topics,
        now_ms: u64,
        default_ms: u64,
    ) -> Result<Self, Box<Unread>> {
        let correlation = publish.correlation.clone().filter(|bytes| bytes.len() <= CORRELATION_BYTES_MAX);
        let fallback = |id: &str| Address { topic: topics.reply(place, id), correlation: correlation.clone() };
        // A refusal goes where the answer would have gone, if that can be read and is allowed.
        let unread = |refusal: Refusal, id: Option<String>| {
            let topic = publish.response_topic.clone().or_else(|| text_of(&publish.payload, "reply_to"));
            let topic = topic.filter(|topic| topics.check_reply(&place.client, topic).is_ok());
            let address = fallback(id.as_deref().filter(|id| is_segment(id)).unwrap_or("invalid"));
            let address = topic.map_or(address, |topic| Address { topic, correlation: correlation.clone() });
            Box::new(Unread { refusal, id, address })
        };
        let envelope: Envelope = parse(&publish.payload).map_err(|refusal| {
            let id = text_of(&publish.payload, "id").filter(|id| is_segment(id));
            unread(refusal, id)
        })?;
        let id = envelope.id().or_else(|| correlation.as_deref().map(id_of));
        let Some(id) = id.filter(|id| is_segment(id)) else {
            let reason = "is missing or no plain word of at most 128 bytes (letters, digits, - _ . : @ ~)";
            return Err(unread(Refusal::invalid("id", reason), None));
        };
        let refused = |param: &str, reason: &str| unread(Refusal::invalid(param, reason), Some(id.clone()));
        let Some(op) = place.op else {
            let names = Op::ALL.map(|(name, _)| name).join(", ");
            return Err(refused("op", &format!("is the last level of the topic, and must be one of {names}")));
        };
        if publish.correlation.is_some() && correlation.is_none() {
            return Err(refused("correlation_data", "has more than 256 bytes"));
        }
        envelope.check().map_err(|(param, reason)| refused(param, reason))?;
        let wanted = publish.response_topic.clone().or_else(|| envelope.reply_to.clone());
        if let Some(topic) = &wanted {
            topics.check_reply(&place.client, topic).map_err(|reason| refused("reply_to", reason))?;
        }
        let reply = wanted.unwrap_or_else(|| topics.reply(place, &id));
        let expiry_ms = publish.expiry_s.map_or(u64::MAX, |seconds| u64::from(seconds) * 1000);
        let left_ms = envelope.deadline_ms.unwrap_or(default_ms).min(expiry_ms).min(DEADLINE_MS_MAX);
        let body = envelope.body();
        let digest = Sha256::new().chain_update([op as u8]).chain_update(&body).finalize().into();
        Ok(Self {
            client: place.client.clone(),
            op,
            pool: place.pool,
            id,
            reply,
            correlation,
            body,
            min_ms: envelope.min_ms(),
            max_bytes: envelope.max_bytes,
            deadline_ms: now_ms.saturating_add(left_ms),
            digest,
        })
    }

    /// Which request it is.
    pub(super) fn key(&self) -> Key {
        Key { client: self.client.clone(), reply: self.reply.clone(), id: self.id.clone() }
    }

    /// Where its answers go.
    pub(super) fn address(&self) -> Address {
        Address { topic: self.reply.clone(), correlation: self.correlation.clone() }
    }
}

/// A text of a payload that is no request, if it is JSON at all.
fn text_of(payload: &[u8], name: &str) -> Option<String> {
    let fields: Map<String, Value> = serde_json::from_slice(payload).ok()?;
    match fields.get(name)? {
        Value::String(text) => Some(text.clone()),
        Value::Number(number) => Some(number.to_string()),
        _ => None,
    }
}

/// The name of a request that has correlation data only.
fn id_of(correlation: &[u8]) -> String {
    match std::str::from_utf8(correlation) {
        Ok(text) if is_segment(text) => text.to_owned(),
        _ => correlation.iter().take(64).map(|byte| format!("{byte:02x}")).collect(),
    }
}

/// A piece of an answer.
pub(super) fn delta(id: &str, seq: u64, kind: &str, text: &str) -> String {
    json!({ "v": 1, "id": id, "kind": "delta", "seq": seq, kind: text }).to_string()
}

/// A failure as an answer. With `retry` the same id may be asked again; without, that repeats this.
pub(super) fn error(id: Option<&str>, refusal: &Refusal, node: &str, retry: bool) -> String {
    let body = refusal.body();
    let error = &body["error"];
    let mut payload = json!({
        "v": 1, "id": id, "kind": "error", "code": error["code"], "message": error["message"], "param": error["param"],
        "node": node, "retry": retry,
    });
    if let Some(seconds) = refusal.retry_after_s() {
        payload["retry_after_ms"] = json!(u64::from(seconds) * 1000);
    }
    payload.to_string()
}

/// Payloads of at most `limit` bytes that carry `finale`: itself if it fits, else its text in parts and then the rest
/// of it without its timings, with the number of `parts` in the place of the text. `None` when even the rest does not
/// fit.
pub(super) fn parts(finale: &str, limit: usize) -> Option<Vec<String>> {
    if finale.len() <= limit {
        return Some(vec![finale.to_owned()]);
    }
    let mut rest: Map<String, Value> = serde_json::from_str(finale).ok()?;
    let text = rest.remove("text")?;
    rest.remove("timings"); // nothing that a small device counts on
    let (text, id) = (text.as_str()?, rest.get("id")?.clone());
    let frame =
        |part: usize, text: &str| json!({ "v": 1, "id": id, "kind": "part", "part": part, "text": text }).to_string();
    // The part's number grows by digits: leave room for the longest.
    let room = limit.checked_sub(frame(usize::MAX, "").len()).filter(|room| *room >= 8)?;
    let pieces = split(text, room);
    rest.insert("parts".to_owned(), json!(pieces.len()));
    let rest = Value::Object(rest).to_string();
    let framed = pieces.iter().enumerate().map(|(part, piece)| frame(part, piece));
    (rest.len() <= limit).then(|| framed.chain([rest.clone()]).collect())
}

/// Cuts text so that each piece takes at most `room` bytes in JSON; a character takes at most 6 (or 4 unescaped).
fn split(text: &str, room: usize) -> Vec<&str> {
    let written = |c: char| match c {
        '"' | '\\' | '\n' | '\r' | '\t' | '\u{8}' | '\u{c}' => 2,
        c if c < ' ' => 6,
        c => c.len_utf8(),
    };
    let (mut pieces, mut begin, mut used) = (Vec::new(), 0, 0);
    for (at, c) in text.char_indices() {
        if used + written(c) > room {
            pieces.push(&text[begin..at]);
            (begin, used) = (at, 0);
        }
        used += written(c);
    }
    pieces.push(&text[begin..]);
    pieces
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::mqtt::envelope::{MIN_MS_DEFAULT, PART_BYTES_MIN};

    /// A chat of the client `lamp`.
    pub(in crate::mqtt) fn request(payload: &str) -> Request {
        read(payload, |_| {}).unwrap()
    }

    fn read(payload: &str, edit: impl FnOnce(&mut Publish)) -> Result<Request, Box<Unread>> {
        let topics = Topics::new("s", "box", None, &[]);
        let mut publish =
            Publish { topic: "s/box/req/lamp/chat".to_owned(), payload: payload.into(), ..Publish::default() };
        edit(&mut publish);
        let place = topics.place(&publish.topic).unwrap();
        Request::read(&publish, &place, &topics, 1000, 60_000)
    }

    #[test]
    fn a_device_without_properties_says_all_in_the_payload() {
        let request = read(
            r#"{"id": "a1", "reply_to": "s/reply/lamp/x", "body": {"messages": []}, "session": "S", "max_bytes": 300, "deadline_ms": 5}"#,
            |_| {},
        );
        let request = request.unwrap();
        assert_eq!(
            (request.id.as_str(), request.reply.as_str(), request.max_bytes),
            ("a1", "s/reply/lamp/x", Some(300))
        );
        assert_eq!((request.deadline_ms, request.min_ms), (1005, None));
        assert_eq!(request.body, r#"{"messages":[],"session_id":"S"}"#);
    }

    #[test]
    fn a_number_is_an_id_and_deltas_are_asked_for_in_few_words() {
        let read = |payload: &str| read(payload, |_| {}).map(|request| (request.id, request.min_ms));
        assert_eq!(read(r#"{"id": 7}"#).unwrap(), ("7".to_owned(), None));
        assert_eq!(read(r#"{"id": "a", "stream": true}"#).unwrap().1, Some(MIN_MS_DEFAULT));
        assert_eq!(read(r#"{"id": "a", "stream": {"min_ms": 0}}"#).unwrap().1, Some(0));
        assert_eq!(read(r#"{"id": "a", "stream": null}"#).unwrap().1, None);
        for (payload, id) in
            [(r#"{"id": 7.5}"#, Some("7.5")), (r#"{"id": 9, "x": 1}"#, Some("9")), (r#"{"id": []}"#, None)]
        {
            assert_eq!(read(payload).unwrap_err().id.as_deref(), id, "{payload}");
        }
    }

    #[test]
    fn a_verb_that_there_is_not_is_refused_by_name() {
        let unread = read(r#"{"id": "e"}"#, |publish| publish.topic = "s/box/req/lamp/embed".to_owned()).unwrap_err();
        assert_eq!((unread.id.as_deref(), unread.address.topic.as_str()), (Some("e"), "s/box/res/lamp/e"));
        let said = unread.refusal.message();
        assert!(said.contains("'op'") && said.contains("chat, complete"), "{said}");
    }

    #[test]
    fn properties_say_the_same() {
        let request = read(r#"{"body": {}, "stream": {"mode": "delta"}}"#, |publish| {
            publish.response_topic = Some("s/reply/lamp/y".to_owned());
            publish.correlation = Some(vec![0, 255]);
            publish.expiry_s = Some(2);
        });
        let request = request.unwrap();
        assert_eq!((request.id.as_str(), request.reply.as_str()), ("00ff", "s/reply/lamp/y"));
        assert_eq!((request.deadline_ms, request.min_ms), (3000, Some(MIN_MS_DEFAULT)));
        assert_eq!(read(r#"{"id": "q"}"#, |_| {}).unwrap().reply, "s/box/res/lamp/q");
    }

    #[test]
    fn what_is_wrong_is_told_by_name_where_the_asker_may_be() {
        for (payload, param) in [
            (r#"{"body": {}}"#, Some("id")),
            (r#"{"id": "a/b"}"#, Some("id")),
            (r#"{"id": "a", "v": 2}"#, Some("v")),
            (r#"{"id": "a", "max_bytes": 10}"#, Some("max_bytes")),
            (r#"{"id": "a", "deadline_ms": 0}"#, Some("deadline_ms")),
            (r#"{"id": "a", "reply_to": "s/box/res/tv/1"}"#, Some("reply_to")),
            (r#"{"id": "a", "body": {"n": 2}}"#, Some("n")),
            (r#"{"id": "a", "stream": {"mode": "x"}}"#, Some("stream.mode")),
            ("{", None),
        ] {
            let unread = read(payload, |_| {}).unwrap_err();
            assert_eq!(unread.refusal.body()["error"]["param"].as_str(), param, "{payload}");
            assert!(unread.address.topic.starts_with("s/box/res/lamp/"), "{payload}: {}", unread.address.topic);
        }
        let asker = r#"{"id": "a", "reply_to": "s/reply/lamp/z", "body": "#;
        for wrong in ["1}", "{}, \"v\": 2}", "{}, \"nope\": 1}"] {
            let unread = read(&format!("{asker}{wrong}"), |_| {}).unwrap_err();
            assert_eq!((unread.id.as_deref(), unread.address.topic.as_str()), (Some("a"), "s/reply/lamp/z"), "{wrong}");
        }
        let elsewhere = read("{", |publish| publish.response_topic = Some("s/reply/lamp/z".to_owned())).unwrap_err();
        assert_eq!(elsewhere.address.topic, "s/reply/lamp/z");
    }

    #[test]
    fn parts_are_short_enough_and_make_the_text_again() {
        let mut random = fastrand::Rng::with_seed(3);
        for _ in 0..200 {
            let n = random.usize(0..3000);
            let letters = ['a', '"', '\\', '\n', '\u{1}', 'ü', '🙂', '\u{7f}'];
            let text: String = (0..n).map(|_| letters[random.usize(..letters.len())]).collect();
            let finale = json!({ "v": 1, "id": "x", "kind": "final", "text": text, "finish": "stop" }).to_string();
            let limit = random.usize(PART_BYTES_MIN..2000);
            let parts = parts(&finale, limit).unwrap();
            assert!(parts.iter().all(|part| part.len() <= limit));
            let values: Vec<Value> = parts.iter().map(|part| serde_json::from_str(part).unwrap()).collect();
            let (last, before) = values.split_last().unwrap();
            let again: String = before.iter().map(|part| part["text"].as_str().unwrap()).collect();
            let whole = if before.is_empty() { last["text"].as_str().unwrap() } else { &again };
            assert!(whole == text && last["finish"] == "stop" && last["kind"] == "final");
            assert!(before.is_empty() || last["parts"] == before.len());
        }
    }
}
