//! What the tests share: where the built tool and the prepared models are, and how outputs are read and compared.

pub mod broker;
pub mod bus;
pub mod chatty;
pub mod daemon;
pub mod default_model;
pub mod small_disk;
pub mod tiny;

use std::fs::OpenOptions;
use std::io::{BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::Command;

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

/// A test has not run here for want of something. The test runner keeps what a test says that passes to itself, so
/// `make test` shows these lines at its end.
///
/// # Panics
/// When that cannot be written down.
pub fn skipped(test: &str, reason: &str) {
    let list = root().join("target/skipped-tests");
    let mut list = OpenOptions::new().append(true).create(true).open(list).expect("target/ is there");
    writeln!(list, "{test}: {reason}").expect("target/ has room");
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

/// Shape and values of a .npy file, row-major.
///
/// # Panics
/// When it is not one, or holds another type or columns.
pub fn npy<T: npyz::Deserialize>(path: &Path) -> (Vec<u64>, Vec<T>) {
    let file = std::fs::File::open(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let file = npyz::NpyFile::new(BufReader::new(file)).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    assert_eq!(file.order(), npyz::Order::C, "{} is row-major", path.display());
    (file.shape().to_vec(), file.into_vec().unwrap_or_else(|error| panic!("{}: {error}", path.display())))
}

/// What `sparsectl logits` answers.
#[derive(Debug)]
pub struct Answer {
    /// `[L, vocabulary]`
    pub logits: Vec<f32>,
    /// `[index layers, L, k]`, ascending, -1 padded; empty when they were not asked for.
    pub selections: Vec<i32>,
}

/// Runs `sparsectl logits` on a file or folder.
///
/// # Panics
/// When it fails, with what it said.
pub fn logits(model: &Path, ids: &[u32], selections: bool, extra: &[&str]) -> Answer {
    let dir = tempfile::tempdir().unwrap_or_else(|error| panic!("a temporary folder: {error}"));
    let file = |name: &str| dir.path().join(name);
    std::fs::write(file("ids.json"), format!("{ids:?}")).unwrap_or_else(|error| panic!("ids.json: {error}"));
    let mut command = Command::new(sparsectl());
    command.arg("logits").arg("--model").arg(model);
    command.arg("--ids").arg(file("ids.json")).arg("--out").arg(file("logits.npy")).args(extra);
    if selections {
        command.arg("--topk-out").arg(file("topk.npy"));
    }
    let done = command.output().unwrap_or_else(|error| panic!("sparsectl: {error}"));
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    let selections = if selections { npy(&file("topk.npy")).1 } else { Vec::new() };
    Answer { logits: npy(&file("logits.npy")).1, selections }
}

/// The largest difference of two answers.
///
/// # Panics
/// When there is not a number for each number.
pub fn worst(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len(), "as many logits");
    assert!(a.iter().chain(b).all(|value| value.is_finite()), "logits are numbers");
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}
