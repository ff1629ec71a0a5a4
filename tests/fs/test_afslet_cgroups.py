"""Control groups: v1 on the machine's own, v2 on a directory that looks like one."""

import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from afs.afslet.cgroups import CONTAINER, CgroupV1, CgroupV2, Limits, clean_up, hierarchies

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
def v1(parent: str) -> Iterator[CgroupV1]:
    """A v1 group."""
    mounts = hierarchies()
    if "memory" not in mounts:
        pytest.skip("needs cgroup v1")
    made = CgroupV1(mounts, parent, "run", LIMITS)
    yield made
    made.kill()
    made.remove()


def inside(parent: str, program: str) -> "subprocess.Popen[bytes]":
    """A Python program in the container's group, as the runtime would start it."""
    files = []
    for controller in ("memory", "pids"):
        directory = hierarchies()[controller] / parent / "run" / CONTAINER
        directory.mkdir(exist_ok=True)
        files.append(directory / "cgroup.procs")
    enter = "".join(f"open({str(file)!r}, 'w').write('0'); " for file in files)
    argv = [sys.executable, "-S", "-c", f"{enter}print('in', flush=True); {program}"]
    return subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def test_limits_are_written(parent: str, v1: CgroupV1) -> None:
    mounts = hierarchies()

    def value(controller: str, name: str) -> str:
        return (mounts[controller] / parent / "run" / name).read_text().strip()

    assert v1.path == f"/{parent}/run/{CONTAINER}"
    assert value("memory", "memory.limit_in_bytes") == str(64 << 20)
    assert value("cpu", "cpu.cfs_quota_us") == "150000"
    assert value("cpu", "cpu.cfs_period_us") == "100000"
    assert value("pids", "pids.max") == "50"
    assert not v1.counters().oom
    assert not v1.kill()


def test_processes_are_killed(parent: str, v1: CgroupV1) -> None:
    with inside(parent, "import sys; sys.stdin.read()") as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"in\n"
        assert v1.kill()
        assert child.wait() == -9
        assert not v1.counters().oom


def test_running_out_of_memory_is_counted(parent: str, v1: CgroupV1) -> None:
    with inside(parent, "x = bytearray(256 << 20)") as child:
        assert child.stdout is not None
        assert child.stdout.read() == b"in\n"
        assert child.wait() == -9
    counters = v1.counters()
    assert counters.oom
    assert 32 << 20 < counters.peak_memory <= 64 << 20


def test_leftovers_are_cleaned_up(parent: str) -> None:
    mounts = hierarchies()
    if "memory" not in mounts:
        pytest.skip("needs cgroup v1")
    left = CgroupV1(mounts, parent, "run", LIMITS)
    with inside(parent, "import sys; sys.stdin.read()") as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"in\n"
        assert clean_up(parent) == 1
        assert child.wait() == -9
    assert clean_up(parent) == 0
    left.remove()  # it is gone already


def test_v2_on_a_directory(tmp_path: Path) -> None:
    group = CgroupV2(tmp_path, "parent", "run", LIMITS)
    top = tmp_path / "parent" / "run"
    assert group.path == f"/parent/run/{CONTAINER}"
    for directory in (tmp_path, tmp_path / "parent", top):
        assert (directory / "cgroup.subtree_control").read_text() == "+cpu +memory +pids\n"
    written = {path.name: path.read_text().strip() for path in top.iterdir() if path.name != "cgroup.subtree_control"}
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
    (top / CONTAINER).mkdir()
    assert not group.kill()
    with subprocess.Popen(["sleep", "100"]) as child:
        (top / CONTAINER / "cgroup.procs").write_text(f"{child.pid}\n")
        assert group.kill()
        assert child.wait() == -9
    for path in (*top.iterdir(), *(top / CONTAINER).iterdir()):  # the kernel's files go with their directory
        if path.is_file():
            os.unlink(path)
    group.remove()
    assert not top.exists()
