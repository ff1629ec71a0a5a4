"""Where a layer's bytes come from: the peers that hold them, the layer's owner, or its source.

State (one event loop): ``_providers``, ``_avoided`` and ``_origins`` are hints; any await may find them changed, and a wrong
one costs one failed call. They go with the layer when it is evicted.

``_origins`` has for each layer where it may be pulled from. An image can claim any diff_id, so a new one goes last, behind
what may be better; one that proved right goes first, and one that failed last.
"""

import asyncio
import contextlib
import functools
import logging
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path

from afs.core.errors import (
    AfsError,
    DataLoss,
    DeadlineExceeded,
    Internal,
    ResourceExhausted,
    Unavailable,
)
from afs.core.images import ImageRef, Platform
from afs.discovery.client import Announcer, Peer
from afs.layerstore.errors import LayerUnavailable
from afs.layerstore.manifests import Layer
from afs.layerstore.partial import PartialLayer
from afs.layerstore.peers import Peers
from afs.layerstore.placement import ranked
from afs.layerstore.pull import OriginKey, Puller, origin_key
from afs.layerstore.repair import Copy, Repairs
from afs.layerstore.room import Room
from afs.layerstore.store import CompleteLayer, LayerStore

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a layer came from: enough to have it pulled again."""

    ref: ImageRef
    platform: Platform
    layer: Layer

    @property
    def key(self) -> OriginKey:
        """See :func:`afs.layerstore.pull.origin_key`."""
        return origin_key(self.ref, self.layer)


class Supply:
    """*read_deadline* in seconds bounds how long a chunk may take over all tries.

    *told* says whether another node just told this one to have a layer.
    """

    def __init__(
        self,
        store: LayerStore,
        room: Room,
        puller: Puller,
        peers: Peers,
        announcer: Announcer,
        read_deadline: float,
        told: Callable[[str], bool],
    ) -> None:
        self._store = store
        self._puller = puller
        self._peers = peers
        self._announcer = announcer
        self._read_deadline = read_deadline
        self._told = told
        self._providers: dict[str, list[Peer]] = {}
        self._origins: dict[str, dict[OriginKey, Origin]] = {}
        self._avoided: dict[str, set[str]] = {}  # ids of nodes that served a bad chunk of a layer, by diff_id
        self.repairs = Repairs(store, room, announcer, self._chunk_from_peers, self._copy_of)

    def know(self, origin: Origin) -> None:
        """Where a layer may be pulled from."""
        self._origins.setdefault(origin.layer.diff_id, {}).setdefault(origin.key, origin)

    def origin(self, diff_id: str) -> Origin | None:
        """Where the layer is best pulled from, if anybody told."""
        return next(iter(self._origins.get(diff_id, {}).values()), None)

    def _proved(self, origin: Origin) -> None:
        """The layer came from there."""
        known = self._origins.get(origin.layer.diff_id, {})
        self._origins[origin.layer.diff_id] = {origin.key: origin, **known}

    def _failed(self, origin: Origin) -> None:
        """The layer did not come from there."""
        known = self._origins.get(origin.layer.diff_id, {})
        if origin.key in known:
            known[origin.key] = known.pop(origin.key)

    def provide(self, diff_id: str, holders: list[Peer]) -> None:
        """Ask these for chunks of the layer, in this order."""
        self._providers[diff_id] = list(holders)

    def forget(self, diff_id: str) -> None:
        """The layer was evicted."""
        self.repairs.forget(diff_id)
        for hints in (self._providers, self._origins, self._avoided):
            hints.pop(diff_id, None)

    async def holders(self, diff_id: str) -> list[Peer]:
        """Who has the layer, complete ones first; nobody if not one of them has all of it.

        Partial holders alone are of no use: what they miss has to come from the source, and whoever pulls it has it all.
        """
        located, avoided = await self._announcer.locate([diff_id]), self._avoided.get(diff_id, set())
        if not located.complete.get(diff_id, frozenset()) - avoided:
            return []
        return [peer for peer in located.layers.get(diff_id, []) if peer.node_id not in avoided]

    async def place(self, origin: Origin, *, local: bool) -> CompleteLayer | Peer:
        """Have the layer pulled by its owner, or here if the owner cannot or served bad chunks; the holder."""
        me, diff_id = self._announcer.me, origin.layer.diff_id
        owner = me if local else ranked(diff_id, self._announcer.peers)[0]
        if owner.node_id in self._avoided.get(diff_id, ()):
            owner = me
        if owner.node_id != me.node_id:
            try:
                await self._peers.ensure_layer(owner, origin.ref, origin.platform, origin.layer)
            except (Unavailable, DeadlineExceeded, ResourceExhausted, Internal, DataLoss) as error:
                # Its trouble need not be ours: its disk may be what damages the layer.
                log.warning("owner %s of layer %s: %s; pulling it here", owner.node_id, diff_id, error.line)
            else:
                return owner
        return await self.pull(origin)

    async def pull(self, origin: Origin) -> CompleteLayer:
        """The layer from its source, and announced."""
        complete = self._store.complete(origin.layer.diff_id)
        if complete is None:
            try:
                complete = await self._puller.pull(origin.ref, origin.layer)
            except AfsError:
                self._failed(origin)
                raise
            self._proved(origin)
        if not self.repairs.is_damaged(complete.diff_id):
            self._announcer.hold(complete.diff_id, complete.layout.file_size, complete=True)
            await self._announcer.flush()
        return complete

    async def _chunk_from_peers(self, layer: CompleteLayer, index: int) -> bytes | None:
        """A verified chunk from any other node that has it, for a repair."""
        located = await self._announcer.locate([layer.diff_id])
        for peer in located.layers.get(layer.diff_id, []):
            try:
                data = await self._peers.read_chunk(peer, layer.diff_id, index)
            except AfsError as error:
                log.info("chunk %d of layer %s: %s", index, layer.diff_id, error.line)
                continue
            if await asyncio.to_thread(layer.table.verify, index, data):
                return data
        return None

    def _copy_of(self, diff_id: str) -> Copy | None:
        return functools.partial(self._copy, diff_id) if diff_id in self._origins else None

    @contextlib.asynccontextmanager
    async def _copy(self, diff_id: str) -> AsyncIterator[Path]:
        """As :meth:`Puller.copy`, from the first origin that gives the layer."""
        async with contextlib.AsyncExitStack() as stack:
            yield await self._enter_copy(diff_id, stack)

    async def _enter_copy(self, diff_id: str, stack: contextlib.AsyncExitStack) -> Path:
        error: AfsError = LayerUnavailable(diff_id, "nobody said where it comes from")
        for origin in list(self._origins.get(diff_id, {}).values()):
            try:
                path = await stack.enter_async_context(self._puller.copy(origin.ref, origin.layer))
            except AfsError as failure:
                log.warning("layer %s cannot be pulled from %s: %s", diff_id, origin.ref, failure.line)
                self._failed(origin)
                error = failure
            else:
                self._proved(origin)
                return path
        raise error

    async def fetch(self, partial: PartialLayer, index: int) -> bytes:
        """A verified chunk, from whoever has it; LayerUnavailable after the deadline."""
        end, pause, cause = time.monotonic() + self._read_deadline, 0.05, "no node holds it"
        while True:
            if (complete := self._store.complete(partial.diff_id)) is not None:  # it was pulled meanwhile
                data = await asyncio.to_thread(complete.read_chunk, index)
                if data is not None and complete.table == partial.table:
                    return data
                if data is not None:
                    raise DataLoss(f"layer {partial.diff_id}: a peer described it with an index that is not its own")
                cause = f"chunk {index} is damaged on disk"
                self.repairs.suspect(complete)
                if await self.repairs.check(complete):
                    continue
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
            if await self._find_providers(partial.diff_id) and not self.repairs.is_damaged(partial.diff_id):
                continue
            if time.monotonic() + pause > end:
                raise LayerUnavailable(partial.diff_id, cause)
            await asyncio.sleep(pause)
            pause = min(pause * 2, 1.0)

    async def _find_providers(self, diff_id: str) -> bool:
        """Refresh the providers; if nobody is left, have the layer pulled again. True if that was here."""
        holders = await self.holders(diff_id)
        origin = self.origin(diff_id)
        if not holders and origin is not None:
            try:
                # A node that was itself told to have the layer does not pass that on: two nodes that see different
                # peers for a moment would wait for each other.
                placed = await self.place(origin, local=origin.ref.is_local or self._told(diff_id))
            except AfsError as error:
                log.warning("layer %s cannot be pulled again: %s", diff_id, error.line)
                self._failed(origin)
                return False
            if isinstance(placed, CompleteLayer):
                return True
            holders = [placed]
        self._providers[diff_id] = holders
        return False
