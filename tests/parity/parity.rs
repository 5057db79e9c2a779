//! `sparsectl logits` against reference outputs that other code computed (tests/golden/README.md).
#![allow(clippy::unwrap_used, missing_docs, reason = "a test")]

use sparsed_tests::default_model::{VOCAB, argmax, check, golden, kept};
use std::process::Command;

/// Logits `[384, vocab]`, and selections `[30, 384, k]` unless dense, of the reference prompt.
fn logits(model: &str, top_k: u32, extra: &[&str]) -> (Vec<f32>, Vec<i32>) {
    let top_k_argument = top_k.to_string();
    let extra = [&["--top-k", &top_k_argument], extra].concat();
    let answer = sparsed_tests::logits(&sparsed_tests::model(model), &golden::<u32>("ids"), top_k > 0, &extra);
    (answer.logits, answer.selections)
}

/// The F16-indexer model in f32 against the reference: 8 last rows at fixed columns, argmax and selections.
fn check_reference(name: &str, top_k: u32, extra: &[&str]) {
    let (logits, selections) = logits("smollm2-135m-dsa-f16.gguf", top_k, extra);
    check(name, top_k as usize, &logits, &selections);
}

#[test]
fn selecting_64_tokens_equals_the_reference() {
    check_reference("k64", 64, &["--act", "f32"]);
}

#[test]
fn selecting_128_tokens_equals_the_reference_in_odd_chunks() {
    check_reference("k128", 128, &["--act", "f32", "--chunk", "37"]);
}

#[test]
fn dense_attention_equals_the_reference() {
    check_reference("dense", 0, &["--act", "f32"]);
}

#[test]
fn the_scalar_level_equals_the_reference_too() {
    check_reference("k64", 64, &["--act", "f32", "--plugin-set", "level=scalar"]);
}

#[test]
fn the_converted_model_is_the_base_exactly_when_dense() {
    let (converted, _) = logits("smollm2-135m-dsa.gguf", 0, &["--act", "f32"]);
    let (base, _) = logits("SmolLM2-135M-Instruct.Q4_1.gguf", 0, &["--act", "f32"]);
    let worst = sparsed_tests::worst(&converted, &base);
    assert!(worst < 2e-4, "logits differ by {worst}");
}

#[test]
fn the_converted_model_is_what_hugging_face_reads_in_the_base_file() {
    let (converted, _) = logits("smollm2-135m-dsa.gguf", 0, &["--act", "f32"]);
    let worst = sparsed_tests::worst(&kept(&converted), &golden::<f32>("logits_hf"));
    assert!(worst < 2e-4, "logits differ by {worst}");
}

#[test]
fn chunks_and_threads_do_not_change_a_bit() {
    for act in ["int16", "int8"] {
        let (whole, _) = logits("smollm2-135m-dsa.gguf", 64, &["--act", act, "-t", "1"]);
        let (pieces, _) = logits("smollm2-135m-dsa.gguf", 64, &["--act", act, "-t", "2", "--chunk", "5"]);
        assert!(whole.iter().zip(&pieces).all(|(a, b)| a.to_bits() == b.to_bits()), "{act}");
    }
}

/// 16-bit activations, f16 latents and q8_0 index keys against the reference, which is f32 throughout.
#[test]
fn the_default_mode_chooses_the_tokens_that_f32_does() {
    for (name, top_k) in [("k64", 64), ("dense", 0)] {
        let (logits, _) = logits("smollm2-135m-dsa-f16.gguf", top_k, &[]);
        let expected = golden::<u32>(&format!("argmax_{name}"));
        let same = logits.chunks_exact(VOCAB).zip(expected).filter(|(row, id)| argmax(row) == *id).count();
        assert!(same * 1000 >= 384 * 995, "{name}: argmax agrees on {same} of 384 rows");
    }
}

#[test]
fn a_q8_0_indexer_selects_nearly_what_f16_does() {
    let (f16, f16_sel) = logits("smollm2-135m-dsa-f16.gguf", 64, &["--act", "f32"]);
    let (q8, q8_sel) = logits("smollm2-135m-dsa.gguf", 64, &["--act", "f32"]);
    let pairs = f16.chunks_exact(VOCAB).zip(q8.chunks_exact(VOCAB));
    let same = pairs.filter(|(a, b)| argmax(a) == argmax(b)).count();
    assert!(same * 100 >= 384 * 99, "argmax agrees on {same} of 384 rows");
    let (mut kept, mut all) = (0, 0);
    for (a, b) in f16_sel.chunks_exact(64).zip(q8_sel.chunks_exact(64)) {
        let chosen = a.iter().filter(|&&s| s >= 0);
        all += chosen.clone().count();
        kept += chosen.filter(|s| b.contains(s)).count();
    }
    assert!(kept * 1000 >= all * 995, "{kept} of {all} selected tokens are the same");
}

/// What `sparsectl run` says at temperature 0; `None` when this CPU lacks the level.
fn said(prompt: &str, extra: &[&str]) -> Option<String> {
    let done = Command::new(sparsed_tests::sparsectl())
        .args(["run", "--temperature", "0", "--max-tokens", "40"])
        .args(extra)
        .arg(sparsed_tests::model("smollm2-135m-dsa.gguf"))
        .arg(prompt)
        .output()
        .unwrap();
    let error = String::from_utf8_lossy(&done.stderr);
    if error.contains("this CPU does not have it") {
        return None;
    }
    assert!(done.status.success(), "{error}");
    Some(String::from_utf8(done.stdout).unwrap().trim_end().to_owned())
}

/// The texts were made with scalar kernels and f32 activations; every other path gives them too.
#[test]
fn golden_texts_come_out_at_every_level_and_in_the_default_mode() {
    let path = sparsed_tests::root().join("tests/golden/text.json");
    let texts: serde_json::Value = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    let texts = texts.as_array().unwrap();
    assert!(texts.len() >= 5);
    for text in texts {
        let (prompt, answer) = (text["prompt"].as_str().unwrap(), text["answer"].as_str().unwrap());
        for level in ["level=avx2", "level=avx512"] {
            for act in ["f32", "int16"] {
                if let Some(said) = said(prompt, &["--act", act, "--plugin-set", level]) {
                    assert_eq!(said, answer, "{prompt} at {level}, {act}");
                }
            }
        }
        // Slow, so only for short answers.
        if answer.len() < 50 {
            for act in ["f32", "int16"] {
                let said = said(prompt, &["--act", act, "--plugin-set", "level=scalar"]);
                assert_eq!(said.as_deref(), Some(answer), "{prompt}, scalar {act}");
            }
        }
    }
}
