"""One call of Execute at the proxy, and the table of all of them."""

import secrets
import time
from dataclasses import dataclass, field

from google.protobuf.message import DecodeError

from afs.afslet.requests import check_start, image_hash, resources_of
from afs.core.errors import Cancelled, InvalidArgument
from afs.proto.v1 import afslet_pb2 as pb
from afs.proto.v1 import runs_pb2
from afs.proxy.dispatch import Waiter
from afs.proxy.node import AfsletNode
from afs.proxy.offer import Call, NodeFailed


@dataclass(slots=True, eq=False)
class Run:
    """*first* is the client's first message as it came; *start* is dropped once a node has accepted the run.

    *owner* is the client's address. *ends* is when waiting for room ends, in monotonic seconds, and *limit* says whose wish
    that is. *failed* is why the last offers came to nothing. *over*: the node itself has ended the call.
    """

    first: bytes
    start: pb.StartRequest | None
    waiter: Waiter
    owner: str
    ends: float
    limit: str
    run_id: str = field(default_factory=lambda: secrets.token_hex(8))
    started: float = field(default_factory=time.time)
    node: AfsletNode | None = None
    call: Call | None = None
    accepted: bytes = b""
    result: bytes = b""
    failed: NodeFailed | None = None
    over: bool = False
    cancelled: Cancelled | None = None

    @property
    def node_run_id(self) -> str:
        """What the node calls it; empty if it did not say."""
        return pb.ExecuteResponse.FromString(self.accepted).accepted.run_id if self.accepted else ""

    def cancel(self, reason: str) -> None:
        """End the call with CANCELLED, whatever it waits for."""
        self.cancelled = Cancelled(f"run {self.run_id} was cancelled" + (f": {reason}" if reason else ""))
        self.waiter.error = self.cancelled
        self.waiter.wake()
        if self.call is not None:
            self.call.cancel()

    def describe(self) -> runs_pb2.Run:
        """As Runs.List tells it."""
        start = self.start or pb.ExecuteRequest.FromString(self.first).start
        wanted = self.waiter.wanted
        return runs_pb2.Run(
            run_id=self.node_run_id or self.run_id,
            node_id=self.node.status.node_id if self.node is not None and self.accepted else "",
            image=f"{start.image}:{start.tag}" if start.tag else start.image,
            command=start.command,
            tenant=start.tenant,
            owner=self.owner,
            phase="running" if self.accepted else "queued",
            started_unix_ms=int(self.started * 1000),
            cpu_millis=wanted.cpu_millis,
            memory_mb=wanted.memory_mb,
            labels=start.labels,
        )


def read_start(first: bytes | None) -> pb.StartRequest:
    """The start request in a call's first message; InvalidArgument if it is none, or can never work."""
    try:
        request = pb.ExecuteRequest.FromString(first or b"")
    except DecodeError:
        raise InvalidArgument("the first request is not an ExecuteRequest") from None
    if not request.HasField("start"):
        raise InvalidArgument("the first request must be start")
    check_start(request.start)
    return request.start


def waiter_of(start: pb.StartRequest) -> Waiter:
    """How the run of *start* stands in the queue."""
    return Waiter(
        resources_of(start),
        start.tenant,
        start.priority,
        start.node_id,
        image=image_hash(start),
        wants_progress=start.progress,
    )


def queued(position: int = 0, length: int = 0) -> bytes:
    """The response that says that a run waits."""
    progress = pb.Progress(phase=pb.Progress.PHASE_QUEUED, position=position, queued=length)
    return pb.ExecuteResponse(progress=progress).SerializeToString()
