"""Where a run's output goes: stdout and stderr, which may be closed, or not be read for a while."""

import asyncio
import os
import select
import sys

_SURE = 4096  # bytes that a pipe takes whole when it takes any (PIPE_BUF in pipe(7))


class Closed(Exception):
    """Nobody reads *name* any more."""


class Output:
    """``waiting``: a thread is stuck in a write. Only the event loop's thread uses it."""

    def __init__(self) -> None:
        self.over = False  # nothing is written any more
        self.waiting = False
        self.began = False  # something was written

    async def write(self, source: str, data: bytes) -> None:
        """Write all of *data*. Whoever is slow to read keeps this waiting, but not the event loop. Closed."""
        if self.over:
            return
        stream = sys.stderr if source == "stderr" else sys.stdout
        self.began = True
        fd = stream.fileno()
        try:
            if len(data) <= _SURE and select.select([], [fd], [], 0)[1]:
                _write(fd, data)
                return
            self.waiting = True
            await asyncio.to_thread(_write, fd, data)
        except BrokenPipeError:
            raise Closed(f"nobody reads {source} any more") from None
        self.waiting = False


def _write(fd: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(fd, rest) :]


def discard_stdout() -> None:
    """Python flushes stdout when it ends, which must not fail on a closed pipe."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
    os.close(null)
