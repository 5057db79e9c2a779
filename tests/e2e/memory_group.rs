//! A control group without memory: whoever is put into it and wants a page more is ended by the kernel's OOM killer.

use std::fs;
use std::path::{Path, PathBuf};

/// The group; removed when dropped.
#[derive(Debug)]
pub(crate) struct MemoryGroup(PathBuf);

impl MemoryGroup {
    /// A new group below this process's own; `None` where the system gives none to it.
    pub(crate) fn new() -> Option<Self> {
        let own = fs::read_to_string("/proc/self/cgroup").ok()?;
        let below = |mark: &str| own.lines().find_map(|line| Some(line.split_once(mark)?.1.trim_start_matches('/')));
        // Version 1 has a tree of its own for memory, version 2 one for all.
        let v1 = below(":memory:").map(|path| (Path::new("/sys/fs/cgroup/memory").join(path), "memory.limit_in_bytes"));
        let v2 = || Some((Path::new("/sys/fs/cgroup").join(below("0::")?), "memory.max"));
        let (parent, limit) = v1.or_else(v2)?;
        let group = Self(parent.join(format!("sparsed-test-{}", std::process::id())));
        fs::create_dir(&group.0).ok()?;
        // What its members have is charged elsewhere: only what they take from now on counts.
        fs::write(group.0.join(limit), "4096").ok()?;
        Some(group)
    }

    /// Puts a process in; false when it is not there any more.
    pub(crate) fn take(&self, pid: u32) -> bool {
        fs::write(self.0.join("cgroup.procs"), pid.to_string()).is_ok()
    }
}

impl Drop for MemoryGroup {
    fn drop(&mut self) {
        // One that is left behind is empty and harms nobody.
        let _left = fs::remove_dir(&self.0).is_err();
    }
}
