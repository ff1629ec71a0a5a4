"""A layer of which this node has some chunks: a sparse file and a map of what is in it.

State and locks. One :class:`PartialLayer` per diff_id, owned by the layerstore's event loop.

- ``chunks`` is a shared memory map, one byte per chunk. It is set after the chunk's bytes were verified and written:
  whoever sees 1 may read the file. ``afs_fused`` maps the same file read-only. It is cleared only when the bytes turned
  out to be damaged on disk, so that readers wait for good ones; the bytes that come then are those that were there.
- ``fillings`` are the fetches that are under way, a chunk once; ``arrivals`` tells who waits for them
  (:mod:`afs.layerstore.filling`).
- ``verified`` has a byte for every chunk whose bytes were compared with the table since this object was made: what was
  written, and what was read for a peer. It is not compared again for the next peer, which does so itself anyway.
- Writes of different chunks touch different ranges, so they need no lock.
- Nothing is synced to disk. After a crash a byte of the map may be there whose data is not, so the map is trusted only
  after every marked chunk was hashed again (once per boot: after a crash of the process alone the page cache is whole),
  and the table only if its digest is right (:meth:`PartialLayer.open`). What is lost is fetched again; waiting for the
  disk would cost every first run of an image more than that.
- ``on_full`` is called when the disk took no more of a chunk: it makes room and returns, or raises to give the chunk up.
  The map needs no room later: its blocks are allocated when it is made, all zeros.
- ``pin`` is held by every fetch.
- ``_users`` counts who else works on the files (:meth:`PartialLayer.using`). :meth:`PartialLayer.idle` waits for them and for
  the fetches, and whoever closes the layer does so on return, without an await in between: its descriptor may be another
  file's right after.
"""

import asyncio
import contextlib
import hashlib
import logging
import mmap
import os
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self, TypeVar

from afs.core.files import remove_tree
from afs.core.together import ended
from afs.layerstore.afslyr.layout import HEADER_SIZE, ChunkTable, Layout, metadata_chunks
from afs.layerstore.afslyr.reader import layout_from_bytes, read_layer
from afs.layerstore.errors import BadChunk, DiskFull
from afs.layerstore.filling import Arrivals, Fetch, Fillings, Start, StartRun
from afs.layerstore.readahead import ReadAhead
from afs.layerstore.scheduling import Priority, Slots
from afs.layerstore.store import NO_SPACE, write_all

log = logging.getLogger(__name__)
T = TypeVar("T")

# Called with the bytes wanted and the monotonic time since when: see the module.
OnFull = Callable[["PartialLayer", int, float], Awaitable[None]]


async def _give_up(layer: "PartialLayer", wanted: int, since: float) -> None:
    raise DiskFull(layer.diff_id, layer.directory)


def _boot_id() -> str:
    """Changes with every boot of the machine (proc_sys_kernel(5))."""
    return Path("/proc/sys/kernel/random/boot_id").read_text()


@dataclass(frozen=True, slots=True)
class Description:
    """What a peer says of a layer file: its *size* in bytes, and *header*, *table* and *footer* of it."""

    size: int
    header: bytes
    table: ChunkTable
    footer: bytes


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
        self.fillings = Fillings(self, self._store)
        self.arrivals = Arrivals(self.has)
        self.verified = bytearray(table.count)
        self._users = 0
        self._unused = asyncio.Event()
        self.slots = Slots()  # the layerstore puts those of the node in place
        self.read_ahead = ReadAhead(table.count)
        self.is_forged = self._forged_path.exists()  # it was whole, and not what its name says
        self.on_full: OnFull = _give_up
        self.pin: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext

    @property
    def data_path(self) -> Path:
        """The sparse file, as long as the whole layer file."""
        return self.directory / "data"

    @property
    def _forged_path(self) -> Path:
        return self.directory / "forged"

    def mark_forged(self) -> None:
        """A peer made the layer up. Known after a restart, too, unless the disk takes no more names."""
        self.is_forged = True
        try:
            self._forged_path.touch()
        except OSError as error:
            log.warning("cannot remember on disk that layer %s is forged: %s", self.diff_id, error)

    @property
    def map_path(self) -> Path:
        """The chunk map."""
        return self.directory / "chunks"

    @classmethod
    def create(cls, diff_id: str, directory: Path, said: Description) -> Self:
        """Start a partial layer from what a peer said of it. Raises CorruptLayer."""
        layout = layout_from_bytes(said.header, said.size)
        if layout.diff_id != diff_id:
            from afs.core.errors import DataLoss

            raise DataLoss(f"a peer described layer {layout.diff_id} as {diff_id}")
        building = directory.with_name(f".{directory.name}.new")
        remove_tree(building)
        building.mkdir()
        try:
            _write_files(building, layout, said)
            remove_tree(directory)
            building.rename(directory)
        except BaseException:
            remove_tree(building)
            raise
        return cls(diff_id, directory, layout, said.table)

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
            if layer._chunks[index] and not (layer.has(index) and layer._is_right(layer._data, index)):
                log.warning("layer %s: chunk %d was not on disk after a crash", diff_id, index)
                layer.unmark(index)
        (directory / "boot").write_text(_boot_id())
        return layer

    def open_data(self) -> int:
        """One more descriptor of the file, for who reads it in a thread; read-only, or the file could not be sealed later."""
        return os.open(f"/proc/self/fd/{self._data}", os.O_RDONLY | os.O_CLOEXEC)

    def close(self) -> None:
        """Close the files, once; the layer stays on disk."""
        fd, self._data = self._data, -1
        if fd >= 0:
            os.close(fd)
        self._chunks.close()

    def has(self, index: int) -> bool:
        """Whether chunk *index* may be read."""
        return self._chunks[index] == 1

    def is_news(self, index: int) -> bool:
        """Whether nobody read chunk *index* or waits to: it is not here, and not demanded."""
        return not self.has(index) and not self.fillings.is_demanded(index)

    def unmark(self, index: int) -> None:
        """Chunk *index* is damaged on disk: whoever reads it from now on waits until it is filled again."""
        self._chunks[index] = self.verified[index] = 0

    def missing(self) -> list[int]:
        """The chunks that are not here yet."""
        return [index for index in range(self.table.count) if not self.has(index)]

    @property
    def here(self) -> int:
        """How many chunks are here."""
        return self._chunks[:].count(1)

    def metadata_chunks(self) -> list[int]:
        """The chunks a mount reads at once: superblock first, then the EROFS metadata."""
        return metadata_chunks(self.layout)

    def is_mountable(self) -> bool:
        """Whether a mount finds at once what it reads at once."""
        return all(self.has(index) for index in self.metadata_chunks())

    def read(self, index: int) -> bytes:
        """The bytes of chunk *index*. Blocking; only meaningful if :meth:`has` it."""
        offset, length = self.table.chunk_range(index, self.layout)
        return os.pread(self._data, length, offset)

    async def read_async(self, index: int, *, from_disk: bool = False) -> bytes | None:
        """Chunk *index* in a thread; None if it is damaged. *from_disk*: compare it with the table again, as it is on disk."""
        # On a descriptor of its own: the layer may be closed.
        fd = self.open_data()
        reading = asyncio.ensure_future(asyncio.to_thread(self._read_checked, fd, index, from_disk=from_disk))
        reading.add_done_callback(lambda _: os.close(fd))
        return await asyncio.shield(reading)

    def _read_checked(self, fd: int, index: int, *, from_disk: bool) -> bytes | None:
        offset, length = self.table.chunk_range(index, self.layout)
        if from_disk:
            self.verified[index] = 0
            os.posix_fadvise(fd, offset, length, os.POSIX_FADV_DONTNEED)
        try:
            data = os.pread(fd, length, offset)
        except OSError as error:
            log.error("cannot read chunk %d of %s: %s", index, self.data_path, error)
            return None
        if not self.verified[index]:
            if not self.table.verify(index, data):
                return None
            self.verified[index] = 1
        return data

    def _is_right(self, fd: int, index: int) -> bool:
        return self._read_checked(fd, index, from_disk=False) is not None

    def damaged(self) -> list[int]:
        """The chunks that are here and not what the table says. Reads all of them; blocks."""
        self.verified = bytearray(self.table.count)
        return [index for index in range(self.table.count) if self.has(index) and not self._is_right(self._data, index)]

    async def fill(
        self, indices: Iterable[int], fetch: Fetch, priority: Priority = Priority.DEMAND, start: Start | None = None
    ) -> None:
        """Have all of *indices* on return; raises what *fetch* raised for the first that failed."""
        await self.fillings.fill([index for index in indices if not self.has(index)], fetch, priority, start)

    async def fill_run(self, indices: Sequence[int], fetch: Fetch, start: Start, start_run: StartRun) -> None:
        """:meth:`fill` with what nobody waits for, a few chunks together."""
        await self.fillings.fill_run([index for index in indices if not self.has(index)], fetch, start, start_run)

    async def _store(self, index: int, data: bytes | memoryview, since: float) -> None:
        while not await self._written(index, data):
            await self.on_full(self, len(data), since)

    @contextlib.contextmanager
    def using(self) -> Iterator[None]:
        """The layer is not closed while the block runs."""
        self._users += 1
        try:
            yield
        finally:
            self._users -= 1
            self._unused.set()

    def put(self, index: int, data: bytes | memoryview, digest: bytes | None = None) -> bool:
        """Verify and write a chunk; false if the disk is full. Raises BadChunk. Blocks; for who is :meth:`using` the layer.

        *digest*: its sha256, if that is known.
        """
        length = self.table.chunk_range(index, self.layout)[1]
        if len(data) != length or (digest or hashlib.sha256(data).digest()) != self.table.digest(index):
            raise BadChunk(self.diff_id, index)
        try:
            self._write(index, data)
        except OSError as error:
            if error.errno not in NO_SPACE:
                raise
            return False
        return True

    async def put_async(self, index: int, data: bytes | memoryview) -> bool:
        """:meth:`put` in a thread."""
        return await _unbroken(self.put, index, data)

    async def _written(self, index: int, data: bytes | memoryview) -> bool:
        """Write a chunk in a thread; false if the disk is full."""
        try:
            await _unbroken(self._write, index, data)
        except OSError as error:
            if error.errno not in NO_SPACE:
                raise
            return False
        return True

    def _write(self, index: int, data: bytes | memoryview) -> None:
        offset, _ = self.table.chunk_range(index, self.layout)
        write_all(self._data, data, offset)
        self.verified[index] = 1
        self._chunks[index] = 1
        self.arrivals.arrived(index)

    async def stop(self) -> None:
        """End what is being fetched; before closing at shutdown."""
        self.fillings.cancel()
        await self.idle()

    async def idle(self) -> None:
        """Wait until nothing is being fetched and nobody uses the layer; before closing."""
        while self.fillings or self._users:
            await self.fillings.ended()
            if self._users:
                self._unused.clear()
                await self._unused.wait()


async def _unbroken(work: Callable[[int, bytes | memoryview], T], index: int, data: bytes | memoryview) -> T:
    """*work* in a thread, to its end: a thread cannot be cancelled, and the descriptor must not be closed below it."""
    working = asyncio.ensure_future(asyncio.to_thread(work, index, data))
    try:
        return await asyncio.shield(working)
    except asyncio.CancelledError:
        await ended([working])
        raise


def _write_files(directory: Path, layout: Layout, said: Description) -> None:
    """The files of a new partial layer; CorruptLayer if they do not fit together."""
    with (directory / "data").open("wb") as data:
        data.truncate(layout.file_size)
    # Sizes come from a peer: reading back through the parser checks them against each other.
    fd = os.open(directory / "data", os.O_RDWR | os.O_CLOEXEC)
    try:
        # Table and footer are no chunk of their own: they describe the chunks.
        write_all(fd, said.table.digests + said.footer, layout.table_offset)
        write_all(fd, said.header[:HEADER_SIZE], 0)
        read_layer(fd)
    finally:
        os.close(fd)
    (directory / "chunks").write_bytes(bytes(said.table.count))
    (directory / "boot").write_text(_boot_id())
