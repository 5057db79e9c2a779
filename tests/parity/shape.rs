//! Which models are there besides the kept ones? GGUF files of any shape with random weights, made from a seed.

use fastrand::Rng;
use sparsed_quant::gguf::{Array, Metadata, Value, Writer};
use sparsed_quant::{Format, encode};
use std::path::Path;

const ROPE_BASE: f32 = 50000.0;

/// A model of some shape; the fields are those of `sparsed_oracle::Config`.
#[derive(Clone, Debug)]
pub(super) struct Shape {
    pub(super) arch: &'static str,
    pub(super) n_tokens: usize,
    pub(super) n_layers: usize,
    pub(super) hidden: usize,
    pub(super) vocab: usize,
    pub(super) n_heads: usize,
    pub(super) groups: usize,
    pub(super) q_lora: Option<usize>,
    pub(super) latent: usize,
    pub(super) nope: usize,
    pub(super) rope_row: usize,
    pub(super) v_head: usize,
    pub(super) feed_forward: usize,
    pub(super) index: Option<Index>,
    pub(super) experts: Option<Experts>,
    /// Factor, original context, and the log multiplier in the file.
    pub(super) yarn: Option<(f32, u32, Option<f32>)>,
    pub(super) tied: bool,
    /// Layers of multi-token prediction at the end, to be skipped.
    pub(super) predicted: usize,
}

#[derive(Clone, Debug)]
pub(super) struct Index {
    pub(super) n_heads: usize,
    pub(super) width: usize,
    pub(super) rope: Option<usize>,
    pub(super) top_k: usize,
    /// Layers with an indexer of their own; all without the list.
    pub(super) full: Option<Vec<bool>>,
}

#[derive(Clone, Debug)]
pub(super) struct Experts {
    pub(super) n: usize,
    pub(super) active: usize,
    pub(super) shared: usize,
    pub(super) width: usize,
    pub(super) groups: usize,
    pub(super) kept: usize,
    pub(super) softmax: bool,
    pub(super) renormalise: bool,
    pub(super) first_layer: usize,
}

/// The shape that the cases depart from.
pub(super) fn base() -> Shape {
    Shape {
        arch: "deepseek32",
        n_tokens: 70,
        n_layers: 2,
        hidden: 33,
        vocab: 37,
        n_heads: 3,
        groups: 1,
        q_lora: Some(17),
        latent: 21,
        nope: 11,
        rope_row: 6,
        v_head: 13,
        feed_forward: 29,
        index: Some(Index { n_heads: 7, width: 10, rope: None, top_k: 9, full: None }),
        experts: None,
        yarn: None,
        tied: false,
        predicted: 0,
    }
}

pub(super) fn experts() -> Experts {
    Experts {
        n: 6,
        active: 2,
        shared: 1,
        width: 15,
        groups: 3,
        kept: 2,
        softmax: false,
        renormalise: true,
        first_layer: 0,
    }
}

/// Nearly normal, deviation 1: the sum of twelve numbers from 0 to 1, less 6.
#[expect(clippy::cast_possible_truncation, reason = "a weight in single precision")]
fn normal(random: &mut Rng) -> f32 {
    ((0..12).map(|_| random.f64()).sum::<f64>() - 6.0) as f32
}

/// Names and dimensions (the fastest first) of a shape's tensors.
fn tensors(shape: &Shape) -> Vec<(String, Vec<usize>)> {
    let s = shape;
    let mut all = vec![("token_embd.weight".to_owned(), vec![s.hidden, s.vocab])];
    all.push(("output_norm.weight".to_owned(), vec![s.hidden]));
    if !s.tied {
        all.push(("output.weight".to_owned(), vec![s.hidden, s.vocab]));
    }
    if s.groups > 1 {
        all.push(("rope_freqs.weight".to_owned(), vec![s.rope_row / 2]));
    }
    let key = s.nope + s.rope_row / s.groups;
    let from = s.q_lora.unwrap_or(s.hidden);
    for layer in 0..s.n_layers + s.predicted {
        let mut put = |name: &str, dims: &[usize]| all.push((format!("blk.{layer}.{name}"), dims.to_vec()));
        put("attn_norm.weight", &[s.hidden]);
        match s.q_lora {
            Some(rank) => {
                put("attn_q_a.weight", &[s.hidden, rank]);
                put("attn_q_a_norm.weight", &[rank]);
                put("attn_q_b.weight", &[rank, s.n_heads * key]);
            }
            None => put("attn_q.weight", &[s.hidden, s.n_heads * key]),
        }
        put("attn_kv_a_mqa.weight", &[s.hidden, s.latent + s.rope_row]);
        if s.groups == 1 {
            put("attn_kv_a_norm.weight", &[s.latent]);
            put("attn_k_b.weight", &[s.nope, s.latent, s.n_heads]);
            put("attn_v_b.weight", &[s.latent, s.v_head, s.n_heads]);
        }
        put("attn_output.weight", &[s.n_heads * s.v_head, s.hidden]);
        put("ffn_norm.weight", &[s.hidden]);
        if let Some(index) = s.index.as_ref().filter(|i| i.full.as_ref().is_none_or(|f| *f.get(layer).unwrap_or(&true)))
        {
            put("indexer.attn_q_b.weight", &[from, index.n_heads * index.width]);
            put("indexer.attn_k.weight", &[s.hidden, index.width]);
            put("indexer.k_norm.weight", &[index.width]);
            put("indexer.k_norm.bias", &[index.width]);
            put("indexer.proj.weight", &[s.hidden, index.n_heads]);
        }
        let mut feed_forward = |suffix: &str, width: usize, stack: &[usize]| {
            put(&format!("ffn_gate{suffix}.weight"), &[&[s.hidden, width], stack].concat());
            put(&format!("ffn_up{suffix}.weight"), &[&[s.hidden, width], stack].concat());
            put(&format!("ffn_down{suffix}.weight"), &[&[width, s.hidden], stack].concat());
        };
        match s.experts.as_ref().filter(|e| layer >= e.first_layer) {
            Some(e) => {
                feed_forward("_exps", e.width, &[e.n]);
                if e.shared > 0 {
                    feed_forward("_shexp", e.width * e.shared, &[]);
                }
                put("ffn_gate_inp.weight", &[s.hidden, e.n]);
                if !e.softmax {
                    put("exp_probs_b.bias", &[e.n]);
                }
            }
            None => feed_forward("", s.feed_forward, &[]),
        }
    }
    all
}

fn metadata(shape: &Shape) -> Metadata {
    let s = shape;
    let mut metadata = Metadata::new();
    metadata.set("general.architecture", Value::String(s.arch.to_owned()));
    metadata.set("tokenizer.ggml.model", Value::String("none".to_owned()));
    let mut set = |key: &str, value: Value| metadata.set(format!("{}.{key}", s.arch), value);
    let number = |n: usize| Value::U32(u32::try_from(n).unwrap());
    let mut count = |key: &str, n: usize| set(key, number(n));
    count("block_count", s.n_layers + s.predicted);
    count("nextn_predict_layers", s.predicted);
    count("context_length", 4096);
    count("embedding_length", s.hidden);
    count("feed_forward_length", s.feed_forward);
    count("vocab_size", s.vocab);
    count("attention.head_count", s.n_heads);
    count("attention.head_count_kv", 1);
    count("attention.q_lora_rank", s.q_lora.unwrap_or(0));
    count("attention.kv_lora_rank", s.latent);
    count("attention.key_length", s.latent + s.rope_row);
    count("attention.value_length", s.latent);
    count("attention.key_length_mla", s.nope + s.rope_row);
    count("attention.value_length_mla", s.v_head);
    count("rope.dimension_count", s.rope_row);
    if s.groups > 1 {
        count("attention.group_count", s.groups);
    }
    if let Some(index) = &s.index {
        count("attention.indexer.head_count", index.n_heads);
        count("attention.indexer.key_length", index.width);
        count("attention.indexer.top_k", index.top_k);
        index.rope.into_iter().for_each(|n| count("attention.indexer.rope_dimension_count", n));
    }
    if let Some(e) = &s.experts {
        count("leading_dense_block_count", e.first_layer);
        count("expert_count", e.n);
        count("expert_used_count", e.active);
        count("expert_shared_count", e.shared);
        count("expert_feed_forward_length", e.width);
        count("expert_group_count", e.groups);
        count("expert_group_used_count", e.kept);
        count("expert_gating_func", if e.softmax { 1 } else { 2 });
        set("expert_weights_norm", Value::Bool(e.renormalise));
        set("expert_weights_scale", Value::F32(1.7));
    }
    set("attention.layer_norm_rms_epsilon", Value::F32(1e-5));
    set("rope.freq_base", Value::F32(ROPE_BASE));
    if s.groups > 1 {
        set("attention.kv_a_norm", Value::Bool(false));
        set("attention.scale", Value::F32(0.4));
    }
    if let Some(full) = s.index.as_ref().and_then(|index| index.full.clone()) {
        set("attention.indexer.types", Value::Array(Array::Bool(full)));
    }
    if let Some((factor, original, log_multiplier)) = s.yarn {
        set("rope.scaling.type", Value::String("yarn".to_owned()));
        set("rope.scaling.factor", Value::F32(factor));
        set("rope.scaling.original_context_length", Value::U32(original));
        log_multiplier.into_iter().for_each(|m| set("rope.scaling.yarn_log_multiplier", Value::F32(m)));
    }
    metadata
}

/// What makes every group's slice of the rope row turn as a row of its own.
#[expect(clippy::cast_possible_truncation, reason = "a factor in single precision")]
fn factors(shape: &Shape) -> Vec<f32> {
    let frequency = |i: usize, width: usize| f64::from(ROPE_BASE).powf(-2.0 * i as f64 / width as f64);
    let head = shape.rope_row / shape.groups;
    let factor = |i: usize| frequency(i, shape.rope_row) / frequency(i % (head / 2), head);
    (0..shape.rope_row / 2).map(|i| factor(i) as f32).collect()
}

/// Writes a model with random weights.
pub(super) fn write(shape: &Shape, seed: u64, path: &Path) {
    let mut random = Rng::with_seed(seed);
    let mut writer = Writer::new(metadata(shape));
    let tensors = tensors(shape);
    for (name, dims) in &tensors {
        writer.add(name, &dims.iter().map(|&d| d as u64).collect::<Vec<_>>(), Format::F32).unwrap();
    }
    let mut out = writer.begin(std::fs::File::create(path).unwrap()).unwrap();
    for (name, dims) in tensors {
        let (middle, spread) = match name.as_str() {
            name if name.ends_with("bias") => (0.0, 0.2),
            name if name.contains("norm") => (1.0, 0.1),
            "token_embd.weight" => (0.0, 1.0),
            _ => (0.0, 1.0 / (dims[0] as f32).sqrt()),
        };
        let mut values: Vec<f32> = (0..dims.iter().product()).map(|_| middle + spread * normal(&mut random)).collect();
        if name == "rope_freqs.weight" {
            values = factors(shape);
        }
        let mut bytes = vec![0; values.len() * 4];
        encode(Format::F32, &values, &mut bytes).unwrap();
        out.tensor(&bytes).unwrap();
    }
    out.finish().unwrap();
}
