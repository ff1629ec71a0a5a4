"""What a run changed, as a compressed OCI layer (OCI image spec, layer.md).

Deleted: ``.wh.NAME``; replaced directory: ``.wh..wh..opq`` in it; everything else as it is, with xattrs and hard links.
The same changes give the same bytes.
"""

import errno
import functools
import os
from collections.abc import AsyncGenerator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from afs.afslet import difftar
from afs.afslet.diffwalk import Change, Kind, Walk
from afs.afslet.globs import Globs
from afs.core.errors import InvalidArgument
from afs.core.threads import ahead
from afs.proto.v1 import afslet_pb2 as pb

_READ = 1 << 20  # of a file at once
_CHUNK = 1 << 18  # of the compressed diff, at least: one message costs about as much as compressing so much
_BATCH = 1 << 16  # what small files are gathered to before they are compressed
_AHEAD = 4  # chunks that wait for a slow client
_LEVEL = 1  # of ISA-L: at 2 and 3 it is slower for a few per cent
_ZSTD_LEVEL = 1
_ZEROS = bytes(_READ)
_OPEN = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
_NAMES = {pb.DIFF_GZIP: "writable-upper.tar.gz", pb.DIFF_ZSTD: "writable-upper.tar.zst"}


@dataclass(frozen=True, slots=True)
class DiffOptions:
    """How a diff is to be. *max_bytes* of the tar before compression, 0: no limit."""

    format: pb.DiffFormat.ValueType = pb.DIFF_GZIP
    include: Globs = field(default_factory=lambda: Globs(()))
    exclude: Globs = field(default_factory=lambda: Globs(()))
    max_bytes: int = 0

    @classmethod
    def of(cls, start: pb.StartRequest, max_bytes: int = 0) -> "DiffOptions":
        """What *start* asks for; *max_bytes* is the node's own limit. InvalidArgument for a pattern that makes no sense."""
        limit = min(filter(None, (start.diff_max_bytes, max_bytes)), default=0)
        include, exclude = Globs(start.diff_include, "diff_include"), Globs(start.diff_exclude, "diff_exclude")
        return cls(start.diff_format, include, exclude, limit)

    @property
    def name(self) -> str | None:
        """The file name for the client; None if no diff is wanted."""
        return _NAMES.get(self.format)


class _Compressor(Protocol):
    def compress(self, data: bytes | memoryview, /) -> bytes: ...
    def flush(self) -> bytes: ...


class Diff:
    """One diff. While :meth:`chunks` or :meth:`stream` is taken, the counters grow; at its end they are final.

    *lower* are the directories below *upper*, topmost first: overlayfs marks every new directory opaque, and only where
    one of them has it too does the mark say something.
    """

    def __init__(self, upper: Path, lower: Sequence[Path], options: DiffOptions | None = None) -> None:
        self._options = options or DiffOptions()
        self._walk = Walk(upper, lower, self._options.include, self._options.exclude)
        self._links: dict[tuple[int, int], bytes] = {}
        self._tar_bytes = 0
        self._too_large = ""
        self.bytes = 0  # compressed
        self.entries = 0

    @property
    def error(self) -> str:
        """Why the diff is not whole, in one line; empty if it is."""
        return "; ".join(filter(None, (self._too_large, self._walk.omitted.line())))

    async def stream(self) -> AsyncGenerator[bytes, None]:
        """:meth:`chunks`, made in a thread that is some chunks ahead; no thread if nothing was changed."""
        if self._walk.is_empty():
            chunk = _nothing(self._options.format)
            self.bytes = len(chunk)
            yield chunk
            return
        async for chunk in ahead(self.chunks(), _AHEAD):
            yield chunk

    def chunks(self) -> Iterator[bytes]:
        """The diff as chunks of 256 KiB to somewhat over 1 MiB, the last one of any size. Blocking; memory bounded by some chunks."""
        compressor = _compressor(self._options.format)
        ready, size = list[bytes](), 0
        for piece in self._pieces():
            if data := compressor.compress(piece):
                ready.append(data)
                size += len(data)
                if size >= _CHUNK:
                    self.bytes += size
                    yield b"".join(ready)
                    ready, size = [], 0
        ready.append(compressor.flush())
        last = b"".join(ready)
        self.bytes += len(last)
        yield last

    def _pieces(self) -> Iterator[bytes | memoryview]:
        """The tar. A piece is valid until the next one is asked for."""
        gathered, size = list[bytes](), 0
        buffer = memoryview(bytearray(_READ))
        for change in self._walk.changes():
            head, length = self._head(change)
            if not self._fits(change, len(head) + length + -length % difftar.BLOCK):
                break
            gathered.append(head)
            size += len(head) + length
            if length > _BATCH:
                yield b"".join(gathered)
                gathered, size = [], _BATCH  # the rest of its last block is not to wait for long
                yield from _content(change.path, change.status, buffer)
            elif length:
                gathered.append(_small(change.path, length))
            gathered.append(_ZEROS[: -length % difftar.BLOCK])
            if size >= _BATCH:
                yield b"".join(gathered)
                gathered, size = [], 0
        gathered.append(difftar.END)
        yield b"".join(gathered)

    def _fits(self, change: Change, size: int) -> bool:
        """Count an entry, unless it is too much."""
        if self._options.max_bytes and self._tar_bytes + size + len(difftar.END) > self._options.max_bytes:
            shown = os.fsdecode(change.name)[:200].encode(errors="replace").decode()
            self._too_large = f"the diff is larger than {self._options.max_bytes} bytes: it ends before {shown!r}"
            return False
        self.entries += 1
        self._tar_bytes += size
        return True

    def _head(self, change: Change) -> tuple[bytes, int]:
        """The header of an entry, and how many bytes of content follow."""
        name, status = change.name or b".", change.status
        if change.kind is Kind.OPAQUE:
            return difftar.empty(name + b"/.wh..wh..opq", int(status.st_mtime)), 0
        if change.kind is Kind.WHITEOUT:
            directory, slash, base = name.rpartition(b"/")
            return difftar.empty(directory + slash + b".wh." + base, int(status.st_mtime)), 0
        kind = difftar.type_of(status.st_mode)
        if kind != difftar.DIRECTORY and status.st_nlink > 1:
            inode = (status.st_dev, status.st_ino)
            if (first := self._links.setdefault(inode, name)) is not name:
                return difftar.entry(name, difftar.LINK, status, first), 0
        target = os.readlink(change.path) if kind == difftar.SYMLINK else b""
        return difftar.entry(name, kind, status, target, change.xattrs), status.st_size if kind == difftar.FILE else 0


@functools.cache
def _nothing(kind: pb.DiffFormat.ValueType) -> bytes:
    """A diff without entries."""
    compressor = _compressor(kind)
    return compressor.compress(difftar.END) + compressor.flush()


def _compressor(kind: pb.DiffFormat.ValueType) -> _Compressor:
    if kind == pb.DIFF_ZSTD:
        import zstandard

        return zstandard.ZstdCompressor(level=_ZSTD_LEVEL, write_checksum=True).compressobj()
    if kind == pb.DIFF_GZIP:
        from isal import isal_zlib

        return isal_zlib.compressobj(_LEVEL, isal_zlib.DEFLATED, 31)
    raise InvalidArgument(f"a diff of format {kind} cannot be made")


def _small(path: bytes, size: int) -> bytes:
    """A file in one piece. One that has shrunk is filled up: its size is in the header already."""
    fd = os.open(path, _OPEN)
    try:
        data = os.read(fd, size)
    finally:
        os.close(fd)
    return data + bytes(size - len(data))


def _content(path: bytes, status: os.stat_result, buffer: memoryview) -> Iterator[memoryview]:
    """A file in pieces, which share *buffer*. What it does not have on disk is not read, only written as zeros."""
    fd = os.open(path, _OPEN)
    try:
        done, size = 0, status.st_size
        data_end = size if status.st_blocks * 512 >= size else 0
        while done < size:
            if done >= data_end:  # at the end of known data, or of none: how far does a hole reach?
                data = _seek(fd, done, os.SEEK_DATA, size)
                yield from _hole(done, data)
                done = data
                data_end = _seek(fd, done, os.SEEK_HOLE, size)
                continue
            count = os.preadv(fd, [buffer[: data_end - done]], done)
            if not count:  # it has shrunk
                yield from _hole(done, size)
                return
            yield buffer[:count]
            done += count
    finally:
        os.close(fd)


def _hole(start: int, end: int) -> Iterator[memoryview]:
    """Zeros from *start* to *end*."""
    while start < end:
        yield (piece := memoryview(_ZEROS)[: end - start])
        start += len(piece)


def _seek(fd: int, offset: int, how: int, size: int) -> int:
    """lseek(2) to data or a hole, at most to *size*."""
    try:
        return min(os.lseek(fd, offset, how), size)
    except OSError as error:
        if error.errno != errno.ENXIO:  # nothing but a hole up to the end
            raise
        return size
