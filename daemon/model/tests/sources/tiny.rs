//! A seeded tiny model of odd shapes, written as a Hugging Face folder or as a GGUF, from one set of numbers.

use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::{Value as Json, json};
use sparsed_quant::Format;
use sparsed_quant::gguf::{Array, Metadata, Value, Writer};
use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};

pub const HIDDEN: usize = 20;
pub const HEADS: usize = 3;
pub const NOPE: usize = 6;
pub const ROPE: usize = 4;
pub const VALUE: usize = 5;
pub const RANK: usize = 7;
const Q_RANK: usize = 9;
const VOCAB: usize = 11;
const WIDTH: usize = 10;
pub const EXPERTS: usize = 3;
pub const LAYERS: usize = 3;

/// A tensor by Hugging Face's name: shape with the slowest dimension first.
#[derive(Clone, Debug, PartialEq)]
pub struct Numbers {
    pub shape: Vec<usize>,
    pub values: Vec<f32>,
}

pub type Tensors = BTreeMap<String, Numbers>;

/// All tensors: the first layer dense, the second without an indexer of its own. Values are eighths: exact in bf16.
pub fn tensors() -> Tensors {
    let mut state = 0x1234_5678_u32;
    let mut all = Tensors::new();
    let mut add = |name: String, shape: &[usize]| {
        let value = |_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            f32::from(u8::try_from(state >> 27).unwrap()) / 8.0 - 2.0
        };
        let values = (0..shape.iter().product::<usize>()).map(value).collect();
        all.insert(name, Numbers { shape: shape.to_vec(), values });
    };
    add("model.embed_tokens.weight".to_owned(), &[VOCAB, HIDDEN]);
    add("lm_head.weight".to_owned(), &[VOCAB, HIDDEN]);
    add("model.norm.weight".to_owned(), &[HIDDEN]);
    for layer in 0..LAYERS {
        let name = |part: &str| format!("model.layers.{layer}.{part}");
        add(name("input_layernorm.weight"), &[HIDDEN]);
        add(name("post_attention_layernorm.weight"), &[HIDDEN]);
        add(name("self_attn.q_a_proj.weight"), &[Q_RANK, HIDDEN]);
        add(name("self_attn.q_a_layernorm.weight"), &[Q_RANK]);
        add(name("self_attn.q_b_proj.weight"), &[HEADS * (NOPE + ROPE), Q_RANK]);
        add(name("self_attn.kv_a_proj_with_mqa.weight"), &[RANK + ROPE, HIDDEN]);
        add(name("self_attn.kv_a_layernorm.weight"), &[RANK]);
        add(name("self_attn.kv_b_proj.weight"), &[HEADS * (NOPE + VALUE), RANK]);
        add(name("self_attn.o_proj.weight"), &[HIDDEN, HEADS * VALUE]);
        if layer != 1 {
            add(name("self_attn.indexer.wq_b.weight"), &[2 * 6, Q_RANK]);
            add(name("self_attn.indexer.wk.weight"), &[6, HIDDEN]);
            add(name("self_attn.indexer.k_norm.weight"), &[6]);
            add(name("self_attn.indexer.k_norm.bias"), &[6]);
            add(name("self_attn.indexer.weights_proj.weight"), &[2, HIDDEN]);
        }
        let mut ffn = |prefix: String| {
            add(format!("{prefix}.gate_proj.weight"), &[WIDTH, HIDDEN]);
            add(format!("{prefix}.up_proj.weight"), &[WIDTH, HIDDEN]);
            add(format!("{prefix}.down_proj.weight"), &[HIDDEN, WIDTH]);
        };
        if layer == 0 {
            ffn(name("mlp"));
            continue;
        }
        ffn(name("mlp.shared_experts"));
        (0..EXPERTS).for_each(|expert| ffn(name(&format!("mlp.experts.{expert}"))));
        add(name("mlp.gate.weight"), &[EXPERTS, HIDDEN]);
        add(name("mlp.gate.e_score_correction_bias"), &[EXPERTS]);
    }
    all
}

/// The configuration of those tensors.
pub fn config() -> Json {
    json!({
        "model_type": "glm_moe_dsa", "vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": WIDTH,
        "moe_intermediate_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
        "n_shared_experts": 1, "n_routed_experts": EXPERTS, "num_experts_per_tok": 2, "kv_lora_rank": RANK,
        "q_lora_rank": Q_RANK, "qk_rope_head_dim": ROPE, "qk_nope_head_dim": NOPE, "v_head_dim": VALUE,
        "n_group": 1, "topk_group": 1, "max_position_embeddings": 64, "first_k_dense_replace": 1,
        "index_topk": 5, "index_n_heads": 2, "index_head_dim": 6, "index_topk_pattern": "FSF",
        "rms_norm_eps": 1e-6, "rope_theta": 1e6, "tie_word_embeddings": false,
    })
}

/// One tensor, encoded.
#[derive(Clone)]
pub struct Stored {
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    pub bytes: Vec<u8>,
}

pub fn stored(numbers: &Numbers, dtype: Dtype) -> Stored {
    let format = match dtype {
        Dtype::F32 => Format::F32,
        Dtype::F16 => Format::F16,
        Dtype::BF16 => Format::BF16,
        other => panic!("{other:?}"),
    };
    let mut bytes = vec![0; format.row_bytes(numbers.values.len()).unwrap()];
    sparsed_quant::encode(format, &numbers.values, &mut bytes).unwrap();
    Stored { dtype, shape: numbers.shape.clone(), bytes }
}

/// Writes `dir/file`.
pub fn write_safetensors(dir: &Path, file: &str, tensors: &[(String, Stored)]) {
    let views = tensors.iter().map(|(name, t)| (name, TensorView::new(t.dtype, t.shape.clone(), &t.bytes).unwrap()));
    std::fs::write(dir.join(file), safetensors::serialize(views, None).unwrap()).unwrap();
}

/// All tensors as `dtype`.
pub fn all_stored(tensors: &Tensors, dtype: Dtype) -> Vec<(String, Stored)> {
    tensors.iter().map(|(name, numbers)| (name.clone(), stored(numbers, dtype))).collect()
}

/// Writes the folder `dir` with all tensors as `dtype` in one file.
pub fn write_folder(dir: &Path, tensors: &Tensors, config: &Json, dtype: Dtype) {
    std::fs::write(dir.join("config.json"), config.to_string()).unwrap();
    write_safetensors(dir, "model.safetensors", &all_stored(tensors, dtype));
}

/// One tensor on its way into a GGUF: name, dimensions with the fastest first, values.
pub type Planned = (String, Vec<u64>, Vec<f32>);

/// The tensors as a GGUF has them, by the rules of llama.cpp's converter; `split`: kv_b in its two parts.
pub fn planned(tensors: &Tensors, split: bool) -> Vec<Planned> {
    let names = [
        ("model.embed_tokens.weight", "token_embd.weight"),
        ("model.norm.weight", "output_norm.weight"),
        ("lm_head.weight", "output.weight"),
    ];
    let parts = [
        ("input_layernorm", "attn_norm"),
        ("post_attention_layernorm", "ffn_norm"),
        ("self_attn.q_a_proj", "attn_q_a"),
        ("self_attn.q_a_layernorm", "attn_q_a_norm"),
        ("self_attn.q_b_proj", "attn_q_b"),
        ("self_attn.kv_a_proj_with_mqa", "attn_kv_a_mqa"),
        ("self_attn.kv_a_layernorm", "attn_kv_a_norm"),
        ("self_attn.o_proj", "attn_output"),
        ("self_attn.indexer.wq_b", "indexer.attn_q_b"),
        ("self_attn.indexer.wk", "indexer.attn_k"),
        ("self_attn.indexer.k_norm", "indexer.k_norm"),
        ("self_attn.indexer.weights_proj", "indexer.proj"),
        ("mlp.gate", "ffn_gate_inp"),
        ("mlp.gate_proj", "ffn_gate"),
        ("mlp.up_proj", "ffn_up"),
        ("mlp.down_proj", "ffn_down"),
        ("mlp.shared_experts.gate_proj", "ffn_gate_shexp"),
        ("mlp.shared_experts.up_proj", "ffn_up_shexp"),
        ("mlp.shared_experts.down_proj", "ffn_down_shexp"),
    ];
    let mut out: Vec<Planned> = Vec::new();
    let mut put = |name: String, shape: &[usize], values: Vec<f32>| {
        out.push((name, shape.iter().rev().map(|&n| n as u64).collect(), values));
    };
    for (name, Numbers { shape, values }) in tensors {
        if let Some((_, ours)) = names.iter().find(|(theirs, _)| theirs == name) {
            put((*ours).to_owned(), shape, values.clone());
            continue;
        }
        let (layer, part) = name.strip_prefix("model.layers.").unwrap().split_once('.').unwrap();
        if part == "mlp.gate.e_score_correction_bias" {
            put(format!("blk.{layer}.exp_probs_b.bias"), shape, values.clone());
        } else if part == "self_attn.kv_b_proj.weight" && !split {
            put(format!("blk.{layer}.attn_kv_b.weight"), shape, values.clone());
        } else if part == "self_attn.kv_b_proj.weight" {
            let at = |head: usize, row: usize, column: usize| values[(head * (NOPE + VALUE) + row) * RANK + column];
            let (mut k, mut v) = (Vec::new(), Vec::new());
            for head in 0..HEADS {
                (0..RANK).for_each(|column| k.extend((0..NOPE).map(|row| at(head, row, column))));
                (0..VALUE).for_each(|row| v.extend((0..RANK).map(|column| at(head, NOPE + row, column))));
            }
            put(format!("blk.{layer}.attn_k_b.weight"), &[HEADS, RANK, NOPE], k);
            put(format!("blk.{layer}.attn_v_b.weight"), &[HEADS, VALUE, RANK], v);
        } else if let Some(rest) = part.strip_prefix("mlp.experts.") {
            let (expert, projection) = rest.split_once('.').unwrap();
            if expert == "0" {
                let of = |expert: usize| &tensors[&format!("model.layers.{layer}.mlp.experts.{expert}.{projection}")];
                let all = (0..EXPERTS).flat_map(|expert| of(expert).values.clone()).collect();
                let ours = projection.replace("_proj.weight", "_exps.weight");
                put(format!("blk.{layer}.ffn_{ours}"), &[EXPERTS, shape[0], shape[1]], all);
            }
        } else {
            let (part, kind) = part.rsplit_once('.').unwrap();
            let (_, ours) = parts.iter().find(|(theirs, _)| *theirs == part).unwrap();
            put(format!("blk.{layer}.{ours}.{kind}"), shape, values.clone());
        }
    }
    out
}

/// The metadata of those tensors.
pub fn metadata(arch: &str) -> Metadata {
    let mut metadata = Metadata::new();
    metadata.set("general.architecture", Value::String(arch.to_owned()));
    for (key, n) in [
        ("block_count", LAYERS),
        ("context_length", 64),
        ("embedding_length", HIDDEN),
        ("feed_forward_length", WIDTH),
        ("attention.head_count", HEADS),
        ("attention.head_count_kv", 1),
        ("attention.q_lora_rank", Q_RANK),
        ("attention.kv_lora_rank", RANK),
        ("attention.key_length", RANK + ROPE),
        ("attention.value_length", RANK),
        ("attention.key_length_mla", NOPE + ROPE),
        ("attention.value_length_mla", VALUE),
        ("rope.dimension_count", ROPE),
        ("leading_dense_block_count", 1),
        ("expert_count", EXPERTS),
        ("expert_used_count", 2),
        ("expert_shared_count", 1),
        ("expert_feed_forward_length", WIDTH),
        ("expert_gating_func", 2),
    ] {
        metadata.set(format!("{arch}.{key}"), Value::U32(u32::try_from(n).unwrap()));
    }
    metadata.set(format!("{arch}.rope.freq_base"), Value::F32(1e6));
    metadata.set(format!("{arch}.attention.layer_norm_rms_epsilon"), Value::F32(1e-6));
    metadata.set(format!("{arch}.expert_weights_scale"), Value::F32(2.5));
    metadata.set(format!("{arch}.expert_weights_norm"), Value::Bool(true));
    if arch != "deepseek2" {
        metadata.set(format!("{arch}.attention.indexer.head_count"), Value::U32(2));
        metadata.set(format!("{arch}.attention.indexer.key_length"), Value::U32(6));
        metadata.set(format!("{arch}.attention.indexer.top_k"), Value::U32(5));
        metadata.set(format!("{arch}.attention.indexer.types"), Value::Array(Array::Bool(vec![true, false, true])));
    }
    metadata
}

/// Writes a GGUF in F32.
pub fn write_gguf(path: &Path, metadata: Metadata, planned: &[Planned]) -> PathBuf {
    let mut writer = Writer::new(metadata);
    for (name, dims, _) in planned {
        writer.add(name, dims, Format::F32).unwrap();
    }
    let mut data = writer.begin(File::create(path).unwrap()).unwrap();
    for (_, _, values) in planned {
        data.tensor(&values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<u8>>()).unwrap();
    }
    data.finish().unwrap();
    path.to_owned()
}
