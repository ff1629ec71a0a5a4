"""The start traces of a node on disk: ``ROOT/traces/<hex of the manifest digest>``, as :mod:`afs.layerstore.traces` encodes them.

All methods but ``in`` and ``len`` block and are called by one thread at a time. ``_kept`` has the digests of what is there, the least
recently used first; over a restart the files' mtime is the last use. A trace is a hint that any node can make anew, so
nothing is synced: a file that a crash damaged is dropped when it is read.
"""

import logging
import os
from collections.abc import Collection, Mapping
from pathlib import Path

from afs.core.digests import hex_of, is_digest
from afs.core.files import write_atomic
from afs.layerstore.store import delete
from afs.layerstore.traces import MAX_BYTES, BadTrace, Trace, parse_trace

log = logging.getLogger(__name__)
MOST = 2000  # as many as there are images that a node remembers; most are of 1 to 4 KB


class TraceFiles:
    """Below *directory*, the *most* traces that were used last."""

    def __init__(self, directory: Path, most: int = MOST) -> None:
        self._directory = directory
        self._most = most
        self._kept: dict[str, None] = {}

    def __contains__(self, image: object) -> bool:
        """Whether there is a trace of the image with that manifest digest."""
        return image in self._kept

    def __len__(self) -> int:
        """How many traces there are."""
        return len(self._kept)

    def restore(self, images: Mapping[str, Collection[str]]) -> dict[str, int]:
        """Read what an earlier process left; chunks of each trace by manifest digest.

        *images* are the diff_ids of the images that are known, by manifest digest; traces of others are removed. Raises
        OSError.
        """
        self._directory.mkdir(exist_ok=True)
        files = sorted((path.stat().st_mtime, path) for path in self._directory.iterdir())
        found: dict[str, int] = {}
        for _, path in files:
            image = f"sha256:{path.name}"
            if not is_digest(image) or image not in images:  # also what was being written when the process died
                delete(path)
                continue
            self._kept[image] = None
            if (trace := self._read(image, images[image])) is not None:
                found[image] = len(trace.chunks)
        for image in self._forget_some():
            del found[image]
        return found

    def load(self, image: str, diff_ids: Collection[str]) -> Trace | None:
        """The trace of an image with layers *diff_ids*, for use; None if there is none. Raises OSError."""
        if image not in self._kept or (trace := self._read(image, diff_ids)) is None:
            return None
        self._kept[image] = self._kept.pop(image)
        os.utime(self._path(image))
        return trace

    def read(self, image: str) -> bytes:
        """The file as it is; empty if there is none. Raises OSError."""
        try:
            with self._path(image).open("rb") as file:
                return file.read(MAX_BYTES)
        except FileNotFoundError:
            return b""

    def _read(self, image: str, diff_ids: Collection[str]) -> Trace | None:
        """A damaged file is removed."""
        path = self._path(image)
        try:
            with path.open("rb") as file:
                return parse_trace(file.read(MAX_BYTES + 1), image, diff_ids)
        except (BadTrace, FileNotFoundError) as error:
            log.error("dropping %s: %s", path, error)
            self.drop(image)
            return None

    def save(self, trace: Trace) -> list[str]:
        """Keep *trace* in place of what there is; the manifest digests of traces that had to go. Raises OSError."""
        write_atomic(self._path(trace.image), trace.encode(), durable=False)
        self._kept.pop(trace.image, None)
        self._kept[trace.image] = None
        return self._forget_some()

    def drop(self, image: str) -> None:
        """Remove the trace of an image, if there is one. Raises OSError."""
        self._path(image).unlink(missing_ok=True)
        self._kept.pop(image, None)

    def _forget_some(self) -> list[str]:
        gone = list(self._kept)[: max(0, len(self._kept) - self._most)]
        for image in gone:
            self.drop(image)
        return gone

    def _path(self, image: str) -> Path:
        return self._directory / hex_of(image)
