//! A tensor that no operator reads is refused, in a folder and in a file, but for those that are known.

use super::tiny::{self, Numbers, write_gguf};
use super::{assert_same, folder, program, refused};
use safetensors::Dtype;
use serde_json::json;
use sparsed_model::{Model, ProgramOptions, Selection};
use sparsed_quant::gguf::{Metadata, Value};
use tempfile::tempdir;

/// A tensor of eight ones.
fn ones() -> Numbers {
    Numbers { shape: vec![8], values: vec![1.0; 8] }
}

#[test]
fn a_tensor_that_no_operator_reads_is_refused_by_name_in_a_folder() {
    for name in [
        "model.layers.0.self_attn.q_a_proj.bias",
        "model.layers.0.self_attn.sinks",
        "model.layers.0.self_attn.indexer.wq_b.bias",
        "model.layers.0.self_attn.q_norm.weight",
        "model.layers.0.self_attn.q_a_proj.weight_scale_inv",
        "model.layers.1.mlp.experts.7.up_proj.weight",
        "model.layers.01.input_layernorm.weight",
        "lm_head.bias",
    ] {
        let mut tensors = tiny::tensors();
        tensors.insert(name.to_owned(), ones());
        let said = refused(folder(&tensors, &tiny::config(), Dtype::F32).path());
        assert!(said.contains(&format!("1 tensor(s) that no operator reads ({name})")), "{name}: {said}");
    }
    let mut tensors = tiny::tensors();
    (0..5).for_each(|i| drop(tensors.insert(format!("model.layers.{}.sink{i}", i % 3), ones())));
    let said = refused(folder(&tensors, &tiny::config(), Dtype::F32).path());
    assert!(said.contains("5 tensor(s)") && said.contains(", ...)"), "{said}");
}

#[test]
fn a_tensor_that_no_operator_reads_is_refused_by_name_in_a_file() {
    let dir = tempdir().unwrap();
    for name in ["blk.0.attn_q_a.bias", "blk.0.attn_sinks.weight", "blk.0.post_attention_norm.weight", "output.bias"] {
        let mut planned = tiny::planned(&tiny::tensors(), true);
        planned.push((name.to_owned(), vec![8], vec![1.0; 8]));
        let said = refused(&write_gguf(&dir.path().join("m.gguf"), tiny::metadata("glm-dsa"), &planned));
        assert!(said.contains(&format!("1 tensor(s) that no operator reads ({name})")), "{name}: {said}");
    }
    let mut planned = tiny::planned(&tiny::tensors(), true);
    planned.push(("blk.0.indexer.proj.weight_2".to_owned(), vec![8], vec![1.0; 8]));
    let dense = write_gguf(&dir.path().join("m.gguf"), tiny::metadata("deepseek2"), &planned);
    let said = refused(&dense);
    assert!(said.contains("11 tensor(s)") && said.contains("blk.0.indexer.attn_k.weight"), "V3 has no indexer: {said}");
}

#[test]
fn tensors_that_are_known_and_not_needed_may_be_there() {
    let mut tensors = tiny::tensors();
    tensors.insert("model.layers.0.self_attn.rotary_emb.inv_freq".to_owned(), ones());
    tensors.insert("model.layers.3.eh_proj.weight".to_owned(), ones());
    // A layer that shares its selection, with an indexer all the same.
    for part in ["wq_b.weight", "wk.weight", "k_norm.weight", "k_norm.bias", "weights_proj.weight"] {
        let of = |layer| format!("model.layers.{layer}.self_attn.indexer.{part}");
        let numbers = tensors[&of(0)].clone();
        tensors.insert(of(1), numbers);
    }
    let plain = folder(&tiny::tensors(), &tiny::config(), Dtype::F32);
    assert_same(&program(folder(&tensors, &tiny::config(), Dtype::F32).path()), &program(plain.path()));
    let mut tied = tiny::config();
    tied["tie_word_embeddings"] = json!(true);
    let dir = folder(&tensors, &tied, Dtype::F32);
    for selection in [Selection::Model, Selection::Dense] {
        let options = ProgramOptions { selection, ..ProgramOptions::default() };
        Model::open(dir.path()).unwrap().program(&options).expect("a head that is tied away, an indexer not asked");
    }
    let mut both = tiny::planned(&tiny::tensors(), true);
    both.extend(tiny::planned(&tiny::tensors(), false).into_iter().filter(|(name, ..)| name.contains("attn_kv_b")));
    program(&write_gguf(&dir.path().join("m.gguf"), tiny::metadata("glm-dsa"), &both));
}

#[test]
fn a_file_with_experts_must_count_its_shared_ones() {
    let (dir, planned) = (tempdir().unwrap(), tiny::planned(&tiny::tensors(), true));
    let mut metadata = Metadata::new();
    for (key, value) in tiny::metadata("glm-dsa").iter().filter(|(key, _)| !key.ends_with("expert_shared_count")) {
        metadata.set(key, value.clone());
    }
    let said = refused(&write_gguf(&dir.path().join("m.gguf"), metadata.clone(), &planned));
    assert!(said.contains("glm-dsa.expert_shared_count"), "{said}");
    metadata.set("glm-dsa.expert_shared_count", Value::U32(0));
    let said = refused(&write_gguf(&dir.path().join("m.gguf"), metadata, &planned));
    assert!(said.contains("6 tensor(s)") && said.contains("shexp"), "none are said, two layers have some: {said}");
}
