"""Network namespaces for runs: made ahead, used once, and held by nothing but a descriptor of this process.

State: a :class:`Pool` belongs to the event loop; its thread only makes namespaces and hands over descriptors. Between two
awaits, ready + being made >= those that wait. A namespace goes with its descriptor and the last process in it, so a
killed afslet leaves none.

Measured on two cores with Linux 6.18: making one takes 0.2 ms, nearly all of it CPU time of the kernel, and closing
one 1 us plus what the kernel cleans up in the background; taking one from the pool takes 10 us, with the order for another.
"""

import asyncio
import logging
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

from afs.core.errors import AfsError, Unavailable
from afs.core.syscalls import CLONE_NEWNET, set_interface_up, setns, unshare

log = logging.getLogger(__name__)
_SYSCTL = Path("/proc/sys/net/ipv4")  # of the network namespace of the thread that opens the file
# As Docker has them: nobody in a container has rights over its network namespace, and ports below 1024 and ping work
# nevertheless, also for users other than root and in user namespaces.
_SYSCTLS = {"ip_unprivileged_port_start": "0", "ping_group_range": "0 2147483647"}


@contextmanager
def staying() -> Iterator[None]:
    """Have the calling thread be in the network namespace that it is in now again afterwards."""
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        try:
            yield
        finally:
            setns(home, CLONE_NEWNET)
    finally:
        os.close(home)


@contextmanager
def inside(namespace: int) -> Iterator[None]:
    """Have the calling thread, which has no other work, be in the network namespace of a descriptor."""
    with staying():
        setns(namespace, CLONE_NEWNET)
        yield


def make_namespace() -> int:
    """A descriptor (close-on-exec) of a new network namespace that has loopback up and nothing else.

    The calling thread is in it for a moment. OSError.
    """
    with staying():
        unshare(CLONE_NEWNET)
        set_interface_up("lo")
        for name, value in _SYSCTLS.items():
            (_SYSCTL / name).write_text(value, encoding="ascii")
        return os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)


class Pool:
    """*size* namespaces that are ready, as long as they are not taken faster than they are made."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._thread = ThreadPoolExecutor(1, "afs-netns")
        self._ready: deque[int] = deque()
        self._waiting: deque[asyncio.Future[int]] = deque()
        self._making = 0
        self._closed = False

    def start(self) -> None:
        """Begin to make namespaces; within the event loop."""
        self._make_more()

    def close(self) -> None:
        """Give back those that nobody took."""
        self._closed = True
        self._thread.shutdown(cancel_futures=True)
        for namespace in self._ready:
            os.close(namespace)
        self._ready.clear()

    async def take(self) -> int:
        """A descriptor of a namespace of the caller's own, to be closed by it. Unavailable if none can be made."""
        if self._ready:
            namespace = self._ready.popleft()
            self._make_more()
            return namespace
        waiter: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._waiting.append(waiter)
        self._make_more()
        try:
            return await waiter
        except asyncio.CancelledError:
            with suppress(ValueError):
                self._waiting.remove(waiter)
            if not waiter.cancelled() and waiter.exception() is None:  # it came at the same time
                self._ready.append(waiter.result())
            raise

    def _make_more(self) -> None:
        loop = asyncio.get_running_loop()

        def hand_over(done: "Future[int]") -> None:
            if done.cancelled():
                return
            with suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(self._made, done)
                return
            if done.exception() is None:
                os.close(done.result())

        while not self._closed and len(self._ready) + self._making < self._size + len(self._waiting):
            self._making += 1
            self._thread.submit(make_namespace).add_done_callback(hand_over)

    def _made(self, done: "Future[int]") -> None:
        self._making -= 1
        while self._waiting and self._waiting[0].done():  # cancelled, and not awake yet
            self._waiting.popleft()
        waiter = self._waiting.popleft() if self._waiting else None
        error = done.exception()
        if error is not None:
            failure: BaseException = error
            if isinstance(error, OSError):
                failure = Unavailable(f"no network namespace can be made: {error.strerror}")
            if waiter is not None:
                waiter.set_exception(failure)
            else:
                log.warning("%s", failure.line if isinstance(failure, AfsError) else failure)
        elif self._closed:
            os.close(done.result())
        elif waiter is not None:
            waiter.set_result(done.result())
        else:
            self._ready.append(done.result())
