"""Runs of /bin/true by the SDK, one at a time and four at once: against bare runc, `ctr run` and `docker run`."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import TYPE_CHECKING

from tests.testbed.cluster import RealCluster, cluster
from tests.testbed.containerd import Containerd
from tests.testbed.docker import Docker
from tests.testbed.registry import Registry

from benchmarks import measure, subjects
from benchmarks.warm import bare_runc

if TYPE_CHECKING:
    from collections.abc import Callable

SAMPLES = 30
WARM_UP = 3
AT_ONCE = 4
RUNS = 40  # of one sample of what is measured four at once
AFS, BARE, CTR, DOCKER = "AFS", "bare runc", "ctr run", "docker run --network host"


def _servers(stack: ExitStack, name: str) -> tuple[str, RealCluster, Containerd]:
    """A registry with the image, whose name there comes first, a cluster, and a containerd that has pulled it."""
    registry = stack.enter_context(Registry())
    reference = subjects.image(name).push(registry)
    running = stack.enter_context(cluster(2))
    containerd = stack.enter_context(Containerd())
    subjects.ctr_pull(containerd, reference)
    return reference, running, containerd


def latency(name: str, samples: int | None) -> measure.Report:
    """One run after the other."""
    with ExitStack() as stack:
        reference, running, containerd = _servers(stack, name)
        client = stack.enter_context(subjects.connected(running.proxy))
        docker = stack.enter_context(Docker())
        docker.pull(reference)
        client.have_everywhere(reference, len(running.nodes))
        for node in running.nodes:
            client.run(reference, node=node.node_id)
        bare = stack.enter_context(bare_runc(running.nodes[0].run_dir, reference))
        taken = measure.interleave(
            {
                AFS: measure.plain(lambda: client.run(reference)),
                BARE: measure.plain(bare),
                CTR: measure.plain(lambda: subjects.ctr_run(containerd, reference)),
                DOCKER: measure.plain(lambda: docker.run(reference, subjects.TRUE)),
            },
            samples or SAMPLES,
            warm_up=WARM_UP,
        )
    targets = [measure.ratio(taken, AFS, peer, limit) for peer, limit in ((BARE, 1.35), (CTR, 0.4), (DOCKER, 0.35))]
    return measure.Report(f"runs-{name}", f"A run of /bin/true in {name}", measure.seconds(taken), targets)


def throughput(name: str, samples: int | None) -> measure.Report:
    """Four at once."""
    with ExitStack() as stack:
        reference, running, containerd = _servers(stack, name)
        client = stack.enter_context(subjects.connected(running.proxy))
        client.have_everywhere(reference, len(running.nodes))
        for node in running.nodes:
            client.run(reference, node=node.node_id)
        bares = [stack.enter_context(bare_runc(running.nodes[0].run_dir, reference, str(n))) for n in range(AT_ONCE)]
        threads = stack.enter_context(ThreadPoolExecutor(AT_ONCE))

        def spread(workers: list[Callable[[], None]]) -> None:
            def repeat(work: Callable[[], None]) -> None:
                for _ in range(RUNS // AT_ONCE):
                    work()

            list(threads.map(repeat, workers))

        def ctr() -> None:
            subjects.ctr_run(containerd, reference)

        taken = measure.interleave(
            {
                AFS: measure.plain(lambda: client.run_many(reference, RUNS, AT_ONCE)),
                BARE: measure.plain(lambda: spread(bares)),
                CTR: measure.plain(lambda: spread([ctr] * AT_ONCE)),
            },
            samples or 9,
            warm_up=1,
        )
    rates = {subject: [RUNS / each for each in seconds] for subject, seconds in taken.items()}
    series = [measure.Series(subject, "runs/s", each) for subject, each in rates.items()]
    targets = [
        measure.Target(f"runs/s: {AFS} / {peer}", measure.ratio(taken, peer, AFS, 0).value, limit, least=True)
        for peer, limit in ((BARE, 0.6), (CTR, 2.5))
    ]
    return measure.Report(f"rate-{name}", f"Runs of /bin/true in {name}, {AT_ONCE} at once", series, targets)
