"""Processes that convert layers; see :mod:`afs.layerstore.pullworker`.

State, on one event loop: ``_idle`` are workers without a job; a worker is taken out of it before the first await and
comes back when its job is done, so no two jobs share one. ``_slots`` bounds how many there are. A worker whose job was
cancelled or whose pipe broke is killed, never reused. ``_reaper`` ends idle workers after ``IDLE_S``.
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


class Workers:
    """At most *most* processes; they start when they are needed and end when they are not."""

    def __init__(self, most: int) -> None:
        self._slots = asyncio.Semaphore(most)
        self._idle: list[Child] = []
        self._all: set[Child] = set()
        self._reaper: asyncio.TimerHandle | None = None

    def warm(self) -> None:
        """Have one process start now: a job is likely to follow, and Python takes a while to import what it needs."""
        if not self._all:
            self._idle.append(self._start())
            self._reap_later()

    def _start(self) -> Child:
        argv = [sys.executable, "-m", "afs.layerstore.pullworker", str(os.getpid())]
        child = popen(argv, stdin=PIPE, stdout=PIPE, new_session=True)
        self._all.add(child)
        return child

    async def run(self, job: dict[str, Any]) -> dict[str, Any]:
        """The answer to *job*. Cancelling it kills the process, so that nothing of the job goes on."""
        async with self._slots:
            child = self._idle.pop() if self._idle else self._start()
            try:
                answer = await _ask(child, job)
            except BaseException:
                await self._kill(child)
                raise
            self._idle.append(child)
            self._reap_later()
            return answer

    async def _kill(self, child: Child) -> None:
        self._all.discard(child)
        child.kill()
        await asyncio.shield(wait(child))
        _close(child)

    def _reap_later(self) -> None:
        if self._reaper is not None:
            self._reaper.cancel()
        self._reaper = asyncio.get_running_loop().call_later(IDLE_S, self._reap)

    def _reap(self) -> None:
        """End the idle ones: stdin's end ends them. They are waited for when the next ones are reaped, or at the end."""
        for child in self._idle:
            if child.stdin is not None:
                child.stdin.close()
        self._idle.clear()
        if ended := [child for child in self._all if child.poll() is not None]:
            for child in ended:
                self._all.discard(child)
                _close(child)
        if any(child.stdin is not None and child.stdin.closed for child in self._all):
            self._reap_later()

    async def close(self) -> None:
        """Kill all; jobs must be over or cancelled."""
        if self._reaper is not None:
            self._reaper.cancel()
        for child in list(self._all):
            await self._kill(child)


async def _ask(child: Child, job: dict[str, Any]) -> dict[str, Any]:
    assert child.stdin is not None
    assert child.stdout is not None
    child.stdin.write(json.dumps(job).encode() + b"\n")
    child.stdin.flush()
    fd, line = child.stdout.fileno(), b""
    os.set_blocking(fd, False)
    while not line.endswith(b"\n"):
        await _readable(fd)
        data = os.read(fd, 1 << 16)
        if not data:
            raise Internal(f"the process that pulls layers died with status {await wait(child)}")
        line += data
    answer: dict[str, Any] = json.loads(line)
    return answer


async def _readable(fd: int) -> None:
    loop, event = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(fd, event.set)
    try:
        await event.wait()
    finally:
        loop.remove_reader(fd)


def _close(child: Child) -> None:
    for pipe in (child.stdin, child.stdout):
        if pipe is not None:
            pipe.close()
