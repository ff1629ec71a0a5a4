"""Processes that read files of a mounted root while something happens to it, and what they got."""

from __future__ import annotations

import asyncio
import hashlib
import signal
import sys
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Literal

from tests.testbed import readprogram

if TYPE_CHECKING:
    import random
    from collections.abc import AsyncIterator, Mapping
    from pathlib import Path

Mode = Literal["whole", "random", "mapped"]
MODES: tuple[Mode, ...] = ("whole", "random", "mapped")


class Reader:
    """One process of readprogram.py on one file, whose bytes are `data`; every piece it tells is compared with them."""

    def __init__(self, process: asyncio.subprocess.Process, name: str, data: bytes) -> None:
        self.name = name
        self.pieces = 0
        self._process = process
        self._data = data
        self._changed = asyncio.Condition()
        self._wrong: list[str] = []
        self._following = asyncio.create_task(self._follow())

    async def _follow(self) -> None:
        assert self._process.stdout is not None
        async for line in self._process.stdout:
            offset, length, digest = line.split()
            right = self._data[int(offset) : int(offset) + int(length)]
            async with self._changed:
                if len(right) != int(length) or hashlib.sha256(right).hexdigest().encode() != digest:
                    self._wrong.append(f"{self.name}: wrong bytes at {int(offset)}, {int(length)} bytes")
                self.pieces += 1
                self._changed.notify_all()
        await self._process.wait()
        async with self._changed:
            self._changed.notify_all()

    @property
    def running(self) -> bool:
        """Whether it still reads."""
        return self._process.returncode is None

    async def more(self, pieces: int, timeout: float) -> None:
        """Wait until it has read so many more pieces from now on; AssertionError if it ended or `timeout` s went by."""
        goal = self.pieces + pieces
        async with asyncio.timeout(timeout), self._changed:
            await self._changed.wait_for(lambda: self.pieces >= goal or not self.running)
        assert self.pieces >= goal, f"{self.name} ended with {self._process.returncode} before that"

    async def failed(self, timeout: float) -> None:
        """Wait until it got an I/O error; AssertionError if it did not, or read wrong bytes."""
        assert not await self._end(timeout), f"{self.name} read all of it"

    async def right(self, timeout: float) -> None:
        """Wait until it has read all of its file rightly; AssertionError if not within `timeout` seconds."""
        assert await self._end(timeout), f"{self.name} got an I/O error after {self.pieces} pieces"

    async def right_or_failed(self, timeout: float) -> bool:
        """Wait for its end, whether right or with an I/O error; which of both. AssertionError if it is neither."""
        return await self._end(timeout)

    async def _end(self, timeout: float) -> bool:
        assert self._process.stdin is not None
        assert self._process.stderr is not None
        self._process.stdin.close()  # a mapped one ends after this round
        try:
            await asyncio.wait_for(asyncio.shield(self._following), timeout)
        except TimeoutError:
            raise AssertionError(f"{self.name} hangs: {self.pieces} pieces, then none for {timeout} s") from None
        assert not self._wrong, self._wrong
        status = self._process.returncode
        if status in (readprogram.IO_ERROR_STATUS, -signal.SIGBUS):
            return False
        assert status == 0, f"{self.name} ended with {status}: {(await self._process.stderr.read()).decode()}"
        return True

    async def close(self) -> None:
        """Kill it if it still runs."""
        if self.running:
            self._process.kill()
        await self._following


@asynccontextmanager
async def reading(
    root: Path, files: Mapping[str, bytes], rng: random.Random, modes: tuple[Mode, ...] = MODES
) -> AsyncIterator[list[Reader]]:
    """A reader in every mode, each on a file of its own below `root`, with a seed that is printed."""
    async with AsyncExitStack() as stack:
        found = []
        for mode, (name, data) in zip(modes, files.items(), strict=False):
            seed = str(rng.getrandbits(32))
            argv = [sys.executable, "-I", "-S", readprogram.__file__, mode, str(root / name), seed]
            print(f"reader: {mode} {name} seed {seed}")
            process = await asyncio.create_subprocess_exec(
                *argv, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
            )
            reader = Reader(process, f"{mode} reader of {name}, seed {seed}", data)
            stack.push_async_callback(reader.close)
            found.append(reader)
        yield found
