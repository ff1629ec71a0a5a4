"""The layers of a node: absent, partial or complete, and how they get from one state to the next.

State and locks (one event loop):

- The partial layers are in :class:`~afs.layerstore.partials.Partials`; :class:`~afs.layerstore.describing.Describing` makes
  them, :class:`~afs.layerstore.completion.Completion` turns them into complete ones, each single flight by diff_id.
- ``_opening`` and ``_ensuring`` are single flight by diff_id and origin, for an image can claim any diff_id: a layer must
  not wait for another image's slow source, nor share its failure; what is opened without a pull waits for none of them. A
  pulled layer is committed in one step, and the first stays.
- A layer leaves every map at once, in :meth:`_detach`, when :class:`~afs.layerstore.room.Room` evicts it. That happens at
  any await, but never to a layer that is leased: whoever looks one up leases or pins it before the next await, and so it
  is there as long as it is needed.
- Readers come first: their chunks, then those that they are about to want, then the rest (:mod:`afs.layerstore.scheduling`).
"""

import asyncio
import contextlib
import functools
import itertools
import logging
from collections.abc import Awaitable, Callable, Iterable, Iterator
from pathlib import Path

from afs.core.errors import AfsError, DataLoss, NotFound
from afs.core.singleflight import SingleFlight
from afs.core.together import together
from afs.discovery.client import Announcer
from afs.layerstore.chunkserver import Range
from afs.layerstore.chunkwire import Question
from afs.layerstore.completion import Completing, Completion
from afs.layerstore.describing import Describing
from afs.layerstore.errors import DamagedLayer, LayerNotHeld, LayerUnavailable
from afs.layerstore.fillahead import FilledAhead
from afs.layerstore.layerstats import LayerStats
from afs.layerstore.origins import Origin
from afs.layerstore.partial import PartialLayer
from afs.layerstore.partials import Partials
from afs.layerstore.peers import Peers
from afs.layerstore.pull import OriginKey, Puller
from afs.layerstore.repair import Repairs
from afs.layerstore.room import Room
from afs.layerstore.scheduling import LIMITS, Priority
from afs.layerstore.serving import Serving
from afs.layerstore.store import CompleteLayer, LayerStore
from afs.layerstore.supply import Providers, Supply

log = logging.getLogger(__name__)
OpenLayer = CompleteLayer | PartialLayer
_READ_AHEADS = LIMITS[Priority.PREFETCH]  # chunks that are waited for at once
_RUN = 4  # chunks of a start trace that come in one exchange; with more, fewer exchanges share the slots for what is prefetched
_TRIES = 2  # to open a layer: the second after the first one found it damaged, and it was repaired or dropped


class Layers:
    """See the module. *read_deadline* in seconds bounds how long a chunk may take over all tries."""

    def __init__(
        self,
        store: LayerStore,
        room: Room,
        puller: Puller,
        peers: Peers,
        announcer: Announcer,
        read_deadline: float,
        completing: Completing | None = None,
    ) -> None:
        self._store = store
        self._room = room
        self._pinned = room.leases.pinned
        self._announcer = announcer
        self._opening: SingleFlight[OriginKey, OpenLayer] = SingleFlight()
        self._ensuring: SingleFlight[OriginKey, bool] = SingleFlight()
        self._supply = Supply(store, room, puller, peers, announcer, read_deadline, self._is_ensured)
        self._partials = Partials(store, room, announcer, read_deadline)
        self._describing = Describing(store, room, peers, self._supply, self._partials, announcer)
        self.completion = Completion(
            store, room, puller, announcer, self._supply, self._partials, self._describing, completing or Completing()
        )
        self._serving = Serving(self.repairs, self._refill, self._in_background)
        self._partials.on_dropped = self._serving.forget
        self._background: set[asyncio.Task[None]] = set()
        self.ahead = FilledAhead()
        # Told once of every chunk that a reader wanted and that was not here.
        self.on_demand: Callable[[str, int], None] = lambda diff_id, index: None
        room.detach = self._detach

    @property
    def repairs(self) -> Repairs:
        """Of complete layers."""
        return self._supply.repairs

    def when_described(self, callback: Callable[[str], None]) -> None:
        """Tell *callback* of every partial layer as soon as its chunks can be asked for, before its metadata is here."""
        self._partials.on_taken_in = callback

    def restore(self) -> None:
        """Open what an earlier process left. Blocking, at start."""
        for ref, platform, image in self._store.load_images():
            for part in image.layers:
                self._supply.know(Origin(ref, platform, part))
        # Before anything is opened: it is the last use by an earlier process that counts.
        self._room.restore({*self._store.complete_ids(), *self._store.partial_ids()})
        for diff_id in self._store.complete_ids():
            if (layer := self._store.complete(diff_id)) is not None:
                self._announcer.hold(diff_id, layer.layout.file_size, complete=True)
        for diff_id in self._store.partial_ids():
            self._partials.restore(diff_id)
        for diff_id in self._room.layers():
            if self.find(diff_id) is None:  # it was damaged
                self._room.forget(diff_id)
            else:
                self._room.note(diff_id)

    async def close(self) -> None:
        """End what is under way and close the files."""
        for task in self._background:
            task.cancel()
        await asyncio.gather(*self._background, return_exceptions=True)
        await self._ensuring.close(cancel=True)
        await self.completion.close()
        await self._opening.close(cancel=True)
        await self._describing.close()
        await self._partials.close()
        await self._supply.close()

    def find(self, diff_id: str) -> OpenLayer | None:
        """The layer if this node has it, at least partly. It may be evicted at the next await."""
        return self._store.complete(diff_id) or self._partials.get(diff_id)

    def stats(self, diff_id: str) -> LayerStats:
        """What is counted for a layer that is here."""
        return self._supply.stats(diff_id)

    def fetched(self, diff_id: str) -> int:
        """Bytes of the layer that came from peers and its source since this process started."""
        return self._supply.fetched(diff_id)

    def look_up(self, diff_id: str) -> OpenLayer:
        """:meth:`find` for somebody who uses the layer; NotFound if this node has nothing of it."""
        layer = self.find(diff_id)
        if layer is None:
            raise NotFound(f"layer {diff_id} is not on this node")
        self._room.use(diff_id)
        return layer

    def use(self, diff_id: str) -> OpenLayer:
        """:meth:`look_up` for a peer, who will ask for more within a minute: the layer is leased for as long.

        NotFound for a layer that a peer made up, too: readers here go on with it, others need not begin.
        """
        layer = self.look_up(diff_id)
        if isinstance(layer, PartialLayer) and layer.is_forged:
            raise NotFound(f"layer {diff_id} on this node is not what its name says")
        self._room.leases.lease(diff_id)
        return layer

    def _detach(self, diff_id: str) -> list[Path]:
        """Take an evicted layer out of the maps; what is to be deleted."""
        self._announcer.drop(diff_id)
        self._supply.forget(diff_id)
        self._serving.forget(diff_id)
        self.ahead.forget(diff_id)
        self._partials.detach(diff_id)
        return self._store.detach(diff_id)

    async def open(self, origin: Origin, *, local: bool) -> OpenLayer:
        """Make the layer mountable: complete, or partial with its metadata here. *local*: pull it on this node.

        Nothing holds it on return: the caller pins or leases it before the next await.
        """
        work = functools.partial(self._open_pinned, origin, local=local)
        return await self._opened(origin.layer.diff_id, origin, origin.key, work)

    async def open_held(self, diff_id: str, origin: Origin | None) -> OpenLayer:
        """The same for what is here, or whole on another node; LayerNotHeld if it is neither, for nothing is pulled.

        The *origin*, if it is known, is for when those who have the layer are gone.
        """
        return await self._opened(diff_id, origin, (diff_id, "", ""), functools.partial(self._open_held, diff_id))

    async def _opened(
        self, diff_id: str, origin: Origin | None, key: OriginKey, work: Callable[[], Awaitable[OpenLayer]]
    ) -> OpenLayer:
        for _ in range(_TRIES):
            with self._pinned([diff_id]):
                found = self.find(diff_id)
                with self._known(diff_id, origin):
                    if not _may_be_opened(found):
                        found = await self._opening.run(key, functools.partial(self._pinning, diff_id, work))
                        if isinstance(found, PartialLayer) and not self._partials.is_open(found):
                            found = self.find(diff_id)  # it became complete meanwhile
                if found is None:
                    continue  # and that was damaged on disk
                if not isinstance(found, CompleteLayer) or not self.repairs.is_damaged(diff_id):
                    return found
            await self._mend(found)
        raise DamagedLayer(diff_id, "a chunk")

    @contextlib.contextmanager
    def _known(self, diff_id: str, origin: Origin | None) -> Iterator[None]:
        """The layer may be pulled from there, unless it fails and nothing of the layer is here, nor on its way."""
        if origin is not None:
            self._supply.know(origin)
        try:
            yield
        except BaseException:
            coming = any(key[0] == diff_id for keys in (self._opening, self._ensuring) for key in keys)
            if self.find(diff_id) is None and not coming:
                self._supply.forget(diff_id)
            raise

    async def _mend(self, layer: CompleteLayer) -> None:
        """Repair a damaged layer or drop it; DamagedLayer if neither can be. The caller must not pin it."""
        if not await self.repairs.check(layer) and self._store.complete(layer.diff_id) is layer:
            raise DamagedLayer(layer.diff_id, "a chunk")

    async def _pinning(self, diff_id: str, work: Callable[[], Awaitable[OpenLayer]]) -> OpenLayer:
        with self._pinned([diff_id]):  # its callers may all go away
            return await work()

    async def _open_held(self, diff_id: str) -> OpenLayer:
        known, partial = self._partials.get(diff_id), None
        if known is None or not known.is_forged:
            partial = await self._describing.describe(diff_id, await self._supply.holders(diff_id))
        found = partial or self._store.complete(diff_id)  # which may have been pulled meanwhile
        if found is None:
            raise LayerNotHeld(diff_id)
        return found

    async def _open_pinned(self, origin: Origin, *, local: bool) -> OpenLayer:
        diff_id = origin.layer.diff_id
        if (known := self._partials.get(diff_id)) is not None and known.is_forged:
            complete = await self._supply.pull(origin)
            await self.completion.drop_beside(diff_id)
            return complete
        if (
            not local
            and (partial := await self._describing.describe(diff_id, await self._supply.holders(diff_id))) is not None
        ):
            return partial
        holder = await self._supply.place(origin, local=local or origin.ref.is_local)
        if isinstance(holder, CompleteLayer):
            return holder
        if (
            partial := await self._describing.describe(diff_id, Providers([holder], frozenset({holder.node_id})))
        ) is None:
            raise LayerUnavailable(diff_id, f"layerstore {holder.endpoint} pulled it and went away")
        return partial

    async def fill(
        self, diff_id: str, first: int, count: int, *, beside: bool = False, here: Callable[[], None] = lambda: None
    ) -> None:
        """Have chunks *first* to *first + count - 1* in the partial layer's file; NotFound if the layer is not here.

        *beside*: the other half of each 512 KiB comes behind them. *here* may be called earlier than this returns, in any
        thread: when the chunks have come.
        """
        with self._pinned([diff_id]):
            self.look_up(diff_id)
            partial = self._partials.get(diff_id)
            if partial is None:  # it is complete, and the asker opens that
                return
            wanted = [i for i in range(max(first, 0), min(first + count, partial.table.count)) if not partial.has(i)]
            for index in wanted:
                self._note_demand(partial, index, beside=beside)
            with partial.arrivals.telling(wanted, here):
                await partial.fill(wanted, self._supply.fetch, start=self._supply.start)
            self._note_filled(partial)

    def _note_filled(self, partial: PartialLayer) -> None:
        """Chunks came. Whoever asked has the file open, or opens the complete one."""
        self._room.note_soon(partial.diff_id)
        if self._store.complete(partial.diff_id) is not None:
            self._in_background(functools.partial(self.completion.drop_beside, partial.diff_id))
        elif partial.here == partial.table.count:
            self._in_background(functools.partial(self.completion.promote, partial))

    def _note_demand(self, partial: PartialLayer, index: int, *, beside: bool) -> None:
        self.completion.demanded()
        if partial.is_news(index):
            self._supply.stats(partial.diff_id).demanded += 1
            self.on_demand(partial.diff_id, index)
        if ahead := partial.read_ahead.demanded(index):
            self._in_background(functools.partial(self._prefetch, partial, ahead))
        elif beside and (buddy := index ^ 1) < partial.table.count and partial.is_news(buddy):
            # The other half of 512 KiB: of the chunks that W touches seven in ten have one that it touches too, and then
            # it need not wait for that. What is fetched grows from 1.3 to 1.5 times what is touched.
            self.on_demand(partial.diff_id, buddy)
            self._in_background(lambda: self._fill_ahead(partial, buddy))

    async def _fill_ahead(self, partial: PartialLayer, index: int) -> None:
        if self._partials.is_open(partial):
            await partial.fill([index], self._supply.fetch, Priority.PREFETCH, start=self._supply.start)
            if self._partials.is_open(partial):  # it is not pinned any more
                self._note_filled(partial)

    async def prefetch(self, diff_id: str, indices: Iterable[int], at_once: int = _READ_AHEADS) -> None:
        """Fetch what is missing of these chunks, in this order, as far as no reader is delayed. Errors are logged.

        The snapshotter is told of them. *at_once* are waited for; those that find no free slot cost twice the CPU.
        """
        partial = self._partials.get(diff_id)
        if partial is None:
            return
        count = partial.table.count
        missing = (index for index in dict.fromkeys(indices) if 0 <= index < count and not partial.has(index))

        async def work() -> None:
            while self._partials.is_open(partial) and (run := list(itertools.islice(missing, _RUN))):
                await partial.fill_run(run, self._supply.fetch, self._supply.start, self._supply.start_run)
                if self._partials.is_open(partial):  # it is not pinned any more
                    self._note_filled(partial)
                    for index in run:
                        if partial.has(index):
                            self.ahead.came(diff_id, *partial.table.chunk_range(index, partial.layout))

        try:
            await together(work, max(at_once // _RUN, 1))
        except (AfsError, OSError) as error:
            log.warning("prefetch: %s", error)

    async def _prefetch(self, partial: PartialLayer, indices: Iterable[int]) -> None:
        """Some at a time: the layer is pinned only by what is on its way, and may be evicted in between."""
        left = iter(indices)

        async def work() -> None:
            for index in left:
                if not self._partials.is_open(partial):
                    return
                if 0 <= index < partial.table.count and not partial.has(index):
                    await self._fill_ahead(partial, index)

        await together(work, _READ_AHEADS)

    async def _refill(self, partial: PartialLayer, index: int) -> None:
        """A chunk that was here comes again."""
        if self._partials.is_open(partial):
            await partial.fill([index], self._supply.fetch, start=self._supply.start)

    async def read_chunk(self, diff_id: str, index: int, *, was_bad: bool = False) -> bytes:
        """A chunk for a peer; see :meth:`Serving.read_chunk`. NotFound if the layer is not here."""
        with self._pinned([diff_id]):
            return await self._serving.read_chunk(self.use(diff_id), index, was_bad=was_bad)

    def find_chunk(self, question: Question) -> Range | None:
        """See :meth:`Serving.find`; in any thread."""
        return self._serving.find(question)

    def _in_background(self, work: Callable[[], Awaitable[object]]) -> None:
        async def run() -> None:
            try:
                await work()
            except (AfsError, OSError) as error:
                log.error("layers: %s", error)
            except Exception:  # a mistake of ours
                log.exception("layers")

        task = asyncio.create_task(run())
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def ensure(self, origin: Origin) -> tuple[CompleteLayer, bool]:
        """The layer, complete on this node, and whether it was read from its source for that. As :meth:`open`."""
        diff_id, pulled = origin.layer.diff_id, False
        for _ in range(_TRIES):
            with self._pinned([diff_id]):
                with self._known(diff_id, origin):
                    if self._store.complete(diff_id) is None:
                        pulled = await self._ensuring.run(origin.key, lambda: self._ensure(origin))
                complete = self._store.complete(diff_id)
                if complete is None:
                    raise DataLoss(f"layer {diff_id} was damaged on disk as soon as it was complete")
                if not self.repairs.is_damaged(diff_id):
                    return complete, pulled
            await self._mend(complete)
        raise DamagedLayer(diff_id, "a chunk")

    def _is_ensured(self, diff_id: str) -> bool:
        return any(key[0] == diff_id for key in self._ensuring)

    async def _ensure(self, origin: Origin) -> bool:
        diff_id = origin.layer.diff_id
        with self._pinned([diff_id]):  # its callers may all go away
            try:
                done = await self.completion.from_peers(diff_id)
                if done is not None:
                    return done
            except (LayerUnavailable, DataLoss) as error:
                log.warning("layer %s cannot be completed from peers: %s; pulling it", diff_id, error.line)
            await self._supply.pull(origin)
            await self.completion.drop_beside(diff_id)
            return True


def _may_be_opened(found: OpenLayer | None) -> bool:
    """Whether a new mount may use what was found: not what misses metadata, nor what a peer made up."""
    return isinstance(found, CompleteLayer) or (found is not None and found.is_mountable() and not found.is_forged)
