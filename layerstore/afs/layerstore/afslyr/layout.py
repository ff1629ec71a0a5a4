"""Where everything stands in an ``.afslyr`` file: header, footer and chunk table. docs/afslyr.md draws it.

All integers are little-endian. Nothing here reads files: bytes in, checked values out, CorruptLayer for bad ones.
"""

import hashlib
import struct
from dataclasses import dataclass

from afs.core.digests import hex_of
from afs.layerstore.afslyr.errors import CorruptLayer

MAGIC = b"AFSLYR\x00\x01"
FOOTER_MAGIC = b"AFSLYR\x00\xff"
VERSION = 2
HEADER_SIZE = 1024  # bytes that the AFSLYR header owns; EROFS leaves 0..1023 to boot loaders
HEADER_AREA = 4096  # header, superblock and padding; the tar starts here
TAR_OFFSET = HEADER_AREA
ALIGN = 4096
CHUNK_SIZE = 1 << 18
PIECE = 4 * CHUNK_SIZE  # bytes that a program reads and hashes at a time
DIGEST_SIZE = 32
FOOTER_SIZE = 64
BLOCK_BITS = 9
BLOCK_SIZE = 1 << BLOCK_BITS  # of EROFS; a tar aligns file data to the same
MAX_EROFS_END = ((1 << 32) - 1) // (ALIGN // BLOCK_SIZE) * ALIGN  # EROFS counts blocks in 32 bits: just under 2 TiB

_HEADER = struct.Struct("<8sII32s6Q")
_FOOTER = struct.Struct("<8sQQ32s8x")


def align_up(value: int, to: int = ALIGN) -> int:
    """The smallest multiple of *to* that is at least *value*."""
    return -(-value // to) * to


@dataclass(frozen=True, slots=True)
class Layout:
    """The regions of one file; offsets and lengths in bytes, ``diff_id`` with its ``sha256:`` prefix."""

    diff_id: str
    file_size: int
    chunk_size: int
    tar_offset: int
    tar_length: int
    extras_offset: int
    extras_length: int
    meta_offset: int
    erofs_end: int
    table_offset: int

    @property
    def chunk_count(self) -> int:
        """How many chunks cover [0, erofs_end)."""
        return -(-self.erofs_end // self.chunk_size)

    @property
    def table_length(self) -> int:
        """Bytes of the chunk table."""
        return self.chunk_count * DIGEST_SIZE


def file_size_of(erofs_end: int) -> int:
    """Bytes of the whole file whose EROFS part ends at *erofs_end*."""
    return erofs_end + -(-erofs_end // CHUNK_SIZE) * DIGEST_SIZE + FOOTER_SIZE


def make_layout(diff_id: str, tar_length: int, extras_length: int, meta_length: int) -> Layout:
    """The layout that a writer gives to a tar, extras and metadata of these lengths in bytes."""
    extras_offset = align_up(TAR_OFFSET + tar_length)
    meta_offset = align_up(extras_offset + extras_length)
    end = align_up(meta_offset + meta_length)
    return Layout(
        diff_id=diff_id,
        file_size=file_size_of(end),
        chunk_size=CHUNK_SIZE,
        tar_offset=TAR_OFFSET,
        tar_length=tar_length,
        extras_offset=extras_offset,
        extras_length=extras_length,
        meta_offset=meta_offset,
        erofs_end=end,
        table_offset=end,
    )


def pack_header(layout: Layout) -> bytes:
    """The first 1024 bytes of the file."""
    return _HEADER.pack(
        MAGIC,
        VERSION,
        layout.chunk_size,
        bytes.fromhex(hex_of(layout.diff_id)),
        layout.tar_offset,
        layout.tar_length,
        layout.extras_offset,
        layout.extras_length,
        layout.meta_offset,
        layout.erofs_end,
    ).ljust(HEADER_SIZE, b"\0")


def parse_header(header: bytes, file_size: int) -> Layout:
    """The layout that the first 1024 bytes of a file of *file_size* bytes describe.

    Raises CorruptLayer unless every field is one that version 1 allows, whatever it would lead to.
    """
    if len(header) < HEADER_SIZE:
        raise CorruptLayer(f"file has {len(header)} bytes of header, {HEADER_SIZE} needed")
    magic, version, chunk_size, digest, tar_offset, tar_length, extras_offset, extras_length, meta_offset, end = (
        _HEADER.unpack_from(header)
    )
    if magic != MAGIC:
        raise CorruptLayer("not an .afslyr file: bad magic")
    if version != VERSION:
        raise CorruptLayer(f"format version {version}, this program knows {VERSION}")
    if any(header[_HEADER.size : HEADER_SIZE]):
        raise CorruptLayer("reserved header bytes are not zero")
    if chunk_size != CHUNK_SIZE:
        raise CorruptLayer(f"chunk size {chunk_size}, version {VERSION} has {CHUNK_SIZE}")
    layout = Layout(
        diff_id="sha256:" + digest.hex(),
        file_size=file_size,
        chunk_size=chunk_size,
        tar_offset=tar_offset,
        tar_length=tar_length,
        extras_offset=extras_offset,
        extras_length=extras_length,
        meta_offset=meta_offset,
        erofs_end=end,
        table_offset=end,
    )
    _check_regions(layout)
    return layout


def _check_regions(layout: Layout) -> None:
    """Regions follow each other, aligned, and fill the file exactly."""
    if layout.tar_offset != TAR_OFFSET:
        raise CorruptLayer(f"tar offset {layout.tar_offset}, must be {TAR_OFFSET}")
    if layout.extras_offset != align_up(layout.tar_offset + layout.tar_length):
        raise CorruptLayer("extras do not follow the tar")
    if layout.meta_offset != align_up(layout.extras_offset + layout.extras_length):
        raise CorruptLayer("metadata do not follow the extras")
    if layout.erofs_end <= layout.meta_offset or layout.erofs_end % ALIGN:
        raise CorruptLayer(f"end of EROFS {layout.erofs_end} is not an aligned offset behind the metadata")
    if layout.erofs_end > MAX_EROFS_END:
        raise CorruptLayer(f"end of EROFS {layout.erofs_end} is beyond 32-bit block addresses")
    if layout.file_size != file_size_of(layout.erofs_end):
        raise CorruptLayer(f"file has {layout.file_size} bytes, the header says {file_size_of(layout.erofs_end)}")


def metadata_chunks(layout: Layout) -> list[int]:
    """The chunks that a mount reads at once: the superblock's, then those of the EROFS metadata."""
    first, last = layout.meta_offset // layout.chunk_size, (layout.erofs_end - 1) // layout.chunk_size
    return sorted({0, *range(first, last + 1)})


def pack_footer(layout: Layout, root: bytes) -> bytes:
    """The last 64 bytes of the file; *root* is the sha256 of the chunk table."""
    return _FOOTER.pack(FOOTER_MAGIC, layout.table_offset, layout.table_length, root)


def parse_footer(footer: bytes, layout: Layout) -> bytes:
    """The root digest (32 bytes) in the last 64 bytes of a file; CorruptLayer if they contradict *layout*."""
    if len(footer) != FOOTER_SIZE:
        raise CorruptLayer(f"footer has {len(footer)} bytes, {FOOTER_SIZE} needed")
    magic, table_offset, table_length, root = _FOOTER.unpack(footer)
    if magic != FOOTER_MAGIC or any(footer[-8:]):
        raise CorruptLayer("bad footer", layer=layout.diff_id)
    if (table_offset, table_length) != (layout.table_offset, layout.table_length):
        raise CorruptLayer("footer and header disagree about the chunk table", layer=layout.diff_id)
    return bytes(root)


@dataclass(frozen=True, slots=True)
class ChunkTable:
    """The sha256 digests of a file's chunks, 32 bytes each, concatenated in file order."""

    digests: bytes

    @property
    def count(self) -> int:
        """The number of chunks."""
        return len(self.digests) // DIGEST_SIZE

    @property
    def root_digest(self) -> str:
        """The layer's root digest, ``sha256:`` and the hash of the table."""
        return "sha256:" + hashlib.sha256(self.digests).hexdigest()

    def chunk_range(self, index: int, layout: Layout) -> tuple[int, int]:
        """Offset and length in bytes of chunk *index*; the last one may be short. IndexError outside the table."""
        if not 0 <= index < self.count:
            raise IndexError(f"chunk {index} of {self.count}")
        offset = index * layout.chunk_size
        return offset, min(layout.chunk_size, layout.erofs_end - offset)

    def verify(self, index: int, data: bytes | bytearray | memoryview) -> bool:
        """Whether *data* is chunk *index*. IndexError outside the table."""
        return hashlib.sha256(data).digest() == self.digest(index)

    def digest(self, index: int) -> bytes:
        """The sha256 of chunk *index*. IndexError outside the table."""
        if not 0 <= index < self.count:
            raise IndexError(f"chunk {index} of {self.count}")
        at = index * DIGEST_SIZE
        return self.digests[at : at + DIGEST_SIZE]
