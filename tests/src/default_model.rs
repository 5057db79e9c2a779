//! What must the default model answer? Its reference outputs in `tests/golden`.

use crate::{npy, root};

/// Width of a row of logits.
pub const VOCAB: usize = 49152;
/// Largest difference of a logit.
pub const TOLERANCE: f32 = 1e-3;
/// Tokens of the prompt, and how many of the last have all their outputs kept.
const TOKENS: usize = 384;
const LAST: usize = 8;

/// The values of `tests/golden/{name}.npy`.
///
/// # Panics
/// When it is not there.
pub fn golden<T: npyz::Deserialize>(name: &str) -> Vec<T> {
    npy(&root().join("tests/golden").join(format!("{name}.npy"))).1
}

/// The place of a row's greatest value, the first of equals.
pub fn argmax(row: &[f32]) -> u32 {
    let best = (0u32..).zip(row).fold((0, f32::NEG_INFINITY), |best, (i, &v)| if v > best.1 { (i, v) } else { best });
    best.0
}

/// The last rows of `logits` at the columns that are kept.
pub fn kept(logits: &[f32]) -> Vec<f32> {
    let columns = golden::<u32>("columns");
    let rows = logits.chunks_exact(VOCAB).skip(logits.len() / VOCAB - LAST);
    rows.flat_map(|row| columns.iter().map(|&column| row[column as usize])).collect()
}

/// Compares all 384 rows, and with `k` selected tokens the selections `[30, 384, k]`, with the reference called `name`.
///
/// # Panics
/// When they differ.
pub fn check(name: &str, k: usize, logits: &[f32], selections: &[i32]) {
    assert_eq!(logits.len(), TOKENS * VOCAB);
    let found: Vec<u32> = logits.chunks_exact(VOCAB).map(argmax).collect();
    assert_eq!(found, golden::<u32>(&format!("argmax_{name}")));
    let worst = crate::worst(&kept(logits), &golden::<f32>(&format!("logits_{name}")));
    assert!(worst < TOLERANCE, "logits differ by {worst}");
    if k > 0 {
        let last = selections.chunks_exact(TOKENS * k).flat_map(|layer| layer[(TOKENS - LAST) * k..].to_vec());
        let expected = golden::<u16>(&format!("topk_{name}")).into_iter().map(i32::from);
        assert_eq!(last.collect::<Vec<_>>(), expected.collect::<Vec<_>>(), "a selection differs");
    }
}
