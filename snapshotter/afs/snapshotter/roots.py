"""Root file systems: an overlay of an image's layers, an upper directory and optional read-only directories.

State: ``_removing`` are removals under way, so that a stop waits for them. Each :class:`Hold` is used by one call only.
Directories of roots are numbered; nothing that a client names becomes a file name, except a mount target it asked for.
"""

import asyncio
import contextlib
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from afs.core.errors import FailedPrecondition, InvalidArgument
from afs.core.files import remove_tree
from afs.core.mounts import list_mounts, unmount, unmount_below
from afs.core.rpc import calling, channel
from afs.proto.v1 import layerstore_pb2 as pb
from afs.proto.v1.layerstore_pb2_grpc import LayerstoreNodeStub
from afs.snapshotter.layermounts import LayerMounts, MountedLayer
from afs.snapshotter.overlay import mount_overlay

log = logging.getLogger(__name__)
CONNECT_S = 1.5  # channel() tries to connect at least once a second
_TARGET = "target"  # holds the path of a root that is mounted elsewhere
_BASE_DIRECTORIES = ("dev", "proc", "sys")


class Roots:
    """Makes roots below *directory*, which has to be on a file system that overlayfs takes as upper (ext4, xfs, tmpfs)."""

    def __init__(self, directory: Path, base: Path, mounts: LayerMounts, layerstore: str) -> None:
        self._directory = directory
        self._base = base
        self._mounts = mounts
        self._layerstore = f"layerstore {layerstore}"
        self._channel = channel(layerstore)
        self._stub = LayerstoreNodeStub(self._channel)
        self._next = 0
        self._removing: set[asyncio.Task[None]] = set()
        self.count = 0

    def prepare(self) -> None:
        """Make the directories and clear what a crash left. Blocking, at start.

        *base* is the lowest directory of every root: the mount points that a container runtime needs. Without it the
        runtime would make them in the upper directory of an image that lacks them, and they would be in the diff.
        """
        for file in self._directory.glob(f"*/{_TARGET}"):
            target = Path(os.fsdecode(file.read_bytes()))
            if _is_ours(target):
                log.info("unmounting %s, which a crash left", target)
                unmount(str(target))
        for path in (self._directory, self._base):
            if count := unmount_below(path):
                log.info("unmounted %d mounts below %s, which a crash left", count, path)
            remove_tree(path)
            path.mkdir(parents=True)
        # Not for others to enter: a run may leave setuid files in its upper directory, and here no nosuid holds.
        self._directory.chmod(0o700)
        for name in _BASE_DIRECTORIES:
            (self._base / name).mkdir()

    async def close(self) -> None:
        """Wait for removals and remove the base directory."""
        await asyncio.gather(*self._removing, return_exceptions=True)
        await self._channel.close()
        remove_tree(self._base)

    async def open_image(
        self, stack: contextlib.AsyncExitStack, name: pb.ImageName, *, force_local: bool
    ) -> tuple[pb.Image, list[MountedLayer]]:
        """Ask the layerstore for an image and mount its layers (bottom first) until *stack* closes."""
        with self._mounts.opening() as number:
            # gRPC fails calls at once between two tries to connect, and a layerstore that restarts is back before the next.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(CONNECT_S):
                    await self._channel.channel_ready()
            request = pb.OpenImageRequest(name=name, force_local_fetch=force_local, number=number)
            with calling(self._layerstore):
                answer = await self._stub.OpenImage(request)
            self._mounts.opened(number, [layer.diff_id for layer in answer.layers])
            return answer.image, await self._mount_layers(stack, answer.layers)

    async def _mount_layers(
        self, stack: contextlib.AsyncExitStack, layers: Sequence[pb.LocalLayer]
    ) -> list[MountedLayer]:
        # An image may hold one layer several times.
        entering = (stack.enter_async_context(self._mounts.using(layer.diff_id, layer.path)) for layer in layers)
        # All of them are awaited even if one fails: what the others mounted has to be on the stack when it unwinds.
        results = await asyncio.gather(*entering, return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                raise result
        return [result for result in results if not isinstance(result, BaseException)]

    async def mount_root(
        self, stack: contextlib.AsyncExitStack, layers: Sequence[MountedLayer], request: "RootRequest"
    ) -> "MountedRoot":
        """Mount a root over *layers* (bottom first) until *stack* closes."""
        self._next += 1
        home = self._directory / str(self._next)
        merged = request.target or home / "merged"
        image = _visible(layers)
        root = MountedRoot(
            merged, None if request.read_only else home / "upper", (*request.extra_dirs, *image, self._base)
        )
        # An image without layers is legal; its root directory is the base's.
        attributes = image[0] if image else self._base
        making = asyncio.create_task(asyncio.to_thread(_make_root, home, root, attributes), name=f"make {home}")
        stack.push_async_callback(self._remove, making, home, merged)
        self.count += 1
        await asyncio.shield(making)
        return root

    async def _remove(self, making: "asyncio.Task[None]", home: Path, merged: Path) -> None:
        """Unmount and delete a root. Runs to its end even if the caller is cancelled meanwhile."""

        async def remove() -> None:
            await asyncio.wait([making])  # a thread cannot be cancelled: what it mounts has to be unmounted after it
            made = not making.cancelled() and making.exception() is None
            await asyncio.to_thread(_remove_root, home, merged if made else None)

        task = asyncio.create_task(remove(), name=f"remove {home}")
        self._removing.add(task)
        task.add_done_callback(self._removing.discard)
        self.count -= 1
        await asyncio.shield(task)


@dataclass(frozen=True, slots=True)
class MountedRoot:
    """A mounted root; *lower* is topmost first, *upper* is None for a read-only root."""

    path: Path
    upper: Path | None
    lower: tuple[Path, ...]


class RootRequest:
    """What kind of root is wanted. *extra_dirs* are read-only, topmost first, over the image."""

    __slots__ = ("extra_dirs", "read_only", "target")

    def __init__(self, extra_dirs: Sequence[str] = (), *, read_only: bool = False, target: str = "") -> None:
        for path in (*extra_dirs, *([target] if target else [])):
            if not os.path.isabs(path):
                raise InvalidArgument(f"{path!r} is not an absolute path")
            if not os.path.isdir(path):
                raise FailedPrecondition(f"{path} is not a directory")
        self.extra_dirs = tuple(Path(path) for path in extra_dirs)
        self.read_only = read_only
        self.target = Path(target) if target else None


def _visible(layers: Sequence[MountedLayer]) -> list[Path]:
    """The lower directories for *layers* (bottom first), topmost first.

    A layer whose root is opaque hides all below it; overlayfs itself ignores the mark on a root. And overlayfs refuses
    a directory that is given twice: an image may hold one layer several times, the topmost one decides.
    """
    paths: dict[Path, None] = {}
    for layer in reversed(layers):
        paths.setdefault(layer.path)
        if layer.opaque:
            break
    return list(paths)


def _make_root(home: Path, root: MountedRoot, attributes: Path) -> None:
    home.mkdir()
    work = None
    if root.upper is not None:
        root.upper.mkdir()
        work = home / "work"
        work.mkdir()
        # The merged root directory takes its attributes from the upper one, so give it the image's.
        status = os.stat(attributes)
        os.chown(root.upper, status.st_uid, status.st_gid)
        os.chmod(root.upper, status.st_mode & 0o7777)
    if root.path.parent == home:
        root.path.mkdir()
    else:  # for whoever cleans up after a crash
        (home / _TARGET).write_bytes(os.fsencode(root.path))
    mount_overlay(root.path, root.lower, root.upper, work)


def _remove_root(home: Path, merged: Path | None) -> None:
    """Unmount the overlay at *merged*, if it was made, and delete *home*. A target may be below somebody else's mount."""
    if merged is not None and _is_ours(merged):
        unmount(str(merged))
    remove_tree(home)


def _is_ours(path: Path) -> bool:
    """Whether what is mounted at *path*, topmost, is an overlay of ours: its user may have unmounted it by hand."""
    at = [mount for mount in list_mounts(os.path.realpath(path)) if mount.target == os.path.realpath(path)]
    return bool(at) and (at[-1].fstype, at[-1].source) == ("overlay", "afs")
