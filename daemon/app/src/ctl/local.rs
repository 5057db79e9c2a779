//! A model on a device in this process, for commands that need no daemon.

use crate::assemble::program_options;
use crate::config::{Activations, Config, IndexDtype, Isolation, KvDtype};
use crate::devices::{CPU, PluginDevice};
use anyhow::Context;
use sparsed_backend::Backend;
use sparsed_engine::{DeviceModel, DeviceSource, LoadOptions};
use sparsed_kv::blocks_for;
use sparsed_model::{Model, ProgramOptions};
use std::path::{Path, PathBuf};

/// Which model, on which device, computed how.
#[derive(Debug, clap::Args)]
pub(super) struct Local {
    /// GGUF file (the first part of a split one) or Hugging Face folder.
    #[arg(long)]
    pub(super) model: PathBuf,
    #[command(flatten)]
    pub(super) device: LocalDevice,
    /// Tokens that attention selects; 0: all. Default: as many as the model was made for.
    #[arg(long)]
    top_k: Option<u32>,
}

/// On which device, computed how. What is not given is as in a configuration without that key.
#[derive(Clone, Debug, clap::Args)]
pub(super) struct LocalDevice {
    /// Plugin id; cpu without it.
    #[arg(long)]
    plugin: Option<String>,
    /// Folder with plugins, searched first.
    #[arg(long)]
    plugins_dir: Option<PathBuf>,
    /// Setting for the plugin, for example level=scalar; may be repeated.
    #[arg(long = "plugin-set", value_name = "KEY=VALUE", value_parser = key_value)]
    plugin_set: Vec<(String, String)>,
    /// Compute threads; 0 or without it: the plugin's choice.
    #[arg(short, long)]
    threads: Option<u32>,
    /// Where the plugin's code runs; auto without it: cpu in this process, others in one of their own.
    #[arg(long, value_enum)]
    isolation: Option<Isolation>,
    /// How activations go into products; int16 without it.
    #[arg(long, value_enum)]
    act: Option<Activations>,
    /// How KV rows are stored; as the activations have it without it.
    #[arg(long, value_enum)]
    pub(super) kv: Option<KvDtype>,
    /// How index rows are stored; as the activations have it without it.
    #[arg(long, value_enum)]
    pub(super) index: Option<IndexDtype>,
}

/// What a command needs room for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Needs {
    /// Most tokens of a sequence.
    pub(super) context: u32,
    /// Most tokens of a step.
    pub(super) step_tokens: u32,
    /// Most sequences of a step.
    pub(super) sequences: u32,
    pub(super) outputs: LocalOutputs,
}

/// What a command needs of each step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum LocalOutputs {
    /// Logits of each sequence's last token.
    LastRow,
    /// Logits of every token.
    EveryRow,
    /// Logits of every token, and what attention selected.
    EverythingWithSelections,
    /// That, and what attention asked.
    EverythingWithQueries,
}

impl Local {
    /// Has attention read everything, whatever the model was made for.
    pub(super) fn select_all(&mut self) {
        self.top_k = Some(0);
    }

    pub(super) fn open(&self) -> anyhow::Result<(Model, Backend)> {
        self.device.open(&self.model)
    }

    /// Puts the model on the device.
    pub(super) fn load(&self, model: &Model, backend: &Backend, needs: Needs) -> anyhow::Result<DeviceModel> {
        self.device.load(model, backend, self.top_k, needs)
    }
}

impl LocalDevice {
    /// Whether anything is given.
    pub(super) fn any(&self) -> bool {
        let Self { plugin, plugins_dir, plugin_set, threads, isolation, act, kv, index } = self;
        let any = plugin.is_some() || plugins_dir.is_some() || !plugin_set.is_empty() || isolation.is_some();
        any || threads.is_some() || act.is_some() || kv.is_some() || index.is_some()
    }

    /// Puts the device into a configuration.
    pub(super) fn configure(&self, config: &mut Config) {
        config.plugins.dir.clone_from(&self.plugins_dir);
        config.engine.plugin = self.plugin.as_deref().unwrap_or(CPU).to_owned();
        config.engine.threads = self.threads();
        config.engine.isolation = self.isolation.unwrap_or_default();
        config.engine.set = self.plugin_set.iter().cloned().collect();
    }

    /// A model as a configuration would have it.
    pub(super) fn configured(&self, path: &Path, top_k: Option<u32>) -> crate::config::Model {
        let (activations, kv_dtype, index_dtype) = (self.activations(), self.kv, self.index);
        crate::config::Model { top_k, activations, kv_dtype, index_dtype, ..crate::config::Model::at(path.to_owned()) }
    }

    /// Compute threads; 0: the plugin's choice.
    pub(super) fn threads(&self) -> u32 {
        self.threads.unwrap_or(0)
    }

    /// How activations go into products.
    pub(super) fn activations(&self) -> Activations {
        self.act.unwrap_or_default()
    }

    /// Opens the model and the device.
    pub(super) fn open(&self, path: &Path) -> anyhow::Result<(Model, Backend)> {
        let mut config = Config::default();
        self.configure(&mut config);
        let backend = PluginDevice::configured(&config).open()?;
        let model = Model::open(path).with_context(|| format!("cannot serve {}", path.display()))?;
        Ok((model, backend))
    }

    /// Puts the model on the device; `top_k` as in [`Local`].
    pub(super) fn load(
        &self,
        model: &Model,
        backend: &Backend,
        top_k: Option<u32>,
        needs: Needs,
    ) -> anyhow::Result<DeviceModel> {
        let Needs { context: max_context, step_tokens: max_step_tokens, sequences: max_seqs, outputs } = needs;
        let queries_out = outputs == LocalOutputs::EverythingWithQueries;
        let selections_out = queries_out || outputs == LocalOutputs::EverythingWithSelections;
        let mut config = Config::default();
        self.configure(&mut config);
        let configured = program_options(&config, &self.configured(model.path(), top_k));
        let program = ProgramOptions { selections_out, queries_out, ..configured };
        let n_blocks = blocks_for(max_context).checked_mul(max_seqs).context("more KV blocks than a pool can have")?;
        let options = LoadOptions {
            program,
            max_context,
            max_step_tokens,
            max_seqs,
            max_logits: if outputs == LocalOutputs::LastRow { max_seqs } else { max_step_tokens },
            n_blocks,
            n_fast: n_blocks,
            slow_cache_bytes: 0,
        };
        Ok(DeviceModel::load(backend, model, options, &mut |_, _| {})?)
    }
}

fn key_value(text: &str) -> Result<(String, String), String> {
    let pair = text.split_once('=').ok_or_else(|| format!("'{text}' is not KEY=VALUE"))?;
    Ok((pair.0.to_owned(), pair.1.to_owned()))
}
