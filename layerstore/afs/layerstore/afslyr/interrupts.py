"""Signals for a command that leaves nothing half done.

State, all of it changed in the main thread, by signal handlers too: which signal came first, whether it may raise, and
whether input is still wanted.

- As a rule the first SIGINT, SIGTERM or SIGHUP raises Cancelled in the main thread, wherever that is, a blocking write
  among it. Later ones are ignored, for what cleans up must come to its end.
- Inside :meth:`Interrupts.deferred` nothing is raised. Whoever works there asks :meth:`pending` and waits for input by
  :meth:`wait_readable`, from any thread; a signal wakes that by a pipe.
"""

import contextlib
import os
import select
import signal
from collections.abc import Iterator
from types import FrameType

from afs.core.errors import Cancelled

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupts:
    """The signal handlers of this process, from construction on."""

    def __init__(self) -> None:
        self._caught: signal.Signals | None = None
        self._deferred = self._unwanted = False
        self._wake, self._waker = os.pipe2(os.O_CLOEXEC)
        for number in _SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup(1), and background jobs of sh, want it ignored
                signal.signal(number, self._handle)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if self._caught is not None:
            return
        self._caught = signal.Signals(number)
        os.write(self._waker, b"!")
        if not self._deferred:
            self.check()

    def pending(self) -> bool:
        """Whether a signal came."""
        return self._caught is not None

    def check(self) -> None:
        """Raise Cancelled, naming the signal, if one came."""
        if self._caught is not None:
            raise Cancelled(f"interrupted by {self._caught.name}")

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Raise nothing while the block runs. One that comes too late for the block is left to the next :meth:`check`."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    def stop_waiting(self) -> None:
        """Let :meth:`wait_readable` raise Cancelled from now on: nobody wants the input any more."""
        self._unwanted = True
        os.write(self._waker, b"!")

    def wait_readable(self, fd: int) -> None:
        """Wait until reading *fd* would not block; Cancelled if a signal or :meth:`stop_waiting` comes first."""
        poller = select.poll()
        poller.register(fd, select.POLLIN)
        poller.register(self._wake, select.POLLIN)
        poller.poll()
        self.check()
        if self._unwanted:
            raise Cancelled("the input is not wanted any more")
