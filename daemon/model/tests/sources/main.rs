//! One model from every source: a GGUF, its parts, its legacy form, and a Hugging Face folder become one program.
#![allow(clippy::unwrap_used, missing_docs, unreachable_pub, reason = "a test")]

mod quantized;
mod tiny;
mod unread;

use safetensors::Dtype;
use serde_json::{Value as Json, json};
use sparsed_abi::{DT_BF16, DT_F32};
use sparsed_model::{Model, Program, ProgramOptions, SafetensorsHeader, Selection};
use sparsed_quant::gguf::{Metadata, Value};
use std::path::Path;
use tempfile::{TempDir, tempdir};
use tiny::{Numbers, Planned, Stored, Tensors, all_stored, stored, write_folder, write_gguf, write_safetensors};

fn program(path: &Path) -> Program {
    Model::open(path).unwrap().program(&ProgramOptions::default()).unwrap()
}

/// What is said when it cannot be opened or written down.
fn refused(path: &Path) -> String {
    let made = Model::open(path).and_then(|model| model.program(&ProgramOptions::default()));
    made.expect_err("it must be refused").to_string()
}

fn folder(tensors: &Tensors, config: &Json, dtype: Dtype) -> TempDir {
    let dir = tempdir().unwrap();
    write_folder(dir.path(), tensors, config, dtype);
    dir
}

#[track_caller]
fn assert_same(a: &Program, b: &Program) {
    assert_eq!(a.blob.as_bytes(), b.blob.as_bytes());
    assert_eq!(a.kv, b.kv);
    assert_eq!(a.weights.len(), b.weights.len());
    for (a, b) in a.weights.iter().zip(&b.weights) {
        assert_eq!((&a.name, a.dtype, a.batch, a.rows, a.cols), (&b.name, b.dtype, b.batch, b.rows, b.cols));
        assert_eq!(a.bytes, b.bytes, "{}", a.name);
    }
}

#[test]
fn a_folder_and_a_file_of_the_same_numbers_are_one_program() {
    let tensors = tiny::tensors();
    let dir = folder(&tensors, &tiny::config(), Dtype::F32);
    let file = dir.path().join("m.gguf");
    write_gguf(&file, tiny::metadata("glm-dsa"), &tiny::planned(&tensors, true));
    let (ours, theirs) = (program(dir.path()), program(&file));
    assert_same(&ours, &theirs);
    assert_eq!((ours.kv.n_layers, ours.kv.n_index_layers), (3, 2), "a layer that shares has no index row");
    assert!(!ours.weights.iter().any(|weight| weight.name.starts_with("blk.1.indexer")));
    let model = Model::open(dir.path()).unwrap();
    let numbers: usize = tensors.values().map(|numbers| numbers.values.len()).sum();
    assert_eq!(model.summary().parameters, numbers as u64);
    assert_eq!(model.name(), dir.path().file_name().unwrap().to_str().unwrap());
    assert!(model.tokenizer().is_none() && model.file_bytes() > 4 * numbers as u64);
}

#[test]
fn an_unsplit_kv_b_is_split_on_loading() {
    let (mut tensors, dir) = (tiny::tensors(), tempdir().unwrap());
    tensors.retain(|name, _| !name.contains("indexer"));
    let whole: Vec<Planned> = tiny::planned(&tensors, false);
    let mut legacy = Metadata::new();
    for (key, value) in tiny::metadata("deepseek2").iter().filter(|(key, _)| !key.ends_with("_mla")) {
        legacy.set(key, value.clone());
    }
    let width = |n: usize| Value::U32(u32::try_from(n).unwrap());
    legacy.set("deepseek2.attention.key_length", width(tiny::NOPE + tiny::ROPE));
    legacy.set("deepseek2.attention.value_length", width(tiny::VALUE));
    let old = write_gguf(&dir.path().join("old.gguf"), legacy.clone(), &whole);
    let new = write_gguf(&dir.path().join("new.gguf"), tiny::metadata("deepseek2"), &tiny::planned(&tensors, true));
    assert_same(&program(&old), &program(&new));
    legacy.set("deepseek2.attention.value_length", width(tiny::VALUE + 1));
    assert!(refused(&write_gguf(&old, legacy, &whole)).contains("attn_kv_b"), "the rows do not add up");
}

#[test]
fn numbers_in_half_precision_stay_so_but_vectors_are_decoded() {
    let tensors = tiny::tensors();
    let (exact, half) = (folder(&tensors, &tiny::config(), Dtype::F32), folder(&tensors, &tiny::config(), Dtype::BF16));
    let (exact, half) = (program(exact.path()), program(half.path()));
    for (exact, half) in exact.weights.iter().zip(&half.weights) {
        if half.rows == 1 && half.batch == 1 {
            assert_eq!((half.dtype, &half.bytes), (DT_F32, &exact.bytes), "{}", half.name);
        } else {
            assert_eq!(half.dtype, DT_BF16, "{}", half.name);
            let upper: Vec<u8> = exact.bytes.chunks(4).flat_map(|value| value[2..].to_vec()).collect();
            assert_eq!(half.bytes, upper, "{}", half.name);
        }
    }
}

/// Matrices of the folder in FP8 with blocks of 4 x 8, and the numbers that this stands for.
fn fp8(tensors: &Tensors, scale: f32) -> (Vec<(String, Stored)>, Tensors) {
    // Eighths from -2 to 2 less an eighth, all e4m3 numbers or cut to one: sign, exponent and three bits of the single.
    let cut = |value: f32| f32::from_bits(value.to_bits() & 0xfff0_0000);
    let bits = |value: f32| {
        let single = cut(value).to_bits();
        let exponent = (single >> 23 & 0xff).saturating_sub(120);
        u8::try_from(if value == 0.0 { 0 } else { single >> 31 << 7 | exponent << 3 | single >> 20 & 7 }).unwrap()
    };
    let (mut out, mut meant) = (Vec::new(), Tensors::new());
    for (name, numbers) in tensors {
        let quantised = numbers.shape.len() == 2 && !name.contains("embed") && !name.contains("lm_head");
        if !quantised {
            out.push((name.clone(), stored(numbers, Dtype::F32)));
            meant.insert(name.clone(), numbers.clone());
            continue;
        }
        let (rows, cols) = (numbers.shape[0], numbers.shape[1]);
        let per_row = cols.div_ceil(8);
        let power = |i: usize| scale * f32::from(u8::try_from(1 << (i % 3)).unwrap());
        let scales: Vec<f32> = (0..rows.div_ceil(4) * per_row).map(power).collect();
        let at = |i: usize| scales[i / cols / 4 * per_row + i % cols / 8];
        let values: Vec<f32> = numbers.values.iter().enumerate().map(|(i, value)| cut(*value) * at(i)).collect();
        meant.insert(name.clone(), Numbers { shape: numbers.shape.clone(), values });
        let bytes = numbers.values.iter().map(|value| bits(*value)).collect();
        out.push((name.clone(), Stored { dtype: Dtype::F8_E4M3, shape: numbers.shape.clone(), bytes }));
        let scales = Numbers { shape: vec![rows.div_ceil(4), per_row], values: scales };
        out.push((format!("{name}_scale_inv"), stored(&scales, Dtype::F32)));
    }
    (out, meant)
}

fn fp8_config() -> Json {
    let mut config = tiny::config();
    config["quantization_config"] =
        json!({"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [4, 8]});
    config
}

#[test]
fn fp8_blocks_are_decoded_without_loss() {
    for (scale, dtype) in [(0.3, DT_F32), (0.25, DT_BF16)] {
        let (stored, meant) = fp8(&tiny::tensors(), scale);
        let dir = tempdir().unwrap();
        std::fs::write(dir.path().join("config.json"), fp8_config().to_string()).unwrap();
        write_safetensors(dir.path(), "model.safetensors", &stored);
        let exact = folder(&meant, &tiny::config(), Dtype::F32);
        let (found, wanted) = (program(dir.path()), program(exact.path()));
        assert!(found.weights.iter().any(|weight| weight.dtype == dtype && weight.name.contains("attn_k_b")));
        for (found, wanted) in found.weights.iter().zip(&wanted.weights) {
            let single: Vec<u8> = if found.dtype == DT_BF16 {
                found.bytes.chunks(2).flat_map(|half| [0, 0, half[0], half[1]]).collect()
            } else {
                found.bytes.to_vec()
            };
            assert_eq!(single, wanted.bytes, "{} with scale {scale}", found.name);
        }
    }
}

#[test]
fn fp8_without_fitting_scales_is_refused() {
    let (all, _) = fp8(&tiny::tensors(), 0.25);
    let with = |keep: &dyn Fn(&str) -> bool, config: &Json| {
        let dir = tempdir().unwrap();
        std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
        let kept: Vec<_> = all.iter().filter(|(name, _)| keep(name)).cloned().collect();
        write_safetensors(dir.path(), "model.safetensors", &kept);
        refused(dir.path())
    };
    let scale = "model.layers.0.self_attn.q_a_proj.weight_scale_inv";
    assert!(with(&|name| name != scale, &fp8_config()).contains(scale));
    assert!(with(&|_| true, &tiny::config()).contains("scales of shape [1, 1]"), "blocks of 128 are not these");
    let mut other = fp8_config();
    other["quantization_config"]["quant_method"] = json!("awq");
    assert!(with(&|_| true, &other).contains("quantization_config.quant_method"));
    other["quantization_config"] = json!({"quant_method": "fp8", "weight_block_size": [0, 8]});
    assert!(with(&|_| true, &other).contains("weight_block_size"));
}

/// A folder of two shards, split by name, whose index is `change`d before it is written.
fn sharded(change: impl Fn(&mut serde_json::Map<String, Json>)) -> TempDir {
    let (tensors, dir) = (tiny::tensors(), tempdir().unwrap());
    std::fs::write(dir.path().join("config.json"), tiny::config().to_string()).unwrap();
    let file = |name: &str| if name.contains("mlp") { "b.safetensors" } else { "a.safetensors" };
    for shard in ["a.safetensors", "b.safetensors"] {
        let mut all = all_stored(&tensors, Dtype::F32);
        all.retain(|(name, _)| file(name) == shard);
        write_safetensors(dir.path(), shard, &all);
    }
    let mut map = tensors.keys().map(|name| (name.clone(), json!(file(name)))).collect();
    change(&mut map);
    let index = json!({"metadata": {"total_size": 0}, "weight_map": map}).to_string();
    std::fs::write(dir.path().join("model.safetensors.index.json"), index).unwrap();
    dir
}

#[test]
fn shards_are_one_model() {
    let whole = folder(&tiny::tensors(), &tiny::config(), Dtype::F32);
    assert_same(&program(sharded(|_| {}).path()), &program(whole.path()));
}

#[test]
fn an_index_that_lies_is_refused() {
    for away in
        ["../b.safetensors", "/etc/passwd", "x/../b.safetensors", "./b.safetensors", "..", "", "x/b.safetensors"]
    {
        let dir = sharded(|map| drop(map.insert("lm_head.weight".to_owned(), json!(away))));
        let said = refused(dir.path());
        assert!(said.contains("no file of this folder"), "{away}: {said}");
    }
    let dir = sharded(|map| drop(map.insert("model.more.weight".to_owned(), json!("a.safetensors"))));
    assert!(refused(dir.path()).contains("lacks model.more.weight"));
    let dir = sharded(|map| drop(map.insert("lm_head.weight".to_owned(), json!("c.safetensors"))));
    assert!(refused(dir.path()).contains("c.safetensors"), "a missing shard is named");
    let dir = sharded(|_| {});
    std::fs::copy(dir.path().join("a.safetensors"), dir.path().join("b.safetensors")).unwrap();
    assert!(refused(dir.path()).contains("b.safetensors"), "a tensor in two files");
    let dir = sharded(|map| map.clear());
    assert!(refused(dir.path()).contains("names 0 files"));
}

#[test]
fn a_head_is_tied_only_where_the_configuration_says_so() {
    let (mut tensors, mut config) = (tiny::tensors(), tiny::config());
    tensors.remove("lm_head.weight");
    assert!(refused(folder(&tensors, &config, Dtype::F32).path()).contains("output.weight"));
    config["tie_word_embeddings"] = json!(true);
    let tied = program(folder(&tensors, &config, Dtype::F32).path());
    assert!(!tied.weights.iter().any(|weight| weight.name == "output.weight"));
}

#[test]
fn a_gguf_without_a_head_has_a_tied_one_and_computes_what_a_tied_folder_does() {
    let (mut tensors, mut config, dir) = (tiny::tensors(), tiny::config(), tempdir().unwrap());
    let path = dir.path().join("m.gguf");
    let own = program(&write_gguf(&path, tiny::metadata("glm-dsa"), &tiny::planned(&tensors, true)));
    assert!(own.weights.iter().any(|weight| weight.name == "output.weight"));
    tensors.remove("lm_head.weight");
    config["tie_word_embeddings"] = json!(true);
    let tied = program(&write_gguf(&path, tiny::metadata("glm-dsa"), &tiny::planned(&tensors, true)));
    assert!(Model::open(&path).unwrap().spec().tied_embeddings);
    assert_same(&tied, &program(folder(&tensors, &config, Dtype::F32).path()));
}

#[test]
fn experts_must_be_as_many_as_said() {
    let (tensors, mut config) = (tiny::tensors(), tiny::config());
    config["n_routed_experts"] = json!(tiny::EXPERTS + 1);
    let mut wide = tensors.clone();
    let more = tiny::EXPERTS + 1;
    for layer in 1..tiny::LAYERS {
        let gate = Numbers { shape: vec![more, tiny::HIDDEN], values: vec![0.5; more * tiny::HIDDEN] };
        wide.insert(format!("model.layers.{layer}.mlp.gate.weight"), gate);
        let bias = Numbers { shape: vec![more], values: vec![0.5; more] };
        wide.insert(format!("model.layers.{layer}.mlp.gate.e_score_correction_bias"), bias);
    }
    assert!(refused(folder(&wide, &config, Dtype::F32).path()).contains("experts.3.gate_proj.weight: is missing"));
    let mut more = tensors.clone();
    let spare = tensors["model.layers.1.mlp.experts.0.gate_proj.weight"].clone();
    more.insert("model.layers.1.mlp.experts.3.gate_proj.weight".to_owned(), spare);
    assert!(refused(folder(&more, &tiny::config(), Dtype::F32).path()).contains("more than the 3 experts"));
}

/// Writes the model in `count` parts and answers the first's path.
fn split(dir: &Path, count: usize, change: impl Fn(usize, &mut Metadata)) -> std::path::PathBuf {
    let planned = tiny::planned(&tiny::tensors(), true);
    let name = |part: usize| dir.join(format!("m-{part:05}-of-{count:05}.gguf"));
    for (part, tensors) in planned.chunks(planned.len().div_ceil(count)).enumerate() {
        let mut metadata = if part == 0 { tiny::metadata("glm-dsa") } else { Metadata::new() };
        metadata.set("split.no", Value::U16(u16::try_from(part).unwrap()));
        metadata.set("split.count", Value::U16(u16::try_from(count).unwrap()));
        metadata.set("split.tensors.count", Value::I32(i32::try_from(planned.len()).unwrap()));
        change(part, &mut metadata);
        write_gguf(&name(part + 1), metadata, tensors);
    }
    name(1)
}

#[test]
fn parts_of_a_split_file_are_one_model() {
    let dir = tempdir().unwrap();
    let whole = dir.path().join("whole.gguf");
    write_gguf(&whole, tiny::metadata("glm-dsa"), &tiny::planned(&tiny::tensors(), true));
    let first = split(dir.path(), 3, |_, _| {});
    assert_same(&program(&first), &program(&whole));
    let model = Model::open(&first).unwrap();
    assert_eq!(model.summary().parameters, Model::open(&whole).unwrap().summary().parameters);
    let second = dir.path().join("m-00002-of-00003.gguf");
    assert!(refused(&second).contains("by its first part"));
    let renamed = dir.path().join("x.gguf");
    std::fs::copy(&first, &renamed).unwrap();
    assert!(refused(&renamed).contains("-00001-of-00003.gguf"));
    std::fs::remove_file(&second).unwrap();
    assert!(refused(&first).contains("m-00002-of-00003.gguf"));
}

#[test]
fn parts_that_do_not_belong_together_are_refused() {
    let dir = tempdir().unwrap();
    let said = |change: &dyn Fn(usize, &mut Metadata)| refused(&split(dir.path(), 2, change));
    assert!(
        said(&|part, metadata| {
            if part == 1 {
                metadata.set("split.no", Value::U16(7));
            }
        })
        .contains("split.no 7")
    );
    assert!(said(&|_, metadata| metadata.set("split.tensors.count", Value::I32(5))).contains("5 were split"));
    assert!(said(&|_, metadata| metadata.set("split.count", Value::U16(60000))).contains("limit is 1024"));
    let first = split(dir.path(), 2, |_, _| {});
    let mut metadata = Metadata::new();
    metadata.set("split.no", Value::U16(1));
    metadata.set("split.count", Value::U16(2));
    let double = &tiny::planned(&tiny::tensors(), true)[..1];
    write_gguf(&dir.path().join("m-00002-of-00002.gguf"), metadata, double);
    assert!(refused(&first).contains("in two parts"));
}

#[test]
fn a_key_that_may_change_the_mathematics_is_refused_in_a_file_too() {
    let (dir, planned) = (tempdir().unwrap(), tiny::planned(&tiny::tensors(), true));
    let said = |key: &str, value: Value| {
        let mut metadata = tiny::metadata("glm-dsa");
        metadata.set(format!("glm-dsa.{key}"), value);
        refused(&write_gguf(&dir.path().join("m.gguf"), metadata, &planned))
    };
    for (key, value) in [
        ("attention.temperature_scale", Value::F32(0.1)),
        ("attention.sliding_window", Value::U32(128)),
        ("attention.indexer.kpool", Value::U32(4)),
        ("expert_gating_func", Value::U32(4)),
        ("rope.scaling.type", Value::String("linear".to_owned())),
        ("rope.scaling.factor", Value::F32(4.0)),
        ("attention.layer_norm_epsilon", Value::F32(1e-2)),
        ("attention.key_length_mla", Value::U32(3)),
        ("expert_group_count", Value::U32(2)),
        ("block_count", Value::U32(0)),
        ("rope.freq_base", Value::F32(1.0)),
        ("nextn_predict_layers", Value::U32(3)),
    ] {
        let said = said(key, value);
        assert!(said.contains(key) || said.contains("expert_count"), "{said}");
    }
}

#[test]
fn a_glm_file_without_types_shares_as_glm_5_2_from_a_million_tokens_on() {
    let (dir, planned) = (tempdir().unwrap(), tiny::planned(&tiny::tensors(), true));
    let full = |arch: &str, context: u32| {
        let mut metadata = Metadata::new();
        for (key, value) in tiny::metadata(arch).iter().filter(|(key, _)| !key.ends_with("indexer.types")) {
            metadata.set(key, value.clone());
        }
        metadata.set(format!("{arch}.block_count"), Value::U32(8));
        metadata.set(format!("{arch}.context_length"), Value::U32(context));
        let model = Model::open(&write_gguf(&dir.path().join("m.gguf"), metadata, &planned)).unwrap();
        model.spec().indexer.clone().unwrap().full
    };
    assert_eq!(full("glm-dsa", 1_048_576), [true, true, true, false, false, false, true, false]);
    assert_eq!(full("glm-dsa", 202_752), [true; 8]);
    assert_eq!(full("deepseek32", 1_048_576), [true; 8]);
}

#[test]
fn selecting_and_dense_steps_differ_in_their_index_rows() {
    let dir = folder(&tiny::tensors(), &tiny::config(), Dtype::F32);
    let model = Model::open(dir.path()).unwrap();
    let made = |selection| model.program(&ProgramOptions { selection, ..ProgramOptions::default() }).unwrap();
    assert_eq!((made(Selection::Model).top_k(), made(Selection::TopK(9)).top_k()), (Some(5), Some(9)));
    let dense = made(Selection::Dense);
    assert_eq!((dense.top_k(), dense.kv.n_index_layers), (None, 0));
}

#[test]
fn a_safetensors_header_is_read_with_limits() {
    let said = |bytes: &[u8]| SafetensorsHeader::parse("x", bytes).expect_err("it is damaged").to_string();
    let with =
        |header: &str, data: usize| [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &vec![0; data]].concat();
    assert!(said(b"").contains("not a safetensors"));
    assert!(said(&u64::MAX.to_le_bytes()).contains("limit is 67108864"));
    assert!(said(&with("{}", 0)[..9]).contains("damaged"));
    let one = |offsets: &str| format!(r#"{{"t":{{"dtype":"F32","shape":[2],"data_offsets":{offsets}}}}}"#);
    SafetensorsHeader::parse("x", &with(&one("[0,8]"), 8)).unwrap();
    for (offsets, data) in [("[0,8]", 7), ("[0,8]", 9), ("[8,0]", 8), ("[4,12]", 12), ("[0,4]", 4), ("[0,1e99]", 8)] {
        assert!(said(&with(&one(offsets), data)).contains("damaged"), "{offsets} of {data}");
    }
    let huge = r#"{"t":{"dtype":"F32","shape":[4294967296,4294967296,4294967296],"data_offsets":[0,0]}}"#;
    assert!(said(&with(huge, 0)).contains("damaged"));
    let deep = r#"{"t":{"dtype":"U8","shape":[1,1,1,1,1],"data_offsets":[0,1]}}"#;
    assert!(said(&with(deep, 1)).contains("4 dimensions"));
    assert!(said(&with(&format!("{{\"a\":{}", "[".repeat(4000)), 0)).contains("damaged"), "nesting is limited");
}
