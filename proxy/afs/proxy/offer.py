"""Offering a run to a node, and how calls to nodes fail.

Until a node says ``accepted`` nothing has happened, so the run may be offered elsewhere. Responses are told apart by their
first byte, the tag of the field that they consist of, and not decoded.
"""

import contextlib
from dataclasses import dataclass
from typing import Any, cast

import grpc
import grpc.aio

from afs.afslet import faults
from afs.core.errors import AfsError, Cancelled, DeadlineExceeded, Internal, ResourceExhausted, Unavailable
from afs.core.rpc import CALL_ENDED, EOF, send, to_afs_error
from afs.proto.v1 import afslet_pb2 as pb
from afs.proxy.node import AfsletNode
from afs.proxy.nodes import Nodes

EXECUTE = "/afsletpb.Afslet/Execute"
RESULT, ACCEPTED, PROGRESS = b"\x12", b"\x32", b"\xa2\x06"  # tags of the fields 2, 6 and 100 of ExecuteResponse
Call = grpc.aio.StreamStreamCall[bytes, bytes]


@dataclass(eq=False)
class NodeFailed(Exception):
    """A call to a node ended with *error*; *result* is what its trailing metadata say of it."""

    error: AfsError
    result: pb.Result | None = None

    @property
    def retryable(self) -> bool:
        """Whether another node, or this one later, may do better."""
        return self.result.retryable if self.result is not None else faults.is_retryable(self.error)

    @property
    def spoken(self) -> bool:
        """Whether the node itself said so; else the call ended here or on the way, and the node may be at work still."""
        return self.result is not None or not isinstance(self.error, Unavailable | DeadlineExceeded | Cancelled)


class QueueTimeout(DeadlineExceeded):
    """No room until the time that the client gave was over: the same request may succeed later."""


def failure(error: grpc.aio.AioRpcError, node: AfsletNode) -> NodeFailed:
    """What *error* of a call to *node* says."""
    metadata = cast("Any", error.trailing_metadata())
    return NodeFailed(to_afs_error(error, f"afslet {node.endpoint}"), faults.from_metadata(metadata))


def fault(error: AfsError, result: pb.Result | None, node: AfsletNode | None, *, accepted: bool) -> pb.Result:
    """The Result that the client's trailing metadata get: the node's own, or one for an *error* found here."""
    node_id = node.status.node_id if node is not None else ""
    if result is None:
        result = faults.fault(error, accepted=accepted)
        if isinstance(error, QueueTimeout):
            result.retryable = True
        elif isinstance(error, DeadlineExceeded) and accepted:
            result.outcome = pb.OUTCOME_CANCELLED
    result.node_id = result.node_id or (node_id if accepted else "")
    return result


def open_call(node: AfsletNode, metadata: Any, timeout: float | None) -> Call:
    """A call to *node* that ends after *timeout* seconds, if there are any."""
    return node.channel.stream_stream(EXECUTE)(metadata=metadata, timeout=timeout)


async def offer(call: Call, node: AfsletNode, first: bytes) -> bytes:
    """Send the start request; the node's first answer. Raises NodeFailed."""
    # A refused call refuses the write as well; its status comes with the read.
    with contextlib.suppress(*CALL_ENDED):
        await send(call, first)
    return await answer(call, node)


async def answer(call: Call, node: AfsletNode) -> bytes:
    """The next response before ``accepted`` or that itself; NodeFailed if the call ended instead."""
    try:
        response = await call.read()
    except grpc.aio.AioRpcError as error:
        raise failure(error, node) from None
    if response is EOF:
        raise NodeFailed(Internal(f"afslet {node.endpoint} ended the call without an answer"))
    data = cast("bytes", response)
    if data[:1] != ACCEPTED and data[:2] != PROGRESS:
        call.cancel()
        raise NodeFailed(Internal(f"afslet {node.endpoint} answered a run with something else than accepted"))
    return data


def blame(nodes: Nodes, node: AfsletNode, failed: NodeFailed) -> None:
    """Remember what a failed offer says about *node*."""
    if isinstance(failed.error, ResourceExhausted):
        node.refused = True  # until its next report
        return
    if not failed.retryable:
        return
    if isinstance(failed.error, Unavailable) and failed.result is None:
        nodes.lost(node, failed.error)  # nobody spoke: there is no connection
    else:
        nodes.failed(node, failed.error)
