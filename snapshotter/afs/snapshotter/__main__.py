"""``afs_snapshotter``: the node's mounts."""

import asyncio
import contextlib
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from afs.core.cli import daemon_command
from afs.core.config import setting
from afs.core.errors import AfsError
from afs.core.service import notify
from afs.core.units import parse_duration, parse_size
from afs.snapshotter.containerd_cli import with_commands

if TYPE_CHECKING:
    from afs.snapshotter.attached import AttachedRoots
    from afs.snapshotter.fusedworkers import FusedWorkers
    from afs.snapshotter.layermounts import LayerMounts
    from afs.snapshotter.roots import Roots
    from afs.snapshotter.scratchpool import ScratchPool
    from afs.snapshotter.snapshots.snapshots import Snapshots

log = logging.getLogger(__name__)
SERVICE = "snapshotter"


@dataclass(frozen=True, slots=True)
class Config:
    """Configuration of afs_snapshotter."""

    root: Path = setting(Path("/var/lib/afs/snapshotter"), "Directory of upper directories.")
    run_dir: Path = setting(Path("/run/afs"), "Directory of the layer mounts and of the unix sockets.")
    read_deadline: float = setting(40.0, "How long a read of a partial layer waits for the layerstore.", parse_duration)
    fuse_workers: int = setting(2, "Processes that serve layers over FUSE; a crash of one touches its own layers only.")
    backend: str = setting(
        "auto", "How layers are mounted: erofs-file, erofs-loop, tree, or auto: the best that works."
    )
    layerstore_root: Path = setting(
        Path("/var/lib/afs/layerstore"), "The layerstore's root: where mounts are tried out."
    )
    keep_layers: int = setting(200, "Unused layers that stay mounted for the next run.")
    keep_mounts: bool = setting(
        True,
        "Leave mounted what containers and afs_mount --detach use when this service stops, for the next one.",
    )
    prepare_timeout: float = setting(
        10.0,
        "How long containerd waits for the cluster to tell whether it can supply a layer, before it fetches it itself.",
        parse_duration,
    )
    on_missing: str = setting(
        "wait",
        "If no node has a layer, but the labels name its image: wait for the cluster to pull it, "
        "have it pulled in the background while containerd does so too, or never.",
    )
    scratch_keep: int = setting(16, "Unused file systems of roots of limited size that stay mounted for the next run.")
    scratch_idle: float = setting(60.0, "How long such a file system stays without a user.", parse_duration)
    reserve: int = setting(
        0,
        "Space that roots of limited size leave free on the file system of `root`; a hundredth of it, "
        "at most 256 MiB, if 0.",
        parse_size,
    )
    log_level: str = setting("INFO", "Least level to log.")


async def serve(config: Config, stop: asyncio.Event) -> None:
    """Serve until *stop* is set."""
    from afs.core.files import locked
    from afs.core.rpc import serving
    from afs.proto.containerd.snapshots_pb2_grpc import add_SnapshotsServicer_to_server
    from afs.proto.v1.mounts_pb2_grpc import add_MountsServicer_to_server
    from afs.snapshotter.attached import AttachedRoots
    from afs.snapshotter.backends import parse_backend
    from afs.snapshotter.fusedworkers import FusedWorkers
    from afs.snapshotter.layermounts import LayerMounts
    from afs.snapshotter.leases import report_mounts
    from afs.snapshotter.opening import Opener
    from afs.snapshotter.pagesahead import PagesAhead
    from afs.snapshotter.probe import check_overlay, find_backends
    from afs.snapshotter.roots import Roots
    from afs.snapshotter.scratchpool import ScratchPool
    from afs.snapshotter.server import MountsService
    from afs.snapshotter.snapshots.directories import check_path
    from afs.snapshotter.snapshots.remote import RemoteLayers, parse_on_missing
    from afs.snapshotter.snapshots.service import SnapshotsService
    from afs.snapshotter.snapshots.snapshots import open_snapshots

    check_overlay()
    forced, on_missing = parse_backend(config.backend), parse_on_missing(config.on_missing)
    run_dir = config.run_dir
    for path in (run_dir, config.root):
        path.mkdir(parents=True, exist_ok=True)
        check_path(path)
    async with contextlib.AsyncExitStack() as stack:
        # The directory of mounts as well: whoever starts clears it of what a crash left.
        stack.enter_context(locked(config.root / "lock", "afs_snapshotter"))
        stack.enter_context(locked(run_dir / "snapshotter.lock", "afs_snapshotter"))
        workers = FusedWorkers(
            run_dir / "fuse", run_dir / "faults", run_dir / "fill.sock", config.read_deadline, config.fuse_workers
        )
        backends = await asyncio.to_thread(find_backends, config.layerstore_root, run_dir, forced)
        mounts = LayerMounts(run_dir / "l", workers, backends, config.keep_layers)
        opener = await stack.enter_async_context(Opener(mounts, f"unix:{run_dir}/layerstore.sock"))
        scratch = ScratchPool(
            config.root / "scratch", keep=config.scratch_keep, idle_s=config.scratch_idle, reserve=config.reserve
        )
        roots = Roots(config.root / "roots", run_dir / "base", mounts, scratch)
        attached = AttachedRoots(config.root / "attached", opener, roots, mounts, keep=config.keep_mounts)
        snapshots = await asyncio.to_thread(open_snapshots, config.root, opener, mounts, keep=config.keep_mounts)
        snapshots.remote = RemoteLayers(opener, on_missing, config.prepare_timeout, snapshots.create_remote)
        # What an earlier snapshotter left: roots that nobody holds any more go from the top down, the rest is adopted
        # from the bottom up. If that fails all stays as it is, for the next start.
        await asyncio.to_thread(roots.prepare)
        await asyncio.to_thread(scratch.prepare)
        await workers.adopt()
        await mounts.adopt()
        await attached.adopt()
        await snapshots.restore()
        await mounts.drop_unclaimed()
        stack.push_async_callback(_close, attached, snapshots, roots, scratch, mounts, workers, keep=config.keep_mounts)
        # Ended before the mounts are: what it said last holds for the layerstore's grace period.
        reporting = asyncio.create_task(report_mounts(f"unix:{run_dir}/layerstore.sock", mounts))
        stack.push_async_callback(_cancelled, reporting)
        reading = asyncio.create_task(PagesAhead(run_dir / "fill.sock", mounts).run())
        stack.push_async_callback(_cancelled, reading)
        service = MountsService(opener, roots, attached, mounts, workers)
        await stack.enter_async_context(
            serving([f"unix:{run_dir}/mounts.sock"], lambda server: add_MountsServicer_to_server(service, server))
        )
        # A server of its own: who may make snapshots need not be able to mount images.
        containerd = SnapshotsService(snapshots)
        await stack.enter_async_context(
            serving(
                [f"unix:{run_dir}/snapshotter.sock"], lambda server: add_SnapshotsServicer_to_server(containerd, server)
            )
        )
        clearing = asyncio.create_task(_clear(snapshots))
        stack.push_async_callback(_cancelled, clearing)
        notify("READY=1")
        await stop.wait()


async def _clear(snapshots: "Snapshots") -> None:
    """Delete what snapshots left that were removed before this process began."""
    try:
        await snapshots.cleanup()
    except (AfsError, OSError) as error:  # logged with its cause; the next clean-up tries again
        log.error("not all directories of removed snapshots could be deleted: %s", error)


async def _close(
    attached: "AttachedRoots",
    snapshots: "Snapshots",
    roots: "Roots",
    scratch: "ScratchPool",
    mounts: "LayerMounts",
    workers: "FusedWorkers",
    *,
    keep: bool,
) -> None:
    """Unmount everything from the top down; with *keep*, but for what attached roots and snapshots need."""
    await attached.close()
    await snapshots.close()
    await roots.close(keep_base=bool(attached.records()))
    await scratch.close()
    await mounts.close(keep_used=keep or roots.staying)
    await workers.close(keep=mounts.workers())


async def _cancelled(task: "asyncio.Task[None]") -> None:
    task.cancel()
    await asyncio.wait([task])


main = with_commands(
    daemon_command("afs_snapshotter", SERVICE, Config, serve, "Make this node's mounts: layers and root file systems."),
    SERVICE,
    Config,
)

if __name__ == "__main__":
    main()
