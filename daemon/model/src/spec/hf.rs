//! What does a Hugging Face `config.json` say? Both styles: `rope_theta` with `rope_scaling`, and `rope_parameters`.
//!
//! Defaults of keys that are absent, and the maths behind each key, are those of transformers 5.23
//! (`configuration_*.py` and `modeling_*.py` of the model type).

mod known;
mod rope;

use super::config::{K_NORM_EPS, SCHEDULE_OFFSET, check_full, check_moe, group_score, schedule};
use super::json::Object;
use super::keys::{CONTEXT_MAX, DIM_MAX, LAYERS_MAX};
use super::parse::VOCAB_MAX;
use super::yarn::Rope;
use super::{Architecture, IndexerSpec, ModelSpec, MoeSpec, RopeLayout, RouterScore};
use crate::ModelError;
use serde_json::{Map, Value};

/// Epsilon of the q_a and kv_a norms (D3): transformers passes none, so its class default holds.
const LATENT_NORM_EPS: f32 = 1e-6;

/// What a model type means where its configuration is silent.
struct Family {
    model_type: &'static str,
    architecture: Architecture,
    rms_norm_eps: f64,
    dense_layers: u32,
    shared_experts: u32,
    /// Expert groups and those kept.
    groups: (u32, u32),
    renormalise: bool,
    expert_scale: f64,
    score: RouterScore,
    topk_method: &'static str,
}

const V3: Family = Family {
    model_type: "deepseek_v3",
    architecture: Architecture::DeepSeek2,
    rms_norm_eps: 1e-6,
    dense_layers: 3,
    shared_experts: 1,
    groups: (8, 4),
    renormalise: true,
    expert_scale: 2.5,
    score: RouterScore::Sigmoid,
    topk_method: "noaux_tc",
};

const FAMILIES: [Family; 5] = [
    Family {
        model_type: "deepseek_v2",
        dense_layers: 0,
        shared_experts: 2,
        groups: (1, 1),
        renormalise: false,
        expert_scale: 1.0,
        score: RouterScore::Softmax,
        topk_method: "greedy",
        ..V3
    },
    V3,
    Family { model_type: "deepseek_v32", architecture: Architecture::DeepSeek32, ..V3 },
    Family { model_type: "glm_moe_dsa", architecture: Architecture::GlmDsa, rms_norm_eps: 1e-5, groups: (1, 1), ..V3 },
    Family {
        model_type: "glm4_moe_lite",
        rms_norm_eps: 1e-5,
        dense_layers: 1,
        groups: (1, 1),
        expert_scale: 1.8,
        ..V3
    },
];

#[expect(clippy::cast_possible_truncation, reason = "hyperparameters are single precision")]
fn single(n: f64) -> f32 {
    n as f32
}

/// Reads a whole configuration.
pub(super) fn parse(config: &Map<String, Value>) -> Result<ModelSpec, ModelError> {
    let keys = Object { map: config, prefix: "" };
    let model_type = keys.str("model_type")?.unwrap_or("none");
    let Some(family) = FAMILIES.iter().find(|family| family.model_type == model_type) else {
        let types: Vec<&str> = FAMILIES.iter().map(|family| family.model_type).collect();
        return Err(keys.refuse("model_type", model_type, format!("served are {}", types.join(", "))));
    };
    known::check(keys, family.architecture)?;
    let (nope, rope_dim) = (keys.count("qk_nope_head_dim", DIM_MAX)?, keys.count("qk_rope_head_dim", DIM_MAX)?);
    if !rope_dim.is_multiple_of(2) {
        return Err(keys.refuse("qk_rope_head_dim", rope_dim, "must be even"));
    }
    let n_layers = keys.count("num_hidden_layers", LAYERS_MAX)?;
    let context_length = keys.count("max_position_embeddings", CONTEXT_MAX)?;
    let rope = rope::parse(keys, context_length)?;
    Ok(ModelSpec {
        architecture: family.architecture,
        n_layers,
        vocab_size: keys.count("vocab_size", VOCAB_MAX)?,
        hidden_size: keys.count("hidden_size", DIM_MAX)?,
        context_length,
        n_heads: keys.count("num_attention_heads", DIM_MAX)?,
        q_lora_rank: keys.optional("q_lora_rank", DIM_MAX)?.filter(|&rank| rank > 0),
        kv_lora_rank: keys.count("kv_lora_rank", DIM_MAX)?,
        qk_nope_head_dim: nope,
        qk_rope_head_dim: rope_dim,
        rope_row: rope_dim,
        v_head_dim: keys.count("v_head_dim", DIM_MAX)?,
        group_count: 1,
        softmax_scale: single(rope.score_factor() / f64::from(nope + rope_dim).sqrt()),
        rms_norm_eps: single(keys.float("rms_norm_eps")?.unwrap_or(family.rms_norm_eps)),
        latent_norm_eps: LATENT_NORM_EPS,
        kv_a_norm: true,
        rope_frequencies: rope.frequencies(rope_dim),
        rope_layout: layout(keys.bool("rope_interleave")?.unwrap_or(true)),
        rope_factor: rope.attention_factor(),
        indexer: match family.architecture {
            Architecture::DeepSeek2 => None,
            _ => Some(indexer(keys, family, &rope, rope_dim, n_layers)?),
        },
        feed_forward: keys.count("intermediate_size", DIM_MAX)?,
        moe: moe(keys, family, n_layers)?,
        tied_embeddings: keys.bool("tie_word_embeddings")?.unwrap_or(false),
    })
}

/// The RoPE of a configuration.
pub(super) fn rope_of(config: &Map<String, Value>, context_length: u32) -> Result<Rope, ModelError> {
    rope::parse(Object { map: config, prefix: "" }, context_length)
}

fn layout(interleaved: bool) -> RopeLayout {
    if interleaved { RopeLayout::Interleaved } else { RopeLayout::HalfSplit }
}

fn indexer(
    keys: Object<'_>,
    family: &Family,
    rope: &Rope,
    rope_dim: u32,
    n_layers: u32,
) -> Result<IndexerSpec, ModelError> {
    let head_dim = keys.count("index_head_dim", DIM_MAX)?;
    if rope_dim > head_dim {
        return Err(keys.refuse("index_head_dim", head_dim, format!("is below qk_rope_head_dim, {rope_dim}")));
    }
    let glm = family.architecture == Architecture::GlmDsa;
    Ok(IndexerSpec {
        n_heads: keys.count("index_n_heads", DIM_MAX)?,
        head_dim,
        top_k: keys.count("index_topk", CONTEXT_MAX)?,
        rope_dim,
        rope_layout: layout(keys.bool("indexer_rope_interleave")?.unwrap_or(glm)),
        rope_frequencies: rope.frequencies(rope_dim),
        k_norm_eps: K_NORM_EPS,
        full: indexer_types(keys, n_layers, family.architecture)?,
    })
}

/// Which layers select: a list, else a pattern, else a schedule; all, if nothing is said.
fn indexer_types(keys: Object<'_>, n_layers: u32, architecture: Architecture) -> Result<Vec<bool>, ModelError> {
    let (key, full) = match (keys.get("indexer_types"), keys.get("index_topk_pattern")) {
        (Some(_), _) => ("indexer_types", kinds(keys, "indexer_types")?),
        (None, Some(Value::String(pattern))) => {
            let kind = |c: char| match c {
                'F' => Ok(true),
                'S' => Ok(false),
                _ => Err(keys.refuse("index_topk_pattern", pattern, "only F and S are known")),
            };
            ("index_topk_pattern", pattern.chars().map(kind).collect::<Result<_, _>>()?)
        }
        (None, Some(_)) => ("index_topk_pattern", kinds(keys, "index_topk_pattern")?),
        (None, None) => {
            let frequency = keys.optional("index_topk_freq", LAYERS_MAX)?.unwrap_or(1);
            let offset = keys.optional("index_skip_topk_offset", LAYERS_MAX)?.unwrap_or(SCHEDULE_OFFSET);
            ("index_topk_freq", schedule(n_layers, frequency, offset))
        }
    };
    check_full(&full, n_layers).map_err(|reason| keys.refuse(key, "a list", reason))?;
    if architecture == Architecture::DeepSeek32 && full.contains(&false) {
        let reason = "transformers lets no layer of deepseek_v32 share (D18): only glm_moe_dsa may";
        return Err(keys.refuse(key, "a list", reason));
    }
    Ok(full)
}

fn kinds(keys: Object<'_>, key: &str) -> Result<Vec<bool>, ModelError> {
    let kind = |kind: &str| match kind {
        "full" => Ok(true),
        "shared" => Ok(false),
        other => Err(keys.refuse(key, other, "only 'full' and 'shared' are known")),
    };
    keys.strings(key)?.unwrap_or_default().into_iter().map(kind).collect()
}

/// Which layers have experts: a list, else all but the first ones.
fn moe_layers(keys: Object<'_>, family: &Family, n_layers: u32) -> Result<Vec<bool>, ModelError> {
    let key = "mlp_layer_types";
    let Some(kinds) = keys.strings(key)? else {
        let dense = keys.optional("first_k_dense_replace", u32::MAX)?.unwrap_or(family.dense_layers);
        return Ok((0..n_layers).map(|layer| layer >= dense).collect());
    };
    let sparse = |kind: &str| match kind {
        "sparse" => Ok(true),
        "dense" => Ok(false),
        other => Err(keys.refuse(key, other, "only 'dense' and 'sparse' are known")),
    };
    let layers = kinds.into_iter().map(sparse).collect::<Result<Vec<_>, _>>()?;
    if layers.len() != n_layers as usize {
        return Err(keys.refuse(key, "a list", format!("has {} entries for {n_layers} layers", layers.len())));
    }
    Ok(layers)
}

fn moe(keys: Object<'_>, family: &Family, n_layers: u32) -> Result<Option<MoeSpec>, ModelError> {
    let layers = moe_layers(keys, family, n_layers)?;
    if !layers.contains(&true) {
        return Ok(None);
    }
    let names = ["n_routed_experts", "num_local_experts", "num_experts"];
    let name = names.into_iter().find(|name| keys.get(name).is_some()).unwrap_or(names[0]);
    let score = match keys.str("scoring_func")? {
        None => family.score,
        Some("sigmoid") => RouterScore::Sigmoid,
        Some("softmax") => RouterScore::Softmax,
        Some(other) => return Err(keys.refuse("scoring_func", other, "only 'sigmoid' and 'softmax' are served")),
    };
    let (groups, kept, correction_bias) = groups(keys, family)?;
    let renormalise = keys.bool("norm_topk_prob")?.unwrap_or(family.renormalise);
    if renormalise && family.model_type == "deepseek_v2" {
        let reason = "with deepseek_v2, transformers ignores it and DeepSeek's code leaves the factor out";
        return Err(keys.refuse("norm_topk_prob", true, reason));
    }
    let moe = MoeSpec {
        n_experts: keys.count(name, DIM_MAX)?,
        n_active: keys.count("num_experts_per_tok", DIM_MAX)?,
        feed_forward: keys.count("moe_intermediate_size", DIM_MAX)?,
        n_shared: keys.optional("n_shared_experts", DIM_MAX)?.unwrap_or(family.shared_experts),
        n_groups: groups,
        n_groups_kept: kept,
        score,
        group_score: group_score(score),
        correction_bias,
        renormalise,
        scale: single(keys.float("routed_scaling_factor")?.unwrap_or(family.expert_scale)),
        layers,
    };
    check_moe(&moe).map_err(|(active, reason)| match active {
        true => keys.refuse("num_experts_per_tok", moe.n_active, reason),
        false => keys.refuse("n_group", groups, reason),
    })?;
    Ok(Some(moe))
}

/// Groups, those kept, and whether a bias corrects the choice, by the method's name.
fn groups(keys: Object<'_>, family: &Family) -> Result<(u32, u32, bool), ModelError> {
    let method = keys.str("topk_method")?.unwrap_or(family.topk_method);
    let groups = || {
        let groups = keys.optional("n_group", DIM_MAX)?.unwrap_or(family.groups.0);
        Ok::<_, ModelError>((groups, keys.optional("topk_group", DIM_MAX)?.unwrap_or(family.groups.1)))
    };
    match method {
        // Greedy choice does not look at groups, even where the file counts some.
        "greedy" if family.score == RouterScore::Softmax => Ok((1, 1, false)),
        "group_limited_greedy" if family.score == RouterScore::Softmax => groups().map(|(n, kept)| (n, kept, false)),
        "noaux_tc" => groups().map(|(n, kept)| (n, kept, true)),
        other => Err(keys.refuse("topk_method", other, format!("is not served with model type {}", family.model_type))),
    }
}

#[cfg(test)]
mod tests;
