"""Copies of an image on more nodes."""

import asyncio

from afs.core.errors import InvalidArgument, Unavailable
from afs.core.images import parse_image, parse_platform
from afs.core.rpc import calling, channel
from afs.discovery.client import Peer
from afs.layerstore.manifests import Image, Layer
from afs.layerstore.peers import Peers
from afs.layerstore.placement import ranked
from afs.proto.v1 import discovery_pb2
from afs.proto.v1 import proxy_pb2 as pb
from afs.proto.v1.discovery_pb2_grpc import DiscoveryStub


class Replicas:
    """Asks *discovery* who holds what, and layerstores to get what they lack."""

    def __init__(self, discovery: str) -> None:
        self._name = f"discovery {discovery}"
        self._channel = channel(discovery)
        self._discovery = DiscoveryStub(self._channel)
        self._peers = Peers()

    async def close(self) -> None:
        """Close all channels."""
        await self._peers.close()
        await self._channel.close()

    async def layerstores(self) -> list[discovery_pb2.Node]:
        """All that live, with what they hold."""
        with calling(self._name):
            request = discovery_pb2.ListNodesRequest(include_contents=True)
            return list((await self._discovery.ListNodes(request, timeout=5.0)).nodes)

    async def reconcile(self, request: pb.ReconcileImageReplicaRequest) -> pb.ReconcileImageReplicaResponse:
        """Have as many nodes as asked for hold every layer of the image completely."""
        ref = parse_image(request.image, request.tag)
        platform = parse_platform(request.platform_os, request.platform_arch, request.platform_variant)
        if request.replica < 1:
            raise InvalidArgument(f"replica must be positive, not {request.replica}")
        stores = [Peer(node.node_id, node.endpoint, node.capacity_bytes) for node in await self.layerstores()]
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
        with calling(self._name):
            located = await self._discovery.Locate(discovery_pb2.LocateRequest(diff_ids=[layer.diff_id]), timeout=5.0)
        holders = located.layers[layer.diff_id].holders if layer.diff_id in located.layers else []
        instances = [pb.LayerstoreTarget(node_id=h.node_id, endpoint=h.endpoint) for h in holders if h.complete]
        return pb.ReconciledLayerPlacement(digest=layer.diff_id, instances=instances)
