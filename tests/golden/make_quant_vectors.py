#!/usr/bin/env python3
"""Makes tests/golden/quant/*.bin and prints the figures in quant/tests/vectors.rs. Run by hand; seeded.

Needs the Python packages gguf, numpy and torch (whose float8_e4m3fn is the reference for FP8). With --ggml LIB, a
libggml-base.so built without contraction of products and sums (-ffp-contract=off), every vector is also decoded by
ggml itself and must agree to the bit, and ggml's encoders give the figures.

A file is n blocks, then n times their values as little-endian f32.
"""

import argparse
import ctypes
import pathlib

import numpy as np
import torch
from gguf import GGMLQuantizationType as T
from gguf import quants

# name: (type, values in a block, bytes of a block, offsets of its f16 fields)
FORMATS = {
    "q4_0": (T.Q4_0, 32, 18, (0,)),
    "q4_1": (T.Q4_1, 32, 20, (0, 2)),
    "q5_0": (T.Q5_0, 32, 22, (0,)),
    "q5_1": (T.Q5_1, 32, 24, (0, 2)),
    "q8_0": (T.Q8_0, 32, 34, (0,)),
    "q2_K": (T.Q2_K, 256, 84, (80, 82)),
    "q3_K": (T.Q3_K, 256, 110, (108,)),
    "q4_K": (T.Q4_K, 256, 144, (0, 2)),
    "q5_K": (T.Q5_K, 256, 176, (0, 2)),
    "q6_K": (T.Q6_K, 256, 210, (208,)),
    "iq4_nl": (T.IQ4_NL, 32, 18, (0,)),
    "iq4_xs": (T.IQ4_XS, 256, 136, (0,)),
    "mxfp4": (T.MXFP4, 32, 17, ()),
}
# Ordinary scales, then both zeros, subnormals, the smallest normal number, the largest, an infinity.
SCALES = [0.0123, -0.75, 0.0, -0.0, 2.0**-24, -3 * 2.0**-24, 2.0**-14, 65504.0, -65504.0, np.inf]
ENCODERS = ("q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "q4_K", "q5_K", "q6_K")


def blocks(name, rng):
    _, values, size, halves = FORMATS[name]
    n = 40 if values == 32 else 7
    data = rng.integers(0, 256, (n, size), dtype=np.uint8)
    for row in range(n):
        if row % 3 == 1:  # every byte, and so every code, in order
            data[row] = (np.arange(size) + row * 83) % 256
        for field, at in enumerate(halves):
            scale = np.float16(SCALES[row * (3 + 4 * field) % len(SCALES)])
            data[row, at : at + 2] = np.frombuffer(scale.tobytes(), np.uint8)
        if name == "mxfp4":
            data[row, 0] = [0, 1, 2, 3, 127, 128, 254, 255][row % 8]
    return data


def ggml_decode(lib, name, data, values):
    out = np.empty((len(data), values), np.float32)
    decode = getattr(lib, f"dequantize_row_{name}")
    decode(data.ctypes.data_as(ctypes.c_void_p), out.ctypes.data_as(ctypes.c_void_p), ctypes.c_int64(out.size))
    return out


def same_bits(a, b):
    return ((a.view(np.uint32) == b.view(np.uint32)) | (np.isnan(a) & np.isnan(b))).all()


def sample():
    """Sums of four 16-bit draws, every 97th four times as large, scaled by powers of two: exact in f32."""
    state, out = 0x2545F491, np.empty(1 << 16)
    for i in range(out.size):
        total = -131070
        for _ in range(4):
            state = (state * 1664525 + 1013904223) % 2**32
            total += state >> 16
        out[i] = total * (4 if i % 97 == 0 else 1) / 2 ** (20 + i // 256 % 8)
    return out.astype(np.float32)


def rms_error(lib, name, x):
    _, values, size, _ = FORMATS[name]
    data = np.zeros((x.size // values, size), np.uint8)
    encode = getattr(lib, f"quantize_{name}")
    encode.restype = ctypes.c_size_t
    pointer = ctypes.c_void_p
    done = encode(
        x.ctypes.data_as(pointer), data.ctypes.data_as(pointer), ctypes.c_int64(1), ctypes.c_int64(x.size), None
    )
    assert done == data.size
    back = ggml_decode(lib, name, data, values).ravel().astype(np.float64)
    return float(np.sqrt(np.mean((back - x) ** 2) / np.mean(x.astype(np.float64) ** 2)))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ggml", metavar="LIB")
    arguments = parser.parse_args()
    lib = ctypes.CDLL(arguments.ggml) if arguments.ggml else None
    folder = pathlib.Path(__file__).parent / "quant"
    rng = np.random.default_rng(20261125)
    for name, (kind, values, _, _) in FORMATS.items():
        data = blocks(name, rng)
        with np.errstate(all="ignore"):
            expected = quants.dequantize(data, kind).astype(np.float32).reshape(len(data), values)
        if lib:
            assert same_bits(expected, ggml_decode(lib, name, data, values)), f"{name}: gguf and ggml differ"
        (folder / f"{name.lower()}.bin").write_bytes(data.tobytes() + expected.astype("<f4").tobytes())
    codes = np.arange(256, dtype=np.uint8)
    expected = torch.from_numpy(codes).view(torch.float8_e4m3fn).to(torch.float32).numpy()
    (folder / "f8e4m3.bin").write_bytes(codes.tobytes() + expected.astype("<f4").tobytes())
    if lib:
        x = sample()
        for name in ENCODERS:
            print(f"(Format::{name.upper()}, {rms_error(lib, name, x):.6e}),")


if __name__ == "__main__":
    main()
