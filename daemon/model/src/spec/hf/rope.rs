//! How are positions encoded? `rope_scaling` if it says something, else `rope_parameters`; YaRN or nothing.

use super::super::json::Object;
use super::super::keys::CONTEXT_MAX;
use super::super::yarn::{Rope, Yarn, magnitude};
use crate::ModelError;

/// Base of a model that names none.
const THETA: f64 = 10000.0;
/// Keys that are read; any other may change the frequencies.
const KNOWN: [&str; 13] = [
    "attention_factor",
    "beta_fast",
    "beta_slow",
    "factor",
    "finetuned",
    "mscale",
    "mscale_all_dim",
    "original_max_position_embeddings",
    "partial_rotary_factor",
    "rope_theta",
    "rope_type",
    "truncate",
    "type",
];

pub(super) fn parse(config: Object<'_>, context_length: u32) -> Result<Rope, ModelError> {
    let scaling = config.object("rope_scaling", "rope_scaling.")?.filter(|keys| !keys.map.is_empty());
    let keys = match scaling {
        Some(keys) => Some(keys),
        None => config.object("rope_parameters", "rope_parameters.")?,
    };
    let top = config.float("rope_theta")?;
    let Some(keys) = keys else { return rope(top.unwrap_or(THETA), None, config) };
    if let Some(key) = keys.map.keys().find(|key| !KNOWN.contains(&key.as_str())) {
        return Err(keys.unknown(key));
    }
    for keys in [config, keys] {
        let part = keys.float("partial_rotary_factor")?.unwrap_or(1.0);
        if part.total_cmp(&1.0).is_ne() {
            return Err(keys.refuse("partial_rotary_factor", part, "only 1 is served"));
        }
    }
    let base = keys.float("rope_theta")?.or(top).unwrap_or(THETA);
    let kind = match keys.str("rope_type")? {
        Some(kind) => kind,
        None => keys.str("type")?.unwrap_or("default"),
    };
    match kind {
        "default" => rope(base, None, keys),
        "yarn" => rope(base, Some(yarn(keys, context_length)?), keys),
        other => Err(keys.refuse("rope_type", other, "only 'default' and 'yarn' are served")),
    }
}

fn rope(base: f64, yarn: Option<Yarn>, keys: Object<'_>) -> Result<Rope, ModelError> {
    if base <= 1.0 {
        return Err(keys.refuse("rope_theta", base, "must be above 1"));
    }
    Ok(Rope { base, yarn })
}

fn yarn(keys: Object<'_>, context_length: u32) -> Result<Yarn, ModelError> {
    let original = "original_max_position_embeddings";
    let original: f64 = keys.optional(original, CONTEXT_MAX)?.filter(|&n| n > 0).unwrap_or(context_length).into();
    let factor = keys.float("factor")?.unwrap_or_else(|| f64::from(context_length) / original);
    // As in Python, 0 counts as absent.
    let number = |key: &str| match keys.get(key).map(|value| value.as_f64()) {
        Some(Some(0.0)) => Ok(None),
        _ => keys.float(key),
    };
    let (mscale, all_dim) = (number("mscale")?, number("mscale_all_dim")?);
    let implied = match (mscale, all_dim) {
        (Some(mscale), Some(all_dim)) => magnitude(factor, mscale) / magnitude(factor, all_dim),
        _ => magnitude(factor, 1.0),
    };
    Ok(Yarn {
        factor,
        original_context: original,
        beta_fast: number("beta_fast")?.unwrap_or(32.0),
        beta_slow: number("beta_slow")?.unwrap_or(1.0),
        truncate: keys.bool("truncate")?.unwrap_or(true),
        attention_factor: keys.float("attention_factor")?.unwrap_or(implied),
        score_factor: all_dim.map_or(1.0, |all_dim| magnitude(factor, all_dim).powi(2)),
    })
}
