"""The scratch file systems of this node: which root has which, and those that wait for the next root.

State (one event loop): ``_used`` are those of roots, from before they are made until they are empty; ``_idle`` are empty
and mounted, least recently used first, each with the monotonic time since when; ``_checking`` are tasks that see to one
that is neither. A file system is in one of the three, and moves without an await between the look and the change.
Blocking work is done in threads, by whoever has the file system.

Space: what is promised to roots may be more than the disk has. Files on a loop device get their place when the kernel
writes them back, long after the program did, and if the disk is full then they are lost. So while limited roots are in
use the pool looks at what is free, the more often the less there is, counts what is still to be written, and before
nothing is left has the kernel refuse writes that need space (:meth:`Scratch.squeeze`), with ENOSPC and at once.
"""

import asyncio
import logging
import os
import time
from pathlib import Path

from afs.core.errors import FailedPrecondition, ResourceExhausted
from afs.core.units import format_size
from afs.snapshotter.scratchfs import Scratch, Templates, clear_scratch, probe_scratch, rounded

log = logging.getLogger(__name__)
_FASTEST = 4 << 30  # bytes per second: what programs may write between two looks, at most
_LOOK_S = (0.02, 1.0)  # between two looks
_RELAX = 64 << 20  # bytes more than the reserve have to be free before writes go on
_STILL_HELD_S = (0.02, 0.1, 0.5)  # when to look again whether an emptied one is free
_MOST_RESERVE = 256 << 20


class ScratchPool:
    """Gives out file systems below *directory*; *keep* unused ones stay mounted, each for *idle_s* seconds at most.

    *reserve* bytes of the disk are left free by what roots write; 0: a hundredth of it, at most 256 MiB.
    """

    def __init__(self, directory: Path, *, keep: int, idle_s: float, reserve: int) -> None:
        self._directory = directory
        self._keep = keep
        self._idle_s = idle_s
        self._wanted_reserve = reserve
        self._reserve = 0
        self._templates = Templates()
        self._refusal = "it was not tried out"
        self._next = 0
        self._used: set[Scratch] = set()
        self._idle: dict[Scratch, float] = {}
        self._checking: set[asyncio.Task[None]] = set()
        self._expiry: asyncio.TimerHandle | None = None
        self._look: asyncio.TimerHandle | None = None
        self._squeezed = False
        self._closed = False

    def prepare(self) -> None:
        """Clear what a crash left, after the roots that used it, and find out whether this works here. Blocking, at start."""
        clear_scratch(self._directory)
        status = os.statvfs(self._directory)
        self._reserve = self._wanted_reserve or min(status.f_blocks * status.f_frsize // 100, _MOST_RESERVE)
        self._refusal = probe_scratch(self._directory)
        if self._refusal:
            log.warning("the size of roots cannot be limited: %s", self._refusal)

    def take(self, size: int) -> Scratch:
        """A file system for *size* bytes: an idle one, or one to be made. The caller owes it to :meth:`give_back`.

        FailedPrecondition if there are none here, ResourceExhausted if the disk is too full.
        """
        if self._refusal:
            raise FailedPrecondition(f"the size of roots cannot be limited here: {self._refusal}")
        margin = self._margin()
        if margin <= 0 or self._squeezed:
            left = format_size(max(margin + self._reserve, 0))
            raise ResourceExhausted(
                f"{left} are free at {self._directory}, and {format_size(self._reserve)} have to stay so"
            )
        size = rounded(size, self._directory)
        for found in reversed(self._idle):  # the most recently used: the kernel has most of it in memory
            if found.size == size and found.is_mounted():
                del self._idle[found]
                break
        else:
            self._next += 1
            found = Scratch(size, self._directory / str(self._next))
        found.was_squeezed = False
        self._used.add(found)
        self._look_again(margin)
        return found

    def make(self, scratch: Scratch) -> None:
        """Make it unless it is there. Blocking."""
        if not scratch.made:
            scratch.make(self._templates)

    def give_back(self, scratch: Scratch, why_not: str) -> None:
        """The root is gone, and :meth:`Scratch.empty`, called before, said *why_not* to use it again."""
        self._used.discard(scratch)
        if not scratch.made:
            return
        if scratch.squeezed:
            why_not = "the disk was full"
        if why_not:
            log.warning("dropping the file system at %s: %s", scratch.path, why_not)
            self._check(scratch, drop=True)
        elif not self._closed and scratch.is_empty() and scratch.is_small():
            self._put(scratch)
        else:
            self._check(scratch, drop=self._closed)

    def _put(self, scratch: Scratch) -> None:
        self._idle[scratch] = time.monotonic()
        if len(self._idle) > self._keep:
            self._drop_idle(next(iter(self._idle)))
        if self._expiry is None and self._idle:
            self._expiry = asyncio.get_running_loop().call_later(self._idle_s, self._expire)

    def _expire(self) -> None:
        self._expiry = None
        now = time.monotonic()
        for scratch, since in list(self._idle.items()):
            if since + self._idle_s > now:
                left = since + self._idle_s - now
                self._expiry = asyncio.get_running_loop().call_later(left, self._expire)
                return
            self._drop_idle(scratch)

    def _drop_idle(self, scratch: Scratch) -> None:
        del self._idle[scratch]
        self._check(scratch, drop=True)

    def _check(self, scratch: Scratch, *, drop: bool) -> None:
        """See to one that nobody has: drop it, or have it ready for the next root if that is possible soon."""
        task = asyncio.create_task(self._see_to(scratch, drop=drop), name=f"see to {scratch.path}")
        self._checking.add(task)
        task.add_done_callback(self._checking.discard)

    async def _see_to(self, scratch: Scratch, *, drop: bool) -> None:
        try:
            if not drop and await self._make_ready(scratch) and not self._closed:
                self._put(scratch)
                return
        except OSError as error:
            log.warning("dropping the file system at %s: %s", scratch.path, error)
        try:
            await asyncio.to_thread(scratch.drop)
        except OSError as error:  # the next start clears it
            log.error("cannot drop the file system at %s: %s", scratch.path, error)

    async def _make_ready(self, scratch: Scratch) -> bool:
        for delay in (0, *_STILL_HELD_S):
            if delay and not self._closed:
                await asyncio.sleep(delay)
            if scratch.is_empty():
                return await asyncio.to_thread(scratch.trim)
        log.info("dropping the file system at %s: somebody still uses what was in it", scratch.path)
        return False

    def _margin(self) -> int:
        """Bytes that may still be written before the reserve is touched."""
        status = os.statvfs(self._directory)
        pending = 0
        for scratch in self._used:
            try:
                pending += scratch.pending() if scratch.device else 0
            except OSError as error:  # it has gone meanwhile, or there is no sysfs
                log.debug("%s: %s", scratch.path, error)
        return status.f_bavail * status.f_frsize - pending - self._reserve

    def _look_again(self, margin: int) -> None:
        if self._look is None and not self._closed:
            least, most = _LOOK_S
            delay = min(max(margin / _FASTEST, least), most)
            self._look = asyncio.get_running_loop().call_later(delay, self._watch)

    def _watch(self) -> None:
        """Look at the space, and again as long as a limited root is in use."""
        self._look = None
        margin = self._margin()
        if self._used and (margin <= 0 or (self._squeezed and margin <= _RELAX)):
            if not self._squeezed:
                log.error("the disk of %s is full: roots of limited size cannot be written to", self._directory)
            self._squeeze(on=True)
        elif self._squeezed:
            log.info("there is space again at %s", self._directory)
            self._squeeze(on=False)
        if self._used:
            self._look_again(margin)

    @property
    def full(self) -> bool:
        """Whether limited roots cannot be written to, for the disk is full."""
        return self._squeezed

    def _squeeze(self, *, on: bool) -> None:
        self._squeezed = on
        for scratch in self._used:
            if scratch.made and scratch.squeezed is not on:
                try:
                    scratch.squeeze(on=on)
                except OSError as error:
                    log.error("writes to %s cannot be stopped: %s", scratch.path, error)

    async def settle(self) -> None:
        """Wait until every one that no root uses is ready for the next or dropped."""
        while self._checking:
            await asyncio.wait(self._checking)

    async def close(self) -> None:
        """Drop all that no root uses."""
        self._closed = True
        for timer in (self._expiry, self._look):
            if timer is not None:
                timer.cancel()
        for scratch in list(self._idle):
            self._drop_idle(scratch)
        await self.settle()
