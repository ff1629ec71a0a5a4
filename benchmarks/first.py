"""The first run of an image that only the registry has: AFS against `ctr images pull` and `ctr run`."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from tests.testbed.cluster import cluster
from tests.testbed.containerd import Containerd
from tests.testbed.registry import Registry

from benchmarks import measure, subjects

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

SAMPLES = {"busybox": 7, "debian": 7, "img4": 3}
LIMIT = 0.5
CTR = "ctr pull + run"


def run(name: str, samples: int | None) -> measure.Report:
    """Measure with the image *name*: every command of it, with each size of cluster."""
    image = subjects.image(name)
    series, targets, dropped = [], [], measure.drop_caches()
    with Registry() as registry:
        reference = image.push(registry)
        for label, command in image.commands.items():
            taken = measure.interleave(
                {
                    "AFS, 1 node": lambda command=command: _afs(1, reference, command),  # type: ignore[misc]
                    "AFS, 2 nodes": lambda command=command: _afs(2, reference, command),  # type: ignore[misc]
                    CTR: lambda command=command: _ctr(reference, command),  # type: ignore[misc]
                },
                samples or SAMPLES[name],
            )
            prefix = f"{label}: "
            series += [measure.Series(prefix + each.name, each.unit, each.samples) for each in measure.seconds(taken)]
            targets += [measure.ratio(taken, subject, CTR, LIMIT, prefix) for subject in taken if subject != CTR]
    cache = "The page cache was emptied before each sample." if dropped else "The page cache could not be emptied."
    return measure.Report(f"first-{name}", f"The first run in {name}", series, targets, notes=[cache])


@contextmanager
def _afs(nodes: int, reference: str, command: Sequence[str]) -> Iterator[Callable[[], object]]:
    """A cluster that has nothing yet, and a client that is connected."""
    with cluster(nodes) as running, subjects.connected(running.proxy) as client:
        measure.drop_caches()
        yield lambda: client.run(reference, command)


@contextmanager
def _ctr(reference: str, command: Sequence[str]) -> Iterator[Callable[[], object]]:
    """A containerd that has nothing yet."""
    with Containerd() as containerd:

        def act() -> None:
            subjects.ctr_pull(containerd, reference)
            subjects.ctr_run(containerd, reference, command)

        measure.drop_caches()
        yield act
