#!/usr/bin/env python3
"""Makes the fixtures of tests/golden with Hugging Face transformers. Run by hand; README.md says when and with what.

    make_reference.py tiny [NAME ...]   seeded tiny models in tests/golden/tiny: a Hugging Face folder, the same as GGUF,
                                        and what transformers answers
    make_reference.py base FILE.gguf    tests/golden/logits_hf.npy: the default model's base, as transformers reads it;
                                        needs the package accelerate

The same versions give the same bytes. Matrices hold bf16 values, so that both files are small and exact; everything is
computed in f32. A seed is taken when no selection is nearly tied, and when f64 gives the same selections and nearly the
same logits: then a difference is a mistake and not chance.
"""
import json
import sys
from pathlib import Path

import gguf
import numpy as np
import torch
import transformers
from safetensors.torch import save_file
from torch.overrides import TorchFunctionMode

HERE = Path(__file__).parent
YARN = dict(rope_type="yarn", rope_theta=10000.0, factor=40.0, original_max_position_embeddings=4096,
            beta_fast=32, beta_slow=1, mscale=1.0, mscale_all_dim=1.0)
MOE = dict(first_k_dense_replace=1, n_shared_experts=1, norm_topk_prob=True, routed_scaling_factor=2.5)
COMMON = dict(tie_word_embeddings=False, bos_token_id=0, eos_token_id=1, num_hidden_layers=3, rms_norm_eps=1e-6)

# name: (class, GGUF architecture, length of the prompt, gain of the weights, config)
MODELS = {
    # No width is a multiple of 32, and heads, experts and vocabulary are odd.
    "v32": ("DeepseekV32", "deepseek32", 83, 1.3, COMMON | MOE | dict(
        vocab_size=131, hidden_size=60, intermediate_size=84, num_attention_heads=3, q_lora_rank=36, kv_lora_rank=40,
        qk_nope_head_dim=20, qk_rope_head_dim=16, v_head_dim=24, n_routed_experts=9, num_experts_per_tok=3, n_group=3,
        topk_group=2, moe_intermediate_size=20, max_position_embeddings=163840, rope_parameters=YARN,
        index_n_heads=7, index_head_dim=24, index_topk=12)),
    # Weak weights, widths of whole blocks: what quantised weights are compared on.
    "v32-soft": ("DeepseekV32", "deepseek32", 70, 0.4, COMMON | MOE | dict(
        vocab_size=128, hidden_size=64, intermediate_size=96, num_attention_heads=2, q_lora_rank=64, kv_lora_rank=64,
        qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32, n_routed_experts=4, num_experts_per_tok=2, n_group=2,
        topk_group=1, moe_intermediate_size=32, max_position_embeddings=163840, rope_parameters=YARN,
        num_hidden_layers=2, index_n_heads=8, index_head_dim=32, index_topk=16)),
    "glm5": ("GlmMoeDsa", "glm-dsa", 70, 1.3, COMMON | MOE | dict(
        vocab_size=150, hidden_size=48, intermediate_size=80, num_attention_heads=2, q_lora_rank=40, kv_lora_rank=32,
        qk_nope_head_dim=24, qk_rope_head_dim=16, v_head_dim=32, n_routed_experts=6, num_experts_per_tok=2, n_group=1,
        topk_group=1, moe_intermediate_size=24, max_position_embeddings=202752, rms_norm_eps=1e-5,
        rope_parameters=dict(rope_type="default", rope_theta=1e6),
        index_n_heads=8, index_head_dim=32, index_topk=16)),
    # Layers 2, 3 and 5 share what 1 and 4 selected.
    "glm52": ("GlmMoeDsa", "glm-dsa", 70, 1.3, COMMON | MOE | dict(
        vocab_size=120, hidden_size=40, intermediate_size=80, num_attention_heads=2, q_lora_rank=32, kv_lora_rank=32,
        qk_nope_head_dim=24, qk_rope_head_dim=16, v_head_dim=32, n_routed_experts=4, num_experts_per_tok=2, n_group=1,
        topk_group=1, moe_intermediate_size=16, max_position_embeddings=1048576, rms_norm_eps=1e-5,
        rope_parameters=dict(rope_type="default", rope_theta=8e6), num_hidden_layers=6,
        index_n_heads=8, index_head_dim=32, index_topk=14, index_topk_freq=3, index_skip_topk_offset=2)),
    "v3": ("DeepseekV3", "deepseek2", 70, 1.3, COMMON | MOE | dict(
        vocab_size=140, hidden_size=64, intermediate_size=80, num_attention_heads=3,
        q_lora_rank=40, kv_lora_rank=48, qk_nope_head_dim=24, qk_rope_head_dim=16, v_head_dim=20, n_routed_experts=8,
        num_experts_per_tok=3, n_group=2, topk_group=1, moe_intermediate_size=24, max_position_embeddings=163840,
        rope_parameters=YARN)),
    # As V2-Lite: no compressed query, softmax scores, mscale below 1; with V2's groups and two shared experts.
    "v2": ("DeepseekV2", "deepseek2", 70, 1.3, COMMON | MOE | dict(
        vocab_size=140, hidden_size=54, intermediate_size=80, num_attention_heads=3,
        q_lora_rank=None, kv_lora_rank=48, qk_nope_head_dim=24, qk_rope_head_dim=16, v_head_dim=20, n_routed_experts=8,
        num_experts_per_tok=3, n_group=4, topk_group=2, topk_method="group_limited_greedy", moe_intermediate_size=24,
        n_shared_experts=2, norm_topk_prob=False, routed_scaling_factor=1.5, max_position_embeddings=163840,
        rope_parameters=YARN | dict(mscale=0.707, mscale_all_dim=0.707))),
}


def fill(model, seed, gain):
    """Weights that matter everywhere: also where Hugging Face starts from zeros, the router's bias and k_norm's."""
    generator = torch.Generator().manual_seed(seed)
    everything = dict(model.named_parameters()) | dict(model.named_buffers())
    for name in sorted(name for name in everything if "inv_freq" not in name):
        tensor = everything[name]
        noise = torch.randn(tensor.shape, generator=generator)
        if name.endswith("bias"):
            noise *= 0.1
        elif "norm" in name:
            noise = 1 + 0.1 * noise
        elif "embed_tokens" not in name:
            noise *= gain / tensor.shape[-1] ** 0.5
        tensor.data.copy_(noise if tensor.dim() == 1 else noise.bfloat16().float())


class IndexerTap(TorchFunctionMode):
    """Keeps what each indexer hands to topk, and what topk answers."""

    def __init__(self, model):
        super().__init__()
        self.scores, self.chosen, self.inside = [], [], False
        self.hooks = []
        for layer in model.model.layers:
            if getattr(layer.self_attn, "indexer", None) is not None:
                self.hooks.append(layer.self_attn.indexer.register_forward_pre_hook(lambda *_: self.mark(True)))
                self.hooks.append(layer.self_attn.indexer.register_forward_hook(lambda *_: self.mark(False)))

    def mark(self, inside):
        self.inside = inside

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if self.inside and func is torch.Tensor.topk:
            self.scores.append(args[0][0].double())
            self.chosen.append(out.indices[0])
        return out


@torch.no_grad()
def answer(model, ids):
    """Logits [L, vocab]; selections [index layers, L, k] ascending and -1 padded; margins [index layers, L]."""
    tap = IndexerTap(model)
    with tap:
        logits = model(ids, use_cache=False).logits[0]
    for hook in tap.hooks:
        hook.remove()
    position = torch.arange(ids.shape[1])
    selections, margins = [], []
    for scores, chosen in zip(tap.scores, tap.chosen):
        future = position[None] > position[:, None]
        ranked = scores.masked_fill(future, -torch.inf).sort(-1, descending=True).values
        k = chosen.shape[1]
        gap = ranked[:, k - 1] - ranked[:, k]
        margins.append(torch.where(position < k, torch.inf, gap).numpy())
        past = torch.where(chosen > position[:, None], 1 << 30, chosen.long()).sort(-1).values
        selections.append(torch.where(past == 1 << 30, -1, past).numpy().astype(np.int32))
    return logits.numpy(), np.array(selections), np.array(margins)


def released_names(state):
    """Parameters under the names of released checkpoints: experts one by one."""
    out = {}
    for name, tensor in state.items():
        tensor = tensor if tensor.dim() == 1 else tensor.bfloat16()
        stem, _, what = name.rpartition("experts.")
        if what == "gate_up_proj":
            for e, both in enumerate(tensor):
                gate, up = both.chunk(2)
                out[f"{stem}experts.{e}.gate_proj.weight"] = gate.clone()
                out[f"{stem}experts.{e}.up_proj.weight"] = up.clone()
        elif what == "down_proj":
            out |= {f"{stem}experts.{e}.down_proj.weight": one.clone() for e, one in enumerate(tensor)}
        else:
            out[name] = tensor.clone()
    return out


def saved_style(config):
    """The config as transformers 5 saves it, without what has nothing to do with the model."""
    noise = ("_name_or_path", "chunk_size_feed_forward", "id2label", "label2id", "is_encoder_decoder", "problem_type",
             "output_attentions", "output_hidden_states", "output_router_logits", "return_dict")
    return {key: value for key, value in config.to_dict().items() if key not in noise} | dict(dtype="bfloat16")


def hub_style(config, arguments):
    """The same config as model pages have it: rope_theta and rope_scaling, and the schedule of shared indexers."""
    derived = ("layer_types", "mlp_layer_types", "head_dim", "qk_head_dim")
    out = {key: value for key, value in saved_style(config).items() if key not in derived}
    out["torch_dtype"] = out.pop("dtype")
    rope = dict(out.pop("rope_parameters"))
    out["rope_theta"] = rope.pop("rope_theta")
    kind = rope.pop("rope_type")
    out["rope_scaling"] = None if kind == "default" else dict(type=kind, **rope)
    if config.model_type != "deepseek_v2":
        out |= dict(scoring_func="sigmoid", topk_method="noaux_tc")
    else:
        out["scoring_func"] = "softmax"
    if "index_topk_freq" in arguments:
        del out["indexer_types"]
        out |= {key: arguments[key] for key in ("index_topk_freq", "index_skip_topk_offset")}
    if config.model_type == "glm_moe_dsa":
        out["indexer_rope_interleave"] = True
    return out


GGUF_NAMES = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.q_a_proj": "attn_q_a", "self_attn.q_a_layernorm": "attn_q_a_norm", "self_attn.q_b_proj": "attn_q_b",
    "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa", "self_attn.kv_a_layernorm": "attn_kv_a_norm",
    "self_attn.o_proj": "attn_output", "self_attn.indexer.wq_b": "indexer.attn_q_b",
    "self_attn.indexer.wk": "indexer.attn_k", "self_attn.indexer.k_norm": "indexer.k_norm",
    "self_attn.indexer.weights_proj": "indexer.proj", "mlp.gate": "ffn_gate_inp",
    **{f"mlp.{what}_proj": f"ffn_{what}" for what in ("gate", "up", "down")},
    **{f"mlp.shared_experts.{what}_proj": f"ffn_{what}_shexp" for what in ("gate", "up", "down")},
}


def write_gguf(path, arch, config, state):
    """The model under llama.cpp's conventions. Keys are written out: the package does not know all architectures."""
    out = gguf.GGUFWriter(path, arch)
    rope = config.rope_parameters
    integers = {
        "block_count": config.num_hidden_layers, "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size, "feed_forward_length": config.intermediate_size,
        "vocab_size": config.vocab_size, "leading_dense_block_count": config.first_k_dense_replace,
        "attention.head_count": config.num_attention_heads, "attention.head_count_kv": 1,
        "attention.kv_lora_rank": config.kv_lora_rank,
        "attention.key_length": config.kv_lora_rank + config.qk_rope_head_dim,
        "attention.value_length": config.kv_lora_rank,
        "attention.key_length_mla": config.qk_nope_head_dim + config.qk_rope_head_dim,
        "attention.value_length_mla": config.v_head_dim, "rope.dimension_count": config.qk_rope_head_dim,
        "expert_count": config.n_routed_experts, "expert_used_count": config.num_experts_per_tok,
        "expert_shared_count": config.n_shared_experts, "expert_feed_forward_length": config.moe_intermediate_size,
        "expert_gating_func": 1 if config.model_type == "deepseek_v2" else 2,
    }
    floats = {"attention.layer_norm_rms_epsilon": config.rms_norm_eps, "rope.freq_base": rope["rope_theta"],
              "expert_weights_scale": config.routed_scaling_factor}
    if config.q_lora_rank:
        integers["attention.q_lora_rank"] = config.q_lora_rank
    if config.n_group > 1:
        integers |= {"expert_group_count": config.n_group, "expert_group_used_count": config.topk_group}
    if hasattr(config, "index_topk"):
        integers |= {"attention.indexer.head_count": config.index_n_heads,
                     "attention.indexer.key_length": config.index_head_dim,
                     "attention.indexer.top_k": config.index_topk}
    if rope["rope_type"] == "yarn":
        out.add_string(f"{arch}.rope.scaling.type", "yarn")
        integers["rope.scaling.original_context_length"] = rope["original_max_position_embeddings"]
        floats |= {"rope.scaling.factor": rope["factor"], "rope.scaling.yarn_beta_fast": rope["beta_fast"],
                   "rope.scaling.yarn_beta_slow": rope["beta_slow"],
                   "rope.scaling.yarn_log_multiplier": 0.1 * rope["mscale_all_dim"]}
    for key, value in integers.items():
        out.add_uint32(f"{arch}.{key}", value)
    for key, value in floats.items():
        out.add_float32(f"{arch}.{key}", float(value))
    out.add_bool(f"{arch}.expert_weights_norm", config.norm_topk_prob)
    if arch == "glm-dsa":
        out.add_array(f"{arch}.attention.indexer.types", [kind == "full" for kind in config.indexer_types])
    out.add_string("tokenizer.ggml.model", "none")

    def put(name, tensor):
        values = np.ascontiguousarray(tensor.float().numpy())
        kind = gguf.GGMLQuantizationType.F32 if tensor.dim() == 1 else gguf.GGMLQuantizationType.BF16
        out.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)

    put("token_embd.weight", state["model.embed_tokens.weight"])
    put("output_norm.weight", state["model.norm.weight"])
    put("output.weight", state["lm_head.weight"])
    for i in range(config.num_hidden_layers):
        layer = f"model.layers.{i}."
        for theirs, ours in GGUF_NAMES.items():
            for part in ("weight", "bias"):
                if f"{layer}{theirs}.{part}" in state:
                    put(f"blk.{i}.{ours}.{part}", state[f"{layer}{theirs}.{part}"])
        heads = state[layer + "self_attn.kv_b_proj.weight"].view(config.num_attention_heads, -1, config.kv_lora_rank)
        put(f"blk.{i}.attn_k_b.weight", heads[:, :config.qk_nope_head_dim].transpose(1, 2))
        put(f"blk.{i}.attn_v_b.weight", heads[:, config.qk_nope_head_dim:])
        if layer + "mlp.gate.e_score_correction_bias" in state:
            put(f"blk.{i}.exp_probs_b.bias", state[layer + "mlp.gate.e_score_correction_bias"])
        if layer + "mlp.gate.weight" in state:
            for what in ("gate", "up", "down"):
                experts = [state[f"{layer}mlp.experts.{e}.{what}_proj.weight"] for e in range(config.n_routed_experts)]
                put(f"blk.{i}.ffn_{what}_exps.weight", torch.stack(experts))
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


def norms_at_eps(model, eps):
    """The norms inside attention with another epsilon: transformers has 1e-6 there, a GGUF one number for all."""
    for layer in model.model.layers:
        for norm in (getattr(layer.self_attn, "q_a_layernorm", None), layer.self_attn.kv_a_layernorm):
            if norm is not None:
                norm.variance_epsilon = eps


def tiny(name):
    kind, arch, length, gain, arguments = MODELS[name]
    model_class = getattr(transformers, kind + "ForCausalLM")
    config = getattr(transformers, kind + "Config")(num_key_value_heads=arguments["num_attention_heads"], **arguments)
    config._attn_implementation = config._experts_implementation = "eager"
    for seed in range(100):
        torch.manual_seed(seed)
        model = model_class(config).float().eval()
        fill(model, seed, gain)
        ids = torch.randint(2, config.vocab_size, (1, length), generator=torch.Generator().manual_seed(seed))
        logits, selections, margins = answer(model, ids)
        norms_at_eps(model, config.rms_norm_eps)
        at_eps = answer(model, ids)
        exact = answer(model.double(), ids)
        model.float()
        deviation = np.abs(at_eps[0] - exact[0]).max()
        same = all(np.array_equal(selections, other[1]) for other in (at_eps, exact))
        margin = margins.min() if len(margins) else np.inf
        if same and deviation < 3e-5 and margin > (1e-4 if gain > 1 else 1e-5):
            break
    else:
        sys.exit(f"{name}: no seed without near ties")
    folder = HERE / "tiny" / name
    folder.mkdir(parents=True, exist_ok=True)
    state = released_names({key: value for key, value in model.state_dict().items() if "inv_freq" not in key})
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)
    write_gguf(folder / "model.gguf", arch, config, state)
    config.architectures = [kind + "ForCausalLM"]
    save = lambda file, content: (folder / file).write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")
    hub = hub_style(config, arguments)
    for style, content in (("config.hub.json", hub), ("config.json", saved_style(config))):
        save("config.json", content)
        again = model_class.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
        again.config._experts_implementation = "eager"
        off = np.abs(answer(again, ids)[0] - logits).max()
        assert off < 1e-6, f"{name}: read back by {style}, it differs by {off}"
        save(style, content)
    np.save(folder / "ids.npy", ids[0].numpy().astype(np.uint32))
    np.save(folder / "logits.npy", logits)
    if config.rms_norm_eps != 1e-6:
        np.save(folder / "logits_file_eps.npy", at_eps[0])
    if len(selections):
        np.save(folder / "topk.npy", selections)
        np.save(folder / "margins.npy", margins.astype(np.float32))
    size = sum(file.stat().st_size for file in folder.iterdir())
    print(f"{name}: seed {seed}, {size} bytes, logits' deviation {logits.std():.3f}, f32 to f64 {deviation:.1e}, "
          f"least margin {margin:.1e}, "
          f"1e-6 to the file's eps {np.abs(logits - at_eps[0]).max():.1e}")


@torch.no_grad()
def base(path):
    """The last 8 rows of the reference prompt, at the columns of columns.npy."""
    path = Path(path)
    model = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    ids = torch.from_numpy(np.load(HERE / "ids.npy").astype(np.int64))[None]
    rows = model.eval()(ids, use_cache=False).logits[0, -8:].numpy()
    np.save(HERE / "logits_hf.npy", np.ascontiguousarray(rows[:, np.load(HERE / "columns.npy")]))


if __name__ == "__main__":
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if len(sys.argv) >= 3 and sys.argv[1] == "base":
        base(sys.argv[2])
    elif len(sys.argv) >= 2 and sys.argv[1] == "tiny":
        for model_name in sys.argv[2:] or MODELS:
            tiny(model_name)
    else:
        sys.exit(__doc__)
