//! `sparsectl logits` on tiny models of every kind, against Hugging Face and the oracle (tests/golden/README.md).
#![allow(clippy::unwrap_used, missing_docs, reason = "a test")]

use sparsed_oracle::{Model, Options, Output, forward};
use sparsed_quant::Format;
use sparsed_quant::gguf::Value;
use sparsed_tests::default_model::argmax;
use sparsed_tests::tiny::{TOLERANCE, Tiny, rewrite, rewrite_with};
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

/// Of a GGUF file, all rows.
fn oracle(model: &Path, ids: &[u32]) -> (Vec<f32>, Output<f64>) {
    let output = forward::<f64>(&Model::open(model).unwrap(), ids, &Options::default()).unwrap();
    #[expect(clippy::cast_possible_truncation, reason = "compared in single precision")]
    let logits = output.logits.values().iter().map(|&v| v as f32).collect();
    (logits, output)
}

fn check_gguf(name: &str) {
    let tiny = Tiny::open(name);
    check(name, &tiny, &tiny.gguf(), &tiny.logits_of_gguf);
    let worst = worst(&answer(&tiny, &tiny.gguf(), 256).logits, &oracle(&tiny.gguf(), &tiny.ids).0);
    assert!(worst < TOLERANCE, "{name}: logits differ from the oracle's by {worst}");
}

#[test]
fn a_v3_2_file_equals_hugging_face_and_the_oracle() {
    check_gguf("v32");
    check_gguf("v32-soft");
}

#[test]
fn a_glm_5_file_equals_hugging_face_and_the_oracle() {
    check_gguf("glm5");
}

#[test]
fn a_glm_5_2_file_with_shared_indexers_equals_hugging_face_and_the_oracle() {
    check_gguf("glm52");
}

#[test]
fn dense_files_of_v3_and_v2_equal_hugging_face_and_the_oracle() {
    check_gguf("v3");
    check_gguf("v2");
}

/// The Hugging Face folder with its config in both styles.
fn check_folder(name: &str) {
    let tiny = Tiny::open(name);
    check(name, &tiny, tiny.folder(), &tiny.logits);
    let dir = tempfile::tempdir().unwrap();
    std::fs::copy(tiny.folder().join("model.safetensors"), dir.path().join("model.safetensors")).unwrap();
    std::fs::copy(tiny.folder().join("config.hub.json"), dir.path().join("config.json")).unwrap();
    check(&format!("{name} in the style of model pages"), &tiny, dir.path(), &tiny.logits);
}

#[test]
fn hugging_face_folders_with_an_indexer_equal_hugging_face() {
    ["v32", "v32-soft", "glm5", "glm52"].into_iter().for_each(check_folder);
}

#[test]
fn hugging_face_folders_without_an_indexer_equal_hugging_face() {
    ["v3", "v2"].into_iter().for_each(check_folder);
}

#[test]
fn prompts_that_end_around_k_and_around_a_block_equal_hugging_face() {
    let tiny = Tiny::open("v32");
    let (vocab, layers) = (tiny.logits.len() / tiny.ids.len(), tiny.selections.len() / tiny.k / tiny.ids.len());
    for n in [1, tiny.k - 1, tiny.k, tiny.k + 1, 63, 64, 65] {
        let answer = sparsed_tests::logits(&tiny.gguf(), &tiny.ids[..n], true, &["--act", "f32", "--chunk", "5"]);
        let worst = worst(&answer.logits, &tiny.logits[..n * vocab]);
        assert!(worst < TOLERANCE, "{n} tokens: logits differ by {worst}");
        for layer in 0..layers {
            let expected = &tiny.selections[layer * tiny.ids.len() * tiny.k..][..n * tiny.k];
            assert_eq!(&answer.selections[layer * n * tiny.k..][..n * tiny.k], expected, "{n} tokens, layer {layer}");
        }
    }
}

/// Whether the answer of `model` is Hugging Face's of `tiny`, by what [`check`] demands; no error, but other numbers.
fn equals_hugging_face(tiny: &Tiny, model: &Path) -> bool {
    let answer = answer(tiny, model, 256);
    worst(&answer.logits, &tiny.logits) < TOLERANCE && tiny.other_selections(&answer.selections) == 0
}

/// These comparisons can fail: another layout of RoPE in the indexer is enough.
#[test]
fn an_indexer_that_rotates_in_the_other_layout_differs_from_hugging_face() {
    for (name, interleaved) in [("v32", true), ("glm5", false)] {
        let tiny = Tiny::open(name);
        let dir = tempfile::tempdir().unwrap();
        std::fs::copy(tiny.folder().join("model.safetensors"), dir.path().join("model.safetensors")).unwrap();
        let text = std::fs::read(tiny.folder().join("config.json")).unwrap();
        let mut config: serde_json::Value = serde_json::from_slice(&text).unwrap();
        for (value, equal) in [(!interleaved, true), (interleaved, false)] {
            config["indexer_rope_interleave"] = value.into();
            std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
            assert_eq!(equals_hugging_face(&tiny, dir.path()), equal, "{name}, interleaved: {value}");
        }
    }
}

/// So is a lost bias of the index keys' LayerNorm.
#[test]
fn an_index_key_without_its_bias_differs_from_hugging_face() {
    let tiny = Tiny::open("v32");
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("model.gguf");
    for zeroed in [false, true] {
        rewrite(&tiny.gguf(), &file, |mut tensors| {
            let biases = tensors.iter_mut().filter(|tensor| zeroed && tensor.name.ends_with("indexer.k_norm.bias"));
            biases.for_each(|bias| bias.values.fill(0.0));
            tensors
        });
        assert_eq!(equals_hugging_face(&tiny, &file), !zeroed, "bias zeroed: {zeroed}");
    }
}

/// So is a lost ReLU. A file can undo it: with every index head there twice, the second time with its query negated and
/// its weight times `weight`, a score is `sum w (relu(q k) + weight relu(-q k))`, and for -1 that is `sum w q k`.
#[test]
fn index_scores_without_relu_differ_from_hugging_face() {
    let tiny = Tiny::open("v32");
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("model.gguf");
    for (weight, equal) in [(0.0, true), (-1.0, false)] {
        rewrite_with(&tiny.gguf(), &file, |metadata, mut tensors| {
            let key = "deepseek32.attention.indexer.head_count";
            let heads = metadata.u32(key).unwrap().unwrap();
            metadata.set(key, Value::U32(2 * heads));
            for tensor in &mut tensors {
                let factor = match &tensor.name {
                    name if name.ends_with("indexer.attn_q_b.weight") => -1.0,
                    name if name.ends_with("indexer.proj.weight") => weight,
                    _ => continue,
                };
                tensor.dims[1] *= 2;
                tensor.values.extend(tensor.values.clone().iter().map(|value| factor * value));
            }
            tensors
        });
        assert_eq!(equals_hugging_face(&tiny, &file), equal, "the second heads have {weight} of the first's weight");
    }
}

/// The same model with matrices in `format`; routers and `indexer.proj` stay as they are, the indexer is Q8_0 at least.
fn quantised(tiny: &Tiny, format: Format, to: &Path) {
    rewrite(&tiny.gguf(), to, |mut tensors| {
        let matrices = tensors.iter_mut().filter(|tensor| tensor.dims.len() > 1);
        for tensor in matrices.filter(|t| !t.name.ends_with("ffn_gate_inp.weight") && !t.name.ends_with("proj.weight"))
        {
            tensor.format = if tensor.name.contains("indexer") { Format::Q8_0 } else { format };
        }
        tensors
    });
}

fn correlation(a: &[f32], b: &[f32]) -> f64 {
    let mean = |x: &[f32]| x.iter().copied().map(f64::from).sum::<f64>() / x.len() as f64;
    let (ma, mb) = (mean(a), mean(b));
    let sum = |f: &dyn Fn(f64, f64) -> f64| a.iter().zip(b).map(|(&a, &b)| f(a.into(), b.into())).sum::<f64>();
    let covariance = sum(&|a, b| (a - ma) * (b - mb));
    covariance / (sum(&|a, _| (a - ma).powi(2)) * sum(&|_, b| (b - mb).powi(2))).sqrt()
}

/// Quantised weights lose what they must, against Hugging Face, and nothing more, against the oracle on the same file.
fn check_quantised(format: Format, least_correlation: f64, least_argmax: f64) {
    let tiny = Tiny::open("v32-soft");
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("model.gguf");
    quantised(&tiny, format, &file);
    let answer = answer(&tiny, &file, 256);
    let (logits, output) = oracle(&file, &tiny.ids);
    let worst = worst(&answer.logits, &logits);
    assert!(worst < TOLERANCE, "{format:?}: logits differ from the oracle's by {worst}");
    let positions = output.selections.iter().flat_map(|s| s.positions.iter().zip(&s.margins));
    for ((expected, &margin), found) in positions.zip(answer.selections.chunks_exact(tiny.k)) {
        let found: Vec<usize> = found.iter().filter_map(|&s| usize::try_from(s).ok()).collect();
        assert!(margin < 1e-5 || found == *expected, "{format:?}: a selection differs");
    }
    let correlation = correlation(&answer.logits, &tiny.logits);
    assert!(correlation >= least_correlation, "{format:?}: correlation {correlation}");
    let vocab = tiny.logits.len() / tiny.ids.len();
    let rows = answer.logits.chunks_exact(vocab).zip(tiny.logits.chunks_exact(vocab));
    let same = rows.filter(|(a, b)| argmax(a) == argmax(b)).count() as f64 / tiny.ids.len() as f64;
    assert!(same >= least_argmax, "{format:?}: argmax equal on {same} of the rows");
}

#[test]
fn q8_0_weights_keep_nearly_every_answer() {
    check_quantised(Format::Q8_0, 0.998, 0.96);
}

#[test]
fn q4_0_weights_keep_most_answers() {
    check_quantised(Format::Q4_0, 0.986, 0.74);
}
