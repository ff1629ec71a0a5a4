"""One container as afslet runs it, in this process: for tests of what confines it."""

from __future__ import annotations

import asyncio
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from afs.afslet.bundle import Process, Sandbox, runtime_config
from afs.afslet.cgroups import Limits, clean_up
from afs.afslet.rootfs import User
from afs.afslet.runc import Ended, Job, Runtime, become_subreaper, run_container
from afs.afslet.runtimebinary import RuntimeBinary
from afs.afslet.stdio import Pipes
from afs.core import syscalls
from tests.testbed import leaks

if TYPE_CHECKING:
    from collections.abc import Sequence

MAX_FILES = 1024


@dataclass
class Heard:
    """How it ended, and what it said."""

    ended: Ended
    stdout: str
    stderr: str


async def run_in(root: Path, argv: Sequence[str], sandbox: Sandbox, uid: int = 0) -> Heard:
    """Run a command in a root directory, as a user without an entry anywhere."""
    heard = {"stdout": b"", "stderr": b""}

    async def output(name: str, data: bytes) -> None:
        heard[name] += data

    process = Process(tuple(argv), ("PATH=/bin",), "/", User(uid, uid, (), "/"))
    parent = f"afs-{leaks.tag()}"
    with tempfile.TemporaryDirectory(prefix="afs-test-") as directory:
        bundle = Path(directory, "bundle")
        bundle.mkdir()
        try:
            become_subreaper()
            binary = RuntimeBinary("runc")
            runtime = Runtime(binary, Path(directory, "state"), parent, MAX_FILES)
            config = runtime_config(process, str(root), sandbox)
            job = Job("run", bundle, config, Limits(1.0, 64 << 20, 64), 30.0, 1.0, Pipes())
            ended = await run_container(runtime, job, output, lambda: None)
            binary.close()
        finally:
            syscalls.set_child_subreaper(enabled=False)  # or other tests' orphans become ours
            await asyncio.to_thread(clean_up, parent)
    return Heard(ended, heard["stdout"].decode(), heard["stderr"].decode())
