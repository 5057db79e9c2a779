#!/usr/bin/env python3
"""Does anything grow? Mixed traffic on all doors for as long as is wanted, and what the daemon holds meanwhile.

A daemon of its own serves streams, answers that are cancelled, conversations that are made and deleted, requests with a key
on TCP, calls on D-Bus and requests by MQTT (where dbus-daemon and mosquitto are there). Between rounds of traffic everything
ends, and memory, file descriptors, threads and bytes on disk are counted while nothing runs. It fails when one of them grows,
or an answer is wrong; from half an hour on also when memory's slope is surely steeper than it may be. What is allowed is
printed first.

Usage: soak.py [--seconds 180] [--rounds 12] [--rest 0] [--model FILE] [--set KEY=VALUE]... [--json]
"""
import argparse
import http.client
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, os.path.join(ROOT, ".venv/python"))
PATIENCE = 120
# What may be added between the first third and the end: memory in MiB and as a share of what there was, descriptors,
# threads, MiB on disk.
RSS_MIB, RSS_SHARE, FDS, THREADS, DISK_MIB = 12, 0.04, 2, 2, 4
# And of a run that is long enough for it, MiB an hour, by least squares over the last two thirds: less two standard errors,
# since samples of a flat line are some MiB apart.
SLOPE_MIB_PER_HOUR, SLOPE_FROM_S = 2, 1800
# Little memory, so that all of it has been touched soon.
SETTINGS = ["memory.budget=72MiB", "model.default.max_context=1024", "sessions.kv=16MiB"]
KEY = "soak-key-0123456789abcdef"
QUESTION = [{"role": "user", "content": "Name three colours."}]


class OverSocket(http.client.HTTPConnection):
    def __init__(self, path):
        super().__init__("localhost", timeout=PATIENCE)
        self.path = path

    def connect(self):
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(PATIENCE)
        self.sock.connect(self.path)


class Box:
    """The daemon, and the broker and bus that it is on."""

    def __init__(self, options):
        self.home = tempfile.mkdtemp(prefix="sparsed-soak-")
        self.socket, self.state = f"{self.home}/api.sock", f"{self.home}/state"
        self.children = []
        sets = [f"socket.path={self.socket}", f"state_dir={self.state}", f"model.default.path={options.model}"]
        self.port = self.broker() if shutil.which("mosquitto") or os.path.exists("/usr/sbin/mosquitto") else None
        if self.port:
            sets += [f"mqtt.broker=mqtt://127.0.0.1:{self.port}", "mqtt.node=soak", "mqtt.keep_s=5"]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.tcp = free.getsockname()[1]
        with open(f"{self.home}/keys", "w", opener=lambda path, flags: os.open(path, flags, 0o600)) as keys:
            keys.write(f"soak {KEY}\n")
        sets += [f"tcp.listen=127.0.0.1:{self.tcp}", f"tcp.keys={self.home}/keys"]
        self.bus = self.message_bus() if shutil.which("dbus-daemon") else None
        if self.bus:
            sets.append(f"dbus.bus={self.bus}")
        arguments = [argument for each in sets + options.set for argument in ("--set", each)]
        self.log = open(f"{self.home}/log", "w+")
        command = [f"{ROOT}/target/release/sparsed", *arguments]
        self.daemon = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=self.log)
        until("ready", lambda: self.lives() and self.ask("GET", "/health")[0] == 200)
        if self.port:
            until("on MQTT", lambda: "connected to the MQTT broker" in open(f"{self.home}/log").read())
        if self.bus:
            until("on D-Bus", lambda: "on D-Bus" in open(f"{self.home}/log").read())

    def broker(self):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        with open(f"{self.home}/mosquitto.conf", "w") as conf:
            conf.write(f"user root\nlistener {port} 127.0.0.1\nallow_anonymous true\nlog_dest none\n")
        path = shutil.which("mosquitto") or "/usr/sbin/mosquitto"
        self.children.append(subprocess.Popen([path, "-c", f"{self.home}/mosquitto.conf"], stderr=subprocess.DEVNULL))
        until("a broker", lambda: socket.create_connection(("127.0.0.1", port), 1).close() is None)
        return port

    def message_bus(self):
        path = f"{self.home}/bus"
        with open(f"{self.home}/bus.conf", "w") as conf:
            conf.write(f"""<busconfig><type>session</type><listen>unix:path={path}</listen><auth>EXTERNAL</auth>
<policy context="default"><allow send_destination="*"/><allow receive_sender="*"/><allow own="*"/></policy></busconfig>""")
        command = ["dbus-daemon", f"--config-file={self.home}/bus.conf", "--nofork", "--nopidfile"]
        self.children.append(subprocess.Popen(command, stderr=subprocess.DEVNULL))
        until("a bus", lambda: os.path.exists(path))
        return f"unix:path={path}"

    def ask(self, method, path, body=None):
        connection = OverSocket(self.socket)
        try:
            connection.request(method, path, json.dumps(body) if body is not None else None)
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def lives(self):
        if self.daemon.poll() is not None:
            for child in self.children:
                child.kill()
            sys.exit(f"the daemon ended: {open(self.log.name).read()[-2000:]}")
        return True

    def held(self):
        """What the daemon holds: bytes of memory, descriptors, threads, bytes on disk, seconds of processor time."""
        process = f"/proc/{self.daemon.pid}"
        status = dict(line.split(":\t", 1) for line in open(f"{process}/status").read().splitlines() if ":\t" in line)
        disk = sum(os.lstat(os.path.join(folder, name)).st_blocks * 512
                   for folder, _, names in os.walk(self.state) for name in names)
        rss = sum(int(status[kind].split()[0]) for kind in ("RssAnon", "RssShmem")) * 1024
        return {"rss": rss, "fds": len(os.listdir(f"{process}/fd")), "threads": int(status["Threads"]), "disk": disk}

    def is_still(self):
        """Nothing runs, waits or is on its way."""
        status = json.loads(self.ask("GET", "/v1/status")[1])
        return all(model["running"] + model["waiting"] == 0 for model in status["models"])

    def end(self):
        self.daemon.terminate()
        code = self.daemon.wait(PATIENCE)
        for child in self.children:
            child.kill()
            child.wait()
        return code


def until(what, condition):
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        try:
            if condition():
                return
        except OSError:
            pass
        time.sleep(0.05)
    sys.exit(f"not {what} after {PATIENCE} s")


def chat(random_, tokens, **more):
    seed = random_.randrange(1 << 30)
    return {"messages": QUESTION, "max_tokens": tokens, "ignore_eos": True, "temperature": 0.8, "seed": seed} | more


def streams(box, random_):
    status, body = box.ask("POST", "/v1/chat/completions", chat(random_, random_.randrange(4, 24), stream=True))
    assert status == 200 and body.endswith(b"data: [DONE]\n\n"), body[-200:]


def cancels(box, random_):
    connection = OverSocket(box.socket)
    connection.request("POST", "/v1/chat/completions", json.dumps(chat(random_, 400, stream=True)))
    connection.getresponse().read(random_.randrange(1, 2000))
    connection.close()


def conversations(box, random_):
    status, body = box.ask("POST", "/v1/sessions", {"title": "soak"})
    assert status in (200, 201), body
    session = json.loads(body)["id"]
    for _ in range(2):
        status, body = box.ask("POST", "/v1/chat/completions", chat(random_, 8, session_id=session))
        assert status == 200, body
    status, body = box.ask("DELETE", f"/v1/sessions/{session}")
    assert status in (200, 204), body


def keyed(box, random_):
    connection = http.client.HTTPConnection("127.0.0.1", box.tcp, timeout=PATIENCE)
    try:
        for key, expected in ((KEY, 200), ("wrong-key-0123456789abcdef", 401)):
            head = {"authorization": f"Bearer {key}", "content-type": "application/json"}
            connection.request("POST", "/v1/chat/completions", json.dumps(chat(random_, 8)), head)
            answer = connection.getresponse()
            body = answer.read()
            assert answer.status == expected, (answer.status, body)
    finally:
        connection.close()


def calls(box, random_):
    from jeepney import DBusAddress, new_method_call
    from jeepney.io.blocking import open_dbus_connection
    with open_dbus_connection(bus=box.bus, enable_fds=True) as bus:
        manager = DBusAddress("/org/sparsed1", "org.sparsed1", "org.sparsed1.Manager")
        call = new_method_call(manager, "Generate", "sa{sv}", (json.dumps(chat(random_, 8)), {}))
        _, pipe = bus.send_and_get_reply(call, timeout=PATIENCE).body
        with pipe.to_file("r") as answer:
            assert json.loads(answer.read())["choices"], "an answer by D-Bus"


def messages(box, random_):
    import paho.mqtt.client as paho
    came, name = threading.Event(), f"soak-{random_.randrange(1 << 40)}"
    client = paho.Client(paho.CallbackAPIVersion.VERSION2, client_id=name)
    reply = f"sparsed/v1/reply/{name}"
    request = json.dumps({"id": name, "reply_to": reply, "body": chat(random_, 8)})
    client.on_connect = lambda *_: client.subscribe(reply, 1)
    client.on_subscribe = lambda *_: client.publish(f"sparsed/v1/soak/req/{name}/chat", request, qos=1)
    client.on_message = lambda _client, _data, message: came.set() if b'"kind":"final"' in message.payload else None
    client.connect("127.0.0.1", box.port)
    client.loop_start()
    heard = came.wait(PATIENCE)
    client.disconnect()
    client.loop_stop()
    assert heard, "an answer by MQTT"


def traffic(box, kinds, seconds, rest, seed):
    """A thread for each kind of traffic, until the time is over; answers how often each was done, and what went wrong."""
    end, done, wrong = time.monotonic() + seconds, {}, []

    def work(kind, random_):
        while time.monotonic() < end and not wrong:
            try:
                kind(box, random_)
            except Exception as error:
                wrong.append(f"{kind.__name__}: {type(error).__name__} {error}")
                return
            done[kind.__name__] = done.get(kind.__name__, 0) + 1
            time.sleep(rest)

    threads = [threading.Thread(target=work, args=(kind, random.Random(f"{seed} {kind.__name__}"))) for kind in kinds]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return done, wrong


def slope(samples):
    """Least squares, MiB of memory in an hour, and the standard error of that."""
    n = len(samples)
    if n < 3:
        return 0.0, 0.0
    x = sum(at for at, _ in samples) / n
    y = sum(held["rss"] for _, held in samples) / n
    over = sum((at - x) ** 2 for at, _ in samples)
    rise = sum((at - x) * (held["rss"] - y) for at, held in samples) / over
    rest = sum((held["rss"] - y - rise * (at - x)) ** 2 for at, held in samples)
    per_hour = 3600 / (1 << 20)
    return rise * per_hour, (rest / (n - 2) / over) ** 0.5 * per_hour


def too_steep(later, seconds):
    """What is wrong with the slope of memory, of a run that was long enough to say so."""
    rise, error = slope(later)
    if seconds < SLOPE_FROM_S or rise - 2 * error <= SLOPE_MIB_PER_HOUR:
        return []
    return [f"memory grows by {rise:.1f} (+- {2 * error:.1f}) MiB an hour, {SLOPE_MIB_PER_HOUR} are allowed"]


def fill(box):
    """Touches all of the KV pool: memory that is used for the first time is none that grows."""
    words = random.Random(1)
    for _ in range(16):
        prompt = [words.randrange(1000, 40000) for _ in range(900)]
        status, answer = box.ask("POST", "/v1/completions", {"prompt": prompt, "max_tokens": 1})
        assert status == 200, answer


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=180)
    parser.add_argument("--rounds", type=int, default=12)
    # Seconds between two of a kind, for a machine that has other work.
    parser.add_argument("--rest", type=float, default=0)
    parser.add_argument("--model", default=f"{ROOT}/models/smollm2-135m-dsa.gguf")
    parser.add_argument("--set", action="append", default=list(SETTINGS))
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    criterion = (f"allowed from the first third of the rounds to the end: {RSS_MIB} MiB + {RSS_SHARE:.0%} of memory, {FDS} "
                 f"descriptors, {THREADS} threads, {DISK_MIB} MiB on disk; from {SLOPE_FROM_S} s on "
                 f"{SLOPE_MIB_PER_HOUR} MiB of memory an hour beyond two standard errors")
    print(criterion, file=sys.stderr, flush=True)
    box = Box(options)
    fill(box)
    kinds = [streams, cancels, conversations, keyed] + [calls] * bool(box.bus) + [messages] * bool(box.port)
    start, total, wrong, samples = time.monotonic(), {}, [], []
    for number in range(options.rounds):
        done, wrong = traffic(box, kinds, options.seconds / options.rounds, options.rest, number)
        for kind, times in done.items():
            total[kind] = total.get(kind, 0) + times
        if wrong or box.daemon.poll() is not None:
            break
        until("still", box.is_still)
        # Connections that have just ended are let go of, and what MQTT keeps for those who ask again is forgotten.
        time.sleep(1)
        samples.append((time.monotonic() - start, box.held()))
        print(f"{samples[-1][0]:7.0f} s  {json.dumps(samples[-1][1])}", file=sys.stderr, flush=True)
    problems, later = list(wrong), samples[len(samples) // 3:]
    problems += too_steep(later, time.monotonic() - start)
    if box.daemon.poll() is not None:
        problems.append(f"the daemon ended with {box.daemon.returncode}")
    if samples:
        warm, last = samples[len(samples) // 3][1], samples[-1][1]
        allowed = {"rss": RSS_MIB * (1 << 20) + RSS_SHARE * warm["rss"], "fds": FDS, "threads": THREADS,
                   "disk": DISK_MIB << 20}
        problems += [f"{what} grew from {warm[what]} to {last[what]}" for what, most in allowed.items()
                     if last[what] - warm[what] > most]
    code = box.end()
    if code:
        problems.append(f"the daemon's end: {code}")
    if problems:
        print(open(f"{box.home}/log").read()[-4000:], file=sys.stderr)
    report = {"seconds": round(time.monotonic() - start), "criterion": criterion, "done": total, "first": samples[0][1] if samples else None,
              "last": samples[-1][1] if samples else None, "rss_mib_per_hour": [round(number, 2) for number in slope(later)], "problems": problems}
    shutil.rmtree(box.home)
    print(json.dumps(report, indent=None if options.json else 1))
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
