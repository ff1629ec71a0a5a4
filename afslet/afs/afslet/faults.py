"""Runs that AFS could not finish, typed: a Result that travels in the trailing metadata of the call's status.

Old clients see the gRPC status alone, as ever. Who reads the metadata learns whether the run was cancelled, rejected or
broken by the infrastructure, and whether trying again makes sense.
"""

from typing import TYPE_CHECKING, Any

from google.protobuf.message import DecodeError

from afs.core.errors import AfsError, Cancelled, Internal, ResourceExhausted, Unavailable
from afs.proto.v1 import afslet_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Iterable

RESULT_METADATA = "afs-result-bin"
_MAX_ERROR = 1000  # bytes: with metadata of 8 KiB and more, gRPC puts RESOURCE_EXHAUSTED in place of the status
_RETRYABLE = (Unavailable, ResourceExhausted, Internal)  # of the moment or of the node, not of the request


def is_retryable(error: AfsError) -> bool:
    """Whether the same request may succeed later, or on another node."""
    return isinstance(error, _RETRYABLE)


def fault(error: AfsError, *, accepted: bool, node_id: str = "") -> pb.Result:
    """The Result of a run that ended with *error*; *accepted*: a node had taken it."""
    result = pb.Result(error=error.line, node_id=node_id)
    if isinstance(error, Cancelled):
        result.outcome = pb.OUTCOME_CANCELLED
    else:
        broken = accepted and is_retryable(error)
        result.outcome = pb.OUTCOME_INFRASTRUCTURE_ERROR if broken else pb.OUTCOME_REJECTED
        result.retryable = is_retryable(error)
    return result


def to_metadata(result: pb.Result) -> tuple[tuple[str, bytes], ...]:
    """What the call's trailing metadata gets; a long error is cut, also one that another process wrote."""
    text = result.error.encode()
    if len(text) > _MAX_ERROR:
        shorter = pb.Result()
        shorter.CopyFrom(result)
        shorter.error = text[:_MAX_ERROR].decode(errors="ignore") + " ..."
        result = shorter
    return ((RESULT_METADATA, result.SerializeToString()),)


def from_metadata(metadata: "Iterable[tuple[str, Any]] | None") -> pb.Result | None:
    """The Result in *metadata*, if there is one that can be read."""
    for key, value in metadata or ():
        if key == RESULT_METADATA:
            try:
                return pb.Result.FromString(value)
            except DecodeError:
                return None
    return None
