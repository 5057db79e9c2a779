"""Clients of org.sparsed1 with jeepney. Usage: client.py ADDRESS SCENARIO [ARGUMENT...]; each scenario is a function."""
import contextlib
import fcntl
import hashlib
import http.client
import json
import os
import select
import socket
import subprocess
import sys
import time
from random import Random

from jeepney import DBusAddress, DBusErrorResponse, HeaderFields, MatchRule, MessageFlag, MessageType, message_bus
from jeepney import new_method_call, new_method_return
from jeepney.io.blocking import open_dbus_connection

NAME, ROOT = "org.sparsed1", "/org/sparsed1"
MANAGER, SESSION, REQUEST = (f"{NAME}.{name}" for name in ("Manager", "Session", "Request"))
PROPERTIES = "org.freedesktop.DBus.Properties"
ERROR = f"{NAME}.Error."
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
PATIENCE = 120
# The smallest that a pipe can be, and more than any line of a completion has.
SMALL_PIPE, LINE_BYTES_MAX = 4096, 400
SEALS = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK


class Client:
    """A connection, and the daemon at the other end of it."""

    def __init__(self, address):
        self.bus = open_dbus_connection(bus=address, enable_fds=True)

    def call(self, path, interface, member, signature=None, *body, flags=None):
        to = DBusAddress(path, bus_name=NAME, interface=interface)
        message = new_method_call(to, member, signature, body)
        if flags:
            message.header.flags |= flags
        reply = self.bus.send_and_get_reply(message, timeout=PATIENCE)
        if reply.header.message_type == MessageType.error:
            raise DBusErrorResponse(reply)
        return reply.body

    def manager(self, member, signature=None, *body, **more):
        return self.call(ROOT, MANAGER, member, signature, *body, **more)

    def session(self, path, member, signature=None, *body):
        return self.call(path, SESSION, member, signature, *body)

    def get(self, path, interface, name):
        return self.call(path, PROPERTIES, "Get", "ss", interface, name)[0][1]

    def generate(self, body, **options):
        """The request's path and the reading end of its pipe."""
        path, fd = self.manager("Generate", "sa{sv}", json.dumps(body), variants(options))
        return path, fd.to_raw_fd()

    def lines(self, body, **options):
        """The whole answer, line by line."""
        return read_lines(self.generate(body, **options)[1])


def variants(options):
    kinds = {str: "s", bool: "b", int: "u"}
    return {key: (kinds[type(value)], value) for key, value in options.items()}


def read_lines(fd):
    with open(fd) as pipe:
        return [json.loads(line) for line in pipe]


def refused(name, action, *arguments, **more):
    """That `action` fails with the error `name`; gives its message."""
    try:
        got = action(*arguments, **more)
    except DBusErrorResponse as error:
        assert error.name == name, f"{error.name}: {error.data}, not {name}"
        return error.data
    raise AssertionError(f"{got} instead of {name}")


def until(what, condition):
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"not {what} after {PATIENCE} s"
        select.select([], [], [], 0.01)


def chat(**more):
    return {"messages": QUESTION, "temperature": 0, "max_tokens": 24, "ignore_eos": True, **more}


def endless(**more):
    """Longer than any pipe."""
    return {"prompt": [1, 2, 3], "max_tokens": 100_000, "ignore_eos": True, "stream": True, **more}


def memfd(data, seals=SEALS):
    fd = os.memfd_create("body", os.MFD_ALLOW_SEALING)
    os.write(fd, data)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


def post(path, body, to="/v1/chat/completions"):
    """The same request over HTTP."""
    connection = http.client.HTTPConnection("localhost")
    connection.sock = socket.socket(socket.AF_UNIX)
    connection.sock.connect(path)
    connection.request("POST", to, json.dumps(body))
    return connection.getresponse().read().decode()


def same(answers):
    """Without what differs between two answers that are the same."""
    return [{key: value for key, value in one.items() if key not in ("id", "created", "timings")} for one in answers]


def answers(address, http_socket):
    client = Client(address)
    client.bus.send_and_get_reply(message_bus.AddMatch(MatchRule(type="signal", interface=REQUEST)))
    whole = client.lines(chat())
    assert same(whole) == same([json.loads(post(http_socket, chat()))]), whole
    body = chat(stream=True, stream_options={"include_usage": True})
    events = [line[6:] for line in post(http_socket, body).splitlines() if line.startswith("data: ")]
    assert events.pop() == "[DONE]"
    chunks = client.lines(body)
    assert same(chunks) == same(map(json.loads, events)), chunks
    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks if chunk["choices"])
    assert text == whole[0]["choices"][0]["message"]["content"] and len(chunks) > 10, chunks

    # The path is known before the call; the end is told to the caller.
    with client.bus.filter(MatchRule(type="signal", interface=REQUEST, member="Finished")) as finished:
        path, fd = client.generate(chat(stream=True), handle_token="mine")
        unique = client.bus.unique_name[1:].replace(".", "_")
        assert path == f"{ROOT}/requests/{unique}/mine", path
        read_lines(fd)
        # Of the requests before it, something may still come.
        while (signal := client.bus.recv_until_filtered(finished, timeout=PATIENCE)).header.fields[HeaderFields.path] != path:
            pass
    reason, usage = signal.body
    counts = {key: value for key, (kind, value) in usage.items() if kind == "u"}
    assert (reason, counts["completion_tokens"]) == ("length", 24) and counts["prompt_tokens"] > 20, signal.body
    until("gone", lambda: gone(client, path))

    # However it is carried, the end says why, and counts what the body counts.
    more = {"n": 3, "max_tokens": 5}
    (whole,) = client.lines(chat(**more))
    expected = ("length", {"prompt_tokens": whole["usage"]["prompt_tokens"], "completion_tokens": 15})
    for streamed in ({}, {"stream": True}, {"stream": True, "stream_options": {"include_usage": True}}):
        with client.bus.filter(MatchRule(type="signal", interface=REQUEST, member="Finished")) as finished:
            path, fd = client.generate(chat(**more, **streamed))
            read_lines(fd)
            while (signal := client.bus.recv_until_filtered(finished, timeout=PATIENCE)).header.fields[HeaderFields.path] != path:
                pass
        reason, usage = signal.body[0], {key: value for key, (_, value) in signal.body[1].items()}
        usage.pop("cached_tokens")  # the first prompt of its kind has read them, the next ones have them
        assert (reason, usage) == expected, (streamed, signal.body)

    # Tokens are what HTTP gives, in each of its forms.
    for member, bodies in {
        "Tokenize": [{"prompt": "abc"}, {"content": "ab", "with_pieces": True}, {"messages": QUESTION, "return_token_strs": True}],
        "Detokenize": [{"tokens": [97, 98, 99]}],
    }.items():
        for body in bodies:
            (said,) = client.manager(member, "s", json.dumps(body))
            assert json.loads(said) == json.loads(post(http_socket, body, f"/{member.lower()}")), said
    refused(ERROR + "InvalidValue", client.manager, "Tokenize", "s", "{}")
    refused(ERROR + "InvalidValue", client.manager, "Detokenize", "s", '{"tokens": [1000000]}')
    refused(ERROR + "BodyTooLarge", client.manager, "Tokenize", "s", json.dumps({"prompt": "x" * (1 << 20)}))
    refused(ERROR + "AnswerTooLarge", client.manager, "Tokenize", "s", json.dumps({"prompt": "x" * (1 << 19)}))

    completion = client.lines({"prompt": [1, 2, 3], "max_tokens": 3, "return_tokens": True}, endpoint="completions")
    assert completion[0]["object"] == "text_completion", completion


def gone(client, path):
    try:
        client.get(path, REQUEST, "State")
    except DBusErrorResponse as error:
        assert error.name == "org.freedesktop.DBus.Error.UnknownObject", error
        return True
    return False


def refusals(address):
    client = Client(address)
    # One text and nothing else: GLib shows no message of an error that carries more.
    (message,) = refused(ERROR + "InvalidValue", client.generate, {"messages": 5})
    assert message.startswith("'messages'"), message
    refused(ERROR + "ModelNotFound", client.generate, chat(model="none"))
    refused(ERROR + "ContextLengthExceeded", client.generate, {"messages": [{"role": "user", "content": "x" * 50000}]})
    refused(ERROR + "InvalidValue", client.generate, chat(), colour="red")
    refused(ERROR + "InvalidValue", client.generate, chat(), endpoint="embeddings")
    refused(ERROR + "InvalidValue", client.generate, chat(), handle_token="../x")
    refused(ERROR + "SessionNotFound", client.session, f"{ROOT}/sessions/sess_0", "Checkpoint")
    refused(ERROR + "BodyTooLarge", client.generate, {"messages": "x" * (1 << 20)})
    standard = "org.freedesktop.DBus.Error."
    refused(standard + "InvalidArgs", client.manager, "Generate", "s", "{}")
    refused(standard + "InvalidArgs", client.manager, "Generate", "ssa{sv}", "{}", "", {})
    refused(standard + "UnknownMethod", client.manager, "Degenerate")
    refused(standard + "UnknownObject", client.call, ROOT + "/x", MANAGER, "GetStatus")
    refused(standard + "UnknownObject", client.call, ROOT + "/requests/1_1/r0", REQUEST, "Cancel")
    refused(standard + "UnknownProperty", client.get, ROOT, MANAGER, "Colour")
    refused(standard + "PropertyReadOnly", client.call, ROOT, PROPERTIES, "Set", "ssv", MANAGER, "State", ("s", "x"))


def interface(address, folder):
    """The objects say of themselves what is installed, and have every method and property of it."""
    client = Client(address)
    path = client.manager("CreateSession", "a{sv}", {})[0]
    request, fd = client.generate(endless(), endpoint="completions")
    introspectable = "org.freedesktop.DBus.Introspectable"
    for at, name in ((ROOT, MANAGER), (path, SESSION), (request, REQUEST)):
        said = client.call(at, introspectable, "Introspect")[0]
        installed = open(f"{folder}/{name}.xml").read().splitlines()
        begin, end = (next(i for i, line in enumerate(installed) if mark in line) for mark in ("<interface", "</interface"))
        assert "\n".join(installed[begin:end]) in said, said
        values = client.call(at, PROPERTIES, "GetAll", "s", name)[0]
        rows = [line.split('"') for line in installed if "<property" in line]
        assert {row[1]: row[3] for row in rows} == {key: kind for key, (kind, _) in values.items()}, values
        for row in rows:
            client.get(at, name, row[1])
        for method in [line.split('"')[1] for line in installed if "<method" in line]:
            # Arguments that no method takes: each is found, and refuses them.
            assert refused("org.freedesktop.DBus.Error.InvalidArgs", client.call, at, name, method, "(y)", (1,))
    assert client.get(ROOT, MANAGER, "State") == "ready" and client.get(ROOT, MANAGER, "Models") == ["default"]
    status = json.loads(client.manager("GetStatus")[0])
    assert status["models"][0]["state"] == "ready", status
    assert client.get(ROOT, MANAGER, "ModelStates") == {"default": "ready"}
    device = {name: client.get(ROOT, MANAGER, f"Device{name}") for name in ("", "State", "Fault", "Faults")}
    assert device == {"": status["device"]["name"], "State": "ready", "Fault": "", "Faults": 0}, device
    memory = status["memory"]
    assert client.get(ROOT, MANAGER, "MemoryLimit") == min(memory["limits"].values()) > 0, memory
    assert client.get(ROOT, MANAGER, "MemoryLimitedBy") == memory["binds"], memory
    assert client.get(ROOT, MANAGER, "MemoryForKv") == memory["kv_bytes"] > 0, memory
    assert client.get(ROOT, MANAGER, "MemoryPressure") in ("none", "some", "critical"), memory
    assert json.loads(client.manager("ListModels")[0])["data"][0]["id"] == "default"
    client.call(request, REQUEST, "Cancel")
    os.close(fd)


def leases(address):
    """A descriptor keeps a model in memory that would leave at once."""
    client = Client(address)

    def model():
        return json.loads(client.manager("GetStatus")[0])["models"][0]

    refused(ERROR + "ModelNotFound", client.manager, "Lease", "s", "none")
    until("unloaded", lambda: model()["state"] == "unloaded")
    # The reply does not wait for the model, so what is wrong with the request comes through the pipe.
    line, = client.lines(chat(grammar="nonsense"))
    assert line["error"]["param"] == "grammar", line
    until("unloaded", lambda: model()["state"] == "unloaded")
    before = model()["keeping"]
    first, second = (client.manager("Lease", "s", "default")[0].to_raw_fd() for _ in range(2))
    until("loaded", lambda: model()["state"] == "ready" and model()["keeping"]["leases"] == 2)
    client.lines(chat(max_tokens=2))
    os.close(first)
    until("one lease", lambda: model()["keeping"]["leases"] == 1)
    # The lease is the descriptor's, not the connection's.
    client.bus.close()
    client = Client(address)
    assert model()["state"] == "ready", model()
    os.close(second)
    until("unloaded", lambda: model()["state"] == "unloaded")
    after = model()["keeping"]
    assert after["unloads"]["idle"] == before["unloads"]["idle"] + 1 and after["loads"] == before["loads"] + 1, after
    refused(ERROR + "ModelNotFound", client.manager, "KeepModel", "sx", "none", 1)
    lease = client.manager("Lease", "s", "default")[0].to_raw_fd()
    until("loaded", lambda: client.get(ROOT, MANAGER, "ModelStates") == {"default": "ready"})
    client.manager("KeepModel", "sx", "default", 600)
    os.close(lease)
    until("no lease", lambda: model()["keeping"]["leases"] == 0)
    client.lines(chat(max_tokens=2))
    assert client.get(ROOT, MANAGER, "ModelStates") == {"default": "ready"}
    client.manager("KeepModel", "sx", "default", 0)
    until("unloaded", lambda: client.get(ROOT, MANAGER, "ModelStates") == {"default": "unloaded"})
    held = [client.manager("Lease", "s", "default")[0].to_raw_fd() for _ in range(32)]
    refused(ERROR + "TooManyLeases", client.manager, "Lease", "s", "default")
    for fd in held:
        os.close(fd)


def announces(address):
    """Changes are announced, and once in three seconds at most."""
    client = Client(address)
    rule = MatchRule(type="signal", interface=PROPERTIES, member="PropertiesChanged", path=ROOT)
    client.bus.send_and_get_reply(message_bus.AddMatch(rule))
    began, n_heard, noted = time.monotonic(), 0, set()
    with client.bus.filter(rule) as heard:
        for _ in range(20):
            client.lines(chat(max_tokens=2))
        while "SampledTokens" not in noted or n_heard < 2:
            signal = client.bus.recv_until_filtered(heard, timeout=PATIENCE)
            n_heard += 1
            assert signal.body[0] == MANAGER and not set(signal.body[1]) & {"SampledTokens", "Version"}, signal.body
            noted |= set(signal.body[2])
            client.lines(chat(max_tokens=2))
    assert n_heard <= time.monotonic() - began + 1, n_heard


def ends(address, http_socket):
    """A request ends by Cancel, by its pipe, by its sender, and not without a reason."""
    client = Client(address)
    running = lambda: client.get(ROOT, MANAGER, "RunningRequests")
    client.bus.send_and_get_reply(message_bus.AddMatch(MatchRule(type="signal", interface=REQUEST)))
    with client.bus.filter(MatchRule(type="signal", interface=REQUEST, member="Finished")) as finished:
        path, fd = client.generate(endless(), endpoint="completions")
        os.read(fd, 1)
        assert client.get(path, REQUEST, "State") == "answering"
        client.call(path, REQUEST, "Cancel")
        assert client.bus.recv_until_filtered(finished, timeout=PATIENCE).body[0] == "cancelled"
        while os.read(fd, 65536):
            pass
        until("ended by Cancel", lambda: running() == 0)

        path, fd = client.generate(endless(), endpoint="completions")
        os.close(fd)
        assert client.bus.recv_until_filtered(finished, timeout=PATIENCE).body[0] == "cancelled"
        until("ended by its pipe", lambda: running() == 0)

    def leaver(**options):
        other = Client(address)
        path, fd = other.generate(endless(), endpoint="completions", **options)
        os.read(fd, 1)
        other.bus.close()
        return path, fd

    _, fd = leaver()
    until("ended by its sender", lambda: running() == 0)
    while os.read(fd, 65536):
        pass
    path, kept = leaver(detach=True)
    _, fd = leaver()
    until("one is left", lambda: running() == 1)
    assert client.get(path, REQUEST, "State") == "answering"
    for _ in range(100):
        assert os.read(kept, 4096)
    os.close(kept)
    until("ended by its pipe", lambda: running() == 0)

    # A client that is killed, with its pipe and its connection.
    command = [sys.executable, __file__, address, "holds"]
    victim = subprocess.Popen(command, stdout=subprocess.PIPE)
    victim.stdout.readline()
    assert running() == 1
    victim.kill()
    victim.wait()
    until("ended with its client", lambda: running() == 0)


def holds(address):
    _, fd = Client(address).generate(endless(), endpoint="completions")
    os.read(fd, 1)
    print("holds", flush=True)
    select.select([], [], [])


def large(address, limit):
    """Bodies by memfd, and what cannot be one."""
    client = Client(address)
    data = json.dumps(chat(max_tokens=4, metadata={"filler": "x" * (2 << 20)})).encode()
    by_fd = lambda fd: client.manager("GenerateFromFd", "ha{sv}", fd, {})
    _, fd = by_fd(memfd(data))
    whole = read_lines(fd.to_raw_fd())
    assert same(whole) == same(client.lines(chat(max_tokens=4))), whole
    refused(ERROR + "InvalidValue", by_fd, memfd(data, seals=fcntl.F_SEAL_GROW))
    refused(ERROR + "InvalidValue", by_fd, os.pipe()[0])
    refused(ERROR + "InvalidValue", by_fd, os.open(__file__, os.O_RDONLY))
    refused(ERROR + "InvalidValue", by_fd, os.open("/dev/zero", os.O_RDONLY))
    refused(ERROR + "BodyTooLarge", by_fd, memfd(b"x" * (int(limit) + 1)))
    refused(ERROR + "InvalidJson", by_fd, memfd(b""))


def add(client, fd, name="small", **options):
    """The request's path and the reading end of its pipe."""
    path, pipe = client.manager("AddModel", "hsa{sv}", fd, name, variants(options))
    return path, pipe.to_raw_fd()


def added(client, fd, name="small", **options):
    """The last line about a model; a file on which a read stalls is no reason to wait for ever."""
    _, pipe = add(client, fd, name, **options)
    assert select.select([pipe], [], [], PATIENCE)[0], "nothing comes"
    lines = read_lines(pipe)
    assert all(line["object"] == "model.progress" for line in lines[:-1]), lines
    return lines[-1]


def refusal(line):
    return line["error"]["code"], line["error"]["param"]


def in_store(store):
    """What the store has, but for its lock."""
    found = []
    for folder in ("blobs", "names", "partial"):
        with contextlib.suppress(FileNotFoundError):
            found += [f"{folder}/{name}" for name in os.listdir(os.path.join(store, folder))]
    return sorted(found)


def adds(address, model, store):
    """A model comes as a descriptor and is in the store as it was; what is none leaves nothing there."""
    client = Client(address)
    with open(model, "rb") as file:
        data = file.read()
    digest = hashlib.sha256(data).hexdigest()
    fd = os.open(model, os.O_RDONLY)

    def cut(length):
        copy = os.open(os.path.dirname(model), os.O_TMPFILE | os.O_RDWR)
        os.write(copy, data[:length])
        return copy

    assert refusal(added(client, fd, sha256="0" * 64)) == ("digest_mismatch", None)
    for length in (0, 3, 100, len(data) - 1):
        assert refusal(added(client, cut(length))) == ("invalid_model", None), length
    ends, (ours, _theirs) = os.pipe(), socket.socketpair()
    folder = os.path.dirname(model)
    none = [*ends, ours.fileno(), os.open(folder, os.O_RDONLY), os.open(model, os.O_PATH), os.open(model, os.O_WRONLY),
            os.open("/dev/zero", os.O_RDONLY)]
    for other in none:
        assert refusal(added(client, other)) == ("invalid_value", "file"), other
    refused(ERROR + "InvalidValue", add, client, fd, "../small")
    refused(ERROR + "InvalidValue", add, client, fd, sha256="abc")
    refused(ERROR + "InvalidValue", add, client, fd, colour="red")
    refused("org.freedesktop.DBus.Error.InvalidArgs", client.manager, "AddModel", "ssa{sv}", model, "small", {})
    assert in_store(store) == [], in_store(store)

    client.bus.send_and_get_reply(message_bus.AddMatch(MatchRule(type="signal", interface=REQUEST)))
    os.lseek(fd, 100, os.SEEK_SET)
    with client.bus.filter(MatchRule(type="signal", interface=REQUEST, member="Finished")) as finished:
        last = added(client, fd, sha256=digest.upper(), handle_token="small")
        unique = client.bus.unique_name[1:].replace(".", "_")
        assert end_of(client, finished, f"{ROOT}/requests/{unique}/small") == "added"
    assert (last["sha256"], last["bytes"], last["path"]) == (digest, len(data), "store:small"), last
    assert last["served_as"] == [] and "[model.small]" in last["next"] and "restart" in last["next"], last
    assert last["not_served"] is None and os.lseek(fd, 0, os.SEEK_CUR) == 100, last
    assert in_store(store) == [f"blobs/{digest}", "names/small.json"], in_store(store)
    # Memory is a file as well; the same content is there once.
    last = added(client, memfd(data), name="late")
    assert last["served_as"] == ["late"], last
    assert in_store(store) == [f"blobs/{digest}", "names/late.json", "names/small.json"], in_store(store)


def end_of(client, finished, path):
    """Why the request at `path` has ended; of those before it, something may still come."""
    while (signal := client.bus.recv_until_filtered(finished, timeout=PATIENCE)).header.fields[HeaderFields.path] != path:
        pass
    return signal.body[0]


def long_file(folder):
    """It begins as a model does, and takes a while."""
    fd = os.open(folder, os.O_TMPFILE | os.O_RDWR)
    os.write(fd, b"GGUF")
    os.ftruncate(fd, 2 << 30)
    return fd


def begun(client, fd, **options):
    """One that is being copied, once the one before has ended."""
    added = []

    def may_begin():
        with contextlib.suppress(DBusErrorResponse):
            added.append(add(client, fd, **options))
        return added

    until("free", may_begin)
    path, pipe = added[0]
    assert b"copying" in os.read(pipe, 4096)
    return path, pipe


def stops_adding(address, folder, store):
    """Closing the pipe, Cancel and leaving the bus end it, and nothing is left; one at a time."""
    client, fd = Client(address), long_file(folder)
    client.bus.send_and_get_reply(message_bus.AddMatch(MatchRule(type="signal", interface=REQUEST)))
    for end in ("close", "cancel"):
        with client.bus.filter(MatchRule(type="signal", interface=REQUEST, member="Finished")) as finished:
            path, pipe = begun(client, fd)
            assert in_store(store) == ["partial/descriptor.part"], in_store(store)
            refused(ERROR + "StoreBusy", add, client, fd, "other")
            refused(ERROR + "StoreBusy", add, Client(address), fd, "other")
            if end == "close":
                os.close(pipe)
            else:
                client.call(path, REQUEST, "Cancel")
                while os.read(pipe, 65536):
                    pass
            assert end_of(client, finished, path) == "cancelled"
        # What has ended has ended: nothing is left, and the next one may begin.
        assert in_store(store) == [], in_store(store)
        assert refusal(added(client, os.pipe()[0])) == ("invalid_value", "file")
    leaver = Client(address)
    _, pipe = begun(leaver, fd)
    leaver.bus.close()
    until("gone", lambda: in_store(store) == [])
    os.close(pipe)
    leaver = Client(address)
    _, pipe = begun(leaver, fd, detach=True)
    leaver.bus.close()
    os.read(pipe, 4096)
    assert in_store(store) == ["partial/descriptor.part"], in_store(store)
    os.close(pipe)
    until("gone", lambda: in_store(store) == [])
    # A file that others write into while it is read is none.
    _, pipe = begun(client, fd)
    os.ftruncate(fd, 5)
    assert refusal(read_lines(pipe)[-1]) == ("file_changed", None)
    assert in_store(store) == [], in_store(store)


def holds_adding(address, folder):
    """Until the daemon ends; what its last line was then."""
    _, pipe = begun(Client(address), long_file(folder))
    print("holds", flush=True)
    with open(pipe) as lines:
        last = [line for line in lines if line.endswith("\n")][-1:]
    print(*last, flush=True)


def fuse(address, folder, store):
    """A file that another process serves, which does not answer, is not read."""
    from stalls import Stalling

    served = Stalling(os.path.join(folder, "stalls"))
    client = Client(address)
    line = added(client, served.open())
    assert refusal(line) == ("invalid_value", "file") and "FUSE" in line["error"]["message"], line
    assert served.n_reads() == 0 and in_store(store) == [], in_store(store)


def sessions(address):
    client = Client(address)
    path = client.manager("CreateSession", "a{sv}", variants({"title": "trains", "pinned": True}))[0]
    name = client.get(path, SESSION, "Id")
    assert path == f"{ROOT}/sessions/{name}" and client.get(path, SESSION, "Title") == "trains"
    turn = lambda text: client.lines({**chat(max_tokens=8), "session_id": name, "messages": [{"role": "user", "content": text}]})
    turn("one")
    turn("two")
    assert len(json.loads(client.session(path, "GetMessages")[0])) == 4
    assert client.get(path, SESSION, "Turns") == 2
    fork = client.session(path, "Fork", "a{sv}", variants({"turns": 1}))[0]
    assert client.get(fork, SESSION, "Turns") == 1
    client.session(path, "Truncate", "u", 1)
    client.session(path, "Checkpoint")
    client.session(path, "Rename", "s", "planes")
    client.session(path, "Pin", "b", False)
    client.session(path, "Change", "a{sv}", variants({"durability": "token"}))
    values = {key: value for key, (_, value) in client.call(path, PROPERTIES, "GetAll", "s", SESSION)[0].items()}
    assert (values["Title"], values["Pinned"], values["Turns"], values["State"]) == ("planes", False, 1, "idle"), values
    exported = os.fdopen(client.session(path, "Export")[0].to_raw_fd(), "rb")
    assert fcntl.fcntl(exported, fcntl.F_GET_SEALS) & SEALS == SEALS
    exported.seek(0)
    copy = client.manager("ImportSession", "h", memfd(exported.read()))[0]
    assert client.session(copy, "GetMessages") == client.session(path, "GetMessages") and copy != path
    listed = [entry[0] for entry in client.manager("ListSessions")[0]]
    assert {path, fork, copy} <= set(listed), listed
    tree = client.call(f"{ROOT}/sessions", "org.freedesktop.DBus.Introspectable", "Introspect")[0]
    assert all(name.rsplit("/", 1)[1] in tree for name in (path, fork, copy)), tree
    refused(ERROR + "InvalidValue", client.session, path, "Change", "a{sv}", variants({"durability": 5}))
    for one in (path, fork, copy):
        client.session(one, "Delete")
        refused(ERROR + "SessionNotFound", client.session, one, "GetMessages")


def cut(address):
    """Begins a turn and prints the session; the daemon is then killed, which ends the pipe."""
    client = Client(address)
    path = client.manager("CreateSession", "a{sv}", variants({"durability": "token"}))[0]
    body = {**endless(messages=QUESTION, max_tokens=400), "session_id": client.get(path, SESSION, "Id")}
    del body["prompt"]
    _, fd = client.generate(body)
    with open(fd) as pipe:
        lines = [json.loads(pipe.readline()) for _ in range(5)]
        print(path, flush=True)
        rest = [line for line in pipe if line.endswith("\n")]
    assert not any("timings" in json.loads(line) for line in rest), "it was not cut"
    print(json.dumps([line["choices"][0]["delta"].get("content", "") for line in lines]), flush=True)


def goes_on(address, path, begun):
    """After the restart: the same session, all of its answer."""
    client = Client(address)
    assert client.get(path, SESSION, "State") == "interrupted"
    _, fd = client.session(path, "Continue", "a{sv}", variants({"stream": True}))
    lines = read_lines(fd.to_raw_fd())
    text = "".join(line["choices"][0]["delta"].get("content", "") for line in lines)
    assert text.startswith("".join(json.loads(begun))) and "timings" in lines[-1], lines[-1]
    assert client.get(path, SESSION, "State") == "idle"


def asks_on(address, path, begun):
    """After the restart: a new turn is replied to at once, though the answer that was cut is finished before it."""
    client = Client(address)
    session = client.get(path, SESSION, "Id")
    # What is wrong with it is found behind that answer, so it comes through the pipe and is no error of the call.
    line, = client.lines({**chat(grammar="nonsense"), "session_id": session})
    assert line["error"]["param"] == "grammar", line
    assert client.get(path, SESSION, "State") == "idle"
    assert client.lines({**chat(max_tokens=3), "session_id": session})[0]["choices"][0]["message"]["content"]
    said = json.loads(client.session(path, "GetMessages")[0])
    assert len(said) == 4 and said[1]["content"].startswith("".join(json.loads(begun))), said


def others(address, uid):
    """Another user finds nothing of ours, and cannot do what an administrator does."""
    client = Client(address)
    mine = client.manager("CreateSession", "a{sv}", {})[0]
    request, fd = client.generate(endless(), endpoint="completions")
    os.read(fd, 1)
    done = subprocess.run([sys.executable, __file__, address, "stranger", uid, mine, request], check=False)
    assert done.returncode == 0
    assert client.get(request, REQUEST, "State") == "answering", "it was cancelled"
    assert client.get(mine, SESSION, "Turns") == 0
    client.call(request, REQUEST, "Cancel")
    # Root is told of the stranger's session, but not what it is about, and may delete it.
    found = client.manager("ListSessionsOf", "u", int(uid))[0]
    assert len(found) == 1 and "Title" not in found[0], found
    client.manager("DeleteSessionOf", "us", int(uid), found[0]["Id"][1])
    assert client.manager("ListSessionsOf", "u", int(uid))[0] == []


def stranger(address, uid, session, request):
    # Opened before: the folder that these tests are in may be closed to him.
    file = os.open(__file__, os.O_RDONLY)
    os.setgid(int(uid))
    os.setuid(int(uid))
    client = Client(address)
    own = client.manager("CreateSession", "a{sv}", variants({"title": "mine"}))[0]
    assert [entry[0] for entry in client.manager("ListSessions")[0]] == [own]
    for method, *arguments in (
        ("GetMessages",), ("Fork", "a{sv}", {}), ("Truncate", "u", 0), ("Rename", "s", "x"), ("Pin", "b", True),
        ("Export",), ("Checkpoint",), ("Delete",), ("Continue", "a{sv}", {}), ("Change", "a{sv}", {"title": ("s", "x")}),
    ):
        refused(ERROR + "SessionNotFound", client.session, session, method, *arguments)
    refused(ERROR + "SessionNotFound", client.call, session, PROPERTIES, "GetAll", "s", SESSION)
    refused(ERROR + "SessionNotFound", client.generate, chat(session_id=session.rsplit("/", 1)[1]))
    unknown = "org.freedesktop.DBus.Error.UnknownObject"
    refused(unknown, client.call, request, REQUEST, "Cancel")
    refused(unknown, client.call, request, PROPERTIES, "GetAll", "s", REQUEST)
    for path in ("", "/sessions", "/requests", request.removeprefix(ROOT).rsplit("/", 1)[0]):
        tree = client.call(ROOT + path, "org.freedesktop.DBus.Introspectable", "Introspect")[0]
        assert session.rsplit("/", 1)[1] not in tree and request.rsplit("/", 1)[1] + '"' not in tree, tree
    denied = "org.freedesktop.DBus.Error.AccessDenied"
    # Whether he may is asked before anything of the file is.
    refused(denied, add, client, os.pipe()[0])
    refused(denied, add, client, file, "../x", colour="red")
    refused(denied, client.manager, "ListSessionsOf", "u", 0)
    refused(denied, client.manager, "DeleteSessionOf", "us", 0, session.rsplit("/", 1)[1])
    # A user's many requests leave another one's alone.
    held = []
    while True:
        try:
            held.append(client.generate(endless(), endpoint="completions")[1])
        except DBusErrorResponse as error:
            assert error.name == ERROR + "TooManyRequests", error
            break
    assert len(held) == 4, held
    assert Client(address).get(ROOT, MANAGER, "State") == "ready"


def polkit(address, uid, model):
    """A polkit that says yes to interactive callers, and is asked with the caller's name."""
    authority = open_dbus_connection(bus=address)
    name = "org.freedesktop.PolicyKit1"
    authority.send_and_get_reply(message_bus.RequestName(name))
    command = [sys.executable, __file__, address, "administrator", uid, model]
    caller = subprocess.Popen(command)
    for action_asked, allowed in (("manage-sessions-of-others", False), ("manage-sessions-of-others", True),
                                  ("add-models", False), ("add-models", True)):
        asked = authority.receive(timeout=PATIENCE)
        while asked.header.message_type != MessageType.method_call:
            asked = authority.receive(timeout=PATIENCE)
        (kind, subject), action, _, flags, _ = asked.body
        assert kind == "system-bus-name" and subject["name"][1].startswith(":"), asked.body
        assert action == f"{NAME}.{action_asked}" and flags == int(allowed), asked.body
        authority.send(new_method_return(asked, "(bba{ss})", ((allowed, not allowed, {}),)))
    assert caller.wait() == 0


def administrator(address, uid, model):
    # Opened by one who may, as a desktop's portal would.
    fd = os.open(model, os.O_RDONLY)
    os.setuid(int(uid))
    client = Client(address)
    refused("org.freedesktop.DBus.Error.AccessDenied", client.manager, "ListSessionsOf", "u", 0)
    interactive = MessageFlag.allow_interactive_authorization
    assert client.manager("ListSessionsOf", "u", 12345, flags=interactive) == ([],)
    refused("org.freedesktop.DBus.Error.AccessDenied", add, client, fd)
    _, pipe = client.manager("AddModel", "hsa{sv}", fd, "small", {}, flags=interactive)
    assert read_lines(pipe.to_raw_fd())[-1]["object"] == "model.added"


def slow(address, pid):
    """200 readers that do not read, on 8 connections: memory stays, and who reads is served."""
    def rss():
        with open(f"/proc/{pid}/status") as status:
            return next(int(line.split()[1]) for line in status if line.startswith("VmRSS"))

    def hold(client):
        path, fd = client.generate(endless(), endpoint="completions")
        # One that has more in it already stays as it is, and is full somewhat later.
        with contextlib.suppress(OSError):
            fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, SMALL_PIPE)
        return client, path, fd

    reader = Client(address)
    reader.lines(chat())
    clients = [Client(address) for _ in range(8)]
    held = [hold(client) for client in clients for _ in range(25)]
    lines = lambda: [client.get(path, REQUEST, "Lines") for client, path, _ in held]
    seen = []

    def stuck():
        seen.append(lines())
        return len(seen) > 5 and seen[-1] == seen[-5] and min(seen[-1]) * LINE_BYTES_MAX > SMALL_PIPE

    until("all stuck", stuck)
    before = rss()
    for _ in range(10):
        assert len(reader.lines(chat())) == 1
    grown = rss() - before
    print(f"200 readers that do not read: {sum(lines())} lines in pipes, RSS {before >> 10} MiB, {grown} KiB more")
    assert lines() == seen[-1] and grown < 4096, grown
    for _, _, fd in held:
        os.close(fd)
    until("over", lambda: reader.get(ROOT, MANAGER, "RunningRequests") == 0)


NAMES = ["messages", "prompt", "model", "max_tokens", "temperature", "stop", "tools", "response_format", "stream", "n",
         "session_id", "logit_bias", "seed", "title", "pinned", "endpoint", "handle_token", "detach", "durability", "sha256"]
TEXTS = ["default", "", "x", "chat.completions", "completions", "sess_0", "{", "\u202e\U0001f980", "<|im_end|>", "a/b", "token"]
PATHS = [ROOT, ROOT, ROOT, f"{ROOT}/sessions", f"{ROOT}/sessions/x", f"{ROOT}/requests/1_1/x", "/", "/org", "/other"]
INTERFACES = [MANAGER, MANAGER, SESSION, REQUEST, PROPERTIES, "org.freedesktop.DBus.Introspectable",
              "org.freedesktop.DBus.Peer", "org.sparsed1.Nothing", None]
MEMBERS = ["Generate", "Generate", "GenerateFromFd", "GetStatus", "ListModels", "Tokenize", "Detokenize", "CreateSession", "ListSessions",
           "ImportSession", "ListSessionsOf", "DeleteSessionOf", "AddModel", "Cancel", "Rename", "Fork", "Truncate", "Export",
           "Continue", "Delete", "Get", "GetAll", "Set", "Introspect", "Ping", "GetMachineId", "Nothing"]

# Calls that get as far as their arguments.
SESSION_AT = f"{ROOT}/sessions/x"
CALLS = [
    *[(ROOT, MANAGER, "Generate", ["s", "a{sv}"])] * 8, (ROOT, MANAGER, "GenerateFromFd", ["h", "a{sv}"]),
    (ROOT, MANAGER, "CreateSession", ["a{sv}"]), (ROOT, MANAGER, "ImportSession", ["h"]), (ROOT, MANAGER, "ListSessionsOf", ["u"]),
    (ROOT, MANAGER, "DeleteSessionOf", ["u", "s"]), (SESSION_AT, SESSION, "Rename", ["s"]), (SESSION_AT, SESSION, "Fork", ["a{sv}"]),
    (SESSION_AT, SESSION, "Truncate", ["u"]), (SESSION_AT, SESSION, "Continue", ["a{sv}"]), (SESSION_AT, SESSION, "Change", ["a{sv}"]),
    (ROOT, MANAGER, "AddModel", ["h", "s", "a{sv}"]), (ROOT, MANAGER, "Tokenize", ["s"]), (ROOT, MANAGER, "Detokenize", ["s"]),
    (ROOT, PROPERTIES, "Get", ["s", "s"]), (ROOT, PROPERTIES, "GetAll", ["s"]), (ROOT, PROPERTIES, "Set", ["s", "s", "v"]),
]


def thing(random, depth=0):
    """JSON that may mean something by accident; answers stay short."""
    pick = random.randrange(5 if depth > 3 else 8)
    if pick < 3:
        return random.choice([None, True, 0, -1, 2, 40, 1 << 40, 0.5, 1e300])
    if pick < 5:
        return random.choice(TEXTS)
    if pick == 5:
        return [thing(random, depth + 1) for _ in range(random.randrange(3))]
    return {random.choice(NAMES): thing(random, depth + 1) for _ in range(random.randrange(5))}


def body_of(random):
    body = thing(random, 2)
    if random.random() < 0.7:
        content = random.choice(["x", "x", thing(random, 3)])
        body = {"messages": [{"role": "user", "content": content}], "prompt": content, "max_tokens": 2}
        for name in random.sample(NAMES, random.randrange(3)):
            body[name] = thing(random, 3)
        body["max_tokens"] = random.choice([2, 2, 2, body["max_tokens"] if body["max_tokens"] != 1 << 40 else 0])
    text = json.dumps(body)
    return text[: random.randrange(len(text) + 1)] if random.random() < 0.1 else text


def argument(random, kind):
    """A value of a D-Bus type."""
    match kind:
        case "s":
            return body_of(random) if random.random() < 0.7 else random.choice(NAMES + TEXTS + INTERFACES[:3])
        case "o":
            return random.choice(PATHS)
        case "u":
            return random.choice([0, 1, os.getuid(), 65534, (1 << 32) - 1])
        case "b":
            return random.random() < 0.5
        case "d":
            return random.choice([0.0, -1.0, float("nan"), 1e300])
        case "v":
            inner = random.choice("subd")
            return (inner, argument(random, inner))
        case "a{sv}":
            return {random.choice(NAMES): argument(random, "v") for _ in range(random.choice([0, 0, 0, 1, 2]))}
        case "as":
            return random.choices(TEXTS, k=random.randrange(3))
        case "ay":
            return random.randbytes(random.randrange(40))
        case "h":
            data = random.choice([b"", b"{", body_of(random).encode(), random.randbytes(60)])
            return memfd(data, random.choice([0, SEALS, SEALS]))


def fuzz(address, pid, n):
    """Sends `n` calls that are broken somewhere, or right by accident; each has its answer."""
    random = Random(int(os.environ.get("SEED", "7")))
    client = Client(address)
    signatures = [["s", "a{sv}"], ["s", "a{sv}"], ["s", "s"], ["a{sv}"], ["h", "a{sv}"], ["h"], ["u"], ["u", "s"], ["s"], [],
                  ["s", "s", "v"], ["o"], ["ay"], ["v"], ["as"], ["b", "d"]]
    outcomes = {}

    def rss():
        with open(f"/proc/{pid}/status") as status:
            return next(int(line.split()[1]) for line in status if line.startswith("VmRSS"))

    def answered():
        message = client.bus.receive(timeout=PATIENCE)
        if message.header.message_type not in (MessageType.error, MessageType.method_return):
            return 0
        name = message.header.fields.get(HeaderFields.error_name, "")
        assert not name or name.startswith((ERROR, "org.freedesktop.DBus.Error.")), message
        assert name not in (ERROR + "InternalError", ERROR + "BackendFailed", ERROR + "SessionDamaged"), message
        outcomes[name] = outcomes.get(name, 0) + 1
        for value in message.body:
            if hasattr(value, "to_raw_fd"):
                os.close(value.to_raw_fd())
        return 1

    open_calls, early = 0, 0
    for at in range(int(n)):
        path, interface, member, kinds = random.choice(CALLS)
        if random.random() < 0.4:
            path, interface, member = random.choice(PATHS), random.choice(INTERFACES), random.choice(MEMBERS)
        if random.random() < 0.2:
            kinds = random.choice(signatures)
        to = DBusAddress(path, bus_name=NAME, interface=interface)
        arguments = tuple(argument(random, kind) for kind in kinds)
        client.bus.send(new_method_call(to, member, "".join(kinds) or None, arguments))
        for kind, value in zip(kinds, arguments):
            if kind == "h":
                os.close(value)
        open_calls += 1
        while open_calls >= 8:
            open_calls -= answered()
        if at == int(n) // 5:
            early = rss()
    while open_calls:
        open_calls -= answered()
    assert sum(outcomes.values()) == int(n) and len(outcomes) > 5, outcomes
    assert outcomes[""] < int(n) // 2 and outcomes[ERROR + "InvalidValue"] > int(n) // 200, outcomes
    until("free", lambda: client.get(ROOT, MANAGER, "KvBlocksUsed") == client.get(ROOT, MANAGER, "RunningRequests") == 0)
    assert rss() < early + 32768, f"RSS {early} KiB early, {rss()} KiB at the end"
    assert client.lines(chat())[0]["choices"]
    print(f"{outcomes}; RSS {early} KiB early, {rss()} KiB at the end")


def waits(address):
    """Until the name is there."""
    bus = open_dbus_connection(bus=address)
    until("on the bus", lambda: bus.send_and_get_reply(message_bus.NameHasOwner(NAME)).body[0])
    assert Client(address).lines(chat(max_tokens=2))


if __name__ == "__main__":
    globals()[sys.argv[2]](sys.argv[1], *sys.argv[3:])
