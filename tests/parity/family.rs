//! `sparsectl logits` on tiny models of every kind, against Hugging Face and the oracle (tests/golden/README.md).
#![allow(clippy::unwrap_used, missing_docs, reason = "a test")]

use sparsed_oracle::{Model, Options, forward};
use sparsed_tests::tiny::{TOLERANCE, Tiny};
use sparsed_tests::{Answer, worst};
use std::path::Path;

/// In f32, in steps of `chunk` tokens.
fn answer(tiny: &Tiny, model: &Path, chunk: usize) -> Answer {
    let arguments = ["--act", "f32", "--chunk", &chunk.to_string()];
    sparsed_tests::logits(model, &tiny.ids, !tiny.selections.is_empty(), &arguments)
}

/// One step, odd chunks and token by token: each equals Hugging Face.
fn check(name: &str, tiny: &Tiny, model: &Path, expected: &[f32]) {
    for chunk in [tiny.ids.len(), 7, 1] {
        let answer = answer(tiny, model, chunk);
        let worst = worst(&answer.logits, expected);
        assert!(worst < TOLERANCE, "{name} in chunks of {chunk}: logits differ by {worst}");
        assert_eq!(tiny.other_selections(&answer.selections), 0, "{name} in chunks of {chunk}: selections differ");
    }
}

fn check_gguf(name: &str) {
    let tiny = Tiny::open(name);
    check(name, &tiny, &tiny.gguf(), &tiny.logits_of_gguf);
    let oracle = forward::<f64>(&Model::open(&tiny.gguf()).unwrap(), &tiny.ids, &Options::default()).unwrap();
    #[expect(clippy::cast_possible_truncation, reason = "compared in single precision")]
    let oracle: Vec<f32> = oracle.logits.values().iter().map(|&v| v as f32).collect();
    let worst = worst(&answer(&tiny, &tiny.gguf(), 256).logits, &oracle);
    assert!(worst < TOLERANCE, "{name}: logits differ from the oracle's by {worst}");
}

#[test]
fn a_v3_2_file_equals_hugging_face_and_the_oracle() {
    check_gguf("v32");
    check_gguf("v32-soft");
}
