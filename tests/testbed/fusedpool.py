"""A pool of real afs_fused processes for a test, and programs that read through them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from afs.core.mounts import list_mounts, unmount_below
from afs.snapshotter.fusedworkers import FusedWorkers

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from afs.snapshotter.fusedworker import Worker
    from tests.testbed.fillsource import FillSource

_LIMIT_S = 60.0


def make_pool(directory: Path, source: FillSource, *, deadline: float = 30.0, count: int = 1) -> FusedWorkers:
    """A pool that is not started."""
    return FusedWorkers(directory / "fuse", directory / "faults", source.socket, deadline, count)


@contextlib.asynccontextmanager
async def running(
    directory: Path, source: FillSource, *, deadline: float = 30.0, count: int = 1
) -> AsyncIterator[FusedWorkers]:
    """A pool that runs while the block does; afterwards nothing of it may be left, mounted or not."""
    pool = make_pool(directory, source, deadline=deadline, count=count)
    try:
        await pool.adopt()
        yield pool
    finally:
        await pool.close()
        left = list_mounts(str(directory))
        unmount_below(directory)
    assert left == []
    assert list((directory / "fuse").iterdir()) == []


def open_files(worker: Worker, below: Path) -> list[str]:
    """The files below a directory that a worker has open or mapped."""
    found = []
    for name in ("fd", "map_files"):
        directory = f"/proc/{worker.pid}/{name}"
        for link in os.listdir(directory):
            with contextlib.suppress(FileNotFoundError):
                target = os.readlink(f"{directory}/{link}")
                if target.startswith(f"{below}/layer"):
                    found.append(target)
    return found


def bind(tree: Path, at: Path) -> None:
    """Bind-mount a tree at a new directory, as layer mounts do. Blocking: not on the loop that serves the fill socket."""
    at.mkdir()
    subprocess.run(["mount", "--bind", tree, at], check=True)


@dataclass
class Program:
    """A process whose output comes when it is asked for."""

    process: asyncio.subprocess.Process

    async def line(self) -> str:
        """Its next line."""
        assert self.process.stdout is not None
        async with asyncio.timeout(_LIMIT_S):
            return (await self.process.stdout.readline()).decode().rstrip("\n")

    def say(self, line: str) -> None:
        """A line to its stdin."""
        assert self.process.stdin is not None
        self.process.stdin.write(line.encode() + b"\n")


@contextlib.asynccontextmanager
async def program(code: str, *args: object) -> AsyncIterator[Program]:
    """Python code that runs in a process of its own; killed at the end of the block."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-uc", code, *map(str, args), stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        yield Program(process)
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()
