//! What is collected? One text for each part; a part that cannot be had is named with the reason.

use super::{redact, socket_of};
use crate::assemble::{now_ms, quarantine};
use crate::config::{Config, Paths, Source};
use crate::ctl::client::{Client, soon};
use crate::ctl::system::said;
use crate::ctl::{config, doctor, plugins};
use anyhow::{Context, ensure};
use serde_json::Value;
use sparsed_backend::SearchPath;
use std::fmt::Write;
use std::fs::File;
use std::io::Read;
use std::path::Path;

/// Largest part in bytes; of a longer one the end is kept.
const PART_BYTES_MAX: usize = 4 << 20;
/// Lines of the log.
const LOG_LINES: &str = "5000";
/// What the service manager is asked: its environment is not among it.
const PROPERTIES: &str = "ActiveState,SubState,Result,NRestarts,ExecMainStatus,ExecMainStartTimestamp,MainPID,\
    MemoryCurrent,MemoryPeak,MemoryHigh,MemoryMax,CPUUsageNSec,TasksCurrent,WatchdogUSec,FragmentPath,DropInPaths,\
    ControlGroup";
/// The service's unit.
const UNIT: &str = "sparsed.service";
/// What a group says of itself.
const GROUP_FILES: &[&str] = &[
    "memory.current",
    "memory.high",
    "memory.max",
    "memory.events",
    "memory.stat",
    "memory.pressure",
    "cpu.stat",
    "cpu.pressure",
    "io.pressure",
    "pids.current",
];
/// What the machine says of itself.
const MACHINE_FILES: &[&str] = &[
    "/proc/version",
    "/proc/cpuinfo",
    "/proc/meminfo",
    "/proc/loadavg",
    "/proc/uptime",
    "/proc/pressure/cpu",
    "/proc/pressure/io",
    "/proc/pressure/memory",
    "/etc/os-release",
];

/// Parts with their names, and those that could not be had.
#[derive(Debug, Default)]
pub(super) struct Collected {
    parts: Vec<(String, String)>,
    missing: Vec<(String, String)>,
}

impl Collected {
    /// What there is.
    pub(super) fn parts(&self) -> &[(String, String)] {
        &self.parts
    }

    /// What there is not, and why.
    pub(super) fn missing(&self) -> impl Iterator<Item = (&str, &str)> {
        self.missing.iter().map(|(part, reason)| (part.as_str(), reason.as_str()))
    }

    /// Collects everything.
    pub(super) fn all(&mut self, source: &Source, config: &Config, named: Option<&Path>) {
        let socket = socket_of(source, config, named);
        self.add("versions.txt", Ok(versions()));
        let settings = source.layers().map_err(Into::into);
        self.add("config.toml", settings.and_then(|layers| config::with_origins(&layers, redact::shown)));
        let status = get(&socket, "/v1/status");
        let pid = status.as_deref().ok().and_then(|text| serde_json::from_str::<Value>(text).ok()?["pid"].as_u64());
        self.add("status.json", status);
        self.add("metrics.txt", get(&socket, "/metrics"));
        self.add("doctor.json", doctor::report(source, named).and_then(|report| pretty(&report)));
        let scan = SearchPath::standard(config.plugins.dir.as_deref()).scan();
        self.add("plugins.json", pretty(&plugins::report(config, &scan, &quarantine(config), now_ms())));
        let log = ["--unit", UNIT, "--lines", LOG_LINES, "--no-pager", "--output", "short-iso"];
        self.add("log.txt", said("journalctl", &log));
        self.add("service.txt", said("systemctl", &["show", UNIT, "--property", PROPERTIES]));
        self.add("disk.txt", said("df", &["-P", &Paths::of(config).state_dir.display().to_string()]));
        self.add("machine.txt", files(MACHINE_FILES.iter().map(Path::new)));
        match pid {
            Some(pid) => self.process(pid),
            None => self.missing.push(("process.txt".to_owned(), "no daemon answers".to_owned())),
        }
    }

    /// What the kernel says of the daemon; not its environment, arguments or memory.
    fn process(&mut self, pid: u64) {
        let of = |name: &str| Path::new("/proc").join(pid.to_string()).join(name);
        let names = ["status", "limits", "cgroup", "schedstat"].map(of);
        self.add("process.txt", files(names.iter().map(std::path::PathBuf::as_path)));
        let group = read(&of("cgroup")).and_then(|text| {
            let path = text.lines().find_map(|line| line.strip_prefix("0::")).context("no unified hierarchy")?;
            let group = Path::new("/sys/fs/cgroup").join(path.trim_start_matches('/'));
            let names: Vec<_> = GROUP_FILES.iter().map(|name| group.join(name)).collect();
            files(names.iter().map(std::path::PathBuf::as_path))
        });
        self.add("cgroup.txt", group);
    }

    fn add(&mut self, name: &str, text: anyhow::Result<String>) {
        match text {
            Ok(text) => self.parts.push((name.to_owned(), shortened(text))),
            Err(error) => self.missing.push((name.to_owned(), crate::ctl::message(&error))),
        }
    }
}

fn versions() -> String {
    let kernel = rustix::system::uname();
    let mut text = format!("sparsectl {}\n", env!("CARGO_PKG_VERSION"));
    for part in [kernel.sysname(), kernel.release(), kernel.version(), kernel.machine()] {
        // A String takes all.
        let _whole = writeln!(text, "{}", part.to_string_lossy()).is_ok();
    }
    text
}

/// What the daemon answers at `path`, as text.
fn get(socket: &Path, path: &str) -> anyhow::Result<String> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let body = runtime.block_on(soon(Client::new(socket).get_file(path)))?;
    String::from_utf8(body.to_vec()).context("an answer that is not text")
}

fn pretty(value: &Value) -> anyhow::Result<String> {
    Ok(serde_json::to_string_pretty(value)?)
}

/// Files of the kernel one after the other; those that cannot be read are left out.
fn files<'a>(paths: impl Iterator<Item = &'a Path>) -> anyhow::Result<String> {
    let read = paths.filter_map(|path| Some(format!("== {}\n{}\n", path.display(), read(path).ok()?)));
    let text: String = read.collect();
    ensure!(!text.is_empty(), "none of its files can be read");
    Ok(text)
}

fn read(path: &Path) -> anyhow::Result<String> {
    let mut bytes = Vec::new();
    File::open(path)?.take(PART_BYTES_MAX as u64).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// The end of a text that is too long, from a line's beginning on.
fn shortened(text: String) -> String {
    let Some(from) = text.len().checked_sub(PART_BYTES_MAX).filter(|&from| from > 0) else { return text };
    let line = text.as_bytes()[from..].iter().position(|&byte| byte == b'\n').map_or(text.len(), |at| from + at + 1);
    format!("(the beginning is left out)\n{}", &text[line..])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_a_long_part_the_end_is_kept_in_whole_lines() {
        let text = format!("é{}\nlast line\n", "x".repeat(PART_BYTES_MAX));
        assert_eq!(shortened(text), "(the beginning is left out)\nlast line\n");
        assert_eq!(shortened("short".to_owned()), "short");
    }

    #[test]
    fn a_part_that_cannot_be_had_is_named_with_the_reason() {
        let mut collected = Collected::default();
        collected.add("x.txt", said("/no/such/tool", &[]));
        let (part, reason) = collected.missing().next().unwrap();
        assert!(part == "x.txt" && reason.contains("/no/such/tool"), "{reason}");
    }
}
