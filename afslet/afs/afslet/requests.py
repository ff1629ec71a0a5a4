"""What a start request must look like, and what it asks for; the proxy looks at it too, before it looks for a node."""

import hashlib
import ipaddress
from dataclasses import dataclass

from typing_extensions import override

from afs.core.errors import InvalidArgument
from afs.proto.v1 import afslet_pb2 as pb

MAX_PRIORITY = 100
MAX_KEY = 256  # bytes of a tenant, an idempotency key, a label
MAX_LABELS = 64
MAX_IMAGE = 8192  # characters: local ones are paths
MIN_PIDS = 16  # the runtime's threads count too, until the command runs: with four it sometimes could not start it
_NOT_NEGATIVE = (
    "cpu_millis",
    "timeout_ms",
    "proxy_dispatch_max_retries",
    "proxy_dispatch_backoff_ms",
    "pids_limit",
    "disk_mb",
    "max_output_bytes",
    "diff_max_bytes",
    "term_grace_ms",
    "queue_timeout_ms",
)
_ENUMS = ("network", "user_namespace", "upload_mode", "diff_format")


@dataclass(frozen=True, slots=True)
class Resources:
    """What a run takes from a node: CPU in thousandths of a core, memory and disk in MiB (0: the node's default)."""

    cpu_millis: int = 0
    memory_mb: int = 0
    disk_mb: int = 0

    @override
    def __str__(self) -> str:
        disk = f" and {self.disk_mb} MiB of disk" if self.disk_mb else ""
        return f"{self.cpu_millis / 1000:g} CPUs and {self.memory_mb} MiB{disk}"


def resources_of(start: pb.StartRequest) -> Resources:
    """What *start* asks for."""
    return Resources(start.cpu_millis or start.cpu_cores * 1000, start.memory_mb, start.disk_mb)


def image_hash(start: pb.StartRequest) -> int:
    """64 bits that stand for the image as the request names it: for telling where it ran lately."""
    parts = (start.image, start.tag, start.platform_os, start.platform_arch, start.platform_variant)
    return int.from_bytes(hashlib.blake2b("\0".join(parts).encode(), digest_size=8).digest(), "little")


def check_start(start: pb.StartRequest) -> None:
    """InvalidArgument for a start request that can never work."""
    if not start.image:
        raise InvalidArgument("image is missing")
    if len(start.image) + len(start.tag) > MAX_IMAGE:
        raise InvalidArgument(f"the image's name is longer than {MAX_IMAGE} characters")
    for name in _NOT_NEGATIVE:
        if getattr(start, name) < 0:
            raise InvalidArgument(f"{name} must not be negative")
    if not start.cpu_millis and start.cpu_cores <= 0:
        raise InvalidArgument(f"cpu_cores must be positive, not {start.cpu_cores}")
    if start.memory_mb <= 0:
        raise InvalidArgument(f"memory_mb must be positive, not {start.memory_mb}")
    for name in _ENUMS:
        known = start.DESCRIPTOR.fields_by_name[name].enum_type
        assert known is not None
        if getattr(start, name) not in known.values_by_number:
            raise InvalidArgument(f"{name} {getattr(start, name)} is unknown")
    if not -MAX_PRIORITY <= start.priority <= MAX_PRIORITY:
        raise InvalidArgument(f"priority must be between -{MAX_PRIORITY} and {MAX_PRIORITY}, not {start.priority}")
    if 0 < start.pids_limit < MIN_PIDS:
        raise InvalidArgument(f"pids_limit must be at least {MIN_PIDS}: the runtime needs some to start the command")
    _check_texts(start)
    _check_process(start)
    for entry in start.egress_allow:
        parse_egress(entry)
    if start.egress_allow and start.network in (pb.NETWORK_NONE, pb.NETWORK_HOST):
        raise InvalidArgument("egress_allow makes sense on a bridge network only")


def _check_texts(start: pb.StartRequest) -> None:
    for name in ("tenant", "idempotency_key"):
        if len(getattr(start, name).encode()) > MAX_KEY:
            raise InvalidArgument(f"{name} is longer than {MAX_KEY} bytes")
    if len(start.labels) > MAX_LABELS:
        raise InvalidArgument(f"{len(start.labels)} labels are more than {MAX_LABELS}")
    for key, value in start.labels.items():
        if len(key.encode()) > MAX_KEY or len(value.encode()) > MAX_KEY:
            raise InvalidArgument(f"label {key[:40]!r} is longer than {MAX_KEY} bytes")


def _check_process(start: pb.StartRequest) -> None:
    for entry in start.env:
        if not entry.partition("=")[0] or "=" not in entry or "\0" in entry:
            raise InvalidArgument(f"env entry {entry!r} is not NAME=value")
    if any("\0" in argument for argument in start.command):
        raise InvalidArgument("an argument of the command holds a NUL byte")
    if start.cwd and (not start.cwd.startswith("/") or "\0" in start.cwd):
        raise InvalidArgument(f"cwd {start.cwd!r} is not an absolute path")
    if start.hostname and not _is_hostname(start.hostname):
        raise InvalidArgument(f"hostname {start.hostname!r} is not one: letters, digits, '-' and '.', at most 63 bytes")
    if "\0" in start.user or any(not group or "\0" in group for group in start.groups):
        raise InvalidArgument("user and groups must be names or numbers")
    if start.HasField("terminal_size") and not start.tty:
        raise InvalidArgument("terminal_size without tty")
    size = start.terminal_size
    if size.rows > 0xFFFF or size.columns > 0xFFFF:
        raise InvalidArgument(f"a terminal of {size.rows} rows and {size.columns} columns is too large")


def _is_hostname(name: str) -> bool:
    allowed = all(part and not part.startswith("-") and not part.endswith("-") for part in name.split("."))
    return allowed and len(name) <= 63 and name.isascii() and name.replace("-", "").replace(".", "").isalnum()


@dataclass(frozen=True, slots=True)
class Egress:
    """Where a run may connect to: addresses, and a port (0: any)."""

    network: ipaddress.IPv4Network | ipaddress.IPv6Network
    port: int


def parse_egress(entry: str) -> Egress:
    """``10.1.2.3``, ``10.0.0.0/8``, ``10.1.2.3:443``, ``[fd00::1]:443``; InvalidArgument."""
    address, port = entry, ""
    if entry.startswith("["):
        address, bracket, port = entry[1:].partition("]")
        if not bracket or (port and not port.startswith(":")):
            raise InvalidArgument(f"egress_allow {entry!r} is not ADDRESS[/BITS][:PORT]")
        port = port[1:]
    elif entry.count(":") == 1:
        address, _, port = entry.partition(":")
    if port and not (port.isascii() and port.isdigit() and 0 < int(port) < 65536):
        raise InvalidArgument(f"egress_allow {entry!r}: {port!r} is not a port")
    try:
        network = ipaddress.ip_network(address)
    except ValueError as error:
        raise InvalidArgument(f"egress_allow {entry!r} is not ADDRESS[/BITS][:PORT]: {error}") from None
    return Egress(network, int(port or 0))
