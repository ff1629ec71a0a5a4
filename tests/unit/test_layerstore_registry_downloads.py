"""Layers that come through connections which break, stall or are slow, and through several at once."""

import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from afs.core.errors import AfsError
from afs.core.images import parse_image
from afs.layerstore import registrydownload
from afs.layerstore.afslyr.errors import DigestMismatch
from afs.layerstore.errors import CorruptImage, ImageNotFound, RegistryUnreachable
from afs.layerstore.manifests import Layer
from afs.layerstore.pullworker import _convert
from afs.layerstore.registry import Registries
from afs.layerstore.registryoptions import RegistryOptions
from tests.testbed import oci, tars
from tests.testbed.faults import Fault, FaultServer

PIECE = 64 << 10
DATA = random.Random(7).randbytes(20 * PIECE + 12345)  # noqa: S311 - any bytes
TAR = tars.tar_of({"data": DATA})


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A layout with an image v1 of one layer that does not compress."""
    builder = oci.LayoutBuilder(tmp_path_factory.mktemp("layout"))
    builder.add_image("v1", [builder.add_layer(TAR, "gzip")])
    return builder.directory


@pytest.fixture
def server(layout: Path) -> Iterator[FaultServer]:
    """A registry."""
    with FaultServer(layout) as running:
        yield running
    assert not running.errors


@pytest.fixture(params=[1, 4], ids=["one", "several"])
def connections(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Through one connection, or pieces through several; the pieces are small and every server counts as slow."""
    monkeypatch.setattr(registrydownload, "PIECE", PIECE)
    monkeypatch.setattr(registrydownload, "_READ", 10_000)
    monkeypatch.setattr(registrydownload, "_FAST", 1 << 60)
    return int(request.param)


def layer_of(layout: Path) -> Layer:
    """The layer of v1."""
    (layer,) = oci.read_image(layout, "v1").layers
    return Layer(layer.diff_id, layer.digest, layer.size, layer.media_type)


def blob(layout: Path) -> bytes:
    """Its bytes."""
    return oci.blob_path(layout, layer_of(layout).blob_digest).read_bytes()


def fetched(server: FaultServer, connections: int, **options: object) -> bytes:
    """The layer's blob through *connections*; no thread is left whatever happens."""
    given = RegistryOptions(backoff=0, connections=connections, parallel_from=0, **options)  # type: ignore[arg-type]
    registries = Registries(given)
    try:
        with registries.source(parse_image(f"{server.address}/app:v1")).open_layer(layer_of(server.layout)) as read:
            return b"".join(iter(lambda: read(30_000), b""))
    finally:
        registries.close()
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("download")]


def test_a_sound_layer(server: FaultServer, connections: int) -> None:
    assert fetched(server, connections) == blob(server.layout)
    ranges = [request.headers.get("range") for request in server.requests("blobs")]
    if connections == 1:
        assert ranges == [None]
    else:
        assert len(ranges) in (20, 21)  # how much comes at once differs
        assert ranges[0] is None
        assert server.connections <= 1 + connections


@pytest.mark.parametrize(
    "fault",
    [
        Fault("blobs", times=7, cut=20_000),
        Fault("blobs", times=7, cut=50_000, reset=True),
        Fault("blobs", times=2, reset=True),
        Fault("blobs", times=2, cut=0),
        Fault("blobs", times=2, status=503),
    ],
    ids=["cut", "reset", "no answer", "no body", "busy"],
)
def test_it_goes_on_where_it_broke_off(server: FaultServer, connections: int, fault: Fault) -> None:
    server.add(fault)
    assert fetched(server, connections) == blob(server.layout)
    if connections == 1 and fault.cut == 20_000:
        starts = [request.headers.get("range") for request in server.requests("blobs")]
        size = len(blob(server.layout))
        assert starts == [None, *(f"bytes={number * 20_000}-{size - 1}" for number in range(1, 8))]


def test_a_stalled_connection_is_left(server: FaultServer, connections: int) -> None:
    server.add(Fault("blobs", times=2, stall=30_000))
    assert fetched(server, connections, stall_s=0.2) == blob(server.layout)


def test_a_server_that_ignores_ranges(server: FaultServer, connections: int) -> None:
    server.ranges = False
    server.add(Fault("blobs", times=2, cut=100_000))
    assert fetched(server, connections) == blob(server.layout)
    assert server.count("blobs") == 3


def test_a_server_that_stops_to_honour_ranges(server: FaultServer, connections: int) -> None:
    server.add(Fault("blobs", times=1, cut=10_000), Fault("blobs", ignore_range=True))
    assert fetched(server, connections) == blob(server.layout)


def test_ranges_that_are_ignored_later_cost_the_blob_only_once_more(server: FaultServer, connections: int) -> None:
    server.add(Fault("blobs", times=7), Fault("blobs", ignore_range=True))
    assert fetched(server, connections) == blob(server.layout)
    assert server.count("blobs") <= (1 if connections == 1 else 7 + connections + 1)


@pytest.mark.parametrize("status", [400, 501])
def test_a_server_that_refuses_ranges(server: FaultServer, connections: int, status: int) -> None:
    refuse = Fault("blobs", times=1, status=status)
    server.add(Fault("blobs", times=1, cut=100_000), refuse, Fault("blobs", ignore_range=True))
    assert fetched(server, connections) == blob(server.layout)
    assert any("range" not in request.headers for request in server.requests("blobs")[2:])


def test_threads_that_cannot_start_end_the_others(
    server: FaultServer, connections: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if connections == 1:
        return
    start = threading.Thread.start

    def fail(self: threading.Thread) -> None:
        if self.name == "download-2":
            raise RuntimeError("can't start new thread")
        start(self)

    monkeypatch.setattr(threading.Thread, "start", fail)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        fetched(server, connections)


def test_a_wrong_range_is_no_answer(server: FaultServer, connections: int) -> None:
    server.add(Fault("blobs", times=1, cut=10_000), Fault("blobs", headers={"Content-Range": "bytes 5-9/10"}))
    with pytest.raises(RegistryUnreachable, match="it answers with another range than it was asked for"):
        fetched(server, connections)


def test_a_range_of_another_blob_is_told(server: FaultServer, connections: int) -> None:
    server.add(Fault("blobs", times=1, cut=10_000))
    server.add(Fault("blobs", status=416, headers={"Content-Range": "bytes */9999"}))
    with pytest.raises(CorruptImage, match=r"should have .* bytes but has 9999 at "):
        fetched(server, connections)


@pytest.mark.parametrize("fault", [Fault("blobs", cut=0), Fault("blobs", stall=0)], ids=["cut", "stalled"])
def test_it_ends_without_progress(server: FaultServer, connections: int, fault: Fault) -> None:
    server.add(Fault("blobs", times=1, cut=30_000), fault)
    with pytest.raises(RegistryUnreachable) as caught:
        fetched(server, connections, stall_s=30.0 if fault.stall is None else 0.2)
    line, layer = caught.value.line, layer_of(server.layout)
    assert line.startswith(f"registry {server.address} is unreachable: image {server.address}/app:v1: ")
    assert f"reading layer {layer.blob_digest} failed: breaking off at byte " in line
    assert fault.stall is not None or f"at byte 30000 of {layer.blob_size}: " in line
    assert "0x" not in line
    assert server.count("blobs") <= 2 + 4 * 3


def test_a_layer_that_disappears(server: FaultServer, connections: int) -> None:
    server.add(Fault("blobs", times=1, cut=30_000), Fault("blobs", status=404))
    with pytest.raises(ImageNotFound, match=r"\(HTTP 404 for http://.*/blobs/sha256:"):
        fetched(server, connections)


def test_content_that_changes_in_between_is_found_by_its_digest(
    server: FaultServer, connections: int, tmp_path: Path
) -> None:
    server.add(Fault("blobs", times=1, cut=30_000), Fault("blobs", corrupt=1000))
    registries = Registries(RegistryOptions(backoff=0, connections=connections, parallel_from=0))
    source = registries.source(parse_image(f"{server.address}/app:v1"))
    with pytest.raises(DigestMismatch):
        _convert(source, layer_of(server.layout), tmp_path / "out")
    registries.close()


@pytest.mark.timeout(25)  # less than the time-out of a stalled body, 30 s
def test_a_reader_that_goes_away_ends_the_threads(server: FaultServer, connections: int) -> None:
    server.add(Fault("blobs", stall=20_000))
    registries = Registries(RegistryOptions(backoff=0, connections=connections, parallel_from=0))
    with registries.source(parse_image(f"{server.address}/app:v1")).open_layer(layer_of(server.layout)) as read:
        assert read(10) == blob(server.layout)[:10]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("download")]
    registries.close()


def test_memory_is_bounded(server: FaultServer, monkeypatch: pytest.MonkeyPatch, connections: int) -> None:
    if connections == 1:
        return
    fetched_bytes, handed = 0, 0
    most = 0
    lock = threading.Lock()
    put = registrydownload._Pieces._put

    def counting(self: registrydownload._Pieces, index: int, data: bytes) -> None:
        nonlocal fetched_bytes, most
        with lock:
            fetched_bytes += len(data)
            most = max(most, fetched_bytes - handed)
        put(self, index, data)

    monkeypatch.setattr(registrydownload._Pieces, "_put", counting)
    registries = Registries(RegistryOptions(connections=connections, parallel_from=0))
    reached = threading.Event()
    with registries.source(parse_image(f"{server.address}/app:v1")).open_layer(layer_of(server.layout)) as read:
        while handed < PIECE:  # through the first connection
            handed += len(read(10_000))
        fetched_bytes = handed
        handed += len(read(10_000))  # now the threads run, and fill what they may
        while server.count("blobs") < 1 + connections:
            reached.wait(0.01)
        while data := read(10_000):
            with lock:
                handed += len(data)
    assert PIECE < most <= (connections + 1) * PIECE
    registries.close()


def test_a_fast_server_is_read_through_one_connection(
    server: FaultServer, connections: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registrydownload, "_FAST", 1)
    assert fetched(server, connections) == blob(server.layout)
    assert server.count("blobs") == 1
    assert server.connections == 1


def test_a_small_layer_comes_through_one_connection(server: FaultServer) -> None:
    registries = Registries(RegistryOptions(connections=4))
    with registries.source(parse_image(f"{server.address}/app:v1")).open_layer(layer_of(server.layout)) as read:
        while read(1 << 20):
            pass
    registries.close()
    assert [request.headers.get("range") for request in server.requests("blobs")] == [None]


def test_several_slow_connections_are_faster_than_one(server: FaultServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registrydownload, "PIECE", PIECE)
    server.add(Fault("blobs", rate=4 << 20))
    seconds = []
    for connections in (1, 4):
        started = time.monotonic()
        assert fetched(server, connections) == blob(server.layout)
        seconds.append(time.monotonic() - started)
    assert server.connections >= 4
    print(f"one connection {seconds[0]:.2f} s, four {seconds[1]:.2f} s")


def test_redirects_are_asked_for_once(server: FaultServer, layout: Path, connections: int) -> None:
    layer = layer_of(layout)
    with FaultServer(layout) as store:
        target = f"{store.url}/v2/x/blobs/{layer.blob_digest}?signature=1"
        server.add(Fault("blobs", status=307, headers={"Location": target}))
        assert fetched(server, connections) == blob(layout)
        assert server.count("blobs") <= connections  # one, and threads that start together
        assert store.count("blobs") in ((1,) if connections == 1 else (20, 21))
        assert all("signature=1" in request.path for request in store.requests())


def test_a_redirect_that_expires_is_asked_for_again(server: FaultServer, layout: Path, connections: int) -> None:
    layer = layer_of(layout)
    with FaultServer(layout) as store:
        target = f"{store.url}/v2/x/blobs/{layer.blob_digest}"
        server.add(Fault("blobs", status=307, headers={"Location": target}))
        store.add(Fault("blobs", times=1, cut=30_000), Fault("blobs", times=1, status=403))
        assert fetched(server, connections) == blob(layout)
        assert server.count("blobs") >= 2


# Mirrors


def with_mirrors(tmp_path: Path, server: FaultServer, *mirrors: FaultServer) -> Path:
    """A directory of settings in which *mirrors* stand in for *server*."""
    directory = tmp_path / "certs.d" / server.address
    directory.mkdir(parents=True)
    tables = "".join(f'[host."{mirror.url}"]\n' for mirror in mirrors)
    (directory / "hosts.toml").write_text(f'server = "{server.url}"\n{tables}')
    return directory.parent


@pytest.mark.parametrize(
    ("fault", "logged"),
    [
        (Fault("blobs", status=404), "HTTP 404"),
        (Fault("blobs", status=401), "HTTP 401"),
        (Fault("blobs", status=403), "HTTP 403"),
        (Fault("blobs", status=500), "HTTP 500"),
        (Fault("blobs", reset=True), "onnection"),
        (Fault("blobs", truncate=1000), ""),
        (Fault("blobs", cut=0), "breaking off at byte 0"),
        (Fault("blobs", cut=100_000, times=1), None),
        (Fault("blobs", corrupt=1000), "the blob's digest is"),
    ],
    ids=["404", "401", "403", "500", "reset", "short", "cut", "cut once", "corrupt"],
)
def test_a_bad_mirror_costs_nothing_but_a_line_in_the_log(
    server: FaultServer,
    layout: Path,
    connections: int,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    fault: Fault,
    logged: str | None,
) -> None:
    with FaultServer(layout) as mirror:
        mirror.add(fault)
        given = RegistryOptions(
            backoff=0, connections=connections, parallel_from=0, hosts_dir=with_mirrors(tmp_path, server, mirror)
        )
        registries = Registries(given)
        source = registries.source(parse_image(f"{server.address}/app:v1"))
        assert _convert(source, layer_of(layout), tmp_path / "out").diff_id == layer_of(layout).diff_id
        registries.close()
        assert {request.path.partition("?")[2] for request in mirror.requests()} == {
            f"ns={server.address.replace(':', '%3A')}"
        }
    if logged is None:
        assert server.count("blobs") == 0
    else:
        assert server.count("blobs") > 0
        assert logged in caplog.text
    assert {"ns" in request.path for request in server.requests()} <= {False}


def test_a_mirror_that_breaks_off_is_continued_elsewhere(
    server: FaultServer, layout: Path, connections: int, tmp_path: Path
) -> None:
    with FaultServer(layout) as mirror:
        mirror.add(Fault("blobs", times=1, cut=50_000), Fault("blobs", reset=True))
        assert fetched(server, connections, hosts_dir=with_mirrors(tmp_path, server, mirror)) == blob(layout)
        assert server.requests("blobs")[0].headers["range"].startswith("bytes=50000-")


def test_a_good_server_is_found_behind_two_bad_mirrors(server: FaultServer, layout: Path, tmp_path: Path) -> None:
    with FaultServer(layout) as first, FaultServer(layout) as second:
        first.add(Fault("blobs", times=1, corrupt=1000, cut=50_000), Fault("blobs", reset=True))
        second.add(Fault("blobs", corrupt=70_000))
        registries = Registries(RegistryOptions(backoff=0, hosts_dir=with_mirrors(tmp_path, server, first, second)))
        source = registries.source(parse_image(f"{server.address}/app:v1"))
        _convert(source, layer_of(layout), tmp_path / "out")
        assert server.count("blobs") == 1
        server.add(Fault("blobs", corrupt=1000))
        with pytest.raises(DigestMismatch):
            _convert(registries.source(parse_image(f"{server.address}/app:v1")), layer_of(layout), tmp_path / "out2")
        registries.close()


def test_all_causes_are_in_the_error(server: FaultServer, layout: Path, tmp_path: Path) -> None:
    with FaultServer(layout) as mirror:
        mirror.add(Fault("blobs", status=404))
        server.add(Fault("blobs", status=500))
        with pytest.raises(AfsError) as caught:
            fetched(server, 1, hosts_dir=with_mirrors(tmp_path, server, mirror))
        assert isinstance(caught.value, RegistryUnreachable)
        assert f"; before it, {mirror.address}: Not Found (HTTP 404 for " in caught.value.line
