"""``afs_mount``: mount one image, without containerd."""

import asyncio
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import click

from afs.core.cli import fail
from afs.core.errors import AfsError, InvalidArgument


async def hold(socket: str, image: str, target: str, extra_dirs: Sequence[str], *, read_only: bool) -> None:
    """Mount *image* at *target* and keep it until SIGINT or SIGTERM."""
    from afs.proto.v1.mounts_pb2 import OpenImage
    from afs.snapshotter.client import Mounts

    stop = asyncio.Event()
    for signum in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(signum, stop.set)
    mounts = Mounts(socket)
    try:
        async with mounts.holding() as held:
            await held.open(OpenImage(image=image))
            await held.mount(extra_dirs, read_only=read_only, target=target)
            click.echo(f"{image} is mounted at {target}; Ctrl-C unmounts it", err=True)
            held.when_lost(stop.set)
            await stop.wait()
            if held.lost:
                raise held.loss()
    finally:
        await mounts.close()


@click.command(help="Mount IMAGE at the directory DIR until Ctrl-C.")
@click.version_option(package_name="afs-cluster", prog_name="afs_mount")
@click.option(
    "--run-dir", type=click.Path(path_type=Path), default=Path("/run/afs"), envvar="AFS_RUN_DIR", show_default=True
)
@click.option(
    "--extra-dir", "extra_dirs", multiple=True, help="A read-only directory over the image; repeatable, topmost first."
)
@click.option("--read-only", is_flag=True, help="Without an upper directory.")
@click.argument("image")
@click.argument("directory", type=click.Path(file_okay=False, exists=True))
def main(run_dir: Path, extra_dirs: tuple[str, ...], read_only: bool, image: str, directory: str) -> None:
    """Entry point."""
    try:
        extra = [os.path.abspath(path) for path in extra_dirs]
        if any(not os.path.isdir(path) for path in extra):
            raise InvalidArgument(f"not a directory: {next(path for path in extra if not os.path.isdir(path))}")
        asyncio.run(hold(f"unix:{run_dir}/mounts.sock", image, os.path.abspath(directory), extra, read_only=read_only))
    except AfsError as error:
        fail("afs_mount", error)
    sys.exit(0)


if __name__ == "__main__":
    main()
