"""Runs dbus-broker under its launcher, which wants a listening socket as systemd passes one, and a journal to log to: here
that is a socket that nobody reads. To be started alone in a mount namespace (unshare -m), so that nothing of the system is
touched. Usage: broker.py CONFIG SOCKET"""
import os
import socket
import subprocess
import sys

LISTEN_FD = 3
config, path = sys.argv[1:]
subprocess.run(["mount", "-t", "tmpfs", "none", "/run"], check=True)
os.makedirs("/run/systemd/journal")
listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
journal = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
journal.bind("/run/systemd/journal/socket")
os.set_inheritable(journal.fileno(), True)
listener.bind(path)
os.chmod(path, 0o666)
listener.listen()
assert listener.fileno() == LISTEN_FD, listener.fileno()
os.set_inheritable(LISTEN_FD, True)
os.environ |= {"LISTEN_FDS": "1", "LISTEN_PID": str(os.getpid()), "DBUS_SYSTEM_BUS_ADDRESS": f"unix:path={path}"}
os.execvp("dbus-broker-launch", ["dbus-broker-launch", "--scope", "system", "--config-file", config])
