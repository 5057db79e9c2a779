//! `sparsectl logits` against reference outputs that other code computed (tests/golden/README.md).
#![allow(clippy::unwrap_used, missing_docs, reason = "a test")]

use npyz::NpyFile;
use std::path::Path;
use std::process::Command;

/// Row and column-wise access to a .npy file.
fn read<T: npyz::Deserialize>(path: &Path) -> (Vec<u64>, Vec<T>) {
    let file = NpyFile::new(std::io::BufReader::new(std::fs::File::open(path).unwrap())).unwrap();
    (file.shape().to_vec(), file.into_vec().unwrap())
}

fn golden<T: npyz::Deserialize>(name: &str) -> Vec<T> {
    read(&sparsed_tests::root().join("tests/golden").join(format!("{name}.npy"))).1
}

/// Logits `[384, vocab]`, and selections `[30, 384, k]` unless dense, of the reference prompt.
fn logits(model: &str, top_k: u32, extra: &[&str]) -> (Vec<f32>, Vec<i32>) {
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str| dir.path().join(name);
    let ids = serde_json::to_string(&golden::<u32>("ids")).unwrap();
    std::fs::write(file("ids.json"), ids).unwrap();
    let mut command = Command::new(sparsed_tests::sparsectl());
    command.arg("logits").arg("--model").arg(sparsed_tests::model(model));
    command.arg("--ids").arg(file("ids.json")).arg("--out").arg(file("logits.npy"));
    command.arg("--top-k").arg(top_k.to_string()).args(extra);
    if top_k > 0 {
        command.arg("--topk-out").arg(file("topk.npy"));
    }
    let done = command.output().unwrap();
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    let selections = if top_k > 0 { read(&file("topk.npy")).1 } else { Vec::new() };
    (read(&file("logits.npy")).1, selections)
}

fn argmax(row: &[f32]) -> u32 {
    let best = (0u32..).zip(row).fold((0, f32::NEG_INFINITY), |best, (i, &v)| if v > best.1 { (i, v) } else { best });
    best.0
}

const VOCAB: usize = 49152;

/// The F16-indexer model in f32 against the reference: 8 last rows at fixed columns, argmax and selections.
fn check_reference(name: &str, top_k: u32, extra: &[&str]) {
    let (logits, selections) = logits("smollm2-135m-dsa-f16.gguf", top_k, extra);
    let rows: Vec<&[f32]> = logits.chunks_exact(VOCAB).collect();
    assert_eq!(rows.len(), 384);
    let found: Vec<u32> = rows.iter().map(|row| argmax(row)).collect();
    assert_eq!(found, golden::<u32>(&format!("argmax_{name}")));
    let columns = golden::<u32>("columns");
    let expected = golden::<f32>(&format!("logits_{name}"));
    for (row, expected) in rows[376..].iter().zip(expected.chunks_exact(columns.len())) {
        for (&column, expected) in columns.iter().zip(expected) {
            let difference = (row[column as usize] - expected).abs();
            assert!(difference < 1e-3, "column {column} differs by {difference}");
        }
    }
    if top_k > 0 {
        let k = top_k as usize;
        let last: Vec<i32> = selections.chunks_exact(384 * k).flat_map(|layer| layer[376 * k..].to_vec()).collect();
        let expected: Vec<i32> = golden::<u16>(&format!("topk_{name}")).into_iter().map(i32::from).collect();
        assert_eq!(last, expected, "a selection differs");
    }
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
    let worst = converted.iter().zip(&base).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(worst < 2e-4, "logits differ by {worst}");
}

#[test]
fn chunks_and_threads_do_not_change_a_bit() {
    let (whole, _) = logits("smollm2-135m-dsa.gguf", 64, &["--act", "int8", "-t", "1"]);
    let (pieces, _) = logits("smollm2-135m-dsa.gguf", 64, &["--act", "int8", "-t", "2", "--chunk", "5"]);
    assert!(whole.iter().zip(&pieces).all(|(a, b)| a.to_bits() == b.to_bits()));
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

#[test]
fn the_default_model_knows_the_capital_of_france_at_every_level() {
    for level in ["scalar", "avx2", "avx512"] {
        let done = Command::new(sparsed_tests::sparsectl())
            .args(["run", "--plugin-set", &format!("level={level}"), "--model"])
            .arg(sparsed_tests::model("smollm2-135m-dsa.gguf"))
            .arg("What is the capital of France?")
            .output()
            .unwrap();
        let error = String::from_utf8_lossy(&done.stderr);
        if level != "scalar" && error.contains("this CPU does not have it") {
            continue;
        }
        assert!(done.status.success(), "{error}");
        assert_eq!(String::from_utf8_lossy(&done.stdout).trim(), "The capital of France is Paris.", "level {level}");
    }
}
