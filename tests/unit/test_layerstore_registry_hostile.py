"""Registries that send what no server should: time, memory and the daemon's other threads stay bounded."""

import asyncio
import contextlib
import itertools
import logging
import math
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self, cast

import pytest

from afs.core.errors import AfsError, Unavailable
from afs.core.images import Platform, parse_image
from afs.layerstore import images, pullworker, registry, registrydownload, registryhttp
from afs.layerstore.afslyr.errors import DigestMismatch, LayerLimit
from afs.layerstore.errors import CorruptImage, ImageNotFound, RegistryDenied, RegistryUnreachable
from afs.layerstore.images import Images
from afs.layerstore.manifests import Layer
from afs.layerstore.registry import Registries, RegistrySource
from afs.layerstore.registryfailures import RequestFailed, without_query
from afs.layerstore.registryhosts import Host, Tls
from afs.layerstore.registryoptions import RegistryOptions
from afs.layerstore.registrystop import Stop

AMD64 = Platform("linux", "amd64")
MANIFEST = b'{"schemaVersion": 2}'


class RawServer:
    """Calls ``answer(connection, head of the request)`` for each request; it returns False to close the connection."""

    def __init__(self, answer: Callable[[socket.socket, str], object]) -> None:
        self._answer = answer
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
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
                    if head.startswith(b"\x16"):  # the first record of TLS
                        connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
                        return
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
        assert not opened._failed  # it is no fault of the host


# Headers and tokens that make no sense


@pytest.mark.parametrize("value", ["Fri, 31 Dec 99999 23:59:59 GMT", "9" * 5000, "9" * 400, "-1", "\xb2"])
def test_retry_after(source: Callable[..., RegistrySource], value: str) -> None:
    with fixed(response("429 Too Many Requests", Retry_After=value)) as server:
        with pytest.raises(RegistryUnreachable, match=r"HTTP 429|it was given up"):
            source(server, Stop(0.5)).get_manifest("v1")
        assert server.heads


@pytest.mark.parametrize(
    ("length", "content_range"),
    [
        ("abc", "bytes 10-99/100"),
        ("90\r\nContent-Length: 90", "bytes 10-99/100"),
        ("90", f"bytes {'0' * 5000}10-99/100"),
        ("90", f"bytes 10-{'9' * 5000}/100"),
        ("90", ""),
    ],
)
def test_a_range_in_numbers_that_are_none(
    source: Callable[..., RegistrySource], length: str, content_range: str
) -> None:
    def answer(connection: socket.socket, head: str) -> bool:
        whole = "range:" not in head.lower()
        first = "200 OK\r\nContent-Length: 100" if whole else f"206 P\r\nContent-Length: {length}"
        connection.sendall(f"HTTP/1.1 {first}\r\nContent-Range: {content_range}\r\n\r\n".encode() + bytes(10))
        return False

    with RawServer(answer) as server, source(server).open_layer(layer(100)) as read:
        seen = b""
        with pytest.raises(RegistryUnreachable, match="it answers with another range"):
            while data := read(100):
                seen += data
        assert len(seen) == 10


@pytest.mark.parametrize("length", ["abc", "100\r\nContent-Length: 100", "1" * 5000, "-1"])
def test_a_length_that_is_no_number(source: Callable[..., RegistrySource], length: str) -> None:
    with fixed(f"HTTP/1.1 200 OK\r\nContent-Length: {length}\r\n\r\n".encode() + bytes(10)) as server:
        opened = source(server)
        with (
            pytest.raises(CorruptImage, match="should have 100 bytes but has "),
            opened.open_layer(layer(100)) as read,
        ):
            read(10)


@pytest.mark.parametrize(
    "realm", ["https://[::1", "http://h:99999/t", "foo", "ftp://h/t", "http://u:SECRET@h/t", "http://h\\@g/t", ""]
)
def test_a_token_service_that_is_none(source: Callable[..., RegistrySource], realm: str) -> None:
    with fixed(response("401 Unauthorized", WWW_Authenticate=f'Bearer realm="{realm}",service="x"')) as server:
        with pytest.raises(RegistryDenied, match="that is not an http URL") as caught:
            source(server).get_manifest("v1")
        assert "SECRET" not in caught.value.line


def with_tokens(token: bytes, challenge: str = "") -> RawServer:
    """A registry and its token service, which says *token*."""

    def answer(connection: socket.socket, head: str) -> None:
        if head.startswith("GET /token"):
            connection.sendall(response(body=token))
        elif "authorization:" in head.lower():
            connection.sendall(response(body=MANIFEST))
        else:
            bearer = f'Bearer realm="http://{server.address}/token"{challenge}'
            connection.sendall(response("401 Unauthorized", WWW_Authenticate=bearer))

    server = RawServer(answer)
    return server


@pytest.mark.parametrize("life", ["1" + "0" * 400, "1e999", "NaN", "-1", '"300"', "true", "null"])
def test_a_token_of_any_life(source: Callable[..., RegistrySource], life: str) -> None:
    with with_tokens(b'{"token": "a", "expires_in": %s}' % life.encode()) as server:
        assert source(server).get_manifest("v1") == MANIFEST


@pytest.mark.parametrize(
    ("challenge", "query"),
    [
        ("", "scope=repository%3Aapp%3Apull"),
        (',service=""', "scope=repository%3Aapp%3Apull"),
        (',service="s",scope="a:b:pull c:d:pull"', "service=s&scope=a%3Ab%3Apull&scope=c%3Ad%3Apull"),
    ],
)
def test_what_a_token_is_asked_for(source: Callable[..., RegistrySource], challenge: str, query: str) -> None:
    with with_tokens(b'{"token": "a"}', challenge) as server:
        opened = source(server)
        opened.get_manifest("v1")
        assert f"GET /token?{query} " in server.heads[1]
        assert len(opened._registries.authorizer._asking) == 0


def test_a_worker_survives_what_nobody_thought_of(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ValueError("surprise")

    monkeypatch.setattr(pullworker, "check_and_sync", fail)
    answer = pullworker._Worker().answer({"check": "/nowhere"})
    assert answer == {"error": "ValueError: surprise", "status": "INTERNAL", "errno": None}


# Where credentials go


@pytest.mark.parametrize(
    "location",
    [
        "http://EVIL\\@HERE/v2/x?sig=SECRET",
        "http://user:SECRET@HERE/x?sig=SECRET",
        "http://[::1/x?sig=SECRET",
        "http://bad host/x?sig=SECRET",
        "ftp://HERE/?sig=SECRET",
        "http:\t//HERE/?sig=SECRET",
    ],
)
def test_redirects_that_parsers_read_in_two_ways(source: Callable[..., RegistrySource], location: str) -> None:
    with fixed(response(body=MANIFEST)) as evil:

        def answer(connection: socket.socket, _: str) -> None:
            found = location.replace("EVIL", evil.address).replace("HERE", server.address)
            connection.sendall(response("307 Temporary Redirect", Location=found))

        server = RawServer(answer)
        with server, pytest.raises(RegistryUnreachable, match="redirects to something that is not an http") as caught:
            source(server).get_manifest("v1")
        assert "SECRET" not in caught.value.line
        assert not evil.heads


@pytest.mark.parametrize(
    ("before", "after"),
    [("https://r/a", "HTTP://evil/x"), ("HTTPS://cdn/a", "http://evil/x"), ("https://r/a", "Http://r:443/x")],
)
def test_no_redirect_into_the_clear_however_it_is_written(before: str, after: str) -> None:
    with pytest.raises(RequestFailed, match=r"from https to .*, in the clear"):
        registryhttp._redirected(before, after, Host("https", "r"))


def test_a_grant_is_for_one_scheme(source: Callable[..., RegistrySource]) -> None:
    with silent() as server:
        authorizer = source(server)._registries.authorizer
        authorizer.learn([("https://r", "", "Basic c2VjcmV0", math.inf)])
        assert authorizer.known(Host("https", "r"), "app")
        assert not authorizer.known(Host("http", "r"), "app")


def test_a_password_that_is_refused_is_forgotten(source: Callable[..., RegistrySource]) -> None:
    with fixed(response("401 Unauthorized", WWW_Authenticate="Negotiate")) as server:
        opened = source(server)
        opened._registries.authorizer.learn([(f"http://{server.address}", "", "Basic c2VjcmV0", math.inf)])
        for sent in (True, False):
            with pytest.raises(RegistryDenied):
                opened.get_manifest("v1")
            assert ("Basic c2VjcmV0" in server.heads[-1]) == sent


def test_http_counts_only_where_it_answered(source: Callable[..., RegistrySource]) -> None:
    with fixed(response(body=MANIFEST)) as server:
        http = source(server)._registries.http
        host = Host("either", server.address, tls=Tls(skip_verify=True))
        secrets = {"authorization": "Basic SECRET"}
        answer = http.request("GET", host, "/v2/x", {}, secrets, tries=1)
        assert answer.read(100) == MANIFEST
        answer.close()
        assert http.base(host) == f"http://{server.address}"
        assert "authorization" not in server.heads[-1].lower()  # it was granted to https
    with pytest.raises(RequestFailed):
        http.request("GET", host, "/v2/x", {}, {}, tries=1)
    assert http.base(host) == f"https://{server.address}"


def test_signatures_are_in_no_log(source: Callable[..., RegistrySource], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)

    def answer(connection: socket.socket, _: str) -> bool:
        connection.sendall(b"HTTP/1.1 200 OK\r\nBad Header Line\r\n\r\n" + MANIFEST)
        return False

    with RawServer(answer) as store:
        location = f"http://{store.address}/b?X-Amz-Signature=SECRET"
        with fixed(response("307 Temporary Redirect", Location=location)) as server:
            with contextlib.suppress(AfsError):
                source(server).get_manifest("v1")
            assert store.heads
    assert "SECRET" not in caplog.text
    assert "SECRET" not in without_query("http://user:SECRET@host/path?SECRET")


# Answers that are none


@pytest.fixture
def with_mirror(tmp_path: Path) -> Callable[[RawServer, RawServer], Path]:
    """Settings in which the second server is asked before the first one."""

    def make(server: RawServer, mirror: RawServer) -> Path:
        directory = tmp_path / "certs.d" / server.address
        directory.mkdir(parents=True)
        (directory / "hosts.toml").write_text(f'[host."http://{mirror.address}"]\n')
        return directory.parent

    return make


LIE = response(body=MANIFEST, Docker_Content_Digest=f"sha256:{'a' * 64}")


@pytest.mark.parametrize("answer", [response(body=b"<html>login</html>"), response(body=b"[]"), LIE])
def test_what_is_no_manifest_is_asked_of_the_next_host(
    source: Callable[..., RegistrySource], with_mirror: Callable[[RawServer, RawServer], Path], answer: bytes
) -> None:
    with fixed(response(body=MANIFEST)) as server, fixed(answer) as mirror:
        assert source(server, hosts_dir=with_mirror(server, mirror)).get_manifest("v1") == MANIFEST
        with pytest.raises(CorruptImage, match=r"is corrupt: (manifest is not |its manifest should be sha256:aaa)"):
            source(mirror).get_manifest("v1")


@pytest.mark.parametrize("alone", [True, False])
def test_a_body_that_breaks_off_is_asked_for_again(
    source: Callable[..., RegistrySource], with_mirror: Callable[[RawServer, RawServer], Path], alone: bool
) -> None:
    def answer(connection: socket.socket, _: str) -> bool:
        connection.sendall(response(body=MANIFEST)[: -5 if len(broken.heads) < 3 else None])
        return False

    broken = RawServer(answer)
    with broken, fixed(response(body=MANIFEST)) as server:
        settings = {} if alone else {"hosts_dir": with_mirror(server, broken)}
        assert source(broken if alone else server, **settings).get_manifest("v1") == MANIFEST
        assert len(broken.heads) == (3 if alone else 1)


def test_a_registry_that_has_enough_is_not_asked_more(source: Callable[..., RegistrySource]) -> None:
    with fixed(b"HTTP/1.1 429 Too Many Requests\r\nRetry-After: 0\r\nContent-Length: 0\r\n\r\n") as server:
        with pytest.raises(RegistryUnreachable, match="HTTP 429"):
            source(server).current_digest("v1")
        assert all(head.startswith("HEAD ") for head in server.heads)


@pytest.mark.timeout(20)
def test_a_layer_of_no_bytes_with_another_digest(source: Callable[..., RegistrySource], tmp_path: Path) -> None:
    with fixed(response()) as server, pytest.raises(DigestMismatch):
        pullworker._convert(source(server), layer(0), tmp_path / "out")


def test_a_layer_over_a_limit_is_asked_of_the_next_host(
    source: Callable[..., RegistrySource],
    with_mirror: Callable[[RawServer, RawServer], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def convert(read: Callable[[int], bytes], *_: object, **__: object) -> bytes:
        if (data := read(10)) == b"x" * 10:
            raise LayerLimit("entries", 1)
        return data

    monkeypatch.setattr(pullworker, "convert", convert)
    with fixed(response(body=b"y" * 10)) as server, fixed(response(body=b"x" * 10)) as mirror:
        opened = source(server, hosts_dir=with_mirror(server, mirror))
        assert cast("Any", pullworker._convert(opened, layer(10), tmp_path / "out")) == b"y" * 10
        with pytest.raises(LayerLimit):
            pullworker._convert(source(mirror), layer(10), tmp_path / "out")


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
