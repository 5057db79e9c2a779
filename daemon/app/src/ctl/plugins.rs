//! `sparsectl plugins`: which plugins are there, what is each one's state, and why?
//!
//! Checks each as the daemon does when it loads one. Plugins of this release are then loaded and asked for their
//! devices, in a process of their own: a driver that hangs or crashes takes its time, and nothing else. Code of others
//! is not run for a list.

use crate::assemble::{now_ms, quarantine};
use crate::choice::plugin_of;
use crate::config::{Config, Source};
use crate::devices::trial_options;
use anyhow::ensure;
use serde_json::{Value, json};
use sparsed_backend::{
    BackendError, DeviceInfo, DeviceKind, Found, HostOptions, Left, Plugin, QuarantineStore, Scan, SearchPath,
};
use std::collections::BTreeMap;
use std::fmt::Write;

/// List plugins, the state of each, and why.
///
/// Looks where a daemon with the same configuration looks. States: ok; refused (the reason says what is wrong with it);
/// quarantined (it has failed too often).
#[derive(Debug, clap::Args)]
pub(super) struct Plugins {
    #[command(flatten)]
    source: Source,
    /// Print JSON.
    #[arg(long)]
    json: bool,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// Let a plugin be used again, and forget its failures.
    Unquarantine {
        /// A plugin's id, or the sha256 of its library or the first 8 digits of it.
        #[arg(value_name = "ID|SHA256")]
        name: String,
    },
}

/// What is known of a plugin that can be loaded.
struct Usable {
    abi: Option<(u32, u32)>,
    /// `None` where its code is not run to ask.
    devices: Option<Vec<DeviceInfo>>,
}

impl Plugins {
    pub(super) fn run(self) -> anyhow::Result<()> {
        let config = self.source.load()?;
        match self.command {
            None => {
                let scan = SearchPath::standard(config.plugins.dir.as_deref()).scan();
                let report = report(&config, &scan, &quarantine(&config), now_ms());
                if self.json { super::print_json(&report) } else { super::print(&text(&report)) }
            }
            Some(Command::Unquarantine { name }) => {
                let cleared = quarantine(&config).clear(&name, now_ms())?;
                ensure!(!cleared.is_empty(), "no library of '{name}' is quarantined or has failed lately");
                super::print(&format!("may be used again: {}", cleared.join(", ")))
            }
        }
    }
}

/// All plugins with state and reason.
pub(super) fn report(config: &Config, scan: &Scan, quarantine: &QuarantineStore, now_ms: u64) -> Value {
    let options = trial_options(&config.plugins, &config.engine);
    let selected = plugin_of(config, scan);
    let describe = |found: &Found| {
        let is_selected = found.manifest.id == selected;
        let no_settings = BTreeMap::new();
        let settings = if is_selected { &config.engine.set } else { &no_settings };
        let outcome = quarantine.admit(found, now_ms).and_then(|()| usable(found, settings, &options));
        describe(found, outcome, is_selected)
    };
    let mut plugins: Vec<Value> = scan.found.iter().map(describe).collect();
    plugins.extend(scan.refused.iter().map(|refusal| {
        let id = refusal.dir.file_name().map(|name| name.to_string_lossy());
        json!({ "id": id, "dir": refusal.dir, "state": "refused", "reason": refusal.error.to_string() })
    }));
    json!({ "searched": scan.searched, "plugins": plugins })
}

/// Checks a plugin, and loads it if it is one of ours.
fn usable(found: &Found, settings: &BTreeMap<String, String>, options: &HostOptions) -> Result<Usable, BackendError> {
    found.verify()?;
    if !found.is_ours() {
        return Ok(Usable { abi: None, devices: None });
    }
    let plugin = Plugin::load_isolated(found, settings, options)?;
    Ok(Usable { abi: Some(plugin.abi()), devices: Some(DeviceInfo::list(&plugin)?) })
}

fn describe(found: &Found, outcome: Result<Usable, BackendError>, is_selected: bool) -> Value {
    let (manifest, library) = (&found.manifest, found.variant().ok());
    let mut value = json!({
        "id": manifest.id,
        "version": manifest.version,
        "vendor": manifest.vendor,
        "description": manifest.description,
        "license": manifest.license,
        "dir": found.dir,
        "third_party": !found.is_ours(),
        "selected": is_selected,
        "abi_majors": manifest.abi.major,
        "library": library.map(|library| json!({
            "path": library.path,
            "sha256": library.sha256,
            "requires": library.requires,
            "needs": library.needs,
        })),
    });
    match outcome {
        Ok(Usable { abi, devices }) => {
            value["state"] = json!("ok");
            value["abi"] = json!(abi.map(|(major, minor)| format!("{major}.{minor}")));
            value["devices"] = json!(devices.map(|devices| devices.iter().map(device).collect::<Vec<Value>>()));
        }
        Err(BackendError::Quarantined { library, left }) => {
            value["state"] = json!("quarantined");
            value["reason"] = json!(library.reason);
            value["times"] = json!(library.times);
            value["until_ms"] = json!(library.until_ms);
            value["left_ms"] = json!(left.0);
        }
        Err(error) => {
            value["state"] = json!("refused");
            value["reason"] = json!(error.to_string());
        }
    }
    value
}

fn device(info: &DeviceInfo) -> Value {
    let kind = match info.kind {
        DeviceKind::Cpu => "cpu",
        DeviceKind::Gpu => "gpu",
        DeviceKind::Npu => "npu",
        _ => "other",
    };
    json!({ "id": info.id, "kind": kind, "name": info.name, "driver": info.driver, "mem_total": info.mem_total })
}

fn text(report: &Value) -> String {
    let plugins = report["plugins"].as_array().map_or(&[][..], Vec::as_slice);
    let mut text = String::new();
    for plugin in plugins {
        plugin_text(plugin, &mut text).expect("writing to a String cannot fail");
    }
    if plugins.is_empty() {
        let searched = report["searched"].as_array().into_iter().flatten().filter_map(Value::as_str);
        text = format!("no plugins in {}", searched.collect::<Vec<_>>().join(", "));
    }
    text.trim_end().to_owned()
}

fn plugin_text(plugin: &Value, out: &mut String) -> std::fmt::Result {
    let word = |key: &str| plugin[key].as_str().unwrap_or("-");
    let mut state = word("state").to_owned();
    if let Some(left_ms) = plugin["left_ms"].as_u64() {
        write!(state, " for another {} (time {})", Left(left_ms), plugin["times"])?;
    }
    write!(out, "{} {}: {state}", word("id"), word("version"))?;
    if let Some(abi) = plugin["abi"].as_str() {
        write!(out, ", ABI {abi}")?;
    }
    let marks = [("third_party", "third-party: taints the daemon"), ("selected", "selected by engine.plugin")];
    for (_, mark) in marks.iter().filter(|(key, _)| plugin[*key] == true) {
        write!(out, ", {mark}")?;
    }
    writeln!(out)?;
    if let Some(reason) = plugin["reason"].as_str() {
        writeln!(out, "  {reason}")?;
    }
    match plugin["library"]["path"].as_str() {
        Some(library) => writeln!(
            out,
            "  {}/{library}, sha256 {:.8}",
            word("dir"),
            plugin["library"]["sha256"].as_str().unwrap_or("-")
        )?,
        None => writeln!(out, "  {}", word("dir"))?,
    }
    for (index, device) in plugin["devices"].as_array().into_iter().flatten().enumerate() {
        let of = |key: &str| device[key].as_str().unwrap_or("-");
        write!(out, "  device {index}: {} ({}), {}", of("name"), of("kind"), of("driver"))?;
        match device["mem_total"].as_u64() {
            Some(bytes) if bytes > 0 => writeln!(out, ", {} MiB", bytes >> 20)?,
            _ => writeln!(out)?,
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_plugin_is_told_with_its_state_and_reason() {
        let report = json!({ "searched": ["/p"], "plugins": [
            { "id": "cpu", "version": "0.1.0", "state": "ok", "abi": "0.2", "dir": "/p/cpu", "selected": true,
              "third_party": false, "library": { "path": "lib.so", "sha256": "0123456789" },
              "devices": [{ "name": "Some CPU", "kind": "cpu", "driver": "avx2", "mem_total": 3 << 20 }] },
            { "id": "acme", "version": "2.0", "state": "quarantined", "reason": "it hung", "dir": "/p/acme", "times": 2,
              "left_ms": 7_100_000, "third_party": true, "library": { "path": "a.so", "sha256": "abcdef0123" } },
            { "id": "bad", "dir": "/p/bad", "state": "refused", "reason": "/p/bad: mode 777" },
        ]});
        let expected = "cpu 0.1.0: ok, ABI 0.2, selected by engine.plugin\n  \
            /p/cpu/lib.so, sha256 01234567\n  device 0: Some CPU (cpu), avx2, 3 MiB\n\
            acme 2.0: quarantined for another 119 min (time 2), third-party: taints the daemon\n  it hung\n  \
            /p/acme/a.so, sha256 abcdef01\n\
            bad -: refused\n  /p/bad: mode 777\n  /p/bad";
        assert_eq!(text(&report), expected);
    }

    #[test]
    fn where_no_plugin_is_the_folders_are_told() {
        assert_eq!(text(&json!({ "searched": ["/a", "/b"], "plugins": [] })), "no plugins in /a, /b");
    }
}
