"""The flags of ``afs_cli execute``, and the request that they make."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypedDict, TypeVar

import click

from afs.client.cli_arguments import environment, image_name, labels, platform, split_dir, split_file
from afs.client.options import DiffFormat, Network, RunRequest
from afs.core.errors import InvalidArgument
from afs.core.units import parse_duration, parse_size

F = TypeVar("F", bound=Callable[..., Any])
PROXY = click.option(
    "--proxy", default="127.0.0.1:62051", envvar="AFS_PROXY", show_default=True, help="Address of afs_proxy."
)


class Flags(TypedDict):
    """What click gives to the command."""

    proxy: str
    image: str
    cpu: float
    memory_mb: int
    disk_mb: int
    pids: int
    timeout: str
    grace: str
    env: tuple[str, ...]
    cwd: str
    user: str
    group: tuple[str, ...]
    hostname: str
    network: Network
    allow: tuple[str, ...]
    userns: bool | None
    stdin: bool
    tty: bool
    max_output: str
    directory: tuple[str, ...]
    file: tuple[str, ...]
    copy: bool
    out: Path | None
    diff_format: DiffFormat
    include: tuple[str, ...]
    exclude: tuple[str, ...]
    max_diff: str
    platform: str
    node: str
    max_retries: int
    queue_timeout: str
    priority: int
    tenant: str
    key: str
    label: tuple[str, ...]
    retries: int
    as_json: bool
    argv: tuple[str, ...]


_OPTIONS = (
    PROXY,
    click.option(
        "--image", required=True, help="alpine:3.20, host:5000/name@sha256:..., oci:DIR:tag, docker-archive:FILE."
    ),
    click.option("--cpu", type=float, default=1, show_default=True, help="CPU cores, such as 0.5."),
    click.option("--memory-mb", type=int, default=512, show_default=True),
    click.option("--disk-mb", type=int, default=0, help="What may be written; the node's default if not given."),
    click.option("--pids", type=int, default=0, help="Processes and threads; the node's default if not given."),
    click.option("--timeout", default="0", help="Like 30s or 5m; the node's default if not given."),
    click.option("--grace", default="0", help="Between SIGTERM and SIGKILL after the timeout."),
    click.option("--env", multiple=True, help="NAME=value, or NAME to pass on; repeatable."),
    click.option("--cwd", default="", help="Working directory, instead of the image's."),
    click.option("--user", default="", help="USER[:GROUP], names or numbers, instead of the image's."),
    click.option("--group", multiple=True, help="One more group of the user; repeatable."),
    click.option("--hostname", default=""),
    click.option(
        "--network",
        type=click.Choice(["default", "none", "bridge", "host"]),
        default="default",
        show_default=True,
        help="default: what the node's operator chose.",
    ),
    click.option("--allow", multiple=True, help="ADDRESS[/BITS][:PORT] to connect to on a bridge; repeatable."),
    click.option("--userns/--no-userns", default=None, help="Whether root is an unprivileged user outside."),
    click.option("-i", "--stdin", is_flag=True, help="Pass standard input on."),
    click.option("-t", "--tty", is_flag=True, help="Give the command a terminal."),
    click.option("--max-output", default="0", help="Of stdout and of stderr, like 10M; the rest is dropped."),
    click.option(
        "--dir",
        "directory",
        multiple=True,
        help="DIR or DIR:/PREFIX: upload a directory to the container's root, or below PREFIX; repeatable.",
    ),
    click.option("--file", multiple=True, help="FILE:/PATH: upload one file; repeatable."),
    click.option("--copy", is_flag=True, help="Uploaded files count as written by the command."),
    click.option(
        "--out", type=click.Path(path_type=Path, dir_okay=False), help="Write the changed files there, as a tar."
    ),
    click.option(
        "--diff-format",
        type=click.Choice(["gzip", "zstd"]),
        default="gzip",
        show_default=True,
        help="How --out is compressed.",
    ),
    click.option("--include", multiple=True, help="Changed files: only what this pattern matches; repeatable."),
    click.option("--exclude", multiple=True, help="Changed files: but for what this pattern matches; repeatable."),
    click.option("--max-diff", default="0", help="Changed files: at most this much, uncompressed, like 1G."),
    click.option("--platform", default="", help="OS/ARCH[/VARIANT]."),
    click.option("--node", default="", help="Run on this node only."),
    click.option("--max-retries", type=int, default=0, help="Tries while no node has room; 0: until Ctrl-C."),
    click.option("--queue-timeout", default="0", help="How long to wait for room, like 1m; 0: until Ctrl-C."),
    click.option("--priority", type=int, default=0, help="-100 to 100; higher ones come first."),
    click.option("--tenant", default="", help="Who the run is for; room is shared fairly between tenants."),
    click.option("--key", default="", help="Idempotency key: runs of a tenant with one key are one run."),
    click.option("--label", multiple=True, help="KEY=value, for lists and logs; repeatable."),
    click.option(
        "--retries", type=int, default=0, help="Tries after faults that may go away, as long as nothing was printed."
    ),
    click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the output."),
    click.argument("argv", nargs=-1, type=click.UNPROCESSED),
)


def with_flags(command: F) -> F:
    """Decorate *command* with all flags."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def request_of(flags: Flags) -> RunRequest:
    """The run that *flags* ask for; InvalidArgument."""
    if flags["retries"] and flags["stdin"]:
        raise InvalidArgument("--retries does not go with --stdin: what was read cannot be read again")
    upload = [*map(split_dir, flags["directory"]), *map(split_file, flags["file"])]
    return RunRequest(
        image_name(flags["image"]),
        flags["argv"],
        cpu=flags["cpu"],
        memory_mb=flags["memory_mb"],
        disk_mb=flags["disk_mb"],
        pids_limit=flags["pids"],
        timeout=parse_duration(flags["timeout"]),
        term_grace=parse_duration(flags["grace"]),
        env=environment(flags["env"]),
        cwd=flags["cwd"],
        user=flags["user"],
        groups=flags["group"],
        hostname=flags["hostname"],
        network=flags["network"],
        egress_allow=flags["allow"],
        user_namespace=flags["userns"],
        stdin=flags["stdin"],
        tty=flags["tty"],
        max_output_bytes=parse_size(flags["max_output"]),
        upload=upload or None,
        upload_mode="copy" if flags["copy"] else "layer",
        # Without --out nobody reads it.
        diff_format=flags["diff_format"] if flags["out"] is not None else "none",
        diff_include=flags["include"],
        diff_exclude=flags["exclude"],
        diff_max_bytes=parse_size(flags["max_diff"]),
        diff_to=flags["out"],
        platform=platform(flags["platform"]),
        node_id=flags["node"],
        max_retries=flags["max_retries"],
        queue_timeout=parse_duration(flags["queue_timeout"]),
        priority=flags["priority"],
        tenant=flags["tenant"],
        idempotency_key=flags["key"],
        labels=labels(flags["label"]),
    )
