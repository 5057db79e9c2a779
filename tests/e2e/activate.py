"""Stands for a service manager with a socket unit: listens on SOCKET, runs COMMAND with it, and again when it ends.

    python3 activate.py SOCKET COMMAND [ARGUMENT ...]

Ends when its standard input does.
"""

import os
import signal
import socket
import sys
import threading

path, command = sys.argv[1], sys.argv[2:]
door = socket.socket(socket.AF_UNIX)
door.bind(path)
door.listen(64)
child = 0


def end():
    sys.stdin.read()
    os.kill(child, signal.SIGKILL)
    os._exit(0)


threading.Thread(target=end, daemon=True).start()
while True:
    child = os.fork()
    if child == 0:
        os.dup2(door.fileno(), 3)
        os.set_inheritable(3, True)  # it may have been 3 before
        os.environ.update(LISTEN_FDS="1", LISTEN_PID=str(os.getpid()), LISTEN_FDNAMES="api")
        os.execv(command[0], command)
    print(child, flush=True)
    os.waitpid(child, 0)
