//! How much is there, and who has it? The parts of the status that operators watch.

use serde_json::{Value, json};
use sparsed_engine::api::Owner;
use sparsed_engine::memory::Outlook;
use sparsed_engine::{Left, ModelStatus, Service};
use std::time::{Duration, Instant};

/// What memory there is and which limit binds.
pub(crate) fn memory(service: &Service) -> Value {
    let (budget, outlook) = (service.budget(), service.outlook());
    let limits: serde_json::Map<String, Value> =
        budget.bounds.iter().map(|bound| (bound.limit.name().to_owned(), json!(bound.bytes))).collect();
    // Where nothing limits the memory, or nobody has looked yet, there is no number.
    let is_known = outlook.number > 0 && outlook.headroom_bytes < i64::MAX;
    json!({
        "limits": limits,
        "binds": budget.tightest().map(|bound| bound.limit.name()),
        "weights_bytes": budget.weights_bytes,
        "workspace_bytes": budget.workspace_bytes,
        "kv_bytes": budget.for_kv(),
        "kv_bytes_configured": budget.kv_bytes,
        "pressure": outlook.pressure.name(),
        "headroom_bytes": is_known.then_some(outlook.headroom_bytes),
    })
}

/// Bytes that may be taken yet. Nothing where nothing limits the memory, or nobody has looked yet.
pub(crate) fn headroom(outlook: &Outlook) -> Option<u64> {
    let is_known = outlook.number > 0 && outlook.headroom_bytes < i64::MAX;
    is_known.then(|| u64::try_from(outlook.headroom_bytes).unwrap_or(0))
}

/// What keeps a model in memory, and how often it came and went.
pub(crate) fn keeping(service: &Service, model: &ModelStatus) -> Value {
    let keeping = &model.keeping;
    let left: serde_json::Map<String, Value> =
        Left::ALL.iter().zip(keeping.n_left).map(|(why, n)| (why.name().to_owned(), json!(n))).collect();
    json!({
        "load": if keeping.at_start { "start" } else { "demand" },
        "leases": keeping.n_leases,
        "keep_alive_s": keeping.keep_alive.map(|time| time.as_secs_f64()),
        "unloads_in_s": leaves_in(service, model).map(|time| time.as_secs_f64()),
        "loads": keeping.n_loads,
        "unloads": left,
    })
}

/// How long a model that nobody needs stays; `None` when it is needed, or does not go.
pub(crate) fn leaves_in(service: &Service, model: &ModelStatus) -> Option<Duration> {
    Some(model.keeping.expires?.saturating_sub(service.uptime(Instant::now())))
}

/// Who waits and what was decided about a model's requests.
pub(crate) fn scheduling(service: &Service, model: &ModelStatus) -> Value {
    let (board, uptime) = (&model.board, service.uptime(Instant::now()));
    let owners: Vec<Value> = board
        .owners
        .iter()
        .map(|load| {
            // Whom a door knows by a name has no user's number.
            let uid = match load.owner {
                Owner::Uid(uid) => Some(uid),
                Owner::Named(_) => None,
            };
            json!({ "uid": uid, "running": load.running, "waiting": load.waiting, "served_tokens": load.served })
        })
        .collect();
    let decisions: Vec<Value> = board
        .decisions
        .iter()
        .map(|decision| {
            let age = uptime.saturating_sub(decision.at).as_secs();
            json!({ "seconds_ago": age, "decision": decision.what.name(), "reason": decision.reason })
        })
        .collect();
    json!({
        "stage": board.stage.name(),
        "kv_blocks_max": board.blocks_max,
        "running_max": board.running_max,
        "prefill_chunk_tokens": board.chunk_tokens,
        "tokens_per_second": board.tokens_per_s,
        "preemptions": model.stats.tally.preempted,
        "owners": owners,
        "decisions": decisions,
    })
}
