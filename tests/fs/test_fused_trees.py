"""Layers as trees over FUSE: what EROFS shows, whole and in pieces, and what happens when they are wrong."""

import asyncio
import contextlib
import ctypes
import errno
import os
import random
import stat
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

from afs.core.mounts import list_mounts, unmount
from afs.layerstore.afslyr.layout import HEADER_SIZE
from afs.layerstore.afslyr.reader import layout_from_bytes
from afs.snapshotter.fusedworkers import FusedWorkers
from tests.testbed import layerkinds, mounts, tars, treediff
from tests.testbed.fillsource import CHUNK, FillSource, SourceLayer
from tests.testbed.fusedpool import bind, open_files, program, running

pytestmark = pytest.mark.root
MANY = 20_000
KINDS: dict[str, Callable[[], bytes]] = {
    "every-kind": tars.every_kind_tar,
    "names": layerkinds.names,
    "attributes": layerkinds.attributes,
    "trusted": layerkinds.trusted,
    "links": layerkinds.links,
    "hard-links": layerkinds.hard_links,
    "devices": layerkinds.devices,
    "numbers": layerkinds.numbers,
    "before-1970": layerkinds.before_1970,
    "sparse": layerkinds.pax_sparse_files,
    "nothing": layerkinds.nothing,
}
READ = "import sys; sys.stdout.write(str(len(open(sys.argv[1], 'rb').read())))"


@pytest.fixture
async def source(tmp_path: Path) -> AsyncIterator[FillSource]:
    """Serves layers."""
    found = FillSource(tmp_path)
    async with found.serving():
        yield found


@pytest.fixture
async def pool(tmp_path: Path, source: FillSource) -> AsyncIterator[FusedWorkers]:
    """One worker."""
    async with running(tmp_path, source) as started:
        yield started


@contextlib.contextmanager
def erofs(layer: SourceLayer, at: Path) -> Iterator[Path]:
    """The layer's file, mounted."""
    at.mkdir()
    mounts.mount(layer.whole, at, "erofs", read_only=True)
    try:
        yield at
    finally:
        unmount(str(at))


async def seen(tree: Path) -> dict[bytes, treediff.Seen]:
    """All of a tree. In a thread, as all that reads from a worker: the fill socket is served by this process's loop."""
    return await asyncio.to_thread(treediff.look, tree)


@pytest.mark.parametrize("partial", [False, True], ids=["whole", "partial"])
@pytest.mark.parametrize("kind", KINDS)
async def test_a_tree_is_what_erofs_shows(
    tmp_path: Path, source: FillSource, pool: FusedWorkers, kind: str, partial: bool
) -> None:
    layer = source.add(KINDS[kind](), partial=partial)
    tree = (await pool.place(layer.diff_id)).tree(layer.diff_id)
    found = await seen(tree)
    with erofs(layer, tmp_path / "erofs") as reference:
        expected = treediff.look(reference)
        treediff.assert_same(found, expected)
        for path, one in expected.items():
            if one.type != "?":
                ours, theirs = os.lstat(os.fsencode(tree) + b"/" + path), os.lstat(os.fsencode(reference) + b"/" + path)
                assert (ours.st_nlink, ours.st_size) == (theirs.st_nlink, theirs.st_size), path
                assert (ours.st_blocks, ours.st_ctime_ns) == (theirs.st_blocks, theirs.st_ctime_ns), path


async def test_hard_links_are_one_inode(source: FillSource, pool: FusedWorkers) -> None:
    layer = source.add(tars.tar_of({"a": b"content", "d": None})[:-1024] + tars.hard_link("d/b", "a") + tars.END)
    tree = (await pool.place(layer.diff_id)).tree(layer.diff_id)
    first, second = await asyncio.to_thread(lambda: (os.stat(tree / "a"), os.stat(tree / "d/b")))
    assert (first.st_ino, first.st_nlink, second.st_nlink) == (second.st_ino, 2, 2)
    assert await asyncio.to_thread((tree / "d/b").read_bytes) == b"content"


async def test_reading_in_every_way(source: FillSource, pool: FusedWorkers, rng: random.Random) -> None:
    content = rng.randbytes(3 * CHUNK + 12345)
    layer = source.add(tars.tar_of({"pad": b"p" * 700, "file": content}), partial=True)
    worker = await pool.place(layer.diff_id)
    path = worker.tree(layer.diff_id) / "file"

    def read() -> None:
        import mmap

        with path.open("rb") as file:
            for _ in range(50):
                at = rng.randrange(len(content) + 100)
                length = rng.randrange(1, 300_000)
                assert os.pread(file.fileno(), length, at) == content[at : at + length]
            with mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
                assert mapped[CHUNK - 10 : CHUNK + 10] == content[CHUNK - 10 : CHUNK + 10]
        direct = os.open(path, os.O_RDONLY | os.O_DIRECT)
        try:
            buffer = mmap.mmap(-1, 8192)
            assert os.preadv(direct, [buffer], 4096) == 8192
            assert bytes(buffer) == content[4096 : 4096 + 8192]
        finally:
            os.close(direct)
        for flags in (os.O_WRONLY, os.O_RDWR):
            with pytest.raises(OSError, match="Read-only"):
                os.open(path, flags)
        assert worker.file(layer.diff_id).read_bytes() == layer.whole.read_bytes()

    await asyncio.to_thread(read)


def names_by_position(directory: str) -> list[tuple[bytes, int]]:
    """What readdir(3) gives, each with the position behind it."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.opendir.restype = libc.readdir.restype = ctypes.c_void_p
    libc.telldir.restype = ctypes.c_long
    libc.telldir.argtypes = libc.readdir.argtypes = libc.closedir.argtypes = (ctypes.c_void_p,)
    stream = libc.opendir(directory.encode())
    found = []
    while entry := libc.readdir(stream):
        found.append((ctypes.string_at(entry + 19), libc.telldir(stream)))  # d_name of struct dirent
    libc.closedir(stream)
    return found


async def test_a_huge_directory_with_concurrent_readers(
    source: FillSource, pool: FusedWorkers, rng: random.Random
) -> None:
    expected = {f"name-{number:06}-{'x' * (number % 40)}" for number in range(MANY)}
    layer = source.add(b"".join(tars.file(f"d/{name}") for name in expected) + tars.END)
    tree = (await pool.place(layer.diff_id)).tree(layer.diff_id)
    count = "import os, sys; print(len(set(os.listdir(sys.argv[1]))))"
    async with contextlib.AsyncExitStack() as stack:
        readers = [await stack.enter_async_context(program(count, tree / "d")) for _ in range(3)]
        listed = await asyncio.to_thread(names_by_position, str(tree / "d"))
        assert [await reader.line() for reader in readers] == [str(MANY)] * 3
    names = [os.fsdecode(name) for name, _ in listed]
    assert len(names) == MANY + 2
    assert set(names) - {".", ".."} == expected

    def read_from_anywhere() -> None:
        fd = os.open(tree / "d", os.O_RDONLY)
        try:
            for at in [*rng.sample(range(len(listed) - 1), 20), len(listed) - 2]:
                os.lseek(fd, listed[at][1], os.SEEK_SET)
                assert first_name(fd) == listed[at + 1][0]
            for nowhere in (listed[-1][1], 1 << 40, (1 << 62) + 5):
                os.lseek(fd, nowhere, os.SEEK_SET)
                assert first_name(fd) is None
        finally:
            os.close(fd)
        missing = [name for name in rng.sample(sorted(expected), 50) if not (tree / "d" / name).exists()]
        assert not missing
        assert not (tree / "d" / "name-").exists()

    await asyncio.to_thread(read_from_anywhere)


def first_name(fd: int) -> bytes | None:
    """The first name that getdents64(2) gives from where *fd* stands."""
    libc = ctypes.CDLL(None, use_errno=True)
    buffer = ctypes.create_string_buffer(1024)
    length = libc.syscall(217, fd, buffer, 1024)
    assert length >= 0, os.strerror(ctypes.get_errno())
    return ctypes.string_at(ctypes.addressof(buffer) + 19) if length else None


@contextlib.contextmanager
def overlay(tmp_path: Path, lower: list[Path], options: str) -> Iterator[Path]:
    """A writable overlay of *lower*, topmost first."""
    for name in ("upper", "work", "merged"):
        (tmp_path / name).mkdir()
    directories = f"lowerdir={':'.join(map(str, lower))},upperdir={tmp_path}/upper,workdir={tmp_path}/work"
    subprocess.run(["mount", "-t", "overlay", "-o", f"{directories},{options}", "o", tmp_path / "merged"], check=True)
    try:
        yield tmp_path / "merged"
    finally:
        unmount(str(tmp_path / "merged"))


@pytest.mark.parametrize("user", [False, True], ids=["trusted", "userxattr"])
async def test_a_lower_directory_of_an_overlay(
    tmp_path: Path, source: FillSource, pool: FusedWorkers, user: bool
) -> None:
    """Whiteouts, opaque directories, copies up; and that one view never shows the marks of the other."""
    below = tars.tar_of(
        {"gone": b"x", "kept": b"kept", "d": None, "d/hidden": b"x", "e": None, "e/gone": b"x", "e/kept": b"k"}
    )
    above = tars.tar_of(
        {".wh.gone": b"", "d": None, "d/.wh..wh..opq": b"", "d/new": b"n", "e": None, "e/.wh.gone": b""}
    )
    layers = [source.add(tar, partial=True) for tar in (above, below)]
    lower = []
    for layer in layers:
        worker = await pool.place(layer.diff_id)
        lower.append(worker.tree(layer.diff_id, user_xattrs=user))

    def use() -> None:
        mark, other = ("user", "trusted") if user else ("trusted", "user")
        assert os.listxattr(lower[0] / "d") == [f"{mark}.overlay.opaque"]
        assert os.getxattr(lower[0] / "d", f"{mark}.overlay.opaque") == b"y"
        with pytest.raises(OSError, match="No data") as caught:
            os.getxattr(lower[0] / "d", f"{other}.overlay.opaque")
        assert caught.value.errno == errno.ENODATA
        whiteout = os.lstat(lower[0] / "gone")
        assert (stat.S_ISCHR(whiteout.st_mode), whiteout.st_rdev) == (True, 0)
        with overlay(tmp_path, lower, "userxattr" if user else "index=off,redirect_dir=off,metacopy=off") as merged:
            names = sorted(str(path.relative_to(merged)) for path in merged.rglob("*"))
            assert names == ["d", "d/new", "e", "e/kept", "kept"]
            (merged / "kept").write_text("changed")
            (merged / "e" / "kept").unlink()
            (merged / "d" / "hidden").write_text("mine")
            assert (merged / "kept").read_text() == "changed"
            assert [path.name for path in (merged / "e").iterdir()] == []
            assert (merged / "d" / "hidden").read_text() == "mine"
        assert (lower[1] / "kept").read_bytes() == b"kept"

    await asyncio.to_thread(use)


async def test_permissions_are_those_of_the_layer(tmp_path: Path, source: FillSource, pool: FusedWorkers) -> None:
    """Modes and ACLs hold, for others too; a worker's own directories are closed to them."""
    _user_obj, user, group_obj, mask, other = 1, 2, 4, 16, 32
    nobody = 0xFFFFFFFF
    acl = layerkinds.acl(
        (_user_obj, 6, nobody), (user, 4, 1234), (group_obj, 0, nobody), (mask, 4, nobody), (other, 0, nobody)
    )
    tar = tars.root() + tars.file("open", b"o", mode=0o644) + tars.file("closed", b"c", mode=0o600)
    tar += tars.pax([("SCHILY.xattr.system.posix_acl_access", acl)]) + tars.file("acl", b"a", mode=0o640) + tars.END
    layer = source.add(tar)
    worker = await pool.place(layer.diff_id)
    at = tmp_path / "bound"
    await asyncio.to_thread(bind, worker.tree(layer.diff_id), at)
    code = """
import os, sys
os.setgroups([]); os.setgid(int(sys.argv[2])); os.setuid(int(sys.argv[2]))
for name in sys.argv[3:]:
    try:
        print(open(sys.argv[1] + "/" + name).read())
    except OSError as error:
        print(error.strerror)
"""
    try:
        for path in [tmp_path, *tmp_path.parents]:
            if path.stat().st_uid == os.getuid() and not path.stat().st_mode & 0o001:
                path.chmod(0o711)
        async with program(code, at, 1234, "open", "closed", "acl") as one:
            assert [await one.line() for _ in range(3)] == ["o", "Permission denied", "a"]
        async with program(code, at, 4321, "acl") as one:
            assert await one.line() == "Permission denied"
        async with program(code, worker.mountpoint, 1234, f"t/{layer.diff_id[7:]}/open", "t") as one:
            assert [await one.line() for _ in range(2)] == ["Permission denied"] * 2
    finally:
        await asyncio.to_thread(unmount, str(at))


async def test_metadata_come_first_and_at_once(source: FillSource, pool: FusedWorkers, rng: random.Random) -> None:
    """The header's chunk, then the whole of the metadata in one question; contents when they are read."""
    tar = tars.file("data", rng.randbytes(3 * CHUNK)) + b"".join(tars.file(f"d/{n:05}") for n in range(MANY)) + tars.END
    layer = source.add(tar, partial=True)
    layout = layout_from_bytes(layer.whole.read_bytes()[:HEADER_SIZE], layer.whole.stat().st_size)
    first, last = layout.meta_offset // CHUNK, (layout.erofs_end - 1) // CHUNK
    assert last > first
    worker = await pool.place(layer.diff_id)
    assert (await asyncio.to_thread(os.stat, worker.tree(layer.diff_id))).st_nlink == 3
    assert layer.asked == [(0, 1), (first, last - first + 1)]
    assert await asyncio.to_thread(lambda: len(os.listdir(worker.tree(layer.diff_id) / "d"))) == MANY
    assert len(layer.asked) == 2
    assert layer.chunks is not None
    with layer.chunks.open("r+b") as marks:  # the layerstore found a chunk of it damaged
        marks.seek(last)
        marks.write(b"\0")
    await asyncio.to_thread(os.stat, worker.tree(layer.diff_id) / "d" / "00007")
    assert (await pool.stats())[layer.diff_id].failed == 0
    names = await asyncio.to_thread(lambda: os.listdir(worker.tree(layer.diff_id) / "d"))
    assert len(names) == MANY
    assert layer.asked[2:] == [(last, 1)], "filled again before anything else was read"


@pytest.mark.parametrize("view", ["file", "tree"])
async def test_reads_wait_over_a_restart_of_the_layerstore(tmp_path: Path, rng: random.Random, view: str) -> None:
    source = FillSource(tmp_path)
    layer = source.add(tars.tar_of({"file": rng.randbytes(2 * CHUNK)}), partial=True)
    async with running(tmp_path, source) as pool:
        async with source.serving():
            worker = await pool.place(layer.diff_id)
            path = worker.tree(layer.diff_id) / "file" if view == "tree" else worker.file(layer.diff_id)
            size = (await asyncio.to_thread(os.stat, path)).st_size
            layer.gate.clear()
            layer.questioned.clear()
            reading = await asyncio.create_subprocess_exec(sys.executable, "-c", READ, path, stdout=subprocess.PIPE)
            await layer.questioned.wait()
        layer.gate.set()
        asked = len(layer.asked)
        async with source.serving():
            assert (await reading.communicate())[0] == b"%d" % size
            assert len(layer.asked) > asked, "asked again"
            found = (await pool.stats())[layer.diff_id]
            assert found.waits > 0
            assert found.wait_s > 0
            assert found.failed == 0


async def test_after_the_deadline_reads_fail(tmp_path: Path, rng: random.Random) -> None:
    source = FillSource(tmp_path)
    layer = source.add(tars.tar_of({"file": rng.randbytes(2 * CHUNK)}), partial=True)
    async with running(tmp_path, source, deadline=1.0) as pool:
        worker = await pool.place(layer.diff_id)
        path = worker.tree(layer.diff_id) / "file"
        async with source.serving():
            assert (await asyncio.to_thread(os.stat, path)).st_size == 2 * CHUNK
            waits = (await pool.stats())[layer.diff_id].waits
            layer.gate.clear()
            with pytest.raises(OSError, match="Input/output"):
                await asyncio.to_thread(path.read_bytes)
            assert pool.faults(layer.diff_id) > 0
            found = (await pool.stats())[layer.diff_id]
            assert found.failed == pool.faults(layer.diff_id)
            assert found.waits - waits < found.failed, "the kernel tried again, and that failed at once"
            layer.gate.set()
            assert len(await _read_at_last(path)) == 2 * CHUNK, "a failure is not for ever"
            layer.broken = True
        with pytest.raises(OSError, match="Input/output"):
            await asyncio.to_thread((worker.tree("sha256:" + "0" * 64)).stat)


async def _read_at_last(path: Path) -> bytes:
    """The file, as soon as it can be read."""
    async with asyncio.timeout(30):
        while True:
            try:
                return await asyncio.to_thread(path.read_bytes)
            except OSError:
                await asyncio.sleep(0.05)


async def test_layers_that_nobody_has_are_no_names(source: FillSource, pool: FusedWorkers) -> None:
    layer = source.add(tars.tar_of({"a": b"a"}))
    worker = await pool.place(layer.diff_id)
    missing = "sha256:" + "0" * 64

    def look() -> None:
        for path in (
            worker.tree(missing),
            worker.file(missing),
            worker.mountpoint / "t" / "x",
            worker.mountpoint / "x",
        ):
            with pytest.raises(FileNotFoundError):
                path.stat()
        with pytest.raises(FileNotFoundError):
            (worker.tree(layer.diff_id) / "b").stat()

    await asyncio.to_thread(look)
    later = source.add(tars.tar_of({"b": b"b"}))
    source.layers[missing] = later  # a file of another layer under that name
    with pytest.raises(OSError, match="Input/output"):
        await asyncio.to_thread(worker.tree(missing).stat)


def damaged(layer: SourceLayer, old: bytes, new: bytes) -> None:
    """Change the metadata of a layer's file; it belongs to this test."""
    data = bytearray(layer.whole.read_bytes())
    start = layout_from_bytes(bytes(data[:HEADER_SIZE]), len(data)).meta_offset
    at = data.index(old, start)
    data[at : at + len(old)] = new
    layer.whole.write_bytes(data)


async def test_a_hostile_index_is_an_error_to_whoever_meets_it(source: FillSource, pool: FusedWorkers) -> None:
    """Names out of the way, types that lie; the rest of the layer, and other layers, are as they were."""
    layer = source.add(tars.tar_of({"bad": None, "bad/name": b"n", "good": b"good", "lies": b"", "z": None}))
    damaged(layer, b"name", b"na/e")
    data = layer.whole.read_bytes()
    layout = layout_from_bytes(data[:HEADER_SIZE], len(data))
    # The entry of "lies", the last but one in the root's block, says that it is a directory.
    entry = data.index(b"...badgoodliesz", layout.meta_offset) - 2 * 12
    layer.whole.write_bytes(data[: entry + 10] + b"\2" + data[entry + 11 :])
    worker = await pool.place(layer.diff_id)
    tree = worker.tree(layer.diff_id)

    def look() -> None:
        for path in (tree / "bad" / "name", tree / "lies"):
            with pytest.raises(OSError, match="Input/output"):
                path.stat()
        with pytest.raises(OSError, match="Input/output"):
            os.listdir(tree / "bad")
        assert (tree / "good").read_bytes() == b"good"

    await asyncio.to_thread(look)
    assert pool.faults(layer.diff_id) == (await pool.stats())[layer.diff_id].failed >= 3
    assert worker.alive


async def test_files_of_what_is_not_mounted_are_closed(tmp_path: Path, source: FillSource, pool: FusedWorkers) -> None:
    """The kernel remembers names long after the last mount; the space on disk must not wait for it."""
    layer = source.add(tars.tar_of({"file": b"content", "other": b"o"}), partial=True)
    worker = await pool.place(layer.diff_id)
    tree = worker.tree(layer.diff_id)
    assert await asyncio.to_thread((tree / "file").read_bytes) == b"content"
    assert open_files(worker, tmp_path)
    held = await asyncio.to_thread((tree / "other").open, "rb")
    with held:
        await worker.release(layer.diff_id)
        assert open_files(worker, tmp_path), "somebody reads"
        assert await asyncio.to_thread(held.read) == b"o"
    await asyncio.to_thread(os.listdir, worker.mountpoint)  # release of a file has no answer; this comes behind it
    assert open_files(worker, tmp_path) == []
    assert await asyncio.to_thread((tree / "other").read_bytes) == b"o", "and are opened again"
    assert await asyncio.to_thread(worker.file(layer.diff_id).read_bytes) == layer.whole.read_bytes()
    assert list_mounts(str(worker.mountpoint))
