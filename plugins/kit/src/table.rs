//! Which C function does what? Every entry of the table, generic over the plugin.

mod host_memory;
mod work;

use crate::border::{Host, PluginError, Source, borrow, entry, read_in, write_out};
use crate::{Device, OpenOptions, Plugin, SlowArea};
use host_memory::{Arenas, host_alloc, host_free, host_register, host_unregister};
use sparsed_abi::{
    ABI_MINOR, SpdApi, SpdDevice, SpdDeviceInfo, SpdError, SpdHealth, SpdHost, SpdInstance, SpdKvDesc, SpdKvInfo,
    SpdKvPool, SpdMemInfo, SpdOpenOptions, SpdSource, SpdStatus, SpdWeight, SpdWeightDesc,
};
use std::ffi::{c_char, c_void};
use std::ptr::NonNull;
use std::sync::Arc;
use work::{
    plan_compile, plan_destroy, queue_cancel, queue_create, queue_destroy, queue_kv, queue_query, queue_run,
    queue_wait, queue_wait_queue,
};

type Err = *mut SpdError;

/// What the handles stand for.
struct OpenDevice<D> {
    /// Freed before the device is.
    arenas: Arenas,
    device: Arc<D>,
}
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
        host_alloc: Some(host_alloc::<P::Device>),
        host_free: Some(host_free::<P::Device>),
        host_register: Some(host_register::<P::Device>),
        host_unregister: Some(host_unregister::<P::Device>),
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
        let device = OpenDevice { arenas: Arenas::default(), device: Arc::new(plugin.open(index, &options)?) };
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
    Ok(&unsafe { open_device::<D>(handle) }?.device)
}

/// As [`device`], with what belongs to it.
///
/// # Safety
/// As [`device`].
unsafe fn open_device<'a, D: Device>(handle: *mut SpdDevice) -> crate::Result<&'a OpenDevice<D>> {
    // SAFETY: the caller's contract.
    unsafe { borrow::<OpenDevice<D>>(handle.cast()) }
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
        let slow = if desc.slow.is_null() { None } else { Some(unsafe { SlowArea::read(desc.slow) }?) };
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

unsafe extern "C" fn extension(_: *mut SpdInstance, _: *const c_char) -> *const c_void {
    std::ptr::null()
}
