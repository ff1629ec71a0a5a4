"""A layerstore's fill socket without a layerstore: layer files, whole or in pieces, for tests of afs_fused."""

from __future__ import annotations

import asyncio
import contextlib
import io
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from afs.layerstore.afslyr.convert import convert
from afs.layerstore.afslyr.layout import CHUNK_SIZE
from afs.layerstore.fillwire import decode, encode

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

CHUNK = CHUNK_SIZE


@dataclass
class SourceLayer:
    """A layer file. While `data` is not `whole`, chunks are copied when they are asked for, once `gate` is set."""

    diff_id: str
    whole: Path
    data: Path
    chunks: Path | None = None
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    asked: list[tuple[int, int]] = field(default_factory=list)
    """(first, count) of each fill."""
    questioned: asyncio.Event = field(default_factory=asyncio.Event)
    """Set by each fill."""
    broken: bool = False
    """Fills are answered with an error."""
    lost: set[int] = field(default_factory=set)
    """The same for fills of these chunks."""

    def fill(self, first: int, count: int) -> None:
        """Copy chunks and mark them."""
        assert self.chunks is not None
        with self.whole.open("rb") as source, self.data.open("r+b") as target, self.chunks.open("r+b") as marks:
            source.seek(first * CHUNK)
            target.seek(first * CHUNK)
            target.write(source.read(count * CHUNK))
            target.flush()
            marks.seek(first)
            marks.write(b"\1" * count)


class FillSource:
    """Answers at `socket` while :meth:`serving` runs; `layers` by diff_id."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.socket = directory / "fill.sock"
        self.layers: dict[str, SourceLayer] = {}
        self.opened: list[str] = []
        self.watched = asyncio.Event()
        self._watching: list[asyncio.StreamWriter] = []

    def add(self, tar: bytes, *, partial: bool = False) -> SourceLayer:
        """A layer made of a tar."""
        whole = self.directory / f"layer{len(self.layers)}"
        made = convert(io.BytesIO(tar).read, whole)
        return self.add_file(made.diff_id, whole, partial=partial)

    def add_file(self, diff_id: str, whole: Path, *, partial: bool = False) -> SourceLayer:
        """A layer file that is there already."""
        layer = self.layers[diff_id] = SourceLayer(diff_id, whole, whole)
        layer.gate.set()
        if partial:
            layer.data = self.directory / f"{whole.name}.data"
            layer.chunks = self.directory / f"{whole.name}.chunks"
            size = whole.stat().st_size
            with layer.data.open("wb") as data:
                data.truncate(size)
            layer.chunks.write_bytes(bytes(-(-size // CHUNK)))
        return layer

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        """Answer while the block runs."""
        tasks: set[asyncio.Task[None]] = set()
        writers: list[asyncio.StreamWriter] = []

        async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writers.append(writer)
            with contextlib.suppress(OSError):
                while line := await reader.readline():
                    task = asyncio.create_task(self._answer(decode(line), writer))
                    tasks.add(task)
                    task.add_done_callback(tasks.discard)

        self.socket.unlink(missing_ok=True)
        server = await asyncio.start_unix_server(connected, self.socket)
        try:
            yield
        finally:
            server.close()
            for writer in writers:
                writer.close()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def drop_watchers(self) -> None:
        """Close their connections."""
        for writer in self._watching:
            writer.close()
        self._watching.clear()

    def tell(self, diff_id: str, chunks: list[int]) -> None:
        """Say that these came ahead of readers."""
        for writer in self._watching:
            writer.write(encode({"ahead": diff_id, "ranges": [(index * CHUNK, CHUNK) for index in chunks]}))

    async def _answer(self, question: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        layer = self.layers.get(question.get("diff_id", ""))
        if question["op"] == "watch":
            self._watching.append(writer)
            self.watched.set()
            answer: dict[str, Any] = {}
        elif layer is None:
            answer = {"error": "no such layer", "errno": 2}
        elif question["op"] == "open":
            self.opened.append(layer.diff_id)
            size = layer.whole.stat().st_size
            answer = {"size": size, "chunk_size": CHUNK, "data": str(layer.data), "chunks": str(layer.chunks or "")}
        else:
            first, count = question["first"], question["count"]
            layer.asked.append((first, count))
            layer.questioned.set()
            await layer.gate.wait()
            failed = layer.broken or not layer.lost.isdisjoint(range(first, first + count))
            answer = {"error": "no chunk", "errno": 5} if failed else {}
            if not failed:
                layer.fill(first, count)
        writer.write(encode({"id": question["id"], **answer}))
