"""What comes ahead of readers is put into the page cache by a real afs_fused."""

from __future__ import annotations

import asyncio
import mmap
from typing import TYPE_CHECKING

import pytest

from tests.testbed import tars
from tests.testbed.fillsource import CHUNK, FillSource
from tests.testbed.fusedpool import running
from tests.testbed.pagecache import resident

if TYPE_CHECKING:
    import random
    from collections.abc import AsyncIterator
    from pathlib import Path

pytestmark = pytest.mark.root
PAGES = CHUNK // mmap.PAGESIZE


@pytest.fixture
async def source(tmp_path: Path) -> AsyncIterator[FillSource]:
    """Serves layers."""
    found = FillSource(tmp_path)
    async with found.serving():
        yield found


async def cached(path: Path, chunk: int) -> None:
    """Wait until the kernel has all pages of a chunk."""
    async with asyncio.timeout(30):
        while not all((await asyncio.to_thread(resident, path))[chunk * PAGES : (chunk + 1) * PAGES]):  # noqa: ASYNC110
            await asyncio.sleep(0.001)


async def test_chunks_that_came_ahead_are_read_without_asking(
    tmp_path: Path, source: FillSource, rng: random.Random
) -> None:
    layer = source.add(tars.tar_of({"file": rng.randbytes(8 * CHUNK)}), partial=True)
    whole, count = layer.whole.read_bytes(), layer.whole.stat().st_size // CHUNK
    async with running(tmp_path, source, store_pages=True) as pool:
        worker = await pool.place(layer.diff_id)
        path = worker.file(layer.diff_id)
        layer.fill(3, 2)
        assert (await asyncio.to_thread(path.stat)).st_size == len(whole)  # looked up, and so opened at the source
        source.tell(layer.diff_id, [3])  # before the kernel has it open
        file = await asyncio.to_thread(path.open, "rb", 0)
        try:
            await cached(path, 3)
            source.tell(layer.diff_id, [4, 5, -1, count + 7])
            await cached(path, 4)
            pages = await asyncio.to_thread(resident, path)
            assert not any(pages[: 3 * PAGES])
            assert not any(pages[5 * PAGES : 6 * PAGES]), "it is not here, whatever was said"
            before = (await pool.stats())[layer.diff_id]

            def read() -> bytes:
                file.seek(3 * CHUNK)
                return file.read(2 * CHUNK) or b""

            assert await asyncio.to_thread(read) == whole[3 * CHUNK : 5 * CHUNK]
            after = (await pool.stats())[layer.diff_id]
            assert after.bytes - before.bytes <= CHUNK, "what the kernel reads ahead of that, and nothing else"
            layer.fill(count, 1)  # the last, which is short
            source.tell(layer.diff_id, [count])
            await cached(path, count)

            def read_end() -> bytes:
                file.seek(count * CHUNK)
                return file.read(CHUNK) or b""

            assert await asyncio.to_thread(read_end) == whole[count * CHUNK :]
            assert (await asyncio.to_thread(path.stat)).st_size == len(whole)
        finally:
            file.close()
        await worker.release(layer.diff_id)


async def test_nothing_is_stored_for_who_reads_past_the_page_cache(
    tmp_path: Path, source: FillSource, rng: random.Random
) -> None:
    layer = source.add(tars.tar_of({"file": rng.randbytes(4 * CHUNK)}), partial=True)
    async with running(tmp_path, source, store_pages=False) as pool:
        worker = await pool.place(layer.diff_id)
        path = worker.file(layer.diff_id)
        file = await asyncio.to_thread(path.open, "rb", 0)
        try:
            layer.fill(1, 1)
            source.tell(layer.diff_id, [1])
            await pool.stats()
            layer.fill(0, 1)
            assert await asyncio.to_thread(file.read, 10)  # answered behind what was told
            assert not any((await asyncio.to_thread(resident, path))[PAGES : 2 * PAGES])
        finally:
            file.close()
        await worker.release(layer.diff_id)
