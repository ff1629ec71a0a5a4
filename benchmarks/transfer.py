"""Files to a run and back, through proxy and afslet, against tar over a TCP connection of the loopback interface.

What comes back is compressed on both sides by ISA-L at level 1 and stored as it comes; what goes there is not compressed.
"""

from __future__ import annotations

import asyncio
import random
import shutil
import socket
import subprocess
import tempfile
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from tests.testbed.cluster import cluster

from afs.client import AfsClient, DiffChunk, Done, Finished, Outcome
from benchmarks import measure, subjects

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Iterator

    from afs.client.events import Event

SAMPLES = 9
WARM_UP = 1
SIZE = 200 << 20
SMALL = 10_000
UP, UP_TAR = "AFS, 200 MiB there", "tar, 200 MiB there"
BACK, BACK_TAR = "AFS, 200 MiB back", "tar | igzip -1, 200 MiB back"
MANY, MANY_TAR = f"AFS, {SMALL} files of 1 KiB there", f"tar, {SMALL} files of 1 KiB there"


def run(name: str, samples: int | None) -> measure.Report:
    """Measure with the image *name*."""
    image = subjects.image(name)
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="afs-bench-")))
        large, small = directory / "large", directory / "small"
        make_mixed(large)
        make_small(small)
        running = stack.enter_context(cluster(1))
        peer = stack.enter_context(asyncio.Runner())
        client = peer.run(_connect(running.proxy))
        stack.callback(lambda: peer.run(client.close()))
        there = _There(peer, client, image.reference)
        taken = measure.interleave(
            {
                UP: measure.plain(lambda: there.up(large)),
                UP_TAR: lambda: tar_up(large, directory),
                BACK: lambda: there.back(large, directory),
                BACK_TAR: lambda: tar_back(large, directory),
                MANY: measure.plain(lambda: there.up(small)),
                MANY_TAR: lambda: tar_up(small, directory),
            },
            samples or SAMPLES,
            warm_up=WARM_UP,
        )
    targets = [measure.ratio(taken, UP, UP_TAR, 2.0), measure.ratio(taken, BACK, BACK_TAR, 2.0)]
    rates = [f"{each.name}: {SIZE / 2**20 / each.median:.0f} MiB/s" for each in measure.seconds(taken)[:4]]
    notes = [
        "Half of the bytes are random. AFS there: from the call to the end of /bin/true, and of the run.",
        "AFS back: from the command's end to `done`, when the run's root is gone.",
        "; ".join(rates) + ".",
    ]
    return measure.Report("transfer", "Files to a run and back", measure.seconds(taken), targets, notes=notes)


def make_mixed(directory: Path) -> None:
    """200 MiB: twenty files of 8 MiB, and 2560 of 16 KiB; in each half is random and half is text."""
    chance = random.Random(7)  # noqa: S311 - not for secrets
    words = [b"%x" % chance.getrandbits(24) for _ in range(2000)]

    def content(size: int) -> bytes:
        text = b" ".join(chance.choices(words, k=size // 14))
        text = (text * (size // 2 // len(text) + 1))[: size // 2]
        return text + chance.randbytes(size - len(text))

    for number in range(20):
        _write(directory / "large" / f"f{number}", content(8 << 20))
    for number in range(2560):
        _write(directory / "middle" / f"d{number // 64}" / f"f{number}", content(16 << 10))


def make_small(directory: Path) -> None:
    """10,000 files of 1 KiB in a hundred directories."""
    chance = random.Random(8)  # noqa: S311 - not for secrets
    for number in range(SMALL):
        _write(directory / f"d{number // 100}" / f"f{number}", chance.randbytes(1024))


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


async def _connect(address: str) -> AfsClient:
    client = AfsClient(address)
    await client.status()
    return client


class _There:
    """Runs of one client."""

    def __init__(self, runner: asyncio.Runner, client: AfsClient, reference: str) -> None:
        self._runner = runner
        self._client = client
        self._reference = reference

    def up(self, source: Path) -> None:
        """A run of /bin/true with an upload."""
        result = self._runner.run(self._client.run(self._reference, subjects.TRUE, upload=source, upload_to="/up"))
        assert result.ok, result

    @contextmanager
    def back(self, source: Path, directory: Path) -> Iterator[Callable[[], object]]:
        """A run that has changed as much as *source* has; the action takes the diff."""
        out = directory / "diff.tar.gz"
        command = ["cp", "-r", "/up", "/changed"]
        events = self._client.execute(self._reference, command, upload=source, upload_to="/up")
        self._runner.run(_until_finished(events))
        try:
            yield lambda: self._runner.run(_take(events, out))
            assert out.stat().st_size > SIZE // 2
        finally:
            self._runner.run(cast("Any", events.aclose()))
            out.unlink(missing_ok=True)


async def _until_finished(events: AsyncGenerator[Event, None]) -> None:
    async for event in events:
        if isinstance(event, Finished):
            assert event.outcome is Outcome.EXITED, event
            return
    raise AssertionError("no result")


async def _take(events: AsyncGenerator[Event, None], out: Path) -> None:
    with out.open("wb") as file:
        async for event in events:
            if isinstance(event, DiffChunk):
                file.write(event.data)
            elif isinstance(event, Done):
                return
    raise AssertionError("not done")


@contextmanager
def tar_up(source: Path, directory: Path) -> Iterator[Callable[[], object]]:
    """`tar -c` into a connection, `tar -x` out of it."""
    target = directory / "unpacked"
    target.mkdir()
    try:
        with _connection() as (near, far):
            yield lambda: _pipe([["tar", "-c", "-C", str(source), "."]], near, ["tar", "-x", "-C", str(target)], far)
    finally:
        shutil.rmtree(target)


@contextmanager
def tar_back(source: Path, directory: Path) -> Iterator[Callable[[], object]]:
    """`tar -c | igzip -1` into a connection, and out of it into a file."""
    out = directory / "diff.tar.gz"
    try:
        with _connection() as (near, far), out.open("wb") as file:
            commands = [["tar", "-c", "-C", str(source), "."], ["igzip", "-1", "-c"]]
            yield lambda: _pipe(commands, near, ["cat"], far, file.fileno())
        assert out.stat().st_size > SIZE // 2
    finally:
        out.unlink(missing_ok=True)


@contextmanager
def _connection() -> Iterator[tuple[socket.socket, socket.socket]]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        near = socket.create_connection(server.getsockname())
        far, _ = server.accept()
    with near, far:
        yield near, far


def _pipe(
    commands: list[list[str]], near: socket.socket, last: list[str], far: socket.socket, out: int | None = None
) -> None:
    """Run *commands* as a pipe into one end of a connection, and the last one at the other end."""
    started = [subprocess.Popen(last, stdin=far.fileno(), stdout=out)]
    source: Any = subprocess.DEVNULL
    for number, argv in enumerate(commands, 1):
        target = near.fileno() if number == len(commands) else subprocess.PIPE
        made = subprocess.Popen(argv, stdin=source, stdout=target)
        if source is not subprocess.DEVNULL:
            source.close()
        source = made.stdout
        started.append(made)
    near.close()
    for process in reversed(started):
        assert process.wait() == 0, process.args
