//! With what does the MQTT door open? The configuration, and the secrets that it names.
//!
//! A secret is a file that the configuration names, or else a credential that systemd hands over
//! (`LoadCredential=sparsed.mqtt-password:...`). A broker elsewhere must be told who we are.

use crate::assemble::make_dir;
use crate::config::{Config, Paths};
use crate::private::{Missing, credential};
use crate::state::may_mend_itself;
use anyhow::{Context, bail};
use sha2::{Digest, Sha256};
use sparsed_surface::{MqttDoor, MqttOptions, MqttSettings, tls_config};
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use zeroize::Zeroizing;

/// The journal's folder in the state folder.
const DIR: &str = "mqtt";
/// Largest password in bytes.
const PASSWORD_BYTES_MAX: u64 = 4096;
/// What the journal's key is made of, beside the master key.
const KEY_CONTEXT: &[u8] = b"sparsed mqtt journal 1";

/// Opens the door with these [`options`].
///
/// # Errors
/// A journal that cannot be opened, or of another key.
pub(crate) fn open(mut options: MqttOptions, paths: &Paths) -> anyhow::Result<MqttDoor> {
    let master = crate::sessions::master_key(&paths.state_dir)?;
    *options.key = *journal_key(&master);
    make_dir(&options.dir, 0o700)?;
    let dir = options.dir.display().to_string();
    MqttDoor::open(options).with_context(|| format!("the MQTT journal in {dir}"))
}

/// Has the journal in the state folder, if there is one that was written under the master key `from`, go on under `to`.
/// No door has it open: that one would not know the key.
///
/// # Errors
/// The disk's.
pub(crate) fn change_key(state_dir: &Path, from: &[u8; 32], to: &[u8; 32]) -> anyhow::Result<()> {
    static CHANGING: Mutex<()> = Mutex::new(());
    let _alone = CHANGING.lock().unwrap_or_else(PoisonError::into_inner);
    let dir = state_dir.join(DIR);
    sparsed_surface::seal_journal_anew(&dir, &journal_key(from), &journal_key(to))
        .with_context(|| format!("the MQTT journal in {} under another key", dir.display()))
}

/// The journal's key under a master key.
fn journal_key(master: &[u8; 32]) -> Zeroizing<[u8; 32]> {
    Zeroizing::new(Sha256::new().chain_update(KEY_CONTEXT).chain_update(master).finalize().into())
}

/// What reloads and a door that may open after the start know of each other; clones are the same door's.
#[derive(Clone, Debug)]
pub(crate) struct Tuning(Arc<Mutex<Tuned>>);

#[derive(Debug)]
struct Tuned {
    /// As the last reload has left it.
    config: Config,
    /// Of the door, once it is open.
    settings: Option<MqttSettings>,
}

impl Tuning {
    /// Of this door, if it is open, in a daemon that runs with `config`.
    pub(crate) fn new(config: &Config, door: Option<&MqttDoor>) -> Self {
        Self(Arc::new(Mutex::new(Tuned { config: config.clone(), settings: door.map(MqttDoor::settings) })))
    }

    /// What `config` says of the door, with which a reload is about to have it go on; `None` where no door is to be, or
    /// one that waits for its files.
    ///
    /// # Errors
    /// As [`options`].
    pub(crate) fn check(&self, config: &Config, paths: &Paths) -> anyhow::Result<Option<MqttOptions>> {
        match options(config, paths) {
            Err(error) if may_mend_itself(&error) && self.tuned().settings.is_none() => Ok(None),
            options => options,
        }
    }

    /// Goes on with `config`, whose options are these.
    pub(crate) fn take_up(&self, config: &Config, options: Option<&MqttOptions>) {
        let mut tuned = self.tuned();
        tuned.config = config.clone();
        if let (Some(settings), Some(options)) = (&tuned.settings, options) {
            settings.change(options);
        }
    }

    /// Opens the door as the last reload would have it.
    ///
    /// # Errors
    /// As [`options`] and [`open`].
    pub(crate) fn open(&self, paths: &Paths) -> anyhow::Result<Option<MqttDoor>> {
        let config = self.tuned().config.clone();
        // Without the lock: no reload waits for a disk.
        let Some(door) = options(&config, paths)?.map(|options| open(options, paths)).transpose()? else {
            return Ok(None);
        };
        let (mut tuned, settings) = (self.tuned(), door.settings());
        if let Some(changed) = options(&tuned.config, paths)? {
            settings.change(&changed);
        }
        tuned.settings = Some(settings);
        Ok(Some(door))
    }

    fn tuned(&self) -> MutexGuard<'_, Tuned> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What the door, or another client of its broker, needs to know, if there is to be one; the key is still all zeros.
///
/// # Errors
/// A secret that cannot be read, a broker that would have to trust anybody.
pub(crate) fn options(config: &Config, paths: &Paths) -> anyhow::Result<Option<MqttOptions>> {
    let mqtt = &config.mqtt;
    let Some(broker) = mqtt.broker().map_err(|reason| anyhow::anyhow!("mqtt.broker {reason}"))? else {
        return Ok(None);
    };
    let password = secret(&mqtt.password_file, "password").map(|path| password(&path)).transpose()?;
    let own = secret(&mqtt.cert_file, "cert").zip(secret(&mqtt.key_file, "key"));
    if !broker.is_here() && !mqtt.allow_insecure && own.is_none() && (mqtt.username.is_none() || password.is_none()) {
        let said = format!(
            "the broker {} is elsewhere and would not know who this is: set mqtt.username and mqtt.password_file, or \
             mqtt.cert_file and mqtt.key_file, or mqtt.allow_insecure",
            broker.host
        );
        let name = if mqtt.username.is_some() { "password" } else { "key" };
        bail!(Missing { said, credential: credential_of(name) });
    }
    let tls = broker.tls.then(|| {
        let own = own.as_ref().map(|(certificate, key)| (certificate.as_path(), key.as_path()));
        tls_config(secret(&mqtt.ca_file, "ca").as_deref(), own)
    });
    let node = mqtt.node.clone().unwrap_or_else(host_name);
    Ok(Some(MqttOptions {
        host: broker.host,
        port: broker.port,
        tls: tls.transpose().context("TLS for the MQTT broker")?,
        client_id: mqtt.client_id.clone().unwrap_or_else(|| format!("sparsed-{node}")),
        username: mqtt.username.clone(),
        password,
        root: mqtt.root.clone(),
        node,
        pool: mqtt.pool.clone(),
        reply_topics: mqtt.reply_topics.clone(),
        keepalive: Duration::from_secs(mqtt.keepalive_s),
        payload_bytes_max: usize::try_from(mqtt.payload.0)?,
        per_client: mqtt.per_client as usize,
        pending_max: mqtt.pending as usize,
        running_max: mqtt.running as usize,
        held_bytes_max: mqtt.inbox.0,
        keep: Duration::from_secs(mqtt.keep_s),
        deadline: Duration::from_secs(mqtt.deadline_s),
        // As HTTP's clients have it.
        stop_timeout: Duration::from_secs(config.limits.stop_s + 2),
        dir: paths.state_dir.join(DIR),
        key: Zeroizing::new([0; 32]),
    }))
}

/// The file of a secret: the one that is configured, or else the credential `sparsed.mqtt-NAME`.
fn secret(configured: &Option<PathBuf>, name: &str) -> Option<PathBuf> {
    configured.clone().or_else(|| credential(&credential_of(name)))
}

fn credential_of(name: &str) -> String {
    format!("sparsed.mqtt-{name}")
}

/// The first line of a file.
fn password(path: &Path) -> anyhow::Result<Zeroizing<String>> {
    let about = || format!("the MQTT password in {}", path.display());
    let mut text = Zeroizing::new(String::new());
    let file = File::open(path).with_context(about)?;
    file.take(PASSWORD_BYTES_MAX).read_to_string(&mut text).with_context(about)?;
    let line = text.lines().next().unwrap_or_default();
    if line.is_empty() {
        bail!("{} is empty", about());
    }
    Ok(Zeroizing::new(line.to_owned()))
}

/// The host's name, as far as it may stand in a topic.
fn host_name() -> String {
    let name = rustix::system::uname().nodename().to_string_lossy().into_owned();
    let name: String = name.chars().filter(|c| c.is_ascii_alphanumeric() || "-_.".contains(*c)).take(64).collect();
    if name.is_empty() { "node".to_owned() } else { name }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn opened(dir: &Path, sets: &[&str]) -> Result<Option<MqttOptions>, String> {
        let mut sets: Vec<String> = sets.iter().map(|set| (*set).to_owned()).collect();
        sets.push(format!("state_dir={}", dir.display()));
        let config = Config::of(&sets);
        options(&config, &Paths::of(&config)).map_err(|error| format!("{error:#}"))
    }

    #[test]
    fn without_a_broker_there_is_no_door_and_no_key_is_made() {
        let dir = tempfile::tempdir().unwrap();
        assert!(opened(dir.path(), &[]).unwrap().is_none());
        assert_eq!(dir.path().read_dir().unwrap().count(), 0);
    }

    #[test]
    fn opening_makes_the_journal_and_the_master_key_if_there_is_none() {
        let dir = tempfile::tempdir().unwrap();
        let sets = ["mqtt.broker=mqtt://localhost".to_owned(), format!("state_dir={}", dir.path().display())];
        let config = Config::of(&sets);
        let paths = Paths::of(&config);
        let opened =
            || options(&config, &paths).unwrap().map(|options| open(options, &paths)).is_some_and(|door| door.is_ok());
        assert!(opened());
        // A journal begins with its first record: an empty one has nothing that another key could not open.
        assert!(dir.path().join("mqtt/journal").exists() && opened());
        assert_eq!(std::fs::read(dir.path().join("master.key")).unwrap().len(), 32);
    }

    #[test]
    fn a_broker_elsewhere_is_told_who_we_are() {
        let dir = tempfile::tempdir().unwrap();
        let said = opened(dir.path(), &["mqtt.broker=mqtts://b.example"]).unwrap_err();
        assert!(said.contains("mqtt.username"), "{said}");
        let path = dir.path().join("password");
        std::fs::write(&path, "secret\n").unwrap();
        let file = format!("mqtt.password_file={}", path.display());
        let options = opened(dir.path(), &["mqtt.broker=mqtt://localhost", "mqtt.username=u", &file]).unwrap().unwrap();
        assert_eq!(options.password.unwrap().as_str(), "secret");
        std::fs::write(&path, "").unwrap();
        assert!(opened(dir.path(), &["mqtt.broker=mqtt://localhost", &file]).unwrap_err().contains("is empty"));
    }
}
