//! What one client asks has no say in what another one hears again.

use super::{Bench, LIMITS, Limits, finale};
use serde_json::{Value, json};

/// Bytes that may be held here.
const MOST: u64 = 20_000;

fn bench() -> Bench {
    Bench::with(Limits { held_bytes: MOST, per_client: 100, pending: 100, running: 100, ..LIMITS })
}

/// Bytes of all that is held, and of one client's.
fn held(bench: &Bench, client: &str) -> (u64, u64) {
    let sum = |of: &dyn Fn(&str) -> bool| {
        bench.desk.entries.iter().filter(|(key, _)| of(&key.client)).map(|(_, entry)| entry.bytes()).sum()
    };
    (sum(&|_| true), sum(&|name| name == client))
}

fn ask(bench: &mut Bench, client: &str, id: usize, bytes: usize) {
    let body = json!({ "id": id, "body": { "x": "y".repeat(bytes) } });
    bench.ask(1, &format!("s/box/req/{client}/chat"), &body);
}

/// A request and its answer of so many bytes; nothing when it was refused, and then why.
fn asked(bench: &mut Bench, client: &str, id: usize, bytes: usize) -> Option<Value> {
    ask(bench, client, id, bytes);
    if bench.started.is_empty() {
        return Some(bench.land().1["code"].clone());
    }
    let n = bench.n_started;
    bench.finish(|request| {
        let text = format!("{n}{}", "z".repeat(bytes));
        Ok(json!({ "id": request.id, "kind": "final", "text": text }).to_string())
    });
    bench.land();
    None
}

fn hears_again(bench: &mut Bench, client: &str, id: usize, bytes: usize) -> bool {
    let before = bench.n_started;
    ask(bench, client, id, bytes);
    let known = bench.n_started == before;
    if known {
        bench.land();
    } else {
        bench.started.clear();
    }
    known
}

#[test]
fn no_flood_of_another_client_takes_a_result_away() {
    let mut bench = bench();
    assert_eq!(asked(&mut bench, "lamp", 0, 10), None);
    for id in 0..100 {
        // Requests of the other one are taken on and on: its own oldest results go for them.
        assert_eq!(asked(&mut bench, "tv", id, 1000), None, "{id}");
        let (all, own) = held(&bench, "tv");
        assert!(all <= MOST && own <= MOST / 2, "{id}: {own} of {all}");
    }
    assert!(hears_again(&mut bench, "tv", 99, 1000) && hears_again(&mut bench, "lamp", 0, 10));
    assert!(!hears_again(&mut bench, "tv", 0, 1000), "its own has gone");
    // A third one has its room, and takes nobody's.
    for id in 0..20 {
        assert_eq!(asked(&mut bench, "clock", id, 500), None);
    }
    assert!(hears_again(&mut bench, "lamp", 0, 10) && hears_again(&mut bench, "clock", 19, 500));
}

#[test]
fn who_has_its_share_unanswered_is_refused_and_others_are_not() {
    let mut bench = bench();
    assert_eq!(asked(&mut bench, "tv", 100, 10), None);
    let mut n = 0;
    while bench.flying.is_empty() {
        ask(&mut bench, "tv", n, 1000);
        n += 1;
        assert!(n < 50);
    }
    let (_, refused) = bench.land();
    assert_eq!((&refused["code"], &refused["retry"]), (&json!("queue_full"), &json!(true)));
    assert!(held(&bench, "tv").1 <= MOST / 2);
    let before = bench.n_started;
    ask(&mut bench, "lamp", 0, 1000);
    assert_eq!(bench.n_started, before + 1, "the other half is for others");
    assert_eq!(bench.started.len(), n, "a refusal takes no place");
    assert!(hears_again(&mut bench, "tv", 100, 10), "what did not help was not forgotten");
}

#[test]
fn answers_that_are_larger_than_their_questions_leave_room_for_others() {
    let mut bench = bench();
    assert_eq!(asked(&mut bench, "lamp", 0, 10), None);
    for id in 0..9 {
        ask(&mut bench, "tv", id, 10);
    }
    for _ in 0..9 {
        let long = "z".repeat(5000);
        bench.finish(|request| Ok(json!({ "id": request.id, "kind": "final", "text": long }).to_string()));
        bench.land();
    }
    let (all, own) = held(&bench, "tv");
    assert!(all <= MOST && own <= MOST / 2, "{own} of {all}");
    // While the other one had more than there is, this one's result was delivered, and stays.
    ask(&mut bench, "lamp", 1, 10);
    bench.finish(finale);
    bench.land();
    assert!(hears_again(&mut bench, "lamp", 0, 10) && hears_again(&mut bench, "lamp", 1, 10));
}
