"""The registry that fails on demand."""

from __future__ import annotations

import http.client
import threading
from typing import TYPE_CHECKING

import pytest

from tests.testbed import oci
from tests.testbed.faults import TOKEN, Fault, FaultServer

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

BLOB = b"0123456789" * 1000


@pytest.fixture
def layout(tmp_path: Path) -> Path:
    builder = oci.LayoutBuilder(tmp_path / "layout")
    builder.add_image("latest", [builder.add_layer(BLOB, "plain")])
    return builder.directory


@pytest.fixture
def server(layout: Path) -> Iterator[FaultServer]:
    with FaultServer(layout) as running:
        yield running
    assert running.errors == []


def get(
    server: FaultServer, path: str, method: str = "GET", **headers: str
) -> tuple[int, bytes, http.client.HTTPMessage]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    try:
        connection.request(method, path, headers=headers)
        response = connection.getresponse()
        return response.status, response.read(), response.headers
    finally:
        connection.close()


def blob_of(server: FaultServer) -> str:
    return f"/v2/any/name/blobs/{oci.read_image(server.layout, 'latest').layers[0].digest}"


def test_it_serves_tags_digests_blobs_and_ranges(server: FaultServer) -> None:
    image = oci.read_image(server.layout, "latest")
    status, by_tag, headers = get(server, "/v2/x/manifests/latest")
    assert (status, headers["Content-Type"]) == (200, oci.OCI_MANIFEST)
    assert headers["Docker-Content-Digest"] == image.manifest.digest
    assert get(server, f"/v2/x/manifests/{image.manifest.digest}")[1] == by_tag
    assert get(server, blob_of(server))[1] == BLOB
    status, part, headers = get(server, blob_of(server), Range="bytes=10-19")
    assert (status, part, headers["Content-Range"]) == (206, b"0123456789", "bytes 10-19/10000")
    assert get(server, blob_of(server), Range="bytes=10000-")[0] == 416
    assert get(server, "/v2/x/manifests/none")[0] == 404
    status, nothing, headers = get(server, blob_of(server), "HEAD")
    assert (status, nothing, headers["Content-Length"]) == (200, b"", "10000")
    assert server.count("GET .*/blobs/") == 3


def test_a_fault_hits_as_often_as_told(server: FaultServer) -> None:
    server.add(Fault("GET .*/blobs/", times=2, status=503, headers={"Retry-After": "0"}))
    assert [get(server, blob_of(server))[0] for _ in range(3)] == [503, 503, 200]
    server.add(Fault("/manifests/", status=429, body=b"slow down"))
    assert get(server, "/v2/x/manifests/latest")[:2] == (429, b"slow down")
    server.clear()
    assert get(server, "/v2/x/manifests/latest")[0] == 200


def test_wrong_bytes_and_lengths(server: FaultServer) -> None:
    path = blob_of(server)
    server.add(Fault("/blobs/", times=1, corrupt=5))
    assert get(server, path)[1] == BLOB[:5] + bytes([BLOB[5] ^ 0xFF]) + BLOB[6:]
    server.add(Fault("/blobs/", times=1, truncate=100))
    assert get(server, path)[1] == BLOB[:100]
    server.add(Fault("/blobs/", times=1, content_length=50))
    assert get(server, path)[1] == BLOB[:50]
    server.add(Fault("/blobs/", times=1, content_length=20_000))
    with pytest.raises(http.client.IncompleteRead):
        get(server, path)


def test_broken_connections(server: FaultServer) -> None:
    path = blob_of(server)
    server.add(Fault("/blobs/", times=1, cut=1234))
    with pytest.raises(http.client.IncompleteRead) as caught:
        get(server, path)
    assert caught.value.partial == BLOB[:1234]
    server.add(Fault("/blobs/", times=1, reset=True))
    with pytest.raises(ConnectionError):
        get(server, path)
    server.add(Fault("/blobs/", times=1, reset=True, cut=10))
    with pytest.raises((ConnectionError, http.client.IncompleteRead)):
        get(server, path)
    assert get(server, path)[1] == BLOB


def test_a_gate_holds_an_answer_and_stop_opens_it(layout: Path) -> None:
    gate = threading.Event()
    results: list[object] = []

    def fetch(running: FaultServer) -> None:
        try:
            results.append(get(running, "/v2/x/manifests/latest")[0])
        except (OSError, http.client.HTTPException) as error:
            results.append(error)

    with FaultServer(layout) as held:
        held.add(Fault("/manifests/", gate=gate))
        client = threading.Thread(target=fetch, args=(held,))
        client.start()
        while not held.count("/manifests/"):
            client.join(0.01)
        assert results == []
    client.join(10)
    assert gate.is_set()
    assert len(results) == 1


def test_authentication(layout: Path) -> None:
    basic = "Basic YWZzOnRlc3RiZWQ="
    with FaultServer(layout, auth="basic") as server:
        status, _, headers = get(server, "/v2/")
        assert (status, headers["WWW-Authenticate"]) == (401, 'Basic realm="testbed"')
        assert get(server, "/v2/", Authorization=basic)[0] == 200
    with FaultServer(layout, auth="token") as server:
        status, _, headers = get(server, "/v2/a/b/manifests/latest")
        assert status == 401
        assert headers["WWW-Authenticate"].endswith('service="testbed",scope="repository:a/b:pull"')
        assert get(server, "/token")[0] == 401
        assert TOKEN.encode() in get(server, "/token", Authorization=basic)[1]
        assert get(server, "/v2/a/b/manifests/latest", Authorization=f"Bearer {TOKEN}")[0] == 200


def test_a_kept_connection_does_not_delay_the_end(layout: Path) -> None:
    with FaultServer(layout) as server:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
        connection.request("GET", "/v2/")
        connection.getresponse().read()
    connection.close()
