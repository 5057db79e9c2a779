//! Can any bytes make the reader of an exported session panic?
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|file: &[u8]| {
    drop(sparsed_session::probe::export(file));
});
