"""When a tag is old, one HEAD request tells whether it still means the same image."""

import contextlib
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from afs.core.errors import NotFound
from afs.core.images import ImageRef, Platform, parse_image
from afs.core.rpc import serving
from afs.discovery.client import Announcer, Peer
from afs.discovery.directory import Directory
from afs.discovery.server import DiscoveryService
from afs.layerstore.images import Images
from afs.layerstore.manifests import Image
from afs.layerstore.peers import Peers
from afs.layerstore.pull import Puller
from afs.layerstore.registryoptions import RegistryOptions
from afs.layerstore.store import LayerStore
from afs.proto.v1.discovery_pb2_grpc import add_DiscoveryServicer_to_server
from tests.testbed import oci, tars
from tests.testbed.faults import Fault, FaultServer
from tests.testbed.layernodes import endless_room

AMD64 = Platform("linux", "amd64")


class Node:
    """A node's images, and a clock."""

    def __init__(self, images: Images, server: FaultServer, builder: oci.LayoutBuilder, store: LayerStore) -> None:
        self.images = images
        self.store = store
        self.server = server
        self.builder = builder
        self.now = 1_000_000.0

    async def resolve(self, tag: str) -> Image:
        """What app:tag is."""
        return await self.images.resolve(self.ref(tag), AMD64)

    def ref(self, tag: str) -> ImageRef:
        """The name of app:tag."""
        return parse_image(f"{self.server.address}/app:{tag}")

    def image(self, tag: str, content: bytes, *, index: bool = False) -> None:
        """Let *tag* mean an image with *content*."""
        layer = self.builder.add_layer(tars.tar_of({"a": content}))
        found = self.builder.add_image(None if index else tag, [layer])
        if index:
            self.builder.add_index(tag, {oci.ARM64: found, oci.AMD64: found})

    def asked(self) -> list[str]:
        """The requests for manifests and configs since this was called last."""
        found = [f"{seen.method} {seen.path.rpartition('/')[2]}" for seen in self.server.requests()]
        new, self._told = found[getattr(self, "_told", 0) :], len(found)
        return new


@pytest.fixture
async def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Node]:
    """A node with v1, a manifest, and v2, an index."""
    service = DiscoveryService(Directory(60.0), 1.0)
    builder = oci.LayoutBuilder(tmp_path / "layout")
    async with contextlib.AsyncExitStack() as stack:
        server = stack.enter_context(FaultServer(builder.directory))
        (address,) = await stack.enter_async_context(
            serving(["127.0.0.1:0"], lambda s: add_DiscoveryServicer_to_server(service, s), grace_s=0)
        )
        store = LayerStore(tmp_path / "store")
        stack.callback(store.close)
        puller = Puller(store, endless_room(store), RegistryOptions(backoff=0), 1)
        stack.push_async_callback(puller.close)
        peers = Peers()
        stack.push_async_callback(peers.close)
        announcer = Announcer(address, Peer("n1", "none", 1))
        stack.push_async_callback(announcer.leave)
        images = Images(store, puller, peers, announcer, 300.0, most=2)
        stack.push_async_callback(images.close)
        made = Node(images, server, builder, store)
        monkeypatch.setattr(time, "time", lambda: made.now)
        made.image("v1", b"one")
        made.image("v2", b"two", index=True)
        yield made


@pytest.mark.parametrize("tag", ["v1", "v2"])
async def test_a_tag_that_did_not_change_costs_one_head(node: Node, tag: str) -> None:
    first = await node.resolve(tag)
    assert node.asked()[0] == f"GET {tag}"
    node.now += 299
    assert await node.resolve(tag) is first
    assert node.asked() == []
    node.now += 2
    second = await node.resolve(tag)
    assert node.asked() == [f"HEAD {tag}"]
    assert "index" in node.server.requests()[-1].headers["accept"]
    assert (second.manifest_digest, second.resolved_unix) == (first.manifest_digest, first.resolved_unix + 301)
    node.now += 299
    assert await node.resolve(tag) is second
    assert node.asked() == []


@pytest.mark.parametrize("tag", ["v1", "v2"])
async def test_a_tag_that_changed_is_read_anew(node: Node, tag: str) -> None:
    first = await node.resolve(tag)
    node.image(tag, b"other", index=tag == "v2")
    node.now += 301
    node.asked()
    assert (await node.resolve(tag)).manifest_digest != first.manifest_digest
    assert node.asked()[:2] == [f"HEAD {tag}", f"GET {tag}"]


@pytest.mark.parametrize(
    "fault",
    [
        Fault("HEAD", status=405),
        Fault("HEAD", status=404),
        Fault("HEAD", headers={"Docker-Content-Digest": ""}),
        Fault("HEAD", headers={"Docker-Content-Digest": "nonsense"}),
    ],
    ids=["405", "404", "none", "nonsense"],
)
async def test_a_registry_whose_head_says_nothing_is_read(node: Node, fault: Fault) -> None:
    first = await node.resolve("v1")
    node.server.add(fault)
    node.now += 301
    node.asked()
    assert (await node.resolve("v1")).manifest_digest == first.manifest_digest
    assert node.asked()[:2] == ["HEAD v1", "GET v1"]


async def test_a_tag_is_believed_on_while_the_registry_is_down(node: Node) -> None:
    first = await node.resolve("v1")
    node.server.add(Fault("manifests", reset=True))
    node.now += 301
    assert await node.resolve("v1") is first


async def test_a_digest_is_never_asked_for_again(node: Node) -> None:
    digest = oci.find_tag(node.builder.directory, "v1").digest
    ref = parse_image(f"{node.server.address}/app@{digest}")
    first = await node.images.resolve(ref, AMD64)
    node.now += 1e6
    node.asked()
    assert await node.images.resolve(ref, AMD64) is first
    assert node.asked() == []


async def test_the_images_that_were_used_least_recently_are_forgotten(node: Node) -> None:
    node.image("v3", b"three")
    await node.resolve("v1")
    await node.resolve("v2")
    await node.resolve("v1")
    await node.resolve("v3")
    with pytest.raises(NotFound, match="v2 is not known here"):
        node.images.known(node.ref("v2"), AMD64)
    assert sorted(ref.tag for ref, _, _ in node.store.load_images()) == ["v1", "v3"]
    node.asked()
    await node.resolve("v2")
    assert node.asked()[0] == "GET v2"
