#!/usr/bin/env python3
"""How long from the daemon's start to the first token of an answer, the model's file in the page cache?

    python3 tests/bench/start.py [--model MODEL.gguf] [--runs 7]

A daemon with a new state directory is started, asked over its socket as soon as it listens, and killed; the clock runs from
the start of the process to the whole answer of one token. Builds nothing: run `make build models` before.
"""

import argparse
import http.client
import json
import pathlib
import socket
import statistics
import subprocess
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
QUESTION = json.dumps({"prompt": "The capital of France is", "max_tokens": 1})
LIMIT_S = 60


class Connection(http.client.HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: str) -> None:
        super().__init__("localhost")
        self.path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(self.path)


def answered(path: str) -> bool:
    try:
        connection = Connection(path)
        connection.request("POST", "/v1/completions", QUESTION)
        response = connection.getresponse()
        return response.status == 200 and bool(response.read())
    except OSError:
        return False


def once(model: pathlib.Path) -> float:
    with tempfile.TemporaryDirectory() as home:
        sets = (f"state_dir={home}/state", f"socket.path={home}/s", f"model.default.path={model}")
        command = [ROOT / "target/release/sparsed", *(word for pair in sets for word in ("--set", pair))]
        begun = time.monotonic()
        daemon = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        try:
            while not answered(f"{home}/s"):
                assert daemon.poll() is None, f"the daemon has ended: {daemon.returncode}"
                assert time.monotonic() - begun < LIMIT_S, f"no answer in {LIMIT_S} s"
                time.sleep(0.002)
            return time.monotonic() - begun
        finally:
            daemon.kill()
            daemon.wait()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=pathlib.Path, default=ROOT / "models/smollm2-135m-dsa.gguf")
    parser.add_argument("--runs", type=int, default=7)
    ARGUMENTS = parser.parse_args()
    times = [once(ARGUMENTS.model) for _ in range(ARGUMENTS.runs)]
    print(f"start to first token: {', '.join(f'{s:.3f}' for s in times)} s, median {statistics.median(times):.3f} s")
