#![allow(clippy::unwrap_used, reason = "tests")]

use super::*;
use serde_json::json;

/// A small configuration of `model_type` in Hub style.
fn config(model_type: &str) -> Map<String, Value> {
    let value = json!({
        "model_type": model_type, "vocab_size": 256, "hidden_size": 128, "intermediate_size": 256,
        "moe_intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 4,
        "n_shared_experts": 1, "n_routed_experts": 16, "num_experts_per_tok": 4, "kv_lora_rank": 64,
        "q_lora_rank": 96, "qk_rope_head_dim": 32, "qk_nope_head_dim": 32, "v_head_dim": 48,
        "n_group": 4, "topk_group": 2, "max_position_embeddings": 163_840, "first_k_dense_replace": 1,
        "hidden_act": "silu", "attention_bias": false, "use_cache": true, "transformers_version": "4.44.2",
    });
    let mut map = value.as_object().unwrap().clone();
    if matches!(model_type, "deepseek_v32" | "glm_moe_dsa") {
        for (key, n) in [("index_topk", 16), ("index_head_dim", 64), ("index_n_heads", 8)] {
            map.insert(key.to_owned(), json!(n));
        }
    }
    map
}

fn with(model_type: &str, changes: &[(&str, Value)]) -> Result<ModelSpec, ModelError> {
    let mut map = config(model_type);
    map.extend(changes.iter().map(|(key, value)| ((*key).to_owned(), value.clone())));
    parse(&map)
}

fn refused(model_type: &str, key: &str, value: Value) -> String {
    with(model_type, &[(key, value)]).expect_err("it is not served").to_string()
}

fn yarn(mscale: f64, all_dim: f64) -> Value {
    json!({"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1,
           "mscale": mscale, "mscale_all_dim": all_dim})
}

#[test]
fn both_styles_of_rope_say_the_same() {
    let hub = with("deepseek_v32", &[("rope_theta", json!(10000)), ("rope_scaling", yarn(1.0, 1.0))]).unwrap();
    let mut parameters = yarn(1.0, 1.0);
    let kind = parameters.as_object_mut().unwrap().remove("type").unwrap();
    parameters["rope_type"] = kind;
    parameters["rope_theta"] = json!(10000.0);
    let v5 = with("deepseek_v32", &[("rope_parameters", parameters)]).unwrap();
    assert_eq!(hub.rope_frequencies, v5.rope_frequencies);
    assert_eq!((hub.softmax_scale, hub.rope_factor), (v5.softmax_scale, v5.rope_factor));
    assert!((hub.softmax_scale - 1.873_854_2 / 8.0).abs() < 1e-6);
}

#[test]
fn unequal_magnitudes_go_to_cosine_and_sine() {
    let spec = with("deepseek_v3", &[("rope_scaling", yarn(1.0, 0.5))]).unwrap();
    let m = |m: f64| 0.1 * m * 40f64.ln() + 1.0;
    assert!((spec.rope_factor - m(1.0) / m(0.5)).abs() < 1e-12);
    assert!((f64::from(spec.softmax_scale) - m(0.5).powi(2) / 8.0).abs() < 1e-6);
    let lite = with("deepseek_v2", &[("rope_scaling", yarn(0.707, 0.707))]).unwrap();
    assert!((lite.rope_factor - 1.0).abs() < 1e-15);
    let without = with("deepseek_v3", &[("rope_scaling", yarn(1.0, 0.0))]).unwrap();
    assert!((without.rope_factor - m(1.0)).abs() < 1e-12 && (without.softmax_scale - 0.125).abs() < 1e-7, "D14");
}

#[test]
fn indexers_rotate_as_their_family_unless_the_file_says_otherwise() {
    let layout = |model_type, changes: &[_]| with(model_type, changes).unwrap().indexer.unwrap().rope_layout;
    assert_eq!(layout("deepseek_v32", &[]), RopeLayout::HalfSplit);
    assert_eq!(layout("glm_moe_dsa", &[]), RopeLayout::Interleaved);
    let says = |yes: bool| [("indexer_rope_interleave", json!(yes))];
    assert_eq!(layout("deepseek_v32", &says(true)), RopeLayout::Interleaved);
    assert_eq!(layout("glm_moe_dsa", &says(false)), RopeLayout::HalfSplit);
}

#[test]
fn sharing_is_read_in_every_encoding() {
    let full = |changes: &[_]| with("glm_moe_dsa", changes).unwrap().indexer.unwrap().full;
    let wanted = [true, true, false, false];
    assert_eq!(full(&[("indexer_types", json!(["full", "full", "shared", "shared"]))]), wanted);
    assert_eq!(full(&[("index_topk_pattern", json!("FFSS"))]), wanted);
    assert_eq!(full(&[("index_topk_freq", json!(4)), ("index_skip_topk_offset", json!(2))]), wanted);
    assert_eq!(full(&[("index_topk_freq", json!(4))]), wanted, "D11: the offset is 2");
    assert_eq!(full(&[]), [true; 4]);
    for (key, value) in [("index_topk_pattern", json!("FFSS")), ("index_topk_freq", json!(4))] {
        let said = refused("deepseek_v32", key, value);
        assert!(said.contains(key) && said.contains("D18"), "{said}");
    }
    with("deepseek_v32", &[("index_topk_pattern", json!("FFFF"))]).expect("no layer shares");
    assert!(refused("glm_moe_dsa", "index_topk_pattern", json!("SFFF")).contains("first layer"));
    assert!(refused("glm_moe_dsa", "index_topk_pattern", json!("FF")).contains("2 entries for 4"));
}

#[test]
fn routers_follow_their_method() {
    let moe = |model_type, changes: &[_]| with(model_type, changes).unwrap().moe.unwrap();
    let v3 = moe("deepseek_v3", &[]);
    assert_eq!((v3.n_groups, v3.n_groups_kept, v3.score), (4, 2, RouterScore::Sigmoid));
    assert!(v3.correction_bias && v3.renormalise && (v3.scale - 2.5).abs() < 1e-7);
    let greedy = moe("deepseek_v2", &[("topk_method", json!("greedy"))]);
    assert_eq!((greedy.n_groups, greedy.score, greedy.correction_bias), (1, RouterScore::Softmax, false));
    let limited = moe("deepseek_v2", &[("topk_method", json!("group_limited_greedy"))]);
    assert_eq!((limited.n_groups, limited.group_score), (4, super::super::GroupScore::Best));
    assert!(refused("deepseek_v3", "topk_method", json!("greedy")).contains("topk_method"));
    assert!(refused("deepseek_v3", "n_group", json!(3)).contains("n_group"));
    let said = refused("deepseek_v3", "num_experts_per_tok", json!(9));
    assert!(said.contains("'num_experts_per_tok' is 9") && said.contains("8 can be reached"), "{said}");
}

#[test]
fn shared_experts_that_are_not_counted_are_as_many_as_the_family_has() {
    let shared = |model_type, value: Value| {
        with(model_type, &[("n_shared_experts", value), ("norm_topk_prob", json!(false))])
            .unwrap()
            .moe
            .unwrap()
            .n_shared
    };
    for (model_type, default) in [("deepseek_v2", 2), ("deepseek_v3", 1), ("deepseek_v32", 1), ("glm_moe_dsa", 1)] {
        assert_eq!(shared(model_type, Value::Null), default, "{model_type}");
        assert_eq!(shared(model_type, json!(0)), 0, "{model_type}");
    }
    assert_eq!(shared("glm4_moe_lite", Value::Null), 1);
}

#[test]
fn layers_with_experts_are_listed_or_counted() {
    let layers = |changes: &[_]| with("deepseek_v32", changes).unwrap().moe.map(|moe| moe.layers);
    assert_eq!(layers(&[]), Some(vec![false, true, true, true]));
    let types = json!(["dense", "sparse", "dense", "sparse"]);
    assert_eq!(layers(&[("mlp_layer_types", types)]), Some(vec![false, true, false, true]));
    assert_eq!(layers(&[("first_k_dense_replace", json!(9))]), None);
}

#[test]
fn eps_of_latent_norms_does_not_follow_the_file() {
    let spec = with("glm_moe_dsa", &[("rms_norm_eps", json!(1e-5))]).unwrap();
    assert_eq!((spec.rms_norm_eps, spec.latent_norm_eps), (1e-5, 1e-6));
}

#[test]
fn what_would_change_the_mathematics_is_refused_by_name() {
    let v32 = "deepseek_v32";
    for (key, value) in [
        ("attention_bias", json!(true)),
        ("hidden_act", json!("gelu")),
        ("sliding_window", json!(128)),
        ("final_logit_softcapping", json!(30.0)),
        ("index_kpool", json!(4)),
        ("attention_sinks", json!(true)),
        ("rope_interleave", json!(false)),
        ("moe_layer_freq", json!(2)),
        ("layer_types", json!(["sliding_attention"])),
        ("original_max_position_embeddings", json!(4096)),
        ("partial_rotary_factor", json!(0.5)),
        ("scoring_func", json!("sqrtsoftplus")),
    ] {
        // The rope keys are looked at with the rope.
        let rope = ("rope_parameters", json!({"rope_type": "default", "rope_theta": 1e4}));
        let said = with(v32, &[rope, (key, value)]).expect_err(key).to_string();
        assert!(said.contains(key), "{said}");
    }
    assert!(refused(v32, "rope_scaling", json!({"type": "linear", "factor": 2})).contains("linear"));
    assert!(refused(v32, "rope_scaling", json!({"type": "yarn", "wobble": 2})).contains("rope_scaling.wobble"));
    assert!(refused("deepseek_v3", "index_topk", json!(16)).contains("index_topk"));
    assert!(refused("deepseek_v4", "x", json!(1)).contains("deepseek_v4"));
    with(v32, &[("sliding_window", Value::Null)]).expect("null is absent");
    let bookkeeping = [
        ("initializer_range", json!(2)),
        ("_attn_implementation", json!("eager")),
        ("top_k", json!(50)),
        ("pruned_heads", json!({})),
        ("is_encoder_decoder", json!(false)),
    ];
    with(v32, &bookkeeping).expect("no mathematics");
}

#[test]
fn a_key_that_is_not_known_is_refused_whatever_it_says() {
    for key in ["clip_qkv", "alibi", "use_qk_clip", "text_config", "_secret", "initializer_factor", "mscale"] {
        for value in [json!(false), json!(0), json!(""), json!([]), json!({}), json!(true), json!(8.5)] {
            let said = refused("deepseek_v32", key, value);
            assert!(said.contains(&format!("'{key}' in config.json is not supported")), "{said}");
        }
    }
}

#[test]
fn keys_that_repeat_others_must_agree_with_them() {
    let v3 = "deepseek_v3";
    for (key, good, bad) in [
        ("num_key_value_heads", json!(4), json!(1)),
        ("qk_head_dim", json!(64), json!(1000)),
        ("head_dim", json!(32), json!(48)),
        ("head_dim", json!(64), json!(0)),
        ("is_encoder_decoder", json!(false), json!(true)),
        ("add_cross_attention", json!(false), json!(true)),
        ("pruned_heads", json!({}), json!({"0": [1]})),
        ("cross_attention_hidden_size", Value::Null, json!(8)),
        ("architectures", json!(["DeepseekV3ForCausalLM"]), json!(["FooForCausalLM"])),
    ] {
        with(v3, &[(key, good)]).expect(key);
        let said = refused(v3, key, bad);
        assert!(said.contains(&format!("'{key}'")), "{said}");
    }
    let code = ("auto_map", json!({"AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM"}));
    with(v3, &[code.clone(), ("architectures", json!(["DeepseekV3ForCausalLM"]))]).expect("as it was published");
    assert!(refused(v3, code.0, code.1).contains("auto_map"));
}

#[test]
fn impossible_numbers_are_refused_by_name() {
    for (key, value) in [
        ("hidden_size", json!(0)),
        ("hidden_size", json!(-1)),
        ("hidden_size", json!(1.5)),
        ("hidden_size", json!(1u64 << 40)),
        ("num_hidden_layers", json!("4")),
        ("qk_rope_head_dim", json!(31)),
        ("index_head_dim", json!(16)),
        ("rms_norm_eps", json!(-1e-6)),
        ("rope_theta", json!(0.5)),
        ("vocab_size", Value::Null),
    ] {
        let said = refused("deepseek_v32", key, value);
        assert!(said.contains(key), "{said}");
    }
    let wide = r#"{"model_type":"deepseek_v3","vocab_size":9,"hidden_size":8,"intermediate_size":8,
        "num_hidden_layers":1,"num_attention_heads":1048576,"kv_lora_rank":1048576,"qk_rope_head_dim":2,
        "qk_nope_head_dim":2,"v_head_dim":2,"max_position_embeddings":9}"#;
    assert!(ModelSpec::from_config(wide.as_bytes()).unwrap_err().to_string().contains("a row of 1048576"));
    assert!(ModelSpec::from_config(b"[1]").is_err() && ModelSpec::from_config(b"{").is_err());
    let deep = format!("{{\"a\":{}", "[".repeat(100_000));
    assert!(ModelSpec::from_config(deep.as_bytes()).unwrap_err().to_string().contains("recursion limit"));
}

/// A configuration as it was published, from the seeds of the fuzz target.
fn published(name: &str) -> ModelSpec {
    let dir = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fuzz/seeds/config");
    ModelSpec::from_config(&std::fs::read(dir.join(name)).unwrap()).unwrap()
}

#[test]
fn published_configurations_are_read() {
    let v32 = published("deepseek-v3.2.json");
    assert!((v32.softmax_scale - 0.135_233_78).abs() < 1e-7, "{}", v32.softmax_scale);
    let indexer = v32.indexer.as_ref().unwrap();
    assert_eq!((indexer.n_heads, indexer.head_dim, indexer.top_k, indexer.n_full()), (64, 128, 2048, 61));
    assert_eq!(v32.moe.as_ref().unwrap().layers.iter().filter(|sparse| **sparse).count(), 58);
    let glm = published("glm-5.2.json");
    assert!((glm.softmax_scale - 0.0625).abs() < 1e-9);
    assert_eq!((glm.indexer.as_ref().unwrap().n_full(), glm.moe.as_ref().unwrap().n_groups), (21, 1));
    let lite = published("deepseek-v2-lite.json");
    assert_eq!((lite.q_lora_rank, lite.label()), (None, Some("dense: no indexer")));
    assert!((lite.rope_factor - 1.0).abs() < 1e-12);
}
