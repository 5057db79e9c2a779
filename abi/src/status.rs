//! What went wrong? Status codes and the caller-owned error.

use crate::layout::abi_struct;
use core::ffi::c_char;

/// `spd_status`: 0 is success, 1 is "ask again", negative is a failure.
pub type SpdStatus = i32;

pub const OK: SpdStatus = 0;
pub const NOT_READY: SpdStatus = 1;
pub const E_INVALID: SpdStatus = -1;
pub const E_UNSUPPORTED: SpdStatus = -2;
pub const E_ABI: SpdStatus = -3;
pub const E_NOMEM_DEVICE: SpdStatus = -4;
pub const E_NOMEM_HOST: SpdStatus = -5;
pub const E_BUSY: SpdStatus = -6;
pub const E_CANCELLED: SpdStatus = -7;
pub const E_TIMEOUT: SpdStatus = -8;
pub const E_DATA: SpdStatus = -9;
pub const E_DRIVER: SpdStatus = -10;
pub const E_STEP: SpdStatus = -11;
pub const E_QUEUE_LOST: SpdStatus = -12;
pub const E_DEVICE_LOST: SpdStatus = -13;
pub const E_INTERNAL: SpdStatus = -14;

pub const ERR_RETRYABLE: u32 = 1;
pub const ERR_STICKY: u32 = 2;

abi_struct! {
    SpdError = "spd_error" {
        struct_size: u32,
        status: i32,
        flags: u32,
        op_index: u32,
        vendor_code: i64,
        block: u64,
        message: [c_char; 224],
    }
}

/// The header's name of a status, for messages.
pub const fn status_name(status: SpdStatus) -> &'static str {
    match status {
        OK => "SPD_OK",
        NOT_READY => "SPD_NOT_READY",
        E_INVALID => "SPD_E_INVALID",
        E_UNSUPPORTED => "SPD_E_UNSUPPORTED",
        E_ABI => "SPD_E_ABI",
        E_NOMEM_DEVICE => "SPD_E_NOMEM_DEVICE",
        E_NOMEM_HOST => "SPD_E_NOMEM_HOST",
        E_BUSY => "SPD_E_BUSY",
        E_CANCELLED => "SPD_E_CANCELLED",
        E_TIMEOUT => "SPD_E_TIMEOUT",
        E_DATA => "SPD_E_DATA",
        E_DRIVER => "SPD_E_DRIVER",
        E_STEP => "SPD_E_STEP",
        E_QUEUE_LOST => "SPD_E_QUEUE_LOST",
        E_DEVICE_LOST => "SPD_E_DEVICE_LOST",
        E_INTERNAL => "SPD_E_INTERNAL",
        _ => "unknown status",
    }
}
