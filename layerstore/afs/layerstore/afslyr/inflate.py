"""Blob bytes to tar bytes: gzip (RFC 1952), zstd (RFC 8878) or plain, told apart by content and in bounded memory.

Media types are not asked: registries and tools get them wrong, the first bytes do not.
"""

import gzip
import io
from collections.abc import Callable, Generator
from typing import IO, TYPE_CHECKING, cast

from isal import igzip, isal_zlib
from typing_extensions import override

from afs.layerstore.afslyr.errors import CorruptLayer
from afs.layerstore.afslyr.zstdframes import FrameWalker, is_zstd_magic

if TYPE_CHECKING:
    from typing_extensions import Buffer

READ_SIZE = 256 << 10  # bytes asked of the source at once
BLOCK_SIZE = 1 << 20  # bytes of a block handed on, at most
MAX_WINDOW = 128 << 20  # zstd's window, what the zstd command allows without --memory
_GZIP_MAGIC = b"\x1f\x8b"
_ISAL_ERROR = cast("type[Exception]", isal_zlib.error)  # isal's stubs take the class for an instance


def inflate(read: Callable[[int], bytes]) -> Generator[bytes]:
    """Blocks of at most BLOCK_SIZE bytes of the uncompressed stream behind *read*.

    *read(n)* returns at most *n* bytes, and none at the end. gzip may have several members and zeros behind them, zstd
    several frames and skippable ones. The source is read to its end. Raises CorruptLayer for truncated or damaged
    streams and for bytes behind their end.
    """
    source = _Peeked(read)
    head = source.peek(4)
    if head[:2] == _GZIP_MAGIC:
        return _gzip(source.read)
    if is_zstd_magic(head):
        return _zstd(source.read)
    return _plain(source.read)


class _Peeked:
    """A source whose first bytes can be looked at."""

    def __init__(self, read: Callable[[int], bytes]) -> None:
        self._read, self._head = read, b""

    def peek(self, count: int) -> bytes:
        while len(self._head) < count and (more := self._read(READ_SIZE)):
            self._head += more
        return self._head[:count]

    def read(self, count: int) -> bytes:
        if not self._head:
            return self._read(count)
        data, self._head = self._head[:count], self._head[count:]
        return data


def _plain(read: Callable[[int], bytes]) -> Generator[bytes]:
    while data := read(BLOCK_SIZE):
        yield data


def _gzip(read: Callable[[int], bytes]) -> Generator[bytes]:
    """By isal's file object, whose loop over members, and over the tiny ones of eStargz, is C."""
    opened = cast("Callable[[io.RawIOBase, str], IO[bytes]]", igzip.open)  # isal has no types for it
    with opened(_Readable(read), "rb") as file:
        while True:
            try:
                data = file.read(BLOCK_SIZE)
            except EOFError as error:
                raise CorruptLayer("gzip stream is truncated or followed by garbage") from error
            except gzip.BadGzipFile as error:
                reason = "garbage behind the gzip stream" if "Not a gzipped file" in str(error) else str(error)
                raise CorruptLayer(f"gzip stream is damaged: {reason}") from error
            except (_ISAL_ERROR, OverflowError) as error:  # OverflowError: a header of more than 512 KiB
                raise CorruptLayer(f"gzip stream is damaged: {error}") from error
            if not data:
                return
            yield data


class _Readable(io.RawIOBase):
    """A ``read(n)`` as the file object that isal wants; it does not look at a short read, only at an empty one."""

    def __init__(self, read: Callable[[int], bytes]) -> None:
        super().__init__()
        self._source = read

    @override
    def readable(self) -> bool:
        return True

    @override
    def readinto(self, buffer: "Buffer") -> int:
        view = memoryview(buffer)
        data = self._source(min(len(view), READ_SIZE))
        view[: len(data)] = data
        return len(data)


def _zstd(read: Callable[[int], bytes]) -> Generator[bytes]:
    import zstandard

    walker = FrameWalker(read)
    decompressor = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW)
    total = 0
    with decompressor.stream_reader(cast("IO[bytes]", walker), read_size=READ_SIZE, read_across_frames=True) as reader:
        while True:
            try:
                data = reader.read(BLOCK_SIZE)
            except zstandard.ZstdError as error:
                raise CorruptLayer(f"zstd stream is damaged: {error}") from error
            if not data:
                break
            total += len(data)
            yield data
    # At a premature end the reader stops as if all were well: the walker knows better. And whether it compares a frame's
    # size with what the frame says depends on how the bytes came.
    walker.finish()
    if walker.declared not in {None, total}:
        raise CorruptLayer(f"zstd stream is damaged: {total} bytes, {walker.declared} declared")
