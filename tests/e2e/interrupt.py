"""Ctrl-C on the terminal of `make chat` stops the answer, not the conversation. Usage: interrupt.py CHAT_SCRIPT MODEL"""
import os
import pty
import select
import sys
import time

pid, terminal = pty.fork()
if pid == 0:
    os.execvp("sh", ["sh", *sys.argv[1:]])
seen = ""


def read_until(what, condition):
    global seen
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not come: {seen[-200:]!r}"
        if select.select([terminal], [], [], 1)[0]:
            seen += os.read(terminal, 4096).decode(errors="replace")


def expect(text):
    """Reads until the text has come, and forgets all up to its end."""
    global seen
    read_until(repr(text), lambda: text in seen)
    seen = seen[seen.find(text) + len(text) :]


expect("> ")
os.write(terminal, b"Write a very long story about the sea and all its ships.\r")
expect("ships.")
read_until("an answer", lambda: len(seen) > 60)
os.write(terminal, b"\x03")
expect("[stopped]")
expect("> ")
os.write(terminal, b"Say hi.\r")
expect("hi.")
expect("> ")
assert "no daemon" not in seen, seen
os.write(terminal, b"\x04")
_, status = os.waitpid(pid, 0)
assert status == 0, status
print("interrupt: ok")
