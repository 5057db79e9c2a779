//! Links the plugin as the ABI wants it: one exported symbol, resolved at load, never unloaded.

fn main() {
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/exports.map");
    println!("cargo:rerun-if-changed={script}");
    for argument in [format!("-Wl,--version-script={script}"), "-Wl,-z,nodelete,-z,now,-z,relro".to_owned()] {
        println!("cargo:rustc-cdylib-link-arg={argument}");
    }
}
