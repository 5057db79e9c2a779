//! What does a new configuration change, and what of it can a running daemon take up?

use super::Config;
use std::fmt;

/// Keys that take hold while the daemon runs; all others wait for its next start.
const LIVE: &[&str] = &[
    "limits.max_waiting",
    "limits.per_user_kv",
    "limits.per_user_queued_tokens",
    "limits.per_user_running",
    "limits.per_user_waiting",
    "limits.slow_consumer_s",
    "limits.tpot_target_ms",
    "log.level",
    "memory.budget",
    "memory.total",
    "mqtt.deadline_s",
    "mqtt.inbox",
    "mqtt.keep_s",
    "mqtt.pending",
    "mqtt.per_client",
    "mqtt.reply_topics",
    "mqtt.running",
    "sessions.context_full",
    "sessions.durability",
    "sessions.journals",
    "sessions.journals_per_user",
    "sessions.kv",
    "sessions.kv_per_user",
    "sessions.max",
    "sessions.max_per_user",
    "sessions.retention_days",
    "tcp.keys",
];

/// A key that says something else than before.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Difference {
    /// Dotted, as in a file.
    key: String,
    /// As TOML; `None`: it was not set.
    before: Option<String>,
    /// As TOML; `None`: it is not set any more.
    after: Option<String>,
}

impl Difference {
    /// Whether a running daemon takes it up.
    pub fn is_live(&self) -> bool {
        LIVE.contains(&self.key.as_str())
    }

    /// The key, dotted.
    pub fn key(&self) -> &str {
        &self.key
    }
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let is_private = super::is_private(&self.key);
        let value = |value: &Option<String>| match value {
            None => "not set".to_owned(),
            Some(_) if is_private => "(not shown)".to_owned(),
            Some(value) => value.clone(),
        };
        write!(f, "{} = {} (was {})", self.key, value(&self.after), value(&self.before))
    }
}

impl Config {
    /// The keys that `next` changes, in order.
    pub fn differences(&self, next: &Self) -> Vec<Difference> {
        let (before, after) = (self.values(), next.values());
        let mut keys: Vec<&String> = before.iter().chain(&after).map(|(key, _)| key).collect();
        keys.sort();
        keys.dedup();
        let value = |values: &[(String, String)], key: &str| {
            values.iter().find(|(known, _)| known == key).map(|(_, value)| value.clone())
        };
        let difference =
            |key: &String| Difference { key: key.clone(), before: value(&before, key), after: value(&after, key) };
        keys.into_iter().map(difference).filter(|difference| difference.before != difference.after).collect()
    }

    /// What runs once the daemon has taken up all of `next` that it can.
    pub fn adopting(&self, next: &Self) -> Self {
        let mut config = self.clone();
        let Self { limits, log, memory, mqtt, sessions, tcp, .. } = next.clone();
        let held = &mut config.limits;
        held.max_waiting = limits.max_waiting;
        held.per_user_kv = limits.per_user_kv;
        held.per_user_queued_tokens = limits.per_user_queued_tokens;
        held.per_user_running = limits.per_user_running;
        held.per_user_waiting = limits.per_user_waiting;
        held.slow_consumer_s = limits.slow_consumer_s;
        held.tpot_target_ms = limits.tpot_target_ms;
        config.log = log;
        (config.memory.budget, config.memory.total) = (memory.budget, memory.total);
        let held = &mut config.mqtt;
        (held.deadline_s, held.keep_s, held.inbox) = (mqtt.deadline_s, mqtt.keep_s, mqtt.inbox);
        (held.pending, held.per_client, held.running) = (mqtt.pending, mqtt.per_client, mqtt.running);
        held.reply_topics = mqtt.reply_topics;
        let (enabled, background) = (config.sessions.enabled, config.sessions.background);
        config.sessions = super::Sessions { enabled, background, ..sessions };
        config.tcp.keys = tcp.keys;
        config
    }

    /// All keys that are set, dotted and in order, and their values as TOML.
    fn values(&self) -> Vec<(String, String)> {
        let mut values = Vec::new();
        let table = toml::Table::try_from(self).expect("a configuration is a table");
        super::flatten(&table, &mut Vec::new(), &mut |key, value| values.push((key.to_owned(), value.to_string())));
        values
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::check;

    #[test]
    fn a_difference_says_what_was_and_what_is() {
        let before = Config::of(&["limits.max_waiting=9", "memory.budget=1GiB", "model.\"a b\".path=/x"]);
        let after = Config::of(&["limits.max_waiting=8", "engine.threads=2", "model.\"a b\".path=/y"]);
        let said: Vec<String> = before.differences(&after).iter().map(ToString::to_string).collect();
        let expected = [
            "engine.threads = 2 (was 0)",
            "limits.max_waiting = 8 (was 9)",
            "memory.budget = not set (was 1073741824)",
            "model.\"a b\".path = \"/y\" (was \"/x\")",
        ];
        assert_eq!(said, expected);
        let live: Vec<bool> = before.differences(&after).iter().map(Difference::is_live).collect();
        assert_eq!(live, [false, true, true, false]);
    }

    #[test]
    fn a_difference_of_what_may_be_secret_does_not_say_it() {
        let before = Config::of(&["engine.set.\"a b\"=hunter1", "mqtt.username=hunter2"]);
        let after = Config::of(&["engine.set.\"a b\"=hunter3"]);
        let said: Vec<String> = before.differences(&after).iter().map(ToString::to_string).collect();
        let expected =
            ["engine.set.\"a b\" = (not shown) (was (not shown))", "mqtt.username = not set (was (not shown))"];
        assert_eq!(said, expected);
    }

    /// What is said to be taken up is what is taken up, for every key.
    #[test]
    fn what_is_adopted_is_what_is_live() {
        assert!(LIVE.iter().all(|key| check::KEYS.contains(key)), "a live key that is none");
        let other = |key: &str| match key {
            "dbus.bus" => "off",
            "engine.isolation" => "process",
            "memory.slow_tier" => "all",
            "log.level" => "warn",
            "sessions.context_full" => "truncate-oldest",
            "sessions.durability" => "token",
            "mqtt.reply_topics" => "[\"x/#\"]",
            "engine.spare_devices" => "[1]",
            "models.dir" | "models.ca_file" => "/x",
            "models.hub" => "https://x",
            "mqtt.broker" => "mqtt://localhost",
            "tcp.listen" => "127.0.0.1:1",
            "mqtt.allow_insecure" => "true",
            "engine.failover" | "sessions.enabled" => "false",
            "engine.retry.backoff_ms" => "[7]",
            "memory.hot_share" => "0.5",
            "plugins.strikes" => "2",
            "plugins.quarantine_ms" => "7200000",
            "plugins.quarantine_max_ms" => "90000000",
            "limits.max_batched_tokens" => "300",
            "mqtt.payload" | "limits.body" | "mqtt.inbox" | "sessions.kv" | "sessions.kv_per_user" => "1234567",
            "memory.budget" | "memory.total" | "sessions.journals" | "sessions.journals_per_user" => "1234567",
            "state_dir" | "socket.path" | "plugins.dir" | "engine.plugin" | "tcp.keys" => "x",
            "mqtt.node" | "mqtt.pool" | "mqtt.client_id" | "mqtt.username" | "mqtt.root" => "x",
            "mqtt.password_file" | "mqtt.ca_file" => "x",
            key if key.ends_with("_ms") || key.ends_with("_s") => "7",
            _ => "17",
        };
        // Certificate and key are right together only, and models have names.
        let alone = |key: &&&str| !key.contains('*') && !matches!(**key, "mqtt.cert_file" | "mqtt.key_file");
        for key in check::KEYS.iter().filter(alone) {
            let next = Config::of(&[&format!("{key}={}", other(key))]);
            let before = Config::default();
            let differences = before.differences(&next);
            assert_eq!(differences.len(), 1, "{key}: {differences:?}");
            let left = before.adopting(&next).differences(&next);
            assert_eq!(left.is_empty(), differences[0].is_live(), "{key}: {left:?}");
        }
    }

    /// The commented file lists what holds at once, a table on each line.
    #[test]
    fn what_is_live_is_what_the_example_says() {
        let text = include_str!("../../../../packaging/config.toml");
        let lines = text.lines().take_while(|line| line.starts_with('#')).filter_map(|line| line.strip_prefix("#   ["));
        let tables = lines.map(|line| line.split_once("] ").expect("a table and its keys"));
        let mut said: Vec<String> =
            tables.flat_map(|(table, keys)| keys.split(", ").map(move |key| format!("{table}.{key}"))).collect();
        said.sort();
        assert_eq!(said, LIVE);
    }
}
