"""One layer that ``afs_fused`` serves: its open files, what of them is here, and waiting for the rest.

A layer is a file and, while it is partial, a map of its chunks in shared memory with the layerstore (see
:mod:`afs.layerstore.partial`). A read whose chunks are here is one pread; otherwise the layerstore is asked to fill them.

State, on one event loop: files are open while somebody holds them (:meth:`ServedLayer.held`) or ``_index`` is set, which
reads the metadata through a mapping; ``_opening`` guards opening them. They may be replaced by others of the same layer
whenever this module awaits. ``_failures`` has the chunks that could not be filled lately, until when they are not asked for
again; it is written by reads that failed, and stale entries of it mean nothing. A disk that fails to read a mapped page ends the process (SIGBUS): what it served is lost then,
as with any other crash of a worker, while a failing pread is an error to one reader.
"""

import asyncio
import contextlib
import errno
import logging
import mmap
import os
import time
from collections.abc import Iterator

from afs.core.digests import hex_of
from afs.layerstore.afslyr.erofs import SUPERBLOCK_OFFSET
from afs.layerstore.afslyr.errors import CorruptLayer
from afs.layerstore.afslyr.index import SUPERBLOCK_SIZE, IndexReader
from afs.layerstore.afslyr.layout import HEADER_AREA, HEADER_SIZE
from afs.layerstore.afslyr.reader import layout_from_bytes, pread_exact
from afs.layerstore.fillwire import FillClient, FillError
from afs.snapshotter.fusedwire import ReadStats

log = logging.getLogger(__name__)
_REOPENS = 3
_REMEMBER_S = 2.0


class ServedLayer:
    """*slot* is the layer's number in this process; *faults* a directory that gets a byte per failed read.

    ``lookups`` is how often the kernel was told one of its inodes and has not forgotten it yet, over all of them.
    """

    def __init__(self, diff_id: str, slot: int, client: FillClient, faults: str) -> None:
        self.diff_id = diff_id
        self.slot = slot
        self.size = 0  # bytes of the layer file; known once it was open
        self.lookups = 0
        self.stats = ReadStats()
        self._client = client
        self._mark = os.path.join(faults, hex_of(diff_id))
        self._complaint = ""
        self._holders = 0
        self._opening = asyncio.Lock()
        self._data = -1  # -1: closed
        self._chunk_size = 1
        self._chunks: mmap.mmap | None = None  # None: complete when it was opened
        self._index: IndexReader | None = None
        self._metadata: mmap.mmap | None = None
        self._metadata_chunks = (0, 0)  # first and behind the last
        self._failures: dict[int, tuple[float, FillError]] = {}

    # Its files

    @property
    def is_open(self) -> bool:
        """Whether its files are."""
        return self._data >= 0

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Files that are open stay so within the block."""
        self.hold()
        try:
            yield
        finally:
            self.drop()

    def hold(self) -> None:
        """Files that are open stay so until :meth:`drop`."""
        self._holders += 1

    def drop(self) -> None:
        """The end of :meth:`hold`."""
        self._holders -= 1
        if not self._holders and self._index is None:
            self.close()

    def release(self) -> None:
        """Nobody has the tree mounted: close the files with their last holder, or an evicted layer keeps its space."""
        self._unmap()
        if not self._holders:
            self.close()

    def close(self) -> None:
        """Close the files; they are opened again when they are needed."""
        self._unmap()
        if self._data >= 0:
            os.close(self._data)
        if self._chunks is not None:
            self._chunks.close()
        self._data, self._chunks = -1, None

    def _unmap(self) -> None:
        self._index = None
        if self._metadata is not None:
            self._metadata.close()
            self._metadata = None

    async def open(self) -> None:
        """Have the files open; the caller holds them. Raises FillError, OSError, ValueError."""
        if self._data < 0:
            async with self._opening:
                if self._data < 0:
                    await self._reopen()

    async def _reopen(self) -> None:
        """Read from the files that the layer has now; FillError if they cannot be the same layer's."""
        try:
            await self._open_files()
        except FileNotFoundError:  # it became complete since the answer, or was made anew
            await self._open_files()

    async def _open_files(self) -> None:
        answer = await self._client.ask(op="open", diff_id=self.diff_id)
        size, chunk_size = int(answer["size"]), int(answer["chunk_size"])
        if self.size not in (0, size):
            raise FillError(f"layer {self.diff_id} has another size than before", errno.EIO)
        data, chunks = _opened(answer["data"], answer["chunks"])
        self.close()
        self.size, self._chunk_size, self._data, self._chunks = size, chunk_size, data, chunks

    # Contents

    def _missing(self, start: int, end: int) -> tuple[int, int] | None:
        """(first, count) of a run of chunks that covers what is missing of [start, end), or None."""
        if self._chunks is None or start >= end:
            return None
        first, stop = start // self._chunk_size, min((end - 1) // self._chunk_size + 1, len(self._chunks))
        absent = self._chunks.find(b"\0", first, stop)
        return None if absent < 0 else (absent, self._chunks.rfind(b"\0", first, stop) + 1 - absent)

    async def read(self, offset: int, count: int) -> bytes:
        """Exactly *count* bytes at *offset* of the file, which is held and was opened. Raises FillError, OSError."""
        end = offset + count
        if self._chunks is not None and self._missing(offset, end) is not None:
            await self._fill_or_fail(offset, end)
        data = os.pread(self._data, count, offset)
        if len(data) != count:  # the kernel would take it for the end of the file and show zeros
            raise CorruptLayer(f"{len(data)} bytes at {offset}, {count} wanted", layer=self.diff_id)
        self.stats.reads += 1
        self.stats.bytes += count
        return data

    async def _fill_or_fail(self, start: int, end: int) -> None:
        """As :meth:`_fill`, but what failed just now fails at once.

        One read(2) of a program is up to four reads here: EROFS reads ahead, and when that fails tries the page alone, and
        FUSE below it does the same. Each would wait for the whole deadline. A failure is remembered for as long as it
        took, and not for long: the kernel asks again at once, and who comes later may find that all is well.
        """
        began = time.monotonic()
        for chunk in self._missing_chunks(start, end):
            until, error = self._failures.get(chunk, (0.0, None))
            if error is not None and began < until:
                raise FillError(str(error), error.errno)
        try:
            await self._fill(start, end)
        except FillError as error:
            now = time.monotonic()
            self._failures = {chunk: failure for chunk, failure in self._failures.items() if now < failure[0]}
            until = now + min(now - began, _REMEMBER_S)
            self._failures.update(dict.fromkeys(self._missing_chunks(start, end), (until, error)))
            raise

    def _missing_chunks(self, start: int, end: int) -> list[int]:
        if self._chunks is None or (missing := self._missing(start, end)) is None:
            return []
        return [chunk for chunk in range(missing[0], sum(missing)) if not self._chunks[chunk]]

    async def _fill(self, start: int, end: int) -> None:
        """Have the chunks of [start, end) in the open file; what is not there must never be read.

        The layerstore may say that it filled them and mean another file: one that it made anew, or the complete layer,
        while we still have an older one open. Then that one is opened; the bytes of a layer are the same everywhere.
        """
        self.stats.waits += 1
        began = time.monotonic()
        try:
            for _ in range(_REOPENS):
                while (missing := self._missing(start, end)) is not None:
                    seen = self._data
                    await self._client.ask(op="fill", diff_id=self.diff_id, first=missing[0], count=missing[1])
                    if self._data == seen and self._missing(start, end) == missing:
                        break  # nothing came into the file that we have
                if missing is None:
                    return
                await self._reopen()
        finally:
            self.stats.wait_s += time.monotonic() - began
        raise FillError(f"layer {self.diff_id} was filled, but not where we can see it", errno.EIO)

    # The tree

    @property
    def index(self) -> IndexReader | None:
        """The reader of its metadata, if all of them are here."""
        if self._chunks is None or self._chunks.find(b"\0", *self._metadata_chunks) < 0:
            return self._index
        return None

    async def open_index(self) -> IndexReader:
        """The reader of its metadata, which are filled first. Raises FillError, OSError, ValueError, CorruptLayer."""
        while (index := self.index) is None:
            with self.held():
                await self.open()
                await self._read_index()
        return index

    async def _read_index(self) -> None:
        await self._fill_if_missing(0, HEADER_AREA)
        layout = layout_from_bytes(pread_exact(self._data, HEADER_SIZE, 0), self.size)
        if layout.diff_id != self.diff_id:
            raise CorruptLayer(f"the file is that of {layout.diff_id}", layer=self.diff_id)
        await self._fill_if_missing(layout.meta_offset, layout.erofs_end)
        superblock = pread_exact(self._data, SUPERBLOCK_SIZE, SUPERBLOCK_OFFSET)
        length = layout.erofs_end - layout.meta_offset
        metadata = mmap.mmap(self._data, length, prot=mmap.PROT_READ, offset=layout.meta_offset)
        try:
            index = IndexReader(layout, superblock, metadata)
        except BaseException:
            metadata.close()
            raise
        self._unmap()
        self._index, self._metadata = index, metadata
        first = layout.meta_offset // self._chunk_size
        self._metadata_chunks = first, -(-layout.erofs_end // self._chunk_size)

    async def _fill_if_missing(self, start: int, end: int) -> None:
        if self._missing(start, end) is not None:
            await self._fill(start, end)

    # What went wrong

    def complain(self, error: Exception) -> None:
        """Log *error*, once if it comes again and again, and leave a mark that outlives this process.

        Whoever ran on the layer has to know that it was not all there.
        """
        self.stats.failed += 1
        message = str(error)
        if message != self._complaint:
            self._complaint = message
            log.error("layer %s: %s", self.diff_id, message)
        try:
            with open(self._mark, "ab") as marks:
                marks.write(b".")
        except OSError as failure:  # the reader gets its error all the same
            log.error("cannot note that a read of layer %s failed: %s", self.diff_id, failure)


def _opened(data: str, chunks: str) -> tuple[int, mmap.mmap | None]:
    """The layer's file and, if it is partial, its map in the same directory.

    Both are opened from one open directory, which is one generation of a partial layer. By their paths the map could be
    that of a later one, and the zeros that the file has still would pass for bytes that are here.
    """
    directory = os.open(os.path.dirname(data), os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fd = _open_in(directory, data)
        try:
            return fd, _mapped(directory, chunks) if chunks else None
        except BaseException:
            os.close(fd)
            raise
    finally:
        os.close(directory)


def _open_in(directory: int, path: str) -> int:
    return os.open(os.path.basename(path), os.O_RDONLY | os.O_CLOEXEC, dir_fd=directory)


def _mapped(directory: int, path: str) -> mmap.mmap:
    fd = _open_in(directory, path)
    try:
        return mmap.mmap(fd, 0, prot=mmap.PROT_READ)
    finally:
        os.close(fd)
