"""Asking peers for chunks; see :mod:`afs.layerstore.chunkwire`.

The event loop sends the question at once. A few threads wait in epoll_wait(2) for answers: one receives a chunk and works on it
in one go, and the event loop hears of it afterwards. A question that is handed to a thread, which sends it and waits, costs a
reader two more wake-ups of a thread, 0.1 to 0.2 ms each on a 2-core VM; receiving on the event loop would be several of its rounds.

What nobody waits for may be asked for many at a time (:meth:`ChunkClient.begin_run`): the questions go out together, and one
thread takes chunk after chunk as they arrive, in the connection's room for one.

State: ``_idle`` has the connections on which nothing is asked, the newest last; it and the timers belong to the event loop. A
connection is armed for one event (``EPOLLONESHOT``) when a question was sent, and belongs to the thread that gets it until the
event loop is told of the end. Who gives up, or has waited for long enough, shuts the connection down, which is an event, too; so
the end always comes from a thread, and whoever awaited it knows that nobody works on the answer any more. One that failed is
closed. One that the peer had closed while idle is not the peer's failure: :meth:`ChunkClient.ask` asks once more on a new one.
"""

import asyncio
import contextlib
import fcntl
import hashlib
import logging
import os
import select
import socket
import struct
import termios
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

from afs.core.errors import DataLoss, DeadlineExceeded, Unavailable
from afs.core.together import ended
from afs.layerstore.chunkwire import ANSWER_SIZE, Question, pack_question, parse_answer, parse_error

log = logging.getLogger(__name__)
T = TypeVar("T")
Address = tuple[str, int]
# What is done with a chunk and its sha256, in a thread. The bytes are those of the connection: they change with its next answer.
Take = Callable[[memoryview, bytes], T]
_IDLE_S = 60.0  # the other side waits for longer
_THREADS = 4  # more only take the interpreter from each other; they wait for what is done with chunks, for a disk say


class Stale(Unavailable):
    """The peer closed the connection before it answered a byte; it may have done so while nothing was asked."""


class _Connection:
    """Not blocking; *room* for an answer is made with the first. ``left`` counts the answers behind the one that comes."""

    __slots__ = ("address", "buffer", "exchange", "got", "hashed", "left", "length", "name", "room", "sha256", "sock")

    def __init__(self, opened: socket.socket, address: Address, room: int) -> None:
        self.sock = opened
        self.address = address
        self.name = f"{address[0]}:{address[1]}"
        self.room = room
        self.buffer = bytearray()
        self.got = 0
        self.length = 0
        self.left = 0
        self.hashed = 0
        self.sha256 = hashlib.sha256()
        self.exchange: Exchange[Any] | None = None

    def begin(self, exchange: "Exchange[Any]") -> None:
        """Its next questions are these."""
        self.exchange, self.got, self.length, self.left = exchange, 0, 0, len(exchange.takes) - 1
        self.hashed, self.sha256 = ANSWER_SIZE, hashlib.sha256()

    @property
    def is_whole(self) -> bool:
        """Whether the last answer came whole."""
        return not self.left and self.got > 0 and self.got == self.length

    def go_on(self) -> None:
        """To the next answer, of which some may be here."""
        self.buffer[: self.got - self.length] = self.buffer[self.length : self.got]
        self.got, self.length, self.left = self.got - self.length, 0, self.left - 1
        self.hashed, self.sha256 = ANSWER_SIZE, hashlib.sha256()

    def receive(self) -> bool:
        """Whether the answer is whole. Raises OSError, EOFError, and DataLoss for nonsense."""
        if not self.buffer:
            self.buffer = bytearray(self.room)
        view = memoryview(self.buffer)
        while not self._knows_length() or self.got < self.length:
            try:
                count = self.sock.recv_into(view[self.got : self.length or None])
            except BlockingIOError:
                self._hash(view)  # while the rest is on its way
                return False
            if not count:
                raise EOFError("it closed the connection")
            self.got += count
        self._hash(view)
        return True

    def _knows_length(self) -> bool:
        if not self.length and self.got >= ANSWER_SIZE:
            self.length = ANSWER_SIZE + self._said()[0]
        if self.got > self.length > 0 and not self.left:
            raise DataLoss(f"{self.got - self.length} bytes came behind an answer")
        return self.length > 0

    def _hash(self, view: memoryview) -> None:
        here = min(self.got, self.length)  # what is hashed must be what is taken
        if here > self.hashed:
            self.sha256.update(view[self.hashed : here])
            self.hashed = here

    def _said(self) -> tuple[int, bool]:
        return parse_answer(bytes(self.buffer[:ANSWER_SIZE]), self.room - ANSWER_SIZE)

    def answer(self) -> memoryview:
        """The chunk that came; raises the peer's error."""
        body = memoryview(self.buffer)[ANSWER_SIZE : self.length]
        if self._said()[1]:
            raise parse_error(bytes(body))
        return body


class Exchange(Generic[T]):
    """A question on its way. ``done`` gets what :meth:`ChunkClient.ask` returns or raises, or Stale; cancel it here only.

    Of several questions, one for each of *takes*, ``done`` is told the end, and what was the matter with the connection.
    *left* is what is left of *timeout*, both in seconds.
    """

    def __init__(self, connection: _Connection, takes: Sequence[Take[T]], left: float, timeout: float) -> None:
        loop = asyncio.get_running_loop()
        self.done: asyncio.Future[T] = loop.create_future()
        self.connection = connection
        self.takes = takes
        self._timeout = timeout
        self.given_up: BaseException | None = None
        self._extended = False
        self.timer = loop.call_later(left, self._expire)

    def _expire(self) -> None:
        # If there is something to receive, the peer answers, and it is our threads that are busy.
        if not self._extended and _has_unread(self.connection.sock):
            self._extended = True
            self.timer = asyncio.get_running_loop().call_later(self._timeout, self._expire)
        else:
            self._give_up(_too_late(self.connection.name, self._timeout))

    def _give_up(self, why: BaseException) -> None:
        if self.given_up is None:
            self.given_up = why
            with contextlib.suppress(OSError):  # the peer was quicker
                self.connection.sock.shutdown(socket.SHUT_RDWR)

    def cancel(self) -> None:
        """End it; ``done`` is cancelled when nobody works on the answer any more."""
        self._give_up(asyncio.CancelledError())


def _too_late(name: str, timeout: float) -> DeadlineExceeded:
    return DeadlineExceeded(f"layerstore {name} did not answer within {timeout:.1f} s")


def _has_unread(sock: socket.socket) -> bool:
    try:
        (count,) = struct.unpack("i", fcntl.ioctl(sock, termios.FIONREAD, bytes(4)))
    except OSError:
        return False
    return bool(count)


class ChunkClient:
    """For chunks of at most *chunk_size* bytes; *most* idle connections are kept."""

    def __init__(self, chunk_size: int, most: int = 256) -> None:
        self._room = ANSWER_SIZE + max(chunk_size, 4096)
        self._most = most
        self._idle: dict[_Connection, float] = {}  # since when, in the loop's time
        self._aging: asyncio.TimerHandle | None = None
        self._asking: dict[int, _Connection] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._threads: list[threading.Thread] = []

    def _start(self) -> None:
        """With the first question: a node may have none."""
        self._loop = asyncio.get_running_loop()
        with contextlib.ExitStack() as stack:
            self._epoll = stack.enter_context(select.epoll())
            self._end = os.eventfd(0, os.EFD_CLOEXEC)
            stack.callback(os.close, self._end)
            self._epoll.register(self._end, select.EPOLLIN)  # never read, so every thread sees it
            stack.pop_all()
        self._threads = [
            threading.Thread(target=self._serve, name=f"answers-{number}", daemon=True) for number in range(_THREADS)
        ]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Close all connections; nothing is being asked any more."""
        for connection in self._idle:
            connection.sock.close()
        self._idle.clear()
        if self._aging is not None:
            self._aging.cancel()
        if self._threads:
            os.eventfd_write(self._end, 1)
            for thread in self._threads:
                thread.join()
            self._threads.clear()
            for connection in self._asking.values():  # at a shutdown that did not wait
                connection.sock.close()
                if connection.exchange is not None:
                    connection.exchange.timer.cancel()
                    connection.exchange.done.cancel()
            self._asking.clear()
            self._epoll.close()
            os.close(self._end)

    # On the event loop

    def begin(self, address: Address, question: Question, timeout: float, take: Take[T]) -> Exchange[T] | None:
        """Ask on an idle connection, if there is one."""
        return self._begin(address, [question], [take], timeout)

    def begin_run(
        self, address: Address, questions: Sequence[Question], timeout: float, takes: Sequence[Take[object]]
    ) -> Exchange[object] | None:
        """Ask for up to ``MOST_AHEAD`` chunks in one go, as :meth:`begin`; each of *takes* gets one, in this order.

        What is the matter with one of the chunks nobody is told: whoever misses it asks for it alone.
        """
        return self._begin(address, questions, takes, timeout)

    def _begin(
        self, address: Address, questions: Sequence[Question], takes: Sequence[Take[T]], timeout: float
    ) -> Exchange[T] | None:
        for connection in reversed(self._idle):
            if connection.address == address:
                del self._idle[connection]
                try:
                    return self._begin_on(connection, questions, takes, timeout, timeout)
                except OSError as error:  # no descriptors or memory just now
                    log.warning("cannot ask layerstore %s: %s", connection.name, error)
                    return None
        return None

    async def ask(self, address: Address, question: Question, timeout: float, take: Take[T]) -> T:
        """What *take* makes of the chunk. Raises the peer's error, Unavailable, DeadlineExceeded, and what *take* raises."""
        end = time.monotonic() + timeout
        if (exchange := self.begin(address, question, timeout, take)) is not None:
            with contextlib.suppress(Stale):
                return await wait_for(exchange)
        try:
            connection = await self._connect(address, end - time.monotonic())
        except TimeoutError:
            raise _too_late(f"{address[0]}:{address[1]}", timeout) from None
        try:
            exchange = self._begin_on(connection, [question], [take], max(end - time.monotonic(), 0.0), timeout)
        except OSError as error:
            raise Unavailable(f"cannot ask layerstore {connection.name}: {error}") from None
        return await wait_for(exchange)

    def _begin_on(
        self,
        connection: _Connection,
        questions: Sequence[Question],
        takes: Sequence[Take[T]],
        left: float,
        timeout: float,
    ) -> Exchange[T]:
        """Raises OSError, and then the connection is closed."""
        exchange, fd = Exchange(connection, takes, left, timeout), connection.sock.fileno()
        try:
            if not self._threads:
                self._start()
            connection.begin(exchange)
            self._asking[fd] = connection
            # Questions fit into any socket that has none under way. If the peer is gone, the event tells.
            with contextlib.suppress(OSError):
                connection.sock.send(b"".join(map(pack_question, questions)))
            self._epoll.register(fd, select.EPOLLIN | select.EPOLLONESHOT)
        except OSError:
            exchange.timer.cancel()
            self._asking.pop(fd, None)
            connection.sock.close()
            raise
        return exchange

    async def _connect(self, address: Address, seconds: float) -> _Connection:
        """Raises TimeoutError, Unavailable."""
        loop, (host, port) = asyncio.get_running_loop(), address
        opened = None
        try:
            async with asyncio.timeout(max(seconds, 0)):
                (family, kind, protocol, _, to), *_ = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
                opened = socket.socket(family, kind, protocol)
                opened.setblocking(False)
                await loop.sock_connect(opened, to)
                opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        except BaseException as error:
            if opened is not None:
                opened.close()
            if isinstance(error, OSError) and not isinstance(error, TimeoutError):
                raise Unavailable(f"layerstore {host}:{port} does not answer: {error}") from None
            raise
        return _Connection(opened, address, self._room)

    def _ended(self, connection: _Connection, result: Any, error: BaseException | None) -> None:
        """A thread is done with a connection, which *error*, unless it is the peer's or that of who took, made useless."""
        exchange, connection.exchange = connection.exchange, None
        assert exchange is not None
        exchange.timer.cancel()
        if exchange.given_up is not None:
            connection.sock.close()
            if error is not None:
                error = exchange.given_up
        elif connection.is_whole:
            self._keep(connection)
        else:
            connection.sock.close()
        if exchange.done.done():  # whoever waits is gone, and the event loop ends
            return
        if isinstance(error, asyncio.CancelledError):
            exchange.done.cancel()
        elif error is not None:
            exchange.done.set_exception(error)
            exchange.done.exception()  # retrieved: it may be nobody's any more
        else:
            exchange.done.set_result(result)

    def _keep(self, connection: _Connection) -> None:
        self._idle[connection] = asyncio.get_running_loop().time()
        while len(self._idle) > self._most:
            self._close_oldest()
        if self._aging is None:
            self._aging = asyncio.get_running_loop().call_later(_IDLE_S, self._age)

    def _close_oldest(self) -> None:
        oldest = next(iter(self._idle))
        del self._idle[oldest]
        oldest.sock.close()

    def _age(self) -> None:
        """Close what has been idle for long: each has room for an answer."""
        loop = asyncio.get_running_loop()
        while self._idle and loop.time() - next(iter(self._idle.values())) >= _IDLE_S:
            self._close_oldest()
        self._aging = loop.call_later(_IDLE_S, self._age) if self._idle else None

    # In any thread

    def _serve(self) -> None:
        while True:
            for fd, _ in self._epoll.poll(maxevents=1):
                if fd == self._end:
                    return
                self._go_on(fd, self._asking[fd])

    def _go_on(self, fd: int, connection: _Connection) -> None:
        result: Any = None
        error: BaseException | None = None
        try:
            exchange = connection.exchange
            assert exchange is not None
            while connection.receive():
                take = exchange.takes[-1 - connection.left]
                if len(exchange.takes) == 1:
                    result = take(connection.answer(), connection.sha256.digest())
                    break
                try:
                    take(connection.answer(), connection.sha256.digest())
                except Exception as failure:  # it will be asked for again, alone
                    log.debug("layerstore %s: %s", connection.name, failure)
                if not connection.left:
                    break
                connection.go_on()
            else:
                self._epoll.modify(fd, select.EPOLLIN | select.EPOLLONESHOT)
                return
        except (OSError, EOFError) as failure:
            kind = Unavailable if connection.got else Stale
            error = failure if connection.is_whole else kind(f"layerstore {connection.name} does not answer: {failure}")
        except Exception as failure:
            error = failure
        self._epoll.unregister(fd)
        del self._asking[fd]
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._ended, connection, result, error)


async def wait_for(exchange: Exchange[T]) -> T:
    """Its end; whoever is cancelled meanwhile gives up, and waits until nobody works on the answer any more."""
    try:
        return await asyncio.shield(exchange.done)
    except asyncio.CancelledError:
        if not exchange.done.done():
            exchange.cancel()
            await ended([exchange.done])
        raise
