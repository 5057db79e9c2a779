//! Can any index of safetensors files, or any `quantization_config`, make the reader of a folder panic?
#![no_main]

#[path = "../shared/models.rs"]
#[allow(dead_code, reason = "each target uses a part")]
mod models;

use libfuzzer_sys::fuzz_target;
use std::path::PathBuf;
use std::sync::OnceLock;

fn folder() -> &'static PathBuf {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    FOLDER.get_or_init(|| {
        let folder = models::scratch("index");
        models::write_shards(&folder);
        folder
    })
}

fuzz_target!(|input: &[u8]| {
    models::write_index(folder(), input);
    drop(models::open(folder()));
});
