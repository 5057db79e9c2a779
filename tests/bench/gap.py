#!/usr/bin/env python3
"""How long does a stream pause? Prints the gaps between the pieces of one streamed answer, in milliseconds.

Usage: gap.py SOCKET PROMPT_TOKENS ANSWER_TOKENS [DAEMON_PID]
With the daemon's process id, its plugin host is killed (SIGKILL) after half of the answer.
"""

import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import time

path, n_prompt, n_answer = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
prompt = [1 + 7 * i % 120 for i in range(n_prompt)]
body = json.dumps({"prompt": prompt, "max_tokens": n_answer, "ignore_eos": True, "stream": True, "temperature": 0})
head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {len(body)}\r\n\r\n"
times = []
with socket.socket(socket.AF_UNIX) as stream:
    stream.connect(path)
    stream.sendall((head + body).encode())
    for line in stream.makefile("rb"):
        if not line.startswith(b"data: {"):
            continue
        times.append(time.monotonic())
        if len(sys.argv) > 4 and len(times) == n_answer // 2:
            host = subprocess.run(["pgrep", "-P", sys.argv[4]], capture_output=True, check=True, text=True).stdout.split()
            os.kill(int(host[-1]), signal.SIGKILL)
gaps = [1e3 * (b - a) for a, b in zip(times, times[1:])]
print(f"{len(gaps)} gaps: median {statistics.median(gaps):.2f} ms, longest {max(gaps):.2f} ms")
