"""What is cleared up after an afslet, and who does it."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from afs.afslet import remains as module
from afs.afslet.locks import take, take_for_keeper
from afs.afslet.remains import Remains, clean_up
from afs.core.errors import FailedPrecondition

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def remains(tmp_path: Path) -> Remains:
    """Of an afslet that left a file and a runtime."""
    found = Remains(str(tmp_path / "root"), str(tmp_path / "run"), f"afs-test-{tmp_path.name}")
    (found.scratch / "a/b").mkdir(parents=True)
    found.state.mkdir(parents=True)
    return found


def sleeper(*arguments: str) -> subprocess.Popen[bytes]:
    """A process with these words in its command line."""
    program = "import time; print(flush=True); time.sleep(1000)"
    process = subprocess.Popen([sys.executable, "-c", program, *arguments], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()  # execution is over, and the command line there
    return process


def test_command_line(remains: Remains) -> None:
    assert Remains.from_json(remains.to_json()) == remains


@pytest.mark.root
def test_everything_is_removed_and_nobody_else_killed(remains: Remains, caplog: pytest.LogCaptureFixture) -> None:
    other = sleeper("--root", f"{remains.state}x")
    runtime = sleeper("--root", str(remains.state), "run")
    try:
        assert clean_up(remains, "a test")
        assert runtime.wait(5) == -9
        assert other.poll() is None
    finally:
        for process in (other, runtime):
            process.kill()
            process.communicate()
    assert not remains.scratch.exists()
    assert not remains.state.exists()
    assert "killed 1 processes of the runtime that a test left" in caplog.text
    caplog.clear()
    assert clean_up(remains, "a test")
    assert not caplog.text


def test_one_failure_keeps_nobody_from_the_rest(
    remains: Remains, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(_: Remains) -> str:
        raise OSError(16, "it is busy")

    monkeypatch.setattr(module, "CLEAN_UPS", (("things", fail), ("more", lambda _: "removed 3 things")))
    assert not clean_up(remains, "a test")
    assert "cannot clean up things that a test left: [Errno 16] it is busy" in caplog.text
    assert caplog.text.count("removed 3 things that a test left") == 1
    caplog.clear()
    left = ["runtime", "file"]
    monkeypatch.setattr(module, "CLEAN_UPS", (("things", lambda _: left.pop() if left else ""),))
    assert clean_up(remains, "a test"), "again until nothing is found"
    assert "runtime that a test left" in caplog.text


async def test_an_afslet_waits_for_a_keeper_but_not_for_another_afslet(remains: Remains) -> None:
    with contextlib.ExitStack() as first:
        assert take_for_keeper(first, remains.locks)
        second = contextlib.ExitStack()
        waiting = asyncio.create_task(take(second, remains.locks))
        done, _ = await asyncio.wait([waiting], timeout=1.3)  # longer than it waits for another afslet
        assert not done
    await waiting
    with second, contextlib.ExitStack() as third:
        assert not take_for_keeper(third, remains.locks)
        with pytest.raises(FailedPrecondition, match="in use by another afslet"):
            await take(third, remains.locks)
