"""A run to its end, as one result."""

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

from afs.client.events import DiffChunk, DiffStart, Log, RunResult
from afs.core.errors import Internal

if TYPE_CHECKING:
    from collections.abc import Iterator

    from afs.client.run import Run


async def collect(run: "Run", diff_to: Path | str | None) -> RunResult:
    """Read *run* to its end. What was read before is not in the result."""
    if diff_to is None:
        return await _collect(run, None)
    with written_whole(Path(diff_to)) as file:
        result = await _collect(run, file.out)
        file.wanted = not result.diff_error
    return result


async def _collect(run: "Run", out: IO[bytes] | None) -> RunResult:
    stdout, stderr = bytearray(), bytearray()
    diff: bytearray | None = None
    begun = False
    async for event in run:
        match event:
            case Log():
                (stderr if event.source == "stderr" else stdout).extend(event.data)
            case DiffStart():
                begun = True
                diff = bytearray() if out is None else None
            case DiffChunk() if out is not None:
                out.write(event.data)
            case DiffChunk() if diff is not None:
                diff += event.data
            case _:
                pass
    missing = _missing(run, begun=begun, wanted=out is not None)
    return _result(run, bytes(stdout), bytes(stderr), diff, missing)


def _missing(run: "Run", *, begun: bool, wanted: bool) -> str:
    """Why the diff is not all here; empty if it is, or if there need not be one. *wanted*: there is a file for it."""
    if run.done is not None and run.done.diff_error:
        return run.done.diff_error
    if run.finished is not None and run.finished.replayed and run.request.diff_format != "none":
        return "the run was replayed: its changed files are not kept"
    if begun and run.done is None:
        return "the run ended before its changed files were complete"
    return "" if begun or not wanted else "no changed files came"


def _result(run: "Run", stdout: bytes, stderr: bytes, diff: bytearray | None, missing: str) -> RunResult:
    finished, done = run.finished, run.done
    if finished is None:
        raise Internal("the run has ended without a result")
    return RunResult(
        run.accepted.node_id if run.accepted is not None else finished.node_id,
        finished.exit_code,
        finished.outcome,
        finished.error,
        stdout,
        stderr,
        bytes(diff) if diff is not None and not missing else None,
        finished.peak_memory,
        finished.cpu_time,
        {**finished.timings, **done.timings} if done is not None else finished.timings,
        finished.signal,
        run.run_id,
        finished.bytes_fetched,
        finished.stdout_bytes or len(stdout),  # servers older than the count
        finished.stderr_bytes or len(stderr),
        finished.stdout_dropped,
        finished.stderr_dropped,
        finished.replayed,
        done.diff_bytes if done is not None else 0,
        done.diff_entries if done is not None else 0,
        missing,
    )


@dataclass(slots=True)
class WholeFile:
    """A file that is being written; it appears if it is *wanted* at the end."""

    out: IO[bytes]
    wanted: bool = True


@contextlib.contextmanager
def written_whole(path: Path) -> "Iterator[WholeFile]":
    """A file to write that appears at *path* when the block succeeds, and leaves nothing when it fails."""
    temporary = path.with_name(f".{path.name}.part")
    try:
        with temporary.open("wb") as out:
            file = WholeFile(out)
            yield file
        if file.wanted:
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
