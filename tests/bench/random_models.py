#!/usr/bin/env python3
"""Writes the models of 12 layers that compare.py asks for: DeepSeek's shape, made small, with seeded random weights.

They say how fast such a model is and nothing else: what they answer is noise, and what their indexers select has no locality.
The same versions of gguf and numpy write the same bytes. Matrices are f16; llama.cpp's quantiser makes them Q4_0.

Usage: random_models.py --base BASE.gguf --into FOLDER [dsa16 dsa64 mla moe]
       llama-quantize FOLDER/dsa16.gguf FOLDER/dsa16-q40.gguf Q4_0     (and so on)
BASE gives the tokenizer. Needs the Python packages gguf (0.19) and numpy.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np

LAYERS, HIDDEN, FEED_FORWARD, VOCAB, CONTEXT = 12, 768, 2048, 49152, 131072
HEADS, Q_LORA, KV_LORA, ROPE, NOPE, V = 16, 384, 512, 64, 128, 128
INDEX_WIDTH, TOP_K = 128, 2048
EXPERT_FEED_FORWARD, SHARED_EXPERTS = 256, 1
SPREAD = 0.03


@dataclass
class Kind:
    """`index_heads` of the indexer, `experts` of each layer but the first and how many of them a token takes; 0: none."""

    architecture: str
    index_heads: int = 0
    experts: int = 0
    used: int = 0


KINDS = {
    "dsa16": Kind("deepseek32", index_heads=16),
    "dsa64": Kind("deepseek32", index_heads=64),
    "mla": Kind("deepseek2"),
    "moe": Kind("deepseek2", experts=64, used=6),
}


def describe(writer: gguf.GGUFWriter, kind: Kind) -> None:
    """The sizes. Readers ask for those of experts in models that have none, too."""
    writer.add_block_count(LAYERS)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_vocab_size(VOCAB)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(ROPE)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(1)
    writer.add_key_length(KV_LORA + ROPE)
    writer.add_value_length(KV_LORA)
    writer.add_key_length_mla(NOPE + ROPE)
    writer.add_value_length_mla(V)
    writer.add_q_lora_rank(Q_LORA)
    writer.add_kv_lora_rank(KV_LORA)
    writer.add_leading_dense_block_count(1 if kind.experts else LAYERS)
    writer.add_expert_count(kind.experts)
    writer.add_expert_used_count(kind.used)
    writer.add_expert_shared_count(SHARED_EXPERTS)
    writer.add_expert_feed_forward_length(EXPERT_FEED_FORWARD)
    writer.add_expert_weights_scale(1.0)
    writer.add_expert_weights_norm(True)
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    if kind.index_heads:
        writer.add_indexer_head_count(kind.index_heads)
        writer.add_indexer_key_length(INDEX_WIDTH)
        writer.add_indexer_top_k(TOP_K)


def add_tokenizer(writer: gguf.GGUFWriter, base: Path) -> None:
    for key, field in gguf.GGUFReader(base).fields.items():
        if not key.startswith("tokenizer."):
            continue
        match field.types[0]:
            case gguf.GGUFValueType.ARRAY:
                writer.add_array(key, field.contents())
            case gguf.GGUFValueType.STRING:
                writer.add_string(key, field.contents())
            case gguf.GGUFValueType.BOOL:
                writer.add_bool(key, bool(field.contents()))
            case _:
                writer.add_uint32(key, int(field.contents()))


def layer_shapes(layer: int, kind: Kind) -> dict[str, tuple[int, ...]]:
    """Names of a layer's tensors and their shapes, rows first. Vectors are norms, or biases."""
    shapes = {
        "attn_norm": (HIDDEN,), "attn_q_a_norm": (Q_LORA,), "attn_kv_a_norm": (KV_LORA,), "ffn_norm": (HIDDEN,),
        "attn_q_a": (Q_LORA, HIDDEN), "attn_q_b": (HEADS * (NOPE + ROPE), Q_LORA),
        "attn_kv_a_mqa": (KV_LORA + ROPE, HIDDEN), "attn_k_b": (HEADS, KV_LORA, NOPE), "attn_v_b": (HEADS, V, KV_LORA),
        "attn_output": (HIDDEN, HEADS * V),
    }
    if kind.index_heads:
        shapes |= {
            "indexer.k_norm": (INDEX_WIDTH,), "indexer.proj": (kind.index_heads, HIDDEN),
            "indexer.attn_k": (INDEX_WIDTH, HIDDEN), "indexer.attn_q_b": (kind.index_heads * INDEX_WIDTH, Q_LORA),
        }
    if not kind.experts or layer == 0:
        return shapes | {"ffn_gate": (FEED_FORWARD, HIDDEN), "ffn_up": (FEED_FORWARD, HIDDEN),
                         "ffn_down": (HIDDEN, FEED_FORWARD)}
    for end, many in (("_exps", (kind.experts,)), ("_shexp", ())):
        wide = EXPERT_FEED_FORWARD * (1 if many else SHARED_EXPERTS)
        shapes |= {f"ffn_gate{end}": (*many, wide, HIDDEN), f"ffn_up{end}": (*many, wide, HIDDEN),
                   f"ffn_down{end}": (*many, HIDDEN, wide)}
    return shapes | {"ffn_gate_inp": (kind.experts, HIDDEN)}


def write(kind: Kind, name: str, base: Path, file: Path) -> None:
    writer, random = gguf.GGUFWriter(file, kind.architecture), np.random.default_rng(1)
    writer.add_name(f"random {name}")
    describe(writer, kind)
    add_tokenizer(writer, base)

    def matrix(name: str, shape: tuple[int, ...]) -> None:
        values = random.standard_normal(shape, dtype=np.float32) * SPREAD
        # Routers are f32 in every reader.
        writer.add_tensor(name, values if "ffn_gate_inp" in name else values.astype(np.float16))

    matrix("token_embd.weight", (VOCAB, HIDDEN))
    matrix("output.weight", (VOCAB, HIDDEN))
    writer.add_tensor("output_norm.weight", np.ones(HIDDEN, dtype=np.float32))
    for layer in range(LAYERS):
        for tensor, shape in layer_shapes(layer, kind).items():
            full = f"blk.{layer}.{tensor}.weight"
            if len(shape) == 1:
                writer.add_tensor(full, np.ones(shape, dtype=np.float32))
            else:
                matrix(full, shape)
        if kind.index_heads:
            writer.add_tensor(f"blk.{layer}.indexer.k_norm.bias", np.zeros(INDEX_WIDTH, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--into", type=Path, required=True)
    parser.add_argument("kinds", nargs="*", choices=(*KINDS, []), metavar="KIND")
    arguments = parser.parse_args()
    for name in arguments.kinds or KINDS:
        file = arguments.into / f"{name}.gguf"
        write(KINDS[name], name, arguments.base, file)
        print(f"{file}: {file.stat().st_size >> 20} MiB", flush=True)


if __name__ == "__main__":
    main()
