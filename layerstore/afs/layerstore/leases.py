"""Who needs which layers: what is leased is never evicted.

Six kinds of lease, over one set of diff_ids:

- *pins* are counted and last as long as a block of code: a pull, a fill, a call that is being answered;
- *timed* leases last 60 s after a peer asked for anything of a layer: it is about to ask for more;
- *handovers* bridge the gap between an answer of OpenImage and the mounts: until the snapshotter reports that it is
  done with that call, 60 s at most;
- *in use* is what the snapshotter reports: mounted, with users;
- *idle* is what it reports mounted without users, until it is unmounted. Its space would not be free after an unlink,
  since the mount holds the file open; but the snapshotter can be asked to unmount it;
- *kept* is what it reports mounted for attached roots: they outlive it, so that holds until the next report, and over
  restarts of this service, until the machine is booted.

State and locks (one event loop). A snapshotter's stream is its lease. There is one snapshotter per layerstore (its lock
file sees to that), so the newest stream speaks for the node and its report replaces all that was known. When a stream
ends, what it said holds for ``grace`` seconds: its mounts are still there, whatever became of it. Before the first
stream nothing is known, so for as long everything counts as in use. Nothing here awaits but :meth:`Leases.known` and
:meth:`Leases.release`: whoever decides to evict looks at the leases and takes the layer out of the maps without an await.
"""

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator

Release = Callable[[Collection[str]], None]  # asks the snapshotter to unmount these; it answers with a report
LEASE_S = 60.0


class Leases:
    """*grace* in seconds; *now* is a monotonic clock; ``changed`` is called when something may have become free.

    ``remember`` is called with all that is kept, when that changes; *kept* is what it was told last in this boot.
    """

    def __init__(
        self, grace: float, now: Callable[[], float] = time.monotonic, kept: frozenset[str] = frozenset()
    ) -> None:
        self._grace = grace
        self._now = now
        self._until = now() + grace  # without a stream: how long what is known holds
        self._pins: Counter[str] = Counter()
        self._timed: dict[str, float] = {}
        self._handovers: dict[int, tuple[frozenset[str], float]] = {}
        self._in_use: frozenset[str] = frozenset()
        self._idle: frozenset[str] = frozenset()
        self._kept = kept
        self._stream: Release | None = None
        self._first = asyncio.Event()
        self._reports: set[asyncio.Event] = set()  # of those who wait for the next report
        self.changed: Callable[[], None] = lambda: None
        self.remember: Callable[[frozenset[str]], None] = lambda kept: None

    def serve(self) -> None:
        """The snapshotter can reach this node from now on: its time to report begins."""
        self._until = self._now() + self._grace

    @contextlib.contextmanager
    def pinned(self, diff_ids: Iterable[str]) -> Iterator[None]:
        """Hold layers, here or not, while the block runs."""
        held = tuple(diff_ids)
        self._pins.update(held)
        try:
            yield
        finally:
            for diff_id in held:
                self._pins[diff_id] -= 1
                if not self._pins[diff_id]:
                    del self._pins[diff_id]

    def lease(self, diff_id: str) -> None:
        """Hold a layer for ``LEASE_S`` from now."""
        self._timed[diff_id] = self._now() + LEASE_S

    def hand_over(self, number: int, diff_ids: Iterable[str]) -> None:
        """Hold what OpenImage call *number* gets until the snapshotter has reported on it; 0 is no call of a snapshotter."""
        held = frozenset(diff_ids)
        if number:
            self._handovers[number] = held, self._now() + LEASE_S
        else:
            for diff_id in held:
                self.lease(diff_id)

    def forget(self, diff_id: str) -> None:
        """What peers asked for earlier keeps the layer no more: it was evicted, or is damaged for good."""
        self._timed.pop(diff_id, None)

    # What the snapshotter says

    @property
    def connected(self) -> bool:
        """Whether a snapshotter's stream is there."""
        return self._stream is not None

    def connect(self, release: Release) -> None:
        """A stream of the snapshotter began; it takes the place of an older one."""
        self._stream = release

    def disconnect(self, release: Release) -> None:
        """The stream ended. Nothing happens if another one took its place."""
        if self._stream is release:
            self._stream = None
            self._until = self._now() + self._grace
            self._wake()

    def report(
        self,
        release: Release,
        in_use: Iterable[str],
        idle: Iterable[str],
        last_opened: int = 0,
        opening: Collection[int] = (),
        kept: Iterable[str] = (),
    ) -> Collection[str]:
        """What the stream's snapshotter has mounted, see LeaseUpdate; returns what is no longer in use."""
        if self._stream is not release:
            return ()
        for number in [number for number in self._handovers if number <= last_opened and number not in opening]:
            del self._handovers[number]
        before = self._in_use
        self._in_use = frozenset(in_use)
        self._idle = frozenset(idle) - self._in_use
        before_kept, self._kept = self._kept, frozenset(kept)
        if self._kept != before_kept:
            self.remember(self._kept)
        self._first.set()
        self._wake()
        self.changed()
        return before - self._in_use

    def _wake(self) -> None:
        for event in self._reports:
            event.set()

    @property
    def in_use(self) -> frozenset[str]:
        """What is mounted and has users, as far as was reported."""
        return self._in_use

    # What follows from it

    def _mounts_known(self) -> bool:
        return self._stream is not None or self._now() < self._until

    def is_leased(self, diff_id: str) -> bool:
        """Whether the layer has to stay, whatever happens."""
        return diff_id in self._pins or self.is_needed(diff_id)

    def is_needed(self, diff_id: str) -> bool:
        """Whether somebody has the layer mounted, is about to, or reads from it as a peer: :meth:`is_leased` without pins."""
        until = self._timed.get(diff_id)
        if until is not None:
            if self._now() < until:
                return True
            del self._timed[diff_id]
        if diff_id in self._kept or self._is_handed_over(diff_id):
            return True
        if not self._first.is_set():
            return self._now() < self._until
        return self._mounts_known() and (diff_id in self._in_use or (self._stream is None and diff_id in self._idle))

    def _is_handed_over(self, diff_id: str) -> bool:
        for number, (diff_ids, until) in list(self._handovers.items()):
            if self._now() >= until:
                del self._handovers[number]
            elif diff_id in diff_ids:
                return True
        return False

    def is_mounted(self, diff_id: str) -> bool:
        """Whether the snapshotter has it mounted, as far as is known, or is about to."""
        mounted = self._in_use, self._idle, self._kept
        return any(diff_id in diff_ids for diff_ids in mounted) or self._is_handed_over(diff_id)

    def is_idle_mount(self, diff_id: str) -> bool:
        """Whether it is mounted without users, so that :meth:`release` can set it free."""
        return self._stream is not None and diff_id in self._idle

    def is_free(self, diff_id: str) -> bool:
        """Whether evicting the layer takes it from nobody and gives its space back."""
        return not self.is_leased(diff_id) and not self.is_idle_mount(diff_id)

    async def known(self) -> None:
        """Wait until the snapshotter has reported for the first time, or its time for that is over."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max(self._until - self._now(), 0)):
                await self._first.wait()

    async def release(self, diff_ids: Collection[str], timeout: float) -> None:
        """Ask the snapshotter to unmount idle layers; returns when all are or it said no, at the latest after *timeout*."""
        if self._stream is None:
            return
        event = asyncio.Event()
        self._reports.add(event)
        self._stream(diff_ids)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                while self.connected and not self._idle.isdisjoint(diff_ids):
                    event.clear()
                    await event.wait()
        self._reports.discard(event)
