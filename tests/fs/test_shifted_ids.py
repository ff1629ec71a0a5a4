"""Roots whose owners appear shifted, and containers in user namespaces on them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import stat
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from afs.afslet.bundle import CAPABILITIES, IdMap, Sandbox
from afs.afslet.rootfs import User, find_command, make_directories, open_root
from afs.afslet.seccomp import load_filter
from afs.core import syscalls
from afs.core.errors import FailedPrecondition, InvalidArgument
from afs.core.mounts import list_mounts
from afs.snapshotter import overlay, shiftedids
from afs.snapshotter.rootmount import RootRequest
from afs.snapshotter.shiftedids import Ids
from tests.testbed import capabilities, tars
from tests.testbed.fillsource import FillSource
from tests.testbed.images import BUSYBOX
from tests.testbed.ourmounts import Kind, layer_mounts, roots_over
from tests.testbed.sandboxed import run_in

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from afs.snapshotter.messages import MountedRoot

pytestmark = pytest.mark.root

IDS = Ids(0x7000_0000, 65536)
LAYERS = (
    tars.directory("bin") + tars.file("bin/busybox", BUSYBOX.read_bytes(), mode=0o755) + tars.symlink("bin/sh", "busybox"),
    tars.directory("home/me", uid=1000, gid=1001)
    + tars.file("home/me/mine", b"#!/bin/sh\n", mode=0o700, uid=1000, gid=1001)
    + tars.file("home/me/ours", b"#!/bin/sh\n", mode=0o610, uid=1000, gid=1001)
    + tars.file("rootly", b"root's", mode=0o600)
    + tars.file("beyond", b"nobody's", uid=70000, gid=70000)
    + tars.directory("tmp", mode=0o1777),
)  # fmt: skip


@pytest.fixture
def source() -> Iterator[FillSource]:
    """Layers below a directory that other users may pass, and a look that nothing stays mounted."""
    capabilities.require("fuse", "runc")
    with tempfile.TemporaryDirectory(prefix="afs-test-", dir="/tmp") as name:
        Path(name).chmod(0o711)
        yield FillSource(Path(name))
        assert list_mounts(name) == []


@contextlib.asynccontextmanager
async def rooted(source: FillSource, kind: Kind, request: RootRequest) -> AsyncIterator[MountedRoot]:
    """A root over LAYERS."""
    layers = [kind.add(source, tar + tars.END) for tar in LAYERS]
    async with (
        layer_mounts(source, kind.backend) as mounts,
        roots_over(mounts, source.directory) as roots,
        contextlib.AsyncExitStack() as stack,
    ):
        used = [await stack.enter_async_context(mounts.using(layer.diff_id, kind.file(layer))) for layer in layers]
        yield await roots.mount_root(stack, used, request)


def owner(path: Path) -> tuple[int, int]:
    """User and group."""
    status = path.lstat()
    return status.st_uid, status.st_gid


@pytest.mark.parametrize("name", ["erofs-file-complete", "erofs-loop-complete", "erofs-file-lazy"])
async def test_owners_are_shifted_and_what_is_written_is_not(source: FillSource, name: str) -> None:
    kind = Kind(name)
    kind.require(source.directory)
    extra = source.directory / "extra"
    extra.mkdir()
    (extra / "uploaded").write_bytes(b"u")
    async with rooted(source, kind, RootRequest([str(extra)], ids=IDS)) as root:

        def look() -> None:
            first = IDS.first
            assert owner(root.path) == owner(root.path / "rootly") == owner(root.path / "uploaded") == (first, first)
            assert owner(root.path / "home/me/mine") == (first + 1000, first + 1001)
            assert owner(root.path / "beyond") == (65534, 65534)  # no id of the namespace: the overflow id
            assert root.upper is not None
            with pytest.raises(OSError, match="Value too large"):  # who has no id there makes nothing
                (root.path / "host").mkdir()
            with syscalls.creating_as(first, first):
                (root.path / "home/me/made").mkdir()
            os.chown(root.path / "home/me/made", first + 1000, first + 1001)
            (root.path / "home/me/mine").write_bytes(b"changed")
            assert owner(root.upper / "home/me/made") == owner(root.upper / "home/me/mine") == (1000, 1001)
            assert owner(root.upper / "home") == owner(root.upper) == (0, 0)
            assert owner(extra / "uploaded") == (0, 0)
            (source.directory / "after").touch()
            assert owner(source.directory / "after") == (0, 0)  # the thread makes files as before

        await asyncio.to_thread(look)
        # All that shifting took has gone: the layers' own mounts and the root are left.
        assert {mount.fstype for mount in list_mounts(str(source.directory / "r"))} == {"overlay"}


async def test_a_root_without_an_upper_directory(source: FillSource) -> None:
    kind = Kind("erofs-file-complete")
    kind.require(source.directory)
    async with rooted(source, kind, RootRequest(read_only=True, ids=IDS)) as root:
        assert owner(root.path / "rootly") == (IDS.first, IDS.first)


async def test_by_the_options_of_an_older_kernel(source: FillSource, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before Linux 6.13 overlayfs takes paths only, and many of them in a thread of its own."""
    monkeypatch.setattr(overlay, "best_way", lambda: "page")
    extra = [source.directory / f"{number}-{'x' * 100}" for number in range(40)]
    for directory in extra:
        directory.mkdir()
    kind = Kind("erofs-file-complete")
    kind.require(source.directory)
    async with rooted(source, kind, RootRequest(list(map(str, extra)), ids=IDS)) as root:
        assert owner(root.path / "home/me/mine") == (IDS.first + 1000, IDS.first + 1001)
        (root.path / "rootly").write_bytes(b"changed")
        assert root.upper is not None
        assert owner(root.upper / "rootly") == (0, 0)


async def test_trees_of_a_worker_cannot_be_shifted(source: FillSource) -> None:
    kind = Kind("tree-complete")
    with pytest.raises(
        FailedPrecondition, match=r"cannot be mounted with shifted ids: its file system, fuse\S*, has no"
    ):
        async with rooted(source, kind, RootRequest(ids=IDS)):
            pass
    assert list((source.directory / "r").iterdir()) == []


async def test_an_old_kernel(source: FillSource, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shiftedids, "_OLDEST", (99, 0))
    with pytest.raises(FailedPrecondition, match=r"a root with shifted ids needs Linux 99.0, here is \d"):
        async with rooted(source, Kind("erofs-file-complete"), RootRequest(ids=IDS)):
            pass


@pytest.mark.parametrize("ids", [(0, 1), (1, 0), (2**32 - 5, 10), (2**32, 1)])
def test_ids_that_are_none(ids: tuple[int, int]) -> None:
    with pytest.raises(InvalidArgument, match="ids cannot be shifted"):
        Ids(*ids)


async def test_root_of_the_namespace_may_pass(source: FillSource) -> None:
    kind = Kind("erofs-file-complete")
    kind.require(source.directory)
    async with rooted(source, kind, RootRequest(ids=IDS)) as root:
        home = root.path.parent
        assert (owner(home), stat.S_IMODE(home.stat().st_mode)) == ((0, IDS.first), 0o710)
        assert stat.S_IMODE(home.parent.stat().st_mode) == 0o711


async def test_homes_of_other_roots_are_closed(source: FillSource) -> None:
    kind = Kind("erofs-file-complete")
    kind.require(source.directory)
    async with rooted(source, kind, RootRequest()) as root:
        assert stat.S_IMODE(root.path.parent.stat().st_mode) == 0o700
        assert stat.S_IMODE(root.path.parent.parent.stat().st_mode) == 0o700


async def test_no_way_to_a_root(source: FillSource) -> None:
    source.directory.chmod(0o700)
    with pytest.raises(FailedPrecondition, match=rf"other users may not pass {source.directory} \(chmod o\+x\)"):
        async with rooted(source, Kind("erofs-file-complete"), RootRequest(ids=IDS)):
            pass


async def test_looking_into_a_shifted_root(source: FillSource) -> None:
    """What afslet asks and makes in a root before a command starts."""
    kind = Kind("erofs-file-complete")
    kind.require(source.directory)
    me, other = User(1000, 7, (), "/"), User(5, 5, (1001,), "/")

    def look(root: MountedRoot) -> None:
        with open_root(root.path) as fd:
            assert find_command(fd, "mine", "/", "/home/me", me, IDS.first).executable
            assert not find_command(fd, "mine", "/", "/home/me", other, IDS.first).executable
            assert find_command(fd, "ours", "/", "/home/me", other, IDS.first).executable
            assert not find_command(fd, "ours", "/", "/home/me", me, IDS.first).executable
            assert make_directories(fd, "/home/me/work/deep", 1000, 1001, IDS.first)
        assert owner(root.path / "home/me/work/deep") == (IDS.first + 1000, IDS.first + 1001)
        assert root.upper is not None
        assert owner(root.upper / "home/me/work") == owner(root.upper / "home/me/work/deep") == (1000, 1001)

    async with rooted(source, kind, RootRequest(ids=IDS)) as root:
        await asyncio.to_thread(look, root)


def sandbox() -> Sandbox:
    """As strict as runs are."""
    return Sandbox(1024, ids=IdMap(IDS.first, IDS.count), seccomp=load_filter("", CAPABILITIES))


async def test_a_container_in_a_user_namespace(source: FillSource) -> None:
    """Root inside is root in its tree and nobody outside, whether the layer is complete or comes in pieces."""
    kind = Kind("erofs-file-lazy")
    kind.require(source.directory)
    script = """
        b=/bin/busybox
        $b id -u; $b stat -c %u:%g /home/me/mine; $b cat /rootly; echo
        echo made > /made && $b chown 1000:1001 /made && $b mkdir /dir && $b rm -r /home
        $b cat /proc/self/uid_map; $b head -c 4 /dev/urandom | $b wc -c
        $b mknod /disk b 8 0 || echo no mknod
        $b mount -t tmpfs none /tmp || echo no mount
    """
    async with rooted(source, kind, RootRequest(ids=IDS)) as root:
        heard = await run_in(root.path, ["/bin/sh", "-c", script], sandbox())
        assert (heard.ended.code, heard.ended.start_error) == (0, ""), heard
        lines = heard.stdout.split("\n")
        assert lines[:3] == ["0", "1000:1001", "root's"]
        assert lines[3].split() == ["0", str(IDS.first), str(IDS.count)]
        assert lines[4:6] == ["4", "no mknod"]
        assert lines[6] == "no mount"
        assert root.upper is not None
        assert owner(root.upper / "made") == (1000, 1001)
        assert owner(root.upper / "dir") == (0, 0)
        whiteout = (root.upper / "home").lstat()
        assert stat.S_ISCHR(whiteout.st_mode)
        assert whiteout.st_rdev == 0


async def test_a_user_in_a_user_namespace(source: FillSource) -> None:
    kind = Kind("erofs-file-complete")
    kind.require(source.directory)
    script = "/bin/busybox cat /rootly; echo w > /home/me/new && /bin/busybox cat /home/me/mine /home/me/new"
    async with rooted(source, kind, RootRequest(ids=IDS)) as root:
        heard = await run_in(root.path, ["/bin/sh", "-c", script], sandbox(), uid=1000)
        assert (heard.ended.code, heard.stdout) == (0, "#!/bin/sh\nw\n"), heard
        assert "Permission denied" in heard.stderr
        assert root.upper is not None
        assert owner(root.upper / "home/me/new") == (1000, 1000)
