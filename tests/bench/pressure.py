#!/usr/bin/env python3
"""Does the daemon keep to its memory, its latency target and its fairness?  python3 tests/bench/pressure.py [what ...]

shrink    a control group whose limit is lowered while answers run: peak of its memory, how they end, what was decided.
          It is proven: not beyond the limit, soon below what is to be used of it, no OOM kill, all answers whole
target    time between tokens of a running answer while long prompts are read beside it, for values of tpot_target_ms
fair      three users of whom one floods: shares of the tokens (root: requests are made under three uids)

Prints a Markdown table of each. Builds nothing: run `make build models` before. `shrink` needs a writable memory
controller of version 1 or 2, else it says that it was skipped; beside version 1 the daemon has a group of version 2 too, if
there can be one, whose stalls it then hears. On a busy machine only ratios mean something; say so beside the figures.
"""

import argparse
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
TEXT = "The quick brown fox jumps over the lazy dog, and the dog does not mind at all. "  # 18 tokens
MIB = 1 << 20
# `shrink`: how long it may take until what is used is what is to be used, and what may then be beyond it: steps take memory
# for a moment, and the watcher looks every two seconds.
SETTLES_S, SLACK_MIB = 10, 16
# How the limit is lowered, of what is to be used.
STEP_MIB, STEP_S = 4, 2


class Group:
    """A memory control group below this process's own."""

    def __init__(self, limit):
        own = dict((line.split(":", 2)[1], line.strip().split(":", 2)[2]) for line in open("/proc/self/cgroup"))
        if "memory" in own:
            self.root, names = "/sys/fs/cgroup/memory" + own["memory"], ("memory.limit_in_bytes", "memory.usage_in_bytes")
            unified = pathlib.Path("/sys/fs/cgroup/unified" + own.get("", "/"))
        else:
            unified = None
            self.root, names = "/sys/fs/cgroup" + own[""], ("memory.max", "memory.current")
        self.path = pathlib.Path(self.root) / f"sparsed-bench-{os.getpid()}"
        self.path.mkdir()
        self.stalls = self.path
        if unified:
            self.stalls = unified / self.path.name
            try:
                self.stalls.mkdir()
            except OSError:
                self.stalls = None
        self.limit_file, self.usage_file = (self.path / name for name in names)
        self.limit(limit)

    def limit(self, n_bytes):
        self.limit_file.write_text(str(n_bytes))

    def used(self):
        """Bytes that cannot be dropped at once: clean pages of the model's file are not the daemon's to keep."""
        stat = dict(line.split() for line in open(self.path / "memory.stat"))
        return int(self.usage_file.read_text()) - int(stat.get("total_inactive_file", stat.get("inactive_file", 0)))

    def events(self):
        """Lines that tell of the kernel's OOM killer."""
        files = (self.path / name for name in ("memory.events", "memory.oom_control"))
        return next(file for file in files if file.exists()).read_text().splitlines()

    def stalled_us(self):
        """How long somebody in it has waited for memory; None where the kernel does not count that for groups."""
        file = self.stalls and self.stalls / "memory.pressure"
        if not file or not file.exists():
            return None
        return int(file.read_text().split("total=")[1].split()[0])

    def folders(self):
        return {self.path, self.stalls} - {None}

    def enter(self):
        for folder in self.folders():
            (folder / "cgroup.procs").write_text(str(os.getpid()))

    def remove(self):
        for folder in self.folders():
            folder.rmdir()


class Daemon:
    def __init__(self, *sets, group=None):
        self.home = tempfile.mkdtemp()
        os.chmod(self.home, 0o755)
        command = [ROOT / "target/release/sparsed", "--set", f"state_dir={self.home}/state"]
        command += ["--set", f"socket.path={self.home}/s", "--set", f"model.default.path={MODEL}"]
        command += [argument for pair in sets for argument in ("--set", pair)]
        enter = group.enter if group else None
        log = open(f"{self.home}/log", "ab")
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=log, preexec_fn=enter)
        while self.process.poll() is None:
            try:
                if self.get("/health").get("status") == "ok":
                    return
            except (OSError, ValueError):
                pass
            time.sleep(0.02)
        sys.exit(f"the daemon has ended: {open(f'{self.home}/log').read()}")

    def connect(self, method, path, body=None):
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(f"{self.home}/s")
        data = json.dumps(body).encode() if body is not None else b""
        head = f"{method} {path} HTTP/1.1\r\nhost: l\r\nconnection: close\r\ncontent-type: application/json\r\n"
        sock.sendall(head.encode() + f"content-length: {len(data)}\r\n\r\n".encode() + data)
        return sock.makefile("rb")

    def get(self, path):
        return json.loads(self.connect("GET", path).read().split(b"\r\n\r\n", 1)[1])

    def stream(self, n_prompt, n_answer, seed=0, **more):
        """Times at which tokens came, and how the answer ended. With `return_tokens` also one without a text comes."""
        body = {"prompt": f"{seed} " + TEXT * (n_prompt // 18), "max_tokens": n_answer, "ignore_eos": True,
                "temperature": 0, "stream": True, "return_tokens": True, **more}
        times, end = [], "cut off"
        for line in self.connect("POST", "/v1/completions", body):
            if line.startswith(b"data: [DONE]"):
                end = "done"
            elif line.startswith(b"data: ") and b'"error"' in line:
                end = json.loads(line[6:])["error"]["code"]
            elif line.startswith(b"data: "):
                times.append(time.monotonic())
            elif line.startswith(b'{"error"'):
                end = json.loads(line)["error"]["code"]
        return times, end

    def stop(self):
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait()


def in_thread(work, *arguments, **more):
    result = []
    thread = threading.Thread(target=lambda: result.append(work(*arguments, **more)))
    thread.start()
    return lambda: (thread.join(), result[0])[1]


def shrink():
    try:
        group = Group(1024 * MIB)
    except OSError as error:
        print(f"skipped: no group of its own with a limit of memory: {error}")
        return
    daemon = Daemon("memory.slow_tier=all", "limits.max_batched_tokens=64", "engine.threads=2", group=group)

    def ask(first):
        """Four answers; a daemon that is killed takes them with it: they end as cut off."""
        answers = [in_thread(daemon.stream, 1000, 80, first + seed) for seed in range(4)]
        return in_thread(lambda: [answer()[1] for answer in answers])

    waiting, ends = ask(0), []
    while daemon.get("/v1/status")["models"][0]["sampled_tokens"] < 40:
        time.sleep(0.2)
    # Nine tenths of the limit are used: what is in use now is to become too much, bit by bit. A limit that falls within a
    # moment to just above what is in use has the kernel kill before anybody can give something back.
    before = group.used()
    lowered = before - 16 * MIB
    limit = lowered * 10 // 9
    for step in range(16, -1, -STEP_MIB):
        group.limit((lowered + step * MIB) * 10 // 9)
        time.sleep(STEP_S)
    peak, after = 0, 0
    lowered_at = time.monotonic()
    while True:
        used = group.used()
        peak = max(peak, used)
        if time.monotonic() - lowered_at > SETTLES_S:
            after = max(after, used)
        time.sleep(0.05)
        took_s = time.monotonic() - lowered_at
        if threading.active_count() == 1:
            ends += waiting()
            # On a fast machine there are more, until it has had time to settle.
            if took_s > SETTLES_S or daemon.process.poll() is not None:
                break
            waiting = ask(len(ends))
    assert daemon.process.poll() is None, f"the daemon has ended: {group.events()} {open(f'{daemon.home}/log').read()}"
    decisions = [d["decision"] for d in daemon.get("/v1/status")["models"][0]["scheduling"]["decisions"]]
    kills = next((line.split()[1] for line in group.events() if line.startswith("oom_kill ")), "?")
    stalled, log = group.stalled_us(), open(f"{daemon.home}/log").read()
    code = daemon.stop()
    group.remove()
    print("| limit of the group | lowered to | peak of its memory | OOM kills | stalls of the group | answers | decisions |")
    print("|---|---|---|---|---|---|---|")
    print(f"| {1024} MiB | {limit // MIB} MiB, {lowered // MIB} to be used | {peak // MIB} MiB, {after // MIB} MiB from "
          f"{SETTLES_S} s after on, of {took_s:.0f} s | {kills} | {'not told' if stalled is None else f'{stalled // 1000} ms'} "
          f"| {', '.join(ends)} | {', '.join(decisions)} |")
    assert peak <= limit, f"{peak} bytes beyond the limit of {limit}"
    assert 0 < after <= lowered + SLACK_MIB * MIB, f"{after} bytes are used, {lowered} are to be"
    assert kills == "0", f"{kills} OOM kills"
    assert set(ends) == {"done"}, ends
    assert {"bound", "climb"} & set(decisions), f"nothing was decided for want of memory: {decisions}"
    assert "decided" in log, "no decision in the log"
    if stalled is not None:
        assert f"source={group.stalls}/memory.pressure" in log, "the group's stalls are not watched"
    assert code == 0, code


def target():
    print("| tpot_target_ms | median | 95 % | later than the target | prompt tokens of a step at the end |")
    print("|---|---|---|---|---|")
    for target_ms in ARGUMENTS.targets:
        daemon = Daemon(f"limits.tpot_target_ms={target_ms}", "memory.budget=512MiB")
        running = in_thread(daemon.stream, 18, 240, 1)
        while daemon.get("/v1/status")["models"][0]["sampled_tokens"] < 8:
            time.sleep(0.05)
        others = [in_thread(daemon.stream, 1800, 1, seed) for seed in (2, 3, 4)]
        begun = time.monotonic()
        ends = [other()[1] for other in others]
        chunk = daemon.get("/v1/status")["models"][0]["scheduling"]["prefill_chunk_tokens"]
        over = time.monotonic()
        times = [at for at in running()[0] if begun <= at <= over]
        gaps = sorted(b - a for a, b in zip(times, times[1:]))
        assert ends == ["done"] * 3 and len(gaps) > 4, (ends, len(gaps))
        of = lambda share: gaps[min(len(gaps) - 1, int(len(gaps) * share))] * 1e3
        late = sum(gap * 1e3 > target_ms for gap in gaps) / len(gaps)
        row = [target_ms, f"{of(0.5):.0f} ms", f"{of(0.95):.0f} ms", f"{late:.0%}" if target_ms else "", chunk]
        print(f"| {' | '.join(map(str, row))} |", flush=True)
        daemon.stop()


def as_user(daemon, uid, n_open, n_all):
    """A process of `uid` that has so many requests open at a time."""
    pid = os.fork()
    if pid == 0:
        os.setuid(uid)
        places = threading.Semaphore(n_open)

        def ask(seed):
            with places:
                daemon.stream(54, 16, uid * 1000 + seed)

        threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(n_all)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        os._exit(0)
    return pid


def fair():
    print("| user | open at a time | tokens | share |\n|---|---|---|---|")
    daemon = Daemon("limits.max_running=4", "memory.budget=256MiB")
    os.chmod(f"{daemon.home}/s", 0o666)
    users = {2001: 120, 2002: 3, 2003: 3}
    pids = [as_user(daemon, uid, n_open, 120) for uid, n_open in users.items()]
    time.sleep(2)
    begun, served = None, {}
    until = time.monotonic() + ARGUMENTS.seconds
    totals = {uid: 0 for uid in users}
    while time.monotonic() < until:
        now = {o["uid"]: o["served_tokens"] for o in daemon.get("/v1/status")["models"][0]["scheduling"]["owners"]}
        if begun is not None:
            for uid in users:
                # An owner without a request is forgotten, and begins with what the least served one has.
                totals[uid] += max(0, now.get(uid, begun.get(uid, 0)) - begun.get(uid, now.get(uid, 0)))
        begun = now
        time.sleep(0.1)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    whole = sum(totals.values())
    for uid, n_open in users.items():
        print(f"| {uid} | {n_open} | {totals[uid]} | {totals[uid] / whole:.3f} |")
    daemon.stop()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", default=["shrink", "target", "fair"], choices=["shrink", "target", "fair"])
    parser.add_argument("--model", default=ROOT / "models/smollm2-135m-dsa.gguf")
    parser.add_argument("--targets", type=int, nargs="*", default=[0, 200, 100])
    parser.add_argument("--seconds", type=float, default=30, help="how long `fair` looks")
    ARGUMENTS = parser.parse_args()
    MODEL = ARGUMENTS.model
    for what in ARGUMENTS.what:
        print(f"\n{what}\n")
        globals()[what]()
