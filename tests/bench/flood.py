#!/usr/bin/env python3
"""How much does one user's flood slow another user's answers? Run as root: it asks as two users.

    tests/bench/flood.py [--daemon FILE] [--model FILE] [--flooders N] [--rounds N] [--set key=value ...]

A daemon of its own; the user 65534 asks for short answers, one after the other: alone, and while root keeps as many
requests under way as it may. Prints medians and 95th percentiles of whole answers and of the time to their first byte,
and how much both users had computed meanwhile.
"""
import argparse
import http.client
import json
import os
import pathlib
import socket
import statistics
import subprocess
import tempfile
import threading
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
OTHER = 65534


def ask(path, body):
    """Seconds to the first byte of the answer and to its end, and the status."""
    began = time.monotonic()
    connection = http.client.HTTPConnection("localhost")
    connection.sock = socket.socket(socket.AF_UNIX)
    connection.sock.connect(path)
    connection.request("POST", "/v1/completions", json.dumps(body))
    response = connection.getresponse()
    first = response.read1(1)
    spent = time.monotonic() - began
    response.read()
    assert first
    connection.close()
    return spent, time.monotonic() - began, response.status


def measured(path, rounds):
    """What the other user sees; measured in a process of its own, with its rights."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.setgid(OTHER)
        os.setuid(OTHER)
        times = []
        for at in range(rounds):
            prompt = [100 + (at * 97 + i * 31) % 40000 for i in range(48)]
            body = {"prompt": prompt, "max_tokens": 48, "ignore_eos": True, "stream": True}
            first, whole, status = ask(path, body)
            assert status == 200, status
            times.append((first, whole))
        os.write(writing, json.dumps(times).encode())
        os._exit(0)
    os.close(writing)
    with open(reading) as pipe:
        times = json.loads(pipe.read())
    os.waitpid(child, 0)
    return times


def show(name, times):
    for at, what in ((0, "first byte"), (1, "whole answer")):
        ordered = sorted(time[at] for time in times)
        p95 = ordered[int(len(ordered) * 0.95)]
        print(f"{name}, {what}: p50 {statistics.median(ordered) * 1e3:.0f} ms, p95 {p95 * 1e3:.0f} ms")
    return statistics.median(time[1] for time in times)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default=str(ROOT / "models/smollm2-135m-dsa.gguf"))
    parser.add_argument("--daemon", default=str(ROOT / "target/release/sparsed"))
    parser.add_argument("--flooders", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--set", action="append", default=[])
    options = parser.parse_args()
    home = tempfile.TemporaryDirectory()
    os.chmod(home.name, 0o755)
    path = f"{home.name}/api.sock"
    sets = [f"model.default.path={options.model}", f"state_dir={home.name}/state", f"socket.path={path}", *options.set]
    command = [options.daemon, *(word for each in sets for word in ("--set", each))]
    daemon = subprocess.Popen(command, stderr=open(f"{home.name}/log", "w"))
    try:
        while not os.path.exists(path) or b" 200 " not in health(path):
            assert daemon.poll() is None, open(f"{home.name}/log").read()
            time.sleep(0.05)
        os.chmod(path, 0o666)
        measured(path, 5)
        alone = show("alone", measured(path, options.rounds))
        over, statuses = threading.Event(), []

        def flood(seed):
            n = 0
            while not over.is_set():
                n += 1
                prompt = [100 + (seed * 7919 + n * 104729 + i * 17) % 40000 for i in range(300)]
                body = {"prompt": prompt, "max_tokens": 200, "ignore_eos": True}
                try:
                    statuses.append(ask(path, body)[2])
                except (OSError, http.client.HTTPException):
                    return

        threads = [threading.Thread(target=flood, args=(seed,), daemon=True) for seed in range(options.flooders)]
        for thread in threads:
            thread.start()
        time.sleep(5)
        before, began = computed(path), time.monotonic()
        flooded = show("in the flood", measured(path, options.rounds))
        speed = (computed(path) - before) / (time.monotonic() - began)
        print(f"both together: {speed:.0f} tokens/s, of prompts and answers")
        over.set()
        counts = {status: statuses.count(status) for status in sorted(set(statuses))}
        print(f"ratio of medians {flooded / alone:.2f}; the flood had {counts}")
    finally:
        daemon.kill()
        daemon.wait()


def get(path, what):
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
        connection.sendall(f"GET {what} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n".encode())
        return b"".join(iter(lambda: connection.recv(1 << 16), b""))


def health(path):
    try:
        return get(path, "/health")
    except OSError:
        return b""


def computed(path):
    """Tokens that went through the model so far."""
    return json.loads(get(path, "/v1/status").split(b"\r\n\r\n", 1)[1])["models"][0]["computed_tokens"]


if __name__ == "__main__":
    main()
