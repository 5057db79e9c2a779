//! What does the host process do? It loads one plugin and does what the daemon asks, with the daemon's own types.
//!
//! One thread answers control calls in order; each lane has a thread for its jobs. The process ends when the daemon
//! closes the socket or dies.

mod lane;
mod objects;
mod sandbox;

pub use sandbox::confine;
pub(crate) use sandbox::matching_devices;

use crate::remote::wire::{Failure, Reply, Request, Start, receive, send};
use crate::{BackendError, Found, Plugin};
use objects::Objects;
use rustix::process::{Signal, getppid, set_parent_process_death_signal};
use sparsed_abi::{E_ABI, E_DRIVER, E_INVALID, LAYOUT_DIGEST, OK};
use std::fs::File;
use std::io::{Error, ErrorKind};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

/// Serves one plugin to the daemon at the other end of standard input, until that end is closed.
///
/// # Errors
/// Standard input that is not the daemon's socket, or a message that no daemon of this version sends.
pub fn run_plugin_host() -> std::io::Result<()> {
    let socket = take_socket()?;
    let (mut plugin, mut objects) = (None, Objects::default());
    while let Some((request, fds)) = receive::<Request>(socket.as_fd())? {
        let reply = match (request, &plugin) {
            (Request::Start(start), None) => load(&start).map(|(loaded, device_count)| {
                let (_, abi_minor) = loaded.abi();
                plugin = Some(loaded);
                Reply::Started { device_count, abi_minor }
            }),
            (Request::Start(_), Some(_)) | (_, None) => {
                return Err(Error::new(ErrorKind::InvalidData, "the first request, and only it, starts the plugin"));
            }
            (request, Some(plugin)) => objects.answer(plugin, request, fds),
        };
        send(socket.as_fd(), &reply.unwrap_or_else(|error| failed(&error)), &[])?;
    }
    Ok(())
}

/// Binds this process's life to the daemon's and takes the socket out of the way of whoever reads standard input.
fn take_socket() -> std::io::Result<OwnedFd> {
    let socket = rustix::io::fcntl_dupfd_cloexec(rustix::stdio::stdin(), 3)?;
    set_parent_process_death_signal(Some(Signal::KILL))?;
    let daemon = rustix::net::sockopt::socket_peercred(&socket)?.pid;
    if getppid() != Some(daemon) {
        return Err(Error::new(ErrorKind::NotConnected, "the daemon is gone, or this process is not its child"));
    }
    rustix::stdio::dup2_stdin(File::open("/dev/null")?)?;
    Ok(socket)
}

/// Gives up what the plugin does not need, then loads it.
fn load(start: &Start) -> Result<(Arc<Plugin>, u32), BackendError> {
    let refuse = |reason: String| BackendError::Host { plugin: start.id.clone(), reason };
    if start.version != env!("CARGO_PKG_VERSION") || start.layout != LAYOUT_DIGEST {
        let mine = env!("CARGO_PKG_VERSION");
        return Err(refuse(format!("the host's executable is sparsed {mine}, the caller is {}", start.version)));
    }
    // Read for the devices and files it names, and again as the library is loaded, when nothing else can be opened.
    let manifest = Found::open(&start.dir)?.manifest;
    confine(&start.dir, &manifest).map_err(|error| refuse(format!("cannot give up rights: {error}")))?;
    let found = Found::open(&start.dir)?;
    if (&found.manifest.id, &found.manifest.version) != (&start.id, &start.plugin_version) {
        return Err(refuse("its plugin.toml has changed".to_owned()));
    }
    let plugin = Plugin::load_here(&found, &start.settings)?;
    let count = plugin.device_count()?;
    Ok((plugin, count))
}

/// A failure as the daemon hears it: a plugin's with its own status and words.
fn failed(error: &BackendError) -> Reply {
    Reply::Failed(match error {
        BackendError::NoDevice { .. } => Failure::of(error, E_INVALID),
        // No plugin may say that it has failed with a status that is none.
        BackendError::Call { status, .. } if *status >= OK => Failure::new(E_DRIVER, error.to_string()),
        BackendError::Call { .. } | BackendError::Host { .. } => Failure::of(error, E_DRIVER),
        // A manifest, a file or a table that is not as it must be.
        other => Failure::of(other, E_ABI),
    })
}
