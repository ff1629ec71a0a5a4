"""urllib3's connections, with an end to waiting for the head of an answer.

Its time-outs are for each piece that comes, so whoever sends a byte now and then, or ``100 Continue`` for ever, is never
late. Here another thread shuts the socket down, which wakes the one that waits.

State: the :class:`Exchange` under way is the thread's own, because urllib3 has no way to hand it to a connection.
"""

import contextlib
import socket
import threading
import time
from collections.abc import Iterator

import urllib3
from typing_extensions import override
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.response import HTTPResponse

from afs.layerstore.registrystop import Stop

_current = threading.local()


class Exchange:
    """One request and its answer, whose head has to be there at *end* on the monotonic clock."""

    def __init__(self, stop: Stop, end: float) -> None:
        self._stop = stop
        self._end = end
        self._socket: socket.socket | None = None
        self.woken = False  # then what was read is not all: a head that breaks off looks whole to http.client

    @contextlib.contextmanager
    def requesting(self) -> Iterator[None]:
        """The request that this thread makes in the block is this one."""
        _current.exchange = self
        try:
            yield
        finally:
            del _current.exchange

    @contextlib.contextmanager
    def waiting_for(self, connection: HTTPConnection) -> Iterator[None]:
        """In the block the head is read from *connection*."""
        # With TLS inside of TLS, through a proxy, there is an object of urllib3's around the socket. The connection may
        # forget it with the head, while the body is still to come.
        self._socket = getattr(connection.sock, "socket", connection.sock)
        with self.until(self._end):
            yield

    @contextlib.contextmanager
    def until(self, end: float) -> Iterator[None]:
        """Wake who reads in the block if that takes until *end* on the monotonic clock."""
        with self._stop.watching(self.wake, end - time.monotonic()):
            yield

    def wake(self) -> None:
        """The thread that reads gets an error, and the connection is of no use any more."""
        self.woken = True
        if (found := self._socket) is not None:
            with contextlib.suppress(OSError):  # it was closed in this moment
                # Both ways: Linux goes on to receive on a socket that is shut down for reading only. And not the method
                # of ssl.SSLSocket, which takes the TLS away from under the thread that reads.
                socket.socket.shutdown(found, socket.SHUT_RDWR)

    def release(self) -> None:
        """From now on the connection may be another exchange's."""
        self._socket = None


class _Plain(HTTPConnection):
    @override
    def getresponse(self) -> HTTPResponse:  # type: ignore[override]  # as in urllib3
        with _current.exchange.waiting_for(self):
            return super().getresponse()


class _Secure(HTTPSConnection):
    @override
    def getresponse(self) -> HTTPResponse:  # type: ignore[override]  # as in urllib3
        with _current.exchange.waiting_for(self):
            return super().getresponse()


class _PlainPool(urllib3.HTTPConnectionPool):
    ConnectionCls = _Plain  # type: ignore[mutable-override]  # what it is for


class _SecurePool(urllib3.HTTPSConnectionPool):
    ConnectionCls = _Secure  # type: ignore[mutable-override]  # what it is for


POOLS = {"http": _PlainPool, "https": _SecurePool}  # for PoolManager.pool_classes_by_scheme
