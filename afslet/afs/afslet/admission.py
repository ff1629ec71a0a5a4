"""What a node has to give, what of it is taken, and who waits for it.

State, on one event loop: nothing is awaited between a check and its reservation, so there is no lock. Waiting runs are in
the order in which they get room: higher priorities first, then first come, first served. None is overtaken by a later one
that happens to fit, or a large run would wait for ever.
"""

import asyncio
import bisect
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from afs.afslet.requests import Resources, resources_of
from afs.core.errors import InvalidArgument, ResourceExhausted, Unavailable
from afs.proto.v1 import afslet_pb2 as pb

Moved = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Capacity:
    """All that a node gives away: CPU in thousandths of a core, memory and disk in MiB. 0 for disk or runs: not limited.

    One run has at most *run_disk_mb* and *run_pids*, and gets that if it asks for nothing; 0 MiB: not limited.
    """

    cpu_millis: int
    memory_mb: int
    disk_mb: int = 0
    runs: int = 0
    run_disk_mb: int = 0
    run_pids: int = 4096

    def __post_init__(self) -> None:
        if self.disk_mb and not 0 < self.run_disk_mb <= self.disk_mb:
            raise InvalidArgument(
                f"a node that gives away {self.disk_mb} MiB of disk needs a limit below it for each run, not {self.run_disk_mb} MiB"
            )

    def wanted(self, start: pb.StartRequest) -> Resources:
        """What the run takes, defaults filled in; InvalidArgument if this node can never give it."""
        asked = resources_of(start)
        if asked.cpu_millis > self.cpu_millis or asked.memory_mb > self.memory_mb:
            limit = Resources(self.cpu_millis, self.memory_mb)
            raise InvalidArgument(f"{asked} asked for, but this node has {limit}")
        if self.run_disk_mb and asked.disk_mb > self.run_disk_mb:
            raise InvalidArgument(
                f"{asked.disk_mb} MiB of disk asked for, but a run of this node has at most {self.run_disk_mb} MiB"
            )
        if start.pids_limit > self.run_pids:
            raise InvalidArgument(
                f"{start.pids_limit} processes asked for, but a run of this node has at most {self.run_pids}"
            )
        return Resources(asked.cpu_millis, asked.memory_mb, asked.disk_mb or self.run_disk_mb)


class Reservation:
    """What one run holds until it is released."""

    def __init__(self, admission: "Admission", wanted: Resources) -> None:
        self._admission = admission
        self._wanted: Resources | None = wanted

    def release(self) -> None:
        """Give it back; once is enough."""
        wanted, self._wanted = self._wanted, None
        if wanted is not None:
            self._admission._give_back(wanted)


@dataclass(slots=True, eq=False)
class _Waiting:
    order: tuple[int, int]
    wanted: Resources
    moved: Moved | None
    ready: "asyncio.Future[Reservation]"
    told: tuple[int, int] = field(default=(0, 0))

    def tell(self, position: int, queued: int) -> None:
        if self.moved is not None and self.told != (position, queued):
            self.told = (position, queued)
            self.moved(position, queued)


class Admission:
    """Reservations against *limit*; at most *max_queued* runs wait. *changed* is called after every change."""

    def __init__(self, limit: Capacity, max_queued: int = 0, changed: Callable[[], None] | None = None) -> None:
        self.limit = limit
        self.used = Resources()
        self.running = 0
        self._max_queued = max_queued
        self._changed = changed or (lambda: None)
        self._waiting: list[_Waiting] = []
        self._arrivals = 0
        self._refusal = ""

    @property
    def queued(self) -> int:
        """How many wait."""
        return len(self._waiting)

    @property
    def available(self) -> Resources:
        """What is free now; disk is 0 if it is not limited."""
        limit, used = self.limit, self.used
        disk = max(limit.disk_mb - used.disk_mb, 0)
        return Resources(limit.cpu_millis - used.cpu_millis, limit.memory_mb - used.memory_mb, disk)

    def refuse(self, why: str) -> None:
        """From now on every reservation, also of those who wait, fails with Unavailable; an empty *why* ends that."""
        self._refusal = why
        if why:
            waiting, self._waiting = self._waiting, []
            for each in waiting:
                each.ready.set_exception(Unavailable(why))
        self._changed()

    async def reserve(
        self,
        wanted: Resources,
        *,
        priority: int = 0,
        may_wait: bool = False,
        timeout_s: float | None = None,
        moved: Moved | None = None,
    ) -> Reservation:
        """Take *wanted*, which comes from :meth:`Capacity.wanted`.

        Unavailable while the node refuses. ResourceExhausted if it cannot be had now, or with *may_wait*: if the queue is full, or after *timeout_s* seconds.
        *moved* gets (position, length) of the queue while the run waits, whenever they change; the next one is at 1.
        """
        if self._refusal:
            raise Unavailable(self._refusal)
        # Those who wait go first, unless they are less urgent.
        if not (self._waiting and -self._waiting[0].order[0] >= priority) and self._lacking(wanted) is None:
            return self._take(wanted)
        if not may_wait or len(self._waiting) >= self._max_queued:
            raise ResourceExhausted(self._why(wanted, may_wait=may_wait))
        self._arrivals += 1
        waiting = _Waiting((-priority, self._arrivals), wanted, moved, asyncio.get_running_loop().create_future())
        bisect.insort(self._waiting, waiting, key=lambda each: each.order)
        self._moved()
        try:
            await asyncio.wait([waiting.ready], timeout=timeout_s)
        except BaseException:
            self._leave(waiting)
            raise
        if not waiting.ready.done():
            self._leave(waiting)
            raise ResourceExhausted(f"no room for {self._shown(wanted)} within {timeout_s:g} s")
        return waiting.ready.result()

    def _lacking(self, wanted: Resources) -> str | None:
        """What there is too little of now."""
        limit, free = self.limit, self.available
        if wanted.cpu_millis > free.cpu_millis or wanted.memory_mb > free.memory_mb:
            return f"{Resources(free.cpu_millis, free.memory_mb)} are free"
        if limit.disk_mb and wanted.disk_mb > free.disk_mb:
            return f"{free.disk_mb} MiB of disk are free"
        if limit.runs and self.running >= limit.runs:
            return f"{self.running} runs are all that this node runs at once"
        return None

    def _why(self, wanted: Resources, *, may_wait: bool) -> str:
        lacking = self._lacking(wanted) or f"{len(self._waiting)} runs wait for room"
        full = f", and {len(self._waiting)} runs wait already" if may_wait and self._max_queued else ""
        return f"{self._shown(wanted)} asked for, but {lacking}{full}"

    def _shown(self, wanted: Resources) -> Resources:
        """What of it the node counts."""
        return wanted if self.limit.disk_mb else replace(wanted, disk_mb=0)

    def _take(self, wanted: Resources) -> Reservation:
        self._add(wanted, 1)
        return Reservation(self, wanted)

    def _give_back(self, wanted: Resources) -> None:
        self._add(wanted, -1)
        self._serve()

    def _add(self, wanted: Resources, sign: int) -> None:
        used = self.used
        self.used = Resources(
            used.cpu_millis + sign * wanted.cpu_millis,
            used.memory_mb + sign * wanted.memory_mb,
            used.disk_mb + sign * wanted.disk_mb,
        )
        self.running += sign
        self._changed()

    def _serve(self) -> None:
        """Give room to those who wait, as long as the next one fits."""
        served = False
        while self._waiting and self._lacking(self._waiting[0].wanted) is None:
            waiting = self._waiting.pop(0)
            waiting.ready.set_result(self._take(waiting.wanted))
            served = True
        if served:
            self._moved()

    def _leave(self, waiting: _Waiting) -> None:
        if waiting in self._waiting:
            self._waiting.remove(waiting)
            self._moved()
            self._serve()  # it may have been the one that the others waited for
        elif not waiting.ready.exception():
            waiting.ready.result().release()

    def _moved(self) -> None:
        for position, each in enumerate(self._waiting, 1):
            each.tell(position, len(self._waiting))
        self._changed()
