"""The partial layers of a node.

State (one event loop): ``_partials`` holds every open one by its diff_id. An entry appears in :meth:`Partials.take_in` after
its files exist, and leaves in :meth:`Partials.drop` after the complete file was committed (in between a layer may be read
from either, the bytes are equal), when nobody uses it, or in :meth:`Partials.detach`, at once, when the layer is evicted.
That never happens while it is leased or a chunk of it is on its way, which pins it.
"""

import asyncio
import errno
import functools
import logging
import time
from collections.abc import Callable, Iterator

from afs.core.errors import AfsError
from afs.discovery.client import Announcer
from afs.layerstore.errors import DiskFull
from afs.layerstore.partial import PartialLayer
from afs.layerstore.room import Room
from afs.layerstore.scheduling import Slots
from afs.layerstore.store import LayerStore

log = logging.getLogger(__name__)


class Partials:
    """*read_deadline* in seconds bounds how long a chunk waits for room on a full disk."""

    def __init__(self, store: LayerStore, room: Room, announcer: Announcer, read_deadline: float) -> None:
        self._store = store
        self._room = room
        self._announcer = announcer
        self._read_deadline = read_deadline
        self._slots = Slots()
        self._partials: dict[str, PartialLayer] = {}
        self.on_dropped: Callable[[str], None] = lambda diff_id: None
        self.on_taken_in: Callable[[str], None] = lambda diff_id: None

    def get(self, diff_id: str) -> PartialLayer | None:
        """The layer if it is partial."""
        return self._partials.get(diff_id)

    def __iter__(self) -> Iterator[PartialLayer]:
        """All of them, as they are now."""
        return iter(list(self._partials.values()))

    def is_open(self, partial: PartialLayer) -> bool:
        """Whether the layer is still here, and partial."""
        return self._partials.get(partial.diff_id) is partial

    def take_in(self, partial: PartialLayer) -> None:
        """Open for everybody from now on."""
        partial.on_full = self._on_full
        partial.pin = functools.partial(self._room.leases.pinned, [partial.diff_id])
        partial.slots = self._slots
        self._partials[partial.diff_id] = partial
        self.on_taken_in(partial.diff_id)

    def restore(self, diff_id: str) -> None:
        """Open what an earlier process left. Blocks: after a crash of the machine it reads all of it."""
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
        self.take_in(partial)
        if not partial.is_forged:
            self._announcer.hold(diff_id, partial.layout.file_size, complete=False)

    async def drop(self, partial: PartialLayer) -> None:
        """Forget a partial layer whose complete file is there; afs_fused keeps what it has open."""
        await partial.idle()  # no await from here on
        if not self.is_open(partial):
            return  # somebody else has dropped it
        del self._partials[partial.diff_id]
        partial.close()
        self.on_dropped(partial.diff_id)
        self._store.drop_partial(partial.diff_id)
        self._room.note(partial.diff_id)

    def detach(self, diff_id: str) -> None:
        """The layer is evicted. Nothing of it is being filled or read: that would hold a pin."""
        partial = self._partials.pop(diff_id, None)
        if partial is not None:
            partial.close()

    async def close(self) -> None:
        """End what is being fetched and close the files."""
        for partial in self:
            await partial.stop()
            partial.close()

    async def _on_full(self, partial: PartialLayer, wanted: int, since: float) -> None:
        """Make room for a chunk on a full disk, or wait for somebody to let go of something; DiskFull at the deadline."""
        if await self._room.on_full_disk(wanted):
            return
        if time.monotonic() - since > self._read_deadline:
            raise DiskFull(partial.diff_id, self._store.root)
        await asyncio.sleep(min(1.0, self._read_deadline / 10))
