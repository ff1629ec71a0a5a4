"""Roots of limited size: the limit, what is used again, what is given back, full disks, and what a crash leaves."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import pytest
from typing_extensions import override

from afs.core import syscalls
from afs.core.errors import FailedPrecondition, InvalidArgument, ResourceExhausted, Unavailable, Unimplemented
from afs.core.mounts import list_mounts, mounts_from, unmount_below
from afs.core.rpc import serving
from afs.proto.v1 import mounts_pb2 as pb
from afs.proto.v1.mounts_pb2_grpc import add_MountsServicer_to_server
from afs.snapshotter import scratchpool
from afs.snapshotter.client import Mounts
from afs.snapshotter.messages import root_request
from afs.snapshotter.rootmount import RootRequest
from afs.snapshotter.roots import Roots
from afs.snapshotter.scratchfs import LEAST_BYTES, Scratch, lost_writes
from afs.snapshotter.scratchpool import ScratchPool
from afs.snapshotter.server import MountsService
from afs.snapshotter.shiftedids import Ids
from tests.fs.test_attached_roots import NAME, Snapshotter, make_layer
from tests.testbed import mounts
from tests.testbed.crashes import Scenario, crash_everywhere

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator, Sequence

    from afs.snapshotter.messages import MountedRoot

pytestmark = pytest.mark.root
MIB = 1 << 20
SIZE = 16 * MIB


class Node(Snapshotter):
    """A snapshotter without services, whose roots may be limited."""

    def __init__(self, directory: Path, **settings: Any) -> None:
        super().__init__(directory)
        chosen = {"keep": 4, "idle_s": 600.0, "reserve": MIB} | settings
        self.scratch = ScratchPool(directory / "scratch", **chosen)
        self.roots = Roots(directory / "roots", directory / "base", self.mounts, self.scratch)

    @contextlib.asynccontextmanager
    async def root(self, size: int = SIZE) -> AsyncIterator[MountedRoot]:
        """A root without layers that takes *size* bytes."""
        async with contextlib.AsyncExitStack() as stack:
            yield await self.roots.mount_root(stack, [], RootRequest(disk_bytes=size))


@contextlib.asynccontextmanager
async def node(directory: Path, **settings: Any) -> AsyncIterator[Node]:
    """One that starts and stops as afs_snapshotter does."""
    if not (directory / "layers").exists():
        make_layer(directory)
    running = Node(directory, **settings)
    try:
        await asyncio.to_thread(running.roots.prepare)
        await asyncio.to_thread(running.scratch.prepare)
        await running.mounts.adopt()
        async with running.opener:
            yield running
    finally:
        await running.roots.close()
        await running.scratch.close()
        await running.mounts.close()
        await running.workers.close(keep=set())


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Path]:
    """A directory, and a look that nothing of it stays mounted, on a loop device or on the disk."""
    yield tmp_path
    left = list_mounts(str(tmp_path))
    unmount_below(tmp_path)
    assert left == []
    assert_no_loops(tmp_path)
    for scratch in tmp_path.glob("**/scratch"):
        assert list(scratch.iterdir()) == []


def assert_no_loops(below: Path) -> None:
    """Fail if a loop device is over a file below a directory, deleted or not."""
    deadline = time.monotonic() + 5.0
    while (left := loops(below)) and time.monotonic() < deadline:
        time.sleep(0.02)  # other programs open any loop device for a moment, and the last one to close it ends it
    assert left == []


def loops(below: Path) -> list[str]:
    """The files below a directory that loop devices are over."""
    found = []
    for file in Path("/sys/block").glob("loop*/loop/backing_file"):
        with contextlib.suppress(OSError):  # cleared meanwhile
            found.append(file.read_text().strip())
    return [path for path in found if path.startswith(f"{below}/")]


def mounted(directory: Path) -> int:
    """How many scratch file systems there are, used or not."""
    files = len(list((directory / "scratch").glob("*.img")))
    assert len(list_mounts(str(directory / "scratch"))) == files
    return files


def fill(path: Path, byte: bytes = b"\xa5") -> int:
    """Write to a file until that fails; how many bytes it has then."""
    with path.open("ab", buffering=0) as file, pytest.raises(OSError, match="No space left"):
        while True:
            file.write(byte * MIB)
    return path.stat().st_size


def written_back(path: Path) -> None:
    """Have a file in a scratch file system written to the disk: not through the root, where fsync does nothing."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@pytest.mark.parametrize("size", [1, 10 * MIB + 1, 33 * MIB, 200 * MIB])
async def test_as_much_can_be_written_as_was_asked_for(directory: Path, size: int) -> None:
    async with node(directory) as running, running.root(size) as root:
        status = os.statvfs(root.path)
        usable = status.f_bavail * status.f_frsize
        least = max(-(-size // MIB) * MIB, LEAST_BYTES)
        assert least <= usable <= least * 1.001 + 300 * 1024
        assert size <= fill(root.path / "file") <= usable
        (root.path / "file").unlink()
        assert least <= fill(root.path / "other") <= usable


async def test_empty_files_are_limited_too(directory: Path) -> None:
    async with node(directory) as running, running.root(4 * MIB) as root:
        count = 0
        with pytest.raises(OSError, match="No space left"):
            while True:
                os.close(os.open(root.path / str(count), os.O_CREAT | os.O_WRONLY))
                count += 1
        assert 1000 < count < 1400  # one for each 4 KiB


async def test_small_files_end_with_the_bytes(directory: Path) -> None:
    async with node(directory) as running, running.root(4 * MIB) as root:
        for number in range(900):
            (root.path / str(number)).write_bytes(b"x" * 4000)


async def test_the_next_root_sees_nothing_of_the_last(directory: Path) -> None:
    async with node(directory) as running:
        async with running.root() as root:
            assert root.upper is not None
            first = root.upper
            (root.path / "secret").mkdir()
            (root.path / "secret/name").symlink_to("target")
            fill(root.path / "file")
            written_back(root.upper / "file")
        await running.scratch.settle()
        async with running.root() as root:
            assert root.upper == first
            assert sorted(os.listdir(first.parent)) == ["lost+found", "upper", "work"]
            assert os.listdir(first) == []
            with (root.path / "file").open("wb+") as file:  # blocks that were written by the last one
                os.posix_fallocate(file.fileno(), 0, SIZE)
                assert file.read() == bytes(SIZE)


async def test_sizes_have_their_own(directory: Path) -> None:
    async with node(directory) as running:
        async with running.root(8 * MIB) as root:
            small = root.upper
        async with running.root(SIZE) as root:
            assert root.upper != small
        async with running.root(8 * MIB - 5) as root:
            assert root.upper == small


async def test_space_is_given_back(directory: Path) -> None:
    async with node(directory) as running:
        async with running.root(64 * MIB) as root:
            assert root.upper is not None
            image = root.upper.parent.with_suffix(".img")
            (root.path / "file").write_bytes(os.urandom(40 * MIB))
            written_back(root.upper / "file")
            assert image.stat().st_blocks * 512 > 40 * MIB
        await running.scratch.settle()
        assert image.stat().st_blocks * 512 < 2 * MIB
        assert image.stat().st_size > 64 * MIB
        async with running.root(64 * MIB) as root:
            assert root.upper is not None
            assert root.upper.parent.with_suffix(".img") == image


async def test_unused_ones_go(directory: Path) -> None:
    async with node(directory, keep=2) as running:
        async with running.root(), running.root(), running.root():
            assert mounted(directory) == 3
        await running.scratch.settle()
        assert mounted(directory) == 2
    async with node(directory, idle_s=0.0) as running:
        async with running.root():
            pass
        while list_mounts(str(directory / "scratch")):
            await asyncio.sleep(0)
            await running.scratch.settle()


async def test_many_at_once(directory: Path) -> None:
    async def use(running: Node, number: int) -> Path:
        async with running.root() as root:
            assert root.upper is not None
            assert os.listdir(root.upper) == []
            (root.path / f"of {number}").write_text(str(number))
            await asyncio.sleep(0)
            assert os.listdir(root.upper) == [f"of {number}"]
            return root.upper

    async with node(directory) as running:
        await asyncio.gather(*(use(running, number) for number in range(40)))
        await running.scratch.settle()
        assert mounted(directory) == 4


async def test_a_cancelled_request_leaves_nothing(directory: Path) -> None:
    async with node(directory, keep=0) as running:
        for _ in range(10):
            task = asyncio.create_task(running.root().__aenter__())
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        await running.roots.close()
        await running.scratch.settle()
        assert mounted(directory) == 0
        assert list((directory / "roots").iterdir()) == []


@contextlib.contextmanager
def file_open(root: Path) -> Iterator[None]:
    """A file of a root stays open, and is there at the end."""
    (root / "file").write_bytes(b"x")
    with (root / "file").open("rb") as file:
        yield
        assert file.read() == b"x"


@contextlib.contextmanager
def seen_elsewhere(root: Path) -> Iterator[None]:
    """A process works in a root, in a mount namespace that no unmounting here reaches."""
    argv = ["unshare", "--mount", "--propagation=private", "sh", "-c", 'cd "$0" && echo && read nothing', str(root)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"\n"
        yield
        process.communicate()


@pytest.mark.parametrize("using", [file_open, seen_elsewhere])
async def test_one_that_is_still_used_is_dropped(
    directory: Path, using: Callable[[Path], contextlib.AbstractContextManager[None]]
) -> None:
    async with node(directory) as running:
        with contextlib.ExitStack() as stack:
            async with running.root() as root:
                first = root.upper
                stack.enter_context(using(root.path))
            await running.scratch.settle()
            async with running.root() as root:
                assert root.upper != first
        await running.scratch.settle()
        assert mounted(directory) == 1


async def test_one_that_is_used_a_moment_longer_is_kept(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked = asyncio.Event()
    real = Scratch.is_empty

    def is_empty(scratch: Scratch) -> bool:
        try:
            return real(scratch)
        finally:
            looked.set()

    monkeypatch.setattr(Scratch, "is_empty", is_empty)
    async with node(directory) as running:
        async with running.root() as root:
            first = root.upper
            (root.path / "file").write_bytes(b"x")
            file = (root.path / "file").open("rb")
            looked.clear()
        await looked.wait()
        file.close()
        await running.scratch.settle()
        async with running.root() as root:
            assert root.upper == first


async def test_a_damaged_one_is_dropped(directory: Path) -> None:
    async with node(directory) as running:
        async with running.root() as root:
            assert root.upper is not None
            first = root.upper
            (root.path / "file").write_bytes(b"x")
            name = next(mount.source for mount in list_mounts(str(first.parent)))
            Path("/sys/fs/ext4", Path(name).name, "trigger_fs_error").write_text("a test")
        await running.scratch.settle()
        assert mounted(directory) == 0
        async with running.root() as root:
            assert root.upper != first


async def test_one_that_was_unmounted_by_hand_is_not_used(directory: Path) -> None:
    async with node(directory) as running:
        async with running.root() as root:
            assert root.upper is not None
            first = root.upper.parent
        mounts.umount(first)
        async with running.root() as root:
            assert root.upper is not None
            assert root.upper.parent != first


class Limited(Scenario):
    """Two roots of one size, one after the other."""

    calls: ClassVar[Sequence[tuple[Any, str, bool]]] = (
        (syscalls, "mount", True),
        (syscalls, "attach_loop", True),
        (syscalls.MountContext, "mount", True),
        (syscalls, "umount", False),
    )

    @override
    def prepare(self, root: Path) -> None:
        make_layer(root)

    @override
    def work(self, root: Path) -> None:
        async def act() -> None:
            async with node(root) as running:
                for _ in range(2):
                    async with running.root(LEAST_BYTES) as made:
                        made.path.joinpath("file").write_bytes(b"x")

        asyncio.run(act())

    @override
    def failed(self, root: Path, error: Exception) -> None:
        assert "No space left" in str(error), error
        assert not list_mounts(str(root))
        assert_no_loops(root)

    @override
    def check(self, root: Path) -> None:
        async def look() -> None:
            async with node(root) as running:
                assert_no_loops(root)
                async with running.root() as made:
                    made.path.joinpath("file").write_bytes(b"x")

        try:
            asyncio.run(look())
            assert not list_mounts(str(root))
            assert_no_loops(root)
            assert [path for name in ("roots", "scratch") for path in (root / name).iterdir()] == []
        finally:
            unmount_below(root)


@pytest.mark.slow
def test_whatever_ends_it_the_next_one_clears(directory: Path) -> None:
    killed, failed = crash_everywhere(Limited, directory)
    assert killed > 20
    assert failed > 10


def test_what_a_killed_one_left_in_use_is_detached(directory: Path) -> None:
    make_layer(directory)
    program = f"""
import asyncio, signal
from pathlib import Path
from tests.fs.test_scratch_slots import node
async def main():
    async with node(Path({str(directory)!r})) as running, running.root() as root:
        (root.path / "file").write_bytes(b"x")
        print(root.path, flush=True)
        signal.pause()
asyncio.run(main())
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as killed:
        assert killed.stdout is not None
        path = Path(killed.stdout.readline().strip())
        file = (path / "file").open("rb")
        killed.send_signal(signal.SIGKILL)
    assert mounted(directory) == 1

    async def look() -> None:
        async with node(directory) as running:
            assert list((directory / "scratch").iterdir()) == []
            assert file.read() == b"x"
            file.close()
            assert_no_loops(directory)
            async with running.root():
                pass

    asyncio.run(look())


@pytest.fixture
def small_disk(directory: Path) -> Iterator[Path]:
    """A directory on an ext4 of 64 MiB."""
    image, at = directory / "disk", directory / "small"
    at.mkdir()
    with image.open("wb") as file:
        file.truncate(64 * MIB)
    subprocess.run(["mkfs.ext4", "-q", "-F", "-m", "0", image], check=True)
    subprocess.run(["mount", "-o", "loop", image, at], check=True)
    yield at
    left = list_mounts(str(at))[1:]
    unmount_below(at)
    assert left == []


def free(directory: Path) -> int:
    """Bytes of the disk."""
    status = os.statvfs(directory)
    return status.f_bavail * status.f_frsize


def occupied(disk: Path, but: int) -> Path:
    """A new file that takes all of the disk but that many bytes."""
    path = disk / "occupied"
    with path.open("wb") as file:
        size = 0
        for step in (MIB, 4096):
            with contextlib.suppress(OSError):
                while free(disk) >= but + step:
                    os.posix_fallocate(file.fileno(), size, step)
                    size += step
    return path


def fill_slowly(path: Path) -> int:
    """As fill(), with 128 MiB per second, for there is little time on a small disk."""
    with path.open("ab", buffering=0) as file, pytest.raises(OSError, match="No space left"):
        while True:
            file.write(b"\xa5" * (MIB // 4))
            time.sleep(0.002)
    return path.stat().st_size


async def test_a_full_disk_is_told_to_the_writer(small_disk: Path) -> None:
    """More is promised than there is; nothing that could be written is lost, and others find space."""
    async with node(small_disk, reserve=20 * MIB) as running:
        async with running.root(40 * MIB) as one, running.root(40 * MIB) as other:
            sizes = await asyncio.gather(*(asyncio.to_thread(fill_slowly, root.path / "file") for root in (one, other)))
            assert 20 * MIB < sum(sizes) < 60 * MIB
            for root, size in zip((one, other), sizes, strict=True):
                assert root.upper is not None
                await asyncio.to_thread(written_back, root.upper / "file")
                assert lost_writes(root.path) == ""
                assert not fills_on(root.path / "more")
                assert (root.path / "file").read_bytes() == b"\xa5" * size
                assert running.roots.was_full(root.path)
            with pytest.raises(ResourceExhausted, match=r"are free at .*/scratch, and 20\.0 MiB have to stay so"):
                async with running.root():
                    pass
            (one.path / "file").unlink()  # deleting works
        await running.scratch.settle()
        assert free(small_disk) > 40 * MIB
        await until(lambda: not running.scratch.full)
        async with running.root() as root:
            assert fills_on(root.path / "file")
            assert not running.roots.was_full(root.path)


async def test_writes_go_on_when_there_is_space_again(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scratchpool, "_RELAX", 4 * MIB)
    async with node(small_disk, reserve=2 * MIB) as running, running.root(SIZE) as root:
        path = occupied(small_disk, MIB)
        await until(lambda: running.scratch.full)
        assert not fills_on(root.path / "file")
        path.unlink()
        await until(lambda: not running.scratch.full)
        assert fills_on(root.path / "file")


async def until(state: Callable[[], bool]) -> None:
    """Wait for the pool to look at the disk, which it does at least once a second and tells nobody."""
    async with asyncio.timeout(20):
        while not state():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


def fills_on(path: Path) -> bool:
    """Whether 4 KiB more can be written."""
    with contextlib.suppress(OSError), path.open("ab", buffering=0) as file:
        return file.write(b"x" * 4096) > 0
    return False


@contextlib.asynccontextmanager
async def served(directory: Path, **settings: Any) -> AsyncIterator[Mounts]:
    """A client of a snapshotter's service."""
    async with node(directory, **settings) as running:
        service = MountsService(running.opener, running.roots, running.attached, running.mounts, running.workers)
        address = f"unix:{directory}/m"
        async with serving([address], lambda server: add_MountsServicer_to_server(service, server)):
            client = Mounts(address)
            try:
                yield client
            finally:
                await client.close()


async def test_lost_writes_are_told_after_the_run(small_disk: Path) -> None:
    """Others fill the disk faster than the pool looks."""
    image = pb.OpenImage(image=NAME.image)
    async with served(small_disk) as client:
        async with client.holding() as hold:
            _, root = await hold.open_and_mount(image, root_request(disk_bytes=20 * MIB))
            assert root.upper is not None
            await hold.check()
            (root.path / "file").write_bytes(b"x" * 15 * MIB)
            path = occupied(small_disk, 0)
            with pytest.raises(OSError, match=r"No space left|Input/output"):
                written_back(root.upper / "file")
            with pytest.raises(Unavailable, match=r"what was written to .*/merged could not all be kept"):
                await hold.check()
            path.unlink()
        async with client.holding() as hold:
            await hold.open(image)
            root = await hold.mount(root_request(disk_bytes=20 * MIB))
            (root.path / "file").write_bytes(b"x" * 15 * MIB)
            await hold.check()


async def test_what_cannot_be_limited(directory: Path) -> None:
    (directory / "upper").mkdir()
    with pytest.raises(InvalidArgument, match="read-only"):
        RootRequest(read_only=True, disk_bytes=1)
    with pytest.raises(InvalidArgument, match="upper_dir"):
        RootRequest(upper_dir=str(directory / "upper"), disk_bytes=1)
    async with served(directory) as client:
        wanted = root_request(target=directory / "upper", disk_bytes=MIB)
        with pytest.raises(Unimplemented, match="attached"):
            await client.attach(pb.OpenImage(image=NAME.image), wanted)
        async with client.holding() as hold:
            await hold.open(pb.OpenImage(image=NAME.image))
            root = await hold.mount(wanted)
            assert (root.path, (root.path / "a").read_bytes()) == (directory / "upper", b"a")
            assert MIB <= os.statvfs(root.path).f_bavail * os.statvfs(root.path).f_frsize < 8 * MIB


async def test_limits_and_shifted_ids_go_together() -> None:
    with tempfile.TemporaryDirectory(prefix="afs-") as name:
        directory = Path(name)
        directory.chmod(0o711)  # root of the user namespace has to pass
        async with node(directory) as running:
            for _ in range(2):
                async with contextlib.AsyncExitStack() as stack:
                    wanted = RootRequest(disk_bytes=SIZE, ids=Ids(700_000, 65536))
                    root = await running.roots.mount_root(stack, [], wanted)
                    assert root.upper is not None
                    writer = ["dd", "if=/dev/zero", f"of={root.path}/file", "bs=1M"]  # as root in the container
                    full = await asyncio.to_thread(
                        subprocess.run, writer, capture_output=True, user=700_000, group=700_000, extra_groups=[]
                    )
                    assert b"No space left" in full.stderr
                    assert SIZE <= (root.upper / "file").stat().st_size < SIZE + MIB
                    assert lost_writes(root.path) == ""
                    assert (root.path.stat().st_uid, root.upper.stat().st_uid) == (700_000, 0)
                await running.scratch.settle()
                assert mounted(directory) == 1
        assert list_mounts(name) == []
        assert_no_loops(directory)


_PROBE = """
import sys
import tempfile
import time
from pathlib import Path
from afs.snapshotter.scratchfs import probe_scratch
print(probe_scratch(Path(sys.argv[1])))
"""


def shell(script: str) -> Sequence[str]:
    """A command that runs its arguments after *script*, in a mount namespace of its own."""
    return ["unshare", "--mount", "--propagation=private", "sh", "-ec", f'{script}; exec "$@"', "sh"]


@pytest.mark.parametrize(
    ("within", "reason"),
    [
        ([], ""),
        (shell("mount -t tmpfs none /dev"), "no /dev/loop-control: the module loop is missing or blocked"),
        (shell("PATH=/nowhere"), "no mkfs.ext4: the package e2fsprogs is missing"),
        (["unshare", "--user", "--map-root-user", "--mount"], "not permitted here, as in a user namespace"),
    ],
    ids=["here", "no devices", "no program", "user namespace"],
)
def test_the_probe_says_why_not(directory: Path, within: Sequence[str], reason: str) -> None:
    argv = [*within, sys.executable, "-c", _PROBE, str(directory)]
    done = subprocess.run(argv, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert reason in done.stdout if reason else done.stdout == "\n"
    assert list(directory.iterdir()) == []


async def test_roots_without_a_limit_go_on_where_there_is_none(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scratchpool, "probe_scratch", lambda _: "no ext4")
    async with node(directory) as running:
        with pytest.raises(FailedPrecondition, match="the size of roots cannot be limited here: no ext4"):
            async with running.root():
                pass
        async with running.root(0) as root:
            assert root.upper == root.path.parent / "upper"


@pytest.mark.parametrize("name", ["plain", "with space", "tab\tand\nline", "back\\slash", "hash#", "\udcff", "a,b:c"])
def test_mounts_are_found_by_their_source(directory: Path, name: str) -> None:
    source = f"{directory}/{name}"
    for at, given in (("one", source), ("two", source), ("longer", f"{source}x"), ("other", f"x{source}")):
        (directory / at).mkdir()
        mounts.mount(given, directory / at, "tmpfs")
    try:
        assert [mount.target for mount in mounts_from(source)] == [f"{directory}/one", f"{directory}/two"]
        assert mounts_from(f"{source}/none") == []
    finally:
        unmount_below(directory)


@pytest.mark.parametrize("size", [0, SIZE])
async def test_a_covered_root_stays(directory: Path, size: int) -> None:
    """Who unmounts it by its number sees what is over it."""
    async with node(directory) as running:
        async with running.root(size) as root:
            mounts.mount("over", root.path, "tmpfs")
        assert root.upper is not None
        assert root.upper.exists()
        assert running.roots.staying
        mounts.umount(root.path)
        assert [mount.fstype for mount in list_mounts(str(root.path))] == ["overlay"]
    async with node(directory):
        assert list((directory / "roots").iterdir()) == []


@pytest.mark.parametrize("size", [0, SIZE])
async def test_a_root_that_is_bound_elsewhere_stays_there(directory: Path, size: int) -> None:
    (directory / "elsewhere").mkdir()
    async with node(directory) as running:
        async with running.root(size) as root:
            (root.path / "file").write_bytes(b"x")
            subprocess.run(["mount", "--bind", root.path, directory / "elsewhere"], check=True)  # noqa: ASYNC221
        assert running.roots.staying
        assert (directory / "elsewhere/file").read_bytes() == b"x"
    mounts.umount(directory / "elsewhere")
    async with node(directory):
        assert list((directory / "roots").iterdir()) == []


async def test_what_is_mounted_in_a_root_goes_with_it(directory: Path) -> None:
    async with node(directory) as running:
        async with running.root() as root:
            (root.path / "in").mkdir()
            mounts.mount("foreign", root.path / "in", "tmpfs")
        assert list((directory / "roots").iterdir()) == []
        assert not running.roots.staying
