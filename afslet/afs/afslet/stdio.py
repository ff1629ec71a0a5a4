"""The standard streams of a container: pipes, or a terminal.

The runtime starts the container detached, so the command has our pipes themselves: nothing but the kernel is between it
and us. While :data:`Output` waits, the pipe fills and the command waits as well.

State: all of it belongs to one task's event loop. Of each pipe the container's side is closed as soon as the runtime was
started, or no end of file would ever come.
"""

import array
import asyncio
import contextlib
import errno
import fcntl
import os
import select
import socket
import struct
import termios
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import NamedTuple, Protocol

from afs.core.errors import Internal

Output = Callable[[str, bytes], Awaitable[None]]
"""Takes what came from ``stdout`` or ``stderr``."""
_READ_SIZE = 1 << 16  # what a pipe holds as it is made
_LARGE = 1 << 19  # once a command has filled that: fewer, larger messages
_F_SETPIPE_SZ = 1031
_EOT = b"\x04"  # VEOF of a new terminal


class Window(NamedTuple):
    """The size of a terminal, in characters."""

    rows: int
    columns: int


class Stdio(Protocol):
    """The streams of one container."""

    stdin: int
    stdout: int
    stderr: int
    """What the runtime gets, as descriptors."""

    def arguments(self) -> list[str]:
        """Arguments of the runtime's ``run``."""
        ...

    def started(self) -> None:
        """The runtime has been started: close what is the container's alone."""
        ...

    async def copy(self, output: Output) -> None:
        """Give everything that the container writes to *output*, until nobody can write any more."""
        ...

    async def write(self, data: bytes) -> None:
        """Give *data* to the command's standard input; dropped if nobody reads it any more."""
        ...

    def end_input(self) -> None:
        """End of file on standard input."""
        ...

    def resize(self, window: Window) -> None:
        """The terminal has another size."""
        ...

    def close(self) -> None:
        """Close everything."""
        ...


class _Descriptors:
    """Descriptors that are closed once."""

    def __init__(self) -> None:
        self._open: set[int] = set()

    def own(self, *fds: int) -> None:
        self._open.update(fds)

    def close(self, *fds: int) -> None:
        for fd in fds:
            if fd in self._open:
                self._open.discard(fd)
                os.close(fd)

    def close_all(self) -> None:
        self.close(*self._open.copy())


class Pipes:
    """Three pipes; without *stdin* standard input is /dev/null."""

    def __init__(self, *, stdin: bool = False) -> None:
        self._fds = _Descriptors()
        self._input = -1
        try:
            if stdin:
                self.stdin, self._input = os.pipe2(os.O_CLOEXEC)
                self._fds.own(self.stdin, self._input)
                os.set_blocking(self._input, False)
            else:
                self.stdin = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
                self._fds.own(self.stdin)
            self._out, self.stdout = os.pipe2(os.O_CLOEXEC)
            self._fds.own(self._out, self.stdout)
            self._err, self.stderr = os.pipe2(os.O_CLOEXEC)
            self._fds.own(self._err, self.stderr)
        except BaseException:
            self.close()
            raise

    def arguments(self) -> list[str]:
        return []

    def started(self) -> None:
        self._fds.close(self.stdin, self.stdout, self.stderr)

    async def copy(self, output: Output) -> None:
        reading = [
            asyncio.create_task(_read_all(fd, source, output))
            for source, fd in (("stdout", self._out), ("stderr", self._err))
        ]
        try:
            await asyncio.gather(*reading)
        finally:
            for task in reading:
                task.cancel()
            await asyncio.wait(reading)

    async def write(self, data: bytes) -> None:
        if self._input >= 0 and not await _write_all(self._input, data):
            self.end_input()

    def end_input(self) -> None:
        self._fds.close(self._input)
        self._input = -1

    def resize(self, window: Window) -> None:
        pass

    def close(self) -> None:
        self._input = -1  # who still writes must not write to what has its number next
        self._fds.close_all()


class Terminal:
    """A pseudo-terminal that the runtime makes and sends to the socket *path* (runc's docs/terminals.md).

    *window* is its first size. What the runtime itself writes goes to *errors*, a descriptor.
    """

    def __init__(self, path: Path, window: Window) -> None:
        self._fds = _Descriptors()
        self._path = path
        self._window = window
        self._master: int | None = None
        self._made = asyncio.Event()  # set with the terminal, or when there will be none
        self._ended = self._accepted = False
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            self._socket.bind(str(path))
            self._socket.listen(1)
            self._socket.setblocking(False)
            self.stdin = self.stdout = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
            self._fds.own(self.stdin)
            self._err, self.stderr = os.pipe2(os.O_CLOEXEC)
            self._fds.own(self._err, self.stderr)
        except BaseException:
            self.close()
            raise

    def arguments(self) -> list[str]:
        return ["--console-socket", str(self._path)]

    def started(self) -> None:
        self._fds.close(self.stdin, self.stderr)

    async def copy(self, output: Output) -> None:
        """Output is all of ``stdout``; the runtime's own words, before the terminal is there, are ``stderr``."""
        errors = asyncio.create_task(_read_all(self._err, "stderr", output))
        receiving = asyncio.create_task(self._receive())
        try:
            # The runtime's end closes the pipe; if it sent no terminal by then, it never will.
            await asyncio.wait({receiving, errors}, return_when=asyncio.FIRST_COMPLETED)
            if not receiving.done() and not self._is_coming():
                return
            self._master = await receiving
            self._fds.own(self._master)
            self.resize(self._window)
            os.set_blocking(self._master, False)
            self._made.set()
            if self._ended:
                self.end_input()
            await _read_all(self._master, "stdout", output)
            await errors
        finally:
            self._made.set()
            for task in (errors, receiving):
                task.cancel()
            await asyncio.wait({errors, receiving})

    def _is_coming(self) -> bool:
        """Whether the runtime has connected; what it sent is in the kernel then, however late we look."""
        return self._accepted or bool(select.select([self._socket], [], [], 0)[0])

    async def _receive(self) -> int:
        loop = asyncio.get_running_loop()
        connection, _ = await loop.sock_accept(self._socket)
        self._accepted = True
        with connection:
            readable = asyncio.Event()
            loop.add_reader(connection, readable.set)
            try:
                await readable.wait()
            finally:
                loop.remove_reader(connection)
            _, ancillary, _, _ = connection.recvmsg(4096, socket.CMSG_SPACE(4), socket.MSG_CMSG_CLOEXEC)
        fds = array.array("i")
        for level, kind, data in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
        if not fds:
            raise Internal("the runtime connected for a terminal, and sent none")
        return fds[0]

    async def write(self, data: bytes) -> None:
        await self._made.wait()
        if self._master is not None:
            await _write_all(self._master, data)

    def end_input(self) -> None:
        self._ended = True
        if self._master is not None:
            with contextlib.suppress(OSError):  # EIO: nobody has the terminal open any more
                os.write(self._master, _EOT)

    def resize(self, window: Window) -> None:
        self._window = window
        if self._master is not None:
            size = struct.pack("HHHH", window.rows, window.columns, 0, 0)
            fcntl.ioctl(self._master, termios.TIOCSWINSZ, size)  # the kernel tells the foreground processes: SIGWINCH

    def close(self) -> None:
        self._master = None  # who still writes must not write to what has its number next
        self._fds.close_all()
        self._socket.close()
        self._path.unlink(missing_ok=True)


async def _read_all(fd: int, source: str, output: Output) -> None:
    """Read *fd* to its end without blocking the loop."""
    loop, readable = asyncio.get_running_loop(), asyncio.Event()
    os.set_blocking(fd, False)
    size = _READ_SIZE
    loop.add_reader(fd, readable.set)
    waiting = True
    try:
        while True:
            try:
                data = os.read(fd, size)
            except BlockingIOError:
                if not waiting:
                    loop.add_reader(fd, readable.set)
                    waiting = True
                readable.clear()
                await readable.wait()
                continue
            except OSError as error:
                if error.errno == errno.EIO:  # a terminal that nobody has open any more
                    return
                raise
            if not data:
                return
            if waiting:
                # While there is something to read, it would be told at every turn of the loop.
                loop.remove_reader(fd)
                waiting = False
            if len(data) == size == _READ_SIZE:
                size = _enlarge(fd)
            await output(source, data)
    finally:
        if waiting:
            loop.remove_reader(fd)


def _enlarge(fd: int) -> int:
    """Have a pipe hold more; how much may be read from it at once."""
    try:
        fcntl.fcntl(fd, _F_SETPIPE_SZ, _LARGE)
    except OSError as error:
        # EBADF: a terminal. EPERM: over the user's limit of pipe memory; it works, with more and smaller messages.
        if error.errno not in (errno.EBADF, errno.EPERM):
            raise
        return _READ_SIZE + 1
    return _LARGE


async def _write_all(fd: int, data: bytes) -> bool:
    """Write to a descriptor that does not block; False if nobody can read it any more."""
    loop, view = asyncio.get_running_loop(), memoryview(data)
    while view:
        try:
            view = view[os.write(fd, view) :]
        except BlockingIOError:
            writable = asyncio.Event()
            loop.add_writer(fd, writable.set)
            try:
                await writable.wait()
            finally:
                loop.remove_writer(fd)
        except OSError as error:
            if error.errno in (errno.EPIPE, errno.EIO):
                return False
            raise
    return True
