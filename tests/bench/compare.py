#!/usr/bin/env python3
"""How fast are we beside llama.cpp, and beside ourselves with selection off?

All sides run each test in turn (A B A B ...), with two threads seven times at least; no round of a test begins after
--patience. The table has medians, or with two threads each side's best round (virtual processors share a third-level
cache at one moment and none at the next), in brackets the lowest and highest of the rounds, how many there were, and
says "void" where other work waited for a processor before or after them (PSI `cpu some avg10` above 10). The peers
read what lies before a depth, which takes minutes, so their side of a test is run at depths up to --deep only; ours
fills the cache with copies (see `sparsectl bench --help`), so beyond what a model was trained for it is speed only.

Usage: compare.py --sparsectl target/release/sparsectl --llama-bench LLAMA_BENCH --base BASE.gguf --dsa DSA.gguf
           [--ik-llama-bench LLAMA_BENCH of ik_llama.cpp] [--baby BABY_DSA.gguf] [--wide BABY_DSA_64.gguf]
           [--mla BABY_MLA.gguf] [--moe BABY_MOE.gguf] [--rounds 3] [--patience 240] [--deep TOKENS] [--only TEXT]
           [--results RESULTS.md] [--plot FOLDER]
BASE is a dense model, DSA the same matrices with an indexer (`sparsectl convert`), so that both sides read equal
bytes. The others have random weights (random_models.py): BABY_DSA 16 index heads, BABY_DSA_64 64 of them. --results
replaces what that file has below the table's heading, up to the next one, and nothing else.
"""

import argparse
import datetime
import json
import math
import os
import re
import statistics
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

MODELS = ("base", "dsa", "baby", "wide", "mla", "moe")
MARK = "### The table that `tests/bench/compare.py --results` writes"
PRESSURE_MAX = 10.0
ROUNDS_OF_TWO_THREADS = 7


@dataclass
class Test:
    """One line of the table: `ours` and `theirs` are models by name, `theirs` may be None."""

    label: str
    kind: str  # prefill or decode
    n: int
    depth: int
    threads: int
    ours: str
    theirs: str | None
    goal: str
    options: tuple[str, ...] = ()


# Ours round to 16 bits unless asked otherwise; llama.cpp has 8.
ACTIVATIONS = (("", ()), (", 8-bit activations as llama.cpp's", ("--act", "int8")))

TESTS = [
    *(Test(f"base, decode, {t} thread(s)", "decode", 64, 0, t, "base", "base", goal)
      for t, goal in [(1, "4.3 ms"), (2, "2.7 ms")]),
    *(Test(f"DSA against the dense base, decode at {d // 1024}K", "decode", 16, d, 1, "dsa", "base", goal)
      for d, goal in [(8192, "8 ms"), (32768, "12 ms")]),
    *(Test(f"the same model dense, decode at {d // 1024}K", "decode", 8, d, 1, "dsa", None, "", ("--dense",))
      for d in (8192, 32768)),
    *(Test(f"base, prefill {n}, {t} thread(s){width}", "prefill", n, 0, t, "base", "base", goal, options)
      for t, n, goal in [(1, 512, "1100 t/s"), (1, 4096, "500 t/s"), (2, 512, "2000 t/s"), (2, 4096, "950 t/s")]
      for width, options in ACTIVATIONS),
    *(Test(f"DSA, prefill of 32K, whole{width}", "prefill", 32768, 0, 1, "dsa", None, "298 t/s (110 s)", options)
      for width, options in ACTIVATIONS),
    *(Test(f"12-layer DSA, 16 index heads, decode at {d // 1024}K", "decode", 16, d, 1, "baby", "baby", goal)
      for d, goal in [(2048, "15 ms"), (8192, "17 ms"), (65536, "30 ms")]),
    *(Test(f"12-layer DSA, prefill {n}{width}", "prefill", n, 0, 1, "baby", "baby", goal, options)
      for n, goal in [(512, "400 t/s"), (4096, "250 t/s")] for width, options in ACTIVATIONS),
    Test("12-layer DSA, 64 index heads, decode at 64K", "decode", 8, 65536, 1, "wide", "wide", "65 ms"),
    Test("12-layer dense MLA, decode at 32K", "decode", 8, 32768, 1, "mla", "mla", "110 ms"),
    Test("12-layer MoE, 64 experts, 6 active, decode", "decode", 64, 0, 1, "moe", "moe", "1.3 times llama.cpp"),
    *(Test(f"12-layer MoE, 64 experts, 6 active, prefill{width}", "prefill", 512, 0, 1, "moe", "moe",
           "1.3 times llama.cpp", options) for width, options in ACTIVATIONS),
]


# From here on tokens are read once, without a round before to warm up.
LONG = 4096


def run(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, check=True, text=True).stdout


@dataclass
class Peer:
    """A llama-bench. ik_llama.cpp's has other options for a prompt that lies before, and none to be told it is cold."""

    program: str
    is_ik: bool

    def options(self, test: Test) -> list[str]:
        cold = ["-w", "0"] if self.is_ik else ["--no-warmup"]
        options = cold if test.depth + test.n >= LONG else []
        if test.kind == "prefill":
            return [*options, "-p", str(test.n), "-n", "0"]
        if test.depth and self.is_ik:
            return [*options, "-p", "0", "-n", "0", "-gp", f"{test.depth},{test.n}"]
        return [*options, "-p", "0", "-n", str(test.n), *(["-d", str(test.depth)] if test.depth else [])]


class Sides:
    """The programs and their models."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.models = {name: getattr(arguments, name) for name in MODELS}
        programs = (arguments.llama_bench, arguments.ik_llama_bench)
        self.peers = [Peer(program, is_ik) if program else None for program, is_ik in zip(programs, (False, True))]

    def ours(self, test: Test) -> tuple[float, float]:
        """Milliseconds per token: wall, CPU."""
        sizes = ["-p", str(test.n), "-n", "0"] if test.kind == "prefill" else ["-p", "0", "-n", str(test.n)]
        repetitions = "1" if test.n > 4096 else "3"
        found = json.loads(run([
            self.arguments.sparsectl, "bench", "--json", "--model", self.models[test.ours], "-t", str(test.threads),
            "-d", str(test.depth), "-r", repetitions, *sizes, *test.options,
        ]))["results"][0]
        return found["ms_per_token"], found["cpu_ms_per_token"]

    def theirs(self, peer: Peer, test: Test) -> tuple[float, float | None] | None:
        """Milliseconds per token: wall, CPU; None where it does not load the model. CPU is what four repetitions take more
        than one; it is not known where each repetition reads thousands of tokens, or any that lie before."""
        cpu, wall = [], 0.0
        for repetitions in (1,) if test.depth or test.n >= LONG else (1, 4):
            before = os.times()
            command = [peer.program, "-m", self.models[test.theirs], "-t", str(test.threads), "-fa", "1", "-o", "json",
                       "-r", str(repetitions), *peer.options(test)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode != 0 and "failed to load model" in done.stderr + done.stdout:
                return None
            done.check_returncode()
            after, wall = os.times(), 1e3 / json.loads(done.stdout)[0]["avg_ts"]
            cpu.append(sum(after[2:4]) - sum(before[2:4]))
        return wall, 1e3 * (cpu[1] - cpu[0]) / 3 / test.n if len(cpu) > 1 else None


def is_busy() -> bool:
    """Whether other programs wait for processors."""
    pressure = re.search(r"some avg10=([\d.]+)", Path("/proc/pressure/cpu").read_text())
    return bool(pressure and float(pressure[1]) > PRESSURE_MAX)


def of_rounds(times: list[float], test: Test) -> float:
    """The time that stands for a test's rounds."""
    return min(times) if test.threads > 1 else statistics.median(times)


def spread(times: list[float], test: Test) -> str:
    def shown(time: float) -> str:
        return f"{1e3 / time:.0f}" if test.kind == "prefill" else f"{time:.2f}"

    unit = "t/s" if test.kind == "prefill" else "ms"
    lowest, highest = sorted([shown(min(times)), shown(max(times))], key=float)
    return f"{shown(of_rounds(times, test))} {unit} ({lowest}-{highest})"


def against(theirs: list[tuple[float, float | None]], ours: list[tuple[float, float]], test: Test) -> tuple[str, str]:
    """A side's CPU milliseconds per token, and how many times faster we are: in CPU time, which can be compared on a busy
    machine too, or in wall time where the side's CPU time is not known."""
    if not theirs:
        return "", ""
    at = 0 if theirs[0][1] is None else 1
    their_time, our_time = (of_rounds([pair[at] for pair in times], test) for times in (theirs, ours))
    return f"{their_time:.2f}" if at else "", f"{their_time / our_time:.2f}"


def measure(test: Test, sides: Sides) -> tuple[list[str], float]:
    """The columns of a line of the table, and our CPU milliseconds per token."""
    is_alone = test.theirs is None or test.depth > sides.arguments.deep
    peers: list[Peer | None] = [None if is_alone else peer for peer in sides.peers]
    theirs, ours = [[] for _ in peers], []
    rounds = max(sides.arguments.rounds, ROUNDS_OF_TWO_THREADS) if test.threads > 1 else sides.arguments.rounds
    busy, end = is_busy(), time.monotonic() + sides.arguments.patience
    while len(ours) < rounds and (not ours or time.monotonic() < end):
        for at, (peer, times) in enumerate(zip(peers, theirs)):
            found = sides.theirs(peer, test) if peer else None
            if found:
                times.append(found)
            elif peer:
                peers[at] = None
        ours.append(sides.ours(test))
    busy |= is_busy()
    (their_cpu, ratio), (_, ik_ratio) = (against(times, ours, test) for times in theirs)
    cpu = of_rounds([pair[1] for pair in ours], test)
    walls = [spread([pair[0] for pair in times], test) if times else "" for times in (*theirs, ours)]
    rest = [their_cpu, f"{cpu:.2f}", ratio, ik_ratio, test.goal, str(len(ours)), "void" if busy else ""]
    return [test.label, *walls, *rest], cpu


def table(sides: Sides) -> list[str]:
    lines = [
        "| work | llama.cpp | ik_llama.cpp | ours | CPU ms per token: llama.cpp | ours | times faster than llama.cpp "
        "| than ik_llama.cpp | goal (wall) | rounds | machine |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    print("\n".join(lines), flush=True)
    sparse: dict[int, float] = {}
    for test in TESTS:
        if not sides.models[test.ours] or sides.arguments.only not in test.label:
            continue
        columns, cpu = measure(test, sides)
        if "--dense" not in test.options:
            sparse[test.depth] = cpu
        elif test.depth in sparse:
            columns[0] += f": sparse takes {sparse[test.depth] / cpu:.2f} of it"
        lines.append(f"| {' | '.join(columns)} |")
        print(lines[-1], flush=True)
    return lines


def svg(title: str, points: dict[str, list[tuple[int, float]]]) -> str:
    """Lines over a doubling axis, both axes logarithmic; x from 1024 on is told in K."""
    every = [point for line in points.values() for point in line]
    steps = sorted({x for x, _ in every})
    top = 10 ** len(str(int(max(y for _, y in every))))
    def place(x: int, y: float) -> tuple[float, float]:
        across = steps.index(x) / max(len(steps) - 1, 1)
        return 60 + 500 * across, 320 - 280 * max(0.0, min(1.0, math.log10(y) / math.log10(top)))
    body = [f'<text x="60" y="20">{title}</text>']
    for x in steps:
        body.append(f'<text x="{place(x, 1)[0] - 12:.0f}" y="340">{f"{x // 1024}K" if x >= 1024 else x}</text>')
    for y in (10**i for i in range(len(str(top)))):
        height = place(steps[0], y)[1]
        body.append(f'<line x1="60" x2="560" y1="{height:.0f}" y2="{height:.0f}" stroke="#ddd"/>')
        body.append(f'<text x="10" y="{height + 4:.0f}">{y} ms</text>')
    for (name, line), colour in zip(points.items(), ("#06c", "#c30", "#083")):
        path = " ".join(f"{x:.0f},{y:.0f}" for x, y in (place(*point) for point in line))
        body.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        x, y = place(*line[-1])
        body.append(f'<text x="{x + 6:.0f}" y="{y + 4:.0f}" fill="{colour}">{name}</text>')
    head = '<svg xmlns="http://www.w3.org/2000/svg" width="760" height="350" font-family="sans-serif" font-size="12">'
    return "\n".join([head, *body, "</svg>", ""])


def plot(sides: Sides, folder: Path) -> None:
    """CPU time of a decoded token against the context, and against the sequences of a step."""
    points: dict[str, list[tuple[int, float]]] = {}
    sides.ours(Test("", "decode", 16, 2048, 1, "dsa", None, ""))  # the first process finds a cold machine
    for name, options in (("k = 512", ()), ("dense", ("--dense",))):
        for depth in (2048 << i for i in range(8)):
            test = Test("", "decode", 4 if options else 16, depth, 1, "dsa", None, "", options)
            points.setdefault(name, []).append((depth, sides.ours(test)[1]))
    for depth in (2048 << i for i in range(8) if 2048 << i <= sides.arguments.deep):
        test = Test("", "decode", 8, depth, 1, "base", "base", "")
        if found := sides.theirs(sides.peers[0], test):
            points.setdefault("llama.cpp, base model (wall time)", []).append((depth, found[0]))
    (folder / "context.svg").write_text(
        svg("CPU time per decoded token, default model, one thread; speed only past 2K", points))
    tell(points)
    batch: dict[str, list[tuple[int, float]]] = {}
    for name, depth, options in (("k = 512, 8K", 8192, ()), ("dense, 8K", 8192, ("--dense",)), ("512 tokens", 512, ())):
        for sequences in (1, 2, 4, 8, 16):
            every = ("--sequences", str(sequences), *options)
            test = Test("", "decode", 4 if options else 16, depth, 1, "dsa", None, "", every)
            batch.setdefault(name, []).append((sequences, sides.ours(test)[1]))
    (folder / "batch.svg").write_text(
        svg("CPU time per decoded token against sequences in a step, default model, one thread", batch))
    tell(batch)


def tell(points: dict[str, list[tuple[int, float]]]) -> None:
    print({name: [(x, round(y, 2)) for x, y in line] for name, line in points.items()}, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("sparsectl", "llama-bench", *MODELS[:2]):
        parser.add_argument(f"--{name}", required=True)
    for name in ("ik-llama-bench", *MODELS[2:], "results", "plot"):
        parser.add_argument(f"--{name}")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--patience", type=float, default=240)
    parser.add_argument("--deep", type=int, default=0)
    parser.add_argument("--only", default="")
    arguments = parser.parse_args()
    if arguments.results and arguments.only:
        parser.error("--results replaces the whole table, so it does not go with --only")
    sides = Sides(arguments)
    lines = table(sides)
    if arguments.results:
        path = Path(arguments.results)
        before, _, rest = path.read_text().partition(MARK)
        after = re.search(r"\n##+ .*", rest, re.DOTALL)
        said = f"{datetime.date.today()}; depths of ours are copies, so speed only."
        path.write_text(f"{before.rstrip()}\n\n{MARK}\n\n{said}\n\n" + "\n".join(lines) + "\n" + (after[0] if after else ""))
    if arguments.plot:
        plot(sides, Path(arguments.plot))


if __name__ == "__main__":
    main()
