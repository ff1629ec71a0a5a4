"""This side of a run's terminal and standard input.

State: :class:`Terminal` belongs to the main thread. Standard input is read in a thread of its own, since not every file
can be waited for; the thread waits until the run has taken what it read, and ends with the process.
"""

import asyncio
import contextlib
import os
import signal
import sys
import termios
import threading
import tty
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from afs.client.errors import RunEnded

if TYPE_CHECKING:
    from afs.client.run import Run

_CHUNK = 1 << 16


def terminal_size() -> tuple[int, int] | None:
    """Rows and columns of the terminal on standard input, if that is one."""
    try:
        size = os.get_terminal_size(sys.stdin.fileno())
    except OSError:
        return None
    return size.lines, size.columns


class Terminal:
    """The terminal on standard input, raw while in the block: every key goes to the command, Ctrl-C too."""

    def __init__(self) -> None:
        self._fd = sys.stdin.fileno()
        self._before: list[Any] | None = None

    def __enter__(self) -> Self:
        if os.isatty(self._fd):
            self._before = termios.tcgetattr(self._fd)
            tty.setraw(self._fd)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.restore()

    def restore(self) -> None:
        """As it was before."""
        if self._before is not None:
            # DRAIN: what the command wrote is shown first.
            with contextlib.suppress(termios.error):  # it has been closed
                termios.tcsetattr(self._fd, termios.TCSADRAIN, self._before)
            self._before = None


def follow_size(run: "Run") -> None:
    """Tell *run* when the terminal has another size, until the loop ends."""
    loop = asyncio.get_running_loop()
    resizing = set[asyncio.Task[None]]()

    async def resize() -> None:
        size = terminal_size()
        if size is not None:
            with contextlib.suppress(RunEnded):
                await run.resize(*size)

    def changed() -> None:
        task = loop.create_task(resize())
        resizing.add(task)
        task.add_done_callback(resizing.discard)

    loop.add_signal_handler(signal.SIGWINCH, changed)


def pass_stdin_on(run: "Run") -> None:
    """Have *run* get what comes on standard input, to its end."""
    loop = asyncio.get_running_loop()

    def read() -> None:
        with contextlib.suppress(RunEnded, RuntimeError, asyncio.CancelledError):  # the run, or this program, is over
            while data := os.read(sys.stdin.fileno(), _CHUNK):
                asyncio.run_coroutine_threadsafe(run.write(data), loop).result()
            asyncio.run_coroutine_threadsafe(run.close_stdin(), loop).result()

    threading.Thread(target=read, name="stdin", daemon=True).start()
