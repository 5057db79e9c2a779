//! Can any text make the reader of `config.json` panic, or give a spec that contradicts itself?
#![no_main]

#[path = "../shared/models.rs"]
#[allow(dead_code, reason = "each target uses a part")]
mod models;

use libfuzzer_sys::fuzz_target;
use sparsed_model::ModelSpec;

fuzz_target!(|text: &[u8]| {
    let Ok(spec) = ModelSpec::from_config(text) else { return };
    models::check(&spec);
});
