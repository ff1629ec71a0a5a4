"""Header, footer and chunk table against hostile values."""

import io
import os
import struct
from dataclasses import replace
from pathlib import Path

import pytest

from afs.layerstore.afslyr import layout as lay
from afs.layerstore.afslyr import reader
from afs.layerstore.afslyr.convert import convert
from afs.layerstore.afslyr.errors import CorruptLayer
from tests.testbed import tars

DIFF_ID = "sha256:" + "ab" * 32
GOOD = lay.make_layout(DIFF_ID, 10_240, 4096, 3_000_000)


def test_a_header_round_trips() -> None:
    assert lay.parse_header(lay.pack_header(GOOD), GOOD.file_size) == GOOD


def test_regions_are_aligned_and_ordered() -> None:
    assert GOOD.extras_offset == 16384
    assert GOOD.meta_offset == 20480
    assert GOOD.erofs_end == 20480 + lay.align_up(3_000_000)
    assert GOOD.file_size == GOOD.erofs_end + 12 * 32 + 64


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tar_offset", 0),
        ("tar_offset", 8192),
        ("tar_length", 2**64 - 1),
        ("tar_length", GOOD.tar_length + 8192),
        ("extras_offset", GOOD.extras_offset + 512),
        ("extras_length", 2**64 - 1),
        ("extras_length", 0),
        ("meta_offset", GOOD.meta_offset - 4096),
        ("erofs_end", GOOD.meta_offset),
        ("erofs_end", 0),
        ("erofs_end", GOOD.erofs_end + 1),
        ("erofs_end", 2**64 - 4096),
        ("chunk_size", 0),
        ("chunk_size", 4096),
    ],
)
def test_hostile_fields_are_refused(field: str, value: int) -> None:
    bad = replace(GOOD, **{field: value})  # type: ignore[arg-type]  # mypy cannot know the field
    with pytest.raises(CorruptLayer):
        lay.parse_header(lay.pack_header(bad), GOOD.file_size)


@pytest.mark.parametrize(("at", "value"), [(0, 0x58), (7, 2), (8, 1), (8, 3), (200, 1), (1023, 1)])
def test_bad_magic_version_and_reserved_bytes_are_refused(at: int, value: int) -> None:
    header = bytearray(lay.pack_header(GOOD))
    header[at] = value
    with pytest.raises(CorruptLayer):
        lay.parse_header(bytes(header), GOOD.file_size)


def test_a_short_header_and_a_wrong_file_size_are_refused() -> None:
    with pytest.raises(CorruptLayer, match="header"):
        reader.layout_from_bytes(b"AFSLYR", 6)
    for size in (GOOD.file_size - 1, GOOD.file_size + 1, 0):
        with pytest.raises(CorruptLayer, match="bytes"):
            lay.parse_header(lay.pack_header(GOOD), size)


def test_an_end_beyond_32_bit_blocks_is_refused() -> None:
    huge = lay.make_layout(DIFF_ID, 3 << 40, 0, 4096)
    with pytest.raises(CorruptLayer, match="32-bit"):
        lay.parse_header(lay.pack_header(huge), huge.file_size)


def test_the_footer_must_agree_with_the_header() -> None:
    footer = lay.pack_footer(GOOD, b"r" * 32)
    assert lay.parse_footer(footer, GOOD) == b"r" * 32
    wrong = [footer[:-1], b"x" + footer[1:], footer[:-1] + b"\1"]
    wrong += [
        struct.pack("<8sQQ32s8x", lay.FOOTER_MAGIC, *pair, b"r" * 32) for pair in ((0, 12 * 32), (GOOD.erofs_end, 64))
    ]
    for bad in wrong:
        with pytest.raises(CorruptLayer):
            lay.parse_footer(bad, GOOD)


def test_chunk_ranges_cover_the_file_and_no_more() -> None:
    table = lay.ChunkTable(bytes(GOOD.table_length))
    ranges = [table.chunk_range(index, GOOD) for index in range(table.count)]
    assert ranges[0] == (0, 1 << 18)
    assert sum(length for _, length in ranges) == GOOD.erofs_end
    for index in (-1, table.count):
        with pytest.raises(IndexError):
            table.chunk_range(index, GOOD)
        with pytest.raises(IndexError):
            table.verify(index, b"")


def converted(tmp_path: Path) -> Path:
    """A layer file of a few chunks."""
    out = tmp_path / "layer.afslyr"
    tar = tars.tar_of({"a": os.urandom(2_500_000), "b": b"b"})
    convert(io.BytesIO(tar).read, out)
    return out


@pytest.mark.parametrize("at", [0, 100, 1500, 3000, 5000, 1 << 20, 2_000_000, -4200, -200, -70, -40, -1])
def test_every_flipped_byte_is_found(tmp_path: Path, at: int) -> None:
    out = converted(tmp_path)
    fd = os.open(out, os.O_RDWR)
    try:
        reader.verify_layer(fd)
        offset = at % out.stat().st_size
        byte = os.pread(fd, 1, offset)[0]
        os.pwrite(fd, bytes([byte ^ 0x10]), offset)
        with pytest.raises(CorruptLayer):
            reader.verify_layer(fd)
    finally:
        os.close(fd)


def test_a_bad_chunk_is_named(tmp_path: Path) -> None:
    out = converted(tmp_path)
    fd = os.open(out, os.O_RDWR)
    try:
        os.pwrite(fd, b"\0\0\0\0", lay.CHUNK_SIZE + 5)
        with pytest.raises(CorruptLayer, match="chunk 1") as caught:
            reader.verify_layer(fd)
        assert caught.value.chunk == 1
    finally:
        os.close(fd)


@pytest.mark.parametrize("keep", [0, 1000, 4096, 1 << 20, -1])
def test_truncated_files_are_refused(tmp_path: Path, keep: int) -> None:
    out = converted(tmp_path)
    os.truncate(out, keep if keep >= 0 else out.stat().st_size + keep)
    fd = os.open(out, os.O_RDONLY)
    try:
        with pytest.raises(CorruptLayer):
            reader.read_layer(fd)
    finally:
        os.close(fd)
