//! Can any bytes make the reader of a KV file's header panic?
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|file: &[u8]| {
    sparsed_session::probe::kv(file);
});
