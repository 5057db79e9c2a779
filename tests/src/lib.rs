//! What the tests share: where the built tool and the prepared models are.

pub mod daemon;

use std::path::{Path, PathBuf};

/// The root of the repository.
pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("tests/ has a parent")
}

/// The built `sparsectl`, with the staged plugins beside it.
///
/// # Panics
/// When `make build` has not run.
pub fn sparsectl() -> PathBuf {
    let path = root().join("target/release/sparsectl");
    assert!(path.exists(), "{} is not there: run `make test`", path.display());
    path
}

/// A prepared model by its file name.
///
/// # Panics
/// When `make models` has not run.
pub fn model(name: &str) -> PathBuf {
    let path = root().join("models").join(name);
    assert!(path.exists(), "{} is not there: run `make test`", path.display());
    path
}
