//! What must not leave the box? Secrets that the configuration names, settings that may be some, and what looks like
//! one.

use crate::config::{Source, is_private};
use regex::Regex;
use std::fs::File;
use std::io::Read;
use std::path::Path;
use zeroize::Zeroizing;

/// What stands in the place of a secret.
const REDACTED: &str = "[redacted]";
/// Shorter words would be found everywhere.
const SECRET_BYTES_MIN: usize = 4;
/// A setting that may be none is often a common word: shorter ones are found by their keys only.
const SETTING_BYTES_MIN: usize = 8;
/// Most bytes of a file with secrets.
const FILE_BYTES_MAX: u64 = 256 << 10;
/// What an HTTP header has.
const BEARERS: &str = r#"(?i)\b((?:bearer|basic)\s+)[^\s"',;]+"#;
/// Words after which a secret comes, in whatever file.
const AFTER_WORDS: &str =
    r#"(?i)((?:password|passwd|secret|api[_-]?key|authorization)["']?\s*[=:]\s*)("[^"]*"|'[^']*'|[^\s,;]+)"#;
/// Name and password in an address: up to the last `@`, since either may have one, and slashes.
const IN_ADDRESSES: &str = r#"(://)(?:[^\s"\\]|\\.)*@"#;
/// What an address says to be let in.
const IN_QUERIES: &str =
    r#"(?i)([?&][a-z0-9_.-]*(?:token|key|signature|sig|secret|credential|password)[a-z0-9_.-]*=)[^&\s"'<>]+"#;
/// The line of a file that an error of the configuration quotes: what stands there is not known to be a setting.
const QUOTED_LINES: &str = r"(?m)( in: ).*$";
/// The value that such an error quotes since it has the wrong type.
const QUOTED_VALUES: &str = r"(invalid (?:type|value|length): |unknown variant ).*(, expected)";

/// Takes secrets out of texts.
#[derive(Debug)]
pub(super) struct Redactor {
    secrets: Vec<Zeroizing<String>>,
    patterns: Vec<(Regex, &'static str)>,
}

impl Redactor {
    /// Knows the secrets of the files that a configuration names, as far as they may be read, and its settings that may
    /// be some; of one that is wrong, too.
    pub(super) fn of(source: &Source) -> Self {
        let mut secrets = Vec::new();
        for (key, value) in source.texts() {
            let text = Zeroizing::new(value);
            match key.rsplit('.').next() {
                _ if is_private(&key) => secrets.extend((text.len() >= SETTING_BYTES_MIN).then_some(text)),
                Some("keys") => secrets.extend(read(Path::new(text.as_str())).iter().flat_map(|text| api_keys(text))),
                Some("password_file" | "key_file") => {
                    let Some(text) = read(Path::new(text.as_str())) else { continue };
                    secrets.extend(text.lines().map(|line| Zeroizing::new(line.trim().to_owned())));
                }
                _ => {}
            }
        }
        secrets.retain(|secret| secret.len() >= SECRET_BYTES_MIN);
        // A secret that is part of another one must not leave the rest of it.
        secrets.sort_by_key(|secret| std::cmp::Reverse(secret.len()));
        let patterns = [
            (QUOTED_LINES, "${1}[redacted]"),
            (QUOTED_VALUES, "${1}[redacted]${2}"),
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

/// The value of a setting as it may be shown.
pub(super) fn shown(key: &str, value: &toml::Value) -> String {
    if is_private(key) { format!("\"{REDACTED}\"") } else { value.to_string() }
}

/// The keys of a file of names and keys.
fn api_keys(text: &str) -> Vec<Zeroizing<String>> {
    let lines = text.lines().filter(|line| !line.trim_start().starts_with('#'));
    let keys = lines.filter_map(|line| line.split_whitespace().nth(1));
    keys.map(|key| Zeroizing::new(key.to_owned())).collect()
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
        Redactor::of(&Source::of(Path::new("/nowhere"), &[])).clean(text)
    }

    #[test]
    fn keys_and_passwords_that_the_configuration_names_are_found_wherever_they_stand() {
        let dir = tempfile::tempdir().unwrap();
        let file = |name: &str, text: &str| {
            std::fs::write(dir.path().join(name), text).unwrap();
            dir.path().join(name).display().to_string()
        };
        let keys = file("keys", "# hall comment-word\nhall 0123456789abcdef\nbath 0123456789abcdefgh\n");
        let (password, relay) = (file("password", "pa55 word\n"), file("relay", "relay-key\n"));
        let right = format!(
            "[tcp]\nkeys = \"{keys}\"\n[mqtt]\nusername = \"anna\"\n[engine.set]\nlicence = \"licence-key\"\n\
             [model.big.relay]\nkey_file = '{relay}'\n"
        );
        let password = format!("mqtt.password_file={password}");
        // One that is wrong names them all the same.
        for wrong in ["", "[limits]\nstop_s = \"x\"\n", "[limits\n", "[limits]\nstop_s =\n"] {
            let config = file("config.toml", &format!("{wrong}{right}"));
            let redactor = Redactor::of(&Source::of(Path::new(&config), &[&password]));
            let said = redactor.clean("x0123456789abcdefghx y pa55 word comment-word hall relay-key anna licence-key");
            assert_eq!(said, "x[redacted]x y [redacted] comment-word hall [redacted] anna [redacted]", "{wrong}");
        }
    }

    /// The folder of drop-ins may be on the disk that is away, for which somebody is to help.
    #[test]
    fn secrets_of_a_systems_files_are_known_though_its_drop_ins_are_away() {
        let root = tempfile::tempdir().unwrap();
        let at = |name: &str| root.path().join(name);
        std::fs::create_dir_all(at("etc/sparsed")).unwrap();
        std::fs::write(at("keys"), "hall 0123456789abcdef\n").unwrap();
        let says = format!("[tcp]\nkeys = \"{}\"\n[engine.set]\nlicence = \"licence-key\"\n", at("keys").display());
        std::fs::write(at("etc/sparsed/config.toml"), says).unwrap();
        std::os::unix::fs::symlink(at("disk/conf.d"), at("etc/sparsed/conf.d")).unwrap();
        let source = Source::of_system_below(root.path());
        assert!(source.layers().unwrap_err().to_string().contains("which is not there"));
        let said = Redactor::of(&source).clean("x 0123456789abcdef y licence-key");
        assert_eq!(said, "x [redacted] y [redacted]");
    }

    #[test]
    fn settings_that_may_be_secret_are_not_shown_and_others_are() {
        let hidden = ["engine.set.licence", "engine.set.\"a b\"", "mqtt.username", "mqtt.client_id"];
        // Also in several lines.
        let value = toml::Value::from("a \" b\nc");
        assert!(hidden.iter().all(|key| shown(key, &value) == "\"[redacted]\""));
        assert_eq!(shown("limits.stop_s", &toml::Value::from(20)), "20");
        assert_eq!(
            cleaned("invalid type: string \"a, expected b\", expected a number of bytes"),
            "invalid type: [redacted], expected a number of bytes"
        );
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
        for secret in ["anna:pw", "anna:p@X", "anna:X/p", "anna:\\\"X\\\"", "anna"] {
            let text = format!("\"mqtts://{secret}@host:8883/\", \"a@b\"");
            assert_eq!(cleaned(&text), "\"mqtts://[redacted]@host:8883/\", \"a@b\"");
        }
        assert_eq!(cleaned("https://host/m.gguf me@host"), "https://host/m.gguf me@host");
        let counts = "prompt_tokens=5 max_batched_tokens = 256 key=limits.x";
        assert_eq!(cleaned(counts), counts);
    }
}
