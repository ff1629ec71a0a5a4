"""Asking peers for chunks; see :mod:`afs.layerstore.chunkwire`.

A question is asked, its answer received and worked on in one go of a thread: each go to a thread and back costs a reader
0.1 ms, and receiving 256 KiB on the event loop would be four wake-ups. The threads are ours alone, for a peer that is silent
holds one until its time is over. Connecting is the event loop's, so that whoever gives up need not wait for it.

State: ``_idle`` has the connections on which nothing is asked, the newest last; it belongs to the event loop. A connection in
use belongs to its thread. Who gives up shuts the connection down, which ends the thread's wait, and waits for the thread: so
nobody works on an answer that nobody wants. A connection that failed is closed. One that the peer had closed while it was
idle is not the peer's failure: the question is asked once more on a new one.
"""

import asyncio
import contextlib
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from afs.core.errors import DeadlineExceeded, Unavailable
from afs.layerstore.chunkwire import ANSWER_SIZE, Question, pack_question, parse_answer, parse_error

T = TypeVar("T")
Address = tuple[str, int]
# What is done with a chunk, in the thread. The bytes are those of the connection: they change with its next answer.
Take = Callable[[memoryview], T]


class _Stale(Exception):
    """The peer closed the connection before it answered a byte."""


class _Connection:
    """Blocking, with the time that is left as the timeout of each system call."""

    def __init__(self, address: Address) -> None:
        self.address = address
        self.name = f"{address[0]}:{address[1]}"
        self.socket: socket.socket | None = None
        self._buffer = bytearray()

    def close(self) -> None:
        if self.socket is not None:
            self.socket.close()
        self.socket = None

    def exchange(self, question: Question, end: float, most: int) -> tuple[memoryview, bool]:
        """The chunk, or an error if true. Raises _Stale, OSError, EOFError, TimeoutError, and DataLoss for nonsense."""
        try:
            self._timed(end).sendall(pack_question(question))
            head = self._receive(ANSWER_SIZE, end)
        except (ConnectionError, EOFError) as error:
            raise _Stale(str(error)) from None
        length, is_error = parse_answer(bytes(head), most)
        return self._receive(length, end), is_error

    def _timed(self, end: float) -> socket.socket:
        left = end - time.monotonic()
        if left <= 0:
            raise TimeoutError
        if self.socket is None:
            raise EOFError("it is closed")
        self.socket.settimeout(left)
        return self.socket

    def _receive(self, length: int, end: float) -> memoryview:
        if len(self._buffer) < length:
            self._buffer = bytearray(length)
        view, got = memoryview(self._buffer)[:length], 0
        while got < length:
            count = self._timed(end).recv_into(view[got:])
            if not count:
                raise EOFError("it closed the connection")
            got += count
        return view


class ChunkClient:
    """At most *at_once* questions at a time, for chunks of at most *chunk_size* bytes; *most* idle connections are kept."""

    def __init__(self, at_once: int, chunk_size: int, most: int = 256) -> None:
        self._chunk_size = chunk_size
        self._most = most
        self._threads = ThreadPoolExecutor(at_once, "chunks")
        self._idle: dict[_Connection, None] = {}

    def close(self) -> None:
        """Close all connections; nothing is being asked any more."""
        for connection in self._idle:
            connection.close()
        self._idle.clear()
        self._threads.shutdown(wait=False)

    async def ask(self, address: Address, question: Question, timeout: float, take: Take[T]) -> T:
        """What *take* makes of the chunk. Raises the peer's error, Unavailable, DeadlineExceeded, and what *take* raises."""
        connection, end = self._of(address), time.monotonic() + timeout
        try:
            if connection.socket is not None:
                with contextlib.suppress(_Stale):
                    return await self._in_thread(connection, question, end, take)
            await _connect(connection, end)
            return await self._in_thread(connection, question, end, take)
        except TimeoutError:
            raise DeadlineExceeded(f"layerstore {connection.name} did not answer within {timeout:.1f} s") from None
        except _Stale as error:
            raise Unavailable(f"layerstore {connection.name} does not answer: {error}") from None
        finally:
            self._keep(connection)

    def _of(self, address: Address) -> _Connection:
        for connection in reversed(self._idle):
            if connection.address == address:
                del self._idle[connection]
                return connection
        return _Connection(address)

    def _keep(self, connection: _Connection) -> None:
        if connection.socket is None:
            return
        self._idle[connection] = None
        while len(self._idle) > self._most:
            oldest = next(iter(self._idle))
            del self._idle[oldest]
            oldest.close()

    async def _in_thread(self, connection: _Connection, question: Question, end: float, take: Take[T]) -> T:
        opened = connection.socket
        working = self._threads.submit(self._ask, connection, question, end, take)
        asking = asyncio.wrap_future(working)
        try:
            return await asyncio.shield(asking)
        except asyncio.CancelledError:
            try:
                if not working.cancel():  # it is not in the queue any more
                    if opened is not None:
                        with contextlib.suppress(OSError):  # closed by the thread just now
                            opened.shutdown(socket.SHUT_RDWR)
                    await asyncio.wait([asking])
            finally:
                connection.close()
            raise

    def _ask(self, connection: _Connection, question: Question, end: float, take: Take[T]) -> T:
        try:
            body, is_error = connection.exchange(question, end, self._chunk_size)
        except BaseException as error:
            connection.close()
            if isinstance(error, (OSError, EOFError)) and not isinstance(error, TimeoutError):
                raise Unavailable(f"layerstore {connection.name} does not answer: {error}") from None
            raise
        if is_error:
            raise parse_error(bytes(body))
        return take(body)


async def _connect(connection: _Connection, end: float) -> None:
    """Open *connection*. Raises TimeoutError, Unavailable."""
    loop, (host, port) = asyncio.get_running_loop(), connection.address
    opened = None
    try:
        async with asyncio.timeout(max(end - time.monotonic(), 0)):
            (family, kind, protocol, _, to), *_ = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            opened = socket.socket(family, kind, protocol)
            opened.setblocking(False)
            await loop.sock_connect(opened, to)
            opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    except BaseException as error:
        if opened is not None:
            opened.close()
        if isinstance(error, OSError) and not isinstance(error, TimeoutError):
            raise Unavailable(f"layerstore {connection.name} does not answer: {error}") from None
        raise
    connection.socket = opened
