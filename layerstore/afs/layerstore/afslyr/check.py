"""Checking a whole ``.afslyr`` file, its index too.

The diff_id vouches for the tar. For the index nobody vouches: a peer may serve one that shows other owners, modes or files,
with a chunk table to match. But the file is a function of the tar, so everything outside the tar is built again from the tar
inside, by the converter's parts, and compared byte for byte.

The file is read once; memory is what the converter takes: the tree, the metadata, and a few chunks.
"""

import contextlib
import os
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from typing_extensions import override

from afs.layerstore.afslyr.erofs import SUPERBLOCK_OFFSET, Index, pack_superblock
from afs.layerstore.afslyr.errors import CorruptLayer, LayerLimit, printable
from afs.layerstore.afslyr.index import SLOT, SUPERBLOCK_SIZE, IndexReader
from afs.layerstore.afslyr.layout import (
    BLOCK_BITS,
    HEADER_AREA,
    PIECE,
    TAR_OFFSET,
    ChunkTable,
    Layout,
    align_up,
    make_layout,
    pack_header,
)
from afs.layerstore.afslyr.limits import DEFAULT_LIMITS, Limits
from afs.layerstore.afslyr.reader import checked_chunks, pread_exact, read_layer
from afs.layerstore.afslyr.sparse import SparseMap
from afs.layerstore.afslyr.tarstream import ByteStream, entries
from afs.layerstore.afslyr.tree import TreeBuilder

# Called with the bytes that were read since the last call. It may raise, which ends the check.
Progress = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Difference:
    """The first byte of a region that is not what the tar gives; ``path`` is the file whose inode or data it is in."""

    region: str  # header, superblock, padding, extras or metadata
    offset: int  # in the file
    path: bytes | None = None

    @override
    def __str__(self) -> str:
        path = f' ("{printable(self.path) or "/"}")' if self.path is not None else ""
        return f"{self.region} at byte {self.offset}{path}"


class IndexMismatch(CorruptLayer):
    """The index is not the one that the tar inside gives; ``differences`` has the first one of each region."""

    def __init__(self, layer: str, differences: tuple[Difference, ...]) -> None:
        self.differences = differences
        found = ", ".join(str(difference) for difference in differences)
        super().__init__(f"the index does not belong to the tar: {found}", layer=layer)


def check_layer(
    fd: int, *, limits: Limits = DEFAULT_LIMITS, progress: Progress = lambda _: None
) -> tuple[Layout, ChunkTable]:
    """Check all of *fd*: chunks against the table, the tar against the diff_id, the index against the tar.

    Returns what read_layer does. Raises CorruptLayer (IndexMismatch among them), LayerLimit and OSError. A tar that the
    converter would refuse is corrupt too, for no honest file holds one.
    """
    layout, table = read_layer(fd)

    def chunks() -> Generator[bytes]:
        for chunk in checked_chunks(fd, layout, table):
            progress(len(chunk))
            yield chunk

    with contextlib.closing(chunks()) as found:
        try:
            _check(fd, layout, found, limits)
        except CorruptLayer:
            for _ in found:  # a wrong chunk or a wrong tar is the better thing to tell
                pass
            raise
    return layout, table


def check_and_sync(path: Path) -> None:
    """:func:`check_layer` for the file *path*, which is durable afterwards; its name is not."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        check_layer(fd)
        os.fsync(fd)
    finally:
        os.close(fd)


def check_index(
    fd: int, layout: Layout, *, limits: Limits = DEFAULT_LIMITS, progress: Progress = lambda _: None
) -> None:
    """Check the index of *fd* against the tar inside, for a file whose chunks and tar were checked already.

    Raises as :func:`check_layer`.
    """

    def chunks() -> Iterator[bytes]:
        for offset in range(0, layout.erofs_end, PIECE):
            data = pread_exact(fd, min(PIECE, layout.erofs_end - offset), offset)
            progress(len(data))
            yield data

    _check(fd, layout, chunks(), limits)


def _check(fd: int, layout: Layout, chunks: Iterator[bytes], limits: Limits) -> None:
    """Parse the tar in *chunks*, which cover the file up to the table, and compare the rest with what it gives."""
    if layout.tar_length > limits.max_tar_bytes:
        raise LayerLimit("uncompressed tar", limits.max_tar_bytes, "bytes")
    builder = TreeBuilder(limits)
    for entry in entries(ByteStream(_tar_blocks(layout, chunks)), limits=limits):
        builder.add(entry)
    for _ in chunks:  # what follows is read again, from the page cache: the tar has to be known first
        pass
    _Comparison(fd, layout, builder, limits).run()


def _tar_blocks(layout: Layout, chunks: Iterator[bytes]) -> Iterator[bytes]:
    """The tar's bytes among *chunks*."""
    at, end = 0, layout.tar_offset + layout.tar_length
    for chunk in chunks:
        if block := chunk[max(0, layout.tar_offset - at) : max(0, end - at)]:
            yield block
        at += len(chunk)
        if at >= end:
            return


class _Comparison:
    """What the tar gives, beside what the file has."""

    def __init__(self, fd: int, layout: Layout, builder: TreeBuilder, limits: Limits) -> None:
        self._fd, self._layout, self._limits = fd, layout, limits
        self._inodes = builder.finish()
        self._index = Index(self._inodes)
        self._sparse = [found for found in builder.sparse if self._index.is_reachable(found[0])]
        self._found: list[Difference] = []

    def run(self) -> None:
        """Raise IndexMismatch unless they are the same."""
        layout, index = self._layout, self._index
        extras_length = sum(align_up(self._inodes.size[node]) for node, _, _ in self._sparse)
        if extras_length > self._limits.max_extras_bytes:
            raise LayerLimit("expanded sparse files", self._limits.max_extras_bytes, "bytes")
        if index.length > self._limits.max_metadata_bytes:
            raise LayerLimit("metadata", self._limits.max_metadata_bytes, "bytes")
        expected = make_layout(layout.diff_id, layout.tar_length, extras_length, index.length)
        self._compare("header", 0, pack_header(expected))
        if expected != layout:  # nothing is where it should be
            raise IndexMismatch(layout.diff_id, tuple(self._found))
        superblock = pack_superblock(layout, index.count)
        self._compare("superblock", SUPERBLOCK_OFFSET, superblock)
        start = SUPERBLOCK_OFFSET + SUPERBLOCK_SIZE
        self._compare("padding", start, bytes(HEADER_AREA - start))
        tar_end = layout.tar_offset + layout.tar_length
        self._compare("padding", tar_end, bytes(layout.extras_offset - tar_end))
        self._compare_extras()
        metadata = index.pack(layout.meta_offset)
        metadata += bytes(layout.erofs_end - layout.meta_offset - len(metadata))
        self._compare("metadata", layout.meta_offset, metadata)
        if self._found:
            right = IndexReader(layout, superblock, metadata)
            named = (replace(found, path=_owner(right, found.offset)) for found in self._found)
            raise IndexMismatch(layout.diff_id, tuple(named))

    def _compare(self, region: str, start: int, expected: bytes | bytearray) -> bool:
        """Whether the file has *expected* from *start* on; notes the first byte that differs."""
        view = memoryview(expected)
        for at in range(0, len(view), PIECE):
            want = view[at : at + PIECE]
            have = pread_exact(self._fd, len(want), start + at)
            if have != want:
                self._found.append(Difference(region, start + at + _first_difference(have, bytes(want))))
                return False
        return True

    def _compare_extras(self) -> None:
        """Compare the expanded sparse files, and tell the index where they stand."""
        start, same = self._layout.extras_offset, True
        for node, pieces, source in self._sparse:
            self._inodes.addr[node] = start >> BLOCK_BITS
            at = start
            size = self._inodes.size[node]
            for block in self._expanded(size, pieces, TAR_OFFSET + source):
                same = same and self._compare("extras", at, block)
                if not same:
                    break
                at += len(block)
            start += align_up(size)

    def _expanded(self, size: int, pieces: SparseMap, source: int) -> Iterator[bytes]:
        """The bytes of a sparse file of *size* bytes and its padding, in blocks of 1 MiB at most."""
        end = 0
        for offset, length in pieces:
            yield from _zeros(offset - end)
            for done in range(0, length, PIECE):
                yield pread_exact(self._fd, min(PIECE, length - done), source + done)
            source += length
            end = offset + length
        yield from _zeros(align_up(size) - end)


def _zeros(count: int) -> Iterator[bytes]:
    for done in range(0, count, PIECE):
        yield bytes(min(PIECE, count - done))


def _first_difference(left: bytes, right: bytes) -> int:
    """The first index at which two different strings of one length differ, by halving."""
    low, high = 0, len(left)
    while high - low > 1:
        middle = (low + high) // 2
        if left[low:middle] == right[low:middle]:
            low = middle
        else:
            high = middle
    return low


def _owner(index: IndexReader, offset: int) -> bytes | None:
    """The path of the file or directory that byte *offset* of the file belongs to, if it is one's."""
    for found in index.walk():
        inode = found.inode
        start = index.layout.meta_offset + inode.nid * SLOT
        if start <= offset < start + inode.length or inode.offset <= offset < inode.offset + (
            inode.blocks or inode.size
        ):
            return found.place.path
    return None
