//! What does a `CUresult` mean for the daemon? Numbers from the driver's reference manual.

use super::table::{Code, Driver};
use sparsed_abi::{E_DEVICE_LOST, E_DRIVER, E_INTERNAL, E_NOMEM_DEVICE, E_STEP, SpdStatus};
use std::ffi::CStr;

/// `CUDA_ERROR_NOT_READY`: an event whose work is not over.
pub(crate) const NOT_READY: Code = 600;
/// `CUDA_ERROR_INVALID_IMAGE`.
pub(crate) const INVALID_IMAGE: Code = 200;
/// `CUDA_ERROR_INVALID_PTX`.
pub(crate) const INVALID_PTX: Code = 218;

/// True for errors after which the context answers nothing but that error: an uncorrectable ECC or NVLink error, an
/// illegal access, a launch that timed out or failed, a destroyed context, a device-side assertion.
pub(crate) fn is_sticky(code: Code) -> bool {
    matches!(code, 214 | 220 | 700 | 702 | 709 | 710 | 714..=719)
}

/// The status that tells the daemon what to do about `code`.
pub(crate) fn status(code: Code) -> SpdStatus {
    match code {
        2 => E_NOMEM_DEVICE,
        701 => E_STEP, // the launch did not fit, nothing has run
        _ if is_sticky(code) => E_DEVICE_LOST,
        // No device, no permission, a stub or a driver that does not fit its kernel module.
        3 | 4 | 34 | 36 | 46 | 100 | 101 | 209 | 222 | 802 | 803 | 999 => E_DRIVER,
        _ => E_INTERNAL, // an argument that the driver does not take is this plugin's fault
    }
}

/// The failure in words: the call, the driver's name for it, its number.
pub(crate) fn describe(driver: &Driver, code: Code, call: &str) -> String {
    let ask = |function: unsafe extern "C" fn(Code, *mut *const std::ffi::c_char) -> Code| {
        let mut text = std::ptr::null();
        // SAFETY: the out pointer is ours.
        let answer = unsafe { function(code, &raw mut text) };
        // SAFETY: the driver answers NULL or a static string.
        (answer == 0 && !text.is_null()).then(|| unsafe { CStr::from_ptr(text) }.to_string_lossy())
    };
    let name = ask(driver.get_error_name).unwrap_or_default();
    let meaning = ask(driver.get_error_string).unwrap_or_default();
    format!("{call}: {name} ({code}) {meaning}").trim_end().to_owned()
}
