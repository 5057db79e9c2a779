//! What comes on a topic of requests and is none.

use super::{Ack, Bench, Input, Line, Publish};

#[test]
fn an_empty_payload_is_no_request_unless_somebody_waits_for_the_answer() {
    let mut bench = Bench::new();
    let publish = Publish { topic: "s/box/req/lamp/chat".to_owned(), ..Publish::default() };
    let ack = |pkid| Some(Ack { line: Line::Node, epoch: 1, pkid });
    bench.take(Input::Publish { line: Line::Node, ack: ack(1), publish: publish.clone() });
    assert_eq!((bench.acks.as_slice(), bench.flying.len()), (&[1][..], 0));
    let asked = Publish { response_topic: Some("s/reply/lamp".to_owned()), ..publish };
    bench.take(Input::Publish { line: Line::Node, ack: ack(2), publish: asked });
    assert_eq!(bench.land().1["code"], "invalid_json");
}

#[test]
fn a_message_whose_time_is_over_when_it_comes_is_not_computed() {
    let mut bench = Bench::new();
    let publish = Publish {
        topic: "s/box/req/lamp/chat".to_owned(),
        payload: br#"{"id": "a", "body": {}}"#.to_vec(),
        expiry_s: Some(0),
        ..Publish::default()
    };
    bench.take(Input::Publish { line: Line::Node, ack: Some(Ack { line: Line::Node, epoch: 1, pkid: 1 }), publish });
    let (_, refused) = bench.land();
    assert_eq!((&refused["code"], &refused["retry"]), (&"deadline_exceeded".into(), &true.into()));
    assert_eq!((bench.n_started, bench.acks.as_slice()), (0, &[1][..]));
}
