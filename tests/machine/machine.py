"""Boots a disk in qemu leg after leg, and cuts the machine's power when the leg says so.

A leg is what `check.py` does between a boot and the end of the machine, which is one of two lines on the serial line:
"leg ended", or "cut the power", upon which qemu is killed. What the machine had not written to its disk is lost then;
what it had, stays, in the order in which it was written: a disk that drops its own cache is not that.
"""

import argparse
import queue
import subprocess
import sys
import threading
import time

# As many as check.py has.
LEGS = 5
# Seconds for a leg, an emulated machine's.
LEG_S = 900
# Lines that are shown where a leg does not end.
TAIL = 30
QUIET = "console=ttyS0 root=/dev/vda rw psi=1 systemd.unified_cgroup_hierarchy=1 systemd.show_status=0 quiet loglevel=3"
MASKED = "systemd.mask=serial-getty@ttyS0.service systemd.mask=getty@tty1.service"


def lines_of(machine):
    """The serial line's lines, as they come; then None."""
    lines = queue.Queue()

    def read():
        for line in machine.stdout:
            lines.put(line.decode(errors="replace").strip())
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    return lines


def run(leg, options):
    """Whether the leg came to its end, and how many of its claims failed."""
    command = ["qemu-system-x86_64", "-accel", options.accel, "-cpu", "max", "-smp", "2", "-m", "1536", "-nographic"]
    command += ["-no-reboot", "-nic", "none", "-kernel", options.kernel, "-initrd", options.initrd]
    command += ["-drive", f"file={options.disk},format=raw,if=virtio"]
    command += ["-append", f"{QUIET} {MASKED} sparsed.leg={leg}"]
    machine = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    lines, said, failed, ended = lines_of(machine), [], 0, False
    deadline = time.monotonic() + LEG_S
    try:
        while not ended:
            line = lines.get(timeout=max(0, deadline - time.monotonic()))
            if line is None:
                break
            said.append(line)
            failed += line.startswith("not ok ")
            ended = line in ("leg ended", "cut the power")
            if line.startswith(("ok ", "not ok ", "#")):
                print(line, flush=True)
    except queue.Empty:
        print(f"leg {leg}: not over within {LEG_S} s", file=sys.stderr)
    # What it would write after this it does not.
    machine.kill()
    machine.wait()
    if not ended:
        print(f"leg {leg} did not come to its end:", *said[-TAIL:], sep="\n", file=sys.stderr)
    return ended, failed


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("accel", "disk", "kernel", "initrd"):
        parser.add_argument(f"--{name}", required=True)
    options = parser.parse_args()
    failures = 0
    for leg in range(1, LEGS + 1):
        began = time.monotonic()
        ended, failed = run(leg, options)
        print(f"# boot {leg} of {LEGS}: {time.monotonic() - began:.0f} s", flush=True)
        failures += failed + (not ended)
        if not ended:
            break
    sys.exit(1 if failures else 0)


main()
