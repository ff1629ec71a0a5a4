"""``afs``: the whole cluster on one machine."""

import asyncio
import os
import signal
import sys
from pathlib import Path
from typing import Any

import click

from afs.core.cli import fail
from afs.core.errors import AfsError, FailedPrecondition, InvalidArgument


@click.group()
@click.version_option(package_name="afs-cluster", prog_name="afs")
def main() -> None:
    """Try AFS on one machine."""


@main.command(context_settings={"allow_interspersed_args": False})
@click.option("--state-dir", type=click.Path(path_type=Path), default=Path("/var/lib/afs/up"), show_default=True)
@click.option("--nodes", default=2, show_default=True)
@click.option("--cpus", default=0, help="CPU cores per node; all of the machine's if 0.")
@click.option("--memory-mb", default=0, help="MiB per node; an equal share of nine tenths of the machine's if 0.")
@click.option("--any-port", is_flag=True, help="Let the kernel choose the ports instead of the default ones.")
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
def up(state_dir: Path, nodes: int, cpus: int, memory_mb: int, any_port: bool, command: tuple[str, ...]) -> None:
    """Start a cluster here and run COMMAND against it, or keep it until Ctrl-C.

    COMMAND finds the proxy's address in AFS_PROXY, where afs_cli looks for it. What is cached stays in --state-dir.
    """
    try:
        if nodes < 1:
            raise InvalidArgument("--nodes must be at least 1")
        if os.geteuid() != 0:
            raise FailedPrecondition("afs up needs root: it mounts file systems and starts containers")
        code = asyncio.run(_up(state_dir.resolve(), nodes, cpus, memory_mb, command, any_port=any_port))
    except AfsError as error:
        fail("afs", error)
    except OSError as error:
        fail("afs", FailedPrecondition(str(error)))
    sys.exit(code)


async def _up(
    state_dir: Path, nodes: int, cpus: int, memory_mb: int, command: tuple[str, ...], *, any_port: bool
) -> int:
    from afs.core.cluster import Cluster, Settings
    from afs.core.run import popen, wait

    stop = asyncio.Event()
    for signum in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(signum, stop.set)
    ports = (0, 0, 0, 0, 0) if any_port else (60051, 50051, 61051, 62051, 62052)
    # The nodes share this machine's memory; CPUs may be promised twice, time is shared without harm.
    total_mb = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >> 20
    cluster = Cluster(Settings(state_dir, cpus, memory_mb or total_mb * 9 // 10 // nodes, *ports))
    try:
        await cluster.start(nodes)
        address = cluster.proxy.address if cluster.proxy else ""
        click.echo(f"afs: {nodes} nodes are up, proxy on {address}, logs in {state_dir}/logs", err=True)
        waits: dict[asyncio.Task[Any], str] = {
            asyncio.create_task(wait(process.popen)): process.name for process in cluster.processes()
        }
        child = popen(command, stdin=sys.stdin.buffer, env={**os.environ, "AFS_PROXY": address}) if command else None
        own: set[asyncio.Task[Any]] = {asyncio.create_task(stop.wait())} | (
            {asyncio.create_task(wait(child))} if child else set()
        )
        done, pending = await asyncio.wait({*waits, *own}, return_when=asyncio.FIRST_COMPLETED)
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)
        if child is not None and child.poll() is None:
            child.terminate()
            await wait(child)
        for task in done & waits.keys():
            raise FailedPrecondition(f"{waits[task]} ended with status {task.result()}; see {state_dir}/logs")
        if child is None:
            return 0
        return child.returncode if child.returncode >= 0 else 128 - child.returncode
    finally:
        await cluster.close()


if __name__ == "__main__":
    main()
