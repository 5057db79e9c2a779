//! The promise under a random row of lost connections and deaths.

use super::{Bench, LIMITS, Limits, finale};
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};

/// Clients that ask again until they have heard, a broker that loses connections, a daemon that dies at any moment:
/// each request has one result, the same each time, and in the end all have one.
#[test]
fn the_promise_holds_through_any_row_of_misfortunes() {
    for seed in 0..6 {
        let limits = Limits { per_client: 1000, pending: 1000, deadline_ms: 1 << 40, keep_ms: 1 << 40, ..LIMITS };
        let (mut bench, mut random) = (Bench::with(limits), fastrand::Rng::with_seed(seed));
        let (mut n_computed, mut n_asked) = (0, 0);
        let mut waiting = BTreeSet::new();
        let mut heard = BTreeMap::<String, Value>::new();
        for round in 0..600 {
            let is_calm = round >= 400;
            match random.u8(0..if is_calm { 6 } else { 9 }) {
                0 if !is_calm => {
                    n_asked += 1;
                    waiting.insert(format!("q{n_asked}"));
                }
                0 | 1 => {
                    let all: Vec<String> = waiting.iter().chain(heard.keys()).cloned().collect();
                    if let Some(id) = random.choice(&all) {
                        bench.chat(random.u16(1..), id);
                    }
                }
                2 | 3 if !bench.started.is_empty() => {
                    n_computed += 1;
                    let n = n_computed;
                    // Each computation says something else, so that two results of one request would show.
                    bench.finish(|request| Ok(json!({ "id": request.id, "kind": "final", "text": n }).to_string()));
                }
                4 | 5 if !bench.flying.is_empty() => {
                    let at = random.usize(..bench.flying.len());
                    bench.flying.swap(0, at);
                    let (_, payload) = bench.land();
                    let id = payload["id"].as_str().unwrap().to_owned();
                    waiting.remove(&id);
                    let before = heard.entry(id).or_insert_with(|| payload.clone());
                    assert_eq!(*before, payload, "seed {seed}: two results of one request");
                }
                6 => {
                    bench.down();
                    bench.up();
                }
                7 => bench.restart(),
                _ => bench.tick(100),
            }
        }
        for _ in 0..10 {
            for id in waiting.clone() {
                bench.chat(1, &id);
            }
            while !bench.started.is_empty() {
                bench.finish(finale);
            }
            while !bench.flying.is_empty() {
                waiting.remove(bench.land().1["id"].as_str().unwrap());
            }
            bench.tick(100);
        }
        assert!(waiting.is_empty() && n_asked > 20, "seed {seed}: {waiting:?} of {n_asked} were never answered");
    }
}
