"""A layer of which this node has some chunks: a sparse file and a map of what is in it.

State and locks. One :class:`PartialLayer` per diff_id, owned by the layerstore's event loop.

- ``chunks`` is a shared memory map, one byte per chunk. It is set after the chunk's bytes were verified and written:
  whoever sees 1 may read the file. ``afs_fused`` maps the same file read-only. It is cleared only when the bytes turned
  out to be damaged on disk, so that readers wait for good ones; the bytes that come then are those that were there.
- ``_filling`` maps a chunk to the task that fetches it. A second demand for the chunk awaits the same task, so a chunk
  is fetched once. A task removes itself when it ends; failures are not remembered.
- Writes of different chunks touch different ranges, so they need no lock.
- Nothing is synced to disk. After a crash a byte of the map may be there whose data is not, so the map is trusted only
  after every marked chunk was hashed again (once per boot: after a crash of the process alone the page cache is whole),
  and the table only if its digest is right (:meth:`PartialLayer.open`). What is lost is fetched again; waiting for the
  disk would cost every first run of an image more than that.
- ``on_full`` is called when the disk took no more of a chunk: it makes room and returns, or raises to give the chunk up.
  The map needs no room later: its blocks are allocated when it is made, all zeros.
- ``pin`` is held by every such task, for it goes on when those who waited for it are gone: the layer is not evicted, and
  its descriptor not closed below a write.
"""

import asyncio
import contextlib
import functools
import logging
import mmap
import os
import time
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from typing import Self

from afs.core.files import remove_tree
from afs.layerstore.afslyr.layout import HEADER_SIZE, ChunkTable, Layout
from afs.layerstore.afslyr.reader import layout_from_bytes, read_layer
from afs.layerstore.errors import DiskFull
from afs.layerstore.store import NO_SPACE, write_all

log = logging.getLogger(__name__)
AT_ONCE = 16  # chunks of one layer in memory, between the peer and the disk

# Fetches one verified chunk: (layer, index) -> bytes. The layerstore supplies it.
Fetch = Callable[["PartialLayer", int], Awaitable[bytes]]
# Called with the bytes wanted and the monotonic time since when: see the module.
OnFull = Callable[["PartialLayer", int, float], Awaitable[None]]


async def _give_up(layer: "PartialLayer", wanted: int, since: float) -> None:
    raise DiskFull(layer.diff_id, layer.directory)


def _boot_id() -> str:
    """Changes with every boot of the machine (proc_sys_kernel(5))."""
    return Path("/proc/sys/kernel/random/boot_id").read_text()


class PartialLayer:
    """Made by :meth:`create` or :meth:`open`; both block and run in a thread."""

    def __init__(self, diff_id: str, directory: Path, layout: Layout, table: ChunkTable) -> None:
        self.diff_id = diff_id
        self.directory = directory
        self.layout = layout
        self.table = table
        fd = os.open(self.map_path, os.O_RDWR | os.O_CLOEXEC)
        try:
            self._data = os.open(self.data_path, os.O_RDWR | os.O_CLOEXEC)
            try:
                self._chunks = mmap.mmap(fd, table.count)
            except BaseException:
                os.close(self._data)
                raise
        finally:
            os.close(fd)
        self._filling: dict[int, asyncio.Task[None]] = {}
        self._slots = asyncio.Semaphore(AT_ONCE)
        self.on_full: OnFull = _give_up
        self.pin: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext

    @property
    def data_path(self) -> Path:
        """The sparse file, as long as the whole layer file."""
        return self.directory / "data"

    @property
    def map_path(self) -> Path:
        """The chunk map."""
        return self.directory / "chunks"

    @classmethod
    def create(cls, diff_id: str, directory: Path, size: int, header: bytes, table: ChunkTable, footer: bytes) -> Self:
        """Start a partial layer from what a peer described; *size* is that of the whole file. Raises CorruptLayer."""
        layout = layout_from_bytes(header, size)
        if layout.diff_id != diff_id:
            from afs.core.errors import DataLoss

            raise DataLoss(f"a peer described layer {layout.diff_id} as {diff_id}")
        building = directory.with_name(f".{directory.name}.new")
        remove_tree(building)
        building.mkdir()
        try:
            _write_files(building, layout, header, table, footer)
            remove_tree(directory)
            building.rename(directory)
        except BaseException:
            remove_tree(building)
            raise
        return cls(diff_id, directory, layout, table)

    @classmethod
    def open(cls, diff_id: str, directory: Path) -> Self:
        """Reopen after a restart; chunks whose bytes are not what the table says count as missing."""
        fd = os.open(directory / "data", os.O_RDONLY | os.O_CLOEXEC)
        try:
            layout, table = read_layer(fd)
        finally:
            os.close(fd)
        layer = cls(diff_id, directory, layout, table)
        if (directory / "boot").read_text() == _boot_id():
            return layer  # only the process ended: the page cache has everything that was written
        for index in range(table.count):
            if layer.has(index) and layer._read_verified(layer._data, index) is None:
                log.warning("layer %s: chunk %d was not on disk after a crash", diff_id, index)
                layer.unmark(index)
        (directory / "boot").write_text(_boot_id())
        return layer

    def close(self) -> None:
        """Close the files; the layer stays on disk."""
        os.close(self._data)
        self._chunks.close()

    def has(self, index: int) -> bool:
        """Whether chunk *index* may be read."""
        return self._chunks[index] == 1

    def is_filling(self, index: int) -> bool:
        """Whether chunk *index* is on its way."""
        return index in self._filling

    def unmark(self, index: int) -> None:
        """Chunk *index* is damaged on disk: whoever reads it from now on waits until it is filled again."""
        self._chunks[index] = 0

    def missing(self) -> list[int]:
        """The chunks that are not here yet."""
        return [index for index in range(self.table.count) if not self.has(index)]

    def metadata_chunks(self) -> list[int]:
        """The chunks a mount reads at once: superblock first, then the EROFS metadata."""
        size = self.layout.chunk_size
        first, last = self.layout.meta_offset // size, (self.layout.erofs_end - 1) // size
        return sorted({0, *range(first, last + 1)})

    def is_mountable(self) -> bool:
        """Whether a mount finds at once what it reads at once."""
        return all(self.has(index) for index in self.metadata_chunks())

    def read(self, index: int) -> bytes:
        """The bytes of chunk *index*. Blocking; only meaningful if :meth:`has` it."""
        offset, length = self.table.chunk_range(index, self.layout)
        return os.pread(self._data, length, offset)

    async def read_async(self, index: int) -> bytes | None:
        """Chunk *index* in a thread, verified; None if it is damaged. On a descriptor of its own: the layer may be closed."""
        fd = os.dup(self._data)
        reading = asyncio.ensure_future(asyncio.to_thread(self._read_verified, fd, index))
        reading.add_done_callback(lambda _: os.close(fd))
        return await asyncio.shield(reading)

    def _read_verified(self, fd: int, index: int) -> bytes | None:
        offset, length = self.table.chunk_range(index, self.layout)
        try:
            data = os.pread(fd, length, offset)
        except OSError as error:
            log.error("cannot read chunk %d of %s: %s", index, self.data_path, error)
            return None
        return data if self.table.verify(index, data) else None

    async def fill(self, indices: Iterable[int], fetch: Fetch) -> None:
        """Have all of *indices* on return; raises what *fetch* raised for the first that failed."""
        wanted = [index for index in indices if not self.has(index)]
        for index in wanted:
            if index not in self._filling:
                task = asyncio.create_task(self._fill_one(index, fetch), name=f"fill {self.diff_id[:19]} {index}")
                self._filling[index] = task
                task.add_done_callback(functools.partial(self._filled, index))
        # Shielded: a reader that gives up must not take the chunk away from the others.
        tasks = [asyncio.shield(self._filling[index]) for index in wanted if index in self._filling]
        if tasks:
            await asyncio.gather(*tasks)

    def _filled(self, index: int, task: "asyncio.Task[None]") -> None:
        del self._filling[index]
        if not task.cancelled():
            task.exception()  # retrieved: its readers may all have gone

    async def _fill_one(self, index: int, fetch: Fetch) -> None:
        with self.pin():
            async with self._slots:
                await self._fetch_and_write(index, fetch)

    async def _fetch_and_write(self, index: int, fetch: Fetch) -> None:
        data, since = await fetch(self, index), time.monotonic()
        while not await self._written(index, data):
            await self.on_full(self, len(data), since)

    async def _written(self, index: int, data: bytes) -> bool:
        """Write a chunk; false if the disk is full."""
        writing = asyncio.ensure_future(asyncio.to_thread(self._write, index, data))
        try:
            await asyncio.shield(writing)
        except asyncio.CancelledError:
            await asyncio.wait(
                [writing]
            )  # a thread cannot be cancelled, and the descriptor must not be closed below it
            raise
        except OSError as error:
            if error.errno not in NO_SPACE:
                raise
            return False
        return True

    def _write(self, index: int, data: bytes) -> None:
        offset, _ = self.table.chunk_range(index, self.layout)
        write_all(self._data, data, offset)
        self._chunks[index] = 1

    async def stop(self) -> None:
        """End what is being fetched; before closing at shutdown."""
        for task in self._filling.values():
            task.cancel()
        await self.idle()

    async def idle(self) -> None:
        """Wait until nothing is being fetched; before closing."""
        while self._filling:
            await asyncio.gather(*self._filling.values(), return_exceptions=True)


def _write_files(directory: Path, layout: Layout, header: bytes, table: ChunkTable, footer: bytes) -> None:
    """The files of a new partial layer; CorruptLayer if they do not fit together."""
    with (directory / "data").open("wb") as data:
        data.truncate(layout.file_size)
    # Sizes come from a peer: reading back through the parser checks them against each other.
    fd = os.open(directory / "data", os.O_RDWR | os.O_CLOEXEC)
    try:
        # Table and footer are no chunk of their own: they describe the chunks.
        write_all(fd, table.digests + footer, layout.table_offset)
        write_all(fd, header[:HEADER_SIZE], 0)
        read_layer(fd)
    finally:
        os.close(fd)
    (directory / "chunks").write_bytes(bytes(table.count))
    (directory / "boot").write_text(_boot_id())
