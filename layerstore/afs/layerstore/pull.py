"""From an image's source to a complete layer: download, convert, commit. Blocking work in threads, each layer once.

State: ``_pulls`` is single flight by diff_id, so a caller that goes away does not stop a pull that others, or the next
run, can use. ``_stop`` ends all at shutdown.
"""

import asyncio
import errno
import functools
import logging
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from afs.core.errors import AfsError, ResourceExhausted, error_for_grpc, status_of
from afs.core.files import unlinked_on_error
from afs.core.images import ImageRef
from afs.core.singleflight import SingleFlight
from afs.core.units import format_size
from afs.layerstore.afslyr.convert import Converted, convert
from afs.layerstore.manifests import Layer
from afs.layerstore.registry import RegistryOptions, RegistrySource, make_pool
from afs.layerstore.source import Source, local_source
from afs.layerstore.store import CompleteLayer, LayerStore

if TYPE_CHECKING:
    import urllib3

log = logging.getLogger(__name__)


class Puller:
    """Pulls layers into *store*, at most *parallel* at a time."""

    def __init__(self, store: LayerStore, options: RegistryOptions, parallel: int) -> None:
        self._store = store
        self._options = options
        self._pool: urllib3.PoolManager = make_pool(options)
        self._threads = ThreadPoolExecutor(parallel, thread_name_prefix="pull")
        self._pulls: SingleFlight[str, CompleteLayer] = SingleFlight()
        self._stop = threading.Event()

    def source(self, ref: ImageRef) -> Source:
        """Where *ref* comes from."""
        return local_source(ref) if ref.is_local else RegistrySource(ref, self._pool, self._options)

    async def pull(self, ref: ImageRef, layer: Layer) -> CompleteLayer:
        """The layer, complete; joins a running pull of it. Raises the source's and the converter's errors."""
        return await self._pulls.run(layer.diff_id, lambda: self._pull(ref, layer))

    async def _pull(self, ref: ImageRef, layer: Layer) -> CompleteLayer:
        loop, started = asyncio.get_running_loop(), time.monotonic()
        temporary = self._store.temporary()
        with unlinked_on_error(temporary):
            try:
                done = await loop.run_in_executor(
                    self._threads, functools.partial(self._convert, ref, layer, temporary)
                )
                complete = self._store.commit(temporary, layer.diff_id)
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                raise ResourceExhausted(
                    f"layer {layer.diff_id} of {ref}: no space left in {self._store.root}"
                ) from error
        seconds = time.monotonic() - started
        log.info("pulled layer %s of %s: %s in %.2f s", layer.diff_id, ref, format_size(done.file_size), seconds)
        return complete

    def _convert(self, ref: ImageRef, layer: Layer, out: Path) -> Converted:
        try:
            with self.source(ref).open_layer(layer) as read:
                return convert(
                    read, out, diff_id=layer.diff_id, blob_digest=layer.blob_digest, cancelled=self._stop.is_set
                )
        except AfsError as error:
            if str(ref) in str(error):
                raise
            raise error_for_grpc(status_of(error).grpc)(f"image {ref}: {error.line}") from error

    async def close(self) -> None:
        """Stop running pulls, which remove their files, and wait for them."""
        self._stop.set()
        await self._pulls.close(cancel=False)
        self._threads.shutdown()
        self._pool.clear()
