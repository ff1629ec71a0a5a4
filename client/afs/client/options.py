"""What a run may ask for: one frozen value, and the keyword arguments that make it."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, TypedDict, Unpack

from afs.client.uploads import Upload
from afs.core.errors import InvalidArgument
from afs.proto.v1 import afslet_pb2 as pb

Network = Literal["default", "none", "bridge", "host"]
UploadMode = Literal["layer", "copy"]
DiffFormat = Literal["gzip", "zstd", "none"]
_NETWORKS: "Mapping[str, pb.NetworkMode.ValueType]" = {
    "default": pb.NETWORK_DEFAULT,
    "none": pb.NETWORK_NONE,
    "bridge": pb.NETWORK_BRIDGE,
    "host": pb.NETWORK_HOST,
}
_UPLOAD_MODES: "Mapping[str, pb.UploadMode.ValueType]" = {"layer": pb.UPLOAD_LAYER, "copy": pb.UPLOAD_COPY}
_DIFF_FORMATS: "Mapping[str, pb.DiffFormat.ValueType]" = {
    "gzip": pb.DIFF_GZIP,
    "zstd": pb.DIFF_ZSTD,
    "none": pb.DIFF_NONE,
}
_USER_NAMESPACES: "Mapping[bool | None, pb.UserNamespace.ValueType]" = {
    None: pb.USER_NAMESPACE_DEFAULT,
    False: pb.USER_NAMESPACE_OFF,
    True: pb.USER_NAMESPACE_ON,
}


class RunOptions(TypedDict, total=False):
    """The keyword arguments of a run; :class:`RunRequest` says what they mean."""

    tag: str
    cpu: float
    memory_mb: int
    timeout: float
    term_grace: float
    env: Mapping[str, str] | None
    cwd: str
    user: str
    groups: Sequence[str]
    hostname: str
    pids_limit: int
    disk_mb: int
    network: Network
    egress_allow: Sequence[str]
    user_namespace: bool | None
    stdin: bool
    tty: bool
    terminal_size: tuple[int, int] | None
    max_output_bytes: int
    upload: Path | str | Iterable[Upload] | None
    upload_to: str
    upload_mode: UploadMode
    diff_format: DiffFormat
    diff_include: Sequence[str]
    diff_exclude: Sequence[str]
    diff_max_bytes: int
    platform: tuple[str, str, str]
    node_id: str
    force_local_fetch: bool
    max_retries: int
    backoff: float
    queue_timeout: float
    priority: int
    tenant: str
    idempotency_key: str
    labels: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class RunRequest:
    """One run: *command* (the image's own if empty) in *image*. Where 0 or "" is the default, the node or image decides.

    *memory_mb* and *disk_mb* are in MiB, *timeout*, *term_grace* (between SIGTERM and SIGKILL), *queue_timeout* and
    *backoff* in seconds, *terminal_size* is rows and columns. A directory *upload* is placed at *upload_to* in the
    container's root. While no node has room the proxy tries again, *max_retries* times (0: as long as the call lives),
    *backoff* apart at first. *diff_to* is a file for the changed files of :meth:`AfsClient.run` and
    :meth:`AfsClient.map`.
    """

    image: str
    command: Sequence[str] = ()
    tag: str = ""
    cpu: float = 1
    memory_mb: int = 512
    timeout: float = 0
    term_grace: float = 0
    env: Mapping[str, str] | None = None
    cwd: str = ""
    user: str = ""  # USER[:GROUP], names or numbers
    groups: Sequence[str] = ()
    hostname: str = ""
    pids_limit: int = 0
    disk_mb: int = 0
    network: Network = "default"
    egress_allow: Sequence[str] = ()  # ADDRESS[/BITS][:PORT], with a bridge network
    user_namespace: bool | None = None
    stdin: bool = False  # Run.write() gives it; else it is /dev/null
    tty: bool = False
    terminal_size: tuple[int, int] | None = None
    max_output_bytes: int = 0  # of each stream; 0: no limit
    upload: Path | str | Iterable[Upload] | None = None
    upload_to: str = "/"
    upload_mode: UploadMode = "layer"
    diff_format: DiffFormat = "gzip"
    diff_include: Sequence[str] = ()  # globs, as gitignore has them
    diff_exclude: Sequence[str] = ()
    diff_max_bytes: int = 0  # uncompressed
    platform: tuple[str, str, str] = ("", "", "")  # OS, architecture, variant
    node_id: str = ""
    force_local_fetch: bool = False
    max_retries: int = 0
    backoff: float = 0
    queue_timeout: float = 0  # for room; 0: as long as the call lives
    priority: int = 0  # -100 to 100, higher ones first
    tenant: str = ""
    idempotency_key: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    diff_to: Path | str | None = None


def make_request(image: str | RunRequest, command: Sequence[str], **options: Unpack[RunOptions]) -> RunRequest:
    """A request of what a caller gave; *command* and *options* win over those of a given request."""
    if isinstance(image, RunRequest):
        return replace(image, command=command or image.command, **options)
    return RunRequest(image, command, **options)


def start_message(request: RunRequest, *, progress: bool) -> pb.StartRequest:
    """*request* on the wire; InvalidArgument for values that no message can hold."""
    try:
        return _start(request, progress)
    except (KeyError, ValueError, OverflowError) as error:
        raise InvalidArgument(f"the request for image {request.image!r} makes no sense: {error}") from None


def _start(request: RunRequest, progress: bool) -> pb.StartRequest:
    start = pb.StartRequest(
        image=request.image,
        tag=request.tag,
        command=request.command,
        # Servers older than cpu_millis see whole cores.
        cpu_cores=math.ceil(request.cpu),
        memory_mb=request.memory_mb,
        timeout_ms=_milliseconds(request.timeout),
        node_id=request.node_id,
        proxy_dispatch_max_retries=request.max_retries,
        proxy_dispatch_backoff_ms=_milliseconds(request.backoff),
        force_local_fetch=request.force_local_fetch,
        bytes_only=True,
        progress=progress,
        no_upload=request.upload is None,
    )
    if request.cpu != start.cpu_cores:
        start.cpu_millis = math.ceil(request.cpu * 1000)
    start.platform_os, start.platform_arch, start.platform_variant = request.platform
    if request.env:
        start.env.extend(f"{name}={value}" for name, value in request.env.items())
    for name in _PLAIN:
        if value := getattr(request, name):
            setattr(start, name, value)
    for name in _LISTS:
        if values := getattr(request, name):
            getattr(start, name).extend(values)
    for name in ("term_grace", "queue_timeout"):
        if seconds := getattr(request, name):
            setattr(start, f"{name}_ms", _milliseconds(seconds))
    if request.labels:
        start.labels.update(request.labels)
    if request.terminal_size is not None:
        start.terminal_size.rows, start.terminal_size.columns = request.terminal_size
    start.network = _NETWORKS[request.network]
    start.user_namespace = _USER_NAMESPACES[request.user_namespace]
    start.upload_mode = _UPLOAD_MODES[request.upload_mode]
    start.diff_format = _DIFF_FORMATS[request.diff_format]
    return start


_PLAIN = (
    *("cwd", "user", "hostname", "pids_limit", "disk_mb", "stdin", "tty", "max_output_bytes", "diff_max_bytes"),
    *("priority", "tenant", "idempotency_key"),
)
_LISTS = ("groups", "egress_allow", "diff_include", "diff_exclude")


def _milliseconds(seconds: float) -> int:
    """Rounded up: 0 stands for the default."""
    return math.ceil(seconds * 1000)
