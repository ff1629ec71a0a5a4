"""Layer mounts: one EROFS mount per layer and node, shared by all roots, counted, unmounted when idle.

State and locks (one event loop): ``_mounted`` maps diff_ids to mounts in the order of last use. A mount is made under
single flight by diff_id. ``users`` changes without an await between the look-up and the change, so a mount that
:meth:`LayerMounts._trim` takes away (users == 0, removed from the map before the first await) is never handed out again.
A mount whose afs_fused died leaves the map at the next look-up and is unmounted by its last user.

``_all`` holds every mount that exists, in the map or not, until it is unmounted: :meth:`LayerMounts.leases` tells the
layerstore of them. ``_opening`` has the numbers of the OpenImage calls whose layers are on their way into it, and the
layers once they are known: a layerstore that starts anew in between knows nothing of its answer, so they count as in use.
``_stuck`` are those of ``_all`` that left the map and whose unmount failed; :meth:`LayerMounts.release` tries again.
``changed`` is set whenever any of them has changed.
"""

import asyncio
import contextlib
import errno
import logging
import os
import time
from collections.abc import AsyncIterator, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from afs.core import syscalls
from afs.core.errors import FailedPrecondition, Internal
from afs.core.mounts import unmount
from afs.core.singleflight import SingleFlight
from afs.proto.v1 import layerstore_pb2 as pb
from afs.snapshotter.fusedworkers import FusedWorkers, Worker

log = logging.getLogger(__name__)


@dataclass(slots=True)
class MountedLayer:
    """*backend* is ``erofs-file`` (a local file) or ``erofs-fuse`` (a partial layer)."""

    diff_id: str
    path: Path
    backend: str
    opaque: bool = False  # its root hides all layers below it
    worker: Worker | None = None  # the afs_fused that it is read through
    users: int = 0


class LayerMounts:
    """Mounts below *directory* with short names: their paths have to fit the one page of overlayfs options.

    *keep* is how many layers that nobody uses stay mounted for the next run.
    """

    def __init__(self, directory: Path, fused: FusedWorkers, keep: int) -> None:
        self._directory = directory
        self._fused = fused
        self._keep = keep
        self._mounted: dict[str, MountedLayer] = {}
        self._all: dict[Path, MountedLayer] = {}
        self._stuck: set[Path] = set()  # those that an unmount failed for
        self._mounting: SingleFlight[str, MountedLayer] = SingleFlight()
        self._opening: dict[int, frozenset[str]] = {}
        self._last_opened = time.time_ns()  # ascends over restarts
        self.changed = asyncio.Event()
        self._next = 0
        self._going: set[asyncio.Task[None]] = set()

    @contextlib.asynccontextmanager
    async def using(self, diff_id: str, file: str) -> AsyncIterator[MountedLayer]:
        """The mount of a layer while the block runs; *file* is its complete file, "" if it is partial."""
        await self._drop_dead(diff_id)
        # Another user's _trim may take a new mount away between the end of the single flight and here.
        while (layer := self._mounted.get(diff_id)) is None:
            await self._mounting.run(diff_id, lambda: self._mount(diff_id, file))
        self._mounted[diff_id] = self._mounted.pop(diff_id)  # now the most recently used
        layer.users += 1
        self.changed.set()
        try:
            yield layer
        finally:
            layer.users -= 1
            self.changed.set()
            if layer.users == 0 and self._mounted.get(diff_id) is not layer:
                await self._unmount(layer)
            await self._trim(self._keep)

    async def _drop_dead(self, diff_id: str) -> None:
        layer = self._mounted.get(diff_id)
        if layer is None or layer.worker is None or layer.worker.alive:
            return
        log.error("layer %s: its afs_fused died; mounting it anew", diff_id)
        del self._mounted[diff_id]
        if layer.users == 0:
            await self._unmount(layer)

    async def _mount(self, diff_id: str, file: str) -> MountedLayer:
        worker = None if file else await self._fused.place(diff_id)
        source = file if worker is None else str(worker.file(diff_id))
        self._next += 1
        path = self._directory / str(self._next)
        layer = MountedLayer(diff_id, path, "erofs-file" if file else "erofs-fuse", worker=worker)
        layer.path.mkdir(parents=True)
        try:
            layer.opaque = await asyncio.to_thread(_mount_erofs, source, layer.path, diff_id)
        except BaseException:
            layer.path.rmdir()
            if worker is not None:
                await worker.release(diff_id)
            raise
        self._mounted[diff_id] = self._all[path] = layer
        self.changed.set()
        return layer

    async def _trim(self, keep: int) -> None:
        idle = [layer for layer in self._mounted.values() if layer.users == 0]
        await self._take_away(idle[: max(len(idle) - keep, 0)])

    async def _take_away(self, idle: Sequence[MountedLayer]) -> None:
        for layer in idle:
            del self._mounted[layer.diff_id]
        await asyncio.gather(*(asyncio.shield(task) for task in [self._start_unmount(layer) for layer in idle]))

    @contextlib.contextmanager
    def opening(self) -> Iterator[int]:
        """The number of an OpenImage call, whose layers are used within the block or not at all. See :meth:`opened`."""
        self._last_opened += 1
        number = self._last_opened
        self._opening[number] = frozenset()
        try:
            yield number
        finally:
            del self._opening[number]
            self.changed.set()

    def opened(self, number: int, diff_ids: Iterable[str]) -> None:
        """OpenImage call *number* gave these layers; they are leased from now on, until :meth:`opening` ends."""
        self._opening[number] = frozenset(diff_ids)
        self.changed.set()

    def leases(self) -> pb.LeaseUpdate:
        """What is mounted and what is on its way, for the layerstore."""
        in_use = {layer.diff_id for layer in self._all.values() if layer.users}.union(*self._opening.values())
        idle = {layer.diff_id for layer in self._all.values()} - in_use
        return pb.LeaseUpdate(
            in_use=sorted(in_use), idle=sorted(idle), last_opened=self._last_opened, opening=sorted(self._opening)
        )

    async def release(self, diff_ids: Collection[str]) -> None:
        """Unmount those of *diff_ids* that nobody uses: the layerstore needs their space."""
        stuck = [self._all[path] for path in self._stuck if self._all[path].diff_id in diff_ids]
        self._stuck -= {layer.path for layer in stuck}
        try:
            await self._take_away(
                [layer for layer in self._mounted.values() if layer.diff_id in diff_ids and not layer.users]
            )
            await asyncio.gather(*(asyncio.shield(task) for task in [self._start_unmount(layer) for layer in stuck]))
        finally:
            self.changed.set()  # an answer, even if nothing could go

    async def _unmount(self, layer: MountedLayer) -> None:
        await asyncio.shield(self._start_unmount(layer))

    def _start_unmount(self, layer: MountedLayer) -> "asyncio.Task[None]":
        """A task of its own, begun at once: the layer has left the map already, so no cancelled caller may stop it."""

        async def unmount_it() -> None:
            try:
                await asyncio.to_thread(_unmount_layer, layer.path)
                del self._all[layer.path]
                if layer.worker is not None:
                    await layer.worker.release(layer.diff_id)
            except BaseException:
                self._stuck.add(layer.path)
                raise
            finally:
                self.changed.set()

        task = asyncio.create_task(unmount_it(), name=f"unmount {layer.path}")
        self._going.add(task)
        task.add_done_callback(self._going.discard)
        return task

    def faults(self, layer: MountedLayer) -> int:
        """How many reads of *layer* failed so far; one more if its afs_fused is gone, for then all do."""
        if layer.worker is None:
            return 0
        return self._fused.faults(layer.diff_id) + (not layer.worker.alive)

    def mounted(self) -> list[MountedLayer]:
        """All layer mounts, least recently used first."""
        return list(self._mounted.values())

    async def close(self) -> None:
        """Unmount all; roots must be gone."""
        await self._mounting.close(cancel=False)
        await self._trim(0)
        await asyncio.gather(*self._going, return_exceptions=True)


def _unmount_layer(path: Path) -> None:
    unmount(str(path))
    path.rmdir()


def _mount_erofs(source: str, target: Path, diff_id: str) -> bool:
    """Mount it; whether its root is opaque."""
    try:
        # nosuid and nodev hold for whoever looks below this path; overlayfs goes by the flags of its own mount.
        flags = syscalls.MS_RDONLY | syscalls.MS_NODEV | syscalls.MS_NOSUID
        syscalls.mount(source, str(target), "erofs", flags)
    except OSError as error:
        if error.errno == errno.ENOTBLK:
            # EROFS asks for a block device where a file will not do: before kernel 6.12, or because the file's file
            # system lacks read_folio, as tmpfs does.
            why = "EROFS on a file needs kernel 6.12 and a layerstore root on a disk file system such as ext4 or xfs"
            raise FailedPrecondition(f"cannot mount layer {diff_id} from {source}: {why}") from error
        raise Internal(f"cannot mount layer {diff_id} from {source}: {error.strerror}") from error
    try:
        return "trusted.overlay.opaque" in os.listxattr(target)
    except OSError as error:
        unmount(str(target))
        raise Internal(f"cannot read layer {diff_id} from {source}: {error.strerror}") from error


def check_kernel() -> None:
    """Raise FailedPrecondition if this kernel lacks a file system that AFS needs."""
    with open("/proc/filesystems", encoding="ascii") as lines:
        known = {line.split()[-1] for line in lines}
    missing = {"erofs", "overlay", "fuse"} - known
    if missing:
        # Modules load at the first mount, which the kernel asks modprobe for; say so only if none is there to load.
        import shutil

        if shutil.which("modprobe") is None:
            raise FailedPrecondition(f"this kernel has no {', '.join(sorted(missing))} (see /proc/filesystems)")
