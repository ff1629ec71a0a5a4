"""What is fuzzed: functions that take any bytes and raise nothing, unless something is wrong with the code under test.

Each target runs one part on hostile bytes, lets the errors pass that the part promises, and checks what it accepted.
Targets are pure: the same bytes, the same outcome. None starts threads, so that they run thousands of times per second.
"""

import hashlib
import io
import os
import struct
import zlib
from collections.abc import Callable
from contextlib import suppress

from afs.core.errors import DataLoss, InvalidArgument
from afs.layerstore import chunkwire, traces
from afs.layerstore.afslyr import layout as lay
from afs.layerstore.afslyr import pax, reader, sparse, tarheader, xattrs
from afs.layerstore.afslyr.check import check_layer
from afs.layerstore.afslyr.erofs import Index, pack_superblock
from afs.layerstore.afslyr.errors import CorruptLayer, LayerLimit
from afs.layerstore.afslyr.index import ROOT, IndexReader, read_index
from afs.layerstore.afslyr.inflate import inflate
from afs.layerstore.afslyr.inspection import contents
from afs.layerstore.afslyr.layout import Layout
from afs.layerstore.afslyr.limits import Limits
from afs.layerstore.afslyr.tarstream import ByteStream, entries
from afs.layerstore.afslyr.tree import TreeBuilder

LIMITS = Limits(
    max_tar_bytes=4 << 20,
    max_entries=2000,
    max_depth=40,
    max_extras_bytes=4 << 20,
    max_metadata_bytes=1 << 20,
    max_extents=500,
)
REFUSALS = (CorruptLayer, LayerLimit)
DIFF_ID = "sha256:" + "5a" * 32
TRACED_IMAGE = "sha256:" + "a5" * 32
TRACED_LAYERS = tuple(f"sha256:{number:064x}" for number in range(4))
_MAX_INFLATED = 8 << 20


def check_answers(index: IndexReader) -> None:
    """Walk *index*: what it accepts must lie within the file and must be a tree of proper names."""
    layout = index.layout
    room = len(range(layout.meta_offset, layout.erofs_end))
    for steps, found in enumerate(index.walk()):
        assert steps <= room, "the walk takes more steps than the metadata has bytes"
        inode, place = found.inode, found.place
        assert 0 <= inode.offset <= inode.offset + inode.size <= layout.erofs_end or not inode.offset
        assert inode.offset or not inode.size
        if place.parent is not None:
            assert place.name not in {b"", b".", b".."}
            assert not {b"/", b"\0"} & {place.name[at : at + 1] for at in range(len(place.name))}
            assert len(place.name) <= 255
    for directory in {ROOT, *(found.inode.nid for found in index.walk() if found.inode.is_directory)}:
        for entry in index.readdir(directory):
            assert index.lookup(directory, entry.name) == entry
    for found in index.walk():
        if found.inode.mode & 0o170000 == 0o120000:
            with suppress(CorruptLayer):
                assert len(index.readlink(found.inode.nid)) == found.inode.size


def tar(data: bytes) -> None:
    """The parser, the tree and the writer of the index: what they take, the reader of the index takes too."""
    _read_tar(data)
    _read_tar(repaired(data))


def repaired(data: bytes) -> bytes:
    """*data* with right checksums in its headers: chance does not hit them, and hostile tars have them."""
    fixed, at = bytearray(data), 0
    while at + 512 <= len(data):
        block = bytes(fixed[at : at + 512])
        size = 0
        if any(block):
            total = sum(block[:148]) + sum(block[156:]) + 8 * 32
            fixed[at + 148 : at + 156] = b"%06o\0 " % total
            with suppress(ValueError):
                size = tarheader.number(block[124:136]) if block[156:157] in b"0\x007SDVxXgLK" else 0
        at += 512 + max(0, size) + -size % 512
    return bytes(fixed)


def _read_tar(data: bytes) -> None:
    builder = TreeBuilder(LIMITS)
    try:
        for entry in entries(ByteStream(iter([data]))):
            builder.add(entry)
        inodes = builder.finish()
        index = Index(inodes)
    except REFUSALS:
        return
    assert builder.entries <= len(data) // 512
    extras = 0
    for node, pieces, offset in builder.sparse:
        assert offset + sum(length for _, length in pieces) <= len(data)
        if index.is_reachable(node):
            addr = (lay.align_up(lay.TAR_OFFSET + len(data)) + extras) >> lay.BLOCK_BITS
            if addr >= 1 << 32:  # the converter refuses it
                return
            inodes.addr[node] = addr
            extras += lay.align_up(inodes.size[node])
    layout = lay.make_layout(DIFF_ID, len(data), extras, index.length)
    if layout.erofs_end > lay.MAX_EROFS_END:  # the converter refuses it
        return
    metadata = bytes(index.pack(layout.meta_offset)).ljust(layout.erofs_end - layout.meta_offset, b"\0")
    check_answers(IndexReader(layout, pack_superblock(layout, index.count), metadata))


def inflated(data: bytes) -> None:
    """gzip, zstd and plain streams: blocks of bounded size or CorruptLayer."""
    total = 0
    with suppress(CorruptLayer):
        for block in inflate(io.BytesIO(data).read):
            assert 0 < len(block) <= 2 << 20
            total += len(block)
            if total > _MAX_INFLATED:
                return


def index(data: bytes) -> None:
    """The reader of the index on any metadata; the first 8 bytes say how many inodes there are."""
    inodes = int.from_bytes(data[:8], "little")
    metadata = data[8:].ljust(lay.align_up(max(1, len(data) - 8)), b"\0")
    layout = lay.make_layout(DIFF_ID, 1 << 20, 1 << 16, len(metadata))
    try:
        found = IndexReader(layout, pack_superblock(layout, inodes & (1 << 64) - 1), metadata)
        for nid in range(0, len(metadata) // 32, 7):
            with suppress(CorruptLayer):
                found.inode(nid)
        check_answers(found)
    except CorruptLayer:
        return


def header(data: bytes) -> None:
    """Header and footer: what is accepted has regions in order within the file, and packs to the same bytes."""
    head, footer = data[: lay.HEADER_SIZE], data[lay.HEADER_SIZE : lay.HEADER_SIZE + lay.FOOTER_SIZE]
    size = 0
    if len(head) >= 96:
        (end,) = struct.unpack_from("<Q", head, 88)
        size = lay.file_size_of(end)
    try:
        layout = lay.parse_header(head, size)
        assert lay.pack_header(layout) == head
        ordered = [layout.tar_offset, layout.extras_offset, layout.meta_offset, layout.erofs_end, layout.file_size]
        assert ordered == sorted(ordered)
        root = lay.parse_footer(footer, layout)
        assert lay.pack_footer(layout, root) == footer
    except CorruptLayer:
        return


def sealed(data: bytes) -> bytes:
    """*data* with a diff_id, a chunk table and a footer that are right, where its header makes sense at all."""
    if len(data) < lay.HEADER_SIZE:
        return data
    (end,) = struct.unpack_from("<Q", data, 88)
    if end > 1 << 24:
        return data
    try:
        layout = lay.parse_header(data[: lay.HEADER_SIZE], lay.file_size_of(end))
    except CorruptLayer:
        return data
    body = bytearray(data[:end].ljust(end, b"\0"))
    of_tar = hashlib.sha256(body[layout.tar_offset : layout.tar_offset + layout.tar_length]).digest()
    body[16:48] = of_tar
    body[1024 + 48 : 1024 + 64] = of_tar[:16]  # the superblock's uuid
    layout = lay.parse_header(bytes(body[: lay.HEADER_SIZE]), layout.file_size)
    table = b"".join(
        hashlib.sha256(body[at : at + lay.CHUNK_SIZE]).digest() for at in range(0, len(body), lay.CHUNK_SIZE)
    )
    return bytes(body) + table + lay.pack_footer(layout, hashlib.sha256(table).digest())


def file(data: bytes) -> None:
    """A whole layer file, as it is and with digests that fit: readers refuse it, or agree about it."""
    for content in (data, sealed(data)):
        fd = os.memfd_create("fuzz", os.MFD_CLOEXEC)
        try:
            os.write(fd, content)
            _read_file(fd, content)
        finally:
            os.close(fd)


def _read_file(fd: int, content: bytes) -> None:
    readable = False
    try:
        layout, _ = reader.read_layer(fd)
        found = read_index(fd, layout, LIMITS)
        contents(found)
        check_answers(found)
        readable = True
    except REFUSALS:
        pass
    try:
        layout, _ = check_layer(fd, limits=LIMITS)
    except REFUSALS:
        return
    assert readable, "verified, yet the index cannot be read"
    assert remade(layout, content) == content, "verified, yet its tar gives another file"


def remade(layout: Layout, content: bytes) -> bytes:
    """The file that the converter makes of the tar in *content*."""
    from pathlib import Path
    from tempfile import TemporaryDirectory

    from afs.layerstore.afslyr.convert import convert

    with TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as directory:
        of_tar = content[layout.tar_offset : layout.tar_offset + layout.tar_length]
        convert(io.BytesIO(of_tar).read, Path(directory, "out"), limits=LIMITS)
        return Path(directory, "out").read_bytes()


def records(data: bytes) -> None:
    """PAX records: ValueError or records that were there."""
    with suppress(ValueError):
        found = pax.parse_records(data)
        assert sum(len(key) + len(value) for key, value in found) <= len(data)
        for _, value in found:
            with suppress(ValueError):
                assert isinstance(pax.time_ns(value), int)
            with suppress(ValueError):
                assert 0 <= pax.integer(value) < 10**20
        attributes = pax.xattrs(dict(found))
        if attributes and (body := xattrs.body_of(attributes)):
            assert xattrs.decode(body).items() <= attributes.items()
            assert xattrs.count_field(body) < 1 << 16
    with suppress(ValueError):
        xattrs.decode(data[: len(data) & -4])


def maps(data: bytes) -> None:
    """Sparse maps in all formats: ValueError or ascending pieces within the file."""
    source = io.BytesIO(data)

    def read_block() -> bytes:
        block = source.read(512)
        if len(block) < 512:
            raise ValueError("end")
        return block

    if len(data) >= 512:
        with suppress(ValueError):
            pairs, size = sparse.old_gnu(data[:512], read_block)
            _check_map(pairs, size)
    source.seek(0)
    with suppress(ValueError):
        pairs, used = sparse.pax_1(read_block)
        assert used <= sparse.MAX_MAP
        _check_map(pairs, 1 << 40)
    with suppress(ValueError):
        _check_map(sparse.pax_0(pax.parse_records(data)), 1 << 40)


def _check_map(pairs: list[tuple[int, int]], size: int) -> None:
    end = 0
    for offset, length in sparse.checked(pairs, size, sum(length for _, length in pairs)):
        assert end <= offset < offset + length <= size
        end = offset + length


def trace(data: bytes) -> None:
    """Start traces, as they are and with a name and a checksum that fit: what is accepted has one encoding and keeps the limits."""
    for content in (data, _named(data)):
        try:
            found = traces.parse_trace(content, TRACED_IMAGE, TRACED_LAYERS)
        except traces.BadTrace:
            continue
        assert found.encode() == content
        assert len(set(found.chunks)) == len(found.chunks) <= traces.MAX_CHUNKS
        assert {chunk.diff_id for chunk in found.chunks} <= set(TRACED_LAYERS)
        assert all(0 <= chunk.number < 1 << 32 for chunk in found.chunks)
        assert found.merged(reversed(found.chunks)) == found


def _named(data: bytes) -> bytes:
    if len(data) < 48:
        return data
    body = traces.MAGIC + bytes.fromhex(TRACED_IMAGE.removeprefix("sha256:")) + data[40:-4]
    return body + zlib.crc32(body).to_bytes(4, "little")


def chunk(data: bytes) -> None:
    """Questions for chunks and answers to them, as they are and with a head that fits."""
    for content in (data, b"AFSK\1\0" + data[6:]):
        with suppress(InvalidArgument):
            question = chunkwire.parse_question(
                content[: chunkwire.QUESTION_SIZE].ljust(chunkwire.QUESTION_SIZE, b"\0")
            )
            assert chunkwire.parse_question(chunkwire.pack_question(question)) == question
    with suppress(DataLoss):
        length, is_error = chunkwire.parse_answer(
            data[: chunkwire.ANSWER_SIZE].ljust(chunkwire.ANSWER_SIZE, b"\0"), 1000
        )
        assert 0 <= length <= (4096 if is_error else 1000)
    error = chunkwire.parse_error(data)
    told = chunkwire.pack_error(error)
    length, is_error = chunkwire.parse_answer(told[: chunkwire.ANSWER_SIZE], 0)
    assert is_error
    assert len(told) == chunkwire.ANSWER_SIZE + length
    assert type(chunkwire.parse_error(told[chunkwire.ANSWER_SIZE :])) is type(error)


TARGETS: dict[str, Callable[[bytes], None]] = {
    "tar": tar,
    "inflate": inflated,
    "index": index,
    "header": header,
    "file": file,
    "records": records,
    "maps": maps,
    "trace": trace,
    "chunk": chunk,
}
