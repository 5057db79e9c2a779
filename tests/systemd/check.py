"""Does sparsed keep its promises as a service of systemd? Runs as root in a box whose PID 1 is systemd.

One line for each claim, in order: "ok claim" or "not ok claim: why". Exit 1 if one fails. Arguments are words of the
names of claims: only those with one of them are tried. Users alice and bob are in
the group sparsed, mallory is not; the packages in PACKAGES are installed and the box has booted, nothing else was done.
"""

import contextlib
import glob
import json
import os
import pwd
import re
import shutil
import signal
import sys
import threading
import time

import advice
import doors
import long
import reduced
import shells
import tutorials
import upgrade
from box import (
    CAPITAL, CONFIG, DROP_INS, PARIS, a_story_that_has_begun, answer, as_user, ask, called, curl, events, group_file, heard,
    is_active, journal, last_message, new_session, pid, restart, run, served, shown, state_of, systemd_version, text_of,
    until, until_ready, wish,
)

# Where the packages lie in the box, and one that is not installed.
PACKAGES = "/opt/packages"
PLUGIN = "/opt/plugin"
KIND = os.environ.get("PACKAGES", "deb")
PACKAGE_NAMES = ("sparsed", "sparsed-model-smollm2-dsa")
UNITS = ("sparsed.service", "sparsed.socket", "sparsed-tcp.socket")
MODEL = "/usr/share/sparsed/models/smollm2-135m-dsa.gguf"
MANAGER_PATH, MANAGER = "/org/sparsed1", "org.sparsed1.Manager"
# What the service may hold before a model is loaded.
RESIDENT_KIB = 30 << 10
# For how many seconds it is watched while nobody asks, and what it may do then: of a processor, and wakeups per second.
IDLE_S = 30
IDLE_SHARE = 0.001
IDLE_WAKEUPS = 2
# Seconds from a SIGKILL to the next daemon that listens, or from a hang to it: RestartSec and the watchdog included.
RESTART_S = 15
# Highest exposure that systemd-analyze may see, in tenths.
EXPOSURE_TENTHS = 12
# With the devices of an accelerator.
EXPOSURE_TENTHS_ACCELERATOR = 19
ACCELERATORS = "/usr/share/sparsed/accelerators"
# A system call that the filter refuses is deadly, so that none can be missed unseen.
STRICT = "[Service]\nSystemCallErrorNumber=kill\n"
# With this much memory for KV rows 29 of the default model's blocks are fast and 65 slow, of 64 tokens each.
SMALL = '[memory]\nbudget = "56MiB"\nslow_tier = "all"\nhot_share = 0\n[limits]\nmax_running = 4\nmax_batched_tokens = 64\n'


def of_the_service(name):
    """This file of `/proc` of each process of the service."""
    with open(group_file("cgroup.procs")) as listed:
        paths = [f"/proc/{line.strip()}/{name}" for line in listed]
    texts = []
    for path in paths:
        with open(path) as file:
            texts.append(file.read())
    return texts


def commands_of_the_service():
    """The command line of each process of the service."""
    return [command.replace("\0", " ").strip() for command in of_the_service("cmdline")]


def is_confined(tenths):
    """Whether the service as it is set up now is exposed that little; None where systemd-analyze has no threshold."""
    if systemd_version() < 250:
        return None
    run("systemd-analyze", "security", "--no-pager", f"--threshold={tenths}", "sparsed.service")
    return True


def the_units_are_valid_and_confined_enough():
    further = ["sparsed-tcp.socket", "sparsed-devices.service", "sparsed-state.service"]
    for manager, more in (("--system", further), ("--user", [])):
        command = ["env", "XDG_RUNTIME_DIR=/run", "systemd-analyze", manager, "verify", "--man=no"]
        complaints = run(*command, "sparsed.service", "sparsed.socket", *more)
        # An older systemd says so of what it does not know; there is one place for that.
        newer = [line for line in complaints.splitlines() if "10-newer-systemd.conf" in line and "nknown" in line]
        # Of the system's own units an older one says much, too.
        others = [line for line in complaints.splitlines() if "sparsed" in line and line not in newer]
        if systemd_version() < 250:
            # It takes what `Alias=` makes for suspicious, and as an alias all the same.
            others = [line for line in others if not re.search("Suspicious symlink .*, treating as alias", line)]
        assert not others, f"{manager}: {others}"
        assert not newer or systemd_version() < 254, newer
    if not is_confined(EXPOSURE_TENTHS):
        print("#  exposure not measured: systemd-analyze has no threshold before 250")


def with_the_drop_in_of_each_accelerator_the_service_starts_and_is_confined_enough():
    for name in sorted(os.listdir(ACCELERATORS)):
        path = f"{ACCELERATORS}/{name}"
        if name.endswith(".rules"):
            if systemd_version() >= 254:
                run("udevadm", "verify", path)
            continue
        with open(path) as file:
            drop_in = file.read()
        for line in drop_in.splitlines():
            key, _, groups = line.partition("=")
            for group in groups.split() if key == "SupplementaryGroups" else []:
                run("groupadd", "--force", group)
        restart(drop_in=drop_in)
        is_confined(EXPOSURE_TENTHS_ACCELERATOR)
        assert text_of(served("alice", "/v1/chat/completions", CAPITAL)) == PARIS, name


def a_device_that_comes_has_a_service_that_runs_restarted():
    # No udev here, which would want this unit.
    restart()
    old = pid()
    run("systemctl", "start", "sparsed-devices.service")
    until("another daemon", lambda: pid() not in (0, old))
    until_ready()
    run("systemctl", "stop", "sparsed.service")
    run("systemctl", "start", "sparsed-devices.service")
    assert not is_active(), "it was started"
    restart()


def the_tcp_socket_is_opt_in_and_asks_for_a_key():
    if systemd_version() < 247:
        print("#  not tried: systemd has no credentials before 247")
        return
    assert run("systemctl", "is-enabled", "sparsed-tcp.socket", check=False) == "disabled"
    keys = "/etc/sparsed/api-keys"
    with open(os.open(keys, os.O_WRONLY | os.O_CREAT, 0o600), "w") as file:
        file.write("hall 0123456789abcdef0123456789abcdef\n")
    run("systemctl", "stop", "sparsed.service")
    run("systemctl", "start", "sparsed-tcp.socket")
    restart(drop_in=f"[Service]\nLoadCredential=sparsed.api-keys:{keys}\n")
    address = "http://127.0.0.1:11535"
    status, value = ask("mallory", "/v1/models", door=(address,))
    assert status == 401, f"{status} {value}"
    door = ("-H", "Authorization: Bearer 0123456789abcdef0123456789abcdef", "-H", "Content-Type: application/json", address)
    said = text_of(served("mallory", "/v1/chat/completions", CAPITAL, door=door))
    assert said == PARIS, said
    # It is taken back: after a reload either that holds, or the log does not claim it.
    with open(keys, "w") as file:
        file.write("hall fedcba9876543210fedcba9876543210\n")
    told = journal().count("configuration reloaded")
    run("systemctl", "reload", "sparsed.service")
    until("it has reloaded", lambda: journal().count("configuration reloaded") > told)
    last = journal().rpartition("configuration reloaded")[2]
    is_good = ask("mallory", "/v1/models", door=door)[0] == 200
    assert is_good == ("a restart is needed for API keys" in last), last
    run("systemctl", "restart", "sparsed.service")
    until_ready()
    assert ask("mallory", "/v1/models", door=door)[0] == 401
    run("systemctl", "stop", "sparsed.service", "sparsed-tcp.socket")
    os.remove(keys)
    restart()


def a_user_has_a_service_of_his_own():
    uid = pwd.getpwnam("mallory").pw_uid
    run("systemctl", "start", f"user@{uid}.service")
    own = [*as_user("mallory"), f"XDG_RUNTIME_DIR=/run/user/{uid}", "HOME=/home/mallory", "systemctl", "--user"]
    # Who has not enabled it gets none by a call.
    bus = [*own[:-2], f"DBUS_SESSION_BUS_ADDRESS=unix:path=/run/user/{uid}/bus", "SYSTEMD_LOG_TARGET=console", "busctl"]
    bus += ["--user", "get-property", "org.sparsed1", MANAGER_PATH, MANAGER, "Version"]
    said = run(*bus, check=False)
    assert not said.startswith('s "'), said
    assert run(*own, "is-active", "sparsed.service", check=False) == "inactive"
    run(*own, "start", "sparsed.socket")
    door = ("--unix-socket", f"/run/user/{uid}/sparsed/api.sock", "http://localhost")
    until("his model is loaded", lambda: ask("mallory", "/health", door=door)[0] == 200)
    assert text_of(served("mallory", "/v1/chat/completions", CAPITAL, door=door)) == PARIS
    assert os.path.isdir("/home/mallory/.local/state/sparsed"), "his state is elsewhere"
    status, value = ask("alice", "/v1/models", door=door)
    assert status == 0, f"alice: {status} {value}"
    run(*own, "stop", "sparsed.service", "sparsed.socket")
    run(*own, "enable", "sparsed.service")
    assert run(*bus).startswith('s "')
    run(*own, "disable", "--now", "sparsed.service", "sparsed.socket")
    run("systemctl", "stop", f"user@{uid}.service")
    run("rm", "-rf", "/home/mallory/.local", "/home/mallory/.config")


def after_the_installation_and_a_boot_the_service_answers_and_the_doctor_finds_nothing():
    until_ready()
    assert is_active()
    said = run(*as_user("alice"), "sparsectl", "run", "What is the capital of France?", "--temperature", "0")
    assert said == PARIS, said
    checks = doctors_checks(*as_user("sparsed"), "HOME=/var/lib/sparsed")
    # Who is no more than in the group is told of the same service, and of no other state folder.
    checks += doctors_checks(*as_user("alice"), "HOME=/home/alice")
    wrong = [check for check in checks if check["verdict"] == "fail" or "/home/" in check["found"]]
    assert not wrong, wrong
    assert os.path.exists("/usr/share/man/man8/sparsed.8.gz"), "no manual page"


def the_socket_is_there_before_the_service_and_the_first_request_starts_it():
    run("systemctl", "stop", "sparsed.service")
    assert run("systemctl", "is-active", "sparsed.socket") == "active"
    assert not is_active(), "the service runs still"
    status, value = ask("alice", "/v1/models")
    assert status == 200, value
    until_ready()
    assert is_active()
    until("the status", lambda: shown("StatusText") == "serving on cpu")


def a_chat_is_answered():
    said = text_of(served("alice", "/v1/chat/completions", CAPITAL))
    assert said == PARIS, said


def who_is_not_in_the_group_is_refused_by_the_sockets_mode():
    status, value = ask("mallory", "/v1/models")
    assert status == 0 and "onnect" in value, f"{status} {value}"
    stat = os.stat("/run/sparsed/api.sock")
    assert stat.st_mode & 0o777 == 0o660, oct(stat.st_mode)


def two_users_see_their_own_sessions_only():
    of_alice, of_bob = new_session("alice"), new_session("bob")
    for user, own, other in (("alice", of_alice, of_bob), ("bob", of_bob, of_alice)):
        listed = [session["id"] for session in served(user, "/v1/sessions")["data"]]
        assert own in listed and other not in listed, f"{user}: {listed}"
        status, value = ask(user, f"/v1/sessions/{other}")
        assert status == 404, f"{user}: {status} {value}"


def a_call_on_the_bus_starts_the_service_and_its_users_are_told_apart():
    run("systemctl", "stop", "sparsed.service")
    version = called("alice", "get-property", "org.sparsed1", MANAGER_PATH, MANAGER, "Version")
    assert version.startswith('s "'), version
    until_ready()
    path = called("alice", "call", "org.sparsed1", MANAGER_PATH, MANAGER, "CreateSession", "a{sv}", "0").split('"')[1]
    for user, sees in (("alice", True), ("bob", False)):
        listed = called(user, "call", "org.sparsed1", MANAGER_PATH, MANAGER, "ListSessions")
        assert (path in listed) == sees, f"{user}: {listed}"
    said = called("bob", "call", "org.sparsed1", path, "org.sparsed1.Session", "Delete", check=False)
    assert "there is no session" in said, f"bob deletes alice's: {said!r}"
    uid = str(pwd.getpwnam("alice").pw_uid)
    said = called("bob", "call", "org.sparsed1", MANAGER_PATH, MANAGER, "ListSessionsOf", "u", uid, check=False)
    # Where polkit allows it to nobody but root may; busctl has words of its own for it.
    assert "ccess denied" in said, f"bob lists alice's: {said!r}"
    assert path.rsplit("/", 1)[1] in called("root", "call", "org.sparsed1", MANAGER_PATH, MANAGER, "ListSessionsOf", "u", uid)
    said = called("mallory", "get-property", "org.sparsed1", MANAGER_PATH, MANAGER, "Version", check=False)
    assert "ccess denied" in said, f"mallory asks: {said!r}"
    called("alice", "call", "org.sparsed1", path, "org.sparsed1.Session", "Delete")


def what_an_operator_has_switched_off_is_not_started_by_a_call_on_the_bus():
    version = ("get-property", "org.sparsed1", MANAGER_PATH, MANAGER, "Version")
    run("systemctl", "disable", "--now", "sparsed.service", "sparsed.socket")
    said = called("alice", *version, check=False)
    assert not said.startswith('s "') and not is_active(), said
    run("systemctl", "enable", "sparsed.service")
    assert called("alice", *version).startswith('s "')
    run("systemctl", "enable", "--now", "sparsed.socket")
    until_ready()


def after_a_kill_a_session_goes_on_alike_and_no_client_is_refused():
    session, whole, stream, before = a_story_that_has_begun()
    old = pid()
    os.kill(old, signal.SIGKILL)
    killed = time.monotonic()
    stream.communicate()
    assert whole.startswith(before), f"{before!r} is not the beginning of {whole!r}"
    # It connects while nothing runs.
    status, value = ask("bob", "/v1/models")
    assert status == 200, f"who came meanwhile: {status} {value}"
    until_ready()
    print(f"#  served again {time.monotonic() - killed:.1f} s after the kill")
    assert pid() != old and state_of(session) == "interrupted"
    again = text_of(served("alice", f"/v1/sessions/{session}/continue", {}))
    assert again == whole, f"{again!r} instead of {whole!r}"


def a_daemon_that_hangs_is_killed_by_the_watchdog_and_started_again():
    restart(drop_in="[Service]\nWatchdogSec=3\nTimeoutAbortSec=3\n")
    old, restarts = pid(), int(shown("NRestarts"))
    os.kill(old, signal.SIGSTOP)
    hung = time.monotonic()
    until("a restart", lambda: int(shown("NRestarts")) > restarts, RESTART_S)
    until_ready()
    print(f"#  served again {time.monotonic() - hung:.1f} s after the hang, WatchdogSec=3")
    assert pid() != old
    assert "Watchdog timeout" in journal()


def a_stop_in_the_middle_of_an_answer_is_orderly_and_the_answer_goes_on_after_the_start():
    restart(config="[limits]\nstop_s = 1\n")
    session = new_session()
    stream = curl("alice", "/v1/chat/completions", wish("Tell me a long story.", 1500, session, True))
    before = heard(stream, 20)
    began = time.monotonic()
    run("systemctl", "stop", "sparsed.service")
    took = time.monotonic() - began
    # stop_s, two seconds for the last bytes, and one for a busy machine.
    assert took < 5, f"the stop took {took:.1f} s"
    before += "".join(events(stream))
    stream.communicate()
    assert shown("Result") == "success", shown("Result")
    assert os.path.exists("/run/sparsed/api.sock"), "the socket went with the service"
    # The socket starts it again.
    until_ready()
    assert state_of(session) == "interrupted", state_of(session)
    stream = curl("alice", f"/v1/sessions/{session}/continue", {"stream": True})
    after = ""
    for piece in events(stream):
        after += piece
        if len(after) > len(before) + 100:
            break
    stream.kill()
    stream.communicate()
    assert after.startswith(before), f"{after!r} does not begin with {before!r}"
    assert len(after) > len(before), "nothing came after what was said before the stop"


def answers_may_end_at_a_stop_that_takes_longer_than_the_units_own_limit():
    restart(config="[limits]\nstop_s = 50\n", drop_in="[Service]\nTimeoutStopSec=1\n")
    session, whole, stream, before = a_story_that_has_begun()
    run("systemctl", "stop", "sparsed.service")
    said = before + "".join(events(stream))
    stream.communicate()
    assert said == whole, f"{said!r} instead of {whole!r}"
    assert shown("Result") == "success", shown("Result")


def entries(*matches):
    """Lines of the journal as objects."""
    return [json.loads(line) for line in run("journalctl", "--no-pager", "-o", "json", *matches).splitlines()]


def a_reload_takes_up_what_it_can_and_the_journal_explains_it():
    is_told = systemd_version() >= 253
    restart(drop_in="[Service]\nType=notify-reload\nExecReload=\n" if is_told else "")
    old = pid()
    with open(CONFIG, "w") as file:
        file.write("[limits]\nmax_waiting = 7\nconnections = 100\n")
    run("systemctl", "reload", "sparsed.service")

    def changes():
        return [entry for entry in entries("-u", "sparsed.service") if entry["MESSAGE"].startswith("configuration reloaded")]

    # With this type, which older versions do not know, the reload is over when the command is.
    told = changes() if is_told else until("it is told", changes)
    assert len(told) == 1 and "limits.max_waiting = 7 (was 256)" in told[0]["SPARSED_CHANGES"], told
    assert "a restart is needed for limits.connections = 100" in told[0]["MESSAGE"], told[0]["MESSAGE"]
    explained = run("journalctl", "--no-pager", "-x", f"MESSAGE_ID={told[0]['MESSAGE_ID']}")
    assert "Subject: The configuration was read again" in explained, explained
    # "listening".
    explained = run("journalctl", "--no-pager", "-x", "MESSAGE_ID=9fb93534081c4253b1e273a87984a8ab")
    assert "The daemon takes requests at /run/sparsed/api.sock." in explained, explained
    restart()
    with open(CONFIG, "w") as file:
        file.write("[limits]\nmax_waitin = 7\n")
    run("systemctl", "reload", "sparsed.service")
    until("the mistake is told", lambda: "did you mean 'limits.max_waiting'" in journal())
    assert is_active() and pid() != old
    with open(CONFIG, "w") as file:
        file.write("")


def doctors_checks(*before):
    """What the doctor finds; behind its checks it may say that some have failed."""
    return json.JSONDecoder().raw_decode(run(*before, "sparsectl", "doctor", "--json", check=False))[0]


def who_waits_for_a_service_whose_configuration_is_wrong_hears_so_and_once_mended_it_answers():
    with open(CONFIG, "w") as file:
        file.write("[limits]\nmax_waitin = 7\n")
    run("systemctl", "restart", "sparsed.service", check=False)
    # More often than a start limit of systemd's would let it be started.
    for _ in range(30):
        status, value = ask("alice", "/v1/models")
        assert (status, value["error"]["code"]) == (503, "misconfigured"), f"{status} {value}"
    wrong = next(check for check in doctors_checks() if check["check"] == "configuration")
    assert "did you mean" in wrong["found"] and CONFIG in wrong["fix"], wrong
    with open(CONFIG, "w") as file:
        file.write("")
    run("systemctl", "restart", "sparsed.service")
    until_ready()
    assert run("systemctl", "is-active", "sparsed.socket") == "active"


def the_doctor_sees_what_the_service_may_not_read_and_does_not_wait_for_one_that_does_not_start():
    hidden = "/etc/sparsed/conf.d/hidden.toml"
    os.makedirs(os.path.dirname(hidden), exist_ok=True)
    with open(hidden, "w") as file:
        file.write("[limits]\nmax_waiting = 9\n")
    os.chmod(hidden, 0o600)
    wrong = next(check for check in doctors_checks() if check["check"] == "configuration")
    assert wrong["verdict"] == "fail" and f"chmod a+rX {hidden}" in wrong["fix"], wrong
    run("sh", "-c", wrong["fix"].replace("sudo ", ""))
    until_ready()
    os.unlink(hidden)
    restart("[engine]\nplugin = \"nowhere\"\n", ready=False)
    wrong = next(check for check in doctors_checks() if check["check"] == "daemon")
    assert wrong["verdict"] == "fail" and "does not start" in wrong["found"], wrong
    restart()


def a_request_is_found_by_its_id_and_what_was_said_is_not_in_the_journal():
    answered = served("alice", "/v1/chat/completions", CAPITAL)
    found = until("the request is in the journal", lambda: entries(f"SPARSED_REQUEST_ID={answered['id']}"))
    alice = str(pwd.getpwnam("alice").pw_uid)
    assert [(entry["SPARSED_OWNER"], entry["SPARSED_MODEL"]) for entry in found] == [(alice, "default")], found
    said = journal()
    assert "capital of France" not in said and PARIS not in said


def a_plugin_in_a_process_of_its_own_answers_in_the_sandbox():
    restart(config='[engine]\nisolation = "process"\n', drop_in=STRICT)
    assert text_of(served("alice", "/v1/chat/completions", CAPITAL)) == PARIS
    hosts = [command for command in commands_of_the_service() if "plugin-host" in command]
    assert len(hosts) == 1, f"plugin hosts: {hosts}"
    assert is_active() and int(shown("NRestarts")) == 0, shown("NRestarts")


def without_a_loaded_model_the_service_is_small():
    for isolation in ("none", "process"):
        model = f'[model.default]\npath = "{MODEL}"\nload = "demand"\n'
        restart(config=f'[engine]\nisolation = "{isolation}"\n{model}')
        until("the device is open", lambda: served("alice", "/v1/status")["device"]["state"] == "ready")
        lines = [line for text in of_the_service("status") for line in text.splitlines() if line.startswith("VmRSS:")]
        resident = sum(int(line.split()[1]) for line in lines)
        print(f"#  {resident} KiB resident in {len(lines)} processes, isolation {isolation}")
        # What two processes have in common counts twice.
        assert resident < RESIDENT_KIB, f"{isolation}: {lines}"
        assert text_of(served("alice", "/v1/chat/completions", CAPITAL)) == PARIS


def used_by_the_service():
    """Ticks of CPU time that its processes used so far, and how often a thread of theirs went to sleep."""
    ticks = sum(int(field) for text in of_the_service("stat") for field in text.rpartition(")")[2].split()[11:13])
    sleeps = 0
    for process in of_the_service("status"):
        pid = re.search(r"^Pid:\s+(\d+)", process, re.M)[1]
        for thread in glob.glob(f"/proc/{pid}/task/*/status"):
            with open(thread) as file:
                sleeps += int(re.search(r"^voluntary_ctxt_switches:\s+(\d+)", file.read(), re.M)[1])
    return ticks, sleeps


def on_all_doors_with_a_loaded_model_that_nobody_asks_the_service_sleeps():
    with doors.all_doors():
        assert text_of(served("alice", "/v1/chat/completions", CAPITAL)) == PARIS
        # The first seconds after an answer belong to it.
        time.sleep(5)
        ticks, sleeps = used_by_the_service()
        time.sleep(IDLE_S)
        used, woken = (after - before for after, before in zip(used_by_the_service(), (ticks, sleeps)))
    print(f"#  {used} ticks of {os.sysconf('SC_CLK_TCK')} a second and {woken} wakeups in {IDLE_S} s")
    assert used <= IDLE_SHARE * IDLE_S * os.sysconf("SC_CLK_TCK"), f"{used} ticks in {IDLE_S} s"
    assert woken <= IDLE_WAKEUPS * IDLE_S, f"{woken} wakeups in {IDLE_S} s"


def slow_rows_are_read_in_the_sandbox_and_the_answers_are_the_same():
    restart()
    # Some 2900 tokens together.
    wishes = [wish(f"Some words of text {name}. " * 190, 20) for name in ("one", "two", "three")]
    roomy = [text_of(served("alice", "/v1/chat/completions", request)) for request in wishes]
    restart(config=SMALL, drop_in=STRICT)
    processes = [curl("alice", "/v1/chat/completions", request) for request in wishes]
    slow = 0
    while any(process.poll() is None for process in processes):
        slow = max(slow, served("bob", "/v1/status")["models"][0]["kv_blocks_slow"])
        time.sleep(0.1)
    tight = [answer(process) for process in processes]
    assert [status for status, _ in tight] == [200] * len(wishes), tight
    assert [text_of(json.loads(text)) for _, text in tight] == roomy
    assert slow > 0, "no block was slow"
    assert int(shown("NRestarts")) == 0, shown("NRestarts")
    reader = "threads, without io_uring" if "read by threads" in journal() else "io_uring"
    print(f"#  {slow} blocks were slow, read by {reader}")


def a_session_under_a_credential():
    """The key's file, a session that it protects, and that one's last message."""
    key = "/etc/sparsed/master.key"
    with open(os.open(key, os.O_WRONLY | os.O_CREAT, 0o600), "wb") as file:
        file.write(os.urandom(32))
    credential = f"[Service]\nLoadCredential=sparsed.master-key:{key}\n"
    # A conversation of another key would have it refused. The key that the package's first start has made does not.
    run("systemctl", "stop", "sparsed.service")
    run("rm", "-rf", "/var/lib/sparsed/store")
    restart(drop_in=credential)
    run("rm", "-f", "/var/lib/sparsed/master.key")
    session = new_session()
    first = text_of(served("alice", "/v1/chat/completions", wish("Say hi.", 10, session)))
    restart(drop_in=credential)
    assert last_message(session) == first
    assert not os.path.exists("/var/lib/sparsed/master.key"), "a key was made beside the credential"
    return key, session, first


def the_master_key_may_be_a_credential_plain_or_encrypted():
    if systemd_version() < 247:
        print("#  not tried: systemd has no credentials before 247")
        return
    key, session, first = a_session_under_a_credential()
    if systemd_version() < 250:
        print("#  not encrypted: systemd has no systemd-creds before 250")
    else:
        name, sealed = "sparsed.master-key", "/etc/sparsed/master-key.cred"
        run("systemd-creds", "encrypt", "--with-key=host", f"--name={name}", key, sealed)
        os.remove(key)
        restart(drop_in=f"[Service]\nLoadCredentialEncrypted={name}:{sealed}\n")
        assert last_message(session) == first
    # Without the credential there is no key for them, and the daemon would not start.
    run("rm", "-rf", "/var/lib/sparsed/store")


def the_plugin_for_cuda_comes_and_goes_and_meanwhile_the_cpu_computes():
    install, erase = ["dpkg", "--install"], ["dpkg", "--purge"]
    if KIND == "rpm":
        install, erase = ["rpm", "--install", "--nodeps"], ["rpm", "--erase"]
    restart()
    old = pid()
    run(*install, *glob.glob(f"{PLUGIN}/*.{KIND}"))
    assert pid() != old and shown("PrivateDevices") == "no", "the service has not seen its drop-in"
    groups = run("id", "-nG", "sparsed").split()
    assert "video" in groups and "render" in groups, groups
    is_confined(EXPOSURE_TENTHS_ACCELERATOR)
    until_ready()
    assert text_of(served("alice", "/v1/chat/completions", CAPITAL)) == PARIS
    assert "cuda" in run("sparsectl", "plugins")
    # There is no driver here, nor would it help.
    restart(config='[engine]\nplugin = "cuda"\n[engine.retry]\nbackoff_ms = [10]\n')
    assert text_of(served("alice", "/v1/chat/completions", CAPITAL)) == PARIS
    restart()
    run(*erase, "sparsed-plugin-cuda")
    assert shown("PrivateDevices") == "yes", "the drop-in holds still"
    until_ready()
    left = glob.glob("/usr/**/*sparsed*cuda*", recursive=True) + glob.glob("/usr/lib/sparsed/plugins/cuda")
    assert not left, left


def a_newer_package():
    """How the kind of packages is upgraded, one of the next version, and one of that which is installed."""
    if KIND == "rpm":
        (package,) = glob.glob(f"{PACKAGES}/sparsed-[0-9]*.rpm")
        return ["rpm", "--upgrade", "--oldpackage", "--nodeps"], "/opt/newer.rpm", package
    (package,) = glob.glob(f"{PACKAGES}/sparsed_*.deb")
    upgrade.make_newer(package)
    return ["dpkg", "--install", "--force-downgrade"], upgrade.NEWER, package


@contextlib.contextmanager
def somebody_asks_all_the_time():
    """What bob, who connects again and again meanwhile, hears instead of an answer."""
    refused, over = [], threading.Event()

    def asks():
        while not over.is_set():
            status, value = ask("bob", "/v1/models")
            if status != 200:
                refused.append((status, value))

    thread = threading.Thread(target=asks)
    thread.start()
    try:
        yield refused
    finally:
        over.set()
        thread.join()


def an_upgrade_and_a_downgrade_in_the_middle_of_answers_lose_none_and_refuse_nobody():
    restart()
    command, newer, package = a_newer_package()
    first = new_session()
    said = text_of(served("alice", "/v1/chat/completions", wish("Say hi.", 10, first)))
    for package, files in ((newer, upgrade.digests_of_newer()), (package, upgrade.digests())):
        session, whole, stream, before = a_story_that_has_begun()
        old = pid()
        with somebody_asks_all_the_time() as refused:
            complaints = run(*command, package)
            until_ready()
        assert not refused, refused
        assert "scriptlet" not in complaints, complaints
        assert upgrade.digests() == files, f"not the files of {package}"
        stream.kill()
        stream.communicate()
        assert pid() != old, "the old daemon runs still"
        assert whole.startswith(before), f"{before!r} is not the beginning of {whole!r}"
        if state_of(session) == "interrupted":
            assert text_of(served("alice", f"/v1/sessions/{session}/continue", {})) == whole
        else:  # It had the time to end: limits.stop_s.
            assert last_message(session) == whole
        assert last_message(first) == said


def states_of_the_units():
    return {unit: [run("systemctl", verb, unit, check=False) for verb in ("is-enabled", "is-active")] for unit in UNITS}


def an_upgrade_leaves_the_units_as_the_operator_has_them():
    restart()
    command, newer, package = a_newer_package()
    run("systemctl", "disable", "--now", "sparsed-tcp.socket")
    on = {"sparsed.service": ["enabled", "active"], "sparsed.socket": ["enabled", "active"]}
    on["sparsed-tcp.socket"] = ["disabled", "inactive"]
    assert states_of_the_units() == on, states_of_the_units()
    run(*command, newer)
    assert states_of_the_units() == on, states_of_the_units()
    run("systemctl", "disable", "--now", "sparsed.socket", "sparsed.service")
    run("systemctl", "enable", "sparsed-tcp.socket")
    off = {unit: ["disabled", "inactive"] for unit in UNITS[:2]}
    off["sparsed-tcp.socket"] = ["enabled", "inactive"]
    assert states_of_the_units() == off, states_of_the_units()
    run(*command, package)
    assert states_of_the_units() == off, states_of_the_units()
    run("systemctl", "disable", "sparsed-tcp.socket")
    run("systemctl", "enable", "--now", "sparsed.socket", "sparsed.service")
    assert text_of(served("alice", "/v1/chat/completions", CAPITAL)) == PARIS


def an_upgrade_that_the_power_cuts_off_leaves_a_service_that_starts_and_dpkg_mends_it():
    upgrade.an_upgrade_that_the_power_cuts_off_leaves_a_service_that_starts_and_dpkg_mends_it(PACKAGES)


def without_the_models_package_it_says_what_is_missing_and_answers_once_that_is_installed():
    restart()
    run("dpkg", "--remove", "sparsed-model-smollm2-dsa")
    run("systemctl", "restart", "sparsed.service")
    until("it says so", lambda: "smollm2-135m-dsa.gguf" in str(ask("alice", "/health")[1]))
    status, value = ask("alice", "/v1/chat/completions", CAPITAL)
    assert status == 503 and "No such file" in str(value), f"{status} {value}"
    assert is_active() and int(shown("NRestarts")) == 0, shown("NRestarts")
    advice.is_mended("model default", "fail", "No such file", folder=PACKAGES)
    until_ready()
    assert text_of(served("alice", "/v1/chat/completions", CAPITAL)) == PARIS


def a_packaged_model_that_decays_or_is_cut_is_refused_and_the_service_stays():
    restart()
    file = os.path.realpath(MODEL)
    with open(file, "rb") as whole:
        weights = bytearray(whole.read())
    os.rename(file, "/opt/whole")
    middle = len(weights) // 2
    weights[middle] ^= 1
    for damaged in (weights, weights[:middle]):
        with open(f"{file}.new", "wb") as new:
            new.write(damaged)
        os.rename(f"{file}.new", file)
        run("systemctl", "restart", "sparsed.service")
        until("it says so", lambda: "is damaged: its SHA-256" in str(ask("alice", "/health")[1]))
        status, value = ask("alice", "/v1/chat/completions", CAPITAL)
        assert status == 503 and "is damaged" in str(value), f"{status} {value}"
        assert is_active() and int(shown("NRestarts")) == 0, shown("NRestarts")
        assert "is damaged: its SHA-256" in run("sparsectl", "doctor", check=False)
        found = run("sparsectl", "doctor", "--full", check=False)
        assert "apt install --reinstall ./sparsed-model-smollm2-dsa" in found, found
    # Cut, it is known without --full.
    advice.is_mended("model default", "fail", "the file is not whole", folder=PACKAGES)
    os.unlink("/opt/whole")
    restart()
    assert text_of(served("alice", "/v1/chat/completions", CAPITAL)) == PARIS


def removing_leaves_conversations_and_settings_and_purging_only_what_is_mounted_below_or_linked():
    run("dpkg", "--remove", "sparsed", "sparsed-model-smollm2-dsa")
    for path in ("/usr/bin/sparsed", "/run/sparsed/api.sock"):
        assert not os.path.exists(path), f"{path} is left"
    for path in ("/var/lib/sparsed/store", "/etc/sparsed/config.toml"):
        assert os.path.exists(path), f"{path} is gone"
    # As on a box whose state has a partition of its own, with a disk of models below, and whose settings lie elsewhere.
    state, settings, models, below = "/var/lib/sparsed", "/srv/settings", "/srv/models", "/var/lib/sparsed/my models"
    run("mount", "--bind", state, state)
    for folder in (models, below):
        os.makedirs(folder)
    run("mount", "--bind", models, below)
    shutil.move("/etc/sparsed", settings)
    os.symlink(settings, "/etc/sparsed")
    theirs = (f"{settings}/theirs", f"{models}/theirs")
    for path in theirs:
        with open(path, "w"):
            pass
    # As the doctor has the operator move conversations to another folder.
    moved = "/srv/moved conversations"
    os.makedirs(f"{moved}/store")
    os.makedirs(DROP_INS, exist_ok=True)
    with open(f"{DROP_INS}/state.conf", "w") as file:
        file.write(f'[Service]\nReadWritePaths="-{moved}"\n')
    said = run("dpkg", "--purge", "sparsed", "sparsed-model-smollm2-dsa")
    assert f"{moved} stays, with conversations and their key" in said, said
    assert os.path.exists(f"{moved}/store")
    shutil.rmtree(moved)
    os.unlink(f"{DROP_INS}/state.conf")
    run("umount", below)
    run("umount", state)
    for path in theirs:
        assert os.path.exists(path), f"{path} is gone"
    assert os.listdir(state) == [os.path.basename(below)], os.listdir(state)
    shutil.rmtree(state)
    left = [path for top in ("/etc", "/usr", "/var", "/run") for path in glob.glob(f"{top}/**/*sparsed*", recursive=True)]
    # Older managers keep a folder of each unit that has run.
    ours = ("/etc/systemd/system/sparsed.service.d", "/usr/share/doc", "/run/systemd", "/var/run/systemd")
    left = [path for path in left if not path.startswith(ours)]
    assert not left, left


def a_masked_service_is_upgraded_and_stays_masked():
    command, newer, package = a_newer_package()
    run("systemctl", "mask", "--now", "sparsed.service")
    for upgraded in (newer, package):
        run(*command, upgraded)
        assert run("systemctl", "is-enabled", "sparsed.service", check=False) == "masked" and not is_active()
    run("systemctl", "unmask", "sparsed.service")
    run("systemctl", "start", "sparsed.service")
    restart()


def on_a_system_that_runs_the_first_installation_answers_on_the_socket_and_the_bus():
    install, erase = ["apt-get", "install", "--yes"], ["dpkg", "--purge"]
    if KIND == "rpm":
        install, erase = ["rpm", "--install", "--nodeps"], ["rpm", "--erase", "--nodeps"]
    # What was there before goes, also the user, whom packages leave.
    run(*erase, *PACKAGE_NAMES, check=False)
    for folder in (DROP_INS, "/etc/sparsed", "/var/lib/sparsed"):
        shutil.rmtree(folder, ignore_errors=True)
    run("userdel", "sparsed")
    run("groupdel", "sparsed", check=False)
    run("systemctl", "daemon-reload")
    run(*install, *glob.glob(f"{PACKAGES}/*.{KIND}"))
    for user in ("alice", "bob"):
        run("usermod", "--append", "--groups", "sparsed", user)
    until_ready()
    assert text_of(served("alice", "/v1/chat/completions", CAPITAL)) == PARIS
    version = ("get-property", "org.sparsed1", MANAGER_PATH, MANAGER, "Version")
    until("it is on the bus", lambda: called("alice", *version, check=False).startswith('s "'))
    said = run(*as_user("alice"), "sparsectl", "run", "--dbus", "What is the capital of France?", "--temperature", "0")
    assert said == PARIS, said
    on = ["enabled", "active"]
    assert [states_of_the_units()[unit] for unit in UNITS[:2]] == [on, on], states_of_the_units()


def a_masked_service_is_purged():
    run("systemctl", "mask", "--now", "sparsed.service")
    run("dpkg", "--purge", "sparsed", "sparsed-model-smollm2-dsa")
    assert not os.path.exists("/var/lib/sparsed") and not os.path.exists("/run/sparsed/api.sock")
    run("systemctl", "unmask", "sparsed.service")


def a_user_who_fills_a_store_of_his_own_hears_that_the_service_does_not_read_it():
    said = run(*as_user("mallory"), "HOME=/home/mallory", "sparsectl", "model", "pull", f"file:{MODEL}")
    assert "this is your own store, /home/mallory/" in said, said
    run("rm", "-rf", "/home/mallory/.local")


def rpm_finds_every_file_as_it_was():
    changed = run("rpm", "--verify", "--nodeps", *PACKAGE_NAMES)
    assert not changed, changed
    # All that Debian's package has is there, too.
    for unit in UNITS[:2]:
        assert run("systemctl", "is-enabled", unit) == "enabled", unit


def after_upgrades_rpm_finds_every_file_and_removing_leaves_conversations_only():
    # The settings are ours by now.
    changed = run("rpm", "--verify", "--nodeps", "--noconfig", *PACKAGE_NAMES)
    assert not changed, changed
    session = new_session()
    run("rpm", "--erase", "--nodeps", *PACKAGE_NAMES)
    assert not is_active(), "the service runs still"
    enabled = "/etc/systemd/system/sockets.target.wants/sparsed.socket"
    for path in ("/usr/bin/sparsed", "/run/sparsed/api.sock", "/usr/lib/sparsed", enabled):
        assert not os.path.lexists(path), f"{path} is left"
    left = glob.glob("/usr/**/*sparsed*", recursive=True)
    assert not left, left
    assert glob.glob(f"/var/lib/sparsed/store/sessions/*/{session}*"), "conversations are gone"


def nothing_was_killed_for_a_system_call():
    lines = [line for line in journal().splitlines() if "status=31/SYS" in line or "SECCOMP" in line]
    assert not lines, lines


CHECKS = [
    the_units_are_valid_and_confined_enough,
    after_the_installation_and_a_boot_the_service_answers_and_the_doctor_finds_nothing,
    the_socket_is_there_before_the_service_and_the_first_request_starts_it,
    a_chat_is_answered,
    who_is_not_in_the_group_is_refused_by_the_sockets_mode,
    two_users_see_their_own_sessions_only,
    a_call_on_the_bus_starts_the_service_and_its_users_are_told_apart,
    what_an_operator_has_switched_off_is_not_started_by_a_call_on_the_bus,
    after_a_kill_a_session_goes_on_alike_and_no_client_is_refused,
    a_daemon_that_hangs_is_killed_by_the_watchdog_and_started_again,
    a_stop_in_the_middle_of_an_answer_is_orderly_and_the_answer_goes_on_after_the_start,
    answers_may_end_at_a_stop_that_takes_longer_than_the_units_own_limit,
    a_reload_takes_up_what_it_can_and_the_journal_explains_it,
    who_waits_for_a_service_whose_configuration_is_wrong_hears_so_and_once_mended_it_answers,
    the_doctor_sees_what_the_service_may_not_read_and_does_not_wait_for_one_that_does_not_start,
    a_request_is_found_by_its_id_and_what_was_said_is_not_in_the_journal,
    a_plugin_in_a_process_of_its_own_answers_in_the_sandbox,
    without_a_loaded_model_the_service_is_small,
    on_all_doors_with_a_loaded_model_that_nobody_asks_the_service_sleeps,
    slow_rows_are_read_in_the_sandbox_and_the_answers_are_the_same,
    the_master_key_may_be_a_credential_plain_or_encrypted,
    with_the_drop_in_of_each_accelerator_the_service_starts_and_is_confined_enough,
    a_device_that_comes_has_a_service_that_runs_restarted,
    the_tcp_socket_is_opt_in_and_asks_for_a_key,
    a_user_has_a_service_of_his_own,
    *doors.CHECKS,
    *reduced.CHECKS,
    *tutorials.CHECKS,
    *shells.CHECKS,
    *advice.CHECKS,
    a_user_who_fills_a_store_of_his_own_hears_that_the_service_does_not_read_it,
    the_plugin_for_cuda_comes_and_goes_and_meanwhile_the_cpu_computes,
    an_upgrade_and_a_downgrade_in_the_middle_of_answers_lose_none_and_refuse_nobody,
    an_upgrade_leaves_the_units_as_the_operator_has_them,
    an_upgrade_that_the_power_cuts_off_leaves_a_service_that_starts_and_dpkg_mends_it,
    a_masked_service_is_upgraded_and_stays_masked,
    without_the_models_package_it_says_what_is_missing_and_answers_once_that_is_installed,
    a_packaged_model_that_decays_or_is_cut_is_refused_and_the_service_stays,
    nothing_was_killed_for_a_system_call,
    removing_leaves_conversations_and_settings_and_purging_only_what_is_mounted_below_or_linked,
    on_a_system_that_runs_the_first_installation_answers_on_the_socket_and_the_bus,
    a_masked_service_is_purged,
]

# What there is to say of the other kind of packages; the service is the same.
RPM_CHECKS = [
    after_the_installation_and_a_boot_the_service_answers_and_the_doctor_finds_nothing,
    the_socket_is_there_before_the_service_and_the_first_request_starts_it,
    a_chat_is_answered,
    rpm_finds_every_file_as_it_was,
    the_plugin_for_cuda_comes_and_goes_and_meanwhile_the_cpu_computes,
    an_upgrade_and_a_downgrade_in_the_middle_of_answers_lose_none_and_refuse_nobody,
    an_upgrade_leaves_the_units_as_the_operator_has_them,
    nothing_was_killed_for_a_system_call,
    after_upgrades_rpm_finds_every_file_and_removing_leaves_conversations_only,
    on_a_system_that_runs_the_first_installation_answers_on_the_socket_and_the_bus,
]


def main():
    failed = 0
    checks = RPM_CHECKS if KIND == "rpm" else CHECKS
    if os.environ.get("ROOT") == "read-only":
        checks = reduced.READ_ONLY_CHECKS
    # The service is the same of the other kind, and a root that is read-only takes no configuration.
    if os.environ.get("LONG") and checks is CHECKS:
        checks = long.CHECKS + checks
    chosen = [check for check in checks if not sys.argv[1:] or any(word in check.__name__ for word in sys.argv[1:])]
    assert chosen, "no claim has such a name"
    for check in chosen:
        claim = check.__name__.replace("_", " ")
        began = time.monotonic()
        try:
            check()
            print(f"ok {claim} ({time.monotonic() - began:.1f} s)", flush=True)
        except Exception as error:
            failed += 1
            print(f"not ok {claim}: {type(error).__name__}: {error}"[:4000], flush=True)
    sys.exit(1 if failed else 0)


main()
