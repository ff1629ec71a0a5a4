"""``afs_fused``: serves layers over FUSE, as files and as trees (:mod:`afs.snapshotter.fusedfs`).

It does as little as possible, so that it need not restart, and is small: no gRPC. It ends when its file system has been
unmounted by everybody, or with SIGTERM.
"""

import asyncio
import contextlib
import logging
import os
import selectors
import signal
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import pyfuse3

from afs.core.service import FORMAT, raise_file_limit
from afs.layerstore.fillwire import FillClient
from afs.snapshotter import fusedloop
from afs.snapshotter.fusedfs import OPTIONS, LayerFiles
from afs.snapshotter.fusedwire import MAX_BACKGROUND, PROTOCOL, serving

# Requests that may wait at once, each in a task that has 1 MiB of address space and touches a page or two of it: buffered
# reads, as many others, and one more that is read, lest nobody sees that the file system is unmounted.
_MAX_TASKS = 2 * MAX_BACKGROUND + 1


def _answer(files: LayerFiles, message: dict[str, Any]) -> dict[str, Any]:
    """The answer to a question on the control socket; ValueError for one that makes no sense."""
    match message.get("op"):
        case "hello":
            layers = [layer.diff_id for layer in files.layers if layer.is_open]
            return {"protocol": PROTOCOL, "pid": os.getpid(), "layers": layers}
        case "stats":
            return {"layers": {layer.diff_id: asdict(layer.stats) for layer in files.layers}}
        case "release":
            files.release_layer(str(message.get("diff_id")))
            return {}
        case operation:
            raise ValueError(f"no operation {operation!r}")


async def _serve(files: LayerFiles, directory: Path, number: int, ready_fd: int) -> None:
    pyfuse3.init(files, str(directory / str(number)), {*OPTIONS, f"fsname=afs/{number}"})
    try:
        async with serving(directory / f"{number}.sock", lambda message: _answer(files, message)):
            os.write(ready_fd, b"R")
            os.close(ready_fd)
            await pyfuse3.main(max_tasks=_MAX_TASKS)
    finally:
        pyfuse3.close(unmount=True)


@click.command(help="Serve layers over FUSE. Started and watched by afs_snapshotter.")
@click.version_option(package_name="afs-cluster", prog_name="afs_fused")
@click.option("--directory", type=Path, required=True, help="Directory of the mount points.")
@click.option("--number", type=int, required=True, help="Mount point, control socket and lock are named by it.")
@click.option("--fill-socket", required=True, help="The layerstore's.")
@click.option("--faults", required=True, help="Directory that gets a byte in a layer's file for each failed read.")
@click.option("--deadline", default=40.0, help="Seconds that a read waits for the layerstore before EIO.")
@click.option("--lock-fd", type=int, required=True, help="The locked lock file, to keep open.")
@click.option("--ready-fd", type=int, required=True, help="Gets one byte when the file system is mounted.")
@click.option("--log-level", default="INFO")
def main(
    directory: Path,
    number: int,
    fill_socket: str,
    faults: str,
    deadline: float,
    lock_fd: int,
    ready_fd: int,
    log_level: str,
) -> None:
    """Run until the file system is unmounted or SIGTERM comes."""
    raise_file_limit()  # an open layer takes two
    logging.basicConfig(level=log_level, format=FORMAT, stream=sys.stderr)
    os.truncate(lock_fd, 0)
    os.pwrite(lock_fd, b"%d\n" % os.getpid(), 0)
    selector = selectors.EpollSelector()

    async def run() -> None:
        client = FillClient(fill_socket, deadline)
        files = LayerFiles(client, faults)
        fusedloop.enable(selector.fileno(), lambda: files.pending > 0)
        loop = asyncio.get_running_loop()
        task = asyncio.ensure_future(_serve(files, directory, number, ready_fd))
        loop.add_signal_handler(signal.SIGTERM, task.cancel)
        # A terminal's Ctrl-C reaches the whole group; mounts need this process until the snapshotter has unmounted them.
        loop.add_signal_handler(signal.SIGINT, lambda: None)
        try:
            with contextlib.suppress(asyncio.CancelledError):
                await task
        finally:
            await client.close()

    with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(selector)) as runner:
        runner.run(run())


if __name__ == "__main__":
    main()
