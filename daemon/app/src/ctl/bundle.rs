//! `sparsectl support-bundle`: what must somebody elsewhere know of this box to help, and nothing that is private?
//!
//! What people said is not looked for: no file of sessions, of the MQTT journal or of a process's environment is read.
//! What is collected goes through [`redact`] all the same.

mod collect;
mod redact;

use super::print;
use crate::config::{Config, Paths, Source};
use anyhow::Context;
use collect::Collected;
use redact::Redactor;
use std::fs::File;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

/// Write what helps to find a fault into a tar file: status, configuration, doctor's report, log, kernel, control
/// group.
///
/// Prompts, answers, conversations, keys, passwords and environments are not in it: they are not collected, secrets
/// that the configuration names are looked for in all the rest, and settings that may be secret are left out. Look at
/// it before you send it: `tar xOf FILE | less`. Run it as root to have the service's log and control group in it. The
/// daemon is asked for its status: a service that is stopped is started by its socket.
#[derive(Debug, clap::Args)]
pub(super) struct SupportBundle {
    /// Where it goes; sparsed-support-TIME.tar here without it. It must not be there yet.
    file: Option<PathBuf>,
    #[command(flatten)]
    source: Source,
    /// The daemon's socket.
    #[arg(long, env = "SPARSED_SOCKET")]
    socket: Option<PathBuf>,
}

impl SupportBundle {
    pub(super) fn run(self) -> anyhow::Result<()> {
        let seconds = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        let name = format!("sparsed-support-{seconds}");
        let path = self.file.clone().unwrap_or_else(|| PathBuf::from(format!("{name}.tar")));
        // A configuration that is wrong is what the bundle may be for.
        let config = self.source.load().unwrap_or_default();
        let redactor = Redactor::of(&self.source);
        let mut collected = Collected::default();
        collected.all(&self.source, &config, self.socket.as_deref());
        write(&path, &name, seconds, &collected, &redactor).with_context(|| path.display().to_string())?;
        for (part, reason) in collected.missing() {
            print(&format!("without {part}: {reason}"))?;
        }
        print(&format!("{}: {} parts; look at it before you send it", path.display(), collected.parts().len()))
    }
}

/// Writes the parts, redacted, as files of one folder.
fn write(path: &Path, folder: &str, seconds: u64, collected: &Collected, redactor: &Redactor) -> anyhow::Result<()> {
    // Who may not read the log or the configuration is not to read them here.
    let file = File::options().write(true).create_new(true).mode(0o600).open(path)?;
    let mut archive = tar::Builder::new(file);
    let missing = collected.missing().map(|(part, reason)| format!("{part}: {reason}\n"));
    let index = ("missing.txt".to_owned(), missing.collect::<String>());
    for (name, text) in collected.parts().iter().chain([&index]) {
        let text = redactor.clean(text);
        let mut header = tar::Header::new_ustar();
        header.set_size(text.len() as u64);
        header.set_mode(0o600);
        header.set_mtime(seconds);
        archive.append_data(&mut header, format!("{folder}/{name}"), text.as_bytes())?;
    }
    archive.into_inner()?.flush()?;
    Ok(())
}

/// Where a daemon of this configuration listens, unless another socket is named.
fn socket_of(source: &Source, config: &Config, named: Option<&Path>) -> PathBuf {
    match named {
        None if !source.names_nothing() => Paths::of(config).socket,
        named => super::client::socket_or_default(named),
    }
}
