"""Answering peers who want chunks; see :mod:`afs.layerstore.chunkwire`.

A reader on another node waits for each answer, so what is at hand does not go through the event loop. A few threads wait in
epoll_wait(2) for questions, and the thread that gets one reads the chunk and sends it. Measured on a 2-core VM while a
program starts from a peer: a question took the event loop and one thread 1.4 ms and 1.1 ms of CPU, most of which was going
from one to the other and back. The event loop has what these threads cannot do: it finds layers, leases and repairs them.

A thread that has sent a chunk goes on with the next question of the connection, if that came with the first.

State: ``_connections`` has all connections by descriptor. A connection is armed for one event (``EPOLLONESHOT``) and belongs to
the thread that gets it, or to the event loop while that reads the answer, until it is armed again. Dictionaries change by
single operations, which the interpreter does not interrupt. Nobody but the owner closes a connection; the event loop shuts
down those whose question is not whole after ``IDLE_S`` or that have not taken an answer after ``SEND_S``, which is an event to
their owner. Threads wait for disks only: what a peer does not take at once is sent when it can.
"""

import asyncio
import contextlib
import errno
import functools
import logging
import os
import select
import socket
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from dataclasses import dataclass, replace
from typing import Protocol

from afs.core.errors import AfsError, FailedPrecondition, InvalidArgument, status_of
from afs.layerstore.chunkwire import MOST_AHEAD, QUESTION_SIZE, Question, pack_chunk, pack_error, parse_question

log = logging.getLogger(__name__)
IDLE_S = 300.0
SEND_S = 60.0
_MOST = 1024  # connections
_THREADS = 8  # reads of the disk at a time
_MOST_OF_ONE = 256  # of them, by address: a layerstore has 64 questions under way at most
_OF_THE_DISK = (errno.EIO, errno.EBADMSG, errno.EUCLEAN)
_SWEEPS = 4  # looks for silent connections in the shorter of the two times


class File(Protocol):
    """An open file; it stays open while somebody has this."""

    def fileno(self) -> int:
        """Its descriptor."""
        ...


@dataclass(frozen=True, slots=True)
class Range:
    """*length* bytes at *offset* of a file: a chunk."""

    file: File
    offset: int
    length: int


# Gives a chunk, or raises an AfsError for the asker. Called on the event loop.
Read = Callable[[Question], Awaitable[bytes]]
# Where a chunk is, if that is known and it was compared; else None. Called in any thread, and may wait for the disk.
Find = Callable[[Question], Range | None]


def find_nothing(question: Question) -> Range | None:
    """Everything is the event loop's."""
    return None


@contextlib.asynccontextmanager
async def serving_chunks(host: str, port: int, read: Read, find: Find = find_nothing) -> AsyncIterator[int]:
    """Answer on *host* and *port* (0: the kernel's choice) with what *find* finds, or else *read* gives; the port."""
    (family, _, _, _, address), *_ = await asyncio.get_running_loop().getaddrinfo(
        host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )
    try:
        listener = socket.create_server(address, family=family, backlog=128)
    except OSError as error:
        raise FailedPrecondition(f"cannot listen on {host}:{port} for chunks: {error.strerror}") from None
    with listener:
        listener.setblocking(False)
        server = _Server(read, find)
        tasks = [
            asyncio.create_task(server.accept(listener), name=f"chunks on {host}:{port}"),
            asyncio.create_task(server.sweep(), name="silent connections for chunks"),
        ]
        try:
            yield listener.getsockname()[1]
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
            await server.close()


class _Unreadable(Exception):
    """The chunk cannot be read any more, though it was before."""


class _Connection:
    """Its questions as far as they came, and what is to be sent: bytes, then a range of a file."""

    __slots__ = ("got", "head", "host", "questions", "range", "sent", "since", "sock", "wanted")

    def __init__(self, opened: socket.socket, host: str) -> None:
        self.sock = opened
        self.host = host
        self.questions = bytearray(QUESTION_SIZE * MOST_AHEAD)
        self.got = 0  # of them
        self.wanted: Question | None = None  # what is answered
        self.head = b""
        self.range: Range | None = None
        self.sent = 0  # of both
        self.since = time.monotonic()

    @property
    def is_sending(self) -> bool:
        return bool(self.head)

    def next(self) -> Question | None:
        """The first of the questions, if it is whole. Raises InvalidArgument."""
        if self.got < QUESTION_SIZE:
            return None
        self.wanted = parse_question(bytes(self.questions[:QUESTION_SIZE]))
        return self.wanted

    def answer(self, head: bytes, range_: Range | None) -> None:
        """What is to be sent from now on for the first of the questions."""
        self.head, self.range, self.sent = head, range_, 0
        self.questions[: self.got - QUESTION_SIZE] = self.questions[QUESTION_SIZE : self.got]
        self.got -= QUESTION_SIZE
        self.since = time.monotonic()

    def receive(self) -> bool:
        """Whether a question is whole. Raises EOFError, OSError."""
        try:
            count = self.sock.recv_into(memoryview(self.questions)[self.got :])
        except BlockingIOError:
            return False
        if not count:
            raise EOFError
        if not self.got:
            self.since = time.monotonic()
        self.got += count
        return self.got >= QUESTION_SIZE

    def send(self) -> bool:
        """Whether all is sent. Raises _Unreadable, OSError."""
        try:
            while self.sent < len(self.head):
                more = socket.MSG_MORE if self.range is not None else 0
                self.sent += self.sock.send(memoryview(self.head)[self.sent :], more)
            if self.range is not None:
                while (done := self.sent - len(self.head)) < self.range.length:
                    self.sent += self._send_file(self.range, done)
        except BlockingIOError:
            return False
        self.head, self.range, self.since = b"", None, time.monotonic()
        return True

    def _send_file(self, range_: Range, done: int) -> int:
        try:
            left = range_.length - done
            count = os.sendfile(self.sock.fileno(), range_.file.fileno(), range_.offset + done, left)
        except OSError as error:
            if error.errno in _OF_THE_DISK:
                raise _Unreadable(error.strerror) from error
            raise
        if not count:
            raise _Unreadable("the file is shorter than it was")
        return count


class _Server:
    def __init__(self, read: Read, find: Find) -> None:
        self._read = read
        self._find = find
        self._loop = asyncio.get_running_loop()
        self._connections: dict[int, _Connection] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._epoll = select.epoll()
        self._end = os.eventfd(0, os.EFD_CLOEXEC)
        self._epoll.register(self._end, select.EPOLLIN)  # never read, so every thread sees it
        self._threads = [
            threading.Thread(target=self._serve, name=f"chunks-{number}", daemon=True) for number in range(_THREADS)
        ]
        for thread in self._threads:
            thread.start()

    async def close(self) -> None:
        """End all that is under way."""
        os.eventfd_write(self._end, 1)
        for thread in self._threads:
            await asyncio.to_thread(thread.join)
        for task in self._tasks:  # the threads start no more of them
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for connection in self._connections.values():
            connection.sock.close()
        self._epoll.close()
        os.close(self._end)

    # On the event loop

    async def accept(self, listener: socket.socket) -> None:
        """Take connections."""
        while True:
            try:
                opened, (host, *_) = await self._loop.sock_accept(listener)
            except OSError as error:  # such as EMFILE, or one that was gone before it was accepted
                log.error("cannot accept a connection for chunks: %s", error)
                await asyncio.sleep(0.1)
                continue
            of_host = sum(connection.host == host for connection in list(self._connections.values()))
            if len(self._connections) >= _MOST or of_host >= _MOST_OF_ONE:
                log.warning("%d connections for chunks: refusing %s", len(self._connections), host)
                opened.close()
                continue
            try:
                opened.setblocking(False)
                opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self._connections[opened.fileno()] = _Connection(opened, host)
                self._epoll.register(opened, select.EPOLLIN | select.EPOLLONESHOT)
            except OSError as error:  # the kernel has no room for another one
                log.error("cannot serve a connection for chunks: %s", error)
                self._connections.pop(opened.fileno(), None)
                opened.close()

    async def sweep(self) -> None:
        """Let go who is silent or takes nothing; they connect again when they want something."""
        while True:
            await asyncio.sleep(min(IDLE_S, SEND_S) / _SWEEPS)
            now = time.monotonic()
            for connection in list(self._connections.values()):
                # While the event loop reads the answer the question is whole and nothing is sent: that may take long.
                is_reading = connection.got >= QUESTION_SIZE and not connection.is_sending
                if not is_reading and now - connection.since > (SEND_S if connection.is_sending else IDLE_S):
                    with contextlib.suppress(OSError):  # closed just now
                        connection.sock.shutdown(socket.SHUT_RDWR)

    def _start(self, work: Callable[[], Coroutine[None, None, None]]) -> None:
        task = asyncio.create_task(work(), name="chunk")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _look(self, wanted: Question) -> None:
        try:
            await self._read(wanted)
        except AfsError as error:
            log.info("chunks: %s", error.line)

    async def _answer(self, connection: _Connection, wanted: Question) -> None:
        try:
            data = await self._read(wanted)
        except Exception as error:
            if not isinstance(error, AfsError):
                log.error(
                    "chunk %d of layer %s: %s", wanted.index, wanted.diff_id, status_of(error).grpc, exc_info=error
                )
            connection.answer(pack_error(error), None)
        else:
            connection.answer(pack_chunk(len(data)) + data, None)
        self._arm(connection, select.EPOLLOUT)

    # In any thread

    def _arm(self, connection: _Connection, event: int) -> None:
        self._epoll.modify(connection.sock, event | select.EPOLLONESHOT)

    def _serve(self) -> None:
        while True:
            for fd, _ in self._epoll.poll(maxevents=1):
                if fd == self._end:
                    return
                connection = self._connections[fd]
                try:
                    self._go_on(connection)
                except Exception as error:
                    if isinstance(error, _Unreadable):
                        # As if its bytes had been wrong: it is looked at once more, and repaired.
                        assert connection.wanted is not None
                        wanted = replace(connection.wanted, was_bad=True)
                        log.error("chunk %d of layer %s: %s", wanted.index, wanted.diff_id, error)
                        self._loop.call_soon_threadsafe(self._start, functools.partial(self._look, wanted))
                    elif not isinstance(error, (OSError, EOFError, InvalidArgument)):  # a mistake of ours
                        log.exception("chunks for %s", connection.host)
                    elif not isinstance(error, EOFError) or connection.is_sending:
                        log.info("chunks for %s: %s", connection.host, error)
                    del self._connections[fd]
                    connection.sock.close()

    def _go_on(self, connection: _Connection) -> None:
        """After an event: send what is left, or receive questions; then answer what was asked."""
        done = connection.send() if connection.is_sending else connection.receive()
        while done and (wanted := connection.next()) is not None:
            found = self._find(wanted)
            if found is None:
                self._loop.call_soon_threadsafe(self._start, functools.partial(self._answer, connection, wanted))
                return
            connection.answer(pack_chunk(found.length), found)
            done = connection.send()
        self._arm(connection, select.EPOLLOUT if connection.is_sending else select.EPOLLIN)
