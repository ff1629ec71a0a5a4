"""Making room in the cache: evicting layers that nobody needs, before a pull and when the disk gets full.

State and locks (one event loop). :class:`Quota` has the sums, :class:`Leases` says what must stay. ``_making`` lets one
task at a time make room, so that nobody counts on a victim of another. The decision for a victim is one step without an
await: it is free of leases, leaves the maps of :class:`~afs.layerstore.layers.Layers` and the quota, and its files are
renamed into ``tmp/``. Whoever looks it up afterwards finds it absent; whoever found it before holds a lease. The files
are deleted after that, in a thread.

Two limits hold: the capacity, and the free space that the file system keeps whoever fills it. A pull that cannot have
its certain part within both is refused. Reads of what is mounted are not: a chunk that a container waits for is written
as long as the disk takes it, and :meth:`Room.run` evicts others behind it.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from afs.core.errors import AfsError
from afs.core.units import format_size
from afs.layerstore.errors import CacheFull
from afs.layerstore.leases import Leases
from afs.layerstore.quota import Quota, Reservation
from afs.layerstore.store import LayerStore, delete_all

log = logging.getLogger(__name__)
HIGH, LOW = 0.95, 0.90  # of the capacity: above the one, run() evicts down to the other
LOOK_S = 60.0  # others may fill the disk, and leases end, without an event for us
RELEASE_S = 5.0  # how long the snapshotter may take to unmount what it does not use
NOTE_S = 0.05  # of a layer that grows the size is looked up at most this often
PERSIST_S = 60.0  # last uses are put on disk at most this often for a layer
_GUESS = 4  # how many times its compressed size a layer's tar is, for lack of anything better


class CachedLayer(NamedTuple):
    """*used* in bytes, *last_use* in seconds since the epoch."""

    diff_id: str
    used: int
    leased: bool
    last_use: float


class CacheStatus(NamedTuple):
    """Sizes in bytes; layers least recently used first; *evicted* counts layers since the start."""

    capacity: int
    used: int
    reserved: int
    free: int
    evicted: int
    layers: list[CachedLayer]


class Room:
    """Space for layers in *store*; *headroom* in bytes stays free on its file system. *node* is for messages."""

    def __init__(self, store: LayerStore, quota: Quota, leases: Leases, *, headroom: int, node: str = "") -> None:
        self._store = store
        self._quota = quota
        self.leases = leases
        self._headroom = headroom
        self._node = node
        self._paths: dict[Reservation, Path] = {}
        self._persisted: dict[str, float] = {}
        self._growing: dict[str, bool] = {}  # what note_soon knows; true: it has grown since
        self._making = asyncio.Lock()
        self._look = asyncio.Event()
        self._evicted = 0
        self._stampable = True  # as far as is known: it is logged once if not
        # Takes a layer out of every map and gives the files to delete; Layers puts its own in place.
        self.detach: Callable[[str], list[Path]] = store.detach
        leases.changed = self._look.set

    # Accounting

    def note(self, diff_id: str) -> None:
        """The layer's files are new or have grown."""
        used, last_use = self._store.usage(diff_id)
        self._quota.put(diff_id, used, last_use)
        if self._short_of(HIGH, likely=False) > 0:
            self._look.set()

    def note_soon(self, diff_id: str) -> None:
        """The same of a layer that grows and grows: now, if that was not done within ``NOTE_S``, or else after that time."""
        if diff_id in self._growing:
            self._growing[diff_id] = True
            return
        self._growing[diff_id] = False
        asyncio.get_running_loop().call_later(NOTE_S, self._note_grown, diff_id)
        self.note(diff_id)

    def _note_grown(self, diff_id: str) -> None:
        if self._growing.pop(diff_id) and diff_id in self._quota:
            self.note(diff_id)

    def use(self, diff_id: str) -> None:
        """The layer is used now; on disk that is its files' mtime, which reading does not change."""
        now = time.time()
        self._quota.touch(diff_id, now)
        if now - self._persisted.get(diff_id, 0.0) >= PERSIST_S:
            self._persisted[diff_id] = now
            try:
                self._store.stamp(diff_id, now)
            except OSError as error:  # known all the same, until a restart
                if self._stampable:
                    log.warning("cannot remember on disk when layers were used: %s", error)
                self._stampable = False

    def restore(self, diff_ids: Collection[str]) -> None:
        """Count what an earlier process left, in the order of its last use. Blocking, at start."""
        for last_use, diff_id, used in sorted(
            (usage[1], d, usage[0]) for d in diff_ids for usage in [self._store.usage(d)]
        ):
            self._quota.put(diff_id, used, last_use)

    def layers(self) -> list[str]:
        """All layers that count, least recently used first."""
        return self._quota.layers()

    def forget(self, diff_id: str) -> None:
        """The layer is gone."""
        self._quota.remove(diff_id)
        self._persisted.pop(diff_id, None)
        self.leases.forget(diff_id)

    def usage(self, diff_ids: Iterable[str]) -> dict[str, int]:
        """Bytes on disk of those layers that are here, as :meth:`status` has them."""
        return {diff_id: self._quota.used_by(diff_id) for diff_id in diff_ids if diff_id in self._quota}

    def status(self) -> CacheStatus:
        """A snapshot."""
        quota = self._quota
        layers = [
            CachedLayer(diff_id, quota.used_by(diff_id), self.leases.is_leased(diff_id), quota.last_use(diff_id))
            for diff_id in quota.layers()
        ]
        return CacheStatus(quota.capacity, quota.used, quota.likely, self._store.free(), self._evicted, layers)

    def _short_of(self, level: float, *, likely: bool = True) -> int:
        """Bytes to evict until use and promises are within *level* of the capacity and the headroom is there."""
        promised = self._quota.likely if likely else self._quota.least
        over = self._quota.used + promised - int(level * self._quota.capacity)
        missing = 0  # of each by itself: what one wrote beyond its promise is not room for another
        for reservation in self._quota.reservations():
            path = self._paths.get(reservation)
            size = reservation.likely if likely else reservation.least
            missing += max(size - (_allocated(path) if path is not None else 0), 0)
        return max(over, self._headroom + missing - self._store.free())

    def has_free(self, size: int) -> bool:
        """Whether *size* bytes more fit without anything going for them, now or soon."""
        return self._short_of(HIGH) + size <= 0

    # Reservations

    @contextlib.asynccontextmanager
    async def reserved(
        self, diff_id: str, least: int, *, compressed: bool = False, path: Path | None = None
    ) -> AsyncIterator[Reservation]:
        """Room for a layer of *least* bytes while the block runs, or of some times as many if it comes *compressed*.

        What is written meanwhile goes to *path* and counts as written. The layer is pinned. Raises CacheFull.
        """
        reservation = self._quota.reserve(diff_id, least, least * _GUESS if compressed else least)
        if path is not None:
            self._paths[reservation] = path
        try:
            with self.leases.pinned([diff_id]):
                await self._fit(reservation)
                yield reservation
        finally:
            self._quota.release(reservation)
            self._paths.pop(reservation, None)

    @contextlib.contextmanager
    def spare(self, diff_id: str, likely: int) -> Iterator[bool]:
        """Whether *likely* bytes more of a layer fit without anybody being evicted, now or by :meth:`run`.

        For what nobody may ever need: while the block runs they are promised, but refused to nobody else.
        """
        reservation = self._quota.reserve(diff_id, 0, likely)
        try:
            yield self._short_of(HIGH) <= 0
        finally:
            self._quota.release(reservation)

    async def grow(self, reservation: Reservation) -> None:
        """Look at what was written so far: more than was guessed needs more room. Raises CacheFull."""
        written = _allocated(self._paths[reservation])
        if written > reservation.likely:
            reservation.least, reservation.likely = written, 2 * written
            await self._fit(reservation)

    async def correct(self, reservation: Reservation, size: int) -> None:
        """The layer takes *size* bytes, as it turned out. Raises CacheFull."""
        reservation.least = reservation.likely = size
        await self._fit(reservation)

    def settle(self, reservation: Reservation) -> None:
        """The layer is here; its room counts as used from now on."""
        reservation.least = reservation.likely = 0
        self._paths.pop(reservation, None)
        self.note(reservation.diff_id)

    async def _fit(self, reservation: Reservation) -> None:
        if self._short_of(1.0) <= 0:
            return
        async with self._making:
            if await self._make(1.0) > 0 and self._short_of(1.0, likely=False) > 0:
                quota = self._quota
                # Its own part is not what fills the cache.
                used = quota.used + quota.least - reservation.least
                sizes = reservation.least, used, quota.capacity, self._store.free(), self._headroom
                raise CacheFull(self._node, reservation.diff_id, *sizes)

    # Eviction

    async def _make(self, level: float, *, guesses: bool = True) -> int:
        """Evict until :meth:`_short_of` *level* is 0 or less, or nothing is left to go; what is still short, in bytes.

        For *guesses* nothing is evicted if what is certain would not fit even then.
        """
        await self.leases.known()
        refused: set[str] = set()

        def may_go(diff_id: str) -> bool:
            return diff_id not in refused and not self.leases.is_leased(diff_id)

        while (short := self._short_of(level, likely=guesses)) > 0:
            victims = self._quota.oldest(short, may_go)
            reachable = sum(self._quota.used_by(diff_id) for diff_id in victims)
            if not victims or (guesses and self._short_of(level, likely=False) > reachable):
                break
            refused |= await self._evict(victims)
        return short

    async def _evict(self, victims: Collection[str]) -> set[str]:
        """Evict *victims*; those that turned out to be needed."""
        idle = [diff_id for diff_id in victims if self.leases.is_idle_mount(diff_id)]
        if idle:
            await self.leases.release(idle, RELEASE_S)
        free = [diff_id for diff_id in victims if self.leases.is_free(diff_id)]
        await self._delete(self._take(free))
        return set(victims).difference(free)

    def _take(self, diff_ids: Collection[str]) -> list[Path]:
        """Take layers out of the cache, without an await; what is to be deleted."""
        paths = []
        for diff_id in diff_ids:
            used = self._quota.used_by(diff_id)
            paths += self.detach(diff_id)
            self.forget(diff_id)
            self._evicted += 1
            log.info("evicted layer %s: %s", diff_id, format_size(used))
        return paths

    async def _delete(self, paths: list[Path]) -> None:
        await asyncio.shield(asyncio.to_thread(delete_all, paths))

    async def drop(self, diff_id: str) -> bool:
        """Evict this layer if nobody needs it; whether it is gone."""
        async with self._making:
            await self._evict([diff_id])
        return not self._quota.used_by(diff_id)

    async def on_full_disk(self, wanted: int) -> bool:
        """The disk took no more, whatever the sums say: evict *wanted* bytes; whether anything went meanwhile."""
        evicted = self._evicted
        async with self._making:
            # What one writer evicts is usually enough for all that waited. Free space alone says nothing: a quota may be full.
            if self._evicted > evicted and self._store.free() >= wanted:
                return True
            await self.leases.known()
            victims = self._quota.oldest(wanted, lambda d: not self.leases.is_leased(d))
            return bool(victims) and await self._evict(victims) != set(victims)

    async def run(self) -> None:
        """Keep below the high-water mark, for ever; cancel it to stop."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_S):
                    await self._look.wait()
            self._look.clear()
            try:
                await self.tidy()
            except (AfsError, OSError) as error:  # a disk that fails now may be mended when we look again
                log.error("cannot evict: %s", error)

    async def tidy(self) -> None:
        """Evict down to the low-water mark if use is above the high one."""
        async with self._making:
            if self._short_of(HIGH, likely=False) > 0:
                await self._make(LOW, guesses=False)


def _allocated(path: Path) -> int:
    try:
        return path.stat().st_blocks * 512
    except FileNotFoundError:  # nothing was written yet
        return 0
