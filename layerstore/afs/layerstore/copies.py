"""Where a repair gets what a complete layer has lost: chunks from other nodes, or the whole layer from its source."""

import asyncio
import contextlib
import functools
import logging
from collections.abc import AsyncIterator
from pathlib import Path

from afs.core.errors import AfsError
from afs.discovery.client import Announcer
from afs.layerstore.errors import LayerUnavailable
from afs.layerstore.origins import Origins
from afs.layerstore.peers import Peers
from afs.layerstore.pull import Puller
from afs.layerstore.repair import Copy
from afs.layerstore.store import CompleteLayer

log = logging.getLogger(__name__)


class Copies:
    """See the module; *origins* are told which of them gave a layer."""

    def __init__(self, puller: Puller, peers: Peers, announcer: Announcer, origins: Origins) -> None:
        self._puller = puller
        self._peers = peers
        self._announcer = announcer
        self._origins = origins

    async def chunk(self, layer: CompleteLayer, index: int) -> bytes | None:
        """A verified chunk from any other node that has it."""
        located = await self._announcer.locate([layer.diff_id])
        for peer in located.layers.get(layer.diff_id, []):
            try:
                data = await self._peers.read_chunk(peer, layer.diff_id, index, lambda data, _: bytes(data))
            except AfsError as error:
                log.info("chunk %d of layer %s: %s", index, layer.diff_id, error.line)
                continue
            if await asyncio.to_thread(layer.table.verify, index, data):
                return data
        return None

    def of(self, diff_id: str) -> Copy | None:
        """What copies the layer from its source; None if nobody said where that is."""
        return functools.partial(self._copy, diff_id) if self._origins.of(diff_id) else None

    @contextlib.asynccontextmanager
    async def _copy(self, diff_id: str) -> AsyncIterator[Path]:
        """As :meth:`Puller.copy`, from the first origin that gives the layer."""
        async with contextlib.AsyncExitStack() as stack:
            yield await self._enter_copy(diff_id, stack)

    async def _enter_copy(self, diff_id: str, stack: contextlib.AsyncExitStack) -> Path:
        error: AfsError = LayerUnavailable(diff_id, "nobody said where it comes from")
        for origin in self._origins.of(diff_id):
            try:
                path = await stack.enter_async_context(self._puller.copy(origin.ref, origin.layer))
            except AfsError as failure:
                log.warning("layer %s cannot be pulled from %s: %s", diff_id, origin.ref, failure.line)
                self._origins.failed(origin)
                error = failure
            else:
                self._origins.proved(origin)
                return path
        raise error
