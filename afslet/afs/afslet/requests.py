"""What a start request must look like; the proxy checks it too, before it looks for a node."""

from afs.core.errors import InvalidArgument
from afs.proto.v1 import afslet_pb2 as pb


def check_start(start: pb.StartRequest) -> None:
    """InvalidArgument for a start request that can never work."""
    if not start.image:
        raise InvalidArgument("image is missing")
    if start.cpu_cores <= 0:
        raise InvalidArgument(f"cpu_cores must be positive, not {start.cpu_cores}")
    if start.memory_mb <= 0:
        raise InvalidArgument(f"memory_mb must be positive, not {start.memory_mb}")
    for name in ("timeout_ms", "proxy_dispatch_max_retries", "proxy_dispatch_backoff_ms"):
        if getattr(start, name) < 0:
            raise InvalidArgument(f"{name} must not be negative")
    for entry in start.env:
        if not entry.partition("=")[0] or "=" not in entry or "\0" in entry:
            raise InvalidArgument(f"env entry {entry!r} is not NAME=value")
    if any("\0" in argument for argument in start.command):
        raise InvalidArgument("an argument of the command holds a NUL byte")
