//! `sparsectl doctor`: what keeps this box from serving well, and which command mends it?

mod accelerators;
mod access;
mod disk;
mod doors;
mod elsewhere;
mod installation;
mod machine;
mod named;
mod network;
mod people;
mod plugins;
mod service;
mod state;

use super::client::{own_socket, socket_or_default};
use super::{print, print_json};
use crate::config::{Config, Paths, Source};
use crate::door::is_same;
use anyhow::bail;
use serde_json::{Value, json};
use sparsed_backend::SearchPath;
use std::path::{Path, PathBuf};

/// Check this box: configuration, files, models, plugins, accelerators, processor, memory, disk, clock, temperature,
/// and access to the daemon, the message bus and the MQTT broker.
///
/// Each line is ok, warn (it serves, but not as well as it could) or fail (it does not serve), with what to type. Run
/// it as the daemon's user (`sudo -u sparsed sparsectl doctor`) to check what the daemon may do, as yourself to check
/// what you may do. Exit code 1 when anything fails. Nothing is changed, and a service that is stopped stays so; the
/// disk's speed is measured with a file of 1 MiB. Of models the heads are read, and with --full all bytes.
#[derive(Debug, clap::Args)]
pub(super) struct Doctor {
    #[command(flatten)]
    source: Source,
    /// The daemon's socket.
    #[arg(long, env = "SPARSED_SOCKET")]
    socket: Option<PathBuf>,
    /// Read all of each model: a file of the store is compared with its SHA-256, of another one it is told.
    #[arg(long)]
    full: bool,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// Where the operator's settings are.
const OPERATORS_FILE: &str = "/etc/sparsed/config.toml";

/// What changes a setting of the service.
fn sets(what: &str) -> String {
    format!("sudoedit {OPERATORS_FILE}: {what}; then sudo systemctl restart sparsed")
}

/// How a check ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Verdict {
    Ok,
    Warn,
    Fail,
}

impl Verdict {
    fn word(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Warn => "warn",
            Self::Fail => "fail",
        }
    }
}

/// One line of the report.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Check {
    /// What was looked at.
    name: String,
    verdict: Verdict,
    /// What was found.
    found: String,
    /// What mends it.
    fix: Option<String>,
}

impl Check {
    fn ok(name: impl Into<String>, found: impl Into<String>) -> Self {
        Self { name: name.into(), verdict: Verdict::Ok, found: found.into(), fix: None }
    }

    fn warn(name: impl Into<String>, found: impl Into<String>, fix: impl Into<String>) -> Self {
        Self { name: name.into(), verdict: Verdict::Warn, found: found.into(), fix: Some(fix.into()) }
    }

    fn fail(name: impl Into<String>, found: impl Into<String>, fix: impl Into<String>) -> Self {
        Self { name: name.into(), verdict: Verdict::Fail, found: found.into(), fix: Some(fix.into()) }
    }

    fn json(&self) -> Value {
        json!({ "check": self.name, "verdict": self.verdict.word(), "found": self.found, "fix": self.fix })
    }
}

impl Doctor {
    pub(super) fn run(self) -> anyhow::Result<()> {
        let checks = self.checks()?;
        if self.json {
            print_json(&checks.iter().map(Check::json).collect())?;
        } else {
            print(&text(&checks))?;
        }
        let n_failed = checks.iter().filter(|check| check.verdict == Verdict::Fail).count();
        if n_failed > 0 {
            bail!("{n_failed} of {} checks failed", checks.len());
        }
        Ok(())
    }

    fn checks(&self) -> anyhow::Result<Vec<Check>> {
        let root = Path::new("/");
        let service = self.service(|| service::Service::ask(root), own_socket().is_some());
        let (check, config) = installation::configuration(root, &self.source, service.as_ref());
        let mut checks = vec![check];
        let config = config.unwrap_or_else(Config::default);
        checks.extend(named::named_files(root, &config, service.as_ref()));
        let paths = if service.is_some() { Paths::of_service(&config) } else { Paths::of(&config) };
        checks.push(state::folder(root, &paths.state_dir, service.as_ref()));
        // Another disk's room and speed would be told.
        if crate::state::unmounted(root, &paths.state_dir).is_none() {
            checks.extend(disk::disk(&paths.state_dir, config.sessions.kv.0, service.as_ref()));
        }
        checks.push(machine::processor());
        let socket = match &service {
            // Its manager opens it: the configuration does not decide where.
            Some(service) => service.socket.clone().unwrap_or_else(|| paths.socket.clone()),
            None => self.socket(&paths),
        };
        let pid = match &service {
            Some(service) => service.pid,
            None => access::pid(&socket),
        };
        let memory = machine::Memory::of(root, service.as_ref(), pid);
        checks.extend(machine::memory(root, memory.as_ref()));
        checks.extend(memory.as_ref().map(machine::largest_model));
        checks.extend(installation::models(root, &config, &paths, memory.as_ref(), self.full, service.as_ref()));
        checks.extend(elsewhere::upstreams(&config, service.as_ref()));
        let scan = SearchPath::standard(config.plugins.dir.as_deref()).scan();
        // One that does not run is not started for this.
        let status = match service.as_ref().is_none_or(|service| service.is_active) {
            true => access::status(&socket)?,
            false => None,
        };
        let used = plugins::Plugins::of(&config, &paths, &scan, status.as_ref());
        checks.extend(plugins::plugins(&config, &paths, &scan, &used));
        checks.extend(accelerators::accelerators(root, &used, service.as_ref()));
        checks.push(machine::clock(root));
        checks.extend(machine::temperature(root));
        checks.extend(access::daemon(&socket, service.as_ref())?);
        checks.extend(doors::socket_path(&config, service.as_ref()));
        checks.extend(status.as_ref().and_then(state::sessions_away));
        checks.extend(status.as_ref().and_then(state::other_key));
        checks.extend(doors::message_bus(root, &config, service.as_ref())?);
        checks.extend(doors::tcp_unused(&config.tcp, service.as_ref()));
        checks.extend(doors::tcp(&config.tcp, service.as_ref()));
        checks.extend(doors::broker(&config.mqtt, service.as_ref()));
        Ok(checks)
    }

    /// The service, of which `ask` knows, unless another daemon is asked for: with a configuration that is named, a
    /// socket that is not the service's, or where nothing is named and whoever asks `has_own`.
    fn service(&self, ask: impl FnOnce() -> Option<service::Service>, has_own: bool) -> Option<service::Service> {
        let service = self.source.names_nothing().then(ask).flatten()?;
        let is_meant = match &self.socket {
            None => !has_own,
            // Where its manager opens none, the configuration decides.
            Some(named) => match &service.socket {
                Some(socket) => is_same(named, socket),
                None => is_same(named, &Paths::of_service(&self.source.load().unwrap_or_default()).socket),
            },
        };
        is_meant.then_some(service)
    }

    /// Where the daemon that is asked for listens.
    fn socket(&self, paths: &Paths) -> PathBuf {
        self.socket.clone().unwrap_or_else(|| match self.source.names_nothing() {
            true => socket_or_default(None),
            false => paths.socket.clone(),
        })
    }
}

/// All checks as JSON, for a daemon at `socket` where one is named.
///
/// # Errors
/// As the command's.
pub(super) fn report(source: &Source, socket: Option<&Path>) -> anyhow::Result<Value> {
    let doctor = Doctor { source: source.clone(), socket: socket.map(Path::to_owned), full: false, json: true };
    Ok(doctor.checks()?.iter().map(Check::json).collect())
}

/// Whether this box has sparsed as a service of the system.
pub(super) fn has_service() -> bool {
    service::Service::ask(Path::new("/")).is_some()
}

/// What keeps a daemon from its start of the files that `config`, as `source` has it, names for its doors; and remarks:
/// what whoever asks could not see of them, and a setting that the service does not follow.
pub(super) fn of_config(source: &Source, config: &Config) -> (Vec<String>, Vec<String>) {
    let root = Path::new("/");
    let service = source.names_nothing().then(|| service::Service::ask(root)).flatten();
    let mut checks = named::named_files(root, config, service.as_ref());
    checks.extend(doors::socket_path(config, service.as_ref()));
    checks.extend(doors::tcp_unused(&config.tcp, service.as_ref()));
    let (wrong, remarks): (Vec<_>, Vec<_>) = checks.into_iter().partition(|check| check.verdict == Verdict::Fail);
    let said = |check: &Check| format!("{}: {}", check.name, check.found);
    let with_fix = |check: &Check| match &check.fix {
        Some(fix) => format!("{} -> {fix}", said(check)),
        None => said(check),
    };
    (wrong.iter().map(said).collect(), remarks.iter().map(with_fix).collect())
}

fn text(checks: &[Check]) -> String {
    let width = checks.iter().map(|check| check.name.len()).max().unwrap_or(0);
    let lines = checks.iter().map(|Check { name, verdict, found, fix }| {
        let fix = fix.as_ref().map_or(String::new(), |fix| format!("\n      {:width$}  -> {fix}", ""));
        format!("{:<4}  {name:<width$}  {found}{fix}", verdict.word())
    });
    lines.collect::<Vec<_>>().join("\n")
}

/// A number of bytes, for people.
fn size(bytes: u64) -> String {
    indicatif::BinaryBytes(bytes).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The advice for `socket.path` names the service's socket by the environment, and the support bundle by its path.
    #[test]
    fn who_names_the_services_socket_asks_for_the_service() {
        let dir = tempfile::tempdir().unwrap();
        let (socket, link) = (dir.path().join("api.sock"), dir.path().join("link.sock"));
        std::fs::write(&socket, "").unwrap();
        std::os::unix::fs::symlink(&socket, &link).unwrap();
        let service = service::Service { socket: Some(socket.clone()), ..service::Service::default() };
        let meant = |source: Source, named: Option<&Path>, has_own| {
            let doctor = Doctor { source, socket: named.map(Path::to_owned), full: false, json: true };
            doctor.service(|| Some(service.clone()), has_own).is_some()
        };
        let asked = |named: Option<&Path>, has_own| meant(Source::default(), named, has_own);
        assert!(asked(None, false) && asked(Some(&socket), false) && asked(Some(&link), true));
        assert!(!asked(None, true) && !asked(Some(&dir.path().join("mine.sock")), false));
        assert!(!meant(Source::of(Path::new("/c.toml"), &[]), Some(&socket), false));
    }

    #[test]
    fn each_line_says_what_mends_it() {
        let checks = [Check::ok("clock", "2026"), Check::fail("state folder", "is absent", "mkdir /x")];
        let expected = "ok    clock         2026\nfail  state folder  is absent\n                    -> mkdir /x";
        assert_eq!(text(&checks), expected);
    }
}
