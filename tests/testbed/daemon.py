"""Starts programs that serve, follows what they write, and stops them by pid."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import threading
import time
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path
    from types import TracebackType


class DaemonError(Exception):
    """A program ended, or did not get ready in time; the message has the end of its output."""


class Daemon:
    """One child process, whose standard output and error go line by line into `lines()`.

    The child gets SIGTERM when the thread that started it ends (prctl's PR_SET_PDEATHSIG), so that a test run that is
    killed leaves nothing behind: start daemons in a thread that lives as long as they should.
    """

    def __init__(self, argv: Sequence[str | Path], env: dict[str, str] | None = None) -> None:
        self._argv = [str(arg) for arg in argv]
        self._env = env
        self._process: subprocess.Popen[str] | None = None
        self._lines: list[str] = []
        self._changed = threading.Condition()
        self._ended = False
        self._reader: threading.Thread | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        """The child's pid.

        Raises:
            DaemonError: it is not running.

        """
        if self._process is None:
            raise DaemonError(f"{self._argv[0]} is not started")
        return self._process.pid

    def start(self) -> None:
        """Start the program; it may not be ready yet."""
        prefix = ["setpriv", "--pdeathsig", "TERM"] if shutil.which("setpriv") else []
        self._ended = False
        self._process = subprocess.Popen(
            prefix + self._argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=self._env,
        )
        self._reader = threading.Thread(target=self._follow, name=f"follow {self._argv[0]}", daemon=True)
        self._reader.start()

    def lines(self) -> list[str]:
        """Everything written so far, over all starts."""
        with self._changed:
            return list(self._lines)

    def wait_for(self, pattern: str, timeout: float = 20.0, start: int = 0) -> re.Match[str]:
        """Wait up to `timeout` seconds for a line that has `pattern`, from line number `start` on.

        Raises:
            DaemonError: the time is up, or the program ended without such a line.

        """
        deadline = time.monotonic() + timeout
        expression = re.compile(pattern)
        checked = start
        with self._changed:
            while True:
                for line in self._lines[checked:]:
                    if found := expression.search(line):
                        return found
                checked = max(checked, len(self._lines))
                left = deadline - time.monotonic()
                if self._ended or left <= 0:
                    reason = "ended" if self._ended else f"is not ready after {timeout} s"
                    tail = "\n".join(self._lines[-20:])
                    raise DaemonError(f"{self._argv[0]} {reason}; no line with {pattern!r} in:\n{tail}")
                self._changed.wait(left)

    def stop(self, timeout: float = 10.0) -> int | None:
        """Terminate the child, kill it after `timeout` seconds; returns its exit status, None if it was not running."""
        if self._process is None:
            return None
        process, self._process = self._process, None
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        assert self._reader is not None
        # A grandchild may keep the pipe open; the reader then ends with it, and is a daemon thread.
        self._reader.join(1)
        if not self._reader.is_alive() and process.stdout is not None:
            process.stdout.close()
        return process.returncode

    def _follow(self) -> None:
        process = self._process
        assert process is not None
        assert process.stdout is not None
        for line in process.stdout:
            with self._changed:
                self._lines.append(line.rstrip("\n"))
                self._changed.notify_all()
        with self._changed:
            self._ended = True
            self._changed.notify_all()
