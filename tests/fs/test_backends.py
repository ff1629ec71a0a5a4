"""What every way to mount a layer has to do: all backends, over complete files and over those that come in pieces.

Reads of partial layers wait for this process, whose event loop serves the pieces: what touches a mount runs in threads.
"""

import asyncio
import contextlib
import ctypes
import errno
import hashlib
import io
import mmap
import os
import random
import struct
import subprocess
import sys
import tarfile
from collections.abc import AsyncIterator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from afs.core.mounts import list_mounts
from afs.layerstore.afslyr.convert import convert
from afs.snapshotter.backends import Backend
from afs.snapshotter.rootmount import RootRequest
from tests.fs.test_afslyr_mount import all_paths, seen
from tests.fs.test_fidelity_images import IMAGES, additions, generated
from tests.fs.test_fidelity_layers import SAME, UMOCI
from tests.testbed import capabilities, layerkinds, oci, tars, treediff, unpackers
from tests.testbed.fillsource import CHUNK, FillSource
from tests.testbed.ourmounts import KINDS, Kind, layer_mounts, roots_over
from tests.testbed.treediff import Seen, look

pytestmark = pytest.mark.root

MANY = 50_000
READERS = 4
_libc = ctypes.CDLL(None, use_errno=True)


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Kind:
    """Each backend, complete and lazy."""
    capabilities.require("fuse")
    found = Kind(request.param)
    found.require(tmp_path_factory.getbasetemp())
    return found


@pytest.fixture
def source(tmp_path: Path) -> Iterator[FillSource]:
    """Layers, and a look that nothing stays mounted."""
    yield FillSource(tmp_path)
    assert list_mounts(str(tmp_path)) == []


@contextlib.asynccontextmanager
async def mounted(kind: Kind, source: FillSource, tar: bytes) -> AsyncIterator[Path]:
    """A layer of a tar, mounted that way."""
    layer = kind.add(source, tar)
    async with layer_mounts(source, kind.backend) as mounts, mounts.using(layer.diff_id, kind.file(layer)) as at:
        assert (at.backend, at.lazy) == (kind.backend, kind.lazy)
        yield at.path


def tar_with(files: Mapping[str, tuple[bytes, int]]) -> bytes:
    """A tar of large files: content and mode by name."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, (content, mode) in files.items():
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(content), mode
            tar.addfile(info, io.BytesIO(content))
    return out.getvalue()


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[bytes, Seen]]:
    """What umoci makes of each kind of layer that it takes."""
    capabilities.require("root", "umoci")
    work = tmp_path_factory.mktemp("umoci")
    found = {}
    builder = oci.LayoutBuilder(work / "layout")
    with unpackers.tmpfs(work / "scratch") as scratch:
        for name, make in layerkinds.KINDS.items():
            if not UMOCI.get(name, SAME).error:
                builder.add_image(name, [builder.add_layer(make(), level=1)])
                found[name] = look(unpackers.umoci(builder.directory, name, scratch / name))
    return found


async def test_every_kind_of_layer_is_as_umoci_unpacks_it(
    kind: Kind, source: FillSource, unpacked: dict[str, dict[bytes, Seen]]
) -> None:
    layers = {name: kind.add(source, layerkinds.KINDS[name]()) for name in unpacked}
    async with layer_mounts(source, kind.backend) as mounts:
        for name, theirs in unpacked.items():
            async with mounts.using(layers[name].diff_id, kind.file(layers[name])) as at:
                ours = await asyncio.to_thread(look, at.path)
            treediff.assert_same(ours, theirs, but=UMOCI.get(name, SAME).but)


async def test_every_kind_of_entry_is_as_it_was_packed(kind: Kind, source: FillSource) -> None:
    """Also those that no other program unpacks; among them hard links, xattrs of each prefix, devices and sparse files."""
    tar, expected = tars.every_kind()

    def check(at: Path) -> None:
        root = os.fsencode(at)
        assert all_paths(root) == expected.keys()
        for path, wanted in expected.items():
            assert seen(root, path) == replace(wanted, same_as=None), path
            if wanted.same_as is not None:
                linked = os.path.join(root, wanted.same_as)
                assert os.path.samestat(os.lstat(os.path.join(root, path)), os.lstat(linked))

    async with mounted(kind, source, tar) as at:
        await asyncio.to_thread(check, at)


@pytest.mark.parametrize("name", ["whiteouts", "whiteouts-twice", "remade", "opaque-root", "types-change"])
async def test_marks_hide_what_is_below_in_an_overlay(
    kind: Kind, source: FillSource, tmp_path: Path, name: str
) -> None:
    capabilities.require("umoci")
    image = generated(IMAGES[name].kinds, tmp_path / "layout")
    with unpackers.tmpfs(tmp_path / "scratch") as scratch:
        theirs = look(unpackers.umoci(image.layout, "t", scratch / "umoci"))
    layers = {tar: kind.add(source, layerkinds.KINDS[tar]()) for tar in IMAGES[name].kinds}
    async with (
        layer_mounts(source, kind.backend) as mounts,
        roots_over(mounts, tmp_path) as roots,
        contextlib.AsyncExitStack() as stack,
    ):
        using = [mounts.using(layers[tar].diff_id, kind.file(layers[tar])) for tar in IMAGES[name].kinds]
        found = [await stack.enter_async_context(one) for one in using]
        root = await roots.mount_root(stack, found, RootRequest())
        ours = await asyncio.to_thread(look, root.path)
    treediff.assert_same(ours, theirs, but=additions(theirs, IMAGES[name].umoci))


async def test_files_can_be_mapped_and_run(kind: Kind, source: FillSource, rng: random.Random) -> None:
    content = rng.randbytes(3 * CHUNK + 12345)
    program = Path("/bin/busybox").read_bytes()
    tar = tar_with({"data": (content, 0o644), "busybox": (program, 0o755)})

    script = """
import hashlib, mmap, sys
with open(sys.argv[1], "rb") as file, mmap.mmap(file.fileno(), 0, mmap.MAP_SHARED, mmap.PROT_READ) as mapped:
    for start in map(int, sys.argv[2:]):
        print(mapped[start : start + 5000].hex())
    print(hashlib.sha256(mapped).hexdigest())
"""
    starts = [rng.randrange(len(content)) for _ in range(50)]
    wanted = [content[start : start + 5000].hex() for start in starts]

    def check(at: Path) -> None:
        # In another process: a page fault waits with Python's lock held, which the fills need.
        argv = [sys.executable, "-c", script, f"{at}/data", *map(str, starts)]
        done = subprocess.run(argv, check=True, capture_output=True, text=True)
        assert done.stdout.split() == [*wanted, hashlib.sha256(content).hexdigest()]
        run = subprocess.run([at / "busybox", "echo", "run"], check=True, capture_output=True)
        assert run.stdout == b"run\n"

    async with mounted(kind, source, tar) as at:
        await asyncio.to_thread(check, at)


async def test_direct_reads(kind: Kind, source: FillSource, rng: random.Random) -> None:
    """EROFS on a file refuses them, as other file systems do, at the opening; programs then read without O_DIRECT."""
    content = rng.randbytes(2 * CHUNK + 700)

    def check(at: Path) -> None:
        if kind.backend is Backend.FILE:
            with pytest.raises(OSError, match="Invalid argument"):
                os.open(at / "data", os.O_RDONLY | os.O_DIRECT)
            return
        fd = os.open(at / "data", os.O_RDONLY | os.O_DIRECT)
        with mmap.mmap(-1, 1 << 16) as buffer:  # page-aligned, as direct I/O wants it
            for offset in (0, 4096, CHUNK - 8192, CHUNK, 2 * CHUNK - 4096, 2 * CHUNK):
                count = os.preadv(fd, [buffer], offset)
                assert count == min(len(buffer), len(content) - offset)
                assert buffer[:count] == content[offset : offset + count]
            assert os.preadv(fd, [buffer], 3 * CHUNK) == 0
        os.close(fd)

    async with mounted(kind, source, tar_with({"data": (content, 0o644)})) as at:
        await asyncio.to_thread(check, at)


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A layer with a directory of 50,000 files: diff_id and file."""
    out = tmp_path_factory.mktemp("many") / "layer"
    tar = tars.directory("many/") + b"".join(tars.file(f"many/{number:05}") for number in range(MANY)) + tars.END
    return convert(io.BytesIO(tar).read, out).diff_id, out


async def test_many_readers_of_a_large_directory(kind: Kind, source: FillSource, many: tuple[str, Path]) -> None:
    """Each with a position of its own, which it can come back to."""
    layer = source.add_file(*many, partial=kind.lazy)
    names = [b".", b"..", *(b"%05d" % number for number in range(MANY))]

    def read(at: Path, back_to: int) -> None:
        fd = os.open(at / "many", os.O_RDONLY | os.O_DIRECTORY)
        listed = list(entries(fd))
        assert [name for name, _ in listed] == names
        os.lseek(fd, listed[back_to][1], os.SEEK_SET)  # telldir and seekdir are this
        assert [name for name, _ in entries(fd)] == names[back_to + 1 :]
        os.lseek(fd, 0, os.SEEK_SET)
        assert next(entries(fd))[0] == b"."
        os.close(fd)

    async with layer_mounts(source, kind.backend) as mounts, mounts.using(layer.diff_id, kind.file(layer)) as at:
        with ThreadPoolExecutor(READERS) as pool:
            loop = asyncio.get_running_loop()
            starts = [0, MANY // 2, MANY - 9, MANY + 1]
            await asyncio.gather(*(loop.run_in_executor(pool, read, at.path, start) for start in starts))


def entries(fd: int) -> Iterator[tuple[bytes, int]]:
    """(name, the position behind it) for each entry from the position of a directory's descriptor on; getdents64(2)."""
    buffer = ctypes.create_string_buffer(1 << 15)
    while count := _libc.getdents64(fd, buffer, len(buffer)):
        assert count > 0, os.strerror(ctypes.get_errno())
        offset = 0
        while offset < count:
            _, position, length, _ = struct.unpack_from("=QqHB", buffer.raw, offset)
            name = buffer.raw[offset + 19 : offset + length]
            yield name[: name.index(b"\0")], position
            offset += length


@pytest.mark.parametrize("kind", [name for name in KINDS if name.endswith("-lazy")], indirect=True)
async def test_what_cannot_be_read_is_an_error_and_never_zeros(
    kind: Kind, source: FillSource, rng: random.Random
) -> None:
    """Large reads, which go down in requests that are good in front and bad behind, or the other way round."""
    content = rng.randbytes(6 * CHUNK + 777)
    layer = kind.add(source, tar_with({"data": (content, 0o644)}))
    layer.lost.add(3)

    def read(at: Path) -> int:
        """How many reads fail; the others give what is there."""
        failed = 0
        fd = os.open(at / "data", os.O_RDONLY)
        try:
            for offset in range(0, len(content), 300_000):
                try:
                    got = os.pread(fd, CHUNK, offset)
                except OSError as error:
                    if error.errno != errno.EIO:
                        raise
                    failed += 1
                else:
                    assert got
                    # Not compared by assert, which would take minutes to show the difference.
                    if got != content[offset : offset + len(got)]:
                        raise AssertionError(f"wrong bytes at {offset}, of which {got.count(0)} are zeros")
        finally:
            os.close(fd)
        return failed

    async with layer_mounts(source, kind.backend) as mounts, mounts.using(layer.diff_id, "") as at:
        assert await asyncio.to_thread(read, at.path) > 0
        assert any(first <= 3 < first + count for first, count in layer.asked)
        layer.lost.clear()
        assert await asyncio.to_thread(read, at.path) == 0


async def test_metadata_are_read_ahead_through_loop_devices(source: FillSource) -> None:
    """Which EROFS reads in blocks of 512 bytes, of eight inodes each, and direct I/O passes on as they are."""
    kind = Kind("erofs-loop-lazy")
    kind.require(source.directory)
    count = 3000
    layer = kind.add(source, b"".join(tars.file(f"{number:05}") for number in range(count)) + tars.END)
    async with layer_mounts(source, kind.backend) as mounts, mounts.using(layer.diff_id, "") as at:
        assert len(await asyncio.to_thread(look, at.path)) >= count
        assert at.worker is not None
        reads = (await mounts._fused.stats())[layer.diff_id].reads
        assert reads < count // 8 // 2, "half of what the inodes alone would take"


async def test_open_files_outlive_eviction(kind: Kind, source: FillSource, rng: random.Random) -> None:
    """A layer in use does not go when the layerstore asks; and a file that is open is read to its end in any case."""
    content = rng.randbytes(3 * CHUNK)
    layer = kind.add(source, tar_with({"data": (content, 0o644)}))
    async with layer_mounts(source, kind.backend) as mounts:
        async with mounts.using(layer.diff_id, kind.file(layer)) as at:
            fd = await asyncio.to_thread(os.open, at.path / "data", os.O_RDONLY)
            assert await asyncio.to_thread(os.pread, fd, 10, 0) == content[:10]
            await mounts.release([layer.diff_id])
            assert (at.path / "data").exists()
            if not kind.lazy:
                layer.whole.unlink()
        assert not mounts.leases().idle
        assert [one for one in list_mounts(str(source.directory)) if one.target == str(at.path)] == []
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        assert await asyncio.to_thread(os.pread, fd, len(content), 0) == content
        os.close(fd)
