"""What afs_fused is made of, without a kernel: counting lookups, waiting for chunks, the control socket, the loop."""

import asyncio
import errno
import os
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace

import pyfuse3
import pytest

from afs.core.errors import Unavailable
from afs.layerstore.fillwire import FillClient, FillError
from afs.snapshotter import fusedlayer, fusedloop
from afs.snapshotter.fusedfs import LayerFiles
from afs.snapshotter.fusedlayer import ServedLayer
from afs.snapshotter.fusedwire import ReadStats, ask, serving
from tests.testbed import tars
from tests.testbed.fillsource import CHUNK, FillSource, SourceLayer
from tests.testbed.layernodes import Clock

TREES = 3  # inode of the directory of trees


@pytest.fixture
async def source(tmp_path: Path) -> AsyncIterator[FillSource]:
    """Serves layers."""
    found = FillSource(tmp_path)
    async with found.serving():
        yield found


@pytest.fixture
async def client(source: FillSource) -> AsyncIterator[FillClient]:
    """Asks it."""
    opened = FillClient(str(source.socket), 5.0)
    yield opened
    await opened.close()


@pytest.fixture
def layer(source: FillSource) -> SourceLayer:
    """Two chunks, none of them here."""
    return source.add(tars.tar_of({"d": None, "d/file": b"f" * CHUNK}), partial=True)


def served(layer: SourceLayer, client: FillClient, tmp_path: Path) -> ServedLayer:
    """The layer, not open yet."""
    return ServedLayer(layer.diff_id, 1, client, str(tmp_path))


async def test_chunks_are_asked_for_when_they_are_read(layer: SourceLayer, client: FillClient, tmp_path: Path) -> None:
    one = served(layer, client, tmp_path)
    whole = layer.whole.read_bytes()
    with one.held():
        await one.open()
        assert await one.read(10, 20) == whole[10:30]
        assert await one.read(CHUNK - 5, 10) == whole[CHUNK - 5 : CHUNK + 5]
        assert await one.read(0, CHUNK) == whole[:CHUNK]
        assert layer.asked == [(0, 1), (1, 1)]
        with pytest.raises(Exception, match="wanted"):
            await one.read(len(whole) - 5, 10)
    assert not one.is_open
    assert (one.stats.reads, one.stats.bytes, one.stats.waits) == (3, 20 + 10 + CHUNK, 2)


async def test_filled_elsewhere_is_read_there(layer: SourceLayer, client: FillClient, tmp_path: Path) -> None:
    """The layer was pulled whole meanwhile; fills go to a file that we do not have open."""
    one = served(layer, client, tmp_path)
    with one.held():
        await one.open()
        old = layer.chunks
        assert old is not None
        layer.data, layer.chunks = layer.whole, tmp_path / "other"
        layer.chunks.write_bytes(bytes(old.stat().st_size))
        layer.whole.chmod(0o600)
        assert await one.read(0, 100) == layer.whole.read_bytes()[:100]


async def test_what_failed_late_fails_at_once_for_a_moment(
    layer: SourceLayer, client: FillClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    monkeypatch.setattr(fusedlayer, "time", SimpleNamespace(monotonic=clock))
    one = served(layer, client, tmp_path)
    whole = layer.whole.read_bytes()
    layer.broken = True
    layer.gate.clear()
    with one.held():
        await one.open()
        reading = asyncio.create_task(one.read(0, 10))
        await layer.questioned.wait()
        clock.now += 40
        layer.gate.set()
        with pytest.raises(FillError, match="no chunk"):
            await reading
        layer.broken = False
        for offset, count in ((0, 10), (CHUNK - 10, 20)):  # as the kernel tries again, alone or with what is next to it
            with pytest.raises(FillError, match="no chunk"):
                await one.read(offset, count)
        assert layer.asked == [(0, 1)]
        assert await one.read(CHUNK, 10) == whole[CHUNK : CHUNK + 10], "another chunk may well be there"
        clock.now += 2
        assert await one.read(0, 10) == whole[:10]
        assert layer.asked == [(0, 1), (1, 1), (0, 1)]


async def test_what_failed_at_once_is_asked_for_again(layer: SourceLayer, client: FillClient, tmp_path: Path) -> None:
    one = served(layer, client, tmp_path)
    layer.broken = True
    with one.held():
        await one.open()
        with pytest.raises(FillError, match="no chunk"):
            await one.read(0, 10)
        layer.broken = False
        await asyncio.sleep(one.stats.wait_s)  # as long as that took
        assert await one.read(0, 10) == layer.whole.read_bytes()[:10]


async def test_another_size_is_another_layer(layer: SourceLayer, client: FillClient, tmp_path: Path) -> None:
    one = served(layer, client, tmp_path)
    await one.open()
    one.close()
    layer.whole = layer.data = tmp_path / "longer"
    layer.whole.write_bytes(bytes(100))
    with pytest.raises(FillError, match="another size"):
        await one.open()


async def test_complaints_are_counted_and_logged_once(
    layer: SourceLayer, client: FillClient, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    one = served(layer, client, tmp_path)
    for _ in range(3):
        one.complain(OSError(5, "bad disk"))
    one.complain(OSError(5, "another"))
    assert one.stats.failed == 4
    assert [record.message.partition(": ")[2] for record in caplog.records] == [
        "[Errno 5] bad disk",
        "[Errno 5] another",
    ]
    assert (tmp_path / layer.diff_id[7:]).read_bytes() == b"...."


async def test_a_layer_stays_until_the_kernel_forgot_all_of_it(
    layer: SourceLayer, client: FillClient, tmp_path: Path
) -> None:
    files = LayerFiles(client, str(tmp_path))
    name = layer.diff_id[7:].encode()
    root = await files.lookup(TREES, name, None)
    await files.lookup(TREES, name, None)
    directory = await files.lookup(root.st_ino, b"d", None)
    file = await files.lookup(directory.st_ino, b"file", None)
    assert (await files.lookup(directory.st_ino, b"none", None)).st_ino == 0
    assert (await files.lookup(directory.st_ino, b"..", None)).st_ino == root.st_ino
    opened = await files.open(file.st_ino, os.O_RDONLY, None)
    assert opened.keep_cache
    assert await files.read(opened.fh, CHUNK - 3, 100) == b"fff"
    assert await files.read(opened.fh, CHUNK, 100) == b""
    await files.release(opened.fh)
    await files.forget([(root.st_ino, 2), (directory.st_ino, 1), (file.st_ino, 1)])
    assert [one.lookups for one in files.layers] == [1], "it knows the root, as the parent of the directory"
    await files.forget([(root.st_ino, 1)])
    assert files.layers == []
    for asking in (files.getattr(file.st_ino, None), files.lookup(root.st_ino, b"d", None)):
        with pytest.raises(pyfuse3.FUSEError) as caught:
            await asking
        assert caught.value.errno == errno.ESTALE
    assert (await files.lookup(TREES, name, None)).st_ino != root.st_ino, "numbers are not used again"
    assert files.pending == 0
    for one in files.layers:
        one.close()


async def test_a_layer_that_cannot_be_opened_is_not_kept(
    source: FillSource, client: FillClient, tmp_path: Path
) -> None:
    files = LayerFiles(client, str(tmp_path))
    with pytest.raises(pyfuse3.FUSEError) as caught:
        await files.lookup(TREES, b"0" * 64, None)
    assert caught.value.errno == errno.ENOENT
    assert files.layers == []
    assert (await files.lookup(TREES, b"x", None)).st_ino == 0


async def test_the_control_socket(tmp_path: Path) -> None:
    path = tmp_path / "s"

    def answer(message: dict[str, object]) -> dict[str, object]:
        if message["op"] == "bad":
            raise ValueError("no such thing")
        return {"said": message["op"]}

    with pytest.raises(Unavailable, match="No such file"):
        await ask(path, 5, op="hello")
    async with serving(path, answer):
        assert path.stat().st_mode & 0o777 == 0o600
        assert await ask(path, 5, op="hello") == {"said": "hello"}
        with pytest.raises(Unavailable, match="no such thing"):
            await ask(path, 5, op="bad")
        reader, writer = await asyncio.open_unix_connection(path)
        writer.write(b"[1]\nnonsense\n")
        assert b"not an object" in await reader.readline()
        assert b"Expecting value" in await reader.readline()
        writer.close()
    assert not path.exists()


async def test_a_worker_that_says_nothing_is_unavailable(tmp_path: Path) -> None:
    writers = []

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        await reader.readline()
        if len(writers) > 1:
            writer.close()

    server = await asyncio.start_unix_server(silent, tmp_path / "s")
    with pytest.raises(Unavailable, match="did not answer within"):
        await ask(tmp_path / "s", 0.05, op="hello")
    with pytest.raises(Unavailable, match="0 bytes read"):
        await ask(tmp_path / "s", 5, op="hello")
    server.close()
    writers[0].close()


def test_counts_of_two_workers_add_up() -> None:
    total = ReadStats(1, 2, 3, 0.5, 4)
    total.add(ReadStats(10, 20, 30, 5.0, 40))
    assert total == ReadStats(11, 22, 33, 5.5, 44)


async def test_the_lock_goes_to_another_task_when_its_holder_waits() -> None:
    lock = fusedloop._Lock()
    order: list[str] = []
    gate = asyncio.Event()

    async def answering() -> None:
        for number in range(3):
            async with lock:
                order.append(f"first {number}")
        await gate.wait()

    async def next_in_line() -> None:
        async with lock:
            order.append("second")
            gate.set()

    async with asyncio.TaskGroup() as group, lock:
        group.create_task(answering())
        group.create_task(next_in_line())
        await asyncio.sleep(0)
    assert order == ["first 0", "first 1", "first 2", "second"]
