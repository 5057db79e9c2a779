//! How much is there, and who has it? The parts of the status that operators watch.

use serde_json::{Value, json};
use sparsed_engine::api::Owner;
use sparsed_engine::memory::Outlook;
use sparsed_engine::telemetry::{Decision, OwnerLoad};
use sparsed_engine::{Left, ModelStatus, Service, SessionUsage};
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

/// What all sessions take of the disk and what was written for them since the start; null where there are none.
pub(crate) fn sessions(usage: Option<SessionUsage>) -> Value {
    usage.map_or(Value::Null, |usage| {
        json!({
            "count": usage.sessions,
            "journal_bytes": usage.journal_bytes,
            "kv_bytes": usage.kv_bytes,
            "journal_bytes_written": usage.journal_bytes_written,
            "kv_bytes_written": usage.kv_bytes_written,
        })
    })
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

/// Who waits and what was decided about a model's requests, as `asker` may see it.
pub(crate) fn scheduling(service: &Service, model: &ModelStatus, asker: Owner) -> Value {
    let (board, uptime) = (&model.board, service.uptime(Instant::now()));
    let (owners, others) = owners(&board.owners, asker);
    let seen = |decision: &&Decision| decision.owner.is_none_or(|owner| sees(asker, owner));
    let decisions: Vec<Value> = board
        .decisions
        .iter()
        .filter(seen)
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
        "others": others,
        "decisions": decisions,
    })
}

/// Whether `asker` is told of `owner`'s requests: when somebody else works is that one's own business, and root's.
fn sees(asker: Owner, owner: Owner) -> bool {
    asker == Owner::Uid(0) || asker == owner
}

/// What each owner has that `asker` sees, and what the others have together.
fn owners(loads: &[OwnerLoad], asker: Owner) -> (Vec<Value>, Value) {
    let (shown, others): (Vec<&OwnerLoad>, Vec<_>) = loads.iter().partition(|load| sees(asker, load.owner));
    let row = |load: &OwnerLoad| {
        // Whom a door knows by a name has no user's number.
        let uid = match load.owner {
            Owner::Uid(uid) => Some(uid),
            Owner::Named(_) => None,
        };
        json!({ "uid": uid, "running": load.running, "waiting": load.waiting, "served_tokens": load.served })
    };
    let sum = |of: fn(&OwnerLoad) -> u64| others.iter().map(|load| of(load)).sum::<u64>();
    let others = json!({
        "running": sum(|load| load.running.into()), "waiting": sum(|load| load.waiting.into()),
        "served_tokens": sum(|load| load.served),
    });
    (shown.into_iter().map(row).collect(), others)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_user_sees_itself_and_a_sum_of_others_and_root_sees_all() {
        let load = |owner, served| OwnerLoad { owner, running: 1, waiting: 2, served };
        let loads = [load(Owner::Uid(0), 10), load(Owner::Uid(1000), 20), load(Owner::named("tcp", "bob"), 30)];
        let sum = |n: u64, served: u64| json!({ "running": n, "waiting": 2 * n, "served_tokens": served });
        let row =
            |uid: Option<u32>, served: u64| json!({ "uid": uid, "running": 1, "waiting": 2, "served_tokens": served });
        assert_eq!(owners(&loads, Owner::Uid(1000)), (vec![row(Some(1000), 20)], sum(2, 40)));
        assert_eq!(owners(&loads, Owner::named("tcp", "bob")), (vec![row(None, 30)], sum(2, 30)));
        assert_eq!(owners(&loads, Owner::Uid(1001)), (vec![], sum(3, 60)));
        let all = vec![row(Some(0), 10), row(Some(1000), 20), row(None, 30)];
        assert_eq!(owners(&loads, Owner::Uid(0)), (all, sum(0, 0)));
    }
}
