"""Blob bytes to tar bytes: gzip (RFC 1952), zstd (RFC 8878) or plain, told apart by content and in bounded memory.

Media types are not asked: registries and tools get them wrong, the first bytes do not.
"""

from collections.abc import Callable, Iterator
from typing import IO, cast

from isal import igzip_lib

from afs.layerstore.afslyr.errors import CorruptLayer
from afs.layerstore.afslyr.zstdframes import FrameWalker, is_zstd_magic

READ_SIZE = 256 << 10  # bytes asked of the source at once
BLOCK_SIZE = 1 << 20  # bytes of a block handed on: never more than twice this
MAX_WINDOW = 128 << 20  # zstd's window, what the zstd command allows without --memory
_GZIP_MAGIC = b"\x1f\x8b"
_FIRST_FEED = 4 << 10
_GZIP_ERROR = cast("type[Exception]", igzip_lib.error)  # isal's stubs take the class for an instance


def inflate(read: Callable[[int], bytes]) -> Iterator[bytes]:
    """Blocks of at most 2 MiB of the uncompressed stream behind *read*.

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


def _plain(read: Callable[[int], bytes]) -> Iterator[bytes]:
    while data := read(BLOCK_SIZE):
        yield data


def _gzip(read: Callable[[int], bytes]) -> Iterator[bytes]:
    """Whole blocks of :func:`_gzip_pieces`: eStargz has a member, and so a small piece, for each small file."""
    pieces: list[bytes] = []
    size = 0
    for piece in _gzip_pieces(read):
        pieces.append(piece)
        size += len(piece)
        if size >= BLOCK_SIZE:
            yield b"".join(pieces) if len(pieces) > 1 else piece
            pieces, size = [], 0
    if pieces:
        yield b"".join(pieces)


def _gzip_pieces(read: Callable[[int], bytes]) -> Iterator[bytes]:
    """What each step of the decompressor gives, at most BLOCK_SIZE bytes each."""
    decompressor: igzip_lib.IgzipDecompressor | None = None
    # What a decompressor does not use it hands back as a copy, so small feeds keep streams of tiny members linear.
    feed = _FIRST_FEED
    while data := read(READ_SIZE):
        view, at = memoryview(data), 0
        while at < len(view):
            if decompressor is None:
                if not view[at]:
                    _only_zeros(view[at:], read)
                    return
                if view[at] != _GZIP_MAGIC[0]:
                    raise CorruptLayer("garbage behind the gzip stream")
                decompressor = igzip_lib.IgzipDecompressor(flag=igzip_lib.DECOMP_GZIP)
                feed = _FIRST_FEED
            piece = view[at : at + feed]
            yield from _gzip_step(decompressor, piece)
            at += len(piece)
            feed = min(2 * feed, READ_SIZE)
            if decompressor.eof:
                at -= len(decompressor.unused_data)
                decompressor = None
    if decompressor is not None:
        raise CorruptLayer("gzip stream is truncated")


def _gzip_step(decompressor: igzip_lib.IgzipDecompressor, piece: memoryview) -> Iterator[bytes]:
    """All output of *piece*, in parts of at most BLOCK_SIZE bytes, so that a bomb cannot take the memory."""
    data: memoryview | bytes = piece
    while True:
        try:
            out = decompressor.decompress(data, BLOCK_SIZE)
        except _GZIP_ERROR as error:
            raise CorruptLayer(f"gzip stream is damaged: {error}") from error
        if out:
            yield out
        if decompressor.eof or decompressor.needs_input:
            return
        data = b""


def _only_zeros(rest: memoryview, read: Callable[[int], bytes]) -> None:
    """Zeros may follow the last member (tapes, and gzip(1) itself, pad with them); anything else may not."""
    data: memoryview | bytes = rest
    while data:
        if bytes(data).strip(b"\0"):
            raise CorruptLayer("garbage behind the gzip stream")
        data = read(READ_SIZE)


def _zstd(read: Callable[[int], bytes]) -> Iterator[bytes]:
    import zstandard

    walker = FrameWalker(read)
    decompressor = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW)
    with decompressor.stream_reader(cast("IO[bytes]", walker), read_size=READ_SIZE, read_across_frames=True) as reader:
        while True:
            try:
                data = reader.read(BLOCK_SIZE)
            except zstandard.ZstdError as error:
                raise CorruptLayer(f"zstd stream is damaged: {error}") from error
            if not data:
                break
            yield data
    # At a premature end the reader stops as if all were well: the walker knows better.
    walker.finish()
