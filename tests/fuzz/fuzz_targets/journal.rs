//! Can any bytes make the reader of a session's journal panic?
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|file: &[u8]| {
    drop(sparsed_session::probe::journal(file));
});
