#!/usr/bin/env python3
"""What does a whole session cost in CPU seconds, with selection and without?

    python3 tests/bench/whole_session.py --model MODEL.gguf [--lengths 2048 4096 ...] [--threads 2] [--runs 1]

A session is a prompt of so many tokens and 256 tokens that are generated behind it; "dense" is the same engine, kernels,
rows and threads with selection off; both sides in turn. Told is user and system time of the process; the tokens are
generated behind rows that are copies (`sparsectl bench --depth`). Prints a Markdown table: seconds, and what sparse takes
of dense. Builds nothing: run `make build` before.
"""

import argparse
import json
import pathlib
import statistics
import subprocess

ROOT = pathlib.Path(__file__).resolve().parents[2]
N_GENERATED = 256


def session(n_prompt: int, *mode: str) -> tuple[float, float]:
    """CPU seconds of the prompt, and of the tokens behind it."""

    def cpu_ms(*arguments: str) -> float:
        command = [ROOT / "target/release/sparsectl", "bench", "--model", ARGUMENTS.model, "-t", str(ARGUMENTS.threads)]
        command += ["-r", "1", "--json", *mode, *arguments]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        return json.loads(text)["results"][-1]["cpu_ms_per_token"]

    prompt = cpu_ms("-p", str(n_prompt), "-n", "0")
    behind = cpu_ms("-p", "1", "-d", str(n_prompt), "-n", str(N_GENERATED))
    return prompt * n_prompt / 1e3, behind * N_GENERATED / 1e3


def main() -> None:
    print(f"| prompt | sparse: prompt + {N_GENERATED} tokens | dense | of the prompt | of the tokens | whole session |")
    print("|---|---|---|---|---|---|")
    for n_prompt in ARGUMENTS.lengths:
        runs = [(session(n_prompt), session(n_prompt, "--dense")) for _ in range(ARGUMENTS.runs)]
        sparse, dense = ([statistics.median(run[side][part] for run in runs) for part in (0, 1)] for side in (0, 1))
        text = [f"{prompt:.1f} + {behind:.1f} s" for prompt, behind in (sparse, dense)]
        ratios = [f"{a / b:.2f}" for a, b in (*zip(sparse, dense), (sum(sparse), sum(dense)))]
        print(f"| {' | '.join([str(n_prompt), *text, *ratios])} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--lengths", type=int, nargs="*", default=[2048, 4096, 8192, 16384, 32768, 65536])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=1)
    ARGUMENTS = parser.parse_args()
    main()
