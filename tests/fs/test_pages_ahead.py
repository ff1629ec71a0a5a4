"""What came ahead of readers is in the page cache before anybody reads it, for layers that EROFS reads from files."""

from __future__ import annotations

import asyncio
import contextlib
import mmap
from typing import TYPE_CHECKING

import pytest

from afs.core.mounts import list_mounts
from afs.snapshotter.pagesahead import PagesAhead, read_ahead
from tests.testbed import capabilities, tars
from tests.testbed.fillsource import CHUNK, FillSource
from tests.testbed.ourmounts import Kind, layer_mounts
from tests.testbed.pagecache import resident

if TYPE_CHECKING:
    import random
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    from afs.snapshotter.layermounts import LayerMounts
    from afs.snapshotter.pagesahead import Ranges
    from tests.testbed.fillsource import SourceLayer

pytestmark = pytest.mark.root
PAGES = CHUNK // mmap.PAGESIZE


@pytest.fixture
def source(tmp_path: Path) -> Iterator[FillSource]:
    """Layers, and a look that nothing stays mounted."""
    capabilities.require("fuse")
    yield FillSource(tmp_path)
    assert list_mounts(str(tmp_path)) == []


@contextlib.asynccontextmanager
async def mounting(source: FillSource, kind: Kind) -> AsyncIterator[LayerMounts]:
    """Layer mounts that are read ahead of."""
    async with layer_mounts(source, kind.backend) as mounts:
        task = asyncio.create_task(PagesAhead(source.socket, mounts).run())
        await source.watched.wait()
        try:
            yield mounts
        finally:
            task.cancel()
            await asyncio.wait([task])
            source.watched.clear()


def kind_of(name: str, directory: Path) -> Kind:
    """A way to mount that works here."""
    kind = Kind(name)
    kind.require(directory)
    return kind


async def cached(path: Path, chunk: int) -> None:
    """Wait until the kernel has all pages of a chunk."""
    async with asyncio.timeout(30):
        while not all((await asyncio.to_thread(resident, path))[chunk * PAGES : (chunk + 1) * PAGES]):  # noqa: ASYNC110
            await asyncio.sleep(0.001)


def a_layer(source: FillSource, rng: random.Random) -> SourceLayer:
    """Nine chunks, none of them here."""
    return source.add(tars.tar_of({"file": rng.randbytes(8 * CHUNK)}), partial=True)


async def test_chunks_that_came_ahead_are_read_without_asking(
    tmp_path: Path, source: FillSource, rng: random.Random
) -> None:
    layer, kind = a_layer(source, rng), kind_of("erofs-file-lazy", tmp_path)
    async with mounting(source, kind) as mounts:
        layer.fill(3, 2)
        source.tell(layer.diff_id, [3])  # before it is mounted
        async with mounts.using(layer.diff_id, "") as at:
            assert at.worker is not None
            path = at.worker.file(layer.diff_id)
            await cached(path, 3)
            source.tell(layer.diff_id, [4])
            await cached(path, 4)
            asked = list(layer.asked)
            layer.broken = True  # whoever asks now gets an error
            with (tmp_path / "whole").open("w+b") as whole:
                whole.write(layer.whole.read_bytes())
                whole.seek(3 * CHUNK)
                expected = whole.read(2 * CHUNK)

            def read() -> bytes:
                with path.open("rb", buffering=0) as file:
                    file.seek(3 * CHUNK)
                    return (file.read(CHUNK) or b"") + (file.read(CHUNK // 2) or b"")

            assert await asyncio.to_thread(read) == expected[: CHUNK + CHUNK // 2]
            assert layer.asked[: len(asked)] == asked
            assert not [first for first, count in layer.asked if first in (3, 4) or first + count - 1 in (3, 4)]
            layer.broken = False


async def test_a_new_layerstore_is_watched(
    tmp_path: Path, source: FillSource, rng: random.Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("afs.snapshotter.pagesahead._PAUSE_S", 0.01)
    layer, kind = a_layer(source, rng), kind_of("erofs-file-lazy", tmp_path)
    async with mounting(source, kind) as mounts, mounts.using(layer.diff_id, "") as at:
        source.watched.clear()
        source.drop_watchers()
        await source.watched.wait()
        layer.fill(3, 1)
        source.tell(layer.diff_id, [3])
        assert at.worker is not None
        await cached(at.worker.file(layer.diff_id), 3)


@pytest.mark.parametrize("name", ["erofs-loop-lazy", "tree-lazy"])
async def test_nothing_is_read_ahead_that_nobody_reads_from_there(
    tmp_path: Path, source: FillSource, rng: random.Random, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Path] = []
    monkeypatch.setattr("afs.snapshotter.pagesahead.read_ahead", lambda path, ranges: read.append(path))
    layer, kind = a_layer(source, rng), kind_of(name, tmp_path)
    async with layer_mounts(source, kind.backend) as mounts:
        ahead, taken = PagesAhead(source.socket, mounts), asyncio.Event()
        take = ahead._take

        def noted(diff_id: str) -> Ranges:
            taken.set()
            return take(diff_id)

        monkeypatch.setattr(ahead, "_take", noted)
        async with mounts.using(layer.diff_id, ""):
            task = asyncio.create_task(ahead.run())
            await source.watched.wait()
            layer.fill(3, 1)
            source.tell(layer.diff_id, [3])
            await taken.wait()
            task.cancel()
            await asyncio.wait([task])
    assert read == []


async def test_what_is_never_mounted_is_bounded(source: FillSource, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("afs.snapshotter.pagesahead._MOST", 3)
    async with layer_mounts(source, None) as mounts:
        ahead = PagesAhead(source.socket, mounts)
        for name in "ab":
            ahead._told({"ahead": name, "ranges": [[0, 1], [1, 1]]})
        assert list(ahead._ahead) == ["b"]
        assert ahead._take("b") == [(0, 1), (1, 1)]
        monkeypatch.setattr("afs.snapshotter.pagesahead._FRESH_S", 0.0)
        ahead._told({"ahead": "c", "ranges": [[0, 1]]})
        assert ahead._take("c") == [], "it may have been evicted since"
        assert ahead._count == 0


def test_a_file_that_is_gone_is_no_error(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    read_ahead(tmp_path / "none", [(0, 1)])
    assert "is not read ahead: No such file or directory" in caplog.text
