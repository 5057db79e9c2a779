//! How many bytes may KV caches take? The tightest of all limits, less what else the process needs.
//!
//! What the limits are is found out by others; here it is only reckoned, so that the same reckoning stands behind the
//! start, the status page and the tests.

/// Where a limit comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Limit {
    /// `memory.total` of the configuration.
    Config,
    /// The hard limit of a control group.
    CgroupMax,
    /// 85 % of the limit from which a control group's members are slowed down.
    CgroupHigh,
    /// What the machine has left, less a reserve for others.
    Machine,
    /// The memory of the device.
    Device,
}

impl Limit {
    /// One word, for status pages.
    pub fn name(self) -> &'static str {
        match self {
            Self::Config => "config",
            Self::CgroupMax => "cgroup_max",
            Self::CgroupHigh => "cgroup_high",
            Self::Machine => "machine",
            Self::Device => "device",
        }
    }
}

/// A limit of what the process may take, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bound {
    /// Whose.
    pub limit: Limit,
    /// How much.
    pub bytes: u64,
}

/// What the process may take, and what of it is left for KV caches.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Budget {
    /// All limits that are known.
    pub bounds: Vec<Bound>,
    /// Bytes of weights as the device holds them and of those that were made, beside the mapped files.
    pub weights_bytes: u64,
    /// Bytes of plans' workspaces.
    pub workspace_bytes: u64,
    /// Bytes for KV caches that the configuration names; `None`: a share of what is left.
    pub kv_bytes: Option<u64>,
    /// Whether all that is left is for KV caches, or half of it: others may need memory too.
    pub is_whole: bool,
}

impl Budget {
    /// The limit that binds.
    pub fn tightest(&self) -> Option<Bound> {
        self.bounds.iter().copied().min_by_key(|bound| bound.bytes)
    }

    /// Bytes that are left beside weights and workspace; `None` where no limit is known.
    pub fn left(&self) -> Option<u64> {
        Some(self.tightest()?.bytes.saturating_sub(self.weights_bytes).saturating_sub(self.workspace_bytes))
    }

    /// Bytes for KV caches: what the configuration names as far as there is so much, else a share of what is left.
    pub fn for_kv(&self) -> Option<u64> {
        match (self.kv_bytes, self.left()) {
            (Some(kv), Some(left)) => Some(kv.min(left)),
            (Some(kv), None) => Some(kv),
            (None, Some(left)) => Some(if self.is_whole { left } else { left / 2 }),
            (None, None) => None,
        }
    }

    /// Takes what the configuration has, in the place of what it had.
    pub fn configure(&mut self, total_bytes: Option<u64>, kv_bytes: Option<u64>) {
        self.bounds.retain(|bound| bound.limit != Limit::Config);
        self.bounds.extend(total_bytes.map(|bytes| Bound { limit: Limit::Config, bytes }));
        self.kv_bytes = kv_bytes;
        self.is_whole = total_bytes.is_some();
    }

    /// Adds a limit, or a tighter value of one that is there.
    pub fn bind(&mut self, limit: Limit, bytes: u64) {
        match self.bounds.iter_mut().find(|bound| bound.limit == limit) {
            Some(bound) => bound.bytes = bound.bytes.min(bytes),
            None => self.bounds.push(Bound { limit, bytes }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tightest_limit_binds_and_weights_come_off_first() {
        let mut budget = Budget { weights_bytes: 100, workspace_bytes: 50, is_whole: true, ..Budget::default() };
        assert_eq!((budget.tightest(), budget.for_kv()), (None, None));
        budget.bind(Limit::Machine, 1000);
        budget.bind(Limit::CgroupMax, 700);
        budget.bind(Limit::CgroupMax, 900);
        assert_eq!(budget.tightest(), Some(Bound { limit: Limit::CgroupMax, bytes: 700 }));
        assert_eq!((budget.left(), budget.for_kv()), (Some(550), Some(550)));
        budget.is_whole = false;
        assert_eq!(budget.for_kv(), Some(275));
    }

    #[test]
    fn another_configuration_takes_the_place_of_the_first_and_leaves_other_limits() {
        let mut budget = Budget { weights_bytes: 100, ..Budget::default() };
        budget.bind(Limit::Machine, 1000);
        budget.configure(Some(600), None);
        assert_eq!(budget.for_kv(), Some(500));
        budget.configure(Some(800), Some(50));
        assert_eq!((budget.tightest().map(|bound| bound.bytes), budget.for_kv()), (Some(800), Some(50)));
        budget.configure(None, None);
        assert_eq!(budget.for_kv(), Some(450));
    }

    #[test]
    fn what_the_configuration_names_is_taken_as_far_as_it_is_there() {
        let mut budget = Budget { weights_bytes: 100, kv_bytes: Some(300), ..Budget::default() };
        assert_eq!(budget.for_kv(), Some(300));
        budget.bind(Limit::CgroupHigh, 1000);
        assert_eq!(budget.for_kv(), Some(300));
        budget.bind(Limit::CgroupHigh, 150);
        assert_eq!(budget.for_kv(), Some(50));
        budget.bind(Limit::CgroupHigh, 20);
        assert_eq!(budget.for_kv(), Some(0));
    }
}
