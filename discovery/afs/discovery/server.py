"""The Discovery gRPC service over a :class:`~afs.discovery.directory.Directory`."""

import time
from typing import Any

import grpc.aio
from typing_extensions import override

from afs.core.errors import InvalidArgument
from afs.discovery.directory import Directory, NodeState, Report
from afs.proto.v1 import discovery_pb2 as pb
from afs.proto.v1 import discovery_pb2_grpc as pb_grpc

Context = grpc.aio.ServicerContext[Any, Any]


def _node(state: NodeState, *, contents: bool) -> pb.Node:
    node = pb.Node(
        node_id=state.node_id,
        endpoint=state.endpoint,
        capacity_bytes=state.capacity,
        last_seen_unix=state.seen_unix,
        chunk_port=state.chunk_port,
    )
    if contents:
        node.layers.extend(
            pb.HeldLayer(diff_id=diff_id, size_bytes=size, complete=complete)
            for diff_id, (size, complete) in sorted(state.layers.items())
        )
        node.images.extend(sorted(state.images))
        node.traces.extend(
            pb.HeldTrace(manifest_digest=digest, chunks=chunks) for digest, chunks in sorted(state.traces.items())
        )
    return node


def _holder(state: NodeState, *, complete: bool) -> pb.Holder:
    return pb.Holder(node_id=state.node_id, endpoint=state.endpoint, complete=complete, chunk_port=state.chunk_port)


class DiscoveryService(pb_grpc.DiscoveryServicer):
    """Answers from memory; *interval* is the time in seconds that nodes shall wait between heartbeats."""

    def __init__(self, directory: Directory, interval: float) -> None:
        self._directory = directory
        self._interval = interval

    @override
    async def Heartbeat(self, request: pb.HeartbeatRequest, context: Context) -> pb.HeartbeatResponse:
        if not request.node_id or not request.endpoint:
            raise InvalidArgument("a heartbeat needs node_id and endpoint")
        now = time.monotonic()
        if request.leaving:
            self._directory.leave(request.node_id, request.incarnation)
            return pb.HeartbeatResponse()
        report = Report(
            request.node_id,
            request.endpoint,
            request.capacity_bytes,
            request.incarnation,
            request.sequence,
            request.full,
            tuple((layer.diff_id, layer.size_bytes, layer.complete) for layer in request.layers),
            tuple(request.removed_layers),
            tuple(request.images),
            tuple(request.removed_images),
            tuple((trace.manifest_digest, trace.chunks) for trace in request.traces),
            tuple(request.removed_traces),
            tuple(request.chains),
            tuple(request.removed_chains),
            request.chunk_port,
        )
        resend = self._directory.heartbeat(report, now=now, now_unix=int(time.time()))
        nodes = [_node(state, contents=False) for state in self._directory.nodes(now)]
        return pb.HeartbeatResponse(resend=resend, nodes=nodes, interval_ms=int(self._interval * 1000))

    @override
    async def ListNodes(self, request: pb.ListNodesRequest, context: Context) -> pb.ListNodesResponse:
        nodes = self._directory.nodes(time.monotonic())
        return pb.ListNodesResponse(nodes=[_node(state, contents=request.include_contents) for state in nodes])

    @override
    async def Locate(self, request: pb.LocateRequest, context: Context) -> pb.LocateResponse:
        now, response = time.monotonic(), pb.LocateResponse()
        for diff_id in request.diff_ids:
            for node, complete in self._directory.layer_holders(diff_id, now):
                response.layers[diff_id].holders.append(_holder(node, complete=complete))
        for key in request.images:
            for node in self._directory.image_holders(key, now):
                response.images[key].holders.append(_holder(node, complete=True))
        for digest in request.traces:
            for node in self._directory.trace_holders(digest, now):
                response.traces[digest].holders.append(_holder(node, complete=True))
        for chain in request.chains:
            for node in self._directory.chain_holders(chain, now):
                response.chains[chain].holders.append(_holder(node, complete=True))
        return response
