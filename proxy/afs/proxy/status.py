"""The AfsProxy gRPC service: the cluster's status, and copies of an image on more nodes."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc.aio
from typing_extensions import override

from afs.core.errors import AfsError, InvalidArgument, Unavailable
from afs.core.images import parse_image, parse_platform
from afs.core.rpc import calling, channel
from afs.discovery.client import Peer
from afs.layerstore.manifests import Image, Layer
from afs.layerstore.peers import Peers
from afs.layerstore.placement import ranked
from afs.proto.v1 import discovery_pb2
from afs.proto.v1 import proxy_pb2 as pb
from afs.proto.v1.discovery_pb2_grpc import DiscoveryStub
from afs.proto.v1.proxy_pb2_grpc import AfsProxyServicer
from afs.proxy.nodes import Nodes

Context = grpc.aio.ServicerContext[Any, Any]


class ProxyService(AfsProxyServicer):
    """See the module."""

    def __init__(self, nodes: Nodes, discovery: str) -> None:
        self._nodes = nodes
        self._discovery_name = f"discovery {discovery}"
        self._channel = channel(discovery)
        self._discovery = DiscoveryStub(self._channel)
        self._peers = Peers()

    async def close(self) -> None:
        """Close all channels."""
        await self._peers.close()
        await self._channel.close()

    async def _layerstores(self) -> list[discovery_pb2.Node]:
        with calling(self._discovery_name):
            request = discovery_pb2.ListNodesRequest(include_contents=True)
            return list((await self._discovery.ListNodes(request, timeout=5.0)).nodes)

    @override
    async def Status(self, request: pb.StatusRequest, context: Context) -> AsyncIterator[pb.StatusResponse]:
        await self._nodes.poll()
        failure = None
        try:
            stores = await self._layerstores()
        except AfsError as error:
            stores, failure = [], pb.StatusError(source="discovery", message=error.line)
        yield pb.StatusResponse(
            summary=pb.StatusSummary(
                layerstore_instances=len(stores),
                afslet_instances=len(self._nodes.nodes),
                afslet_reachable=sum(node.reachable for node in self._nodes.nodes),
                total_layers=len({layer.diff_id for store in stores for layer in store.layers}),
            )
        )
        if failure is not None:
            yield pb.StatusResponse(error=failure)
        for store in stores if request.include_layerstores else []:
            yield pb.StatusResponse(layerstore=_layerstore(store))
        for node in self._nodes.nodes if request.include_afslets else []:
            status = node.status
            yield pb.StatusResponse(
                afslet=pb.AfsletInstance(
                    endpoint=node.endpoint,
                    reachable=node.reachable,
                    error=node.error,
                    running_containers=status.running_containers,
                    limit_cpu_cores=status.limit_cpu_cores,
                    limit_memory_mb=status.limit_memory_mb,
                    used_cpu_cores=status.used_cpu_cores,
                    used_memory_mb=status.used_memory_mb,
                    available_cpu_cores=status.available_cpu_cores,
                    available_memory_mb=status.available_memory_mb,
                )
            )

    @override
    async def ReconcileImageReplica(
        self, request: pb.ReconcileImageReplicaRequest, context: Context
    ) -> pb.ReconcileImageReplicaResponse:
        ref = parse_image(request.image, request.tag)
        platform = parse_platform(request.platform_os, request.platform_arch, request.platform_variant)
        if request.replica < 1:
            raise InvalidArgument(f"replica must be positive, not {request.replica}")
        stores = [Peer(node.node_id, node.endpoint, node.capacity_bytes) for node in await self._layerstores()]
        if not stores:
            raise Unavailable("no layerstore is alive")
        owner = ranked(f"{ref} {platform}", stores)[0]
        image = await self._peers.resolve_image(owner, ref, platform, only_known=False)

        async def ensure(layer: Layer) -> pb.ReconciledLayerPlacement:
            targets = ranked(layer.diff_id, stores)[: request.replica]
            for target in targets:  # in order: the first one pulls, the others copy from it
                await self._peers.ensure_layer(target, ref, platform, layer)
            return await self._placement(image, layer)

        unique = list({layer.diff_id: layer for layer in image.layers}.values())
        placements = await asyncio.gather(*(ensure(layer) for layer in unique))
        least = min((len(placement.instances) for placement in placements), default=len(stores))
        return pb.ReconcileImageReplicaResponse(
            image_key=image.key,
            current_replica=least,
            requested_replica=request.replica,
            ensured=least >= request.replica,
            layers=placements,
        )

    async def _placement(self, image: Image, layer: Layer) -> pb.ReconciledLayerPlacement:
        with calling(self._discovery_name):
            located = await self._discovery.Locate(discovery_pb2.LocateRequest(diff_ids=[layer.diff_id]), timeout=5.0)
        holders = located.layers[layer.diff_id].holders if layer.diff_id in located.layers else []
        instances = [pb.LayerstoreTarget(node_id=h.node_id, endpoint=h.endpoint) for h in holders if h.complete]
        return pb.ReconciledLayerPlacement(digest=layer.diff_id, instances=instances)


def _layerstore(node: discovery_pb2.Node) -> pb.LayerstoreInstance:
    return pb.LayerstoreInstance(
        node_id=node.node_id,
        endpoint=node.endpoint,
        last_seen_unix=node.last_seen_unix,
        cache_max_bytes=node.capacity_bytes,
        layers=[pb.LayerInfo(digest=layer.diff_id, afs_size=layer.size_bytes) for layer in node.layers],
        cached_images=list(node.images),
    )
