//! When does memory become short? A thread that waits for the kernel to say so, and looks every two seconds, or ten
//! times a second while steps run: a limit that is lowered, and what they take, may be fatal before a stall is told of.
//!
//! Told are stalls: by the file that the service manager names (`$MEMORY_PRESSURE_WATCH`), else by the control group's
//! own `memory.pressure`, else by the machine's. Where none is to be had, the looks alone must do. A thread that waits
//! for memory cannot say that there is none: from its first wait on this one takes none.

use super::{Sources, cgroup};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use sparsed_engine::Service;
use sparsed_engine::memory::{Outlook, Pressure};
use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Time between looks.
const PAUSE: Duration = Duration::from_secs(2);
/// The same while steps run, which take some tens of MiB in a second.
const PAUSE_BUSY: Duration = Duration::from_millis(100);
/// Somebody has waited for memory for 200 ms of 2 s: a window that is shorter, or no multiple of that, takes a
/// privilege.
const SOME: &[u8] = b"some 200000 2000000\0";
/// Everybody has.
const FULL: &[u8] = b"full 200000 2000000\0";
/// Time for which a stall counts.
const STALL_LASTS: Duration = Duration::from_secs(4);
/// Bytes that must be left before memory is not short any more.
const EASE_BYTES: i64 = 32 << 20;

/// Starts the thread. It ends with the process.
///
/// # Errors
/// When no thread can be started.
pub fn start(service: Service, sources: Sources) -> std::io::Result<()> {
    let mut stalls = Stalls::open();
    log::info!(source:% = stalls.source(); "memory is watched");
    let run = move || {
        let mut gauge = Gauge::default();
        let begun = Instant::now();
        loop {
            let stall = stalls.wait(&sources, if service.is_stepping() { PAUSE_BUSY } else { PAUSE });
            let spare = sources.look();
            let before = gauge.pressure;
            let pressure = gauge.read(stall, spare.map(|spare| (spare.bytes, spare.is_critical)), begun.elapsed());
            gauge.number += 1;
            let headroom_bytes = spare.map_or(i64::MAX, |spare| spare.bytes);
            let outlook = Outlook { number: gauge.number, pressure, headroom_bytes };
            service.report(outlook, pressure != Pressure::None || before != pressure);
        }
    };
    std::thread::Builder::new().name("memory-watch".to_owned()).spawn(run)?;
    Ok(())
}

/// How short memory is, of stalls and looks.
#[derive(Debug, Default)]
struct Gauge {
    number: u64,
    pressure: Pressure,
    /// The worst stall that still counts, and since when the last one has.
    stall: (Pressure, Duration),
    /// Less was left than is to be, and not enough more since.
    is_tight: bool,
}

impl Gauge {
    /// Takes a stall, if there was one, and what is left: bytes, and whether that is critical.
    fn read(&mut self, stall: Pressure, spare: Option<(i64, bool)>, now: Duration) -> Pressure {
        let (worst, since) = self.stall;
        let lasting = if now.saturating_sub(since) < STALL_LASTS { worst } else { Pressure::None };
        self.stall = (lasting.max(stall), if stall > Pressure::None { now } else { since });
        let stalled = self.stall.0;
        let (bytes, is_critical) = spare.unwrap_or((i64::MAX, false));
        self.is_tight = bytes < if self.is_tight { EASE_BYTES } else { 0 };
        let looked = match (is_critical, self.is_tight) {
            (true, _) => Pressure::Critical,
            (false, true) => Pressure::Some,
            (false, false) => Pressure::None,
        };
        self.pressure = stalled.max(looked);
        self.pressure
    }
}

/// Whence stalls are told.
#[derive(Debug)]
struct Stalls {
    some: Option<Trigger>,
    full: Option<Trigger>,
    source: String,
    /// The whole machine's: what the daemon gives back may help nobody.
    is_machine: bool,
}

/// A file that becomes ready when there was a stall.
#[derive(Debug)]
struct Trigger {
    file: File,
    /// A pipe, which is to be emptied.
    is_pipe: bool,
}

impl Trigger {
    /// Opens `path` and says which stalls are to be told; nothing is said to a pipe without `what`.
    fn open(path: &Path, what: Option<&[u8]>) -> std::io::Result<Self> {
        let flags = i32::try_from(rustix::fs::OFlags::NONBLOCK.bits()).unwrap_or(0);
        let mut file = OpenOptions::new().read(true).write(true).custom_flags(flags).open(path)?;
        let is_pipe = file.metadata()?.file_type().is_fifo();
        if let Some(what) = what {
            file.write_all(what)?;
        }
        Ok(Self { file, is_pipe })
    }

    fn flags(&self) -> PollFlags {
        if self.is_pipe { PollFlags::IN } else { PollFlags::PRI }
    }
}

impl Stalls {
    fn open() -> Self {
        let none = |source: String| Self { some: None, full: None, source, is_machine: false };
        if let Some(watch) = std::env::var_os("MEMORY_PRESSURE_WATCH") {
            if watch == "/dev/null" {
                return none("looks only, as the service manager wants it".to_owned());
            }
            let asked = std::env::var("MEMORY_PRESSURE_WRITE").ok();
            let asked = asked.and_then(|text| base64::decode(text.trim()).ok()).filter(|bytes| !bytes.is_empty());
            match Self::at(&PathBuf::from(watch), asked.as_deref(), false) {
                Ok(stalls) => return stalls,
                Err(error) => log::warn!(reason:% = error; "MEMORY_PRESSURE_WATCH cannot be used"),
            }
        }
        let own = cgroup::pressure_file().and_then(|file| Self::at(&file, Some(SOME), false).ok());
        let machine = || Self::at(Path::new("/proc/pressure/memory"), Some(SOME), true).ok();
        own.or_else(machine).unwrap_or_else(|| none("looks only: the system tells of no stalls".to_owned()))
    }

    fn at(path: &Path, what: Option<&[u8]>, is_machine: bool) -> std::io::Result<Self> {
        let some = Trigger::open(path, what)?;
        let full = if some.is_pipe { None } else { Trigger::open(path, Some(FULL)).ok() };
        Ok(Self { some: Some(some), full, source: path.display().to_string(), is_machine })
    }

    fn source(&self) -> &str {
        &self.source
    }

    /// Waits for a stall, or until it is time to look.
    fn wait(&mut self, sources: &Sources, pause: Duration) -> Pressure {
        let told = |stalled: bool, pressure: Pressure| if stalled { pressure } else { Pressure::None };
        let pressure = match (&self.some, &self.full) {
            (None, _) => {
                std::thread::sleep(pause);
                Pressure::None
            }
            (Some(some), None) => {
                let [first] = ready([PollFd::new(&some.file, some.flags())], pause);
                self.take(first, Pressure::Some)
            }
            (Some(some), Some(full)) => {
                let fds = [PollFd::new(&some.file, some.flags()), PollFd::new(&full.file, full.flags())];
                let [first, second] = ready(fds, pause);
                self.take(first, Pressure::Some).max(self.take(second, Pressure::Critical))
            }
        };
        // A machine with much left stalls for reasons that giving memory back does not mend.
        let is_groups = !self.is_machine && sources.is_limited();
        told(is_groups || sources.is_machine_full(), pressure)
    }

    /// What a trigger's flags say. One that is broken would be ready for ever: it is let go of.
    fn take(&mut self, flags: PollFlags, pressure: Pressure) -> Pressure {
        if flags.intersects(PollFlags::ERR | PollFlags::NVAL | PollFlags::HUP) {
            (self.some, self.full) = (None, None);
            return Pressure::None;
        }
        if let Some(Trigger { file, is_pipe: true }) = &self.some {
            let mut buffer = [0; 512];
            let _emptied = (&*file).read(&mut buffer).is_ok();
        }
        if flags.is_empty() { Pressure::None } else { pressure }
    }
}

/// Waits for one of the files; answers the flags of each.
fn ready<const N: usize>(mut fds: [PollFd<'_>; N], pause: Duration) -> [PollFlags; N] {
    let pause = Timespec { tv_sec: pause.as_secs().cast_signed(), tv_nsec: pause.subsec_nanos().into() };
    match poll(&mut fds, Some(&pause)) {
        Ok(_) => std::array::from_fn(|at| fds[at].revents()),
        // Interrupted by a signal: as if it were time to look.
        Err(_) => [PollFlags::empty(); N],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ENOUGH: Option<(i64, bool)> = Some((1 << 30, false));
    const NONE: Pressure = Pressure::None;
    const SHORT: Pressure = Pressure::Some;
    const CRITICAL: Pressure = Pressure::Critical;

    fn s(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    /// However often it is looked.
    #[test]
    fn a_stall_counts_for_four_seconds_and_the_worse_one_stays() {
        let mut gauge = Gauge::default();
        let stalls = [(1, NONE), (3, CRITICAL), (5, SHORT), (8, NONE), (9, NONE), (10, SHORT), (11, NONE)];
        let read: Vec<Pressure> = stalls.into_iter().map(|(at, stall)| gauge.read(stall, ENOUGH, s(at))).collect();
        assert_eq!(read, [NONE, CRITICAL, CRITICAL, CRITICAL, NONE, SHORT, SHORT]);
    }

    #[test]
    fn what_is_tight_stays_so_until_clearly_more_is_left() {
        let mut gauge = Gauge::default();
        let left = [1, -1, EASE_BYTES - 1, EASE_BYTES, 1];
        let read: Vec<Pressure> = left.into_iter().map(|bytes| gauge.read(NONE, Some((bytes, false)), s(9))).collect();
        assert_eq!(read, [NONE, SHORT, SHORT, NONE, NONE]);
        assert_eq!(gauge.read(NONE, Some((5, true)), s(9)), CRITICAL);
        assert_eq!(gauge.read(NONE, None, s(9)), NONE);
    }

    #[test]
    fn a_pipe_tells_of_stalls_and_one_that_breaks_is_let_go_of() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("watch");
        rustix::fs::mknodat(rustix::fs::CWD, &path, rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
        let mut stalls = Stalls::at(&path, None, false).unwrap();
        (&stalls.some.as_ref().unwrap().file).write_all(b"x").unwrap();
        let sources = Sources { groups: Vec::new(), meminfo: None, total_bytes: 0 };
        assert_eq!(stalls.wait(&sources, PAUSE), SHORT);
        assert_eq!(stalls.take(PollFlags::ERR, SHORT), NONE);
        assert!(stalls.some.is_none());
    }
}
