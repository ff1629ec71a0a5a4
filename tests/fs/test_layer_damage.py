"""Damaged bytes in layer files that the kernel reads: what mounts show before and after a repair, with fs-verity and without."""

from __future__ import annotations

import asyncio
import errno
import io
import os
import random
import subprocess
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from afs.core.digests import sha256_digest
from afs.layerstore import sealing
from afs.layerstore.afslyr.convert import convert
from afs.layerstore.mountedpages import forget_pages
from afs.layerstore.repair import damaged_chunks, repair, replace
from afs.layerstore.sealing import Sealer
from afs.layerstore.store import CompleteLayer, LayerStore
from afs.snapshotter.backends import Backend
from tests.testbed import capabilities, tars
from tests.testbed.fillsource import FillSource
from tests.testbed.ourmounts import Kind, layer_mounts

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.root

DATA = random.Random(7).randbytes(1 << 20)  # noqa: S311 - the same in every run
TAR = tars.tar_of({"first": DATA[::-1], "dir/data": DATA, "same": b"content"})
DIFF_ID = sha256_digest(TAR)
MARK = DATA[500_000:500_064]


@contextmanager
def mounted(source: Path, at: Path, *options: str) -> Iterator[Path]:
    """A file mounted by mount(8)."""
    at.mkdir()
    subprocess.run(["mount", *options, source, at], check=True)
    try:
        yield at
    finally:
        subprocess.run(["umount", at], check=True)


@contextmanager
def layer_mounted(layer: Path, at: Path) -> Iterator[Path]:
    """A layer through a loop device with direct I/O: with buffered I/O Linux 6.1 gives zeros for what it cannot read."""
    command = ["losetup", "--find", "--show", "--read-only", "--direct-io=on", str(layer)]
    device = Path(subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip())
    try:
        with mounted(device, at, "-t", "erofs", "-o", "ro"):
            yield at
    finally:
        subprocess.run(["losetup", "--detach", str(device)], check=True)


def made(root: Path) -> tuple[LayerStore, CompleteLayer, bytes]:
    """A cache with one layer, and its bytes."""
    store = LayerStore(root)
    temporary = store.temporary()
    convert(io.BytesIO(TAR).read, temporary, diff_id=DIFF_ID)
    layer = store.commit(temporary, DIFF_ID)
    return store, layer, layer.path.read_bytes()


def overwrite(path: Path, at: int, data: bytes) -> None:
    """Other bytes in a file, on disk."""
    with path.open("r+b") as file:
        os.pwrite(file.fileno(), data, at)
        os.fsync(file.fileno())


@pytest.mark.parametrize("device", ["file", "loop"])
def test_a_mount_shows_the_right_bytes_after_a_repair(tmp_path: Path, device: str) -> None:
    if device == "file":
        capabilities.require("erofs")
    store, layer, good = made(tmp_path / "cache")
    name = good.rindex(b"same")  # in the directory's block
    overwrite(layer.path, good.index(MARK), b"damage")
    overwrite(layer.path, name, b"SAME")
    subprocess.run(["sync", "-f", layer.path], check=True)
    with mounted(layer.path, tmp_path / "m", "-t", "erofs", "-o", "ro,loop" if device == "loop" else "ro") as root:
        data = root / "dir" / "data"
        assert data.read_bytes() != DATA
        assert (root / "first").read_bytes() == DATA[::-1]
        assert sorted(os.listdir(root)) == ["SAME", "dir", "first"]

        async def from_peers(layer: CompleteLayer, index: int) -> bytes:
            offset, length = layer.table.chunk_range(index, layer.layout)
            return good[offset : offset + length]

        async def mend() -> None:
            await repair(layer, await damaged_chunks(layer), from_peers, None)

        asyncio.run(mend())
        assert layer.path.read_bytes() == good
        assert data.read_bytes() != DATA, "EROFS has pages of its own"
        assert forget_pages(layer.path) == 1
        assert data.read_bytes() == DATA
        assert sorted(os.listdir(root)) == ["dir", "first", "same"]
        assert (root / "same").read_bytes() == b"content"
    assert forget_pages(layer.path) == 0
    store.close()


@pytest.mark.parametrize("backend", Backend)
async def test_what_afs_fused_serves_is_right_after_a_repair(tmp_path: Path, backend: Backend) -> None:
    """A tree, or a file that EROFS is mounted on: the kernel keeps the pages of both over closing and opening."""
    Kind(f"{backend}-lazy").require(tmp_path)
    store, layer, good = made(tmp_path / "cache")
    at = good.index(MARK)
    overwrite(layer.path, at, b"damage")
    source = FillSource(tmp_path)
    source.add_file(DIFF_ID, layer.path)
    async with layer_mounts(source, backend) as mounts, mounts.using(DIFF_ID, "") as mounted_at:

        async def read() -> bytes:
            return await asyncio.to_thread((mounted_at.path / "dir" / "data").read_bytes)

        bad = await read()
        assert bad != DATA
        overwrite(layer.path, at, MARK)
        assert await read() == bad
        assert await asyncio.to_thread(forget_pages, layer.path) == 1
        assert await read() == DATA
    assert forget_pages(layer.path) == 0
    store.close()


def test_other_mounts_keep_their_pages(tmp_path: Path) -> None:
    capabilities.require("erofs")
    store, layer, good = made(tmp_path / "cache")
    other = tmp_path / "other.afslyr"
    other.write_bytes(good)
    overwrite(other, good.index(MARK), b"damage")
    with mounted(other, tmp_path / "m", "-t", "erofs", "-o", "ro") as root:
        bad = (root / "dir" / "data").read_bytes()
        overwrite(other, good.index(MARK), MARK)
        assert forget_pages(layer.path) == 0
        assert (root / "dir" / "data").read_bytes() == bad != DATA
    store.close()


@contextmanager
def ext4(tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    """An ext4 that can seal files, and its image; skips where the kernel cannot, for nothing that could be installed helps."""
    if (why := capabilities.missing("fsverity")) is not None:
        pytest.skip(f"needs fs-verity: {why}")
    image = tmp_path / "ext4"
    with image.open("wb") as file:
        file.truncate(64 << 20)
    subprocess.run(["mkfs.ext4", "-q", "-O", "verity", "-b", "4096", image], check=True)
    with mounted(image, tmp_path / "disk", "-o", "loop") as disk:
        yield disk, image


def test_the_kernel_refuses_damaged_pages_of_a_sealed_layer(tmp_path: Path) -> None:
    with ext4(tmp_path) as (disk, image):
        assert sealing.supported(disk)
        store, layer, good = made(disk / "cache")

        async def seal() -> bool:
            sealer = Sealer()
            try:
                return await sealer.seal(layer)
            finally:
                sealer.close()

        before = layer.path.stat().st_blocks
        assert asyncio.run(seal())
        assert sealing.is_sealed(layer.path)
        assert asyncio.run(seal()), "again is no error"
        assert before < layer.path.stat().st_blocks <= before * 1.02 + 16
        with pytest.raises(PermissionError):
            layer.write_chunk(0, b"")
        store.stamp(DIFF_ID, 1234.0)
        assert store.usage(DIFF_ID)[1] == 1234.0, "its last use can be noted"
        assert asyncio.run(damaged_chunks(layer)) == []
        os.sync()
        with image.open("rb") as file:  # the disk changes a byte
            at = file.read().index(MARK)
        overwrite(image, at, bytes([MARK[0] ^ 1]))
        with layer_mounted(layer.path, tmp_path / "old") as old:
            with pytest.raises(OSError, match="Input/output error") as caught:
                (old / "dir" / "data").read_bytes()
            assert caught.value.errno == errno.EIO
            assert (old / "first").read_bytes() == DATA[::-1]
            (index,) = asyncio.run(damaged_chunks(layer))
            assert index == good.index(MARK) >> 20

            async def from_peers(layer: CompleteLayer, index: int) -> bytes:
                offset, length = layer.table.chunk_range(index, layer.layout)
                return good[offset : offset + length]

            asyncio.run(replace(store, layer, store.temporary(), from_peers, None))
            assert layer.path.read_bytes() == good
            assert asyncio.run(damaged_chunks(layer)) == []
            with layer_mounted(layer.path, tmp_path / "new") as new:
                assert (new / "dir" / "data").read_bytes() == DATA
            with pytest.raises(OSError, match="Input/output error"):
                (old / "dir" / "data").read_bytes()
        store.close()
