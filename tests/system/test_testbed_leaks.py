"""The look for leaks, and for capabilities, where root is needed."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.testbed import capabilities, leaks, mounts

pytestmark = pytest.mark.root


def test_a_mount_below_the_given_paths_is_found(tmp_path: Path) -> None:
    before = leaks.snapshot(paths=[tmp_path])
    target = tmp_path / "with space"
    target.mkdir()
    mounts.mount("tmpfs", target, "tmpfs")
    try:
        (found,) = leaks.new_since(before)["mounts"]
        assert found.startswith(f"tmpfs on {target} type tmpfs")
        with leaks.exempt(paths=[target]):
            assert leaks.new_since(before) == {}
    finally:
        assert mounts.umount_below(tmp_path) == [str(target)]
    leaks.assert_no_new(before)


def test_a_cgroup_is_found() -> None:
    before = leaks.snapshot()
    parent = next(path for path in capabilities.MEMORY_CGROUPS if path.is_dir() and os.access(path, os.W_OK))
    child = parent / f"afs-{leaks.tag()}"
    child.mkdir()
    try:
        assert leaks.new_since(before) == {"cgroups": [str(child)]}
    finally:
        child.rmdir()
    leaks.assert_no_new(before)


def test_a_loop_device_is_found(tmp_path: Path) -> None:
    backing = tmp_path / "disk"
    backing.write_bytes(b"\0" * (1 << 20))
    before = leaks.snapshot(paths=[tmp_path])
    made = subprocess.run(["losetup", "--find", "--show", backing], check=False, capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"no loop devices: {made.stderr.strip()}")
    try:
        assert leaks.new_since(before) == {"loop devices": [f"{Path(made.stdout.strip()).name}: {backing}"]}
    finally:
        subprocess.run(["losetup", "--detach", made.stdout.strip()], check=True)
    leaks.assert_no_new(before)


def test_umount_below_handles_stacks_and_busy_mounts(tmp_path: Path) -> None:
    for _ in range(2):
        mounts.mount("tmpfs", tmp_path, "tmpfs")
    inner = tmp_path / "inner"
    inner.mkdir()
    mounts.mount("tmpfs", inner, "tmpfs")
    with (inner / "open").open("w"):
        assert mounts.umount_below(tmp_path) == [str(tmp_path), str(tmp_path), str(inner)]
    assert list(tmp_path.iterdir()) == []


def test_each_probe_gives_a_reason_or_nothing(tmp_path: Path) -> None:
    for name in capabilities.PROBES:
        reason = capabilities.missing(name)
        assert reason is None or re.search(r"\w", reason)
    assert list(tmp_path.iterdir()) == []
