//! What shall go wrong? Settings of one copy of the fake.

/// Faults and properties; a number counts from 1, and 0 is never.
#[derive(Debug)]
pub(crate) struct Faults {
    /// Which interleaving of streams.
    pub(crate) seed: u64,
    /// Answer of `cuInit`.
    pub(crate) init: u64,
    /// Answer of `cuDriverGetVersion`.
    pub(crate) version: u64,
    /// Bytes of device memory.
    pub(crate) memory: u64,
    /// The allocation, of device or pinned memory, that fails with `CUDA_ERROR_OUT_OF_MEMORY`.
    pub(crate) oom_at: u64,
    /// The kernel that fails as it runs, with `lost_code`.
    pub(crate) lost_at: u64,
    pub(crate) lost_code: u64,
    /// The kernel that never ends.
    pub(crate) hang_at: u64,
    /// The call of `cuLaunchKernel` that answers `CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES`.
    pub(crate) refuse_at: u64,
    /// The call of `cuEventRecord` that answers `CUDA_ERROR_OUT_OF_MEMORY`.
    pub(crate) unrecorded_at: u64,
    /// 1: device code that is not real is refused, as by a real driver.
    pub(crate) real: u64,
}

impl Default for Faults {
    fn default() -> Self {
        Self {
            seed: 0,
            init: 0,
            version: 12_060,
            memory: 256 << 20,
            oom_at: 0,
            lost_at: 0,
            lost_code: 719,
            hang_at: 0,
            refuse_at: 0,
            unrecorded_at: 0,
            real: 0,
        }
    }
}

impl Faults {
    /// The settings of the environment.
    pub(crate) fn from_environment() -> Self {
        let mut faults = Self::default();
        for pair in std::env::var("SPARSED_FAKE_CUDA").unwrap_or_default().split(',').filter(|pair| !pair.is_empty()) {
            let set = pair.split_once('=').and_then(|(key, value)| Some(faults.set(key, value.parse().ok()?)));
            assert!(set == Some(true), "SPARSED_FAKE_CUDA: '{pair}' is no setting");
        }
        faults
    }

    /// False when there is no such setting.
    pub(crate) fn set(&mut self, key: &str, value: u64) -> bool {
        let field = match key {
            "seed" => &mut self.seed,
            "init" => &mut self.init,
            "version" => &mut self.version,
            "memory" => &mut self.memory,
            "oom_at" => &mut self.oom_at,
            "lost_at" => &mut self.lost_at,
            "lost_code" => &mut self.lost_code,
            "hang_at" => &mut self.hang_at,
            "refuse_at" => &mut self.refuse_at,
            "unrecorded_at" => &mut self.unrecorded_at,
            "real" => &mut self.real,
            _ => return false,
        };
        *field = value;
        true
    }
}
