"""W in a root whose layers are complete on the disk and not in the page cache: each backend against ext4."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from afs.snapshotter.backends import Backend
from benchmarks import imageroots, measure, subjects

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

SAMPLES = 7
LIMITS = {Backend.FILE: 1.15, Backend.LOOP: 1.15, Backend.TREE: 2.5}
EXT4 = "ext4"


def run(name: str, samples: int | None) -> measure.Report:
    """Measure with the image *name*; only img4 has W."""
    work = subjects.image(name).commands["W"]
    with ExitStack() as stack:
        files = stack.enter_context(imageroots.converted())
        roots = {EXT4: stack.enter_context(imageroots.unpacked_root())}
        for backend in Backend:
            roots[str(backend)] = stack.enter_context(imageroots.afs_root(files, backend))

        @contextmanager
        def cold(root: Path) -> Iterator[Callable[[], object]]:
            measure.drop_caches()
            yield imageroots.command(root, work)

        actions = {label: lambda root=root: cold(root) for label, root in roots.items()}
        taken = measure.interleave(actions, samples or SAMPLES)
        dropped = measure.drop_caches()
    targets = [measure.ratio(taken, str(backend), EXT4, limit) for backend, limit in LIMITS.items()]
    cache = "The page cache was emptied before each sample." if dropped else "The page cache could not be emptied."
    return measure.Report(
        f"coldroot-{name}",
        f"W in a cold root of {name}, all bytes local",
        measure.seconds(taken),
        targets,
        notes=[cache],
    )
