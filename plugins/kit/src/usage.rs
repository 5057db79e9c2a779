//! How much of a device is in use, and may more be taken? Bytes counted by what they are for, under one cap.

use crate::{PluginError, Result};
use sparsed_abi::E_NOMEM_DEVICE;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Bytes in use on a device, as `spd_mem_info` names them.
#[derive(Debug, Default)]
pub struct Usage {
    /// Most bytes of all together; 0: no cap.
    pub budget: u64,
    /// Held by weights.
    pub weights: AtomicU64,
    /// Held by KV pools.
    pub kv: AtomicU64,
    /// Held by plans' workspaces.
    pub workspace: AtomicU64,
    /// Held by what else a plan needs, such as arenas of steps in flight.
    pub plans: AtomicU64,
}

/// Bytes counted in a [`Usage`] until dropped.
#[derive(Debug)]
pub struct Held {
    usage: Arc<Usage>,
    kind: fn(&Usage) -> &AtomicU64,
    bytes: u64,
}

impl Usage {
    /// All that is counted.
    pub fn used(&self) -> u64 {
        [&self.weights, &self.kv, &self.workspace, &self.plans].iter().map(|n| n.load(Ordering::Relaxed)).sum()
    }

    /// Counts `bytes`. `[control]`: calls do not overlap.
    ///
    /// # Errors
    /// `SPD_E_NOMEM_DEVICE` when the budget would be passed; nothing has changed then.
    pub fn hold(self: &Arc<Self>, kind: fn(&Self) -> &AtomicU64, bytes: u64) -> Result<Held> {
        let used = self.used();
        if self.budget != 0 && used.saturating_add(bytes) > self.budget {
            let message = format!("{bytes} bytes more than {used} in use would pass the budget of {}", self.budget);
            return Err(PluginError::new(E_NOMEM_DEVICE, message));
        }
        kind(self).fetch_add(bytes, Ordering::Relaxed);
        Ok(Held { usage: Arc::clone(self), kind, bytes })
    }
}

impl Held {
    /// How many.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        (self.kind)(&self.usage).fetch_sub(self.bytes, Ordering::Relaxed);
    }
}
