//! Which devices may compute? The configured plugin's, and when they are lost for good, the CPU's.

use crate::assemble::{now_ms, quarantine};
use crate::choice::Choice;
use crate::config::{Config, Engine, Isolation, Plugins};
use crate::state::check_mounted;
use sparsed_backend::{Backend, BackendError, Found, HostOptions, OpenOptions, Plugin, QuarantineStore, SearchPath};
use sparsed_engine::DeviceSource;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

/// The plugin that every installation has.
pub(crate) const CPU: &str = "cpu";

/// One device of one plugin.
#[derive(Debug)]
pub struct PluginDevice {
    plugins: Plugins,
    engine: Engine,
    quarantine: QuarantineStore,
    /// No other one takes over: a quarantine would help nobody.
    is_last: bool,
    /// Loaded, and kept if its code is in this process, where it stays in any case.
    plugin: Option<(Found, Arc<Plugin>)>,
    /// Of the library that was tried last, loaded or not.
    sha256: Option<String>,
    /// Why it is preferred, if nobody has named it.
    chosen: Option<String>,
}

/// The devices in order of preference. No code of a plugin runs yet, however long it would take: the first plugin is
/// found and checked, so that what is wrong with the installation shows at once; the engine opens it. One in quarantine
/// is wrong with itself, and the next device takes over. `choice`: why the configured plugin is that one, if nobody has
/// named it.
///
/// # Errors
/// Which file is wrong and why.
pub(crate) fn find(config: &Config, choice: Option<&Choice>) -> Result<Vec<Box<dyn DeviceSource>>, BackendError> {
    let chosen = choice.map(|choice| choice.why.clone());
    let first = PluginDevice { chosen, ..PluginDevice::configured(config) };
    let spares: Vec<_> = config.engine.spare_devices.iter().map(|&device| first.spare(device)).collect();
    let cpu = (config.engine.failover && config.engine.plugin != CPU).then(|| first.cpu());
    let mut devices: Vec<_> = std::iter::once(first).chain(spares).chain(cpu).collect();
    devices.last_mut().expect("there is a first one").is_last = true;
    match devices[0].find().and_then(|found| found.verify()) {
        Err(error @ BackendError::Quarantined { .. }) => log::error!(reason:% = error; "another device takes over"),
        checked => checked?,
    }
    Ok(devices.into_iter().map(|device| Box::new(device) as Box<dyn DeviceSource>).collect())
}

/// How the configured plugin computes, by its manifest. As rows' formats, it is known before a device is open and holds
/// for all that may take over.
pub(crate) fn arithmetic(config: &Config) -> u32 {
    let scan = SearchPath::standard(config.plugins.dir.as_deref()).scan();
    // One that is not there is refused by who opens it.
    scan.select(Some(&config.engine.plugin)).map_or(0, |found| found.manifest.arithmetic)
}

impl PluginDevice {
    /// The configured one, which must have a name.
    pub fn configured(config: &Config) -> Self {
        Self::new(config.plugins.clone(), config.engine.clone(), quarantine(config))
    }

    /// The CPU in its place. Settings are for the configured plugin, so they are left out.
    fn cpu(&self) -> Self {
        let engine = Engine { plugin: CPU.to_owned(), threads: self.engine.threads, ..Engine::default() };
        Self::new(self.plugins.clone(), engine, self.quarantine.clone())
    }

    /// Another device of the same plugin.
    fn spare(&self, device: u32) -> Self {
        Self::new(self.plugins.clone(), Engine { device, ..self.engine.clone() }, self.quarantine.clone())
    }

    fn new(plugins: Plugins, engine: Engine, quarantine: QuarantineStore) -> Self {
        Self { plugins, engine, quarantine, is_last: false, plugin: None, sha256: None, chosen: None }
    }

    fn device(&self, plugin: &Arc<Plugin>) -> Result<Backend, BackendError> {
        Backend::open(plugin, self.engine.device, &open_options(&self.engine))
    }

    /// Finds the plugin, if it may be used.
    fn find(&self) -> Result<Found, BackendError> {
        let scan = SearchPath::standard(self.plugins.dir.as_deref()).scan();
        for refusal in &scan.refused {
            log::warn!(dir:% = refusal.dir.display(), reason:% = refusal.error; "plugin refused");
        }
        let found = scan.select(Some(&self.engine.plugin))?;
        self.admit(found)?;
        Ok(found.clone())
    }

    /// Finds, checks and loads the plugin.
    fn load(&mut self) -> Result<(Found, Arc<Plugin>), BackendError> {
        let found = self.find()?;
        self.sha256 = Some(found.variant()?.sha256.clone());
        let plugin = self.load_found(&found)?;
        Ok((found, plugin))
    }

    /// Whether the plugin is not quarantined, or there is no other. A quarantine that cannot be read keeps nobody from
    /// serving.
    fn admit(&self, found: &Found) -> Result<(), BackendError> {
        match self.quarantine.admit(found, now_ms()) {
            Err(error @ BackendError::Io { .. }) => {
                log::error!(reason:% = error; "quarantine cannot be read, no plugin is refused by it");
                Ok(())
            }
            Err(error @ BackendError::Quarantined { .. }) if self.is_last => {
                log::warn!(reason:% = error; "used all the same: no other device could take over");
                Ok(())
            }
            admitted => admitted,
        }
    }

    /// Loads a plugin where the configuration wants it. By itself only the CPU plugin that is installed with the daemon
    /// comes into its process, not whatever calls itself so.
    fn load_found(&self, found: &Found) -> Result<Arc<Plugin>, BackendError> {
        let (id, engine) = (found.manifest.id.as_str(), &self.engine);
        let is_own_cpu = id == CPU && found.is_ours();
        match engine.isolation {
            Isolation::None if !is_own_cpu => {
                log::warn!(plugin = id; "engine.isolation is none: what this plugin breaks ends the daemon");
            }
            Isolation::Auto if !is_own_cpu => return self.load_isolated(found),
            Isolation::Process => return self.load_isolated(found),
            Isolation::Auto | Isolation::None => {}
        }
        Plugin::load(found, &engine.set)
    }

    fn load_isolated(&self, found: &Found) -> Result<Arc<Plugin>, BackendError> {
        Plugin::load_isolated(found, &self.engine.set, &host_options(&self.plugins, &self.engine))
    }
}

/// How a device is opened.
pub(crate) fn open_options(engine: &Engine) -> OpenOptions {
    OpenOptions { n_threads: engine.threads, mem_budget: engine.device_memory.map_or(0, |bytes| bytes.0) }
}

/// As [`host_options`], where nothing is computed: no call has a reason to take longer than a start.
pub(crate) fn trial_options(plugins: &Plugins, engine: &Engine) -> HostOptions {
    let options = host_options(plugins, engine);
    HostOptions { call_timeout: options.start_timeout, ..options }
}

/// How the process of a plugin is started, and how long it may take.
pub(crate) fn host_options(plugins: &Plugins, engine: &Engine) -> HostOptions {
    HostOptions {
        program: host_program(),
        start_timeout: Duration::from_millis(plugins.start_timeout_ms),
        call_timeout: Duration::from_millis(plugins.call_timeout_ms),
        step_timeout: Duration::from_millis(engine.step_timeout_ms),
        grace: Duration::from_millis(plugins.grace_ms),
        ..HostOptions::default()
    }
}

/// The executable of plugin hosts: the daemon's own, even when its file has been replaced, or the one beside a tool.
fn host_program() -> PathBuf {
    const DAEMON: &str = "sparsed";
    let own = PathBuf::from("/proc/self/exe");
    let Ok(exe) = std::env::current_exe() else { return own };
    // The kernel writes " (deleted)" behind the name of a file that is gone.
    let is_daemon = exe.file_name().is_some_and(|name| name.to_string_lossy().split(' ').next() == Some(DAEMON));
    if is_daemon { own } else { exe.with_file_name(DAEMON) }
}

impl DeviceSource for PluginDevice {
    fn name(&self) -> &str {
        &self.engine.plugin
    }

    fn chosen(&self) -> Option<&str> {
        self.chosen.as_deref()
    }

    fn open(&mut self) -> Result<Backend, BackendError> {
        // A host that was lost is not asked again: a new one is started.
        self.plugin.take_if(|(_, plugin)| plugin.host_process().is_some());
        let plugin = match &self.plugin {
            Some((found, plugin)) => {
                self.admit(found)?;
                Arc::clone(plugin)
            }
            None => {
                let loaded = self.load()?;
                Arc::clone(&self.plugin.insert(loaded).1)
            }
        };
        let backend = self.device(&plugin)?;
        log::info!(plugin:% = self.engine.plugin, device:% = backend.info().name; "device open");
        Ok(backend)
    }

    fn strike(&mut self, reason: &str) {
        let Some(sha256) = &self.sha256 else { return };
        if let Err(error) = check_mounted(self.quarantine.dir()) {
            log::error!(plugin:% = self.engine.plugin, reason:% = error; "strike not noted");
            return;
        }
        let struck = self.quarantine.strike(&self.engine.plugin, sha256, reason, now_ms());
        match struck {
            Ok(outcome) => log::warn!(plugin:% = self.engine.plugin, reason, outcome:?; "strike against the plugin"),
            Err(error) => log::error!(plugin:% = self.engine.plugin, reason:% = error; "strike not noted"),
        }
    }
}
