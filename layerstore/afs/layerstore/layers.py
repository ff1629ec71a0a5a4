"""The layers of a node: absent, partial or complete, and how they get from one state to the next.

State and locks (one event loop):

- ``_partials`` holds every open partial layer. An entry appears in :meth:`_describe_now` after its files exist and leaves in
  :meth:`_promote` after the complete file was committed; in between a layer may be read from either, the bytes are equal.
- ``_opening`` and ``_ensuring`` are single flight by diff_id: at most one task changes the state of a layer each.
  Both may want a partial layer made: ``_describing`` is single flight for that and waits for neither.
- ``_providers``, ``_avoided`` and ``_origins`` are hints; any await may find them changed, and a wrong one costs one failed call.
"""

import asyncio
import logging
import time
from dataclasses import dataclass

from afs.core.errors import (
    AfsError,
    DataLoss,
    DeadlineExceeded,
    Internal,
    NotFound,
    ResourceExhausted,
    Unavailable,
)
from afs.core.images import ImageRef, Platform
from afs.core.singleflight import SingleFlight
from afs.discovery.client import Announcer, Peer
from afs.layerstore.errors import LayerUnavailable
from afs.layerstore.manifests import Layer
from afs.layerstore.partial import AT_ONCE, PartialLayer
from afs.layerstore.peers import Peers
from afs.layerstore.placement import ranked
from afs.layerstore.pull import Puller
from afs.layerstore.store import CompleteLayer, LayerStore

log = logging.getLogger(__name__)
OpenLayer = CompleteLayer | PartialLayer


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a layer came from: enough to have it pulled again."""

    ref: ImageRef
    platform: Platform
    layer: Layer


class Layers:
    """See the module. *read_deadline* in seconds bounds how long a chunk may take over all tries."""

    def __init__(
        self, store: LayerStore, puller: Puller, peers: Peers, announcer: Announcer, read_deadline: float
    ) -> None:
        self._store = store
        self._puller = puller
        self._peers = peers
        self._announcer = announcer
        self._read_deadline = read_deadline
        self._partials: dict[str, PartialLayer] = {}
        self._providers: dict[str, list[Peer]] = {}
        self._origins: dict[str, Origin] = {}
        self._avoided: dict[str, set[str]] = {}  # ids of nodes that served a bad chunk of a layer, by diff_id
        self._opening: SingleFlight[str, OpenLayer] = SingleFlight()
        self._ensuring: SingleFlight[str, bool] = SingleFlight()
        self._describing: SingleFlight[str, PartialLayer | None] = SingleFlight()

    def restore(self) -> None:
        """Open what an earlier process left. Blocking, at start."""
        for diff_id in self._store.complete_ids():
            if (layer := self._store.complete(diff_id)) is not None:
                self._announcer.hold(diff_id, layer.layout.file_size, complete=True)
        for diff_id in self._store.partial_ids():
            if self._store.complete(diff_id) is not None:  # it was pulled because the peers went away
                self._store.drop_partial(diff_id)
                continue
            try:
                partial = PartialLayer.open(diff_id, self._store.partial_dir(diff_id))
            except (AfsError, OSError, ValueError) as error:
                log.warning("dropping the partial layer %s: %s", diff_id, error)
                self._store.drop_partial(diff_id)
                continue
            self._partials[diff_id] = partial
            self._announcer.hold(diff_id, partial.layout.file_size, complete=False)

    async def close(self) -> None:
        """End what is under way and close the files."""
        await self._ensuring.close(cancel=True)
        await self._opening.close(cancel=True)
        await self._describing.close(cancel=True)
        for partial in self._partials.values():
            await partial.stop()
            partial.close()

    def find(self, diff_id: str) -> OpenLayer | None:
        """The layer if this node has it, at least partly."""
        return self._store.complete(diff_id) or self._partials.get(diff_id)

    async def open(self, origin: Origin, *, local: bool) -> OpenLayer:
        """Make the layer mountable: complete, or partial with its metadata here. *local*: pull it on this node."""
        diff_id = origin.layer.diff_id
        self._origins[diff_id] = origin
        found = self.find(diff_id)
        return found or await self._opening.run(diff_id, lambda: self._open(origin, local=local))

    async def _open(self, origin: Origin, *, local: bool) -> OpenLayer:
        diff_id = origin.layer.diff_id
        if not local and (partial := await self._describe(diff_id, await self._holders(diff_id))) is not None:
            return partial
        holder = await self._place(origin, local=local or origin.ref.is_local)
        if isinstance(holder, CompleteLayer):
            return holder
        if (partial := await self._describe(diff_id, [holder])) is None:
            raise LayerUnavailable(diff_id, f"layerstore {holder.endpoint} pulled it and went away")
        return partial

    async def _holders(self, diff_id: str) -> list[Peer]:
        """Who has the layer, complete ones first; nobody if not one of them has all of it.

        Partial holders alone are of no use: what they miss has to come from the source, and whoever pulls it has it all.
        """
        located, avoided = await self._announcer.locate([diff_id]), self._avoided.get(diff_id, set())
        if not located.complete.get(diff_id, frozenset()) - avoided:
            return []
        return [peer for peer in located.layers.get(diff_id, []) if peer.node_id not in avoided]

    async def _place(self, origin: Origin, *, local: bool) -> CompleteLayer | Peer:
        """Have the layer pulled by its owner, or here if the owner does not answer or served bad chunks; the holder."""
        me, diff_id = self._announcer.me, origin.layer.diff_id
        owner = me if local else ranked(diff_id, self._announcer.peers)[0]
        if owner.node_id in self._avoided.get(diff_id, ()):
            owner = me
        if owner.node_id != me.node_id:
            try:
                await self._peers.ensure_layer(owner, origin.ref, origin.platform, origin.layer)
            except (
                Unavailable,
                DeadlineExceeded,
                ResourceExhausted,
                Internal,
            ) as error:  # its trouble need not be ours
                log.warning("owner %s of layer %s: %s; pulling it here", owner.node_id, diff_id, error.line)
            else:
                return owner
        return await self._pull(origin)

    async def _pull(self, origin: Origin) -> CompleteLayer:
        complete = self._store.complete(origin.layer.diff_id) or await self._puller.pull(origin.ref, origin.layer)
        self._announcer.hold(complete.diff_id, complete.layout.file_size, complete=True)
        await self._announcer.flush()
        return complete

    async def _describe(self, diff_id: str, holders: list[Peer]) -> PartialLayer | None:
        """A partial layer as one of *holders* describes it, its metadata read; None if nobody can."""
        return await self._describing.run(diff_id, lambda: self._describe_now(diff_id, holders))

    async def _describe_now(self, diff_id: str, holders: list[Peer]) -> PartialLayer | None:
        if (known := self._partials.get(diff_id)) is not None:
            return known
        for peer in holders:
            try:
                size, header, table, footer = await self._peers.describe_layer(peer, diff_id)
                directory = self._store.partial_dir(diff_id)
                partial = await asyncio.to_thread(PartialLayer.create, diff_id, directory, size, header, table, footer)
            except AfsError as error:
                log.warning("layerstore %s cannot describe layer %s: %s", peer.endpoint, diff_id, error.line)
                continue
            self._providers[diff_id] = list(holders)
            self._partials[diff_id] = partial
            await partial.fill(partial.metadata_chunks(), self._fetch)
            self._announcer.hold(diff_id, size, complete=False)
            return partial
        return None

    async def fill(self, diff_id: str, first: int, count: int) -> None:
        """Have chunks *first* to *first + count - 1* in the partial layer's file; NotFound if the layer is not here."""
        partial = self._partials.get(diff_id)
        if partial is not None:
            last = min(first + count, partial.table.count)
            await partial.fill(range(max(first, 0), last), self._fetch)
        elif self._store.complete(diff_id) is None:
            raise NotFound(f"layer {diff_id} is not on this node")

    async def _fetch(self, partial: PartialLayer, index: int) -> bytes:
        """A verified chunk, from whoever has it; LayerUnavailable after the deadline."""
        end, pause, cause = time.monotonic() + self._read_deadline, 0.05, "no node holds it"
        while True:
            if (complete := self._store.complete(partial.diff_id)) is not None:
                data = await asyncio.to_thread(
                    complete.read_chunk, index
                )  # it was pulled meanwhile; the bytes are equal
                if not await asyncio.to_thread(partial.table.verify, index, data):
                    raise DataLoss(f"layer {partial.diff_id}: chunk {index} is damaged on disk")
                return data
            for peer in list(self._providers.get(partial.diff_id, [])):
                try:
                    data = await self._peers.read_chunk(peer, partial.diff_id, index)
                except AfsError as error:
                    cause = error.line
                    others = [other for other in self._providers.get(partial.diff_id, []) if other != peer]
                    self._providers[partial.diff_id] = [*others, peer]  # last from now on
                    if time.monotonic() > end:
                        raise LayerUnavailable(partial.diff_id, cause) from None
                    continue
                if await asyncio.to_thread(partial.table.verify, index, data):
                    return data
                cause = f"layerstore {peer.endpoint} served a bad chunk {index}"
                log.error("layer %s: %s; avoiding it", partial.diff_id, cause)
                self._avoided.setdefault(partial.diff_id, set()).add(peer.node_id)
                self._providers[partial.diff_id] = [p for p in self._providers[partial.diff_id] if p != peer]
            if await self._find_providers(partial.diff_id):
                continue
            if time.monotonic() + pause > end:
                raise LayerUnavailable(partial.diff_id, cause)
            await asyncio.sleep(pause)
            pause = min(pause * 2, 1.0)

    async def _find_providers(self, diff_id: str) -> bool:
        """Refresh the providers; if nobody is left, have the layer pulled again. True if that was here."""
        holders = await self._holders(diff_id)
        origin = self._origins.get(diff_id)
        if not holders and origin is not None:
            try:
                # A node that was itself told to have the layer does not pass that on: two nodes that see different
                # peers for a moment would wait for each other.
                placed = await self._place(origin, local=origin.ref.is_local or diff_id in self._ensuring)
            except AfsError as error:
                log.warning("layer %s cannot be pulled again: %s", diff_id, error.line)
                return False
            if isinstance(placed, CompleteLayer):
                return True
            holders = [placed]
        self._providers[diff_id] = holders
        return False

    async def ensure(self, origin: Origin) -> tuple[CompleteLayer, bool]:
        """The layer, complete on this node, and whether it was read from its source for that."""
        diff_id = origin.layer.diff_id
        self._origins[diff_id] = origin
        pulled = False
        if self._store.complete(diff_id) is None:
            pulled = await self._ensuring.run(diff_id, lambda: self._ensure(origin))
        complete = self._store.complete(diff_id)
        if complete is None:
            raise DataLoss(f"layer {diff_id} was damaged on disk as soon as it was complete")
        return complete, pulled

    async def _ensure(self, origin: Origin) -> bool:
        diff_id = origin.layer.diff_id
        try:
            partial = self._partials.get(diff_id)
            if partial is None:
                partial = await self._describe(diff_id, await self._holders(diff_id))
            if partial is not None:
                missing = partial.missing()
                for start in range(0, len(missing), AT_ONCE):  # what a reader waits for gets in between
                    await partial.fill(missing[start : start + AT_ONCE], self._fetch)
                if self._store.complete(diff_id) is not None:  # no peer was left, so a fetch had it pulled
                    await self._drop(partial)
                    return True
                await self._promote(partial)
                return False
        except (LayerUnavailable, DataLoss) as error:
            log.warning("layer %s cannot be completed from peers: %s; pulling it", diff_id, error.line)
        await self._pull(origin)
        return True

    async def _promote(self, partial: PartialLayer) -> None:
        """A partial layer that has every chunk becomes the complete one."""
        await partial.idle()
        await asyncio.to_thread(partial.verify_and_sync)
        self._store.commit(partial.data_path, partial.diff_id)
        await self._drop(partial)
        self._announcer.hold(partial.diff_id, partial.layout.file_size, complete=True)
        await self._announcer.flush()

    async def _drop(self, partial: PartialLayer) -> None:
        """Forget a partial layer whose complete file is there; afs_fused keeps what it has open."""
        await partial.idle()
        self._partials.pop(partial.diff_id, None)
        partial.close()
        self._store.drop_partial(partial.diff_id)
