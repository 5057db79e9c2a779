"""Is there a service after the power has gone in the middle of an upgrade? dpkg is killed at several moments of one.

Each time the service starts, with the old files or the new ones and never with halves of both, and dpkg mends the rest.
What a disk makes of writes that it had not synced is not tried: dpkg syncs a file before it takes its name.
"""

import contextlib
import glob
import hashlib
import os
import shutil
import signal
import subprocess
import time

from box import PATIENCE, restart, run, served, text_of

CAPITAL = {"messages": [{"role": "user", "content": "What is the capital of France?"}], "temperature": 0}
PARIS = "The capital of France is Paris."
NEWER, TREE = "/opt/newer.deb", "/opt/newer"
PLUGIN = "/usr/lib/sparsed/plugins/cpu"
EXECUTABLES = ("/usr/bin/sparsed", "/usr/bin/sparsectl")
# Keeps maintainer scripts from starting services, as on a box that is being mended by hand.
POLICY = "/usr/sbin/policy-rc.d"


def digest(path):
    with open(path, "rb") as file:
        return hashlib.sha256(file.read()).hexdigest()


def library(folder):
    (path,) = glob.glob(f"{folder}/libsparsed_plugin_cpu.so*")
    return path


def make_newer(deb):
    """A package of the next version, whose executables and plugin are other bytes that do the same."""
    run("dpkg-deb", "--raw-extract", deb, TREE)
    for path in EXECUTABLES:
        with open(TREE + path, "ab") as file:
            file.write(b"\0")
    old = library(TREE + PLUGIN)
    before = digest(old)
    with open(old, "ab") as file:
        file.write(b"\0")
    after = digest(old)
    new = old.replace(before[:8], after[:8])
    assert new != old, f"{old} is not named by its digest, and two versions of it would be mixed"
    os.rename(old, new)
    for path, words in (
        (f"{TREE}{PLUGIN}/plugin.toml", ((before, after), (os.path.basename(old), os.path.basename(new)))),
        (f"{TREE}/DEBIAN/control", (("Version: ", "Version: 1:"),)),
    ):
        with open(path) as file:
            text = file.read()
        for word, other in words:
            assert word in text, f"{path} has no {word}"
            text = text.replace(word, other)
        with open(path, "w") as file:
            file.write(text)
    run("dpkg-deb", "--build", "--root-owner-group", "-Znone", TREE, NEWER)


def state():
    """What dpkg wants of the package, whether it must be reinstalled (reinstreq), and how far it is."""
    return run("dpkg-query", "--show", "--showformat", "${Status}", "sparsed").split()


def recorded():
    """What dpkg has written of the package's state last; cheap enough to be asked again and again."""
    newest = sorted(glob.glob("/var/lib/dpkg/updates/[0-9]*"))
    for path in [*reversed(newest), "/var/lib/dpkg/status"]:
        with contextlib.suppress(OSError), open(path) as file:
            text = file.read()
            for entry in text.split("\n\n"):
                if entry.startswith("Package: sparsed\n"):
                    return entry.split("Status: ", 1)[1].split("\n", 1)[0].split()[-1]
    return ""


def cut(moment, options=("--install",)):
    """Starts the upgrade, and kills it with all of its children as soon as it is at this moment."""
    dpkg = subprocess.Popen(
        ["dpkg", *options, NEWER], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    end = time.monotonic() + PATIENCE
    while dpkg.poll() is None and not moment():
        assert time.monotonic() < end, "the upgrade does not come so far"
    was_running = dpkg.poll() is None
    with contextlib.suppress(ProcessLookupError):
        os.killpg(dpkg.pid, signal.SIGKILL)
    dpkg.wait()
    return was_running


def whole(old, new):
    """That each executable, and the plugin that its manifest names, is of one version."""
    for path in EXECUTABLES:
        assert digest(path) in (old[path], new[path]), f"{path} is neither the old nor the new one"


def an_upgrade_that_the_power_cuts_off_leaves_a_service_that_starts_and_dpkg_mends_it(debs):
    (deb,) = glob.glob(f"{debs}/sparsed_*.deb")
    make_newer(deb)
    old_library = library(PLUGIN)
    old = {path: digest(path) for path in EXECUTABLES}
    new = {path: digest(TREE + path) for path in EXECUTABLES}
    manifest = digest(f"{PLUGIN}/plugin.toml")
    moments = {
        "files are unpacked beside the old ones": lambda: os.path.exists("/usr/bin/sparsed.dpkg-new"),
        "files take their names": lambda: digest(f"{PLUGIN}/plugin.toml") != manifest,
        "what is old is removed": lambda: not os.path.exists(old_library),
        "nothing is configured yet": lambda: recorded() == "unpacked",
        # Before anything is unpacked the old one is half configured too.
        "it is being configured": lambda: recorded() == "half-configured"
        and digest(f"{PLUGIN}/plugin.toml") != manifest,
    }
    with open(os.open(POLICY, os.O_WRONLY | os.O_CREAT, 0o755), "w") as file:
        file.write("#!/bin/sh\nexit 101\n")
    try:
        for name, moment in moments.items():
            was_running = cut(moment)
            left = state()
            # The machine starts again.
            run("systemctl", "kill", "--signal=KILL", "sparsed.service", check=False)
            restart()
            whole(old, new)
            said = text_of(served("alice", "/v1/chat/completions", CAPITAL))
            assert said == PARIS, f"cut when {name}: {said}"
            print(f"#  cut when {name}: {' '.join(left)}{'' if was_running else ', dpkg had ended'}")
            said = run("dpkg", "--configure", "-a", check=False)
            if state()[-1] != "installed":
                # What was not unpacked whole wants its package once more, as dpkg says.
                assert "reinstreq" in left, said
                run("dpkg", "--install", NEWER)
            assert state()[-1] == "installed" and not run("dpkg", "--audit"), run("dpkg", "--audit")
            left_over = glob.glob("/usr/**/*.dpkg-new", recursive=True)
            assert not left_over, left_over
            restart()
            run("dpkg", "--install", "--force-downgrade", deb)
            assert {path: digest(path) for path in EXECUTABLES} == old, "it is not the old version again"
    finally:
        os.remove(POLICY)
        shutil.rmtree(TREE)
    restart()
