"""Layer mounts: one mount per layer and node, shared by all roots, counted, unmounted when idle.

State and locks (one event loop): ``_mounted`` maps diff_ids to the mounts for new users, in the order of last use. A mount
is made under single flight by diff_id. ``users`` changes without an await between the look-up and the change, so a mount
that :meth:`LayerMounts._trim` takes away (users == 0, removed from the map before the first await) is never handed out
again. A mount whose afs_fused died, that is lazy while the layer is complete now, whose layer file was replaced (the layerstore
repairs a sealed file so), or that somebody unmounted by hand or covered leaves the map at the next look-up and is unmounted
by its last user.

``_all`` holds every mount that exists, in the map or not, until it is unmounted: :meth:`LayerMounts.leases` tells the
layerstore of them. A mount that is ``leaving`` is being unmounted, and nobody gets it any more. ``_opening`` has the numbers
of the calls OpenImage and OpenLayers whose layers are on their way into ``_all``, and the layers once they are known: a layerstore that
starts anew in between knows nothing of its answer, so they count as in use.
``_stuck`` are those of ``_all`` that left the map and whose unmount failed; :meth:`LayerMounts.release` tries again.
``changed`` is set whenever what :meth:`LayerMounts.leases` says has changed.
"""

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path

from afs.core import syscalls
from afs.core.errors import FailedPrecondition, Internal, NotFound
from afs.core.singleflight import SingleFlight
from afs.proto.v1 import layerstore_pb2 as pb
from afs.snapshotter.adoption import Found, find_mounts
from afs.snapshotter.backends import Backend, Backends, Unusable, is_opaque
from afs.snapshotter.fusedworker import Worker
from afs.snapshotter.fusedworkers import FusedWorkers
from afs.snapshotter.layermount import MountedLayer, file_id_of, mount_layer_at, named_id, unmount_layer
from afs.snapshotter.overlay import in_user_namespace

log = logging.getLogger(__name__)
_WORKERS_TRIED = 3  # for one mount; a layer that ends each of them is not to end all


class LayerMounts:
    """Mounts below *directory*: ``<number>``, with ``-<st_dev>-<st_ino>`` of the layer file if that is mounted itself.

    Mountinfo does not tell which file had the name when it was mounted. :attr:`fallbacks` counts why a backend could not be
    used for a layer.

    *keep* is how many layers that nobody uses stay mounted for the next run.
    """

    def __init__(self, directory: Path, fused: FusedWorkers, backends: Backends, keep: int) -> None:
        self._directory = directory
        self._fused = fused
        self._backends = backends
        self._keep = keep
        self._mounted: dict[str, MountedLayer] = {}
        self._all: dict[Path, MountedLayer] = {}
        self._stuck: set[Path] = set()  # those that an unmount failed for
        self._mounting: SingleFlight[str, MountedLayer] = SingleFlight()
        self._opening: dict[int, frozenset[str]] = {}
        self._kept: Counter[str] = Counter()  # what roots need that outlive this process
        self._last_opened = time.time_ns()  # ascends over restarts
        self.changed = asyncio.Event()
        self.on_mounted: Callable[[], None] = lambda: None  # called for each new mount
        self._next = 0
        self._going: set[asyncio.Task[None]] = set()
        self._closed = False
        self.fallbacks: Counter[str] = Counter()

    async def adopt(self) -> None:
        """Take over what an earlier snapshotter left mounted below the directory; the workers have been adopted.

        What is mounted through a worker that is gone, and what is no layer, is unmounted.
        """
        self._directory.mkdir(parents=True, exist_ok=True)
        # Below it is every image of the node, with what is for its root user alone in an image but readable here.
        self._directory.chmod(0o700)
        found = await asyncio.to_thread(find_mounts, self._directory)
        numbers = [path.name.partition("-")[0] for path in self._directory.iterdir()]
        self._next = max((int(number) for number in numbers if number.isdecimal()), default=0)
        given: Counter[tuple[Worker, str]] = Counter()
        for mount in found:
            layer = await self._adopted(mount)
            if layer is None:
                continue
            self._all[layer.path] = layer
            if layer.worker is not None:
                given[layer.worker, layer.diff_id] += 1
            better = self._mounted.get(layer.diff_id)
            if self._is_for_new_users(layer) and (better is None or better.lazy):
                self._mounted[layer.diff_id] = layer
        for path in self._directory.iterdir():
            if path not in self._all:
                try:
                    await asyncio.to_thread(unmount_layer, path)
                except OSError as error:  # somebody's file; its number is not used again
                    log.error("leaving %s alone: %s", path, error.strerror)
        for worker in self._fused.workers:
            await worker.keep_only(Counter({diff_id: count for (of, diff_id), count in given.items() if of is worker}))
        if found:
            log.info("adopted %d of %d layer mounts", len(self._all), len(found))
        self.changed.set()

    async def _adopted(self, mount: Found) -> MountedLayer | None:
        worker = None if mount.worker is None else self._fused.find(mount.worker)
        if mount.worker is not None and (worker is None or not worker.alive):
            log.error("layer %s at %s: its afs_fused is gone; unmounting it", mount.diff_id, mount.path)
            return None
        try:
            # Those of what covers it would say nothing.
            opaque = not mount.covered and await asyncio.to_thread(is_opaque, mount.path)
            mount_id = 0 if mount.covered else syscalls.mount_id(str(mount.path))
        except OSError as error:
            log.error("layer %s at %s: %s; unmounting it", mount.diff_id, mount.path, error.strerror)
            return None
        return MountedLayer(
            diff_id=mount.diff_id,
            path=mount.path,
            backend=mount.backend,
            lazy=worker is not None,
            opaque=opaque,
            worker=worker,
            file=mount.file,
            file_id=named_id(mount.path),
            mount_id=mount_id,
        )

    def _is_for_new_users(self, layer: MountedLayer) -> bool:
        """Whether an adopted mount is as a new one would be: the backend may be another one now, or the worker too old."""
        if not layer.is_mounted():
            return False
        choices = {choice.backend for choice in self._backends.choices(lazy=layer.lazy)}
        return layer.backend in choices and (layer.worker is None or layer.worker.usable)

    async def drop_unclaimed(self) -> None:
        """Unmount the adopted mounts that nobody uses and new users will not get; call it when all who can claim have."""
        idle = [layer for layer in self._all.values() if not self._wanted(layer)]
        try:
            await self._unmount_all(idle)
            await self._trim(self._keep)
        except OSError as error:  # it is among the stuck ones
            log.error("cannot unmount what nobody uses: %s", error)

    def _wanted(self, layer: MountedLayer) -> bool:
        return bool(layer.users) or layer.leaving or self._mounted.get(layer.diff_id) is layer

    @contextlib.asynccontextmanager
    async def using(self, diff_id: str, file: str) -> AsyncIterator[MountedLayer]:
        """The mount of a layer while the block runs; *file* is its complete file, "" if it is partial."""
        # Another user's _trim may take a new mount away between the end of the single flight and here; and that flight
        # may have been somebody's who was told that the layer is partial.
        while (layer := await self._current(diff_id, file)) is None:
            await self._mounting.run(diff_id, lambda: self._mount(diff_id, file))
        self._mounted[diff_id] = self._mounted.pop(diff_id)  # now the most recently used
        self._hold(layer)
        try:
            yield layer
        finally:
            await self.let_go(layer)

    def hold(self, diff_ids: Iterable[str]) -> list[MountedLayer] | None:
        """The mounts that new users of these get, if all are there and usable; each to be given to :meth:`let_go`."""
        found = [self._mounted.get(diff_id) for diff_id in diff_ids]
        good = [layer for layer in found if layer is not None and layer.is_usable() and not layer.was_replaced()]
        if len(good) < len(found):
            return None
        for layer in good:
            self._mounted[layer.diff_id] = self._mounted.pop(layer.diff_id)  # now the most recently used
            self._hold(layer)
        return good

    @contextlib.asynccontextmanager
    async def claiming(self, path: Path, diff_id: str) -> AsyncIterator[MountedLayer]:
        """The mount of a layer at *path*, made or adopted, while the block runs; NotFound if it is not there."""
        layer = self._all.get(path)
        if layer is None or layer.leaving or layer.diff_id != diff_id:
            raise NotFound(f"layer {diff_id} is not mounted at {path} any more")
        self._hold(layer)
        try:
            yield layer
        finally:
            await self.let_go(layer)

    @contextlib.contextmanager
    def keeping(self, diff_ids: Iterable[str]) -> Iterator[None]:
        """Tell the layerstore that these, in use already, stay mounted without this process too, while the block runs."""
        kept = tuple(diff_ids)
        self._kept.update(kept)
        self.changed.set()
        try:
            yield
        finally:
            self._kept.subtract(kept)
            self.changed.set()

    def _hold(self, layer: MountedLayer) -> None:
        layer.users += 1  # with no await since the caller found it
        if layer.users == 1:
            self.changed.set()

    async def let_go(self, layer: MountedLayer) -> None:
        """A user of the mount has ended."""
        if self._closed:
            return  # what close() left mounted stays: the event loop closes its users' blocks when it ends
        layer.users -= 1
        if not layer.users:
            self.changed.set()
        if not self._wanted(layer):
            await self._unmount_all([layer])
        await self._trim(self._keep)

    async def _current(self, diff_id: str, file: str) -> MountedLayer | None:
        """The mount for a new user, if there is one that is good enough; does not suspend when it finds one."""
        layer = self._mounted.get(diff_id)
        if layer is None:
            return None
        if layer.worker is not None and not layer.worker.alive:
            log.error("layer %s: its afs_fused died; mounting it anew", diff_id)
        elif not layer.is_mounted():
            log.error("layer %s: somebody unmounted or covered %s; mounting it anew", diff_id, layer.path)
        elif layer.lazy and file:
            if layer.backend is Backend.TREE and self._backends.choices(lazy=False)[0].backend is Backend.TREE:
                layer.lazy = False  # a new mount would be the same tree
                return layer
            log.info("layer %s is complete now: mounting its file", diff_id)
        elif layer.file_id is not None and file_id_of(file) not in (layer.file_id, None):
            log.info("layer %s: its file was replaced; mounting the new one", diff_id)
        else:
            return layer
        del self._mounted[diff_id]
        if not layer.users:
            try:
                await self._unmount_all([layer])
            except OSError as error:  # it is among the stuck ones; the new user has nothing to do with it
                log.error("cannot unmount %s: %s", layer.path, error.strerror)
        return None

    async def _mount(self, diff_id: str, file: str) -> MountedLayer:
        """Mount it with the best backend that can."""
        lazy = not file
        why: list[str] = []
        for choice in self._backends.choices(lazy=lazy):
            try:
                layer = await self._mount_with(choice.backend, diff_id, file)
            except Unusable as error:
                log.warning("layer %s: %s", diff_id, error.line)
                self.fallbacks[error.line] += 1
                why.append(error.line)
                continue
            except Internal as error:
                raise Internal(f"layer {diff_id}: {error.line}") from error
            layer.fallback = "; ".join(why)
            self._mounted[diff_id] = self._all[layer.path] = layer
            self.changed.set()
            self.on_mounted()
            return layer
        raise FailedPrecondition(f"cannot mount layer {diff_id}: {'; '.join(why) or self._backends.refusal(lazy=lazy)}")

    async def _mount_with(self, backend: Backend, diff_id: str, file: str) -> MountedLayer:
        if file and backend is not Backend.TREE:
            return await self._mount_from(backend, diff_id, Path(file), None)
        for _ in range(_WORKERS_TRIED - 1):
            worker = await self._fused.place(diff_id)
            try:
                return await self._mount_through(worker, backend, diff_id, lazy=not file)
            except (Internal, Unusable, OSError):
                if not await worker.is_dead():
                    raise
            log.warning("layer %s: afs_fused %d died while it was mounted; trying another", diff_id, worker.number)
        return await self._mount_through(await self._fused.place(diff_id), backend, diff_id, lazy=not file)

    async def _mount_through(self, worker: Worker, backend: Backend, diff_id: str, *, lazy: bool) -> MountedLayer:
        """Mount what *worker*, which the layer was placed on, serves."""
        tree = backend is Backend.TREE
        source = worker.tree(diff_id, user_xattrs=in_user_namespace()) if tree else worker.file(diff_id)
        try:
            return await self._mount_from(backend, diff_id, source, worker, lazy=lazy)
        except BaseException:
            await worker.release(diff_id)
            raise

    async def _mount_from(
        self, backend: Backend, diff_id: str, source: Path, worker: Worker | None, *, lazy: bool = False
    ) -> MountedLayer:
        # Before it is mounted: if the file is replaced in between, the next user mounts it once more.
        file_id = file_id_of(str(source)) if worker is None else None
        self._next += 1
        path = self._directory / "-".join(map(str, (self._next, *(file_id or ()))))
        file = str(source) if worker is None else ""
        layer = MountedLayer(diff_id, path, backend, lazy=lazy, worker=worker, file=file, file_id=file_id)
        layer.opaque, layer.mount_id = await asyncio.to_thread(mount_layer_at, backend, source, path)
        return layer

    async def _trim(self, keep: int) -> None:
        idle = [layer for layer in self._mounted.values() if layer.users == 0]
        await self._take_away(idle[: max(len(idle) - keep, 0)])

    async def _take_away(self, idle: Sequence[MountedLayer]) -> None:
        for layer in idle:
            if self._mounted.get(layer.diff_id) is layer:
                del self._mounted[layer.diff_id]
        await self._unmount_all(idle)

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
        self._opening[number] = found = frozenset(diff_ids)
        if not found <= {layer.diff_id for layer in self._all.values() if layer.users}:
            self.changed.set()

    def leases(self) -> pb.LeaseUpdate:
        """What is mounted and what is on its way, for the layerstore."""
        in_use = {layer.diff_id for layer in self._all.values() if layer.users}.union(*self._opening.values())
        idle = {layer.diff_id for layer in self._all.values()} - in_use
        return pb.LeaseUpdate(
            in_use=sorted(in_use),
            idle=sorted(idle),
            last_opened=self._last_opened,
            opening=sorted(self._opening),
            kept=sorted(+self._kept),
        )

    async def release(self, diff_ids: Collection[str]) -> None:
        """Unmount those of *diff_ids* that nobody uses: the layerstore needs their space."""
        stuck = [self._all[path] for path in self._stuck if self._all[path].diff_id in diff_ids]
        self._stuck -= {layer.path for layer in stuck}
        try:
            named = [layer for layer in self._all.values() if layer.diff_id in diff_ids]
            await self._take_away([layer for layer in named if not layer.users and not layer.leaving])
            await self._unmount_all(stuck)
        finally:
            self.changed.set()  # an answer, even if nothing could go

    async def _unmount_all(self, layers: Iterable[MountedLayer]) -> None:
        await asyncio.gather(*(asyncio.shield(task) for task in [self._start_unmount(layer) for layer in layers]))

    def _start_unmount(self, layer: MountedLayer) -> "asyncio.Task[None]":
        """A task of its own, begun at once: the layer has left the map already, so no cancelled caller may stop it."""
        layer.leaving = True

        async def unmount_it() -> None:
            try:
                await asyncio.to_thread(unmount_layer, layer.path)
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

    def find(self, diff_id: str) -> MountedLayer | None:
        """The mount of a layer that new users get, as far as is known."""
        return self._mounted.get(diff_id)

    def mounted(self) -> list[MountedLayer]:
        """All layer mounts, least recently used first."""
        return list(self._mounted.values())

    def workers(self) -> set[Worker]:
        """The workers that a mount is read through; dead ones too, whose mounts nobody can read any more."""
        return {layer.worker for layer in self._all.values() if layer.worker is not None}

    async def close(self, *, keep_used: bool = False) -> None:
        """Unmount all, or with *keep_used* all that nobody uses: what stays is there for :meth:`adopt`."""
        await self._mounting.close(cancel=False)
        if not keep_used:
            for layer in self._all.values():
                if layer.users:
                    log.error("layer %s at %s is unmounted, though %d use it", layer.diff_id, layer.path, layer.users)
        going = [layer for layer in self._all.values() if not layer.leaving and not (keep_used and layer.users)]
        self._mounted.clear()
        for layer in (*going, *(self._all[path] for path in self._stuck)):
            self._start_unmount(layer)
        self._stuck.clear()
        await asyncio.gather(*self._going, return_exceptions=True)
        self._closed = True
