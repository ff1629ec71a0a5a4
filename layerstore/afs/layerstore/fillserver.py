"""The layerstore's end of the fill socket; see :mod:`afs.layerstore.fillwire`.

State: a connection and its questions, each a task, belong to the event loop. Answers are sent by whoever has them, which for
chunks that come from other nodes is the thread that wrote the last one (:class:`~afs.layerstore.filling.Arrivals`): a reader goes on
meanwhile. ``_lock`` guards the sending side; it is held while a socket takes bytes without waiting, and for nothing else.
"""

import asyncio
import contextlib
import errno
import logging
import os
import socket
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from afs.core.digests import check_digest
from afs.core.errors import AfsError, InvalidArgument, status_of
from afs.layerstore.fillahead import Ranges
from afs.layerstore.fillwire import MAX_LINE, Lines, decode, encode
from afs.layerstore.layers import Layers
from afs.layerstore.partial import PartialLayer

log = logging.getLogger(__name__)


@contextlib.asynccontextmanager
async def serving_fills(path: Path, layers: Layers) -> AsyncIterator[None]:
    """Serve the unix socket *path* (mode 0600) while the block runs."""
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as listener:
        old = os.umask(0o177)
        try:
            listener.bind(str(path))
        finally:
            os.umask(old)
        listener.listen()
        listener.setblocking(False)
        accepting = asyncio.create_task(_accept(listener, layers), name=f"fills at {path}")
        try:
            yield
        finally:
            accepting.cancel()
            await asyncio.wait([accepting])
            path.unlink(missing_ok=True)


async def _accept(listener: socket.socket, layers: Layers) -> None:
    loop, connections = asyncio.get_running_loop(), set[asyncio.Task[None]]()
    try:
        while True:
            try:
                opened, _ = await loop.sock_accept(listener)
            except OSError as error:  # such as EMFILE
                log.error("fill socket: %s", error)
                await asyncio.sleep(0.1)
                continue
            task = asyncio.create_task(_Connection(opened, layers).serve())
            connections.add(task)
            task.add_done_callback(connections.discard)
    finally:
        for task in connections:
            task.cancel()
        await asyncio.gather(*connections, return_exceptions=True)


class _Connection:
    def __init__(self, opened: socket.socket, layers: Layers) -> None:
        self._socket = opened
        self._layers = layers
        self._loop = asyncio.get_running_loop()
        self._lock = threading.Lock()
        self._unsent = bytearray()
        self._closed = False

    async def serve(self) -> None:
        """Until the other side closes. Every question is a task, so a slow chunk does not hold up the others."""
        self._socket.setblocking(False)
        try:
            async with asyncio.TaskGroup() as group:
                lines = Lines()
                while data := await self._loop.sock_recv(self._socket, MAX_LINE):
                    for line in lines.of(data):
                        group.create_task(self._answer(decode(line)))
        except* (OSError, ValueError) as errors:
            log.warning("fill socket: %s", errors.exceptions[0])
        finally:
            self._layers.ahead.left(self._tell)
            with self._lock:
                self._closed = True
                self._loop.remove_writer(self._socket)
                self._socket.close()

    async def _answer(self, message: dict[str, Any]) -> None:
        answer = _Answer(self, message.get("id"))
        try:
            answer.give(await self._do(message, answer))
        except AfsError as error:
            log.warning("fill: %s", error.line)
            answer.give({"error": error.line, "errno": status_of(error).errno})
        except OSError as error:
            log.error("fill: %s", error)
            answer.give({"error": str(error), "errno": error.errno or errno.EIO})
        except Exception as error:  # a mistake of ours, at one chunk: the connection has those of all readers
            log.exception("fill")
            answer.give({"error": f"{type(error).__name__}: {error}", "errno": errno.EIO})

    def _tell(self, diff_id: str, ranges: Ranges) -> None:
        self.send(encode({"ahead": diff_id, "ranges": ranges}))

    async def _do(self, message: dict[str, Any], answer: "_Answer") -> dict[str, Any]:
        if message.get("op") == "watch":
            self._layers.ahead.watch(self._tell)
            return {}
        diff_id = check_digest(str(message.get("diff_id")))
        match message.get("op"):
            case "open":
                layer = self._layers.look_up(diff_id)  # mounted, or about to be: that is its lease
                return {
                    "size": layer.layout.file_size,
                    "chunk_size": layer.layout.chunk_size,
                    "data": str(layer.data_path if isinstance(layer, PartialLayer) else layer.path),
                    "chunks": str(layer.map_path) if isinstance(layer, PartialLayer) else "",
                }
            case "fill":
                first, count = message.get("first"), message.get("count")
                if not isinstance(first, int) or not isinstance(count, int):
                    raise InvalidArgument(f"fill of {diff_id}: first and count are numbers")
                await self._layers.fill(diff_id, first, count, beside=True, here=lambda: answer.give({}))
                return {}
            case operation:
                raise InvalidArgument(f"no operation {operation!r}")

    # In any thread

    def send(self, line: bytes) -> None:
        """Send *line*, or keep it until the other side takes it; nothing if it is gone."""
        with self._lock:
            if self._closed:
                return
            if not self._unsent:
                line = line[self._take(line) :]
            if line:
                if not self._unsent:
                    self._loop.call_soon_threadsafe(self._send_later)
                self._unsent += line

    def _take(self, data: bytes) -> int:
        """How many bytes the socket takes now. An error is for who receives to see."""
        try:
            return self._socket.send(data)
        except BlockingIOError:
            return 0
        except OSError:
            return len(data)

    # On the event loop

    def _send_later(self) -> None:
        if not self._closed:
            self._loop.add_writer(self._socket, self._send_rest)

    def _send_rest(self) -> None:
        with self._lock:
            del self._unsent[: self._take(bytes(self._unsent))]
            if not self._unsent:
                self._loop.remove_writer(self._socket)


class _Answer:
    """To question *number* of a connection, once."""

    def __init__(self, connection: _Connection, number: object) -> None:
        self._connection = connection
        self._number = number
        self._given = False

    def give(self, answer: dict[str, Any]) -> None:
        """Send it, unless one was sent. Should two be sent at the same time, the asker takes the first."""
        if not self._given:
            self._given = True
            self._connection.send(encode({"id": self._number, **answer}))
