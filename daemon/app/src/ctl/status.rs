//! `sparsectl status` and `sparsectl models`: what the daemon does and serves.

use super::client::{Address, soon};
use super::word;
use crate::config::AUTO;
use anyhow::ensure;
use serde_json::Value;
use std::fmt::Write;

/// Show what the daemon is doing.
#[derive(Debug, clap::Args)]
pub(super) struct Status {
    #[command(flatten)]
    daemon: Daemon,
    /// Fail unless the default model answers, for scripts that wait for it.
    #[arg(long)]
    ready: bool,
}

/// List the models that the daemon is configured to serve; `model list` lists the store.
#[derive(Debug, clap::Args)]
pub(super) struct Models {
    #[command(flatten)]
    daemon: Daemon,
}

#[derive(Debug, clap::Args)]
struct Daemon {
    #[command(flatten)]
    address: Address,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

impl Status {
    pub(super) fn run(self) -> anyhow::Result<()> {
        if self.ready {
            let health = self.daemon.get("/health")?;
            let answers = ["ok", "degraded"].contains(&word(&health["status"]));
            ensure!(answers, "the default model is {}", word(&health["status"]));
        }
        self.daemon.show(|status| status.clone(), status_text)
    }
}

impl Models {
    pub(super) fn run(self) -> anyhow::Result<()> {
        self.daemon.show(|status| status["models"].clone(), models_text)
    }
}

impl Daemon {
    fn show(&self, part: fn(&Value) -> Value, text: fn(&Value, &str) -> String) -> anyhow::Result<()> {
        let status = self.get("/v1/status")?;
        if self.json {
            return super::print_json(&part(&status));
        }
        super::print(&text(&status, &self.address.to_string()))
    }

    fn get(&self, path: &str) -> anyhow::Result<Value> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(soon(self.address.client().get(path)))
    }
}

fn status_text(status: &Value, socket: &str) -> String {
    let mut text = format!("sparsed {} (pid {}) on {socket}\n", word(&status["version"]), status["pid"]);
    text += &device(&status["device"]);
    text += &memory(&status["memory"]);
    for model in status["models"].as_array().into_iter().flatten() {
        let (used, total) = (&model["kv_blocks_used"], &model["kv_blocks_total"]);
        let (name, running, waiting) = (word(&model["name"]), &model["running"], &model["waiting"]);
        let line = format!("  {name:<16} {}; {running} running, {waiting} waiting; ", state(model));
        text += &line;
        let (computed, sampled) = (&model["computed_tokens"], &model["sampled_tokens"]);
        text += &match model["upstream"] == true {
            true => {
                format!("computed by {}; {sampled} tokens came from there\n", word(&model["detail"]["meta"]["address"]))
            }
            false => format!("{used} of {total} KV blocks; {computed} tokens computed, {sampled} sampled\n"),
        };
    }
    let third_party = status["third_party_plugins"].as_array().into_iter().flatten();
    let third_party: Vec<&str> = third_party.map(word).collect();
    if !third_party.is_empty() {
        text += &format!("  tainted by third-party plugins: {}\n", third_party.join(", "));
    }
    text.trim_end().to_owned()
}

/// A line about the device, if there is something to say.
fn device(device: &Value) -> String {
    let changed = if device["backend_changed"] == true { ", which took over" } else { "" };
    let (fault, chosen) = (device["last_fault"].as_str(), device["chosen"].as_str());
    if fault.is_none() && chosen.is_none() {
        return String::new();
    }
    let fault = fault.map_or_else(String::new, |fault| format!("; last fault: {fault}"));
    let chosen = chosen.map_or_else(String::new, |why| format!("; by engine.plugin = \"{AUTO}\": {why}"));
    format!("  device {}{changed}: {}{fault}{chosen}\n", word(&device["name"]), word(&device["state"]))
}

/// A line for each part of the budget's reckoning.
fn memory(memory: &Value) -> String {
    let Some(limits) = memory["limits"].as_object() else { return String::new() };
    let mib = |bytes: &Value| bytes.as_i64().map_or_else(|| "-".to_owned(), |bytes| format!("{} MiB", bytes >> 20));
    let binding = word(&memory["binds"]);
    let limit = |(name, bytes): (&String, &Value)| {
        let binds = if name == binding { " (binds)" } else { "" };
        format!("{name} {}{binds}", mib(bytes))
    };
    format!(
        "  memory: {}; weights {}, workspace {}, KV caches {}; headroom {}, pressure {}\n",
        limits.iter().map(limit).collect::<Vec<_>>().join(", "),
        mib(&memory["weights_bytes"]),
        mib(&memory["workspace_bytes"]),
        mib(&memory["kv_bytes"]),
        mib(&memory["headroom_bytes"]),
        word(&memory["pressure"]),
    )
}

fn models_text(status: &Value, _socket: &str) -> String {
    let mut text =
        format!("{:<16} {:<24} {:>8} {:>10} {:>8} {:>9}\n", "NAME", "STATE", "CONTEXT", "SIZE", "TOP_K", "KV/TOKEN");
    for model in status["models"].as_array().into_iter().flatten() {
        let meta = &model["detail"]["meta"];
        let label = meta["label"].as_str().map_or(String::new(), |label| format!("  ({label})"));
        let (context, stateless) = (&model["detail"]["max_context"], &model["detail"]["stateless_context"]);
        let shorter = stateless.as_u64().filter(|_| stateless != context);
        let shorter = shorter.map_or(String::new(), |n| format!("  (context {n} without a session)"));
        let size = meta["size"].as_u64().map_or_else(|| "-".to_owned(), |bytes| format!("{} MB", bytes / 1_000_000));
        let written = writeln!(
            text,
            "{:<16} {:<24} {:>8} {:>10} {:>8} {:>9}{shorter}{label}",
            word(&model["name"]),
            state(model),
            super::number(context),
            size,
            super::number(&meta["top_k"]),
            super::number(&meta["kv_bytes_per_token"]),
        );
        written.expect("writing to a String cannot fail");
    }
    text.trim_end().to_owned()
}

fn state(model: &Value) -> String {
    let detail = &model["detail"];
    match word(&model["state"]) {
        "loading" => format!("loading {} %", detail["progress_permille"].as_u64().unwrap_or(0) / 10),
        "failed" => format!("failed: {}", word(&detail["reason"])),
        "unreachable" => format!("unreachable: {}", word(&detail["reason"])),
        other => other.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn states_are_told_in_words() {
        let loading = json!({ "state": "loading", "detail": { "progress_permille": 345 } });
        assert_eq!(state(&loading), "loading 34 %");
        let failed = json!({ "state": "failed", "detail": { "reason": "no file" } });
        assert_eq!(state(&failed), "failed: no file");
        let gone = json!({ "state": "unreachable", "detail": { "reason": "refused" } });
        assert_eq!(state(&gone), "unreachable: refused");
    }

    #[test]
    fn a_device_is_told_of_once_it_has_failed() {
        let mut status = json!({ "name": "cpu", "state": "ready", "last_fault": null, "backend_changed": false });
        assert_eq!(device(&status), "");
        status["last_fault"] = json!("gone");
        status["backend_changed"] = json!(true);
        assert_eq!(device(&status), "  device cpu, which took over: ready; last fault: gone\n");
    }

    #[test]
    fn a_device_that_nobody_has_named_is_told_with_what_speaks_for_it() {
        let status = json!({ "name": "cuda", "state": "ready", "chosen": "its device X has passed its test" });
        let line = "  device cuda: ready; by engine.plugin = \"auto\": its device X has passed its test\n";
        assert_eq!(device(&status), line);
    }

    #[test]
    fn the_limit_that_binds_is_marked() {
        let status = json!({ "limits": { "config": 9 << 20, "cgroup_max": 5 << 20 }, "binds": "cgroup_max",
            "weights_bytes": 1 << 20, "workspace_bytes": 0, "kv_bytes": 4 << 20, "headroom_bytes": null,
            "pressure": "none" });
        let text = memory(&status);
        assert!(text.contains("config 9 MiB, cgroup_max 5 MiB (binds); weights 1 MiB"), "{text}");
        assert!(text.contains("KV caches 4 MiB; headroom -, pressure none"), "{text}");
    }

    #[test]
    fn a_tainted_daemon_says_by_what() {
        let mut status = json!({ "version": "1", "pid": 7, "third_party_plugins": [], "models": [] });
        assert_eq!(status_text(&status, "/s"), "sparsed 1 (pid 7) on /s");
        status["third_party_plugins"] = json!(["acme 2.0"]);
        assert!(status_text(&status, "/s").ends_with("\n  tainted by third-party plugins: acme 2.0"));
    }

    #[test]
    fn the_list_says_where_requests_without_a_session_have_a_shorter_context() {
        let row = |stateless: u32| {
            let detail = json!({ "max_context": 8192, "stateless_context": stateless, "meta": {} });
            let text = models_text(&json!({ "models": [{ "name": "a", "state": "ready", "detail": detail }] }), "");
            text.lines().nth(1).unwrap().to_owned()
        };
        assert!(row(4096).ends_with("(context 4096 without a session)"), "{}", row(4096));
        assert!(!row(8192).contains("session"), "{}", row(8192));
    }

    #[test]
    fn a_dense_model_says_so_in_the_list() {
        let meta =
            json!({ "label": "dense: no indexer", "size": 98_000_000, "kv_bytes_per_token": 11520, "top_k": null });
        let model = json!({ "name": "a", "state": "ready", "detail": { "max_context": 8192, "meta": meta } });
        let text = models_text(&json!({ "models": [model] }), "");
        let row = text.lines().nth(1).unwrap();
        assert_eq!(
            row.split_whitespace().collect::<Vec<_>>(),
            ["a", "ready", "8192", "98", "MB", "-", "11520", "(dense:", "no", "indexer)"]
        );
    }
}
