"""The snapshotter that containerd speaks to, without gRPC: what each request does, and in which order.

State and locks (one event loop). The database is the truth; one thread makes all its transactions, in the order in which they
are asked for. Around them:

- a snapshot's directory is made before its row is committed. It loses its name after the row is gone, in the thread of the
  database as well: the number may be given again. What has lost its name is deleted in other threads.
- the layer mounts of an active snapshot are held before its row is committed, and given back after that is gone, behind the
  answer: containerd waits for Commit and Remove within a transaction of its own. The steps from the transaction on run to their
  end even if the client goes away (``_unstopped``).
- ``_chains`` has the snapshots below a name, and ``_mounted`` what is below active snapshots and views that this process made.
  Both spare a look into the database. A name may be another snapshot's by now, so the transaction that makes one on it
  checks the number; an entry of ``_mounted`` goes before the snapshot does.
- ``_used`` is what layers of the cluster took when the layerstore was asked last.
- ``_counting`` is single flight for what a committed directory takes: Commit is called within a transaction of containerd's,
  so counting 25,000 files (0.15 s) happens behind its back.
"""

import asyncio
import functools
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, ParamSpec, TypeVar

from afs.core.errors import AfsError, AlreadyExists, DeadlineExceeded, FailedPrecondition, NotFound, Unavailable
from afs.core.mounts import boot_id
from afs.core.singleflight import SingleFlight
from afs.core.together import Unstopped
from afs.snapshotter.backends import Backend
from afs.snapshotter.layermounts import LayerMounts
from afs.snapshotter.opening import Opener
from afs.snapshotter.snapshots import mountspec
from afs.snapshotter.snapshots.clusterlayer import ClusterLayer
from afs.snapshotter.snapshots.directories import Directories, Usage
from afs.snapshotter.snapshots.filters import Fields, Filter, matches
from afs.snapshotter.snapshots.hints import REFERENCE
from afs.snapshotter.snapshots.lowers import OPEN_TIMEOUT_S, Held, Lowers
from afs.snapshotter.snapshots.metadata import Kind, LayerMount, Metadata, Snapshot
from afs.snapshotter.snapshots.mountspec import Mount

if TYPE_CHECKING:
    from afs.snapshotter.snapshots.remote import RemoteLayers

log = logging.getLogger(__name__)
EXTRACT_TIMEOUT_S = 10.0  # to have the layers below one that containerd unpacks: it holds a lock meanwhile
_MOST_CHAINS = 1000
P = ParamSpec("P")
T = TypeVar("T")


class Snapshots:
    """See the module. *boot* is the id of this boot; :meth:`restore` comes first, :meth:`close` last."""

    def __init__(
        self, metadata: Metadata, directories: Directories, lowers: Lowers, opener: Opener, *, boot: str
    ) -> None:
        self._metadata = metadata
        self._directories = directories
        self._lowers = lowers
        self._opener = opener
        self._boot = boot
        self.remote: RemoteLayers | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="metadata")
        self._unstopped = Unstopped()
        self._counting: SingleFlight[int, Usage] = SingleFlight()
        self._cleaning = asyncio.Lock()
        self._used: dict[str, int] = {}
        self._chains: dict[str, list[Snapshot]] = {}
        self._mounted: dict[str, tuple[Snapshot, list[Snapshot]]] = {}

    async def restore(self) -> None:
        """Take over what an earlier process left; the layer mounts have been adopted."""
        changed = await self._lowers.restore(await self._do(self._metadata.mounts, self._boot))
        for number, mounts in changed.items():
            await self._do(self._metadata.set_mounts, number, mounts, self._boot)

    async def close(self) -> None:
        """End what is under way, and close the database."""
        self._directories.stop()
        if self.remote is not None:
            await self.remote.close()
        await self._counting.close(cancel=True)
        await self.settled()
        await self._lowers.close()
        self._thread.shutdown()
        self._metadata.close()

    async def settled(self) -> None:
        """Wait for what goes on behind the answers."""
        await self._unstopped.close()

    async def _do(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """A transaction, in the thread of the database."""

        def transaction() -> T:
            with self._metadata.errors():
                return work(*args, **kwargs)

        return await asyncio.get_running_loop().run_in_executor(self._thread, transaction)

    # Making

    async def prepare(self, key: str, parent: str, labels: Mapping[str, str]) -> list[Mount]:
        """A new active snapshot. AlreadyExists as well if *labels* ask for a layer that is a committed snapshot now."""
        if self.remote is not None and REFERENCE in labels:
            below = await self._do(self._metadata.stat, parent) if parent else None
            if await self.remote.commit(labels, below):
                raise AlreadyExists(f"target snapshot {labels[REFERENCE]} exists already")
        return await self._make(Kind.ACTIVE, key, parent, labels)

    async def view(self, key: str, parent: str, labels: Mapping[str, str]) -> list[Mount]:
        """A new read-only snapshot."""
        return await self._make(Kind.VIEW, key, parent, labels)

    async def _make(self, kind: Kind, key: str, parent: str, labels: Mapping[str, str]) -> list[Mount]:
        limit = EXTRACT_TIMEOUT_S if REFERENCE in labels else OPEN_TIMEOUT_S
        known = self._chains.get(parent)
        chain = known or await self._look_up(parent)
        held = await self._lowers.acquire(chain, limit)
        try:
            return await self._unstopped.run(self._make_on(held, chain, kind, key, parent, labels))
        except NotFound:
            if self._chains.pop(parent, None) is None or known is None:
                raise
        return await self._make(kind, key, parent, labels)

    async def _look_up(self, parent: str) -> list[Snapshot]:
        """The snapshot *parent* and all below it, topmost first."""
        if not parent:
            return []
        chain = await self._do(self._metadata.chain, parent)
        if len(self._chains) >= _MOST_CHAINS:
            self._chains.clear()
        self._chains[parent] = chain
        return chain

    async def _make_on(
        self, held: Held, chain: Sequence[Snapshot], kind: Kind, key: str, parent: str, labels: Mapping[str, str]
    ) -> list[Mount]:
        """A snapshot that is given *held*, or gives it back."""
        try:
            lower = self._lowers.directories(chain, held)
            owner = await _owner(lower[0], held) if lower else None

            def make(number: int) -> None:
                self._directories.make(number, work=kind is Kind.ACTIVE and bool(lower), owner=owner)
                if self._mount(number, kind, lower).long:
                    self._directories.link(number, lower)

            snapshot = await self._do(
                self._metadata.create,
                kind,
                key,
                parent,
                labels,
                parent_id=chain[0].id if chain else None,
                make=make,
                mounts=held.mounts(),
                boot=self._boot,
            )
        except BaseException:
            await held.stack.aclose()
            raise
        self._lowers.keep(snapshot.id, held)
        self._mounted[key] = snapshot, list(chain)
        return [self._mount(snapshot.id, kind, lower).mount]

    async def create_remote(self, name: str, parent: str, layer: ClusterLayer) -> None:
        """A committed snapshot that is a layer of the cluster; AlreadyExists if the name is another one's.

        It has no label but the one by which clients look for it: all namespaces share it. Whoever asks for it again may know
        more names of images, so these come first from then on.
        """
        labels = {REFERENCE: layer.chain_id}
        try:
            await self._do(self._metadata.create, Kind.COMMITTED, name, parent, labels, layer=layer)
        except AlreadyExists:
            found = await self._do(self._metadata.stat, name)
            if found.layer is None or found.parent != parent:
                raise
            merged = layer.with_names(found.layer.names)
            if merged != found.layer or found.labels.get(REFERENCE) != layer.chain_id:
                await self._do(self._metadata.set_layer, name, {**found.labels, **labels}, merged)

    async def commit(self, name: str, key: str, labels: Mapping[str, str], parent: str) -> None:
        """Turn an active snapshot into a committed one."""

        async def steps() -> None:
            self._mounted.pop(key, None)
            committed = await self._do(self._metadata.commit, name, key, labels, parent)
            self._unstopped.begin(self._release(committed))
            self._count_later(committed.id)

        await self._unstopped.run(steps())

    def _count_later(self, number: int) -> None:
        async def count() -> None:
            try:
                await self._counting.run(number, functools.partial(self._count, number))
            except (AfsError, OSError) as error:  # removed meanwhile, or counted when somebody asks
                log.info("snapshot %d is not counted yet: %s", number, error)

        self._unstopped.begin(count())

    async def _count(self, number: int) -> Usage:
        usage = await asyncio.to_thread(self._directories.usage, number)
        await self._do(self._metadata.set_usage, number, *usage)
        return usage

    # Asking

    async def mounts(self, key: str) -> list[Mount]:
        """What containerd has to mount for an active snapshot or view, as often as it asks."""
        if key in self._mounted:
            snapshot, chain = self._mounted[key]
        else:
            snapshot, *chain = await self._do(self._metadata.chain, key)
        if snapshot.kind is Kind.COMMITTED:
            raise FailedPrecondition(f"snapshot {key} is committed, and has no mounts")
        lower, new = await self._lowers.current(snapshot.id, chain)
        if new:
            await self._unstopped.run(self._remember(snapshot, new))
        mount, long = self._mount(snapshot.id, snapshot.kind, lower)
        if long:
            await asyncio.to_thread(self._directories.link, snapshot.id, lower)
        return [mount]

    async def _remember(self, snapshot: Snapshot, new: Sequence[LayerMount]) -> None:
        try:
            await self._do(self._metadata.add_mounts, snapshot.name, snapshot.id, new, self._boot)
        except NotFound:
            await self._lowers.release(snapshot.id)
            raise

    def _mount(self, number: int, kind: Kind, lower: Sequence[Path]) -> "_Mount":
        """What containerd mounts."""
        writable = kind is Kind.ACTIVE
        if not lower:
            return _Mount(mountspec.bind(self._directories.fs(number), writable=writable), long=False)
        if not writable and len(lower) == 1:
            return _Mount(mountspec.bind(lower[0], writable=False), long=False)
        upper = (self._directories.fs(number), self._directories.work(number)) if writable else ()
        mount = mountspec.overlay(lower, *upper)
        if not mountspec.is_too_long(mount):
            return _Mount(mount, long=False)
        return _Mount(mountspec.overlay(self._directories.links(number, len(lower)), *upper), long=True)

    async def stat(self, name: str) -> Snapshot:
        """What is known of a snapshot."""
        return await self._do(self._metadata.stat, name)

    async def list(self, filters: Sequence[Filter]) -> list[Snapshot]:
        """All that one of *filters* matches."""
        reference = next((r for r in map(_reference, filters)), None) if len(filters) == 1 else None
        found = await self._do(self._metadata.snapshots, reference)
        if reference is not None:
            # The client takes the first one: that is to be the layer of the cluster that it was told of, and not one that
            # somebody unpacked, or says to have unpacked, in another namespace.
            found.sort(key=lambda snapshot: snapshot.layer is None)
        return [snapshot for snapshot in found if matches(filters, _fields(snapshot))]

    async def update(self, name: str, change: Callable[[Mapping[str, str]], Mapping[str, str]]) -> Snapshot:
        """Change a snapshot's labels."""
        return await self._do(self._metadata.set_labels, name, change)

    async def usage(self, name: str) -> Usage:
        """What a snapshot takes of this node's disk, without its parents: of a layer of the cluster, what is here."""
        snapshot = await self.stat(name)
        if snapshot.layer is not None:
            return await self._layer_usage(snapshot.layer.diff_id)
        if snapshot.size is not None and snapshot.inodes is not None:
            return Usage(snapshot.size, snapshot.inodes)
        try:
            if snapshot.kind is Kind.COMMITTED:
                return await self._counting.run(snapshot.id, functools.partial(self._count, snapshot.id))
            return await asyncio.to_thread(self._directories.usage, snapshot.id)
        except FileNotFoundError:
            raise NotFound(f"snapshot {name} was removed") from None

    async def _layer_usage(self, diff_id: str) -> Usage:
        try:
            self._used[diff_id] = (await self._opener.layer_usage([diff_id])).get(diff_id, 0)
        except (Unavailable, DeadlineExceeded) as error:
            # Clients that list all end with the first error; a layerstore that restarts holds what it held.
            if diff_id not in self._used:
                raise
            log.warning("layer %s: %s; telling what it took before", diff_id, error.line)
        size = self._used[diff_id]
        return Usage(size, 1 if size else 0)

    # Removing

    async def remove(self, name: str) -> None:
        """Forget a snapshot; its files go with the next :meth:`cleanup`."""

        async def steps() -> None:
            self._mounted.pop(name, None)
            self._chains.pop(name, None)
            removed = await self._do(self._metadata.remove, name)
            self._unstopped.begin(self._release(removed))

        await self._unstopped.run(steps())

    async def _release(self, snapshot: Snapshot) -> None:
        try:
            await self._lowers.release(snapshot.id)
        except (AfsError, OSError) as error:  # an unmount, which the layer mounts try again
            log.error("snapshot %s: %s", snapshot.name, error)

    async def cleanup(self) -> None:
        """Delete the directories of snapshots that are gone."""
        async with self._cleaning:
            await self._do(self._retire_gone)
            count = await asyncio.to_thread(self._directories.remove_retired)
            if count:
                log.info("removed the directories of %d snapshots", count)
            await self._do(self._metadata.keep_reserve)

    def _retire_gone(self) -> None:
        for number in self._directories.numbers() - self._metadata.ids():
            self._directories.retire(number)


class _Mount(NamedTuple):
    """*long*: its lower directories are links, which have to be made."""

    mount: Mount
    long: bool


async def _owner(directory: Path, held: Held) -> tuple[int, int]:
    """Of the directory that a new root is to look like."""
    layer = next((layer for layer in held.layers.values() if layer.path == directory), None)
    if layer is not None and layer.backend is Backend.TREE:  # afs_fused answers, and may be slow
        status = await asyncio.to_thread(os.stat, directory)
    else:
        status = os.stat(directory)  # in memory: it is the root of what is mounted there, or a directory of ours
    return status.st_uid, status.st_gid


def open_snapshots(root: Path, opener: Opener, mounts: LayerMounts, *, keep: bool) -> Snapshots:
    """Those below *root*; with *keep* what they need stays mounted when the process ends. Blocking."""
    directories = Directories(root)
    lowers = Lowers(opener, mounts, directories, keep_mounts=keep)
    return Snapshots(Metadata(root / "snapshots.db"), directories, lowers, opener, boot=boot_id())


def _fields(snapshot: Snapshot) -> Fields:
    def field(path: Sequence[str]) -> str | None:
        match path:
            case ["name", *_]:
                return snapshot.name
            case ["parent", *_]:
                return snapshot.parent
            case ["kind", *_]:
                return snapshot.kind.name.lower()
            case ["labels", *rest]:
                return snapshot.labels.get(".".join(rest))
            case _:
                return None

    return field


def _reference(one: Filter) -> tuple[str, str] | None:
    """The label and value that a filter asks for, if it is that of the layer that a client has just been told of."""
    for selector in one:
        if selector.operator == "==" and selector.path[0] == "labels" and ".".join(selector.path[1:]) == REFERENCE:
            return REFERENCE, selector.value
    return None
