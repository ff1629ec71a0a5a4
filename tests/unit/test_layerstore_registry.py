"""Pulling from a registry that fails as told."""

import base64
import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import urllib3
from urllib3.util import Retry

from afs.core.errors import status_of
from afs.core.images import Platform, parse_image
from afs.layerstore import registry
from afs.layerstore.errors import CorruptImage, ImageNotFound, RegistryDenied, RegistryUnreachable
from afs.layerstore.manifests import Image, Layer, resolve
from afs.layerstore.registry import RegistrySource, make_pool
from afs.layerstore.registryoptions import RegistryOptions
from tests.testbed import faults, oci, tars
from tests.testbed.faults import Fault, FaultServer

AMD64 = Platform("linux", "amd64")
TAR = tars.tar_of({"a": bytes(range(256)) * 400})


POOLS: list[urllib3.PoolManager] = []


@pytest.fixture(autouse=True)
def _pools() -> Iterator[None]:
    """Close every connection afterwards."""
    yield
    while POOLS:
        POOLS.pop().clear()


@pytest.fixture
def layout(tmp_path: Path) -> Path:
    """A layout with an image v1."""
    builder = oci.LayoutBuilder(tmp_path / "layout")
    builder.add_image("v1", [builder.add_layer(TAR, "plain")])
    return builder.directory


@pytest.fixture
def server(layout: Path) -> Iterator[FaultServer]:
    """A registry without authentication."""
    with FaultServer(layout) as running:
        yield running
    assert not running.errors


def source_of(address: str, tag: str = "v1", **options: object) -> RegistrySource:
    """A source with a pool of its own."""
    given = RegistryOptions(backoff=0, **options)  # type: ignore[arg-type]  # what each test sets
    POOLS.append(make_pool(given))
    return RegistrySource(parse_image(f"{address}/app:{tag}"), POOLS[-1], given)


def resolved(source: RegistrySource, reference: str = "v1") -> Image:
    """What the image consists of."""
    return resolve("app", reference, AMD64, source.get_manifest, source.get_blob, 0)


def pulled(source: RegistrySource, layer: Layer) -> bytes:
    """A layer's blob."""
    with source.open_layer(layer) as read:
        return b"".join(iter(lambda: read(10_000), b""))


def layer_of(layout: Path) -> Layer:
    """The layer of v1."""
    (layer,) = oci.read_image(layout, "v1").layers
    return Layer(layer.diff_id, layer.digest, layer.size, layer.media_type)


def no_credentials_in(text: str) -> None:
    """No secrets and nothing of Python's in a message."""
    assert "0x" not in text
    assert "object at" not in text
    assert faults.PASSWORD not in text.replace("testbed layer", "")


def test_an_image_is_pulled(server: FaultServer) -> None:
    source = source_of(server.address, node_id="node7")
    image = resolved(source)
    assert pulled(source, image.layers[0]) == TAR
    seen = server.requests()
    assert {request.headers["user-agent"] for request in seen} == {"afs (node7)"}
    assert oci.OCI_INDEX in seen[0].headers["accept"]
    assert not any("authorization" in request.headers for request in seen)


def test_a_missing_tag(server: FaultServer) -> None:
    url = f"http://{server.address}/v2/app/manifests/v9"
    with pytest.raises(ImageNotFound) as caught:
        source_of(server.address, "v9").get_manifest("v9")
    expected = f"image {server.address}/app:v9 not found: MANIFEST_UNKNOWN manifest_unknown (HTTP 404 for {url})"
    assert caught.value.line == expected


@pytest.mark.parametrize("status", [401, 403])
def test_refusals(server: FaultServer, status: int) -> None:
    server.add(Fault("manifests", status=status, body=b'{"errors": [{"code": "DENIED", "message": "no way"}]}'))
    with pytest.raises(
        RegistryDenied, match=rf"^registry denies access to {server.address}/app:v1: DENIED no way \(HTTP"
    ):
        source_of(server.address).get_manifest("v1")


@pytest.mark.parametrize("body", [b"", b"<html>", b"[]", b'{"errors": []}', b'{"errors": ["x"]}', b"\xff"])
def test_odd_error_bodies(server: FaultServer, body: bytes) -> None:
    server.add(Fault("manifests", status=404, body=body))
    with pytest.raises(ImageNotFound, match=r"not found: Not Found \(HTTP 404 for "):
        source_of(server.address).get_manifest("v1")


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_a_busy_registry_is_asked_again(server: FaultServer, layout: Path, status: int) -> None:
    server.add(Fault("manifests", times=2, status=status), Fault("blobs", times=1, status=status))
    source = source_of(server.address)
    image = resolved(source)
    assert pulled(source, image.layers[0]) == TAR
    assert server.count("manifests") == 3


@pytest.mark.parametrize("status", [429, 503])
def test_a_registry_that_stays_busy_is_told(server: FaultServer, status: int) -> None:
    server.add(Fault("manifests", status=status, body=b'{"errors": [{"code": "TOOMANYREQUESTS", "message": "later"}]}'))
    with pytest.raises(RegistryUnreachable, match=f"TOOMANYREQUESTS later .HTTP {status} for ") as caught:
        source_of(server.address).get_manifest("v1")
    assert server.count("manifests") == 4
    assert status_of(caught.value).exit_code == 69


def test_retry_after_is_honoured(server: FaultServer) -> None:
    server.add(Fault("manifests", times=1, status=429, headers={"Retry-After": "1"}))
    started = time.monotonic()
    source_of(server.address).get_manifest("v1")
    assert time.monotonic() - started >= 1


def test_retry_after_is_bounded() -> None:
    assert isinstance(registry._RETRIES, Retry)
    assert registry._RETRIES.retry_after_max == 30


def test_a_reset_connection_is_tried_again(server: FaultServer) -> None:
    server.add(Fault("manifests", times=2, reset=True))
    assert source_of(server.address).get_manifest("v1")
    assert server.count("manifests") == 3


def test_a_registry_that_resets_every_connection(server: FaultServer) -> None:
    server.add(Fault("manifests", reset=True))
    with pytest.raises(RegistryUnreachable, match=f"^registry {server.address} is unreachable: ") as caught:
        source_of(server.address).get_manifest("v1")
    no_credentials_in(caught.value.line)


def test_nobody_listens() -> None:
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{reserved.getsockname()[1]}"
        with pytest.raises(RegistryUnreachable) as caught:
            source_of(address).get_manifest("v1")
    line = caught.value.line
    assert line.startswith(f"registry {address} is unreachable: ")
    assert line.endswith("Connection refused")
    no_credentials_in(line)


def test_an_unknown_host_name() -> None:
    with pytest.raises(RegistryUnreachable, match=r"^registry nowhere.invalid is unreachable: ") as caught:
        source_of("nowhere.invalid").get_manifest("v1")
    no_credentials_in(caught.value.line)


# Bodies


@pytest.mark.parametrize(
    "fault", [Fault("blobs", cut=5000), Fault("blobs", cut=5000, reset=True)], ids=["cut", "reset"]
)
def test_a_layer_that_breaks_off(server: FaultServer, layout: Path, fault: Fault) -> None:
    server.add(fault)
    layer = layer_of(layout)
    with pytest.raises(RegistryUnreachable) as caught:
        pulled(source_of(server.address), layer)
    assert f"reading layer {layer.blob_digest} failed: " in caught.value.line
    no_credentials_in(caught.value.line)


def test_a_length_that_is_too_long(server: FaultServer, layout: Path) -> None:
    server.add(Fault("blobs", content_length=len(TAR) + 1))
    with pytest.raises(RegistryUnreachable, match="reading layer sha256:"):
        pulled(source_of(server.address), layer_of(layout))


def test_a_short_body_that_claims_to_be_whole_is_for_the_digest(server: FaultServer, layout: Path) -> None:
    server.add(Fault("blobs", truncate=5000), Fault("manifests", truncate=50))
    source = source_of(server.address)
    assert pulled(source, layer_of(layout)) == TAR[:5000]
    with pytest.raises(CorruptImage, match="manifest is not JSON"):
        resolved(source)


def test_a_manifest_that_breaks_off(server: FaultServer) -> None:
    server.add(Fault("manifests", cut=50))
    with pytest.raises(RegistryUnreachable, match=r"reading http://.*/manifests/v1 failed: "):
        source_of(server.address).get_manifest("v1")


def test_a_manifest_without_end(server: FaultServer) -> None:
    server.add(Fault("manifests", body=b" " * ((4 << 20) + 1)))
    with pytest.raises(CorruptImage, match="manifests/v1 is larger than 4194304 bytes"):
        source_of(server.address).get_manifest("v1")


def test_wrong_bytes_are_found(server: FaultServer, layout: Path) -> None:
    digest = oci.find_tag(layout, "v1").digest
    server.add(Fault("manifests", corrupt=0))
    with pytest.raises(CorruptImage, match=f"its manifest should be {digest} but is sha256:"):
        resolved(source_of(server.address), digest)


def test_a_connection_is_good_again_after_a_failure(server: FaultServer, layout: Path) -> None:
    source, layer = source_of(server.address), layer_of(layout)
    server.add(Fault("blobs", times=1, cut=5000))
    with pytest.raises(RegistryUnreachable):
        pulled(source, layer)
    with source.open_layer(layer) as read:
        assert read(10) == TAR[:10]  # given up in the middle
    assert pulled(source, layer) == TAR


# Authentication


def docker_config(tmp_path: Path, address: str, entry: object) -> Path:
    """Docker's configuration file with one registry."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"auths": {address: entry}}))
    return path


AUTH = base64.b64encode(f"{faults.USER}:{faults.PASSWORD}".encode()).decode()


@pytest.mark.parametrize(
    "entry", [{"auth": AUTH}, {"username": faults.USER, "password": faults.PASSWORD}], ids=["auth", "username"]
)
@pytest.mark.parametrize("auth", ["basic", "token"])
def test_credentials_come_from_docker_s_file(layout: Path, tmp_path: Path, auth: str, entry: object) -> None:
    with FaultServer(layout, auth=auth) as server:  # type: ignore[arg-type]  # one of its literals
        source = source_of(server.address, docker_config=docker_config(tmp_path, server.address, entry))
        image = resolved(source)
        assert pulled(source, image.layers[0]) == TAR
        if auth == "token":
            (asked,) = server.requests("/token")  # one token serves all requests
            assert "scope=repository%3Aapp%3Apull" in asked.path
            assert "service=testbed" in asked.path


@pytest.mark.parametrize("auth", ["basic", "token"])
def test_without_credentials_it_is_denied(layout: Path, tmp_path: Path, auth: str) -> None:
    with FaultServer(layout, auth=auth) as server:  # type: ignore[arg-type]
        for config in (None, tmp_path / "missing", docker_config(tmp_path, "other.example.com", {"auth": AUTH})):
            with pytest.raises(RegistryDenied, match=f"^registry denies access to {server.address}/app:v1: "):
                source_of(server.address, docker_config=config).get_manifest("v1")


def test_a_token_service_that_fails(layout: Path, tmp_path: Path) -> None:
    with FaultServer(layout, auth="token") as server:
        config = docker_config(tmp_path, server.address, {"auth": AUTH})
        for fault, error, message in (
            (Fault("/token", times=1, status=403), RegistryDenied, "the token service answered HTTP 403"),
            (Fault("/token", times=1, body=b"{}"), RegistryDenied, "the token service's answer holds no token"),
            (Fault("/token", times=1, body=b"[]"), RegistryDenied, "the token service's answer holds no token"),
            (Fault("/token", reset=True), RegistryUnreachable, "its token service does not answer: "),
        ):
            server.clear()
            server.add(fault)
            with pytest.raises(error, match=message) as caught:
                source_of(server.address, docker_config=config).get_manifest("v1")
            no_credentials_in(str(caught.value))


def test_an_expired_token_is_renewed(layout: Path, tmp_path: Path) -> None:
    with FaultServer(layout, auth="token") as server:
        source = source_of(server.address, docker_config=docker_config(tmp_path, server.address, {"auth": AUTH}))
        image = resolved(source)
        challenge = f'Bearer realm="http://{server.address}/token",service="testbed"'
        server.add(Fault("blobs", times=1, status=401, headers={"WWW-Authenticate": challenge}))
        assert pulled(source, image.layers[0]) == TAR
        assert server.count("/token") == 2


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"auths": {"HOST": 3}}', '{"auths": null}', '{"auths": {"HOST": {"auth": 3}}}']
)
def test_a_bad_docker_config_is_told(layout: Path, tmp_path: Path, text: str) -> None:
    with FaultServer(layout, auth="basic") as server:
        path = tmp_path / "config.json"
        path.write_text(text.replace("HOST", server.address))
        with pytest.raises(RegistryDenied):
            source_of(server.address, docker_config=path).get_manifest("v1")


# Addresses


@pytest.mark.parametrize(
    ("name", "plain", "base"),
    [
        ("alpine", (), "https://registry-1.docker.io/v2/library/alpine"),
        ("registry.example.com/a/b", (), "https://registry.example.com/v2/a/b"),
        ("registry.example.com:5000/a", ("registry.example.com:5000",), "http://registry.example.com:5000/v2/a"),
        ("localhost:5000/a", (), "http://localhost:5000/v2/a"),
        ("127.0.0.1/a", (), "http://127.0.0.1/v2/a"),
        ("[::1]:5000/a", (), "http://[::1]:5000/v2/a"),
        ("127.0.0.1.example.com/a", (), "https://127.0.0.1.example.com/v2/a"),
    ],
)
def test_what_is_asked(name: str, plain: tuple[str, ...], base: str) -> None:
    options = RegistryOptions(plain)
    assert RegistrySource(parse_image(name), make_pool(options), options)._base == base
