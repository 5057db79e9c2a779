//! Is every key known? Answers with the line and the nearest known key.

use super::{Config, ConfigError, dotted};
use std::path::Path;
use toml::de::{DeTable, DeValue};

/// Every key; `*` stands for a name that the operator chooses, a last `*` for any value below.
pub(super) const KEYS: &[&str] = &[
    "dbus.bus",
    "engine.device",
    "engine.device_memory",
    "engine.failover",
    "engine.isolation",
    "engine.plugin",
    "engine.retry.backoff_ms",
    "engine.retry.forget_ms",
    "engine.set.*",
    "engine.spare_devices",
    "engine.step_timeout_ms",
    "engine.threads",
    "engine.watchdog_ms",
    "limits.body",
    "limits.connections",
    "limits.load_wait_s",
    "limits.max_batched_tokens",
    "limits.max_running",
    "limits.max_waiting",
    "limits.per_user_connections",
    "limits.per_user_kv",
    "limits.per_user_queued_tokens",
    "limits.per_user_requests",
    "limits.per_user_running",
    "limits.per_user_waiting",
    "limits.slow_consumer_s",
    "limits.stop_s",
    "limits.tpot_target_ms",
    "log.level",
    "memory.budget",
    "memory.hot_share",
    "memory.slow_tier",
    "memory.total",
    "model.*.activations",
    "model.*.aliases",
    "model.*.index_dtype",
    "model.*.keep_alive",
    "model.*.kv_dtype",
    "model.*.load",
    "model.*.max_context",
    "model.*.path",
    "model.*.relay.allow_insecure",
    "model.*.relay.ca_file",
    "model.*.relay.connect_ms",
    "model.*.relay.first_token_s",
    "model.*.relay.idle_s",
    "model.*.relay.key_file",
    "model.*.relay.model",
    "model.*.relay.priority",
    "model.*.relay.retries",
    "model.*.relay.running",
    "model.*.relay.waiting",
    "model.*.top_k",
    "model.*.upstream",
    "models.ca_file",
    "models.dir",
    "models.hub",
    "models.max_bytes",
    "mqtt.allow_insecure",
    "mqtt.broker",
    "mqtt.ca_file",
    "mqtt.cert_file",
    "mqtt.client_id",
    "mqtt.deadline_s",
    "mqtt.inbox",
    "mqtt.keep_s",
    "mqtt.keepalive_s",
    "mqtt.key_file",
    "mqtt.node",
    "mqtt.password_file",
    "mqtt.payload",
    "mqtt.pending",
    "mqtt.per_client",
    "mqtt.pool",
    "mqtt.reply_topics",
    "mqtt.root",
    "mqtt.running",
    "mqtt.username",
    "plugins.call_timeout_ms",
    "plugins.dir",
    "plugins.grace_ms",
    "plugins.quarantine_max_ms",
    "plugins.quarantine_ms",
    "plugins.start_timeout_ms",
    "plugins.step_failures",
    "plugins.step_window_ms",
    "plugins.strike_window_ms",
    "plugins.strikes",
    "sessions.background",
    "sessions.context_full",
    "sessions.durability",
    "sessions.enabled",
    "sessions.journals",
    "sessions.journals_per_user",
    "sessions.kv",
    "sessions.kv_per_user",
    "sessions.max",
    "sessions.max_per_user",
    "sessions.retention_days",
    "socket.path",
    "state_dir",
    "tcp.keys",
    "tcp.listen",
];

/// How like a key must be to be suggested, 0 to 1.
const LIKENESS: f64 = 0.7;

/// A file's table; refuses unknown keys and values of a wrong type, with the line.
pub(super) fn parse(path: &Path, text: &str) -> Result<toml::Table, ConfigError> {
    let at = |error: toml::de::Error| located(path, text, &error);
    let table = DeTable::parse(text).map_err(at)?;
    if let Some((reason, offset)) = unknown(table.get_ref(), &mut Vec::new()) {
        let origin = format!("{}:{}", path.display(), line(text, offset));
        return Err(ConfigError::Invalid { origin, reason });
    }
    // Once into the types with the text at hand, so that a wrong one is named with its line.
    toml::from_str::<Config>(text).map_err(at)?;
    toml::from_str(text).map_err(at)
}

/// The line of `text` where the key `path` stands.
pub(super) fn line_of(text: &str, path: &[String]) -> Option<usize> {
    let table = DeTable::parse(text).ok()?;
    offset_of(table.get_ref(), path).map(|offset| line(text, offset))
}

/// Whether `set`, a `key=value`, is about the key `path`.
pub(super) fn is_about(set: &str, path: &[String]) -> bool {
    set.split_once('=').and_then(|(name, _)| key_parts(name)).is_some_and(|parts| parts == path)
}

fn offset_of(table: &DeTable<'_>, path: &[String]) -> Option<usize> {
    let (first, below) = path.split_first()?;
    let (key, value) = table.iter().find(|(key, _)| key.get_ref() == first.as_str())?;
    match value.get_ref() {
        DeValue::Table(table) if !below.is_empty() => offset_of(table, below),
        _ => Some(key.span().start),
    }
}

/// The parts of a TOML key: dots part them but in quotes.
pub(super) fn key_parts(key: &str) -> Option<Vec<String>> {
    let mut table: toml::Table = format!("{key} = 0").parse().ok()?;
    let mut parts = Vec::new();
    loop {
        let (part, value) = std::mem::take(&mut table).into_iter().next()?;
        parts.push(part);
        match value {
            toml::Value::Table(below) => table = below,
            _ => return Some(parts),
        }
    }
}

/// An error of the TOML parser with file and line.
pub(super) fn located(path: &Path, text: &str, error: &toml::de::Error) -> ConfigError {
    let place = error.span().map_or(1, |span| line(text, span.start));
    // The parser says what is wrong; the line's own text says where.
    let quoted = text.lines().nth(place - 1).unwrap_or_default().trim();
    let reason = format!("{} in: {quoted}", error.message());
    ConfigError::Invalid { origin: format!("{}:{place}", path.display()), reason }
}

/// What a setting is called where it is named: without its value, which may be secret.
pub(super) fn origin_of(set: &str) -> String {
    let key = set.split_once('=').map_or_else(|| set.split([':', ' ']).next().unwrap_or_default(), |(key, _)| key);
    format!("--set {key}")
}

/// The tables of `text`: one if it is TOML, else one for each line that is, below the header before it.
pub(super) fn readable_tables(text: &str) -> Vec<toml::Table> {
    if let Ok(table) = text.parse() {
        return vec![table];
    }
    let (mut header, mut tables) = ("", Vec::new());
    for line in text.lines() {
        if line.trim_start().starts_with('[') {
            header = line;
        } else if let Ok(table) = format!("{header}\n{line}").parse().or_else(|_| line.parse()) {
            tables.push(table);
        }
    }
    tables
}

/// The table that `set`, a `key=value`, is by itself; `None` if it is none.
pub(super) fn table_of(set: &str) -> Option<toml::Table> {
    let (key, text) = set.split_once('=')?;
    let mut table = toml::Table::new();
    let (last, tables) = key_parts(key)?.split_last().map(|(last, tables)| (last.clone(), tables.to_vec()))?;
    table.insert(last, value_of(text));
    Some(tables.into_iter().rev().fold(table, |below, part| toml::Table::from_iter([(part, below.into())])))
}

/// The value that is said on a command line: TOML, or else a bare string.
fn value_of(text: &str) -> toml::Value {
    let parsed = format!("value = {text}").parse::<toml::Table>().ok();
    parsed.and_then(|mut parsed| parsed.remove("value")).unwrap_or_else(|| toml::Value::String(text.to_owned()))
}

/// Applies `key=value` to `table`; the value is TOML, or else a bare string.
pub(super) fn apply(set: &str, root: &mut toml::Table) -> Result<(), ConfigError> {
    let fail = |reason: String| ConfigError::Invalid { origin: origin_of(set), reason };
    let (key, text) = set.split_once('=').ok_or_else(|| fail("must be key=value".to_owned()))?;
    let parts = key_parts(key).ok_or_else(|| fail(format!("'{key}' is not a key")))?;
    let parts: Vec<&str> = parts.iter().map(String::as_str).collect();
    if !known(&parts) {
        return Err(fail(unknown_key(&parts)));
    }
    let (last, tables) = parts.split_last().expect("split gives at least one part");
    let mut table = &mut *root;
    for part in tables {
        let entry = table.entry((*part).to_owned()).or_insert_with(|| toml::Value::Table(toml::Table::new()));
        table = entry.as_table_mut().ok_or_else(|| fail(format!("'{part}' is not a table")))?;
    }
    table.insert((*last).to_owned(), value_of(text));
    // Types are checked one by one.
    root.clone().try_into::<Config>().map(drop).map_err(|error| fail(error.message().to_owned()))
}

/// What is to be said of the first unknown key below `table`, and where it stands.
fn unknown(table: &DeTable<'_>, above: &mut Vec<String>) -> Option<(String, usize)> {
    for (key, value) in table {
        above.push(key.get_ref().to_string());
        let parts: Vec<&str> = above.iter().map(String::as_str).collect();
        let found = match value.get_ref() {
            DeValue::Table(below) if is_table(&parts) => unknown(below, above),
            _ if known(&parts) => None,
            _ => Some((unknown_key(&parts), key.span().start)),
        };
        if found.is_some() {
            return found;
        }
        above.pop();
    }
    None
}

fn matches(pattern: &str, parts: &[&str]) -> bool {
    let pattern: Vec<&str> = pattern.split('.').collect();
    pattern.len() == parts.len() && pattern.iter().zip(parts).all(|(p, part)| *p == "*" || p == part)
}

fn known(parts: &[&str]) -> bool {
    KEYS.iter().any(|pattern| matches(pattern, parts))
}

/// Whether keys stand below these parts.
fn is_table(parts: &[&str]) -> bool {
    KEYS.iter().any(|pattern| {
        let head: Vec<&str> = pattern.split('.').take(parts.len()).collect();
        pattern.split('.').count() > parts.len() && matches(&head.join("."), parts)
    })
}

/// What is to be said of a key that is none.
fn unknown_key(parts: &[&str]) -> String {
    let key = dotted(parts);
    // The operator's own names stand in for the stars.
    let concrete = |pattern: &'static str| -> Vec<&str> {
        let filled = pattern.split('.').zip(parts.iter().copied().chain(std::iter::repeat("NAME")));
        filled.map(|(p, part)| if p == "*" { part } else { p }).collect()
    };
    let known = || KEYS.iter().map(|pattern| concrete(pattern));
    if is_table(parts) {
        let below: Vec<String> = known().filter(|key| key.starts_with(parts)).map(|key| dotted(&key)).collect();
        return format!("'{key}' is a table and has no value of its own; its keys are {}", below.join(", "));
    }
    // Keys, and the tables above them that lie as deep.
    let tables = known().map(|key| key.into_iter().take(parts.len()).collect());
    let candidates = known().chain(tables).map(|known: Vec<&str>| dotted(&known));
    let candidates = candidates.map(|known| (strsim::jaro_winkler(&known, &key), known));
    match candidates.filter(|(likeness, _)| *likeness >= LIKENESS).max_by(|a, b| a.0.total_cmp(&b.0)) {
        Some((_, nearest)) => format!("unknown key '{key}'; did you mean '{nearest}'?"),
        None => format!("unknown key '{key}'; known are {}", KEYS.join(", ")),
    }
}

fn line(text: &str, offset: usize) -> usize {
    text.get(..offset).unwrap_or(text).matches('\n').count() + 1
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Addresses, Bytes, IndexDtype, KvDtype, Model, Relay};

    /// The list above and the types cannot drift apart: a full configuration has exactly these keys.
    #[test]
    fn the_list_of_keys_is_that_of_the_types() {
        let mut config = Config { state_dir: Some("x".into()), ..Config::default() };
        config.socket.path = Some("x".into());
        config.plugins.dir = Some("x".into());
        config.engine.device_memory = Some(Bytes(1));
        config.memory.budget = Some(Bytes(1));
        config.memory.total = Some(Bytes(1));
        config.engine.set.insert("*".to_owned(), "x".to_owned());
        let name = || Some("x".to_owned());
        (config.mqtt.node, config.mqtt.pool, config.mqtt.client_id, config.mqtt.username) =
            (name(), name(), name(), name());
        let files = [&mut config.mqtt.password_file, &mut config.mqtt.ca_file, &mut config.mqtt.cert_file];
        files.into_iter().chain([&mut config.mqtt.key_file]).for_each(|file| *file = Some("x".into()));
        config.tcp.listen = Some(Addresses::One("127.0.0.1:1".parse().unwrap()));
        config.tcp.keys = Some("x".into());
        (config.models.dir, config.models.ca_file) = (Some("x".into()), Some("x".into()));
        let keep_alive = Some(toml::Value::from("5m").try_into().unwrap());
        let file = || Some("x".into());
        let relay = Relay { model: name(), key_file: file(), ca_file: file(), ..Relay::default() };
        let model = Model {
            upstream: name(),
            relay: Some(relay),
            aliases: vec!["x".to_owned()],
            max_context: Some(1),
            top_k: Some(1),
            kv_dtype: Some(KvDtype::Q8_0),
            index_dtype: Some(IndexDtype::Q4_0),
            keep_alive,
            ..Model::at("x".into())
        };
        config.model.insert("*".to_owned(), model);
        let mut found = Vec::new();
        flatten(&toml::Table::try_from(config).unwrap(), "", &mut found);
        found.sort();
        assert_eq!(found, KEYS);
    }

    fn flatten(table: &toml::Table, above: &str, found: &mut Vec<String>) {
        for (key, value) in table {
            let name = if above.is_empty() { key.clone() } else { format!("{above}.{key}") };
            match value {
                toml::Value::Table(below) => flatten(below, &name, found),
                _ => found.push(name),
            }
        }
    }
}
