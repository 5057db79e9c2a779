//! Is the plugin host alive, and what does it answer? One conversation at a time over the control socket.
//!
//! A host that dies, hangs or answers nonsense is lost once and for all: it is killed, and every later call answers
//! `SPD_E_DEVICE_LOST` with the first reason, without waiting.

use super::keeper::Keeper;
use crate::remote::wire::{Object, Reply, Request, receive, send};
use crate::remote::{HostOptions, timespec};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use sparsed_abi::{E_DEVICE_LOST, E_INVALID, OK};
use sparsed_plugin_kit::{PluginError, Result};
use std::io::Error;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

/// How long the kernel may take to end a killed process.
const KILL_PATIENCE: Duration = Duration::from_secs(2);
/// How long a process that has closed its connection may take to end: its files are closed a moment before.
const DYING: Duration = Duration::from_millis(500);
/// How long the host may take to free an object. Drops must not hold the daemon up.
const DROP_TIMEOUT: Duration = Duration::from_secs(10);
/// What a service manager has given the daemon and not its children.
const NOT_FOR_CHILDREN: &[&str] =
    &["NOTIFY_SOCKET", "WATCHDOG_PID", "WATCHDOG_USEC", "LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES"];

/// The connection to one host.
#[derive(Debug)]
pub(in crate::remote) struct Link {
    plugin: String,
    options: HostOptions,
    /// Held during a request and its answer.
    socket: Mutex<OwnedFd>,
    /// Why the host is lost, if it is.
    lost: OnceLock<String>,
    next_id: AtomicU32,
    keeper: Keeper,
}

impl Link {
    /// Starts a host process for plugin `plugin`.
    pub(super) fn start(plugin: &str, options: &HostOptions) -> std::result::Result<Self, Error> {
        let (near, far) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
        let mut command = Command::new(&options.program);
        command.arg("plugin-host").arg("--log-level").arg(log::max_level().as_str().to_ascii_lowercase());
        for name in NOT_FOR_CHILDREN {
            command.env_remove(name);
        }
        command.current_dir("/").stdin(Stdio::from(far)).stdout(Stdio::piped()).stderr(Stdio::piped());
        let keeper = Keeper::start(command, plugin.to_owned())?;
        log::info!(plugin, host = keeper.pid; "plugin host started");
        Ok(Self {
            plugin: plugin.to_owned(),
            options: options.clone(),
            socket: Mutex::new(near),
            lost: OnceLock::new(),
            next_id: AtomicU32::new(1),
            keeper,
        })
    }

    pub(super) fn options(&self) -> &HostOptions {
        &self.options
    }

    /// The host's process id.
    pub(super) fn pid(&self) -> u32 {
        self.keeper.pid
    }

    /// Readable once the host has ended.
    pub(super) fn pidfd(&self) -> BorrowedFd<'_> {
        self.keeper.pidfd()
    }

    /// A number for a new object.
    pub(super) fn new_id(&self) -> u32 {
        self.next_id.fetch_add(1, Ordering::Relaxed)
    }

    /// An error once the host is lost.
    pub(super) fn alive(&self) -> Result<()> {
        self.lost.get().map_or(Ok(()), |reason| Err(PluginError::new(E_DEVICE_LOST, reason.clone())))
    }

    /// Asks and waits for the answer. A refusal of the host's is an error with its status.
    pub(super) fn call(&self, request: &Request, fds: &[BorrowedFd<'_>]) -> Result<Reply> {
        self.call_within(request, fds, self.options.call_timeout)
    }

    /// As [`Self::call`], with a limit of its own.
    pub(super) fn call_within(&self, request: &Request, fds: &[BorrowedFd<'_>], limit: Duration) -> Result<Reply> {
        let socket = self.socket.lock().unwrap_or_else(PoisonError::into_inner);
        self.alive()?;
        match send(socket.as_fd(), request, fds) {
            Err(error) if error.kind() == std::io::ErrorKind::InvalidData => {
                return Err(PluginError::new(E_INVALID, error.to_string()));
            }
            Err(error) => return Err(self.lose_closed(&format!("does not listen: {error}"))),
            Ok(()) => {}
        }
        if !self.wait(socket.as_fd(), limit) {
            return Err(self.lose(&format!("did not answer for {} ms", limit.as_millis())));
        }
        match receive::<Reply>(socket.as_fd()) {
            Ok(Some((Reply::Failed(failure), _))) if failure.status < OK => Err(failure.into()),
            Ok(Some((Reply::Failed(_), _))) => Err(self.nonsense()),
            Ok(Some((reply, _))) => Ok(reply),
            Ok(None) => Err(self.lose_closed("closed its connection")),
            Err(error) => Err(self.lose(&format!("answers nonsense: {error}"))),
        }
    }

    /// Asks for something that has no answer but that it is done.
    pub(super) fn tell(&self, request: &Request, fds: &[BorrowedFd<'_>]) -> Result<()> {
        self.done(self.call(request, fds)?)
    }

    /// Lets the host forget an object. With a lost host it is forgotten already.
    pub(super) fn discard(&self, object: Object) {
        // The first failure has been logged where the host was lost.
        let limit = DROP_TIMEOUT.min(self.options.call_timeout);
        let answer = self.call_within(&Request::Drop(object), &[], limit);
        let _lost = answer.and_then(|reply| self.done(reply)).is_err();
    }

    /// Fails unless the answer says no more than that it is done.
    pub(super) fn done(&self, reply: Reply) -> Result<()> {
        match reply {
            Reply::Done => Ok(()),
            _ => Err(self.nonsense()),
        }
    }

    /// The error for an answer to another question.
    pub(super) fn nonsense(&self) -> PluginError {
        self.lose("answers another question")
    }

    /// Kills the host, if it lives, and says why it is lost from now on.
    pub(super) fn lose(&self, symptom: &str) -> PluginError {
        self.lose_within(symptom, Duration::ZERO)
    }

    /// As [`Self::lose`], for a connection that is closed: the sign of a process that is ending, whose end says more.
    fn lose_closed(&self, symptom: &str) -> PluginError {
        self.lose_within(symptom, DYING)
    }

    fn lose_within(&self, symptom: &str, dying: Duration) -> PluginError {
        let reason = self.lost.get_or_init(|| {
            let (died, _) = if self.has_ended(dying) { self.keeper.report(KILL_PATIENCE) } else { (None, Vec::new()) };
            let what = died.unwrap_or_else(|| symptom.to_owned());
            self.keeper.kill();
            let (_, tail) = self.keeper.report(KILL_PATIENCE);
            let (plugin, last) = (self.plugin.as_str(), tail.last().map_or("", String::as_str));
            log::error!(
                plugin, host = self.keeper.pid, what = what.as_str(), last_lines = tail.join(" | ").as_str();
                "plugin host lost"
            );
            let said = if last.is_empty() { String::new() } else { format!("; it said last: {last}") };
            format!("the plugin host {what}{said}")
        });
        PluginError::new(E_DEVICE_LOST, reason.clone())
    }

    fn has_ended(&self, limit: Duration) -> bool {
        self.wait_for(&mut [PollFd::from_borrowed_fd(self.pidfd(), PollFlags::IN)], limit)
    }

    /// Waits until the socket can be read or the host has ended, at most for `limit`.
    fn wait(&self, socket: BorrowedFd<'_>, limit: Duration) -> bool {
        let ready = |fd| PollFd::from_borrowed_fd(fd, PollFlags::IN);
        self.wait_for(&mut [ready(socket), ready(self.pidfd())], limit)
    }

    fn wait_for(&self, fds: &mut [PollFd<'_>], limit: Duration) -> bool {
        let deadline = Instant::now() + limit;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match poll(fds, Some(&timespec(left))) {
                Err(Errno::INTR) => {}
                ready => return ready.is_ok_and(|n| n > 0),
            }
        }
    }
}

impl Drop for Link {
    /// The host ends when its socket is closed; one that does not is killed.
    fn drop(&mut self) {
        if self.lost.get().is_none() {
            let socket = self.socket.get_mut().unwrap_or_else(PoisonError::into_inner);
            // An unconnected socket is as good as one that is shut down.
            let _gone = rustix::net::shutdown(&*socket, rustix::net::Shutdown::Both).is_err();
            let mut ended = [PollFd::from_borrowed_fd(self.keeper.pidfd(), PollFlags::IN)];
            if !self.wait_for(&mut ended, self.options.grace) {
                log::warn!(plugin = self.plugin.as_str(), host = self.keeper.pid; "plugin host killed: it did not end");
                self.keeper.kill();
            }
        }
    }
}
