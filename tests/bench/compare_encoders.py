#!/usr/bin/env python3
"""Encodes trained weights that were never quantised with `sparsectl quantize` and with ggml, and compares the errors.

    compare_encoders.py SPARSECTL LIBGGML_BASE FILE...

Files: .safetensors, .pt, .onnx. Packages: numpy, gguf; safetensors, torch, onnx for such files. Taken are float matrices
of at least 65,536 values whose rows are a multiple of 32 (of 256 for K formats); a kernel is a row for each output. The
error is the root of the mean squared error over that of the mean square, both encodings decoded by gguf-py.
"""
import ctypes
import pathlib
import subprocess
import sys
import tempfile

import gguf
import numpy as np

TYPES = ("Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q5_1", "Q5_0", "Q4_1", "Q4_0")
SMALLEST = 65536


def arrays(path):
    """Name and values of every array of a file."""
    if path.suffix == ".safetensors":
        from safetensors import safe_open
        with safe_open(path, "pt") as file:
            yield from ((name, file.get_tensor(name).float().numpy()) for name in file.keys())
    elif path.suffix == ".pt":
        import torch
        state = torch.load(path, map_location="cpu", weights_only=True)
        yield from ((name, value.float().numpy()) for name, value in state.get("model_state", state).items())
    else:
        import onnx
        from onnx import numpy_helper
        graph = onnx.load(str(path)).graph
        named = [(tensor.name, tensor) for tensor in graph.initializer]
        constants = (node for node in graph.node if node.op_type == "Constant")
        named += [(node.output[0], node.attribute[0].t) for node in constants if node.attribute[0].name == "value"]
        yield from ((name, numpy_helper.to_array(tensor)) for name, tensor in named)


def matrices(path, block):
    for name, array in arrays(path):
        if array.ndim < 2 or array.size < SMALLEST or not np.issubdtype(array.dtype, np.floating):
            continue
        matrix = np.ascontiguousarray(array.reshape(array.shape[0], -1), dtype=np.float32)
        if matrix.shape[1] % block == 0 and np.isfinite(matrix).all():
            yield matrix


def ours(sparsectl, kind, matrices):
    """Each matrix after `sparsectl quantize`."""
    with tempfile.TemporaryDirectory() as folder:
        source, target = f"{folder}/in.gguf", f"{folder}/out.gguf"
        out = gguf.GGUFWriter(source, "comparison")
        for n, matrix in enumerate(matrices):
            out.add_tensor(f"blk.{n}.matrix.weight", matrix)
        # No rule of mixed precision may meet one of them: an output matrix that is not theirs.
        out.add_tensor("output.weight", np.ones((1, 256), np.float32))
        out.write_header_to_file()
        out.write_kv_data_to_file()
        out.write_tensors_to_file()
        out.close()
        subprocess.run([sparsectl, "quantize", source, target, "--type", kind], check=True, stdout=subprocess.DEVNULL)
        tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(target).tensors}
        for n in range(len(matrices)):
            tensor = tensors[f"blk.{n}.matrix.weight"]
            assert tensor.tensor_type.name == kind, (tensor.tensor_type, kind)
            yield np.array(tensor.data)


def theirs(ggml, kind, matrix):
    kind = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[kind]
    rows, cols = matrix.shape
    out = np.empty((rows, cols // block * size), np.uint8)
    written = ggml.ggml_quantize_chunk(
        kind.value, matrix.ctypes.data_as(ctypes.c_void_p), out.ctypes.data_as(ctypes.c_void_p),
        ctypes.c_int64(0), ctypes.c_int64(rows), ctypes.c_int64(cols), None)
    assert written == out.size, (written, out.size)
    return out


def squares(matrix, encoded, kind):
    back = gguf.quants.dequantize(encoded.reshape(matrix.shape[0], -1), gguf.GGMLQuantizationType[kind])
    return ((back.astype(np.float64) - matrix) ** 2).sum()


def main(sparsectl, library, *files):
    ggml = ctypes.CDLL(library)
    ggml.ggml_quantize_chunk.restype = ctypes.c_size_t
    print("| weights | format | matrices | values | ours | ggml | matrices not worse |\n|---|---|---|---|---|---|---|")
    for path in map(pathlib.Path, files):
        for kind in TYPES:
            block, _ = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
            found = list(matrices(path, block))
            if not found:
                continue
            total = sum((matrix.astype(np.float64) ** 2).sum() for matrix in found)
            own = [squares(m, encoded, kind) for m, encoded in zip(found, ours(sparsectl, kind, found))]
            other = [squares(m, theirs(ggml, kind, m), kind) for m in found]
            fine = sum(a <= b * (1 + 1e-6) for a, b in zip(own, other))
            error = [np.sqrt(sum(part) / total) for part in (own, other)]
            values = sum(matrix.size for matrix in found)
            print(f"| {path.name} | {kind} | {len(found)} | {values:,} | {error[0]:.5f} | {error[1]:.5f} "
                  f"| {fine} of {len(found)} |", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
