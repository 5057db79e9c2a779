//! Which devices may compute? The configured plugin's, and the CPU's when it is lost for good.

use crate::config::{Config, Engine};
use sparsed_backend::{Backend, BackendError, Fault, OpenOptions, Plugin, SearchPath};
use sparsed_engine::DeviceSource;
use std::path::PathBuf;
use std::sync::Arc;

/// The plugin that every installation has.
const CPU: &str = "cpu";

/// One device of one plugin.
#[derive(Debug)]
pub struct PluginDevice {
    /// Searched first.
    plugins_dir: Option<PathBuf>,
    engine: Engine,
    /// Loaded, and kept: its code stays in the process in any case, so loading it again would gain nothing.
    plugin: Option<Arc<Plugin>>,
    /// Opened ahead of the engine's first question.
    opened: Option<Backend>,
}

/// The devices in order of preference. The first is opened, so that what is wrong with the installation shows at once.
///
/// # Errors
/// Which file is wrong and why; the device's own failure where no other device may take over.
pub fn open(config: &Config) -> Result<Vec<Box<dyn DeviceSource>>, BackendError> {
    let mut first = PluginDevice::configured(config);
    let failover = (config.engine.failover && config.engine.plugin != CPU).then(|| first.cpu());
    match first.open() {
        Ok(backend) => first.opened = Some(backend),
        // The ladder begins with it.
        Err(error) if failover.is_some() && error.fault() != Fault::Caller => {
            log::warn!(device = first.name(), reason:% = error; "device cannot be opened yet");
        }
        Err(error) => return Err(error),
    }
    let mut devices: Vec<Box<dyn DeviceSource>> = vec![Box::new(first)];
    devices.extend(failover.map(|cpu| Box::new(cpu) as Box<dyn DeviceSource>));
    Ok(devices)
}

impl PluginDevice {
    /// The configured one.
    pub fn configured(config: &Config) -> Self {
        let (plugins_dir, engine) = (config.plugins.dir.clone(), config.engine.clone());
        Self { plugins_dir, engine, plugin: None, opened: None }
    }

    /// The CPU in its place. Settings are for the configured plugin, so they are left out.
    fn cpu(&self) -> Self {
        let engine = Engine { plugin: CPU.to_owned(), threads: self.engine.threads, ..Engine::default() };
        Self { plugins_dir: self.plugins_dir.clone(), engine, plugin: None, opened: None }
    }

    fn device(&self, plugin: &Arc<Plugin>) -> Result<Backend, BackendError> {
        let options = OpenOptions { n_threads: self.engine.threads, mem_budget: 0 };
        Backend::open(plugin, self.engine.device, &options)
    }

    /// Finds, checks and loads the plugin.
    fn load(&self) -> Result<Arc<Plugin>, BackendError> {
        let scan = SearchPath::standard(self.plugins_dir.as_deref()).scan();
        Plugin::load(scan.select(Some(&self.engine.plugin))?, &self.engine.set)
    }
}

impl DeviceSource for PluginDevice {
    fn name(&self) -> &str {
        &self.engine.plugin
    }

    fn open(&mut self) -> Result<Backend, BackendError> {
        if let Some(backend) = self.opened.take() {
            return Ok(backend);
        }
        let plugin = match &self.plugin {
            Some(plugin) => Arc::clone(plugin),
            None => Arc::clone(self.plugin.insert(self.load()?)),
        };
        let backend = self.device(&plugin)?;
        log::info!(plugin:% = self.engine.plugin, device:% = backend.info().name; "device open");
        Ok(backend)
    }

    fn strike(&mut self, reason: &str) {
        // Strikes will be counted where libraries are put into quarantine, and a plugin in a process of its own will be
        // let go of, so that the next opening starts another one; neither is there yet.
        log::warn!(plugin:% = self.engine.plugin, reason; "strike against the plugin");
    }
}
