//! Can any text make the reader of `plugin.toml` panic, or name a file outside of the plugin's folder?
#![no_main]

use libfuzzer_sys::fuzz_target;
use sparsed_backend::Manifest;
use std::path::Path;

fuzz_target!(|text: &str| {
    let path = Path::new("plugin.toml");
    let Ok(manifest) = Manifest::parse(path, text, "acme") else { return };
    let Ok(library) = manifest.choose(path) else { return };
    assert_eq!(Path::new(&library.path).file_name(), Some(library.path.as_ref()));
    assert!(library.sha256.len() == 64 && library.needs.iter().all(|name| !name.contains('/')));
});
