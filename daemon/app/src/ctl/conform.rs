//! `sparsectl conform`: does a plugin keep the contract?

use anyhow::{Context, bail};
use sparsed_conform::{Level, Options, RULES, Report, Subject};
use std::path::PathBuf;
use std::time::Duration;

/// Try whether a plugin keeps the contract of plugin.h and OPS.md.
///
/// Prints a line a rule in TAP's form as it goes; the exit code is 1 when a rule is broken. Each rule runs in a process
/// of its own, so that a crash or a hang of the plugin is one broken rule. Levels: L0 files, L1 layout and negotiation,
/// L2 every operator against an f64 oracle, L3 properties, L4 garbage and repetition.
#[derive(Debug, clap::Args)]
#[command(verbatim_doc_comment)]
pub(super) struct Conform {
    /// The plugin's folder, with plugin.toml.
    #[arg(required_unless_present_any = ["list", "child"])]
    folder: Option<PathBuf>,
    /// The deepest level.
    #[arg(long, default_value = "L4")]
    level: Level,
    /// Where random numbers come from; the same seed tries the same cases.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Seconds that one rule may take.
    #[arg(long, default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..=3600))]
    deadline: u64,
    /// Which of the plugin's devices is tried, from 0.
    #[arg(long, default_value_t = 0)]
    device: u32,
    /// A setting of the plugin, as engine.set has it; may be given again.
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Print the report as JSON, nothing else.
    #[arg(long)]
    json: bool,
    /// Print every rule, its level and what it demands.
    #[arg(long)]
    list: bool,
    /// FOLDER RULE SEED: try one rule in this process.
    #[arg(long, hide = true, num_args = 3)]
    child: Option<Vec<String>>,
}

impl Conform {
    pub(super) fn run(self) -> anyhow::Result<()> {
        let subject = Subject { device: self.device, settings: settings(&self.set)? };
        if let Some([folder, rule, seed]) = self.child.as_deref() {
            return Ok(sparsed_conform::child(folder.as_ref(), rule, seed.parse()?, &subject)?);
        }
        let Some(folder) = self.folder else { return list() };
        let mut child =
            vec![std::env::current_exe()?, "conform".into(), "--device".into(), self.device.to_string().into()];
        child.extend(self.set.iter().flat_map(|set| ["--set".into(), set.into()]));
        child.push("--child".into());
        let options =
            Options { folder, level: self.level, seed: self.seed, deadline: Duration::from_secs(self.deadline), child };
        let mut closed = Ok(());
        let report = sparsed_conform::run(&options, |number, line| {
            if !self.json && closed.is_ok() {
                closed = super::print(&Report::tap_line(number, line));
            }
        });
        closed?;
        if self.json {
            super::print_json(&report.to_json())?;
        } else {
            super::print(&format!("1..{}\n{}", report.lines.len(), report.summary()))?;
        }
        let broken = report.failed();
        if !broken.is_empty() {
            bail!("{} of {} rules are broken: {}", broken.len(), report.lines.len(), broken.join(", "));
        }
        Ok(())
    }
}

fn settings(sets: &[String]) -> anyhow::Result<Vec<(String, String)>> {
    let pair = |set: &String| {
        let (key, value) = set.split_once('=').with_context(|| format!("--set {set}: must be key=value"))?;
        Ok((key.to_owned(), value.to_owned()))
    };
    sets.iter().map(pair).collect()
}

fn list() -> anyhow::Result<()> {
    for rule in RULES.iter().flat_map(|group| group.iter()) {
        super::print(&format!("{} {:26} {} [{}]", rule.level, rule.id, rule.says, rule.place))?;
    }
    Ok(())
}
