#!/usr/bin/env python3
"""What do sessions and the slow tier cost, and what do they save?  python3 tests/bench/sessions.py [what ...]

restore   time to the first token of a session that is restored, against the same prompt without one
kill      from SIGKILL to the next token of a long session, the daemon's start included
host      from SIGKILL of the plugin's process to the next token of a long answer, with a session and without
written   bytes that reach the disk for each token, with a session and without
slow      decode with most latent rows in the slow tier, against all of them in memory

Prints a Markdown table of each. Builds nothing: run `make build models` before. Where the disk is throttled, or the page
cache was dropped, say so beside the figures (--drop-caches does the latter, as root).
"""

import argparse
import atexit
import http.client
import json
import os
import pathlib
import signal
import socket
import subprocess
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
TEXT = "The quick brown fox jumps over the lazy dog, and the dog does not mind at all. "  # 18 tokens


class Connection(http.client.HTTPConnection):
    def __init__(self, path):
        super().__init__("l", timeout=3600)
        self.path = path

    def connect(self):
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(3600)
        self.sock.connect(self.path)


class Daemon:
    def __init__(self, home, *sets):
        self.home, self.sets, self.process = home, sets, None
        self.start()

    def start(self):
        command = [ROOT / "target/release/sparsed", "--set", f"state_dir={self.home}/state"]
        command += ["--set", f"socket.path={self.home}/s", "--set", f"model.default.path={MODEL}"]
        command += [argument for pair in self.sets for argument in ("--set", pair)]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=open(f"{self.home}/log", "ab"))
        atexit.register(self.process.kill)
        while True:
            try:
                if self.ask("GET", "/health").get("status") == "ok":
                    return
            except (OSError, ValueError):
                pass
            time.sleep(0.005)

    def stop(self, how=signal.SIGTERM):
        self.process.send_signal(how)
        self.process.wait()

    def ask(self, method, path, body=None):
        connection = Connection(f"{self.home}/s")
        connection.request(method, path, None if body is None else json.dumps(body))
        return json.loads(connection.getresponse().read())

    def session(self, **fields):
        return self.ask("POST", "/v1/sessions", fields)["id"]

    def chat(self, text, max_tokens=1, session=None):
        body = {"messages": [{"role": "user", "content": text}], "max_tokens": max_tokens, "temperature": 0,
                "ignore_eos": True}
        if session:
            body["session_id"] = session
        return self.ask("POST", "/v1/chat/completions", body)

    def written(self):
        for line in open(f"/proc/{self.process.pid}/io"):
            if line.startswith("write_bytes"):
                return int(line.split()[1])

    def memory(self):
        lines = dict(line.split(":") for line in open(f"/proc/{self.process.pid}/status") if ":" in line)
        return int(lines["RssAnon"].split()[0]) / 1024


def ttft(answer):
    timings = answer["timings"]
    return timings["queue_ms"] + timings["prompt_ms"]


def drop_caches():
    if ARGUMENTS.drop_caches:
        os.sync()
        pathlib.Path("/proc/sys/vm/drop_caches").write_text("1")


def restore(home):
    print("| session tokens | read anew, ms | restored, ms | share |\n|---:|---:|---:|---:|")
    for tokens in ARGUMENTS.tokens:
        daemon = Daemon(home, f"model.default.max_context={tokens + 512}", f"engine.threads={ARGUMENTS.threads}")
        session = daemon.session()
        first = daemon.chat(TEXT * (tokens // 18), session=session)
        anew = ttft(first)
        daemon.stop()
        drop_caches()
        daemon.start()
        restored = ttft(daemon.chat("And then?", session=session))
        print(f"| {first['usage']['prompt_tokens']} | {anew:.0f} | {restored:.0f} | {restored / anew:.2%} |", flush=True)
        daemon.stop()


def kill(home):
    print("| session tokens | SIGKILL to the next token, s |\n|---:|---:|")
    for tokens in ARGUMENTS.tokens:
        daemon = Daemon(home, f"model.default.max_context={tokens + 1024}", f"engine.threads={ARGUMENTS.threads}")
        session = daemon.session()
        daemon.chat(TEXT * (tokens // 18), session=session)
        connection = Connection(f"{home}/s")
        body = {"messages": [{"role": "user", "content": "Go on."}], "max_tokens": 200, "stream": True,
                "temperature": 0, "ignore_eos": True, "session_id": session}
        connection.request("POST", "/v1/chat/completions", json.dumps(body))
        stream = connection.getresponse()
        heard = 0
        while heard < 20:
            line = stream.readline()
            if not line or line.startswith(b"{"):
                raise SystemExit(f"no answer: {line.decode()}")
            heard += line.startswith(b"data: {")
        began = time.monotonic()
        daemon.stop(signal.SIGKILL)
        daemon.start()
        connection = Connection(f"{home}/s")
        connection.request("POST", f"/v1/sessions/{session}/continue", json.dumps({"stream": True}))
        stream, again = connection.getresponse(), 0
        # What was heard comes again; the one after it is the next.
        while again <= heard:
            line = stream.readline()
            if not line or line.startswith(b"{"):
                raise SystemExit(f"the answer did not go on: {line.decode()}")
            again += line.startswith(b"data: {")
        print(f"| {tokens} | {time.monotonic() - began:.2f} |", flush=True)
        daemon.stop()


def host(home):
    print("| prompt tokens | in a session, s | without one, s | computed after it, tokens |\n|---:|---:|---:|---:|")
    for tokens in ARGUMENTS.tokens:
        daemon = Daemon(home, f"model.default.max_context={tokens + 1024}", f"engine.threads={ARGUMENTS.threads}",
                        "engine.isolation=process", "engine.retry.backoff_ms=[1]", "plugins.strike_window_ms=1")
        model = lambda: daemon.ask("GET", "/v1/status")["models"][0]
        row = []
        for session in [daemon.session(), None]:
            connection = Connection(f"{home}/s")
            # Another beginning for each: what the pool has of the first one would be taken for the second.
            body = {"messages": [{"role": "user", "content": f"{len(row)}. " + TEXT * (tokens // 18)}], "stream": True,
                    "max_tokens": 100, "temperature": 0, "ignore_eos": True}
            if session:
                body["session_id"] = session
            connection.request("POST", "/v1/chat/completions", json.dumps(body))
            stream, heard, killed, before = connection.getresponse(), [], None, None
            while len(heard) < 100:
                line = stream.readline()
                if not line or line.startswith(b"{"):
                    raise SystemExit(f"no answer: {line.decode()}")
                if line.startswith(b"data: {"):
                    heard.append(time.monotonic())
                if len(heard) == 50 and killed is None:
                    children = pathlib.Path(f"/proc/{daemon.process.pid}/task").glob("*/children")
                    before = model()["computed_tokens"]
                    killed = time.monotonic()
                    os.kill(int(" ".join(path.read_text() for path in children).split()[0]), signal.SIGKILL)
            # What was on its way to us when the process was killed comes first.
            gap = max(range(50, 100), key=lambda i: heard[i] - heard[i - 1])
            row += [heard[gap] - killed, model()["computed_tokens"] - before]
        print(f"| {tokens} | {row[0]:.2f} | {row[2]:.2f} | {row[1]} against {row[3]} |", flush=True)
        daemon.stop()


def written(home):
    daemon = Daemon(home, f"engine.threads={ARGUMENTS.threads}")
    per_token = daemon.ask("GET", "/v1/models")["data"][0]["meta"]["kv_bytes_per_token"]
    print("| request | tokens | bytes written per token | KV bytes per token |\n|---|---:|---:|---:|")
    for name, session in [("without a session", None), ("of a session", daemon.session())]:
        before = daemon.written()
        usage = daemon.chat(TEXT * 50, 500, session)["usage"]
        time.sleep(1)
        os.sync()
        tokens = usage["total_tokens"]
        print(f"| {name} | {tokens} | {(daemon.written() - before) / tokens:.0f} | {per_token} |", flush=True)
    daemon.stop()


def slow(home):
    print("| context | hot share | slow blocks | memory, MiB | decode, tokens/s | of all in memory |")
    print("|---:|---:|---:|---:|---:|---:|")
    for tokens in ARGUMENTS.tokens:
        base = None
        for hot in [None, 0.2, 0.07, 0.0]:
            sets = [f"model.default.max_context={tokens + 512}", f"engine.threads={ARGUMENTS.threads}"]
            sets += ["limits.max_running=1", "sessions.enabled=false", "memory.slow_tier=all"]
            if hot is not None:
                # So much that all index planes fit, and the share of the latent ones.
                sets += [f"memory.budget={int((tokens + 512) * (2160 + hot * 11520) + (45 << 20))}", f"memory.hot_share={hot}"]
            daemon = Daemon(home, *sets)
            timings = daemon.chat(TEXT * (tokens // 18), 64)["timings"]
            rate = timings["predicted_per_second"]
            base = base or rate
            blocks = daemon.ask("GET", "/v1/status")["models"][0]["kv_blocks_slow"]
            name = "all" if hot is None else f"{hot:.0%}"
            print(f"| {tokens} | {name} | {blocks} | {daemon.memory():.0f} | {rate:.1f} | {rate / base:.2f} |", flush=True)
            daemon.stop()


if __name__ == "__main__":
    PARSER = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    PARSER.add_argument("what", nargs="*", default=["restore", "kill", "host", "written", "slow"])
    PARSER.add_argument("--model", default=ROOT / "models/smollm2-135m-dsa.gguf")
    PARSER.add_argument("--tokens", type=int, nargs="*", default=[2048, 8192])
    PARSER.add_argument("--threads", type=int, default=2)
    PARSER.add_argument("--drop-caches", action="store_true")
    PARSER.add_argument("--home", help="a folder on the disk that is to be measured")
    ARGUMENTS = PARSER.parse_args()
    MODEL = pathlib.Path(ARGUMENTS.model).resolve()
    for what in ARGUMENTS.what:
        with tempfile.TemporaryDirectory(dir=ARGUMENTS.home) as folder:
            print(f"\n{what}:\n")
            {"restore": restore, "kill": kill, "host": host, "written": written, "slow": slow}[what](folder)
