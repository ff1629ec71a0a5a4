"""The gRPC services of the layerstore: to peers, and to the node's own snapshotter."""

import asyncio
import contextlib
import functools
from collections.abc import AsyncIterator, Collection, Iterator, Sequence
from typing import Any

import grpc.aio
from typing_extensions import override

from afs.core.digests import check_digest, hex_of
from afs.core.errors import InvalidArgument, NotFound
from afs.core.images import ImageRef, Platform, parse_image, parse_platform
from afs.layerstore.afslyr.layout import metadata_chunks, pack_footer, pack_header
from afs.layerstore.chunkserver import Range
from afs.layerstore.chunkwire import Question
from afs.layerstore.errors import DamagedLayer
from afs.layerstore.images import Images
from afs.layerstore.layers import Layers, OpenLayer
from afs.layerstore.manifests import Image, Layer
from afs.layerstore.opening import open_all
from afs.layerstore.origins import Origin
from afs.layerstore.partial import PartialLayer
from afs.layerstore.peers import image_name, layer_message
from afs.layerstore.room import CachedLayer, Room
from afs.layerstore.store import CompleteLayer
from afs.layerstore.supplying import Missing, Supplying
from afs.layerstore.tracing import Tracing
from afs.layerstore.wantedlayers import WantedLayer, parse_wanted, wanted_message
from afs.proto.v1 import layerstore_pb2 as pb
from afs.proto.v1 import layerstore_pb2_grpc as pb_grpc

Context = grpc.aio.ServicerContext[Any, Any]


def _name(name: pb.ImageName) -> tuple[ImageRef, Platform]:
    return parse_image(name.image, name.tag), parse_platform(name.os, name.architecture, name.variant)


def _image(image: Image) -> pb.Image:
    return pb.Image(
        key=image.key,
        manifest_digest=image.manifest_digest,
        manifest=image.manifest,
        config=image.config,
        layers=[layer_message(layer) for layer in image.layers],
        resolved_unix=image.resolved_unix,
        index=image.index,
    )


def _local(layer: OpenLayer) -> pb.LocalLayer:
    path = str(layer.path) if isinstance(layer, CompleteLayer) else ""
    return pb.LocalLayer(diff_id=layer.diff_id, size_bytes=layer.layout.file_size, path=path)


_RUN = 1 << 20  # bytes of a message


def runs(indices: Sequence[int], most: int) -> Iterator[tuple[int, int]]:
    """(first, count) of ascending *indices* that follow each other, at most *most* at a time."""
    first, count = -1, 0
    for index in indices:
        if count and (index != first + count or count == most):
            yield first, count
            count = 0
        if not count:
            first = index
        count += 1
    if count:
        yield first, count


class PeerService(pb_grpc.LayerstorePeerServicer):
    """What other nodes may ask."""

    def __init__(self, images: Images, layers: Layers, tracing: Tracing) -> None:
        self._images = images
        self._layers = layers
        self._tracing = tracing

    @override
    async def ResolveImage(self, request: pb.ResolveImageRequest, context: Context) -> pb.Image:
        ref, platform = _name(request.name)
        if request.only_known:
            return _image(self._images.known(ref, platform))
        return _image(await self._images.resolve(ref, platform, here=True, again=request.again))

    @override
    async def EnsureLayer(self, request: pb.EnsureLayerRequest, context: Context) -> pb.EnsureLayerResponse:
        ref, platform = _name(request.name)
        wanted = request.layer
        layer = Layer(
            check_digest(wanted.diff_id), check_digest(wanted.blob_digest), wanted.blob_size, wanted.media_type
        )
        complete, pulled = await self._layers.ensure(Origin(ref, platform, layer))
        self._layers.use(complete.diff_id)  # the peer is about to read from it
        return pb.EnsureLayerResponse(size_bytes=complete.layout.file_size, pulled=pulled)

    @override
    async def DescribeLayer(
        self, request: pb.DescribeLayerRequest, context: Context
    ) -> AsyncIterator[pb.DescribeLayerResponse]:
        layer = self._layers.use(check_digest(request.diff_id))
        # From memory, where it was checked, not from the file, which may have been damaged since.
        yield pb.DescribeLayerResponse(
            size_bytes=layer.layout.file_size,
            header=pack_header(layer.layout),
            table=layer.table.digests,
            footer=pack_footer(layer.layout, bytes.fromhex(hex_of(layer.table.root_digest))),
        )
        for first, count in runs(metadata_chunks(layer.layout), _RUN // layer.layout.chunk_size):
            try:
                data = b"".join([await self._layers.read_chunk(layer.diff_id, first + i) for i in range(count)])
            except (NotFound, DamagedLayer):
                continue  # the asker has it from others
            yield pb.DescribeLayerResponse(index=first, data=data)

    async def read_chunk(self, question: Question) -> bytes:
        """What a peer gets that asks for a chunk; see :mod:`afs.layerstore.chunkwire`."""
        return await self._layers.read_chunk(question.diff_id, question.index, was_bad=question.was_bad)

    def find_chunk(self, question: Question) -> Range | None:
        """The same, for what is at hand; in any thread."""
        return self._layers.find_chunk(question)

    @override
    async def ReadTrace(self, request: pb.ReadTraceRequest, context: Context) -> pb.ReadTraceResponse:
        return pb.ReadTraceResponse(trace=await self._tracing.read(check_digest(request.manifest_digest)))

    @override
    async def FindImage(self, request: pb.FindImageRequest, context: Context) -> pb.FindImageResponse:
        found = self._images.find(check_digest(request.chain_id))
        if found is None:
            raise NotFound(f"no image known here has a layer of chain id {request.chain_id}")
        return pb.FindImageResponse(name=image_name(found.ref, found.platform), image=_image(found.image))


class NodeService(pb_grpc.LayerstoreNodeServicer):
    """What the node's own snapshotter may ask."""

    def __init__(self, images: Images, layers: Layers, room: Room, tracing: Tracing, supplying: Supplying) -> None:
        self._images = images
        self._layers = layers
        self._tracing = tracing
        self._room = room
        self._supplying = supplying
        self._leases = room.leases

    @override
    async def OpenImage(self, request: pb.OpenImageRequest, context: Context) -> pb.OpenImageResponse:
        ref, platform = _name(request.name)
        local = request.force_local_fetch
        image = await self._images.resolve(ref, platform, here=local)
        opens = [
            functools.partial(self._layers.open, Origin(ref, platform, layer), local=local) for layer in image.layers
        ]
        before = [self._layers.fetched(layer.diff_id) for layer in image.layers]
        with self._tracing.opening(image):
            layers = await open_all(self._layers, self._leases, opens, request.number)
        found = [_local(layer) for layer in layers]
        for layer, fetched in zip(found, before, strict=True):
            layer.fetched_before, layer.fetched = fetched, self._layers.fetched(layer.diff_id)
        return pb.OpenImageResponse(image=_image(image), layers=found)

    @override
    async def SupplyLayer(self, request: pb.SupplyLayerRequest, context: Context) -> pb.SupplyLayerResponse:
        try:
            missing = Missing(request.missing)
        except ValueError:  # enums are open in proto3
            raise InvalidArgument(f"missing: {request.missing} is none of its values") from None
        wanted = parse_wanted(request.layer)
        layer, image = await self._supplying.supply(wanted, missing)
        return pb.SupplyLayerResponse(
            layer=wanted_message(wanted, layer.diff_id, image), size_bytes=layer.layout.file_size
        )

    @override
    async def OpenLayers(self, request: pb.OpenLayersRequest, context: Context) -> pb.OpenLayersResponse:
        wanted = [parse_wanted(layer) for layer in request.layers]
        for place, layer in enumerate(wanted):
            if not layer.diff_id:
                raise InvalidArgument(f"layer {place}: no diff_id is given")

        async def open_layer(layer: WantedLayer) -> OpenLayer:
            return (await self._supplying.supply(layer, Missing.PULL)).layer

        image = self._images.find_stack([layer.diff_id for layer in wanted])
        with self._tracing.opening(image.image) if image is not None else contextlib.nullcontext():
            opens = [functools.partial(open_layer, layer) for layer in wanted]
            layers = await open_all(self._layers, self._leases, opens, request.number)
        return pb.OpenLayersResponse(layers=[_local(layer) for layer in layers])

    @override
    async def LayerUsage(self, request: pb.LayerUsageRequest, context: Context) -> pb.LayerUsageResponse:
        fetched = {diff_id: self._layers.fetched(diff_id) for diff_id in request.diff_ids}
        return pb.LayerUsageResponse(used_bytes=self._room.usage(request.diff_ids), fetched_bytes=fetched)

    @override
    async def Leases(
        self, request_iterator: AsyncIterator[pb.LeaseUpdate], context: Context
    ) -> AsyncIterator[pb.LeaseRequest]:
        requests: asyncio.Queue[Collection[str] | None] = asyncio.Queue()
        release = requests.put_nowait  # one bound method, for it stands for the stream

        async def read() -> None:
            try:
                async for update in request_iterator:
                    mounted, opened = (update.in_use, update.idle), (update.last_opened, update.opening)
                    for diff_id in self._leases.report(release, *mounted, *opened, update.kept):
                        self._room.use(diff_id)  # until now
                    self._tracing.review()
            finally:
                requests.put_nowait(None)

        self._leases.connect(release)
        reading = asyncio.create_task(read())
        try:
            while (diff_ids := await requests.get()) is not None:
                yield pb.LeaseRequest(release=sorted(diff_ids))
            await reading
        finally:
            self._leases.disconnect(release)
            reading.cancel()

    @override
    async def CacheStatus(self, request: pb.CacheStatusRequest, context: Context) -> pb.CacheStatusResponse:
        status = self._room.status()
        counts = self._tracing.counts
        traces = pb.TraceStatus(
            enabled=self._tracing.enabled,
            kept=self._tracing.kept,
            recorded=counts.recorded,
            used=counts.used,
            from_peers=counts.from_peers,
            refused=counts.refused,
            prefetched_chunks=counts.prefetched_chunks,
            demanded_chunks=self._tracing.recorder.demanded_chunks,
            recording=len(self._tracing.recorder),
        )
        return pb.CacheStatusResponse(
            traces=traces,
            capacity_bytes=status.capacity,
            used_bytes=status.used,
            reserved_bytes=status.reserved,
            leased_bytes=sum(layer.used for layer in status.layers if layer.leased),
            free_bytes=status.free,
            evicted_layers=status.evicted,
            damaged_layers=self._layers.repairs.count,
            snapshotter_connected=self._leases.connected,
            layers=[self._cached(layer) for layer in status.layers],
        )

    def _cached(self, cached: CachedLayer) -> pb.CachedLayer:
        layer, stats = self._layers.find(cached.diff_id), self._layers.stats(cached.diff_id)
        chunks = layer.table.count if layer is not None else 0
        return pb.CachedLayer(
            diff_id=cached.diff_id,
            used_bytes=cached.used,
            complete=isinstance(layer, CompleteLayer),
            leased=cached.leased,
            last_use_unix=int(cached.last_use),
            chunks=chunks,
            chunks_here=layer.here if isinstance(layer, PartialLayer) else chunks,
            bytes_from_peers=stats.from_peers,
            bytes_from_source=stats.from_source,
            demanded_chunks=stats.demanded,
            prefetched_chunks=stats.prefetched,
            hedges=stats.hedges,
            failovers=stats.failovers,
            bad_chunks=stats.bad_chunks,
        )
