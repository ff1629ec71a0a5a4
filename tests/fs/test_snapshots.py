"""Snapshots over real directories and layer mounts; the layerstore is played by the files of layers."""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from typing_extensions import override

from afs.core.digests import chain_ids, sha256_digest
from afs.core.errors import AlreadyExists, DeadlineExceeded, FailedPrecondition, NotFound, Unavailable
from afs.core.mounts import list_mounts, unmount, unmount_below
from afs.core.rpc import channel, serving
from afs.layerstore.afslyr.convert import convert
from afs.proto.containerd import snapshots_pb2
from afs.proto.containerd.snapshots_pb2_grpc import SnapshotsStub, add_SnapshotsServicer_to_server
from afs.proto.v1 import layerstore_pb2 as pb
from afs.snapshotter.backends import Backend, Backends, Trial
from afs.snapshotter.fusedworkers import FusedWorkers
from afs.snapshotter.layermounts import LayerMounts
from afs.snapshotter.opening import Opener
from afs.snapshotter.snapshots.directories import disk_usage
from afs.snapshotter.snapshots.remote import OnMissing, RemoteLayers
from afs.snapshotter.snapshots.service import SnapshotsService
from afs.snapshotter.snapshots.snapshots import Snapshots, open_snapshots
from tests.testbed import mounts as testmounts
from tests.testbed import tars

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Sequence

    from afs.snapshotter.layermount import MountedLayer
    from afs.snapshotter.snapshots.mountspec import Mount

pytestmark = pytest.mark.root
REF = "containerd.io/snapshot.ref"
TARS = [tars.tar_of({f"layer{number}": b"x" * 5000, "same": str(number).encode()}) for number in range(3)]
DIFFS = [sha256_digest(tar) for tar in TARS]
CHAINS = chain_ids(DIFFS)


class LocalOpener(Opener):
    """Opens layers that are files of one directory; *lost* ones are nowhere."""

    def __init__(self, directory: Path, mounts: LayerMounts) -> None:
        super().__init__(mounts, "unix:/none")
        self._files = directory / "layers"
        self._layers = mounts
        self.lost: set[str] = set()
        self.failing: Exception | None = None
        self.away = False
        self.opened: list[list[str]] = []
        self.opening = asyncio.Event()
        self.asked: list[pb.WantedLayer] = []

    @override
    async def open_layers(
        self, stack: contextlib.AsyncExitStack, layers: Sequence[pb.WantedLayer], timeout: float
    ) -> list[MountedLayer]:
        self.opening.set()
        self.opened.append([layer.diff_id for layer in layers])
        found = []
        for layer in layers:
            if layer.diff_id in self.lost:
                raise Unavailable(f"layer {layer.diff_id} is nowhere")
            file = self._files / f"{layer.diff_id.partition(':')[2]}.afslyr"
            found.append(await stack.enter_async_context(self._layers.using(layer.diff_id, str(file))))
        return found

    @override
    async def supply_layer(
        self, layer: pb.WantedLayer, missing: pb.SupplyLayerRequest.Missing.ValueType, timeout: float
    ) -> pb.WantedLayer:
        self.asked.append(layer)
        if self.failing is not None:
            raise self.failing
        if layer.chain_id not in CHAINS:
            raise NotFound(f"nothing is known of layer {layer.chain_id}")
        found = pb.WantedLayer()
        found.CopyFrom(layer)
        found.diff_id = DIFFS[CHAINS.index(layer.chain_id)]
        return found

    @override
    def is_connected(self) -> bool:
        return not isinstance(self.failing, Unavailable)

    @override
    async def layer_usage(self, diff_ids: Sequence[str]) -> dict[str, int]:
        if self.away:
            raise Unavailable("no layerstore")
        return {diff_id: 12345 for diff_id in diff_ids if diff_id not in self.lost}


class Snapshotter:
    """The parts of one, without services."""

    def __init__(self, directory: Path, mounts: Path, *, keep: bool = True) -> None:
        self.workers = FusedWorkers(directory / "fuse", directory / "faults", directory / "fill.sock", 1.0, 0)
        self.mounts = LayerMounts(mounts, self.workers, Backends((Trial(Backend.FILE, lazy=False),)), 0)
        self.opener = LocalOpener(directory, self.mounts)
        self.snapshots = open_snapshots(directory / "root", self.opener, self.mounts, keep=keep)
        self.snapshots.remote = RemoteLayers(self.opener, OnMissing.WAIT, 5.0, self.snapshots.create_remote)
        self.keep = keep

    async def prepare(self, key: str, parent: str = "", **labels: str) -> list[Mount]:
        """An active snapshot."""
        return await self.snapshots.prepare(key, parent, labels)

    async def lazy(self, count: int = 3) -> str:
        """The name of the topmost snapshot of layers of the cluster."""
        parent = ""
        for chain_id in CHAINS[:count]:
            with contextlib.suppress(AlreadyExists):
                await self.snapshots.prepare(f"extract {chain_id}", parent, {REF: chain_id})
                pytest.fail("containerd was told to unpack the layer")
            parent = chain_id
        return parent

    async def committed(self, name: str, parent: str = "", files: dict[str, str] | None = None, **labels: str) -> None:
        """A snapshot with files."""
        (mount,) = await self.prepare(f"making {name}", parent)
        for path, text in (files or {}).items():
            Path(upper_of(mount), path).write_text(text)
        await self.snapshots.commit(name, f"making {name}", labels, "")


@contextlib.asynccontextmanager
async def snapshotter(directory: Path, *, keep: bool = True, mounts: Path | None = None) -> AsyncIterator[Snapshotter]:
    """A snapshotter that starts and stops as afs_snapshotter does."""
    (directory / "root").mkdir(exist_ok=True)
    running = Snapshotter(directory, mounts or directory / "l", keep=keep)
    await running.workers.adopt()
    await running.mounts.adopt()
    await running.snapshots.restore()
    await running.mounts.drop_unclaimed()
    try:
        async with running.opener:
            yield running
    finally:
        await running.snapshots.close()
        await running.mounts.close(keep_used=keep)
        await running.workers.close(keep=running.mounts.workers())


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Path]:
    """With the layers; what stays mounted there is unmounted."""
    (tmp_path / "layers").mkdir()
    for tar, diff_id in zip(TARS, DIFFS, strict=True):
        convert(io.BytesIO(tar).read, tmp_path / "layers" / f"{diff_id.partition(':')[2]}.afslyr")
    yield tmp_path
    unmount_below(tmp_path)


def upper_of(mount: Mount) -> str:
    """Where a writable mount's files go."""
    if mount.type == "bind":
        return mount.source
    return next(option for option in mount.options if option.startswith("upperdir=")).partition("=")[2]


def lower_of(mount: Mount) -> list[str]:
    """The lower directories."""
    return next(option for option in mount.options if option.startswith("lowerdir=")).partition("=")[2].split(":")


@contextlib.contextmanager
def mounted(mount: Mount, at: Path) -> Iterator[Path]:
    """As containerd mounts it."""
    at.mkdir(exist_ok=True)
    if mount.type == "bind":
        testmounts.mount(mount.source, at, "none", "bind")
    else:
        options, cwd = ",".join(mount.options), Path("/")
        if len(options) >= 4096 - 512:
            lower = lower_of(mount)
            cwd = Path(os.path.commonprefix(lower)).parent  # noqa: RUF071 - as containerd does it
            short = ":".join(str(Path(path).relative_to(cwd)) for path in lower)
            options = ",".join([*mount.options[:-1], f"lowerdir={short}"])
        assert len(options) < 4096
        subprocess.run(["mount", "-t", "overlay", "-o", options, "overlay", at], cwd=cwd, check=True)
    try:
        yield at
    finally:
        unmount(str(at))


async def test_layers_of_the_cluster_below_a_container(directory: Path) -> None:
    async with snapshotter(directory) as running:
        top = await running.lazy()
        assert running.opener.opened == []  # containerd fetches thousands of images that nobody runs here
        assert [layer.parent_chain_id for layer in running.opener.asked] == ["", *CHAINS[:2]]
        (mount,) = await running.prepare("c", top)
        with mounted(mount, directory / "m") as root:
            assert sorted(os.listdir(root)) == ["layer0", "layer1", "layer2", "same"]
            assert (root / "same").read_text() == "2"
            (root / "new").write_text("written")
        assert Path(upper_of(mount), "new").read_text() == "written"
        assert await running.snapshots.mounts("c") == [mount]
        assert running.opener.opened == [DIFFS]
        (view,) = await running.snapshots.view("v", CHAINS[0], {})
        assert (view.type, view.options) == ("bind", ("ro", "rbind"))
        assert sorted(os.listdir(view.source)) == ["layer0", "same"]
        (view,) = await running.snapshots.view("w", top, {})
        assert (view.type, len(lower_of(view))) == ("overlay", 3)
        assert not [option for option in view.options if option.startswith(("upperdir", "workdir"))]


async def test_containerd_finds_what_it_is_told_of(directory: Path) -> None:
    async with snapshotter(directory) as running:
        await running.lazy(2)
        async with serving_at(directory, running.snapshots) as stub:
            for number, parent in ((0, ""), (1, CHAINS[0])):
                wanted = f'labels."{REF}"=={CHAINS[number]},parent=="{parent}"'
                (info,) = [
                    i async for m in stub.List(snapshots_pb2.ListSnapshotsRequest(filters=[wanted])) for i in m.info
                ]
                assert (info.name, info.kind, info.parent) == (CHAINS[number], snapshots_pb2.COMMITTED, parent)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.Prepare(
                    snapshots_pb2.PrepareSnapshotRequest(key="again", parent=CHAINS[0], labels={REF: CHAINS[1]})
                )
            assert caught.value.code() is grpc.StatusCode.ALREADY_EXISTS
            assert "target snapshot" in (caught.value.details() or "")


async def test_a_lazy_layer_on_one_that_was_unpacked_here(directory: Path) -> None:
    async with snapshotter(directory) as running:
        base = f"ns/5/{CHAINS[0]}"
        await running.committed(base, files={"layer0": "local"})
        with pytest.raises(AlreadyExists):
            await running.snapshots.prepare("k", base, {REF: CHAINS[1]})
        (found,) = [snapshot for snapshot in await running.snapshots.list([]) if snapshot.layer is not None]
        assert (found.parent, found.labels[REF]) == (base, CHAINS[1])
        (mount,) = await running.prepare("c", found.name)
        with mounted(mount, directory / "m") as root:
            assert (root / "layer0").read_text() == "local"
            assert (root / "layer1").exists()


@pytest.mark.parametrize(
    "failure", [NotFound("nothing known"), Unavailable("no layerstore"), DeadlineExceeded("too slow")]
)
async def test_without_the_cluster_containerd_unpacks(directory: Path, failure: Exception) -> None:
    async with snapshotter(directory) as running:
        running.opener.failing = failure
        (mount,) = await running.prepare("k", **{REF: CHAINS[0]})
        assert mount.options == ("rw", "rbind")
        assert os.listdir(mount.source) == []
        assert [snapshot.name for snapshot in await running.snapshots.list([])] == ["k"]


async def test_who_waited_in_vain_does_not_wait_for_each_layer(directory: Path) -> None:
    async with snapshotter(directory) as running:
        running.opener.failing = DeadlineExceeded("too slow")
        name = {"containerd.io/snapshot/cri.image-ref": "r.io/a:1"}
        await running.prepare("0", **{REF: CHAINS[0], **name})
        await running.snapshots.commit("a", "0", {REF: CHAINS[0]}, "")
        running.opener.failing = None
        assert (await running.prepare("1", "a", **{REF: CHAINS[1], **name}))[0].type == "overlay"
        assert len(running.opener.asked) == 1
        with pytest.raises(AlreadyExists):  # another image
            await running.prepare("2", "a", **{REF: CHAINS[1]})


async def test_the_pause_is_for_one_image_also_without_a_name(directory: Path) -> None:
    async with snapshotter(directory) as running:
        running.opener.failing = DeadlineExceeded("too slow")
        await running.prepare("0", **{REF: CHAINS[0]})
        await running.snapshots.commit("a", "0", {REF: CHAINS[0]}, "")
        running.opener.failing = None
        (mount,) = await running.prepare("1", "a", **{REF: CHAINS[1]})
        await running.snapshots.commit("b", "1", {REF: CHAINS[1]}, "")
        await running.prepare("2", "b", **{REF: CHAINS[2]})
        assert len(running.opener.asked) == 1
        assert mount.type == "overlay"
        other = sha256_digest(b"of another image")
        await running.prepare("3", **{REF: other})
        assert [layer.chain_id for layer in running.opener.asked] == [CHAINS[0], other]


async def test_a_layerstore_that_is_away_is_not_asked_for_each_layer(directory: Path) -> None:
    async with snapshotter(directory) as running:
        running.opener.failing = Unavailable("no layerstore")
        for number in range(3):
            await running.prepare(f"{number}", **{REF: CHAINS[0]})
        assert len(running.opener.asked) == 1
        running.opener.failing = None
        await running.lazy(1)


async def test_two_namespaces_at_once(directory: Path) -> None:
    async with snapshotter(directory) as running:
        tries = [running.prepare(f"k{number}", **{REF: CHAINS[0]}) for number in range(8)]
        results = await asyncio.gather(*tries, return_exceptions=True)
        assert {type(result) for result in results} == {AlreadyExists}
        assert len(await running.snapshots.list([])) == 1
        assert len(running.opener.asked) == 1


async def test_a_name_that_is_taken_by_another_snapshot(directory: Path) -> None:
    async with snapshotter(directory) as running:
        await running.committed(CHAINS[0], files={"a": "something else"})
        assert (await running.prepare("k", **{REF: CHAINS[0]}))[0].type == "bind"


async def test_containerd_does_not_get_what_others_unpacked(directory: Path) -> None:
    """It takes the first one that List tells."""
    async with snapshotter(directory) as running, serving_at(directory, running.snapshots) as stub:
        await running.committed(f"ns/5/{CHAINS[0]}", files={"layer0": "not what it says"}, **{REF: CHAINS[0]})
        await running.lazy(1)
        wanted = snapshots_pb2.ListSnapshotsRequest(filters=[f'labels."{REF}"=={CHAINS[0]},parent==""'])
        names = [info.name async for message in stub.List(wanted) for info in message.info]
        assert names == [CHAINS[0], f"ns/5/{CHAINS[0]}"]


async def test_a_layer_that_all_share_has_nobody_s_labels(directory: Path) -> None:
    image = "containerd.io/snapshot/cri.image-ref"
    async with snapshotter(directory) as running:
        for name in ("r.io/a:1", "r.io/b:1"):
            with pytest.raises(AlreadyExists):
                await running.prepare(f"k {name}", **{REF: CHAINS[0], image: name, "containerd.io/snapshot/x": name})
        found = await running.snapshots.stat(CHAINS[0])
        assert found.labels == {REF: CHAINS[0]}
        assert found.layer is not None
        assert [name.image for name in found.layer.names] == ["r.io/b:1", "r.io/a:1"]


async def test_a_label_that_was_taken_away_comes_back(directory: Path) -> None:
    async with snapshotter(directory) as running:
        await running.lazy(1)
        await running.snapshots.update(CHAINS[0], lambda _: {"other": "1"})
        await running.lazy(1)
        assert (await running.snapshots.stat(CHAINS[0])).labels == {"other": "1", REF: CHAINS[0]}


async def test_restart_with_containers(directory: Path) -> None:
    async with snapshotter(directory) as running:
        (mount,) = await running.prepare("c", await running.lazy())
        before = await running.snapshots.list([])
    async with snapshotter(directory) as running:
        assert await running.snapshots.list([]) == before
        assert await running.snapshots.mounts("c") == [mount]
        assert running.opener.opened == []  # no need to ask anybody
        with mounted(mount, directory / "m") as root:
            assert (root / "same").read_text() == "2"
        await running.snapshots.remove("c")
    assert list_mounts(str(directory)) == []


async def test_restart_that_unmounts(directory: Path) -> None:
    async with snapshotter(directory, keep=False) as running:
        await running.prepare("c", await running.lazy())
    assert list_mounts(str(directory)) == []
    async with snapshotter(directory, keep=False) as running:
        (mount,) = await running.snapshots.mounts("c")
        assert running.opener.opened == [DIFFS]
        with mounted(mount, directory / "m") as root:
            assert (root / "same").read_text() == "2"


async def test_another_boot(directory: Path) -> None:
    async with snapshotter(directory) as running:
        await running.prepare("c", await running.lazy())
    unmount_below(directory)
    async with snapshotter(directory) as running:
        (mount,) = await running.snapshots.mounts("c")
        with mounted(mount, directory / "m") as root:
            assert (root / "same").read_text() == "2"
    async with snapshotter(directory) as running:
        assert await running.snapshots.mounts("c") == [mount]
        assert running.opener.opened == []


async def test_a_mount_that_somebody_took_away(directory: Path) -> None:
    async with snapshotter(directory) as running:
        (mount,) = await running.prepare("c", await running.lazy())
        unmount(lower_of(mount)[0])
        (again,) = await running.snapshots.mounts("c")
        assert lower_of(again)[0] != lower_of(mount)[0]
        with mounted(again, directory / "m") as root:
            assert (root / "same").read_text() == "2"


async def test_a_layer_that_is_lost(directory: Path) -> None:
    async with snapshotter(directory) as running:
        top = await running.lazy()
        running.opener.lost = {DIFFS[1]}
        with pytest.raises(Unavailable, match=DIFFS[1]):
            await running.prepare("c", top)
        assert "c" not in [snapshot.name for snapshot in await running.snapshots.list([])]
        running.opener.lost = set()
        await running.prepare("c", top)


async def test_a_full_disk(directory: Path) -> None:
    """Nothing is left of what did not fit, and what is there stays."""
    small = directory / "small"
    small.mkdir()
    testmounts.mount("tmpfs", small, "tmpfs", "size=2m")
    (small / "layers").symlink_to(directory / "layers")
    async with snapshotter(small) as running, serving_at(directory, running.snapshots) as stub:
        await running.committed("base", files={"f": "x"})
        rest = os.statvfs(small)
        (small / "filler").write_bytes(b"x" * (rest.f_bavail * rest.f_frsize))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            for number in range(1000):
                labels = {"label": "x" * 1000}
                await stub.Prepare(snapshots_pb2.PrepareSnapshotRequest(key=f"k{number}", parent="base", labels=labels))
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        (small / "filler").unlink()
        await running.prepare("c", "base")
        known = {snapshot.id for snapshot in await running.snapshots.list([])}
        await running.snapshots.cleanup()  # of what failed
        assert {int(path.name) for path in (small / "root/snapshots").iterdir()} == known


async def test_mounts_go_when_nobody_needs_them(directory: Path) -> None:
    async with snapshotter(directory) as running:
        top = await running.lazy()
        await running.prepare("c", top)
        await running.prepare("d", top)
        await running.snapshots.remove("c")
        await running.snapshots.settled()
        assert len(list_mounts(str(directory))) == 3
        await running.snapshots.commit("image", "d", {}, "")
        await running.snapshots.settled()
        assert list_mounts(str(directory)) == []
        with pytest.raises(FailedPrecondition, match="remove"):
            await running.snapshots.remove(top)


async def test_a_name_that_is_another_snapshot_by_now(directory: Path) -> None:
    """What is remembered of names is compared with the database when it matters."""
    async with snapshotter(directory) as running:
        await running.committed("base", files={"old": ""})
        await running.prepare("c", "base")
        old = running.snapshots._chains["base"]
        await running.snapshots.remove("c")
        with pytest.raises(NotFound):
            await running.snapshots.mounts("c")
        await running.snapshots.remove("base")
        await running.committed("base", files={"new": ""})
        running.snapshots._chains["base"] = old  # a Prepare that looked just before
        (mount,) = await running.prepare("c", "base")
        with mounted(mount, directory / "m") as root:
            assert os.listdir(root) == ["new"]
        assert await running.snapshots.mounts("c") == [mount]
        await running.snapshots.remove("c")
        await running.snapshots.remove("base")
        with pytest.raises(NotFound, match="base"):
            await running.prepare("c", "base")


async def test_mounting_once_more_while_it_is_removed(directory: Path) -> None:
    async with snapshotter(directory) as running:
        (mount,) = await running.prepare("c", await running.lazy())
        for path in lower_of(mount):
            unmount(path)
        running.opener.opening.clear()
        again = asyncio.create_task(running.snapshots.mounts("c"))
        await running.opener.opening.wait()
        await running.snapshots.remove("c")
        with pytest.raises(NotFound):
            await again
    assert list_mounts(str(directory)) == []


async def test_cleanup(directory: Path) -> None:
    async with snapshotter(directory) as running:
        for name in ("a", "b"):
            await running.committed(name, files={"f": "x"})
        home = directory / "root/snapshots"
        (home / "77").mkdir()
        (home / "77" / "file").touch()
        (home / "not ours").mkdir()
        await running.snapshots.remove("a")
        assert {path.name for path in home.iterdir()} == {"1", "2", "77", "not ours"}
        await running.snapshots.cleanup()
        assert {path.name for path in home.iterdir()} == {"2", "not ours"}


async def test_a_number_that_is_given_again_is_not_cleaned_up(directory: Path) -> None:
    """A killed process left a directory; its number is the next snapshot's."""
    async with snapshotter(directory) as running:
        await running.committed("base")
        left = directory / "root/snapshots/2"
        left.mkdir()
        (left / "file").touch()
        (mount,) = await running.prepare("c", "base")
        assert mount.options[-2] == f"upperdir={left}/fs"
        assert sorted(path.name for path in left.iterdir()) == ["fs", "work"]
        await running.snapshots.cleanup()
        assert sorted(path.name for path in left.parent.iterdir()) == ["1", "2"]


async def test_what_a_failed_look_at_mounts_held_goes_with_the_snapshot(directory: Path) -> None:
    async with snapshotter(directory) as running:
        (mount,) = await running.prepare("c", await running.lazy())
        unmount(lower_of(mount)[0])
        running.opener.lost = {DIFFS[2]}
        running.opener.opening.clear()
        again = asyncio.create_task(running.snapshots.mounts("c"))
        await running.opener.opening.wait()
        await running.snapshots.remove("c")
        with pytest.raises(Unavailable):
            await again
        await running.snapshots.settled()
        assert [layer.users for layer in running.mounts.mounted()] == []
    assert list_mounts(str(directory)) == []


async def test_a_full_disk_at_the_start(directory: Path) -> None:
    """What was removed can be deleted, and more can be removed."""
    small = directory / "small"
    small.mkdir()
    testmounts.mount("tmpfs", small, "tmpfs", "size=4m")
    (small / "layers").symlink_to(directory / "layers")
    async with snapshotter(small) as running:
        for name in ("a", "b"):
            await running.committed(name, files={"f": "x" * 300_000})
        await running.snapshots.remove("a")
    (small / "run").mkdir()
    rest = os.statvfs(small)
    (small / "filler").write_bytes(b"x" * (rest.f_bavail * rest.f_frsize))
    async with snapshotter(small) as running:
        await running.snapshots.remove("b")
        await running.snapshots.cleanup()
        assert os.listdir(small / "root/snapshots") == []
        await running.prepare("c")


async def test_usage_without_a_layerstore(directory: Path) -> None:
    async with snapshotter(directory) as running:
        await running.lazy(1)
        running.opener.away = True
        with pytest.raises(Unavailable):
            await running.snapshots.usage(CHAINS[0])
        running.opener.away = False
        assert await running.snapshots.usage(CHAINS[0]) == (12345, 1)
        running.opener.away = True
        assert await running.snapshots.usage(CHAINS[0]) == (12345, 1)


async def test_usage_of_what_is_removed_meanwhile(directory: Path) -> None:
    async with snapshotter(directory) as running:
        (mount,) = await running.prepare("c")
        shutil.rmtree(Path(mount.source).parent)
        with pytest.raises(NotFound, match="c was removed"):
            await running.snapshots.usage("c")


def test_usage_does_not_follow_what_a_container_swaps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outside, inside = tmp_path / "outside", tmp_path / "inside"
    outside.mkdir()
    (outside / "large").write_bytes(b"x" * 100_000)
    (inside / "swapped").mkdir(parents=True)
    (inside / "filed").mkdir()
    real = os.open

    def swapping(path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        if path == "swapped":
            (inside / "swapped").rmdir()
            (inside / "swapped").symlink_to(outside)
        if path == "filed":
            (inside / "filed").rmdir()
            (inside / "filed").touch()
        return real(path, flags, mode, dir_fd=dir_fd)

    monkeypatch.setattr(os, "open", swapping)
    assert disk_usage(inside).inodes == 1


async def test_usage(directory: Path) -> None:
    async with snapshotter(directory) as running:
        top = await running.lazy()
        assert await running.snapshots.usage(top) == (12345, 1)
        running.opener.lost = {DIFFS[2]}
        assert await running.snapshots.usage(top) == (0, 0)
        (mount,) = await running.prepare("c", CHAINS[0])
        empty = await running.snapshots.usage("c")
        one = Path(upper_of(mount), "one")
        one.write_bytes(b"x" * 100_000)
        os.link(one, one.with_name("two"))
        used = await running.snapshots.usage("c")
        assert used.inodes == empty.inodes + 1
        assert 100_000 <= used.size - empty.size < 120_000
        await running.snapshots.commit("done", "c", {}, "")
        assert await running.snapshots.usage("done") == used
        assert (await running.snapshots.stat("done")).size == used.size
    async with snapshotter(directory) as running:
        assert await running.snapshots.usage("done") == used


def test_usage_of_a_tree_that_is_deeper_than_a_path_is_long(tmp_path: Path) -> None:
    before = os.open("/", os.O_RDONLY)
    try:
        os.chdir(tmp_path)
        os.mkdir("top")
        os.chdir("top")
        for _ in range(30):
            os.mkdir("d" * 200)
            os.chdir("d" * 200)
    finally:
        os.fchdir(before)
        os.close(before)
    assert disk_usage(tmp_path / "top").inodes == 31


async def test_more_names_than_an_option_can_hold(directory: Path) -> None:
    """containerd shortens names that begin alike; these do not."""
    elsewhere = Path(tempfile.mkdtemp(prefix="afs-test-", dir="/var/tmp"))
    deep = directory / ("n" * 200)
    deep.mkdir()
    (deep / "layers").symlink_to(directory / "layers")
    try:
        async with snapshotter(deep, mounts=elsewhere) as running:
            parent = await running.lazy(1)
            for number in range(14):
                await running.committed(f"{number}", parent, {f"file{number}": ""})
                parent = f"{number}"
            (mount,) = await running.prepare("c", parent)
            assert {Path(path).parent.name for path in lower_of(mount)} == {"lower"}
            with mounted(mount, directory / "m") as root:
                assert len(os.listdir(root)) == 14 + 2
            assert await running.snapshots.mounts("c") == [mount]
    finally:
        unmount_below(elsewhere)
        shutil.rmtree(elsewhere)


@contextlib.asynccontextmanager
async def serving_at(directory: Path, snapshots: Snapshots) -> AsyncIterator[Any]:
    """A client of the service."""
    address, service = f"unix:{directory}/s.sock", SnapshotsService(snapshots)
    async with (
        serving([address], lambda server: add_SnapshotsServicer_to_server(service, server)),
        channel(address) as opened,
    ):
        yield SnapshotsStub(opened)


async def test_what_the_service_refuses(directory: Path) -> None:
    request = snapshots_pb2
    async with snapshotter(directory) as running, serving_at(directory, running.snapshots) as stub:
        await stub.Prepare(request.PrepareSnapshotRequest(key="a", labels={"x": "1"}))
        update = request.UpdateSnapshotRequest(info=request.Info(name="a", parent="b"))
        update.update_mask.paths.append("parent")
        codes = grpc.StatusCode
        for call, code in (
            (stub.Prepare(request.PrepareSnapshotRequest()), codes.INVALID_ARGUMENT),
            (stub.Prepare(request.PrepareSnapshotRequest(key="a")), codes.ALREADY_EXISTS),
            (stub.Commit(request.CommitSnapshotRequest(key="a")), codes.INVALID_ARGUMENT),
            (stub.Update(update), codes.INVALID_ARGUMENT),
            (stub.Stat(request.StatSnapshotRequest(key="b")), codes.NOT_FOUND),
            (stub.Usage(request.UsageRequest(key="b")), codes.NOT_FOUND),
            (stub.Mounts(request.MountsRequest(key="b")), codes.NOT_FOUND),
            (stub.Remove(request.RemoveSnapshotRequest(key="b")), codes.NOT_FOUND),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call
            assert caught.value.code() is code
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in stub.List(request.ListSnapshotsRequest(filters=["=="])):
                pass
        assert caught.value.code() is codes.INVALID_ARGUMENT


@pytest.mark.parametrize(
    ("paths", "given", "expected"),
    [
        ([], {"z": "9"}, {"z": "9"}),
        (["labels"], {"z": "9", "e": ""}, {"z": "9"}),
        (["labels.x"], {"x": "5"}, {"x": "5", "y": "2"}),
        (["labels.x"], {}, {"y": "2"}),
        (["labels.a.b/c"], {"a.b/c": "3"}, {"x": "1", "y": "2", "a.b/c": "3"}),
    ],
)
async def test_updates(directory: Path, paths: list[str], given: dict[str, str], expected: dict[str, str]) -> None:
    request = snapshots_pb2
    async with snapshotter(directory) as running, serving_at(directory, running.snapshots) as stub:
        await stub.Prepare(request.PrepareSnapshotRequest(key="a", labels={"x": "1", "y": "2"}))
        update = request.UpdateSnapshotRequest(info=request.Info(name="a", labels=given))
        update.update_mask.paths.extend(paths)
        answer = (await stub.Update(update)).info
        assert dict(answer.labels) == expected
        assert answer.kind == request.ACTIVE
        assert answer.updated_at.ToNanoseconds() > answer.created_at.ToNanoseconds()


async def test_long_labels(directory: Path) -> None:
    """A message takes 16 MiB; what List could not tell is refused."""
    async with snapshotter(directory) as running, serving_at(directory, running.snapshots) as stub:
        for number in range(30):
            labels = {f"label{part}": "x" * 100_000 for part in range(9)}
            await stub.Prepare(snapshots_pb2.PrepareSnapshotRequest(key=f"k{number}", labels=labels))
        found = [info.name async for part in stub.List(snapshots_pb2.ListSnapshotsRequest()) for info in part.info]
        assert len(found) == 30
        labels = {f"label{part}": "x" * 100_000 for part in range(11)}
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Prepare(snapshots_pb2.PrepareSnapshotRequest(key="more", labels=labels))
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert len(await running.snapshots.list([])) == 30


async def test_many_come_in_parts(directory: Path) -> None:
    async with snapshotter(directory) as running, serving_at(directory, running.snapshots) as stub:
        for number in range(201):
            await running.prepare(f"k{number}")
        parts = [len(part.info) async for part in stub.List(snapshots_pb2.ListSnapshotsRequest())]
        assert parts == [100, 100, 1]
