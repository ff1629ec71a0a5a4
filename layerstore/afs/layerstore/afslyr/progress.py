"""How far a command is, on stderr: bars on a terminal, a line at the start and one at the end elsewhere."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

import click

from afs.core.units import format_size

# Called with the bytes done since the last call, from any thread.
Advance = Callable[[int], None]


@contextlib.contextmanager
def progress(what: str, total: int | None, *, quiet: bool) -> Iterator[Advance]:
    """Show *what* is done while the block runs; *total* is how many bytes there are, if that is known."""
    if quiet or sys.stderr is None:  # None: closed
        yield lambda _: None
    elif sys.stderr.isatty():
        with _bar(what, total) as advance:
            yield advance
    else:
        with _lines(what) as advance:
            yield advance


@contextlib.contextmanager
def _bar(what: str, total: int | None) -> Iterator[Advance]:
    from rich import progress as rich  # 0.1 s, which scripts need not pay
    from rich.console import Console

    columns = [
        rich.TextColumn("{task.description}", markup=False),
        rich.BarColumn(),
        rich.DownloadColumn(binary_units=True),
        rich.TransferSpeedColumn(),
        rich.TimeRemainingColumn(),
    ]
    with rich.Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task(what, total=total)
        yield lambda count: bars.advance(task, count)


@contextlib.contextmanager
def _lines(what: str) -> Iterator[Advance]:
    start, done = time.monotonic(), 0

    def advance(count: int) -> None:
        nonlocal done
        done += count

    click.echo(f"afs_layer: {what}", err=True)
    yield advance
    click.echo(f"afs_layer: {what}: {format_size(done)} in {time.monotonic() - start:.1f} s", err=True)
