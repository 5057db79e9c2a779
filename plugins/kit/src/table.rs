//! Which C function does what? Every entry of the table, generic over the plugin.

use crate::border::{Host, PluginError, Run, Source, borrow, element, entry, read_in, write_out};
use crate::{Device, OpenOptions, Plugin, Queue, SlowFile};
use sparsed_abi::{
    ABI_MINOR, SpdApi, SpdBucket, SpdCompile, SpdDevice, SpdDeviceInfo, SpdError, SpdHealth, SpdHost, SpdInstance,
    SpdKvDesc, SpdKvInfo, SpdKvOp, SpdKvPool, SpdMemInfo, SpdOpenOptions, SpdPlan, SpdPlanInfo, SpdQueue, SpdRun,
    SpdSource, SpdStatus, SpdStep, SpdWeight, SpdWeightDesc, StepArrays,
};
use std::alloc::Layout;
use std::ffi::{c_char, c_void};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::AtomicU32;
use std::time::Duration;

type Err = *mut SpdError;

/// What the handles stand for.
struct OpenDevice<D>(Arc<D>);
struct Weight<D: Device> {
    device: Arc<D>,
    state: WeightState<D::Weight>,
}
enum WeightState<W> {
    Open(W),
    Committed(Arc<W>),
    Failed,
}
struct Pool<D: Device>(Arc<D::Pool>);
struct Plan<D: Device>(Arc<D::Plan>);

/// The table of plugin `P`.
pub const fn table<P: Plugin>() -> SpdApi {
    SpdApi {
        struct_size: size_of::<SpdApi>() as u32,
        abi_minor: ABI_MINOR,
        layout: sparsed_abi::LAYOUT_DIGEST,
        plugin_id: P::ID.as_ptr(),
        plugin_version: P::VERSION.as_ptr(),
        required_host_features: 0,
        instance_create: Some(instance_create::<P>),
        instance_destroy: Some(instance_destroy::<P>),
        device_count: Some(device_count::<P>),
        device_info: Some(device_info::<P>),
        device_open: Some(device_open::<P>),
        device_close: Some(device_close::<P>),
        self_test: Some(self_test::<P::Device>),
        mem_info: Some(mem_info::<P::Device>),
        health: Some(health::<P::Device>),
        supports: Some(supports::<P::Device>),
        host_alloc: Some(host_alloc),
        host_free: Some(host_free),
        host_register: Some(host_register),
        host_unregister: Some(host_unregister),
        weight_create: Some(weight_create::<P::Device>),
        weight_upload: Some(weight_upload::<P::Device>),
        weight_commit: Some(weight_commit::<P::Device>),
        weight_destroy: Some(weight_destroy::<P::Device>),
        kv_create: Some(kv_create::<P::Device>),
        kv_destroy: Some(kv_destroy::<P::Device>),
        plan_compile: Some(plan_compile::<P::Device>),
        plan_destroy: Some(plan_destroy::<P::Device>),
        queue_create: Some(queue_create::<P::Device>),
        queue_destroy: Some(queue_destroy::<P::Device>),
        queue_run: Some(queue_run::<P::Device>),
        queue_kv: Some(queue_kv::<P::Device>),
        queue_wait_queue: Some(queue_wait_queue::<P::Device>),
        queue_query: Some(queue_query::<P::Device>),
        queue_wait: Some(queue_wait::<P::Device>),
        queue_cancel: Some(queue_cancel::<P::Device>),
        extension: Some(extension),
    }
}

/// Hands a boxed value to the caller through its out pointer.
///
/// # Safety
/// `to` is NULL or writable.
unsafe fn give<T, H>(to: *mut *mut H, value: T) -> crate::Result<()> {
    if to.is_null() {
        return Err(PluginError::invalid("the out pointer is NULL"));
    }
    // SAFETY: writable by the caller's contract.
    unsafe { to.write(Box::into_raw(Box::new(value)).cast()) };
    Ok(())
}

/// Takes a boxed value back and drops it; a panic inside is swallowed, there is nobody to tell.
///
/// # Safety
/// `handle` is NULL or came from [`give`] with the same `T`, and is not used again.
unsafe fn take<T>(handle: *mut c_void) {
    if !handle.is_null() {
        entry(std::ptr::null_mut(), || {
            // SAFETY: the caller's contract.
            drop(unsafe { Box::from_raw(handle.cast::<T>()) });
            Ok(())
        });
    }
}

/// Writes to an out pointer of a plain value.
///
/// # Safety
/// `to` is NULL or writable.
unsafe fn put<T>(to: *mut T, value: T) -> crate::Result<()> {
    // SAFETY: the caller's contract.
    let to = unsafe { to.as_mut() }.ok_or_else(|| PluginError::invalid("the out pointer is NULL"))?;
    *to = value;
    Ok(())
}

/// Refuses a flag that this ABI does not have.
fn known_flags(flags: u32, known: u32) -> crate::Result<()> {
    let unknown = flags & !known;
    if unknown == 0 { Ok(()) } else { Err(PluginError::unsupported(format!("unknown flags {unknown:#x}"))) }
}

unsafe extern "C" fn instance_create<P: Plugin>(host: *const SpdHost, out: *mut *mut SpdInstance, e: Err) -> SpdStatus {
    // SAFETY: out is the caller's; the host table outlives the instance by the header's rule.
    entry(e, || unsafe { give(out, P::create(Host::new(host))?) })
}

/// The instance handle of a plugin that exists already, for a daemon that puts something of its own behind the table
/// [`table`] of the same type. Given back to `instance_destroy`.
pub fn instance<P: Plugin>(plugin: P) -> NonNull<SpdInstance> {
    NonNull::from(Box::leak(Box::new(plugin))).cast()
}

unsafe extern "C" fn instance_destroy<P: Plugin>(instance: *mut SpdInstance) {
    // SAFETY: the handle came from instance_create and is not used again.
    unsafe { take::<P>(instance.cast()) };
}

unsafe extern "C" fn device_count<P: Plugin>(instance: *mut SpdInstance, out: *mut u32, e: Err) -> SpdStatus {
    // SAFETY: a living handle and the caller's out pointer.
    entry(e, || unsafe { put(out, borrow::<P>(instance.cast())?.device_count()?) })
}

unsafe extern "C" fn device_info<P: Plugin>(
    instance: *mut SpdInstance,
    index: u32,
    out: *mut SpdDeviceInfo,
    e: Err,
) -> SpdStatus {
    entry(e, || {
        // SAFETY: a living handle.
        let info = unsafe { borrow::<P>(instance.cast()) }?.device_info(index)?;
        // SAFETY: the caller's out struct states its size.
        unsafe { read_in(out.cast_const())? };
        // SAFETY: as above, and not NULL.
        unsafe { write_out(out, info) };
        Ok(())
    })
}

unsafe extern "C" fn device_open<P: Plugin>(
    instance: *mut SpdInstance,
    index: u32,
    options: *const SpdOpenOptions,
    out: *mut *mut SpdDevice,
    e: Err,
) -> SpdStatus {
    entry(e, || {
        // SAFETY: the caller's struct states its size.
        let raw = unsafe { read_in(options) }?;
        known_flags(raw.flags, 0)?;
        let words = if raw.cpu_mask.is_null() { 0 } else { raw.cpu_mask_words.min(1024) as usize };
        // SAFETY: the header says that many words at cpu_mask.
        let mask = if words == 0 { &[][..] } else { unsafe { std::slice::from_raw_parts(raw.cpu_mask, words) } };
        let options = OpenOptions { n_threads: raw.n_threads, mem_budget: raw.mem_budget, cpu_mask: mask.to_vec() };
        // SAFETY: a living handle.
        let plugin = unsafe { borrow::<P>(instance.cast()) }?;
        let device = OpenDevice(Arc::new(plugin.open(index, &options)?));
        // SAFETY: the caller's out pointer.
        unsafe { give(out, device) }
    })
}

unsafe extern "C" fn device_close<P: Plugin>(device: *mut SpdDevice) {
    // SAFETY: the handle came from device_open and is not used again.
    unsafe { take::<OpenDevice<P::Device>>(device.cast()) };
}

/// The device behind a handle.
///
/// # Safety
/// `handle` is NULL or a living device handle of this plugin.
unsafe fn device<'a, D: Device>(handle: *mut SpdDevice) -> crate::Result<&'a Arc<D>> {
    // SAFETY: the caller's contract.
    Ok(&unsafe { borrow::<OpenDevice<D>>(handle.cast()) }?.0)
}

unsafe extern "C" fn self_test<D: Device>(handle: *mut SpdDevice, level: u32, e: Err) -> SpdStatus {
    // SAFETY: a living handle.
    entry(e, || unsafe { device::<D>(handle) }?.self_test(level))
}

unsafe extern "C" fn mem_info<D: Device>(handle: *mut SpdDevice, out: *mut SpdMemInfo, e: Err) -> SpdStatus {
    entry(e, || {
        // SAFETY: a living handle, and the caller's struct that states its size.
        let info = unsafe {
            read_in(out.cast_const())?;
            device::<D>(handle)
        }?
        .mem_info();
        // SAFETY: as above, and not NULL.
        unsafe { write_out(out, info) };
        Ok(())
    })
}

unsafe extern "C" fn health<D: Device>(handle: *mut SpdDevice, out: *mut SpdHealth, e: Err) -> SpdStatus {
    entry(e, || {
        // SAFETY: a living handle, and the caller's struct that states its size.
        let health = unsafe {
            read_in(out.cast_const())?;
            device::<D>(handle)
        }?
        .health();
        // SAFETY: as above, and not NULL.
        unsafe { write_out(out, health) };
        Ok(())
    })
}

/// The program in a caller's blob.
///
/// # Safety
/// `blob` is NULL or has `length` readable bytes.
unsafe fn program(blob: *const c_void, length: u64) -> crate::Result<sparsed_abi::Program> {
    let length = usize::try_from(length).map_err(|_| PluginError::invalid("program: too long"))?;
    if blob.is_null() {
        return Err(PluginError::invalid("program: NULL"));
    }
    // SAFETY: the caller's contract.
    let bytes = unsafe { std::slice::from_raw_parts(blob.cast::<u8>(), length) };
    sparsed_abi::Program::parse(bytes).map_err(|error| PluginError::invalid(error.to_string()))
}

unsafe extern "C" fn supports<D: Device>(
    handle: *mut SpdDevice,
    blob: *const c_void,
    length: u64,
    op: u32,
    e: Err,
) -> SpdStatus {
    entry(e, || {
        // SAFETY: the header's rule for blob and length.
        let program = unsafe { program(blob, length) }?;
        if op as usize >= program.ops().len() {
            return Err(PluginError::invalid(format!("operator {op} of {}", program.ops().len())));
        }
        // SAFETY: a living handle.
        unsafe { device::<D>(handle) }?.supports(&program, op as usize)
    })
}

/// Bytes in front of each host allocation that remember its layout.
const ALLOC_HEADER: usize = 4096;

unsafe extern "C" fn host_alloc(
    _: *mut SpdDevice,
    length: u64,
    align: u64,
    out: *mut *mut c_void,
    e: Err,
) -> SpdStatus {
    entry(e, || {
        let bad = || PluginError::invalid(format!("{length} bytes aligned to {align}"));
        let align = usize::try_from(align.max(16)).map_err(|_| bad())?;
        let total = usize::try_from(length).ok().and_then(|n| n.checked_add(ALLOC_HEADER)).ok_or_else(bad)?;
        let layout =
            Layout::from_size_align(total, align).ok().filter(|l| l.align() <= ALLOC_HEADER).ok_or_else(bad)?;
        // SAFETY: the layout is not empty.
        let base = unsafe { std::alloc::alloc_zeroed(layout) };
        if base.is_null() {
            return Err(PluginError::new(sparsed_abi::E_NOMEM_HOST, format!("{length} bytes")));
        }
        // SAFETY: the header has room for a Layout, and base is aligned to 16.
        unsafe { base.cast::<Layout>().write(layout) };
        // SAFETY: inside the allocation; the out pointer is the caller's.
        unsafe { put(out, base.add(ALLOC_HEADER).cast()) }
    })
}

unsafe extern "C" fn host_free(_: *mut SpdDevice, memory: *mut c_void) {
    if !memory.is_null() {
        // SAFETY: the pointer came from host_alloc, so its header precedes it.
        let base = unsafe { memory.cast::<u8>().sub(ALLOC_HEADER) };
        // SAFETY: written by host_alloc.
        let layout = unsafe { base.cast::<Layout>().read() };
        // SAFETY: allocated with this layout, not used again.
        unsafe { std::alloc::dealloc(base, layout) };
    }
}

unsafe extern "C" fn host_register(_: *mut SpdDevice, _: *mut c_void, _: u64, e: Err) -> SpdStatus {
    entry(e, || Err(PluginError::unsupported("host_register: this device reads the host's memory as it is")))
}

unsafe extern "C" fn host_unregister(_: *mut SpdDevice, _: *mut c_void) {}

unsafe extern "C" fn weight_create<D: Device>(
    handle: *mut SpdDevice,
    desc: *const SpdWeightDesc,
    out: *mut *mut SpdWeight,
    e: Err,
) -> SpdStatus {
    entry(e, || {
        // SAFETY: the caller's struct states its size; a living handle.
        let (desc, device) = unsafe { (read_in(desc)?, device::<D>(handle)?) };
        if desc.batch == 0 || desc.rows == 0 || desc.cols == 0 {
            return Err(PluginError::invalid("a weight has no rows, columns or batch"));
        }
        let state = WeightState::Open(device.weight_create(&desc)?);
        // SAFETY: the caller's out pointer.
        unsafe { give(out, Weight { device: Arc::clone(device), state }) }
    })
}

/// The weight behind a handle, to change.
///
/// # Safety
/// `handle` is NULL or a living weight handle; `[control]`: no other call uses it now.
unsafe fn weight_mut<'a, D: Device>(handle: *mut SpdWeight) -> crate::Result<&'a mut Weight<D>> {
    // SAFETY: the caller's contract.
    unsafe { handle.cast::<Weight<D>>().as_mut() }.ok_or_else(|| PluginError::invalid("a handle is NULL"))
}

unsafe extern "C" fn weight_upload<D: Device>(
    handle: *mut SpdWeight,
    first: u32,
    n: u32,
    source: *const SpdSource,
    e: Err,
) -> SpdStatus {
    entry(e, || {
        // SAFETY: a living handle, `[control]`; the caller's struct states its size.
        let (weight, source) = unsafe { (weight_mut::<D>(handle)?, read_in(source)?) };
        if source.ptr.is_null() {
            return Err(PluginError::unsupported("upload from a file descriptor"));
        }
        let length = usize::try_from(source.length).map_err(|_| PluginError::invalid("source: too long"))?;
        let source = Source { ptr: source.ptr.cast(), length, fd: source.fd, offset: source.offset };
        match &mut weight.state {
            WeightState::Open(state) => weight.device.weight_upload(state, first, n, source),
            _ => Err(PluginError::invalid("the weight is committed")),
        }
    })
}

unsafe extern "C" fn weight_commit<D: Device>(handle: *mut SpdWeight, e: Err) -> SpdStatus {
    entry(e, || {
        // SAFETY: a living handle, `[control]`.
        let weight = unsafe { weight_mut::<D>(handle) }?;
        let WeightState::Open(mut state) = std::mem::replace(&mut weight.state, WeightState::Failed) else {
            return Err(PluginError::invalid("the weight is committed already"));
        };
        weight.device.weight_commit(&mut state)?;
        weight.state = WeightState::Committed(Arc::new(state));
        Ok(())
    })
}

unsafe extern "C" fn weight_destroy<D: Device>(handle: *mut SpdWeight) {
    // SAFETY: the handle came from weight_create and is not used again.
    unsafe { take::<Weight<D>>(handle.cast()) };
}

unsafe extern "C" fn kv_create<D: Device>(
    handle: *mut SpdDevice,
    desc: *const SpdKvDesc,
    out: *mut *mut SpdKvPool,
    info: *mut SpdKvInfo,
    e: Err,
) -> SpdStatus {
    entry(e, || {
        // SAFETY: the callers' structs state their sizes; a living handle.
        let (desc, device) = unsafe {
            read_in(info.cast_const())?;
            (read_in(desc)?, device::<D>(handle)?)
        };
        if desc.block_tokens == 0 || desc.n_blocks == 0 || desc.flags != 0 {
            return Err(PluginError::invalid("a pool without blocks, or an unknown flag"));
        }
        // SAFETY: NULL, or the description of a slow tier whose file is open during the call.
        let slow = if desc.slow.is_null() { None } else { Some(unsafe { SlowFile::read(desc.slow) }?) };
        let (pool, sizes) = device.kv_create(&desc, slow)?;
        // SAFETY: checked above; the caller's out pointer.
        unsafe {
            write_out(info, sizes);
            give(out, Pool::<D>(Arc::new(pool)))
        }
    })
}

unsafe extern "C" fn kv_destroy<D: Device>(handle: *mut SpdKvPool) {
    // SAFETY: the handle came from kv_create and is not used again.
    unsafe { take::<Pool<D>>(handle.cast()) };
}

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

unsafe extern "C" fn plan_compile<D: Device>(
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
        let (plan, sizes) = device.compile(program, weights, pools, bucket)?;
        let filled = SpdPlanInfo {
            workspace_bytes: sizes.workspace,
            in_bytes: sizes.input,
            out_bytes: sizes.output,
            unsupported_op: u32::MAX,
            ..SpdPlanInfo::default()
        };
        // SAFETY: checked above.
        unsafe { write_out(info, filled) };
        if compile.flags & sparsed_abi::COMPILE_DRY_RUN != 0 {
            return Ok(());
        }
        // SAFETY: the caller's out pointer.
        unsafe { give(out, Plan::<D>(Arc::new(plan))) }
    })
}

unsafe extern "C" fn plan_destroy<D: Device>(handle: *mut SpdPlan) {
    // SAFETY: the handle came from plan_compile and is not used again.
    unsafe { take::<Plan<D>>(handle.cast()) };
}

unsafe extern "C" fn queue_create<D: Device>(
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

unsafe extern "C" fn queue_destroy<D: Device>(handle: *mut SpdQueue) {
    // SAFETY: the handle came from queue_create and is not used again.
    unsafe { take::<D::Queue>(handle.cast()) };
}

unsafe extern "C" fn queue_run<D: Device>(
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

unsafe extern "C" fn queue_kv<D: Device>(
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

unsafe extern "C" fn queue_wait_queue<D: Device>(
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

unsafe extern "C" fn queue_query<D: Device>(queue: *mut SpdQueue, completed: *mut u64, e: Err) -> SpdStatus {
    entry(e, || {
        // SAFETY: a living handle and the caller's out pointer.
        unsafe { put(completed, borrow::<D::Queue>(queue.cast())?.completed()) }
    })
}

unsafe extern "C" fn queue_wait<D: Device>(queue: *mut SpdQueue, timeline: u64, timeout_ns: u64, e: Err) -> SpdStatus {
    // SAFETY: a living handle.
    entry(e, || unsafe { borrow::<D::Queue>(queue.cast()) }?.wait(timeline, Duration::from_nanos(timeout_ns)))
}

unsafe extern "C" fn queue_cancel<D: Device>(queue: *mut SpdQueue, from: u64, e: Err) -> SpdStatus {
    // SAFETY: a living handle.
    entry(e, || unsafe { borrow::<D::Queue>(queue.cast()) }?.cancel(from))
}

unsafe extern "C" fn extension(_: *mut SpdInstance, _: *const c_char) -> *const c_void {
    std::ptr::null()
}
