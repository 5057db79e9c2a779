//! The attention mass of `sparsectl eval` against the oracle's attention, which is computed in another form: keys of
//! every head written out, no cache, no groups of heads in slices.
#![allow(clippy::unwrap_used, missing_docs, reason = "a test")]

use serde_json::Value;
use sparsed_oracle::{Model, Options, Output, forward};
use sparsed_tests::{default_model, sparsectl, tiny::Tiny};
use std::path::Path;
use std::process::Command;

/// First tokens of a window.
const SINKS: usize = 4;

/// What k tokens keep: those selected, the best, and those of a window.
#[derive(Clone, Copy, Debug)]
struct Kept {
    selection: f64,
    oracle: f64,
    window: f64,
}

/// `sparsectl eval` of one window with one k: every query of its second half, which leaves nothing to the seed.
fn eval(model: &Path, ids: &[u32], k: usize, extra: &[&str]) -> Value {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("ids.json");
    std::fs::write(&path, format!("{ids:?}")).unwrap();
    let length = ids.len().to_string();
    let mut command = Command::new(sparsectl());
    command.args(["eval", "--json", "--context", &length, "--tokens", &length, "--mass-queries", &length]);
    let done = command.args(extra).args(["--top-k", &k.to_string(), "--ids"]).args([&path, model]).output().unwrap();
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    let found: Value = serde_json::from_slice(&done.stdout).unwrap();
    assert_eq!(found["perplexity"][0]["mass_queries"].as_u64(), Some(ids.len().div_ceil(2) as u64));
    assert!(found["perplexity"][0]["rows"][0]["mass"].is_null(), "dense attention selects nothing");
    found["perplexity"][0]["rows"][1]["mass"].clone()
}

/// The same of each layer, from the oracle's attention and its selections moved down by `shift` places.
fn expected(model: &Path, ids: &[u32], k: usize, shift: usize) -> Vec<Kept> {
    let model = Model::open(model).unwrap();
    let options = Options { top_k: Some(k), last_rows: Some(1), attention: true, ..Options::default() };
    let Output { selections, attention, .. } = forward::<f32>(&model, ids, &options).unwrap();
    let full = &model.config.indexer.as_ref().unwrap().full;
    assert_eq!(attention.len(), full.len());
    let of_layer = |(layer, weights): (usize, &sparsed_oracle::Rows<f32>)| {
        let selecting = full[..=layer].iter().filter(|&&full| full).count() - 1;
        let kept = (ids.len() / 2..ids.len()).map(|t| {
            let mass: Vec<f64> = weights.row(t)[..=t].iter().map(|&p| f64::from(p)).collect();
            assert!((mass.iter().sum::<f64>() - 1.0).abs() < 1e-5);
            let selected = selections[selecting].positions[t].iter().map(|&s| (s + shift) % (t + 1));
            let mut best = mass.clone();
            best.sort_by(|a, b| b.total_cmp(a));
            let in_window = (0..=t).filter(|&s| k > t || s < SINKS || s > t - (k - SINKS));
            Kept {
                selection: selected.map(|s| mass[s]).sum(),
                oracle: best.iter().take(k).sum(),
                window: in_window.map(|s| mass[s]).sum(),
            }
        });
        let kept: Vec<Kept> = kept.collect();
        let mean = |part: fn(&Kept) -> f64| kept.iter().map(part).sum::<f64>() / kept.len() as f64;
        Kept {
            selection: mean(|kept| kept.selection),
            oracle: mean(|kept| kept.oracle),
            window: mean(|kept| kept.window),
        }
    };
    attention.iter().enumerate().map(of_layer).collect()
}

/// The furthest that a layer's `selection` is from what is expected; the other two must agree within `tolerance`.
fn furthest(found: &Value, expected: &[Kept], tolerance: f64) -> f64 {
    let layers = found["layers"].as_array().unwrap();
    assert_eq!(layers.len(), expected.len());
    let differences = layers.iter().zip(expected).map(|(found, expected)| {
        let part = |name: &str| found[name].as_f64().unwrap();
        for (name, expected) in [("oracle", expected.oracle), ("window", expected.window)] {
            assert!((part(name) - expected).abs() < tolerance, "{name} of {found} is not {expected}");
            assert!(part("oracle") >= part(name) - 1e-9, "nothing keeps more than the best: {found}");
        }
        assert!(part("oracle") >= part("selection") - 1e-9, "nothing keeps more than the best: {found}");
        (part("selection") - expected.selection).abs()
    });
    differences.fold(0.0, f64::max)
}

#[test]
fn masses_of_every_kind_of_dsa_model_equal_the_oracles() {
    for name in ["v32", "v32-soft", "glm5", "glm52"] {
        let tiny = Tiny::open(name);
        for k in [5, 16] {
            let found = eval(&tiny.gguf(), &tiny.ids, k, &["--act", "f32", "--chunk", "11"]);
            let expected = expected(&tiny.gguf(), &tiny.ids, k, 0);
            let furthest = furthest(&found, &expected, 1e-6);
            assert!(furthest < 1e-6, "{name}, k = {k}: {furthest}");
            let mean = expected.iter().map(|kept| kept.selection).sum::<f64>() / expected.len() as f64;
            assert!((found["selection"].as_f64().unwrap() - mean).abs() < 1e-5, "{name}, k = {k}");
            let left_out = expected.iter().map(|kept| 1.0 - kept.oracle).fold(0.0, f64::max);
            assert!(left_out > 0.01, "{name}, k = {k}: there was nothing to lose");
        }
    }
}

#[test]
fn masses_of_the_default_model_equal_the_oracles() {
    let model = sparsed_tests::model("smollm2-135m-dsa-f16.gguf");
    let ids = &default_model::golden::<u32>("ids")[..200];
    let found = eval(&model, ids, 32, &["--act", "f32"]);
    let furthest = furthest(&found, &expected(&model, ids, 32, 0), 1e-6);
    assert!(furthest < 1e-6, "{furthest}");
    let part = |name: &str| found[name].as_f64().unwrap();
    // The indexer was trained: close to the best, far above a window of the same size, and above chance.
    assert!(part("share_of_oracle") > 0.95 && part("selection") > part("window") + 0.05, "{found}");
    assert!(part("random") < 0.25 && part("window") > part("random"), "{found}");
}

#[test]
fn a_selection_that_is_moved_by_one_token_keeps_another_mass() {
    let tiny = Tiny::open("v32");
    let found = eval(&tiny.gguf(), &tiny.ids, 5, &["--act", "f32"]);
    assert!(furthest(&found, &expected(&tiny.gguf(), &tiny.ids, 5, 1), 1e-6) > 1e-2);
    let model = sparsed_tests::model("smollm2-135m-dsa-f16.gguf");
    let ids = &default_model::golden::<u32>("ids")[..100];
    let (own, moved) = (expected(&model, ids, 16, 0), expected(&model, ids, 16, 1));
    let sum = |kept: &[Kept]| kept.iter().map(|kept| kept.selection).sum::<f64>();
    assert!(sum(&moved) < 0.8 * sum(&own), "{} {}", sum(&moved), sum(&own));
}

#[test]
fn with_k_of_all_but_one_token_nearly_everything_is_kept_and_a_model_that_reads_all_has_no_masses() {
    let tiny = Tiny::open("v32");
    // 16-bit activations and f16 rows, as served; queries that have no more than k tokens keep exactly all.
    let found = eval(&tiny.gguf(), &tiny.ids, tiny.ids.len() - 1, &[]);
    let (queries, kept) = (tiny.ids.len().div_ceil(2) as f64, found["selection"].as_f64().unwrap());
    assert!(kept > 1.0 - 1.0 / queries && kept < 1.0, "{found}");
    let dir = tempfile::tempdir().unwrap();
    let ids = dir.path().join("ids.json");
    std::fs::write(&ids, format!("{:?}", tiny.ids)).unwrap();
    let run = |extra: &[&str]| {
        let mut command = Command::new(sparsectl());
        command.args(["eval", "--json", "--context", "40"]).args(extra).arg("--ids").arg(&ids);
        command.arg(Tiny::open("v3").gguf()).output().unwrap()
    };
    let found: Value = serde_json::from_slice(&run(&[]).stdout).unwrap();
    assert_eq!(found["perplexity"][0]["rows"].as_array().map(Vec::len), Some(1));
    assert!(String::from_utf8(run(&["--mass-queries", "4"]).stderr).unwrap().contains("--mass-queries"));
}
