"""Attached roots: what a snapshotter that ends at any moment leaves, the next one adopts or clears."""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import pytest
from typing_extensions import override

from afs.core import syscalls
from afs.core.digests import sha256_digest
from afs.core.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound
from afs.core.mounts import list_mounts, unmount, unmount_below
from afs.layerstore.afslyr.convert import convert
from afs.proto.v1 import layerstore_pb2 as pb
from afs.snapshotter.attached import AttachedRoots
from afs.snapshotter.backends import Backend, Backends, Trial
from afs.snapshotter.fusedworkers import FusedWorkers
from afs.snapshotter.layermounts import LayerMounts
from afs.snapshotter.opening import Opened, Opener
from afs.snapshotter.rootmount import RootRequest
from afs.snapshotter.roots import Roots
from tests.testbed import tars
from tests.testbed.crashes import Scenario, crash_everywhere

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Sequence

    from tests.testbed.crashes import Mode

pytestmark = pytest.mark.root
NAME = pb.ImageName(image="test")
TAR = tars.tar_of({"a": b"a"})


def make_layer(directory: Path, tar: bytes = TAR) -> None:
    """The layer of the image in `directory`/layers, as a layerstore has it."""
    (directory / "layers").mkdir(parents=True)
    convert(io.BytesIO(tar).read, directory / "layers" / f"{sha256_digest(tar).partition(':')[2]}.afslyr")


class LocalOpener(Opener):
    """Opens a layer that needs no layerstore."""

    def __init__(self, directory: Path, mounts: LayerMounts) -> None:
        super().__init__(mounts, f"unix:{directory}/none")
        (self._file,) = (directory / "layers").iterdir()
        self._layers = mounts

    @override
    async def open_image(self, stack: contextlib.AsyncExitStack, name: pb.ImageName, *, force_local: bool) -> Opened:
        layer = await stack.enter_async_context(self._layers.using(f"sha256:{self._file.stem}", str(self._file)))
        return Opened(pb.Image(key="test linux/amd64"), [layer], {}, 0)


class Snapshotter:
    """The parts of one, without services."""

    def __init__(self, directory: Path, *, keep: bool = False) -> None:
        self.workers = FusedWorkers(directory / "fuse", directory / "faults", directory / "fill.sock", 1.0, 0)
        backends = Backends((Trial(Backend.FILE, lazy=False),))
        self.mounts = LayerMounts(directory / "l", self.workers, backends, 0)
        self.roots = Roots(directory / "roots", directory / "base", self.mounts)
        self.opener = LocalOpener(directory, self.mounts)
        self.attached = AttachedRoots(directory / "attached", self.opener, self.roots, self.mounts, keep=keep)

    async def attach(self, target: Path, **wanted: Any) -> None:
        """Attach the image."""
        await self.attached.attach(NAME, RootRequest(target=str(target), **wanted), force_local=False)


@contextlib.asynccontextmanager
async def snapshotter(directory: Path, *, keep: bool = False) -> AsyncIterator[Snapshotter]:
    """A snapshotter that starts and stops as afs_snapshotter does."""
    running = Snapshotter(directory, keep=keep)
    running.roots.prepare()
    await running.workers.adopt()
    await running.mounts.adopt()
    await running.attached.adopt()
    await running.mounts.drop_unclaimed()
    try:
        async with running.opener:
            yield running
    finally:
        await running.attached.close()
        await running.roots.close(keep_base=bool(running.attached.records()))
        await running.mounts.close(keep_used=keep or running.roots.staying)
        await running.workers.close(keep=running.mounts.workers())


class Attaching(Scenario):
    """Attach a root, detach it."""

    calls: ClassVar[Sequence[tuple[Any, str, bool]]] = (
        (syscalls, "mount", True),
        (syscalls.MountContext, "mount", True),
        (syscalls, "umount", False),
    )

    @override
    def prepare(self, root: Path) -> None:
        make_layer(root)
        for name in ("at", "uppers"):
            (root / name).mkdir()

    @override
    def work(self, root: Path) -> None:
        async def act() -> None:
            async with snapshotter(root) as running:
                await running.attach(root / "at", proc_dev=True, upper_dir=str(root / "uppers"))
                os.mkdir(root / "at/kept")
                await running.attached.detach(root / "at")

        asyncio.run(act())

    @override
    def failed(self, root: Path, error: Exception) -> None:
        assert "No space left" in str(error), error
        assert not list_mounts(str(root))

    @override
    def check(self, root: Path) -> None:
        async def look() -> None:
            async with snapshotter(root) as running:
                records = running.attached.records()
                if not records:
                    assert not [mount for mount in list_mounts(str(root)) if mount.fstype != "erofs"]
                    assert not list((root / "attached").iterdir())
                    return
                assert [record.root.home for record in records] == list((root / "attached").iterdir())
                assert (root / "at/a").read_bytes() == b"a"
                if records[0].root.proc_dev:
                    assert (root / "at/dev/null").is_char_device()
                    assert (root / "at/proc/self").exists()
                (root / "at/kept").mkdir(exist_ok=True)
                await running.attached.detach(root / "at")

        try:
            asyncio.run(look())
            assert not list_mounts(str(root))
            assert [path for name in ("attached", "l") for path in (root / name).iterdir()] == []
            assert {path.name for path in (root / "uppers").iterdir()} <= {"upper"}
            if (root / "uppers/upper").exists():
                assert [path.name for path in (root / "uppers/upper").iterdir()] in ([], ["kept"])
        finally:
            unmount_below(root)


class Restarting(Attaching):
    """Stop with a root attached, start, and stop for good."""

    modes: ClassVar[Sequence[Mode]] = ("kill",)

    @override
    def work(self, root: Path) -> None:
        async def act() -> None:
            async with snapshotter(root, keep=True) as running:
                await running.attach(root / "at")
            async with snapshotter(root) as running:
                assert len(running.attached.records()) == 1

        asyncio.run(act())


@pytest.mark.parametrize("scenario", [Attaching, pytest.param(Restarting, marks=pytest.mark.slow)])
def test_whatever_ends_it_the_next_one_adopts_or_clears(tmp_path: Path, scenario: type[Scenario]) -> None:
    """Ended at every call that changes something, and failed there."""
    killed, failed = crash_everywhere(scenario, tmp_path)
    assert killed > 20
    assert (failed > 10) == ("enospc" in scenario.modes)


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Path]:
    """With a layer, and a look that nothing stays mounted."""
    make_layer(tmp_path)
    for name in ("at", "other", "uppers"):
        (tmp_path / name).mkdir()
    yield tmp_path
    left = list_mounts(str(tmp_path))
    unmount_below(tmp_path)
    assert left == []


def homes(directory: Path) -> list[Path]:
    """What is there of attached roots."""
    return list((directory / "attached").iterdir())


async def test_a_root_in_use_stays_as_it_is(directory: Path) -> None:
    at = directory / "at"
    async with snapshotter(directory) as running:
        await running.attach(at, proc_dev=True)
        before = list_mounts(str(at))
        (at / "dev/shm/data").write_text("in memory")
        (at / "dev/mine").write_text("too")
        fd = os.open(at / "a", os.O_RDONLY)
        with pytest.raises(
            FailedPrecondition, match=f"^{at} is in use: a process works in it or has a file of it open$"
        ):
            await running.attached.detach(at)
        os.close(fd)
        assert list_mounts(str(at)) == before
        assert ((at / "dev/shm/data").read_text(), (at / "dev/mine").read_text()) == ("in memory", "too")
        with (at / "dev/shm/data").open(), pytest.raises(FailedPrecondition, match=f"^{at} is in use: a process"):
            await running.attached.detach(at)
        assert list_mounts(str(at)) == before
        assert (at / "dev/null").is_char_device()
        (at / "mnt").mkdir()
        syscalls.mount(str(directory / "other"), str(at / "mnt"), "", syscalls.MS_BIND)
        with pytest.raises(FailedPrecondition, match=f"^{at} is in use: {at}/mnt is mounted in it$"):
            await running.attached.detach(at)
        unmount(str(at / "mnt"))
        syscalls.mount("tmpfs", str(at), "tmpfs")
        with pytest.raises(FailedPrecondition, match=f"^another file system is mounted over {at}$"):
            await running.attached.detach(at)
        unmount(str(at))
        assert len(running.attached.records()) == 1
        await running.attached.detach(at)
        assert homes(directory) == []


async def test_where_somebody_bound_a_root_it_stays(directory: Path) -> None:
    """With its layers and what was written, until the next start finds it gone."""
    at, other = directory / "at", directory / "other"
    async with snapshotter(directory) as running:
        await running.attach(at, proc_dev=True)
        (at / "written").write_text("w")
        syscalls.mount(str(at), str(other), "", syscalls.MS_BIND)
        await running.attached.detach(at)
        assert list_mounts(str(at)) == []
        assert ((other / "a").read_bytes(), (other / "written").read_text()) == (b"a", "w")
        (layer,) = running.mounts.mounted()
        assert layer.users == 1
    async with snapshotter(directory) as running:
        assert (other / "written").read_text() == "w"
        await running.attach(at)
        await running.attached.detach(at)
        assert (other / "a").read_bytes() == b"a"
    unmount(str(other))
    async with snapshotter(directory):
        assert homes(directory) == []


async def test_a_place_has_one_root(directory: Path) -> None:
    at, other = directory / "at", directory / "other"
    async with snapshotter(directory) as running:
        results = await asyncio.gather(*(running.attach(at) for _ in range(3)), return_exceptions=True)
        assert [type(result) for result in results if result] == [AlreadyExists, AlreadyExists], results
        async with contextlib.AsyncExitStack() as stack:
            _, layers, *_rest = await running.opener.open_image(stack, NAME, force_local=False)
            with pytest.raises(AlreadyExists, match=f"^a root is mounted at {at} already$"):
                await running.roots.mount_root(stack, layers, RootRequest(target=str(at)))
            await running.roots.mount_root(stack, layers, RootRequest(target=str(other)))
            with pytest.raises(AlreadyExists):
                await running.attach(other)
            with pytest.raises(FailedPrecondition, match=f"^the root at {other} belongs to a program that runs"):
                await running.attached.detach(other)
        await running.attach(other)
        with pytest.raises(NotFound, match=f"^no root is attached at {directory}$"):
            await running.attached.detach(directory)
        assert len(homes(directory)) == 2
    assert homes(directory) == []


async def test_an_upper_directory_of_the_user_s(directory: Path) -> None:
    at, uppers = directory / "at", directory / "uppers"
    async with snapshotter(directory) as running:
        for content in ("first", "second"):
            await running.attach(at, upper_dir=str(uppers))
            with pytest.raises(FailedPrecondition, match=f"^upper directory {uppers}/upper is in use by another root$"):
                await running.attach(directory / "other", upper_dir=str(uppers))
            (at / content).write_text(content)
            assert await running.attached.detach(at) == uppers / "upper"
            assert [path.name for path in uppers.iterdir()] == ["upper"]
        assert sorted(path.name for path in (uppers / "upper").iterdir()) == ["first", "second"]
        with pytest.raises(InvalidArgument, match=r"^a read-only root has no upper directory$"):
            await running.attach(at, upper_dir=str(uppers), read_only=True)


@pytest.mark.parametrize("fails", [False, True])
async def test_nothing_of_the_user_s_is_touched_beside_the_upper_directory(directory: Path, fails: bool) -> None:
    at, uppers = directory / "at", directory / "uppers"
    (uppers / "work").mkdir()
    (uppers / "work/thesis").write_text("precious")
    async with snapshotter(directory) as running:
        if fails:
            with pytest.raises(FailedPrecondition, match="is not a directory in the image"):
                await running.attach(at, upper_dir=str(uppers), proc_dev=True, extra_dirs=[str(hiding(directory))])
            assert [path.name for path in uppers.iterdir()] == ["work"], "not even an empty upper directory"
        else:
            await running.attach(at, upper_dir=str(uppers))
            (made,) = {path.name for path in uppers.iterdir()} - {"upper", "work"}
            assert (uppers / made).stat().st_mode & 0o777 == 0o700
            await running.attached.detach(at)
            assert {path.name for path in uppers.iterdir()} == {"upper", "work"}
    assert (uppers / "work/thesis").read_text() == "precious"
    assert homes(directory) == []


def hiding(directory: Path) -> Path:
    """A directory with a file where a mount point for --mount-proc-dev has to be."""
    path = directory / "hiding"
    path.mkdir()
    (path / "dev").touch()
    return path


@pytest.mark.parametrize("kind", ["symlink", "file"])
async def test_what_cannot_be_an_upper_directory(directory: Path, kind: str) -> None:
    upper = directory / "uppers/upper"
    if kind == "symlink":
        upper.symlink_to(directory / "other")
    else:
        upper.write_text("mine")
    async with snapshotter(directory) as running:
        with pytest.raises(FailedPrecondition, match=f"^{upper} is not a directory$"):
            await running.attach(directory / "at", upper_dir=str(upper.parent))
    assert [path.name for path in upper.parent.iterdir()] == ["upper"]
    assert [list((directory / "other").iterdir()), homes(directory)] == [[], []]


async def test_what_a_killed_one_held_leaves_no_work_directory(directory: Path) -> None:
    running = Snapshotter(directory)
    running.roots.prepare()
    await running.mounts.adopt()
    stack = contextlib.AsyncExitStack()
    _, layers, *_rest = await running.opener.open_image(stack, NAME, force_local=False)
    wanted = RootRequest(target=str(directory / "at"), upper_dir=str(directory / "uppers"))
    await running.roots.mount_root(stack, layers, wanted)
    assert len(list((directory / "uppers").iterdir())) == 2
    async with snapshotter(directory):
        assert [path.name for path in (directory / "uppers").iterdir()] == ["upper"]
    stack.pop_all()
    running.mounts._closed = True  # killed


async def test_a_root_that_cannot_be_unmounted_keeps_its_layers(directory: Path) -> None:
    """Until the next snapshotter has tried again."""
    at = directory / "at"
    async with snapshotter(directory) as running:
        await running.attach(at)
        syscalls.mount("tmpfs", str(at), "tmpfs")
    (home,) = homes(directory)
    assert (home / "upper").is_dir()
    assert [mount.fstype for mount in list_mounts(str(directory / "l"))] == ["erofs"]
    async with snapshotter(directory) as running:
        assert [(layer.users, homes(directory)) for layer in running.mounts.mounted()] == [(1, [home])]
        unmount(str(at))
        assert (at / "a").read_bytes() == b"a"
    async with snapshotter(directory) as running:
        assert (homes(directory), list_mounts(str(directory))) == ([], [])


async def test_a_root_that_was_unmounted_by_hand_is_forgotten(directory: Path) -> None:
    at = directory / "at"
    async with snapshotter(directory, keep=True) as running:
        await running.attach(at)
        unmount(str(at))
        await running.attached.sweep()
        assert (running.attached.records(), homes(directory)) == ([], [])
        assert running.mounts.mounted() == [], "its layers are nobody's any more"
        await running.attach(at)
    unmount(str(at))
    async with snapshotter(directory) as running:
        assert (running.attached.records(), homes(directory)) == ([], [])
        assert list_mounts(str(directory)) == []


async def test_records_that_are_not_to_be_adopted(directory: Path) -> None:
    at = directory / "at"

    def of_an_earlier_boot(record: Path) -> None:
        record.write_text(record.read_text().replace('"boot": "', '"boot": "x'))

    def of_another_version(record: Path) -> None:
        record.write_text(record.read_text().replace('"version": 1', '"version": 2'))

    for spoil in (of_an_earlier_boot, of_another_version, Path.unlink, lambda record: record.write_bytes(b"{\xff")):
        async with snapshotter(directory, keep=True) as running:
            await running.attach(at)
        (home,) = homes(directory)
        spoil(home / "record.json")
        async with snapshotter(directory) as running:
            assert (running.attached.records(), homes(directory)) == ([], [])
            assert not list_mounts(str(at))


async def test_readers_go_on_over_a_restart(directory: Path) -> None:
    at = directory / "at"
    async with snapshotter(directory, keep=True) as running:
        await running.attach(at)
        (at / "written").write_text("w")
    with (at / "a").open("rb") as file:
        async with snapshotter(directory, keep=True) as running:
            assert file.read() == b"a"
            assert [layer.users for layer in running.mounts.mounted()] == [1]
            assert running.mounts.leases().kept == running.mounts.leases().in_use != []
            assert sorted(path.name for path in at.iterdir()) == ["a", "dev", "proc", "sys", "written"]
    async with snapshotter(directory, keep=True) as running:
        await running.attached.detach(at)
        assert not running.mounts.leases().kept


@pytest.mark.parametrize("name", [b"co:lon", b"com,ma", b"back\\slash", b"sp ace", b"new\nline", b"x\xff", b"#"])
async def test_odd_names(directory: Path, name: bytes) -> None:
    at, uppers = directory / os.fsdecode(name), directory / "uppers" / os.fsdecode(name)
    at.mkdir()
    uppers.mkdir()
    async with snapshotter(directory, keep=True) as running:
        await running.attach(at, upper_dir=os.fsencode(uppers), extra_dirs=[os.fsencode(directory / "other")])
        (at / "written").touch()
    async with snapshotter(directory) as running:
        assert [record.root.path for record in running.attached.records()] == [at]
        assert await running.attached.detach(at) == uppers / "upper"
        assert (uppers / "upper/written").exists()


async def test_a_symlink_leads_where_it_led_when_it_was_mounted(directory: Path) -> None:
    link = directory / "link"
    link.symlink_to("at")
    async with snapshotter(directory) as running:
        await running.attach(link)
        link.unlink()
        link.symlink_to("other")
        assert [record.root.path for record in running.attached.records()] == [directory / "at"]
        await running.attached.detach(directory / "at")


@pytest.mark.parametrize("kind", ["proc", "dev", "sys"])
@pytest.mark.parametrize("content", ["symlink", "file"])
async def test_mount_points_that_lead_elsewhere(tmp_path: Path, kind: str, content: str) -> None:
    """Of a hostile image: nothing is mounted outside its root, and nothing stays mounted."""
    outside = tmp_path / "outside"
    outside.mkdir()
    tar = tars.tar_of({kind: b"file"}) if content == "file" else tars.tar_of({kind: str(outside)})
    make_layer(tmp_path, tar)
    (tmp_path / "at").mkdir()
    async with snapshotter(tmp_path) as running:
        with pytest.raises(FailedPrecondition, match=f"^cannot mount on {tmp_path}/at/{kind}: it is not a directory"):
            await running.attach(tmp_path / "at", proc_dev=True)
        assert [mount.fstype for mount in list_mounts(str(tmp_path))] in ([], ["erofs"])
        assert homes(tmp_path) == []
        await running.attach(tmp_path / "at")


@pytest.mark.parametrize("suid", [False, True])
async def test_setuid_programs_of_an_image_are_so_on_demand(directory: Path, suid: bool) -> None:
    at = directory / "at"
    async with snapshotter(directory) as running:
        await running.attach(at, suid=suid)
        assert bool(os.statvfs(at).f_flag & os.ST_NOSUID) != suid
        async with contextlib.AsyncExitStack() as stack:
            _, layers, *_rest = await running.opener.open_image(stack, NAME, force_local=False)
            held = await running.roots.mount_root(stack, layers, RootRequest())
            assert not os.statvfs(held.path).f_flag & os.ST_NOSUID, "a container needs them"
        assert (directory / "l").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("how", ["unmounted", "covered", "removed"])
async def test_a_layer_that_somebody_unmounted(directory: Path, how: str) -> None:
    """No root lacks it: neither one over layers that were opened before, nor the next."""
    at = directory / "at"
    async with snapshotter(directory) as running:
        await running.attach(directory / "other")
        async with contextlib.AsyncExitStack() as stack:
            _, layers, *_rest = await running.opener.open_image(stack, NAME, force_local=False)
            (old,) = layers
            if how == "covered":
                syscalls.mount("tmpfs", str(old.path), "tmpfs")
            else:
                syscalls.umount(str(old.path), syscalls.MNT_DETACH)
            if how == "removed":
                old.path.rmdir()
            with pytest.raises(FailedPrecondition, match=f"was unmounted, or covered, at {old.path} by somebody"):
                await running.roots.mount_root(stack, layers, RootRequest(target=str(at)))
        await running.attach(at)
        assert (at / "a").read_bytes() == b"a"
        assert (directory / "other/a").read_bytes() == b"a"
        assert [layer.path for layer in running.mounts.mounted()] != [old.path]
    assert not list((directory / "l").iterdir())


async def test_what_a_killed_one_held_is_detached(directory: Path) -> None:
    """Its processes read on; the place and the upper directory are free again."""
    at = directory / "at"
    running = Snapshotter(directory)
    running.roots.prepare()
    await running.mounts.adopt()
    stack = contextlib.AsyncExitStack()
    _, layers, *_rest = await running.opener.open_image(stack, NAME, force_local=False)
    await running.roots.mount_root(stack, layers, RootRequest(target=str(at), proc_dev=True))
    with (at / "a").open("rb") as file:
        async with snapshotter(directory) as successor:
            assert not list_mounts(str(at))
            assert not list((directory / "roots").iterdir())
            assert file.read() == b"a"
            await successor.attach(at)
    stack.pop_all()
    running.mounts._closed = True  # killed


async def test_a_directory_with_too_long_a_path(tmp_path: Path) -> None:
    """Mounts carry it as their source, which the kernel takes 255 bytes of."""
    deep = tmp_path / ("d" * 200) / ("e" * 100)
    make_layer(deep)
    with pytest.raises(InvalidArgument, match=f"^the path of {deep}/roots is longer than 230 bytes$"):
        Snapshotter(deep).roots.prepare()
