#!/usr/bin/env python3
"""What do sessions and the slow tier cost, and what do they save?  python3 tests/bench/sessions.py [what ...]

start     from the daemon's start, with nothing kept and the model's file in the page cache, to its first token
restore   time to the first token of a session that is restored, against the same prompt without one
kill      from SIGKILL to the next token of a long session, the daemon's start included
host      from SIGKILL of the plugin's process to the next token of a long answer, with a session and without
written   bytes that reach the disk for each token: without a session, and by durability, in memory or with the slow tier
slow      decode with most latent rows in the slow tier, against all of them in memory
bounded   memory of a control group while 8 times the latent rows are decoded that there is memory for
many      sessions that take turns, on a budget that holds an eighth of them: failures, work done again, fairness

All but `start`, `host` and `written` begin with a session of --tokens tokens, which is read once and kept in --keep.
`written` wants --answer 700 or so: an answer's last block stays where it is until it is full.
Prints a Markdown table of each. Builds nothing: run `make build models` before. `slow` throttles the disk by a block
device group of version 1 (root). Say how busy the machine was beside the figures.
"""

import argparse
import atexit
import glob
import http.client
import json
import os
import pathlib
import signal
import socket
import statistics
import subprocess
import tempfile
import threading
import time

import pressure

ROOT = pathlib.Path(__file__).resolve().parents[2]
# Of the default model: bytes of a token's index keys and of its latent rows in all layers, and its layers.
INDEX_BYTES, LATENT_BYTES, LAYERS = 2040, 23040, 30
TEXT = "The quick brown fox jumps over the lazy dog, and the dog does not mind at all. "  # 18 tokens


class Connection(http.client.HTTPConnection):
    def __init__(self, path):
        super().__init__("l", timeout=3600)
        self.path = path

    def connect(self):
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(3600)
        self.sock.connect(self.path)


def text(tokens):
    """A message of about so many tokens: of the files of --text, else a sentence again and again."""
    if not ARGUMENTS.text:
        return TEXT * (tokens // 18)
    whole = "".join(pathlib.Path(file).read_text(errors="replace") for file in sorted(glob.glob(ARGUMENTS.text)))
    # Vim's manual has 3.6 characters a token; what is missing of `tokens` leaves room.
    return whole[: int(tokens * 3.4)]


class Daemon:
    def __init__(self, home, *sets, enter=None):
        self.home, self.sets, self.process, self.enter = home, sets, None, enter
        self.start()

    def start(self):
        command = [ROOT / "target/release/sparsed", "--set", f"state_dir={self.home}/state"]
        command += ["--set", f"socket.path={self.home}/s", "--set", f"model.default.path={MODEL}"]
        command += [argument for pair in self.sets for argument in ("--set", pair)]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=open(f"{self.home}/log", "ab"),
                                        preexec_fn=self.enter)
        atexit.register(self.process.kill)
        while self.process.poll() is None:
            try:
                if self.ask("GET", "/health").get("status") == "ok":
                    return
            except (OSError, ValueError):
                pass
            time.sleep(0.005)
        raise SystemExit(f"the daemon has ended: {pathlib.Path(self.home, 'log').read_text()[-2000:]}")

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

    def times(self, session, text, max_tokens):
        """When the tokens of a streamed answer came."""
        connection = Connection(f"{self.home}/s")
        body = {"messages": [{"role": "user", "content": text}], "max_tokens": max_tokens, "stream": True,
                "temperature": 0, "ignore_eos": True, "session_id": session}
        connection.request("POST", "/v1/chat/completions", json.dumps(body))
        stream, times = connection.getresponse(), []
        for line in stream:
            if line.startswith(b"{") or b'"error"' in line:
                raise SystemExit(f"no answer: {line.decode()}")
            if b'"content"' in line:
                times.append(time.monotonic())
        return times

    def written(self):
        for line in open(f"/proc/{self.process.pid}/io"):
            if line.startswith("write_bytes"):
                return int(line.split()[1])

    def memory(self):
        lines = dict(line.split(":") for line in open(f"/proc/{self.process.pid}/status") if ":" in line)
        return int(lines["RssAnon"].split()[0]) / 1024


def prepared(home, tokens):
    """A session of so many tokens, and milliseconds that it took to read them; made once in a folder."""
    note = pathlib.Path(home, f"prepared-{tokens}")
    if not note.exists():
        daemon = Daemon(home, *alone(tokens))
        session = daemon.session()
        answer = daemon.chat(text(tokens), session=session)
        daemon.stop()
        note.write_text(json.dumps([session, answer["usage"]["prompt_tokens"], ttft(answer)]))
    return json.loads(note.read_text())


def alone(tokens):
    """Settings of a daemon that has all of one long session in memory."""
    return [f"model.default.max_context={tokens + 1024}", f"engine.threads={ARGUMENTS.threads}", "limits.max_running=1",
            "memory.budget=2GiB", *ARGUMENTS.set]


def ttft(answer):
    timings = answer["timings"]
    return timings["queue_ms"] + timings["prompt_ms"]


def drop_caches(folder):
    """Has the system forget what it has of the files below `folder`."""
    for path in pathlib.Path(folder).rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def start(home):
    times = []
    for number in range(7):
        fresh = f"{home}/{number}"
        os.mkdir(fresh)
        began = time.monotonic()
        daemon = Daemon(fresh)
        daemon.ask("POST", "/v1/completions", {"prompt": "The capital of France is", "max_tokens": 1})
        times.append(time.monotonic() - began)
        daemon.stop()
    print(f"| start to the first token, s | median |\n|---|---:|\n| {', '.join(f'{took:.2f}' for took in times)} "
          f"| {statistics.median(times):.2f} |")


def restore(home):
    print("| session tokens | read anew, ms | restored, ms | share | from a cold file, ms | share |")
    print("|---:|---:|---:|---:|---:|---:|")
    for tokens in ARGUMENTS.tokens:
        session, n_prompt, anew = prepared(home, tokens)
        row = []
        for is_cold in [False, True]:
            times = []
            for _ in range(3):
                if is_cold:
                    drop_caches(f"{home}/state")
                daemon = Daemon(home, *alone(tokens))
                times.append(ttft(daemon.chat("And then?", session=session)))
                daemon.ask("POST", f"/v1/sessions/{session}/truncate", {"turns": 1})
                daemon.stop()
            row += [f"{statistics.median(times):.0f}", f"{statistics.median(times) / anew:.2%}"]
        print(f"| {n_prompt} | {anew:.0f} | {' | '.join(row)} |", flush=True)


def kill(home):
    print("| session tokens | SIGKILL to the next token, s |\n|---:|---:|")
    for tokens in ARGUMENTS.tokens:
        session, n_prompt, _ = prepared(home, tokens)
        times = []
        for _ in range(3):
            daemon = Daemon(home, *alone(tokens))
            connection = Connection(f"{home}/s")
            body = {"messages": [{"role": "user", "content": "Go on."}], "max_tokens": 200, "stream": True,
                    "temperature": 0, "ignore_eos": True, "session_id": session}
            connection.request("POST", "/v1/chat/completions", json.dumps(body))
            heard = hear(connection.getresponse(), 20)
            began = time.monotonic()
            daemon.stop(signal.SIGKILL)
            daemon.start()
            connection = Connection(f"{home}/s")
            connection.request("POST", f"/v1/sessions/{session}/continue", json.dumps({"stream": True}))
            # What was heard comes again; the one after it is the next.
            hear(connection.getresponse(), heard + 1)
            times.append(time.monotonic() - began)
            connection.close()
            daemon.stop()
            daemon = Daemon(home, *alone(tokens))
            daemon.ask("POST", f"/v1/sessions/{session}/truncate", {"turns": 1})
            daemon.stop()
        print(f"| {n_prompt} | {', '.join(f'{took:.2f}' for took in sorted(times))} |", flush=True)


def hear(stream, n_events):
    """Reads so many events of a stream."""
    heard = 0
    while heard < n_events:
        line = stream.readline()
        if not line or line.startswith(b"{") or b'"error"' in line:
            raise SystemExit(f"no answer: {line.decode()}")
        heard += line.startswith(b"data: {")
    return heard


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
    """A turn of few words with a long answer, behind one that was read and written before."""
    tokens = 3072
    print("| latent rows | fast of all blocks | request | new tokens | bytes written per new token | of the KV's own |")
    print("|---|---:|---|---:|---:|---:|")
    for tier, sets in [("hot", []), ("warm", tight(tokens, least()) + ["memory.hot_share=0"])]:
        folder = pathlib.Path(home, f"written-{tier}")
        folder.mkdir(exist_ok=True)
        daemon = Daemon(folder, *alone(tokens), *sets)
        per_token = daemon.ask("GET", "/v1/models")["data"][0]["meta"]["kv_bytes_per_token"]
        # By itself what has no session has no slow tier.
        for durability in ["none", "turn", "token"] if sets else [None, "none", "turn", "token"]:
            session = daemon.session(durability=durability) if durability else None
            if session:
                daemon.chat(f"{durability}. " + text(2400), 1, session)
            before = settled(daemon)
            usage = daemon.chat("Tell me all about it.", ARGUMENTS.answer, session)["usage"]
            grown = settled(daemon) - before
            n_new = usage["total_tokens"] - usage["prompt_tokens_details"]["cached_tokens"]
            n_fast, n_blocks = blocks(folder)
            name = f"of a session, durability {durability}" if durability else "without a session"
            print(f"| {tier} | {n_fast} of {n_blocks} | {name} | {n_new} | {grown / n_new:.0f} "
                  f"| {grown / n_new / per_token:.2f} |", flush=True)
        daemon.stop()


def settled(daemon):
    """Bytes that it has written, once it writes no more."""
    before = None
    while before != (before := daemon.written()):
        time.sleep(2)
    return before


class Disk:
    """A block device group of version 1 that lets its members read and write only so much."""

    PROFILES = {"as it is": None, "eMMC": (6000, 150_000_000), "SD": (1500, 40_000_000)}

    def __init__(self, profile, folder):
        self.path, limits = None, self.PROFILES[profile]
        if limits is None:
            return
        own = next(line.strip().split(":", 2)[2] for line in open("/proc/self/cgroup") if ":blkio:" in line)
        self.path = pathlib.Path(f"/sys/fs/cgroup/blkio{own}/sparsed-bench-{os.getpid()}")
        self.path.mkdir()
        device = os.stat(folder).st_dev
        for name, limit in zip(("iops", "bps"), limits):
            for way in ("read", "write"):
                file = self.path / f"blkio.throttle.{way}_{name}_device"
                file.write_text(f"{os.major(device)}:{os.minor(device)} {limit}")

    def enter(self):
        if self.path:
            (self.path / "cgroup.procs").write_text(str(os.getpid()))

    def remove(self):
        if self.path:
            self.path.rmdir()


def planes():
    """Bytes of a token in the latent plane, and in the index plane with what finds its rows in the cache."""
    return LATENT_BYTES, INDEX_BYTES + 4 * LAYERS


def tight(tokens, left_bytes):
    """Settings for which so many bytes are left beside the index planes of one session.

    Half of what memory holds would be for requests without a session, were they not slow as well. What --set says of
    memory.slow_tier holds all the same: with `sessions`, the default, that half is not left for the session's rows.
    """
    _, index = planes()
    is_set = any(pair.startswith("memory.slow_tier=") for pair in ARGUMENTS.set)
    return [f"memory.budget={(tokens + 1024) * index + int(left_bytes)}"] + ([] if is_set else ["memory.slow_tier=all"])


def least():
    """Bytes of a budget that a step needs beside index planes: blocks on their way, readers, the smallest cache."""
    return 29 * 64 * LATENT_BYTES + (4 << 20)


def blocks(home):
    """Fast blocks and blocks, as the last daemon has said."""
    with open(f"{home}/log") as log:
        line = [line for line in log if "kv_blocks=" in line][-1]
    found = dict(pair.split("=") for pair in line.split() if "_blocks=" in pair)
    return int(found["fast_blocks"]), int(found["kv_blocks"])


def slow(home):
    """One session is read once; each run restores it, so that only the turn is measured."""
    print("| context | disk | hot share | fast of all blocks | memory, MiB | a token, ms: median, slowest tenth "
          "| rate, of all in memory |")
    print("|---:|---|---:|---:|---:|---:|---:|")
    for tokens in ARGUMENTS.tokens:
        session, n_prompt, _ = prepared(home, tokens)
        base = None
        for profile, hot in [("as it is", None)] + [(p, h) for p in ARGUMENTS.disks for h in ARGUMENTS.shares]:
            more = []
            if hot is not None:
                more = tight(tokens, (tokens + 1024) * hot * LATENT_BYTES + least()) + [f"memory.hot_share={hot}"]
            disk = Disk(profile, home)
            daemon = Daemon(home, *alone(tokens), *more, enter=disk.enter)
            times = daemon.times(session, "Tell me about it.", ARGUMENTS.answer)
            # The first third fills the cache.
            times = times[len(times) // 3:]
            gaps = sorted(b - a for a, b in zip(times, times[1:]))
            median = statistics.median(gaps)
            base = base or median
            name, (n_fast, n_blocks) = "all" if hot is None else f"{hot:.0%}", blocks(home)
            print(f"| {n_prompt} | {profile} | {name} | {n_fast} of {n_blocks} | {daemon.memory():.0f} "
                  f"| {median * 1e3:.1f}, {gaps[len(gaps) * 9 // 10] * 1e3:.1f} | {base / median:.2f} |", flush=True)
            daemon.ask("POST", f"/v1/sessions/{session}/truncate", {"turns": 1})
            daemon.stop()
            disk.remove()


def bounded(home):
    print("| session tokens | latent plane, MiB | left for it, MiB | budget of weights, workspace and KV, MiB "
          "| peak of the group, MiB | tokens decoded |")
    print("|---:|---:|---:|---:|---:|---:|")
    for tokens in ARGUMENTS.tokens:
        session, n_prompt, _ = prepared(home, tokens)
        latent, index = planes()
        plane, left = n_prompt * latent, n_prompt * latent // 8
        group = pressure.Group(1 << 40)
        daemon = Daemon(home, *alone(tokens), *tight(tokens, left), "memory.hot_share=0", enter=group.enter)
        is_over, peak = threading.Event(), [0]

        def watch():
            while not is_over.wait(0.01):
                peak[0] = max(peak[0], group.used())

        watching = threading.Thread(target=watch)
        watching.start()
        n_decoded = len(daemon.times(session, "Tell me about it.", ARGUMENTS.answer))
        is_over.set()
        watching.join()
        budget = daemon.ask("GET", "/v1/status")["memory"]
        beside = budget["weights_bytes"] + budget["workspace_bytes"]
        whole = beside + (tokens + 1024) * index + left
        row = [n_prompt, plane >> 20, left >> 20, whole >> 20, peak[0] >> 20, n_decoded]
        print(f"| {' | '.join(map(str, row))} |", flush=True)
        daemon.ask("POST", f"/v1/sessions/{session}/truncate", {"turns": 1})
        daemon.stop()
        group.remove()


def many(home):
    n_sessions, n_rounds, n_clients = ARGUMENTS.sessions, ARGUMENTS.rounds, ARGUMENTS.clients
    tokens = ARGUMENTS.tokens[0]
    daemon = Daemon(home, "memory.budget=1GiB", f"engine.threads={ARGUMENTS.threads}")
    per_token = daemon.ask("GET", "/v1/models")["data"][0]["meta"]["kv_bytes_per_token"]
    daemon.stop()
    budget = n_sessions // 8 * tokens * per_token
    daemon = Daemon(home, f"memory.budget={budget}", f"model.default.max_context={tokens + 512}",
                    f"engine.threads={ARGUMENTS.threads}", *ARGUMENTS.set)
    # Reading them takes many minutes: with --keep that is done once, and the turns can be measured while it is quiet.
    note = pathlib.Path(home, f"prepared-{n_sessions}-of-{tokens}")
    is_new = not note.exists()
    sessions = [daemon.session() for _ in range(n_sessions)] if is_new else json.loads(note.read_text())
    failures, times, ends = [], [[] for _ in sessions], [[] for _ in sessions]

    def turn(at, text, n_answer):
        begun = time.monotonic()
        answer = daemon.chat(text, n_answer, sessions[at])
        if "usage" not in answer or answer["usage"]["completion_tokens"] != n_answer:
            failures.append(answer)
        return time.monotonic() - begun

    # Other words at each beginning, or they would share their blocks.
    if is_new:
        for at in range(n_sessions):
            turn(at, f"Story number {at}. " + TEXT * ((tokens - 256) // 18), 1)
        note.write_text(json.dumps(sessions))
    if not n_rounds:
        return daemon.stop()
    before = scheduling(daemon)
    # The first turns find an empty pool, and the last ones run beside fewer and fewer others: a round at either end is
    # not counted, or sessions would differ by whose turn was first or last.
    turns, lock = iter([(at, n) for n in range(n_rounds + 2) for at in range(n_sessions)]), threading.Lock()

    def client():
        while True:
            with lock:
                at, n = next(turns, (None, None))
            if at is None:
                return
            took = turn(at, f"And then, {n}?", 16)
            times[at] += [took] if 1 <= n <= n_rounds else []
            ends[at] += [] if 1 <= n <= n_rounds else [took]

    clients = [threading.Thread(target=client) for _ in range(n_clients)]
    [thread.start() for thread in clients]
    [thread.join() for thread in clients]
    after = scheduling(daemon)
    grown = {name: after[name] - before[name] for name in after}
    mean, n_turns = statistics.mean(sum(of) for of in times), n_sessions * (n_rounds + 2)
    print("| sessions | tokens of each | budget, MiB | at a time | turns | failures | a turn, s "
          "| restored tokens a turn | computed or restored again | thrash decisions | a session's time, of the mean "
          "| with the ends counted |")
    print("|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|")
    least, most = (pick(sum(of) for of in times) / mean for pick in (min, max))
    whole = [sum(inner + outer) for inner, outer in zip(times, ends)]
    ends_least, ends_most = (pick(whole) / statistics.mean(whole) for pick in (min, max))
    print(f"| {n_sessions} | {tokens} | {budget >> 20} | {n_clients} | {n_turns} | {len(failures)} "
          f"| {mean / n_rounds:.2f} | {grown['restored'] / n_turns:.0f} | {grown['again']} | {grown['thrash']} "
          f"| {least:.2f} to {most:.2f} | {ends_least:.2f} to {ends_most:.2f} |", flush=True)
    assert not failures, failures[0]
    for session in sessions:
        daemon.ask("POST", f"/v1/sessions/{session}/truncate", {"turns": 1})
    daemon.stop()


def scheduling(daemon):
    """Counters of the scheduler."""
    connection = Connection(f"{daemon.home}/s")
    connection.request("GET", "/metrics")
    lines = connection.getresponse().read().decode().splitlines()

    def value(name, label=""):
        found = [line for line in lines if line.startswith(name) and label in line]
        return sum(int(float(line.rsplit(" ", 1)[1])) for line in found)

    return {"restored": value("sparsed_restored_tokens_total"), "again": value("sparsed_again_tokens_total"),
            "thrash": value("sparsed_decisions_total", 'decision="thrash"')}


if __name__ == "__main__":
    PARSER = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    PARSER.add_argument("what", nargs="*", default=["start", "restore", "kill", "host", "written", "slow", "bounded", "many"])
    PARSER.add_argument("--model", default=ROOT / "models/smollm2-135m-dsa.gguf")
    PARSER.add_argument("--tokens", type=int, nargs="*", default=[2048, 8192])
    PARSER.add_argument("--threads", type=int, default=2)
    PARSER.add_argument("--sessions", type=int, default=64, help="`many`: so many, of --tokens each")
    PARSER.add_argument("--rounds", type=int, default=3, help="`many`: turns of each; 0 reads the sessions only")
    PARSER.add_argument("--clients", type=int, default=8, help="`many`: turns at a time")
    PARSER.add_argument("--disks", nargs="*", default=list(Disk.PROFILES), help="`slow`: which kinds are played")
    PARSER.add_argument("--shares", type=float, nargs="*", default=[0.2, 0.07, 0.0], help="`slow`: hot ones")
    PARSER.add_argument("--answer", type=int, default=96, help="`slow`, `written`: tokens of an answer")
    PARSER.add_argument("--text", help="a pattern of files whose text is read instead of a sentence again and again")
    PARSER.add_argument("--keep", help="a folder for sessions that are read once")
    PARSER.add_argument("--set", nargs="*", default=[], help="more settings, of all but `start` and `host`; with "
                        "memory.slow_tier=sessions `slow`, `bounded` and `written` measure that, the default, not `all`")
    PARSER.add_argument("--home", help="a folder on the disk that is to be measured")
    ARGUMENTS = PARSER.parse_args()
    MODEL = pathlib.Path(ARGUMENTS.model).resolve()
    for what in ARGUMENTS.what:
        print(f"\n{what}:\n")
        if ARGUMENTS.keep:
            pathlib.Path(ARGUMENTS.keep).mkdir(parents=True, exist_ok=True)
            globals()[what](ARGUMENTS.keep)
            continue
        with tempfile.TemporaryDirectory(dir=ARGUMENTS.home) as folder:
            globals()[what](folder)
