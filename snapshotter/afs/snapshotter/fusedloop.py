"""pyfuse3 on asyncio, waiting for requests in a way that costs little.

pyfuse3 is written for trio; its asyncio mode is a stand-in for the few names of trio that it uses. The stand-in's way to wait
for a request costs more than most requests: a reader is added to the event loop and removed again, a lock passes from task
to task, and the loop turns three times. Measured on a 2-core VM with getxattr over FUSE: 83 µs of CPU for each, kernel
included, 23 µs with what is here.

As long as requests come, the task that answers them blocks in poll(2) itself, for at most ``_LINGER_MS``, on the FUSE
descriptor and on the loop's own (which is readable when the loop has something to do). The loop gets its turns: when its
descriptor says so, after each ``_BURST`` requests, and whenever no request came in time. It is not kept waiting at all
while *busy* says that requests are being waited for elsewhere.

The descriptor does not block. The kernel takes a request back when its asker is killed before anybody has read it, so a
descriptor that was readable a moment ago may have nothing to read; read(2) would sleep till the next request, and with it
all requests that are being answered, and the control socket. pyfuse3 takes EAGAIN for the end of the task that answers;
here that task begins anew. Its buffer is lost then: 1 MiB of address space, of which only the pages that requests
reached are memory.

State: of one process and one event loop, as pyfuse3's own.
"""

import asyncio
import functools
import os
import select
from collections import deque
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Any

import pyfuse3
import pyfuse3.asyncio
from typing_extensions import override

_LINGER_MS = 2  # what a question on the control socket may wait at most when the kernel asks nothing
_BURST = 16


class _Lock:
    """An asyncio.Lock that its last holder may take again before those who wait get it.

    pyfuse3 has a task that answers, and one that waits to take over should the answer take long. With a fair lock the two
    of them swap places with every request.
    """

    def __init__(self) -> None:
        self._locked = False
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._passing = False

    async def __aenter__(self) -> None:
        while self._locked:
            future = asyncio.get_running_loop().create_future()
            self._waiting.append(future)
            await future
        self._locked = True

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._locked = False
        if self._waiting and not self._passing:
            self._passing = True
            asyncio.get_running_loop().call_soon(self._pass_on)

    def _pass_on(self) -> None:
        self._passing = False
        if self._locked:
            return  # it is passed on when it is free next
        while self._waiting:
            future = self._waiting.popleft()
            if not future.done():
                future.set_result(None)
                return


class _Waiting:
    """Waits for the FUSE descriptor, of which there is one."""

    def __init__(self, loop_fd: int, busy: Callable[[], bool]) -> None:
        self._loop_fd = loop_fd
        self._busy = busy
        self._poll = select.poll()
        self._poll.register(loop_fd, select.POLLIN)
        self._fd = -1
        self._served = 0

    async def wait_readable(self, fd: int) -> None:
        if fd != self._fd:
            self._fd = fd
            os.set_blocking(fd, False)
            self._poll.register(fd, select.POLLIN)
        self._served += 1
        if self._served % _BURST == 0 or self._busy():
            await asyncio.sleep(0)
        ready = dict(self._poll.poll(0 if self._busy() else _LINGER_MS))
        if self._loop_fd in ready:
            await asyncio.sleep(0)
        if fd not in ready:
            await _readable(fd)


async def _readable(fd: int) -> None:
    loop = asyncio.get_running_loop()
    future: asyncio.Future[None] = loop.create_future()
    loop.add_reader(fd, _set, future)
    try:
        await future
    finally:
        loop.remove_reader(fd)


def _set(future: "asyncio.Future[None]") -> None:
    if not future.done():
        future.set_result(None)


class _Nursery(pyfuse3.asyncio._Nursery):
    """Its tasks begin anew after a request that was taken back."""

    @override
    def start_soon(self, func: Callable[..., Awaitable[None]], *args: Any, name: str | None = None) -> None:
        super().start_soon(functools.partial(_begin_anew, func), *args, name=name)


async def _begin_anew(session_loop: Callable[..., Awaitable[None]], *args: Any) -> None:
    while True:
        try:
            return await session_loop(*args)
        except BlockingIOError:  # of the FUSE descriptor: handlers raise nothing but FUSEError
            await asyncio.sleep(0)


def enable(loop_fd: int, busy: Callable[[], bool]) -> None:
    """Have pyfuse3 run on the event loop whose selector is *loop_fd*. *busy*: whether an answer is being waited for."""
    pyfuse3.asyncio.enable()
    stand_in: Any = pyfuse3.asyncio
    stand_in.Lock = _Lock
    stand_in.open_nursery = _Nursery
    stand_in.wait_readable = _Waiting(loop_fd, busy).wait_readable
