//! Which failures are results?

use super::Bench;
use crate::refusal::Refusal;
use serde_json::json;
use sparsed_engine::api::Failure;

#[test]
fn a_failure_that_may_pass_is_no_result_and_one_of_the_request_is() {
    let mut bench = Bench::new();
    bench.chat(1, "a");
    bench.finish(|_| Err(Failure::BackendFailed { reason: "x".to_owned() }.into()));
    assert_eq!(bench.land().1["retry"], true);
    bench.chat(2, "a");
    assert_eq!(bench.n_started, 2);
    bench.finish(|_| Err(Refusal::invalid("messages", "is empty")));
    assert_eq!(bench.land().1["retry"], false);
    bench.chat(3, "a");
    assert_eq!((bench.land().1["code"].clone(), bench.n_started), (json!("invalid_value"), 2));
}

#[test]
fn who_finds_a_session_busy_asks_again_and_who_has_all_that_it_may_have_need_not() {
    let mut bench = Bench::new();
    let mut told = |pkid, failure: Failure| {
        bench.chat(pkid, "a");
        bench.finish(|_| Err(failure.into()));
        let said = bench.land().1;
        (said["code"].clone(), said["retry"].clone())
    };
    let busy = Failure::SessionBusy { id: "sess_1".to_owned(), state: "answering" };
    assert_eq!(told(1, busy), (json!("session_busy"), json!(true)));
    // So the same id is computed now.
    assert_eq!(told(2, Failure::SessionLimit { what: "sessions", limit: 3 }), (json!("session_limit"), json!(false)));
    bench.chat(3, "a");
    assert_eq!((bench.land().1["code"].clone(), bench.n_started), (json!("session_limit"), 2));
}
