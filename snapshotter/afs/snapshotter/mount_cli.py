"""``afs_mount``: mount one image, without containerd."""

import asyncio
import os
import shlex
import signal
import socket
import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from afs.core.cli import fail
from afs.core.errors import AfsError, Cancelled, FailedPrecondition, InvalidArgument, Unavailable

if TYPE_CHECKING:
    from afs.proto.v1.mounts_pb2 import MountRoot, OpenImage
    from afs.snapshotter.client import Mounts

T = TypeVar("T")


async def hold(mounts: "Mounts", image: "OpenImage", wanted: "MountRoot") -> None:
    """Mount *image* and keep it until a signal comes."""
    target, stop = os.fsdecode(wanted.target), _stopped()
    async with mounts.holding() as held:
        try:
            await _unless(stop, held.open(image), image.image)
            root = await _unless(stop, held.mount(wanted), image.image)
        except Cancelled:
            held.cancel()  # releasing it would wait until the image is open
            raise
        click.echo(f"{image.image} is mounted at {target}; Ctrl-C unmounts it", err=True)
        held.when_lost(stop.set)
        await stop.wait()
        if held.lost:
            raise held.loss()
    if wanted.upper_dir:
        click.echo(f"what was written is in {root.upper}", err=True)


async def attach(mounts: "Mounts", image: "OpenImage", wanted: "MountRoot") -> None:
    """Mount *image* for good."""
    await _unless(_stopped(), mounts.attach(image, wanted), image.image)
    target = os.fsdecode(wanted.target)
    undo = shlex.join(["afs_mount", "--unmount", target])
    click.echo(f"{image.image} is mounted at {target}; {undo} unmounts it", err=True)


async def detach(mounts: "Mounts", target: str) -> None:
    """Unmount what :func:`attach` mounted."""
    kept = await mounts.detach(target)
    if kept is not None:
        click.echo(f"what was written is in {kept}", err=True)


def _stopped() -> asyncio.Event:
    """Set by SIGINT, SIGTERM or SIGHUP."""
    stop = asyncio.Event()
    for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(signum, stop.set)
    return stop


async def _unless(stop: asyncio.Event, work: Coroutine[Any, Any, T], image: str) -> T:
    """The result of *work*, which is cancelled when *stop* is set: then Cancelled."""
    working, stopping = asyncio.ensure_future(work), asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait({working, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise Cancelled(f"mounting {image} was cancelled")
        return working.result()
    finally:
        for task in (working, stopping):
            task.cancel()
        await asyncio.wait({working, stopping})


async def _with_mounts(run_dir: Path, work: Any, *arguments: Any) -> None:
    from afs.snapshotter.client import Mounts

    _check_service(run_dir)
    mounts = Mounts(f"unix:{run_dir}/mounts.sock")
    try:
        await work(mounts, *arguments)
    finally:
        await mounts.close()


def _check_service(run_dir: Path) -> None:
    """Unavailable if nobody listens, with what to do about it."""
    path = run_dir / "mounts.sock"
    try:
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
    except (FileNotFoundError, ConnectionRefusedError):
        raise Unavailable(f"no afs_snapshotter at {path}; is it running? (--run-dir / AFS_RUN_DIR)") from None


def _existing(path: str) -> str:
    if not os.path.isdir(path):
        raise InvalidArgument(f"not a directory: {path}")
    return os.path.abspath(path)


def parse_platform(text: str) -> tuple[str, str, str]:
    """OS, architecture and variant of ``OS/ARCH[/VARIANT]``; all empty for "": this machine's. InvalidArgument else."""
    parts = text.split("/") if text else ["", "", ""]
    if len(parts) not in (2, 3) or (text and not all(parts)):
        raise InvalidArgument(f"not a platform: {text!r}; write it like linux/amd64 or linux/arm/v7")
    return parts[0], parts[1], parts[2] if len(parts) == 3 else ""


@click.command()
@click.version_option(package_name="afs-cluster", prog_name="afs_mount")
@click.option(
    "--run-dir",
    type=click.Path(path_type=Path),
    default=Path("/run/afs"),
    envvar="AFS_RUN_DIR",
    show_default=True,
    help="Where the sockets of this node's snapshotter and layerstore are.",
)
@click.option(
    "--layerstore-root",
    type=click.Path(path_type=Path),
    default=Path("/var/lib/afs/layerstore"),
    show_default=True,
    help="With --probe: where complete layers are, for that depends on the file system.",
)
@click.option("--detach", "detached", is_flag=True, help="Return when it is mounted; it stays until --unmount.")
@click.option("--extra-dir", "extra_dirs", multiple=True, help="A read-only directory over the image; topmost first.")
@click.option("--read-only", is_flag=True, help="Let nothing be written.")
@click.option("--upper-dir", help="Keep what is written in DIR/upper. [default: it is gone at the end]", metavar="DIR")
@click.option("--mount-proc-dev", is_flag=True, help="With /proc, /dev and a read-only /sys, for chroot(8).")
@click.option("--suid", is_flag=True, help="Let setuid programs of the image be setuid, for all who can reach DIR.")
@click.option("--platform", default="", help="OS/ARCH[/VARIANT] of the image. [default: this machine's]")
@click.option("--unmount", metavar="DIR", help="Unmount what --detach mounted at DIR.")
@click.option("--probe", is_flag=True, help="Tell how layers are mounted on this machine, and why not otherwise.")
@click.option("--stats", is_flag=True, help="Tell what is mounted and where its bytes came from.")
@click.option("--json", "as_json", is_flag=True, help="With --probe and --stats: for programs.")
@click.argument("arguments", nargs=-1, metavar="[IMAGE DIR]")
def main(
    run_dir: Path,
    layerstore_root: Path,
    detached: bool,
    extra_dirs: tuple[str, ...],
    read_only: bool,
    upper_dir: str | None,
    mount_proc_dev: bool,
    suid: bool,
    platform: str,
    unmount: str | None,
    probe: bool,
    stats: bool,
    as_json: bool,
    arguments: tuple[str, ...],
) -> None:
    """Mount IMAGE at the directory DIR, over what is there, until Ctrl-C or, with --detach, until --unmount DIR."""
    try:
        mounting = {
            "--detach": detached,
            "--extra-dir": extra_dirs,
            "--read-only": read_only,
            "--upper-dir": upper_dir,
            "--mount-proc-dev": mount_proc_dev,
            "--suid": suid,
            "--platform": platform,
        }
        others = {"--unmount": unmount is not None, "--probe": probe, "--stats": stats}
        chosen = [flag for flag, given in others.items() if given]
        _check_flags(chosen, [flag for flag, given in mounting.items() if given], arguments, as_json=as_json)
        if probe:
            from afs.snapshotter.mount_probe import show_probe

            show_probe(layerstore_root, as_json=as_json)
        elif stats:
            from afs.snapshotter.mount_stats import show_stats

            _check_service(run_dir)
            asyncio.run(show_stats(run_dir, as_json=as_json))
        elif unmount is not None:
            # Resolved here, once: nothing of it needs to exist any more.
            asyncio.run(_with_mounts(run_dir, detach, os.path.realpath(unmount)))
        else:
            from afs.proto.v1.mounts_pb2 import OpenImage
            from afs.snapshotter.messages import root_request

            image, target = arguments
            wanted = root_request(
                [_existing(path) for path in extra_dirs],
                read_only=read_only,
                target=_existing(target),
                upper_dir=_existing(upper_dir) if upper_dir else "",
                proc_dev=mount_proc_dev,
                suid=suid,
            )
            os_name, architecture, variant = parse_platform(platform)
            opened = OpenImage(image=image, os=os_name, architecture=architecture, variant=variant)
            asyncio.run(_with_mounts(run_dir, attach if detached else hold, opened, wanted))
    except AfsError as error:
        fail("afs_mount", error)
    except OSError as error:
        fail("afs_mount", FailedPrecondition(str(error)))
    sys.exit(0)


def _check_flags(chosen: list[str], mounting: list[str], arguments: tuple[str, ...], *, as_json: bool) -> None:
    """InvalidArgument for what does not go together; *chosen* are the flags that ask for something else than mounting."""
    if len(chosen) > 1:
        raise InvalidArgument(f"{chosen[0]} and {chosen[1]} do not go together")
    if chosen and (arguments or mounting):
        raise InvalidArgument(f"{chosen[0]} does not go with {mounting[0] if mounting else arguments[0]}")
    if as_json and chosen not in (["--probe"], ["--stats"]):
        raise InvalidArgument("--json goes with --probe and --stats")
    if not chosen and len(arguments) != 2:
        raise InvalidArgument("give an IMAGE and a directory DIR, or one of --unmount, --probe, --stats; see --help")


if __name__ == "__main__":
    main()
