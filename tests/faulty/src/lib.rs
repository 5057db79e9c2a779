//! Does the daemon survive its devices? The CPU plugin with planted faults, id `faulty`.
//!
//! The table is that of the library named by the environment's `SPARSED_WRAPPED`, but for the functions here. Where
//! `SPARSED_ACCELERATOR` is an id, it is the table of that plugin, and its device is no CPU. Settings:
//! - `faults`, a list `run:status` of steps that fail, counted from 1 over the life of the process;
//! - `broken_from`, the step at which the device is lost and does not open again, or not before `broken_opens`
//!   attempts;
//! - `bad_from`, the step from which all fail though nothing is lost, with the status `bad_status` or, without one,
//!   with logits that are no numbers; `honest`, with which its self-test says so;
//! - `slow`, what is wrong with its slow tier: `swallow`, `shift` or `spill` (`slow.rs`);
//! - `slow_host`, with which its slow tier is taken in host memory only;
//! - `host_memory`, `none`: it gives none; `only`: steps whose arenas lie in other memory fail;
//! - `hang_open`, with which it does not come back from being opened;
//! - `late_compile`, the steps that all compilations but the first wait for; `hang_compile`, with which these do not
//!   come back (`compile.rs`);
//! - `hog_at`, the step that wants more memory than there is.
//!
//! As a real device does, a lost queue fails until there is a new one, and a lost device until it is opened again.
//! Every other step of `faults` has done its work before it fails, and leaves nonsense in its output.
#![allow(unsafe_code, reason = "the plugin's side of the C ABI")]

mod compile;
mod slow;

use slow::SlowFault;

use libloading::os::unix::{Library, RTLD_LOCAL, RTLD_NOW};
use sparsed_abi::{
    ABI_MAJOR, ABI_MINOR, DEV_NPU, E_DATA, E_DEVICE_LOST, E_INTERNAL, E_INVALID, E_QUEUE_LOST, E_UNSUPPORTED,
    ENTRY_SYMBOL, FEAT_SLOW_FILE, OK, SpdApi, SpdDevice, SpdDeviceInfo, SpdError, SpdGetApiFn, SpdHost, SpdInstance,
    SpdKvOp, SpdKvPool, SpdOpenOptions, SpdPlan, SpdQueue, SpdRun, SpdStatus,
};
use std::collections::BTreeMap;
use std::ffi::{CStr, CString, c_void};
use std::ops::Range;
use std::ptr;
use std::str::FromStr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};

/// Of the wrapped library and of this one.
static TABLES: OnceLock<Option<(&'static SpdApi, SpdApi)>> = OnceLock::new();
static PLANTED: OnceLock<Planted> = OnceLock::new();
static RUNS: AtomicU64 = AtomicU64::new(0);
/// Attempts to open the broken device.
static OPENS: AtomicU64 = AtomicU64::new(0);
static QUEUE_LOST: AtomicBool = AtomicBool::new(false);
static DEVICE_LOST: AtomicBool = AtomicBool::new(false);
/// Memory that was given for arenas, freed or not.
static GIVEN: Mutex<Vec<Range<usize>>> = Mutex::new(Vec::new());

/// Between two operations of a list of ours.
#[allow(clippy::cast_possible_truncation, reason = "a few dozen")]
const OP_BYTES: u32 = size_of::<SpdKvOp>() as u32;

/// What is to fail.
#[derive(Debug, Default)]
struct Planted {
    /// Status by step.
    faults: BTreeMap<u64, SpdStatus>,
    broken_from: Option<u64>,
    /// Attempts to open the broken device that fail; `None`: all.
    broken_opens: Option<u64>,
    bad_from: Option<u64>,
    bad_status: Option<SpdStatus>,
    is_honest: bool,
    slow_host: bool,
    slow: Option<SlowFault>,
    /// None is given, or only what was given is taken.
    host_memory: Option<String>,
    hangs: bool,
    late_compile: u64,
    hangs_in_compile: bool,
    hog_at: Option<u64>,
}

/// The one symbol of the library; see `plugin.h`.
#[unsafe(no_mangle)]
pub extern "C" fn spd_get_api(abi_major: u32, _host_minor: u32) -> *const SpdApi {
    let tables = TABLES.get_or_init(wrap).as_ref().filter(|_| abi_major == ABI_MAJOR);
    tables.map_or(ptr::null(), |(_, own)| ptr::from_ref(own))
}

fn wrap() -> Option<(&'static SpdApi, SpdApi)> {
    let path = std::env::var_os("SPARSED_WRAPPED")?;
    // SAFETY: the test names the CPU plugin, whose initialisers do nothing.
    let library = unsafe { Library::open(Some(path), RTLD_NOW | RTLD_LOCAL) }.ok()?;
    // SAFETY: the symbol has this type in every plugin.
    let entry = *unsafe { library.get::<SpdGetApiFn>(ENTRY_SYMBOL) }.ok()?;
    std::mem::forget(library);
    // SAFETY: the library stays loaded; the answer is NULL or a static table.
    let real: &'static SpdApi = unsafe { entry(ABI_MAJOR, ABI_MINOR).as_ref() }?;
    let own = SpdApi {
        plugin_id: accelerator().unwrap_or(c"faulty").as_ptr(),
        instance_create: Some(instance_create),
        device_info: Some(device_info),
        device_open: Some(device_open),
        self_test: Some(self_test),
        host_alloc: Some(host_alloc),
        kv_create: Some(slow::kv_create),
        plan_compile: Some(compile::plan_compile),
        queue_create: Some(queue_create),
        queue_run: Some(queue_run),
        queue_kv: Some(queue_kv),
        ..*real
    };
    Some((real, own))
}

/// The id of the plugin whose place it takes, if it is another one's.
fn accelerator() -> Option<&'static CStr> {
    static ID: OnceLock<Option<CString>> = OnceLock::new();
    let id = || std::env::var("SPARSED_ACCELERATOR").ok().and_then(|id| CString::new(id).ok());
    ID.get_or_init(id).as_deref()
}

fn real() -> &'static SpdApi {
    let tables = TABLES.get().and_then(Option::as_ref).expect("our functions are known by our table only");
    tables.0
}

/// A setting of the plugin.
///
/// # Safety
/// `host` is the daemon's table.
unsafe fn setting(host: *const SpdHost, key: &CStr) -> Option<String> {
    // SAFETY: the caller's contract.
    let host = unsafe { host.as_ref() }?;
    let config = host.config?;
    // SAFETY: context is passed back as given, the key is a C string.
    let value = unsafe { config(host.context, key.as_ptr()) };
    // SAFETY: the answer is NULL or a C string that lives as long as the instance.
    (!value.is_null()).then(|| unsafe { CStr::from_ptr(value) }.to_string_lossy().into_owned())
}

impl Planted {
    /// Whether the device is broken now.
    fn is_broken(&self) -> bool {
        self.broken_from.is_some_and(|run| RUNS.load(Ordering::Relaxed) >= run)
            && self.broken_opens.is_none_or(|opens| OPENS.load(Ordering::Relaxed) < opens)
    }

    /// Whether step `run` fails because all do.
    fn is_bad(&self, run: u64) -> bool {
        self.bad_from.is_some_and(|from| run >= from)
    }
}

/// The settings, if they are what they must be.
fn parse(setting: impl Fn(&CStr) -> Option<String>) -> Option<Planted> {
    let pair = |pair: &str| {
        let (run, status) = pair.split_once(':')?;
        Some((run.parse().ok()?, status.parse().ok()?))
    };
    Some(Planted {
        faults: setting(c"faults").unwrap_or_default().split_whitespace().map(pair).collect::<Option<_>>()?,
        broken_from: number(setting(c"broken_from"))?,
        broken_opens: number(setting(c"broken_opens"))?,
        bad_from: number(setting(c"bad_from"))?,
        bad_status: number(setting(c"bad_status"))?,
        is_honest: setting(c"honest").is_some(),
        slow_host: setting(c"slow_host").is_some(),
        slow: number(setting(c"slow"))?,
        host_memory: setting(c"host_memory"),
        hangs: setting(c"hang_open").is_some(),
        late_compile: number(setting(c"late_compile"))?.unwrap_or(0),
        hangs_in_compile: setting(c"hang_compile").is_some(),
        hog_at: number(setting(c"hog_at"))?,
    })
}

/// A number or a name, if there is a setting; `None` when it is none.
fn number<T: FromStr>(text: Option<String>) -> Option<Option<T>> {
    text.map(|text| text.parse().ok()).map_or(Some(None), |number| number.map(Some))
}

/// Writes why into the caller's error.
///
/// # Safety
/// `error` is NULL or the caller's own.
unsafe fn refuse(error: *mut SpdError, status: SpdStatus, why: &str) -> SpdStatus {
    // SAFETY: the caller's contract.
    if let Some(error) = unsafe { error.as_mut() } {
        error.status = status;
        let bytes = why.bytes().take(error.message.len() - 1).chain([0]);
        error.message.iter_mut().zip(bytes).for_each(|(to, from)| *to = from.cast_signed());
    }
    status
}

/// The status of a queue or device that is lost.
fn lost() -> Option<SpdStatus> {
    if DEVICE_LOST.load(Ordering::Relaxed) {
        return Some(E_DEVICE_LOST);
    }
    QUEUE_LOST.load(Ordering::Relaxed).then_some(E_QUEUE_LOST)
}

unsafe extern "C" fn instance_create(
    host: *const SpdHost,
    out: *mut *mut SpdInstance,
    error: *mut SpdError,
) -> SpdStatus {
    // SAFETY: the daemon's table.
    let Some(planted) = parse(|key| unsafe { setting(host, key) }) else {
        // SAFETY: the daemon's error.
        return unsafe { refuse(error, E_INVALID, "faults must be a list of run:status, the others numbers") };
    };
    PLANTED.get_or_init(|| planted);
    let create = real().instance_create.expect("a whole table");
    // SAFETY: as we were called.
    unsafe { create(host, out, error) }
}

unsafe extern "C" fn device_info(
    instance: *mut SpdInstance,
    index: u32,
    out: *mut SpdDeviceInfo,
    error: *mut SpdError,
) -> SpdStatus {
    let call = real().device_info.expect("a whole table");
    // SAFETY: as we were called.
    let status = unsafe { call(instance, index, out, error) };
    if status == OK && PLANTED.get().is_some_and(|planted| planted.slow_host) {
        // SAFETY: the daemon's struct, of this version, which the library has filled.
        unsafe { (*out).features &= !FEAT_SLOW_FILE };
    }
    if status == OK && accelerator().is_some() {
        // SAFETY: as above.
        unsafe { (*out).kind = DEV_NPU };
    }
    status
}

unsafe extern "C" fn device_open(
    instance: *mut SpdInstance,
    index: u32,
    options: *const SpdOpenOptions,
    out: *mut *mut SpdDevice,
    error: *mut SpdError,
) -> SpdStatus {
    while PLANTED.get().is_some_and(|planted| planted.hangs) {
        std::thread::park();
    }
    if PLANTED.get().is_some_and(Planted::is_broken) {
        OPENS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the daemon's error.
        return unsafe { refuse(error, E_DEVICE_LOST, "broken") };
    }
    DEVICE_LOST.store(false, Ordering::Relaxed);
    QUEUE_LOST.store(false, Ordering::Relaxed);
    let open = real().device_open.expect("a whole table");
    // SAFETY: as we were called.
    unsafe { open(instance, index, options, out, error) }
}

unsafe extern "C" fn self_test(device: *mut SpdDevice, level: u32, error: *mut SpdError) -> SpdStatus {
    let is_bad = |planted: &Planted| planted.is_honest && planted.is_bad(RUNS.load(Ordering::Relaxed));
    if PLANTED.get().is_some_and(is_bad) {
        // SAFETY: the daemon's error.
        return unsafe { refuse(error, E_DATA, "two and two are five") };
    }
    let test = real().self_test.expect("a whole table");
    // SAFETY: as we were called.
    unsafe { test(device, level, error) }
}

unsafe extern "C" fn host_alloc(
    device: *mut SpdDevice,
    length: u64,
    align: u64,
    out: *mut *mut c_void,
    error: *mut SpdError,
) -> SpdStatus {
    if PLANTED.get().is_some_and(|planted| planted.host_memory.as_deref() == Some("none")) {
        // SAFETY: the daemon's error.
        return unsafe { refuse(error, E_UNSUPPORTED, "no memory of this device's") };
    }
    let alloc = real().host_alloc.expect("a whole table");
    // SAFETY: as we were called.
    let status = unsafe { alloc(device, length, align, out, error) };
    if status == OK {
        // SAFETY: the daemon's pointer, which the library has filled.
        let base = unsafe { out.read() } as usize;
        GIVEN.lock().unwrap_or_else(PoisonError::into_inner).push(base..base + usize::try_from(length).unwrap_or(0));
    }
    status
}

/// Whether both arenas lie in memory of [`host_alloc`].
///
/// # Safety
/// `run` is the daemon's struct.
unsafe fn has_our_arenas(run: *const SpdRun) -> bool {
    // SAFETY: the caller's contract.
    let run = unsafe { &*run };
    let given = GIVEN.lock().unwrap_or_else(PoisonError::into_inner);
    let arenas = [(run.input as usize, run.in_length), (run.out as usize, run.out_length)];
    arenas.into_iter().all(|(base, length)| {
        let end = base + usize::try_from(length).unwrap_or(0);
        length == 0 || given.iter().any(|given| given.start <= base && end <= given.end)
    })
}

unsafe extern "C" fn queue_create(
    device: *mut SpdDevice,
    priority: u32,
    flags: u64,
    out: *mut *mut SpdQueue,
    error: *mut SpdError,
) -> SpdStatus {
    QUEUE_LOST.store(false, Ordering::Relaxed);
    let create = real().queue_create.expect("a whole table");
    // SAFETY: as we were called.
    unsafe { create(device, priority, flags, out, error) }
}

unsafe extern "C" fn queue_run(
    queue: *mut SpdQueue,
    plan: *mut SpdPlan,
    run: *const SpdRun,
    timeline: *mut u64,
    error: *mut SpdError,
) -> SpdStatus {
    if let Some(status) = lost() {
        // SAFETY: the daemon's error.
        return unsafe { refuse(error, status, "still lost") };
    }
    let number = RUNS.fetch_add(1, Ordering::Relaxed) + 1;
    compile::stepped();
    let planted = PLANTED.get().expect("set by instance_create");
    // SAFETY: the daemon's struct.
    if planted.host_memory.as_deref() == Some("only") && !unsafe { has_our_arenas(run) } {
        // SAFETY: the daemon's error.
        return unsafe { refuse(error, E_INVALID, "an arena in memory that was not given") };
    }
    if planted.hog_at == Some(number) {
        // No address space holds it: the allocator fails, and that ends the process.
        std::hint::black_box(vec![0u8; 1 << 62]);
    }
    let place = planted.faults.keys().position(|&run| run == number);
    let bad = planted.bad_status.filter(|_| planted.is_bad(number));
    let status = planted.is_broken().then_some(E_DEVICE_LOST).or_else(|| planted.faults.get(&number).copied()).or(bad);
    let call = real().queue_run.expect("a whole table");
    let Some(status) = status else {
        // SAFETY: as we were called; the CPU's queues are synchronous, so the work is done when the call returns.
        let status = unsafe { slow::swallowed(call(queue, plan, run, timeline, error), error) };
        if planted.is_bad(number) {
            // SAFETY: the daemon gives an output arena of this size.
            unsafe { spoil(run) };
        }
        return status;
    };
    if place.is_some_and(|place| place % 2 == 1) {
        // SAFETY: as we were called; the CPU's queues are synchronous, so the work is done when the call returns.
        unsafe { call(queue, plan, run, timeline, error) };
        // SAFETY: the daemon gives an output arena of this size.
        unsafe { spoil(run) };
    }
    QUEUE_LOST.store(status == E_QUEUE_LOST, Ordering::Relaxed);
    DEVICE_LOST.store([E_DEVICE_LOST, E_INTERNAL].contains(&status), Ordering::Relaxed);
    // SAFETY: the daemon's error.
    unsafe { refuse(error, status, &format!("planted fault at run {number}")) }
}

/// Fills the output with what is no number.
///
/// # Safety
/// The arena of `run` has its size, and nobody else uses it.
unsafe fn spoil(run: *const SpdRun) {
    // SAFETY: the caller's contract.
    unsafe { ptr::write_bytes((*run).out.cast::<u8>(), 0xff, usize::try_from((*run).out_length).unwrap_or(0)) };
}

unsafe extern "C" fn queue_kv(
    queue: *mut SpdQueue,
    pool: *mut SpdKvPool,
    ops: *const SpdKvOp,
    count: u32,
    stride: u32,
    host: *mut c_void,
    length: u64,
    timeline: *mut u64,
    error: *mut SpdError,
) -> SpdStatus {
    if let Some(status) = lost() {
        // SAFETY: the daemon's error.
        return unsafe { refuse(error, status, "still lost") };
    }
    let call = real().queue_kv.expect("a whole table");
    // SAFETY: the caller's array.
    if let Some(list) = unsafe { slow::shifted(ops, count, stride) } {
        // SAFETY: as we were called, but for the list, which is ours and lives through the call.
        return unsafe { call(queue, pool, list.as_ptr(), count, OP_BYTES, host, length, timeline, error) };
    }
    // SAFETY: as we were called.
    unsafe { call(queue, pool, ops, count, stride, host, length, timeline, error) }
}
