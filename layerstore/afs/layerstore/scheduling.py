"""Who may fetch a chunk next: readers first.

State (one event loop): every fetch has a :class:`Ticket`, which waits in the queue of its priority and then holds one of a
node's slots while other nodes are asked for its chunk, until it is written. It gives the slot back while it looks for nodes
or waits for one to come back, and then queues again. ``_waiting``, ``_running`` and ``_of_peer`` change without an await in
between, so a free slot is given away at once, to the first of the most urgent queue that the limits let through. A ticket may
become more urgent while it waits or runs, when a reader wants a chunk that is on its way already.

The limits are cumulative: *limits[p]* bounds what runs with priority p or a less urgent one. So whatever is
prefetched, the difference to the first limit is left to readers, and all of them together bound the memory: a slot is a
chunk or two. No node is asked first by more than ``MOST_OF_ONE``: if it is silent, the other slots are for what others have.
"""

import asyncio
import contextlib
import enum
from collections import Counter
from collections.abc import AsyncIterator, Callable


class Priority(enum.IntEnum):
    """The smaller, the more urgent."""

    DEMAND = 0  # a reader waits
    PREFETCH = 1  # a reader is about to want it
    COMPLETION = 2  # nobody waits


# A reader's read-ahead is many chunks at once. Bulk needs some to keep a link busy (16: 4 MiB per round trip); more would only
# stand before a reader's chunk on the link.
LIMITS = (64, 16, 8)
MOST_OF_ONE = LIMITS[0] // 2


class Ticket:
    """One fetch. ``peer`` is whom it asks first; ``on_demand`` is called when it becomes a reader's."""

    def __init__(self, priority: Priority) -> None:
        self.priority = priority
        self.peer = ""
        self.on_demand: Callable[[], None] = lambda: None
        self.granted: asyncio.Future[None] | None = None  # None: neither waits nor runs


class Slots:
    """The slots of a node."""

    def __init__(self, limits: tuple[int, int, int] = LIMITS, most_of_one: int = MOST_OF_ONE) -> None:
        self._limits = limits
        self._most_of_one = most_of_one
        self._running = [0] * len(limits)
        self._of_peer: Counter[str] = Counter()
        self._waiting: list[dict[Ticket, None]] = [{} for _ in limits]

    @contextlib.asynccontextmanager
    async def held(self, ticket: Ticket, peer: str) -> AsyncIterator[None]:
        """A slot while the block runs, for asking *peer* first."""
        ticket.peer = peer
        ticket.granted = asyncio.get_running_loop().create_future()
        self._waiting[ticket.priority][ticket] = None
        self._grant()
        try:
            await ticket.granted
            yield
        finally:
            if self._waiting[ticket.priority].pop(ticket, ticket) is ticket:  # it was granted, if only just now
                self.give_back(ticket)
            else:
                ticket.granted = None
                self._grant()

    def take(self, ticket: Ticket, peer: str) -> bool:
        """A slot at once, if there is one that nobody waits for; until :meth:`give_back`."""
        if any(self._waiting[: ticket.priority + 1]) or not self._has_room(ticket.priority):
            return False
        if self._of_peer[peer] >= self._most_of_one:
            return False
        ticket.peer = peer
        ticket.granted = asyncio.get_running_loop().create_future()
        self._run(ticket)
        return True

    def give_back(self, ticket: Ticket) -> None:
        """The end of what :meth:`take` gave."""
        self._running[ticket.priority] -= 1
        self._of_peer[ticket.peer] -= 1
        if not self._of_peer[ticket.peer]:
            del self._of_peer[ticket.peer]
        ticket.granted = None
        self._grant()

    def is_waiting(self, ticket: Ticket) -> bool:
        """Whether *ticket* is in the queue."""
        return ticket in self._waiting[ticket.priority]

    def promote(self, ticket: Ticket, priority: Priority) -> None:
        """Make *ticket* as urgent as *priority*, unless it is already."""
        if priority >= ticket.priority:
            return
        if self.is_waiting(ticket):
            del self._waiting[ticket.priority][ticket]
            self._waiting[priority][ticket] = None
        elif ticket.granted is not None:
            self._running[ticket.priority] -= 1
            self._running[priority] += 1
        ticket.priority = priority
        if priority is Priority.DEMAND:
            ticket.on_demand()
        self._grant()

    def _grant(self) -> None:
        for priority, waiting in enumerate(self._waiting):
            for ticket in list(waiting):
                if not self._has_room(priority):
                    break
                if self._of_peer[ticket.peer] >= self._most_of_one:
                    continue
                del waiting[ticket]
                self._run(ticket)

    def _run(self, ticket: Ticket) -> None:
        self._running[ticket.priority] += 1
        self._of_peer[ticket.peer] += 1
        if ticket.granted is not None and not ticket.granted.done():
            ticket.granted.set_result(None)

    def _has_room(self, priority: int) -> bool:
        return all(sum(self._running[p:]) < self._limits[p] for p in range(priority + 1))


@contextlib.asynccontextmanager
async def slot_in_queue(slots: Slots, ticket: Ticket, peer: str, limit: asyncio.Timeout) -> AsyncIterator[None]:
    """A slot to ask *peer* first; the queue takes no time of *limit* while no reader waits for the chunk."""
    now = asyncio.get_running_loop().time
    left = (limit.when() or now()) - now()

    def go_on() -> None:
        if limit.when() is None:
            limit.reschedule(now() + left)

    if ticket.priority is not Priority.DEMAND:
        limit.reschedule(None)
        ticket.on_demand = go_on
    try:
        async with slots.held(ticket, peer):
            go_on()
            yield
    finally:
        ticket.on_demand = lambda: None
