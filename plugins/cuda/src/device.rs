//! Which devices are there, and how is one opened?

use crate::check::Bound;
use crate::driver::{Context, Driver, Function, Launch, Module, PinnedMemory, Stream, describe};
use crate::lower::{Kernel, lower};
use crate::memory::Weight;
use crate::plan::Plan;
use crate::pool::{Pool, ROW_DTYPES};
use crate::queue::CudaQueue;
use sparsed_abi::{
    DEV_GPU, DT_F16, DT_F32, E_DATA, E_DRIVER, E_TIMEOUT, FEAT_ASYNC, FEAT_UNIFIED_MEM, HEALTH_LOST, HEALTH_OK,
    LOG_INFO, Program, SpdBucket, SpdDeviceInfo, SpdHealth, SpdKvDesc, SpdKvInfo, SpdMemInfo, SpdWeightDesc, dtype_bit,
};
use sparsed_plugin_kit::{
    Device, Host, HostMemory, OpenOptions, PlanSizes, Plugin, PluginError, Result, SlowArea, Source, Usage, put_text,
};
use std::ffi::{CStr, c_char, c_int};
use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

/// What the driver's host memory is aligned to.
const PAGE_BYTES: usize = 4096;

/// What kernels there are, for a driver that has them; see the file.
const KERNELS: &CStr =
    match CStr::from_bytes_with_nul(concat!(include_str!("../kernels/sparsed.kernels"), "\0").as_bytes()) {
        Ok(text) => text,
        Err(_) => panic!("the list of kernels has no NUL inside"),
    };

/// `CU_DEVICE_ATTRIBUTE_*` (the driver's reference).
const INTEGRATED: c_int = 18;
const COMPUTE_CAPABILITY_MAJOR: c_int = 75;
const COMPUTE_CAPABILITY_MINOR: c_int = 76;
/// NVIDIA's number among PCI vendors.
const PCI_VENDOR: u32 = 0x10de;
/// How long the self test waits for its kernel.
const SELF_TEST_MAX: Duration = Duration::from_secs(1);

/// The plugin. The driver is loaded when devices are first asked for.
#[derive(Debug)]
pub(crate) struct CudaPlugin {
    host: Arc<Host>,
    lib_dir: Option<PathBuf>,
    driver: OnceLock<Result<Arc<Driver>>>,
}

/// An open device.
#[derive(Debug)]
pub(crate) struct CudaDevice {
    host: Arc<Host>,
    context: Arc<Context>,
    usage: Arc<Usage>,
    functions: [Function; Kernel::ALL.len()],
    /// Has the functions' code.
    _module: Module,
}

impl CudaPlugin {
    fn driver(&self) -> Result<&Arc<Driver>> {
        let driver = self.driver.get_or_init(|| Driver::load(self.lib_dir.as_deref()).map(Arc::new));
        driver.as_ref().map_err(Clone::clone)
    }

    /// The driver's handle of device `index`.
    fn handle(&self, driver: &Driver, index: u32) -> Result<c_int> {
        let ordinal = c_int::try_from(index).ok().filter(|_| self.device_count().is_ok_and(|n| index < n));
        let ordinal = ordinal.ok_or_else(|| PluginError::invalid(format!("there is no device {index}")))?;
        let mut handle = 0;
        // SAFETY: the driver is initialised; the out pointer is ours.
        asked(driver, unsafe { (driver.device_get)(&raw mut handle, ordinal) }, "cuDeviceGet")?;
        Ok(handle)
    }
}

/// The outcome of a question to the driver that needs no context.
fn asked(driver: &Driver, code: c_int, call: &str) -> Result<()> {
    if code == 0 {
        return Ok(());
    }
    Err(PluginError::new(E_DRIVER, describe(driver, code, call)).with_vendor_code(code.into()))
}

/// A text of up to 63 bytes.
fn text(
    driver: &Driver,
    call: &str,
    ask: unsafe extern "C" fn(*mut c_char, c_int, c_int) -> c_int,
    device: c_int,
) -> Result<String> {
    let mut buffer = [0; 64];
    // SAFETY: the buffer has one byte more than it is said to have, a NUL that stays.
    asked(driver, unsafe { ask(buffer.as_mut_ptr(), 63, device) }, call)?;
    // SAFETY: it ends with a NUL.
    Ok(unsafe { CStr::from_ptr(buffer.as_ptr()) }.to_string_lossy().into_owned())
}

impl Plugin for CudaPlugin {
    const ID: &'static CStr = c"cuda";
    const VERSION: &'static CStr = sparsed_plugin_kit::cargo_version!();
    type Device = CudaDevice;

    fn create(host: Host) -> Result<Self> {
        let from_environment = || std::env::var_os("SPARSED_CUDA_LIB_DIR").map(PathBuf::from);
        let lib_dir = host.config(c"lib_dir").map(PathBuf::from).or_else(from_environment);
        Ok(Self { host: Arc::new(host), lib_dir, driver: OnceLock::new() })
    }

    fn device_count(&self) -> Result<u32> {
        let (driver, mut count) = (self.driver()?, 0);
        // SAFETY: the driver is initialised; the out pointer is ours.
        asked(driver, unsafe { (driver.device_get_count)(&raw mut count) }, "cuDeviceGetCount")?;
        Ok(u32::try_from(count).unwrap_or(0))
    }

    fn device_info(&self, index: u32) -> Result<SpdDeviceInfo> {
        let driver = self.driver()?;
        let device = self.handle(driver, index)?;
        let attribute = |which| {
            let mut value = 0;
            // SAFETY: the driver is initialised; the out pointer is ours.
            let code = unsafe { (driver.device_get_attribute)(&raw mut value, which, device) };
            asked(driver, code, "cuDeviceGetAttribute").map(|()| u32::try_from(value).unwrap_or(0))
        };
        let mut total = 0usize;
        // SAFETY: as above.
        asked(driver, unsafe { (driver.device_total_mem)(&raw mut total, device) }, "cuDeviceTotalMem")?;
        let unified = if attribute(INTEGRATED)? == 1 { FEAT_UNIFIED_MEM } else { 0 };
        let mut info = SpdDeviceInfo {
            kind: DEV_GPU,
            score: 1,
            numa_node: u32::MAX,
            pci_vendor: PCI_VENDOR,
            compute_major: attribute(COMPUTE_CAPABILITY_MAJOR)?,
            compute_minor: attribute(COMPUTE_CAPABILITY_MINOR)?,
            mem_total: total as u64,
            features: FEAT_ASYNC | unified,
            block_tokens_align: 1,
            ..SpdDeviceInfo::default()
        };
        put_text(&mut info.id, &text(driver, "cuDeviceGetPCIBusId", driver.device_get_pci_bus_id, device)?);
        put_text(&mut info.name, &text(driver, "cuDeviceGetName", driver.device_get_name, device)?);
        put_text(&mut info.driver, &format!("CUDA {}", driver.version()));
        for (word, mask) in [DT_F16, DT_F32].into_iter().filter_map(dtype_bit) {
            info.weight_dtypes[word] |= mask;
        }
        for (word, mask) in ROW_DTYPES.into_iter().filter_map(dtype_bit) {
            info.row_dtypes[word] |= mask;
        }
        Ok(info)
    }

    fn open(&self, index: u32, options: &OpenOptions) -> Result<CudaDevice> {
        let driver = self.driver()?;
        let context = Context::retain(driver, self.handle(driver, index)?)?;
        let module = Module::load(&context, KERNELS)?;
        let mut functions = Vec::with_capacity(Kernel::ALL.len());
        for (_, name) in Kernel::ALL {
            functions.push(module.function(name)?);
        }
        let functions = functions.try_into().expect("one for each kernel");
        self.host.log(LOG_INFO, &format!("cuda device {index} open, driver for CUDA {}", driver.version()));
        let usage = Arc::new(Usage { budget: options.mem_budget, ..Usage::default() });
        Ok(CudaDevice { host: Arc::clone(&self.host), context, usage, functions, _module: module })
    }
}

impl CudaDevice {
    pub(crate) fn function(&self, kernel: Kernel) -> Function {
        self.functions[kernel as usize]
    }

    pub(crate) fn log(&self, level: i32, message: &str) {
        self.host.log(level, message);
    }

    /// Free and total bytes as the driver sees them; 0 of a device that does not answer.
    fn driver_memory(&self) -> (u64, u64) {
        let (mut free, mut total) = (0usize, 0usize);
        let answer = self.context.enter().and_then(|()| {
            // SAFETY: the context is current; the out pointers are ours.
            let code = unsafe { (self.context.driver.mem_get_info)(&raw mut free, &raw mut total) };
            self.context.check(code, "cuMemGetInfo")
        });
        if answer.is_ok() { (free as u64, total as u64) } else { (0, 0) }
    }
}

impl Device for CudaDevice {
    type Weight = Weight;
    type Pool = Pool;
    type Plan = Plan;
    type Queue = CudaQueue;

    fn mem_info(&self) -> SpdMemInfo {
        let (free, total) = self.driver_memory();
        let usage = &*self.usage;
        let left = if usage.budget == 0 { u64::MAX } else { usage.budget.saturating_sub(usage.used()) };
        SpdMemInfo {
            total,
            free: free.min(left),
            budget: usage.budget,
            used_weights: usage.weights.load(Ordering::Relaxed),
            used_kv: usage.kv.load(Ordering::Relaxed),
            used_workspace: usage.workspace.load(Ordering::Relaxed),
            used_plans: usage.plans.load(Ordering::Relaxed),
            ..SpdMemInfo::default()
        }
    }

    fn health(&self) -> SpdHealth {
        let state = if self.context.is_lost() { HEALTH_LOST } else { HEALTH_OK };
        let (temperature_millicelsius, power_milliwatt) = (i32::MIN, i32::MIN);
        SpdHealth { state, temperature_millicelsius, power_milliwatt, ..SpdHealth::default() }
    }

    /// Pinned, so that copies need no buffers of the driver's.
    fn host_alloc(&self, length: usize, align: usize) -> Result<Option<Box<dyn HostMemory>>> {
        // The driver gives whole pages.
        if align > PAGE_BYTES {
            return Err(PluginError::invalid(format!("pinned memory aligned to {align}, {PAGE_BYTES} is the most")));
        }
        Ok(Some(Box::new(PinnedMemory::new(&self.context, length)?)))
    }

    /// Adds 64 numbers to themselves in memory that the device maps, on a stream of its own.
    fn self_test(&self, _level: u32) -> Result<()> {
        const N: usize = 64;
        let (pinned, stream) = (PinnedMemory::new(&self.context, 12 + N * 8)?, Stream::new(&self.context, 0)?);
        let event = crate::driver::Event::new(&self.context)?;
        let base = pinned.device_address()?;
        // The words behind the cancel word: N addends, then N sums.
        let words = pinned.as_ptr().cast::<f32>();
        for i in 0..N {
            // SAFETY: inside the pinned memory; nothing is enqueued yet.
            unsafe { words.add(1 + i).write(i as f32) };
        }
        let (x, y, n) = (base + 4, base + 4 + N as u64 * 4, N as u64);
        let parameters = [base, x, n, n, x, n, n, y, 1, 1, n];
        let function = self.function(Kernel::Add);
        // SAFETY: the parameters of `add`; the memory lives until the event is over, or is leaked below.
        unsafe { stream.launch(Launch { function, grid: (1, 1), threads: N as u32, words: &parameters })? };
        event.record(&stream)?;
        let begun = Instant::now();
        while !event.is_over()? {
            if begun.elapsed() > SELF_TEST_MAX {
                std::mem::forget((pinned, stream)); // the kernel may still write
                return Err(PluginError::new(E_TIMEOUT, "a small kernel is not over after a second"));
            }
            std::thread::yield_now();
        }
        // SAFETY: the kernel is over.
        let is_right = (0..N).all(|i| unsafe { words.add(1 + N + i).read() } == 2.0 * i as f32);
        if is_right { Ok(()) } else { Err(PluginError::new(E_DATA, "a sum came out wrong")) }
    }

    fn supports(&self, program: &Program, op: usize) -> Result<()> {
        lower(Bound { program, weights: &[] }, &program.ops()[op]).map(drop).map_err(|error| error.at(op))
    }

    fn weight_create(&self, desc: &SpdWeightDesc) -> Result<Weight> {
        Weight::create(desc, &self.context, &self.usage)
    }

    fn weight_upload(&self, weight: &mut Weight, first: u32, n: u32, source: Source) -> Result<()> {
        weight.upload(first, n, source)
    }

    fn weight_commit(&self, weight: &mut Weight) -> Result<()> {
        weight.commit(&self.context)
    }

    fn kv_create(&self, desc: &SpdKvDesc, slow: Option<SlowArea>) -> Result<(Pool, SpdKvInfo)> {
        if slow.is_some() {
            return Err(PluginError::unsupported("a slow tier"));
        }
        Pool::create(desc, &self.context, &self.usage)
    }

    fn compile(
        &self,
        program: Program,
        weights: Vec<Arc<Weight>>,
        pools: Vec<Arc<Pool>>,
        bucket: SpdBucket,
    ) -> Result<(Plan, PlanSizes)> {
        self.context.enter()?;
        Plan::compile(program, weights, pools, bucket, &self.context, &self.usage)
    }

    fn queue(self: &Arc<Self>, priority: u32) -> Result<CudaQueue> {
        CudaQueue::new(self, &self.context, priority)
    }
}
