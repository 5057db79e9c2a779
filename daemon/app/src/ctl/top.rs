//! `sparsectl top`: who is served how fast, where the memory goes, and what was decided about it.

use super::client::{Address, soon};
use super::word;
use serde_json::Value;
use std::fmt::Write;
use std::time::{Duration, Instant};

/// Time between two pictures.
const PAUSE: Duration = Duration::from_secs(1);
/// Cursor to the first place, and everything behind it away.
const CLEAR: &str = "\x1b[H\x1b[2J";
/// Decisions that are shown.
const DECISIONS: usize = 6;

/// Watch the daemon at work.
#[derive(Debug, clap::Args)]
pub(super) struct Top {
    #[command(flatten)]
    address: Address,
    /// Show one picture, of one second, and end.
    #[arg(long)]
    once: bool,
}

impl Top {
    pub(super) fn run(self) -> anyhow::Result<()> {
        let client = self.address.client();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let look = || runtime.block_on(soon(client.get("/v1/status")));
        let (mut before, mut at) = (look()?, Instant::now());
        loop {
            std::thread::sleep(PAUSE);
            let (now, seconds) = (look()?, at.elapsed().as_secs_f64());
            at = Instant::now();
            let picture = picture(&before, &now, seconds);
            if self.once {
                return super::print(picture.trim_end());
            }
            super::print(&format!("{CLEAR}{picture}"))?;
            before = now;
        }
    }
}

/// What happened between two looks, `seconds` apart.
fn picture(before: &Value, now: &Value, seconds: f64) -> String {
    let mut text = String::new();
    let device = &now["device"];
    line(
        &mut text,
        format!("device {}: {}, {} faults", word(&device["name"]), word(&device["state"]), device["faults"]),
    );
    text += &memory(&now["memory"]);
    text += &sessions(&before["sessions"], &now["sessions"], seconds);
    for model in list(&now["models"]) {
        let earlier = list(&before["models"]).find(|other| other["name"] == model["name"]);
        text += &served(model, earlier, seconds);
    }
    text
}

fn memory(memory: &Value) -> String {
    let mut text = String::new();
    let limits = memory["limits"].as_object().into_iter().flatten();
    let limits: Vec<String> = limits.map(|(name, bytes)| format!("{name} {}", mib(bytes))).collect();
    line(
        &mut text,
        format!(
            "memory: pressure {}, headroom {}; {} binds of {}",
            word(&memory["pressure"]),
            mib(&memory["headroom_bytes"]),
            word(&memory["binds"]),
            limits.join(", "),
        ),
    );
    let parts = ["weights_bytes", "workspace_bytes", "kv_bytes"].map(|part| mib(&memory[part]));
    line(&mut text, format!("  weights {}, workspace {}, KV caches {}", parts[0], parts[1], parts[2]));
    text
}

/// What sessions have on the disk, and how fast it is written.
fn sessions(before: &Value, now: &Value, seconds: f64) -> String {
    let mut text = String::new();
    if now.is_null() {
        return text;
    }
    let rate = |key: &str| {
        let written = |sessions: &Value| sessions[key].as_f64().unwrap_or(0.0);
        (written(now) - written(before)) / seconds.max(1e-3) / 1024.0
    };
    line(
        &mut text,
        format!(
            "sessions: {}; journals {}, {:.0} KiB/s written, {} in all; KV files {}, {:.0} KiB/s written, {} in all",
            now["count"],
            mib(&now["journal_bytes"]),
            rate("journal_bytes_written"),
            mib(&now["journal_bytes_written"]),
            mib(&now["kv_bytes"]),
            rate("kv_bytes_written"),
            mib(&now["kv_bytes_written"]),
        ),
    );
    text
}

fn served(model: &Value, earlier: Option<&Value>, seconds: f64) -> String {
    let mut text = String::new();
    let scheduling = &model["scheduling"];
    let rate = |key: &str| {
        let count = |model: &Value| model[key].as_f64().unwrap_or(0.0);
        earlier.map_or(0.0, |earlier| (count(model) - count(earlier)) / seconds.max(1e-3))
    };
    line(&mut text, format!("{} ({})", word(&model["name"]), word(&model["state"])));
    line(
        &mut text,
        format!(
            "  {:.1} tokens/s computed, {:.1} answered; {} running of {}, {} waiting; {} preempted",
            rate("computed_tokens"),
            rate("sampled_tokens"),
            model["running"],
            scheduling["running_max"],
            model["waiting"],
            scheduling["preemptions"],
        ),
    );
    line(
        &mut text,
        format!(
            "  KV blocks: {} held, {} cached, {} slow, {} allowed of {}; stage {}; {} prompt tokens a step",
            model["kv_blocks_used"],
            model["kv_blocks_cached"],
            model["kv_blocks_slow"],
            scheduling["kv_blocks_max"],
            model["kv_blocks_total"],
            word(&scheduling["stage"]),
            scheduling["prefill_chunk_tokens"],
        ),
    );
    for owner in list(&scheduling["owners"]) {
        let (uid, running, waiting) = (&owner["uid"], &owner["running"], &owner["waiting"]);
        line(
            &mut text,
            format!("  uid {uid}: {running} running, {waiting} waiting, {} tokens", owner["served_tokens"]),
        );
    }
    let others = &scheduling["others"];
    if ["running", "waiting", "served_tokens"].iter().any(|name| others[name].as_u64().unwrap_or(0) > 0) {
        let (running, waiting) = (&others["running"], &others["waiting"]);
        let tokens = &others["served_tokens"];
        line(&mut text, format!("  others: {running} running, {waiting} waiting, {tokens} tokens"));
    }
    let decisions: Vec<&Value> = list(&scheduling["decisions"]).collect();
    for decision in decisions.iter().rev().take(DECISIONS) {
        let (age, what) = (&decision["seconds_ago"], word(&decision["decision"]));
        line(&mut text, format!("  {age} s ago: {what}: {}", word(&decision["reason"])));
    }
    text
}

fn line(text: &mut String, line: String) {
    writeln!(text, "{line}").expect("writing to a String cannot fail");
}

fn list(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

/// Bytes in MiB; `-` where there is no number.
fn mib(bytes: &Value) -> String {
    bytes.as_i64().map_or_else(|| "-".to_owned(), |bytes| format!("{} MiB", bytes >> 20))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_picture_says_rates_owners_limits_and_decisions() {
        let status = |computed: u64| {
            json!({
                "device": { "name": "cpu", "state": "ready", "faults": 0 },
                "memory": { "limits": { "machine": 10 << 20, "config": 5 << 20 }, "binds": "config", "pressure": "some",
                    "headroom_bytes": -(3 << 20), "weights_bytes": 1 << 20, "workspace_bytes": null, "kv_bytes": 2 << 20 },
                "sessions": { "count": 5, "journal_bytes": 1 << 20, "journal_bytes_written": 3 << 20,
                    "kv_bytes": 7 << 20, "kv_bytes_written": (8 << 20) + 4096 * computed },
                "models": [{ "name": "m", "state": "ready", "running": 1, "waiting": 2, "computed_tokens": computed,
                    "sampled_tokens": 4, "kv_blocks_used": 3, "kv_blocks_cached": 1, "kv_blocks_slow": 0,
                    "kv_blocks_total": 9, "scheduling": { "stage": "hold", "kv_blocks_max": 5, "running_max": 4,
                        "prefill_chunk_tokens": 64, "preemptions": 7,
                        "owners": [{ "uid": 1000, "running": 1, "waiting": 2, "served_tokens": 50 }],
                        "others": { "running": 3, "waiting": 0, "served_tokens": 70 },
                        "decisions": [{ "seconds_ago": 3, "decision": "climb", "reason": "pressure is some" }] } }],
            })
        };
        let text = picture(&status(100), &status(150), 2.0);
        for part in [
            "25.0 tokens/s computed, 0.0 answered; 1 running of 4, 2 waiting; 7 preempted",
            "pressure some, headroom -3 MiB; config binds of machine 10 MiB, config 5 MiB",
            "weights 1 MiB, workspace -, KV caches 2 MiB",
            "3 held, 1 cached, 0 slow, 5 allowed of 9; stage hold; 64 prompt tokens a step",
            "sessions: 5; journals 1 MiB, 0 KiB/s written, 3 MiB in all; KV files 7 MiB, 100 KiB/s written, 8 MiB in all",
            "uid 1000: 1 running, 2 waiting, 50 tokens",
            "others: 3 running, 0 waiting, 70 tokens",
            "3 s ago: climb: pressure is some",
        ] {
            assert!(text.contains(part), "no '{part}' in:\n{text}");
        }
    }
}
