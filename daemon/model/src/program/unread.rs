//! Which tensors of a model did its program not read? One that nobody reads may change what the model computes - a
//! bias, a sink, a further norm - so a model that has any is refused, but for those that are known to be left out.

use crate::weights::{Weights, expert_of, layer_of};
use crate::{ModelError, ModelSpec};

/// Tensors of an indexer, which a dense step leaves out and a layer that shares its selection need not have (D17).
const INDEXER: [&str; 5] = [
    "indexer.attn_k.weight",
    "indexer.attn_q_b.weight",
    "indexer.k_norm.bias",
    "indexer.k_norm.weight",
    "indexer.proj.weight",
];
/// How many tensors an error names.
const NAMED: usize = 3;

/// Refuses a model with tensors that are neither `bound` nor left out for a reason; both by a GGUF's names.
pub(super) fn check(spec: &ModelSpec, weights: &Weights, bound: &dyn Fn(&str) -> bool) -> Result<(), ModelError> {
    let n_experts = spec.moe.as_ref().map_or(0, |moe| moe.n_experts);
    let mut unread: Vec<&str> = Vec::new();
    for (name, ours) in weights.inventory() {
        let read = ours.as_deref().is_some_and(|ours| bound(ours) || is_left_out(spec, ours, bound));
        let read = read && expert_of(name).is_none_or(|(expert, _)| expert < n_experts);
        if !read && !is_of_no_layer(spec, name) {
            unread.push(name);
        }
    }
    if unread.is_empty() {
        return Ok(());
    }
    unread.sort_unstable();
    let (n, more) = (unread.len(), if unread.len() > NAMED { ", ..." } else { "" });
    let what = format!("{n} tensor(s) that no operator reads ({}{more})", unread[..n.min(NAMED)].join(", "));
    Err(ModelError::Unsupported { what, hint: ": it may change what the model computes" })
}

/// Whether the tensor that a GGUF calls `name` is known and not needed.
fn is_left_out(spec: &ModelSpec, name: &str, bound: &dyn Fn(&str) -> bool) -> bool {
    match name {
        // It went into the angles.
        "rope_freqs.weight" => return true,
        "output.weight" => return spec.tied_embeddings,
        _ => {}
    }
    let Some((layer, part)) = name.strip_prefix("blk.").and_then(|rest| rest.split_once('.')) else { return false };
    let of_layer = |part: &str| bound(&format!("blk.{layer}.{part}"));
    match part {
        // Both of its parts were read, or made of it.
        "attn_kv_b.weight" => of_layer("attn_k_b.weight") && of_layer("attn_v_b.weight"),
        _ => spec.indexer.is_some() && INDEXER.contains(&part),
    }
}

/// Whether the tensor that the model calls `name` is of a layer that is not run (D10), or is a table of frequencies
/// that old checkpoints stored although it follows from the configuration.
fn is_of_no_layer(spec: &ModelSpec, name: &str) -> bool {
    layer_of(name).is_some_and(|layer| layer >= spec.n_layers) || name.ends_with(".rotary_emb.inv_freq")
}
