"""Putting a complete layer right after the disk changed its bytes.

Chunks are written in place, for the file may be mounted; then its mounts are made to read them anew, and those that nobody
uses are unmounted. A sealed file cannot be written (:mod:`afs.layerstore.sealing`): a whole one takes its place by rename,
for mounts made from then on, and those over the old one go on failing where that is damaged.

Where a chunk comes from: peers that have it, each answer checked against the table; else the whole layer from its source
once more.

State and locks (one event loop): ``_damaged`` maps what is known to be damaged, and not yet repaired, to how often somebody
has found that. It is not announced and not opened. ``_checking`` is single flight by diff_id, so a layer is repaired by one
task at a time; it is pinned meanwhile. A check clears the mark only if nobody found damage while it ran, for that may lie
behind its position; else the layer is checked again. Sealing is a part of checking, so nobody writes to a file that is
being sealed. A layer that cannot be repaired goes, if nobody needs it, and is
pulled anew when it is wanted. Peers' timed leases do not keep it, for they get it elsewhere; those who join a check hold
no pin of it either, or nobody could drop the layer.
"""

import asyncio
import contextlib
import dataclasses
import logging
import os
from collections.abc import Awaitable, Callable
from pathlib import Path

from afs.core.errors import AfsError
from afs.core.files import unlinked_on_error
from afs.core.singleflight import SingleFlight
from afs.discovery.client import Announcer
from afs.layerstore.afslyr.errors import CorruptLayer
from afs.layerstore.afslyr.reader import pread_exact, read_layer
from afs.layerstore.errors import LayerUnavailable
from afs.layerstore.mountedpages import forget_pages
from afs.layerstore.room import RELEASE_S, Room
from afs.layerstore.sealing import Sealer, is_sealed
from afs.layerstore.store import CompleteLayer, LayerStore, write_all

log = logging.getLogger(__name__)

# A verified chunk from whoever has it: (layer, index) -> bytes, None if nobody does.
FromPeers = Callable[[CompleteLayer, int], Awaitable[bytes | None]]
# Pulls the layer once more, into a file that is gone after the block.
Copy = Callable[[], contextlib.AbstractAsyncContextManager[Path]]
Pause = Callable[[], float]  # seconds between two chunks, asked behind each


def at_once() -> float:
    """The :data:`Pause` of those who wait."""
    return 0.0


class Repairs:
    """*copy_of* gives a way to pull a layer again, None if nobody knows where it came from.

    With a ``sealer`` each layer is sealed before it is verified.
    """

    def __init__(
        self,
        store: LayerStore,
        room: Room,
        announcer: Announcer,
        from_peers: FromPeers,
        copy_of: Callable[[str], Copy | None],
    ) -> None:
        self.sealer: Sealer | None = None
        self._store = store
        self._room = room
        self._announcer = announcer
        self._from_peers = from_peers
        self._copy_of = copy_of
        self._damaged: dict[str, int] = {}
        self._checking: SingleFlight[str, bool] = SingleFlight()

    def is_damaged(self, diff_id: str) -> bool:
        """Whether a layer is known to be damaged."""
        return diff_id in self._damaged

    @property
    def count(self) -> int:
        """How many layers are known to be damaged."""
        return len(self._damaged)

    def forget(self, diff_id: str) -> None:
        """The layer is gone."""
        self._damaged.pop(diff_id, None)

    def suspect(self, layer: CompleteLayer) -> None:
        """A chunk of *layer* is damaged: others must not come for it until :meth:`check` has repaired it."""
        self._damaged[layer.diff_id] = self._damaged.get(layer.diff_id, 0) + 1
        self._announcer.drop(layer.diff_id)

    async def check(self, layer: CompleteLayer, pause: Pause = at_once) -> bool:
        """Verify *layer* and repair it if need be; whether it is whole now. If not, it is dropped, unless somebody needs it.

        There is a *pause* between two chunks, as long as no reader found damage: then somebody may wait.
        """
        while True:
            whole = await self._checking.run(layer.diff_id, lambda: self._check_or_drop(layer, pause))
            if not whole or not self.is_damaged(layer.diff_id):
                return whole

    async def _check_or_drop(self, layer: CompleteLayer, pause: Pause) -> bool:
        whole = await self._check(layer, pause)
        if not whole and self.is_damaged(layer.diff_id):
            self._room.leases.forget(layer.diff_id)
            await self._room.drop(layer.diff_id)
        return whole

    async def _check(self, layer: CompleteLayer, pause: Pause) -> bool:
        diff_id = layer.diff_id
        with self._room.leases.pinned([diff_id]):
            found = self._damaged.get(diff_id, 0)
            try:
                if self.sealer is not None and not self.is_damaged(diff_id) and await self.sealer.seal(layer):
                    self._room.note(diff_id)
                chunks = await damaged_chunks(layer, pause=lambda: 0.0 if self.is_damaged(diff_id) else pause())
                if chunks:
                    log.error("layer %s: chunks %s are damaged on disk", diff_id, chunks)
                    self._damaged.setdefault(diff_id, found)
                    self._announcer.drop(diff_id)
                    await self._announcer.flush()
                await self._repair(layer, chunks)
            except FileNotFoundError:  # evicted before we came to it
                self.forget(diff_id)
                return True
            except (AfsError, OSError) as error:
                log.error("layer %s cannot be repaired now: %s", diff_id, error)
                return False
            if self._damaged.get(diff_id) == found:
                log.info("layer %s is whole again", diff_id)
                del self._damaged[diff_id]
                self._announcer.hold(diff_id, layer.layout.file_size, complete=True)
            return True

    async def _repair(self, layer: CompleteLayer, chunks: list[int]) -> None:
        """:func:`repair` in place, or by a new file if the old one is sealed, and let mounts see it."""
        diff_id, copy = layer.diff_id, self._copy_of(layer.diff_id)
        sealed = await asyncio.to_thread(is_sealed, layer.path)
        if not sealed:
            await repair(layer, chunks, self._from_peers, copy)
        elif chunks or not await asyncio.to_thread(layer.has_tail):
            temporary = self._store.temporary()
            async with self._room.reserved(diff_id, layer.layout.file_size, path=temporary) as reservation:
                await replace(self._store, layer, temporary, self._from_peers, copy)
                self._room.settle(reservation)
        if chunks:
            await self._room.leases.release([diff_id], RELEASE_S)
            if not sealed:  # else what mounts have in memory was right when it was read, and cannot be read again
                mounts = await asyncio.to_thread(forget_pages, layer.path)
                log.info("layer %s: %d mounts read their pages anew", diff_id, mounts)

    async def close(self) -> None:
        """End what is under way."""
        await self._checking.close(cancel=True)


async def damaged_chunks(layer: CompleteLayer, *, pause: Pause = at_once) -> list[int]:
    """The chunks of *layer* that are not what its table says, read from the disk; *pause()* seconds between two."""
    found = []
    for index in range(layer.table.count):
        if await asyncio.to_thread(layer.read_chunk, index, from_disk=True) is None:
            found.append(index)
        if seconds := pause():
            await asyncio.sleep(seconds)
    return found


async def repair(layer: CompleteLayer, chunks: list[int], from_peers: FromPeers, copy: Copy | None) -> None:
    """Write *chunks* anew, and table and footer if they are damaged too.

    Raises LayerUnavailable if no peer has what is needed and there is no *copy*, and what *copy* raises; CorruptLayer if
    the layer was never right.
    """
    if not await asyncio.to_thread(layer.has_tail):
        log.error("layer %s: its chunk table is damaged on disk; writing it anew", layer.diff_id)
        await asyncio.to_thread(layer.write_tail)
    left = []
    for index in chunks:
        data = await from_peers(layer, index)
        if data is None:
            left.append(index)
        else:
            await asyncio.to_thread(layer.write_chunk, index, data)
    if not left:
        return
    if copy is None:
        raise LayerUnavailable(
            layer.diff_id, f"no peer has chunk {left[0]}, and nobody said where the layer comes from"
        )
    async with copy() as path:
        await asyncio.to_thread(_take_from, path, layer, left)


async def replace(
    store: LayerStore, layer: CompleteLayer, temporary: Path, from_peers: FromPeers, copy: Copy | None
) -> None:
    """Put a whole file, made at *temporary* of the good chunks and what :func:`repair` finds, in the place of *layer*'s.

    Raises what :func:`repair` does; the file is as it was then.
    """
    whole = dataclasses.replace(layer, path=temporary)
    with unlinked_on_error(temporary):
        chunks = await asyncio.to_thread(_copy_good_chunks, layer, whole)
        await repair(whole, chunks, from_peers, copy)
        store.commit(temporary, layer.diff_id, replace=True)


def _copy_good_chunks(layer: CompleteLayer, whole: CompleteLayer) -> list[int]:
    """Make the file of *whole* of the chunks that are right there; those that are not."""
    bad = []
    with whole.path.open("xb") as file:
        for index in range(layer.table.count):
            data = layer.read_chunk(index)
            if data is None:
                bad.append(index)
            else:
                write_all(file.fileno(), data, layer.table.chunk_range(index, layer.layout)[0])
        os.fsync(file.fileno())
    whole.write_tail()
    return bad


def _take_from(path: Path, layer: CompleteLayer, chunks: list[int]) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _, table = read_layer(fd)
        if table != layer.table:
            # The file is a function of the tar: a peer made this one's index up.
            raise CorruptLayer("its index is not the one that its tar gives", layer=layer.diff_id)
        for index in chunks:
            offset, length = table.chunk_range(index, layer.layout)
            layer.write_chunk(index, pread_exact(fd, length, offset))
    finally:
        os.close(fd)
