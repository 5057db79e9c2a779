//! How does the tool run a model file? As the daemon does: a whole one in this process, on a socket nobody else knows.

use super::local::Act;
use crate::assemble::Assembly;
use crate::config::{Activations, Config, Model};
use crate::lifecycle::serve_until;
use anyhow::Context;
use sparsed_engine::{DEFAULT_MODEL, ModelState};
use std::path::{Path, PathBuf};
use std::time::Duration;
use tempfile::TempDir;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

/// Pause between looks whether the model is loaded.
const LOADING_PAUSE: Duration = Duration::from_millis(5);

/// How a model file is run; not for models of the daemon, which are configured there.
#[derive(Clone, Debug, clap::Args)]
pub(super) struct PrivateOptions {
    /// Plugin id (for a model file).
    #[arg(long)]
    plugin: Option<String>,
    /// Folder with plugins, searched first (for a model file).
    #[arg(long)]
    plugins_dir: Option<PathBuf>,
    /// Setting for the plugin, for example level=scalar; may be repeated (for a model file).
    #[arg(long = "plugin-set", value_name = "KEY=VALUE", value_parser = super::local::key_value)]
    plugin_set: Vec<(String, String)>,
    /// Compute threads; without it the plugin's choice (for a model file).
    #[arg(short, long)]
    threads: Option<u32>,
    /// Tokens that attention selects; 0: all (for a model file).
    #[arg(long)]
    top_k: Option<u32>,
    /// How activations go into products (for a model file).
    #[arg(long, value_enum)]
    act: Option<Act>,
}

/// A daemon in this process.
#[derive(Debug)]
pub(super) struct PrivateDaemon {
    socket: PathBuf,
    stop: oneshot::Sender<()>,
    serving: JoinHandle<anyhow::Result<()>>,
    /// Its socket and state; removed at the end.
    _home: TempDir,
}

impl PrivateDaemon {
    /// Starts a daemon that serves `file`, and waits until it does.
    ///
    /// # Errors
    /// Why it cannot.
    pub(super) async fn start(file: &Path, options: &PrivateOptions) -> anyhow::Result<Self> {
        let home = tempfile::tempdir().context("a folder for the private socket")?;
        let config = options.config(file, home.path());
        let assembly = Assembly::new(&config)?;
        let service = assembly.service.clone();
        let socket = assembly.paths.socket.clone();
        let (stop, stopped) = oneshot::channel();
        let mut serving =
            tokio::spawn(async move { serve_until(assembly, &config, async move { drop(stopped.await) }).await });
        while matches!(service.models()[0].state, ModelState::Loading { .. }) && !serving.is_finished() {
            tokio::time::sleep(LOADING_PAUSE).await;
        }
        if let ModelState::Failed(_) = service.models()[0].state {
            (&mut serving).await??;
        }
        Ok(Self { socket, stop, serving, _home: home })
    }

    pub(super) fn socket(&self) -> &Path {
        &self.socket
    }

    /// Ends the daemon in order.
    ///
    /// # Errors
    /// What it ended with.
    pub(super) async fn stop(self) -> anyhow::Result<()> {
        drop(self.stop);
        self.serving.await?
    }
}

impl PrivateOptions {
    /// Whether any is given: a model of the daemon takes none.
    pub(super) fn any(&self) -> bool {
        let Self { plugin, plugins_dir, plugin_set, threads, top_k, act } = self;
        let any = plugin.is_some() || plugins_dir.is_some() || !plugin_set.is_empty() || threads.is_some();
        any || top_k.is_some() || act.is_some()
    }

    fn config(&self, file: &Path, home: &Path) -> Config {
        let mut config = Config { state_dir: Some(home.join("state")), ..Config::default() };
        config.socket.path = Some(home.join("api.sock"));
        config.plugins.dir.clone_from(&self.plugins_dir);
        if let Some(plugin) = &self.plugin {
            config.engine.plugin.clone_from(plugin);
        }
        config.engine.threads = self.threads.unwrap_or(0);
        config.engine.set = self.plugin_set.iter().cloned().collect();
        let activations = self.act.map_or_else(Activations::default, Act::activations);
        let model = Model { path: file.to_owned(), max_context: None, top_k: self.top_k, activations };
        config.model.insert(DEFAULT_MODEL.to_owned(), model);
        config
    }
}
