//! `sparsectl model`: what is in the store of models? Fetched, listed, read again, removed.

use super::client::{Events, OnBus};
use super::{bus, doctor};
use crate::assemble::configured_models;
use crate::config::{Config, Paths, Source as Configuration};
use crate::store::{Digest, Entry, FetchOptions, Source, Store, Watcher, fetch, how_to_serve, reference};
use anyhow::{Context, bail, ensure};
use indicatif::{HumanBytes, ProgressBar, ProgressStyle};
use serde_json::{Value, json};
use sparsed_surface::Bus;
use std::fs::File;
use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Pauses before further attempts to go on.
const PAUSES_S: [u64; 6] = [1, 2, 5, 10, 30, 60];
/// How long a server may be silent.
const PATIENCE: Duration = Duration::from_secs(60);
/// Where a hub's clients look for its address and a token.
const HUB_VARIABLE: &str = "HF_ENDPOINT";
const TOKEN_VARIABLE: &str = "HF_TOKEN";
/// Where other tools look for a proxy, in either case.
const PROXY_VARIABLES: [&str; 6] = ["https_proxy", "HTTPS_PROXY", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"];

/// Fetch models into the store, and look after them.
///
/// A model of the store is a GGUF file, or several that are parts of one, that nobody changes any more.
/// `path = "store:NAME"` below [model.<name>] of the configuration has the daemon serve it. The store is the service's
/// for root (sudo), else the user's own, which the system's service does not read.
#[derive(Debug, clap::Args)]
pub(super) struct Model {
    #[command(flatten)]
    configuration: Configuration,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// Fetch a model: https://..., hf:OWNER/NAME/FILE[@REVISION] or file:PATH.
    ///
    /// Of a model in parts name the first (...-00001-of-00003.gguf), and all are fetched. What was interrupted is
    /// continued. A hub's files need its address, or that of a mirror: --hub, HF_ENDPOINT or models.hub; a token in
    /// HF_TOKEN goes there and nowhere else. With --dbus the daemon on that bus takes the file into its own store,
    /// which needs root or polkit's word; only file: goes that way, as the daemon has no network.
    Pull(Pull),
    /// List the models of the store.
    List(List),
    /// Read models and compare them with what they were; all of them, or those that are named.
    Verify(Verify),
    /// Take a name away; `gc` removes its file.
    Rm(Rm),
    /// Remove files that no name stands for.
    Gc(Gc),
}

#[derive(Debug, clap::Args)]
struct Pull {
    /// Where from.
    source: String,
    /// What it is to be called; otherwise as its file, without .gguf.
    #[arg(long)]
    name: Option<String>,
    /// What its SHA-256 must be.
    #[arg(long)]
    sha256: Option<Digest>,
    /// What hf: stands for.
    #[arg(long, env = HUB_VARIABLE)]
    hub: Option<String>,
    /// Whose certificates are believed, in PEM, instead of the system's authorities.
    #[arg(long, conflicts_with = "dbus")]
    ca_file: Option<PathBuf>,
    /// Largest file.
    #[arg(long, conflicts_with = "dbus")]
    max_bytes: Option<u64>,
    #[command(flatten)]
    on: OnBus,
}

#[derive(Debug, clap::Args)]
struct List {
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, clap::Args)]
struct Verify {
    names: Vec<String>,
}

#[derive(Debug, clap::Args)]
struct Rm {
    #[arg(required = true)]
    names: Vec<String>,
}

#[derive(Debug, clap::Args)]
struct Gc {
    /// Also what was begun to be fetched and is not being fetched now.
    #[arg(long)]
    partial: bool,
    /// Only say what would be removed.
    #[arg(long)]
    dry_run: bool,
}

impl Model {
    pub(super) fn run(self) -> anyhow::Result<()> {
        // The daemon's configuration is the daemon's to know.
        if let Command::Pull(Pull { on: OnBus { dbus: Some(bus) }, .. }) = &self.command {
            let bus = bus.clone();
            return match self.command {
                Command::Pull(pull) => pull.run_on(&bus),
                _ => Ok(()),
            };
        }
        let config = self.configuration.load()?;
        let paths = Paths::of(&config);
        let store = Store::at(&paths.models_dir);
        match self.command {
            Command::Pull(pull) => {
                let is_default = self.configuration.names_nothing() && config.models.dir.is_none();
                let note = is_default.then(|| note_of_own_store(store.dir(), doctor::has_service)).flatten();
                pull.run(&config, &store, note.as_deref())
            }
            Command::List(list) => list.run(&store),
            Command::Verify(verify) => verify.run(&store),
            Command::Rm(Rm { names }) => names.iter().try_for_each(|name| remove(&config, &store, name)),
            Command::Gc(gc) => {
                let models = configured_models(&config, &paths);
                gc.run(&store, &models.into_values().map(|model| model.path).collect::<Vec<_>>())
            }
        }
    }
}

impl Pull {
    fn run(self, config: &Config, store: &Store, note: Option<&str>) -> anyhow::Result<()> {
        let hub = self.hub.or_else(|| Some(config.models.hub.clone())).filter(|hub| !hub.is_empty());
        let source = Source::parse(&self.source, hub.as_deref())?;
        let name = self.name.map_or_else(|| source.default_name(), Ok)?;
        let is_of_hub = matches!(source, Source::Hub { .. });
        let options = FetchOptions {
            expected: self.sha256,
            bytes_max: self.max_bytes.unwrap_or(config.models.max_bytes.0),
            token: std::env::var(TOKEN_VARIABLE).ok().filter(|token| is_of_hub && !token.is_empty()),
            ca_file: self.ca_file.or_else(|| config.models.ca_file.clone()),
            pauses: PAUSES_S.map(Duration::from_secs).to_vec(),
            patience: PATIENCE,
        };
        let mut shown = Shown::new()?;
        if let Some(note) = note {
            shown.say(note);
        }
        let proxy =
            PROXY_VARIABLES.into_iter().find(|name| std::env::var_os(name).is_some_and(|value| !value.is_empty()));
        if let (Source::Web(_) | Source::Hub { .. }, Some(variable)) = (&source, proxy) {
            shown.say(&format!(
                "note: {variable} is set, but proxies are not used; fetch with another tool, then pull file:"
            ));
        }
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let fetched = runtime.block_on(fetch(store, &name, &source, &options, &mut shown));
        shown.bar.finish_and_clear();
        let fetched = fetched.with_context(|| format!("{} was not fetched", self.source))?;
        if fetched.resumed_bytes > 0 {
            super::print(&format!("{} were there from before", HumanBytes(fetched.resumed_bytes)))?;
        }
        let entry = fetched.entry;
        let files = match entry.more.len() {
            0 => format!("sha256 {}", entry.sha256),
            n => format!("{} files, the first one's sha256 {}", n + 1, entry.sha256),
        };
        super::print(&format!("{name}: {}, {files}", HumanBytes(entry.total_bytes())))?;
        if let Err(error) = sparsed_model::Model::open(&store.path(&entry)) {
            super::print(&format!("note: sparsed cannot serve it: {error}"))?;
        }
        super::print(&how_to_serve(&name))?;
        note.map_or(Ok(()), super::print)
    }

    /// Has the daemon take the file.
    fn run_on(self, bus: &Bus) -> anyhow::Result<()> {
        let source = Source::parse(&self.source, self.hub.as_deref())?;
        let Source::File(path) = &source else {
            bail!(
                "the daemon has no network and takes file: only; without --dbus the tool itself fetches {}",
                self.source
            );
        };
        let parts = source.parts()?.len();
        ensure!(parts == 1, "the daemon takes single files; without --dbus all {parts} parts are taken");
        let file = File::open(path).with_context(|| path.display().to_string())?;
        let name = self.name.map_or_else(|| source.default_name(), Ok)?;
        let mut shown = Shown::new()?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let added = runtime.block_on(async {
            let mut lines = Events::of_pipe(bus::models::add(bus, file, &name, self.sha256).await?);
            loop {
                let line = lines.next().await?.context("the pipe has ended")?;
                let bytes = |key: &str| line[key].as_u64().unwrap_or_default();
                match line["stage"].as_str() {
                    Some("copying") => shown.show("fetched", bytes("done_bytes"), Some(bytes("total_bytes"))),
                    Some(_) => shown.show("verified", bytes("done_bytes"), Some(bytes("total_bytes"))),
                    None => return Ok::<_, anyhow::Error>(line),
                }
            }
        });
        shown.bar.finish_and_clear();
        let added = added.with_context(|| format!("{} was not taken", self.source))?;
        let bytes = HumanBytes(added["bytes"].as_u64().unwrap_or_default());
        super::print(&format!("{name}: {bytes}, sha256 {}", super::word(&added["sha256"])))?;
        if let Some(reason) = added["not_served"].as_str() {
            super::print(&format!("note: sparsed cannot serve it: {reason}"))?;
        }
        super::print(super::word(&added["next"]))
    }
}

/// How far it is: a bar on a terminal, else a line for each tenth.
struct Shown {
    bar: ProgressBar,
    tenths: u64,
}

impl Shown {
    fn new() -> anyhow::Result<Self> {
        let bar = if std::io::stderr().is_terminal() { ProgressBar::new(0) } else { ProgressBar::hidden() };
        let style = "{msg} {wide_bar} {bytes}/{total_bytes} {bytes_per_sec} {eta}";
        bar.set_style(ProgressStyle::with_template(style)?);
        Ok(Self { bar, tenths: 0 })
    }

    fn show(&mut self, what: &'static str, done: u64, total: Option<u64>) {
        self.bar.set_message(what);
        self.bar.set_length(total.unwrap_or(0));
        self.bar.set_position(done);
        let tenths = done.saturating_mul(10).checked_div(total.unwrap_or(0)).unwrap_or(0);
        if self.bar.is_hidden() && tenths != self.tenths {
            self.tenths = tenths;
            self.say(&format!("{what} {} %", tenths * 10));
        }
    }

    #[expect(clippy::print_stderr, reason = "a command-line tool speaks on standard error")]
    fn say(&self, text: &str) {
        self.bar.suspend(|| eprintln!("{text}"));
    }
}

impl Watcher for Shown {
    fn fetched(&mut self, done: u64, total: Option<u64>) -> std::io::Result<()> {
        self.show("fetched", done, total);
        Ok(())
    }

    fn hashed(&mut self, done: u64, total: u64) -> std::io::Result<()> {
        self.show("verified", done, Some(total));
        Ok(())
    }

    fn note(&mut self, text: &str) {
        self.say(text);
    }
}

impl List {
    fn run(&self, store: &Store) -> anyhow::Result<()> {
        let names = store.names()?;
        if self.json {
            let entry = |(name, entry): (String, anyhow::Result<Entry>)| match entry {
                Ok(entry) => json!({
                    "name": name, "sha256": entry.sha256, "bytes": entry.total_bytes(),
                    "files": 1 + entry.more.len(), "source": entry.source, "added": entry.added,
                    "path": store.path(&entry),
                }),
                Err(error) => json!({ "name": name, "error": format!("{error:#}") }),
            };
            return super::print_json(&Value::Array(names.into_iter().map(entry).collect()));
        }
        if names.is_empty() {
            return super::print(&format!(
                "no models in {}; `sparsectl model pull` fetches one",
                store.dir().display()
            ));
        }
        let line = |(name, entry): &(String, anyhow::Result<Entry>)| match entry {
            Ok(entry) => format!(
                "{name:<24} {:>11}  {}  {}",
                HumanBytes(entry.total_bytes()).to_string(),
                &entry.sha256.to_string()[..12],
                entry.source
            ),
            Err(error) => format!("{name:<24} cannot be read: {error:#}"),
        };
        super::print(&names.iter().map(line).collect::<Vec<_>>().join("\n"))
    }
}

impl Verify {
    fn run(self, store: &Store) -> anyhow::Result<()> {
        let all = store.names()?.into_iter().map(|(name, _)| name);
        let names = if self.names.is_empty() { all.collect() } else { self.names };
        let mut n_bad = 0;
        for name in &names {
            let mut shown = Shown::new()?;
            let verified = store.entry(name).and_then(|entry| {
                store.verify(name, &entry, &mut |done| shown.show("verified", done, Some(entry.total_bytes())))
            });
            shown.bar.finish_and_clear();
            match verified {
                Ok(()) => super::print(&format!("{name}: whole"))?,
                Err(error) => {
                    n_bad += 1;
                    super::print(&format!("{name}: {error:#}"))?;
                }
            }
        }
        ensure!(n_bad == 0, "{n_bad} of {} models are not there or not what they were", names.len());
        Ok(())
    }
}

/// Takes a name away that the configuration does not use.
fn remove(config: &Config, store: &Store, name: &str) -> anyhow::Result<()> {
    if let Some((user, _)) = config.model.iter().find(|(_, model)| reference(&model.path) == Some(name)) {
        bail!("model.{user}.path of the configuration is store:{name}; take it out there first");
    }
    store.remove(name)
}

/// What a user is to hear whose models go where the system's service does not look for them.
fn note_of_own_store(dir: &Path, has_service: impl Fn() -> bool) -> Option<String> {
    let is_own = !dir.starts_with("/var/lib") && has_service();
    is_own.then(|| {
        format!(
            "note: this is your own store, {}, which the system's service does not read; its own is filled by: sudo \
             sparsectl model pull ...; or for a file of this box: sparsectl model pull --dbus file:...",
            dir.display()
        )
    })
}

impl Gc {
    fn run(&self, store: &Store, configured: &[PathBuf]) -> anyhow::Result<()> {
        store.make()?;
        let lock = store.lock()?;
        let garbage = store.garbage(&lock, self.partial, configured)?;
        if !self.dry_run {
            store.sweep(&lock, &garbage)?;
        }
        for one in &garbage {
            super::print(&format!("{} {}", HumanBytes(one.bytes), one.path.display()))?;
        }
        let bytes = HumanBytes(garbage.iter().map(|one| one.bytes).sum());
        let done = if self.dry_run { "would be removed" } else { "removed" };
        super::print(&format!("{} files, {bytes} {done}", garbage.len()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_fills_a_store_that_the_systems_service_does_not_read_hears_so() {
        let note = |dir: &str, has_service| note_of_own_store(Path::new(dir), || has_service);
        let said = note("/home/anna/.local/share/sparsed/models", true).unwrap();
        assert!(said.contains("/home/anna/") && said.contains("sudo sparsectl model pull"), "{said}");
        assert_eq!(note("/home/anna/.local/share/sparsed/models", false), None);
        assert_eq!(note("/var/lib/sparsed/models", true), None);
    }
}
