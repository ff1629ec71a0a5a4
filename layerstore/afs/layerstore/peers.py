"""Calls to other layerstores.

State (one event loop): ``_connections`` has one for a node, made at the first call and kept. The most recently used are at the
end; beyond ``_MOST`` those go that were used least recently and have no call under way. Chunks come through connections of
their own, one for each that is on its way (:mod:`afs.layerstore.chunkclient`), so none queues behind another one.
"""

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from typing import TYPE_CHECKING, TypeVar

from afs.core.digests import sha256_digest
from afs.core.errors import DataLoss, Unavailable
from afs.core.images import ImageRef, Platform, parse_image, parse_platform
from afs.core.rpc import calling, channel
from afs.discovery.client import Peer
from afs.layerstore.afslyr.layout import CHUNK_SIZE, ChunkTable
from afs.layerstore.chains import chains_of
from afs.layerstore.chunkclient import Address, ChunkClient, Exchange, Take
from afs.layerstore.chunkwire import Question
from afs.layerstore.manifests import Image, Layer, NamedImage, build_image
from afs.layerstore.partial import Description
from afs.proto.v1 import layerstore_pb2 as pb
from afs.proto.v1.layerstore_pb2_grpc import LayerstorePeerStub

CHUNK_TIMEOUT_S = 10.0
CALL_TIMEOUT_S = 30.0
FIND_TIMEOUT_S = 2.0  # the snapshotter waits, and others may know the image too
TRACE_TIMEOUT_S = 2.0  # the container runs without it meanwhile
_MOST = 256
T = TypeVar("T")

if TYPE_CHECKING:  # a class of the stub file only
    from afs.proto.v1.layerstore_pb2_grpc import LayerstorePeerAsyncStub


class _Connection:
    def __init__(self, endpoint: str) -> None:
        self.channel = channel(endpoint, shared=False)
        self.stub: LayerstorePeerAsyncStub = LayerstorePeerStub(self.channel)
        self.calls = 0


class Peers:
    """See the module. *most* connections are kept."""

    def __init__(self, most: int = _MOST) -> None:
        self._most = most
        self._connections: dict[str, _Connection] = {}
        self._chunks = ChunkClient(CHUNK_SIZE, most)
        self._closing: set[asyncio.Task[None]] = set()

    @contextlib.contextmanager
    def _calling(self, endpoint: str) -> Iterator[_Connection]:
        """A connection for one call; its errors become AfsErrors."""
        connection = self._connections.pop(endpoint, None) or _Connection(endpoint)
        self._connections[endpoint] = connection
        connection.calls += 1
        try:
            with calling(f"layerstore {endpoint}"):
                yield connection
        finally:
            connection.calls -= 1
            self._close_some()

    def _close_some(self) -> None:
        idle = [key for key, connection in self._connections.items() if not connection.calls]
        for key in idle[: max(len(self._connections) - self._most, 0)]:
            task = asyncio.create_task(self._connections.pop(key).channel.close())
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)

    async def close(self) -> None:
        """Close all connections."""
        self._chunks.close()
        await asyncio.gather(*self._closing, *(each.channel.close() for each in self._connections.values()))

    async def resolve_image(
        self, peer: Peer, ref: ImageRef, platform: Platform, *, only_known: bool, again: bool = False
    ) -> Image:
        """Ask *peer*; what it says is checked against the digests in it."""
        with self._calling(peer.endpoint) as connection:
            request = pb.ResolveImageRequest(name=image_name(ref, platform), only_known=only_known, again=again)
            answer = await connection.stub.ResolveImage(request, timeout=CALL_TIMEOUT_S)
        return _checked(peer, ref, platform, answer)

    async def find_image(self, peer: Peer, chain_id: str) -> NamedImage:
        """An image that *peer* knows with a layer of that chain id; NotFound if there is none. It is checked as above.

        Nobody asked for its name, so a tag in it is not believed: the image is named by its digest.
        """
        with self._calling(peer.endpoint) as connection:
            answer = await connection.stub.FindImage(pb.FindImageRequest(chain_id=chain_id), timeout=FIND_TIMEOUT_S)
        name, said = answer.name, answer.image
        ref, platform = parse_image(name.image, name.tag), parse_platform(name.os, name.architecture, name.variant)
        if not ref.digest:
            ref = dataclasses.replace(ref, tag="", digest=sha256_digest(said.manifest))
            said.index = b""
        image = _checked(peer, ref, platform, said)
        if chain_id not in chains_of(image):
            raise DataLoss(f"layerstore {peer.endpoint} answered {ref}, which has no layer of chain id {chain_id}")
        return NamedImage(ref, platform, image)

    async def ensure_layer(self, peer: Peer, ref: ImageRef, platform: Platform, layer: Layer) -> bool:
        """Make *peer* hold the layer; True if it was read from the image's source. A pull has no deadline of its own."""
        with self._calling(peer.endpoint) as connection:
            request = pb.EnsureLayerRequest(name=image_name(ref, platform), layer=layer_message(layer))
            return (await connection.stub.EnsureLayer(request)).pulled

    async def describe_layer(self, peer: Peer, diff_id: str) -> AsyncGenerator[Description | tuple[int, bytes], None]:
        """What *peer* says of a layer that it holds at least partly, then what a mount reads at once: chunks with their index.

        Unchecked. Ends early if the peer has not all of that.
        """
        with self._calling(peer.endpoint) as connection:
            request = pb.DescribeLayerRequest(diff_id=diff_id)
            call = connection.stub.DescribeLayer(request, timeout=CALL_TIMEOUT_S)
            try:
                described = False
                async for message in call:
                    if not described:
                        yield Description(message.size_bytes, message.header, ChunkTable(message.table), message.footer)
                        described = True
                    else:
                        for number, at in enumerate(range(0, len(message.data), CHUNK_SIZE)):
                            yield message.index + number, message.data[at : at + CHUNK_SIZE]
            finally:
                call.cancel()  # of no effect once it has ended

    async def read_chunk(
        self,
        peer: Peer,
        diff_id: str,
        index: int,
        take: Take[T],
        *,
        timeout: float = CHUNK_TIMEOUT_S,
        was_bad: bool = False,
    ) -> T:
        """What *take* makes of one chunk, unchecked, in a thread. *was_bad*: it came before, with the wrong bytes."""
        return await self._chunks.ask(_chunks_of(peer), Question(diff_id, index, was_bad), timeout, take)

    def begin_chunk(self, peer: Peer, diff_id: str, index: int, take: Take[T], *, timeout: float) -> Exchange[T] | None:
        """The same without waiting, if there is a connection to *peer* that is not used."""
        return (
            self._chunks.begin(_chunks_of(peer), Question(diff_id, index), timeout, take) if peer.chunk_port else None
        )

    def begin_chunks(
        self, peer: Peer, diff_id: str, indices: Sequence[int], takes: Sequence[Take[object]], *, timeout: float
    ) -> Exchange[object] | None:
        """The same for several chunks in one go; see :meth:`ChunkClient.begin_run`."""
        if not peer.chunk_port:
            return None
        questions = [Question(diff_id, index) for index in indices]
        return self._chunks.begin_run(_chunks_of(peer), questions, timeout, takes)

    async def read_trace(self, peer: Peer, manifest_digest: str) -> bytes:
        """The start trace of an image, unchecked."""
        with self._calling(peer.endpoint) as connection:
            request = pb.ReadTraceRequest(manifest_digest=manifest_digest)
            return (await connection.stub.ReadTrace(request, timeout=TRACE_TIMEOUT_S)).trace


def _checked(peer: Peer, ref: ImageRef, platform: Platform, said: pb.Image) -> Image:
    """What *peer* said that *ref* consists of, if the digests in it agree."""
    resolved = min(said.resolved_unix, int(time.time()))
    image = build_image(str(ref), platform, said.manifest, said.config, resolved, said.index)
    if ref.digest and not image.is_pinned_by(ref.digest):
        raise DataLoss(f"layerstore {peer.endpoint} answered {image.manifest_digest} for {ref}")
    return image


def _chunks_of(peer: Peer) -> Address:
    """Where *peer* serves chunks."""
    if not peer.chunk_port:
        raise Unavailable(f"layerstore {peer.endpoint} serves no chunks")
    return peer.endpoint.rpartition(":")[0].strip("[]"), peer.chunk_port


def image_name(ref: ImageRef, platform: Platform) -> pb.ImageName:
    """The message for a parsed image name."""
    return pb.ImageName(image=str(ref), os=platform.os, architecture=platform.architecture, variant=platform.variant)


def layer_message(layer: Layer) -> pb.ImageLayer:
    """The message for a layer."""
    return pb.ImageLayer(
        diff_id=layer.diff_id, blob_digest=layer.blob_digest, blob_size=layer.blob_size, media_type=layer.media_type
    )
