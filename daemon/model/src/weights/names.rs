//! What does Hugging Face call a tensor? llama.cpp's names to those of DeepSeek's checkpoints.

/// Parts of a layer that have a counterpart of their own.
const PARTS: &[(&str, &str)] = &[
    ("attn_kv_a_mqa", "self_attn.kv_a_proj_with_mqa"),
    ("attn_kv_a_norm", "self_attn.kv_a_layernorm"),
    ("attn_kv_b", "self_attn.kv_b_proj"),
    ("attn_norm", "input_layernorm"),
    ("attn_output", "self_attn.o_proj"),
    ("attn_q", "self_attn.q_proj"),
    ("attn_q_a", "self_attn.q_a_proj"),
    ("attn_q_a_norm", "self_attn.q_a_layernorm"),
    ("attn_q_b", "self_attn.q_b_proj"),
    ("ffn_down", "mlp.down_proj"),
    ("ffn_down_shexp", "mlp.shared_experts.down_proj"),
    ("ffn_gate", "mlp.gate_proj"),
    ("ffn_gate_inp", "mlp.gate"),
    ("ffn_gate_shexp", "mlp.shared_experts.gate_proj"),
    ("ffn_norm", "post_attention_layernorm"),
    ("ffn_up", "mlp.up_proj"),
    ("ffn_up_shexp", "mlp.shared_experts.up_proj"),
    ("indexer.attn_k", "self_attn.indexer.wk"),
    ("indexer.attn_q_b", "self_attn.indexer.wq_b"),
    ("indexer.k_norm", "self_attn.indexer.k_norm"),
    ("indexer.proj", "self_attn.indexer.weights_proj"),
];

/// Projections of experts.
const EXPERTS: [(&str, &str); 3] =
    [("ffn_down_exps", "down_proj"), ("ffn_gate_exps", "gate_proj"), ("ffn_up_exps", "up_proj")];

/// `blk.N.part.kind` in its three pieces.
fn of_layer(name: &str) -> Option<(u32, &str, &str)> {
    let (layer, rest) = name.strip_prefix("blk.")?.split_once('.')?;
    let (part, kind) = rest.rsplit_once('.')?;
    Some((layer.parse().ok()?, part, kind))
}

/// The counterpart of the tensor `name`.
pub(super) fn plain(name: &str) -> Option<String> {
    match name {
        "token_embd.weight" => return Some("model.embed_tokens.weight".to_owned()),
        "output_norm.weight" => return Some("model.norm.weight".to_owned()),
        "output.weight" => return Some("lm_head.weight".to_owned()),
        _ => {}
    }
    let (layer, part, kind) = of_layer(name)?;
    if (part, kind) == ("exp_probs_b", "bias") {
        return Some(format!("model.layers.{layer}.mlp.gate.e_score_correction_bias"));
    }
    let (_, theirs) = PARTS.iter().find(|(ours, _)| *ours == part)?;
    Some(format!("model.layers.{layer}.{theirs}.{kind}"))
}

/// The counterparts of a tensor of all experts of a layer: before and after the expert's number.
pub(super) fn experts(name: &str) -> Option<(String, String)> {
    let (layer, part, kind) = of_layer(name)?;
    let (_, theirs) = EXPERTS.iter().find(|(ours, _)| *ours == part)?;
    Some((format!("model.layers.{layer}.mlp.experts."), format!(".{theirs}.{kind}")))
}

/// The layer that a tensor belongs to by its name, in a GGUF or in a folder.
pub(crate) fn layer_of(name: &str) -> Option<u32> {
    let rest = name.strip_prefix("blk.").or_else(|| name.strip_prefix("model.layers."))?;
    rest.split_once('.')?.0.parse().ok()
}

/// The number of the expert that a folder's tensor belongs to, as [`experts`] writes it, and what follows it.
pub(crate) fn expert_of(name: &str) -> Option<(u32, &str)> {
    let (_, rest) = name.split_once("mlp.experts.")?;
    let (number, rest) = rest.split_once('.')?;
    let expert: u32 = number.parse().ok()?;
    (expert.to_string() == number).then_some((expert, rest))
}

/// The GGUF tensor that the tensor `name` of a folder is, or is one expert of.
pub(super) fn ours(name: &str) -> Option<String> {
    for ours in ["token_embd.weight", "output_norm.weight", "output.weight"] {
        if plain(ours).as_deref() == Some(name) {
            return Some(ours.to_owned());
        }
    }
    let (layer, rest) = name.strip_prefix("model.layers.")?.split_once('.')?;
    if rest == "mlp.gate.e_score_correction_bias" {
        return Some(format!("blk.{layer}.exp_probs_b.bias"));
    }
    let (part, kind) = rest.rsplit_once('.')?;
    if let Some((_, projection)) = expert_of(part) {
        let (ours, _) = EXPERTS.iter().find(|(_, theirs)| *theirs == projection)?;
        return Some(format!("blk.{layer}.{ours}.{kind}"));
    }
    let (ours, _) = PARTS.iter().find(|(_, theirs)| *theirs == part)?;
    Some(format!("blk.{layer}.{ours}.{kind}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_translate_and_strange_ones_do_not() {
        let is = |ours: &str, theirs: &str| assert_eq!(plain(ours).as_deref(), Some(theirs));
        is("blk.3.indexer.k_norm.bias", "model.layers.3.self_attn.indexer.k_norm.bias");
        is("blk.61.ffn_gate_inp.weight", "model.layers.61.mlp.gate.weight");
        is("blk.4.exp_probs_b.bias", "model.layers.4.mlp.gate.e_score_correction_bias");
        is("output.weight", "lm_head.weight");
        for strange in ["blk.x.attn_q.weight", "blk.1.attn_k_b.weight", "rope_freqs.weight", "blk.", ""] {
            assert_eq!(plain(strange), None, "{strange}");
        }
        let wanted = ("model.layers.7.mlp.experts.".to_owned(), ".down_proj.weight".to_owned());
        assert_eq!(experts("blk.7.ffn_down_exps.weight"), Some(wanted));
        assert_eq!(experts("blk.7.ffn_down.weight"), None);
    }

    #[test]
    fn names_translate_back() {
        let tops = ["token_embd.weight", "output_norm.weight", "output.weight", "blk.5.exp_probs_b.bias"];
        let parts = PARTS.iter().map(|(part, _)| format!("blk.12.{part}.weight"));
        for name in tops.map(str::to_owned).into_iter().chain(parts) {
            assert_eq!(ours(&plain(&name).unwrap()), Some(name));
        }
        let expert = "model.layers.7.mlp.experts.12.up_proj.weight";
        assert_eq!(ours(expert).as_deref(), Some("blk.7.ffn_up_exps.weight"));
        assert_eq!(expert_of(expert), Some((12, "up_proj.weight")));
        for strange in [
            "model.layers.7.mlp.experts.x.up_proj.weight",
            "model.layers.7.mlp.experts.01.up_proj.weight",
            "model.layers.1.self_attn.sinks",
            "x.bias",
            "",
        ] {
            assert_eq!(ours(strange), None, "{strange}");
        }
        assert_eq!((layer_of("blk.3.x"), layer_of("model.layers.61.x.y")), (Some(3), Some(61)));
        assert_eq!((layer_of("model.norm.weight"), layer_of("blk.x.y")), (None, None));
    }
}
