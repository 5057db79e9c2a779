//! What the fuzz targets begin with is read or refused, and never panics, in every build.
#![allow(clippy::unwrap_used, missing_docs, reason = "a test")]

use sparsed_model::{ModelSpec, SafetensorsHeader};
use std::path::Path;

/// Names of the seeds under `target` that `read` accepts; all are read.
fn accepted(target: &str, read: impl Fn(&[u8]) -> bool) -> Vec<String> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fuzz/seeds").join(target);
    let entries: Vec<_> = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()).collect();
    assert!(entries.len() > 10, "the seeds are there");
    let mut names: Vec<String> = entries
        .iter()
        .filter(|path| read(&std::fs::read(path).unwrap()))
        .map(|path| path.file_stem().unwrap().to_str().unwrap().to_owned())
        .collect();
    names.sort();
    names
}

#[test]
fn of_the_configurations_only_the_whole_ones_are_read() {
    let read = accepted("config", |text| ModelSpec::from_config(text).is_ok());
    assert_eq!(read, ["deepseek-v2-lite", "deepseek-v3.2", "glm-5.2", "listed-types", "pattern"]);
}

#[test]
fn of_the_headers_only_the_whole_ones_are_read() {
    let read = accepted("safetensors", |file| SafetensorsHeader::parse("seed", file).is_ok());
    assert_eq!(read, ["empty", "fp8", "two"]);
}
