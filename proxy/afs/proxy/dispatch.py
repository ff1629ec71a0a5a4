"""Runs that wait, and room on nodes: who gets which.

State, on one event loop: the queue, and per tenant what its runs have in use. Nothing is awaited while either is changed: a
run that ends, a report of a node or a new run makes :meth:`Dispatcher.pump` place whoever is next, and only those placed are
woken. Between two looks nothing that waits fits anywhere, so if one node has changed, only that one is looked at.
A :class:`Waiter` belongs to one call, whose handler alone awaits it and gives back what it got, by :meth:`leave`.

A run that others have passed for *patience* seconds gets a reservation, one at a time: on the node with the most room all but
what it needs is for others, so it fits once what runs there now has ended, and those behind it may use the rest meanwhile.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass

from afs.afslet.requests import Resources
from afs.core.errors import AfsError, ResourceExhausted, Unavailable
from afs.proxy.fairqueue import Entry, FairQueue
from afs.proxy.node import AfsletNode, Placement, Reservation
from afs.proxy.nodes import Nodes

_TICK_S = 1.0
_MAX_TOLD = 500  # positions per second, over all runs: each is a message
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Limits:
    """How many runs may wait, and times in seconds: see the settings of the same names."""

    max_queued: int = 5000
    max_queued_tenant: int = 2000
    priority_ageing: float = 10.0
    patience: float = 10.0
    lost_grace: float = 10.0  # how long queued runs wait for nodes of which none answers
    feedback: float = 0.5  # between two positions told to a run


@dataclass(slots=True, eq=False)
class Waiter(Entry):
    """An entry and its handler. It is placed, has failed, or waits (*aside*: not in the queue for a while)."""

    image: int = 0
    wants_progress: bool = False
    placement: Placement | None = None
    error: AfsError | None = None
    position: int = 0
    in_queue: bool = False
    waiting: bool = False  # counted as waiting
    waker: asyncio.Future[None] | None = None

    def wake(self) -> None:
        """Let the handler look."""
        if self.waker is not None and not self.waker.done():
            self.waker.set_result(None)

    async def wait(self, seconds: float | None) -> None:
        """Until something changed, *seconds* at most."""
        loop = asyncio.get_running_loop()
        self.waker = loop.create_future()
        timer = loop.call_later(seconds, self.wake) if seconds is not None else None
        try:
            await self.waker
        finally:
            self.waker = None
            if timer is not None:
                timer.cancel()


@dataclass(slots=True)
class Usage:
    """What a tenant's dispatched runs have in use."""

    runs: int = 0
    cpu_millis: int = 0
    memory_mb: int = 0


class Dispatcher:
    """See the module. *clock* gives monotonic seconds."""

    def __init__(self, nodes: Nodes, limits: Limits, clock: Callable[[], float] = time.monotonic) -> None:
        self.nodes = nodes
        self._limits = limits
        self._clock = clock
        self._queue = FairQueue(limits.priority_ageing)
        self._usage: dict[str, Usage] = {}
        self._waiting: dict[str, int] = {}  # by tenant, those aside included
        self._lost: dict[tuple[Resources, str], float] = {}
        self._reserved: tuple[Waiter, AfsletNode] | None = None
        self._only: AfsletNode | None = None  # where pump() looks; None: everywhere
        self._closed = False
        self._feedback_wanted = 0
        self.queued = 0
        self.running = 0
        self.observe_wait: Callable[[float], None] = lambda _: None
        nodes.changed = self.room_changed

    def enter(self, waiter: Waiter) -> None:
        """Place *waiter* at once or queue it; :meth:`leave` has to follow.

        Raises what :meth:`Nodes.check` raises, and ResourceExhausted if too many wait already.
        """
        if self._closed:
            raise _stopping()
        waiter.since = now = self._clock()
        if self._queue.may_fit(waiter):
            self._queue.add(waiter, now)
            waiter.in_queue = True
            self.pump()
            if waiter.placement is not None:
                return
            self._drop(waiter)
        self.nodes.check(waiter.wanted, waiter.node_id)
        self._check_limits(waiter.tenant)
        self._count(waiter, 1)
        self._enqueue(waiter)

    def _check_limits(self, tenant: str) -> None:
        limits = self._limits
        if self.queued >= limits.max_queued:
            raise ResourceExhausted(f"{self.queued} runs wait already: the proxy's limit is {limits.max_queued}")
        if (own := self._waiting.get(tenant, 0)) >= limits.max_queued_tenant:
            raise ResourceExhausted(
                f"{own} runs of tenant {tenant!r} wait already: the limit per tenant is {limits.max_queued_tenant}"
            )

    def _count(self, waiter: Waiter, sign: int) -> None:
        waiter.waiting = sign > 0
        self.queued += sign
        self._feedback_wanted += sign if waiter.wants_progress else 0
        left = self._waiting.get(waiter.tenant, 0) + sign
        if left:
            self._waiting[waiter.tenant] = left
        else:
            del self._waiting[waiter.tenant]

    def _enqueue(self, waiter: Waiter) -> None:
        self._queue.add(waiter, self._clock())
        waiter.in_queue = True
        waiter.position = self._queue.position(waiter) if waiter.wants_progress else 0

    def _drop(self, waiter: Waiter) -> None:
        if waiter.in_queue:
            self._queue.remove(waiter)
            waiter.in_queue = False
        if self._reserved is not None and self._reserved[0] is waiter:
            self._reserved[1].reservation = None
            self._reserved = None
            self._only = None  # that node has room for others now
            self._queue.room_freed()

    def leave(self, waiter: Waiter) -> None:
        """The call of *waiter* ends, whatever it had reached."""
        held = self._reserved is not None and self._reserved[0] is waiter
        node = waiter.placement.node if waiter.placement is not None else None
        self._drop(waiter)
        if waiter.waiting:
            self._count(waiter, -1)
        self._give_back(waiter)
        self._queue.left(waiter)
        self._forget(waiter.tenant)
        if held or node is not None:
            self.room_changed(None if held else node)

    def _forget(self, tenant: str) -> None:
        if tenant not in self._usage and tenant not in self._waiting:
            self._queue.forget(tenant)

    def put_aside(self, waiter: Waiter) -> None:
        """*waiter*, which was placed, was refused everywhere: it waits, but not in the queue until :meth:`resume`."""
        node = waiter.placement.node if waiter.placement is not None else None
        self._give_back(waiter)
        self._queue.refused(waiter)
        self._count(waiter, 1)
        self.room_changed(node)

    def resume(self, waiter: Waiter, *, patient: bool) -> None:
        """Queue *waiter*, which was aside, in its old place.

        Raises what :meth:`Nodes.check` raises, unless *patient*: then it waits for nodes that went away, as others do.
        """
        if self._closed:
            raise _stopping()
        if not patient:
            self.nodes.check(waiter.wanted, waiter.node_id)
        self._enqueue(waiter)
        if self._queue.may_fit(waiter):
            self.pump()

    def elsewhere(self, waiter: Waiter, tried: Collection[AfsletNode]) -> bool:
        """Move *waiter*, which was refused, to a node with room that was not *tried*, if there is one."""
        node = self.nodes.pick(waiter.wanted, waiter.node_id, waiter.image, tried)
        if node is None:
            return False
        before = waiter.placement.node if waiter.placement is not None else None
        self._give_back(waiter)
        self._place(waiter, node)
        self.room_changed(before)
        return True

    def room_changed(self, node: AfsletNode | None = None) -> None:
        """Room may have been freed, on *node* or anywhere."""
        self._queue.room_freed()
        if self._queue.length:
            self.pump(node)

    def pump(self, only: AfsletNode | None = None) -> None:
        """Place whoever is next until nobody fits; with *only*, nothing has changed elsewhere since the last time."""
        self._only = only
        if self._reserved is not None:
            self._serve_reserved(*self._reserved)
        found: list[AfsletNode | None] = [None]

        def fits(entry: Entry) -> bool:
            found[0] = self.nodes.pick(entry.wanted, entry.node_id, _image(entry), (), self._only)
            return found[0] is not None

        while (entry := self._queue.next(fits, self._share, self._clock())) is not None:
            waiter, node = _waiter(entry), found[0]
            assert node is not None
            waiter.in_queue = False
            self._drop(waiter)
            self._granted(waiter, node)

    def _serve_reserved(self, waiter: Waiter, node: AfsletNode) -> None:
        place = self.nodes.pick(waiter.wanted, waiter.node_id, waiter.image)
        if place is None and node.usable and node.has_room(waiter.wanted) and not self.nodes.avoided(node):
            place = node
        if place is not None:
            self._drop(waiter)
            self._queue.served(waiter, self._clock())
            self._granted(waiter, place)

    def _granted(self, waiter: Waiter, node: AfsletNode) -> None:
        if waiter.waiting:
            self._count(waiter, -1)
        self._place(waiter, node)
        waiter.wake()

    def _place(self, waiter: Waiter, node: AfsletNode) -> None:
        waiter.placement = node.take(waiter.wanted)
        usage = self._usage.setdefault(waiter.tenant, Usage())
        usage.runs += 1
        usage.cpu_millis += waiter.wanted.cpu_millis
        usage.memory_mb += waiter.wanted.memory_mb
        self.running += 1

    def _give_back(self, waiter: Waiter) -> None:
        if (placement := waiter.placement) is None:
            return
        waiter.placement = None
        placement.node.give_back(placement)
        usage = self._usage[waiter.tenant]
        usage.runs -= 1
        usage.cpu_millis -= waiter.wanted.cpu_millis
        usage.memory_mb -= waiter.wanted.memory_mb
        if not usage.runs:
            del self._usage[waiter.tenant]
        self.running -= 1

    def _share(self, tenant: str) -> float:
        """The larger of the parts of the cluster's CPU and memory that *tenant* has in use (its dominant share)."""
        usage = self._usage.get(tenant)
        if usage is None:
            return 0.0
        total = self.nodes.total
        return max(usage.cpu_millis / total.cpu_millis, usage.memory_mb / total.memory_mb)

    async def run(self) -> None:
        """Do what needs time to pass; cancel it to stop."""
        told = ticked = self._clock()
        while True:
            await asyncio.sleep(self._limits.feedback)
            now = self._clock()
            if now - told >= self._feedback_wanted / _MAX_TOLD:
                told = now
                self.tell_positions()
            if now - ticked >= _TICK_S:
                ticked = now
                self.tick()

    def tick(self) -> None:
        """Reservations, nodes that were avoided, and runs that nobody can take any more."""
        self._fail_the_lost()
        self._reserve()
        self.room_changed()

    def _reserve(self) -> None:
        if self._reserved is not None:
            if self._reserved[1].usable:
                return
            self._reserved[1].reservation = None
            self._reserved = None
        entry = self._queue.starved(self._clock(), self._limits.patience)
        if entry is None:
            return
        able = [
            node
            for node in self.nodes.nodes
            if node.usable
            and node.could_take(entry.wanted)
            and (not entry.node_id or node.status.node_id == entry.node_id)
        ]
        if able:
            node = min(able, key=AfsletNode.load)
            node.reservation = Reservation(entry.wanted)
            self._reserved = (_waiter(entry), node)
            log.info("afslet %s makes room for a run that wants %s", node.endpoint, entry.wanted)

    def _fail_the_lost(self) -> None:
        """End the runs that no node could take for a while now."""
        now, lost = self._clock(), dict[tuple[Resources, str], float]()
        for shape in self._queue.shapes():
            try:
                self.nodes.check(*shape)
            except AfsError as error:
                lost[shape] = self._lost.get(shape, now)
                if now - lost[shape] >= self._limits.lost_grace:
                    for waiter in [_waiter(entry) for entry in self._queue if entry.shape == shape]:
                        self.fail(waiter, error)
        self._lost = lost

    def fail(self, waiter: Waiter, error: AfsError) -> None:
        """End the wait of *waiter* with *error*."""
        self._drop(waiter)
        waiter.error = error
        waiter.wake()

    def tell_positions(self) -> None:
        """Wake those who want to know their place and have another one now."""
        if not self._feedback_wanted:
            return
        for entry, position in self._queue.positions():
            waiter = _waiter(entry)
            if waiter.wants_progress and waiter.position != position:
                waiter.position = position
                waiter.wake()

    def close(self) -> None:
        """Take no more runs, and let nobody wait: another proxy may have room."""
        self._closed = True
        for entry in list(self._queue):
            self.fail(_waiter(entry), _stopping())

    def tenants(self) -> dict[str, tuple[int, int]]:
        """How many runs of each tenant wait and run."""
        names = sorted(self._waiting.keys() | self._usage.keys())
        none = Usage()
        return {name: (self._waiting.get(name, 0), self._usage.get(name, none).runs) for name in names}

    def oldest_wait(self) -> float:
        """For how many seconds the first in the queue has waited."""
        now = self._clock()
        return now - min((entry.since for entry in self._queue), default=now)


def _stopping() -> Unavailable:
    return Unavailable("afs_proxy is being stopped")


def _waiter(entry: Entry) -> Waiter:
    assert isinstance(entry, Waiter)
    return entry


def _image(entry: Entry) -> int:
    return _waiter(entry).image
