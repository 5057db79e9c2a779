//! Can any metadata make the reader of a GGUF's hyperparameters panic, or give a model that contradicts itself?
#![no_main]

#[path = "../shared/models.rs"]
#[allow(dead_code, reason = "each target uses a part")]
mod models;

use libfuzzer_sys::fuzz_target;

fuzz_target!(|edits: &str| {
    let path = models::scratch("hyperparameters").join("m.gguf");
    models::write_gguf(&path, edits);
    drop(models::open(&path));
});
