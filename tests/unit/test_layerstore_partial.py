"""A partial layer: chunks appear once, verified, and a crash is noticed."""

import asyncio
import io
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from typing_extensions import override

from afs.core.digests import sha256_digest
from afs.core.errors import DataLoss, Unavailable
from afs.layerstore.afslyr.check import check_and_sync
from afs.layerstore.afslyr.convert import convert
from afs.layerstore.afslyr.errors import CorruptLayer
from afs.layerstore.afslyr.layout import FOOTER_SIZE, HEADER_AREA, ChunkTable, Layout
from afs.layerstore.afslyr.reader import read_layer
from afs.layerstore.errors import BadChunk, DiskFull
from afs.layerstore.partial import Description, PartialLayer
from afs.layerstore.scheduling import Ticket
from tests.testbed import tars

TAR = tars.tar_of({name: bytes([number]) * 225_000 for number, name in enumerate("abcdef")})
DIFF_ID = sha256_digest(TAR)


class Whole:
    """The complete layer file, to take chunks from; counts what was fetched."""

    def __init__(self, path: Path) -> None:
        convert(io.BytesIO(TAR).read, path)
        self.data = path.read_bytes()
        with path.open("rb") as file:
            self.layout: Layout
            self.table: ChunkTable
            self.layout, self.table = read_layer(file.fileno())
        self.fetched: Counter[int] = Counter()
        self.gate = asyncio.Event()
        self.error: Exception | None = None

    def chunk(self, index: int) -> bytes:
        """Chunk *index*."""
        offset, length = self.table.chunk_range(index, self.layout)
        return self.data[offset : offset + length]

    async def fetch(self, _: PartialLayer, index: int, ticket: Ticket) -> bytes:
        """For `PartialLayer.fill`: waits at the gate."""
        self.fetched[index] += 1
        await self.gate.wait()
        if self.error is not None:
            raise self.error
        return self.chunk(index)

    def create(self, directory: Path, diff_id: str = DIFF_ID, **changes: object) -> PartialLayer:
        """A partial layer of it."""
        given = {
            "size": len(self.data),
            "header": self.data[:HEADER_AREA],
            "table": self.table,
            "footer": self.data[-FOOTER_SIZE:],
        }
        said = Description(**given | changes)  # type: ignore[arg-type]  # tests change single values
        return PartialLayer.create(diff_id, directory, said)


@pytest.fixture(name="whole")
def _whole(tmp_path: Path) -> Whole:
    """The layer."""
    return Whole(tmp_path / "whole")


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Where the partial layer is."""
    (tmp_path / "partial").mkdir()
    return tmp_path / "partial" / DIFF_ID[7:]


def test_a_new_partial_layer_has_nothing(whole: Whole, directory: Path) -> None:
    layer = whole.create(directory)
    assert layer.missing() == list(range(whole.table.count))
    assert layer.data_path.stat().st_size == len(whole.data)
    assert layer.data_path.stat().st_blocks * 512 < 100_000  # sparse
    assert layer.map_path.read_bytes() == bytes(whole.table.count)
    metadata = layer.metadata_chunks()
    assert metadata[0] == 0
    assert metadata[-1] == whole.table.count - 1
    assert [path.name for path in directory.parent.iterdir()] == [directory.name]
    layer.close()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"size": 1 << 18}, CorruptLayer, "file has 262144 bytes, the header says"),
        ({"header": b"x" * HEADER_AREA}, CorruptLayer, "bad magic"),
        ({"header": b""}, CorruptLayer, "bytes of header"),
        ({"table": ChunkTable(b"")}, CorruptLayer, "corrupt layer"),
        ({"table": ChunkTable(b"x" * 32)}, CorruptLayer, "corrupt layer"),
        ({"footer": b""}, CorruptLayer, "corrupt layer"),
        ({"diff_id": "sha256:" + "0" * 64}, DataLoss, f"a peer described layer {DIFF_ID} as sha256:0000"),
    ],
    ids=["size", "magic", "header", "no table", "table", "footer", "diff_id"],
)
def test_a_peer_s_nonsense_leaves_nothing(
    whole: Whole, directory: Path, change: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        whole.create(directory, **change)
    assert not directory.exists()
    layer = whole.create(directory)  # a try later succeeds
    layer.close()


async def test_a_chunk_is_fetched_once_for_all(whole: Whole, directory: Path) -> None:
    layer = whole.create(directory)
    fills = [asyncio.create_task(layer.fill(indices, whole.fetch)) for indices in ([0, 1], [1, 2], [1])]
    await asyncio.sleep(0)
    whole.gate.set()
    await asyncio.gather(*fills)
    assert whole.fetched == {0: 1, 1: 1, 2: 1}
    await layer.fill([0, 1, 2], whole.fetch)
    assert whole.fetched == {0: 1, 1: 1, 2: 1}
    assert [layer.read(index) for index in range(3)] == [whole.chunk(index) for index in range(3)]
    layer.close()


async def test_a_chunk_counts_only_once_it_is_written(
    whole: Whole, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = whole.create(directory)
    seen: list[bool] = []
    real = os.pwrite

    def pwrite(fd: int, data: bytes, offset: int) -> int:
        seen.append(layer.has(1))
        return real(fd, memoryview(data)[:75_000], offset)  # the kernel may write less

    filling = asyncio.create_task(layer.fill([1], whole.fetch))
    await asyncio.sleep(0)
    assert not layer.has(1)
    monkeypatch.setattr(os, "pwrite", pwrite)
    whole.gate.set()
    await filling
    assert len(seen) > 1
    assert not any(seen)
    assert layer.has(1)
    assert layer.read(1) == whole.chunk(1)
    layer.close()


async def test_a_failure_is_for_those_who_wait_and_not_remembered(whole: Whole, directory: Path) -> None:
    layer = whole.create(directory)
    whole.gate.set()
    whole.error = Unavailable("gone")
    results = await asyncio.gather(*(layer.fill([1], whole.fetch) for _ in range(2)), return_exceptions=True)
    assert results == [whole.error] * 2
    assert whole.fetched == {1: 1}
    assert not layer.has(1)
    whole.error = None
    await layer.fill([1], whole.fetch)
    assert layer.has(1)
    layer.close()


async def test_a_full_disk_leaves_the_chunk_missing(
    whole: Whole, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = whole.create(directory)
    whole.gate.set()

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(DiskFull, match=f"^layer {DIFF_ID}: no space left in {directory}$"):
            await layer.fill([1], whole.fetch)
    assert not layer.has(1)
    await layer.fill([1], whole.fetch)
    assert layer.has(1)
    layer.close()


async def test_a_reader_that_gives_up_leaves_the_chunk_to_others(whole: Whole, directory: Path) -> None:
    layer = whole.create(directory)
    impatient, patient = (asyncio.create_task(layer.fill([1], whole.fetch)) for _ in range(2))
    await asyncio.sleep(0)
    impatient.cancel()
    await asyncio.wait([impatient])
    whole.gate.set()
    await patient
    assert whole.fetched == {1: 1}
    await layer.idle()
    layer.close()


async def test_reopening_trusts_only_what_is_on_disk(
    whole: Whole, directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    layer = whole.create(directory)
    whole.gate.set()
    await layer.fill([0, 1, 2], whole.fetch)
    layer.close()
    with (directory / "data").open("r+b") as data:
        data.seek(whole.layout.chunk_size + 5)
        data.write(b"damaged")
    with (directory / "chunks").open("r+b") as chunks:
        chunks.seek(3)
        chunks.write(b"\1")  # marked, but the data was never written
    (directory / "boot").write_text("another boot")  # the machine went down, not only the process
    layer = PartialLayer.open(DIFF_ID, directory)
    assert [layer.has(index) for index in range(4)] == [True, False, True, False]
    assert [record.message for record in caplog.records] == [
        f"layer {DIFF_ID}: chunk {index} was not on disk after a crash" for index in (1, 3)
    ]
    await layer.fill(layer.missing(), whole.fetch)
    assert layer.missing() == []
    check_and_sync(layer.data_path)
    assert layer.data_path.read_bytes() == whole.data
    layer.close()


async def test_a_layer_that_is_not_what_its_name_says_is_not_promoted(whole: Whole, directory: Path) -> None:
    """A peer may lie with a consistent table: only the diff_id tells."""
    layer = whole.create(directory)
    whole.gate.set()
    await layer.fill(layer.missing()[:-1], whole.fetch)
    with pytest.raises(CorruptLayer, match=f"corrupt layer {DIFF_ID}: chunk"):
        check_and_sync(layer.data_path)
    layer.close()


def test_what_cannot_be_reopened(whole: Whole, directory: Path) -> None:
    whole.create(directory).close()
    (directory / "data").write_bytes(b"")
    with pytest.raises(CorruptLayer):
        PartialLayer.open(DIFF_ID, directory)
    (directory / "data").unlink()
    with pytest.raises(FileNotFoundError):
        PartialLayer.open(DIFF_ID, directory)


class PartialMachine(RuleBasedStateMachine):
    """Fill, crash and reopen in any order: what is marked is right, what was filled stays."""

    def __init__(self) -> None:
        super().__init__()
        import tempfile

        self.temporary = tempfile.TemporaryDirectory()
        self.runner = asyncio.Runner()
        top = Path(self.temporary.name)
        self.whole = Whole(top / "whole")
        self.whole.gate.set()
        self.layer = self.whole.create(top / DIFF_ID[7:])
        self.filled: set[int] = set()

    @rule(indices=st.sets(st.integers(0, 5)))
    def fill(self, indices: set[int]) -> None:
        """Ask for some chunks."""
        self.runner.run(self.layer.fill(indices, self.whole.fetch))
        self.filled |= indices

    @rule(indices=st.sets(st.integers(0, 5), min_size=1))
    def fail(self, indices: set[int]) -> None:
        """Ask while nobody answers."""
        self.whole.error = Unavailable("gone")
        try:
            self.runner.run(self.layer.fill(indices, self.whole.fetch))
        except Unavailable:
            assert indices - self.filled
        self.whole.error = None

    @rule(index=st.integers(0, 5))
    def lose(self, index: int) -> None:
        """Crash; one chunk's data did not reach the disk."""
        self.layer.close()
        with self.layer.data_path.open("r+b") as data:
            data.seek(index * self.whole.layout.chunk_size + 2000)
            data.write(b"lost")
        (self.layer.directory / "boot").write_text("another boot")
        self.layer = PartialLayer.open(DIFF_ID, self.layer.directory)
        self.filled.discard(index)

    @invariant()
    def marked_is_right(self) -> None:
        """The map and the data agree with the model."""
        has = {index for index in range(self.layer.table.count) if self.layer.has(index)}
        assert has == self.filled
        assert all(self.layer.read(index) == self.whole.chunk(index) for index in has)

    @override
    def teardown(self) -> None:
        """Give everything back."""
        self.layer.close()
        self.runner.close()
        self.temporary.cleanup()


TestPartialMachine = PartialMachine.TestCase
TestPartialMachine.settings = settings(
    derandomize=True, deadline=None, database=None, max_examples=15, stateful_step_count=12
)


def test_a_chunk_of_another_length_is_refused_whatever_its_digest(whole: Whole, directory: Path) -> None:
    layer = whole.create(directory)
    with pytest.raises(BadChunk):
        layer.put(1, whole.chunk(1)[:5], whole.table.digest(1))
    assert not layer.has(1)
    layer.close()


def test_who_serves_a_partial_layer_cannot_write_it(whole: Whole, directory: Path) -> None:
    """Nor keep others from sealing the file once it is complete."""
    layer = whole.create(directory)
    fd = layer.open_data()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.pwrite(fd, b"x", 0)
    os.close(fd)
    layer.close()
