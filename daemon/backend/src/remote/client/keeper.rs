//! Who looks after the child process? A thread that starts it, writes what it says into the log, and takes its end.
//!
//! The kernel ends a child with the *thread* that started it (PR_SET_PDEATHSIG), so that thread must live as long as
//! the child: it is this one. The child leads a process group of its own, so that a terminal's interrupt does not reach
//! it, and that what it has started, where its kernel let it, ends with it.

use super::lines::{Flow, Lines};
use crate::remote::timespec;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open};
use std::cell::RefCell;
use std::collections::VecDeque;
use std::fs::File;
use std::io::{Error, ErrorKind, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, ExitStatus};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak, mpsc};
use std::time::{Duration, Instant};

/// How many last lines are kept for the report of its end.
const TAIL_LINES: usize = 8;
/// Most bytes that are read at a time: a grandchild may hold the pipes and write for ever.
const REST_BYTES_MAX: usize = 256 << 10;
/// How long a child that was killed is waited for. One that a driver holds in the kernel ends when the driver lets it.
const END_PATIENCE: Duration = Duration::from_secs(2);

/// The children that live.
static LIVING: Mutex<Vec<Weak<OwnedFd>>> = Mutex::new(Vec::new());

/// A running child and its thread.
#[derive(Debug)]
pub(super) struct Keeper {
    /// In decimal, for messages.
    pub(super) pid: u32,
    pidfd: Arc<OwnedFd>,
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    ended: Condvar,
}

#[derive(Debug, Default)]
struct State {
    tail: VecDeque<String>,
    end: Option<String>,
}

impl Keeper {
    /// Starts `command`, whose standard output and error must be pipes. Lines are logged with this plugin's id.
    ///
    /// # Errors
    /// The system's.
    pub(super) fn start(mut command: Command, plugin: String) -> Result<Self, Error> {
        let shared = Arc::new(Shared::default());
        let (started, start) = mpsc::sync_channel(1);
        let theirs = Arc::clone(&shared);
        command.process_group(0);
        // Not joined, since a child that cannot end must not hold the daemon: `drop` waits for its word, with a limit.
        std::thread::Builder::new().name("plugin-host".to_owned()).spawn(move || {
            let spawned = command.spawn().and_then(|child| Ok((pidfd_of(&child)?, child)));
            drop(command); // with the child's end of the socket
            match spawned {
                Err(error) => drop(started.send(Err(error))),
                Ok((pidfd, child)) => {
                    let pidfd = Arc::new(pidfd);
                    let mut living = lock(&LIVING);
                    living.retain(|child| child.strong_count() > 0);
                    living.push(Arc::downgrade(&pidfd));
                    drop(living);
                    drop(started.send(Ok((child.id(), Arc::clone(&pidfd)))));
                    keep(child, pidfd, &plugin, &theirs);
                }
            }
        })?;
        let (pid, pidfd) = start.recv().map_err(|_| Error::other("the thread ended"))??;
        Ok(Self { pid, pidfd, shared })
    }

    /// Readable once the child has ended.
    pub(super) fn pidfd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }

    /// Kills the child, if it lives.
    pub(super) fn kill(&self) {
        kill(&self.pidfd);
    }

    /// What it ended with and its last lines, oldest first; the former `None` when it has not ended in `patience`.
    pub(super) fn report(&self, patience: Duration) -> (Option<String>, Vec<String>) {
        let state = lock(&self.shared.state);
        let waited = self.shared.ended.wait_timeout_while(state, patience, |state| state.end.is_none());
        let (state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        (state.end.clone(), state.tail.iter().cloned().collect())
    }
}

impl Drop for Keeper {
    /// The child must have ended, or be about to.
    fn drop(&mut self) {
        if self.report(END_PATIENCE).0.is_none() {
            let waited_ms = END_PATIENCE.as_millis();
            log::error!(host = self.pid, waited_ms:%; "a killed plugin host does not end: a driver holds it in the kernel");
        }
    }
}

/// Kills every plugin host of this process, so that calls that wait for one fail at once. For the end of the daemon.
pub fn kill_plugin_hosts() {
    lock(&LIVING).iter().filter_map(Weak::upgrade).for_each(|pidfd| kill(&pidfd));
}

fn kill(pidfd: &OwnedFd) {
    // It has ended already: as good.
    let _gone = rustix::process::pidfd_send_signal(pidfd, Signal::KILL).is_err();
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn pid_of(child: &Child) -> Option<Pid> {
    i32::try_from(child.id()).ok().and_then(Pid::from_raw)
}

fn pidfd_of(child: &Child) -> Result<OwnedFd, Error> {
    Ok(pidfd_open(pid_of(child).ok_or(ErrorKind::InvalidData)?, PidfdFlags::empty())?)
}

/// Reads until the child has ended, then takes its status.
fn keep(mut child: Child, pidfd: Arc<OwnedFd>, plugin: &str, shared: &Shared) {
    let pid = child.id();
    let flow = RefCell::new(Flow::new(Instant::now()));
    let told = |dropped: Option<u64>| {
        if let Some(n) = dropped {
            log::warn!(plugin, host = pid, lines = n; "lines of the plugin host dropped: it says too much");
        }
    };
    let mut said = |level, line: String| {
        let (is_logged, dropped) = flow.borrow_mut().admit(Instant::now());
        told(dropped);
        if is_logged {
            log::log!(level, plugin, host = pid; "{line}");
        }
        let mut state = lock(&shared.state);
        if state.tail.len() == TAIL_LINES {
            state.tail.pop_front();
        }
        state.tail.push_back(line);
    };
    let out = child.stdout.take().and_then(|pipe| Stream::new(pipe.into(), log::Level::Info));
    let err = child.stderr.take().and_then(|pipe| Stream::new(pipe.into(), log::Level::Warn));
    let mut streams: Vec<Stream> = out.into_iter().chain(err).collect();
    loop {
        let mut fds = vec![PollFd::new(&pidfd, PollFlags::IN)];
        fds.extend(streams.iter().map(|stream| PollFd::new(&stream.pipe, PollFlags::IN)));
        // What was dropped is told soon, though nothing more is said.
        let pause = flow.borrow().has_dropped().then(|| timespec(Flow::TIME));
        if poll(&mut fds, pause.as_ref()).is_err_and(|errno| errno != Errno::INTR) {
            break;
        }
        told(flow.borrow_mut().look(Instant::now()));
        let ended = !fds[0].revents().is_empty();
        streams.retain_mut(|stream| {
            let is_open = stream.read(&mut said);
            if !is_open {
                stream.finish(&mut said);
            }
            is_open
        });
        if ended {
            break;
        }
    }
    streams.iter_mut().for_each(|stream| stream.finish(&mut said));
    told(flow.borrow_mut().end());
    // Before the child is taken: until then its number, and its group's, cannot be another's.
    if let Some(group) = pid_of(&child) {
        let _none_left = rustix::process::kill_process_group(group, Signal::KILL).is_err();
    }
    let end = match child.wait() {
        Ok(status) => describe(status),
        Err(error) => format!("ended, and nobody knows how: {error}"),
    };
    // Whoever hears of the end finds nothing of it left open.
    drop((streams, child, pidfd));
    lock(&shared.state).end = Some(end);
    shared.ended.notify_all();
}

/// For people: how a process ended.
fn describe(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("ended with exit status {code}"),
        (_, Some(signal)) => format!("was ended by signal {signal}"),
        _ => "ended".to_owned(),
    }
}

/// Standard output or error of the child.
#[derive(Debug)]
struct Stream {
    pipe: File,
    lines: Lines,
}

impl Stream {
    /// `None` when the pipe cannot be read without waiting.
    fn new(pipe: OwnedFd, level: log::Level) -> Option<Self> {
        rustix::io::ioctl_fionbio(&pipe, true).ok()?;
        Some(Self { pipe: pipe.into(), lines: Lines::new(level) })
    }

    /// Reads what is there; false at its end.
    fn read(&mut self, said: &mut impl FnMut(log::Level, String)) -> bool {
        let (mut buffer, mut total) = ([0; 4096], 0);
        while total < REST_BYTES_MAX {
            match self.pipe.read(&mut buffer) {
                Ok(0) => return false,
                Ok(n) => {
                    self.lines.push(&buffer[..n], said);
                    total += n;
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return error.kind() == ErrorKind::WouldBlock,
            }
        }
        true
    }

    /// Gives out what has no line's end.
    fn finish(&mut self, said: &mut impl FnMut(log::Level, String)) {
        self.lines.finish(said);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::PathBuf;
    use std::process::Stdio;

    /// More than any test takes.
    const PATIENCE: Duration = Duration::from_secs(60);

    fn shell(script: &str) -> Keeper {
        let mut command = Command::new("/bin/sh");
        command.args(["-c", script]).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        Keeper::start(command, "test".to_owned()).unwrap()
    }

    #[test]
    fn an_end_is_told_with_the_last_lines_of_both_streams() {
        let (end, tail) = shell("echo out; echo '<3>err' >&2; printf cut; exit 3").report(PATIENCE);
        assert_eq!(end.as_deref(), Some("ended with exit status 3"));
        assert!(["out", "err", "cut"].iter().all(|line| tail.iter().any(|t| t == line)), "{tail:?}");
    }

    #[test]
    fn a_killed_child_is_told_by_its_signal() {
        let keeper = shell("exec sleep 1000");
        assert_eq!(keeper.report(Duration::ZERO).0, None);
        keeper.kill();
        assert_eq!(keeper.report(PATIENCE).0.as_deref(), Some("was ended by signal 9"));
    }

    #[test]
    fn a_grandchild_that_keeps_the_pipes_ends_with_the_child_and_does_not_hold_its_end_up() {
        let keeper = shell("sleep 1000 & echo $!; exit 0");
        let (end, tail) = keeper.report(PATIENCE);
        assert_eq!(end.as_deref(), Some("ended with exit status 0"));
        let stat = PathBuf::from(format!("/proc/{}/stat", tail[0]));
        // Killed, it is a zombie until its new parent has taken it.
        let is_dead = || std::fs::read_to_string(&stat).map_or(true, |stat| stat.contains(") Z "));
        let deadline = Instant::now() + PATIENCE;
        while !is_dead() {
            assert!(Instant::now() < deadline, "process {} lives", tail[0]);
            std::thread::yield_now();
        }
    }

    #[test]
    fn a_flood_is_cut_and_told_and_the_last_lines_are_kept() {
        let (end, tail) = shell("seq 1 100000; exit 0").report(PATIENCE);
        assert_eq!(end.as_deref(), Some("ended with exit status 0"));
        assert_eq!(tail.last().map(String::as_str), Some("100000"));
    }

    #[test]
    fn a_program_that_is_not_there_is_an_error() {
        let mut command = Command::new("/nowhere/sparsed");
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        assert_eq!(Keeper::start(command, "test".to_owned()).unwrap_err().kind(), ErrorKind::NotFound);
    }
}
