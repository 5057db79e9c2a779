//! A model on a device in this process, for commands that need no daemon.

use crate::assemble::{open_backend, program_options};
use crate::config::{Activations, Config};
use anyhow::Context;
use sparsed_backend::Backend;
use sparsed_engine::{DeviceModel, LoadOptions};
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

/// On which device, computed how.
#[derive(Debug, clap::Args)]
pub(super) struct LocalDevice {
    /// Plugin id.
    #[arg(long, default_value = "cpu")]
    plugin: String,
    /// Folder with plugins, searched first.
    #[arg(long)]
    plugins_dir: Option<PathBuf>,
    /// Setting for the plugin, for example level=scalar; may be repeated.
    #[arg(long = "plugin-set", value_name = "KEY=VALUE", value_parser = key_value)]
    plugin_set: Vec<(String, String)>,
    /// Compute threads; 0: the plugin's choice.
    #[arg(short, long, default_value_t = 0)]
    pub(super) threads: u32,
    /// int16: 16-bit activations, f16 and q8_0 rows. f32: activations, KV rows and index rows in f32, slow. int8: 8-bit
    /// activations; near ties between tokens may fall otherwise.
    #[arg(long, value_enum, default_value = "int16")]
    pub(super) act: Act,
}

/// What a command needs of each step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum LocalOutputs {
    /// Logits of the last token.
    LastRow,
    /// Logits of every token.
    EveryRow,
    /// Logits of every token, and what attention selected.
    EverythingWithSelections,
}

/// The values of `--act`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum Act {
    Int16,
    F32,
    Int8,
}

impl Act {
    /// As the configuration has it.
    pub(super) fn activations(self) -> Activations {
        match self {
            Self::Int16 => Activations::Int16,
            Self::F32 => Activations::F32,
            Self::Int8 => Activations::Int8,
        }
    }
}

impl Local {
    pub(super) fn open(&self) -> anyhow::Result<(Model, Backend)> {
        self.device.open(&self.model)
    }

    /// Puts the model on the device for one sequence.
    pub(super) fn load(
        &self,
        model: &Model,
        backend: &Backend,
        max_context: u32,
        max_step_tokens: u32,
        outputs: LocalOutputs,
    ) -> anyhow::Result<DeviceModel> {
        self.device.load(model, backend, self.top_k, max_context, max_step_tokens, outputs)
    }
}

impl LocalDevice {
    /// Opens the model and the device.
    pub(super) fn open(&self, path: &Path) -> anyhow::Result<(Model, Backend)> {
        let mut config = Config::default();
        config.plugins.dir.clone_from(&self.plugins_dir);
        config.engine.plugin.clone_from(&self.plugin);
        config.engine.threads = self.threads;
        config.engine.set = self.plugin_set.iter().cloned().collect();
        let backend = open_backend(&config)?;
        let model = Model::open(path).with_context(|| format!("cannot serve {}", path.display()))?;
        Ok((model, backend))
    }

    /// Puts the model on the device for one sequence; `top_k` as in [`Local`].
    pub(super) fn load(
        &self,
        model: &Model,
        backend: &Backend,
        top_k: Option<u32>,
        max_context: u32,
        max_step_tokens: u32,
        outputs: LocalOutputs,
    ) -> anyhow::Result<DeviceModel> {
        let (path, activations) = (model.path().to_owned(), self.act.activations());
        let configured = crate::config::Model { path, max_context: None, top_k, activations };
        let selections_out = outputs == LocalOutputs::EverythingWithSelections;
        let program = ProgramOptions { selections_out, ..program_options(&configured) };
        let options = LoadOptions {
            program,
            max_context,
            max_step_tokens,
            max_seqs: 1,
            max_logits: if outputs == LocalOutputs::LastRow { 1 } else { max_step_tokens },
            n_blocks: blocks_for(max_context),
        };
        Ok(DeviceModel::load(backend, model, options, &mut |_, _| {})?)
    }
}

pub(super) fn key_value(text: &str) -> Result<(String, String), String> {
    let pair = text.split_once('=').ok_or_else(|| format!("'{text}' is not KEY=VALUE"))?;
    Ok((pair.0.to_owned(), pair.1.to_owned()))
}
