"""The snapshotter's layer mounts over a fill source, for tests of each backend."""

from __future__ import annotations

import contextlib
from functools import cache
from typing import TYPE_CHECKING

from afs.snapshotter.backends import Backend, Backends, Trial
from afs.snapshotter.fusedworkers import FusedWorkers
from afs.snapshotter.layermounts import LayerMounts
from afs.snapshotter.probe import probe
from afs.snapshotter.roots import Roots
from tests.testbed import capabilities

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from tests.testbed.fillsource import FillSource, SourceLayer

KINDS = [f"{backend}-{state}" for backend in Backend for state in ("complete", "lazy")]
"""Names of all ways to mount a layer, as parameters of tests."""


class Kind:
    """A way to mount a layer: a backend, and whether the layer is partial."""

    def __init__(self, name: str) -> None:
        backend, _, state = name.rpartition("-")
        self.backend = Backend(backend)
        self.lazy = state == "lazy"

    def require(self, directory: Path) -> None:
        """Skip the test if it does not work here, which under CI=true is a failure."""
        trial = next(one for one in trials(directory) if (one.backend, one.lazy) == (self.backend, self.lazy))
        if not trial.works:
            capabilities.unavailable(f"{self.backend} ({'lazy' if self.lazy else 'complete'}): {trial.reason}")

    def add(self, source: FillSource, tar: bytes) -> SourceLayer:
        """A layer of a tar in that state."""
        return source.add(tar, partial=self.lazy)

    def file(self, layer: SourceLayer) -> str:
        """What the layerstore says of a layer in that state."""
        return "" if self.lazy else str(layer.whole)


@cache
def trials(directory: Path) -> tuple[Trial, ...]:
    """What works for files in a directory."""
    return probe(directory, directory)


@contextlib.asynccontextmanager
async def layer_mounts(source: FillSource, forced: Backend | None, keep: int = 0) -> AsyncIterator[LayerMounts]:
    """Layer mounts in the directory of a fill source, which answers meanwhile."""
    work = source.directory
    backends = Backends(trials(work), forced)
    workers = FusedWorkers(work / "fuse", work / "faults", source.socket, 60.0, 1)
    mounts = LayerMounts(work / "l", workers, backends, keep)
    async with source.serving():
        try:
            yield mounts
        finally:
            await mounts.close()
            await workers.close()


@contextlib.asynccontextmanager
async def roots_over(mounts: LayerMounts, work: Path) -> AsyncIterator[Roots]:
    """Roots below `work`."""
    roots = Roots(work / "r", work / "base", mounts)
    roots.prepare()
    try:
        yield roots
    finally:
        await roots.close()
