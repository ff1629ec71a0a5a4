"""Layer mounts over the life of a layer and of the snapshotter: complete at last, mounted elsewhere, left by a crash."""

import asyncio
import contextlib
import io
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Literal

import pytest
from typing_extensions import override

from afs.core import syscalls
from afs.core.errors import Internal, NotFound
from afs.core.mounts import list_mounts, unmount, unmount_below
from afs.layerstore.afslyr.convert import convert
from afs.snapshotter import layermount, layermounts
from afs.snapshotter.backends import Backend, Backends, mount_layer
from afs.snapshotter.fusedworkers import FusedWorkers
from afs.snapshotter.layermounts import LayerMounts
from tests.testbed import capabilities, tars, unpackers
from tests.testbed.fillsource import FillSource, SourceLayer
from tests.testbed.fusedpool import make_pool, open_files
from tests.testbed.ourmounts import KINDS, Kind, layer_mounts, trials

pytestmark = pytest.mark.root

TAR = tars.tar_of({"file": b"content"})


@pytest.fixture
def source(tmp_path: Path) -> Iterator[FillSource]:
    """Layers in the names that a layerstore gives them, and a look that nothing stays mounted."""
    capabilities.require("fuse")
    yield FillSource(tmp_path)
    left = list_mounts(str(tmp_path))
    unmount_below(tmp_path)
    assert left == []


def add(source: FillSource, tar: bytes, *, partial: bool) -> SourceLayer:
    """A layer in a file named by its diff_id."""
    made = convert(io.BytesIO(tar).read, source.directory / "new")
    whole = (source.directory / "new").rename(source.directory / f"{made.diff_id.removeprefix('sha256:')}.afslyr")
    return source.add_file(made.diff_id, whole, partial=partial)


async def read(path: Path) -> bytes:
    """The file of a mounted layer, read in a thread: the loop serves the chunks."""
    return await asyncio.to_thread((path / "file").read_bytes)


@pytest.mark.parametrize("forced", [None, Backend.LOOP])
async def test_new_users_get_the_file_of_a_layer_that_became_complete(
    source: FillSource, forced: Backend | None
) -> None:
    layer = add(source, TAR, partial=True)
    async with layer_mounts(source, forced, keep=5) as mounts:
        async with mounts.using(layer.diff_id, "") as lazy:
            async with mounts.using(layer.diff_id, str(layer.whole)) as complete:
                assert (lazy.lazy, complete.lazy) == (True, False)
                assert (complete.worker, complete.backend) == (None, lazy.backend)
                assert await read(lazy.path) == await read(complete.path) == b"content"
                assert list(mounts.leases().in_use) == [layer.diff_id]
            async with mounts.using(layer.diff_id, "") as again:  # somebody who asked before it was complete
                assert again is complete
            assert {one.path for one in mounts.mounted()} == {complete.path}
        assert not lazy.path.exists()
        assert (complete.path / "file").exists()


def replace(layer: SourceLayer) -> None:
    """What the layerstore does to repair a sealed file: another one with the same bytes takes its name."""
    new = layer.whole.with_name("replacement")
    new.write_bytes(layer.whole.read_bytes())
    new.rename(layer.whole)


@pytest.mark.parametrize("forced", [Backend.FILE, Backend.LOOP])
async def test_new_users_get_the_file_that_replaced_a_damaged_one(source: FillSource, forced: Backend) -> None:
    Kind(f"{forced}-complete").require(source.directory)
    layer = add(source, TAR, partial=False)
    file = str(layer.whole)
    async with layer_mounts(source, forced, keep=5) as mounts:
        async with mounts.using(layer.diff_id, file) as old:
            async with mounts.using(layer.diff_id, file) as again:
                assert again is old
            replace(layer)
            async with mounts.using(layer.diff_id, file) as new:
                assert new is not old
                assert await read(new.path) == b"content"
            async with mounts.using(layer.diff_id, file) as again:
                assert again is new
            assert await read(old.path) == b"content"
        assert not old.path.exists()
        replace(layer)
        async with mounts.using(layer.diff_id, file) as newest:
            assert newest is not new
        assert not new.path.exists(), "nobody used it"
        layer.whole.unlink()
        async with mounts.using(layer.diff_id, file) as again:
            assert again is newest, "a file that is gone was not replaced"


async def test_one_tree_serves_partial_and_complete(source: FillSource) -> None:
    layer = add(source, TAR, partial=True)
    async with (
        layer_mounts(source, Backend.TREE) as mounts,
        mounts.using(layer.diff_id, "") as lazy,
        mounts.using(layer.diff_id, str(layer.whole)) as complete,
    ):
        assert complete is lazy
        assert not complete.lazy


async def test_users_of_both_states_at_once(source: FillSource) -> None:
    """Those with a file never get a mount that waits for others."""
    layer = add(source, TAR, partial=True)
    async with layer_mounts(source, None) as mounts, contextlib.AsyncExitStack() as stack:
        files = ["", str(layer.whole)] * 4
        entering = [stack.enter_async_context(mounts.using(layer.diff_id, file)) for file in files]
        used = await asyncio.gather(*entering)
        assert [one.lazy for one, file in zip(used, files, strict=True) if file] == [False] * 4
        assert len({one.path for one in used}) <= 2


async def test_a_layer_on_another_file_system_falls_back(source: FillSource) -> None:
    """EROFS mounts no files of a tmpfs; that is seen when such a layer is mounted."""
    with unpackers.tmpfs(source.directory / "tmpfs") as elsewhere:
        made = convert(io.BytesIO(TAR).read, elsewhere / "layer")
        if not next(one for one in trials(source.directory) if one.backend is Backend.FILE and not one.lazy).works:
            capabilities.unavailable("EROFS on a file")
        async with layer_mounts(source, None) as mounts:
            async with mounts.using(made.diff_id, str(elsewhere / "layer")) as at:
                assert at.backend is Backend.LOOP
                assert await read(at.path) == b"content"
                assert at.fallback.endswith(" and tmpfs")
            assert mounts.fallbacks == {at.fallback: 1}


def start_and_kill(source: FillSource, kind: Kind, layers: list[SourceLayer]) -> list[Path]:
    """Mount layers in a process of its own, which is killed then; the mounts' paths."""
    script = f"""
import asyncio, contextlib, sys, threading
from pathlib import Path
from afs.snapshotter.backends import Backend, Backends, mount_layer
from afs.snapshotter.fusedworkers import FusedWorkers
from afs.snapshotter.layermounts import LayerMounts
from afs.snapshotter.probe import probe

async def main(work, *layers):
    workers = FusedWorkers(work / "fuse", work / "faults", work / "fill.sock", 10.0, 1)
    mounts = LayerMounts(work / "l", workers, Backends(probe(work, work), Backend({str(kind.backend)!r})), 9)
    await workers.adopt()
    await mounts.adopt()
    for diff_id, file in zip(layers[::2], layers[1::2]):
        used = mounts.using(diff_id, file)
        print((await used.__aenter__()).path, flush=True)
    print("done", flush=True)
    await asyncio.Event().wait()

asyncio.run(main(Path(sys.argv[1]), *sys.argv[2:]))
"""
    names = [text for layer in layers for text in (layer.diff_id, kind.file(layer))]
    argv = [sys.executable, "-c", script, str(source.directory), *names]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        paths = []
        while (line := process.stdout.readline().strip()) not in ("done", ""):
            paths.append(Path(line))
        process.kill()
    assert line == "done"
    return paths


@contextlib.asynccontextmanager
async def adopting(source: FillSource, kind: Kind, keep: int = 9) -> AsyncIterator[LayerMounts]:
    """What a snapshotter does when it starts anew."""
    work = source.directory
    workers = FusedWorkers(work / "fuse", work / "faults", source.socket, 10.0, 1)
    mounts = LayerMounts(work / "l", workers, Backends(trials(work), kind.backend), keep)
    try:
        await workers.adopt()
        await mounts.adopt()
        yield mounts
    finally:
        await mounts.close()
        await workers.close()


@pytest.mark.parametrize("name", KINDS)
async def test_mounts_of_a_killed_snapshotter_are_adopted(source: FillSource, name: str) -> None:
    kind = Kind(name)
    kind.require(source.directory)
    layers = [add(source, tars.tar_of({"file": text}), partial=kind.lazy) for text in (b"one", b"two")]
    opaque = add(source, tars.tar_of({".wh..wh..opq": b"", "file": b"three"}), partial=kind.lazy)
    async with source.serving():
        paths = await asyncio.to_thread(start_and_kill, source, kind, [*layers, opaque])
        (source.directory / "l/77").mkdir()  # killed before it mounted anything there
        async with adopting(source, kind) as mounts:
            assert [one.path for one in mounts.mounted()] == paths
            assert sorted(mounts.leases().idle) == sorted(one.diff_id for one in (*layers, opaque))
            for layer, path in zip(layers, paths, strict=False):
                async with mounts.using(layer.diff_id, kind.file(layer)) as at:
                    assert (at.path, at.backend, at.opaque) == (path, kind.backend, False)
                    assert at.lazy == kind.lazy
            async with mounts.claiming(paths[2], opaque.diff_id) as claimed:
                assert (claimed.users, claimed.diff_id, claimed.opaque) == (1, opaque.diff_id, True)
                assert await read(claimed.path) == b"three"
                await mounts.release([layers[0].diff_id, opaque.diff_id])
                assert list(mounts.leases().in_use) == [opaque.diff_id]
            with pytest.raises(NotFound):
                async with mounts.claiming(paths[0], layers[0].diff_id):
                    pass
            with pytest.raises(NotFound):  # its number is another layer's, as after a restart of the machine
                async with mounts.claiming(paths[1], opaque.diff_id):
                    pass
            served = {one: count for worker in mounts.workers() for one, count in worker.layers.items()}
            through_workers = kind.lazy or kind.backend is Backend.TREE
            assert served == ({layers[1].diff_id: 1, opaque.diff_id: 1} if through_workers else {})
            new = add(source, tars.tar_of({"file": b"four"}), partial=kind.lazy)
            async with mounts.using(new.diff_id, kind.file(new)) as at:
                assert int(at.path.name.partition("-")[0]) > 77


async def test_what_somebody_put_among_the_mounts_does_not_end_the_start(source: FillSource) -> None:
    kind = Kind("erofs-loop-complete")
    kind.require(source.directory)
    layers = [add(source, tars.tar_of({"file": text}), partial=False) for text in (b"covered", b"free")]
    async with source.serving():
        covered, free = await asyncio.to_thread(start_and_kill, source, kind, layers)
        stray = source.directory / "l/9"
        stray.write_text("file")
        full = source.directory / "l/10"
        full.mkdir()
        (full / "file").touch()
        syscalls.mount("tmpfs", str(covered), "tmpfs")
        async with adopting(source, kind) as mounts:
            assert [one.path for one in mounts.mounted()] == [free]
            async with mounts.claiming(covered, layers[0].diff_id):
                await mounts.drop_unclaimed()
                assert list(mounts.leases().in_use) == [layers[0].diff_id]
                async with mounts.using(layers[0].diff_id, str(layers[0].whole)) as at:
                    assert await read(at.path) == b"covered"
                    assert int(at.path.name.partition("-")[0]) == 11
            assert not covered.exists()
        assert {path.name for path in (source.directory / "l").iterdir()} == {"9", "10"}


@pytest.mark.parametrize("name", ["erofs-file-complete", "erofs-loop-complete"])
async def test_an_adopted_mount_of_a_file_that_was_replaced_is_for_its_users_alone(
    source: FillSource, name: str
) -> None:
    kind = Kind(name)
    kind.require(source.directory)
    kept, replaced = (add(source, tars.tar_of({"file": text}), partial=False) for text in (b"kept", b"replaced"))
    async with source.serving():
        paths = await asyncio.to_thread(start_and_kill, source, kind, [kept, replaced])
        replace(replaced)
        async with adopting(source, kind) as mounts, mounts.claiming(paths[1], replaced.diff_id) as claimed:
            async with mounts.using(kept.diff_id, str(kept.whole)) as at:
                assert at.path == paths[0]
            async with mounts.using(replaced.diff_id, str(replaced.whole)) as at:
                assert at is not claimed
                assert await read(at.path) == await read(claimed.path) == b"replaced"


async def test_what_was_mounted_through_a_dead_worker_is_not_adopted(source: FillSource) -> None:
    kind = Kind("erofs-file-lazy")
    kind.require(source.directory)
    layer = add(source, TAR, partial=True)
    async with source.serving():
        (path,) = await asyncio.to_thread(start_and_kill, source, kind, [layer])
        pid = int((source.directory / "fuse/0.lock").read_text())
        fd = os.pidfd_open(pid)
        signal.pidfd_send_signal(fd, signal.SIGKILL)
        await ended(fd)
        os.close(fd)
        async with adopting(source, kind) as mounts:
            assert mounts.mounted() == []
            assert not path.exists()
            async with mounts.using(layer.diff_id, "") as at:
                assert await read(at.path) == b"content"


async def ended(pidfd: int) -> None:
    """Wait until a process that is not our child has ended."""
    readable = asyncio.Event()
    asyncio.get_running_loop().add_reader(pidfd, readable.set)
    try:
        await readable.wait()
    finally:
        asyncio.get_running_loop().remove_reader(pidfd)


async def test_the_better_of_two_adopted_mounts_is_for_new_users(source: FillSource) -> None:
    """The other one is for whoever claims it, and goes if nobody does."""
    layer = add(source, TAR, partial=True)
    lazy, complete = Kind("erofs-loop-lazy"), Kind("erofs-loop-complete")
    complete.require(source.directory)
    async with source.serving():
        (old,) = await asyncio.to_thread(start_and_kill, source, lazy, [layer])
        new = source.directory / "l/5"
        new.mkdir()
        mount_layer(Backend.LOOP, layer.whole, new)
        async with adopting(source, complete) as mounts:
            assert [one.path for one in mounts.mounted()] == [new]
            async with mounts.claiming(old, layer.diff_id) as claimed:
                assert claimed.lazy
                await mounts.drop_unclaimed()
                assert await read(old) == b"content"
            assert not old.exists()
        assert not new.exists()


async def test_a_clean_stop_can_leave_what_is_used(source: FillSource) -> None:
    kind = Kind("erofs-loop-complete")
    kind.require(source.directory)
    used, idle = (add(source, tars.tar_of({"file": text}), partial=False) for text in (b"used", b"idle"))
    async with adopting(source, kind) as mounts, contextlib.AsyncExitStack() as stack:
        at = await stack.enter_async_context(mounts.using(used.diff_id, str(used.whole)))
        async with mounts.using(idle.diff_id, str(idle.whole)) as other:
            pass
        await mounts.close(keep_used=True)
        assert (at.path.exists(), other.path.exists()) == (True, False)
        assert (at.path / "file").read_bytes() == b"used"


async def test_mounts_of_dead_workers_are_not_taken_for_a_new_one_s(source: FillSource) -> None:
    """They were used, so a clean stop left them, and no worker lived any more."""
    layer = add(source, TAR, partial=True)
    backends = Backends(trials(source.directory), None)
    async with source.serving(), contextlib.AsyncExitStack() as users:
        first = make_pool(source.directory, source)
        await first.adopt()
        mounts = LayerMounts(source.directory / "l", first, backends, 0)
        await mounts.adopt()
        old = await users.enter_async_context(mounts.using(layer.diff_id, ""))
        assert old.worker is not None
        replacing = asyncio.Event()
        first._starting = _Never(replacing)  # the snapshotter ends before there is another one
        os.kill(old.worker.pid, signal.SIGKILL)
        await replacing.wait()
        await mounts.close(keep_used=True)
        await first.close(keep=mounts.workers())
        assert [one.target for one in list_mounts(str(source.directory / "l"))] == [str(old.path)]
        second = make_pool(source.directory, source)
        await second.adopt()
        again = LayerMounts(source.directory / "l", second, backends, 0)
        await again.adopt()
        assert old.worker.number not in {worker.number for worker in second.workers}
        assert again.mounted() == []
        async with again.using(layer.diff_id, "") as new:
            assert await read(new.path) == b"content"
        await again.close()
        await second.close()


@pytest.mark.parametrize("deaths", [1, 3])
async def test_a_worker_that_dies_while_a_layer_is_mounted(
    source: FillSource, monkeypatch: pytest.MonkeyPatch, deaths: int
) -> None:
    """The user gets the layer from another one, unless the layer seems to be what ends them."""
    layer = add(source, TAR, partial=True)
    mount = layermount.mount_layer_at
    killed: list[int] = []

    def dying(backend: Backend, at: Path, target: Path) -> tuple[bool, int]:
        if len(killed) < deaths:
            pid = int((source.directory / "fuse" / f"{at.parts[-3]}.lock").read_text())
            killed.append(pid)
            os.kill(pid, signal.SIGKILL)
        return mount(backend, at, target)

    async with layer_mounts(source, None) as mounts:
        monkeypatch.setattr(layermounts, "mount_layer_at", dying)
        if deaths == 1:
            async with mounts.using(layer.diff_id, "") as mounted:
                assert await read(mounted.path) == b"content"
        else:
            with pytest.raises((Internal, OSError)):
                await mounts.using(layer.diff_id, "").__aenter__()
        assert len(set(killed)) == deaths


async def test_files_of_mounts_that_went_unnoticed_are_closed(source: FillSource) -> None:
    """The snapshotter was killed after it unmounted a tree and before it told the worker."""
    layer = source.add(TAR)
    backends = Backends(trials(source.directory), Backend.TREE)
    async with source.serving():
        first = make_pool(source.directory, source)
        await first.adopt()
        mounts = LayerMounts(source.directory / "l", first, backends, 1)
        await mounts.adopt()
        async with mounts.using(layer.diff_id, "") as mounted:
            await read(mounted.path)
        assert mounted.worker is not None
        assert open_files(mounted.worker, source.directory)
        unmount(str(mounted.path))
        await first.close(keep=[mounted.worker])
        second = make_pool(source.directory, source)
        await second.adopt()
        again = LayerMounts(source.directory / "l", second, backends, 1)
        await again.adopt()
        (adopted,) = second.workers
        assert (adopted.pid, adopted.layers) == (mounted.worker.pid, {})
        assert open_files(adopted, source.directory) == []
        await again.close()
        await second.close()
        assert mounted.worker.child is not None
        mounted.worker.child.wait(30)  # of the first pool, which gave it up


class _Never(asyncio.Lock):
    """A lock that nobody gets; says who wants it."""

    def __init__(self, wanted: asyncio.Event) -> None:
        super().__init__()
        self._wanted = wanted

    @override
    async def acquire(self) -> Literal[True]:
        self._wanted.set()
        await asyncio.Event().wait()
        return True
