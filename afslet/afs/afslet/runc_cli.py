"""``afs_runc``: run one command in a root directory under limits, with the same code that afslet runs containers with."""

import asyncio
import os
import resource
import secrets
import signal
import sys
import tempfile
from collections.abc import Coroutine
from pathlib import Path

import click

from afs.core.cli import fail
from afs.core.errors import AfsError, Cancelled, FailedPrecondition, Internal, InvalidArgument
from afs.core.units import parse_duration


async def run(
    rootfs: Path, argv: tuple[str, ...], cpus: float, memory: int, timeout: float, env: tuple[str, ...]
) -> int:
    """The exit code: the command's, 124 after a timeout, 137 when memory ran out."""
    from afs.afslet.bundle import CAPABILITIES, Process, Sandbox, merge_env, runtime_config
    from afs.afslet.cgroups import Limits, clean_up
    from afs.afslet.execution import KILLED, NOT_EXECUTABLE, NOT_FOUND, TIMED_OUT
    from afs.afslet.rootfs import User, find_bad_mount_point, find_command, open_root
    from afs.afslet.runc import Runtime, run_container
    from afs.afslet.seccomp import load_filter

    async def output(source: str, data: bytes) -> None:
        stream = sys.stdout if source == "stdout" else sys.stderr
        await asyncio.to_thread(_write, stream.fileno(), data)

    process = Process(argv, merge_env((), env, "/root"), "/", User(0, 0, (), "/root"))
    with open_root(rootfs) as fd:
        if bad := find_bad_mount_point(fd):
            raise FailedPrecondition(f"{bad} is not a directory in {rootfs}")
        path = next(entry[5:] for entry in process.env if entry.startswith("PATH="))
        command = find_command(fd, argv[0], "/", path, process.user)
    if not command.executable:
        what = "cannot be executed" if command.found else "not found"
        why = f": {command.why}" if command.why else ""
        click.echo(f"afs_runc: command {argv[0]!r} {what} in {rootfs}{why}", err=True)
        return NOT_EXECUTABLE if command.found else NOT_FOUND
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    name = secrets.token_hex(8)
    seccomp = load_filter("", CAPABILITIES)
    parent = f"afs-runc-{name}"
    with tempfile.TemporaryDirectory(prefix="afs-runc-") as temporary:
        bundle, state = Path(temporary, "bundle"), Path(temporary, "state")
        bundle.mkdir()
        try:
            ended = await run_container(
                Runtime("runc", state, parent, 2.0, files),
                name,
                bundle,
                runtime_config(process, str(rootfs), Sandbox(files, seccomp=seccomp)),
                Limits(cpus, memory, 4096),
                timeout,
                output,
            )
        finally:
            await asyncio.to_thread(clean_up, parent)
    if ended.start_error:
        raise FailedPrecondition(f"cannot start {argv[0]!r} in {rootfs}: {ended.start_error}")
    if ended.timed_out:
        click.echo(f"afs_runc: command {argv[0]!r} timed out after {timeout:g} s", err=True)
        return TIMED_OUT
    if ended.counters.oom and ended.status:
        click.echo(f"afs_runc: command {argv[0]!r} ran out of memory: the limit is {memory >> 20} MiB", err=True)
        return KILLED
    return ended.status


async def _until_signal(name: str, work: Coroutine[None, None, int]) -> int:
    """The result of *work*; SIGINT and SIGTERM cancel it, which kills the container and removes its cgroup."""
    task = asyncio.create_task(work)
    for signum in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(signum, task.cancel)
    try:
        return await task
    except asyncio.CancelledError:
        raise Cancelled(f"command {name!r} was cancelled") from None


def _write(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


@click.command(
    context_settings={"allow_interspersed_args": False},
    help="Run ARGV in a container whose root is the directory --rootfs.",
)
@click.version_option(package_name="afs-cluster", prog_name="afs_runc")
@click.option("--rootfs", type=click.Path(path_type=Path), required=True)
@click.option("--cpu", "cpus", type=float, default=1.0, show_default=True, help="CPU cores; may be a fraction.")
@click.option("--memory-mb", type=int, default=512, show_default=True)
@click.option("--timeout", default="1h", show_default=True)
@click.option("--env", "env", multiple=True, help="NAME=value; repeatable.")
@click.argument("argv", nargs=-1, required=True)
def main(rootfs: Path, cpus: float, memory_mb: int, timeout: str, env: tuple[str, ...], argv: tuple[str, ...]) -> None:
    """Entry point."""
    try:
        if not rootfs.is_dir():
            raise InvalidArgument(f"--rootfs {rootfs} is not a directory")
        if cpus <= 0 or memory_mb <= 0:
            raise InvalidArgument("--cpu and --memory-mb must be positive")
        seconds = parse_duration(timeout)
        code = asyncio.run(_until_signal(argv[0], run(rootfs.resolve(), argv, cpus, memory_mb << 20, seconds, env)))
    except AfsError as error:
        fail("afs_runc", error)
    except OSError as error:
        fail("afs_runc", Internal(str(error)))
    sys.exit(code)


if __name__ == "__main__":
    main()
