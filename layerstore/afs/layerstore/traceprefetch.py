"""Fetching the chunks of a start trace, in its order, before readers ask for them.

Nobody waits for these chunks, so they come behind all that somebody waits for (:meth:`Layers.prefetch`), take only room
that is free, and stop when the image has no users any more.

State (one event loop): ``_queues`` has what is still to come, by layer, with the place of each chunk in the trace. Layers
become partial one by one while the image is being opened: the next batch is taken from that layer among those here whose
first chunk comes first in the trace. Between two awaits a layer may go or become complete, so it is looked up each time.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Callable

from afs.core.units import format_size
from afs.layerstore.afslyr.layout import CHUNK_SIZE
from afs.layerstore.layers import Layers
from afs.layerstore.partial import PartialLayer
from afs.layerstore.room import Room
from afs.layerstore.scheduling import LIMITS, Priority
from afs.layerstore.traces import Trace, TraceCounts

log = logging.getLogger(__name__)
_BATCHES = 4  # under way at a time
_BATCH = 32  # chunks of one layer at most; so 32 MiB are promised at a time
_AHEAD = 32  # places in the trace that a batch may span: beyond that other layers come first


class Prefetch:
    """Of one *trace*. *needed* says whether the image still has users, *opening* whether layers may still come."""

    def __init__(
        self,
        trace: Trace,
        layers: Layers,
        room: Room,
        counts: TraceCounts,
        *,
        needed: Callable[[], bool],
        opening: Callable[[], bool],
    ) -> None:
        self._image = trace.image
        self._layers = layers
        self._room = room
        self._counts = counts
        self._needed = needed
        self._opening = opening
        self._changed = asyncio.Event()
        self._full = False
        self._queues: dict[str, deque[tuple[int, int]]] = {}
        for place, chunk in enumerate(trace.chunks):
            self._queues.setdefault(chunk.diff_id, deque()).append((place, chunk.number))

    def wake(self) -> None:
        """Look again: a layer was described, or *needed* or *opening* may have changed."""
        self._changed.set()

    async def run(self) -> None:
        """Until there is nothing left to fetch, no room for it, or no need."""
        async with asyncio.TaskGroup() as group:
            for _ in range(_BATCHES):
                group.create_task(self._work())

    async def _work(self) -> None:
        while not self._full and self._needed():
            layer, indices = self._take()
            if layer is not None:
                await self._fetch(layer, indices)
            elif self._opening():
                self._changed.clear()
                await self._changed.wait()
            else:
                return

    def _take(self) -> tuple[PartialLayer | None, list[int]]:
        """The next batch: a layer and chunks of it that are not here; no layer if none with chunks to come is here."""
        while (layer := self._first()) is not None:
            queue, indices = self._queues[layer.diff_id], list[int]()
            end = queue[0][0] + _AHEAD
            while queue and queue[0][0] < end and len(indices) < _BATCH:
                _, index = queue.popleft()
                if index < layer.table.count and not layer.has(index):
                    indices.append(index)
            if indices:
                return layer, indices
        return None, []

    def _first(self) -> PartialLayer | None:
        """The partial layer here whose next chunk comes first."""
        found: dict[int, PartialLayer] = {}
        for diff_id in [diff_id for diff_id, queue in self._queues.items() if not queue]:
            del self._queues[diff_id]
        for diff_id, queue in self._queues.items():
            layer = self._layers.find(diff_id)
            if isinstance(layer, PartialLayer):
                found[queue[0][0]] = layer
            elif layer is not None:
                queue.clear()  # it is complete
        return found[min(found)] if found else None

    async def _fetch(self, layer: PartialLayer, indices: list[int]) -> None:
        with self._room.spare(layer.diff_id, len(indices) * CHUNK_SIZE) as fits:
            if not fits:
                if not self._full:
                    left = len(indices) + sum(map(len, self._queues.values()))
                    size = format_size(left * CHUNK_SIZE)
                    log.info("image %s: no room to prefetch the other %s of its start trace", self._image, size)
                self._full = True
                return
            await self._layers.prefetch(layer.diff_id, indices, LIMITS[Priority.PREFETCH] // _BATCHES)
            if self._layers.find(layer.diff_id) is layer:
                self._counts.prefetched_chunks += sum(layer.has(index) for index in indices)
