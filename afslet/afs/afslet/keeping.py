"""afslet's side of its keeper: start it, show it that we live, start another one if it does not.

State: one task owns the process and the socket to it. The beats come from the event loop, so a loop that hangs is silent.
"""

import asyncio
import contextlib
import logging
import os
import socket
import sys
from collections.abc import AsyncIterator

from afs.afslet.keeper import BEAT, BEATS_PER_LEASE, GOODBYE
from afs.afslet.remains import Remains
from afs.core.run import Child, popen, wait

log = logging.getLogger(__name__)
_PAUSE_S = 1.0  # before another one is started, or a keeper that cannot live would keep us busy
_START_S = 10.0  # until a new one answers
_END_S = 5.0  # until one has ended that was told to


@contextlib.asynccontextmanager
async def kept(remains: Remains, lease_ttl: float) -> AsyncIterator[None]:
    """Have a keeper while the block runs. After an error it is not told that we stop properly, and clears up."""
    keeping = _Keeping(remains, lease_ttl)
    keeping.start()  # the first one has to be there before there is anything to keep
    task = asyncio.create_task(keeping.run(), name="keeper")
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])
    await keeping.say_goodbye()


class _Keeping:
    def __init__(self, remains: Remains, lease_ttl: float) -> None:
        self._remains = remains
        self._lease_ttl = lease_ttl
        self._process: Child | None = None
        self._sock: socket.socket | None = None

    def start(self) -> None:
        """Start a keeper; OSError."""
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        pidfd = os.pidfd_open(os.getpid())
        try:
            argv = [sys.executable, "-m", "afs.afslet.keeper", str(pidfd), str(theirs.fileno()), str(self._lease_ttl)]
            argv.append(self._remains.to_json())
            self._process = popen(argv, pass_fds=(pidfd, theirs.fileno()), new_session=True)
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
            os.close(pidfd)
        self._sock = ours

    async def run(self) -> None:
        """For ever: beat, and replace a keeper that ended or does not answer."""
        while True:
            try:
                if self._process is None:
                    self.start()
                await self._beat()
            except OSError as error:
                log.error("the keeper cannot be started: %s", error)
            self._drop()
            await asyncio.sleep(_PAUSE_S)

    async def _beat(self) -> None:
        """Until the keeper has ended."""
        process, sock = self._process, self._sock
        assert process is not None
        assert sock is not None
        ending = asyncio.create_task(wait(process), name="end of the keeper")
        interval = self._lease_ttl / BEATS_PER_LEASE
        silence = -_START_S
        try:
            while not ending.done():
                with contextlib.suppress(BlockingIOError, BrokenPipeError, ConnectionResetError):
                    sock.send(BEAT)
                await asyncio.wait([ending], timeout=interval)
                silence += interval
                with contextlib.suppress(BlockingIOError, ConnectionResetError):
                    if sock.recv(4096):
                        silence = 0.0
                if silence > self._lease_ttl and not ending.done():
                    log.warning("the keeper has been silent for %g s: killing it", self._lease_ttl)
                    process.kill()
                    await ending
        finally:
            ending.cancel()
        log.warning("the keeper ended with status %s: starting another one", process.returncode)

    def _drop(self) -> None:
        if self._sock is not None:
            self._sock.close()
        self._process = self._sock = None

    async def say_goodbye(self) -> None:
        """We have stopped properly, so it ends as well."""
        process, sock = self._process, self._sock
        if process is None or sock is None:
            return
        with contextlib.suppress(BlockingIOError, BrokenPipeError, ConnectionResetError):
            sock.send(GOODBYE)
        try:
            await asyncio.wait_for(wait(process), _END_S)
        except TimeoutError:
            log.warning("the keeper does not end: killing it")
            process.kill()
            await wait(process)
        self._drop()
