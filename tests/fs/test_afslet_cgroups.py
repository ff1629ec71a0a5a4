"""Control groups: those of the machine (v1 or v2), and v2 on a directory that looks like one."""

import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from afs.afslet import cgroups
from afs.afslet.cgroups import Cgroup, CgroupV2, Limits, clean_up, hierarchies, open_cgroup

pytestmark = pytest.mark.root
LIMITS = Limits(1.5, 64 << 20, 50)


@pytest.fixture
def parent() -> Iterator[str]:
    """A group of our own, gone afterwards."""
    name = f"afs-test-{uuid.uuid4().hex[:8]}"
    yield name
    clean_up(name)
    assert not [mount for mount in set(hierarchies().values()) if (mount / name).exists()]


@pytest.fixture
def group(parent: str) -> Iterator[Cgroup]:
    """A group of the version that this machine has."""
    made = open_cgroup(parent, "run", LIMITS)
    yield made
    made.kill()
    made.remove()


def directory(controller: str, parent: str) -> Path:
    """The directory of the group where a controller's files are."""
    found = hierarchies()
    return found.get("", found.get(controller, Path())) / parent / "run"


def inside(parent: str, program: str) -> "subprocess.Popen[bytes]":
    """A Python program in the container's group, as the runtime would start it."""
    files = set()
    for controller in ("memory", "pids"):
        files.add(directory(controller, parent) / "cgroup.procs")
    enter = "".join(f"open({str(file)!r}, 'w').write('0'); " for file in files)
    argv = [sys.executable, "-S", "-c", f"{enter}print('in', flush=True); {program}"]
    return subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def test_limits_are_written(parent: str, group: Cgroup) -> None:
    assert group.path == f"/{parent}/run"
    v1 = {
        ("memory", "memory.limit_in_bytes"): str(64 << 20),
        ("cpu", "cpu.cfs_quota_us"): "150000",
        ("cpu", "cpu.cfs_period_us"): "100000",
        ("pids", "pids.max"): "50",
    }
    v2 = {("memory", "memory.max"): str(64 << 20), ("cpu", "cpu.max"): "150000 100000", ("pids", "pids.max"): "50"}
    for (controller, name), value in (v2 if "" in hierarchies() else v1).items():
        assert (directory(controller, parent) / name).read_text().strip() == value
    assert not group.counters().oom
    assert not group.kill()


def test_processes_are_killed(parent: str, group: Cgroup) -> None:
    with inside(parent, "import sys; sys.stdin.read()") as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"in\n"
        assert group.kill()
        assert child.wait() == -9
        assert not group.counters().oom


def test_running_out_of_memory_is_counted(parent: str, group: Cgroup) -> None:
    with inside(parent, "x = bytearray(256 << 20)") as child:
        assert child.stdout is not None
        assert child.stdout.read() == b"in\n"
        assert child.wait() == -9
    counters = group.counters()
    assert counters.oom
    assert 32 << 20 < counters.peak_memory <= 64 << 20


def test_leftovers_are_cleaned_up(parent: str) -> None:
    left = open_cgroup(parent, "run", LIMITS)
    with inside(parent, "import sys; sys.stdin.read()") as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"in\n"
        assert clean_up(parent) == 1
        assert child.wait() == -9
    assert clean_up(parent) == 0
    left.remove()  # it is gone already


def test_v2_on_a_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel makes a group's files with its directory; here this does."""
    limits = ("memory.max", "memory.swap.max", "cpu.max", "pids.max")

    def make(path: str) -> None:
        (tmp_path / "cgroup.subtree_control").touch()
        (tmp_path / "parent").mkdir()
        (tmp_path / "parent" / "cgroup.subtree_control").touch()
        Path(path).mkdir()
        for name in limits:
            Path(path, name).touch()

    monkeypatch.setattr(os, "makedirs", make)
    monkeypatch.setattr(cgroups, "_is_member", lambda pid, group: True)
    group = CgroupV2(tmp_path, "parent", "run", LIMITS)
    top = tmp_path / "parent" / "run"
    assert group.path == "/parent/run"
    for directory in (tmp_path, tmp_path / "parent"):
        assert (directory / "cgroup.subtree_control").read_text() == "+cpu +memory +pids\n"
    written = {path.name: path.read_text().strip() for path in top.iterdir()}
    assert written == {
        "memory.max": str(64 << 20), "memory.swap.max": "0", "cpu.max": "150000 100000", "pids.max": "50",
    }  # fmt: skip
    (top / "memory.events").write_text("low 0\noom 1\noom_kill 0\n")
    (top / "cpu.stat").write_text("usage_usec 42\nuser_usec 40\n")
    counters = group.counters()
    assert (counters.oom, counters.peak_memory, counters.cpu_us) == (False, 0, 42)
    (top / "memory.events").write_text("oom 2\noom_kill 1\n")
    (top / "memory.peak").write_text("4096\n")
    counters = group.counters()
    assert (counters.oom, counters.peak_memory) == (True, 4096)
    assert not group.kill()
    with subprocess.Popen(["sleep", "100"]) as child:
        (top / "cgroup.procs").write_text(f"{child.pid}\n")
        assert group.kill()
        assert child.wait() == -9
    for path in top.iterdir():  # the kernel's files go with their directory
        if path.is_file():
            os.unlink(path)
    group.remove()
    assert not top.exists()
