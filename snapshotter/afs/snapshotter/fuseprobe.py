"""A FUSE file system of one file, for finding out what the kernel can mount on such files (see linux/fuse.h).

It is not served by ``afs_fused``, which asks a layerstore about every file and takes longer to start than all probes take.

State: the thread owns the descriptor's reading end. It ends when :attr:`_stop` is written to, or the file system is gone;
closing the descriptor then aborts what the kernel may still ask.
"""

import contextlib
import errno
import logging
import os
import select
import stat
import struct
import threading
from pathlib import Path
from typing import Self

from afs.core import syscalls
from afs.core.mounts import unmount

log = logging.getLogger(__name__)
FILE = "layer"
_ROOT, _INODE = 1, 2
_FORGET, _BATCH_FORGET, _INTERRUPT = 2, 42, 36  # have no answer
_LOOKUP, _GETATTR, _OPEN, _READ, _RELEASE, _FLUSH, _INIT, _OPENDIR, _RELEASEDIR = 1, 3, 14, 15, 18, 25, 26, 27, 29
_MAX_READ = 1 << 17
_IN = struct.Struct("=IIQQIIII")  # length, opcode, unique, inode, uid, gid, pid, padding
_OUT = struct.Struct("=IiQ")  # length, -errno, unique
_ATTR = struct.Struct("=QQQQQQIIIIIIIIII")
_VALID_S = 60


class FuseFile:
    """*content* as the file :data:`FILE` in a file system at *mountpoint*, as long as the ``with`` block runs."""

    def __init__(self, mountpoint: Path, content: bytes) -> None:
        self._mountpoint = mountpoint
        self._content = content

    @property
    def path(self) -> Path:
        """Where the file is."""
        return self._mountpoint / FILE

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            self._fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
            stack.callback(os.close, self._fd)
            options = f"fd={self._fd},rootmode=40000,user_id={os.geteuid()},group_id={os.getegid()}"
            flags = syscalls.MS_NODEV | syscalls.MS_NOSUID | syscalls.MS_RDONLY
            syscalls.mount("afs/probe", str(self._mountpoint), "fuse", flags, options)
            stack.callback(unmount, str(self._mountpoint))
            self._stopped, self._stop = os.pipe()
            stack.callback(os.close, self._stopped)
            thread = threading.Thread(target=self._serve, name="fuse probe")
            thread.start()
            stack.callback(thread.join)
            stack.callback(os.close, self._stop)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        # The thread goes before the mount: nobody reads any more, and what the kernel has left to say is a goodbye.
        self._stack.close()

    def _serve(self) -> None:
        poll = select.poll()
        poll.register(self._stopped, select.POLLHUP)
        poll.register(self._fd, select.POLLIN)
        try:
            while all(fd == self._fd for fd, _ in poll.poll()):
                request = os.read(self._fd, _MAX_READ + 4096)
                _, opcode, unique, inode, *_ = _IN.unpack_from(request)
                if opcode in (_FORGET, _BATCH_FORGET, _INTERRUPT):
                    continue
                number, body = self._answer(opcode, inode, request[_IN.size :])
                os.write(self._fd, _OUT.pack(_OUT.size + len(body), -number, unique) + body)
        except OSError as error:
            if error.errno != errno.ENODEV:  # unmounted
                log.warning("the FUSE probe ends: %s", error)

    def _answer(self, opcode: int, inode: int, body: bytes) -> tuple[int, bytes]:
        """An errno and what follows."""
        if opcode == _INIT:
            major, minor, readahead, _ = struct.unpack_from("=IIII", body)
            return 0, struct.pack("=IIIIHHIIHHII24x", major, min(minor, 31), readahead, 0, 16, 12, 4096, 1, 0, 0, 0, 0)
        if opcode == _LOOKUP:
            if body.rstrip(b"\0") != FILE.encode():
                return errno.ENOENT, b""
            return 0, struct.pack("=QQQQII", _INODE, 0, _VALID_S, _VALID_S, 0, 0) + self._attributes(_INODE)
        if opcode == _GETATTR:
            return 0, struct.pack("=QII", _VALID_S, 0, 0) + self._attributes(inode)
        if opcode in (_OPEN, _OPENDIR):
            return 0, struct.pack("=QII", 0, 0, 0)
        if opcode == _READ:
            _, offset, size = struct.unpack_from("=QQI", body)
            return 0, self._content[offset : offset + size]
        return (0, b"") if opcode in (_RELEASE, _RELEASEDIR, _FLUSH) else (errno.ENOSYS, b"")

    def _attributes(self, inode: int) -> bytes:
        mode, size = (stat.S_IFDIR | 0o500, 0) if inode == _ROOT else (stat.S_IFREG | 0o400, len(self._content))
        blocks = -(-size // 512)
        owner = os.geteuid(), os.getegid()
        return _ATTR.pack(inode, size, blocks, 0, 0, 0, 0, 0, 0, mode, 1, *owner, 0, 4096, 0)
