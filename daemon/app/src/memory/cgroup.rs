//! What does the control group leave? The files of the process's own group and of those above it, version 1 or 2.

use super::{FILE_BYTES, Spare, difference, number, text, value};
use sparsed_engine::memory::Limit;
use std::fs::File;
use std::path::{Path, PathBuf};

/// Groups above the own one that are looked at.
const DEPTH_MAX: usize = 16;
/// Version 1 says "no limit" with a number near the largest.
const UNLIMITED: u64 = 1 << 62;
/// Of the hard limit.
const OF_MAX: Shares = Shares { most: 90, critical: 95 };
/// Of the limit from which members are slowed down. Within allocations they stand still then, so it is kept away from.
const OF_HIGH: Shares = Shares { most: 85, critical: 95 };

/// Parts of a limit in percent.
#[derive(Clone, Copy, Debug)]
struct Shares {
    /// What is used of it.
    most: u64,
    /// From here on it is critical.
    critical: u64,
}

/// A limit that is set.
#[derive(Clone, Copy, Debug)]
struct Set {
    limit: Limit,
    bytes: u64,
    shares: Shares,
}

impl Set {
    /// What it leaves to a group that uses so much.
    fn spare(self, used: u64) -> Spare {
        let share = |percent: u64| self.bytes / 100 * percent;
        Spare { bytes: difference(share(self.shares.most), used), is_critical: used > share(self.shares.critical) }
    }
}

/// A group's files.
#[derive(Debug)]
pub(super) struct Group {
    max: File,
    high: Option<File>,
    usage: File,
    stat: File,
    inactive_file: &'static [u8],
    held_keys: [&'static [u8]; 2],
}

impl Group {
    fn open(dir: &Path, files: &Files) -> Option<Self> {
        let open = |name: &str| File::open(dir.join(name)).ok();
        Some(Self {
            max: open(files.max)?,
            high: files.high.and_then(open),
            usage: open(files.usage)?,
            stat: open("memory.stat")?,
            inactive_file: files.inactive_file,
            held_keys: files.held_keys,
        })
    }

    /// Bytes in use that cannot be dropped at once.
    fn used(&self) -> Option<u64> {
        let mut buffer = [0; FILE_BYTES];
        let usage = number(text(&self.usage, &mut buffer)?)?;
        let cache = value(text(&self.stat, &mut buffer)?, self.inactive_file).unwrap_or(0);
        Some(usage.saturating_sub(cache))
    }

    /// Bytes of its members that are no pages of files: what ends with them.
    fn held(&self) -> Option<u64> {
        let mut buffer = [0; FILE_BYTES];
        let stat = text(&self.stat, &mut buffer)?;
        let [own, shared] = self.held_keys.map(|key| value(stat, key));
        Some(own?.saturating_add(shared.unwrap_or(0)))
    }

    /// The limits that are set.
    fn set(&self) -> [Option<Set>; 2] {
        let read = |file: &File| {
            let mut buffer = [0; FILE_BYTES];
            number(text(file, &mut buffer)?).filter(|&bytes| bytes < UNLIMITED)
        };
        let max = read(&self.max).map(|bytes| Set { limit: Limit::CgroupMax, bytes, shares: OF_MAX });
        let high = self.high.as_ref().and_then(read);
        [max, high.map(|bytes| Set { limit: Limit::CgroupHigh, bytes, shares: OF_HIGH })]
    }

    /// What is left now; `None` where no limit is set. Takes no memory.
    pub(super) fn spare(&self) -> Option<Spare> {
        let used = self.used()?;
        self.set().into_iter().flatten().map(|set| set.spare(used)).reduce(Spare::tighter)
    }

    /// What each limit that is set leaves now.
    pub(super) fn limits(&self) -> impl Iterator<Item = (Limit, u64)> {
        let used = self.used().unwrap_or(0);
        let left = move |set: Set| (set.limit, u64::try_from(set.spare(used).bytes).unwrap_or(0));
        self.set().into_iter().flatten().map(left)
    }
}

/// How a version calls its files.
struct Files {
    max: &'static str,
    high: Option<&'static str>,
    usage: &'static str,
    inactive_file: &'static [u8],
    held_keys: [&'static [u8]; 2],
}

const V1: Files = Files {
    max: "memory.limit_in_bytes",
    high: None,
    usage: "memory.usage_in_bytes",
    inactive_file: b"total_inactive_file ",
    held_keys: [b"total_rss ", b"total_shmem "],
};
const V2: Files = Files {
    max: "memory.max",
    high: Some("memory.high"),
    usage: "memory.current",
    inactive_file: b"inactive_file ",
    held_keys: [b"anon ", b"shmem "],
};

/// The process's own group and those above it that have the memory controller, the own one first.
pub(super) fn own_groups() -> Vec<Group> {
    groups_of(Path::new("/"), &own_text())
}

/// Those of a process whose `/proc/PID/cgroup` has this text.
fn groups_of(root: &Path, text: &str) -> Vec<Group> {
    let mut groups = Vec::new();
    for (mount, path, files) in trees(text) {
        groups.extend(ancestors(&root.join(mount), &path).filter_map(|dir| Group::open(&dir, files)));
    }
    groups
}

/// What control groups leave to a daemon that begins anew, as another process sees it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Room {
    /// What the tightest limit leaves once what the daemon holds is back; `None`: no limit is set.
    pub(crate) left: Option<u64>,
    /// The own group's tightest limit.
    pub(crate) limit: Option<u64>,
    /// What the daemon holds, where its group is its own and counts that.
    pub(crate) held: Option<u64>,
}

/// Of a daemon whose `/proc/PID/cgroup` has, or would have, this text. `held`: what it holds, in a group that it shares
/// with others; in one of its own, `None`, the group knows.
pub(crate) fn room(root: &Path, text: &str, held: Option<u64>) -> Room {
    let groups = groups_of(root, text);
    let Some(own) = groups.first() else { return Room { held, ..Room::default() } };
    let is_own = held.is_none();
    let held = held.or_else(|| own.held());
    let left = groups.iter().enumerate().flat_map(|(at, group)| {
        let used = group.used().unwrap_or(0);
        // A group of its own is empty when the daemon begins.
        let others = if at == 0 && is_own { 0 } else { used.saturating_sub(held.unwrap_or(0)) };
        group.set().into_iter().flatten().map(move |set| set.spare(others).bytes)
    });
    Room {
        left: left.min().map(|bytes| u64::try_from(bytes).unwrap_or(0)),
        limit: own.set().into_iter().flatten().map(|set| set.bytes).min(),
        held,
    }
}

fn own_text() -> String {
    std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default()
}

/// The file that tells of the own group's stalls, where the system has one.
pub(super) fn pressure_file() -> Option<PathBuf> {
    let trees = trees(&own_text());
    let dirs = trees.into_iter().filter_map(|(mount, path, _)| ancestors(&Path::new("/").join(mount), &path).next());
    dirs.filter(|dir| is_group(dir)).map(|dir| dir.join("memory.pressure")).find(|file| file.exists())
}

/// Whether a folder is a group's: the root's stalls are the whole machine's, and it has no type.
fn is_group(dir: &Path) -> bool {
    dir.join("cgroup.type").exists()
}

/// Mounts that may have the memory controller, and the path below them, of a text of `/proc/PID/cgroup`.
fn trees(text: &str) -> Vec<(&'static str, String, &'static Files)> {
    let mut trees = Vec::new();
    for line in text.lines() {
        let mut parts = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(path)) = (parts.next(), parts.next()) else { continue };
        if controllers.split(',').any(|name| name == "memory") {
            trees.push(("sys/fs/cgroup/memory", path.to_owned(), &V1));
        } else if controllers.is_empty() {
            trees.push(("sys/fs/cgroup", path.to_owned(), &V2));
            trees.push(("sys/fs/cgroup/unified", path.to_owned(), &V2));
        }
    }
    trees
}

/// The folder of `path` below `mount` and those above it; in a namespace of its own the mount is the group.
fn ancestors(mount: &Path, path: &str) -> impl Iterator<Item = PathBuf> + use<> {
    let (mount, below) = (mount.to_owned(), path.trim_start_matches('/'));
    let own = mount.join(below);
    let first = if own.is_dir() { own } else { mount.clone() };
    let above = |dir: &PathBuf| dir.parent().map(Path::to_owned);
    std::iter::successors(Some(first), above).take_while(move |dir| dir.starts_with(&mount)).take(DEPTH_MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::write;

    #[test]
    fn the_root_of_all_groups_is_none() {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path().join("memory.pressure"), "").unwrap();
        assert!(!is_group(dir.path()));
        write(dir.path().join("cgroup.type"), "domain\n").unwrap();
        assert!(is_group(dir.path()));
    }

    /// A group as version 2 has it.
    fn group(dir: &Path, max: &str, high: &str, current: u64) -> Group {
        write(dir.join("memory.max"), max).unwrap();
        write(dir.join("memory.high"), high).unwrap();
        write(dir.join("memory.current"), current.to_string()).unwrap();
        write(dir.join("memory.stat"), "anon 1\nfile 5000\ninactive_anon 1\ninactive_file 1000\n").unwrap();
        Group::open(dir, &V2).unwrap()
    }

    #[test]
    fn the_tighter_limit_counts_and_clean_pages_do_not() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(group(dir.path(), "max\n", "max\n", 9000).spare(), None);
        let spare = group(dir.path(), "100000\n", "max\n", 51_000).spare();
        assert_eq!(spare, Some(Spare { bytes: 40_000, is_critical: false }));
        let both = group(dir.path(), "100000\n", "60000\n", 51_000);
        assert_eq!(both.spare(), Some(Spare { bytes: 1000, is_critical: false }));
        assert_eq!(both.limits().collect::<Vec<_>>(), [(Limit::CgroupMax, 40_000), (Limit::CgroupHigh, 1000)]);
    }

    #[test]
    fn a_limit_that_shrinks_is_seen_at_the_next_look() {
        let dir = tempfile::tempdir().unwrap();
        let group = group(dir.path(), "100000\n", "max\n", 51_000);
        write(dir.path().join("memory.max"), "50000\n").unwrap();
        assert_eq!(group.spare(), Some(Spare { bytes: -5000, is_critical: true }));
    }

    #[test]
    fn groups_above_are_looked_at_up_to_the_mount() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(dir.path().join("a/b")).unwrap();
        let mount = dir.path();
        let dirs: Vec<PathBuf> = ancestors(mount, "/a/b").collect();
        assert_eq!(dirs, [dir.path().join("a/b"), dir.path().join("a"), dir.path().to_owned()]);
        assert_eq!(ancestors(mount, "/elsewhere").collect::<Vec<_>>(), [dir.path()]);
    }

    /// What a daemon would have if it began anew is told beside the one that runs.
    #[test]
    fn what_the_daemon_holds_comes_back_and_what_others_hold_does_not() {
        let root = tempfile::tempdir().unwrap();
        let above = root.path().join("sys/fs/cgroup/system.slice");
        let own = above.join("sparsed.service");
        std::fs::create_dir_all(&own).unwrap();
        group(&own, "max\n", "max\n", 60_000);
        group(&above, "100000\n", "max\n", 80_000);
        write(own.join("memory.stat"), "anon 40000\nfile 9\nshmem 10000\ninactive_file 0\n").unwrap();
        let path = "0::/system.slice/sparsed.service\n";
        // Of 90000 others use 80000 - 1000 - 50000.
        let expected = Room { left: Some(61_000), limit: None, held: Some(50_000) };
        assert_eq!(room(root.path(), path, None), expected);
        // A limit of its own is all for the one that begins.
        write(own.join("memory.max"), "50000\n").unwrap();
        let expected = Room { left: Some(45_000), limit: Some(50_000), held: Some(50_000) };
        assert_eq!(room(root.path(), path, None), expected);
        // In a group that others share only what is its own comes back.
        assert_eq!(room(root.path(), path, Some(20_000)).left, Some(5_000));
        assert_eq!(room(Path::new("/nowhere"), path, Some(7)), Room { held: Some(7), ..Room::default() });
    }
}
