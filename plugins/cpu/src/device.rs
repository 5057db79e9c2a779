//! Which device is this, and how is it opened?

use crate::execute;
use crate::level::Level;
use crate::memory::{BLOCK_TOKENS_ALIGN, Pool, ROW_DTYPES, Weight};
use crate::plan::{Plan, Request};
use crate::threads::{THREADS_MAX, Team, allowed_cpus, threads_for};
use crate::validate::Bound;
use sparsed_abi::{
    DEV_CPU, DT_BF16, DT_F8E4M3, DT_F16, DT_F32, DT_IQ4_NL, DT_IQ4_XS, DT_MXFP4, DT_Q2_K, DT_Q3_K, DT_Q4_0, DT_Q4_1,
    DT_Q4_K, DT_Q5_0, DT_Q5_1, DT_Q5_K, DT_Q6_K, DT_Q8_0, E_DATA, E_NOMEM_HOST, FEAT_CANCEL_MID, FEAT_DETERMINISTIC,
    FEAT_HOST_WEIGHTS, FEAT_INVARIANT, FEAT_SLOW_FILE, FEAT_SLOW_HOST, FEAT_SLOW_SEALED, FEAT_UNIFIED_MEM, LOG_INFO,
    LOG_WARN, Program, SpdBucket, SpdDeviceInfo, SpdHealth, SpdKvDesc, SpdKvInfo, SpdKvOp, SpdMemInfo, SpdWeightDesc,
    dtype_bit,
};
use sparsed_plugin_kit::{
    Device, Host, InOrder, OpenOptions, PlanSizes, Plugin, PluginError, Result, Run, SlowArea, Source, Synchronous,
    Usage, put_text,
};
use std::ffi::CStr;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// What a weight may be. Formats without a kernel of their own are decoded row by row.
const WEIGHT_DTYPES: &[u32] = &[
    DT_F32, DT_F16, DT_BF16, DT_Q8_0, DT_Q4_0, DT_Q4_1, DT_Q5_0, DT_Q5_1, DT_Q2_K, DT_Q3_K, DT_Q4_K, DT_Q5_K, DT_Q6_K,
    DT_IQ4_NL, DT_IQ4_XS, DT_MXFP4, DT_F8E4M3,
];

/// The plugin: one device, the host's cores.
#[derive(Debug)]
pub(crate) struct CpuPlugin {
    host: Host,
    level: Level,
}

/// The open device.
#[derive(Debug)]
pub(crate) struct CpuDevice {
    pub(crate) level: Level,
    pub(crate) team: Team,
    pub(crate) host: Host,
    pub(crate) usage: Arc<Usage>,
    pub(crate) quota: Option<Quota>,
}

/// What the control group's quota is asked for again and again, where nobody said how many threads there are: it may
/// be cut, and threads that it does not keep busy are stopped for the rest of each period while others wait for them.
#[derive(Debug)]
pub(crate) struct Quota {
    /// Processors that threads may run on.
    cpus: usize,
    /// When it was looked up.
    looked: Mutex<Instant>,
}

/// How long an answer about the quota is believed.
const QUOTA_AGE: Duration = Duration::from_secs(1);

impl Plugin for CpuPlugin {
    const ID: &'static CStr = c"cpu";
    const VERSION: &'static CStr = sparsed_plugin_kit::cargo_version!();
    type Device = CpuDevice;

    fn create(host: Host) -> Result<Self> {
        let level = match host.config(c"level") {
            Some(name) => Level::forced(&name)?,
            None => Level::detect(),
        };
        Ok(Self { host, level })
    }

    fn device_count(&self) -> Result<u32> {
        Ok(1)
    }

    fn device_info(&self, index: u32) -> Result<SpdDeviceInfo> {
        check_index(index)?;
        let mut info = SpdDeviceInfo {
            kind: DEV_CPU,
            score: 1,
            numa_node: u32::MAX,
            mem_total: total_memory(),
            features: FEAT_HOST_WEIGHTS
                | FEAT_UNIFIED_MEM
                | FEAT_DETERMINISTIC
                | FEAT_INVARIANT
                | FEAT_CANCEL_MID
                | FEAT_SLOW_FILE
                | FEAT_SLOW_HOST
                | FEAT_SLOW_SEALED,
            block_tokens_align: BLOCK_TOKENS_ALIGN,
            ..SpdDeviceInfo::default()
        };
        put_text(&mut info.id, "cpu");
        put_text(&mut info.name, std::env::consts::ARCH);
        put_text(&mut info.driver, self.level.name());
        for (map, dtypes) in [(&mut info.weight_dtypes, WEIGHT_DTYPES), (&mut info.row_dtypes, &ROW_DTYPES[..])] {
            for (word, mask) in dtypes.iter().filter_map(|&dtype| dtype_bit(dtype)) {
                map[word] |= mask;
            }
        }
        Ok(info)
    }

    fn open(&self, index: u32, options: &OpenOptions) -> Result<CpuDevice> {
        check_index(index)?;
        let cpus = allowed_cpus(&options.cpu_mask);
        if cpus.is_empty() {
            return Err(PluginError::invalid("the affinity mask leaves no processor"));
        }
        let n = if options.n_threads == 0 { threads_for(cpus.len()) } else { options.n_threads as usize };
        if n > THREADS_MAX {
            return Err(PluginError::invalid(format!("{n} threads, {THREADS_MAX} are allowed")));
        }
        let asked = if options.cpu_mask.is_empty() { &[] } else { &cpus[..] };
        let no_threads =
            |error: std::io::Error| PluginError::new(E_NOMEM_HOST, format!("cannot start a thread: {error}"));
        let team = Team::new(n, asked).map_err(no_threads)?;
        self.host.log(LOG_INFO, &format!("cpu device open: {n} threads, level {}", self.level.name()));
        let usage = Arc::new(Usage { budget: options.mem_budget, ..Usage::default() });
        let quota = (options.n_threads == 0).then(|| Quota { cpus: cpus.len(), looked: Mutex::new(Instant::now()) });
        Ok(CpuDevice { level: self.level, team, host: self.host.clone(), usage, quota })
    }
}

impl Device for CpuDevice {
    type Weight = Weight;
    type Pool = Pool;
    type Plan = Plan;
    type Queue = InOrder<Self>;

    fn mem_info(&self) -> SpdMemInfo {
        let load = |n: &std::sync::atomic::AtomicU64| n.load(Ordering::Relaxed);
        let usage = &*self.usage;
        let used = usage.used();
        let total = total_memory();
        SpdMemInfo {
            total,
            free: total.saturating_sub(used),
            budget: usage.budget,
            used_weights: load(&usage.weights),
            used_kv: load(&usage.kv),
            used_workspace: load(&usage.workspace),
            ..SpdMemInfo::default()
        }
    }

    fn health(&self) -> SpdHealth {
        SpdHealth { temperature_millicelsius: i32::MIN, power_milliwatt: i32::MIN, ..SpdHealth::default() }
    }

    fn self_test(&self, _level: u32) -> Result<()> {
        let (a, b) = ([1.5f32; 40], [2.0f32; 40]);
        let found = crate::kernels::dot::dot(self.level, &a, &b);
        if (found - 120.0).abs() > 1e-3 {
            return Err(PluginError::new(E_DATA, format!("a dot product is {found}, not 120")));
        }
        let mut selected = [0; 2];
        crate::kernels::select::top_k(self.level, &[0.0, 2.0, 1.0], &mut Default::default(), &mut selected);
        if selected != [1, 2] {
            return Err(PluginError::new(E_DATA, "a selection came out wrong"));
        }
        Ok(())
    }

    fn supports(&self, program: &Program, op: usize) -> Result<()> {
        Bound { program, weights: &[], pools: &[] }.check_op(&program.ops()[op]).map_err(|error| error.at(op))
    }

    fn weight_create(&self, desc: &SpdWeightDesc) -> Result<Weight> {
        Weight::create(desc, &self.usage)
    }

    fn weight_upload(&self, weight: &mut Weight, first: u32, n: u32, source: Source) -> Result<()> {
        weight.upload(first, n, source)
    }

    fn weight_commit(&self, weight: &mut Weight) -> Result<()> {
        weight.commit()
    }

    fn kv_create(&self, desc: &SpdKvDesc, slow: Option<SlowArea>) -> Result<(Pool, SpdKvInfo)> {
        let (pool, info) = Pool::create(desc, slow, &self.usage)?;
        if let Some(reason) = pool.slow().as_ref().and_then(|slow| slow.no_uring()) {
            self.host.log(LOG_WARN, &format!("the slow tier is read by threads, as io_uring cannot be used: {reason}"));
        }
        Ok((pool, info))
    }

    fn compile(
        &self,
        program: Program,
        weights: Vec<Arc<Weight>>,
        pools: Vec<Arc<Pool>>,
        bucket: SpdBucket,
    ) -> Result<(Plan, PlanSizes)> {
        Plan::compile(Request { program, weights, pools, bucket }, &self.team, &self.usage)
    }

    fn plan_sizes(
        &self,
        program: Program,
        weights: Vec<Arc<Weight>>,
        pools: Vec<Arc<Pool>>,
        bucket: SpdBucket,
    ) -> Result<PlanSizes> {
        Request { program, weights, pools, bucket }.sizes(self.team.len())
    }

    fn queue(self: &Arc<Self>, _priority: u32) -> Result<InOrder<Self>> {
        Ok(InOrder::new(self))
    }
}

impl CpuDevice {
    /// Puts threads to sleep, or wakes them, where the quota was changed.
    fn heed_quota(&self) {
        let Some(Quota { cpus, looked }) = &self.quota else { return };
        let mut looked = looked.lock().unwrap_or_else(PoisonError::into_inner);
        if looked.elapsed() < QUOTA_AGE {
            return;
        }
        *looked = Instant::now();
        let before = self.team.awake();
        self.team.keep_awake(threads_for(*cpus));
        let now = self.team.awake();
        if now != before {
            let text = format!("the quota of processor time changed: {now} of {} threads compute", self.team.len());
            self.host.log(LOG_INFO, &text);
        }
    }
}

impl Synchronous for CpuDevice {
    fn run(&self, plan: &Plan, run: Run<'_>) -> Result<()> {
        let _turn = self.team.turns.take();
        self.heed_quota();
        execute::run(self, plan, run)
    }

    fn kv(&self, pool: &Pool, ops: &[SpdKvOp], host: &mut [u8]) -> Result<()> {
        pool.apply(ops, host)
    }
}

fn check_index(index: u32) -> Result<()> {
    if index == 0 { Ok(()) } else { Err(PluginError::invalid(format!("device {index}; there is only device 0"))) }
}

fn total_memory() -> u64 {
    let info = rustix::system::sysinfo();
    let (ram, unit) = (info.totalram, u64::from(info.mem_unit));
    ram.saturating_mul(unit)
}

#[cfg(test)]
impl CpuDevice {
    /// One that is what a test wants, whatever processors and quota there are.
    pub(crate) fn with_threads(level: Level, n: usize) -> Self {
        let team = Team::new(n, &[]).expect("threads");
        Self { level, team, host: Host::none(), usage: Arc::new(Usage::default()), quota: None }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn threads(n_threads: u32, cpu_mask: Vec<u64>) -> Result<usize> {
        let plugin = CpuPlugin { host: Host::none(), level: Level::Scalar };
        let device = plugin.open(0, &OpenOptions { n_threads, cpu_mask, mem_budget: 0 })?;
        Ok(device.team.len())
    }

    #[test]
    fn a_device_has_as_many_threads_as_it_was_told_or_else_as_its_processors_and_its_quota_allow() {
        let cpus = allowed_cpus(&[]);
        let mut one = vec![0; cpus[0] / 64 + 1];
        one[cpus[0] / 64] = 1 << (cpus[0] % 64);
        assert_eq!(threads(0, Vec::new()).unwrap(), threads_for(cpus.len()));
        assert_eq!(threads(0, one.clone()).unwrap(), 1);
        assert_eq!(threads(3, one).unwrap(), 3);
        assert!(threads(0, vec![0]).unwrap_err().message.contains("leaves no processor"));
        assert!(threads(THREADS_MAX as u32 + 1, Vec::new()).is_err());
    }
}
