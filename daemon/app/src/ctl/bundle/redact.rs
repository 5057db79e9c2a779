//! What must not leave the box? Secrets that the configuration names, settings that may be some, and what looks like
//! one.

use crate::config::Config;
use regex::Regex;
use std::fs::File;
use std::io::Read;
use std::path::Path;
use zeroize::Zeroizing;

/// What stands in the place of a secret.
const REDACTED: &str = "[redacted]";
/// Shorter words would be found everywhere.
const SECRET_BYTES_MIN: usize = 4;
/// Most bytes of a file with secrets.
const FILE_BYTES_MAX: u64 = 256 << 10;
/// Settings whose values are not shown: they may be secret, or say who somebody is.
const SETTINGS: &str = r#"(?m)^((?:engine\.set\.\S+|mqtt\.(?:username|client_id)) = )("(?:[^"\\]|\\.)*"|\S+)"#;
/// What an HTTP header has.
const BEARERS: &str = r#"(?i)\b((?:bearer|basic)\s+)[^\s"',;]+"#;
/// Words after which a secret comes, in whatever file.
const AFTER_WORDS: &str =
    r#"(?i)((?:password|passwd|secret|api[_-]?key|authorization)["']?\s*[=:]\s*)("[^"]*"|'[^']*'|[^\s,;]+)"#;
/// Name and password in an address.
const IN_ADDRESSES: &str = r"(://)[^/\s@]+@";
/// What an address says to be let in.
const IN_QUERIES: &str =
    r#"(?i)([?&][a-z0-9_.-]*(?:token|key|signature|sig|secret|credential|password)[a-z0-9_.-]*=)[^&\s"'<>]+"#;
/// The line of a file that an error of the configuration quotes: what stands there is not known to be a setting.
const QUOTED_LINES: &str = r"(?m)( in: ).*$";

/// Takes secrets out of texts.
#[derive(Debug)]
pub(super) struct Redactor {
    secrets: Vec<Zeroizing<String>>,
    patterns: Vec<(Regex, &'static str)>,
}

impl Redactor {
    /// Knows the secrets of the files that `config` names, as far as they may be read.
    pub(super) fn of(config: &Config) -> Self {
        let mut secrets = Vec::new();
        if let Some(text) = config.tcp.keys.as_deref().and_then(read) {
            let keys = text.lines().filter(|line| !line.trim_start().starts_with('#'));
            let keys = keys.filter_map(|line| line.split_whitespace().nth(1));
            secrets.extend(keys.map(|key| Zeroizing::new(key.to_owned())));
        }
        let relays = config.model.values().filter_map(|model| model.relay.as_ref()?.key_file.as_ref());
        let files = [&config.mqtt.password_file, &config.mqtt.key_file].into_iter().flatten();
        for path in files.chain(relays) {
            let Some(text) = read(path) else { continue };
            secrets.extend(text.lines().map(|line| Zeroizing::new(line.trim().to_owned())));
        }
        secrets.retain(|secret| secret.len() >= SECRET_BYTES_MIN);
        // A secret that is part of another one must not leave the rest of it.
        secrets.sort_by_key(|secret| std::cmp::Reverse(secret.len()));
        let patterns = [
            (SETTINGS, "${1}\"[redacted]\""),
            (QUOTED_LINES, "${1}[redacted]"),
            (BEARERS, "${1}[redacted]"),
            (AFTER_WORDS, "${1}[redacted]"),
            (IN_ADDRESSES, "${1}[redacted]@"),
            (IN_QUERIES, "${1}[redacted]"),
        ];
        let compiled = |(pattern, by): (&str, &'static str)| (Regex::new(pattern).expect("a pattern of ours"), by);
        Self { secrets, patterns: patterns.map(compiled).into() }
    }

    /// `text` without them.
    pub(super) fn clean(&self, text: &str) -> String {
        let mut text = text.to_owned();
        for secret in &self.secrets {
            if text.contains(secret.as_str()) {
                text = text.replace(secret.as_str(), REDACTED);
            }
        }
        for (pattern, by) in &self.patterns {
            text = pattern.replace_all(&text, *by).into_owned();
        }
        text
    }
}

fn read(path: &Path) -> Option<Zeroizing<String>> {
    let mut text = Zeroizing::new(String::new());
    File::open(path).ok()?.take(FILE_BYTES_MAX).read_to_string(&mut text).ok()?;
    Some(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cleaned(text: &str) -> String {
        Redactor::of(&Config::default()).clean(text)
    }

    #[test]
    fn keys_and_passwords_that_the_configuration_names_are_found_wherever_they_stand() {
        let dir = tempfile::tempdir().unwrap();
        let file = |name: &str, text: &str| {
            std::fs::write(dir.path().join(name), text).unwrap();
            Some(dir.path().join(name))
        };
        let mut config = Config::default();
        config.tcp.keys = file("keys", "# hall comment-word\nhall 0123456789abcdef\nbath 0123456789abcdefgh\n");
        config.mqtt.password_file = file("password", "pa55 word\n");
        let redactor = Redactor::of(&config);
        let said = redactor.clean("x0123456789abcdefghx y pa55 word comment-word hall");
        assert_eq!(said, "x[redacted]x y [redacted] comment-word hall");
    }

    #[test]
    fn settings_that_may_be_secret_are_not_shown_and_others_are() {
        let text = "engine.set.licence = \"a \\\" b\" # /f:1\nmqtt.username = \"anna\"\nlimits.stop_s = 20 # default";
        let shown =
            "engine.set.licence = \"[redacted]\" # /f:1\nmqtt.username = \"[redacted]\"\nlimits.stop_s = 20 # default";
        assert_eq!(cleaned(text), shown);
        assert_eq!(
            cleaned("c.toml:3: expected a number in: broker = \"anna:x\""),
            "c.toml:3: expected a number in: [redacted]"
        );
    }

    #[test]
    fn what_looks_like_a_secret_goes_and_counts_of_tokens_stay() {
        assert_eq!(cleaned("Authorization: Bearer abc.def-1"), "Authorization: [redacted] [redacted]");
        assert_eq!(cleaned("{\"password\": \"x y\"}"), "{\"password\": [redacted]}");
        assert_eq!(cleaned("curl -H 'authorization: Basic YTpi'"), "curl -H 'authorization: [redacted] [redacted]'");
        assert_eq!(cleaned("mqtts://anna:pw@host:8883/"), "mqtts://[redacted]@host:8883/");
        let counts = "prompt_tokens=5 max_batched_tokens = 256 key=limits.x";
        assert_eq!(cleaned(counts), counts);
    }
}
