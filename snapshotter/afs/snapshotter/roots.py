"""Root file systems: an overlay of an image's layers, an upper directory and optional read-only directories.

State (one event loop): ``_removing`` are removals under way, so that a stop waits for them. ``_targets`` and ``_uppers``
are the places that clients named and that a root has now, from before it is mounted until it is removed: they change
without an await between the look and the change. Each root belongs to one exit stack: a Hold call's, or an attached
root's. Directories of roots are numbered; nothing that a client names becomes a file name, except the places it asked for.
"""

import asyncio
import contextlib
import logging
import os
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from afs.core import syscalls
from afs.core.errors import AlreadyExists, FailedPrecondition, InvalidArgument
from afs.core.files import remove_tree
from afs.core.mounts import unmount_below
from afs.snapshotter.layermount import MountedLayer
from afs.snapshotter.layermounts import LayerMounts
from afs.snapshotter.messages import MountedRoot
from afs.snapshotter.rootmount import (
    Root,
    RootRequest,
    clear_home,
    detach_root,
    homes_below,
    is_mount,
    keep_upper,
    lower_directories,
    make_root,
    mounts_of,
    remove_home,
)
from afs.snapshotter.scratchfs import Scratch, lost_writes
from afs.snapshotter.scratchpool import ScratchPool

log = logging.getLogger(__name__)
_MAX_PATH = 230  # a home's path has to fit fsconfig(2), which takes 255 bytes
_BASE_DIRECTORIES = ("dev", "proc", "sys")


class Steps(NamedTuple):
    """What is called in the thread that mounts a root: before and after that, and before it is taken down."""

    before: Callable[[], None]
    mounted: Callable[[], None]
    leaving: Callable[[], None]


NO_STEPS = Steps(*[lambda: None] * 3)


class Roots:
    """Makes roots below *directory*, which has to be on a file system that overlayfs takes as upper (ext4, xfs, tmpfs).

    *base* is the lowest directory of every root: the mount points that a container runtime needs. Without it the runtime
    would make them in the upper directory of an image that lacks them, and they would be in the diff. Roots with a limit
    write to a file system of *scratch*. :attr:`staying`: a root could not be unmounted, and what is below it has to stay for the next snapshotter to try again.
    """

    def __init__(self, directory: Path, base: Path, mounts: LayerMounts, scratch: ScratchPool | None = None) -> None:
        self._directory = directory.resolve()  # as mountinfo has it
        self._base = base.resolve()
        self._mounts = mounts
        self._scratch = scratch
        self._limited: dict[Path, Scratch] = {}  # by where the root is
        self._next = 0
        self._removing: set[asyncio.Task[None]] = set()
        self._targets: set[Path] = set()
        self._uppers: set[Path] = set()
        self._staying = (
            contextlib.AsyncExitStack()
        )  # holds the layers of roots that could not be unmounted; never closed
        self.staying = False
        self.count = 0

    def prepare(self) -> None:
        """Make the directories and clear what a crash left. Blocking, at start.

        Roots that a killed snapshotter left are detached: their users are gone, or about to be, and processes that still
        run in one keep it until they end. InvalidArgument if the directory's path is too long.
        """
        if len(os.fsencode(self._directory)) > _MAX_PATH:
            raise InvalidArgument(f"the path of {self._directory} is longer than {_MAX_PATH} bytes")
        for home in homes_below(self._directory):
            log.info("unmounting the root of %s, which a crash left", home)
            detach_root(home)
        if count := unmount_below(self._directory):
            log.info("unmounted %d mounts below %s, which a crash left", count, self._directory)
        still = {home.name for home in homes_below(self._directory)}
        self._directory.mkdir(parents=True, exist_ok=True)
        for home in self._directory.iterdir():
            if home.name not in still:
                clear_home(home)
        self._next = max((int(name) for name in still), default=0)
        # Not for others to enter: a run may leave setuid files in its upper directory, and here no nosuid holds.
        self._directory.chmod(0o700)
        for name in _BASE_DIRECTORIES:
            (self._base / name).mkdir(parents=True, exist_ok=True)

    async def close(self, *, keep_base: bool = False) -> None:
        """Wait for removals and remove the base directory, if no root is left that needs it."""
        await asyncio.gather(*self._removing, return_exceptions=True)
        if not keep_base and not self.staying:
            remove_tree(self._base)

    async def mount_root(
        self,
        stack: contextlib.AsyncExitStack,
        layers: Sequence[MountedLayer],
        request: RootRequest,
        home: Path | None = None,
        steps: Steps = NO_STEPS,
    ) -> MountedRoot:
        """Mount a root over *layers* (bottom first) until *stack* closes; without *home* it gets a new one.

        AlreadyExists or FailedPrecondition if another root has its target or upper directory. ResourceExhausted or
        FailedPrecondition if its size cannot be limited.
        """
        if home is None:
            self._next += 1
            home = self._directory / str(self._next)
        lower = lower_directories(layers, request, self._base)
        self.check_free(Root.of(home, request))
        root = Root.of(home, request, self._take(request.disk_bytes))  # with no await from here to _push()

        def make() -> int:
            if root.scratch is not None and self._scratch is not None:
                self._scratch.make(root.scratch)
            root.home.mkdir(mode=0o700)  # for the day that the directory above is open, see open_way
            steps.before()
            _check_layers(layers)
            make_root(root, lower, suid=request.suid, ids=request.ids)
            _check_layers(layers)  # what overlayfs was given
            steps.mounted()
            keep_upper(root)
            return syscalls.mount_id(str(root.path)) if root.path.parent == root.home else 0

        if root.scratch is not None:
            self._limited[root.path] = root.scratch
        making = self._push(stack, root, layers, asyncio.to_thread(make), steps.leaving)
        await asyncio.shield(making)
        return MountedRoot(root.path, root.upper, lower.directories)

    def was_full(self, path: Path) -> bool:
        """Whether the disk was full while the root at *path* was there, so that what should have fit could not be written."""
        scratch = self._limited.get(path)
        return scratch is not None and scratch.was_squeezed

    def _take(self, disk_bytes: int) -> Scratch | None:
        if not disk_bytes:
            return None
        if self._scratch is None:
            raise FailedPrecondition("the size of roots cannot be limited here")
        return self._scratch.take(disk_bytes)

    def check_free(self, root: Root) -> None:
        """AlreadyExists or FailedPrecondition if another root has the target or upper directory of *root*."""
        if root.path in self._targets:
            raise AlreadyExists(f"a root is mounted at {root.path} already")
        if root.kept_upper in self._uppers:
            raise FailedPrecondition(f"upper directory {root.kept_upper} is in use by another root")

    def adopt_root(
        self,
        stack: contextlib.AsyncExitStack,
        root: Root,
        layers: Sequence[MountedLayer],
        leaving: Callable[[], None],
    ) -> None:
        """Take over a mounted *root* over *layers*: it goes when *stack* closes; *leaving* is called before."""
        self._push(stack, root, layers, _nothing(), leaving)

    def has(self, target: Path) -> bool:
        """Whether a root is mounted at *target*."""
        return target in self._targets

    def _push(
        self,
        stack: contextlib.AsyncExitStack,
        root: Root,
        layers: Sequence[MountedLayer],
        make: Coroutine[Any, Any, int],
        leaving: Callable[[], None],
    ) -> "asyncio.Task[int]":
        """Begin *make*, which gives the number of the root's mount, after which *stack* has to remove *root*."""
        self._targets.add(root.path)
        if root.kept_upper is not None:
            self._uppers.add(root.kept_upper)
        self.count += 1
        making = asyncio.create_task(make, name=f"make {root.home}")
        stack.push_async_callback(self._remove, making, root, layers, leaving)
        return making

    async def _remove(
        self,
        making: "asyncio.Task[int]",
        root: Root,
        layers: Sequence[MountedLayer],
        leaving: Callable[[], None],
    ) -> None:
        """Unmount and delete a root. Runs to its end even if the caller is cancelled meanwhile."""

        async def remove() -> None:
            await asyncio.wait([making])  # a thread cannot be cancelled: what it mounts has to be unmounted after it
            self._limited.pop(root.path, None)
            mount_id = 0 if making.cancelled() or making.exception() else making.result()
            gone = False
            try:
                gone, why_not = await asyncio.to_thread(_take_down, root, leaving, mount_id)
                if gone and root.scratch is not None and self._scratch is not None:
                    self._scratch.give_back(root.scratch, why_not)
            finally:
                # Whatever failed: as long as it is mounted, it needs what is below it, and nobody else gets its place.
                left = [] if gone else await asyncio.to_thread(mounts_of, root.home)
                if left:
                    await self.stay(layers)
                else:
                    self._targets.discard(root.path)
                    if root.kept_upper is not None:
                        self._uppers.discard(root.kept_upper)
                    self.count -= 1

        task = asyncio.create_task(remove(), name=f"remove {root.home}")
        self._removing.add(task)
        task.add_done_callback(self._removing.discard)
        await asyncio.shield(task)

    async def stay(self, layers: Sequence[MountedLayer]) -> None:
        """A root over *layers* could not be unmounted: they are needed until the next snapshotter has tried again."""
        self.staying = True
        self._staying.enter_context(self._mounts.keeping(layer.diff_id for layer in layers))
        for layer in layers:
            await self._staying.enter_async_context(self._mounts.claiming(layer.path, layer.diff_id))


async def _nothing() -> int:
    return 0


def _check_layers(layers: Sequence[MountedLayer]) -> None:
    """FailedPrecondition if one was unmounted by hand since it was opened: the root would silently lack its files."""
    for layer in layers:
        if not layer.is_mounted():
            raise FailedPrecondition(f"layer {layer.diff_id} was unmounted, or covered, at {layer.path} by somebody")


def _take_down(root: Root, leaving: Callable[[], None], mount_id: int) -> tuple[bool, str]:
    """Whether it is gone, and why its scratch file system cannot be used again, "" if it can."""
    leaving()
    limited = root.scratch if root.scratch is not None and root.scratch.made else None
    why_not = lost_writes(root.path) if limited is not None and mount_id and is_mount(root.path, mount_id) else ""
    if not detach_root(root.home, root.path, mount_id):
        return False, ""
    if limited is not None and not why_not:
        why_not = limited.empty()
    remove_home(root.home)
    return True, why_not
