"""Processes that convert layers; see :mod:`afs.layerstore.pullworker`.

State, on one event loop: every process is in ``_all``, and in ``_free`` while it has no job. A job takes whichever is
free first; if none is for ``PATIENCE_S`` and there may be more, another one is started, which joins ``_free`` when it
has imported what it needs: that takes 0.1 s of CPU, more than a few small layers. A process whose job was cancelled
or whose pipe broke is killed, never reused. When no job came for ``IDLE_S``, processes that worked are ended, which
gives their memory back, and fresh spares take their place: from a cold disk Python takes 0.2 s to be ready, as long
as a small image takes altogether. Two spares of 30 MiB, so that the layers of a small image come side by side: with
one, the first run of three layers took 0.54 of what containerd takes.
"""

import asyncio
import json
import logging
import os
import sys
from typing import Any

from afs.core.errors import Internal
from afs.core.run import PIPE, Child, popen, wait

log = logging.getLogger(__name__)
IDLE_S = 5.0
SPARES = 2
PATIENCE_S = 0.05


class Workers:
    """At most *most* processes, at least ``SPARES`` of them (or *most*) between :meth:`start` and :meth:`close`."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._spares = min(most, SPARES)
        self._all: set[Child] = set()
        self._used: set[Child] = set()
        self._free: asyncio.LifoQueue[Child] = asyncio.LifoQueue()
        self._tasks: set[asyncio.Task[None]] = set()
        self._reaper: asyncio.TimerHandle | None = None
        self._closing = False

    async def start(self) -> None:
        """Have the spare processes ready."""
        spares = [self._spawn() for _ in range(self._spares)]
        await asyncio.gather(*(self._bring_up(child) for child in spares))

    def _spawn(self) -> Child:
        argv = [sys.executable, "-m", "afs.layerstore.pullworker", str(os.getpid())]
        child = popen(argv, stdin=PIPE, stdout=PIPE, new_session=True)
        self._all.add(child)
        return child

    async def _bring_up(self, child: Child) -> None:
        try:
            await _read_line(child)
        except Internal as error:
            log.error("%s", error.line)  # the job that gets it will say so too
        self._free.put_nowait(child)

    def _in_background(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def run(self, job: dict[str, Any], limit: float | None = None) -> dict[str, Any]:
        """The answer to *job*. Cancelling it kills the process, so that nothing of the job goes on.

        Raises TimeoutError *limit* seconds after a process took the job; waiting for one does not count.
        """
        while (child := await self._take()).poll() is not None:  # killed while it was idle, by the OOM killer say
            log.warning("a process that pulls layers died with status %d; starting another one", child.returncode)
            await self._kill(child)
        self._used.add(child)
        try:
            async with asyncio.timeout(limit):
                answer = await _ask(child, job)
        except BaseException:
            await self._kill(child)
            raise
        self._free.put_nowait(child)
        self._reap_later()
        return answer

    async def _take(self) -> Child:
        try:
            async with asyncio.timeout(PATIENCE_S):
                return await self._free.get()
        except TimeoutError:
            if len(self._all) < self._most:
                self._in_background(self._bring_up(self._spawn()))
            return await self._free.get()

    async def _kill(self, child: Child) -> None:
        self._all.discard(child)
        self._used.discard(child)
        child.kill()
        await asyncio.shield(wait(child))
        for pipe in (child.stdin, child.stdout):
            if pipe is not None:
                pipe.close()
        if len(self._all) < self._spares and not self._closing:
            self._in_background(self._bring_up(self._spawn()))

    def _reap_later(self) -> None:
        if self._reaper is not None:
            self._reaper.cancel()
        self._reaper = asyncio.get_running_loop().call_later(IDLE_S, lambda: self._in_background(self._reap()))

    async def _reap(self) -> None:
        """End the free ones that worked; :meth:`_kill` starts a fresh one for each."""
        fresh = []
        while not self._free.empty():
            child = self._free.get_nowait()
            if child in self._used:
                await self._kill(child)
            else:
                fresh.append(child)
        for child in fresh:
            self._free.put_nowait(child)

    async def close(self) -> None:
        """Kill all; jobs must be over or cancelled."""
        self._closing = True
        if self._reaper is not None:
            self._reaper.cancel()
        while self._tasks or self._all:
            for task in list(self._tasks):
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            for child in list(self._all):
                await self._kill(child)


async def _ask(child: Child, job: dict[str, Any]) -> dict[str, Any]:
    assert child.stdin is not None
    try:
        child.stdin.write(json.dumps(job).encode() + b"\n")
        child.stdin.flush()
    except BrokenPipeError:
        raise Internal(f"the process that pulls layers died with status {await wait(child)}") from None
    answer: dict[str, Any] = json.loads(await _read_line(child))
    return answer


async def _read_line(child: Child) -> bytes:
    assert child.stdout is not None
    fd, line = child.stdout.fileno(), b""
    os.set_blocking(fd, False)
    while not line.endswith(b"\n"):
        await _readable(fd)
        data = os.read(fd, 1 << 16)
        if not data:
            raise Internal(f"the process that pulls layers died with status {await wait(child)}")
        line += data
    return line


async def _readable(fd: int) -> None:
    loop, event = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(fd, event.set)
    try:
        await event.wait()
    finally:
        loop.remove_reader(fd)
