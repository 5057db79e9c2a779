//! Plans and queues: what is computed, and when.

use super::{Err, Plan, Pool, Weight, WeightState, device, give, known_flags, program, put, take};
use crate::border::{PluginError, Run, borrow, element, entry, read_in, write_out};
use crate::{Device, Queue};
use sparsed_abi::{
    SpdBucket, SpdCompile, SpdDevice, SpdKvOp, SpdKvPool, SpdPlan, SpdPlanInfo, SpdQueue, SpdRun, SpdStatus, SpdStep,
    StepArrays,
};
use std::ffi::c_void;
use std::sync::Arc;
use std::sync::atomic::AtomicU32;
use std::time::Duration;

/// The elements of a C array of handles.
///
/// # Safety
/// `handles` has `n` readable elements, or `n` is 0.
unsafe fn handles<'a, H>(handles: *const *mut H, n: u32) -> crate::Result<&'a [*mut H]> {
    if n == 0 {
        return Ok(&[]);
    }
    if handles.is_null() {
        return Err(PluginError::invalid("an array of handles is NULL"));
    }
    // SAFETY: the caller's contract.
    Ok(unsafe { std::slice::from_raw_parts(handles, n as usize) })
}

/// The component-wise largest bucket.
///
/// # Safety
/// `compile` describes a readable array of buckets.
unsafe fn largest_bucket(compile: &SpdCompile) -> crate::Result<SpdBucket> {
    if compile.n_buckets == 0 {
        return Err(PluginError::invalid("no buckets"));
    }
    let mut largest = SpdBucket::default();
    for i in 0..compile.n_buckets as usize {
        // SAFETY: element i of the caller's array.
        let bucket = unsafe { element(compile.buckets, compile.bucket_stride, i) }?;
        largest.max_tokens = largest.max_tokens.max(bucket.max_tokens);
        largest.max_seqs = largest.max_seqs.max(bucket.max_seqs);
        largest.max_logits = largest.max_logits.max(bucket.max_logits);
        largest.max_context = largest.max_context.max(bucket.max_context);
    }
    Ok(largest)
}

pub(super) unsafe extern "C" fn plan_compile<D: Device>(
    handle: *mut SpdDevice,
    compile: *const SpdCompile,
    out: *mut *mut SpdPlan,
    info: *mut SpdPlanInfo,
    e: Err,
) -> SpdStatus {
    entry(e, || {
        // SAFETY: the callers' structs state their sizes; a living handle.
        let (compile, device) = unsafe {
            read_in(info.cast_const())?;
            (read_in(compile)?, device::<D>(handle)?)
        };
        known_flags(compile.flags, sparsed_abi::COMPILE_DRY_RUN)?;
        // SAFETY: the header's rules for the arrays of spd_compile.
        let (program, bucket, raw_weights, raw_pools) = unsafe {
            (
                program(compile.blob, compile.blob_length)?,
                largest_bucket(&compile)?,
                handles(compile.weights, compile.n_weights)?,
                handles(compile.kvpools, compile.n_kvpools)?,
            )
        };
        let header = program.header();
        if header.n_weights != compile.n_weights || header.n_kvpools != compile.n_kvpools {
            return Err(PluginError::invalid("the program wants another number of weights or pools"));
        }
        let mut weights = Vec::with_capacity(raw_weights.len());
        for &raw in raw_weights {
            // SAFETY: a living weight handle.
            match &unsafe { borrow::<Weight<D>>(raw.cast()) }?.state {
                WeightState::Committed(weight) => weights.push(Arc::clone(weight)),
                _ => return Err(PluginError::invalid("a weight is not committed")),
            }
        }
        let mut pools = Vec::with_capacity(raw_pools.len());
        for &raw in raw_pools {
            // SAFETY: a living pool handle.
            pools.push(Arc::clone(&unsafe { borrow::<Pool<D>>(raw.cast()) }?.0));
        }
        let (plan, sizes) = if compile.flags & sparsed_abi::COMPILE_DRY_RUN == 0 {
            let (plan, sizes) = device.compile(program, weights, pools, bucket)?;
            (Some(plan), sizes)
        } else {
            (None, device.plan_sizes(program, weights, pools, bucket)?)
        };
        let filled = SpdPlanInfo {
            workspace_bytes: sizes.workspace,
            in_bytes: sizes.input,
            out_bytes: sizes.output,
            unsupported_op: u32::MAX,
            ..SpdPlanInfo::default()
        };
        // SAFETY: checked above.
        unsafe { write_out(info, filled) };
        match plan {
            // SAFETY: the caller's out pointer.
            Some(plan) => unsafe { give(out, Plan::<D>(Arc::new(plan))) },
            None => Ok(()),
        }
    })
}

pub(super) unsafe extern "C" fn plan_destroy<D: Device>(handle: *mut SpdPlan) {
    // SAFETY: the handle came from plan_compile and is not used again.
    unsafe { take::<Plan<D>>(handle.cast()) };
}

pub(super) unsafe extern "C" fn queue_create<D: Device>(
    handle: *mut SpdDevice,
    priority: u32,
    _cookie: u64,
    out: *mut *mut SpdQueue,
    e: Err,
) -> SpdStatus {
    entry(e, || {
        // SAFETY: a living handle.
        let queue = unsafe { device::<D>(handle) }?.queue(priority)?;
        // SAFETY: the caller's out pointer.
        unsafe { give(out, queue) }
    })
}

pub(super) unsafe extern "C" fn queue_destroy<D: Device>(handle: *mut SpdQueue) {
    // SAFETY: the handle came from queue_create and is not used again.
    unsafe { take::<D::Queue>(handle.cast()) };
}

pub(super) unsafe extern "C" fn queue_run<D: Device>(
    queue: *mut SpdQueue,
    plan: *mut SpdPlan,
    run: *const SpdRun,
    timeline: *mut u64,
    e: Err,
) -> SpdStatus {
    entry(e, || {
        // SAFETY: living handles; the caller's struct states its size.
        let (queue, plan, run) =
            unsafe { (borrow::<D::Queue>(queue.cast())?, borrow::<Plan<D>>(plan.cast())?, read_in(run)?) };
        known_flags(run.flags, 0)?;
        // SAFETY: the header's rules for step and arenas.
        let arguments = unsafe { arguments(&run) }?;
        let value = queue.run(&plan.0, arguments)?;
        // SAFETY: the caller's out pointer.
        unsafe { put(timeline, value) }
    })
}

/// The step and arenas of a call.
///
/// # Safety
/// The pointers of `run` follow the header's rules for the time of the answer.
unsafe fn arguments<'a>(run: &SpdRun) -> crate::Result<Run<'a>> {
    if run.step.is_null() || run.step.align_offset(8) != 0 {
        return Err(PluginError::invalid("step: NULL or not 8-aligned"));
    }
    // SAFETY: a step has at least its header.
    let total = unsafe { (&raw const (*run.step).total_size).read() } as usize;
    if total < size_of::<SpdStep>() {
        return Err(PluginError::invalid("step: total_size is smaller than the header"));
    }
    // SAFETY: a step has total_size bytes.
    let bytes = unsafe { std::slice::from_raw_parts(run.step.cast::<u8>(), total) };
    let step = StepArrays::parse(bytes).map_err(|error| PluginError::invalid(error.to_string()))?;
    // SAFETY: the header's rules; an empty arena may be NULL.
    let (input, output) = unsafe { (arena(run.input, run.in_length)?, arena_mut(run.out, run.out_length)?) };
    // SAFETY: NULL or a u32 that the host may change at any time, which is what an atomic is for.
    let cancel = unsafe { run.cancel.cast::<AtomicU32>().as_ref() };
    Ok(Run { step, step_bytes: bytes, input, output, cancel })
}

/// # Safety
/// NULL, or `length` readable bytes.
unsafe fn arena<'a>(at: *const c_void, length: u64) -> crate::Result<&'a [u8]> {
    let length = usize::try_from(length).map_err(|_| PluginError::invalid("arena: too long"))?;
    if at.is_null() || length == 0 {
        return Ok(&[]);
    }
    // SAFETY: the caller's contract.
    Ok(unsafe { std::slice::from_raw_parts(at.cast::<u8>(), length) })
}

/// # Safety
/// NULL, or `length` writable bytes that nobody else touches.
unsafe fn arena_mut<'a>(at: *mut c_void, length: u64) -> crate::Result<&'a mut [u8]> {
    let length = usize::try_from(length).map_err(|_| PluginError::invalid("arena: too long"))?;
    if at.is_null() || length == 0 {
        return Ok(&mut []);
    }
    // SAFETY: the caller's contract.
    Ok(unsafe { std::slice::from_raw_parts_mut(at.cast::<u8>(), length) })
}

pub(super) unsafe extern "C" fn queue_kv<D: Device>(
    queue: *mut SpdQueue,
    pool: *mut SpdKvPool,
    ops: *const SpdKvOp,
    n_ops: u32,
    stride: u32,
    host: *mut c_void,
    host_length: u64,
    timeline: *mut u64,
    e: Err,
) -> SpdStatus {
    entry(e, || {
        // SAFETY: living handles; the caller's buffer.
        let (queue, pool, host) = unsafe {
            (borrow::<D::Queue>(queue.cast())?, borrow::<Pool<D>>(pool.cast())?, arena_mut(host, host_length)?)
        };
        let mut list = Vec::with_capacity(n_ops as usize);
        for i in 0..n_ops as usize {
            // SAFETY: element i of the caller's array.
            list.push(unsafe { element(ops, stride, i) }?);
        }
        let value = queue.kv(&pool.0, &list, host)?;
        // SAFETY: the caller's out pointer.
        unsafe { put(timeline, value) }
    })
}

pub(super) unsafe extern "C" fn queue_wait_queue<D: Device>(
    queue: *mut SpdQueue,
    other: *mut SpdQueue,
    timeline: u64,
    e: Err,
) -> SpdStatus {
    entry(e, || {
        // SAFETY: living handles.
        let (queue, other) = unsafe { (borrow::<D::Queue>(queue.cast())?, borrow::<D::Queue>(other.cast())?) };
        queue.wait_queue(other, timeline)
    })
}

pub(super) unsafe extern "C" fn queue_query<D: Device>(queue: *mut SpdQueue, completed: *mut u64, e: Err) -> SpdStatus {
    entry(e, || {
        // SAFETY: a living handle and the caller's out pointer.
        unsafe { put(completed, borrow::<D::Queue>(queue.cast())?.completed()) }
    })
}

pub(super) unsafe extern "C" fn queue_wait<D: Device>(
    queue: *mut SpdQueue,
    timeline: u64,
    timeout_ns: u64,
    e: Err,
) -> SpdStatus {
    // SAFETY: a living handle.
    entry(e, || unsafe { borrow::<D::Queue>(queue.cast()) }?.wait(timeline, Duration::from_nanos(timeout_ns)))
}

pub(super) unsafe extern "C" fn queue_cancel<D: Device>(queue: *mut SpdQueue, from: u64, e: Err) -> SpdStatus {
    // SAFETY: a living handle.
    entry(e, || unsafe { borrow::<D::Queue>(queue.cast()) }?.cancel(from))
}
