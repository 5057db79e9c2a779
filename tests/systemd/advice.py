"""Does what the doctor says to type mend what it has found?

Each claim spoils something, has the doctor find it, types what stands behind its `->`, and has the doctor content with that
check. An editor's part is done here: `sudoedit FILE: KEY = VALUE` writes that line.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import stat

import doors
from box import (
    CAPITAL, CONFIG, DROP_INS, PARIS, as_user, ask, curl, group_file, heard, new_session, restart, run, served, shown,
    text_of, until, until_ready, wish,
)

MODEL = "/usr/share/sparsed/models/smollm2-135m-dsa.gguf"
STATE = "/var/lib/sparsed"
PLUGIN = "/usr/lib/sparsed/plugins/cpu"
DEFAULT = f'model.default.path = "{MODEL}"\n'


def checks(user="root"):
    """What the doctor finds, by the names of its checks."""
    # What it logs is no JSON, and its exit code says that some have failed.
    command = [*(as_user(user) if user != "root" else ()), "sh", "-c", "sparsectl doctor --json 2>/dev/null"]
    found = json.loads(run(*command, check=False))
    # Of two with one name the first says what is wrong with the box, the other what the daemon makes of it.
    return {check["check"]: check for check in reversed(found)}


def edit(file, setting):
    """Has the file say the setting, whose key may be there with another value."""
    key = setting.split(" = ")[0]
    with open(file) as old:
        lines = [line for line in old if not line.startswith(f"{key} = ")]
    with open(file, "w") as new:
        new.writelines([f"{setting}\n", *lines])


def typed(advice, user="root", folder="/"):
    """Does what the advice says, as a root without sudo in the box; behind " or " and "; another" is another way."""
    advice = re.split(r", or |; another |, then log in", advice)[0]
    for part in re.split(r", then |; then ", advice):
        editing = re.fullmatch(r"sudoedit (\S+): (\S+ = .*)", part)
        if editing:
            edit(*editing.groups())
        else:
            run("bash", "-euc", f'sudo() {{ "$@"; }}\nUSER={user}\ncd {folder}\n{part}')


def is_mended(name, verdict, words, user="root", folder="/"):
    """The check of this name fails so with these words; what it says to type is typed, and it is content or gone."""
    before = checks(user).get(name)
    assert before and before["verdict"] == verdict and words in before["found"], f"{name}: {before}"
    typed(before["fix"], user, folder)
    # A service that was restarted loads its model first.
    until(f"{name} after {before['fix']!r}", lambda: checks(user).get(name, {"verdict": "ok"})["verdict"] == "ok")


def the_doctors_advice_shuts_a_state_folder_that_is_open_to_others():
    restart()
    os.chmod(STATE, 0o755)
    is_mended("state folder", "warn", "is open to others (mode 755)")
    assert stat.S_IMODE(os.stat(STATE).st_mode) == 0o700


def the_doctors_advice_makes_a_state_folder_that_is_not_there():
    restart()
    # Whoever connects or calls would start the service, which makes it.
    run("systemctl", "disable", "--now", "sparsed.socket", "sparsed.service")
    os.rename(STATE, f"{STATE}.away")
    try:
        is_mended("state folder", "fail", "is not there, and you may not make it", user="sparsed")
        os.rmdir(STATE)
    finally:
        os.rename(f"{STATE}.away", STATE)
        run("systemctl", "enable", "--now", "sparsed.socket", "sparsed.service")
        restart()


def the_doctors_advice_moves_conversations_to_another_folder_and_lets_the_service_write_there():
    elsewhere = "/srv/sparsed"
    restart()
    session = new_session()
    kept = set(os.listdir(STATE))
    # Not merely a restart: it would serve without conversations.
    restart(f'state_dir = "{elsewhere}"\n')
    status, value = ask("alice", "/v1/sessions", {})
    assert (status, value["error"]["code"]) == (503, "sessions_away"), f"{status} {value}"
    try:
        is_mended("state folder", "fail", "cannot be written by sparsed.service (ProtectSystem=strict)")
        until_ready()
        assert ask("alice", f"/v1/sessions/{session}")[0] == 200
        assert os.listdir(STATE) == ["models"], os.listdir(STATE)
        assert kept <= {*os.listdir(elsewhere), "models"}, os.listdir(elsewhere)
        assert ask("alice", f"/v1/sessions/{new_session()}")[0] == 200
    finally:
        run("systemctl", "stop", "sparsed.service")
        with contextlib.suppress(FileNotFoundError):
            os.unlink(f"{DROP_INS}/state.conf")
            run("cp", "-a", f"{elsewhere}/.", STATE)
            shutil.rmtree(elsewhere)
        restart()
    assert ask("alice", f"/v1/sessions/{session}")[0] == 200


def the_doctors_advice_brings_a_model_that_the_sandbox_hides_into_the_store():
    restart()
    shutil.copyfile(MODEL, "/root/mine.gguf")
    restart('model.default.path = "/root/mine.gguf"\n', ready=False)
    try:
        is_mended("model default", "fail", "is not there for sparsed.service (ProtectHome=yes)")
        until_ready()
        assert text_of(served("alice", "/v1/chat/completions", CAPITAL)) == PARIS
    finally:
        restart()
        run("sparsectl", "model", "rm", "default", check=False)
        run("sparsectl", "model", "gc")
        os.unlink("/root/mine.gguf")


def is_told_and_mended(config, name, words, drop_in=""):
    """`config check` refuses what the daemon could not read, as the doctor does; once mended it is right."""
    restart(config, drop_in, ready=False)
    said = run("sparsectl", "config", "check", check=False)
    assert words in said and "right:" not in said, said
    is_mended(name, "fail", words)
    said = run("sparsectl", "config", "check")
    assert "right: " in said and CONFIG in said, said
    until_ready()


def the_doctors_advice_gives_keys_that_are_roots_alone_to_the_daemons_user():
    keys = "/etc/sparsed/keys"
    os.makedirs(os.path.dirname(keys), exist_ok=True)
    with open(os.open(keys, os.O_WRONLY | os.O_CREAT, 0o600), "w") as file:
        file.write("hall 0123456789abcdef0123456789abcdef\n")
    try:
        config = f'tcp.listen = "127.0.0.1:11536"\ntcp.keys = "{keys}"\n'
        # The packaged service opens no TCP socket of its own.
        with open(doors.NETWORK) as file:
            drop_in = file.read()
        is_told_and_mended(config, "tcp.keys", "cannot be read by the daemon's user", drop_in)
    finally:
        restart()
        os.unlink(keys)


def the_doctors_advice_brings_a_file_that_the_sandbox_hides_to_where_the_service_sees_it():
    key = "/root/upstream.key"
    with open(os.open(key, os.O_WRONLY | os.O_CREAT, 0o600), "w") as file:
        file.write("secret\n")
    try:
        config = f'{DEFAULT}model.big.upstream = "http://127.0.0.1:9/v1"\nmodel.big.relay.key_file = "{key}"\n'
        words = "is not there for sparsed.service (ProtectHome=yes)"
        is_told_and_mended(config, "model.big.relay.key_file", words)
    finally:
        restart()
        for file in (key, "/etc/sparsed/upstream.key"):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(file)


def the_doctors_advice_shuts_a_plugin_that_others_may_write():
    restart()
    os.chmod(PLUGIN, 0o777)
    try:
        title = f"plugin {PLUGIN}"
        is_mended(title, "warn", "mode 777")
        assert checks()["plugin cpu"]["verdict"] == "ok"
    finally:
        os.chmod(PLUGIN, 0o755)
    restart()


def the_doctors_advice_lifts_the_quarantine_of_a_plugin():
    restart('[engine]\nisolation = "process"\nretry.backoff_ms = [10]\n')
    for _ in range(3):
        until_ready()
        old = hosts()
        stream = curl("alice", "/v1/chat/completions", wish("Tell me a story.", 400, None, True))
        heard(stream, 5)
        for process in old:
            os.kill(int(process), signal.SIGKILL)
        until("another process of the plugin", lambda: hosts() not in ([], old))
        stream.kill()
        stream.communicate()
    found = checks()["plugin cpu"]
    assert found["verdict"] == "fail" and "is quarantined for another" in found["found"], found
    look, _, lift = found["fix"].partition("; once its cause is mended: ")
    typed(f"export SYSTEMD_PAGER=; {look}")
    typed(lift)
    assert checks()["plugin cpu"]["verdict"] == "ok"
    restart()


def hosts():
    """The processes of plugins."""
    found = []
    with open(group_file("cgroup.procs")) as listed:
        for process in listed.read().split():
            with contextlib.suppress(OSError), open(f"/proc/{process}/cmdline") as command:
                if "plugin-host" in command.read():
                    found.append(process)
    return found


def the_doctors_advice_starts_a_service_that_is_switched_off():
    run("systemctl", "disable", "--now", "sparsed.service", "sparsed.socket")
    try:
        is_mended("daemon", "warn", "does not run: /run/sparsed/api.sock is not there")
        until_ready()
    finally:
        run("systemctl", "enable", "--now", "sparsed.socket", "sparsed.service")


def the_doctors_advice_lets_somebody_in_who_may_not_connect():
    restart()
    try:
        is_mended("daemon", "fail", "you may not connect to", user="mallory")
        assert ask("mallory", "/v1/models")[0] == 200
    finally:
        run("gpasswd", "--delete", "mallory", "sparsed")


def the_doctors_advice_opens_the_network_to_a_service_with_a_broker():
    if not shutil.which("mosquitto"):
        print("#  not tried: no mosquitto here")
        return
    run("systemctl", "start", "mosquitto.service")
    try:
        restart('mqtt.broker = "mqtt://localhost"\nmqtt.node = "kitchen"\n')
        is_mended("MQTT broker", "fail", "sparsed.service has no network (PrivateNetwork=yes)")
        assert shown("PrivateNetwork") == "no"
    finally:
        run("systemctl", "stop", "mosquitto.service")
        with contextlib.suppress(FileNotFoundError):
            os.unlink(f"{DROP_INS}/{os.path.basename(doors.NETWORK)}")
        restart()


def the_doctors_advice_lets_the_service_open_a_tcp_socket_of_its_own():
    keys = "/etc/sparsed/keys"
    with open(os.open(keys, os.O_WRONLY | os.O_CREAT, 0o600), "w") as file:
        file.write("hall 0123456789abcdef0123456789abcdef\n")
    shutil.chown(keys, "sparsed")
    try:
        restart(f'tcp.listen = "127.0.0.1:11536"\ntcp.keys = "{keys}"\n', ready=False)
        is_mended("tcp.listen", "fail", "may open no TCP socket (PrivateNetwork=yes)")
        until_ready()
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(f"{DROP_INS}/{os.path.basename(doors.NETWORK)}")
        restart()
        os.unlink(keys)


CHECKS = [
    the_doctors_advice_shuts_a_state_folder_that_is_open_to_others,
    the_doctors_advice_makes_a_state_folder_that_is_not_there,
    the_doctors_advice_moves_conversations_to_another_folder_and_lets_the_service_write_there,
    the_doctors_advice_brings_a_model_that_the_sandbox_hides_into_the_store,
    the_doctors_advice_gives_keys_that_are_roots_alone_to_the_daemons_user,
    the_doctors_advice_brings_a_file_that_the_sandbox_hides_to_where_the_service_sees_it,
    the_doctors_advice_shuts_a_plugin_that_others_may_write,
    the_doctors_advice_lifts_the_quarantine_of_a_plugin,
    the_doctors_advice_starts_a_service_that_is_switched_off,
    the_doctors_advice_lets_somebody_in_who_may_not_connect,
    the_doctors_advice_opens_the_network_to_a_service_with_a_broker,
    the_doctors_advice_lets_the_service_open_a_tcp_socket_of_its_own,
]
