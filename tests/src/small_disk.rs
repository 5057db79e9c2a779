//! A disk of its own that is soon full.

use std::path::Path;
use std::process::Command;

/// A tmpfs; unmounted when dropped.
#[derive(Debug)]
pub struct SmallDisk(tempfile::TempDir);

impl SmallDisk {
    /// One of so many KiB; `None` where this user may not mount any.
    ///
    /// # Panics
    /// When no folder can be made for it.
    pub fn mount(kib: u32) -> Option<Self> {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let size = format!("size={kib}k");
        let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", &size, "none"]).arg(dir.path()).status();
        mounted.is_ok_and(|status| status.success()).then_some(Self(dir))
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        self.0.path()
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _unmounted = Command::new("umount").arg("-l").arg(self.path()).status().is_ok();
    }
}
