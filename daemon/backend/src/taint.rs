//! Has code run in this process that is not ours? For bug reports: the daemon is then *tainted*.
//!
//! A plugin is ours when it lies in a folder that is installed with the daemon, its id is one of this release's and its
//! version is this release's. The first cannot be feigned: who can write there can replace the daemon itself.

use crate::{Found, Manifest};
use std::sync::{Mutex, PoisonError};

/// The plugins of this source tree.
const OURS: &[&str] = &["ascend", "cambricon", "cpu", "cuda", "minimal"];

/// The third-party plugins of this process, in the order of their loading. It only grows: nothing is unloaded.
static THIRD_PARTY: Mutex<Vec<String>> = Mutex::new(Vec::new());

impl Manifest {
    /// True when the plugin says that it comes with this release.
    pub(crate) fn claims_to_be_ours(&self) -> bool {
        OURS.contains(&self.id.as_str()) && self.version == env!("CARGO_PKG_VERSION")
    }
}

/// The third-party plugins that were loaded since the process began, as `id version`. Not empty: tainted.
pub fn third_party() -> Vec<String> {
    THIRD_PARTY.lock().unwrap_or_else(PoisonError::into_inner).clone()
}

/// Notes a plugin that is going to be loaded here or in a host process of ours, and says so the first time.
pub(crate) fn note(found: &Found) {
    if found.is_ours() {
        return;
    }
    let manifest = &found.manifest;
    let name = format!("{} {}", manifest.id, manifest.version);
    let mut list = THIRD_PARTY.lock().unwrap_or_else(PoisonError::into_inner);
    if !list.contains(&name) {
        let vendor = manifest.vendor.as_deref().unwrap_or("unknown");
        log::warn!(plugin:% = name, vendor; "a third-party plugin is loaded: the daemon is tainted");
        list.push(name);
    }
}
