//! Can any bytes make the reader of safetensors headers panic, or name bytes outside the file?
#![no_main]

use libfuzzer_sys::fuzz_target;
use sparsed_model::SafetensorsHeader;

fuzz_target!(|file: &[u8]| {
    let Ok(header) = SafetensorsHeader::parse("fuzz", file) else { return };
    for (_, range) in header.tensors() {
        assert!(range.start <= range.end && range.end <= file.len());
    }
});
