"""Calls to other layerstores. Channels are opened on demand and kept."""

import time
from typing import TYPE_CHECKING

from afs.core.errors import DataLoss
from afs.core.images import ImageRef, Platform
from afs.core.rpc import calling, channel
from afs.discovery.client import Peer
from afs.layerstore.afslyr.layout import ChunkTable
from afs.layerstore.manifests import Image, Layer, build_image
from afs.proto.v1 import layerstore_pb2 as pb
from afs.proto.v1.layerstore_pb2_grpc import LayerstorePeerStub

if TYPE_CHECKING:
    import grpc.aio

CHUNK_TIMEOUT_S = 10.0
CALL_TIMEOUT_S = 30.0

if TYPE_CHECKING:  # a class of the stub file only
    from afs.proto.v1.layerstore_pb2_grpc import LayerstorePeerAsyncStub


class Peers:
    """A stub for every endpoint that was called."""

    def __init__(self) -> None:
        self._channels: dict[str, tuple[grpc.aio.Channel, LayerstorePeerAsyncStub]] = {}

    def _stub(self, endpoint: str) -> "LayerstorePeerAsyncStub":
        if endpoint not in self._channels:
            opened = channel(endpoint)
            self._channels[endpoint] = opened, LayerstorePeerStub(opened)
        return self._channels[endpoint][1]

    async def close(self) -> None:
        """Close all channels."""
        for opened, _ in self._channels.values():
            await opened.close()

    async def resolve_image(self, peer: Peer, ref: ImageRef, platform: Platform, *, only_known: bool) -> Image:
        """Ask *peer*; what it says is checked against the digests in it."""
        with calling(f"layerstore {peer.endpoint}"):
            request = pb.ResolveImageRequest(name=image_name(ref, platform), only_known=only_known)
            answer = await self._stub(peer.endpoint).ResolveImage(request, timeout=CALL_TIMEOUT_S)
        image = build_image(
            str(ref),
            platform,
            answer.manifest,
            answer.config,
            min(answer.resolved_unix, int(time.time())),
            answer.index,
        )
        if ref.digest and not image.is_pinned_by(ref.digest):
            raise DataLoss(f"layerstore {peer.endpoint} answered {image.manifest_digest} for {ref}")
        return image

    async def ensure_layer(self, peer: Peer, ref: ImageRef, platform: Platform, layer: Layer) -> bool:
        """Make *peer* hold the layer; True if it was read from the image's source. A pull has no deadline of its own."""
        with calling(f"layerstore {peer.endpoint}"):
            request = pb.EnsureLayerRequest(name=image_name(ref, platform), layer=layer_message(layer))
            return (await self._stub(peer.endpoint).EnsureLayer(request)).pulled

    async def describe_layer(self, peer: Peer, diff_id: str) -> tuple[int, bytes, ChunkTable, bytes]:
        """(size in bytes, header, table, footer) of a layer file that *peer* holds at least partly."""
        with calling(f"layerstore {peer.endpoint}"):
            answer = await self._stub(peer.endpoint).DescribeLayer(
                pb.DescribeLayerRequest(diff_id=diff_id), timeout=CHUNK_TIMEOUT_S
            )
        return answer.size_bytes, answer.header, ChunkTable(answer.table), answer.footer

    async def read_chunk(self, peer: Peer, diff_id: str, index: int) -> bytes:
        """One chunk, unchecked."""
        with calling(f"layerstore {peer.endpoint}"):
            request = pb.ReadChunkRequest(diff_id=diff_id, index=index)
            return (await self._stub(peer.endpoint).ReadChunk(request, timeout=CHUNK_TIMEOUT_S)).data


def image_name(ref: ImageRef, platform: Platform) -> pb.ImageName:
    """The message for a parsed image name."""
    return pb.ImageName(image=str(ref), os=platform.os, architecture=platform.architecture, variant=platform.variant)


def layer_message(layer: Layer) -> pb.ImageLayer:
    """The message for a layer."""
    return pb.ImageLayer(
        diff_id=layer.diff_id, blob_digest=layer.blob_digest, blob_size=layer.blob_size, media_type=layer.media_type
    )
