"""What a run does before it prints, and after it, for people at a terminal.

A display looks at the run a few times a second, beginning when the run takes longer than a moment; what draws it is
imported no sooner. Everything happens in the event loop's thread.
"""

import asyncio
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from afs.client.events import Progress, Queued
from afs.client.uploads import Upload

if TYPE_CHECKING:
    import rich.progress

    from afs.client.run import Run

_FIRST_S, _EVERY_S = 0.3, 0.2
_WORDS = {"image": "opening the image", "upload": "uploading", "diff": "changed files"}


class Display:
    """Shows *run* on stderr if that is a terminal. :meth:`hide` it before anything else is printed."""

    def __init__(self, run: "Run") -> None:
        self._run = run
        self._total: int | None = None
        self._progress: rich.progress.Progress | None = None
        self._timer: asyncio.TimerHandle | None = None
        if sys.stderr.isatty():
            self._timer = asyncio.get_running_loop().call_later(_FIRST_S, self._tick)

    def close(self) -> None:
        """Nothing is shown any more."""
        self.hide()
        if self._timer is not None:
            self._timer.cancel()

    def hide(self) -> None:
        """Clear what is shown now."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _tick(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(_EVERY_S, self._tick)
        state = self._state()
        if state is None:
            self.hide()
            return
        text, done, total = state
        if self._progress is None:
            self._progress = _begin()
        self._progress.update(self._progress.task_ids[0], description=text, completed=done, total=total or None)

    def _state(self) -> tuple[str, int, int] | None:
        """What to say, bytes done and in all; None while the command runs."""
        run, told = self._run, self._run.progress
        if run.finished is not None:
            total = told.total if isinstance(told, Progress) and told.phase == "diff" else 0
            return _WORDS["diff"], run.diff_received, total
        if isinstance(told, Queued):
            place = f", {told.position} of {told.queued}" if told.position else ""
            return f"waiting for room{place}", 0, 0
        if told is None:
            return None if run.accepted is not None else ("waiting for a node", 0, 0)
        if told.phase == "running":
            return None
        if told.phase == "upload":
            if self._total is None:
                self._total = upload_size(run.request.upload)
            return _WORDS["upload"], run.uploaded, self._total
        return _WORDS[told.phase], told.done, told.total


def _begin() -> "rich.progress.Progress":
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, SpinnerColumn, TextColumn, TransferSpeedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    progress = Progress(*columns, console=Console(stderr=True), transient=True)
    progress.add_task("", total=None)
    progress.start()
    return progress


def upload_size(upload: Path | str | Iterable[Upload] | None) -> int:
    """Bytes of the files of *upload*; 0 if that cannot be known yet."""
    if upload is None or isinstance(upload, Iterator):
        return 0
    parts = [Upload(upload)] if isinstance(upload, Path | str) else upload
    return sum(map(_size, parts))


def _size(part: Upload) -> int:
    if isinstance(part.source, bytes):
        return len(part.source)
    path = Path(part.source)
    if path.is_file():
        return path.stat().st_size
    # What is in the way of looking shows up in the upload itself.
    return sum(
        os.lstat(os.path.join(directory, name)).st_size for directory, _, names in os.walk(path) for name in names
    )
