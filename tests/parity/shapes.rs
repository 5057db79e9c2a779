//! `sparsectl logits` against the oracle on models of odd shapes, made here from a seed: no file is kept for them.
#![allow(clippy::unwrap_used, missing_docs, reason = "a test")]

mod shape;

use fastrand::Rng;
use serde_json::Value;
use shape::{Experts, Index, Shape, base, experts, write};
use sparsed_oracle::{Model, Options, Output, forward};
use sparsed_tests::daemon::Daemon;
use sparsed_tests::tiny::TOLERANCE;
use std::path::Path;
use std::process::Command;

fn singles(output: &Output<f64>) -> Vec<f32> {
    #[expect(clippy::cast_possible_truncation, reason = "compared in single precision")]
    output.logits.values().iter().map(|&v| v as f32).collect()
}

/// A seed without near ties, found by the oracle: its f32 and f64 agree, and no selection is close.
fn settled(shape: &Shape, ids: &[u32], path: &Path) -> Output<f64> {
    for seed in 0..200 {
        write(shape, seed, path);
        let model = Model::open(path).unwrap();
        let exact = forward::<f64>(&model, ids, &Options::default()).unwrap();
        let single = forward::<f32>(&model, ids, &Options::default()).unwrap();
        let close = sparsed_tests::worst(single.logits.values(), &singles(&exact)) < TOLERANCE / 4.0;
        if close && exact.selections.iter().flat_map(|s| &s.margins).all(|&margin| margin > TOLERANCE.into()) {
            return exact;
        }
    }
    panic!("no seed without near ties for {shape:?}");
}

/// One step, odd chunks and token by token give what the oracle does.
fn check(shape: &Shape) {
    let mut random = Rng::with_seed(7);
    let ids: Vec<u32> = (0..shape.n_tokens).map(|_| random.u32(0..shape.vocab as u32)).collect();
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("model.gguf");
    let expected = settled(shape, &ids, &file);
    let k = shape.index.as_ref().map_or(0, |index| index.top_k);
    let rows = expected.selections.iter().flat_map(|selection| &selection.positions);
    let selected: Vec<i32> =
        rows.flat_map(|row| (0..k).map(|i| row.get(i).map_or(-1, |&s| i32::try_from(s).unwrap()))).collect();
    for chunk in ["256", "7", "1"] {
        let answer = sparsed_tests::logits(&file, &ids, k > 0, &["--act", "f32", "--chunk", chunk]);
        let worst = sparsed_tests::worst(&answer.logits, &singles(&expected));
        assert!(worst < TOLERANCE, "in chunks of {chunk}, logits differ by {worst}: {shape:?}");
        assert_eq!(answer.selections, selected, "in chunks of {chunk}: {shape:?}");
    }
}

#[test]
fn one_layer_with_one_head_and_one_token_selected() {
    let index = Some(Index { n_heads: 1, width: 6, rope: None, top_k: 1, full: None });
    check(&Shape { n_layers: 1, n_heads: 1, vocab: 2, index, n_tokens: 20, ..base() });
}

#[test]
fn one_expert() {
    let experts = Experts { n: 1, active: 1, groups: 1, kept: 1, shared: 0, ..experts() };
    check(&Shape { experts: Some(experts), ..base() });
}

#[test]
fn experts_in_groups_after_a_dense_layer() {
    check(&Shape { experts: Some(Experts { first_layer: 1, shared: 2, ..experts() }), n_layers: 3, ..base() });
}

#[test]
fn weights_of_experts_that_are_not_renormalised() {
    check(&Shape { experts: Some(Experts { renormalise: false, groups: 1, kept: 1, ..experts() }), ..base() });
}

#[test]
fn more_tokens_selected_than_there_are() {
    check(&Shape { index: Some(Index { top_k: 100, ..base().index.unwrap() }), ..base() });
}

#[test]
fn queries_that_are_not_compressed() {
    check(&Shape { q_lora: None, ..base() });
}

#[test]
fn yarn_with_the_factor_of_deepseek() {
    check(&Shape { yarn: Some((40.0, 64, Some(0.1))), ..base() });
}

#[test]
fn an_embedding_that_is_the_head_too() {
    check(&Shape { tied: true, ..base() });
}

#[test]
fn layers_of_multi_token_prediction_are_skipped() {
    check(&Shape { predicted: 1, ..base() });
}

#[test]
fn the_group_form_with_an_indexer_that_rotates_fewer_values() {
    let index = Some(Index { rope: Some(4), ..base().index.unwrap() });
    let (n_heads, groups, latent, v_head) = (6, 3, 15, 5);
    check(&Shape { n_heads, groups, latent, nope: 0, v_head, rope_row: 12, q_lora: None, index, ..base() });
}

#[test]
fn a_glm_file_whose_layers_share_an_indexer() {
    let full = Some(vec![true, false, true, false, false]);
    let index = Some(Index { full, ..base().index.unwrap() });
    check(&Shape { arch: "glm-dsa", n_layers: 5, index, ..base() });
}

#[test]
fn a_glm_file_whose_layer_of_multi_token_prediction_is_in_the_list() {
    let index = Some(Index { full: Some(vec![true, false, true]), ..base().index.unwrap() });
    check(&Shape { arch: "glm-dsa", n_layers: 2, predicted: 1, index, ..base() });
}

#[test]
fn dense_files_with_softmax_scores_in_groups_and_without() {
    let dense = Shape { arch: "deepseek2", index: None, q_lora: None, ..base() };
    let softmax = Experts { softmax: true, renormalise: false, ..experts() };
    check(&Shape { experts: Some(softmax.clone()), ..dense.clone() });
    check(&Shape { experts: Some(Experts { groups: 1, kept: 1, ..softmax }), ..dense });
}

#[test]
fn yarn_with_other_factors_on_attention() {
    // deepseek2: mscale is mscale_all_dim. Elsewhere it is 1, and cosines and sines grow by the quotient.
    let dense = Shape { arch: "deepseek2", index: None, ..base() };
    check(&Shape { yarn: Some((40.0, 64, Some(0.0707))), ..dense.clone() });
    check(&Shape { yarn: Some((40.0, 64, None)), ..dense });
    check(&Shape { yarn: Some((40.0, 64, Some(0.05))), ..base() });
    check(&Shape { yarn: Some((40.0, 64, None)), ..base() });
}

/// Any shape at all, from a seed.
fn any(seed: u64) -> Shape {
    let mut random = Rng::with_seed(1000 + seed);
    let mut shape = base();
    shape.n_tokens = random.usize(1..=130);
    shape.n_layers = random.usize(1..=3);
    shape.hidden = random.usize(5..=70);
    shape.vocab = random.usize(2..=90);
    shape.n_heads = random.usize(1..=5);
    shape.q_lora = random.bool().then(|| random.usize(3..=40));
    shape.latent = random.usize(3..=70);
    shape.nope = random.usize(1..=40);
    shape.rope_row = 2 * random.usize(1..=20);
    shape.v_head = random.usize(1..=40);
    shape.feed_forward = random.usize(1..=70);
    shape.tied = random.bool();
    shape.yarn = random.bool().then(|| (random.usize(2..=50) as f32, 64, Some(0.1)));
    let width = shape.rope_row + random.usize(0..=30);
    let top_k = random.usize(1..=70);
    shape.index = Some(Index { n_heads: random.usize(5..=9), width, rope: None, top_k, full: None });
    if random.bool() {
        let (groups, per_group) = (random.usize(1..=4), random.usize(2..=4));
        let kept = random.usize(1..=groups);
        let active = random.usize(1..=kept * per_group);
        let (shared, renormalise, width) = (random.usize(0..=2), random.bool(), random.usize(1..=40));
        let n = groups * per_group;
        shape.experts = Some(Experts { n, active, shared, width, groups, kept, renormalise, ..experts() });
    }
    shape
}

#[test]
fn shapes_from_a_seed() {
    (0..24).for_each(|seed| check(&any(seed)));
}

#[test]
fn copies_of_packed_weights_are_as_large_as_inspect_says() {
    let index = Some(Index { n_heads: 4, width: 32, rope: Some(16), top_k: 64, full: None });
    let wide = Shape { hidden: 256, vocab: 37, q_lora: Some(256), latent: 256, nope: 32, rope_row: 32, ..base() };
    let shape = Shape { v_head: 64, n_heads: 4, feed_forward: 520, index, tied: true, ..wide };
    let dir = tempfile::tempdir().unwrap();
    let (whole, file) = (dir.path().join("f32.gguf"), dir.path().join("small.gguf"));
    write(&shape, 1, &whole);
    let tool = |arguments: &[&str], path: &Path| {
        let done = Command::new(sparsed_tests::sparsectl()).args(arguments).arg(path).output().unwrap();
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
        done.stdout
    };
    for recipe in ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K_M", "Q5_K_M", "Q6_K"] {
        tool(&["quantize", "--type", recipe, whole.to_str().unwrap()], &file);
        let inspected: Value = serde_json::from_slice(&tool(&["inspect", "--json"], &file)).unwrap();
        let bytes = |key: &str| inspected["memory"][key].as_u64().unwrap();
        let daemon = Daemon::start(&file, &[]);
        let held = daemon.get("/v1/status").json()["memory"]["weights_bytes"].as_u64().unwrap();
        assert_eq!(bytes("weights_made_bytes") + bytes("copy_bytes_at_most"), held, "{recipe}: {inspected}");
    }
}
