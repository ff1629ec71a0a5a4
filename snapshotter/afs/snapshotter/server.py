"""The Mounts gRPC service; see proto/afs/proto/v1/mounts.proto."""

import contextlib
import logging
import os
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import grpc.aio
from typing_extensions import override

from afs.core.errors import AfsError, InvalidArgument
from afs.proto.v1 import layerstore_pb2, mounts_pb2_grpc
from afs.proto.v1 import mounts_pb2 as pb
from afs.snapshotter.attached import AttachedRoots, Record
from afs.snapshotter.fusedwire import ReadStats
from afs.snapshotter.fusedworkers import FusedWorkers
from afs.snapshotter.layermount import MountedLayer
from afs.snapshotter.layermounts import LayerMounts
from afs.snapshotter.opening import Opener
from afs.snapshotter.rootmount import RootRequest
from afs.snapshotter.roots import Roots
from afs.snapshotter.shiftedids import Ids

log = logging.getLogger(__name__)
Context = grpc.aio.ServicerContext[Any, Any]


class MountsService(mounts_pb2_grpc.MountsServicer):
    """Roots for programs of this node."""

    def __init__(
        self, opener: Opener, roots: Roots, attached: AttachedRoots, mounts: LayerMounts, workers: FusedWorkers
    ) -> None:
        self._opener = opener
        self._roots = roots
        self._attached = attached
        self._mounts = mounts
        self._workers = workers

    @override
    async def Hold(
        self, request_iterator: AsyncIterator[pb.HoldRequest], context: Context
    ) -> AsyncIterator[pb.HoldResponse]:
        # The stack is the lease: it unwinds when the caller half-closes, is cancelled or dies.
        async with contextlib.AsyncExitStack() as stack:
            held = _Held(self._opener, self._roots, self._mounts, stack)
            async for request in request_iterator:
                yield await held.answer(request)

    @override
    async def Attach(self, request: pb.AttachRequest, context: Context) -> pb.MountedRoot:
        wanted, image = _root_request(request.mount), request.open
        root = await self._attached.attach(_name(image), wanted, force_local=image.force_local_fetch)
        return root.message()

    @override
    async def Detach(self, request: pb.DetachRequest, context: Context) -> pb.DetachResponse:
        kept = await self._attached.detach(Path(os.fsdecode(request.target)))
        return pb.DetachResponse(kept_upper=os.fsencode(kept) if kept else b"")

    @override
    async def Stats(self, request: pb.StatsRequest, context: Context) -> pb.StatsResponse:
        await self._attached.sweep()
        reads = await self._workers.stats()
        workers = [
            pb.FusedWorker(number=worker.number, pid=worker.pid, alive=worker.alive, layers=len(worker.layers))
            for worker in self._workers.workers
        ]
        return pb.StatsResponse(
            layers=[self._layer(layer, reads.get(layer.diff_id, ReadStats())) for layer in self._mounts.mounted()],
            roots=self._roots.count,
            attached=[_attached(record) for record in self._attached.records()],
            workers=workers,
            worker_deaths=self._workers.deaths,
        )

    def _layer(self, layer: MountedLayer, reads: ReadStats) -> pb.MountedLayer:
        return pb.MountedLayer(
            diff_id=layer.diff_id,
            backend=layer.backend,
            users=layer.users,
            lazy=layer.lazy,
            worker=layer.worker.number if layer.worker else None,
            reads=reads.reads,
            bytes_read=reads.bytes,
            waits=reads.waits,
            faults=self._mounts.faults(layer),
            fallback=layer.fallback,
        )


class _Held:
    """What one Hold call has; it belongs to the call's task. All of it goes when *stack* closes."""

    def __init__(self, opener: Opener, roots: Roots, mounts: LayerMounts, stack: contextlib.AsyncExitStack) -> None:
        self._opener = opener
        self._roots = roots
        self._mounts = mounts
        self._stack = stack
        self._layers: list[MountedLayer] | None = None
        self._faults: list[int] = []
        self._fetched: Mapping[str, int] = {}  # before, by diff_id
        self._bytes = 0  # since then
        self._lazy = False
        self._mounted: dict[Path, contextlib.AsyncExitStack] = {}

    async def answer(self, request: pb.HoldRequest) -> pb.HoldResponse:
        """Do all that *request* asks for."""
        if not request.ListFields():
            raise InvalidArgument("neither open, mount, unmount nor check")
        response = pb.HoldResponse()
        if request.HasField("open"):
            response.opened.CopyFrom(await self._open(request.open))
        if request.HasField("unmount"):
            await self._unmount(Path(os.fsdecode(request.unmount.path)))
            response.unmounted.SetInParent()
        if request.HasField("mount"):
            response.mounted.CopyFrom(await self._mount(request.mount))
        if request.HasField("check"):
            response.faults.CopyFrom(await self._check())
            response.faults.SetInParent()
        return response

    async def _open(self, request: pb.OpenImage) -> pb.OpenedImage:
        if self._layers is not None:
            raise InvalidArgument("one image per call")
        opened = await self._opener.open_image(self._stack, _name(request), force_local=request.force_local_fetch)
        image, self._layers = opened.image, opened.layers
        self._faults = [self._mounts.faults(layer) for layer in opened.layers]
        self._fetched, self._bytes = opened.fetched, opened.now - sum(opened.fetched.values())
        self._lazy = any(layer.worker is not None for layer in opened.layers)
        return pb.OpenedImage(
            key=image.key,
            manifest_digest=image.manifest_digest,
            config=image.config,
            lazy=self._lazy,
            bytes_fetched=max(self._bytes, 0),
        )

    async def _check(self) -> pb.ReadFaults:
        pairs = zip(self._layers or [], self._faults, strict=True)
        failed = {layer.diff_id for layer, before in pairs if self._mounts.faults(layer) != before}
        if self._lazy:
            try:
                now = await self._opener.bytes_fetched(list(self._fetched))
                # It counts from its start: after a restart there is less.
                self._bytes = max(now - sum(self._fetched.values()), self._bytes)
            except AfsError as error:  # a count that nobody's result depends on
                log.info("what was fetched for %d layers is not known: %s", len(self._fetched), error.line)
        full = any(self._roots.was_full(path) for path in self._mounted)
        return pb.ReadFaults(layers=sorted(failed), bytes_fetched=max(self._bytes, 0), disk_full=full)

    async def _mount(self, request: pb.MountRoot) -> pb.MountedRoot:
        if self._layers is None:
            raise InvalidArgument("open an image before mounting it")
        own = await self._stack.enter_async_context(contextlib.AsyncExitStack())
        root = await self._roots.mount_root(own, self._layers, _root_request(request))
        self._mounted[root.path] = own
        return root.message()

    async def _unmount(self, path: Path) -> None:
        own = self._mounted.pop(path, None)
        if own is None:
            raise InvalidArgument(f"{path} is not a root of this call")
        await own.aclose()


def _attached(record: Record) -> pb.AttachedRoot:
    root = record.root
    return pb.AttachedRoot(
        target=os.fsencode(root.path),
        image=record.image,
        upper=os.fsencode(root.upper) if root.upper else b"",
        layers=[diff_id for diff_id, _ in record.layers],
    )


def _name(request: pb.OpenImage) -> layerstore_pb2.ImageName:
    return layerstore_pb2.ImageName(
        image=request.image,
        tag=request.tag,
        os=request.os,
        architecture=request.architecture,
        variant=request.variant,
    )


def _root_request(request: pb.MountRoot) -> RootRequest:
    return RootRequest(
        request.extra_dirs,
        read_only=request.read_only,
        target=request.target,
        upper_dir=request.upper_dir,
        proc_dev=request.proc_dev,
        suid=request.suid,
        disk_bytes=request.disk_bytes,
        ids=Ids(request.id_first, request.id_count) if request.id_count else None,
    )
