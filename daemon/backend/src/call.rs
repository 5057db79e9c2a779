//! How does a status of the C ABI become a `Result`, and a plugin's words a line that can be shown?

use crate::BackendError;
use sparsed_abi::{OK, SpdError, SpdStatus};
use sparsed_plugin_kit::struct_size;
use std::ffi::c_char;

/// Longest text of a plugin that is kept, in characters: some lines of a terminal.
pub(crate) const TEXT_CHARS_MAX: usize = 1024;

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
    // What is no block's number names none.
    let block = u32::try_from(error.block).ok();
    Err(BackendError::Call { call: name, status, message, op_index, block, vendor_code: error.vendor_code })
}

/// A fixed-size, NUL-terminated field as text.
pub(crate) fn text(field: &[c_char]) -> String {
    // C's char has a sign on x86-64 and none on aarch64.
    let bytes: Vec<u8> = field.iter().take_while(|&&c| c != 0).flat_map(|c| c.to_ne_bytes()).collect();
    clean(&String::from_utf8_lossy(&bytes))
}

/// A plugin's words as they may go into logs, terminals and answers, which all its words go through once: one line,
/// cut, without what moves a cursor or turns the reading direction.
pub(crate) fn clean(words: &str) -> String {
    let moves = |c: char| {
        c.is_control() || matches!(c, '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
    };
    let line: String = words.chars().take(TEXT_CHARS_MAX).map(|c| if moves(c) { ' ' } else { c }).collect();
    line.trim_end().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use sparsed_abi::E_DATA;

    #[test]
    fn a_plugins_words_are_one_short_line_that_moves_no_cursor() {
        assert_eq!(clean("a\x1b[2Jb\r\nc\u{202e}d\u{9b}e  "), "a [2Jb  c d e");
        assert_eq!(clean(&"é".repeat(5000)).chars().count(), TEXT_CHARS_MAX);
    }

    #[test]
    fn an_error_keeps_what_the_plugin_filled_in() {
        let failed = checked("queue_run", |error| {
            // SAFETY: the error is the caller's own.
            let error = unsafe { &mut *error };
            (error.block, error.vendor_code, error.op_index) = (7, -700, 3);
            sparsed_plugin_kit::put_text(&mut error.message, "bad\x07page");
            E_DATA
        });
        let said = failed.unwrap_err();
        assert_eq!(said.to_string(), "queue_run: bad page (SPD_E_DATA) at operator 3, block 7, the driver's code -700");
        let silent = checked("health", |_| E_DATA).unwrap_err();
        assert_eq!(silent.to_string(), "health: the plugin gave no reason (SPD_E_DATA)");
    }
}
