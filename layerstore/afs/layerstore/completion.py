"""From a partial layer to the complete one: fetching the rest, checking all of it, and committing it.

Three things lead there: somebody told this node to have the layer (:meth:`Completion.from_peers`), its readers wanted every
chunk (:meth:`Completion.promote`), or it is in use and the node completes such layers in the background (:meth:`Completion.run`).

State (one event loop): ``_completing`` is single flight by diff_id and knows no origin: who joined one that failed tries again.
It alone turns a partial layer into a complete one, and drops it then. A partial layer beside a complete one that came otherwise
is dropped by it or, while it does not run, by whoever finds it; it does not start on a layer that is complete, so it never has
its files closed below it. The background's fetching is outside of it, for whoever was told to have the layer must not wait
for somebody who takes his time; a chunk that both want comes once.
"""

import asyncio
import enum
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from afs.core.errors import AfsError, DataLoss
from afs.core.singleflight import SingleFlight
from afs.core.together import together
from afs.discovery.client import Announcer
from afs.layerstore.describing import AHEAD, Describing
from afs.layerstore.partial import PartialLayer
from afs.layerstore.partials import Partials
from afs.layerstore.pull import Puller
from afs.layerstore.room import Room
from afs.layerstore.scheduling import Priority
from afs.layerstore.store import LayerStore
from afs.layerstore.supply import Supply

log = logging.getLogger(__name__)
AT_ONCE = 32  # chunks that are asked for together when somebody waits for the layer
_BEHIND = 4  # and when nobody does
_AGAIN_S = 30.0  # a layer that could not be completed is left alone for so long
_GUESS = 4  # how many times its compressed size a layer is, for lack of anything better


class Mode(enum.Enum):
    """When layers in use are completed."""

    ALWAYS = "always"
    IDLE = "idle"  # while no reader had to wait for a chunk for some seconds
    NEVER = "never"


@dataclass(frozen=True, slots=True)
class Completing:
    """How the background works. *rate* in bytes per second, 0: unlimited; *idle* in seconds without a reader that waits."""

    mode: Mode = Mode.NEVER
    rate: int = 0
    idle: float = 5.0
    look: float = 1.0  # seconds between two looks for something to complete
    now: Callable[[], float] = time.monotonic


class Completion:
    """See the module."""

    def __init__(
        self,
        store: LayerStore,
        room: Room,
        puller: Puller,
        announcer: Announcer,
        supply: Supply,
        partials: Partials,
        describing: Describing,
        how: Completing,
    ) -> None:
        self._store = store
        self._room = room
        self._puller = puller
        self._announcer = announcer
        self._supply = supply
        self._partials = partials
        self._describing = describing
        self._how = how
        self._now = how.now
        self._completing: SingleFlight[str, bool | None] = SingleFlight()
        self._demanded = how.now() - how.idle
        self._next = 0.0  # when the rate allows the next chunk
        self._left_alone: dict[str, float] = {}  # until when

    async def close(self) -> None:
        """End what is under way."""
        await self._completing.close(cancel=True)

    # For somebody who waits

    async def from_peers(self, diff_id: str) -> bool | None:
        """Complete the layer from other nodes: False. None if nobody has it, True if it was pulled after all."""
        return await self._completing.run(diff_id, lambda: self._from_peers(diff_id))

    async def _from_peers(self, diff_id: str) -> bool | None:
        with self._room.leases.pinned([diff_id]):
            partial = self._partials.get(diff_id)
            if partial is None:
                partial = await self._describing.describe(diff_id, await self._supply.holders(diff_id))
            if self._store.complete(diff_id) is not None:
                if partial is not None:
                    await self._partials.drop(partial)
                return True
            return None if partial is None or partial.is_forged else await self._complete(partial)

    async def _complete(self, partial: PartialLayer) -> bool:
        diff_id, missing = partial.diff_id, partial.missing()
        origin = self._supply.origin(diff_id)
        # Not what a peer claims, as long as nothing of it came.
        believed = max(AHEAD, _GUESS * origin.layer.blob_size) if origin is not None else AHEAD
        size = partial.layout.chunk_size
        async with self._room.reserved(diff_id, min(len(missing) * size, believed)) as reservation:
            for start in range(0, len(missing), AT_ONCE):
                await partial.fill(
                    missing[start : start + AT_ONCE], self._supply.fetch, Priority.PREFETCH, start=self._supply.start
                )
                self._room.note(diff_id)
                left = (partial.table.count - partial.here) * size
                await self._room.correct(reservation, min(left, believed))
            if self._store.complete(diff_id) is not None:  # no peer was left, so a fetch had it pulled
                await self._partials.drop(partial)
                return True
            await self._commit(partial)
            return False

    async def _commit(self, partial: PartialLayer) -> None:
        """Check a layer that has every chunk and make it the complete one. Raises DataLoss."""
        await partial.idle()
        await self._puller.check(partial.data_path, partial.diff_id)
        self._store.commit(partial.data_path, partial.diff_id)
        await self._partials.drop(partial)
        self._announcer.hold(partial.diff_id, partial.layout.file_size, complete=True)
        await self._announcer.flush()
        log.info("layer %s is complete", partial.diff_id)

    async def drop_beside(self, diff_id: str) -> None:
        """Drop the partial layer if the complete one is there; see the module."""
        partial = self._partials.get(diff_id)
        if partial is not None and self._store.complete(diff_id) is not None and diff_id not in self._completing:
            await self._partials.drop(partial)

    # For nobody in particular

    async def promote(self, partial: PartialLayer) -> None:
        """Commit a layer whose readers wanted all of it; what turns out to be wrong comes again."""
        if self._partials.is_open(partial) and partial.here == partial.table.count and not partial.is_forged:
            await self._completing.run(partial.diff_id, lambda: self._promote(partial))

    async def _promote(self, partial: PartialLayer) -> bool | None:
        diff_id = partial.diff_id
        with self._room.leases.pinned([diff_id]):
            if not self._partials.is_open(partial):
                return None
            if self._store.complete(diff_id) is not None:
                await self._partials.drop(partial)
                return True
            try:
                await self._commit(partial)
            except DataLoss as error:
                log.error("layer %s is whole and cannot be committed: %s", diff_id, error.line)
                return await self._mend(partial)
            return False

    async def _mend(self, partial: PartialLayer) -> bool | None:
        """The disk damaged chunks, which come again; or a peer made the layer up, and then it has to be pulled."""
        damaged = await asyncio.to_thread(partial.damaged)
        for index in damaged:
            partial.unmark(index)
        if damaged:
            log.error("layer %s: chunks %s are damaged on disk", partial.diff_id, damaged)
            return None
        partial.mark_forged()  # what is mounted goes on with it; new mounts get the pulled one
        self._announcer.drop(partial.diff_id)
        if (origin := self._supply.origin(partial.diff_id)) is None:
            return None
        await self._supply.pull(origin)
        await self._partials.drop(partial)
        return True

    def demanded(self) -> None:
        """A reader waits for a chunk."""
        self._demanded = self._now()

    async def run(self) -> None:
        """Complete what is in use, for ever; cancel it to stop. First, what was whole when an earlier process ended."""
        for left_over in self._partials:
            await self._guarded(left_over, self.promote)
        while self._how.mode is not Mode.NEVER:
            partial = self._next_partial()
            if partial is not None:
                await self._guarded(partial, self._fill_and_promote)
            await asyncio.sleep(self._how.look)

    async def _fill_and_promote(self, partial: PartialLayer) -> None:
        await self._fill_behind(partial)
        await self.promote(partial)

    async def _guarded(self, partial: PartialLayer, work: Callable[[PartialLayer], Awaitable[None]]) -> None:
        """Do *work*; if it fails, leave the layer alone for a while."""
        try:
            await work(partial)
        except (AfsError, OSError) as error:
            log.warning("cannot complete layer %s now: %s", partial.diff_id, error)
            self._left_alone[partial.diff_id] = self._now() + _AGAIN_S
        except Exception:  # a mistake of ours, at one layer
            log.exception("layer %s is not completed now", partial.diff_id)
            self._left_alone[partial.diff_id] = self._now() + _AGAIN_S

    def _next_partial(self) -> PartialLayer | None:
        """The layer in use that misses least."""
        now = self._now()
        self._left_alone = {diff_id: until for diff_id, until in self._left_alone.items() if until > now}
        waiting = [each for each in self._partials if each.diff_id not in self._left_alone and self._may_go_on(each)]
        return min(waiting, key=lambda each: each.table.count - each.here, default=None)

    def _may_go_on(self, partial: PartialLayer) -> bool:
        return (
            self._partials.is_open(partial)
            and not partial.is_forged
            and partial.diff_id in self._room.leases.in_use
            and self._room.has_free(_BEHIND * partial.layout.chunk_size)  # for all at once; nobody else goes for it
            and (self._how.mode is Mode.ALWAYS or self._now() >= self._demanded + self._how.idle)
        )

    async def _fill_behind(self, partial: PartialLayer) -> None:
        missing = iter(partial.missing())

        async def work() -> None:
            for index in missing:
                await self._pace(partial.layout.chunk_size)
                if not self._may_go_on(partial):
                    return
                await partial.fill([index], self._supply.fetch, Priority.COMPLETION, start=self._supply.start)
                self._room.note(partial.diff_id)

        await together(work, _BEHIND)

    async def _pace(self, size: int) -> None:
        if self._how.rate:
            now = self._now()
            start = max(self._next, now)
            self._next = start + size / self._how.rate
            await asyncio.sleep(start - now)
