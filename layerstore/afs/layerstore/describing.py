"""From a layer that other nodes have to a partial layer that can be mounted: its description, and the metadata behind it.

Both come in one stream of one node, so a mount waits for one round trip; what that node does not give comes chunk by chunk
from the others. Somebody waits for the mount: a node that is silent gets another one beside it, and the first of them to
describe the layer is taken; one that falls silent behind that is left.

State (one event loop): ``_describing`` is single flight by diff_id and knows no origin; who joined one that failed tries
again. The layer is used until its metadata is here: what completes it meanwhile must not close it below what comes. Nothing
that a peer claims makes room before its bytes came: what is promised runs ``AHEAD`` before what is here.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, AsyncIterator

from afs.core.errors import AfsError, DataLoss, DeadlineExceeded
from afs.core.singleflight import SingleFlight
from afs.discovery.client import Announcer, Peer
from afs.layerstore.errors import BadChunk, DiskFull, LayerUnavailable
from afs.layerstore.partial import Description, PartialLayer
from afs.layerstore.partials import Partials
from afs.layerstore.peers import Peers
from afs.layerstore.quota import Reservation
from afs.layerstore.room import Room
from afs.layerstore.store import NO_SPACE, LayerStore
from afs.layerstore.supply import Providers, Supply

log = logging.getLogger(__name__)
AHEAD = 64 << 20  # bytes promised beyond what came
_BESIDE_S = 0.5  # of silence, before another node is asked for a description too
_FIRST_S = 10.0  # of silence before a node's description counts as not coming
_SILENT_S = 2.0  # between two messages
_MOST_METADATA = 1 << 30  # bytes; what the converter makes at most

Parts = AsyncGenerator[Description | tuple[int, bytes], None]
_Asking = asyncio.Task[Description]


class Describing:
    """See the module."""

    def __init__(
        self, store: LayerStore, room: Room, peers: Peers, supply: Supply, partials: Partials, announcer: Announcer
    ) -> None:
        self._store = store
        self._room = room
        self._peers = peers
        self._supply = supply
        self._partials = partials
        self._announcer = announcer
        self._describing: SingleFlight[str, PartialLayer | None] = SingleFlight()

    async def close(self) -> None:
        """End what is under way."""
        await self._describing.close(cancel=True)

    async def describe(self, diff_id: str, holders: Providers) -> PartialLayer | None:
        """A partial layer as one of *holders* describes it, its metadata here; None if nobody can."""
        joined = diff_id in self._describing
        with contextlib.ExitStack() as stack:
            if joined:  # what others were told need not be so for us
                stack.enter_context(contextlib.suppress(LayerUnavailable, DataLoss))
            partial = await self._describing.run(diff_id, lambda: self._describe(diff_id, holders))
            if partial is not None or not joined:
                return partial
        return await self._describing.run(diff_id, lambda: self._describe(diff_id, holders))

    async def _describe(self, diff_id: str, holders: Providers) -> PartialLayer | None:
        if (known := self._partials.get(diff_id)) is not None:
            if not known.is_mountable():
                if not holders.peers:
                    return None
                with known.using():
                    await self._fill_metadata(known, holders)
            return known
        return await self._describe_anew(diff_id, holders)

    async def _describe_anew(self, diff_id: str, holders: Providers) -> PartialLayer | None:
        watch = self._supply.watch
        left = watch.order(holders.peers, holders.complete)
        asked: dict[_Asking, tuple[Peer, Parts]] = {}
        try:
            while left or asked:
                if left:  # the ones before were silent, or failed
                    peer = left.pop(0)
                    parts = self._peers.describe_layer(peer, diff_id)
                    asked[asyncio.create_task(_first(parts), name=f"description by {peer.node_id}")] = peer, parts
                done, _ = await asyncio.wait(
                    asked, timeout=_BESIDE_S if left else None, return_when=asyncio.FIRST_COMPLETED
                )
                for task in done:
                    peer, parts = asked[task]
                    try:
                        partial = await self._create(diff_id, task.result())
                    except DiskFull:  # whoever describes it
                        raise
                    except AfsError as error:
                        log.warning("layerstore %s cannot describe layer %s: %s", peer.endpoint, diff_id, error.line)
                        del asked[task]
                        continue
                    for earlier, (silent, _) in asked.items():
                        if earlier is task:
                            break
                        watch.lost(silent.endpoint)
                    del asked[task]
                    await _end(asked)
                    async with contextlib.aclosing(parts):
                        with partial.using():
                            await self._fill_metadata(partial, holders, self._received(partial, parts, peer.endpoint))
                    return partial
        finally:
            await _end(asked)
        return None

    async def _create(self, diff_id: str, said: Description) -> PartialLayer:
        partial = await self._create_files(diff_id, said)
        if len(partial.metadata_chunks()) * partial.layout.chunk_size > _MOST_METADATA:
            partial.close()
            self._store.drop_partial(diff_id)
            raise DataLoss("it claims more metadata than a layer can have")
        return partial

    async def _create_files(self, diff_id: str, said: Description) -> PartialLayer:
        """The layer as it was described; DiskFull if nothing can go for it."""
        while True:
            try:
                return await asyncio.to_thread(PartialLayer.create, diff_id, self._store.partial_dir(diff_id), said)
            except OSError as error:
                if error.errno not in NO_SPACE:
                    raise
                if not await self._room.on_full_disk(len(said.header) + len(said.table.digests) + said.table.count):
                    raise DiskFull(diff_id, self._store.root) from error

    async def _received(self, partial: PartialLayer, parts: Parts, endpoint: str) -> AsyncIterator[None]:
        """Put what comes behind the description in place; gives something after each chunk."""
        stats = self._supply.stats(partial.diff_id)
        try:
            while (part := await _next(parts, _SILENT_S)) is not None:
                if isinstance(part, Description):
                    raise DataLoss("it described the layer twice")
                index, data = part
                stats.from_peers[endpoint] += len(data)
                if index >= partial.table.count or not await partial.put_async(index, data):
                    return
                yield
        except BadChunk as error:
            stats.bad_chunks += 1
            log.error("layerstore %s: %s", endpoint, error.line)
        except AfsError as error:  # the others may have the rest
            log.warning("layerstore %s: metadata of layer %s: %s", endpoint, partial.diff_id, error.line)

    async def _fill_metadata(
        self, partial: PartialLayer, holders: Providers, received: AsyncIterator[None] | None = None
    ) -> None:
        """Take a partial layer in and have its metadata here. Raises CacheFull, and then a new one is gone."""
        chunks, diff_id = partial.metadata_chunks(), partial.diff_id
        taken_in = self._partials.is_open(partial)
        try:
            # Only of this room can a container be sure; what it reads later may push others out.
            async with self._room.reserved(diff_id, self._promise(partial)) as reservation:
                self._supply.provide(diff_id, holders)
                if not taken_in:
                    self._partials.take_in(partial)
                    taken_in = True
                self._room.note(diff_id)
                if received is not None:
                    async for _ in received:
                        await self._grow(partial, reservation)
                await partial.fill(chunks, self._supply.fetch, start=self._supply.start)
                self._room.settle(reservation)
        except BaseException:
            if not taken_in:  # else it belongs to all
                partial.close()
                self._store.drop_partial(diff_id)
            raise
        if self._store.complete(diff_id) is None:
            self._announcer.hold(diff_id, partial.layout.file_size, complete=False)

    def _promise(self, partial: PartialLayer) -> int:
        missing = sum(not partial.has(index) for index in partial.metadata_chunks())
        return min(missing * partial.layout.chunk_size, AHEAD)

    async def _grow(self, partial: PartialLayer, reservation: Reservation) -> None:
        self._room.note(partial.diff_id)
        await self._room.correct(reservation, self._promise(partial))


async def _next(parts: Parts, seconds: float) -> Description | tuple[int, bytes] | None:
    """What comes next, None at the end; DeadlineExceeded after *seconds* of silence, and then nothing comes any more."""
    try:
        async with asyncio.timeout(seconds):
            return await anext(parts, None)
    except TimeoutError:
        raise DeadlineExceeded(f"it said nothing for {seconds:.0f} s") from None


async def _first(parts: Parts) -> Description:
    said = await _next(parts, _FIRST_S)
    if not isinstance(said, Description):
        raise DataLoss("it said nothing")
    return said


async def _end(asked: dict[_Asking, tuple[Peer, Parts]]) -> None:
    """End the descriptions that nobody wants any more."""
    for task in asked:
        task.cancel()
    await asyncio.gather(*asked, return_exceptions=True)
    for _, parts in asked.values():
        await parts.aclose()
    asked.clear()
