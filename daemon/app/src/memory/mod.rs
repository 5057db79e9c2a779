//! How much memory may the daemon take? What the configuration, the control group and the machine leave, at the start
//! and while it runs.
//!
//! [`Sources`] are opened once; looking at them takes no memory, so that the thread that watches gets on when there is
//! none.

mod cgroup;
mod watch;

pub(crate) use cgroup::room;
pub use watch::start;

use crate::config::{Config, LoadWhen, Model};
use crate::store::Store;
use cgroup::Group;
use sparsed_engine::memory::{Budget, Limit};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// What is left to others of the machine's memory: a twentieth of it, within these bounds.
const RESERVE_SHARE: u64 = 20;
const RESERVE_MIN: u64 = 64 << 20;
const RESERVE_MAX: u64 = 1 << 30;
/// Longest file that is looked at.
const FILE_BYTES: usize = 8192;

/// What limits the daemon's memory.
#[derive(Debug)]
pub struct Sources {
    groups: Vec<Group>,
    meminfo: Option<File>,
    total_bytes: u64,
}

/// What is left at a look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Spare {
    /// Bytes that may be taken; negative: that are to be given back.
    pub(crate) bytes: i64,
    /// Next to nothing is left.
    pub(crate) is_critical: bool,
}

impl Spare {
    /// Of two, the tighter.
    fn tighter(self, other: Self) -> Self {
        Self { bytes: self.bytes.min(other.bytes), is_critical: self.is_critical || other.is_critical }
    }
}

impl Sources {
    /// Finds them; what the system does not have limits nothing.
    pub fn open() -> Self {
        let meminfo = File::open("/proc/meminfo").ok();
        let total_bytes = meminfo.as_ref().and_then(|file| kib(file, b"MemTotal:")).unwrap_or(0);
        Self { groups: cgroup::own_groups(), meminfo, total_bytes }
    }

    /// What is left now; `None` where nothing limits the memory that could be looked at. Takes no memory.
    pub(crate) fn look(&self) -> Option<Spare> {
        let machine = self.available().map(|available| machine(available, self.total_bytes));
        let groups = self.groups.iter().filter_map(Group::spare);
        groups.chain(machine).reduce(Spare::tighter)
    }

    /// Whether a control group limits the process. Where none does, its stalls are the whole machine's matter.
    pub(crate) fn is_limited(&self) -> bool {
        self.groups.iter().any(|group| group.spare().is_some())
    }

    /// Whether other processes leave little to the whole machine, so that what is given back helps them.
    pub(crate) fn is_machine_full(&self) -> bool {
        self.available().is_none_or(|available| available < self.total_bytes / 4)
    }

    fn available(&self) -> Option<u64> {
        kib(self.meminfo.as_ref()?, b"MemAvailable:")
    }

    /// What KV caches may take, with the sizes of `models`' files for their weights: the device says later what they
    /// take indeed. Of those that are loaded on demand only the largest counts: they make way for each other.
    pub fn budget<'a>(&self, config: &Config, store: &Store, models: impl Iterator<Item = &'a Model>) -> Budget {
        let (mut at_start, mut on_demand) = (0_u64, 0);
        for model in models {
            let bytes = weights_bytes(&store.resolve(&model.path));
            match model.load {
                LoadWhen::Start => at_start = at_start.saturating_add(bytes),
                LoadWhen::Demand => on_demand = bytes.max(on_demand),
            }
        }
        let mut budget = Budget {
            weights_bytes: at_start.saturating_add(on_demand),
            kv_bytes: config.memory.budget.map(|bytes| bytes.0),
            is_whole: config.memory.total.is_some(),
            ..Budget::default()
        };
        if let Some(total) = config.memory.total {
            budget.bind(Limit::Config, total.0);
        }
        for group in &self.groups {
            for (limit, spare) in group.limits() {
                budget.bind(limit, spare);
            }
        }
        if let Some(available) = self.available_at_start() {
            budget.bind(Limit::Machine, available.saturating_sub(reserve(self.total_bytes)));
        }
        budget
    }

    /// What the machine has left, as `sysinfo` knows it.
    fn available_at_start(&self) -> Option<u64> {
        let mut system = sysinfo::System::new().ok()?;
        system.refresh_memory();
        Some(system.available_memory()).filter(|&bytes| bytes > 0).or_else(|| self.available())
    }
}

fn reserve(total: u64) -> u64 {
    (total / RESERVE_SHARE).clamp(RESERVE_MIN, RESERVE_MAX)
}

fn machine(available: u64, total: u64) -> Spare {
    let reserve = reserve(total);
    Spare { bytes: difference(available, reserve), is_critical: available < reserve / 2 }
}

/// `a - b`.
fn difference(a: u64, b: u64) -> i64 {
    let signed = |n: u64| i64::try_from(n).unwrap_or(i64::MAX);
    signed(a) - signed(b)
}

/// Bytes of a model's file, or of the weights in its folder; 0 where they cannot be asked for.
fn weights_bytes(path: &Path) -> u64 {
    let size = |path: &Path| path.metadata().map_or(0, |meta| if meta.is_file() { meta.len() } else { 0 });
    let Ok(entries) = path.read_dir() else { return size(path) };
    let is_weights = |path: &Path| path.extension().is_some_and(|extension| extension == "safetensors");
    entries.flatten().map(|entry| entry.path()).filter(|path| is_weights(path)).map(|path| size(&path)).sum()
}

/// The text of a file of the kernel, in `buffer`.
fn text<'a>(file: &File, buffer: &'a mut [u8; FILE_BYTES]) -> Option<&'a [u8]> {
    let n = file.read_at(buffer, 0).ok()?;
    buffer.get(..n)
}

/// The number at the beginning of a text; `None` for `max` and what is no number.
fn number(text: &[u8]) -> Option<u64> {
    let text = text.trim_ascii_start();
    let end = text.iter().position(|byte| !byte.is_ascii_digit()).unwrap_or(text.len());
    std::str::from_utf8(&text[..end]).ok()?.parse().ok()
}

/// The number that follows `key` at the beginning of a line.
fn value(text: &[u8], key: &[u8]) -> Option<u64> {
    text.split(|&byte| byte == b'\n').find_map(|line| number(line.strip_prefix(key)?))
}

/// As [`value`], of a file that counts in KiB.
fn kib(file: &File, key: &[u8]) -> Option<u64> {
    let mut buffer = [0; FILE_BYTES];
    kib_in(text(file, &mut buffer)?, key)
}

/// As [`value`], of a text that counts in KiB.
pub(crate) fn kib_in(text: &[u8], key: &[u8]) -> Option<u64> {
    value(text, key)?.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_found_by_their_key_and_max_is_none() {
        let text = b"MemTotal:       100 kB\nMemAvailable:    42 kB\nxMemFree: 7\n";
        assert_eq!((value(text, b"MemAvailable:"), value(text, b"MemFree:")), (Some(42), None));
        assert_eq!((number(b"123\n"), number(b"max\n"), number(b"99999999999999999999")), (Some(123), None, None));
    }

    #[test]
    fn the_machine_keeps_a_reserve_and_is_critical_at_half_of_it() {
        let (gib, mib) = (1u64 << 30, 1i64 << 20);
        assert_eq!(machine(gib, 4 * gib), Spare { bytes: 1024 * mib - 4 * 1024 * mib / 20, is_critical: false });
        assert_eq!(machine(40 << 20, gib / 2), Spare { bytes: -24 * mib, is_critical: false });
        assert!(machine(31 << 20, gib / 2).is_critical);
    }

    #[test]
    fn a_models_weights_are_its_file_or_those_in_its_folder() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("a.safetensors"), [0; 100]).unwrap();
        std::fs::write(dir.path().join("b.safetensors"), [0; 11]).unwrap();
        std::fs::write(dir.path().join("config.json"), [0; 1000]).unwrap();
        assert_eq!(weights_bytes(dir.path()), 111);
        assert_eq!(weights_bytes(&dir.path().join("a.safetensors")), 100);
        assert_eq!(weights_bytes(&dir.path().join("none")), 0);
    }
}
