"""What takes minutes: claims that are tried with LONG=1 alone, before the others."""

import os
import signal
import time

from box import ask, curl, events, heard, new_session, pid, restart, run, served, until, until_ready, wish

# Tokens that a long conversation has at least, and lines of each message in it.
TOKENS, LINES = 31000, 200


def a_conversation(session):
    """Tokens and turns of the session once it is long."""
    tokens = turns = 0
    while tokens < TOKENS:
        lines = [f"On day {turns * LINES + line} the river was {line * 7 % 90} miles long." for line in range(LINES)]
        tokens = served("alice", "/v1/chat/completions", wish("\n".join(lines), 1, session))["usage"]["prompt_tokens"]
        turns += 1
    return tokens, turns


def killed_in_an_answer(session):
    """Seconds from a SIGKILL in the middle of an answer to the first token that nobody had heard."""
    stream = curl("alice", "/v1/chat/completions", wish("Go on.", 400, session, True))
    before, old = heard(stream, 20), pid()
    os.kill(old, signal.SIGKILL)
    killed = time.monotonic()
    before += "".join(events(stream))
    stream.communicate()
    until_ready()
    again, text = curl("alice", f"/v1/sessions/{session}/continue", {"stream": True}), ""
    for piece in events(again):
        text += piece
        if len(text) > len(before):
            break
    took = time.monotonic() - killed
    assert text.startswith(before) and text != before, f"{text!r} does not go on from {before!r}"
    again.kill()
    again.communicate()
    assert pid() != old
    return took


def a_conversation_of_32768_tokens_goes_on_at_once_after_a_kill():
    restart('[model.default]\nmax_context = 40960\n[memory]\nbudget = "2GiB"\n[limits]\nmax_running = 1\n')
    session = new_session()
    tokens, turns = a_conversation(session)
    times = []
    for _ in range(5):
        times.append(killed_in_an_answer(session))
        # A service that is killed again and again is started later each time.
        run("systemctl", "reset-failed", "sparsed.service")
        # As it was before, once the daemon has seen that nobody listens any more.
        until("it is cut", lambda: ask("alice", f"/v1/sessions/{session}/truncate", {"turns": turns})[0] == 200)
    print(f"#  {tokens} tokens, from SIGKILL to the next token: {', '.join(f'{took:.2f}' for took in times)} s")


CHECKS = [a_conversation_of_32768_tokens_goes_on_at_once_after_a_kill]
