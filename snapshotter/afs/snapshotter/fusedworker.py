"""One ``afs_fused`` process, and what it leaves in the pool's directory; see :mod:`afs.snapshotter.fusedworkers`."""

import asyncio
import contextlib
import fcntl
import logging
import os
import select
import signal
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from afs.core.digests import hex_of
from afs.core.errors import Unavailable
from afs.core.mounts import unmount
from afs.core.run import Child
from afs.snapshotter.fusedwire import ask

if TYPE_CHECKING:
    from collections.abc import Callable

log = logging.getLogger(__name__)
ANSWER_S = 5.0  # for what a worker says without asking anybody


class Worker:
    """One living ``afs_fused``. ``died`` is set when its process has ended, whatever ended it."""

    def __init__(self, directory: Path, number: int, pid: int, *, child: Child | None, usable: bool) -> None:
        self.number = number
        self.pid = pid
        self.usable = usable
        self.unmounted = False  # by somebody else: it serves what is mounted through it, and nobody can mount more
        self.died = asyncio.Event()
        self.mountpoint = directory / str(number)
        self.socket = directory / f"{number}.sock"
        self.child = child
        self.row = 0  # how many in a row, of which each replaced another, died soon after their start before it
        self.since = asyncio.get_running_loop().time()
        self.layers: Counter[str] = Counter()  # what it was given to serve, and is not released yet
        self._pidfd = os.pidfd_open(pid)

    def file(self, diff_id: str) -> Path:
        """The layer as one read-only file."""
        return self.mountpoint / "f" / hex_of(diff_id)

    def tree(self, diff_id: str, *, user_xattrs: bool = False) -> Path:
        """The layer's tree; *user_xattrs*: with overlayfs's marks as those mounted with ``userxattr`` read them."""
        return self.mountpoint / ("u" if user_xattrs else "t") / hex_of(diff_id)

    @property
    def in_place(self) -> bool:
        """Whether its file system is where it was mounted; asks the kernel only, never the worker."""
        return _mount_id(self.mountpoint) not in (None, _mount_id(self.mountpoint.parent))

    @property
    def alive(self) -> bool:
        """Whether its process runs; asks the kernel, for the loop may not have come to notice its end yet."""
        if self.died.is_set():
            return False
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        return not poll.poll(0)

    async def is_dead(self) -> bool:
        """Whether it died, for one that just failed: its files are closed some time before the kernel tells of its end.

        An answer tells that it lives. One that neither answers nor ends within seconds counts as living.
        """
        try:
            await ask(self.socket, ANSWER_S, op="hello")
        except Unavailable:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.died.wait(), ANSWER_S)
            return self.died.is_set()
        return False

    async def keep_only(self, mounted: Counter[str]) -> None:
        """Count what is *mounted* of it, and release all else: files that it has open and nobody unmounted in order.

        A snapshotter that was killed between an unmount and its release leaves some, which keep an evicted layer's space.
        """
        for diff_id in set(self.layers) - set(mounted):
            self.layers[diff_id] = 1
            await self.release(diff_id)
        self.layers = mounted

    async def release(self, diff_id: str) -> None:
        """A mount that :meth:`FusedWorkers.place` gave this worker for is gone: the layer's files may be closed."""
        self.layers[diff_id] -= 1
        if self.layers[diff_id] > 0:
            return
        del self.layers[diff_id]
        if not self.alive or not self.usable:
            return
        try:
            await ask(self.socket, ANSWER_S, op="release", diff_id=diff_id)
        except Unavailable as error:  # nothing is lost: it closes them when the kernel forgets the layer
            log.warning("%s", error.line)

    def watch(self, ended: "Callable[[Worker], None]") -> None:
        """Call *ended* when the process has ended."""
        asyncio.get_running_loop().add_reader(self._pidfd, ended, self)

    def forget(self) -> None:
        """Watch it no more; the process goes on."""
        asyncio.get_running_loop().remove_reader(self._pidfd)
        os.close(self._pidfd)

    def end(self) -> str:
        """Note that the process has ended; its status for people, "unknown" if it was not our child."""
        self.forget()
        self.died.set()
        return "unknown" if self.child is None else str(self.child.wait())

    def signal(self, signum: int) -> None:
        """Send *signum*; nothing happens if the process has ended."""
        if not self.died.is_set():  # else the pidfd is closed, and its number perhaps another file's
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signum)


def _mount_id(path: Path) -> int | None:
    """The number of the mount that *path* leads into, or None if there is no such path."""
    try:
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)  # stat(2) would ask the file system
    except FileNotFoundError:
        return None
    try:
        fields = dict(line.split(":\t") for line in Path(f"/proc/self/fdinfo/{fd}").read_text().splitlines())
        return int(fields["mnt_id"])
    finally:
        os.close(fd)


def is_held(lock: Path) -> bool:
    """Whether a living process has *lock*."""
    try:
        fd = os.open(lock, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def numbers(directory: Path) -> list[int]:
    """Those that have been given away, as far as anything of theirs is left."""
    if not directory.exists():  # no worker was ever needed
        return []
    return sorted({int(path.stem) for path in directory.iterdir() if path.stem.isdecimal()})


def clear_dead(directory: Path, *, anew: bool) -> None:
    """Remove what dead workers left; with *anew* their lock files too if none lives: the next pool begins at 0. Blocking.

    Otherwise a new worker could get the number of a dead one, and what is mounted through that one would count as its own.
    """
    dead = [number for number in numbers(directory) if not is_held(directory / f"{number}.lock")]
    last = anew and len(dead) == len(numbers(directory))
    for number in dead:
        clear_number(directory, number, keep_lock=not last)


def clear_number(directory: Path, number: int, *, keep_lock: bool) -> None:
    """Remove what a dead worker left. Blocking."""
    mountpoint = directory / str(number)
    unmount(str(mountpoint))
    with contextlib.suppress(FileNotFoundError):
        mountpoint.rmdir()
    (directory / f"{number}.sock").unlink(missing_ok=True)
    if not keep_lock:
        (directory / f"{number}.lock").unlink(missing_ok=True)
