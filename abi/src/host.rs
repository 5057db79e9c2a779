//! What does the daemon offer to a plugin?

use crate::SpdStatus;
use crate::layout::abi_struct;
use core::ffi::{c_char, c_void};

pub const LOG_ERROR: i32 = 3;
pub const LOG_WARN: i32 = 4;
pub const LOG_INFO: i32 = 6;
pub const LOG_DEBUG: i32 = 7;

abi_struct! {
    SpdHost = "spd_host" {
        struct_size: u32,
        abi_minor: u32,
        context: *mut c_void,
        name: *const c_char,
        version: *const c_char,
        max_log_level: i32,
        flags: u32,
        log: Option<unsafe extern "C" fn(*mut c_void, i32, *const c_char, *const c_char, u64)>,
        notify: Option<unsafe extern "C" fn(*mut c_void, u64, u64, SpdStatus)>,
        device_event: Option<unsafe extern "C" fn(*mut c_void, u64, u32, i64)>,
        now_ns: Option<unsafe extern "C" fn(*mut c_void) -> u64>,
        config: Option<unsafe extern "C" fn(*mut c_void, *const c_char) -> *const c_char>,
        extension: Option<unsafe extern "C" fn(*mut c_void, *const c_char) -> *const c_void>,
    }
}
