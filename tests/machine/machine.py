"""Boots a disk in qemu leg after leg, and cuts the machine's power when the leg says so.

A leg is what `check.py` does between a boot and the end of the machine, which is one of two lines on the serial line:
"leg ended", or "cut the power", upon which qemu is killed. What the machine had not written to its disk is lost then;
what it had, stays, in the order in which it was written: a disk that drops its own cache is not that.
"""

import argparse
import queue
import re
import subprocess
import sys
import threading
import time

# Seconds for a leg, an emulated machine's.
LEG_S = 1800
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


def boot(leg, options):
    """The machine, which has begun."""
    command = ["qemu-system-x86_64", "-accel", options.accel, "-cpu", "max", "-smp", "2", "-m", "1536", "-nographic"]
    command += ["-no-reboot", "-nic", "none", "-kernel", options.kernel, "-initrd", options.initrd]
    command += ["-drive", f"file={options.disk},format=raw,if=virtio"]
    command += ["-append", f"{QUIET} {MASKED} sparsed.leg={leg}"]
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def run(leg, options):
    """How many legs there are, and whether all claims of this one hold; no legs when it did not come to its end."""
    machine = boot(leg, options)
    lines, said, announced, ended = lines_of(machine), [], None, False
    deadline = time.monotonic() + LEG_S
    try:
        while not ended:
            line = lines.get(timeout=max(0, deadline - time.monotonic()))
            if line is None:
                break
            said.append(line)
            # Behind what the firmware has said without a line's end.
            announced = re.search(r"leg \d+ of (\d+), (\d+) claims$", line) or announced
            ended = line in ("leg ended", "cut the power")
            if line.startswith(("ok ", "not ok ", "#")):
                print(line, flush=True)
    except queue.Empty:
        print(f"leg {leg}: not over within {LEG_S} s", file=sys.stderr)
    # What it would write after this it does not.
    machine.kill()
    machine.wait()
    if not ended or not announced:
        print(f"leg {leg} did not come to its end:", *said[-TAIL:], sep="\n", file=sys.stderr)
        return 0, False
    # Counted, so that a line that was garbled is no success.
    held, failed = (sum(line.startswith(word) for line in said) for word in ("ok ", "not ok "))
    return int(announced[1]), held == int(announced[2]) and failed == 0


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("accel", "disk", "kernel", "initrd"):
        parser.add_argument(f"--{name}", required=True)
    options = parser.parse_args()
    leg, legs, all_hold = 0, 1, True
    while leg < legs:
        leg, began = leg + 1, time.monotonic()
        legs, hold = run(leg, options)
        all_hold &= hold
        print(f"# boot {leg}: {time.monotonic() - began:.0f} s", flush=True)
    sys.exit(0 if all_hold else 1)


main()
