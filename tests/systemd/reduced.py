"""Does sparsed serve where something is missing? Each time it starts, says what is reduced, and answers.

What is missing is taken away by a drop-in of the service; the journal's words are of the daemon that has started then.
"""

import os
import pwd

from advice import checks, typed
from box import (
    CAPITAL, PARIS, ask, group_file, last_message, new_session, restart, run, served, shown, text_of, until, until_ready,
)

FSTAB = "/etc/fstab"
MODEL = "/usr/share/sparsed/models/smollm2-135m-dsa.gguf"
# Calls that are refused look as on a kernel that does not have them.
MISSING_CALL = "[Service]\nSystemCallErrorNumber=ENOSYS\nSystemCallFilter=~{}\n"


def journal_of_this_start():
    return run("journalctl", "--no-pager", "-o", "verbose", f"_SYSTEMD_INVOCATION_ID={shown('InvocationID')}")


def is_served_without(what, says, drop_in="", config=""):
    """Starts it so, and looks for the words."""
    restart(config=config, drop_in=drop_in)
    session = served("alice", "/v1/sessions", {})["id"]
    said = text_of(served("alice", "/v1/chat/completions", {**CAPITAL, "session_id": session}))
    assert said == PARIS, f"without {what}: {said}"
    lines = journal_of_this_start()
    assert says in lines, f"without {what} nothing says {says!r}: {lines[-3000:]}"


def without_stall_information_it_looks_at_memory_by_itself():
    own = group_file("memory.pressure")
    hidden = f"[Service]\nMemoryPressureWatch=skip\nInaccessiblePaths=-/proc/pressure -{own}\n"
    is_served_without("PSI", "the system tells of no stalls", hidden)


def without_control_groups_it_hears_of_the_machines_stalls():
    hidden = "[Service]\nMemoryPressureWatch=skip\nInaccessiblePaths=-/sys/fs/cgroup\n"
    source = "/proc/pressure/memory" if os.path.exists("/proc/pressure/memory") else "the system tells of no stalls"
    is_served_without("cgroups", source, hidden)


def without_io_uring_slow_rows_are_read_by_threads():
    # So little memory that there is a slow tier.
    small = '[memory]\nbudget = "56MiB"\nslow_tier = "all"\nhot_share = 0\n'
    small += "[limits]\nmax_running = 4\nmax_batched_tokens = 64\n"
    is_served_without("io_uring", "io_uring cannot be used", MISSING_CALL.format("io_uring_setup"), small)


def without_landlock_a_plugins_process_is_confined_less_and_says_so():
    config = '[engine]\nisolation = "process"\n'
    is_served_without("Landlock", "no Landlock", MISSING_CALL.format("landlock_create_ruleset"), config)


def without_a_bus_it_serves_the_socket_and_tries_again():
    is_served_without("D-Bus", "not on D-Bus", "[Service]\nInaccessiblePaths=-/run/dbus\n")


def without_a_network_it_serves_the_socket_and_looks_for_its_broker():
    is_served_without("a network", "no connection to the MQTT broker", config='[mqtt]\nbroker = "mqtt://localhost"\n')


def without_the_partition_of_its_state_it_serves_the_rest_and_has_conversations_once_that_is_mounted():
    # It wants what is no option of a tmpfs, so that mounting fails as where a disk is away.
    line, mount = "state /var/lib/sparsed tmpfs nofail,size=2G,{} 0 0\n", "var-lib-sparsed.mount"
    owner = pwd.getpwnam("sparsed")
    restart()
    session = new_session()
    with open(FSTAB) as file:
        before = file.read()
    try:
        with open(FSTAB, "a") as file:
            file.write(line.format("nosuchoption"))
        restart()
        assert shown("Result", mount) != "success", shown("Result", mount)
        assert "is not mounted" in journal_of_this_start()
        assert text_of(served("alice", "/v1/chat/completions", CAPITAL)) == PARIS
        status, value = ask("alice", "/v1/sessions", {})
        assert (status, value["error"]["code"]) == (503, "sessions_away"), f"{status} {value}"
        # The catalogue sends whoever reads the log to the doctor.
        found = checks()
        assert all(found[name]["verdict"] == "fail" for name in ("state folder", "sessions")), found
        assert "is not mounted" in found["state folder"]["found"] and "disk speed" not in found, found
        # Nor is a model put where the partition would hide it.
        said = run("sparsectl", "model", "pull", f"file:{MODEL}", "--name", "below", check=False)
        assert "is not mounted" in said and not os.path.exists("/var/lib/sparsed/models/names/below.json"), said
        # A fresh partition: its top is root's, and for everybody to read.
        with open(FSTAB, "w") as file:
            file.write(before + line.format("mode=0755"))
        run("systemctl", "daemon-reload")
        typed(found["state folder"]["fix"])
        until("conversations are kept", lambda: ask("alice", "/v1/sessions", {})[0] == 201)
        found = checks()
        assert found["state folder"]["verdict"] == "ok" and "sessions" not in found, found
        stat = os.stat("/var/lib/sparsed")
        assert (stat.st_uid, stat.st_mode & 0o777) == (owner.pw_uid, 0o700), oct(stat.st_mode)
        # Those of the partition, not those that lie below it.
        assert ask("alice", f"/v1/sessions/{session}")[0] == 404
    finally:
        run("systemctl", "stop", "sparsed.service", mount)
        with open(FSTAB, "w") as file:
            file.write(before)
        restart()
    stat = os.stat("/var/lib/sparsed")
    assert stat.st_mode & 0o777 == 0o700, oct(stat.st_mode)
    assert ask("alice", f"/v1/sessions/{session}")[0] == 200


def on_a_root_of_which_only_the_state_folder_can_be_written_it_serves_and_keeps_conversations():
    for folder in ("/", "/etc", "/usr", "/var", "/var/lib"):
        said = run("touch", f"{folder}/new", check=False)
        assert "Read-only file system" in said, f"{folder} can be written: {said}"
    until_ready()
    session = new_session()
    said = text_of(served("alice", "/v1/chat/completions", {**CAPITAL, "session_id": session}))
    assert said == PARIS, said
    run("systemctl", "restart", "sparsed.service")
    until_ready()
    assert last_message(session) == PARIS


CHECKS = [
    without_stall_information_it_looks_at_memory_by_itself,
    without_control_groups_it_hears_of_the_machines_stalls,
    without_io_uring_slow_rows_are_read_by_threads,
    without_landlock_a_plugins_process_is_confined_less_and_says_so,
    without_a_bus_it_serves_the_socket_and_tries_again,
    without_a_network_it_serves_the_socket_and_looks_for_its_broker,
    without_the_partition_of_its_state_it_serves_the_rest_and_has_conversations_once_that_is_mounted,
]

# Where the box has booted so.
READ_ONLY_CHECKS = [on_a_root_of_which_only_the_state_folder_can_be_written_it_serves_and_keeps_conversations]
