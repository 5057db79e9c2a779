"""Is the model reached by each door of the packaged service, and does polkit have its say?

What a tree does not have (polkit, a broker) is said, and not tried there.
"""

import contextlib
import json
import os
import pwd
import shutil

from box import CAPITAL, PARIS, as_user, called, journal, new_session, restart, run, shown, until

NETWORK = "/usr/share/sparsed/examples/network.conf"
MANAGER_PATH, MANAGER = "/org/sparsed1", "org.sparsed1.Manager"
# An operator's word on who may do what polkit asks about.
RULE = "/etc/polkit-1/rules.d/50-sparsed.rules"
# A polkit before 121 in Debian reads these instead.
OLD_RULE = "/etc/polkit-1/localauthority/50-local.d/50-sparsed.pkla"
ACTION = "org.sparsed1.manage-sessions-of-others"
MODEL = "/usr/share/sparsed/models/smollm2-135m-dsa.gguf"


def a_chat_is_answered_on_the_bus_of_the_system():
    restart()
    said = run(*as_user("alice"), "sparsectl", "run", "--dbus", "What is the capital of France?", "--temperature", "0")
    assert said == PARIS, said
    unit = shown("Id", "dbus.service")
    print(f"#  the bus is {unit}'s")
    assert unit == os.environ.get("BUS", "dbus") + ".service", unit


def another_user_manages_conversations_if_polkit_says_so_and_only_then():
    if not os.path.isdir("/usr/share/polkit-1/actions") or not shutil.which("pkcheck"):
        print("#  not tried: no polkit here")
        return
    session, uid = new_session("alice"), str(pwd.getpwnam("alice").pw_uid)
    listing = ("call", "org.sparsed1", MANAGER_PATH, MANAGER, "ListSessionsOf", "u", uid)
    said = called("bob", *listing, check=False)
    assert "ccess denied" in said, said
    is_old = os.path.isdir(os.path.dirname(OLD_RULE)) and not os.path.isdir(os.path.dirname(RULE))
    path = OLD_RULE if is_old else RULE
    with open(path, "w") as file:
        if is_old:
            file.write(f"[bob]\nIdentity=unix-user:bob\nAction={ACTION}\nResultAny=yes\n")
        else:
            condition = f'action.id == "{ACTION}" && who.user == "bob"'
            file.write(f'polkit.addRule(function(action, who) {{ if ({condition}) return "yes"; }});\n')
    os.chmod(path, 0o644)
    try:
        run("systemctl", "restart", "polkit.service")
        until("bob may", lambda: session in called("bob", *listing, check=False))
        said = called("mallory", *listing, check=False)
        assert "ccess denied" in said, said
    finally:
        os.remove(path)
    run("systemctl", "restart", "polkit.service")
    until("bob may not any more", lambda: "ccess denied" in called("bob", *listing, check=False))


def a_model_comes_by_the_bus_into_the_store_of_the_confined_service():
    pull = ["sparsectl", "model", "pull", "--dbus", f"file:{MODEL}", "--name", "again"]
    said = run(*as_user("alice"), *pull, check=False)
    assert "is not allowed" in said, said
    said = run(*pull)
    assert "store:again" in said, said
    said = run("sparsectl", "model", "verify", "again")
    assert "again: whole" in said, said
    run("sparsectl", "model", "rm", "again")
    run("sparsectl", "model", "gc")


def restart_for_a_broker():
    """The service with a broker on this box, which does not run yet, and with the drop-in for networks."""
    with open(NETWORK) as file:
        drop_in = file.read()
    restart(config='[mqtt]\nbroker = "mqtt://localhost"\nnode = "kitchen"\n', drop_in=drop_in)


@contextlib.contextmanager
def all_doors():
    """The service on each door that the box has: with a broker, if there is one."""
    if not shutil.which("mosquitto"):
        print("#  without MQTT: no mosquitto here")
        yield restart()
        return
    run("systemctl", "start", "mosquitto.service")
    try:
        restart_for_a_broker()
        status = ["mosquitto_sub", "-h", "localhost", "-t", "sparsed/v1/kitchen/status", "-C", "1", "-W", "20"]
        until("it is on MQTT", lambda: "online" in run(*status, check=False))
        yield
    finally:
        run("systemctl", "stop", "mosquitto.service")
        restart()


def a_chat_is_answered_by_a_broker_with_the_drop_in_for_networks():
    if not shutil.which("mosquitto"):
        print("#  not tried: no mosquitto here")
        return
    restart_for_a_broker()
    until("it says that there is no broker", lambda: "no connection to the MQTT broker" in journal())
    run("systemctl", "start", "mosquitto.service")
    request = json.dumps({"id": "q1", "body": CAPITAL})
    ask = ["mosquitto_rr", "-V", "5", "-h", "localhost", "-i", "lamp", "-q", "1", "-W", "20", "-m", request]
    ask += ["-t", "sparsed/v1/kitchen/req/lamp/chat", "-e", "sparsed/v1/kitchen/res/lamp/q1"]
    def final():
        lines = run(*ask, check=False).splitlines()
        return next((json.loads(line) for line in lines if '"kind":"final"' in line), None)

    # Asked again until the node has subscribed; the same id has the same answer.
    answer = until("an answer", final)
    assert answer["text"] == PARIS, answer
    run("systemctl", "stop", "mosquitto.service")
    restart()


CHECKS = [
    a_chat_is_answered_on_the_bus_of_the_system,
    another_user_manages_conversations_if_polkit_says_so_and_only_then,
    a_model_comes_by_the_bus_into_the_store_of_the_confined_service,
    a_chat_is_answered_by_a_broker_with_the_drop_in_for_networks,
]
