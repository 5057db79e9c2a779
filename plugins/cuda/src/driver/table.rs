//! Which functions of `libcuda.so.1` are used, and where is that library?
//!
//! Signatures and names are those of the CUDA Driver API (NVIDIA's reference manual, 12.x): a driver exports the old
//! name beside a newer one for as long as it lives, so the names of 12.x serve old and new drivers.

use libloading::os::unix::{Library, RTLD_LOCAL, RTLD_NOW};
use sparsed_abi::E_DRIVER;
use sparsed_plugin_kit::{PluginError, Result};
use std::ffi::{c_char, c_int, c_uchar, c_uint, c_void};
use std::mem::ManuallyDrop;
use std::path::Path;

/// `CUresult`: 0 is success.
pub(crate) type Code = c_int;
/// `CUdeviceptr`: an address on the device, in bytes.
pub(crate) type Address = u64;
/// `CUcontext`, `CUmodule`, `CUfunction`, `CUstream`, `CUevent`.
pub(crate) type Handle = *mut c_void;

/// Oldest driver that is taken: `CUDA_VERSION` as 1000 major + 10 minor.
const DRIVER_VERSION_MIN: c_int = 11_040;

/// The library's file name.
const LIBRARY: &str = "libcuda.so.1";

macro_rules! driver {
    ($($field:ident = $symbol:literal ($($argument:ty),*);)*) => {
        /// The functions of the driver.
        pub(crate) struct Driver {
            $(pub(crate) $field: unsafe extern "C" fn($($argument),*) -> Code,)*
            /// The driver keeps threads of its own, so it stays loaded.
            _library: ManuallyDrop<Library>,
        }

        impl Driver {
            fn bind(library: Library) -> std::result::Result<Self, &'static str> {
                Ok(Self {
                    $($field: {
                        // SAFETY: the type is the one that the driver's reference gives for this name.
                        let symbol = unsafe { library.get($symbol.to_bytes_with_nul()) };
                        *symbol.map_err(|_| $symbol.to_str().unwrap_or_default())?
                    },)*
                    _library: ManuallyDrop::new(library),
                })
            }
        }
    };
}

driver! {
    init = c"cuInit"(c_uint);
    driver_get_version = c"cuDriverGetVersion"(*mut c_int);
    device_get_count = c"cuDeviceGetCount"(*mut c_int);
    device_get = c"cuDeviceGet"(*mut c_int, c_int);
    device_get_name = c"cuDeviceGetName"(*mut c_char, c_int, c_int);
    device_get_pci_bus_id = c"cuDeviceGetPCIBusId"(*mut c_char, c_int, c_int);
    device_get_attribute = c"cuDeviceGetAttribute"(*mut c_int, c_int, c_int);
    device_total_mem = c"cuDeviceTotalMem_v2"(*mut usize, c_int);
    primary_ctx_retain = c"cuDevicePrimaryCtxRetain"(*mut Handle, c_int);
    primary_ctx_release = c"cuDevicePrimaryCtxRelease_v2"(c_int);
    ctx_set_current = c"cuCtxSetCurrent"(Handle);
    ctx_synchronize = c"cuCtxSynchronize"();
    ctx_get_stream_priority_range = c"cuCtxGetStreamPriorityRange"(*mut c_int, *mut c_int);
    mem_get_info = c"cuMemGetInfo_v2"(*mut usize, *mut usize);
    mem_alloc = c"cuMemAlloc_v2"(*mut Address, usize);
    mem_free = c"cuMemFree_v2"(Address);
    mem_host_alloc = c"cuMemHostAlloc"(*mut *mut c_void, usize, c_uint);
    mem_free_host = c"cuMemFreeHost"(*mut c_void);
    mem_host_get_device_pointer = c"cuMemHostGetDevicePointer_v2"(*mut Address, *mut c_void, c_uint);
    memcpy_htod = c"cuMemcpyHtoD_v2"(Address, *const c_void, usize);
    memcpy_htod_async = c"cuMemcpyHtoDAsync_v2"(Address, *const c_void, usize, Handle);
    memcpy_dtoh_async = c"cuMemcpyDtoHAsync_v2"(*mut c_void, Address, usize, Handle);
    memcpy_dtod_async = c"cuMemcpyDtoDAsync_v2"(Address, Address, usize, Handle);
    memset_d8_async = c"cuMemsetD8Async"(Address, c_uchar, usize, Handle);
    stream_create_with_priority = c"cuStreamCreateWithPriority"(*mut Handle, c_uint, c_int);
    stream_destroy = c"cuStreamDestroy_v2"(Handle);
    stream_wait_event = c"cuStreamWaitEvent"(Handle, Handle, c_uint);
    event_create = c"cuEventCreate"(*mut Handle, c_uint);
    event_record = c"cuEventRecord"(Handle, Handle);
    event_query = c"cuEventQuery"(Handle);
    event_destroy = c"cuEventDestroy_v2"(Handle);
    module_load_data = c"cuModuleLoadData"(*mut Handle, *const c_void);
    module_unload = c"cuModuleUnload"(Handle);
    module_get_function = c"cuModuleGetFunction"(*mut Handle, Handle, *const c_char);
    launch_kernel = c"cuLaunchKernel"(
        Handle, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, Handle, *mut *mut c_void, *mut *mut c_void
    );
    get_error_name = c"cuGetErrorName"(Code, *mut *const c_char);
    get_error_string = c"cuGetErrorString"(Code, *mut *const c_char);
}

impl std::fmt::Debug for Driver {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Driver")
    }
}

impl Driver {
    /// Loads and initialises the driver in folder `dir`, or where the dynamic linker finds it.
    ///
    /// # Errors
    /// `SPD_E_DRIVER`: no library, a symbol that it lacks, an old version, or what `cuInit` said.
    pub(crate) fn load(dir: Option<&Path>) -> Result<Self> {
        let path = dir.map_or_else(|| LIBRARY.into(), |dir| dir.join(LIBRARY));
        // SAFETY: the operator names the driver's folder; its initialisers are NVIDIA's.
        let library = unsafe { Library::open(Some(&path), RTLD_NOW | RTLD_LOCAL) };
        let library = library.map_err(|error| {
            // libloading has the linker's words as the cause.
            let reason = std::error::Error::source(&error).map_or_else(|| error.to_string(), ToString::to_string);
            unavailable(&format!("{} cannot be loaded: {reason}", path.display()))
        })?;
        let driver = Self::bind(library)
            .map_err(|symbol| unavailable(&format!("{} does not have {symbol}; update the driver", path.display())))?;
        // SAFETY: any thread may call it; the flags must be 0.
        driver.started(unsafe { (driver.init)(0) }, "cuInit")?;
        let mut version = 0;
        // SAFETY: the out pointer is ours.
        driver.started(unsafe { (driver.driver_get_version)(&raw mut version) }, "cuDriverGetVersion")?;
        if version < DRIVER_VERSION_MIN {
            let (found, needed) = (version_text(version), version_text(DRIVER_VERSION_MIN));
            return Err(unavailable(&format!("the driver is for CUDA {found}, older than {needed}; update it")));
        }
        Ok(driver)
    }

    /// The CUDA version that the driver is for, as text.
    pub(crate) fn version(&self) -> String {
        let mut version = 0;
        // SAFETY: the out pointer is ours; a failure leaves the 0.
        unsafe { (self.driver_get_version)(&raw mut version) };
        version_text(version)
    }

    fn started(&self, code: Code, call: &str) -> Result<()> {
        if code == 0 {
            return Ok(());
        }
        Err(unavailable(&super::describe(self, code, call)).with_vendor_code(code.into()))
    }
}

fn unavailable(reason: &str) -> PluginError {
    PluginError::new(E_DRIVER, format!("unavailable: {reason}"))
}

fn version_text(version: c_int) -> String {
    format!("{}.{}", version / 1000, version % 1000 / 10)
}
