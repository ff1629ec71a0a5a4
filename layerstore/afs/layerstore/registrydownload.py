"""A layer's blob as one stream of bytes, whatever happens to the connections that it comes through.

A body that breaks off or stalls goes on by a range request where it ended, from the next host if this one gives up.
Nothing here protects against content that changed in between: the blob's digest, which the converter checks, does.

A large blob comes through several connections if one is slow: the first ``PIECE`` bytes tell. Then that one is closed, and
pieces are fetched side by side and handed on in order. Memory is bounded by connections times ``PIECE``: 16 MiB with four.
A fast registry sees one request for each layer.

State and locks: all of :class:`_Pieces` changes under ``_changed``. A :class:`_Stream` belongs to the thread that reads
it; another one may only call ``interrupt``, after it has set ``stop``.
"""

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Iterator
from typing import Protocol

from afs.layerstore.registryfailures import RequestFailed
from afs.layerstore.registryhttp import Answer
from afs.layerstore.registrystop import Stop
from afs.layerstore.source import Read

log = logging.getLogger(__name__)
PIECE = 4 << 20
_READ = 256 << 10
# Bytes per second of one connection, with which more of them help nobody: the converter takes 70 MiB of gzip per second
# here. A layer of 169 MiB from a registry on loopback cost 2.04 s of CPU through one connection, 1.98 s with the probe
# and 2.31 s (and 29 MiB more memory) in pieces from the start. At 5 MiB/s per connection 40 MiB took 9.7 s through one
# and 4.8 s through four, at 20 MiB/s 2.6 and 1.8 s; 9 MiB took 0.58 and 0.71 s: see parallel_from.
_FAST = 64 << 20
_RESUMPTIONS = 2  # in a row that bring nothing, before the next host is asked


class Blob(Protocol):
    """What a download asks of its source. *number* stands for a host."""

    size: int

    def open(self, start: int, end: int, stop: Stop) -> tuple[int, Answer]:
        """A body with bytes *start* to *end* (206), or one with all of them (200); raises AfsError if nobody has it."""
        ...

    def give_up(self, number: int, cause: str) -> None:
        """Ask the next host from now on; raises AfsError if there is none."""
        ...

    def pause(self, attempt: int) -> float:
        """Seconds to wait before another try after *attempt* ones."""
        ...


@contextlib.contextmanager
def reading(blob: Blob, connections: int, parallel_from: int) -> Iterator[Read]:
    """*blob* as a ``read(n)``, through *connections* at once if it has *parallel_from* bytes or more."""
    stop = Stop()
    if connections < 2 or blob.size < max(parallel_from, PIECE + 1):
        stream = _Stream(blob, 0, blob.size, stop)
        try:
            yield stream.read
        finally:
            stream.close()
        return
    reader = _Probed(blob, connections, stop)
    try:
        yield reader.read
    finally:
        reader.close()


class _Probed:
    """All through one request if that is fast; if its first bytes were slow, the rest in pieces."""

    def __init__(self, blob: Blob, connections: int, stop: Stop) -> None:
        self._blob = blob
        self._connections = connections
        self._stop = stop
        number, answer = blob.open(0, blob.size, stop)
        self._divisible = answer.header("Accept-Ranges").strip().lower() == "bytes"
        self._reader: _Stream | _Pieces = _Stream(blob, 0, blob.size, stop, (number, answer))
        self._seen = 0  # bytes so far, and seconds that they took
        self._waited = 0.0

    def read(self, count: int) -> bytes:
        """The next bytes, at most *count*; b"" at the end. Raises what the blob does."""
        if self._divisible and self._seen >= PIECE:
            self._divisible = False
            if self._waited > self._seen / _FAST:
                self._reader.close()
                self._reader = _Pieces(self._blob, self._seen, self._connections)
        started = time.monotonic()
        try:
            data = self._reader.read(count)
        except _NotDivisible:
            self._reader.close()
            log.info("ranges are not honoured any more: going on from byte %d as one stream", self._seen)
            self._reader = _Stream(self._blob, self._seen, self._blob.size, Stop())
            data = self._reader.read(count)
        self._waited += time.monotonic() - started  # the converter's time does not count
        self._seen += len(data)
        return data

    def close(self) -> None:
        """Give connections back, or close them."""
        self._reader.close()


class _NotDivisible(Exception):
    """A piece was asked for, and all of the blob comes: skipping to each piece would read the blob once for each."""


class _Stream:
    """Bytes *start* to *end* of a blob."""

    def __init__(
        self,
        blob: Blob,
        start: int,
        end: int,
        stop: Stop,
        first: tuple[int, Answer] | None = None,
        *,
        piece: bool = False,
    ) -> None:
        self._blob = blob
        self._at, self._end = start, end
        self._stop = stop
        self._number = first[0] if first else 0
        self._body: Answer | None = first[1] if first else None
        self._piece = piece
        self._fruitless = 0

    def read(self, count: int) -> bytes:
        """The next bytes, at most *count*; b"" at the end. Raises what the blob does; of a piece, _NotDivisible."""
        while self._at < self._end:
            try:
                body = self._body or self._open()
                data = body.read(min(count, self._end - self._at))
                if data:
                    self._at += len(data)
                    self._fruitless = 0
                    return data
                cause = "it ended early"
            except RequestFailed as error:
                cause = error.cause
            self._recover(f"breaking off at byte {self._at} of {self._blob.size}: {cause}")
        self.close()
        return b""

    def _open(self) -> Answer:
        self._number, body = self._blob.open(self._at, self._end, self._stop)
        self._body = body
        if self._stop.is_set():  # interrupt() may have come too early
            raise RequestFailed("it was given up", again=False)
        if body.status == 200 and self._piece:
            raise _NotDivisible
        left = self._at if body.status == 200 else 0
        while left:
            skipped = body.read(min(left, _READ))
            if not skipped:
                raise RequestFailed("it ended early")
            left -= len(skipped)
        return body

    def _recover(self, cause: str) -> None:
        """Close what broke and wait, or go on to the next host."""
        if self._stop.is_set():
            raise _Stopped
        if self._body is not None:
            self._body.exchange.release()
            self._body.response.close()  # no use to read on
            self._body = None
        self._fruitless += 1
        if self._fruitless > _RESUMPTIONS:
            self._blob.give_up(self._number, cause)
            self._fruitless = 0
            return
        log.info("%s; going on from there", cause)
        # The first time at once: a load balancer that was restarted, say.
        if self._fruitless > 1 and self._stop.wait(self._blob.pause(self._fruitless - 1)):
            raise _Stopped

    def interrupt(self) -> None:
        """Wake the thread that reads."""
        if (body := self._body) is not None:
            body.interrupt()

    def close(self) -> None:
        """Give the connection back, or close it."""
        body, self._body = self._body, None
        if body is not None:
            body.close()


class _Stopped(Exception):
    """The reader went away."""


class _Piece:
    """What is there of a piece and not handed on yet."""

    def __init__(self) -> None:
        self.blocks: deque[bytes] = deque()
        self.complete = False


class _Pieces:
    """Threads that fetch pieces side by side."""

    def __init__(self, blob: Blob, start: int, connections: int) -> None:
        self._blob = blob
        self._start = start
        self._stop = Stop()
        self._count = -(-(blob.size - start) // PIECE)
        self._window = connections
        self._changed = threading.Condition()
        self._pieces: dict[int, _Piece] = {}
        self._streams: set[_Stream] = set()
        self._head = self._next = 0  # the piece that is handed on, and the first that nobody fetches
        self._error: BaseException | None = None
        self._threads: list[threading.Thread] = []
        try:
            for number in range(min(connections, self._count)):
                thread = threading.Thread(target=self._work, name=f"download-{number}", daemon=True)
                thread.start()
                self._threads.append(thread)
        except BaseException:  # there may be no more threads to be had
            self.close()
            raise

    def read(self, count: int) -> bytes:
        """The next bytes, at most *count*; b"" at the end. Raises what the blob does."""
        with self._changed:
            while self._head < self._count:
                piece = self._pieces.get(self._head)
                if piece is not None and piece.blocks:
                    block = piece.blocks.popleft()
                    if len(block) > count:
                        piece.blocks.appendleft(block[count:])
                    return block[:count]
                if piece is not None and piece.complete:
                    del self._pieces[self._head]
                    self._head += 1
                    self._changed.notify_all()
                elif self._error is not None:
                    raise self._error
                else:
                    self._changed.wait()
            return b""

    def _work(self) -> None:
        """A thread's life: piece after piece."""
        try:
            while (stream := self._take()) is not None:
                index, reader = stream
                try:
                    while data := reader.read(_READ):
                        self._put(index, data)
                finally:
                    reader.close()
                    with self._changed:
                        self._streams.discard(reader)
                self._put(index, b"")
        except _Stopped:
            return
        except BaseException as error:  # for the reader, who raises it
            with self._changed:
                self._error = self._error or error
                self._changed.notify_all()

    def _take(self) -> tuple[int, _Stream] | None:
        """The next piece to fetch, as soon as there is room for it; None if there is nothing left to do."""
        with self._changed:
            while self._next < self._count and self._next >= self._head + self._window and not self._stop.is_set():
                self._changed.wait()
            if self._next >= self._count or self._stop.is_set() or self._error is not None:
                return None
            index = self._next
            self._next += 1
            self._pieces[index] = _Piece()
            start = self._start + index * PIECE
            stream = _Stream(self._blob, start, min(start + PIECE, self._blob.size), self._stop, piece=True)
            self._streams.add(stream)
            return index, stream

    def _put(self, index: int, data: bytes) -> None:
        """Append to a piece; no data completes it."""
        with self._changed:
            piece = self._pieces[index]
            if data:
                piece.blocks.append(data)
            else:
                piece.complete = True
            if index == self._head:
                self._changed.notify_all()

    def close(self) -> None:
        """End the threads, at once: all but connecting, that is, which has a time-out of its own."""
        self._stop.set()
        with self._changed:
            streams = list(self._streams)
            self._changed.notify_all()
        for stream in streams:
            stream.interrupt()
        for thread in self._threads:
            thread.join()
