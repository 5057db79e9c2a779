"""Real MQTT clients against the real daemon.

Usage: mqtt_client.py basics|v311|big|share|small PORT, or full PORT FOLDER, flood PORT PREFIX N WINDOW, fuzz PORT PID N
"""
import asyncio
import json
import os
import queue
import sys
import time
from random import Random

import aiomqtt
import paho.mqtt.client as paho
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

ROOT = "sparsed/v1"
NODE = f"{ROOT}/box"
LETTERS = {str(byte): -100 for byte in range(259) if not 32 <= byte < 127}
SAY = {
    "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 12, "temperature": 0, "ignore_eos": True,
    "logit_bias": LETTERS,
}
PATIENCE = 60


class Client:
    """A client of one name: what comes goes into a queue."""

    def __init__(self, port, name, filters, version=paho.MQTTv5):
        self.came, self.name, self.v5 = queue.Queue(), name, version == paho.MQTTv5
        self.client = paho.Client(paho.CallbackAPIVersion.VERSION2, client_id=name, protocol=version)
        self.client.on_connect = lambda *_: self.client.subscribe([(each, 1) for each in filters])
        self.client.on_subscribe = lambda *_: self.came.put(None)
        self.client.on_message = lambda _client, _data, message: self.came.put(message)
        self.client.connect("127.0.0.1", port, keepalive=20)
        self.client.loop_start()
        assert self.came.get(timeout=PATIENCE) is None

    def ask(self, op, payload, topic=None, **properties):
        packed = None
        if self.v5 and properties:
            packed = Properties(PacketTypes.PUBLISH)
            for key, value in properties.items():
                setattr(packed, key, value)
        topic = topic or f"{NODE}/req/{self.name}/{op}"
        text = payload if isinstance(payload, str) else json.dumps(payload)
        self.client.publish(topic, text, qos=1, properties=packed)

    def next(self):
        message = self.came.get(timeout=PATIENCE)
        return message, json.loads(message.payload)

    def until_final(self):
        told = []
        while True:
            message, payload = self.next()
            told.append(payload)
            if payload["kind"] in ("final", "error"):
                return message, payload, told[:-1]

    def done(self, op, payload, **properties):
        self.ask(op, payload, **properties)
        return self.until_final()[1]


def basics(port):
    lamp = Client(port, "lamp", [f"{NODE}/res/lamp/#", f"{ROOT}/reply/lamp/#"])
    # A topic and a word of its own, deltas in order, and a final that says it all again.
    body = {"id": "1", "body": SAY, "stream": {"mode": "delta", "min_ms": 0}}
    lamp.ask("chat", body, ResponseTopic=f"{ROOT}/reply/lamp/x", CorrelationData=b"\x00word")
    message, final, deltas = lamp.until_final()
    assert message.topic == f"{ROOT}/reply/lamp/x" and message.properties.CorrelationData == b"\x00word"
    assert message.properties.ContentType == "application/json", message.properties
    assert [delta["seq"] for delta in deltas] == list(range(len(deltas))) and len(deltas) > 3, deltas
    assert "".join(delta["text"] for delta in deltas) == final["text"] != "", final
    assert final["seq"] == len(deltas) and final["node"] == "box" and final["finish"] == "length", final
    assert final["usage"]["completion_tokens"] == 12, final

    # The same id hears the same, word for word; another body is none of it.
    lamp.ask("chat", body, ResponseTopic=f"{ROOT}/reply/lamp/x", CorrelationData=b"\x00word")
    assert lamp.next()[1] == final
    conflict = {"id": "1", "body": {**SAY, "max_tokens": 3}}
    lamp.ask("chat", conflict, ResponseTopic=f"{ROOT}/reply/lamp/x")
    assert lamp.next()[1]["code"] == "id_conflict"

    # Without `stream` the reply topic gets the final only.
    lamp.ask("chat", {"id": "2", "body": {**SAY, "seed": 1}})
    message, final, deltas = lamp.until_final()
    assert message.topic == f"{NODE}/res/lamp/2" and deltas == [] and len(final["text"]) > 0, final

    done = lamp.done("complete", {"id": "3", "body": {"prompt": "Once", "max_tokens": 3, "temperature": 0, "ignore_eos": True}})
    assert done["kind"] == "final" and done["usage"]["completion_tokens"] == 3, done
    done = lamp.done("tokenize", {"id": "4", "body": {"prompt": "abc"}})["result"]
    assert (done["tokens"], done["count"], done["max_model_len"]) == ([97, 98, 99], 3, 4096), done
    # As on the other doors: llama.cpp's form, and conversations.
    done = lamp.done("tokenize", {"id": "4p", "body": {"content": "ab", "with_pieces": True}})["result"]
    assert done == {"tokens": [{"id": 97, "piece": "a"}, {"id": 98, "piece": "b"}]}, done
    done = lamp.done("tokenize", {"id": "4m", "body": {"messages": SAY["messages"]}})["result"]
    assert done["count"] == len(done["tokens"]) > len("Hello"), done

    # How likely each token was, of both kinds of answers.
    likely = {**SAY, "logprobs": True, "top_logprobs": 2}
    told = lamp.done("chat", {"id": "l1", "body": likely, "stream": True})
    content = told["logprobs"]["content"]
    assert len(content) == 12 and all(len(one["top_logprobs"]) == 2 for one in content), told
    told = lamp.done("complete", {"id": "l2", "body": {"prompt": "Once", "max_tokens": 3, "ignore_eos": True, "logprobs": 1}})
    assert [len(told["logprobs"][name]) for name in ("tokens", "token_logprobs", "text_offset")] == [3, 3, 3], told

    # Small devices count their requests, and a verb that there is not is no silence.
    assert lamp.done("tokenize", {"id": 40, "body": {"prompt": "a"}})["id"] == "40"
    refused = lamp.done("embed", {"id": "41"})
    assert (refused["kind"], refused["id"], refused["param"]) == ("error", "41", "op"), refused

    # Nobody is sent what another client has asked for.
    tv = Client(port, "tv", [f"{ROOT}/reply/lamp", f"{NODE}/res/tv/#"])
    tv.ask("tokenize", {"id": "3", "reply_to": f"{ROOT}/reply/lamp", "body": {"prompt": "abc"}})
    message, refused = tv.next()
    assert (message.topic, refused["param"]) == (f"{NODE}/res/tv/3", "reply_to"), refused
    tv.ask("tokenize", {"id": "4", "reply_to": f"{ROOT}/reply/nobody", "body": {"prompt": "abc"}})
    message, refused = tv.next()  # nor what one has not asked for yet
    assert (message.topic, refused["param"]) == (f"{NODE}/res/tv/4", "reply_to"), refused

    # A name is any level of a topic.
    for name in ["my device", "dev=1", "k\u00fcche"]:
        named = Client(port, f"named {name}", [f"{NODE}/res/{name}/#", f"{ROOT}/reply/{name}"])
        named.ask("tokenize", {"id": "1", "body": {"prompt": "a"}}, topic=f"{NODE}/req/{name}/tokenize")
        message, done = named.next()
        assert (message.topic, done["kind"]) == (f"{NODE}/res/{name}/1", "final"), done
        ask = {"id": "2", "reply_to": f"{ROOT}/reply/{name}", "body": {"prompt": "a"}}
        named.ask("tokenize", ask, topic=f"{NODE}/req/{name}/tokenize")
        assert named.next()[0].topic == f"{ROOT}/reply/{name}"

    back = lamp.done("detokenize", {"id": "5", "body": {"tokens": [97, 98, 99]}})
    assert back["result"] == {"content": "abc"}, back
    refused = lamp.done("session", {"id": "6", "body": {"verb": "export", "id": "sess_0"}})
    assert refused["param"] == "verb" and "HTTP" in refused["message"], refused

    # What is wrong has the same codes as on the other doors.
    for n, (body, code, param) in enumerate([
        ({"id": "e0", "body": {"messages": []}}, "invalid_value", "messages"),
        ({"id": "e1", "body": {**SAY, "model": "nothing"}}, "model_not_found", "model"),
        ({"id": "e2", "body": {**SAY, "temperature": -1}}, "invalid_value", "temperature"),
        ({"id": "e3", "reply_to": f"{NODE}/res/tv/1", "body": SAY}, "invalid_value", "reply_to"),
        ("{", "invalid_json", None),
        ({"body": SAY}, "invalid_value", "id"),
    ]):
        refused = lamp.done("chat", body)
        assert (refused["code"], refused["param"], refused["retry"]) == (code, param, False), (n, refused)

    # A running request is ended by its id, by its own client only.
    lamp.ask("chat", {"id": "long", "body": {**SAY, "max_tokens": 200000}, "stream": {"mode": "delta", "min_ms": 0}})
    refused = lamp.next()[1]
    if refused["kind"] == "delta":
        lamp.ask("cancel", {"id": "long"}, topic=f"{NODE}/req/tv/cancel")
        lamp.ask("cancel", {"id": "long"})
        assert lamp.until_final()[1]["code"] == "cancelled"
    refused = lamp.done("chat", {"id": "late", "deadline_ms": 1, "body": {**SAY, "max_tokens": 3000}})
    assert refused["code"] == "deadline_exceeded" and refused["retry"], refused

    # Sessions belong to their client.
    session = lamp.done("session", {"id": "s1", "body": {"verb": "create", "title": "lamp's"}})["result"]["id"]
    turn = lamp.done("chat", {"id": "s2", "session": session, "body": SAY})
    assert turn["kind"] == "final", turn
    whole = lamp.done("session", {"id": "s3", "body": {"verb": "get", "id": session}})["result"]
    assert [message["role"] for message in whole["messages"]] == ["user", "assistant"], whole
    assert whole["messages"][1]["content"] == turn["text"]
    # One turn at a time: who comes meanwhile may ask again, and then has it.
    long = {"id": "s3a", "session": session, "body": {**SAY, "max_tokens": 2000}, "stream": {"mode": "delta", "min_ms": 0}}
    lamp.ask("chat", long)
    assert lamp.next()[1]["kind"] == "delta"
    lamp.ask("chat", {"id": "s3b", "session": session, "body": SAY})
    while (refused := lamp.next()[1])["id"] != "s3b":
        assert refused["kind"] == "delta", refused
    assert (refused["code"], refused["retry"]) == ("session_busy", True), refused
    assert lamp.until_final()[1]["id"] == "s3a"
    again = lamp.done("chat", {"id": "s3b", "session": session, "body": SAY})
    assert again["kind"] == "final", again
    tv = Client(port, "tv", [f"{NODE}/res/tv/#"])
    assert tv.done("session", {"id": "s", "body": {"verb": "get", "id": session}})["code"] == "session_not_found"
    assert tv.done("session", {"id": "l", "body": {"verb": "list"}})["result"]["data"] == []
    assert lamp.done("session", {"id": "s4", "body": {"verb": "delete", "id": session}})["result"]["deleted"]

    # Without a segment of its own a client is one of the anonymous.
    anonymous = Client(port, "anybody", [f"{NODE}/res/anonymous/#"])
    anonymous.ask("tokenize", {"id": "a", "body": {"prompt": "a"}}, topic=f"{NODE}/req/tokenize")
    assert anonymous.until_final()[1]["result"]["count"] == 1

    # Who comes late learns what there is.
    late = Client(port, "late", [f"{NODE}/status", f"{NODE}/info"])
    told = dict((message.topic.rsplit("/", 1)[1], payload) for message, payload in (late.next(), late.next()))
    assert told["status"]["state"] == "online" and told["info"]["models"][0]["id"] == "default", told
    assert "chat" in told["info"]["ops"] and told["info"]["max_payload"] == 256 << 10, told
    asyncio.run(modern(port))


async def modern(port):
    async with aiomqtt.Client("127.0.0.1", port, identifier="aio", protocol=aiomqtt.ProtocolVersion.V5) as client:
        await client.subscribe(f"{NODE}/res/aio/#", qos=1)
        await client.publish(f"{NODE}/req/aio/chat", json.dumps({"id": "q", "body": SAY}), qos=1)
        async for message in client.messages:
            final = json.loads(message.payload)
            assert final["kind"] == "final" and final["usage"]["completion_tokens"] == 12, final
            return


def v311(port):
    """A small device: no properties, and no more than 300 bytes at a time."""
    device = Client(port, "dev", [f"{ROOT}/reply/dev"], paho.MQTTv311)
    ask = {"id": "d1", "reply_to": f"{ROOT}/reply/dev", "max_bytes": 300, "body": {**SAY, "max_tokens": 1000}}
    device.ask("chat", ask)
    parts, last = [], None
    while last is None:
        message, payload = device.next()
        assert len(message.payload) <= 300
        parts, last = (parts + [payload], None) if payload["kind"] == "part" else (parts, payload)
    assert last["kind"] == "final" and last["parts"] == len(parts) > 3, last
    assert [part["part"] for part in parts] == list(range(len(parts))), parts
    assert last["usage"]["completion_tokens"] == 1000 and len("".join(part["text"] for part in parts)) > 900, parts


def big(port):
    lamp = Client(port, "lamp", [f"{NODE}/res/lamp/#"])
    for kib in (50, 200):
        content = "x" * (kib << 10)
        done = lamp.done("tokenize", {"id": f"b{kib}", "body": {"prompt": content}})
        assert done["result"]["count"] == kib << 10, str(done)[:300]
        done = lamp.done("chat", {"id": f"c{kib}", "body": {**SAY, "messages": [{"role": "user", "content": content}]}})
        assert done.get("code") in (None, "context_length_exceeded"), str(done)[:300]
    refused = lamp.done("chat", {"id": "x", "body": {**SAY, "messages": [{"role": "user", "content": "x" * (300 << 10)}]}})
    assert refused["code"] == "body_too_large", refused


def share(port):
    """The daemon may hold 1 MiB: what one client asks for takes no result of another one's away."""
    lamp, tv = (Client(port, name, [f"{NODE}/res/{name}/#"]) for name in ("lamp", "tv"))
    ask = {"id": "1", "body": {**SAY, "temperature": 1}}
    first = lamp.done("chat", ask)
    for n in range(14):
        done = tv.done("tokenize", {"id": f"t{n}", "body": {"prompt": "x" * 60000}})
        assert done["kind"] == "final" and done["result"]["count"] == 60000, str(done)[:300]
    assert lamp.done("chat", ask) == first
    print("ok")


def small(port):
    """The broker takes no packets of more than 2000 bytes, and nobody has said so to the daemon but the broker."""
    lamp = Client(port, "lamp", [f"{NODE}/res/lamp/#"])
    body = {**SAY, "max_tokens": 1900}
    del body["logit_bias"]
    lamp.ask("chat", {"id": "1", "body": body})
    _, final, parts = lamp.until_final()
    assert final["kind"] == "final" and final["parts"] == len(parts) > 1, str(final)[:300]
    assert lamp.done("tokenize", {"id": "2", "body": {"prompt": "a"}})["result"]["count"] == 1
    print(final["parts"], "parts")


def full(port, folder):
    """The state folder's disk is filled up, and then there is room again."""
    lamp = Client(port, "lamp", [f"{NODE}/res/lamp/#"])
    assert lamp.done("tokenize", {"id": "1", "body": {"prompt": "a"}})["kind"] == "final"
    filler = os.path.join(folder, "filler")
    with open(filler, "wb", buffering=0) as file:
        try:
            while file.write(b"x" * 4096):
                pass
        except OSError:
            pass
    # What is in the file's last page may still find room.
    refused = lamp.done("tokenize", {"id": "2", "body": {"prompt": "a" * 9000}})
    assert refused["code"] == "disk_failed" and refused["retry"], str(refused)[:300]
    os.remove(filler)
    deadline = time.monotonic() + PATIENCE
    while (done := lamp.done("tokenize", {"id": "2", "body": {"prompt": "a" * 9000}}))["kind"] != "final":
        assert done["code"] == "disk_failed" and time.monotonic() < deadline, str(done)[:300]
    assert done["result"]["count"] == 9000
    again = lamp.done("tokenize", {"id": "1", "body": {"prompt": "a"}})
    assert again["result"]["count"] == 1
    print("ok")


def fuzz(port, pid, n):
    """Publishes `n` requests that are broken somewhere, or right by accident; those with an address have an answer."""
    random, n = Random(int(os.environ.get("SEED", "7"))), int(n)
    client = Client(port, "fuzz", [f"{NODE}/res/fuzz/#", f"{ROOT}/reply/fuzz"])
    names = ["messages", "prompt", "model", "max_tokens", "temperature", "tools", "verb", "id", "title", "turns", "n", "stop",
             "mode", "min_ms", "response_format", "session_id", "seed"]
    texts = ["default", "", "x", "create", "list", "get", "delete", "fork", "continue", "sess_0", "delta", "none", "#", "+/x",
             f"{ROOT}/reply/fuzz", f"{NODE}/res/other/1", "$SYS/x", "\u202e\U0001f980"]

    def thing(depth=0):
        pick = random.randrange(5 if depth > 3 else 8)
        if pick < 3:
            return random.choice([None, True, 0, -1, 2, 40, 1 << 70, 0.5, 1e300])
        if pick < 5:
            return random.choice(texts)
        if pick == 5:
            return [thing(depth + 1) for _ in range(random.randrange(3))]
        return {random.choice(names): thing(depth + 1) for _ in range(random.randrange(5))}

    def request(at):
        body = thing(2)
        if random.random() < 0.8:
            content = random.choice(["x", "x", thing(3)])
            body = {"messages": [{"role": "user", "content": content}], "prompt": "x", "max_tokens": 2, "verb": random.choice(texts)}
            for name in random.sample(names, random.randrange(3)):
                body[name] = thing(3)
        request = {"id": f"f{at}", "body": body}
        if random.random() < 0.4:
            request[random.choice(["reply_to", "deadline_ms", "stream", "max_bytes", "session", "id", "v"])] = thing(3)
        return request

    def rss():
        with open(f"/proc/{pid}/status") as status:
            return next(int(line.split()[1]) for line in status if line.startswith("VmRSS"))

    outcomes, early = {}, 0
    properties = Properties(PacketTypes.PUBLISH)
    for at in range(n):
        payload = json.dumps(random.choice([request(at), request(at), request(at), thing()])).encode()
        if random.random() < 0.1:
            payload = random.choice([payload[: random.randrange(len(payload) + 1)], random.randbytes(50), b"[" * 5000])
        op = random.choice(["chat", "chat", "complete", "tokenize", "session", "session", "cancel", "nothing", ""])
        topic = random.choice([f"{NODE}/req/fuzz/{op}", f"{NODE}/req/fuzz/{op}", f"{NODE}/req/fuzz/{op}/more", f"{NODE}/req/{op}"])
        properties.CorrelationData = random.randbytes(random.randrange(200))
        qos = random.randrange(2)
        sent = client.client.publish(topic, payload, qos=qos, properties=random.choice([None, properties]))
        if at % 50 == 0:
            sent.wait_for_publish(PATIENCE)  # what waits in the broker and here stays little
        if at == n // 5:
            early = rss()
    # Somebody who asks properly is answered all the while.
    client.ask("complete", {"id": "last", "body": {"prompt": "x", "max_tokens": 2}})
    while True:
        message, payload = client.next()
        kind = payload.get("code") or payload["kind"]
        outcomes[kind] = outcomes.get(kind, 0) + 1
        assert kind not in ("internal_error", "backend_failed", "session_damaged"), payload
        if payload["id"] == "last":
            if payload["kind"] == "final":
                break
            assert payload["retry"], payload
            client.ask("complete", {"id": "last", "body": {"prompt": "x", "max_tokens": 2}})
    assert sum(outcomes.values()) > n // 4 and outcomes["invalid_value"] > n // 50, outcomes
    assert rss() < early + 32768, f"RSS {early} KiB early, {rss()} KiB at the end"
    print(f"{outcomes}; RSS {early} KiB early, {rss()} KiB at the end")



def flood(port, prefix, n, window):
    """Keeps WINDOW requests under way until N have a result, asking again with the same id after a while of silence."""
    reply, came = f"{ROOT}/reply/flood", queue.Queue()
    client = paho.Client(paho.CallbackAPIVersion.VERSION2, client_id="flood", protocol=paho.MQTTv5)
    client.reconnect_delay_set(min_delay=1, max_delay=1)
    client.on_connect = lambda *_: client.subscribe(reply, qos=1)
    client.on_message = lambda _client, _data, message: came.put(json.loads(message.payload))
    client.connect("127.0.0.1", port, keepalive=5)
    client.loop_start()
    ids = [f"f{i}" for i in range(n)]
    unasked, waiting, results, asked = ids[::-1], {}, {}, 0
    deadline = time.monotonic() + 900
    while len(results) < n:
        assert time.monotonic() < deadline, f"{len(results)} of {n} after {asked} asked"
        while unasked and len(waiting) < window:
            waiting[unasked.pop()] = 0.0
        for each, when in waiting.items():
            if when < time.monotonic() - 4 and client.is_connected():
                waiting[each] = time.monotonic()
                asked += 1
                body = {**SAY, "temperature": 1, "max_tokens": 6, "seed": int(each[1:])}
                payload = {"id": each, "reply_to": reply, "deadline_ms": 300000, "body": body}
                client.publish(f"{prefix}/req/flood/chat", json.dumps(payload), qos=1)
        try:
            came_now = came.get(timeout=0.2)
        except queue.Empty:
            continue
        if came_now["kind"] == "error" and came_now["retry"]:
            if came_now["id"] in waiting:
                waiting[came_now["id"]] = time.monotonic() - 3
            continue
        assert came_now["kind"] == "final", came_now
        results.setdefault(came_now["id"], []).append(came_now)
        waiting.pop(came_now["id"], None)
        if len(results) % 20 == 0:
            print(len(results), flush=True)
    nodes = set()
    for each, finals in results.items():
        by_node = {}
        for final in finals:
            nodes.add(final["node"])
            before = by_node.setdefault(final["node"], final)
            assert before == final, f"two results of {each}: {before} {final}"
    print(json.dumps({"results": len(results), "asked": asked, "finals": sum(map(len, results.values())), "nodes": sorted(nodes)}))


if __name__ == "__main__":
    what, port, rest = sys.argv[1], int(sys.argv[2]), sys.argv[3:]
    if what == "flood":
        flood(port, rest[0], int(rest[1]), int(rest[2]))
    elif what == "full":
        full(port, rest[0])
    elif what == "fuzz":
        fuzz(port, *rest)
    else:
        {"basics": basics, "v311": v311, "big": big, "share": share, "small": small}[what](port)
