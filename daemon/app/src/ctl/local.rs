//! A model on a device in this process, for commands that need no daemon.

use anyhow::Context;
use sparsed_backend::{Backend, OpenOptions, Plugin, SearchPath};
use sparsed_engine::{DeviceModel, LoadOptions};
use sparsed_model::{Activations, KvFormats, Model, ProgramOptions, Selection};
use std::collections::BTreeMap;
use std::path::PathBuf;

/// Which model, on which device, computed how.
#[derive(Debug, clap::Args)]
pub(super) struct Local {
    /// Model file (GGUF).
    #[arg(long)]
    pub(super) model: PathBuf,
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
    threads: u32,
    /// Tokens that attention selects; 0: all. Default: as many as the model was made for.
    #[arg(long)]
    top_k: Option<u32>,
    /// f32: activations, KV rows and index rows in f32. int8: int8 activations, f16 and q8_0 rows; faster, and near
    /// ties between tokens may fall otherwise.
    #[arg(long, value_enum, default_value = "f32")]
    act: Act,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Act {
    F32,
    Int8,
}

impl Local {
    pub(super) fn open(&self) -> anyhow::Result<(Model, Backend)> {
        let scan = SearchPath::standard(self.plugins_dir.as_deref()).scan();
        let settings: BTreeMap<String, String> = self.plugin_set.iter().cloned().collect();
        let plugin = Plugin::load(scan.select(Some(&self.plugin))?, &settings)?;
        let options = OpenOptions { n_threads: self.threads, mem_budget: 0 };
        let backend = Backend::open(&plugin, 0, &options)?;
        let model = Model::open(&self.model).with_context(|| format!("cannot serve {}", self.model.display()))?;
        Ok((model, backend))
    }

    /// Puts the model on the device for one sequence.
    pub(super) fn load(
        &self,
        model: &Model,
        backend: &Backend,
        max_context: u32,
        max_step_tokens: u32,
        selections_out: bool,
    ) -> anyhow::Result<DeviceModel> {
        let (activations, kv) = match self.act {
            Act::F32 => (Activations::F32, KvFormats::exact()),
            Act::Int8 => (Activations::Int8, KvFormats::default()),
        };
        let selection = match self.top_k {
            None => Selection::Model,
            Some(0) => Selection::Dense,
            Some(k) => Selection::TopK(k),
        };
        let program = ProgramOptions { activations, selection, kv, selections_out };
        let options = LoadOptions { program, max_context, max_step_tokens };
        Ok(DeviceModel::load(backend, model, options, &mut |_, _| {})?)
    }
}

fn key_value(text: &str) -> Result<(String, String), String> {
    let pair = text.split_once('=').ok_or_else(|| format!("'{text}' is not KEY=VALUE"))?;
    Ok((pair.0.to_owned(), pair.1.to_owned()))
}
