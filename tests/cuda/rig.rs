//! The plugin and its fake driver, driven through the table as a host drives it.

use sparsed_abi::{
    Blob, ProgramBuilder, SpdApi, SpdBucket, SpdCompile, SpdDevice, SpdError, SpdGetApiFn, SpdHealth, SpdHost,
    SpdInstance, SpdKvPool, SpdMemInfo, SpdOpenOptions, SpdPlan, SpdPlanInfo, SpdQueue, SpdRun, SpdSource, SpdStatus,
    SpdWeight, SpdWeightDesc, StepArrays,
};
use std::cell::Cell;
use std::ffi::{CStr, CString, c_char, c_void};
use std::path::{Path, PathBuf};
use std::ptr::{null, null_mut};
use std::sync::atomic::AtomicU32;

/// What a failed call said.
#[derive(Debug)]
pub struct Failure {
    pub status: SpdStatus,
    pub vendor_code: i64,
    pub op_index: u32,
    pub message: String,
}

pub type Result<T> = std::result::Result<T, Failure>;

/// The bucket of every plan here.
pub static BUCKET: SpdBucket = SpdBucket { max_tokens: 8, max_seqs: 1, max_logits: 8, max_context: 64 };

/// A host, an instance of the plugin, a driver of its own, and an open device.
pub struct Rig {
    pub api: &'static SpdApi,
    _host: Box<SpdHost>,
    _lib_dir: Box<CString>,
    instance: *mut SpdInstance,
    pub device: *mut SpdDevice,
    fake: Option<libloading::Library>,
    is_lost: Cell<bool>,
    _dir: tempfile::TempDir,
}

/// What `make test` has built.
pub fn built(name: &str) -> PathBuf {
    let path = sparsed_tests::root().join("target/release").join(name);
    assert!(path.exists(), "{} is not there: run `make test`", path.display());
    path
}

/// A folder with a driver in it.
pub fn driver_folder() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    std::fs::copy(built("libsparsed_fake_cuda.so"), dir.path().join("libcuda.so.1")).unwrap();
    dir
}

/// The fake in this folder, the same that the plugin loads from there.
pub fn fake(dir: &Path) -> libloading::Library {
    // SAFETY: our own library, whose initialisers do nothing.
    unsafe { libloading::Library::new(dir.join("libcuda.so.1")) }.unwrap()
}

/// Sets a fault of the fake.
pub fn set(fake: &libloading::Library, key: &str, value: u64) {
    let key = CString::new(key).unwrap();
    // SAFETY: the signature is the fake's.
    let answer = unsafe {
        fake.get::<unsafe extern "C" fn(*const c_char, u64) -> i32>(b"fake_cuda_set").unwrap()(key.as_ptr(), value)
    };
    assert_eq!(answer, 0, "{key:?} is a setting");
}

pub fn size<T>() -> u32 {
    u32::try_from(size_of::<T>()).unwrap()
}

/// Calls into the plugin.
pub fn call(body: impl FnOnce(*mut SpdError) -> SpdStatus) -> Result<()> {
    let mut error = SpdError { struct_size: size::<SpdError>(), ..SpdError::default() };
    let status = body(&raw mut error);
    if status == 0 {
        return Ok(());
    }
    assert_eq!(error.status, status, "the error says what the call says");
    // SAFETY: the plugin has filled in a NUL-terminated text.
    let message = unsafe { CStr::from_ptr(error.message.as_ptr()) }.to_str().unwrap().to_owned();
    Err(Failure { status, vendor_code: error.vendor_code, op_index: error.op_index, message })
}

unsafe extern "C" fn config(lib_dir: *mut c_void, key: *const c_char) -> *const c_char {
    // SAFETY: the key is a C string; the context is the rig's CString.
    unsafe { if CStr::from_ptr(key) == c"lib_dir" { (*lib_dir.cast::<CString>()).as_ptr() } else { null() } }
}

impl Rig {
    /// An instance whose driver is in `dir`; no device is open.
    pub fn instance(dir: tempfile::TempDir) -> Self {
        // SAFETY: our own plugin, whose initialisers do nothing; it is never unloaded.
        let plugin = unsafe { libloading::Library::new(built("libsparsed_plugin_cuda.so")) }.unwrap();
        // SAFETY: the symbol is the ABI's; its table is static.
        let api = unsafe { plugin.get::<SpdGetApiFn>(b"spd_get_api").unwrap()(0, 2).as_ref() }.unwrap();
        std::mem::forget(plugin);
        let mut lib_dir = Box::new(CString::new(dir.path().to_str().unwrap()).unwrap());
        let context = (&raw mut *lib_dir).cast();
        let host = SpdHost {
            struct_size: size::<SpdHost>(),
            abi_minor: 2,
            context,
            config: Some(config),
            ..SpdHost::default()
        };
        let host = Box::new(host);
        let mut instance = null_mut();
        // SAFETY: the host lives as long as the instance.
        call(|e| unsafe { api.instance_create.unwrap()(&raw const *host, &raw mut instance, e) }).unwrap();
        let (device, is_lost) = (null_mut(), Cell::new(false));
        Self { api, _host: host, _lib_dir: lib_dir, instance, device, fake: None, is_lost, _dir: dir }
    }

    /// An open device with these faults of its driver.
    pub fn try_open(faults: &[(&str, u64)], mem_budget: u64) -> Result<Self> {
        let dir = driver_folder();
        let fake = fake(dir.path());
        faults.iter().for_each(|&(key, value)| set(&fake, key, value));
        let mut rig = Self::instance(dir);
        rig.fake = Some(fake);
        rig.device_count()?;
        let options = SpdOpenOptions { struct_size: size::<SpdOpenOptions>(), mem_budget, ..SpdOpenOptions::default() };
        let (api, instance, device) = (rig.api, rig.instance, &raw mut rig.device);
        // SAFETY: a living instance; the out pointer is ours.
        call(|e| unsafe { api.device_open.unwrap()(instance, 0, &raw const options, device, e) })?;
        Ok(rig)
    }

    pub fn open(faults: &[(&str, u64)]) -> Self {
        Self::try_open(faults, 0).unwrap()
    }

    pub fn device_count(&self) -> Result<u32> {
        let mut count = 0;
        // SAFETY: a living instance; the out pointer is ours.
        call(|e| unsafe { self.api.device_count.unwrap()(self.instance, &raw mut count, e) }).map(|()| count)
    }

    pub fn set(&self, key: &str, value: u64) {
        set(self.fake.as_ref().unwrap(), key, value);
    }

    /// A counter of the fake.
    pub fn counter(&self, key: &str) -> u64 {
        let (fake, key) = (self.fake.as_ref().unwrap(), CString::new(key).unwrap());
        // SAFETY: the signature is the fake's.
        let value =
            unsafe { fake.get::<unsafe extern "C" fn(*const c_char) -> u64>(b"fake_cuda_get").unwrap()(key.as_ptr()) };
        assert_ne!(value, u64::MAX, "{key:?} is a counter");
        value
    }

    /// The device has been lost on purpose: what it held cannot be freed.
    pub fn expect_lost(&self) {
        self.is_lost.set(true);
    }

    pub fn memory(&self) -> SpdMemInfo {
        let mut info = SpdMemInfo { struct_size: size::<SpdMemInfo>(), ..SpdMemInfo::default() };
        // SAFETY: a living device; the out struct is ours.
        call(|e| unsafe { self.api.mem_info.unwrap()(self.device, &raw mut info, e) }).unwrap();
        info
    }

    pub fn health(&self) -> u32 {
        let mut health = SpdHealth { struct_size: size::<SpdHealth>(), ..SpdHealth::default() };
        // SAFETY: a living device; the out struct is ours.
        call(|e| unsafe { self.api.health.unwrap()(self.device, &raw mut health, e) }).unwrap();
        health.state
    }

    pub fn self_test(&self) -> Result<()> {
        // SAFETY: a living device.
        call(|e| unsafe { self.api.self_test.unwrap()(self.device, 0, e) })
    }

    pub fn host_alloc(&self, length: u64, align: u64) -> Result<*mut c_void> {
        let mut memory = null_mut();
        // SAFETY: a living device; the out pointer is ours.
        call(|e| unsafe { self.api.host_alloc.unwrap()(self.device, length, align, &raw mut memory, e) })?;
        assert!(!memory.is_null() && (memory as u64).is_multiple_of(align));
        // SAFETY: the device said that there are as many bytes.
        unsafe { std::ptr::write_bytes(memory.cast::<u8>(), 7, usize::try_from(length).unwrap()) };
        Ok(memory)
    }

    pub fn host_free(&self, memory: *mut c_void) {
        // SAFETY: from host_alloc of this device, not used again.
        unsafe { self.api.host_free.unwrap()(self.device, memory) };
    }

    pub fn supports(&self, blob: &Blob, op: u32) -> Result<()> {
        let bytes = blob.as_bytes();
        // SAFETY: a living device; the blob lives through the call.
        call(|e| unsafe { self.api.supports.unwrap()(self.device, bytes.as_ptr().cast(), bytes.len() as u64, op, e) })
    }

    /// A committed weight. The source is overwritten afterwards.
    pub fn weight(&self, dtype: u32, rows: u64, cols: u64, mut bytes: Vec<u8>) -> Result<Weight<'_>> {
        let desc = SpdWeightDesc {
            struct_size: size::<SpdWeightDesc>(),
            dtype,
            batch: 1,
            rows,
            cols,
            ..SpdWeightDesc::default()
        };
        let mut raw = null_mut();
        // SAFETY: a living device; description and out pointer are ours.
        call(|e| unsafe { self.api.weight_create.unwrap()(self.device, &raw const desc, &raw mut raw, e) })?;
        let weight = Weight { rig: self, raw };
        let source = SpdSource {
            struct_size: size::<SpdSource>(),
            fd: -1,
            ptr: bytes.as_ptr().cast(),
            length: bytes.len() as u64,
            ..SpdSource::default()
        };
        // SAFETY: a living weight; the source lives through the call.
        call(|e| unsafe { self.api.weight_upload.unwrap()(raw, 0, 1, &raw const source, e) })?;
        bytes.fill(0xaa);
        // SAFETY: a living weight.
        call(|e| unsafe { self.api.weight_commit.unwrap()(raw, e) })?;
        Ok(weight)
    }

    pub fn plan(&self, blob: &Blob, weights: &[&Weight<'_>]) -> Result<Plan<'_>> {
        let weights: Vec<_> = weights.iter().map(|weight| weight.raw).collect();
        let compile = SpdCompile {
            struct_size: size::<SpdCompile>(),
            blob: blob.as_bytes().as_ptr().cast(),
            blob_length: blob.as_bytes().len() as u64,
            weights: weights.as_ptr(),
            n_weights: u32::try_from(weights.len()).unwrap(),
            buckets: &raw const BUCKET,
            n_buckets: 1,
            bucket_stride: size::<SpdBucket>(),
            ..SpdCompile::default()
        };
        let mut info = SpdPlanInfo { struct_size: size::<SpdPlanInfo>(), ..SpdPlanInfo::default() };
        let mut raw = null_mut();
        // SAFETY: living handles; blob and arrays live through the call.
        call(|e| unsafe {
            self.api.plan_compile.unwrap()(self.device, &raw const compile, &raw mut raw, &raw mut info, e)
        })?;
        Ok(Plan { rig: self, raw })
    }

    pub fn queue(&self) -> Result<Queue<'_>> {
        let mut raw = null_mut();
        // SAFETY: a living device; the out pointer is ours.
        call(|e| unsafe { self.api.queue_create.unwrap()(self.device, 1, 0, &raw mut raw, e) })?;
        Ok(Queue { rig: self, raw })
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        // SAFETY: what was made on the device borrows the rig, so it is gone.
        unsafe {
            if !self.device.is_null() {
                self.api.device_close.unwrap()(self.device);
            }
            self.api.instance_destroy.unwrap()(self.instance);
        }
        if self.fake.is_none() || self.is_lost.get() || std::thread::panicking() {
            return;
        }
        for counter in ["live_device", "live_pinned", "live_streams", "live_events", "live_modules", "retained", "used"]
        {
            assert_eq!(self.counter(counter), 0, "{counter} at the end");
        }
        assert_eq!((self.counter("misuses"), self.counter("overruns")), (0, 0), "wrong calls, writes past the end");
    }
}

macro_rules! handle {
    ($name:ident, $raw:ty, $destroy:ident) => {
        pub struct $name<'a> {
            pub rig: &'a Rig,
            pub raw: *mut $raw,
        }

        impl Drop for $name<'_> {
            fn drop(&mut self) {
                // SAFETY: a living handle that is not used again.
                unsafe { self.rig.api.$destroy.unwrap()(self.raw) };
            }
        }
    };
}

handle!(Weight, SpdWeight, weight_destroy);
handle!(Plan, SpdPlan, plan_destroy);
handle!(Queue, SpdQueue, queue_destroy);
handle!(Pool, SpdKvPool, kv_destroy);

/// An output arena that the plugin may write to until the step has completed.
pub struct Arena(Vec<f32>);

impl Drop for Arena {
    fn drop(&mut self) {
        if std::thread::panicking() {
            std::mem::forget(std::mem::take(&mut self.0)); // steps in flight may still write to it
        }
    }
}

impl Arena {
    /// `n` values that no operator makes.
    pub fn new(n: usize) -> Self {
        Self(vec![-777.0; n])
    }

    pub fn values(&self) -> &[f32] {
        // SAFETY: read as the plugin may have written it meanwhile, on this thread.
        unsafe { std::slice::from_raw_parts(std::hint::black_box(self.0.as_ptr()), self.0.len()) }
    }

    /// True when nothing has been written.
    pub fn is_untouched(&self) -> bool {
        self.values().iter().all(|&value| value == -777.0)
    }
}

impl Queue<'_> {
    /// Runs a step; step and input are overwritten once the call is over, as the contract allows.
    pub fn run(&self, plan: &Plan<'_>, step: &StepArrays<'_>, input: &[f32], out: &mut Arena) -> Result<u64> {
        self.run_with(plan, step, input, out, None)
    }

    pub fn run_with(
        &self,
        plan: &Plan<'_>,
        step: &StepArrays<'_>,
        input: &[f32],
        out: &mut Arena,
        cancel: Option<&AtomicU32>,
    ) -> Result<u64> {
        let (mut step, mut input) = (step.encode(), input.to_vec());
        let run = SpdRun {
            struct_size: size::<SpdRun>(),
            step: step.as_bytes().as_ptr().cast(),
            input: input.as_ptr().cast(),
            in_length: size_of_val(&input[..]) as u64,
            out: out.0.as_mut_ptr().cast(),
            out_length: size_of_val(&out.0[..]) as u64,
            cancel: cancel.map_or(null(), |flag| flag.as_ptr().cast_const()),
            ..SpdRun::default()
        };
        let mut timeline = 0;
        // SAFETY: living handles; the arena lives until the test has waited.
        let answer = call(|e| unsafe {
            self.rig.api.queue_run.unwrap()(self.raw, plan.raw, &raw const run, &raw mut timeline, e)
        });
        step.as_bytes_mut().fill(0xaa);
        input.fill(f32::NAN);
        answer.map(|()| timeline)
    }

    pub fn wait(&self, timeline: u64) -> Result<()> {
        self.wait_for(timeline, 60_000_000_000)
    }

    pub fn wait_for(&self, timeline: u64, timeout_ns: u64) -> Result<()> {
        // SAFETY: a living queue.
        call(|e| unsafe { self.rig.api.queue_wait.unwrap()(self.raw, timeline, timeout_ns, e) })
    }

    pub fn wait_queue(&self, other: &Self, timeline: u64) -> Result<()> {
        // SAFETY: living queues.
        call(|e| unsafe { self.rig.api.queue_wait_queue.unwrap()(self.raw, other.raw, timeline, e) })
    }

    pub fn completed(&self) -> u64 {
        let mut completed = 0;
        // SAFETY: a living queue; the out pointer is ours.
        call(|e| unsafe { self.rig.api.queue_query.unwrap()(self.raw, &raw mut completed, e) }).unwrap();
        completed
    }

    pub fn cancel(&self, from: u64) -> Result<()> {
        // SAFETY: a living queue.
        call(|e| unsafe { self.rig.api.queue_cancel.unwrap()(self.raw, from, e) })
    }
}

/// A program made by `build`.
pub fn program(build: impl FnOnce(&mut ProgramBuilder)) -> Blob {
    let mut builder = ProgramBuilder::new();
    build(&mut builder);
    builder.finish(0)
}
