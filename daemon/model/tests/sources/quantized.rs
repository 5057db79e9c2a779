//! Quantising takes every source: a folder, parts and a whole file of the same numbers become the same file.

use crate::tiny::{self, write_gguf, write_safetensors};
use crate::{folder, fp8, fp8_config, program, sharded, split};
use safetensors::Dtype;
use serde_json::json;
use sparsed_model::Model;
use sparsed_model::quantize::{QuantizeOptions, QuantizeReport, Recipe, quantize};
use sparsed_quant::Format;
use sparsed_quant::gguf::{Gguf, Value};
use std::path::{Path, PathBuf};
use tempfile::tempdir;

fn options(recipe: &str, keep: &[&str]) -> QuantizeOptions {
    let keep = keep.iter().map(|&keep| keep.to_owned()).collect();
    QuantizeOptions { recipe: Recipe::from_name(recipe).unwrap(), keep, n_threads: 3 }
}

/// A file's tensors by name, and its metadata but for what a model calls itself.
type Contents = (Vec<(String, Vec<u64>, Format, Vec<u8>)>, Vec<(String, Value)>);

fn contents(path: &Path) -> Contents {
    let bytes = std::fs::read(path).unwrap();
    let gguf = Gguf::parse(&bytes).unwrap();
    let mut tensors: Vec<_> = gguf
        .tensors()
        .iter()
        .map(|info| (info.name.clone(), info.dims.clone(), info.format, bytes[info.range.clone()].to_vec()))
        .collect();
    tensors.sort_by(|a, b| a.0.cmp(&b.0));
    let entries = gguf.metadata().iter().filter(|(key, _)| *key != "general.name");
    let mut entries: Vec<_> = entries.map(|(key, value)| (key.to_owned(), value.clone())).collect();
    entries.sort_by(|a, b| a.0.cmp(&b.0));
    (tensors, entries)
}

fn quantized(input: &Path, options: &QuantizeOptions) -> (Contents, QuantizeReport) {
    let dir = tempdir().unwrap();
    let output = dir.path().join("out.gguf");
    let mut last = (0, 0);
    let report = quantize(input, &output, options, &mut |done, all| last = (done, all)).unwrap();
    assert!(last.0 == last.1 && last.0 > 0, "progress ends at the whole: {last:?}");
    Model::open(&output).unwrap().program(&sparsed_model::ProgramOptions::default()).unwrap();
    (contents(&output), report)
}

#[track_caller]
fn assert_same(a: &Contents, b: &Contents) {
    let names = |contents: &Contents| contents.0.iter().map(|tensor| tensor.0.clone()).collect::<Vec<_>>();
    assert_eq!(names(a), names(b));
    for (a, b) in a.0.iter().zip(&b.0) {
        assert_eq!((&a.1, a.2), (&b.1, b.2), "{}", a.0);
        assert!(a.3 == b.3, "{} has other bytes", a.0);
    }
    assert_eq!(a.1, b.1);
}

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/tiny").join(name)
}

#[test]
fn a_folder_becomes_what_the_file_of_the_same_model_becomes() {
    for name in ["v32", "v32-soft", "glm5", "glm52", "v3", "v2"] {
        for recipe in ["Q8_0", "Q4_K_M", "F32"] {
            let of = |path: &Path| quantized(path, &options(recipe, &["blk.1.attn_k_b*", "token_embd.weight"]));
            let (folder, file) = (of(&golden(name)), of(&golden(name).join("model.gguf")));
            assert_same(&folder.0, &file.0);
            let glm = name.starts_with("glm");
            assert_eq!(folder.1.notes.iter().any(|note| note.contains("(D3)")), glm, "{:?}", folder.1.notes);
        }
    }
}

#[test]
fn parts_and_shards_become_what_the_whole_becomes() {
    let (tensors, dir) = (tiny::tensors(), tempdir().unwrap());
    let whole = write_gguf(&dir.path().join("m.gguf"), tiny::metadata("glm-dsa"), &tiny::planned(&tensors, true));
    let options = options("Q4_0", &["output.weight"]);
    let wanted = quantized(&whole, &options).0;
    let parts = quantized(&split(dir.path(), 3, |_, _| {}), &options).0;
    assert_same(&parts, &wanted);
    assert!(!parts.1.iter().any(|(key, _)| key.starts_with("split.")), "it is no part of anything");
    let one = quantized(folder(&tensors, &tiny::config(), Dtype::F32).path(), &options).0;
    assert_same(&quantized(sharded(|_| {}).path(), &options).0, &one);
    assert_eq!(one.0, wanted.0, "and a folder's are those of the file");
}

#[test]
fn fp8_is_quantised_from_the_numbers_that_it_stands_for() {
    for (scale, kept) in [(0.3, Format::F32), (0.25, Format::BF16)] {
        let (stored, meant) = fp8(&tiny::tensors(), scale);
        let dir = tempdir().unwrap();
        std::fs::write(dir.path().join("config.json"), fp8_config().to_string()).unwrap();
        write_safetensors(dir.path(), "model.safetensors", &stored);
        let exact = folder(&meant, &tiny::config(), Dtype::F32);
        for recipe in ["Q8_0", "F16"] {
            let (found, wanted) =
                (quantized(dir.path(), &options(recipe, &[])), quantized(exact.path(), &options(recipe, &[])));
            assert_same(&found.0, &wanted.0);
        }
        // What is kept keeps every number.
        let (found, _) = quantized(dir.path(), &options("Q8_0", &["*.attn_k_b.weight"]));
        let (wanted, _) = quantized(exact.path(), &options("F32", &[]));
        for (name, _, format, bytes) in found.0.iter().filter(|tensor| tensor.0.ends_with("attn_k_b.weight")) {
            let single: Vec<u8> = match format {
                Format::BF16 => bytes.chunks(2).flat_map(|half| [0, 0, half[0], half[1]]).collect(),
                _ => bytes.clone(),
            };
            assert_eq!(*format, kept, "{name}");
            assert!(wanted.0.iter().any(|tensor| (&tensor.0, &tensor.3) == (name, &single)), "{name}");
        }
    }
}

#[test]
fn a_tied_head_and_layers_that_are_not_run_are_left_out() {
    let (mut tensors, mut config) = (tiny::tensors(), tiny::config());
    config["tie_word_embeddings"] = json!(true);
    let further = tensors["model.layers.0.input_layernorm.weight"].clone();
    tensors.insert(format!("model.layers.{}.input_layernorm.weight", tiny::LAYERS), further);
    let dir = folder(&tensors, &config, Dtype::BF16);
    let output = dir.path().join("out.gguf");
    quantize(dir.path(), &output, &options("F32", &[]), &mut |_, _| {}).unwrap();
    let model = Model::open(&output).unwrap();
    assert!(model.spec().tied_embeddings && model.spec().n_layers as usize == tiny::LAYERS);
    // The same numbers, so the same weights; but for the eps of the latent norms the same program.
    let (made, own) = (program(&output), program(dir.path()));
    assert_eq!(made.weights.len(), own.weights.len());
    assert!(made.weights.iter().zip(&own.weights).all(|(a, b)| a.name == b.name && a.rows == b.rows));
}

#[test]
fn a_folder_that_keys_cannot_describe_is_refused_and_leaves_no_file() {
    let reason = |change: &dyn Fn(&mut serde_json::Value)| {
        let mut config = tiny::config();
        change(&mut config);
        let dir = folder(&tiny::tensors(), &config, Dtype::F32);
        let before = std::fs::read_dir(dir.path()).unwrap().count();
        let output = dir.path().join("out.gguf");
        let refused = quantize(dir.path(), &output, &options("Q8_0", &[]), &mut |_, _| {}).unwrap_err();
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), before);
        refused.to_string()
    };
    assert!(reason(&|config| config["rope_interleave"] = json!(false)).contains("rope_interleave"));
    let yarn = json!({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "mscale": 0.5,
        "mscale_all_dim": 1.0});
    assert!(reason(&|config| config["rope_scaling"] = yarn.clone()).contains("mscale"));
    assert!(reason(&|config| config["hidden_size"] = json!(tiny::HIDDEN + 1)).contains("token_embd.weight"));
    assert!(reason(&|config| config["model_type"] = json!("mamba")).contains("model_type"));
}
