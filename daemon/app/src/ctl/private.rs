//! How does the tool run a model file? As the daemon does: a whole one in this process, on a socket nobody else knows.

use super::local::LocalDevice;
use crate::assemble::Assembly;
use crate::config::Config;
use crate::door::Passed;
use crate::lifecycle::serve_until;
use crate::named::Named;
use anyhow::{Context, bail};
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
    #[command(flatten, next_help_heading = "For a model file")]
    device: LocalDevice,
    /// Tokens that attention selects; 0: all.
    #[arg(long)]
    top_k: Option<u32>,
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
        let assembly = Assembly::new(&config, Passed::default(), Named::default())?;
        let service = assembly.service.clone();
        let socket = assembly.paths.socket.clone();
        let (stop, stopped) = oneshot::channel();
        let serving =
            tokio::spawn(async move { serve_until(assembly, &config, async move { drop(stopped.await) }).await });
        while matches!(service.models()[0].state, ModelState::Loading { .. }) && !serving.is_finished() {
            tokio::time::sleep(LOADING_PAUSE).await;
        }
        if let ModelState::Failed(reason) = service.models().swap_remove(0).state {
            drop(stop);
            serving.await??;
            bail!("it cannot be served: {reason}");
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
        self.device.any() || self.top_k.is_some()
    }

    fn config(&self, file: &Path, home: &Path) -> Config {
        let mut config = Config { state_dir: Some(home.join("state")), ..Config::default() };
        config.socket.path = Some(home.join("api.sock"));
        "off".clone_into(&mut config.dbus.bus);
        self.device.configure(&mut config);
        config.model.insert(DEFAULT_MODEL.to_owned(), self.device.configured(file, self.top_k));
        config
    }
}
