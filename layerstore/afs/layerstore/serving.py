"""Chunks for other nodes. Wrong bytes are never kept by who gets them, for it compares them with its table too.

So a chunk is compared here only once as long as this process lives, when it is read first: that takes about a third of the
time that a reader over there waits. What the disk damages after that is found by the receiver, which says so with its next
request; then the chunk is read from the disk and compared, and repaired if it is wrong. Scrubbing finds the rest.

State (one event loop): ``_verified`` has, for the complete layers that were read, the layer and a byte for each chunk that
was compared. Partial layers know it themselves. ``_open`` has the layers that peers read lately, as open files. It is
changed by the event loop alone; :meth:`Serving.find` looks into it from any thread. An entry is good for half the time that
the layer is leased for when it is made, and goes when the layer leaves this node; its descriptor is closed when no
thread sends from it any more. What such a thread sees of a layer is true for good, but for damage, which the receiver finds.
"""

import asyncio
import functools
import logging
import os
import time
from collections.abc import Awaitable, Callable

from afs.core.errors import InvalidArgument, NotFound
from afs.layerstore.chunkserver import Range
from afs.layerstore.chunkwire import Question
from afs.layerstore.errors import DamagedLayer
from afs.layerstore.leases import LEASE_S
from afs.layerstore.partial import PartialLayer
from afs.layerstore.repair import Repairs
from afs.layerstore.store import CompleteLayer

log = logging.getLogger(__name__)


class _OpenLayer:
    """A layer's file for any thread, until the monotonic time *until*; *verified* has a byte for each chunk."""

    def __init__(self, layer: CompleteLayer | PartialLayer, verified: bytearray, until: float) -> None:
        self._fd = layer.open_data()
        self._layer = layer
        self._verified = verified
        self._advised = bytearray((len(verified) + 1) >> 1)
        self.until = until

    def __del__(self) -> None:
        if hasattr(self, "_fd"):  # it was opened
            os.close(self._fd)

    def fileno(self) -> int:
        """See :class:`~afs.layerstore.chunkserver.File`."""
        return self._fd

    def find(self, index: int) -> Range | None:
        """A chunk that is here and right. Raises IndexError, ValueError (the layer was closed), OSError."""
        layer = self._layer
        offset, length = layer.table.chunk_range(index, layer.layout)
        if isinstance(layer, PartialLayer) and (layer.is_forged or not layer.has(index)):
            return None
        if not self._advised[index >> 1]:
            # Who reads the one half of 512 KiB will want the other (layers.py). Cold, on the disk of a VM, 256 KiB take
            # 0.56 ms; with the other half behind them 0.54 ms, and that then 0.05.
            self._advised[index >> 1] = 1
            pair = 2 * layer.layout.chunk_size
            os.posix_fadvise(self._fd, (index >> 1) * pair, pair, os.POSIX_FADV_WILLNEED)
        if not self._verified[index]:
            if not layer.table.verify(index, os.pread(self._fd, length, offset)):
                return None
            self._verified[index] = 1
        return Range(self, offset, length)


class Serving:
    """*refill* fetches a chunk of a partial layer again; *in_background* runs something that logs its own errors."""

    def __init__(
        self,
        repairs: Repairs,
        refill: Callable[[PartialLayer, int], Awaitable[None]],
        in_background: Callable[[Callable[[], Awaitable[object]]], None],
    ) -> None:
        self._repairs = repairs
        self._refill = refill
        self._in_background = in_background
        self._verified: dict[str, tuple[CompleteLayer, bytearray]] = {}
        self._open: dict[str, _OpenLayer] = {}

    def forget(self, diff_id: str) -> None:
        """The layer is gone."""
        self._verified.pop(diff_id, None)
        self._open.pop(diff_id, None)

    def find(self, question: Question) -> Range | None:
        """A chunk of a layer that is read just now, if there is nothing the matter with it; in any thread."""
        opened = self._open.get(question.diff_id)
        if opened is None or question.was_bad or time.monotonic() >= opened.until:
            return None
        try:
            return opened.find(question.index)
        except (IndexError, ValueError, OSError):
            return None  # the event loop looks once more, and says what is wrong

    def _keep_open(self, layer: CompleteLayer | PartialLayer, verified: bytearray) -> None:
        """Let :meth:`find` have the layer, which was leased just now."""
        now = time.monotonic()
        for diff_id in [diff_id for diff_id, opened in self._open.items() if now >= opened.until]:
            del self._open[diff_id]
        try:
            self._open[layer.diff_id] = _OpenLayer(layer, verified, now + LEASE_S / 2)
        except OSError as error:  # no descriptors just now: the event loop goes on answering
            log.warning("layer %s is not kept open: %s", layer.diff_id, error)

    async def read_chunk(self, layer: CompleteLayer | PartialLayer, index: int, *, was_bad: bool) -> bytes:
        """A chunk. NotFound if it is not here; DamagedLayer if it is damaged, and then it is being repaired.

        *was_bad*: what came for it before was wrong. The caller pins the layer.
        """
        if index >= layer.table.count:
            raise InvalidArgument(f"layer {layer.diff_id} has {layer.table.count} chunks, no chunk {index}")
        if isinstance(layer, CompleteLayer):
            data = await self._read(layer, index, was_bad=was_bad)
        else:
            data = await self._read_part(layer, index, was_bad=was_bad)
        if data is None:
            raise DamagedLayer(layer.diff_id, f"chunk {index}")
        return data

    async def _read(self, layer: CompleteLayer, index: int, *, was_bad: bool) -> bytes | None:
        known, verified = self._verified.get(layer.diff_id, (None, bytearray()))
        if known is not layer:
            verified = bytearray(layer.table.count)
            self._verified[layer.diff_id] = layer, verified
        verify = was_bad or not verified[index]
        try:
            data = await asyncio.to_thread(layer.read_chunk, index, from_disk=was_bad, verify=verify)
        except FileNotFoundError:  # it is pinned, so this was somebody's hand
            raise NotFound(f"{layer.path} is gone") from None
        verified[index] = data is not None
        if data is not None:
            self._keep_open(layer, verified)
        else:
            self._repairs.suspect(layer)
            self._in_background(functools.partial(self._repairs.check, layer))
        return data

    async def _read_part(self, layer: PartialLayer, index: int, *, was_bad: bool) -> bytes | None:
        if not layer.has(index):
            raise NotFound(f"chunk {index} of layer {layer.diff_id} is not on this node")
        with layer.using():
            data = await layer.read_async(index, from_disk=was_bad)
            if data is not None:
                self._keep_open(layer, layer.verified)
            else:
                log.error("layer %s: chunk %d is damaged on disk; fetching it again", layer.diff_id, index)
                layer.unmark(index)
                self._in_background(functools.partial(self._refill, layer, index))
        return data
