"""Frame boundaries of a zstd stream (RFC 8878, section 3.1), to tell a whole stream from a truncated one."""

from collections.abc import Callable

from afs.layerstore.afslyr.errors import CorruptLayer

_FRAME = b"\x28\xb5\x2f\xfd"
_DICTIONARY_ID = (0, 1, 2, 4)  # bytes, by flag
_CONTENT_SIZE = (0, 2, 4, 8)
_RLE, _RESERVED = 1, 3


def is_zstd_magic(head: bytes) -> bool:
    """Whether a stream that starts with these 4 bytes is zstd: a frame or a skippable frame."""
    return head[:4] == _FRAME or _is_skippable(head[:4])


def _is_skippable(magic: bytes) -> bool:
    return len(magic) == 4 and magic[0] & 0xF0 == 0x50 and magic[1:] == b"\x2a\x4d\x18"


class FrameWalker:
    """A source that passes bytes on and follows frames and blocks by their headers.

    It looks at a few bytes per block of up to 128 KiB, so it costs nothing beside decompression.
    """

    def __init__(self, read: Callable[[int], bytes]) -> None:
        self._read = read
        self._field = b""  # the header being collected
        self._want = 4  # its length
        self._skip = 0  # bytes of content to pass over before it
        self._step: Callable[[bytes], None] = self._magic
        self._checksum = False
        self.declared: int | None = 0  # bytes that all frames say they hold; None if one does not say

    def read(self, size: int = -1) -> bytes:
        """Bytes of the underlying source, as they are. CorruptLayer where no frame can stand."""
        data = self._read(size)
        at = 0
        while at < len(data):
            if self._skip:
                passed = min(self._skip, len(data) - at)
                self._skip -= passed
                at += passed
                continue
            piece = data[at : at + self._want - len(self._field)]
            self._field += piece
            at += len(piece)
            if len(self._field) == self._want:
                field, self._field = self._field, b""
                self._step(field)
        return data

    def finish(self) -> None:
        """Raise CorruptLayer unless the bytes passed so far end with a frame."""
        if self._skip or self._field or self._step != self._magic:
            raise CorruptLayer("zstd stream is truncated")

    def _expect(self, want: int, step: Callable[[bytes], None], skip: int = 0) -> None:
        self._want, self._step, self._skip = want, step, skip

    def _magic(self, field: bytes) -> None:
        if field == _FRAME:
            self._expect(1, self._descriptor)
        elif _is_skippable(field):
            self._expect(4, self._skippable_size)
        else:
            raise CorruptLayer("garbage behind the zstd stream")

    def _skippable_size(self, field: bytes) -> None:
        self._expect(4, self._magic, skip=int.from_bytes(field, "little"))

    def _descriptor(self, field: bytes) -> None:
        flags = field[0]
        single_segment = flags >> 5 & 1
        self._checksum = bool(flags >> 2 & 1)
        content_size = _CONTENT_SIZE[flags >> 6] or single_segment
        skip = 1 - single_segment + _DICTIONARY_ID[flags & 3]
        if content_size:
            self._expect(content_size, self._content_size, skip)
        else:
            self.declared = None
            self._expect(3, self._block, skip)

    def _content_size(self, field: bytes) -> None:
        if self.declared is not None:
            self.declared += int.from_bytes(field, "little") + (256 if len(field) == 2 else 0)
        self._expect(3, self._block)

    def _block(self, field: bytes) -> None:
        header = int.from_bytes(field, "little")
        kind, size = header >> 1 & 3, header >> 3
        if kind == _RESERVED:
            raise CorruptLayer("zstd stream is damaged: reserved block type")
        content = 1 if kind == _RLE else size
        if header & 1:
            self._expect(4, self._magic, skip=content + 4 * self._checksum)
        else:
            self._expect(3, self._block, skip=content)
