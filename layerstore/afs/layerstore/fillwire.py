"""What ``afs_fused`` and the layerstore say to each other over a unix socket, and the asking side.

One JSON object per line each way; ``id`` pairs answers with questions, which may overtake each other.

- ``{"id": 1, "op": "open", "diff_id": D}`` -> ``{"id": 1, "size": bytes, "chunk_size": bytes, "data": path, "chunks": path}``;
  ``chunks`` is "" when the layer is complete, else it is in the directory of ``data``.
- ``{"id": 2, "op": "fill", "diff_id": D, "first": i, "count": n}`` -> ``{"id": 2}`` once the chunks are in ``data``.
- Failures: ``{"id": 2, "error": message, "errno": number}``.

No gRPC here: afs_fused has to be small and to outlive its peers.
"""

import asyncio
import contextlib
import json
import logging
from typing import Any

log = logging.getLogger(__name__)
MAX_LINE = 1 << 16


class FillError(Exception):
    """The layerstore answered with an error, or not in time; *errno* is for the reader."""

    def __init__(self, message: str, number: int) -> None:
        self.errno = number
        super().__init__(message)


def encode(message: dict[str, Any]) -> bytes:
    """One line."""
    return json.dumps(message, separators=(",", ":")).encode() + b"\n"


def decode(line: bytes) -> dict[str, Any]:
    """The object of one line; ValueError if it is none."""
    value = json.loads(line)
    if not isinstance(value, dict):
        raise ValueError("not an object")  # noqa: TRY004 - as json.loads does
    return value


class FillClient:
    """Asks the layerstore at *path*. While it is away, questions wait and are asked again, up to *deadline* seconds.

    State: ``_waiting`` maps ids to futures. ``_writer`` is None between connections; ``_connecting`` guards its creation.
    A lost connection fails all futures with ConnectionError, and each asker asks again on the next connection.
    """

    def __init__(self, path: str, deadline: float) -> None:
        self._path = path
        self._deadline = deadline
        self._waiting: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._next = 0
        self._writer: asyncio.StreamWriter | None = None
        self._connecting = asyncio.Lock()
        self._reading: asyncio.Task[None] | None = None

    async def ask(self, **message: object) -> dict[str, Any]:
        """The answer to *message*; FillError on failure or after the deadline (ETIMEDOUT)."""
        try:
            async with asyncio.timeout(self._deadline):
                answer = await self._ask_until_answered(message)
        except TimeoutError:
            raise FillError(f"layerstore at {self._path} did not answer within {self._deadline:.0f} s", 110) from None
        if "error" in answer:
            raise FillError(str(answer["error"]), int(answer.get("errno", 5)))
        return answer

    async def _ask_until_answered(self, message: dict[str, object]) -> dict[str, Any]:
        pause = 0.02
        while True:
            try:
                return await self._ask_once(message)
            except OSError as error:
                log.info("layerstore at %s: %s; asking again", self._path, error)
                await asyncio.sleep(pause)
                pause = min(pause * 2, 0.5)

    async def _ask_once(self, message: dict[str, object]) -> dict[str, Any]:
        async with self._connecting:
            if self._writer is None:
                reader, self._writer = await asyncio.open_unix_connection(self._path, limit=MAX_LINE)
                self._reading = asyncio.create_task(self._read(reader))
            writer = self._writer
        self._next += 1
        number = self._next
        future: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._waiting[number] = future
        try:
            writer.write(encode({"id": number, **message}))
            return await future
        finally:
            self._waiting.pop(number, None)

    async def _read(self, reader: asyncio.StreamReader) -> None:
        try:
            while line := await reader.readline():
                answer = decode(line)
                future = self._waiting.get(int(answer["id"]))
                if future is not None and not future.done():
                    future.set_result(answer)
        except (OSError, ValueError, KeyError) as error:
            log.warning("layerstore at %s: %s", self._path, error)
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(ConnectionResetError("connection lost"))

    async def close(self) -> None:
        """Close the connection."""
        if self._reading is not None:
            self._reading.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._reading
        if self._writer is not None:
            self._writer.close()
            self._writer = None
