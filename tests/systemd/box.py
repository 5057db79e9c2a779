"""How do the checks drive the box? systemctl as root, curl over the socket as a user of the box, files of /etc.

Only what Python's own library has. Waiting is asking again until a deadline.
"""

import json
import os
import subprocess
import time

SOCKET = "/run/sparsed/api.sock"
DROP_INS = "/etc/systemd/system/sparsed.service.d"
CONFIG = "/etc/sparsed/config.toml"
# Seconds for anything that must come; an emulated machine wants more.
PATIENCE = int(os.environ.get("PATIENCE_S", "60"))
CAPITAL = {"messages": [{"role": "user", "content": "What is the capital of France?"}], "temperature": 0}
PARIS = "The capital of France is Paris."


def run(*command, check=True):
    """The output of a command, both streams."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=PATIENCE * 3 // 2)
    if check and done.returncode != 0:
        raise AssertionError(f"{' '.join(command)}: exit {done.returncode}: {done.stdout.strip()}")
    return done.stdout.strip()


def until(what, condition, patience=PATIENCE):
    """The first true value of the condition."""
    end = time.monotonic() + patience
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > end:
            raise AssertionError(f"{what}: not within {patience} s")
        time.sleep(0.05)


def as_user(user):
    """What a command of the user begins with."""
    return ["setpriv", "--reuid", user, "--regid", user, "--init-groups", "env"]


def called(user, *arguments, check=True):
    """What busctl says to a user of the system's bus."""
    # systemd 245's tells errors to the log alone where its standard error is no terminal.
    return run(*as_user(user), "env", "SYSTEMD_LOG_TARGET=console", "busctl", "--system", *arguments, check=check)


def curl(user, path, body=None, method=None, door=("--unix-socket", SOCKET, "http://localhost")):
    """The process of a request. The door is what curl wants to hear of it; the address without the path comes last."""
    command = as_user(user)
    command += ["curl", "-sSN", "--max-time", str(PATIENCE), "-w", "\n%{http_code}"]
    command += [*door[:-1], door[-1] + path]
    if method:
        command += ["-X", method]
    if body is not None:
        command += ["-d", json.dumps(body)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def answer(process):
    """Status and text of a request; status 0 and curl's complaint where there was no answer."""
    out, complaint = process.communicate(timeout=PATIENCE + 5)
    text, _, status = out.rpartition("\n")
    return (int(status), text) if process.returncode == 0 else (0, complaint)


def ask(user, path, body=None, method=None, **door):
    """Status and JSON of an answer."""
    status, text = answer(curl(user, path, body, method, **door))
    return status, json.loads(text) if status else text


def served(user, path, body=None, method=None, **door):
    """The JSON of an answer that must be a success."""
    status, value = ask(user, path, body, method, **door)
    assert status in (200, 201), f"{path}: {status} {value}"
    return value


def events(process):
    """The pieces of text of a stream, as they come; ends where the stream does."""
    for line in process.stdout:
        if line.startswith("data: {"):
            for choice in json.loads(line[6:]).get("choices", []):
                piece = choice.get("delta", {}).get("content")
                if piece:
                    yield piece


def heard(process, pieces):
    """Text of the first pieces of a stream."""
    text = ""
    for _, piece in zip(range(pieces), events(process)):
        text += piece
    return text


def text_of(completion):
    return completion["choices"][0]["message"]["content"]


def wish(text, tokens, session=None, stream=False):
    """A request whose answer has so many tokens."""
    request = {"messages": [{"role": "user", "content": text}], "temperature": 0.8, "seed": 7}
    request.update(max_tokens=tokens, ignore_eos=True, stream=stream)
    # Python 3.8 does not add dictionaries.
    return {**request, **({"session_id": session} if session else {})}


def new_session(user="alice"):
    return served(user, "/v1/sessions", {})["id"]


def state_of(session):
    return served("alice", f"/v1/sessions/{session}")["state"]


def last_message(session):
    return served("alice", f"/v1/sessions/{session}")["messages"][-1]["content"]


def shown(prop, unit="sparsed.service"):
    """A property of a unit."""
    return run("systemctl", "show", "--value", "-p", prop, unit)


def group_file(name):
    """Path of a file of the service's control group."""
    return f"/sys/fs/cgroup{shown('ControlGroup')}/{name}"


def systemd_version():
    return int(run("systemctl", "--version").split()[1])


def pid():
    return int(shown("MainPID"))


def is_active():
    return run("systemctl", "is-active", "sparsed.service", check=False) == "active"


def until_ready():
    """Waits until the model answers."""
    until("the model is loaded", lambda: ask("alice", "/health")[0] == 200)


def a_story_that_has_begun():
    """A session that is being answered, the whole answer, its stream, and what was heard of that."""
    until_ready()
    session = new_session()
    twin = served("alice", f"/v1/sessions/{session}/fork", {})["id"]
    whole = text_of(served("alice", "/v1/chat/completions", wish("Tell me a story.", 150, twin)))
    stream = curl("alice", "/v1/chat/completions", wish("Tell me a story.", 150, session, True))
    return session, whole, stream, heard(stream, 20)


def restart(config="", drop_in="", ready=True):
    """The service with this configuration and this drop-in, ready, or else on its way."""
    for path, text in ((CONFIG, config), (f"{DROP_INS}/check.conf", drop_in)):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "w") as file:
            file.write(text)
    run("systemctl", "daemon-reload")
    run("systemctl", "reset-failed", "sparsed.service")
    run("systemctl", "restart", *([] if ready else ["--no-block"]), "sparsed.service")
    if ready:
        until_ready()


def journal():
    """What systemd and the daemon have said of the service."""
    return run("journalctl", "--no-pager", "-o", "cat", "-u", "sparsed.service")
