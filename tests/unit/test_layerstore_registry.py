"""Pulling from a registry that fails as told."""

import base64
import contextlib
import json
import os
import socket
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import pytest
from typing_extensions import override

from afs.core.config import load
from afs.core.errors import status_of
from afs.core.images import Platform, parse_image
from afs.layerstore.__main__ import Config, _registry_options
from afs.layerstore.errors import CorruptImage, ImageNotFound, RegistryDenied, RegistryUnreachable
from afs.layerstore.manifests import Image, Layer, resolve
from afs.layerstore.pullworker import _options, encode_options
from afs.layerstore.registry import Registries, RegistrySource
from afs.layerstore.registryfailures import RequestFailed
from afs.layerstore.registryhosts import hosts_of
from afs.layerstore.registryoptions import RegistryOptions
from afs.layerstore.registryproxies import Proxies
from afs.layerstore.registrystop import Stop
from tests.testbed import faults, oci, tars
from tests.testbed.faults import Fault, FaultServer

AMD64 = Platform("linux", "amd64")
TAR = tars.tar_of({"a": bytes(range(256)) * 400})


OPENED: list[Registries] = []


@pytest.fixture(autouse=True)
def _opened() -> Iterator[None]:
    """Close every connection afterwards."""
    yield
    while OPENED:
        OPENED.pop().close()


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


def registries(**options: object) -> Registries:
    """Closed at the end of the test."""
    OPENED.append(Registries(RegistryOptions(**{"backoff": 0.0, **options})))  # type: ignore[arg-type]  # what each test sets
    return OPENED[-1]


def source_of(address: str, tag: str = "v1", **options: object) -> RegistrySource:
    """A source with connections of its own."""
    return registries(**options).source(parse_image(f"{address}/app:{tag}"))


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


class Pauses(Stop):
    """Stands for the event that ends pauses: notes them and does not wait."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: list[float] = []

    @override
    def wait(self, seconds: float) -> bool:

        self.seconds.append(seconds)
        return False


def pauses_of(server: FaultServer, fault: Fault, **options: object) -> list[float]:
    """Seconds that a request which meets *fault* waits between its tries."""
    server.add(fault)
    opened = registries(**{"backoff": 1.0, **options})
    (host,) = hosts_of(server.address, opened.options)
    pauses = Pauses()
    with contextlib.suppress(RequestFailed):
        opened.http.request("GET", host, "/v2/app/manifests/v1", {}, {}, stop=pauses).close()
    return pauses.seconds


def test_pauses_grow_and_are_out_of_step(server: FaultServer) -> None:
    first, second, third = pauses_of(server, Fault("manifests", status=503))
    assert 0.5 <= first <= 1 <= second <= 2 <= third <= 4
    assert pauses_of(server, Fault("manifests", status=503))[0] != first


def test_retry_after_is_honoured(server: FaultServer) -> None:
    fault = Fault("manifests", times=2, status=429, headers={"Retry-After": "7"})
    assert pauses_of(server, fault) == [7, 7]


def test_retry_after_may_be_a_date(server: FaultServer) -> None:
    when = format_datetime(datetime.now(UTC) + timedelta(seconds=20), usegmt=True)
    (pause,) = pauses_of(server, Fault("manifests", times=1, status=503, headers={"Retry-After": when}))
    assert 10 < pause <= 20


def test_retry_after_is_bounded_and_so_is_the_whole(server: FaultServer) -> None:
    assert pauses_of(server, Fault("manifests", status=429, headers={"Retry-After": "3600"})) == [30]


def test_a_retry_after_that_makes_no_sense_does_not_count(server: FaultServer) -> None:
    (pause,) = pauses_of(server, Fault("manifests", times=1, status=429, headers={"Retry-After": "soon"}))
    assert 0.5 <= pause <= 1


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
    assert line.startswith(f"registry {address} is unreachable: image {address}/app:v1: ")
    assert line.endswith("Connection refused")
    no_credentials_in(line)


def test_an_unknown_host_name() -> None:
    with pytest.raises(RegistryUnreachable, match=r"^registry nowhere.invalid is unreachable: ") as caught:
        source_of("nowhere.invalid").get_manifest("v1")
    no_credentials_in(caught.value.line)


# Bodies


def test_a_layer_of_another_length_is_told(server: FaultServer, layout: Path) -> None:
    layer = layer_of(layout)
    for fault, length in (
        (Fault("blobs", content_length=len(TAR) + 1), len(TAR) + 1),
        (Fault("blobs", truncate=5000), 5000),
    ):
        server.clear()
        server.add(fault)
        with pytest.raises(CorruptImage) as caught:
            pulled(source_of(server.address), layer)
        assert f"app:v1 is corrupt: layer {layer.blob_digest} should have {len(TAR)} bytes but has {length}" in str(
            caught.value
        )


def test_a_short_manifest_is_told(server: FaultServer) -> None:
    server.add(Fault("manifests", truncate=50))
    with pytest.raises(CorruptImage, match="manifest is not JSON"):
        resolved(source_of(server.address))


def test_a_manifest_that_breaks_off(server: FaultServer) -> None:
    server.add(Fault("manifests", cut=50))
    with pytest.raises(RegistryUnreachable, match=r"http://.*/manifests/v1: reading it failed: "):
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


def test_a_connection_is_kept(server: FaultServer, layout: Path) -> None:
    source = source_of(server.address)
    image = resolved(source)
    with source.open_layer(image.layers[0]) as read:
        assert read(10) == TAR[:10]  # given up in the middle
    assert pulled(source, image.layers[0]) == TAR
    assert resolved(source) == image
    assert server.connections == 2


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


# Settings


def test_the_service_s_settings_reach_the_client(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "environ", {"HTTPS_PROXY": "http://p:1", "no_proxy": "x"})
    flags: dict[str, object] = {
        "plain_http": ("a:1",),
        "insecure_registry": ("b:2",),
        "registry_config": tmp_path,
        "registry_cas": ("/ca.pem",),
        "docker_config": tmp_path / "config.json",
        "download_connections": 7,
    }
    config = load(Config, "layerstore", file=None, environ={}, flags=flags)
    options = _registry_options(config, "n1")
    assert options.plain_http == ("a:1",)
    assert options.insecure == ("b:2",)
    assert options.hosts_dir == tmp_path
    assert options.authorities == (Path("/ca.pem"),)
    assert options.proxies == Proxies(https="http://p:1", no_proxy="x")
    assert (options.connections, options.node_id) == (7, "n1")
    # and from there, as JSON, the processes that pull layers
    assert _options(json.loads(json.dumps(encode_options(options)))) == options


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
    opened, ref = registries(plain_http=plain), parse_image(name)
    (host,) = hosts_of(ref.registry, opened.options)
    assert f"{opened.http.base(host)}{host.path}/{ref.repository}" == base
