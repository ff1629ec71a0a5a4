"""From an image's source to a complete layer: download, convert, commit. Each layer once, in processes of their own.

State: ``_pulls`` is single flight by layer and place, so a caller that goes away does not stop a pull that others, or the next
run, can use. A layer under way has a reservation in the cache and is pinned until it is committed.
"""

import asyncio
import contextlib
import dataclasses
import errno
import logging
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from afs.core.errors import DataLoss, Unavailable, error_for_grpc
from afs.core.images import ImageRef
from afs.core.singleflight import SingleFlight
from afs.core.units import format_size
from afs.layerstore.errors import DiskFull
from afs.layerstore.manifests import Layer
from afs.layerstore.pullworker import encode_options
from afs.layerstore.quota import Reservation
from afs.layerstore.registryoptions import RegistryOptions
from afs.layerstore.registrystop import Stop
from afs.layerstore.room import Room
from afs.layerstore.source import Source
from afs.layerstore.sources import Sources
from afs.layerstore.store import NO_SPACE, CompleteLayer, LayerStore
from afs.layerstore.workers import Workers

log = logging.getLogger(__name__)
_LOOK_S = 1.0  # a converter writes some 500 MiB in that time, less than the disk's headroom
_PATIENCE_S, _LEAST_RATE = 120.0, 64 << 10  # seconds, and bytes per second, that a source may take for a layer

OriginKey = tuple[str, str, str]


def origin_key(ref: ImageRef, layer: Layer) -> OriginKey:
    """(diff_id, digest of the blob, place): what one pull is for. Images with the same give the same layer."""
    return layer.diff_id, layer.blob_digest, ref.location


class Puller:
    """Pulls layers into *store*, as far as there is *room*, at most *parallel* at a time."""

    def __init__(self, store: LayerStore, room: Room, options: RegistryOptions, parallel: int) -> None:
        self._store = store
        self._room = room
        self._options = encode_options(options)
        self._sources = Sources(options)
        self._workers = Workers(parallel)
        self._pulls: SingleFlight[OriginKey, CompleteLayer] = SingleFlight()

    def source(self, ref: ImageRef, stop: Stop | None = None) -> Source:
        """Where *ref* comes from, for manifests and configs; *stop* ends requests for them."""
        return self._sources.source(ref, stop)

    async def start(self) -> None:
        """Have a process ready for the first pull."""
        await self._workers.start()

    async def pull(self, ref: ImageRef, layer: Layer) -> CompleteLayer:
        """The layer, complete; joins a running pull of it. Raises the source's and the converter's errors."""
        # No await between this and the single flight: a caller that found the layer absent and then asked others may
        # come here when a pull that ran meanwhile has just ended.
        if (complete := self._store.complete(layer.diff_id)) is not None:
            return complete
        # Not by diff_id alone: a config can claim any, and another image's bad blob must not be this one's error. Of two
        # pulls of one layer from two places the second finds the layer there, of equal bytes.
        return await self._pulls.run(origin_key(ref, layer), lambda: self._pull(ref, layer))

    async def _pull(self, ref: ImageRef, layer: Layer) -> CompleteLayer:
        started = time.monotonic()
        async with self._converted(ref, layer) as (temporary, reservation):
            complete = self._store.commit(temporary, layer.diff_id)
            self._room.settle(reservation)
        size, seconds = format_size(complete.layout.file_size), time.monotonic() - started
        log.info("pulled layer %s of %s: %s in %.2f s", layer.diff_id, ref, size, seconds)
        return complete

    @contextlib.asynccontextmanager
    async def copy(self, ref: ImageRef, layer: Layer) -> AsyncIterator[Path]:
        """Another file of a layer, verified, outside the cache; it is gone after the block."""
        async with self._converted(ref, layer) as (temporary, _):
            yield temporary

    @contextlib.asynccontextmanager
    async def _converted(self, ref: ImageRef, layer: Layer) -> AsyncIterator[tuple[Path, Reservation]]:
        """Download and convert into a temporary file, which is gone after the block unless it was renamed."""
        temporary = self._store.temporary()
        job = {
            "image": str(ref),
            "layer": dataclasses.asdict(layer),
            "out": str(temporary),
            "registry": self._options,
            "grants": self._sources.grants(ref),
        }
        compressed = not layer.media_type.endswith("tar")
        async with self._room.reserved(
            layer.diff_id, layer.blob_size, compressed=compressed, path=temporary
        ) as reservation:
            try:
                answer = await self._watched(job, reservation, ref, layer)
                if "error" in answer:
                    self._fail(ref, layer, answer)
                await self._room.correct(reservation, temporary.stat().st_blocks * 512)
                yield temporary, reservation
            except OSError as error:
                if error.errno in NO_SPACE:
                    raise DiskFull(f"{layer.diff_id} of {ref}", self._store.root) from error
                raise
            finally:  # the worker removes it when it fails, unless it was killed
                temporary.unlink(missing_ok=True)

    async def _watched(
        self, job: dict[str, Any], reservation: Reservation, ref: ImageRef, layer: Layer
    ) -> dict[str, Any]:
        """The answer to *job*, cancelled when what it writes has no room: a blob may become a thousand times its size.

        Unavailable if the source is so slow that it only takes up a worker that others wait for.
        """
        limit = _PATIENCE_S + layer.blob_size / _LEAST_RATE
        task = asyncio.create_task(self._workers.run(job, limit))
        try:
            while not (await asyncio.wait([task], timeout=_LOOK_S))[0]:
                await self._room.grow(reservation)
            return task.result()
        except TimeoutError:
            raise Unavailable(f"image {ref}: layer {layer.blob_digest} did not come within {limit:.0f} s") from None
        finally:
            task.cancel()
            await asyncio.wait([task])

    async def check(self, path: Path, diff_id: str) -> None:
        """Check all of a layer's file, its index too, and put it on disk. Raises DataLoss.

        In one of the processes, for it takes as long as half a conversion, and its memory.
        """
        answer = await self._workers.run({"check": str(path)})
        if "error" in answer:
            if answer["errno"] in NO_SPACE:
                raise DiskFull(diff_id, self._store.root)
            if answer["errno"] == errno.EIO:  # a sector that cannot be read is damage like any other
                raise DataLoss(f"layer {diff_id}: {answer['error']}")
            raise error_for_grpc(answer["status"])(answer["error"])

    def _fail(self, ref: ImageRef, layer: Layer, answer: dict[str, Any]) -> None:
        if answer["errno"] in NO_SPACE:
            raise DiskFull(f"{layer.diff_id} of {ref}", self._store.root)
        message = str(answer["error"])
        if str(ref) not in message:
            message = f"image {ref}: {message}"
        raise error_for_grpc(answer["status"])(message)

    async def close(self) -> None:
        """Kill running pulls and remove their files."""
        await self._pulls.close(cancel=True)
        await self._workers.close()
        self._sources.close()
