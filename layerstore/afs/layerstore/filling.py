"""The fetches of one partial layer that are under way, and who waits for their chunks.

State: :class:`Fillings` belongs to the event loop. It maps a chunk to the fetch that is under way. A second demand for the
chunk awaits the same one, so a chunk is fetched once; a more urgent one makes its ticket more urgent
(:mod:`afs.layerstore.scheduling`). It leaves the map when it ends; failures are not remembered. One that no reader wanted, and
that those who did have given up while it was in the queue for a slot, is cancelled and leaves at once: whoever comes next
starts another one. Every fetch holds a pin, for it goes on when those who waited for it are gone: the layer is not evicted, and
its descriptor not closed below a write. Chunks that come together (:meth:`Fillings.fill_run`) are a fetch each; what is missing
when that ends, and still wanted, is fetched as if it began just then.

:class:`Arrivals` has, by chunk, what is called when it comes, by the thread that wrote it: a reader on this node goes on while
the event loop does its accounts. Its lock is held for dictionary operations only. A chunk is marked before that thread takes
the lock, and looked for with the lock held, so nobody is forgotten.
"""

import asyncio
import contextlib
import functools
import threading
import time
from collections.abc import Awaitable, Callable, Collection, Coroutine, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

from afs.layerstore.scheduling import Priority, Ticket

if TYPE_CHECKING:
    from afs.layerstore.partial import PartialLayer

Chunk = bytes | memoryview | None
# Fetches one chunk: (layer, index, its ticket) -> its bytes, verified, or None if it :meth:`~PartialLayer.put` them.
Fetch = Callable[["PartialLayer", int, Ticket], Awaitable[Chunk]]


class Started(Protocol):
    """A chunk on its way without a task. ``done`` gets what a Fetch returns, when nobody works on the chunk any more."""

    done: asyncio.Future[Chunk]

    def cancel(self) -> None:
        """Give it up; ``done`` is cancelled then."""


# Starts what a Fetch does if it can be started at once, which most can; else None, and the Fetch is called.
Start = Callable[["PartialLayer", int, Ticket], Started | None]


class StartedRun(Protocol):
    """Chunks on their way in one exchange; each that comes is put."""

    def cancel(self) -> None:
        """Give them up for good."""

    def hurry(self) -> None:
        """A reader waits for one of them."""


# Starts that for chunks with their tickets, if it can be started at once. Calls the last argument on the event loop when
# nobody works on the chunks any more: true if they were given up for good.
StartRun = Callable[["PartialLayer", Sequence[tuple[int, Ticket]], Callable[[bool], None]], StartedRun | None]
# Writes a chunk that was fetched but not put, and makes room for it.
Store = Callable[[int, bytes | memoryview, float], Coroutine[None, None, None]]


class _Filling:
    """A chunk that comes; ``waiting`` counts who waits for ``done``, and ``cancel`` ends it. The layer is pinned meanwhile."""

    __slots__ = ("cancel", "done", "index", "pinned", "ticket", "waiting")

    def __init__(self, index: int, ticket: Ticket, pinned: contextlib.ExitStack) -> None:
        self.index = index
        self.ticket = ticket
        self.pinned = pinned
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.cancel: Callable[[], object] = lambda: None
        self.waiting = 0


class Fillings:
    """Of *layer*; *store* writes what was fetched but not put."""

    def __init__(self, layer: "PartialLayer", store: Store) -> None:
        self._layer = layer
        self._store = store
        self._under_way: dict[int, _Filling] = {}

    def __iter__(self) -> Iterator[int]:
        """The chunks that come, in the order in which they were asked for."""
        return iter(self._under_way)

    def __len__(self) -> int:
        return len(self._under_way)

    def is_demanded(self, index: int) -> bool:
        """Whether a reader waits for the chunk."""
        filling = self._under_way.get(index)
        return filling is not None and filling.ticket.priority is Priority.DEMAND

    async def fill(self, wanted: Iterable[int], fetch: Fetch, priority: Priority, start: Start | None) -> None:
        """Have all of *wanted*, which are missing, on return; raises what *fetch* raised for the first that failed."""
        fillings = [self._of(index, fetch, priority, start) for index in wanted]
        for filling in fillings:
            filling.waiting += 1
        try:
            # Shielded: a reader that gives up must not take the chunk away from the others.
            if len(fillings) == 1:
                await asyncio.shield(fillings[0].done)
            else:
                await asyncio.gather(*(asyncio.shield(filling.done) for filling in fillings))
        finally:
            for filling in fillings:
                filling.waiting -= 1
                self._drop_unwanted(filling)

    async def fill_run(self, wanted: Sequence[int], fetch: Fetch, start: Start, start_run: StartRun) -> None:
        """:meth:`fill` with what nobody waits for, in one exchange if that can be started."""
        new = [index for index in wanted if index not in self._under_way]
        if len(new) > 1:
            self._start_run(new, fetch, start, start_run)
        await self.fill(wanted, fetch, Priority.PREFETCH, start)

    def _start_run(self, wanted: Sequence[int], fetch: Fetch, start: Start, start_run: StartRun) -> None:
        with contextlib.ExitStack() as stack:
            fillings = []
            for index in wanted:
                pinned = stack.enter_context(contextlib.ExitStack())
                pinned.enter_context(self._layer.pin())
                fillings.append(_Filling(index, Ticket(Priority.PREFETCH), pinned))
            ended = functools.partial(self._run_ended, fillings, fetch, start)
            run = start_run(self._layer, [(filling.index, filling.ticket) for filling in fillings], ended)
            if run is None:
                return
            stack.pop_all()
        for filling in fillings:
            self._under_way[filling.index] = filling
            filling.cancel = run.cancel
            filling.ticket.on_demand = run.hurry

    def _run_ended(self, fillings: Sequence[_Filling], fetch: Fetch, start: Start, given_up: bool) -> None:
        for filling in fillings:
            filling.ticket.on_demand = lambda: None
            if self._layer.has(filling.index):
                self._leave(filling)
                filling.done.set_result(None)
            elif given_up or not filling.waiting:
                self._leave(filling)
                filling.done.cancel()
            else:
                self._begin(filling, fetch, start)

    def _of(self, index: int, fetch: Fetch, priority: Priority, start: Start | None) -> _Filling:
        if (known := self._under_way.get(index)) is not None:
            self._layer.slots.promote(known.ticket, priority)
            return known
        with contextlib.ExitStack() as pinned:
            pinned.enter_context(self._layer.pin())
            filling = _Filling(index, Ticket(priority), pinned)
            self._begin(filling, fetch, start)
            filling.pinned = pinned.pop_all()
        self._under_way[index] = filling
        return filling

    def _begin(self, filling: _Filling, fetch: Fetch, start: Start | None) -> None:
        started = start(self._layer, filling.index, filling.ticket) if start is not None else None
        if started is None:
            self._go_on(filling, self._fetch(filling.index, fetch, filling.ticket))
        else:
            filling.cancel = started.cancel
            started.done.add_done_callback(functools.partial(self._came, filling))

    def _go_on(self, filling: _Filling, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work, name=f"fill {self._layer.diff_id[:19]} {filling.index}")
        filling.cancel = task.cancel
        task.add_done_callback(functools.partial(self._filled, filling))

    async def _fetch(self, index: int, fetch: Fetch, ticket: Ticket) -> None:
        if (data := await fetch(self._layer, index, ticket)) is not None:
            await self._store(index, data, time.monotonic())

    def _drop_unwanted(self, filling: _Filling) -> None:
        """Nobody may want what nobody waits for; a chunk that a reader wanted it will ask for again."""
        ticket = filling.ticket
        if not filling.waiting and ticket.priority is not Priority.DEMAND and self._layer.slots.is_waiting(ticket):
            filling.cancel()
            del self._under_way[filling.index]

    def _came(self, filling: _Filling, came: asyncio.Future[Chunk]) -> None:
        if came.cancelled() or came.exception() is not None or (data := came.result()) is None:
            self._filled(filling, came)
        else:
            self._go_on(filling, self._store(filling.index, data, time.monotonic()))

    def _filled(self, filling: _Filling, ended: asyncio.Future[None] | asyncio.Future[Chunk]) -> None:
        self._leave(filling)
        if ended.cancelled():
            filling.done.cancel()
        elif (error := ended.exception()) is not None:
            filling.done.set_exception(error)
            filling.done.exception()  # retrieved: its readers may all have gone
        else:
            filling.done.set_result(None)

    def _leave(self, filling: _Filling) -> None:
        filling.pinned.close()
        if self._under_way.get(filling.index) is filling:
            del self._under_way[filling.index]

    def cancel(self) -> None:
        """End all."""
        for filling in self._under_way.values():
            filling.cancel()

    async def ended(self) -> None:
        """Wait for those that are under way now."""
        if self._under_way:
            await asyncio.wait([filling.done for filling in self._under_way.values()])


class _Countdown:
    """Calls *call* when *left* chunks have arrived, from any threads."""

    def __init__(self, left: int, call: Callable[[], None]) -> None:
        self._left = left
        self._call = call
        self._lock = threading.Lock()

    def arrived(self) -> None:
        """One more is here."""
        with self._lock:
            self._left -= 1
            last = self._left == 0
        if last:
            self._call()


class Arrivals:
    """*has* says whether a chunk is here; in any thread."""

    def __init__(self, has: Callable[[int], bool]) -> None:
        self._has = has
        self._told: dict[int, list[_Countdown]] = {}
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def telling(self, indices: Collection[int], call: Callable[[], None]) -> Iterator[None]:
        """Call once when all of *indices*, one at least, are here: now, or in the thread that writes the last, in the block."""
        countdown = _Countdown(len(indices), call)
        with self._lock:
            missing = [index for index in indices if not self._has(index)]
            for index in missing:
                self._told.setdefault(index, []).append(countdown)
        for _ in range(len(indices) - len(missing)):
            countdown.arrived()
        try:
            yield
        finally:
            with self._lock:
                for index in missing:
                    if countdown in (left := self._told.get(index, [])):
                        left.remove(countdown)
                        if not left:
                            del self._told[index]

    def arrived(self, index: int) -> None:
        """The chunk is marked."""
        with self._lock:
            told = self._told.pop(index, [])
        for countdown in told:
            countdown.arrived()
