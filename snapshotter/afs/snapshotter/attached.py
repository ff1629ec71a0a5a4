"""Attached roots: they outlive the call that made them and this process, until they are detached.

    DIRECTORY/<n>/record.json   what is mounted, see :class:`Record`; ``upper`` and ``work`` beside it, as for every root
    DIRECTORY/<n>/leaving.json  the same, while it is being unmounted

A record is there before anything is mounted, and says ``mounted`` only while everything is. So the next snapshotter, whatever ended this
one, finds for every directory one of three things: a finished record and its mounts, which it adopts; anything else, which
it takes down and removes; or, for a root that was unmounted by hand or that an earlier boot had, a record alone, likewise.

State (one event loop): ``_attached`` has what is mounted, by target. An entry leaves it before the first await of its
removal, and only :meth:`AttachedRoots.detach`, which may have to leave the root as it is, marks it as ``leaving`` first.
``_unstopped`` are removals under way, which no cancelled caller stops.
"""

import asyncio
import contextlib
import dataclasses
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from afs.core.errors import FailedPrecondition, InvalidArgument, NotFound, Unimplemented
from afs.core.files import write_atomic
from afs.core.mounts import boot_id
from afs.core.together import Unstopped
from afs.proto.v1 import layerstore_pb2
from afs.snapshotter.layermount import MountedLayer
from afs.snapshotter.layermounts import LayerMounts
from afs.snapshotter.messages import MountedRoot
from afs.snapshotter.opening import Opener
from afs.snapshotter.rootmount import (
    Root,
    RootRequest,
    clear_home,
    detach_root,
    homes_below,
    mounts_of,
    place_of,
    unmount_root,
)
from afs.snapshotter.roots import Roots, Steps

log = logging.getLogger(__name__)
T = TypeVar("T")
_RECORD, _LEAVING = "record.json", "leaving.json"
_VERSION = 1


@dataclass(frozen=True, slots=True)
class Record:
    """What stands in a root's file. *layers* are (diff_id, path of its mount), bottom first; *boot* is the boot's id."""

    boot: str
    image: str
    layers: tuple[tuple[str, str], ...]
    root: Root
    mounted: bool

    def write(self) -> None:
        """Replace the file. A crash of the machine may damage it, but ends the mounts as well."""
        root = {
            field: value and str(value)
            for field, value in dataclasses.asdict(self.root).items()
            if field not in ("home", "scratch")
        }
        fields = {"version": _VERSION, "boot": self.boot, "image": self.image, "layers": self.layers}
        data = json.dumps(fields | {"root": root, "mounted": self.mounted}, indent=1)
        write_atomic(self.root.home / _RECORD, data.encode(), durable=False)

    # Renamed, not written: that works on a full disk.

    def leave(self) -> None:
        """The root is about to be unmounted: nobody may adopt it. Nothing happens without a file."""
        with contextlib.suppress(FileNotFoundError):
            (self.root.home / _RECORD).rename(self.root.home / _LEAVING)

    def stay(self) -> None:
        """The root stays mounted, all of it."""
        (self.root.home / _LEAVING).rename(self.root.home / _RECORD)

    @classmethod
    def read(cls, home: Path) -> "Record | None":
        """The record of the root with that *home*; None if there is none, or none that makes sense."""
        for name in (_RECORD, _LEAVING):
            try:
                found = json.loads((home / name).read_bytes())
                return cls._of(home, found, mounted=found["mounted"] and name == _RECORD)
            except (OSError, ValueError, KeyError, TypeError) as error:
                log.debug("%s: %s", home / name, error)
        return None

    @classmethod
    def _of(cls, home: Path, found: Any, *, mounted: bool) -> "Record":
        if found["version"] != _VERSION:
            raise ValueError(f"version {found['version']}")
        root = found["root"]
        upper, work = (None if root[name] is None else Path(root[name]) for name in ("upper", "work"))
        return cls(
            boot=found["boot"],
            image=found["image"],
            layers=tuple((diff_id, path) for diff_id, path in found["layers"]),
            root=Root(home, Path(root["path"]), upper, work, bool(root["proc_dev"])),
            mounted=mounted,
        )


@dataclass(slots=True)
class _Attached:
    record: Record
    stack: contextlib.AsyncExitStack  # unmounts it and releases its layers
    leaving: bool = False


class AttachedRoots:
    """Makes attached roots, with their homes below *directory*; with *keep* :meth:`close` leaves them to the next one."""

    def __init__(self, directory: Path, opener: Opener, roots: Roots, mounts: LayerMounts, *, keep: bool) -> None:
        self._directory = directory.resolve()
        self._opener = opener
        self._roots = roots
        self._mounts = mounts
        self._keep = keep
        self._boot = boot_id()
        self._next = 0
        self._attached: dict[Path, _Attached] = {}
        self._unstopped = Unstopped()

    async def adopt(self) -> None:
        """Take over what an earlier snapshotter attached, and clear what it left half done. At start."""
        self._directory.mkdir(parents=True, exist_ok=True)
        self._directory.chmod(0o700)  # as the roots' directory
        # A directory may be gone while something is still mounted for it.
        homes = {*self._directory.iterdir(), *homes_below(self._directory)}
        self._next = max((int(home.name) for home in homes if home.name.isdecimal()), default=0)
        for home in sorted(homes):
            record = Record.read(home)
            why = await asyncio.to_thread(self._why_not, home, record)
            if why or record is None:
                log.info("removing the attached root %s: %s", record.root.path if record else home, why)
                if not await asyncio.to_thread(_clear, home, record) and record is not None:
                    async with contextlib.AsyncExitStack() as stack:
                        await self._roots.stay(await self._claim(stack, record))
            else:
                await self._adopt(record)

    def _why_not(self, home: Path, record: Record | None) -> str:
        """Why the root cannot be adopted; "" if it can. Blocking."""
        if record is None or not record.mounted:
            return "it was being mounted or unmounted"
        if record.boot != self._boot:
            return "it is of an earlier boot"
        return "" if mounts_of(home) else "it was unmounted"

    async def _adopt(self, record: Record) -> None:
        # Somebody may have moved the mount, or a directory above it.
        path = place_of(record.root.home, record.root.path)
        record = dataclasses.replace(record, root=dataclasses.replace(record.root, path=path))
        stack = contextlib.AsyncExitStack()
        layers = await self._claim(stack, record)
        self._roots.adopt_root(stack, record.root, layers, record.leave)
        self._add(record, stack)
        log.info("adopted the root of %s that is attached at %s", record.image, path)

    async def _claim(self, stack: contextlib.AsyncExitStack, record: Record) -> list[MountedLayer]:
        """The layers of a root, in use until *stack* closes."""
        layers = []
        for diff_id, mountpoint in record.layers:
            try:
                layers.append(await stack.enter_async_context(self._mounts.claiming(Path(mountpoint), diff_id)))
            except NotFound:
                # Its worker died. What the kernel has of the layer can be read still, the rest is an I/O error.
                log.error("layer %s, of the root attached at %s, is not mounted any more", diff_id, record.root.path)
        return layers

    async def attach(self, name: layerstore_pb2.ImageName, request: RootRequest, *, force_local: bool) -> MountedRoot:
        """Mount an image's root at the request's target for good. AlreadyExists if a root is there."""
        target = request.target
        if target is None:
            raise InvalidArgument("an attached root needs a target")
        if request.disk_bytes:
            raise Unimplemented("the size of a root that stays attached cannot be limited")
        await self.sweep()
        self._roots.check_free(Root.of(self._directory, request))  # before an image is pulled for nothing
        async with contextlib.AsyncExitStack() as stack:
            image, layers, *_ = await self._opener.open_image(stack, name, force_local=force_local)
            self._next += 1
            home = self._directory / str(self._next)
            record = Record(self._boot, image.key, _named(layers), Root.of(home, request), mounted=False)
            finished = dataclasses.replace(record, mounted=True)
            steps = Steps(record.write, finished.write, record.leave)
            root = await self._roots.mount_root(stack, layers, request, home, steps)
            self._add(finished, stack.pop_all())
        log.info("attached a root of %s at %s", image.key, target)
        return root

    def _add(self, record: Record, stack: contextlib.AsyncExitStack) -> None:
        if self._keep:
            stack.enter_context(self._mounts.keeping(diff_id for diff_id, _ in record.layers))
        self._attached[record.root.path] = _Attached(record, stack)

    async def detach(self, target: Path) -> Path | None:
        """Unmount the root at *target* and remove it; the upper directory that stays, if it has one of the user's.

        NotFound if no root is attached there, FailedPrecondition if it is in use.
        """
        found = self._attached.get(target)
        if found is None and self._roots.has(target):
            raise FailedPrecondition(f"the root at {target} belongs to a program that runs: it goes when that ends")
        if found is None:
            raise NotFound(f"no root is attached at {target}")
        if found.leaving:
            raise FailedPrecondition(f"the root at {target} is being unmounted")
        found.leaving = True
        await self._unstopped.run(self._detach(target, found))
        return found.record.root.kept_upper

    async def _detach(self, target: Path, found: _Attached) -> None:
        try:
            await asyncio.to_thread(_unmount, found.record)
        except BaseException:
            found.leaving = False
            raise
        del self._attached[target]
        await found.stack.aclose()
        log.info("detached the root at %s", target)

    async def sweep(self) -> None:
        """Forget the roots that somebody unmounted by hand."""
        mounted = await asyncio.to_thread(homes_below, self._directory)
        gone = {
            target: each
            for target, each in self._attached.items()
            if not each.leaving and each.record.root.home not in mounted
        }
        for target in gone:
            log.info("the root that was attached at %s was unmounted", target)
            del self._attached[target]
        for each in gone.values():
            await self._unstopped.run(each.stack.aclose())

    def records(self) -> list[Record]:
        """What is attached, in the order of the targets."""
        return [each.record for _, each in sorted(self._attached.items())]

    async def close(self) -> None:
        """Unmount and remove all, in use or not, unless they are left to the next snapshotter."""
        await self._unstopped.close()
        if self._keep:
            return  # with the entries' stacks: nothing of them may be closed
        for target, each in list(self._attached.items()):
            del self._attached[target]
            await each.stack.aclose()


def _named(layers: Sequence[MountedLayer]) -> tuple[tuple[str, str], ...]:
    return tuple((layer.diff_id, str(layer.path)) for layer in layers)


def _unmount(record: Record) -> None:
    """unmount_root, after which nobody adopts it, even if we are killed half way."""
    record.leave()
    try:
        unmount_root(record.root)
    except BaseException:
        record.stay()
        raise


def _clear(home: Path, record: Record | None) -> bool:
    """Unmount the root and remove its home; False if it stays mounted."""
    if record:
        record.leave()
    if not detach_root(home, record.root.path if record else None):
        return False
    clear_home(home)
    return True
