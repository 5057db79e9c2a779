//! The oracle against what other code computed: before it judges the product, it is judged (tests/golden/README.md).
#![allow(clippy::unwrap_used, missing_docs, reason = "a test")]

use sparsed_oracle::{Mistake, Model, Options, Output, Real, Selection, forward};
use sparsed_tests::tiny::{TOLERANCE, Tensor, Tiny, rewrite};
use sparsed_tests::{default_model, worst};

/// Of each kind one; the last two have no indexer.
const KINDS: [&str; 6] = ["v32", "v32-soft", "glm5", "glm52", "v3", "v2"];

fn singles<T: Real>(output: &Output<T>) -> Vec<f32> {
    #[expect(clippy::cast_possible_truncation, reason = "compared in single precision")]
    output.logits.values().iter().map(|&v| Into::<f64>::into(v) as f32).collect()
}

/// `[index layers, L, k]`, -1 padded.
fn padded(selections: &[Selection], k: usize) -> Vec<i32> {
    let rows = selections.iter().flat_map(|selection| &selection.positions);
    rows.flat_map(|row| (0..k).map(|i| row.get(i).map_or(-1, |&s| i32::try_from(s).unwrap()))).collect()
}

fn check_default(name: &str, k: usize) {
    let model = Model::open(&sparsed_tests::model("smollm2-135m-dsa-f16.gguf")).unwrap();
    let options = Options { top_k: Some(k), ..Options::default() };
    let output = forward::<f32>(&model, &default_model::golden::<u32>("ids"), &options).unwrap();
    default_model::check(name, k, &singles(&output), &padded(&output.selections, k));
}

#[test]
fn on_the_default_model_with_64_tokens_it_equals_the_reference() {
    check_default("k64", 64);
}

#[test]
fn on_the_default_model_with_128_tokens_it_equals_the_reference() {
    check_default("k128", 128);
}

#[test]
fn on_the_default_model_without_selection_it_equals_the_reference() {
    check_default("dense", 0);
}

#[test]
fn a_llama_file_it_reads_as_hugging_face_does() {
    let model = Model::open(&sparsed_tests::model("SmolLM2-135M-Instruct.Q4_1.gguf")).unwrap();
    let options = Options { last_rows: Some(8), ..Options::default() };
    let output = forward::<f32>(&model, &default_model::golden::<u32>("ids"), &options).unwrap();
    let worst = worst(&default_model::kept(&singles(&output)), &default_model::golden::<f32>("logits_hf"));
    assert!(worst < 2e-4, "logits differ by {worst}");
}

fn check_tiny<T: Real>(name: &str) {
    let tiny = Tiny::open(name);
    let output = forward::<T>(&Model::open(&tiny.gguf()).unwrap(), &tiny.ids, &Options::default()).unwrap();
    let worst = worst(&singles(&output), &tiny.logits_of_gguf);
    assert!(worst < TOLERANCE, "{name}: logits differ by {worst}");
    assert_eq!(tiny.other_selections(&padded(&output.selections, tiny.k)), 0, "{name}: selections differ");
    let margins: Vec<f64> = output.selections.iter().flat_map(|selection| selection.margins.clone()).collect();
    assert_eq!(margins.len(), tiny.margins.len());
    for (found, &expected) in margins.into_iter().zip(&tiny.margins) {
        let expected = f64::from(expected);
        assert!(
            found == expected || (found - expected).abs() < f64::from(TOLERANCE),
            "{name}: margin {found} is not {expected}"
        );
    }
}

#[test]
fn every_kind_of_model_equals_hugging_face_in_f32() {
    KINDS.iter().for_each(|name| check_tiny::<f32>(name));
}

#[test]
fn every_kind_of_model_equals_hugging_face_in_f64() {
    KINDS.iter().for_each(|name| check_tiny::<f64>(name));
}

/// The tensors of `v3` as older files have them: `attn_kv_b` in one piece, and the two parts of `attn_kv_a_mqa` apart.
fn older(tensors: Vec<Tensor>) -> Vec<Tensor> {
    let (latent, nope, v_head) = (48, 24, 20);
    let mut out: Vec<Tensor> = Vec::new();
    for mut tensor in tensors {
        if let Some(layer) = tensor.name.strip_suffix("attn_kv_a_mqa.weight").map(str::to_owned) {
            let rope = tensor.values.split_off(latent * usize::try_from(tensor.dims[0]).unwrap());
            let dims = vec![tensor.dims[0], tensor.dims[1] - latent as u64];
            out.push(Tensor { name: format!("{layer}attn_k_rope.weight"), dims, values: rope, ..tensor.clone() });
            (tensor.name, tensor.dims[1]) = (format!("{layer}attn_kv_a.weight"), latent as u64);
        } else if let Some(layer) = tensor.name.strip_suffix("attn_v_b.weight") {
            let name = format!("{layer}attn_kv_b.weight");
            let k_b = out.pop().unwrap();
            assert!(k_b.name.ends_with("attn_k_b.weight"), "{} comes before {}", k_b.name, tensor.name);
            let heads = k_b.values.chunks_exact(latent * nope).zip(tensor.values.chunks_exact(v_head * latent));
            let both = |(k, v): (&[f32], &[f32])| -> Vec<f32> {
                let turned = (0..nope).flat_map(|n| k.iter().skip(n).step_by(nope));
                turned.chain(v).copied().collect()
            };
            let values: Vec<f32> = heads.flat_map(both).collect();
            tensor = Tensor { name, dims: vec![latent as u64, (values.len() / latent) as u64], values, ..tensor };
        }
        out.push(tensor);
    }
    out
}

#[test]
fn the_older_division_of_tensors_is_the_same_model() {
    let tiny = Tiny::open("v3");
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("model.gguf");
    rewrite(&tiny.gguf(), &file, older);
    let output = forward::<f32>(&Model::open(&file).unwrap(), &tiny.ids, &Options::default()).unwrap();
    let worst = worst(&singles(&output), &tiny.logits);
    assert!(worst < TOLERANCE, "logits differ by {worst}");
}

/// How much a deliberate mistake shows: the largest difference of a logit, and the share of other selections among
/// those that had a choice.
fn shows(name: &str, mistake: Mistake) -> (f32, f64) {
    let tiny = Tiny::open(name);
    let options = Options { mistake: Some(mistake), ..Options::default() };
    let output = forward::<f32>(&Model::open(&tiny.gguf()).unwrap(), &tiny.ids, &options).unwrap();
    let other = tiny.other_selections(&padded(&output.selections, tiny.k));
    let choices = tiny.margins.iter().filter(|margin| margin.is_finite()).count();
    (worst(&singles(&output), &tiny.logits_of_gguf), other as f64 / choices as f64)
}

#[test]
fn the_comparison_notices_each_mistake_in_the_indexer() {
    for name in ["v32", "glm5", "glm52"] {
        for mistake in [Mistake::IndexerRopeStyle, Mistake::NoRelu, Mistake::NoKNormBias] {
            let (worst, other) = shows(name, mistake);
            assert!(worst > 1000.0 * TOLERANCE, "{name}, {mistake:?}: logits differ only by {worst}");
            assert!(other > 0.2, "{name}, {mistake:?}: only {other} of the selections are others");
        }
    }
}

#[test]
fn selection_matters_on_every_sparse_fixture() {
    for name in ["v32", "v32-soft", "glm5", "glm52"] {
        let tiny = Tiny::open(name);
        let options = Options { top_k: Some(0), ..Options::default() };
        let output = forward::<f32>(&Model::open(&tiny.gguf()).unwrap(), &tiny.ids, &options).unwrap();
        let (dense, vocab) = (singles(&output), output.logits.width());
        let (seen_all, rest) = tiny.logits_of_gguf.split_at(tiny.k * vocab);
        assert!(worst(&dense[..seen_all.len()], seen_all) < TOLERANCE, "{name}: up to k tokens nothing is left out");
        assert!(worst(&dense[seen_all.len()..], rest) > 100.0 * TOLERANCE, "{name}: dense attention gives the same");
    }
}
