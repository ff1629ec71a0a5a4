"""The layerstore's end of the fill socket; see :mod:`afs.layerstore.fillwire`."""

import asyncio
import contextlib
import errno
import logging
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from afs.core.digests import check_digest
from afs.core.errors import AfsError, InvalidArgument, status_of
from afs.layerstore.fillwire import MAX_LINE, decode, encode
from afs.layerstore.layers import Layers
from afs.layerstore.partial import PartialLayer

log = logging.getLogger(__name__)


@contextlib.asynccontextmanager
async def serving_fills(path: Path, layers: Layers) -> AsyncIterator[None]:
    """Serve the unix socket *path* (mode 0600) while the block runs."""
    connections: set[asyncio.Task[None]] = set()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        if task is not None:
            connections.add(task)
            task.add_done_callback(connections.discard)
        with contextlib.suppress(asyncio.CancelledError):
            await _serve(layers, reader, writer)

    path.unlink(missing_ok=True)
    old = os.umask(0o177)
    try:
        server = await asyncio.start_unix_server(connected, path, limit=MAX_LINE)
    finally:
        os.umask(old)
    try:
        yield
    finally:
        server.close()
        for task in connections:
            task.cancel()
        await asyncio.gather(*connections, return_exceptions=True)
        path.unlink(missing_ok=True)


async def _serve(layers: Layers, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """One connection: every question is a task, so a slow chunk does not hold up the others."""
    try:
        async with asyncio.TaskGroup() as group:
            while line := await reader.readline():
                group.create_task(_answer(layers, line, writer))
    except* (OSError, ValueError) as errors:
        log.warning("fill socket: %s", errors.exceptions[0])
    finally:
        writer.close()


async def _answer(layers: Layers, line: bytes, writer: asyncio.StreamWriter) -> None:
    message = decode(line)
    try:
        answer = await _do(layers, message)
    except AfsError as error:
        log.warning("fill: %s", error.line)
        answer = {"error": error.line, "errno": status_of(error).errno}
    except OSError as error:
        log.error("fill: %s", error)
        answer = {"error": str(error), "errno": error.errno or errno.EIO}
    except Exception as error:  # a mistake of ours, at one chunk: the connection has those of all readers
        log.exception("fill")
        answer = {"error": f"{type(error).__name__}: {error}", "errno": errno.EIO}
    writer.write(encode({"id": message.get("id"), **answer}))


async def _do(layers: Layers, message: dict[str, Any]) -> dict[str, Any]:
    diff_id = check_digest(str(message.get("diff_id")))
    match message.get("op"):
        case "open":
            layer = layers.look_up(diff_id)  # mounted, or about to be: that is its lease
            partial = isinstance(layer, PartialLayer)
            return {
                "size": layer.layout.file_size,
                "chunk_size": layer.layout.chunk_size,
                "data": str(layer.data_path if isinstance(layer, PartialLayer) else layer.path),
                "chunks": str(layer.map_path) if isinstance(layer, PartialLayer) and partial else "",
            }
        case "fill":
            first, count = message.get("first"), message.get("count")
            if not isinstance(first, int) or not isinstance(count, int):
                raise InvalidArgument(f"fill of {diff_id}: first and count are numbers")
            await layers.fill(diff_id, first, count, beside=True)
            return {}
        case operation:
            raise InvalidArgument(f"no operation {operation!r}")
