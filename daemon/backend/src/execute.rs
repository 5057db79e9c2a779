//! How does a step run? Plans and queues; every call returns when its work is done.

use crate::BackendError;
use crate::call::checked;
use crate::device::Device;
use crate::memory::{KvPool, Weight};
use sparsed_abi::{Blob, E_TIMEOUT, SpdBucket, SpdCompile, SpdKvOp, SpdPlan, SpdPlanInfo, SpdQueue, SpdRun, SpdStep};
use sparsed_plugin_kit::struct_size;
use std::ptr::{self, NonNull};
use std::sync::Arc;
use std::sync::atomic::AtomicU32;
use std::time::Duration;

/// How long one wait lasts before it is asked again, in nanoseconds. Only a pause between questions, not a limit.
const WAIT_NS: u64 = 1_000_000_000;
/// Bytes of weights in a second that a device reads at least while it compiles: what an SD card of class 4 is sure of.
/// Those of higher classes give more than twice as much, and laying weights out otherwise is faster than any of them.
const COMPILED_BYTES_PER_S: u64 = 4 << 20;

/// How long a device that does nothing else may take to compile weights of so many bytes, all of which it may read then
/// from a disk that is slow. Beside others' steps it may take twice as long and a step: they have half of its time.
pub fn compile_time(weights_bytes: u64) -> Duration {
    Duration::from_secs(weights_bytes / COMPILED_BYTES_PER_S)
}

/// A compiled program, bound to its weights and pools.
#[derive(Debug)]
pub struct Plan {
    raw: NonNull<SpdPlan>,
    device: Arc<Device>,
    info: PlanInfo,
    /// What the plan reads and writes; freed after it.
    _bound: (Vec<Weight>, Vec<KvPool>),
}

// SAFETY: created and destroyed under the plugin's lock, used by queues, each of which one thread owns.
unsafe impl Send for Plan {}
// SAFETY: as above.
unsafe impl Sync for Plan {}

/// What a plan needs, in bytes.
#[derive(Clone, Copy, Debug, Default)]
pub struct PlanInfo {
    /// Device memory for intermediate tensors.
    pub workspace_bytes: u64,
    /// Device memory for captured graphs.
    pub graph_bytes: u64,
    /// Host memory.
    pub host_bytes: u64,
    /// The input arena of the largest step.
    pub in_bytes: u64,
    /// The output arena of the largest step.
    pub out_bytes: u64,
}

impl Plan {
    pub(crate) fn compile(
        device: &Arc<Device>,
        blob: &Blob,
        weights: &[&Weight],
        pools: &[&KvPool],
        bucket: SpdBucket,
    ) -> Result<Self, BackendError> {
        let raw_weights: Vec<_> = weights.iter().map(|weight| weight.0.raw.as_ptr()).collect();
        let raw_pools: Vec<_> = pools.iter().map(|pool| pool.0.raw.as_ptr()).collect();
        let count = |n: usize| u32::try_from(n).expect("far fewer than 2^32 weights");
        let compile = SpdCompile {
            struct_size: struct_size::<SpdCompile>(),
            flags: 0,
            blob: blob.as_bytes().as_ptr().cast(),
            blob_length: blob.as_bytes().len() as u64,
            weights: raw_weights.as_ptr(),
            kvpools: raw_pools.as_ptr(),
            n_weights: count(raw_weights.len()),
            n_kvpools: count(raw_pools.len()),
            buckets: &raw const bucket,
            n_buckets: 1,
            bucket_stride: struct_size::<SpdBucket>(),
            cache_dir: ptr::null(),
        };
        let mut info = SpdPlanInfo { struct_size: struct_size::<SpdPlanInfo>(), ..SpdPlanInfo::default() };
        let _control = device.plugin.control();
        let (call, mut raw) = (device.api().plan_compile.expect("checked at load"), ptr::null_mut());
        checked("plan_compile", |e| {
            // SAFETY: device, weights and pools are alive; blob, arrays and bucket live through the call.
            unsafe { call(device.raw.as_ptr(), &raw const compile, &raw mut raw, &raw mut info, e) }
        })?;
        let Some(raw) = NonNull::new(raw) else {
            let reason = "plan_compile answered NULL".to_owned();
            return Err(BackendError::BadTable { path: device.plugin.path().to_owned(), reason });
        };
        let info = PlanInfo {
            workspace_bytes: info.workspace_bytes,
            graph_bytes: info.graph_bytes,
            host_bytes: info.host_bytes,
            in_bytes: info.in_bytes,
            out_bytes: info.out_bytes,
        };
        let bound = (weights.iter().map(|&w| w.clone()).collect(), pools.iter().map(|&p| p.clone()).collect());
        Ok(Self { raw, device: Arc::clone(device), info, _bound: bound })
    }

    /// What the plan needs.
    pub fn info(&self) -> PlanInfo {
        self.info
    }
}

impl Drop for Plan {
    fn drop(&mut self) {
        let _control = self.device.plugin.control();
        let destroy = self.device.api().plan_destroy.expect("checked at load");
        // SAFETY: a queue's call borrows the plan until its work is done, so no work uses it.
        unsafe { destroy(self.raw.as_ptr()) };
    }
}

/// A line of work on a device, owned by one thread at a time.
#[derive(Debug)]
pub struct Queue {
    raw: NonNull<SpdQueue>,
    device: Arc<Device>,
}

// SAFETY: `[queue]` functions need one thread at a time, which `&mut self` gives.
unsafe impl Send for Queue {}

impl Queue {
    pub(crate) fn create(device: &Arc<Device>) -> Result<Self, BackendError> {
        let _control = device.plugin.control();
        let (create, mut raw) = (device.api().queue_create.expect("checked at load"), ptr::null_mut());
        // SAFETY: the device is alive; the out pointer and the error are ours.
        checked("queue_create", |e| unsafe { create(device.raw.as_ptr(), 0, 0, &raw mut raw, e) })?;
        let Some(raw) = NonNull::new(raw) else {
            let reason = "queue_create answered NULL".to_owned();
            return Err(BackendError::BadTable { path: device.plugin.path().to_owned(), reason });
        };
        Ok(Self { raw, device: Arc::clone(device) })
    }

    /// Runs one step. `step` is an encoded `StepArrays`; `input` and `output` are the arenas of `plugin.h`.
    ///
    /// # Errors
    /// The plugin's own; after `SPD_E_STEP` the same step may be run again.
    pub fn run(&mut self, plan: &Plan, step: &Blob, input: &[u8], output: &mut [u8]) -> Result<(), BackendError> {
        self.run_cancellable(plan, step, input, output, None)
    }

    /// As [`Self::run`]; the step ends with `SPD_E_CANCELLED` once `cancel` is not 0, as soon as the device can.
    ///
    /// # Errors
    /// As [`Self::run`].
    pub fn run_cancellable(
        &mut self,
        plan: &Plan,
        step: &Blob,
        input: &[u8],
        output: &mut [u8],
        cancel: Option<&AtomicU32>,
    ) -> Result<(), BackendError> {
        let run = SpdRun {
            struct_size: struct_size::<SpdRun>(),
            step: step.as_bytes().as_ptr().cast::<SpdStep>(),
            input: input.as_ptr().cast(),
            in_length: input.len() as u64,
            out: output.as_mut_ptr().cast(),
            out_length: output.len() as u64,
            cancel: cancel.map_or(ptr::null(), |flag| flag.as_ptr().cast_const()),
            ..SpdRun::default()
        };
        let (call, mut timeline) = (self.device.api().queue_run.expect("checked at load"), 0);
        checked("queue_run", |e| {
            // SAFETY: queue and plan are alive; step, arenas and flag are borrowed until the work is done, below.
            unsafe { call(self.raw.as_ptr(), plan.raw.as_ptr(), &raw const run, &raw mut timeline, e) }
        })?;
        self.wait(timeline)
    }

    /// Copies, exports, imports or discards blocks of `pool`; host images lie in `host`.
    ///
    /// # Errors
    /// The plugin's own.
    pub fn kv(&mut self, pool: &KvPool, ops: &[SpdKvOp], host: &mut [u8]) -> Result<(), BackendError> {
        let count = u32::try_from(ops.len()).expect("far fewer than 2^32 blocks");
        let (call, mut timeline) = (self.device.api().queue_kv.expect("checked at load"), 0);
        let (raw, pool, stride) = (self.raw.as_ptr(), pool.0.raw.as_ptr(), struct_size::<SpdKvOp>());
        let (buffer, length) = (host.as_mut_ptr().cast(), host.len() as u64);
        checked("queue_kv", |e| {
            // SAFETY: queue and pool are alive; ops and host are borrowed until the work is done, below.
            unsafe { call(raw, pool, ops.as_ptr(), count, stride, buffer, length, &raw mut timeline, e) }
        })?;
        self.wait(timeline)
    }

    /// Returns when `timeline` has completed or failed, never while the plugin may still touch borrowed memory.
    fn wait(&mut self, timeline: u64) -> Result<(), BackendError> {
        let call = self.device.api().queue_wait.expect("checked at load");
        loop {
            // SAFETY: the queue is alive; the error is ours.
            let waited = checked("queue_wait", |e| unsafe { call(self.raw.as_ptr(), timeline, WAIT_NS, e) });
            match waited {
                Err(error) if error.status() == Some(E_TIMEOUT) => {}
                done => return done,
            }
        }
    }
}

impl Drop for Queue {
    fn drop(&mut self) {
        let _control = self.device.plugin.control();
        let destroy = self.device.api().queue_destroy.expect("checked at load");
        // SAFETY: every call waits for its work, so the queue is drained.
        unsafe { destroy(self.raw.as_ptr()) };
    }
}
