"""The AfsProxy gRPC service, and the same for HTTP: who is there, who waits and what runs."""

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import grpc.aio
from typing_extensions import override

from afs.core.errors import AfsError, InvalidArgument
from afs.core.version import version
from afs.proto.v1 import discovery_pb2
from afs.proto.v1 import proxy_pb2 as pb
from afs.proto.v1.proxy_pb2_grpc import AfsProxyServicer
from afs.proxy.dispatch import Dispatcher
from afs.proxy.node import AfsletNode
from afs.proxy.peers import Peers, PeerWatch
from afs.proxy.reconcile import Replicas
from afs.proxy.watching import Watcher

Context = grpc.aio.ServicerContext[Any, Any]
_MIN_FOLLOW_MS = 100
_SAME_FIELDS = [
    field.name for field in pb.AfsletInstance.DESCRIPTOR.fields if field.name not in ("endpoint", "reachable", "error")
]


class ProxyService(AfsProxyServicer):
    """See the module."""

    def __init__(self, dispatcher: Dispatcher, watcher: Watcher, peers: PeerWatch, discovery: str) -> None:
        self._dispatcher = dispatcher
        self._watcher = watcher
        self._peers = peers
        self._started = time.monotonic()
        self._replicas = Replicas(discovery)

    async def close(self) -> None:
        """Close all channels."""
        await self._replicas.close()

    @override
    async def Status(self, request: pb.StatusRequest, context: Context) -> AsyncIterator[pb.StatusResponse]:
        if request.follow_ms < 0:
            raise InvalidArgument("follow_ms must not be negative")
        while True:
            for response in await self._status(request):
                yield response
            if not request.follow_ms:
                return
            await asyncio.sleep(max(request.follow_ms, _MIN_FOLLOW_MS) / 1000)

    async def _status(self, request: pb.StatusRequest) -> list[pb.StatusResponse]:
        errors = []

        async def layerstores() -> list[discovery_pb2.Node]:
            try:
                return await self._replicas.layerstores()
            except AfsError as error:
                errors.append(pb.StatusError(source="discovery", message=error.line))
                return []

        stores, peers, _ = await asyncio.gather(layerstores(), self._peers.ask(), self._watcher.refresh())
        errors += [pb.StatusError(source=f"proxy {name}", message=why) for name, why in peers.unreachable.items()]
        nodes = self._dispatcher.nodes.nodes
        found = [pb.StatusResponse(summary=self._summary(stores, peers))]
        found += [pb.StatusResponse(error=error) for error in errors]
        if request.include_layerstores:
            found += [pb.StatusResponse(layerstore=_layerstore(store)) for store in stores]
        if request.include_afslets:
            found += [pb.StatusResponse(afslet=_afslet(node)) for node in nodes]
        return found

    def _summary(self, stores: list[discovery_pb2.Node], peers: Peers) -> pb.StatusSummary:
        dispatcher = self._dispatcher
        return pb.StatusSummary(
            layerstore_instances=len(stores),
            afslet_instances=len(dispatcher.nodes.nodes),
            afslet_reachable=sum(node.reachable for node in dispatcher.nodes.nodes),
            total_layers=len({layer.diff_id for store in stores for layer in store.layers}),
            running=dispatcher.running,
            queued=dispatcher.queued,
            peers_queued=peers.queued,
            tenants=[
                pb.TenantQueue(tenant=name, queued=queued, running=running)
                for name, (queued, running) in dispatcher.tenants().items()
            ],
            peers=len(peers.answering),
        )

    @override
    async def ReconcileImageReplica(
        self, request: pb.ReconcileImageReplicaRequest, context: Context
    ) -> pb.ReconcileImageReplicaResponse:
        return await self._replicas.reconcile(request)

    async def document(self, *, local: bool) -> dict[str, Any]:
        """What ``/status`` says; *local*: without asking the other proxies."""
        dispatcher = self._dispatcher
        document: dict[str, Any] = {
            "id": self._peers.own_id,
            "version": version(),
            "uptime_s": round(time.monotonic() - self._started, 1),
            "queue": {
                "queued": dispatcher.queued,
                "running": dispatcher.running,
                "oldest_wait_s": round(dispatcher.oldest_wait(), 3),
                "tenants": {
                    name: {"queued": queued, "running": running}
                    for name, (queued, running) in dispatcher.tenants().items()
                },
            },
            "nodes": [self._node(node) for node in dispatcher.nodes.nodes],
        }
        if not local:
            peers = await self._peers.ask()
            document["peers"] = {
                "queued": peers.queued,
                "running": peers.running,
                "answering": peers.answering,
                "unreachable": peers.unreachable,
            }
            document["total"] = {
                "queued": dispatcher.queued + peers.queued,
                "running": dispatcher.running + peers.running,
            }
        return document

    def _node(self, node: AfsletNode) -> dict[str, Any]:
        status = node.status
        return {
            "node_id": status.node_id,
            "endpoint": node.endpoint,
            "state": self._dispatcher.nodes.state(node),
            "error": node.error,
            "running": status.running_containers,
            "dispatched_here": node.mine.runs,
            "queued": status.queued_runs,
            "cpu_millis": {"limit": node.limit.cpu_millis, "used": _used_cpu(node)},
            "memory_mb": {"limit": status.limit_memory_mb, "used": status.used_memory_mb},
            "disk_mb": {"limit": status.limit_disk_mb, "used": status.used_disk_mb},
        }


def _used_cpu(node: AfsletNode) -> int:
    return node.status.used_cpu_millis or node.status.used_cpu_cores * 1000


def _afslet(node: AfsletNode) -> pb.AfsletInstance:
    same = {name: getattr(node.status, name) for name in _SAME_FIELDS}
    return pb.AfsletInstance(endpoint=node.endpoint, reachable=node.reachable, error=node.error, **same)


def _layerstore(node: discovery_pb2.Node) -> pb.LayerstoreInstance:
    return pb.LayerstoreInstance(
        node_id=node.node_id,
        endpoint=node.endpoint,
        last_seen_unix=node.last_seen_unix,
        cache_max_bytes=node.capacity_bytes,
        layers=[pb.LayerInfo(digest=layer.diff_id, afs_size=layer.size_bytes) for layer in node.layers],
        cached_images=list(node.images),
    )
