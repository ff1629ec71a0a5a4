"""The lower directories of active snapshots and views: local directories, and mounts of the cluster's layers.

What containerd is told to mount has to be mounted for as long as it may do so: from before Prepare is answered until the
snapshot is committed or removed. A running container itself needs less, for overlayfs has mounts of its own of what it was
given; but if they lead through afs_fused, that has to run.

State (one event loop): ``_held`` has what each snapshot uses, by its number; :meth:`Lowers.keep` puts it there, and
:meth:`Lowers.release` takes it out before its first await. A mount that cannot be used any more is replaced by
:meth:`Lowers.current`, under the snapshot's lock, and held beside it: a container may still run on it. The caller sees to it
that the database has the same.
"""

import asyncio
import contextlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from afs.core.errors import NotFound
from afs.snapshotter.layermount import MountedLayer
from afs.snapshotter.layermounts import LayerMounts
from afs.snapshotter.opening import Opener
from afs.snapshotter.snapshots.clusterlayer import ClusterLayer
from afs.snapshotter.snapshots.directories import Directories
from afs.snapshotter.snapshots.metadata import LayerMount, Snapshot

log = logging.getLogger(__name__)
OPEN_TIMEOUT_S = 60.0  # to have layers for a container that were evicted; their pulls go on behind it


@dataclass(slots=True)
class Held:
    """The mounts that a snapshot uses, by diff_id; *stack* releases them."""

    layers: dict[str, MountedLayer] = field(default_factory=dict)
    stack: contextlib.AsyncExitStack = field(default_factory=contextlib.AsyncExitStack)
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    def mounts(self) -> list[LayerMount]:
        """For the database."""
        return [LayerMount(layer.diff_id, str(layer.path)) for layer in self.layers.values()]


class Lowers:
    """See the module. With *keep_mounts* what is held stays mounted when this process ends."""

    def __init__(self, opener: Opener, mounts: LayerMounts, directories: Directories, *, keep_mounts: bool) -> None:
        self._opener = opener
        self._mounts = mounts
        self._directories = directories
        self._keep_mounts = keep_mounts
        self._held: dict[int, Held] = {}

    def __len__(self) -> int:
        """How many snapshots hold mounts."""
        return len(self._held)

    async def acquire(self, chain: Sequence[Snapshot], timeout: float = OPEN_TIMEOUT_S) -> Held:
        """Mount what a snapshot on *chain* (topmost first) needs; the caller keeps it or closes its stack.

        DeadlineExceeded after *timeout* seconds.
        """
        held = Held()
        await self._open(held, _layers(chain), timeout)
        return held

    async def _open(
        self, held: Held, layers: Sequence[ClusterLayer], timeout: float = OPEN_TIMEOUT_S
    ) -> list[LayerMount]:
        """Mount *layers*, topmost first; the mounts."""
        if not layers:
            return []
        bottom_up = [layer.message() for layer in reversed(layers)]
        async with contextlib.AsyncExitStack() as stack:
            found = await self._opener.open_layers(stack, bottom_up, timeout)
            if self._keep_mounts:
                stack.enter_context(self._mounts.keeping({layer.diff_id for layer in found}))
            held.stack.push_async_exit(stack.pop_all())
        held.layers.update({layer.diff_id: layer for layer in found})
        return [LayerMount(layer.diff_id, str(layer.path)) for layer in found]

    def keep(self, number: int, held: Held) -> None:
        """A snapshot uses *held* until :meth:`release`."""
        if held.layers:
            self._held[number] = held

    async def restore(self, mounts: Mapping[int, Sequence[LayerMount]]) -> dict[int, list[LayerMount]]:
        """Take over the adopted mounts that snapshots used before this process began, at start; those of which some are gone.

        That is no error: they are mounted anew when somebody asks for the snapshot's mounts.
        """
        changed: dict[int, list[LayerMount]] = {}
        for number, needed in mounts.items():
            held, found = Held(), []
            for one in needed:
                try:
                    claim = self._mounts.claiming(Path(one.path), one.diff_id)
                    held.layers[one.diff_id] = await held.stack.enter_async_context(claim)
                    found.append(one)
                except NotFound as error:
                    log.info("snapshot %d: %s", number, error.line)
            if self._keep_mounts:
                held.stack.enter_context(self._mounts.keeping(held.layers))
            self.keep(number, held)
            if len(found) < len(needed):
                changed[number] = found
        return changed

    async def current(self, number: int, chain: Sequence[Snapshot]) -> tuple[list[Path], list[LayerMount]]:
        """The lower directories of a snapshot on *chain*, topmost first, and what had to be mounted for that now."""
        layers = _layers(chain)
        if not layers:
            return self.directories(chain, Held()), []
        while True:
            held = self._held.setdefault(number, Held())
            async with held.lock:
                if self._held.get(number) is held:  # else it was dropped while we waited
                    new = await self._renew(number, held, layers)
                    return self.directories(chain, held), new

    async def _renew(self, number: int, held: Held, layers: Sequence[ClusterLayer]) -> list[LayerMount]:
        """Mount all of *layers* again if one cannot be used any more; under the lock of *held*."""
        usable = {diff_id for diff_id, layer in held.layers.items() if layer.is_usable()}
        if usable.issuperset(layer.diff_id for layer in layers):
            return []
        try:
            new = await self._open(held, layers)  # all: the layerstore tells an image by its layers
        finally:
            await self._drop_lost(number, held)
        if self._held.get(number) is not held:
            raise NotFound("the snapshot was removed while its layers were mounted")
        return new

    async def _drop_lost(self, number: int, held: Held) -> None:
        """Under the lock: a snapshot that was removed meanwhile left it to us to release what it held."""
        if self._held.get(number) is not held:
            await held.stack.aclose()
        elif not held.layers:  # nothing could be mounted
            del self._held[number]

    def directories(self, chain: Sequence[Snapshot], held: Held) -> list[Path]:
        """The directories of *chain*, topmost first, as overlayfs takes them.

        It refuses a directory that is given twice, and ignores the mark on the root of a layer that hides all below it.
        """
        found: dict[Path, None] = {}
        for snapshot in chain:
            if snapshot.layer is None:
                found.setdefault(self._directories.fs(snapshot.id))
                continue
            layer = held.layers[snapshot.layer.diff_id]
            found.setdefault(layer.path)
            if layer.opaque:
                break
        return list(found)

    async def release(self, number: int) -> None:
        """The snapshot uses nothing any more; what nobody else uses may be unmounted."""
        held = self._held.pop(number, None)
        if held is not None and not held.lock.locked():  # else whoever has the lock sees that it is gone
            await held.stack.aclose()

    async def close(self) -> None:
        """Release all, unless it is to stay mounted."""
        if not self._keep_mounts:
            for number in list(self._held):
                await self.release(number)


def _layers(chain: Sequence[Snapshot]) -> list[ClusterLayer]:
    return [snapshot.layer for snapshot in chain if snapshot.layer is not None]
