//! What is the daemon made of? Configuration to a device, an engine and a listening socket, in that order.
//!
//! What is wrong with the installation's files is found here, before the first client is accepted: the state folder,
//! another daemon, the socket, the plugin. The plugin's code runs afterwards, on the engine thread, which opens the
//! device and loads the models: however slow it is, the socket listens and the daemon can be stopped.

use crate::absent::{Absent, Packaged};
use crate::choice;
use crate::config::{Activations, Config, IndexDtype, KeepAlive, KvDtype, LoadWhen, Model, Paths, SlowTierFor};
use crate::devices::{self, CPU};
use crate::door::{Door, Passed};
use crate::memory::Sources;
use crate::mqtt::Tuning;
use crate::named::Named;
use crate::state::{State, StateLock, may_mend_itself};
use crate::store::{ModelAtPath, Store, StoredModel, reference, sync_dir};
use crate::tcp::TcpSockets;
use anyhow::Context;
use sparsed_backend::QuarantineStore;
use sparsed_engine::api::UpstreamModel;
use sparsed_engine::memory::Budget;
use sparsed_engine::{DEFAULT_MODEL, Limits, ModelOptions, ModelSource, Recovery, Residence, Service, SlowTier};
use sparsed_model::{KvFormats, ProgramOptions, Selection};
use sparsed_surface::{MqttDoor, MqttOptions};
use sparsed_upstream::Client;
use std::collections::BTreeMap;
use std::fs::DirBuilder;
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime};

/// The budget where the available memory cannot be found out.
const BUDGET_UNKNOWN_BYTES: u64 = 512 << 20;

/// Remembers in the state folder which files of models were read as a whole.
const VERIFIED_FILE: &str = "verified-models";

/// A daemon that is ready to run.
#[derive(Debug)]
pub struct Assembly {
    /// What surfaces speak to.
    pub service: Service,
    /// The engine thread; it ends by itself when no model can be served.
    pub engine: JoinHandle<()>,
    /// Clients of engines elsewhere, which look whether those are there once they are watched.
    pub upstreams: Vec<Client>,
    /// Where clients come in.
    pub door: Door,
    /// Where those come in that cannot use the door.
    pub tcp: Option<TcpSockets>,
    /// Where devices come in; it is not served yet.
    pub mqtt: Option<MqttDoor>,
    /// Whether they come in later: the journal's folder could not be used, or a file of the door's not be read.
    pub mqtt_comes: bool,
    /// What of the door a reload changes, also before it is open.
    pub(crate) tuning: Tuning,
    /// Models that were to be loaded at the start and are not there.
    pub(crate) absent: Vec<Absent>,
    /// The places in use.
    pub paths: Paths,
    /// Held until the end: one daemon per state folder.
    pub(crate) lock: StateLock,
}

impl Assembly {
    /// Puts the daemon together, with what the service manager has passed and the files that `config` names.
    ///
    /// # Errors
    /// What is wrong, with the file or key.
    pub fn new(config: &Config, passed: Passed, named: Named) -> anyhow::Result<Self> {
        let paths = Paths::of(config);
        let State { lock, sessions, is_there: has_state } = State::open(config, &paths)?;
        let (config, choice) = &choice::settle(config);
        let devices = devices::find(config, choice.as_ref())?;
        let sources = Sources::open();
        let configured = configured_models(config, &paths);
        let budget = sources.budget(config, &Store::at(&paths.models_dir), configured.values());
        let slow_tier = (has_state && config.memory.slow_tier != SlowTierFor::Off)
            .then(|| SlowTier { dir: paths.state_dir.clone(), hot_share: config.memory.hot_share });
        let absent = Absent::of(config, &paths, &configured);
        let models = model_options(config, &paths, configured, &absent, &budget, slow_tier.as_ref());
        let door = Door::open(&config.socket, &paths.socket, passed.api)?;
        let tcp = TcpSockets::open(&config.tcp, passed.tcp, named.keys)?;
        let (mqtt, cannot_open) = open_mqtt(named.mqtt, &paths, has_state)?;
        let (mqtt_comes, tuning) = (named.mqtt_comes || cannot_open, Tuning::new(config, mqtt.as_ref()));
        let retry = &config.engine.retry;
        let recovery = Recovery {
            backoff: retry.backoff_ms.iter().map(|&pause| Duration::from_millis(pause)).collect(),
            forget: Duration::from_millis(retry.forget_ms),
            watchdog: Duration::from_millis(config.engine.watchdog_ms),
            step_failures: config.plugins.step_failures,
            step_window: Duration::from_millis(config.plugins.step_window_ms),
        };
        let relays = named.upstreams.iter().map(|(name, client)| {
            let aliases = config.model.get(name).map_or_else(Vec::new, |model| model.aliases.clone());
            UpstreamModel { name: name.clone(), aliases, engine: Arc::new(client.clone()) }
        });
        let limits = engine_limits(config);
        let started = sparsed_engine::start(devices, models, relays.collect(), limits, &recovery, sessions, budget);
        let (service, engine) = started.context("the engine thread")?;
        crate::memory::start(service.clone(), sources).context("the thread that watches memory")?;
        let upstreams = named.upstreams.into_iter().map(|(_, client)| client).collect();
        Ok(Self { service, engine, upstreams, door, tcp, mqtt, mqtt_comes, tuning, absent, paths, lock })
    }
}

/// MQTT's door, or that it is to be opened when the state folder can be used.
fn open_mqtt(options: Option<MqttOptions>, paths: &Paths, has_state: bool) -> anyhow::Result<(Option<MqttDoor>, bool)> {
    let Some(options) = options else { return Ok((None, false)) };
    if !has_state {
        return Ok((None, true));
    }
    match crate::mqtt::open(options, paths) {
        Err(error) if may_mend_itself(&error) => {
            log::error!(reason:% = format!("{error:#}"); "MQTT is not served until its journal can be opened");
            Ok((None, true))
        }
        door => Ok((Some(door?), false)),
    }
}

/// The plugins that have failed too often for the daemon of this configuration.
pub fn quarantine(config: &Config) -> QuarantineStore {
    quarantine_in(config, &Paths::of(config))
}

/// Those of the daemon that has these places.
pub(crate) fn quarantine_in(config: &Config, paths: &Paths) -> QuarantineStore {
    QuarantineStore::new(&paths.state_dir, config.plugins.quarantine_policy())
}

/// Milliseconds since 1970, by a clock that goes on between two starts; before 1970 it is 1970.
pub fn now_ms() -> u64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    since.map_or(0, |since| u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
}

/// What a configured model's steps compute on the configured devices.
pub fn program_options(config: &Config, model: &Model) -> ProgramOptions {
    // Rows are made before a device is open, and must do for all that may take over: where the CPU plugin is
    // configured, all of them are its.
    let rounded = if config.engine.plugin == CPU { KvFormats::words() } else { KvFormats::default() };
    let (activations, kv) = match model.activations {
        Activations::Int16 => (sparsed_model::Activations::Int16, rounded),
        Activations::F32 => (sparsed_model::Activations::F32, KvFormats::exact()),
        Activations::Int8 => (sparsed_model::Activations::Int8, rounded),
    };
    let kv = match model.kv_dtype {
        None => kv,
        Some(KvDtype::F16) => KvFormats::default(),
        Some(KvDtype::W16) => KvFormats::words(),
        Some(KvDtype::Fp8) => KvFormats::fp8(),
        Some(KvDtype::Q8_0) => KvFormats::small(),
        Some(KvDtype::Q6_0) => KvFormats::six_bits(),
    };
    let kv = match model.index_dtype {
        None => kv,
        Some(IndexDtype::Q8_0) => kv.with_8_bit_index(),
        Some(IndexDtype::Q4_0) => kv.with_4_bit_index(),
    };
    let selection = match model.top_k {
        None => Selection::Model,
        Some(0) => Selection::Dense,
        Some(k) => Selection::TopK(k),
    };
    ProgramOptions { activations, selection, kv, selections_out: false, queries_out: false }
}

/// What requests may ask of the engine.
pub(crate) fn engine_limits(config: &Config) -> Limits {
    Limits {
        max_running: config.limits.max_running,
        max_waiting: config.limits.max_waiting,
        max_batched_tokens: config.limits.max_batched_tokens,
        slow_consumer: Duration::from_secs(config.limits.slow_consumer_s),
        slow_stateless: config.memory.slow_tier == SlowTierFor::All,
        per_user_running: config.limits.running_of_one(),
        per_user_requests: config.limits.per_user_requests,
        per_user_queued_tokens: or_all_of(config.limits.per_user_queued_tokens),
        per_user_kv_bytes: or_all_of(config.limits.per_user_kv.0),
        per_user_waiting: or_all(config.limits.per_user_waiting),
        tpot_target: match config.limits.tpot_target_ms {
            0 => None,
            ms => Some(Duration::from_millis(ms)),
        },
    }
}

/// A limit of which 0 means none.
fn or_all(limit: u32) -> u32 {
    if limit == 0 { u32::MAX } else { limit }
}

/// As [`or_all`], for limits of bytes or tokens.
fn or_all_of(limit: u64) -> u64 {
    if limit == 0 { u64::MAX } else { limit }
}

/// The configured models of this box by name: without any at all, the packaged one.
pub fn configured_models(config: &Config, paths: &Paths) -> BTreeMap<String, Model> {
    if !config.model.is_empty() {
        let here = config.model.iter().filter(|(_, model)| model.upstream.is_none());
        let settled = |name: &str, model: &Model| match is_packaged(config, name) {
            true => Model { path: paths.default_model().to_owned(), ..model.clone() },
            false => model.clone(),
        };
        return here.map(|(name, model)| (name.clone(), settled(name, model))).collect();
    }
    let path = paths.default_model().to_owned();
    BTreeMap::from([(DEFAULT_MODEL.to_owned(), Model::at(path))])
}

/// Whether a model that computes here is the packaged one: nothing says where its file is.
pub(crate) fn is_packaged(config: &Config, name: &str) -> bool {
    config.model.get(name).is_none_or(|model| model.path.as_os_str().is_empty())
}

fn model_options(
    config: &Config,
    paths: &Paths,
    models: BTreeMap<String, Model>,
    absent: &[Absent],
    budget: &Budget,
    slow_tier: Option<&SlowTier>,
) -> Vec<ModelOptions> {
    let bytes = budget.for_kv().unwrap_or_else(|| {
        log::warn!("nothing says how much memory there is; set memory.budget");
        BUDGET_UNKNOWN_BYTES
    });
    if let Some(bound) = budget.tightest() {
        let (limit, mib) = (bound.limit.name(), bound.bytes >> 20);
        log::info!(limit, limit_mib = mib, weights_mib = budget.weights_bytes >> 20, kv_mib = bytes >> 20; "budget");
    }
    // Those that are loaded at the start have their shares, and one that comes on demand.
    let is_demand = |model: &Model| model.load == LoadWhen::Demand;
    let n_on_demand = models.values().filter(|model| is_demand(model)).count();
    let n_shares = models.len() - n_on_demand + n_on_demand.min(1);
    let kv_bytes = bytes / n_shares.max(1) as u64;
    let patience = Duration::from_secs(config.limits.load_wait_s);
    let arithmetic = devices::arithmetic(config);
    let options = |(name, model): (String, Model)| ModelOptions {
        aliases: model.aliases.clone(),
        source: source(config, &name, &model, paths),
        program: program_options(config, &model),
        residence: Residence {
            at_start: !is_demand(&model) && !absent.iter().any(|absent| absent.name() == name),
            keep_alive: model.keep_alive.as_ref().map_or_else(|| model.load.default_keep_alive(), KeepAlive::parsed),
            patience,
        },
        max_context: model.max_context,
        arithmetic,
        kv_bytes,
        slow_tier: slow_tier.cloned(),
        name,
    };
    models.into_iter().map(options).collect()
}

/// Where the file of a model is.
fn source(config: &Config, name: &str, model: &Model, paths: &Paths) -> Arc<dyn ModelSource> {
    let remembered = paths.state_dir.join(VERIFIED_FILE);
    match reference(&model.path) {
        _ if is_packaged(config, name) => Arc::new(Packaged { paths: paths.clone(), remembered }),
        Some(stored) => Arc::new(StoredModel::new(Store::at(&paths.models_dir), stored, Some(remembered))),
        None => Arc::new(ModelAtPath::new(&model.path, name, Some(remembered))),
    }
}

/// Makes a folder and those above it; a power cut does not take them away again.
pub(crate) fn make_dir(dir: &Path, mode: u32) -> anyhow::Result<()> {
    let about = || format!("cannot make {}", dir.display());
    let n_missing = dir.ancestors().take_while(|dir| !dir.exists()).count();
    DirBuilder::new().recursive(true).mode(mode).create(dir).with_context(about)?;
    // Of one that is there already the name may be as young; but it may lie where we may not read.
    if n_missing == 0 {
        let _unsure = dir.parent().is_some_and(|parent| sync_dir(parent).is_err());
        return Ok(());
    }
    let mut parents = dir.ancestors().skip(1).take(n_missing).filter(|parent| !parent.as_os_str().is_empty());
    parents.try_for_each(sync_dir).with_context(about)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_folder_is_made_with_those_above_it_and_one_that_is_there_stays() {
        let dir = tempfile::tempdir().unwrap();
        let deep = dir.path().join("a/b/c");
        make_dir(&deep, 0o700).unwrap();
        make_dir(&deep, 0o755).unwrap();
        assert_eq!(deep.metadata().unwrap().permissions().mode() & 0o777, 0o700);
        std::fs::write(dir.path().join("file"), "").unwrap();
        assert!(make_dir(&dir.path().join("file/below"), 0o700).is_err());
    }
}
