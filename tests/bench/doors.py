#!/usr/bin/env python3
"""What do a hundred streams at a time cost by HTTP, D-Bus and MQTT, and what do clients that do not read?

    tests/bench/doors.py streams [--model FILE] [--streams N] [--tokens N] [--daemon FILE]
    tests/bench/doors.py slow --model FILE --streams 300 --tokens 3000

`streams` asks for N answers at the same time: whole ones by HTTP, which is the engine with one body each, then streamed
ones by HTTP, by D-Bus on eight connections, and by MQTT with a delta for each token; prints tokens a second from the
first request to the last end.
`slow` wants a small model whose tokens are cheap (the tiny chatting one of the tests): N clients that never read, until all
of them are paused, then the daemon's memory while it stays so. MQTT needs mosquitto and paho-mqtt, D-Bus
dbus-daemon and jeepney.
"""
import argparse
import json
import os
import pathlib
import selectors
import shutil
import socket
import subprocess
import tempfile
import threading
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]


class Box:
    """A daemon of its own with room for so many answers at a time, and a broker."""

    def __init__(self, options, *sets):
        self.folder = tempfile.TemporaryDirectory()
        home = self.folder.name
        self.path, self.port, self.bus = f"{home}/api.sock", free_port(), f"unix:path={home}/bus"
        with open(f"{home}/mosquitto.conf", "w") as conf:
            conf.write(f"user root\nlistener {self.port} 127.0.0.1\nallow_anonymous true\nlog_dest none\n")
        broker = shutil.which("mosquitto") or "/usr/sbin/mosquitto"
        n = options.streams
        names = ("limits.max_running", "limits.per_user_running", "limits.per_user_requests", "mqtt.per_client",
                 "mqtt.running", "mqtt.pending", "limits.connections", "limits.per_user_connections")
        sets = [f"model.default.path={options.model}", f"state_dir={home}/state", f"socket.path={self.path}",
                f"mqtt.broker=mqtt://127.0.0.1:{self.port}", "mqtt.node=box", f"dbus.bus={self.bus}",
                f"limits.max_batched_tokens={max(256, n + 8)}",
                *(f"{name}={n + 8}" for name in names), *sets]
        self.log = f"{home}/log"
        command = [options.daemon, *(word for each in sets for word in ("--set", each))]
        with open(f"{home}/bus.conf", "w") as conf:
            conf.write(f"""<busconfig><type>session</type><listen>{self.bus}</listen><auth>EXTERNAL</auth>
<policy context="default"><allow send_destination="*"/><allow receive_sender="*"/><allow own="*"/></policy></busconfig>""")
        bus = ["dbus-daemon", f"--config-file={home}/bus.conf", "--nofork", "--nopidfile"]
        others = [broker, "-c", f"{home}/mosquitto.conf"], bus
        self.daemon = subprocess.Popen(command, stderr=open(self.log, "w"))
        self.children = [subprocess.Popen(other, stderr=subprocess.DEVNULL) for other in others] + [self.daemon]
        while not self.is_ready():
            assert self.daemon.poll() is None, open(self.log).read()
            time.sleep(0.05)

    def is_ready(self):
        try:
            ready = b" 200 " in self.get("/health")
        except OSError:
            return False
        log = open(self.log).read()
        return ready and "connected to the MQTT broker" in log and "on D-Bus" in log

    def get(self, path):
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(self.path)
            connection.sendall(f"GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n".encode())
            return b"".join(iter(lambda: connection.recv(1 << 16), b""))

    def status(self):
        return json.loads(self.get("/v1/status").split(b"\r\n\r\n", 1)[1])["models"][0]

    def post(self, body):
        """A connection with a request on it."""
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(self.path)
        text = json.dumps(body)
        head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {len(text)}\r\n\r\n"
        connection.sendall((head + text).encode())
        return connection

    def rss(self):
        """KiB that are in memory and no file's."""
        with open(f"/proc/{self.daemon.pid}/status") as file:
            return sum(int(line.split()[1]) for line in file if line.startswith(("RssAnon:", "RssShmem:")))

    def cpu(self):
        """Seconds of processor time."""
        with open(f"/proc/{self.daemon.pid}/stat") as file:
            fields = file.read().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def end(self):
        for child in reversed(self.children):
            child.kill()
            child.wait()


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def chat(n, tokens, **more):
    messages = [{"role": "user", "content": f"{n} tell me a story"}]
    return {"messages": messages, "max_tokens": tokens, "ignore_eos": True, "temperature": 0, **more}


def by_http(box, options, stream):
    """All at the same time; answers how many events of streams came."""
    waiting, events = selectors.DefaultSelector(), 0
    for n in range(options.streams):
        waiting.register(box.post(chat(n, options.tokens, stream=stream)), selectors.EVENT_READ)
    while waiting.get_map():
        for key, _ in waiting.select():
            data = key.fileobj.recv(1 << 16)
            events += data.count(b"data: {")
            if not data:
                waiting.unregister(key.fileobj)
                key.fileobj.close()
    return events


def by_dbus(box, options):
    from jeepney import DBusAddress, new_method_call
    from jeepney.io.blocking import open_dbus_connection
    manager = DBusAddress("/org/sparsed1", "org.sparsed1", "org.sparsed1.Manager")
    buses = [open_dbus_connection(bus=box.bus, enable_fds=True) for _ in range(8)]
    waiting, lines = selectors.DefaultSelector(), 0
    for n in range(options.streams):
        body = json.dumps(chat(n + 2000, options.tokens, stream=True))
        call = new_method_call(manager, "Generate", "sa{sv}", (body, {}))
        _, pipe = buses[n % len(buses)].send_and_get_reply(call, timeout=200).body
        waiting.register(pipe.to_raw_fd(), selectors.EVENT_READ)
    while waiting.get_map():
        for key, _ in waiting.select():
            data = os.read(key.fd, 1 << 16)
            lines += data.count(b"\n")
            if not data:
                waiting.unregister(key.fd)
                os.close(key.fd)
    return lines


def by_mqtt(box, options):
    import paho.mqtt.client as paho
    over, counts, ready = threading.Event(), {"delta": 0, "final": 0}, threading.Event()

    def heard(_client, _data, message):
        kind = json.loads(message.payload)["kind"]
        assert kind in counts, message.payload
        counts[kind] += 1
        if counts["final"] == options.streams:
            over.set()

    client = paho.Client(paho.CallbackAPIVersion.VERSION2, client_id="lamp", protocol=paho.MQTTv5)
    client.on_connect = lambda *_: client.subscribe("sparsed/v1/box/res/lamp/#", 1)
    client.on_subscribe = lambda *_: ready.set()
    client.on_message = heard
    client.max_inflight_messages_set(options.streams)
    client.connect("127.0.0.1", box.port)
    client.loop_start()
    assert ready.wait(30)
    began = time.monotonic()
    for n in range(options.streams):
        request = {"id": str(n), "stream": {"mode": "delta", "min_ms": 0}, "body": chat(n + 1000, options.tokens)}
        client.publish("sparsed/v1/box/req/lamp/chat", json.dumps(request), qos=1)
    assert over.wait(200), counts
    took = time.monotonic() - began
    client.disconnect()
    client.loop_stop()
    return took, counts["delta"]


def streams(options):
    box = Box(options)
    try:
        n = options.streams * options.tokens
        by_http(box, options, False)  # whatever is done once is done
        for name in ("whole answers by HTTP", "streams by HTTP", "streams by D-Bus", "streams by MQTT"):
            before, began = box.cpu(), time.monotonic()
            if "MQTT" in name:
                took, events = by_mqtt(box, options)
            else:
                events = by_dbus(box, options) if "D-Bus" in name else by_http(box, options, "streams" in name)
                took = time.monotonic() - began
            cpu = box.cpu() - before
            print(f"{options.streams} {name}: {n / took:.0f} tokens/s, {events} events, {took:.2f} s, "
                  f"{cpu * 1e6 / n:.0f} us of the daemon's CPU a token")
    finally:
        box.end()


def slow(options):
    box = Box(options, "limits.slow_consumer_s=600")
    try:
        before = box.rss()
        held = [box.post(chat(n, options.tokens, stream=True)) for n in range(options.streams)]
        sampled = -1
        while (now := box.status()["sampled_tokens"]) != sampled:
            sampled = now
            time.sleep(2)
        assert box.status()["running"] == options.streams, box.status()
        paused = box.rss()
        print(f"{options.streams} that do not read: paused after {sampled / options.streams:.0f} tokens each")
        print(f"RSS {before} KiB before, {paused} KiB when all of them are paused")
        for _ in range(4):
            for n in range(10):
                with box.post(chat(10_000 + n, 8)) as connection:
                    while connection.recv(1 << 16):
                        pass
            time.sleep(2)
            print(f"RSS {box.rss()} KiB after ten further answers")
        for connection in held:
            connection.close()
    finally:
        box.end()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["streams", "slow"])
    parser.add_argument("--model", default=str(ROOT / "models/smollm2-135m-dsa.gguf"))
    parser.add_argument("--daemon", default=str(ROOT / "target/release/sparsed"))
    parser.add_argument("--streams", type=int, default=100)
    parser.add_argument("--tokens", type=int, default=24)
    options = parser.parse_args()
    {"streams": streams, "slow": slow}[options.what](options)


if __name__ == "__main__":
    main()
