"""Does what the installed tutorials tell an operator to type work on the real service manager?

What is in no `sh` block: those are run by tests/e2e/ops/tutorials.rs, where the service manager is a stand-in.
"""

import os
import re

from box import DROP_INS, new_session, pid, restart, run, served, shown, until, until_ready, wish

TUTORIALS = "/usr/share/doc/sparsed/tutorials"
MIB = 1 << 20


def page(name):
    with open(f"{TUTORIALS}/{name}") as file:
        return file.read()


def typed(command):
    """What a root says who types it: there need be no sudo in the box, and no pager is waited for."""
    return run("bash", "-euc", f'export SYSTEMD_PAGER=; sudo() {{ "$@"; }}\n{command}')


def the_operators_searches_of_the_journal_find_what_they_promise():
    # There is no broker: a warning to be found.
    restart(config='[mqtt]\nbroker = "mqtt://localhost"\nnode = "kitchen"\n')
    session = new_session()
    answered = served("alice", "/v1/chat/completions", wish("Say hi.", 10, session))
    searches = re.findall(r"^\| `(journalctl [^`]+)` \|", page("operators.md"), re.M)
    assert len(searches) == 4, searches
    for search in searches:
        command = search.replace("chatcmpl-...", answered["id"]).replace("sess_...", session)
        assert "..." not in command, command
        found = until(command, lambda: "-- No entries --" not in typed(command) and typed(command))
        # Its one line says how the request has ended.
        assert "SPARSED" not in search or "request answered" in found, f"{command}: {found}"
        if search.endswith(" -x"):
            assert "Subject: " in found, f"{command}: {found[-1000:]}"
            # So stand fields that are not there.
            bare = [line for line in found.splitlines() if "SPARSED_" in line]
            assert not bare, f"{command}: {bare[:5]}"
    restart()


def the_operators_bound_on_memory_is_taken():
    restart()
    commands = re.findall(r"`sudo (systemctl set-property [^`]+)`", page("operators.md"))
    assert len(commands) == 1, commands
    old = pid()
    try:
        typed(commands[0])
        bounds = [int(shown(key)) for key in ("MemoryHigh", "MemoryMax")]
        assert bounds == [2048 * MIB, 2500 * MIB], bounds
        assert pid() == old, "the service was restarted"
    finally:
        run("systemctl", "revert", "sparsed.service")
        restart()


def the_tutorials_drop_in_for_networks_gives_the_service_one():
    restart()
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", page("mqtt-home-assistant.md"), re.M | re.S)
    blocks = [text for language, text in fenced if not language]
    assert len(blocks) == 1 and "network.conf" in blocks[0], blocks
    assert shown("PrivateNetwork") == "yes"
    try:
        typed(blocks[0])
        until_ready()
        assert shown("PrivateNetwork") == "no"
    finally:
        os.remove(f"{DROP_INS}/network.conf")
        restart()
    assert shown("PrivateNetwork") == "yes"


CHECKS = [
    the_operators_searches_of_the_journal_find_what_they_promise,
    the_operators_bound_on_memory_is_taken,
    the_tutorials_drop_in_for_networks_gives_the_service_one,
]
