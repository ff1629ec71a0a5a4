"""The layers of a node: absent, partial or complete, and how they get from one state to the next.

State and locks (one event loop):

- ``_partials`` holds every open partial layer. An entry appears in :meth:`_describe_now` after its files exist and leaves in
  :meth:`_drop` after the complete file was committed; in between a layer may be read from either, the bytes are equal.
- ``_opening`` and ``_ensuring`` are single flight by diff_id and origin, for an image can claim any diff_id: a layer must
  not wait for another image's slow source, nor share its failure. What they do to one layer's state is one task's each:
  ``_describing`` makes the partial layer and ``_completing`` turns it into a complete one, single flight by diff_id; they
  know no origin, and who joined one that failed tries again. A pulled layer is committed in one step, and the first stays.
- A partial layer beside a complete one is dropped by ``_completing`` or, while that does not run, by whoever finds it. It does
  not start on a layer that is complete, so it never has its files closed below it.
- A layer leaves every map at once, in :meth:`_detach`, when :class:`~afs.layerstore.room.Room` evicts it. That happens at
  any await, but never to a layer that is leased: whoever looks one up leases or pins it before the next await, and so it
  is there as long as it is needed.
"""

import asyncio
import contextlib
import errno
import functools
import logging
import time
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path

from afs.core.errors import AfsError, DataLoss, InvalidArgument, NotFound
from afs.core.singleflight import SingleFlight
from afs.discovery.client import Announcer, Peer
from afs.layerstore.errors import DamagedLayer, DiskFull, LayerUnavailable
from afs.layerstore.partial import AT_ONCE, PartialLayer
from afs.layerstore.peers import Peers
from afs.layerstore.pull import OriginKey, Puller
from afs.layerstore.repair import Repairs
from afs.layerstore.room import Room
from afs.layerstore.store import NO_SPACE, CompleteLayer, LayerStore
from afs.layerstore.supply import Origin, Supply

log = logging.getLogger(__name__)
OpenLayer = CompleteLayer | PartialLayer
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
    ) -> None:
        self._store = store
        self._room = room
        self._pinned = room.leases.pinned
        self._peers = peers
        self._announcer = announcer
        self._read_deadline = read_deadline
        self._partials: dict[str, PartialLayer] = {}
        self._opening: SingleFlight[OriginKey, OpenLayer] = SingleFlight()
        self._ensuring: SingleFlight[OriginKey, bool] = SingleFlight()
        self._completing: SingleFlight[str, bool | None] = SingleFlight()
        self._describing: SingleFlight[str, PartialLayer | None] = SingleFlight()
        self._puller = puller
        self._supply = Supply(store, room, puller, peers, announcer, read_deadline, self._is_ensured)
        self._background: set[asyncio.Task[None]] = set()
        # Told once of every chunk that a reader wanted and that was not here.
        self.on_demand: Callable[[str, int], None] = lambda diff_id, index: None
        room.detach = self._detach

    @property
    def repairs(self) -> Repairs:
        """Of complete layers."""
        return self._supply.repairs

    def restore(self) -> None:
        """Open what an earlier process left. Blocking, at start."""
        for ref, platform, image in self._store.load_names():
            for part in image.layers:
                self._supply.know(Origin(ref, platform, part))
        # Before anything is opened: it is the last use by an earlier process that counts.
        self._room.restore({*self._store.complete_ids(), *self._store.partial_ids()})
        for diff_id in self._store.complete_ids():
            if (layer := self._store.complete(diff_id)) is not None:
                self._announcer.hold(diff_id, layer.layout.file_size, complete=True)
        for diff_id in self._store.partial_ids():
            self._restore_partial(diff_id)
        for diff_id in self._room.layers():
            if self.find(diff_id) is None:  # it was damaged
                self._room.forget(diff_id)
            else:
                self._room.note(diff_id)

    def _restore_partial(self, diff_id: str) -> None:
        if self._store.complete(diff_id) is not None:  # it was pulled because the peers went away
            self._store.drop_partial(diff_id)
            return
        try:
            partial = PartialLayer.open(diff_id, self._store.partial_dir(diff_id))
        except (AfsError, OSError, ValueError) as error:
            if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
                raise  # which says nothing about the layer
            log.warning("dropping the partial layer %s: %s", diff_id, error)
            self._store.drop_partial(diff_id)
            return
        self._take_in(partial)
        self._announcer.hold(diff_id, partial.layout.file_size, complete=False)

    def _take_in(self, partial: PartialLayer) -> None:
        partial.on_full = self._on_full
        partial.pin = functools.partial(self._pinned, [partial.diff_id])
        self._partials[partial.diff_id] = partial

    async def close(self) -> None:
        """End what is under way and close the files."""
        for task in self._background:
            task.cancel()
        await asyncio.gather(*self._background, return_exceptions=True)
        await self.repairs.close()
        await self._ensuring.close(cancel=True)
        await self._completing.close(cancel=True)
        await self._opening.close(cancel=True)
        await self._describing.close(cancel=True)
        for partial in self._partials.values():
            await partial.stop()
            partial.close()

    def find(self, diff_id: str) -> OpenLayer | None:
        """The layer if this node has it, at least partly. It may be evicted at the next await."""
        return self._store.complete(diff_id) or self._partials.get(diff_id)

    def look_up(self, diff_id: str) -> OpenLayer:
        """:meth:`find` for somebody who uses the layer; NotFound if this node has nothing of it."""
        layer = self.find(diff_id)
        if layer is None:
            raise NotFound(f"layer {diff_id} is not on this node")
        self._room.use(diff_id)
        return layer

    def use(self, diff_id: str) -> OpenLayer:
        """:meth:`look_up` for a peer, who will ask for more within a minute: the layer is leased for as long."""
        layer = self.look_up(diff_id)
        self._room.leases.lease(diff_id)
        return layer

    def _detach(self, diff_id: str) -> list[Path]:
        """Take an evicted layer out of the maps; what is to be deleted."""
        self._announcer.drop(diff_id)
        self._supply.forget(diff_id)
        partial = self._partials.pop(diff_id, None)
        if partial is not None:
            partial.close()  # nothing is being filled or read: that would hold a pin
        return self._store.detach(diff_id)

    async def open(self, origin: Origin, *, local: bool) -> OpenLayer:
        """Make the layer mountable: complete, or partial with its metadata here. *local*: pull it on this node.

        Nothing holds it on return: the caller pins or leases it before the next await.
        """
        diff_id = origin.layer.diff_id
        for _ in range(_TRIES):
            with self._pinned([diff_id]):
                self._supply.know(origin)
                found = self.find(diff_id)
                if found is None or (isinstance(found, PartialLayer) and not found.is_mountable()):
                    found = await self._opening.run(origin.key, lambda: self._open(origin, local=local))
                if not isinstance(found, CompleteLayer) or not self.repairs.is_damaged(diff_id):
                    return found
            await self._mend(found)
        raise DamagedLayer(diff_id, "a chunk")

    async def _mend(self, layer: CompleteLayer) -> None:
        """Repair a damaged layer or drop it; DamagedLayer if neither can be. The caller must not pin it."""
        if not await self.repairs.check(layer) and self._store.complete(layer.diff_id) is layer:
            raise DamagedLayer(layer.diff_id, "a chunk")

    async def _open(self, origin: Origin, *, local: bool) -> OpenLayer:
        with self._pinned([origin.layer.diff_id]):  # its callers may all go away
            return await self._open_pinned(origin, local=local)

    async def _open_pinned(self, origin: Origin, *, local: bool) -> OpenLayer:
        diff_id = origin.layer.diff_id
        if not local and (partial := await self._describe(diff_id, await self._supply.holders(diff_id))) is not None:
            return partial
        holder = await self._supply.place(origin, local=local or origin.ref.is_local)
        if isinstance(holder, CompleteLayer):
            return holder
        if (partial := await self._describe(diff_id, [holder])) is None:
            raise LayerUnavailable(diff_id, f"layerstore {holder.endpoint} pulled it and went away")
        return partial

    async def _describe(self, diff_id: str, holders: list[Peer]) -> PartialLayer | None:
        """A partial layer as one of *holders* describes it, its metadata read; None if nobody can."""
        joined = diff_id in self._describing
        with contextlib.ExitStack() as stack:
            if joined:  # what others were told need not be so for us
                stack.enter_context(contextlib.suppress(LayerUnavailable, DataLoss))
            partial = await self._describing.run(diff_id, lambda: self._describe_now(diff_id, holders))
            if partial is not None or not joined:
                return partial
        return await self._describing.run(diff_id, lambda: self._describe_now(diff_id, holders))

    async def _describe_now(self, diff_id: str, holders: list[Peer]) -> PartialLayer | None:
        if (known := self._partials.get(diff_id)) is not None:
            if not known.is_mountable():
                if not holders:
                    return None
                await self._fill_metadata(known, holders)
            return known
        for peer in holders:
            try:
                size, header, table, footer = await self._peers.describe_layer(peer, diff_id)
                directory = self._store.partial_dir(diff_id)
                partial = await asyncio.to_thread(PartialLayer.create, diff_id, directory, size, header, table, footer)
            except AfsError as error:
                log.warning("layerstore %s cannot describe layer %s: %s", peer.endpoint, diff_id, error.line)
                continue
            except OSError as error:
                if error.errno in NO_SPACE:
                    raise DiskFull(diff_id, self._store.root) from error
                raise
            await self._fill_metadata(partial, holders)
            return partial
        return None

    async def _fill_metadata(self, partial: PartialLayer, holders: list[Peer]) -> None:
        """Take a partial layer in and have its metadata here. Raises CacheFull, and then a new one is gone."""
        chunks, diff_id = partial.metadata_chunks(), partial.diff_id
        try:
            # Only of this room can a container be sure; what it reads later may push others out.
            async with self._room.reserved(diff_id, len(chunks) * partial.layout.chunk_size) as reservation:
                self._supply.provide(diff_id, holders)
                self._take_in(partial)
                self._room.note(diff_id)
                await partial.fill(chunks, self._supply.fetch)
                self._room.settle(reservation)
        except BaseException:
            if diff_id not in self._partials:
                partial.close()
                self._store.drop_partial(diff_id)
            raise
        if self._store.complete(diff_id) is None:
            self._announcer.hold(diff_id, partial.layout.file_size, complete=False)

    async def fill(self, diff_id: str, first: int, count: int) -> None:
        """Have chunks *first* to *first + count - 1* in the partial layer's file; NotFound if the layer is not here."""
        with self._pinned([diff_id]):
            self.look_up(diff_id)
            partial = self._partials.get(diff_id)
            if partial is not None:  # else it is complete, and the asker opens that
                wanted = range(max(first, 0), min(first + count, partial.table.count))
                for index in wanted:
                    if not partial.has(index) and not partial.is_filling(index):
                        self.on_demand(diff_id, index)
                await partial.fill(wanted, self._supply.fetch)
                self._room.note(diff_id)
                if self._store.complete(diff_id) is not None:  # the asker has the file open, or opens the complete one
                    self._in_background(functools.partial(self._drop_beside, diff_id))

    async def prefetch(self, diff_id: str, indices: Iterable[int]) -> None:
        """Fetch what is missing of these chunks, in this order, as far as no reader is delayed. Errors are logged."""
        for index in indices:
            partial = self._partials.get(diff_id)
            if partial is None:
                return
            if not partial.has(index):
                try:
                    await partial.fill([index], self._supply.fetch)
                except (AfsError, OSError) as error:
                    log.warning("prefetch: %s", error)
                    return

    async def _on_full(self, partial: PartialLayer, wanted: int, since: float) -> None:
        """Make room for a chunk on a full disk, or wait for somebody to let go of something; DiskFull at the deadline."""
        if await self._room.on_full_disk(wanted):
            return
        if time.monotonic() - since > self._read_deadline:
            raise DiskFull(partial.diff_id, self._store.root)
        await asyncio.sleep(min(1.0, self._read_deadline / 10))

    async def read_chunk(self, diff_id: str, index: int) -> bytes:
        """A chunk for a peer. NotFound if it is not here; DamagedLayer if it is damaged, and then it is being repaired."""
        with self._pinned([diff_id]):
            layer = self.use(diff_id)
            if index >= layer.table.count:
                raise InvalidArgument(f"layer {diff_id} has {layer.table.count} chunks, no chunk {index}")
            data = await (
                self._read(layer, index) if isinstance(layer, CompleteLayer) else self._read_part(layer, index)
            )
        if data is None:
            raise DamagedLayer(diff_id, f"chunk {index}")
        return data

    async def _read(self, layer: CompleteLayer, index: int) -> bytes | None:
        try:
            data = await asyncio.to_thread(layer.read_chunk, index)
        except FileNotFoundError:  # it is pinned, so this was somebody's hand
            raise NotFound(f"{layer.path} is gone") from None
        if data is None:
            self.repairs.suspect(layer)
            self._in_background(functools.partial(self.repairs.check, layer))
        return data

    async def _read_part(self, layer: PartialLayer, index: int) -> bytes | None:
        if not layer.has(index):
            raise NotFound(f"chunk {index} of layer {layer.diff_id} is not on this node")
        data = await layer.read_async(index)
        if data is None:
            log.error("layer %s: chunk %d is damaged on disk; fetching it again", layer.diff_id, index)
            layer.unmark(index)
            self._in_background(functools.partial(self.fill, layer.diff_id, index, 1))
        return data

    def _in_background(self, work: Callable[[], Awaitable[object]]) -> None:
        async def run() -> None:
            try:
                await work()
            except (AfsError, OSError) as error:
                log.error("layers: %s", error)

        task = asyncio.create_task(run())
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def ensure(self, origin: Origin) -> tuple[CompleteLayer, bool]:
        """The layer, complete on this node, and whether it was read from its source for that. As :meth:`open`."""
        diff_id, pulled = origin.layer.diff_id, False
        for _ in range(_TRIES):
            with self._pinned([diff_id]):
                self._supply.know(origin)
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
                done = await self._completing.run(diff_id, lambda: self._from_peers(diff_id))
                if done is not None:
                    return done
            except (LayerUnavailable, DataLoss) as error:
                log.warning("layer %s cannot be completed from peers: %s; pulling it", diff_id, error.line)
            await self._supply.pull(origin)
            await self._drop_beside(diff_id)
            return True

    async def _from_peers(self, diff_id: str) -> bool | None:
        """Complete the layer from other nodes: False. None if nobody has it, True if it was pulled after all."""
        with self._pinned([diff_id]):
            partial = self._partials.get(diff_id)
            if partial is None:
                partial = await self._describe(diff_id, await self._supply.holders(diff_id))
            if self._store.complete(diff_id) is not None:
                if partial is not None:
                    await self._drop(partial)
                return True
            return None if partial is None else await self._complete(partial)

    async def _complete(self, partial: PartialLayer) -> bool:
        diff_id, missing = partial.diff_id, partial.missing()
        async with self._room.reserved(diff_id, len(missing) * partial.layout.chunk_size) as reservation:
            for start in range(0, len(missing), AT_ONCE):  # what a reader waits for gets in between
                await partial.fill(missing[start : start + AT_ONCE], self._supply.fetch)
                reservation.least = reservation.likely = len(partial.missing()) * partial.layout.chunk_size
                self._room.note(diff_id)
            if self._store.complete(diff_id) is not None:  # no peer was left, so a fetch had it pulled
                await self._drop(partial)
                return True
            await self._promote(partial)
            return False

    async def _promote(self, partial: PartialLayer) -> None:
        """A partial layer that has every chunk becomes the complete one."""
        await partial.idle()
        await self._puller.check(partial.data_path, partial.diff_id)
        self._store.commit(partial.data_path, partial.diff_id)
        await self._drop(partial)
        self._announcer.hold(partial.diff_id, partial.layout.file_size, complete=True)
        await self._announcer.flush()

    async def _drop_beside(self, diff_id: str) -> None:
        """Drop the partial layer if the complete one is there; see the module."""
        partial = self._partials.get(diff_id)
        if partial is not None and self._store.complete(diff_id) is not None and diff_id not in self._completing:
            await self._drop(partial)

    async def _drop(self, partial: PartialLayer) -> None:
        """Forget a partial layer whose complete file is there; afs_fused keeps what it has open."""
        await partial.idle()
        if self._partials.get(partial.diff_id) is not partial:
            return  # somebody else has dropped it
        del self._partials[partial.diff_id]
        partial.close()
        self._store.drop_partial(partial.diff_id)
        self._room.note(partial.diff_id)
