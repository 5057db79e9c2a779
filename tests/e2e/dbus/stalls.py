"""A file on FUSE whose reads are never answered. Needs root, and a mount namespace of its own, with which it goes."""
import ctypes
import mmap
import os
import signal
import stat
import struct

GETATTR, OPEN, READ, STATFS, RELEASE, FLUSH, INIT = 3, 14, 15, 17, 18, 25, 26
SIZE = 1 << 20
PR_SET_PDEATHSIG = 1
LIBC = ctypes.CDLL(None, use_errno=True)


class Stalling:
    """The file at `path`, which is a mount of its own; a process that ends with this one serves it."""

    def __init__(self, path):
        self.path, self.reads = path, mmap.mmap(-1, mmap.PAGESIZE)
        with open(path, "wb"):
            pass
        self.device = os.open("/dev/fuse", os.O_RDWR)
        options = f"fd={self.device},rootmode={stat.S_IFREG | 0o644:o},user_id=0,group_id=0,allow_other"
        if LIBC.mount(b"stalls", path.encode(), b"fuse", 0, options.encode()):
            raise OSError(ctypes.get_errno(), "mount")
        # Another process: this one waits for it when it closes the file, or ends.
        if os.fork() == 0:
            LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            self.serve()
        os.close(self.device)

    def open(self):
        return os.open(self.path, os.O_RDONLY)

    def n_reads(self):
        return self.reads[0]

    def serve(self):
        while True:
            request = os.read(self.device, 1 << 20)
            _, opcode, unique = struct.unpack_from("=IIQ", request)
            if opcode == READ:
                self.reads[0] += 1
            body = self.answer(opcode)
            if body is not None:
                os.write(self.device, struct.pack("=IiQ", 16 + len(body), 0, unique) + body)

    def answer(self, opcode):
        if opcode == INIT:
            return struct.pack("=IIIIHHI", 7, 31, 0, 0, 1, 1, 4096) + bytes(40)
        if opcode == GETATTR:
            times, owner = bytes(3 * 8 + 3 * 4), struct.pack("=7I", stat.S_IFREG | 0o644, 1, 0, 0, 0, 4096, 0)
            return struct.pack("=QII", 1000, 0, 0) + struct.pack("=QQQ", 1, SIZE, 1) + times + owner
        if opcode in (OPEN, STATFS, RELEASE, FLUSH):
            return bytes({OPEN: 16, STATFS: 80}.get(opcode, 0))
        # Reads stall; nothing else is to be answered.
        return None
