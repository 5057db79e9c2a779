//! Has code run in this process that is not ours? For bug reports: the daemon is then *tainted*.
//!
//! This says where a plugin came from by its own word, as kernels do of modules; it is no protection. A plugin is ours
//! when its id is one of this release's and its version is this release's.

use crate::Manifest;
use std::sync::{Mutex, PoisonError};

/// The plugins of this source tree.
const OURS: &[&str] = &["ascend", "cambricon", "cpu", "cuda", "minimal"];

/// The third-party plugins of this process, in the order of their loading. It only grows: nothing is unloaded.
static THIRD_PARTY: Mutex<Vec<String>> = Mutex::new(Vec::new());

impl Manifest {
    /// True when the plugin says that it comes with this release.
    pub fn is_ours(&self) -> bool {
        OURS.contains(&self.id.as_str()) && self.version == env!("CARGO_PKG_VERSION")
    }
}

/// The third-party plugins that were loaded since the process began, as `id version`. Not empty: tainted.
pub fn third_party() -> Vec<String> {
    THIRD_PARTY.lock().unwrap_or_else(PoisonError::into_inner).clone()
}

/// Notes a plugin that is going to be loaded here or in a host process of ours, and says so the first time.
pub(crate) fn note(manifest: &Manifest) {
    if manifest.is_ours() {
        return;
    }
    let name = format!("{} {}", manifest.id, manifest.version);
    let mut list = THIRD_PARTY.lock().unwrap_or_else(PoisonError::into_inner);
    if !list.contains(&name) {
        let vendor = manifest.vendor.as_deref().unwrap_or("unknown");
        log::warn!(plugin:% = name, vendor; "a third-party plugin is loaded: the daemon is tainted");
        list.push(name);
    }
}
