"""Registries that send what no server should: time, memory and the daemon's other threads stay bounded."""

import asyncio
import contextlib
import itertools
import socket
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, Self, cast

import pytest

from afs.core.errors import Unavailable
from afs.core.images import Platform, parse_image
from afs.layerstore import images, registry, registrydownload, registryhttp
from afs.layerstore.errors import CorruptImage, ImageNotFound, RegistryUnreachable
from afs.layerstore.images import Images
from afs.layerstore.manifests import Layer
from afs.layerstore.registry import Registries, RegistrySource
from afs.layerstore.registryoptions import RegistryOptions
from afs.layerstore.registrystop import Stop

AMD64 = Platform("linux", "amd64")
MANIFEST = b'{"schemaVersion": 2}'


class RawServer:
    """Calls ``answer(connection, head of the request)`` for each request; it returns False to close the connection."""

    def __init__(self, answer: Callable[[socket.socket, str], object]) -> None:
        self._answer = answer
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._open: set[socket.socket] = set()
        self._threads = [threading.Thread(target=self._accept)]
        self.heads: list[str] = []
        self.arrived = threading.Condition()
        self.stopping = threading.Event()

    def __enter__(self) -> Self:
        self._threads[0].start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopping.set()
        self._listener.shutdown(socket.SHUT_RDWR)
        for connection in list(self._open):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        self._listener.close()

    @property
    def address(self) -> str:
        """Host and port."""
        return f"127.0.0.1:{self._listener.getsockname()[1]}"

    def wait_for(self, count: int) -> None:
        """Until so many requests have come."""
        with self.arrived:
            assert self.arrived.wait_for(lambda: len(self.heads) >= count, 30)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # shut down
            while True:
                connection = self._listener.accept()[0]
                self._open.add(connection)
                self._threads.append(threading.Thread(target=self._serve, args=(connection,)))
                self._threads[-1].start()

    def _serve(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            while True:
                head = b""
                while b"\r\n\r\n" not in head:
                    if not (data := connection.recv(1 << 16)):
                        return
                    head += data
                with self.arrived:
                    self.heads.append(head.decode("latin1"))
                    self.arrived.notify_all()
                if self._answer(connection, self.heads[-1]) is False:
                    return


def response(status: str = "200 OK", body: bytes = b"", **headers: str) -> bytes:
    """An answer; underscores in the names of *headers* stand for dashes."""
    lines = [f"HTTP/1.1 {status}", *(f"{name.replace('_', '-')}: {value}" for name, value in headers.items())]
    return "\r\n".join([*lines, f"Content-Length: {len(body)}", "\r\n"]).encode("latin1") + body


def fixed(answer: bytes) -> RawServer:
    """A server that always says the same."""
    return RawServer(lambda connection, _: connection.sendall(answer))


def endless(start: bytes, again: bytes) -> RawServer:
    """A server that sends *start*, then *again* until the client goes away."""

    def answer(connection: socket.socket, _: str) -> bool:
        connection.sendall(start)
        while not server.stopping.is_set():
            connection.sendall(again)
        return False

    server = RawServer(answer)
    return server


def trickling(start: bytes) -> RawServer:
    """A server that sends *start*, then a byte now and then until the client goes away."""

    def answer(connection: socket.socket, _: str) -> bool:
        connection.sendall(start)
        while not server.stopping.wait(0.02):
            connection.sendall(b"a")
        return False

    server = RawServer(answer)
    return server


def silent() -> RawServer:
    """A server that takes requests and answers none."""

    def answer(_: socket.socket, __: str) -> bool:
        server.stopping.wait()
        return False

    server = RawServer(answer)
    return server


@pytest.fixture
def source() -> Iterator[Callable[..., RegistrySource]]:
    """Sources with connections of their own."""
    opened: list[Registries] = []

    def make(server: RawServer, stop: Stop | None = None, **options: Any) -> RegistrySource:
        opened.append(Registries(RegistryOptions(**{"backoff": 0.0, **options})))
        return opened[-1].source(parse_image(f"{server.address}/app:v1"), stop)

    yield make
    for registries in opened:
        registries.close()


def layer(size: int) -> Layer:
    """A layer of *size* bytes that no bytes are right for."""
    return Layer(f"sha256:{'0' * 64}", f"sha256:{'1' * 64}", size, "application/vnd.oci.image.layer.v1.tar")


# Memory


CHUNK = b"HTTP/1.1 %s\r\nTransfer-Encoding: chunked\r\n\r\n-1\r\n"


def test_a_chunk_of_negative_length_is_bounded(source: Callable[..., RegistrySource]) -> None:
    # http.client's read() would go on until memory ends.
    with endless(CHUNK % b"404 Not Found", b"x" * 100_000) as server, pytest.raises(ImageNotFound):
        source(server).get_manifest("v1")
    with endless(CHUNK % b"200 OK", b"x" * 100_000) as server:
        with pytest.raises(CorruptImage, match="larger than 4194304 bytes"):
            source(server).get_manifest("v1")
        with source(server).open_layer(layer(1 << 20)) as read:
            assert 0 < len(read(1 << 16)) <= 1 << 16
        with source(server).open_layer(layer(1 << 20)) as read, pytest.raises(RegistryUnreachable, match="its chunks"):
            read(10)


# Time


@pytest.mark.timeout(30)
@pytest.mark.parametrize(
    "server",
    [
        lambda: endless(b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 100),
        lambda: trickling(b"HTTP/1.1 200 OK\r\nX: "),
        lambda: trickling(b"HTTP/1.1 307 Temporary Redirect\r\nLocation: /v2/x\r\nContent-Length: 60000\r\n\r\n"),
    ],
    ids=["100 Continue", "header", "redirects"],
)
def test_the_head_of_an_answer_has_to_come_in_time(
    source: Callable[..., RegistrySource], monkeypatch: pytest.MonkeyPatch, server: Callable[[], RawServer]
) -> None:
    monkeypatch.setattr(registryhttp, "_HEAD_TIMEOUT_S", 0.5)
    monkeypatch.setattr(registryhttp, "_ASIDE_S", 0.2)
    with server() as running, pytest.raises(RegistryUnreachable, match="no answer within "):
        source(running).get_manifest("v1")


@pytest.mark.timeout(30)
def test_what_an_error_says_has_to_come_in_time(
    source: Callable[..., RegistrySource], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registryhttp, "_ASIDE_S", 0.2)
    with trickling(b"HTTP/1.1 404 Not Found\r\nContent-Length: 60000\r\n\r\n") as server:
        with pytest.raises(ImageNotFound, match=r"Not Found \(HTTP 404 for "):
            source(server).get_manifest("v1")
        assert len(server.heads) == 1


@pytest.mark.timeout(30)
@pytest.mark.parametrize("again", [b"a: b\r\n" * 1000, b""], ids=["trailers", "trickle"])
def test_a_manifest_has_to_come_in_time(
    source: Callable[..., RegistrySource], monkeypatch: pytest.MonkeyPatch, again: bytes
) -> None:
    monkeypatch.setattr(registry, "_SMALL_TIMEOUT_S", 0.3)
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n"
    with endless(head, again) if again else trickling(head) as server:
        with pytest.raises(RegistryUnreachable, match="it comes too slowly"):
            source(server).get_manifest("v1")
        assert len(server.heads) == 1


@pytest.mark.timeout(25)  # less than a silent answer's time-out, 30 s
def test_who_waits_for_a_silent_registry_can_be_woken(source: Callable[..., RegistrySource]) -> None:
    with silent() as server:
        stop = Stop()

        def wake() -> None:
            server.wait_for(1)
            stop.set()

        waking = threading.Thread(target=wake)
        waking.start()
        with pytest.raises(RegistryUnreachable, match="it was given up"):
            source(server, stop).get_manifest("v1")
        waking.join()
        with pytest.raises(RegistryUnreachable, match="it was given up"):
            source(server, Stop(0.1)).get_manifest("v1")
        with pytest.raises(RegistryUnreachable, match="it was given up"):
            source(server, stop).get_manifest("v1")
        assert len(server.heads) == 2


@pytest.mark.timeout(25)  # less than a silent answer's time-out, 30 s
def test_a_download_that_is_closed_does_not_wait_for_silent_pieces(source: Callable[..., RegistrySource]) -> None:
    with silent() as server:
        opened = source(server)
        blob = registry._LayerBlob(opened, opened._hosts, layer(80 << 20))
        pieces = registrydownload._Pieces(blob, 4 << 20, 4)
        server.wait_for(4)
        pieces.close()


# Other registries


class Resolver:
    """The node's view of images, with nothing but registries behind it."""

    def __init__(self, registries: Registries) -> None:
        store = SimpleNamespace(load_images=list)
        puller = SimpleNamespace(source=registries.source)
        self.images = Images(cast("Any", store), cast("Any", puller), cast("Any", None), cast("Any", None), 300.0)

    async def ask(self, name: str) -> Exception:
        """The error that resolving *name* ends in."""
        with pytest.raises((ImageNotFound, Unavailable)) as caught:
            await self.images.resolve(parse_image(name), AMD64, here=True)
        return caught.value


@pytest.mark.timeout(25)  # less than a silent answer's time-out, 30 s
def test_a_silent_registry_does_not_hold_up_others(monkeypatch: pytest.MonkeyPatch) -> None:
    registries = Registries(RegistryOptions(backoff=0))

    async def run(server: RawServer, other: RawServer) -> None:
        resolver = Resolver(registries)
        names = (f"{server.address}/app{number}:v1" for number in itertools.count())
        monkeypatch.setattr(images, "_SOURCE_TIMEOUT_S", 1.0)
        waiting = [asyncio.create_task(resolver.ask(next(names))) for _ in range(20)]
        await asyncio.to_thread(server.wait_for, images._MOST_OF_ONE)
        assert isinstance(await resolver.ask(f"{other.address}/app:v1"), ImageNotFound)
        assert len(server.heads) == images._MOST_OF_ONE
        assert {"did not answer within" in str(error) for error in await asyncio.gather(*waiting)} == {True}
        monkeypatch.setattr(images, "_SOURCE_TIMEOUT_S", 60.0)
        count = len(server.heads)
        last = asyncio.create_task(resolver.ask(next(names)))
        await asyncio.to_thread(server.wait_for, count + 1)
        await resolver.images.close()
        last.cancel()

    with silent() as server, fixed(response("404 Not Found")) as other:
        asyncio.run(run(server, other))
        for thread in threading.enumerate():
            if thread.name.startswith("resolve"):
                thread.join(10)
                assert not thread.is_alive()
    registries.close()
