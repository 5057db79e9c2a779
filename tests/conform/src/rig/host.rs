//! What does the kit offer to a plugin? A host that has a clock, drops the log and has the settings that it was given.

use sparsed_abi::{ABI_MINOR, LOG_ERROR, SpdHost, SpdStatus};
use std::ffi::{CStr, CString, c_char, c_void};
use std::ptr;
use std::sync::OnceLock;
use std::time::Instant;

/// The table for `instance_create`; lives as long as the process.
pub(crate) fn host() -> *const SpdHost {
    struct Table(SpdHost);
    // SAFETY: never written after it is made; its pointers lead to static strings and code.
    unsafe impl Send for Table {}
    // SAFETY: as above.
    unsafe impl Sync for Table {}
    static TABLE: OnceLock<Table> = OnceLock::new();
    let table = TABLE.get_or_init(|| {
        Table(SpdHost {
            struct_size: super::struct_size::<SpdHost>(),
            abi_minor: ABI_MINOR,
            context: ptr::null_mut(),
            name: c"sparsed".as_ptr(),
            version: c"conform".as_ptr(),
            max_log_level: LOG_ERROR,
            flags: 0,
            log: Some(log),
            notify: Some(notify),
            device_event: Some(device_event),
            now_ns: Some(now_ns),
            config: Some(config),
            extension: Some(extension),
        })
    });
    &raw const table.0
}

unsafe extern "C" fn log(_: *mut c_void, _: i32, _: *const c_char, _: *const c_char, _: u64) {}

unsafe extern "C" fn notify(_: *mut c_void, _: u64, _: u64, _: SpdStatus) {}

unsafe extern "C" fn device_event(_: *mut c_void, _: u64, _: u32, _: i64) {}

unsafe extern "C" fn now_ns(_: *mut c_void) -> u64 {
    static START: OnceLock<Instant> = OnceLock::new();
    u64::try_from(START.get_or_init(Instant::now).elapsed().as_nanos()).unwrap_or(u64::MAX)
}

static SETTINGS: OnceLock<Vec<(CString, CString)>> = OnceLock::new();

/// Gives the plugin these settings; called once, before [`host`]. One with a NUL inside is left out.
pub(crate) fn set(settings: &[(String, String)]) {
    let c = |text: &String| CString::new(text.as_str()).ok();
    SETTINGS.get_or_init(|| settings.iter().filter_map(|(key, value)| Some((c(key)?, c(value)?))).collect());
}

unsafe extern "C" fn config(_: *mut c_void, key: *const c_char) -> *const c_char {
    if key.is_null() {
        return ptr::null();
    }
    // SAFETY: the header says that key is a NUL-terminated string.
    let key = unsafe { CStr::from_ptr(key) };
    let found = SETTINGS.get().and_then(|settings| settings.iter().find(|(name, _)| name.as_c_str() == key));
    found.map_or(ptr::null(), |(_, value)| value.as_ptr())
}

unsafe extern "C" fn extension(_: *mut c_void, _: *const c_char) -> *const c_void {
    ptr::null()
}
