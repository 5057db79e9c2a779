//! How does a status of the C ABI become a `Result`?

use crate::BackendError;
use sparsed_abi::{OK, SpdError, SpdStatus};
use sparsed_plugin_kit::struct_size;
use std::ffi::c_char;

/// Runs `call` with a fresh error to fill.
///
/// # Errors
/// [`BackendError::Call`] with the plugin's words when the status is not `SPD_OK`.
pub(crate) fn checked(name: &'static str, call: impl FnOnce(*mut SpdError) -> SpdStatus) -> Result<(), BackendError> {
    let mut error =
        SpdError { struct_size: struct_size::<SpdError>(), op_index: u32::MAX, block: u64::MAX, ..SpdError::default() };
    let status = call(&raw mut error);
    if status == OK {
        return Ok(());
    }
    let message = text(&error.message);
    let message = if message.is_empty() { "the plugin gave no reason".to_owned() } else { message };
    let op_index = (error.op_index != u32::MAX).then_some(error.op_index);
    Err(BackendError::Call { call: name, status, message, op_index })
}

/// A fixed-size, NUL-terminated field as text; what is not UTF-8 is replaced.
pub(crate) fn text(field: &[c_char]) -> String {
    let bytes: Vec<u8> = field.iter().take_while(|&&c| c != 0).map(|&c| c.cast_unsigned()).collect();
    String::from_utf8_lossy(&bytes).into_owned()
}
