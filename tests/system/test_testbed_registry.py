"""Debian's docker-registry as a fixture: pushing, fetching, and the log of requests."""

from __future__ import annotations

import base64
import http.client
import json
import os
from typing import TYPE_CHECKING

import pytest

from tests.testbed import capabilities, oci
from tests.testbed.registry import PASSWORD, USER, PushError, Registry, push

if TYPE_CHECKING:
    from tests.testbed.images import BusyboxImage

ACCEPT = f"{oci.OCI_MANIFEST}, {oci.OCI_INDEX}, {oci.DOCKER_MANIFEST}, {oci.DOCKER_INDEX}"


def get(registry: Registry, path: str, **headers: str) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", registry.port, timeout=10)
    try:
        connection.request("GET", path, headers={"User-Agent": "test", "Accept": ACCEPT} | headers)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


@pytest.mark.parametrize("tag", ["latest", "multi", "docker", "docker-multi"])
def test_what_is_pushed_comes_back(registry: Registry, busybox_image: BusyboxImage, tag: str) -> None:
    layout = busybox_image.layout
    assert registry.push(layout, tag, "some/where", "v1") == f"{registry.address}/some/where:v1"
    found = oci.find_tag(layout, tag)
    assert get(registry, "/v2/some/where/manifests/v1") == (200, oci.blob_path(layout, found.digest).read_bytes())
    image = oci.read_image(layout, tag)
    for layer in image.layers:
        status, data = get(registry, f"/v2/some/where/blobs/{layer.digest}")
        assert (status, len(data)) == (200, layer.size)


def test_fetches_are_counted_by_blob(registry: Registry, busybox_image: BusyboxImage) -> None:
    registry.push(busybox_image.layout, "latest", "x")
    registry.forget()
    assert registry.requests() == []
    first, second, _ = busybox_image.layers
    for digest in (first.digest, second.digest, second.digest):
        get(registry, f"/v2/x/blobs/{digest}")
    get(registry, f"/v2/x/blobs/{first.digest}", Range="bytes=1-2")
    get(registry, "/v2/x/blobs/sha256:" + "0" * 64)
    assert registry.blob_fetches() == {first.digest: 1, second.digest: 2}
    assert [request.status for request in registry.requests("GET", "/blobs/")] == [200, 200, 200, 206, 404]
    last = registry.requests()[-1]
    assert (last.method, last.user_agent, last.digest) == ("GET", "test", "sha256:" + "0" * 64)


def test_a_registry_can_ask_for_a_password(busybox_image: BusyboxImage) -> None:
    capabilities.require("docker-registry")
    basic = f"Basic {base64.b64encode(f'{USER}:{PASSWORD}'.encode()).decode()}"
    with Registry(auth=True) as registry:
        with pytest.raises(PushError, match="401"):
            push(registry.address, busybox_image.layout, "latest", "x")
        registry.push(busybox_image.layout, "latest", "x")
        assert get(registry, "/v2/x/tags/list")[0] == 401
        status, body = get(registry, "/v2/x/tags/list", Authorization=basic)
        assert (status, json.loads(body)["tags"]) == (200, ["latest"])


def test_stopping_ends_the_process_and_removes_its_files() -> None:
    capabilities.require("docker-registry")
    registry = Registry()
    registry.start()
    pid = registry.pid
    registry.stop()
    assert not os.path.exists(f"/proc/{pid}")
    with pytest.raises(RuntimeError, match="not running"):
        registry.requests()
    registry.stop()  # again is no error


def test_the_session_registry_holds_every_tag(session_registry: Registry, busybox_image: BusyboxImage) -> None:
    status, body = get(session_registry, "/v2/busybox/tags/list")
    assert (status, set(json.loads(body)["tags"])) == (200, set(busybox_image.tags))
