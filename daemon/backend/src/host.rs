//! What a plugin may ask of the daemon: a log, a clock, its settings.

use crate::call::clean;
use sparsed_abi::{ABI_MINOR, LOG_DEBUG, LOG_ERROR, LOG_INFO, LOG_WARN, SpdHost, SpdStatus};
use std::collections::BTreeMap;
use std::ffi::{CStr, CString, c_char, c_void};
use std::ptr;

const VERSION: &CStr = sparsed_plugin_kit::cargo_version!();

/// The table handed to a plugin and what stands behind it. Boxed, so that both addresses stay.
#[derive(Debug)]
pub(crate) struct Host {
    table: Box<SpdHost>,
    /// Behind `table.context`; never moved nor changed while the plugin lives.
    _context: Box<Context>,
}

#[derive(Debug)]
struct Context {
    plugin: String,
    settings: BTreeMap<CString, CString>,
}

// SAFETY: the table and the context are never written after construction; `log` and the clock are thread-safe.
unsafe impl Send for Host {}
// SAFETY: as above.
unsafe impl Sync for Host {}

impl Host {
    /// The services for plugin `id` with the operator's settings; a setting with a NUL inside is left out.
    pub(crate) fn new(id: &str, settings: &BTreeMap<String, String>) -> Self {
        let c = |text: &String| CString::new(text.as_str()).ok();
        let settings = settings.iter().filter_map(|(key, value)| Some((c(key)?, c(value)?))).collect();
        let context = Box::new(Context { plugin: id.to_owned(), settings });
        let table = Box::new(SpdHost {
            struct_size: u32::try_from(size_of::<SpdHost>()).expect("a small struct"),
            abi_minor: ABI_MINOR,
            context: ptr::from_ref(&*context).cast_mut().cast(),
            name: c"sparsed".as_ptr(),
            version: VERSION.as_ptr(),
            max_log_level: match log::max_level() {
                log::LevelFilter::Off | log::LevelFilter::Error => LOG_ERROR,
                log::LevelFilter::Warn => LOG_WARN,
                log::LevelFilter::Info => LOG_INFO,
                log::LevelFilter::Debug | log::LevelFilter::Trace => LOG_DEBUG,
            },
            flags: 0,
            log: Some(write_log),
            notify: Some(notify),
            device_event: Some(device_event),
            now_ns: Some(now_ns),
            config: Some(config),
            extension: Some(extension),
        });
        Self { table, _context: context }
    }

    pub(crate) fn as_ptr(&self) -> *const SpdHost {
        &raw const *self.table
    }
}

/// # Safety
/// `context` is the one of a living [`Host`].
unsafe fn context<'a>(context: *mut c_void) -> &'a Context {
    // SAFETY: the caller's contract; the Context is boxed, immutable and lives as long as the plugin's table.
    unsafe { &*context.cast::<Context>() }
}

unsafe extern "C" fn write_log(
    ctx: *mut c_void,
    level: i32,
    target: *const c_char,
    message: *const c_char,
    length: u64,
) {
    if ctx.is_null() || message.is_null() {
        return;
    }
    // SAFETY: the header says that context is passed back as given.
    let plugin = unsafe { context(ctx) }.plugin.as_str();
    let length = usize::try_from(length).unwrap_or(0).min(4096);
    // SAFETY: the header says that message has `length` readable bytes; they are copied before the call returns.
    let message = unsafe { std::slice::from_raw_parts(message.cast::<u8>(), length) };
    let message = clean(&String::from_utf8_lossy(message));
    let target = if target.is_null() {
        String::new()
    } else {
        // SAFETY: the header says that target is NULL or a NUL-terminated string.
        clean(&unsafe { CStr::from_ptr(target) }.to_string_lossy())
    };
    let level = match level {
        ..=LOG_ERROR => log::Level::Error,
        LOG_WARN => log::Level::Warn,
        5..=LOG_INFO => log::Level::Info,
        _ => log::Level::Debug,
    };
    log::log!(level, plugin, target = target.as_str(); "{message}");
}

unsafe extern "C" fn notify(_: *mut c_void, _: u64, _: u64, _: SpdStatus) {
    // The daemon waits with queue_wait; a notification needs no answer.
}

unsafe extern "C" fn device_event(ctx: *mut c_void, device_cookie: u64, kind: u32, argument: i64) {
    if !ctx.is_null() {
        // SAFETY: the header says that context is passed back as given.
        let plugin = unsafe { context(ctx) }.plugin.as_str();
        log::warn!(plugin, device_cookie, kind, argument; "the plugin reports a device event");
    }
}

unsafe extern "C" fn now_ns(_: *mut c_void) -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    let part = |n: i64| u64::try_from(n).unwrap_or(0);
    part(now.tv_sec).saturating_mul(1_000_000_000).saturating_add(part(now.tv_nsec))
}

unsafe extern "C" fn config(ctx: *mut c_void, key: *const c_char) -> *const c_char {
    if ctx.is_null() || key.is_null() {
        return ptr::null();
    }
    // SAFETY: the header says that key is a NUL-terminated string.
    let key = unsafe { CStr::from_ptr(key) };
    // SAFETY: the header says that context is passed back as given.
    unsafe { context(ctx) }.settings.get(key).map_or(ptr::null(), |value| value.as_ptr())
}

unsafe extern "C" fn extension(_: *mut c_void, _: *const c_char) -> *const c_void {
    ptr::null()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plugin_reads_its_settings() {
        let host = Host::new("cpu", &BTreeMap::from([("level".to_owned(), "scalar".to_owned())]));
        // SAFETY: the table is alive; the keys are C strings.
        let (level, none) = unsafe {
            let table = &*host.as_ptr();
            let ask = table.config.expect("set");
            (ask(table.context, c"level".as_ptr()), ask(table.context, c"other".as_ptr()))
        };
        // SAFETY: the answer is a string of the living host.
        assert_eq!(unsafe { CStr::from_ptr(level) }, c"scalar");
        assert!(none.is_null());
    }
}
