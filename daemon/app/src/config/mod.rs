//! What did the operator ask for? TOML files and `--set`, parsed into types, every key known.
//!
//! Order: built-in defaults, the files that [`Source`] names, then `--set` from left to right. An unknown key is an
//! error that names the line and the nearest known key; nothing is ignored.

mod check;
mod dbus;
mod difference;
mod engine;
mod layers;
mod limits;
mod log;
mod memory;
mod model;
mod models;
mod mqtt;
mod paths;
mod plugins;
mod relay;
mod sessions;
mod size;
mod source;
mod tcp;

pub use dbus::Dbus;
pub use difference::Difference;
pub use engine::{AUTO, Engine, Isolation, Retry};
pub use layers::Layers;
pub use limits::Limits;
pub use log::{Log, LogLevel};
pub use memory::{Memory, SlowTierFor};
pub use model::{Activations, IndexDtype, KvDtype, Model};
pub use models::{KeepAlive, LoadWhen, Models};
pub use mqtt::{Broker, Mqtt};
pub use paths::Paths;
pub use plugins::Plugins;
pub use relay::Relay;
pub use sessions::{ContextFull, Durability, Sessions};
pub use size::Bytes;
pub use source::Source;
pub use tcp::{Addresses, Tcp};

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::PathBuf;

/// Most pauses between attempts to open a device.
const PAUSES_MAX: usize = 16;
/// The longest time of the ladder and the watchdog.
const DAY_MS: u64 = 24 * HOUR_MS;
/// The longest time of a call.
const HOUR_MS: u64 = 3600 * 1000;
/// Most bytes of anything: more than a box has, and so few that sums of them are numbers, in TOML too.
const BYTES_MAX: u64 = 1 << 50;

/// What is wrong with a configuration.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// The file could not be read.
    #[error("{}: {cause}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's answer.
        cause: std::io::Error,
    },
    /// A key or value is wrong.
    #[error("{origin}: {reason}")]
    Invalid {
        /// File and line, or the `--set` argument.
        origin: String,
        /// What is wrong.
        reason: String,
    },
}

impl ConfigError {
    /// Whether another start may find it mended though nobody has changed a file: a link to what is not there, which
    /// may be on a disk that comes late.
    pub(crate) fn may_mend_itself(&self) -> bool {
        matches!(self, Self::Io { path, .. } if layers::leads_nowhere(path))
    }
}

/// The whole configuration.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Where the daemon keeps what must survive; `None`: see [`Paths`].
    pub state_dir: Option<PathBuf>,
    /// The Unix socket.
    pub socket: Socket,
    /// Loopback TCP.
    pub tcp: Tcp,
    /// Plugins.
    pub plugins: Plugins,
    /// Which device computes.
    pub engine: Engine,
    /// Memory.
    pub memory: Memory,
    /// Limits of requests.
    pub limits: Limits,
    /// What is logged.
    pub log: Log,
    /// Durable sessions.
    pub sessions: Sessions,
    /// D-Bus.
    pub dbus: Dbus,
    /// MQTT.
    pub mqtt: Mqtt,
    /// The store of models.
    pub models: Models,
    /// Models by name. Without any, `default` is the packaged model.
    pub model: BTreeMap<String, Model>,
}

/// Most bytes of the socket's path: what the kernel has room for, less the end.
const SOCKET_PATH_MAX: usize = 107;

/// `[socket]`
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Socket {
    /// Where it is; `None`: see [`Paths`].
    pub path: Option<PathBuf>,
}

impl Config {
    /// The numbers with their keys and ranges, but for those of models and the pauses of a ladder.
    fn ranges(&self) -> Vec<(String, u64, u64, u64)> {
        let (engine, memory) = (&self.engine, &self.memory);
        let bytes = |bytes: Option<Bytes>| bytes.map_or(0, |bytes| bytes.0);
        let mut ranges = self.limits.ranges();
        ranges.extend([
            ("engine.device_memory".to_owned(), bytes(engine.device_memory), 0, BYTES_MAX),
            ("engine.threads".to_owned(), engine.threads.into(), 0, 1024),
            ("engine.watchdog_ms".to_owned(), engine.watchdog_ms, 1, DAY_MS),
            ("engine.retry.forget_ms".to_owned(), engine.retry.forget_ms, 0, DAY_MS),
            ("engine.step_timeout_ms".to_owned(), engine.step_timeout_ms, 1, HOUR_MS),
            ("memory.total".to_owned(), bytes(memory.total), 0, BYTES_MAX),
            ("memory.budget".to_owned(), bytes(memory.budget), 0, BYTES_MAX),
            ("models.max_bytes".to_owned(), self.models.max_bytes.0, 0, BYTES_MAX),
        ]);
        ranges.extend(self.plugins.ranges());
        ranges.extend(self.mqtt.ranges());
        ranges.extend(self.sessions.ranges());
        ranges
    }

    /// The first value out of its range, and what it must be.
    fn wrong_value(&self) -> Option<(String, String)> {
        let mut ranges = self.ranges();
        let pauses = &self.engine.retry.backoff_ms;
        if !(1..=PAUSES_MAX).contains(&pauses.len()) {
            let reason = format!("has {} pauses, must have 1 to {PAUSES_MAX}", pauses.len());
            return Some(("engine.retry.backoff_ms".to_owned(), reason));
        }
        ranges.extend(pauses.iter().map(|&pause| ("engine.retry.backoff_ms".to_owned(), pause, 0, DAY_MS)));
        let paths = [
            ("state_dir", &self.state_dir),
            ("socket.path", &self.socket.path),
            ("plugins.dir", &self.plugins.dir),
            ("models.dir", &self.models.dir),
            ("models.ca_file", &self.models.ca_file),
        ];
        let paths: Vec<_> =
            paths.into_iter().filter_map(|(key, path)| Some((key.to_owned(), path.as_ref()?))).collect();
        for (name, model) in &self.model {
            if name.is_empty() {
                return Some(("model".to_owned(), "has a model without a name".to_owned()));
            }
            ranges.push((dotted(&["model", name, "max_context"]), model.max_context.unwrap_or(1).into(), 1, 1 << 24));
            ranges.push((dotted(&["model", name, "top_k"]), model.top_k.unwrap_or(0).into(), 0, 1 << 24));
            if let Some(relay) = &model.relay {
                ranges.extend(relay.ranges(name));
            }
            if let Some(wrong) = model.wrong_value(name) {
                return Some(wrong);
            }
        }
        let out = |(key, value, low, high): &(String, u64, u64, u64)| {
            let inside = (low..=high).contains(&value);
            (!inside).then(|| (key.clone(), format!("is {value}, must be {low} to {high}")))
        };
        if let Some(wrong) = ranges.iter().find_map(out) {
            return Some(wrong);
        }
        if let Some((key, _)) = paths.into_iter().find(|(_, path)| path.as_os_str().is_empty()) {
            return Some((key, "is empty, must be a path".to_owned()));
        }
        let socket_bytes = self.socket.path.as_ref().map_or(0, |path| path.as_os_str().len());
        if socket_bytes > SOCKET_PATH_MAX {
            return Some((
                "socket.path".to_owned(),
                format!("has {socket_bytes} bytes, must have 1 to {SOCKET_PATH_MAX}"),
            ));
        }
        let names = || model::ambiguous_name(&self.model);
        if let Some(wrong) = self.mqtt.wrong_value().or_else(|| self.models.wrong_value()).or_else(names) {
            return Some(wrong);
        }
        // What is chosen later is not chosen if it does not hold for it.
        let is_named = !matches!(self.engine.plugin.as_str(), "cpu" | AUTO);
        if let Some(reason) = self.outlasts_watchdog().filter(|_| is_named) {
            return Some(("engine.watchdog_ms".to_owned(), reason));
        }
        let dbus = || self.dbus.bus(None).err().map(|reason| ("dbus.bus".to_owned(), reason));
        self.tcp.wrong_value().or_else(dbus)
    }

    /// Why the watchdog has no patience with a plugin in a process of its own, if so: what its time is, and must be.
    pub(crate) fn outlasts_watchdog(&self) -> Option<String> {
        let Engine { retry, step_timeout_ms: step, watchdog_ms: watchdog, isolation, .. } = &self.engine;
        let (longest, grace) = (retry.backoff_ms.iter().max().copied().unwrap_or(0), self.plugins.grace_ms);
        let hung = step.saturating_add(grace).saturating_add(longest);
        (*isolation != Isolation::None && hung >= *watchdog).then(|| {
            format!(
                "is {watchdog}; a hung step ({step} ms and {grace}) and the longest pause ({longest} ms) would pass it"
            )
        })
    }
}

/// Whether the value of `key`, dotted, may be secret, or say who somebody is: it is shown to those only who ask for
/// the configuration.
pub(crate) fn is_private(key: &str) -> bool {
    key.starts_with("engine.set.") || matches!(key, "mqtt.username" | "mqtt.client_id")
}

#[cfg(test)]
impl Config {
    /// That of a daemon without files and with these `KEY=VALUE`, for tests.
    pub(crate) fn of(sets: &[impl AsRef<str>]) -> Self {
        let sets: Vec<String> = sets.iter().map(|set| set.as_ref().to_owned()).collect();
        Layers::read(&[], &sets).unwrap().config().unwrap()
    }
}

/// A part of a key, quoted as TOML has it where it must be.
fn quoted(part: &str) -> String {
    let bare = part.chars().all(|c| c.is_ascii_alphanumeric() || c == '_' || c == '-') && !part.is_empty();
    if bare { part.to_owned() } else { toml::Value::from(part).to_string() }
}

/// The key of these parts, dotted and quoted as TOML has it.
pub(crate) fn dotted(parts: &[&str]) -> String {
    parts.iter().map(|part| quoted(part)).collect::<Vec<_>>().join(".")
}

/// Gives `each` every value with its key, dotted and quoted as TOML has it.
pub(crate) fn flatten(table: &toml::Table, above: &mut Vec<String>, each: &mut impl FnMut(&str, &toml::Value)) {
    for (key, value) in table {
        above.push(quoted(key));
        match value {
            toml::Value::Table(below) => flatten(below, above, each),
            _ => each(&above.join("."), value),
        }
        above.pop();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    fn load(text: &str, sets: &[&str]) -> Result<Config, String> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("c.toml");
        std::fs::write(&path, text).unwrap();
        let sets: Vec<String> = sets.iter().map(|&set| set.to_owned()).collect();
        let said = |error: ConfigError| error.to_string().replace(&path.display().to_string(), "FILE");
        Layers::read(std::slice::from_ref(&path), &sets).and_then(|layers| layers.config()).map_err(said)
    }

    #[test]
    fn a_file_and_sets_are_read_in_order() {
        let text = "state_dir = \"/s\"\n[memory]\nbudget = \"2GiB\"\n[model.small]\npath = \"/m.gguf\"\n";
        let sets =
            ["memory.budget=1000000000", "socket.path=/tmp/x.sock", "model.small.top_k=64", "limits.max_running=4"];
        let config = load(text, &sets).unwrap();
        assert_eq!(config.memory.budget, Some(Bytes(1_000_000_000)));
        assert_eq!(config.socket.path.as_deref(), Some(Path::new("/tmp/x.sock")));
        assert_eq!((config.model["small"].top_k, config.limits.max_running), (Some(64), 4));
    }

    /// The commented file names every key, and what it sets is the default.
    #[test]
    fn the_example_is_the_defaults() {
        let text = include_str!("../../../../packaging/config.toml");
        let config = load(text, &[]).unwrap();
        let written = |config: &Config| toml::to_string(config).unwrap();
        assert_eq!(written(&config), written(&Config::default()));
        let keys = check::KEYS.iter().map(|key| key.rsplit('.').next().unwrap()).filter(|key| *key != "*");
        keys.for_each(|key| assert!(text.contains(&format!("{key} = ")), "{key} is not in the example"));
    }

    #[test]
    fn an_unknown_key_is_named_with_its_line_and_the_nearest_key() {
        let said = load("[modle.default]\npath = \"/x\"\n", &[]).unwrap_err();
        assert_eq!(said, "FILE:1: unknown key 'modle'; did you mean 'model'?");
        let said = load("[socket]\n\npth = \"/x\"\n", &[]).unwrap_err();
        assert_eq!(said, "FILE:3: unknown key 'socket.pth'; did you mean 'socket.path'?");
        let said = load("[model.a]\npath = \"x\"\nmax_contxt = 1\n", &[]).unwrap_err();
        assert_eq!(said, "FILE:3: unknown key 'model.a.max_contxt'; did you mean 'model.a.max_context'?");
        let said = load("", &["memory.bugdet=1"]).unwrap_err();
        assert_eq!(said, "--set memory.bugdet: unknown key 'memory.bugdet'; did you mean 'memory.budget'?");
        let said = load("socket = \"/x\"\n", &[]).unwrap_err();
        assert_eq!(said, "FILE:1: 'socket' is a table and has no value of its own; its keys are socket.path");
        let said = load("", &["model.a.relay=1"]).unwrap_err();
        assert!(said.contains("model.a.relay.allow_insecure, model.a.relay.ca_file"), "{said}");
    }

    #[test]
    fn a_wrong_value_is_named_with_its_line_or_key() {
        let said = load("[limits]\nmax_running = \"many\"\n", &[]).unwrap_err();
        assert!(said.starts_with("FILE:2: ") && said.contains("max_running"), "{said}");
        let said = load("\n[limits]\nmax_running = 0\n", &[]).unwrap_err();
        assert_eq!(said, "FILE:3: limits.max_running is 0, must be 1 to 1024");
        let said = load(&format!("[socket]\npath = \"/{}\"\n", "x".repeat(107)), &[]).unwrap_err();
        assert_eq!(said, "FILE:2: socket.path has 108 bytes, must have 1 to 107");
        let said = load("", &["engine.threads=1", "limits.stop_s=9999"]).unwrap_err();
        assert_eq!(said, "--set limits.stop_s: limits.stop_s is 9999, must be 0 to 3600");
        let said = load("[plugins]\nquarantine_ms = 9\n", &["plugins.quarantine_max_ms=8"]).unwrap_err();
        assert_eq!(said, "FILE:2: plugins.quarantine_ms is 9, must be 1 to 8");
        let said = load("[sessions]\nretention_days = 999999999999999\n", &[]).unwrap_err();
        assert_eq!(said, "FILE:2: sessions.retention_days is 999999999999999, must be 0 to 36500");
        for key in ["sessions.kv", "sessions.journals_per_user", "memory.total", "memory.budget", "models.max_bytes"] {
            let said = load("", &[&format!("{key}=8388608TiB")]).unwrap_err();
            assert!(said.ends_with("is 9223372036854775808, must be 0 to 1125899906842624"), "{said}");
        }
        assert!(load("", &["plugins.strikes=0"]).unwrap_err().contains("must be 1 to 16"));
        assert!(load("", &["plugins.step_failures=1"]).unwrap_err().contains("must be 2 to 1024"));
        assert!(load("", &["plugins.call_timeout_ms=0"]).unwrap_err().contains("must be 1 to 3600000"));
        assert!(load("", &["plugins.grace_ms=60001"]).unwrap_err().contains("must be 1 to 60000"));
        let hung = load("", &["engine.plugin=x", "plugins.grace_ms=20000"]).unwrap_err();
        assert!(hung.contains("engine.watchdog_ms is 60000; a hung step (20000 ms and 20000)"), "{hung}");
        assert!(load("", &["plugins.strike=1"]).unwrap_err().contains("did you mean 'plugins.strikes'?"));
        assert!(load("", &["memory.budget=lots"]).unwrap_err().starts_with("--set memory.budget: "));
        assert!(load("", &["memory.budget=true"]).unwrap_err().contains("a number of bytes"));
        assert!(load("", &["tcp.listen=0.0.0.0:80"]).unwrap_err().contains("of this box alone"));
        assert!(load("", &["tcp.listen=localhost"]).unwrap_err().starts_with("--set tcp.listen: "));
        let both = r#"tcp.listen=["127.0.0.1:80", "[::1]:80"]"#;
        assert_eq!(load("", &[both]).unwrap().tcp.listen.unwrap().all().len(), 2);
        assert!(load("", &[&both.replace("::1", "::")]).unwrap_err().contains("is [::]:80, must be an address"));
        assert!(load("", &["tcp.listen=[]"]).unwrap_err().contains("has 0 addresses, must have 1 to 8"));
        assert!(load("", &["dbus.bus=sytem"]).unwrap_err().contains("dbus.bus is 'sytem', must be"));
        assert!(load("", &["limits.per_user_requests=0"]).unwrap_err().contains("must be 1 to 65536"));
        assert!(load("", &["state_dir="]).unwrap_err().contains("is empty"));
        assert!(load("", &["engine.retry.backoff_ms=[]"]).unwrap_err().contains("must have 1 to 16"));
        assert!(load("", &["engine.retry.backoff_ms=[1, 86400001]"]).unwrap_err().contains("must be 0 to 86400000"));
        assert!(load("x = [\n", &[]).unwrap_err().starts_with("FILE:"));
        assert!(load("", &["socket.path"]).unwrap_err().contains("key=value"));
    }

    #[test]
    fn no_error_repeats_what_may_be_a_secret() {
        for set in [
            "engine.set.a.b=hunter2",
            "engine.set.licence: hunter2",
            "mqtt.password=hunter2",
            "mqtt.broker=mqtt://anna:hunter2/p@host:99999",
            "mqtt.broker=mqtt://anna:hunter2",
            "mqtt.broker=hunter2",
            "models.hub=https://anna:p@hunter2@hub",
            "models.hub=https://anna:hunter2/p@hub",
            "models.hub=https://hub/?token=hunter2",
            "models.hub=hunter2",
            "model.big.upstream=https://anna:hunter2@host/v1",
        ] {
            let said = load("", &[set]).unwrap_err();
            assert!(!said.contains("hunter2") && said.starts_with("--set "), "{said}");
        }
        let said = load("", &["engine.set.licence=hunter2", "limits.max_running=0"]).unwrap_err();
        assert_eq!(said, "--set limits.max_running: limits.max_running is 0, must be 1 to 1024");
        let said = load("", &["engine.set.licence=hunter2", "model.a.top_k=1"]).unwrap_err();
        assert!(said.contains("--set engine.set.licence --set model.a.top_k: model.a.path"), "{said}");
    }

    #[test]
    fn settings_may_come_in_any_order_and_name_models_with_dots() {
        let sets = ["model.\"smol-1.7\".top_k=5", "model.\"smol-1.7\".path=/x"];
        assert_eq!(load("", &sets).unwrap().model["smol-1.7"].top_k, Some(5));
        assert!(load("", &["model.a.top_k=5"]).unwrap_err().contains("path"));
    }

    #[test]
    fn a_mistake_about_a_model_with_dots_in_its_name_is_told_with_its_line_and_a_key_that_can_be_written() {
        let wrong = |line: &str| load(&format!("[model.\"qwen2.5 b\"]\npath = \"/m\"\n{line}\n"), &[]).unwrap_err();
        let range = "model.\"qwen2.5 b\".max_context is 0, must be 1 to 16777216";
        assert_eq!(wrong("max_context = 0"), format!("FILE:3: {range}"));
        let unknown = "unknown key 'model.\"qwen2.5 b\".max_contxt'; did you mean 'model.\"qwen2.5 b\".max_context'?";
        assert_eq!(wrong("max_contxt = 1"), format!("FILE:3: {unknown}"));
        for (line, said) in [
            ("upstream = \"http://127.0.0.1:1\"", "upstream and model.\"qwen2.5 b\".path exclude each other"),
            ("aliases = [\"x\", \"x\"]", "aliases has 'x', which is a model's name already"),
            ("relay = { running = 0 }", "relay belongs to a model with model.\"qwen2.5 b\".upstream"),
        ] {
            assert_eq!(wrong(line), format!("FILE:3: model.\"qwen2.5 b\".{said}"));
        }
        let set = |key: &str| load("", &["model.\"a.b\".upstream=http://127.0.0.1:1/v1", key]).unwrap_err();
        let said = set("model.\"a.b\".relay.running=0");
        assert!(said.starts_with("--set model.\"a.b\".relay.running: model.\"a.b\".relay.running is 0"), "{said}");
        let said = set("model.\"a.b\".relay=1");
        assert!(said.contains("its keys are model.\"a.b\".relay.allow_insecure, "), "{said}");
    }

    #[test]
    fn a_name_is_of_one_model() {
        let text = |aliases: &str| format!("[model.a]\npath = \"/a\"\naliases = {aliases}\n[model.b]\npath = \"/b\"\n");
        assert_eq!(load(&text("[\"gpt-4o\", \"x\"]"), &[]).unwrap().model["a"].aliases, ["gpt-4o", "x"]);
        for wrong in ["[\"b\"]", "[\"x\", \"x\"]", "[\"a\"]"] {
            let said = load(&text(wrong), &[]).unwrap_err();
            assert!(said.starts_with("FILE:3: model.a.aliases") && said.contains("already"), "{said}");
        }
        assert!(load(&text("[\"\"]"), &[]).unwrap_err().contains("1 to 256"));
    }

    #[test]
    fn a_set_value_is_toml_or_else_a_bare_string() {
        let config = load("", &["engine.threads=2", "engine.set.level=avx2", "state_dir=\"/a b\""]).unwrap();
        assert_eq!((config.engine.threads, config.engine.set["level"].as_str()), (2, "avx2"));
        assert_eq!(config.state_dir.as_deref(), Some(Path::new("/a b")));
    }
}
