//! Who frees what the driver hands out? Memory, streams, events and modules that free themselves.

use super::context::Context;
use super::error::{INVALID_IMAGE, INVALID_PTX, NOT_READY};
use super::table::{Address, Handle};
use sparsed_abi::{E_DRIVER, E_NOMEM_DEVICE, E_NOMEM_HOST};
use sparsed_plugin_kit::{HostMemory, PluginError, Result};
use std::ffi::{CStr, c_uint, c_void};
use std::ptr::{NonNull, null_mut};
use std::sync::Arc;

/// `CU_MEMHOSTALLOC_PORTABLE | CU_MEMHOSTALLOC_DEVICEMAP`: pinned for every context, and readable by kernels.
const PINNED_MAPPED: c_uint = 1 | 2;
/// `CU_STREAM_NON_BLOCKING`: does not wait for the legacy default stream, nor it for us.
const NON_BLOCKING: c_uint = 1;
/// `CU_EVENT_DISABLE_TIMING`: an event that only orders is cheaper.
const DISABLE_TIMING: c_uint = 2;
/// Most parameters of a kernel.
const PARAMETERS_MAX: usize = 16;

macro_rules! owner {
    ($(#[$meta:meta])* $name:ident { $field:ident: $type:ty } frees with $free:ident) => {
        $(#[$meta])*
        #[derive(Debug)]
        pub(crate) struct $name {
            context: Arc<Context>,
            $field: $type,
        }

        // SAFETY: handles and addresses of the driver may be used by any thread in which their context is current.
        unsafe impl Send for $name {}
        // SAFETY: as above; the driver locks inside.
        unsafe impl Sync for $name {}

        impl Drop for $name {
            fn drop(&mut self) {
                self.context.enter_to_free();
                // SAFETY: made by the driver in this context and not used again.
                unsafe { (self.context.driver.$free)(self.$field) };
            }
        }
    };
}

owner!(/// Memory on the device.
    DeviceMemory { address: Address } frees with mem_free);
owner!(/// Page-locked host memory that kernels can read.
    PinnedMemory { host: *mut c_void } frees with mem_free_host);
owner!(/// A line of work; what is enqueued runs in that order.
    Stream { raw: Handle } frees with stream_destroy);
owner!(/// A point in a stream.
    Event { raw: Handle } frees with event_destroy);
owner!(/// Loaded device code.
    Module { raw: Handle } frees with module_unload);

/// A kernel, as long as its module lives.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Function(Handle);

// SAFETY: as for the owners above.
unsafe impl Send for Function {}
// SAFETY: as above.
unsafe impl Sync for Function {}

/// How a kernel is started.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Launch<'a> {
    pub(crate) function: Function,
    /// Blocks along x and y.
    pub(crate) grid: (u32, u32),
    /// Threads of a block.
    pub(crate) threads: u32,
    /// The parameters, each in the low bytes of a word.
    pub(crate) words: &'a [u64],
}

impl DeviceMemory {
    /// `bytes` bytes, at least one; their content is not defined.
    pub(crate) fn new(context: &Arc<Context>, bytes: usize) -> Result<Self> {
        context.enter()?;
        let mut address = 0;
        // SAFETY: the context is current; the out pointer is ours.
        let code = unsafe { (context.driver.mem_alloc)(&raw mut address, bytes.max(1)) };
        context.check(code, "cuMemAlloc").map_err(|error| told(error, bytes))?;
        Ok(Self { context: Arc::clone(context), address })
    }

    pub(crate) fn address(&self) -> Address {
        self.address
    }

    /// Copies `from` to byte `at` on, and waits until it has arrived. The driver copies pageable memory through buffers
    /// of its own and may return before those have been read, and our streams do not wait for its default stream.
    ///
    /// # Safety
    /// `at + from.len()` is not past the end.
    pub(crate) unsafe fn upload(&self, at: usize, from: &[u8]) -> Result<()> {
        self.context.enter()?;
        // SAFETY: the context is current; the range is the caller's promise.
        let code =
            unsafe { (self.context.driver.memcpy_htod)(self.address + at as u64, from.as_ptr().cast(), from.len()) };
        self.context.check(code, "cuMemcpyHtoD")?;
        self.context.synchronize()
    }

    /// Zeroes the first `bytes`, and waits until they are.
    ///
    /// # Safety
    /// The memory has as many.
    pub(crate) unsafe fn zero(&self, bytes: usize) -> Result<()> {
        self.context.enter()?;
        // SAFETY: the caller's contract; the default stream is waited for below.
        let code = unsafe { (self.context.driver.memset_d8_async)(self.address, 0, bytes, null_mut()) };
        self.context.check(code, "cuMemsetD8Async")?;
        self.context.synchronize()
    }
}

impl PinnedMemory {
    /// `bytes` zero bytes, at least one.
    pub(crate) fn new(context: &Arc<Context>, bytes: usize) -> Result<Self> {
        context.enter()?;
        let mut host = null_mut();
        // SAFETY: the context is current; the out pointer is ours.
        let code = unsafe { (context.driver.mem_host_alloc)(&raw mut host, bytes.max(1), PINNED_MAPPED) };
        context.check(code, "cuMemHostAlloc").map_err(|mut error| {
            if error.status == E_NOMEM_DEVICE {
                error.status = E_NOMEM_HOST;
            }
            told(error, bytes)
        })?;
        // SAFETY: the driver has given that many bytes.
        unsafe { host.cast::<u8>().write_bytes(0, bytes.max(1)) };
        Ok(Self { context: Arc::clone(context), host })
    }

    pub(crate) fn as_ptr(&self) -> *mut u8 {
        self.host.cast()
    }

    /// The address by which kernels reach it.
    pub(crate) fn device_address(&self) -> Result<Address> {
        self.context.enter()?;
        let mut address = 0;
        // SAFETY: the context is current; the memory was allocated as mapped; the flags must be 0.
        let code = unsafe { (self.context.driver.mem_host_get_device_pointer)(&raw mut address, self.host, 0) };
        self.context.check(code, "cuMemHostGetDevicePointer")?;
        Ok(address)
    }
}

// SAFETY: the driver's memory stays where it is until it is freed by the drop, which is when its owner says so.
unsafe impl HostMemory for PinnedMemory {
    fn as_ptr(&self) -> NonNull<u8> {
        NonNull::new(self.host.cast()).expect("the driver's answer was checked")
    }
}

fn told(error: PluginError, bytes: usize) -> PluginError {
    PluginError { message: format!("{bytes} bytes: {}", error.message), ..error }
}

impl Stream {
    /// A stream; of several, the device prefers the one with the higher priority.
    pub(crate) fn new(context: &Arc<Context>, priority: u32) -> Result<Self> {
        context.enter()?;
        let (mut least, mut greatest, mut raw) = (0, 0, null_mut());
        // SAFETY: the context is current; the out pointers are ours.
        let code = unsafe { (context.driver.ctx_get_stream_priority_range)(&raw mut least, &raw mut greatest) };
        context.check(code, "cuCtxGetStreamPriorityRange")?;
        // CUDA counts downwards: the greatest priority is the lowest number.
        let wanted = least.saturating_sub(i32::try_from(priority).unwrap_or(i32::MAX)).max(greatest);
        // SAFETY: as above.
        let code = unsafe { (context.driver.stream_create_with_priority)(&raw mut raw, NON_BLOCKING, wanted) };
        context.check(code, "cuStreamCreateWithPriority")?;
        Ok(Self { context: Arc::clone(context), raw })
    }

    pub(crate) fn context(&self) -> &Arc<Context> {
        &self.context
    }

    /// Enqueues a copy to the device.
    ///
    /// # Safety
    /// Both ranges lie inside their memory and stay so until the copy is over, and nobody writes to `from` before.
    pub(crate) unsafe fn copy_in(&self, to: Address, from: NonNull<u8>, bytes: usize) -> Result<()> {
        // SAFETY: the caller's contract; the context is current in a thread that works on a queue.
        let code =
            unsafe { (self.context.driver.memcpy_htod_async)(to, from.as_ptr().cast_const().cast(), bytes, self.raw) };
        self.context.check(code, "cuMemcpyHtoDAsync")
    }

    /// Enqueues a copy to the host.
    ///
    /// # Safety
    /// Both ranges lie inside their memory and stay so until the copy is over, and nobody touches `to` before.
    pub(crate) unsafe fn copy_out(&self, to: NonNull<u8>, from: Address, bytes: usize) -> Result<()> {
        // SAFETY: as above.
        let code = unsafe { (self.context.driver.memcpy_dtoh_async)(to.as_ptr().cast(), from, bytes, self.raw) };
        self.context.check(code, "cuMemcpyDtoHAsync")
    }

    /// Enqueues a copy on the device; of 0 bytes none.
    ///
    /// # Safety
    /// Both ranges lie inside their memory and stay so until the copy is over; they do not overlap.
    pub(crate) unsafe fn copy(&self, to: Address, from: Address, bytes: usize) -> Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        // SAFETY: as above.
        let code = unsafe { (self.context.driver.memcpy_dtod_async)(to, from, bytes, self.raw) };
        self.context.check(code, "cuMemcpyDtoDAsync")
    }

    /// Enqueues zeros; of 0 bytes none.
    ///
    /// # Safety
    /// The range lies inside its memory and stays so until it is over.
    pub(crate) unsafe fn fill_zero(&self, to: Address, bytes: usize) -> Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        // SAFETY: as above.
        let code = unsafe { (self.context.driver.memset_d8_async)(to, 0, bytes, self.raw) };
        self.context.check(code, "cuMemsetD8Async")
    }

    /// Enqueues a kernel.
    ///
    /// # Safety
    /// The words are the parameters that the kernel takes, and what they point to stays until it is over.
    pub(crate) unsafe fn launch(&self, launch: Launch<'_>) -> Result<()> {
        let mut parameters = [null_mut::<c_void>(); PARAMETERS_MAX];
        for (parameter, word) in parameters.iter_mut().zip(launch.words) {
            *parameter = std::ptr::from_ref(word).cast_mut().cast();
        }
        let ((x, y), threads, no_extra) = (launch.grid, launch.threads, null_mut());
        // SAFETY: the driver copies the parameters, whose sizes it knows, before it returns; the rest is the caller's.
        let code = unsafe {
            (self.context.driver.launch_kernel)(
                launch.function.0,
                x,
                y,
                1,
                threads,
                1,
                1,
                0,
                self.raw,
                parameters.as_mut_ptr(),
                no_extra,
            )
        };
        self.context.check(code, "cuLaunchKernel")
    }

    /// Lets what comes from now on wait for what `event` marks now.
    pub(crate) fn wait(&self, event: &Event) -> Result<()> {
        // SAFETY: both are alive; an event of another device's context may be waited for.
        let code = unsafe { (self.context.driver.stream_wait_event)(self.raw, event.raw, 0) };
        self.context.check(code, "cuStreamWaitEvent")
    }
}

impl Event {
    pub(crate) fn new(context: &Arc<Context>) -> Result<Self> {
        context.enter()?;
        let mut raw = null_mut();
        // SAFETY: the context is current; the out pointer is ours.
        let code = unsafe { (context.driver.event_create)(&raw mut raw, DISABLE_TIMING) };
        context.check(code, "cuEventCreate")?;
        Ok(Self { context: Arc::clone(context), raw })
    }

    /// Marks what has been enqueued so far.
    pub(crate) fn record(&self, stream: &Stream) -> Result<()> {
        // SAFETY: both are alive.
        let code = unsafe { (self.context.driver.event_record)(self.raw, stream.raw) };
        self.context.check(code, "cuEventRecord")
    }

    /// True when what it marks is over.
    ///
    /// # Errors
    /// A sticky error of any work of the context.
    pub(crate) fn is_over(&self) -> Result<bool> {
        // SAFETY: it is alive.
        let code = unsafe { (self.context.driver.event_query)(self.raw) };
        if code == NOT_READY {
            return Ok(false);
        }
        self.context.check(code, "cuEventQuery").map(|()| true)
    }
}

impl Module {
    /// Loads device code: a NUL-terminated text or a binary that says its own length.
    pub(crate) fn load(context: &Arc<Context>, image: &CStr) -> Result<Self> {
        context.enter()?;
        let mut raw = null_mut();
        // SAFETY: the context is current; the image is NUL-terminated and outlives the call.
        let code = unsafe { (context.driver.module_load_data)(&raw mut raw, image.as_ptr().cast()) };
        context.check(code, "cuModuleLoadData").map_err(|error| {
            if !matches!(code, INVALID_IMAGE | INVALID_PTX) {
                return error;
            }
            let message = format!("this build has no device code for a real driver ({})", error.message);
            PluginError { status: E_DRIVER, message, ..error }
        })?;
        Ok(Self { context: Arc::clone(context), raw })
    }

    /// The kernel of this name.
    pub(crate) fn function(&self, name: &CStr) -> Result<Function> {
        self.context.enter()?;
        let mut raw = null_mut();
        // SAFETY: the module is alive; the out pointer is ours; the name is a C string.
        let code = unsafe { (self.context.driver.module_get_function)(&raw mut raw, self.raw, name.as_ptr()) };
        let named = |error: PluginError| PluginError { message: format!("{name:?}: {}", error.message), ..error };
        self.context.check(code, "cuModuleGetFunction").map_err(named)?;
        Ok(Function(raw))
    }
}
