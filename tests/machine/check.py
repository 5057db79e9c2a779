"""What does the machine try between two boots? Runs in it as root, with box.py and upgrade.py of tests/systemd beside it.

The kernel's command line names the leg. What one leg leaves for the next is synced before the power is cut.
"""

import glob
import json
import os
import re
import sys
import time
import traceback

import upgrade
from box import (
    CAPITAL, PARIS, a_story_that_has_begun, answer, curl, group_file, journal, pid, restart, run, served, shown,
    state_of, text_of, until, until_ready, wish,
)

(PACKAGE,) = glob.glob("/opt/packages/sparsed_*.deb")
KEPT = "/opt/kept.json"
# Answers at a time under pressure, and words of their prompts.
ANSWERS, WORDS = 3, 80
# Bytes of what it holds that it may hold no more then.
SQUEEZED = 4 << 20
# Of the service's journal, shown when a claim fails.
JOURNAL_LINES = 15
TIERED = '[memory]\nslow_tier = "all"\n[limits]\nmax_batched_tokens = 64\n'


def keep(**facts):
    """Tells the legs after a power cut."""
    with open(KEPT, "w") as file:
        json.dump(facts, file)
    os.sync()


def kept():
    with open(KEPT) as file:
        return json.load(file)


def limit(name, value):
    run("systemctl", "set-property", "--runtime", "sparsed.service", f"{name}={value}")


def on_this_kernel_the_service_answers_and_the_doctor_finds_nothing():
    until_ready()
    assert text_of(served("alice", "/v1/chat/completions", CAPITAL)) == PARIS
    checks = json.loads(run("runuser", "-u", "sparsed", "--", "env", "HOME=/var/lib/sparsed", "sparsectl", "doctor", "--json"))
    wrong = [check for check in checks if check["verdict"] == "fail"]
    assert not wrong, wrong
    print(f"# Linux {os.uname().release}, systemd {run('systemctl', '--version').split()[1]}")


def decisions():
    found = served("alice", "/v1/status")["models"][0]["scheduling"]["decisions"]
    return [decision["decision"] for decision in found]


def when_memory_high_falls_below_what_it_holds_it_gives_memory_back_and_answers_alike():
    prompts = [f"Story {name}: " + f"some words of text {name}. " * (WORDS // 5) for name in range(ANSWERS)]
    wishes = [wish(prompt, 20) for prompt in prompts]
    restart(config=TIERED)
    roomy = [text_of(served("alice", "/v1/chat/completions", one)) for one in wishes]
    restart(config=TIERED)
    processes = [curl("alice", "/v1/chat/completions", one) for one in wishes]
    until("some are answered", lambda: served("bob", "/v1/status")["models"][0]["sampled_tokens"] > 5)
    # Clean pages of files can be dropped without anybody's help.
    with open(group_file("memory.stat")) as file:
        held = int(re.search(r"^anon (\d+)", file.read(), re.M)[1])
    limit("MemoryHigh", held - SQUEEZED)
    squeezed = until("it hears of the pressure", decisions)
    answers = [answer(process) for process in processes]
    limit("MemoryHigh", "infinity")
    assert [text_of(json.loads(text)) for _, text in answers] == roomy
    print(f"# {held >> 20} MiB held, {held - SQUEEZED >> 20} allowed: {', '.join(squeezed)}")
    assert int(shown("NRestarts")) == 0, shown("NRestarts")


def killed_by_the_kernel_for_memory_it_starts_again_and_the_session_goes_on_alike():
    restart()
    session, whole, stream, before = a_story_that_has_begun()
    old = pid()
    # There is nothing to swap to.
    limit("MemoryMax", 32 << 20)
    until("the kernel kills it", lambda: pid() != old)
    limit("MemoryMax", "infinity")
    stream.kill()
    stream.communicate()
    until_ready()
    assert "OOM killer" in journal(), "nothing says why it ended"
    goes_on(session, whole, before)


def goes_on(session, whole, before):
    """What was heard of an answer before its end is the beginning of the whole, which is there in the end."""
    assert state_of(session) == "interrupted", state_of(session)
    assert whole.startswith(before), f"{before!r} is not the beginning of {whole!r}"
    again = text_of(served("alice", f"/v1/sessions/{session}/continue", {}))
    assert again == whole, f"{again!r} instead of {whole!r}"


def cut():
    """Does not come back."""
    print("cut the power")
    time.sleep(3600)


def the_power_goes_while_an_answer_streams():
    restart(config='[sessions]\ndurability = "token"\n')
    session, whole, _stream, before = a_story_that_has_begun()
    keep(session=session, whole=whole, before=before)
    cut()


def after_the_power_went_in_the_middle_of_an_answer_all_that_was_heard_is_there_and_it_goes_on_alike():
    until_ready()
    facts = kept()
    goes_on(facts["session"], facts["whole"], facts["before"])
    print(f"# {len(facts['before'])} bytes were heard before the cut")


def the_power_goes_in_an_upgrade(moment):
    if not os.path.exists(upgrade.NEWER):
        upgrade.make_newer(PACKAGE)
    keep(old=upgrade.digests(), moment=moment)
    dpkg = upgrade.reached(upgrade.moments()[moment])
    assert dpkg.poll() is None, f"dpkg had ended before {moment}"
    cut()


def the_power_goes_when_files_are_unpacked():
    the_power_goes_in_an_upgrade("files are unpacked beside the old ones")


def the_power_goes_when_files_take_their_names():
    the_power_goes_in_an_upgrade("files take their names")


def the_power_goes_when_the_package_is_configured():
    the_power_goes_in_an_upgrade("it is being configured")


def after_the_power_went_in_an_upgrade_the_service_answers_and_dpkg_mends_it():
    until_ready()
    facts, left = kept(), upgrade.state()
    print(f"# cut when {facts['moment']}: {' '.join(left)}")
    upgrade.is_mended(facts["old"], left)
    upgrade.is_old_again(PACKAGE, facts["old"])


LEGS = [
    [
        on_this_kernel_the_service_answers_and_the_doctor_finds_nothing,
        when_memory_high_falls_below_what_it_holds_it_gives_memory_back_and_answers_alike,
        killed_by_the_kernel_for_memory_it_starts_again_and_the_session_goes_on_alike,
        the_power_goes_while_an_answer_streams,
    ],
    [
        after_the_power_went_in_the_middle_of_an_answer_all_that_was_heard_is_there_and_it_goes_on_alike,
        the_power_goes_when_files_are_unpacked,
    ],
    [
        after_the_power_went_in_an_upgrade_the_service_answers_and_dpkg_mends_it,
        the_power_goes_when_files_take_their_names,
    ],
    [
        after_the_power_went_in_an_upgrade_the_service_answers_and_dpkg_mends_it,
        the_power_goes_when_the_package_is_configured,
    ],
    [after_the_power_went_in_an_upgrade_the_service_answers_and_dpkg_mends_it],
]


def main():
    with open("/proc/cmdline") as file:
        leg = int(re.search(r"sparsed\.leg=(\d+)", file.read())[1])
    claims = [check for check in LEGS[leg - 1] if not check.__name__.startswith("the_power_goes")]
    print(f"leg {leg} of {len(LEGS)}, {len(claims)} claims")
    for check in LEGS[leg - 1]:
        claim, began = check.__name__.replace("_", " "), time.monotonic()
        try:
            check()
            print(f"ok {claim} ({time.monotonic() - began:.0f} s)")
        except Exception as error:
            print(f"not ok {claim}: {type(error).__name__}: {error}".replace("\n", " ")[:4000])
            traceback.print_exc(file=sys.stdout)
            for line in journal().splitlines()[-JOURNAL_LINES:]:
                print(f"# {line[:300]}")
    print("leg ended")


main()
