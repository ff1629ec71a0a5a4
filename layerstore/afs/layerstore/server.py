"""The gRPC services of the layerstore: to peers, and to the node's own snapshotter."""

import asyncio
import os
from typing import Any

import grpc.aio
from typing_extensions import override

from afs.core.digests import check_digest
from afs.core.errors import InvalidArgument, NotFound
from afs.core.images import ImageRef, Platform, parse_image, parse_platform
from afs.layerstore.images import Images
from afs.layerstore.layers import Layers, Origin
from afs.layerstore.manifests import Image, Layer
from afs.layerstore.peers import layer_message
from afs.layerstore.store import CompleteLayer
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


class PeerService(pb_grpc.LayerstorePeerServicer):
    """What other nodes may ask."""

    def __init__(self, images: Images, layers: Layers) -> None:
        self._images = images
        self._layers = layers

    @override
    async def ResolveImage(self, request: pb.ResolveImageRequest, context: Context) -> pb.Image:
        ref, platform = _name(request.name)
        if request.only_known:
            return _image(self._images.known(ref, platform))
        return _image(await self._images.resolve(ref, platform, here=True))

    @override
    async def EnsureLayer(self, request: pb.EnsureLayerRequest, context: Context) -> pb.EnsureLayerResponse:
        ref, platform = _name(request.name)
        wanted = request.layer
        layer = Layer(
            check_digest(wanted.diff_id), check_digest(wanted.blob_digest), wanted.blob_size, wanted.media_type
        )
        complete, pulled = await self._layers.ensure(Origin(ref, platform, layer))
        return pb.EnsureLayerResponse(size_bytes=complete.layout.file_size, pulled=pulled)

    @override
    async def DescribeLayer(self, request: pb.DescribeLayerRequest, context: Context) -> pb.DescribeLayerResponse:
        layer = self._layers.find(check_digest(request.diff_id))
        if layer is None:
            raise NotFound(f"layer {request.diff_id} is not on this node")
        layout, table = layer.layout, layer.table
        path = layer.path if isinstance(layer, CompleteLayer) else layer.data_path
        header, footer = await asyncio.to_thread(
            _ends, str(path), layout.tar_offset, layout.table_offset + len(table.digests)
        )
        return pb.DescribeLayerResponse(
            size_bytes=layout.file_size,
            header=header,
            table=table.digests,
            footer=footer,
            complete=isinstance(layer, CompleteLayer),
        )

    @override
    async def ReadChunk(self, request: pb.ReadChunkRequest, context: Context) -> pb.ReadChunkResponse:
        layer = self._layers.find(check_digest(request.diff_id))
        if layer is None:
            raise NotFound(f"layer {request.diff_id} is not on this node")
        if request.index >= layer.table.count:
            raise InvalidArgument(f"layer {request.diff_id} has {layer.table.count} chunks, no chunk {request.index}")
        if isinstance(layer, CompleteLayer):
            return pb.ReadChunkResponse(data=await asyncio.to_thread(layer.read_chunk, request.index))
        if not layer.has(request.index):
            raise NotFound(f"chunk {request.index} of layer {request.diff_id} is not on this node")
        return pb.ReadChunkResponse(data=await layer.read_async(request.index))


def _ends(path: str, header_end: int, footer_start: int) -> tuple[bytes, bytes]:
    with open(path, "rb") as file:
        header = file.read(header_end)
        size = os.fstat(file.fileno()).st_size
        return header, os.pread(file.fileno(), size - footer_start, footer_start)


class NodeService(pb_grpc.LayerstoreNodeServicer):
    """What the node's own snapshotter may ask."""

    def __init__(self, images: Images, layers: Layers) -> None:
        self._images = images
        self._layers = layers

    @override
    async def OpenImage(self, request: pb.OpenImageRequest, context: Context) -> pb.OpenImageResponse:
        ref, platform = _name(request.name)
        local = request.force_local_fetch
        image = await self._images.resolve(ref, platform, here=local)
        origins = [Origin(ref, platform, layer) for layer in image.layers]
        layers = await asyncio.gather(*(self._layers.open(origin, local=local) for origin in origins))
        return pb.OpenImageResponse(
            image=_image(image),
            layers=[
                pb.LocalLayer(
                    diff_id=layer.diff_id,
                    size_bytes=layer.layout.file_size,
                    path=str(layer.path) if isinstance(layer, CompleteLayer) else "",
                )
                for layer in layers
            ],
        )
