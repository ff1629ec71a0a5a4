"""Files that appear whole, the table of mounts, and single flight."""

import asyncio
import builtins
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from afs.core import mounts, syscalls
from afs.core.errors import FailedPrecondition
from afs.core.files import locked, remove_tree, unlinked_on_error, write_atomic
from afs.core.singleflight import SingleFlight

# Files


def test_write_atomic_replaces_the_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomic(path, b"a much longer content")
    inode = path.stat().st_ino
    write_atomic(path, b"new")
    assert path.read_bytes() == b"new"
    assert path.stat().st_ino != inode
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_atomic(path, b"old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_unlinked_on_error(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with unlinked_on_error(path):
        path.touch()
    assert path.exists()
    with pytest.raises(KeyError), unlinked_on_error(path):
        raise KeyError
    assert not path.exists()
    with pytest.raises(KeyError), unlinked_on_error(path):  # it need not exist
        raise KeyError


def test_remove_tree_stays_inside(tmp_path: Path) -> None:
    outside, tree = tmp_path / "outside", tmp_path / "tree"
    outside.mkdir()
    (outside / "kept").touch()
    (tree / "a" / "b").mkdir(parents=True)
    (tree / "a" / "link").symlink_to(outside)
    (tree / "a" / "locked").mkdir(mode=0)
    os.mkfifo(tree / "fifo")
    remove_tree(tree)
    assert not tree.exists()
    assert (outside / "kept").exists()
    remove_tree(tree)  # again: it is no error


# Mounts

MOUNTINFO = rb"""1 0 8:1 / / rw,relatime shared:1 - ext4 /dev/root rw
2 1 0:20 / /proc rw - proc proc rw
3 1 0:21 / /a\040b\011c\012d\134e rw - tmpfs with\040space rw
4 3 0:22 / /a\040b\011c\012d\134e/x rw,nosuid master:2 propagate_from:1 - overlay afs rw,lowerdir=/x
5 1 0:23 / /ab rw - tmpfs tmpfs rw
6 1 0:24 / /odd\377 rw - tmpfs tmpfs rw
""".replace(rb"\377", b"\xff")


@pytest.fixture
def mountinfo(monkeypatch: pytest.MonkeyPatch) -> None:
    """A table with every escape of proc_pid_mountinfo(5)."""
    real = builtins.open

    def fake(path: Any, *args: Any, **kwargs: Any) -> Any:
        if path == "/proc/self/mountinfo":
            return io.TextIOWrapper(io.BytesIO(MOUNTINFO), **kwargs)
        return real(path, *args, **kwargs)

    monkeypatch.setattr(builtins, "open", fake)


@pytest.mark.usefixtures("mountinfo")
def test_mounts_are_unescaped() -> None:
    found = mounts.list_mounts()
    assert [mount.target for mount in found] == [
        "/", "/proc", "/a b\tc\nd\\e", "/a b\tc\nd\\e/x", "/ab", os.fsdecode(b"/odd\xff"),
    ]  # fmt: skip
    assert (found[2].fstype, found[2].source) == ("tmpfs", "with space")
    assert (found[3].fstype, found[3].source) == ("overlay", "afs")


@pytest.mark.usefixtures("mountinfo")
def test_below_means_whole_names() -> None:
    assert [mount.target for mount in mounts.list_mounts("/a b\tc\nd\\e")] == ["/a b\tc\nd\\e", "/a b\tc\nd\\e/x"]
    assert mounts.list_mounts("/a") == []
    assert mounts.list_mounts("/x") == []


def test_this_machine_has_proc() -> None:
    assert ("/proc", "proc") in {(mount.target, mount.fstype) for mount in mounts.list_mounts()}


def test_unmounting_what_is_not_mounted_is_no_error(tmp_path: Path) -> None:
    mounts.unmount(str(tmp_path / "missing"))
    if os.geteuid() == 0:  # others get EPERM first
        mounts.unmount(str(tmp_path))
    assert mounts.unmount_below(tmp_path) == 0


def test_mount_options_longer_than_a_page_are_refused(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="mount options are 4096 bytes, more than a page"):
        syscalls.mount("x", str(tmp_path), "overlay", 0, "x" * 4096)


def test_openat2_names_the_path(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("/etc")
    root = os.open(tmp_path, os.O_PATH)
    try:
        with pytest.raises(FileNotFoundError, match="'missing'"):
            syscalls.openat2(root, b"missing", os.O_PATH, 0)
        with pytest.raises(OSError, match=r"Invalid cross-device link: 'link'"):
            syscalls.openat2(root, b"link", os.O_PATH, syscalls.RESOLVE_BENEATH)
        fd = syscalls.openat2(root, b".", os.O_PATH, syscalls.RESOLVE_BENEATH)
        assert not os.get_inheritable(fd)
        os.close(fd)
    finally:
        os.close(root)


# Single flight


class Work:
    """Counts its runs and waits at a gate."""

    def __init__(self) -> None:
        self.runs = 0
        self.gate = asyncio.Event()
        self.started = asyncio.Event()
        self.error: Exception | None = None
        self.cancelled = 0

    async def __call__(self) -> int:
        self.runs += 1
        run = self.runs
        self.started.set()
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if self.error is not None:
            raise self.error
        return run


def asking(
    flights: SingleFlight[str, int], work: Callable[[], Any], count: int, key: str = "k"
) -> "list[asyncio.Task[int]]":
    """*count* callers."""
    return [asyncio.create_task(flights.run(key, work)) for _ in range(count)]


async def test_callers_share_a_run() -> None:
    flights, work = SingleFlight[str, int](), Work()
    callers = asking(flights, work, 5)
    other = asking(flights, work, 1, "other")
    await work.started.wait()
    work.gate.set()
    assert await asyncio.gather(*callers) == [1] * 5
    assert await other[0] == 2
    assert await flights.run("k", work) == 3  # nothing is remembered


async def test_a_caller_that_leaves_takes_nothing_away() -> None:
    flights, work = SingleFlight[str, int](), Work()
    callers = asking(flights, work, 2)
    await work.started.wait()
    callers[0].cancel()
    await asyncio.wait([callers[0]])
    assert callers[0].cancelled()
    work.gate.set()
    assert await callers[1] == 1
    assert (work.runs, work.cancelled) == (1, 0)


async def test_an_error_reaches_all_and_is_forgotten() -> None:
    flights, work = SingleFlight[str, int](), Work()
    work.error = KeyError("x")
    callers = asking(flights, work, 2)
    work.gate.set()
    results = await asyncio.gather(*callers, return_exceptions=True)
    assert [type(result) for result in results] == [KeyError, KeyError]
    work.error = None
    assert await flights.run("k", work) == 2


async def test_an_error_that_nobody_waits_for_is_quiet() -> None:
    flights, work = SingleFlight[str, int](), Work()
    (caller,) = asking(flights, work, 1)
    await work.started.wait()
    caller.cancel()
    await asyncio.wait([caller])
    work.error = KeyError("x")
    work.gate.set()
    await flights.close(cancel=False)


async def test_close_cancels_or_waits() -> None:
    flights, work = SingleFlight[str, int](), Work()
    (caller,) = asking(flights, work, 1)
    await work.started.wait()
    await flights.close(cancel=True)
    with pytest.raises(asyncio.CancelledError):
        await caller
    assert work.cancelled == 1
    (caller,) = asking(flights, work, 1)
    await asyncio.sleep(0)
    work.gate.set()
    await flights.close(cancel=False)
    assert await caller == 2


def test_trees_deeper_than_python_recurses_are_removed(tmp_path: Path) -> None:
    top = tmp_path / "top"
    top.mkdir()
    fd = os.open(top, os.O_RDONLY)
    for _ in range(1500):
        os.mkdir("d", dir_fd=fd)
        deeper = os.open("d", os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = deeper
    os.close(fd)
    remove_tree(top)
    assert not top.exists()


def test_one_program_per_directory(tmp_path: Path) -> None:
    first, second = locked(tmp_path / "lock", "afslet"), locked(tmp_path / "lock", "afslet")
    with first, pytest.raises(FailedPrecondition, match="in use by another afslet"), second:
        pass
    with locked(tmp_path / "lock", "afslet"):
        pass
