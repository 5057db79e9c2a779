"""Is there a service after the power has gone in the middle of an upgrade? dpkg is killed at several moments of one.

Each time the service starts, with the old files or the new ones and never with halves of both, and dpkg mends the rest.
What a disk makes of writes that were not synced is tried in `tests/machine`, on a machine whose power is cut.
"""

import contextlib
import glob
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time

from box import CAPITAL, PARIS, PATIENCE, restart, run, served, text_of

NEWER, TREE = "/opt/newer.deb", "/opt/newer"
PLUGIN = "/usr/lib/sparsed/plugins/cpu"
EXECUTABLES = ("/usr/bin/sparsed", "/usr/bin/sparsectl")
# What a newer file has more.
MORE = b"\0"
# What says whether they may.
POLICY = "/usr/sbin/policy-rc.d"


def digest(path):
    with open(path, "rb") as file:
        return hashlib.sha256(file.read()).hexdigest()


def library(folder):
    (path,) = glob.glob(f"{folder}/libsparsed_plugin_cpu.so*")
    return path


def alter(tree):
    """The files of another version in a tree of a package's: executables and plugin are other bytes that do the same."""
    for path in EXECUTABLES:
        with open(tree + path, "ab") as file:
            file.write(MORE)
    old = library(tree + PLUGIN)
    before = digest(old)
    with open(old, "ab") as file:
        file.write(MORE)
    after = digest(old)
    new = old.replace(before[:8], after[:8])
    assert new != old, f"{old} is not named by its digest, and two versions of it would be mixed"
    os.rename(old, new)
    rewrite(f"{tree}{PLUGIN}/plugin.toml", (before, after), (os.path.basename(old), os.path.basename(new)))


def rewrite(path, *words):
    """Has a file say other words, each of which it must say now."""
    with open(path) as file:
        text = file.read()
    for word, other in words:
        assert word in text, f"{path} has no {word}"
        text = text.replace(word, other)
    with open(path, "w") as file:
        file.write(text)


def make_newer(deb):
    """A package of the next version, as `alter` makes it."""
    shutil.rmtree(TREE, ignore_errors=True)
    run("dpkg-deb", "--raw-extract", deb, TREE)
    alter(TREE)
    rewrite(f"{TREE}/DEBIAN/control", ("Version: ", "Version: 1:"))
    run("dpkg-deb", "--build", "--root-owner-group", "-Znone", TREE, NEWER)


def digests_of_newer():
    """What `digests` will be where the version that is here is upgraded."""
    wanted = {}
    for path in EXECUTABLES:
        with open(path, "rb") as file:
            wanted[path] = hashlib.sha256(file.read() + MORE).hexdigest()
    return wanted


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


def digests(root=""):
    """Of each executable, by its path in the tree."""
    return {path: digest(root + path) for path in EXECUTABLES}


def moments():
    """By name, whether an upgrade that has begun since then is there."""
    old_library, manifest = library(PLUGIN), digest(f"{PLUGIN}/plugin.toml")
    return {
        "files are unpacked beside the old ones": lambda: os.path.exists("/usr/bin/sparsed.dpkg-new"),
        "files take their names": lambda: digest(f"{PLUGIN}/plugin.toml") != manifest,
        "what is old is removed": lambda: not os.path.exists(old_library),
        "nothing is configured yet": lambda: recorded() == "unpacked",
        # Before anything is unpacked the old one is half configured too.
        "it is being configured": lambda: recorded() == "half-configured"
        and digest(f"{PLUGIN}/plugin.toml") != manifest,
    }


def reached(moment):
    """The process of an upgrade that is at this moment, or has ended."""
    dpkg = subprocess.Popen(
        ["dpkg", "--install", NEWER], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    end = time.monotonic() + PATIENCE
    while dpkg.poll() is None and not moment():
        assert time.monotonic() < end, "the upgrade does not come so far"
    return dpkg


def cut(moment):
    """Starts the upgrade, and kills it with all of its children as soon as it is at this moment."""
    dpkg = reached(moment)
    was_running = dpkg.poll() is None
    with contextlib.suppress(ProcessLookupError):
        os.killpg(dpkg.pid, signal.SIGKILL)
    dpkg.wait()
    return was_running


def is_mended(old, left):
    """The service, which runs, answers with whole files, and dpkg brings what `left` of a cut upgrade says to an end."""
    new = digests(TREE)
    for path, found in digests().items():
        assert found in (old[path], new[path]), f"{path} is neither the old nor the new one"
    said = text_of(served("alice", "/v1/chat/completions", CAPITAL))
    assert said == PARIS, said
    said = run("dpkg", "--configure", "-a", check=False)
    if state()[-1] != "installed":
        # What was not unpacked whole wants its package once more, as dpkg says.
        assert "reinstreq" in left, said
        run("dpkg", "--install", NEWER)
    assert state()[-1] == "installed" and not run("dpkg", "--audit"), run("dpkg", "--audit")
    left_over = glob.glob("/usr/**/*.dpkg-new", recursive=True)
    assert not left_over, left_over


def is_old_again(deb, old):
    run("dpkg", "--install", "--force-downgrade", deb)
    assert digests() == old, "it is not the old version again"


@contextlib.contextmanager
def no_service_is_started():
    """By maintainer scripts, as on a box that is being mended by hand."""
    with open(os.open(POLICY, os.O_WRONLY | os.O_CREAT, 0o755), "w") as file:
        file.write("#!/bin/sh\nexit 101\n")
    try:
        yield
    finally:
        os.remove(POLICY)


def an_upgrade_that_the_power_cuts_off_leaves_a_service_that_starts_and_dpkg_mends_it(debs):
    (deb,) = glob.glob(f"{debs}/sparsed_*.deb")
    make_newer(deb)
    old = digests()
    with no_service_is_started():
        for name, moment in moments().items():
            was_running = cut(moment)
            left = state()
            print(f"#  cut when {name}: {' '.join(left)}{'' if was_running else ', dpkg had ended'}")
            # The machine starts again.
            run("systemctl", "kill", "--signal=KILL", "sparsed.service", check=False)
            restart()
            is_mended(old, left)
            restart()
            is_old_again(deb, old)
    shutil.rmtree(TREE)
    restart()


if __name__ == "__main__":
    alter(sys.argv[1])
