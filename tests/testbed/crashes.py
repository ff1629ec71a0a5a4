"""Ends or fails a piece of work at each of its file-system calls in turn, and looks at what is left.

A program of its own, because it forks, which a process with gRPC's threads must not:
`python -m tests.testbed.crashes MODULE SCENARIO DIRECTORY` prints how many calls there were, to kill at and to fail.
"""

from __future__ import annotations

import builtins
import errno
import importlib
import io
import os
import shutil
import signal
import subprocess
import sys
import threading
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

Mode = Literal["kill", "enospc"]
_CALLS = ("pwrite", "rename", "replace", "fsync", "unlink", "rmdir", "ftruncate", "mkdir", "utime")
_NEED_SPACE = {"pwrite", "rename", "replace", "fsync", "mkdir", "open"}
_MOST = 500


class Scenario:
    """What a test does to a directory; each method runs in a process of its own."""

    calls: ClassVar[Sequence[tuple[Any, str, bool]]] = ()
    """Further functions to end the work at: a module or class, the name in it, and whether it fails without space."""
    modes: ClassVar[Sequence[Mode]] = get_args(Mode)
    """What to do to it; of the others there are 0 calls."""

    def prepare(self, root: Path) -> None:
        """Make what is there before."""

    def work(self, root: Path) -> None:
        """Do what is to be ended at each call."""
        raise NotImplementedError

    def failed(self, root: Path, error: Exception) -> None:
        """Check what the work left behind when it failed with `error`; still in its process."""

    def check(self, root: Path) -> None:
        """Check what is there after, and that the work can be done now."""
        raise NotImplementedError


class _Faults:
    """Counts calls that change the file system, and strikes at number `at`."""

    def __init__(self, at: int, mode: Mode, calls: Sequence[tuple[Any, str, bool]]) -> None:
        self._at, self._mode = at, mode
        self._calls = calls
        self._need_space = _NEED_SPACE | {name for _, name, needs_space in calls if needs_space}
        self._count = 0
        self._lock = threading.Lock()
        self.struck = False

    def _strike(self, name: str) -> bool:
        with self._lock:
            if self._mode == "enospc" and name not in self._need_space:
                return False
            self._count += 1
            self.struck = self.struck or self._count == self._at
            return self._count == self._at

    def _end(self) -> None:
        if self._mode == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise OSError(errno.ENOSPC, "No space left on device (by the test)")

    def install(self) -> None:
        """Replace the functions of this process."""
        for owner, name in (*((os, name) for name in _CALLS), *(call[:2] for call in self._calls)):
            setattr(owner, name, self._wrapped(name, getattr(owner, name)))
        for module in (io, builtins):
            vars(module)["open"] = self._opening(vars(module)["open"])

    def _wrapped(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if self._strike(name):
                if name == "pwrite":  # a part of it is there
                    fd, data, offset = args
                    real(fd, memoryview(data)[: len(data) // 2], offset)
                self._end()
            return real(*args, **kwargs)

        return call

    def _opening(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            writing = any(letter in mode for letter in "wax+")
            if writing and self._strike("open"):
                self._end()
            opened = real(file, mode, *args, **kwargs)
            if writing and self._strike("open"):  # it is there, and empty
                opened.close()
                self._end()
            return opened

        return call


def _in_child(function: Callable[[], int]) -> int:
    """The exit status of `function` in a process of its own; negative for a signal."""
    pid = os.fork()
    if pid == 0:
        status = 70
        # The page cache outlives a process: syncing changes nothing that could be seen here, and takes half a minute.
        os.fsync = lambda fd: None
        try:
            status = function()
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


_DONE, _STRUCK = 0, 3


def _work(scenario: Scenario, root: Path, at: int, mode: Mode) -> int:
    faults = _Faults(at, mode, scenario.calls)
    faults.install()
    try:
        scenario.work(root)
    except Exception as error:
        if not faults.struck:
            raise
        scenario.failed(root, error)
        return _STRUCK
    return _STRUCK if faults.struck else _DONE


def _step(function: Callable[[Path], None], root: Path, what: str) -> None:
    def run() -> int:
        function(root)
        return _DONE

    if _in_child(run) != _DONE:
        raise SystemExit(f"{what} failed in {root}")


def run_scenario(scenario: Scenario, mode: Mode, directory: Path) -> int:
    """How many calls `scenario` makes; SystemExit if something is wrong after it was ended at one of them."""
    template = directory / "template"
    template.mkdir(parents=True)
    _step(scenario.prepare, template, "prepare")
    for at in range(1, _MOST):
        root = directory / str(at)
        shutil.copytree(template, root)
        status = _in_child(lambda root=root, at=at: _work(scenario, root, at, mode))  # type: ignore[misc]  # a default
        if status not in (_DONE, _STRUCK, -signal.SIGKILL):
            raise SystemExit(f"call {at}: the work ended with {status}")
        _step(scenario.check, root, f"check after {mode} at call {at}")
        shutil.rmtree(root)
        if status == _DONE:
            return at - 1
    raise SystemExit(f"more than {_MOST} calls")


def crash_everywhere(scenario: type[Scenario], directory: Path) -> tuple[int, int]:
    """`run_scenario` in a fresh interpreter, both modes; AssertionError with its output if something is wrong."""
    argv = [sys.executable, "-m", "tests.testbed.crashes", scenario.__module__, scenario.__name__, str(directory)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    killed, starved = done.stdout.split()
    return int(killed), int(starved)


def main() -> None:
    """Run one scenario."""
    module, name, directory = sys.argv[1:]
    scenario: Scenario = getattr(importlib.import_module(module), name)()
    for mode in get_args(Mode):
        print(run_scenario(scenario, mode, Path(directory) / mode) if mode in scenario.modes else 0)


if __name__ == "__main__":
    main()
