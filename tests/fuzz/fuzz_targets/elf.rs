//! Can any bytes make the reader of a plugin's ELF headers panic?
#![no_main]

use libfuzzer_sys::fuzz_target;
use sparsed_backend::ElfFacts;
use std::path::Path;

fuzz_target!(|bytes: &[u8]| {
    let Ok(facts) = ElfFacts::parse(bytes) else { return };
    if facts.check(Path::new("lib.so"), &[]).is_ok() {
        assert!(facts.is_shared && facts.exports == ["spd_get_api"] && !facts.needs_executable_stack);
    }
});
