"""Checking a layer as a whole: an index that does not belong to its tar is found, wherever it was changed."""

import hashlib
import io
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from afs.layerstore.afslyr import layout as lay
from afs.layerstore.afslyr import reader
from afs.layerstore.afslyr.check import IndexMismatch, check_index, check_layer
from afs.layerstore.afslyr.convert import Limits, convert
from afs.layerstore.afslyr.errors import CorruptLayer, LayerLimit
from afs.layerstore.afslyr.index import ROOT, SLOT, IndexReader
from tests.testbed import tars
from tests.testbed.forged import Forged


@pytest.fixture
def forged(tmp_path: Path) -> Forged:
    """Every kind of entry, two expanded files and 3 MiB of data."""
    path = tmp_path / "layer"
    tar = tars.file("large", os.urandom(3 << 20)) + tars.every_kind_tar()
    convert(io.BytesIO(tar).read, path)
    return Forged(path)


@pytest.fixture
def opened() -> Iterator[Callable[[Forged], int]]:
    """Seals a file; its descriptor is closed after the test."""
    fds = []

    def seal(forged: Forged) -> int:
        fds.append(forged.seal())
        return fds[-1]

    yield seal
    for fd in fds:
        os.close(fd)


def test_an_honest_file_passes(forged: Forged, opened: Callable[[Forged], int]) -> None:
    fd = opened(forged)
    read: list[int] = []
    layout, table = check_layer(fd, progress=read.append)
    assert layout == forged.layout
    assert table.count == -(-layout.erofs_end // lay.CHUNK_SIZE)
    assert len(read) == -(-layout.erofs_end // lay.PIECE)
    assert sum(read) == layout.erofs_end
    read.clear()
    check_index(fd, layout, progress=read.append)
    assert sum(read) == layout.erofs_end


def inode_of(forged: Forged, name: bytes) -> int:
    """Where the inode of a file in the root stands in the whole file."""
    layout = forged.layout
    metadata = bytes(forged.data[layout.meta_offset : layout.erofs_end])
    found = IndexReader(layout, bytes(forged.data[1024:1152]), metadata).lookup(ROOT, name)
    assert found is not None
    return layout.meta_offset + found.nid * SLOT


@pytest.mark.parametrize(
    ("region", "where", "path"),
    [
        ("superblock", lambda forged: 1024 + 64, None),  # the volume name
        ("padding", lambda forged: 1024 + 128, None),
        ("padding", lambda forged: 4095, None),
        ("padding", lambda forged: forged.layout.tar_offset + forged.layout.tar_length, None),
        ("extras", lambda forged: forged.layout.extras_offset, b"sparse/old"),
        ("extras", lambda forged: forged.layout.extras_offset + 100_001, b"sparse/old"),
        ("extras", lambda forged: forged.layout.extras_offset + 120_000, None),  # its padding
        ("metadata", lambda forged: forged.layout.meta_offset + 24, b""),  # the root's uid
        ("metadata", lambda forged: inode_of(forged, b"large") + 4, b"large"),  # setuid, say
        ("metadata", lambda forged: inode_of(forged, b"big") + 16, b"big"),  # other content
        ("metadata", lambda forged: forged.layout.erofs_end - 1, None),
    ],
    ids=[f"place{number}" for number in range(11)],
)
def test_every_forged_byte_is_found_and_named(
    forged: Forged,
    opened: Callable[[Forged], int],
    region: str,
    where: Callable[[Forged], int],
    path: bytes | None,
) -> None:
    at = where(forged)
    forged.data[at] ^= 0x40
    fd = opened(forged)
    reader.verify_layer(fd)  # chunks and tar are right
    for check in (lambda: check_layer(fd), lambda: check_index(fd, forged.layout)):
        with pytest.raises(IndexMismatch) as caught:
            check()
        (found,) = caught.value.differences
        assert (found.region, found.offset, found.path) == (region, at, path)
        assert f"{region} at byte {at}" in caught.value.line


def test_a_forged_name_is_found(forged: Forged, opened: Callable[[Forged], int]) -> None:
    at = forged.data.rindex(b"v7dir")
    forged.data[at + 4] = ord("s")
    with pytest.raises(IndexMismatch, match=rf'metadata at byte {at + 4} \("/"\)'):
        check_layer(opened(forged))


def test_each_region_is_told(forged: Forged, opened: Callable[[Forged], int]) -> None:
    layout = forged.layout
    for at in (2000, layout.extras_offset + 5, layout.meta_offset + 8, layout.meta_offset + 30):
        forged.data[at] ^= 1
    with pytest.raises(IndexMismatch) as caught:
        check_layer(opened(forged))
    assert [found.region for found in caught.value.differences] == ["padding", "extras", "metadata"]


@pytest.mark.parametrize(("extras", "metadata"), [(4096, 0), (0, 4096), (-4096, 0)])
def test_regions_of_other_sizes_are_found(
    forged: Forged, opened: Callable[[Forged], int], extras: int, metadata: int
) -> None:
    old = forged.layout
    length = old.erofs_end - old.meta_offset
    forged.layout = lay.make_layout(old.diff_id, old.tar_length, old.extras_length + extras, length + metadata)
    forged.data = forged.data[: old.erofs_end].ljust(forged.layout.erofs_end, b"\0")
    forged.data[:1024] = lay.pack_header(forged.layout)
    with pytest.raises(IndexMismatch, match="header at byte"):
        check_layer(opened(forged))


def test_a_tar_that_nobody_converts_is_refused(tmp_path: Path, opened: Callable[[Forged], int]) -> None:
    path = tmp_path / "layer"
    convert(io.BytesIO(tars.tar_of({"name": b"x"})).read, path)
    forged = Forged(path)
    forged.data[forged.layout.tar_offset + 156] = ord("Z")
    block = bytes(forged.data[forged.layout.tar_offset : forged.layout.tar_offset + 512])
    forged.data[forged.layout.tar_offset : forged.layout.tar_offset + 512] = tars.with_checksum(block)
    with pytest.raises(CorruptLayer, match="the tar inside is sha256"):  # told before what it causes
        check_layer(opened(forged))
    set_diff_id(forged)
    with pytest.raises(CorruptLayer, match="unsupported"):
        check_layer(opened(forged))


def set_diff_id(forged: Forged) -> None:
    """Let the header say what the tar is."""
    layout = forged.layout
    tar = bytes(forged.data[layout.tar_offset : layout.tar_offset + layout.tar_length])
    forged.layout = lay.make_layout(
        "sha256:" + hashlib.sha256(tar).hexdigest(),
        len(tar),
        layout.extras_length,
        layout.erofs_end - layout.meta_offset,
    )
    forged.data[:1024] = lay.pack_header(forged.layout)


def test_a_wrong_chunk_is_told_before_what_it_causes(forged: Forged, opened: Callable[[Forged], int]) -> None:
    fd = opened(forged)
    with forged.path.open("r+b") as file:
        file.seek(forged.layout.tar_offset)
        file.write(b"x")  # no tar header any more, in chunk 0
    with pytest.raises(CorruptLayer, match="chunk 0"):
        check_layer(fd)


def test_limits_hold(forged: Forged, opened: Callable[[Forged], int]) -> None:
    fd = opened(forged)
    for limits in (Limits(max_tar_bytes=1000), Limits(max_entries=10), Limits(max_extras_bytes=1000)):
        with pytest.raises(LayerLimit):
            check_layer(fd, limits=limits)


def test_what_progress_raises_ends_the_check(forged: Forged, opened: Callable[[Forged], int]) -> None:
    def stop(_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        check_layer(opened(forged), progress=stop)
