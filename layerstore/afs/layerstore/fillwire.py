"""What ``afs_fused`` and the layerstore say to each other over a unix socket, and the asking side.

One JSON object per line each way; ``id`` pairs answers with questions, which may overtake each other.

- ``{"id": 1, "op": "open", "diff_id": D}`` -> ``{"id": 1, "size": bytes, "chunk_size": bytes, "data": path, "chunks": path}``;
  ``chunks`` is "" when the layer is complete, else it is in the directory of ``data``.
- ``{"id": 2, "op": "fill", "diff_id": D, "first": i, "count": n}`` -> ``{"id": 2}`` once the chunks are in ``data``.
- ``{"id": 3, "op": "watch"}`` -> ``{"id": 3}``, and from then on, without a question:
  ``{"ahead": D, "ranges": [[offset, bytes], ...]}``, what came of a layer before anybody asked for it. The snapshotter watches.
- Failures: ``{"id": 2, "error": message, "errno": number}``.

No gRPC here: afs_fused has to be small and to outlive its peers.
"""

import asyncio
import json
import logging
from typing import Any

from typing_extensions import override

log = logging.getLogger(__name__)
MAX_LINE = 1 << 16


class Lines:
    """Puts lines together of what comes."""

    def __init__(self) -> None:
        self._rest = b""

    def of(self, data: bytes) -> list[bytes]:
        """The lines that *data* ends; ValueError if one becomes longer than ``MAX_LINE``."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > MAX_LINE:
            raise ValueError("a line is too long")
        return lines


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


class _Answers(asyncio.Protocol):
    """One connection: gives answers to *waiting*, by id."""

    def __init__(self, name: str, waiting: dict[int, asyncio.Future[dict[str, Any]]]) -> None:
        self._name = name
        self._waiting = waiting
        self._lines = Lines()
        self.transport: asyncio.Transport | None = None

    @override
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    @override
    def data_received(self, data: bytes) -> None:
        try:
            for line in self._lines.of(data):
                answer = decode(line)
                future = self._waiting.get(int(answer["id"]))
                if future is not None and not future.done():
                    future.set_result(answer)
        except (ValueError, KeyError, TypeError) as error:
            log.warning("layerstore at %s: %s", self._name, error)
            if self.transport is not None:
                self.transport.abort()

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        self.transport = None
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(ConnectionResetError("connection lost"))


class FillClient:
    """Asks the layerstore at *path*. While it is away, questions wait and are asked again, up to *deadline* seconds.

    State: ``_waiting`` maps ids to futures. ``_answers`` is the connection, with a transport as long as that lives;
    ``_connecting`` guards its creation. A lost connection fails all futures with ConnectionError, and each asker asks
    again on the next connection.
    """

    def __init__(self, path: str, deadline: float) -> None:
        self._path = path
        self._deadline = deadline
        self._waiting: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._next = 0
        self._answers = _Answers(path, self._waiting)
        self._connecting = asyncio.Lock()

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
        transport = self._answers.transport or await self._connect()
        self._next += 1
        number = self._next
        future: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._waiting[number] = future
        try:
            transport.write(encode({"id": number, **message}))
            return await future
        finally:
            self._waiting.pop(number, None)

    async def _connect(self) -> asyncio.Transport:
        async with self._connecting:
            if self._answers.transport is None:
                loop = asyncio.get_running_loop()
                _, self._answers = await loop.create_unix_connection(
                    lambda: _Answers(self._path, self._waiting), self._path
                )
            if self._answers.transport is None:
                raise ConnectionResetError("connection lost")
            return self._answers.transport

    async def close(self) -> None:
        """Close the connection."""
        if self._answers.transport is not None:
            self._answers.transport.abort()
            await asyncio.sleep(0)  # it is closed in the next round of the event loop
