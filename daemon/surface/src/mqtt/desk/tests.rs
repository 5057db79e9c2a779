//! The desk without a broker: what it says to what comes, through restarts, broken connections and a full disk.

mod failures;
mod misfortunes;
mod room;
mod strays;

use super::{Ack, Act, Desk, Input, Limits, Line};
use crate::mqtt::ledger::Ledger;
use crate::mqtt::message::{Key, Publish, Request};
use crate::mqtt::topics::Topics;
use crate::refusal::Refusal;
use serde_json::{Value, json};
use sparsed_engine::api::Failure;
use std::path::Path;
use tempfile::TempDir;

const LIMITS: Limits = Limits {
    per_client: 4,
    pending: 6,
    running: 2,
    held_bytes: 1 << 20,
    payload_bytes: 2000,
    keep_ms: 10_000,
    deadline_ms: 5000,
    stall_ms: 3000,
};

/// A desk and what it has said.
struct Bench {
    dir: TempDir,
    desk: Desk,
    now_ms: u64,
    epoch: u64,
    /// Publishes that have not landed.
    flying: Vec<(u64, String, Value)>,
    acks: Vec<u16>,
    /// What runs.
    started: Vec<(Key, u64, Request)>,
    n_started: usize,
}

fn open(dir: &Path, limits: Limits) -> Desk {
    let (ledger, kept) = Ledger::open(dir, &[3; 32]).unwrap();
    Desk::new(Topics::new("s", "box", Some("fleet"), &[]), limits, ledger, kept)
}

impl Bench {
    fn new() -> Self {
        Self::with(LIMITS)
    }

    fn with(limits: Limits) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let desk = open(dir.path(), limits);
        let (flying, acks, started) = (Vec::new(), Vec::new(), Vec::new());
        let mut bench = Self { dir, desk, now_ms: 1_000_000, epoch: 0, flying, acks, started, n_started: 0 };
        bench.up();
        bench
    }

    fn take(&mut self, input: Input) {
        for act in self.desk.handle(self.now_ms, [input]) {
            match act {
                Act::Publish { token, address, payload, .. } => {
                    self.flying.push((token, address.topic, serde_json::from_str(&payload).unwrap()));
                }
                Act::Ack(ack) => {
                    assert_eq!(ack.epoch, self.epoch, "an acknowledgement of an earlier connection");
                    self.acks.push(ack.pkid);
                }
                Act::Start { key, attempt, request } => {
                    self.n_started += 1;
                    self.started.push((key, attempt, *request));
                }
                Act::Cancel(key) => self.started.retain(|(started, ..)| *started != key),
                Act::Subscribe { .. } | Act::Unsubscribe { .. } | Act::Reset(_) => {}
            }
        }
    }

    fn up(&mut self) {
        self.epoch += 1;
        for line in [Line::Node, Line::Pool] {
            self.take(Input::Up { line, epoch: self.epoch, window: 3, packet_bytes_max: None });
        }
    }

    fn down(&mut self) {
        self.flying.clear();
        for line in [Line::Node, Line::Pool] {
            self.take(Input::Down { line, epoch: self.epoch });
        }
    }

    /// The daemon dies and another one comes, which has what is on the disk.
    fn restart(&mut self) {
        self.flying.clear();
        self.started.clear();
        self.desk = open(self.dir.path(), self.desk.limits);
        self.up();
    }

    fn ask(&mut self, pkid: u16, topic: &str, payload: &Value) {
        let line = if topic.starts_with("s/pool") { Line::Pool } else { Line::Node };
        let ack = Some(Ack { line, epoch: self.epoch, pkid });
        let publish = Publish { topic: topic.to_owned(), payload: payload.to_string().into(), ..Publish::default() };
        self.take(Input::Publish { line, ack, publish });
    }

    fn chat(&mut self, pkid: u16, id: &str) {
        self.ask(pkid, "s/box/req/lamp/chat", &json!({ "id": id, "body": { "x": 1 } }));
    }

    fn finish(&mut self, outcome: impl FnOnce(&Request) -> Result<String, Refusal>) {
        let (key, attempt, request) = self.started.remove(0);
        self.take(Input::Done { key, attempt, outcome: outcome(&request) });
    }

    fn land(&mut self) -> (String, Value) {
        let (token, topic, payload) = self.flying.remove(0);
        self.take(Input::Landed { token, refused: None });
        (topic, payload)
    }

    fn tick(&mut self, ms: u64) {
        self.now_ms += ms;
        self.take(Input::Tick);
    }
}

fn finale(request: &Request) -> Result<String, Refusal> {
    Ok(json!({ "id": request.id, "kind": "final", "text": "hello" }).to_string())
}

#[test]
fn a_request_is_acknowledged_when_it_is_journaled_and_has_one_result_that_is_repeated() {
    let mut bench = Bench::new();
    bench.chat(1, "a");
    assert_eq!((bench.acks.as_slice(), bench.n_started), (&[1][..], 1));
    bench.chat(2, "a"); // again, while it runs
    bench.finish(finale);
    let (topic, payload) = bench.land();
    assert_eq!((topic.as_str(), &payload["text"]), ("s/box/res/lamp/a", &json!("hello")));
    bench.chat(3, "a");
    assert_eq!(bench.land().1, payload);
    assert_eq!((bench.acks.as_slice(), bench.n_started), (&[1, 2, 3][..], 1));
    // Another request of the same name is none of it; another client's is another one.
    bench.ask(4, "s/box/req/lamp/chat", &json!({ "id": "a", "body": { "x": 2 } }));
    assert_eq!(bench.land().1["code"], "id_conflict");
    bench.ask(5, "s/box/req/tv/chat", &json!({ "id": "a", "body": { "x": 2 } }));
    assert_eq!(bench.n_started, 2);
    // After a while it is forgotten.
    bench.finish(finale);
    bench.land();
    bench.tick(LIMITS.keep_ms);
    bench.chat(6, "a");
    assert_eq!(bench.n_started, 3);
}

#[test]
fn a_result_that_is_asked_for_while_it_is_sent_is_sent_once_more() {
    let mut bench = Bench::new();
    bench.chat(1, "a");
    bench.finish(finale);
    bench.chat(2, "a");
    bench.land();
    assert_eq!(bench.land().1["kind"], "final");
    assert!(bench.flying.is_empty() && bench.desk.is_idle());
}

#[test]
fn a_request_of_the_pool_is_acknowledged_only_after_its_result() {
    let mut bench = Bench::new();
    bench.ask(7, "s/pool/fleet/req/lamp/chat", &json!({ "id": "a", "body": {} }));
    bench.finish(finale);
    assert!(bench.acks.is_empty());
    assert_eq!(bench.land().0, "s/pool/fleet/res/lamp/a");
    assert_eq!(bench.acks, [7]);
    // One that has no result yet is the broker's again when the node dies.
    bench.ask(8, "s/pool/fleet/req/lamp/chat", &json!({ "id": "b", "body": {} }));
    bench.tick(0);
    bench.restart();
    bench.tick(0);
    assert!(bench.started.is_empty() && bench.acks == [7]);
}

#[test]
fn a_daemon_that_died_computes_again_what_had_no_result_and_sends_again_what_had_one() {
    let mut bench = Bench::new();
    bench.chat(1, "unfinished");
    bench.chat(2, "unsent");
    bench.started.rotate_left(1);
    bench.finish(finale);
    bench.restart();
    assert_eq!(bench.land().1["id"], "unsent");
    bench.tick(0);
    assert_eq!(bench.started.iter().map(|(key, ..)| key.id.as_str()).collect::<Vec<_>>(), ["unfinished"]);
    bench.finish(finale);
    bench.land();
    bench.tick(0);
    bench.restart();
    bench.tick(0);
    assert!(bench.flying.is_empty(), "what was delivered is not sent again unasked");
    bench.chat(3, "unsent");
    assert_eq!(bench.land().1["text"], "hello");
    assert_eq!(bench.n_started, 3);
}

#[test]
fn what_a_broken_connection_did_not_acknowledge_is_sent_again_first_things_first() {
    let mut bench = Bench::new();
    for id in ["a", "b"] {
        bench.chat(1, id);
    }
    bench.finish(finale);
    bench.finish(finale);
    bench.down();
    bench.chat(2, "a"); // a late message of the old connection: not acknowledged on the new one
    bench.up();
    assert_eq!([bench.land().1["id"].clone(), bench.land().1["id"].clone()], ["a", "b"]);
}

#[test]
fn a_broker_that_acknowledges_nothing_is_left() {
    let mut bench = Bench::new();
    bench.chat(1, "a");
    bench.finish(finale);
    bench.now_ms += LIMITS.stall_ms;
    assert_eq!(bench.desk.handle(bench.now_ms, [Input::Tick]), [Act::Reset(Line::Node)]);
    assert!(bench.desk.handle(bench.now_ms + 1, [Input::Tick]).is_empty());
}

#[test]
fn a_client_has_its_share_and_no_more() {
    let mut bench = Bench::new();
    for (pkid, id) in (1..).zip(["a", "b", "c", "d"]) {
        bench.chat(pkid, id);
    }
    bench.chat(5, "e");
    assert_eq!(bench.acks, [1, 2, 3, 4], "a refusal is acknowledged when the broker has it");
    let (_, refused) = bench.land();
    assert_eq!(
        (&refused["code"], &refused["retry"], &refused["retry_after_ms"]),
        (&json!("queue_full"), &json!(true), &json!(1000))
    );
    assert_eq!(bench.acks, [1, 2, 3, 4, 5]);
    bench.ask(6, "s/box/req/tv/chat", &json!({ "id": "a", "body": {} }));
    bench.finish(finale);
    // The next place is for the client that has nothing running.
    assert_eq!(bench.started.last().unwrap().0.client, "tv");
}

#[test]
fn time_and_cancel_end_requests_that_wait_or_run() {
    let mut bench = Bench::new();
    for id in ["a", "b", "c"] {
        bench.chat(1, id);
    }
    bench.ask(2, "s/box/req/tv/cancel", &json!({ "id": "a" })); // another client's word
    bench.ask(3, "s/box/req/lamp/cancel", &json!({ "id": "a" }));
    assert_eq!(bench.land().1["code"], "cancelled");
    assert_eq!(bench.started.len(), 2, "the place is free again");
    bench.tick(LIMITS.deadline_ms);
    assert_eq!(
        [bench.land().1["code"].clone(), bench.land().1["code"].clone()],
        ["deadline_exceeded", "deadline_exceeded"]
    );
    assert!(bench.started.is_empty() && bench.desk.is_idle());
    // A late end of an attempt that was given up is nothing.
    let key = Key { client: "lamp".to_owned(), reply: "s/box/res/lamp/b".to_owned(), id: "b".to_owned() };
    bench.take(Input::Done { key, attempt: 2, outcome: Ok("{}".to_owned()) });
    assert!(bench.flying.is_empty());
}

#[test]
fn a_request_that_finds_no_room_in_the_engine_is_tried_again_and_a_stop_leaves_it_for_the_next_start() {
    let mut bench = Bench::new();
    bench.chat(1, "a");
    bench.finish(|_| Err(Failure::QueueFull { limit: 1, retry_after_s: 1 }.into()));
    bench.tick(999);
    assert!(bench.started.is_empty());
    bench.tick(1);
    assert_eq!(bench.started.len(), 1);
    bench.take(Input::Stop);
    bench.finish(|_| Err(Failure::ShuttingDown.into()));
    bench.tick(2000);
    assert!(bench.desk.is_idle() && bench.flying.is_empty());
    bench.chat(2, "b");
    assert_eq!(bench.acks, [1], "the broker keeps what comes after the stop");
    bench.restart();
    bench.tick(0);
    bench.finish(finale);
    assert_eq!(bench.land().1["kind"], "final");
}

#[test]
fn a_node_that_is_told_to_stop_leaves_its_pool_first_and_ends_what_it_has_of_it() {
    let mut bench = Bench::new();
    bench.ask(1, "s/pool/fleet/req/lamp/chat", &json!({ "id": "a", "body": {} }));
    let acts = bench.desk.handle(bench.now_ms, [Input::Stop]);
    let left = |act: &Act| matches!(act, Act::Unsubscribe { line: Line::Pool, filters } if !filters.is_empty());
    assert!(acts.iter().any(left), "{acts:?}");
    bench.finish(finale);
    assert_eq!(bench.land().1["kind"], "final");
    assert_eq!(bench.acks, [1]);
    // A connection that comes now is not for the pool any more.
    let up = Input::Up { line: Line::Pool, epoch: 9, window: 3, packet_bytes_max: None };
    assert_eq!(bench.desk.handle(bench.now_ms, [up]), []);
}

#[test]
fn a_full_disk_is_told_to_who_asks_and_keeps_results_until_there_is_room() {
    let mut bench = Bench::new();
    bench.chat(1, "a");
    bench.desk.ledger.break_disk();
    bench.chat(2, "b");
    let (_, refused) = bench.land();
    assert_eq!(
        (&refused["code"], &refused["id"], &refused["retry"]),
        (&json!("disk_failed"), &json!("b"), &json!(true))
    );
    bench.finish(finale);
    bench.tick(1000);
    assert!(bench.flying.is_empty(), "a result that is not on the disk could come twice");
    bench.desk.ledger.mend_disk();
    bench.tick(1000);
    assert_eq!(bench.land().1["kind"], "final");
    bench.chat(3, "b");
    assert_eq!(bench.n_started, 2);
}

#[test]
fn a_result_that_the_disk_never_took_ends_with_its_time() {
    let mut bench = Bench::new();
    bench.chat(1, "a");
    bench.desk.ledger.break_disk();
    bench.finish(finale);
    bench.tick(LIMITS.deadline_ms);
    assert_eq!(bench.land().1["kind"], "error");
}

#[test]
fn a_payload_that_is_too_large_is_refused_and_a_small_reader_gets_parts() {
    let mut bench = Bench::new();
    bench.ask(1, "s/box/req/lamp/chat", &json!({ "id": "a", "body": { "x": "y".repeat(2000) } }));
    let (topic, refused) = bench.land();
    assert_eq!((topic.as_str(), &refused["code"]), ("s/box/res/lamp/invalid", &json!("body_too_large")));
    bench.ask(2, "s/box/req/lamp/chat", &json!({ "id": "b", "body": {}, "max_bytes": 256 }));
    let text = "word ".repeat(100);
    let whole = text.clone();
    bench.finish(|request| Ok(json!({ "id": request.id, "kind": "final", "text": whole }).to_string()));
    let (mut said, mut last) = (String::new(), Value::Null);
    while !bench.flying.is_empty() {
        last = bench.land().1;
        said += last["text"].as_str().unwrap_or_default();
    }
    assert_eq!((said, &last["kind"]), (text, &json!("final")));
    assert!(last["parts"].as_u64().unwrap() > 2 && bench.desk.is_idle());
}

#[test]
fn other_settings_hold_for_what_comes_next() {
    let mut bench = Bench::new();
    let reply_to = |bench: &mut Bench, pkid: u16, id: &str| {
        let request = json!({ "id": id, "reply_to": "elsewhere/lamp", "body": { "x": 1 } });
        bench.ask(pkid, "s/box/req/lamp/chat", &request);
    };
    reply_to(&mut bench, 1, "a");
    assert_eq!(bench.n_started, 0, "a topic that answers may not go to");
    let topics = Topics::new("s", "box", Some("fleet"), &["elsewhere/{client}".to_owned()]);
    bench.take(Input::Settings { limits: Limits { per_client: 1, ..LIMITS }, topics });
    reply_to(&mut bench, 2, "b");
    bench.chat(3, "c");
    assert_eq!((bench.n_started, bench.started.len()), (1, 1), "one of a client at a time");
}

#[test]
fn a_desk_is_quiet_when_nobody_waits_and_not_before() {
    let mut bench = Bench::new();
    bench.take(Input::Tick);
    assert!(bench.desk.is_quiet());
    bench.chat(1, "a");
    assert!(!bench.desk.is_quiet());
}
