"""What the snapshotter and its ``afs_fused`` processes say to each other over each one's control socket.

One JSON object per line each way, in order, as on the fill socket (:mod:`afs.layerstore.fillwire`); one question per
connection is what the snapshotter asks.

- ``{"op": "hello"}`` -> ``{"protocol": 1, "pid": pid, "layers": [diff_id, ...]}``; the layers are those with open files.
  Every version answers this, with the number of its protocol: an older worker may be alive when a new snapshotter starts.
- ``{"op": "stats"}`` -> ``{"layers": {diff_id: {"reads": n, "bytes": n, "waits": n, "wait_s": seconds, "failed": n}}}``;
  ``waits`` are the reads that had to wait for chunks.
- ``{"op": "release", "diff_id": D}`` -> ``{}``: nothing is mounted on this layer any more, its files may be closed.
- Failures: ``{"error": message}``.

No word ends a worker: it ends when the kernel dropped its file system, so whoever unmounts ends it, of any version.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from afs.core.errors import Unavailable
from afs.layerstore.fillwire import decode, encode

PROTOCOL = 1
# Buffered reads that the kernel asks a worker for at once. Its default is 12 for all files of a mount together: so many
# readers that wait for chunks of one layer would stop those of all others.
MAX_BACKGROUND = 1024
MAX_LINE = 1 << 20  # of an answer: 4000 layers fit


@dataclass(slots=True)
class ReadStats:
    """What reads of one layer came to; ``bytes`` as readers got them, ``wait_s`` seconds of all ``waits`` together."""

    reads: int = 0
    bytes: int = 0
    waits: int = 0
    wait_s: float = 0.0
    failed: int = 0

    def add(self, other: "ReadStats") -> None:
        """Add what another worker counted of the same layer."""
        self.reads += other.reads
        self.bytes += other.bytes
        self.waits += other.waits
        self.wait_s += other.wait_s
        self.failed += other.failed


async def ask(path: Path, timeout_s: float, **message: object) -> dict[str, Any]:
    """The answer of the worker that listens at *path*; Unavailable if there is none in time."""
    try:
        async with asyncio.timeout(timeout_s):
            reader, writer = await asyncio.open_unix_connection(path, limit=MAX_LINE)
            try:
                writer.write(encode(message))
                answer = decode(await reader.readuntil(b"\n"))
            finally:
                writer.close()
    except TimeoutError:
        raise Unavailable(f"afs_fused at {path} did not answer within {timeout_s:g} s") from None
    except (OSError, ValueError, EOFError, asyncio.LimitOverrunError) as error:
        raise Unavailable(f"afs_fused at {path}: {error}") from error
    if "error" in answer:
        raise Unavailable(f"afs_fused at {path}: {answer['error']}")
    return answer


Handler = Callable[[dict[str, Any]], dict[str, Any]]


@contextlib.asynccontextmanager
async def serving(path: Path, handle: Handler) -> AsyncIterator[None]:
    """Answer with what *handle* returns, at the unix socket *path* (mode 0600), while the block runs."""
    connections: set[asyncio.StreamWriter] = set()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.add(writer)
        try:
            with contextlib.suppress(OSError):  # the asker went away
                while line := await reader.readline():
                    writer.write(encode(_answer(handle, line)))
        finally:
            connections.discard(writer)
            writer.close()

    path.unlink(missing_ok=True)
    server = await asyncio.start_unix_server(connected, path, limit=MAX_LINE)
    path.chmod(0o600)
    try:
        yield
    finally:
        server.close()
        for writer in connections:
            writer.close()
        path.unlink(missing_ok=True)


def _answer(handle: Handler, line: bytes) -> dict[str, Any]:
    try:
        return handle(decode(line))
    except ValueError as error:
        return {"error": str(error)}
