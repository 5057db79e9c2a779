//! With what are engines elsewhere spoken to? The configuration, and the secrets that it names.
//!
//! A secret is a file that the configuration names, or else a credential that systemd hands over
//! (`LoadCredential=sparsed.upstream-NAME-key:...`).

use crate::config::{self, Config, Model};
use crate::private::{self, FORBIDDEN_OF_CREDENTIAL, FORBIDDEN_OF_FILE, credential};
use anyhow::{Context, bail};
use sparsed_surface::tls_config;
use sparsed_upstream::{Address, Client, Limits, Options};
use std::time::Duration;
use zeroize::Zeroizing;

/// Most bytes of a key's file.
const KEY_BYTES_MAX: u64 = 4096;

/// A client for each configured model that an engine elsewhere computes, by the model's name.
///
/// # Errors
/// A secret that cannot be read, or that others may read; an engine that would have to be trusted blindly.
pub fn clients(config: &Config) -> anyhow::Result<Vec<(String, Client)>> {
    let elsewhere = config.model.iter().filter_map(|(name, model)| Some((name, model, model.upstream.as_ref()?)));
    let client = |(name, model, upstream): (&String, &Model, &String)| {
        let options =
            options(config, name, model, upstream).with_context(|| format!("the upstream of model {name}"))?;
        Ok((name.clone(), Client::new(options)))
    };
    elsewhere.map(client).collect()
}

fn options(config: &Config, name: &str, model: &Model, upstream: &str) -> anyhow::Result<Options> {
    let relay = model.relay.clone().unwrap_or_default();
    let address: Address = upstream.parse().map_err(|reason: &str| anyhow::anyhow!("{reason}"))?;
    let ca = relay.ca_file.clone().or_else(|| credential(&format!("sparsed.upstream-{name}-ca")));
    let tls = address.is_tls().then(|| tls_config(ca.as_deref(), None)).transpose().context("TLS")?;
    Ok(Options {
        name: name.to_owned(),
        address,
        model: relay.model.clone(),
        key: key(name, relay.key_file)?,
        tls,
        max_context: model.max_context,
        connect: Duration::from_millis(relay.connect_ms),
        first_token: Duration::from_secs(relay.first_token_s),
        idle: Duration::from_secs(relay.idle_s),
        retries: relay.retries,
        priority: relay.priority,
        running_max: relay.running,
        waiting_max: relay.waiting,
        limits: limits(&config.limits),
    })
}

/// What clients of one user may take of an engine elsewhere.
pub(crate) fn limits(limits: &config::Limits) -> Limits {
    let all = |limit: u32| if limit == 0 { u32::MAX } else { limit };
    Limits {
        per_owner_max: all(limits.per_user_running).saturating_add(all(limits.per_user_waiting)),
        slow_consumer: Duration::from_secs(limits.slow_consumer_s),
    }
}

/// The first line of the key's file, if there is one.
fn key(name: &str, configured: Option<std::path::PathBuf>) -> anyhow::Result<Option<Zeroizing<String>>> {
    let (path, forbidden) = match (configured, credential(&format!("sparsed.upstream-{name}-key"))) {
        (Some(path), _) => (path, FORBIDDEN_OF_FILE),
        (None, Some(path)) => (path, FORBIDDEN_OF_CREDENTIAL),
        (None, None) => return Ok(None),
    };
    let about = || format!("the key {}", path.display());
    let bytes = Zeroizing::new(private::read(&path, forbidden, KEY_BYTES_MAX).with_context(about)?);
    let text = std::str::from_utf8(&bytes).with_context(about)?;
    let line = text.lines().next().unwrap_or_default().trim();
    if line.is_empty() || !line.bytes().all(|byte| byte.is_ascii_graphic()) {
        bail!("{} must be a line of printable letters", about());
    }
    Ok(Some(Zeroizing::new(line.to_owned())))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Layers;
    use std::os::unix::fs::PermissionsExt;

    fn opened(sets: &[&str]) -> Result<usize, String> {
        let sets: Vec<String> = sets.iter().map(|set| (*set).to_owned()).collect();
        let config = Layers::read(&[], &sets).and_then(|layers| layers.config()).map_err(|error| error.to_string())?;
        clients(&config).map(|clients| clients.len()).map_err(|error| format!("{error:#}"))
    }

    #[test]
    fn a_key_is_a_file_that_only_the_daemon_may_read() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        let file = format!("model.big.relay.key_file={}", path.display());
        let sets = ["model.big.upstream=http://127.0.0.1:8000/v1", &file];
        assert!(opened(&sets).unwrap_err().contains("No such file"));
        std::fs::write(&path, "sk-0123\n").unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)).unwrap();
        assert!(opened(&sets).unwrap_err().contains("may be read by others"));
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
        assert_eq!(opened(&sets), Ok(1));
        std::fs::write(&path, "\n").unwrap();
        assert!(opened(&sets).unwrap_err().contains("must be a line"));
    }

    #[test]
    fn an_engine_elsewhere_needs_tls_unless_the_operator_insists() {
        let insecure = "model.big.upstream=http://gpu.example/v1";
        assert!(opened(&[insecure]).unwrap_err().contains("without TLS"));
        assert_eq!(opened(&[insecure, "model.big.relay.allow_insecure=true"]), Ok(1));
        let said = opened(&["model.big.upstream=https://me:secret@gpu.example/v1"]).unwrap_err();
        assert!(said.contains("relay.key_file"), "{said}");
    }
}
