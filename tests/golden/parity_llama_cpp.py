#!/usr/bin/env python3
"""How far are the logits of `sparsectl logits --act f32` from llama.cpp's? Prints the table of PARITY.md.

    parity_llama_cpp.py FOLDER      FOLDER as parity_llama_cpp.sh leaves it: the program `dump`, and `gguf-py`

Ours reads each file as it lies on disk. llama.cpp reads it so too, and again in F32 (`as_f32`), since it rounds
activations to the type of the weights. Both are compared with the oracle in f64, which says whose a difference is.
Needs numpy.
"""
import functools
import re
import subprocess
import sys
from pathlib import Path

import numpy as np

WORK = Path(sys.argv[1]).resolve()
sys.path.insert(0, str(WORK / "gguf-py"))
import gguf  # noqa: E402

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
TINY = ["v3", "v2", "v32", "v32-soft", "glm5", "glm52"]
# What an index key is widened to: llama.cpp's Hadamard matrix is as wide as the power of two above 63 that divides it.
WIDE = 64


def widening(width):
    """W [WIDE, width] whose first rows are the identity, such that W x has the mean and the variance of x for every x.

    The LayerNorm of an index key then gives its first values as before; the others get the gain 0. This needs
    W' W = (WIDE / width) I and 1' W = (WIDE / width) 1', so the lower part is a scaled isometry that takes the
    direction (1 ... 1) to itself.
    """
    def basis(n):
        """Orthonormal columns, the first in the direction (1 ... 1)."""
        full = np.linalg.qr(np.column_stack([np.ones(n), np.eye(n)[:, :n - 1]]))[0]
        return full * np.sign(full[0, 0])

    more = WIDE - width
    assert width <= more, "the lower part holds all of x"
    lower = np.sqrt(more / width) * basis(more)[:, :width] @ basis(width).T
    whole = np.vstack([np.eye(width), lower])
    assert np.allclose(whole.T @ whole, WIDE / width * np.eye(width)) and np.allclose(whole.sum(0), WIDE / width)
    return whole


def widen_indexer(name, values, width):
    """A tensor of an indexer for keys of WIDE values: one constant scales all scores, so none changes its rank."""
    if name.endswith("indexer.attn_k.weight"):
        return widening(width) @ values
    if "indexer.k_norm" in name:
        return np.pad(values, (0, WIDE - width))
    if name.endswith("indexer.attn_q_b.weight"):
        heads = values.reshape(-1, width, values.shape[1])
        return np.pad(heads, ((0, 0), (0, WIDE - width), (0, 0))).reshape(-1, values.shape[1])
    return values


def as_f32(source, target, without=()):
    """The same model with every tensor in F32, in a form that llama.cpp takes: see the text of PARITY.md."""
    reader = gguf.GGUFReader(source)
    fields = {name: field for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    arch = fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(target, arch)
    width_key = f"{arch}.attention.indexer.key_length"
    width = fields[width_key].contents() if width_key in fields else WIDE
    for name, field in fields.items():
        if name == "general.architecture" or name.removeprefix(f"{arch}.") in without:
            continue
        kind, value = field.types[0], WIDE if name == width_key else field.contents()
        writer.add_key_value(name, value, kind, field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None)
    if arch == "deepseek2" and f"{arch}.attention.q_lora_rank" not in fields:
        writer.add_uint32(f"{arch}.attention.q_lora_rank", 0)
    for tensor in reader.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type).reshape(tuple(int(n) for n in reversed(tensor.shape)))
        values = values if width == WIDE else widen_indexer(tensor.name, values.astype(np.float64), width)
        writer.add_tensor(tensor.name, np.ascontiguousarray(values, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def ascending(rows, k):
    """Selections [..., L, k] as sparsectl writes them: ascending, without the future, -1 padded."""
    position = np.arange(rows.shape[-2])[:, None]
    rows = np.sort(np.where(rows > position, 1 << 30, rows), axis=-1)
    return np.where(rows == 1 << 30, -1, rows)


def llama_cpp(file, ids, cache, step):
    """Logits [L, vocabulary] and selections [index layers, L, k]; or why it does not answer."""
    (WORK / "ids.txt").write_text(" ".join(map(str, ids)))
    for old in WORK.glob("out.*"):
        old.unlink()
    command = [WORK / "dump", file, WORK / "ids.txt", WORK / "out", cache, str(step)]
    done = subprocess.run(command, capture_output=True, text=True, env={"GGML_NO_BACKTRACE": "1"})
    if done.returncode != 0:
        said = done.stderr.strip().splitlines() or [f"ended with {done.returncode}"]
        return re.sub(r"/\S*/|^not loaded: |llama_model_load: |error loading model[^:]*: ", "", said[0])
    logits = np.fromfile(WORK / "out.logits", "<f4").reshape(len(ids), -1)
    files = sorted(WORK.glob("out.top_k.*"), key=lambda path: int(path.suffix[1:]))
    found = [np.fromfile(path, "<i4").reshape(len(ids), -1) for path in files]
    return logits, (ascending(np.array(found), found[0].shape[1]) if found else None)


@functools.cache
def logits_of(tool, file, ids, sparse, *options):
    """The same of `sparsectl logits` or of `sparsed-oracle`."""
    (WORK / "ids.json").write_text(str(list(ids)))
    command = [ROOT / "target/release" / tool[0], *tool[1:], "--model", file, "--ids", WORK / "ids.json", *options]
    command += ["--out", WORK / "logits.npy"] + (["--topk-out", WORK / "top_k.npy"] if sparse else [])
    subprocess.run(command, check=True)
    return np.load(WORK / "logits.npy"), np.load(WORK / "top_k.npy") if sparse else None


def row(name, form, run, our_file, their_file, ids, sparse=False, cache="f32", step=1 << 20):
    theirs = llama_cpp(their_file, ids, cache, step)
    if isinstance(theirs, str):
        print(f"| {name} | {form} | {run} | refused: {theirs} | | | | | | |", flush=True)
        return
    logits, selections = logits_of(("sparsectl", "logits"), our_file, ids, sparse, "--act", "f32")
    exact = logits_of(("sparsed-oracle",), our_file, ids, False, "--double")[0]
    worst = lambda a, b: np.abs(a.astype(np.float64) - b).max()
    rms = np.sqrt(((logits.astype(np.float64) - theirs[0]) ** 2).mean())
    same = int((logits.argmax(1) == theirs[0].argmax(1)).sum())
    chosen = ""
    if sparse:
        equal = (selections == theirs[1]).all(-1)
        chosen = f"{equal.sum()} of {equal.size}"
    print(f"| {name} | {form} | {run} | {worst(logits, theirs[0]):.1e} | {rms:.1e} | {same} of {len(ids)} | {chosen} | "
          f"{logits.std():.2f} | {worst(logits, exact):.1e} | {worst(theirs[0], exact):.1e} |", flush=True)


def compare(name, file, ids, sparse, without=()):
    """A file as it is, and in F32: in one step, token by token, and with the cache that llama.cpp takes by itself."""
    if not without:
        row(name, "as it is", "F32 cache", file, file, ids, sparse)
    plain = WORK / f"{name}.f32.gguf"
    as_f32(file, plain, without)
    our_file = plain if without else file
    form = "F32, without groups" if without else "F32"
    row(name, form, "F32 cache", our_file, plain, ids, sparse)
    row(name, form, "F32 cache, token by token", our_file, plain, ids, sparse, step=1)
    row(name, form, "default cache", our_file, plain, ids, sparse, cache="default")
    plain.unlink()


def prompt(path):
    return tuple(int(token) for token in np.load(path))


print("| file | read by llama.cpp | its run | max abs | rms | same argmax | same selections | deviation "
      "| ours to f64 | llama.cpp to f64 |")
print("|---|---|---|---|---|---|---|---|---|---|")
for model in TINY:
    folder = HERE / "tiny" / model
    ids = prompt(folder / "ids.npy")
    compare(model, folder / "model.gguf", ids, (folder / "topk.npy").exists())
    if model == "v2":
        groups = ("expert_group_count", "expert_group_used_count")
        compare(model, folder / "model.gguf", ids, False, without=groups)
ids = prompt(HERE / "ids.npy")
compare("SmolLM2 Q4_1", ROOT / "models/SmolLM2-135M-Instruct.Q4_1.gguf", ids, False)
converted = ROOT / "models/smollm2-135m-dsa.gguf"
row("smollm2-135m-dsa", "as it is", "F32 cache", converted, converted, ids, True)
