//! Who looks after the child process? A thread that starts it, writes what it says into the log, and takes its end.
//!
//! The kernel ends a child with the *thread* that started it (PR_SET_PDEATHSIG), so that thread must live as long as
//! the child: it is this one.

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use std::collections::VecDeque;
use std::fs::File;
use std::io::{Error, ErrorKind, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, ExitStatus};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, mpsc};
use std::thread::JoinHandle;
use std::time::Duration;

/// Longest line in bytes; what is longer becomes several.
const LINE_BYTES_MAX: usize = 1024;
/// How many last lines are kept for the report of its end.
const TAIL_LINES: usize = 8;
/// Most bytes that are read at a time: a grandchild may hold the pipes and write for ever.
const REST_BYTES_MAX: usize = 256 << 10;

/// A running child and its thread.
#[derive(Debug)]
pub(super) struct Keeper {
    /// In decimal, for messages.
    pub(super) pid: u32,
    pidfd: Arc<OwnedFd>,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
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
        let thread = std::thread::Builder::new().name("plugin-host".to_owned()).spawn(move || {
            let spawned = command.spawn().and_then(|child| Ok((pidfd_of(&child)?, child)));
            drop(command); // with the child's end of the socket
            match spawned {
                Err(error) => drop(started.send(Err(error))),
                Ok((pidfd, child)) => {
                    let pidfd = Arc::new(pidfd);
                    drop(started.send(Ok((child.id(), Arc::clone(&pidfd)))));
                    keep(child, pidfd.as_fd(), &plugin, &theirs);
                }
            }
        })?;
        let (pid, pidfd) = start.recv().map_err(|_| Error::other("the thread ended"))??;
        Ok(Self { pid, pidfd, shared, thread: Some(thread) })
    }

    /// Readable once the child has ended.
    pub(super) fn pidfd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }

    /// Kills the child, if it lives.
    pub(super) fn kill(&self) {
        // It has ended already: as good.
        let _gone = rustix::process::pidfd_send_signal(&self.pidfd, rustix::process::Signal::KILL).is_err();
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
    /// The child must have ended, or end soon.
    fn drop(&mut self) {
        if let Some(thread) = self.thread.take() {
            // A panic there has been reported by its thread.
            let _panicked = thread.join().is_err();
        }
    }
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

fn pidfd_of(child: &Child) -> Result<OwnedFd, Error> {
    let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw).ok_or(ErrorKind::InvalidData)?;
    Ok(pidfd_open(pid, PidfdFlags::empty())?)
}

/// Reads until the child has ended, then takes its status.
fn keep(mut child: Child, pidfd: BorrowedFd<'_>, plugin: &str, shared: &Shared) {
    let pid = child.id();
    let mut said = |level, line: String| {
        log::log!(level, plugin, host = pid; "{line}");
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
        if poll(&mut fds, None).is_err_and(|errno| errno != Errno::INTR) {
            break;
        }
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
    let end = match child.wait() {
        Ok(status) => describe(status),
        Err(error) => format!("ended, and nobody knows how: {error}"),
    };
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
        Some(Self { pipe: pipe.into(), lines: Lines { level, partial: Vec::new() } })
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
        if !self.lines.partial.is_empty() {
            self.lines.push(b"\n", said);
        }
    }
}

/// Bytes on their way to lines. A line `<N>text` has the priority N of syslog, as services write it.
#[derive(Debug)]
struct Lines {
    /// Of lines without one of their own.
    level: log::Level,
    partial: Vec<u8>,
}

impl Lines {
    fn push(&mut self, bytes: &[u8], said: &mut impl FnMut(log::Level, String)) {
        for &byte in bytes {
            if byte != b'\n' {
                self.partial.push(byte);
            }
            if byte == b'\n' || self.partial.len() == LINE_BYTES_MAX {
                let line = std::mem::take(&mut self.partial);
                let (level, text) = match line.as_slice() {
                    [b'<', n @ b'0'..=b'7', b'>', text @ ..] => (priority(*n), text),
                    text => (self.level, text),
                };
                // The log is read in terminals; a plugin is not to move their cursors.
                let text = String::from_utf8_lossy(text).replace(char::is_control, " ");
                if !text.trim().is_empty() {
                    said(level, text.trim_end().to_owned());
                }
            }
        }
    }
}

fn priority(digit: u8) -> log::Level {
    match digit {
        b'0'..=b'3' => log::Level::Error,
        b'4' => log::Level::Warn,
        b'5' | b'6' => log::Level::Info,
        _ => log::Level::Debug,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Stdio;

    /// More than any test takes.
    const PATIENCE: Duration = Duration::from_secs(60);

    fn shell(script: &str) -> Keeper {
        let mut command = Command::new("/bin/sh");
        command.args(["-c", script]).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        Keeper::start(command, "test".to_owned()).unwrap()
    }

    fn lines(parts: &[&[u8]]) -> Vec<(log::Level, String)> {
        let (mut lines, mut all) = (Lines { level: log::Level::Warn, partial: Vec::new() }, Vec::new());
        parts.iter().for_each(|part| lines.push(part, &mut |level, line| all.push((level, line))));
        all
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
    fn a_grandchild_that_keeps_the_pipes_does_not_hold_the_end_up() {
        let keeper = shell("sleep 1000 & echo $!; exit 0");
        let (end, tail) = keeper.report(PATIENCE);
        assert_eq!(end.as_deref(), Some("ended with exit status 0"));
        let killed = Command::new("kill").arg(&tail[0]).status().unwrap();
        assert!(killed.success());
    }

    #[test]
    fn a_program_that_is_not_there_is_an_error() {
        let mut command = Command::new("/nowhere/sparsed");
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        assert_eq!(Keeper::start(command, "test".to_owned()).unwrap_err().kind(), ErrorKind::NotFound);
    }

    #[test]
    fn lines_are_put_together_cut_and_cleaned() {
        let found = lines(&[b"<6>he", b"llo\n\n  \n<9>x\x1b[2J\n"]);
        assert_eq!(found, [(log::Level::Info, "hello".to_owned()), (log::Level::Warn, "<9>x [2J".to_owned())]);
        let long = lines(&[&vec![b'a'; 2 * LINE_BYTES_MAX]]);
        assert_eq!(long.len(), 2);
        assert_eq!(lines(&[b"\xff\n"])[0].1, "\u{fffd}");
    }
}
