"""The Mounts gRPC service; see proto/afs/proto/v1/mounts.proto."""

import contextlib
from collections.abc import AsyncIterator
from typing import Any

import grpc.aio
from typing_extensions import override

from afs.core.errors import InvalidArgument
from afs.proto.v1 import layerstore_pb2, mounts_pb2_grpc
from afs.proto.v1 import mounts_pb2 as pb
from afs.snapshotter.layermounts import LayerMounts, MountedLayer
from afs.snapshotter.roots import RootRequest, Roots

Context = grpc.aio.ServicerContext[Any, Any]


class MountsService(mounts_pb2_grpc.MountsServicer):
    """Roots for programs of this node."""

    def __init__(self, roots: Roots, mounts: LayerMounts) -> None:
        self._roots = roots
        self._mounts = mounts

    @override
    async def Hold(
        self, request_iterator: AsyncIterator[pb.HoldRequest], context: Context
    ) -> AsyncIterator[pb.HoldResponse]:
        layers: list[MountedLayer] | None = None
        faults: list[int] = []
        # The stack is the lease: it unwinds when the caller half-closes, is cancelled or dies.
        async with contextlib.AsyncExitStack() as stack:
            async for request in request_iterator:
                if request.HasField("open"):
                    if layers is not None:
                        raise InvalidArgument("one image per call")
                    opened, layers = await self._open(stack, request.open)
                    faults = [self._mounts.faults(layer) for layer in layers]
                    yield pb.HoldResponse(opened=opened)
                elif request.HasField("mount"):
                    if layers is None:
                        raise InvalidArgument("open an image before mounting it")
                    wanted = RootRequest(
                        request.mount.extra_dirs, read_only=request.mount.read_only, target=request.mount.target
                    )
                    root = await self._roots.mount_root(stack, layers, wanted)
                    lower = [str(path) for path in root.lower]
                    mounted = pb.MountedRoot(path=str(root.path), upper=str(root.upper or ""), lower=lower)
                    yield pb.HoldResponse(mounted=mounted)
                elif request.HasField("check"):
                    pairs = zip(layers or [], faults, strict=True)
                    failed = {layer.diff_id for layer, before in pairs if self._mounts.faults(layer) != before}
                    yield pb.HoldResponse(faults=pb.ReadFaults(layers=sorted(failed)))
                else:
                    raise InvalidArgument("neither open, mount nor check")

    async def _open(
        self, stack: contextlib.AsyncExitStack, request: pb.OpenImage
    ) -> tuple[pb.OpenedImage, list[MountedLayer]]:
        name = layerstore_pb2.ImageName(
            image=request.image,
            tag=request.tag,
            os=request.os,
            architecture=request.architecture,
            variant=request.variant,
        )
        image, layers = await self._roots.open_image(stack, name, force_local=request.force_local_fetch)
        lazy = any(layer.worker is not None for layer in layers)
        opened = pb.OpenedImage(key=image.key, manifest_digest=image.manifest_digest, config=image.config, lazy=lazy)
        return opened, layers

    @override
    async def Stats(self, request: pb.StatsRequest, context: Context) -> pb.StatsResponse:
        layers = [
            pb.MountedLayer(diff_id=layer.diff_id, backend=layer.backend, users=layer.users)
            for layer in self._mounts.mounted()
        ]
        return pb.StatsResponse(layers=layers, roots=self._roots.count)
