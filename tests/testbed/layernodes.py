"""Layerstores in one process: stores in temporary directories, real gRPC servers, a real discovery, a registry that fails."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import io
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from typing_extensions import override

from afs.core.digests import chain_ids, hex_of
from afs.core.images import ImageRef, Platform, parse_image
from afs.core.rpc import serving
from afs.discovery.client import Announcer, Peer
from afs.discovery.directory import Directory
from afs.discovery.server import DiscoveryService
from afs.layerstore.afslyr.convert import convert
from afs.layerstore.afslyr.reader import verify_layer
from afs.layerstore.chunkserver import serving_chunks
from afs.layerstore.images import Images
from afs.layerstore.layers import Layers
from afs.layerstore.leases import LEASE_S, Leases
from afs.layerstore.manifests import Layer
from afs.layerstore.origins import Origin
from afs.layerstore.partial import PartialLayer
from afs.layerstore.peers import Peers
from afs.layerstore.pull import Puller
from afs.layerstore.quota import Quota
from afs.layerstore.registryoptions import RegistryOptions
from afs.layerstore.room import Room
from afs.layerstore.server import NodeService, PeerService
from afs.layerstore.store import CompleteLayer, LayerStore
from afs.layerstore.supplying import Supplying
from afs.layerstore.tracefiles import TraceFiles
from afs.layerstore.tracing import RECORD_S, Tracing
from afs.proto.v1 import layerstore_pb2 as pb
from afs.proto.v1.discovery_pb2_grpc import add_DiscoveryServicer_to_server
from afs.proto.v1.layerstore_pb2_grpc import (
    add_LayerstoreNodeServicer_to_server,
    add_LayerstorePeerServicer_to_server,
)
from tests.testbed import oci, tars
from tests.testbed.faults import FaultServer
from tests.testbed.forged import Forged

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

    import grpc.aio

    from afs.layerstore.chunkserver import Range
    from afs.layerstore.chunkwire import Question
    from afs.layerstore.completion import Completing

AMD64 = Platform("linux", "amd64")
TAR = tars.tar_of({name: bytes([number]) * 225_000 for number, name in enumerate("abcdef")})
TAGS = ("v1", "v2", "v3", "v4")
LAYER_SIZE = 1_380_000
"""About what the layer of each takes in the cache, in bytes."""
OTHER = "sha256:" + "0" * 64


class Service(PeerService):
    """The real service, with chunks that a test spoils."""

    spoil = False
    gate: asyncio.Event | None = None
    """What reads of chunks wait for."""
    silent_after: int | None = None
    """Messages of a description behind which nothing comes."""

    def __init__(self, images: Images, layers: Layers, tracing: Tracing) -> None:
        super().__init__(images, layers, tracing)
        self.chunks: list[int] = []

    @override
    async def read_chunk(self, question: Question) -> bytes:
        self.chunks.append(question.index)
        if self.gate is not None:
            await self.gate.wait()
        data = await super().read_chunk(question)
        return bytes(len(data)) if self.spoil else data

    @override
    def find_chunk(self, question: Question) -> Range | None:
        found = None if self.spoil or self.gate is not None else super().find_chunk(question)
        if found is not None:
            self.chunks.append(question.index)
        return found

    @override
    async def DescribeLayer(
        self, request: pb.DescribeLayerRequest, context: Any
    ) -> AsyncIterator[pb.DescribeLayerResponse]:
        said = 0
        async for message in super().DescribeLayer(request, context):
            if said == self.silent_after:
                await asyncio.Event().wait()
            said += 1
            if message.data:
                self.chunks.append(message.index)
            if message.data and self.spoil:
                message.data = bytes(len(message.data))
            yield message


class Clock:
    """Monotonic time as a test wants it, for leases."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        """The time."""
        return self.now


def endless_room(store: LayerStore) -> Room:
    """Room that no layer of a test fills."""
    return Room(store, Quota(1 << 50), Leases(0.0), headroom=0)


@dataclass(frozen=True, slots=True)
class Stack:
    """An image of several layers in the registry, bottom first."""

    ref: ImageRef
    tars: list[bytes]
    layers: list[Layer]
    manifest_digest: str

    @property
    def diff_ids(self) -> list[str]:
        """Of all layers."""
        return [layer.diff_id for layer in self.layers]

    def wanted(self, number: int, *names: pb.ImageName, diff_id: bool = False) -> pb.WantedLayer:
        """The message for a layer."""
        chains = ["", *chain_ids(self.diff_ids)]
        return pb.WantedLayer(
            chain_id=chains[number + 1],
            parent_chain_id=chains[number],
            diff_id=self.diff_ids[number] if diff_id else "",
            names=names,
        )


@dataclass(slots=True)
class Node:
    """A layerstore's parts."""

    store: LayerStore
    announcer: Announcer
    room: Room
    layers: Layers
    images: Images
    puller: Puller
    tracing: Tracing
    supplying: Supplying
    service: Service
    peers: Peers
    address: str
    stop_serving: Callable[[], Any]

    @property
    def leases(self) -> Leases:
        """Who needs what."""
        return self.room.leases

    def hold(self, *tars: bytes) -> None:
        """Have layers complete here, quicker than by a pull."""
        for tar in tars:
            path = self.store.temporary()
            convert(io.BytesIO(tar).read, path)
            layer = self.store.commit(path, "sha256:" + hashlib.sha256(tar).hexdigest())
            self.room.note(layer.diff_id)
            self.announcer.hold(layer.diff_id, layer.layout.file_size, complete=True)

    def evicted(self) -> int:
        """How many layers went so far."""
        return self.room.status().evicted


class World:
    """Discovery, a registry, and nodes."""

    def __init__(
        self,
        tmp_path: Path,
        builder: oci.LayoutBuilder,
        server: FaultServer,
        directory: Directory,
        discovery: str,
        stop_discovery: Callable[[], Any],
        stack: contextlib.AsyncExitStack,
    ) -> None:
        self.builder = builder  # of what the registry has
        self.directory = directory
        self.tmp_path = tmp_path
        self.server = server
        self.discovery = discovery
        self.stop_discovery = stop_discovery
        self.stack = stack
        self.clock = Clock()
        self.origins = [self._origin(tag) for tag in TAGS]
        self.origin = self.origins[0]
        self.diff_id = self.origin.layer.diff_id

    def _origin(self, tag: str) -> Origin:
        stored = oci.read_image(self.server.layout, tag).layers[0]
        layer = Layer(stored.diff_id, stored.digest, stored.size, stored.media_type)
        return Origin(parse_image(f"{self.server.address}/app:{tag}"), AMD64, layer)

    def add_stack(self, tag: str, *contents: str, platform: oci.Platform = oci.AMD64) -> Stack:
        """Have `stack:TAG` in the registry, with a small layer for each of *contents*."""
        made = [tars.tar_of({text: text.encode() * 1000}) for text in contents]
        stored = [self.builder.add_layer(tar) for tar in made]
        image = self.builder.add_image(tag, stored, platform=platform)
        layers = [Layer(each.diff_id, each.digest, each.size, each.media_type) for each in stored]
        return Stack(parse_image(f"{self.server.address}/stack:{tag}"), made, layers, image.digest)

    @property
    def reads(self) -> int:
        """How often the registry served the layer."""
        return self.server.count(f"blobs/{self.origin.layer.blob_digest}")

    def forge(self, name: str) -> bytes:
        """Have node *name*, before it starts, hold the first layer with other file modes; what it should be.

        Its table is right for its own chunks, and its tar is right too.
        """
        path = self.tmp_path / name / "layers" / f"{hex_of(self.diff_id)}.afslyr"
        path.parent.mkdir(parents=True)
        convert(io.BytesIO(TAR).read, path)
        good = path.read_bytes()
        forged = Forged(path)
        forged.data[forged.layout.meta_offset + 4] ^= 0o002  # the root is writable by all
        os.close(forged.seal())
        return good

    async def node(
        self,
        name: str,
        *,
        capacity: int = 1,
        deadline: float = 5.0,
        quota: int = 1 << 40,
        grace: float = 0.0,
        window: float = RECORD_S,
        traces: bool = True,
        completing: Completing | None = None,
    ) -> Node:
        """Start a node with that weight in placement and `quota` bytes of room."""
        stack = await self.stack.enter_async_context(contextlib.AsyncExitStack())
        store = LayerStore(self.tmp_path / name)
        stack.callback(store.close)
        room = Room(store, Quota(quota), Leases(grace, self.clock), headroom=0, node=name)
        puller = Puller(store, room, RegistryOptions(backoff=0), 2)
        stack.push_async_callback(puller.close)
        peers = Peers()
        stack.push_async_callback(peers.close)
        announcer = Announcer(self.discovery, Peer(name, "none", capacity))
        stack.push_async_callback(announcer.leave)
        layers = Layers(store, room, puller, peers, announcer, deadline, completing)
        layers.restore()
        stack.push_async_callback(layers.close)
        images = Images(store, puller, peers, announcer, 300.0)
        stack.push_async_callback(images.close)
        tracing = Tracing(TraceFiles(store.traces_dir), layers, room, peers, announcer, enabled=traces, window=window)
        tracing.restore(images.manifests())
        stack.push_async_callback(tracing.close)
        images.on_gone = tracing.forget
        supplying = Supplying(images, layers, peers, announcer)
        stack.push_async_callback(supplying.close)
        service = Service(images, layers, tracing)
        server = await stack.enter_async_context(contextlib.AsyncExitStack())

        def register(target: grpc.aio.Server) -> None:
            add_LayerstorePeerServicer_to_server(service, target)
            add_LayerstoreNodeServicer_to_server(NodeService(images, layers, room, tracing, supplying), target)

        (address,) = await server.enter_async_context(serving(["127.0.0.1:0"], register, grace_s=0))
        chunks = await server.enter_async_context(
            serving_chunks("127.0.0.1", 0, service.read_chunk, service.find_chunk)
        )
        announcer.serve_at(address, chunks)
        await announcer.flush()
        return Node(
            store, announcer, room, layers, images, puller, tracing, supplying, service, peers, address, server.aclose
        )


@contextlib.asynccontextmanager
async def running_world(tmp_path: Path, compression: oci.Compression = "plain") -> AsyncIterator[World]:
    """A cluster without nodes. The registry has `app` with TAGS, one layer each."""
    builder = oci.LayoutBuilder(tmp_path / "layout")
    for number, tag in enumerate(TAGS):
        tar = TAR if number == 0 else TAR + bytes(1024 * number)
        builder.add_image(tag, [builder.add_layer(tar, compression)])
    directory = Directory(60.0)
    service = DiscoveryService(directory, 1.0)
    async with contextlib.AsyncExitStack() as stack:
        server = stack.enter_context(FaultServer(builder.directory))
        discovery = await stack.enter_async_context(contextlib.AsyncExitStack())
        (address,) = await discovery.enter_async_context(
            serving(["127.0.0.1:0"], lambda s: add_DiscoveryServicer_to_server(service, s), grace_s=0)
        )
        yield World(tmp_path, builder, server, directory, address, discovery.aclose, stack)


async def open_partial(world: World, node: Node) -> PartialLayer:
    """The first layer as a partial one."""
    layer = await node.layers.open(world.origin, local=False)
    assert isinstance(layer, PartialLayer)
    return layer


def complete_of(node: Node, world: World) -> CompleteLayer:
    """The first layer, which is complete on `node`."""
    found = node.store.complete(world.diff_id)
    assert found is not None
    return found


async def pull(world: World, node: Node, number: int) -> CompleteLayer:
    """Have layer *number* complete on the node, as if nobody needed it any more."""
    layer = await node.layers.open(world.origins[number], local=True)
    assert isinstance(layer, CompleteLayer)
    world.clock.now += LEASE_S
    return layer


def flip(path: Path, offset: int) -> None:
    """Change one byte on disk."""
    with path.open("r+b") as file:
        (byte,) = os.pread(file.fileno(), 1, offset)
        os.pwrite(file.fileno(), bytes([byte ^ 1]), offset)


def verified(path: Path) -> None:
    """Every byte is right."""
    with path.open("rb") as file:
        verify_layer(file.fileno())
