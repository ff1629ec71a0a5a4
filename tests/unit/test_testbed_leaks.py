"""The look for what tests leave behind; mounts and cgroups are in tests/system."""

from __future__ import annotations

import os
import signal
import subprocess
from typing import TYPE_CHECKING

import pytest

from tests.testbed import leaks

if TYPE_CHECKING:
    from pathlib import Path


def test_nothing_new_is_no_leak() -> None:
    before = leaks.snapshot()
    assert leaks.new_since(before) == {}
    leaks.assert_no_new(before, grace=0)


def test_a_child_is_found_and_is_gone_once_reaped() -> None:
    before = leaks.snapshot()
    with subprocess.Popen(["sleep", "60"]) as child:
        found = leaks.new_since(before)["processes"]
        assert [line for line in found if "sleep 60" in line] == found
        with pytest.raises(AssertionError, match=rf"processes: {child.pid} sleep 60"):
            leaks.assert_no_new(before, grace=0)
        child.kill()
    leaks.assert_no_new(before)


def test_an_orphan_is_known_by_its_tag() -> None:
    before = leaks.snapshot()
    script = "setsid sleep 61 >/dev/null 2>&1 & echo $!"
    orphan = int(subprocess.run(["sh", "-c", script], check=True, capture_output=True, text=True).stdout)
    try:
        assert any("sleep 61" in line for line in leaks.new_since(before)["processes"])
    finally:
        os.kill(orphan, signal.SIGKILL)
    leaks.assert_no_new(before)


def test_exempt_processes_do_not_count() -> None:
    before = leaks.snapshot()
    with subprocess.Popen(["sleep", "62"]) as child:
        with leaks.exempt(pids=[child.pid]):
            assert leaks.new_since(before) == {}
        assert "processes" in leaks.new_since(before)
        child.kill()


def test_processes_that_work_below_an_exempt_path_do_not_count(tmp_path: Path) -> None:
    before = leaks.snapshot()
    with subprocess.Popen(["sh", "-c", "read line", tmp_path], stdin=subprocess.PIPE) as child:
        with leaks.exempt(paths=[tmp_path]):
            assert leaks.new_since(before) == {}
        assert "processes" in leaks.new_since(before)
        child.kill()


def test_new_entries_of_a_directory(tmp_path: Path) -> None:
    before = leaks.snapshot(entries_of=[tmp_path])
    (tmp_path / "left").touch()
    assert leaks.new_since(before) == {"files": [f"{tmp_path}/left"]}
    with leaks.exempt(paths=[tmp_path]):
        leaks.assert_no_new(before, grace=0)
