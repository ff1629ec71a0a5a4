"""``afs_cli``: the command line client."""

import asyncio
import contextlib
import os
import signal
import sys
from pathlib import Path

import click

from afs.core.cli import fail
from afs.core.errors import AfsError, Cancelled, Internal, InvalidArgument, status_of
from afs.core.units import format_size, parse_duration

PROXY = click.option(
    "--proxy", default="127.0.0.1:62051", envvar="AFS_PROXY", show_default=True, help="Address of afs_proxy."
)


@click.group()
@click.version_option(package_name="afs-cluster", prog_name="afs_cli")
def main() -> None:
    """Run commands in images on an AFS cluster."""


def _split_dir(given: str) -> tuple[Path, str]:
    """``DIR`` or ``DIR:/PREFIX``."""
    path, colon, prefix = given.rpartition(":")
    if colon and prefix.startswith("/") and not Path(given).is_dir():
        return Path(path), prefix
    return Path(given), "/"


def _image_name(image: str) -> str:
    """Local sources get an absolute path: the server has another working directory."""
    scheme, colon, rest = image.partition(":")
    if not colon or scheme not in ("oci", "docker-archive") or rest.startswith("/"):
        return image
    path, at, digest = rest.partition("@")
    if not at:
        path, tag = (rest, "") if os.path.exists(rest) else rest.rpartition(":")[::2] if ":" in rest else (rest, "")
        return f"{scheme}:{os.path.abspath(path)}" + (f":{tag}" if tag else "")
    return f"{scheme}:{os.path.abspath(path)}@{digest}"


def _environment(entries: tuple[str, ...]) -> dict[str, str]:
    """``NAME=value``, or ``NAME`` to pass this process's on."""
    found = {}
    for entry in entries:
        name, equals, value = entry.partition("=")
        if not name or (not equals and name not in os.environ):
            raise InvalidArgument(f"--env {entry!r} is not NAME=value")
        found[name] = value if equals else os.environ[name]
    return found


@main.command(context_settings={"allow_interspersed_args": False})
@PROXY
@click.option(
    "--image", required=True, help="alpine:3.20, host:5000/name@sha256:..., oci:DIR:tag, docker-archive:FILE."
)
@click.option("--cpu", type=int, default=1, show_default=True, help="CPU cores.")
@click.option("--memory-mb", type=int, default=512, show_default=True)
@click.option("--timeout", default="0", help="Like 30s or 5m; the node's default if not given.")
@click.option(
    "--dir", "directory", help="DIR or DIR:/PREFIX: upload a directory to the container's root, or below PREFIX."
)
@click.option(
    "--out", type=click.Path(path_type=Path, dir_okay=False), help="Write the changed files there, as tar.gz."
)
@click.option("--env", multiple=True, help="NAME=value, or NAME to pass on; repeatable.")
@click.option("--platform", default="", help="OS/ARCH[/VARIANT].")
@click.option("--node", default="", help="Run on this node only.")
@click.option("--max-retries", type=int, default=0, help="Tries while no node has room; 0: until Ctrl-C.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the output.")
@click.argument("argv", nargs=-1, type=click.UNPROCESSED)
def execute(
    proxy: str,
    image: str,
    cpu: int,
    memory_mb: int,
    timeout: str,
    directory: str | None,
    out: Path | None,
    env: tuple[str, ...],
    platform: str,
    node: str,
    max_retries: int,
    as_json: bool,
    argv: tuple[str, ...],
) -> None:
    """Run ARGV (the image's own command if empty) in an image; exit as it does.

    After a timeout the exit code is 124, out of memory 137, command not found 127, not executable 126. If AFS itself
    fails it is 64 to 77, with one line on stderr; see docs/exit-codes.md.
    """
    try:
        upload, prefix = _split_dir(directory) if directory is not None else (None, "/")
        os_name, _, rest = platform.partition("/")
        architecture, _, variant = rest.partition("/")
        options = {
            "cpu": cpu,
            "memory_mb": memory_mb,
            "timeout": parse_duration(timeout),
            "env": _environment(env),
            "upload": upload,
            "upload_to": prefix,
            "platform": (os_name, architecture, variant),
            "node_id": node,
            "max_retries": max_retries,
        }
        code = asyncio.run(_execute(proxy, _image_name(image), argv, out, options, as_json=as_json))
    except AfsError as error:
        if as_json:
            import json

            code = status_of(error).exit_code
            click.echo(
                json.dumps({"outcome": "infrastructure error", "code": status_of(error).grpc, "error": error.line})
            )
            sys.exit(code)
        fail("afs_cli", error)
    except (OSError, ValueError, OverflowError) as error:  # a file of ours, or a number or text that no message holds
        fail("afs_cli", InvalidArgument(str(error)))
    sys.exit(code)


async def _execute(
    proxy: str, image: str, argv: tuple[str, ...], out: Path | None, options: dict[str, object], *, as_json: bool
) -> int:
    """Run it, with Ctrl-C and SIGTERM cancelling the run on the node; the exit code."""
    task = asyncio.create_task(_stream(proxy, image, argv, out, options, as_json=as_json))
    loop = asyncio.get_running_loop()
    for signum in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(signum, task.cancel)
    try:
        return await task
    except asyncio.CancelledError:
        raise Cancelled(f"the run of {image} was cancelled") from None


async def _stream(
    proxy: str, image: str, argv: tuple[str, ...], out: Path | None, options: dict[str, object], *, as_json: bool
) -> int:
    from afs.client.aio import AfsClient, to_json, written_whole
    from afs.client.events import DiffChunk, Finished, Log

    async with AfsClient(proxy) as client:
        if as_json:
            result = await client.run(image, argv, diff_to=out, **options)
            click.echo(to_json(result))
            return result.exit_code
        code: int | None = None
        size = 0
        with contextlib.ExitStack() as stack:
            file = stack.enter_context(written_whole(out)) if out is not None else None
            async with contextlib.aclosing(client.execute(image, argv, **options)) as events:  # type: ignore[arg-type, type-var]
                async for event in events:
                    match event:
                        case Log():
                            _write(event.source, event.data)
                        case Finished():
                            code = event.exit_code
                            if event.error:
                                click.echo(f"afs_cli: {event.error}", err=True)
                        case DiffChunk() if file is not None:
                            size += file.write(event.data)
                        case _:
                            pass
        if code is None:
            raise Internal(f"AFS at {proxy} ended the run without a result")
        if out is not None:
            click.echo(f"afs_cli: changed files: {out} ({format_size(size)})", err=True)
        return code


def _write(source: str, data: bytes) -> None:
    stream = sys.stdout if source == "stdout" else sys.stderr
    stream.buffer.write(data)
    stream.flush()


@main.command()
@PROXY
@click.option("--json", "as_json", is_flag=True)
def status(proxy: str, as_json: bool) -> None:
    """Show the cluster's nodes and what they hold."""

    async def ask() -> list[object]:
        from afs.client.aio import AfsClient

        async with AfsClient(proxy) as client:
            return list(await client.status())

    try:
        responses = asyncio.run(ask())
    except AfsError as error:
        fail("afs_cli", error)
    for response in responses:
        _print_status(response, as_json=as_json)


def _print_status(response: object, *, as_json: bool) -> None:
    from afs.proto.v1.proxy_pb2 import StatusResponse

    assert isinstance(response, StatusResponse)
    if as_json:
        from google.protobuf.json_format import MessageToJson

        click.echo(MessageToJson(response, indent=None, preserving_proto_field_name=True))
        return
    match response.WhichOneof("payload"):
        case "summary":
            summary = response.summary
            click.echo(
                f"{summary.layerstore_instances} layerstores, {summary.total_layers} layers; "
                f"{summary.afslet_reachable} of {summary.afslet_instances} afslets answer"
            )
        case "layerstore":
            store = response.layerstore
            size = format_size(sum(layer.afs_size for layer in store.layers))
            click.echo(f"layerstore {store.node_id} {store.endpoint}: {len(store.layers)} layers, {size}")
        case "afslet":
            node = response.afslet
            if node.reachable:
                used = f"{node.used_cpu_cores} of {node.limit_cpu_cores} CPUs, {node.used_memory_mb} of {node.limit_memory_mb} MiB"
                click.echo(f"afslet {node.endpoint}: {node.running_containers} running, {used} in use")
            else:
                click.echo(f"afslet {node.endpoint}: {node.error}")
        case "error":
            click.echo(f"{response.error.source}: {response.error.message}")
        case _:
            pass


@main.command()
@PROXY
@click.option("--replicas", type=int, required=True, help="How many nodes shall hold every layer completely.")
@click.argument("image")
def reconcile(proxy: str, replicas: int, image: str) -> None:
    """Copy the layers of IMAGE to more nodes."""

    async def ask() -> tuple[int, bool]:
        from afs.client.aio import AfsClient

        async with AfsClient(proxy) as client:
            answer = await client.reconcile(_image_name(image), replicas)
            for layer in answer.layers:
                click.echo(f"{layer.digest}: {', '.join(target.node_id for target in layer.instances)}")
            return answer.current_replica, answer.ensured

    try:
        current, ensured = asyncio.run(ask())
        if not ensured:
            raise InvalidArgument(f"{image} is on {current} nodes, not {replicas}: there are not more")
    except AfsError as error:
        fail("afs_cli", error)


if __name__ == "__main__":
    main()
