"""Fixtures of the system tests."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

import pytest

from tests.testbed import capabilities
from tests.testbed.cluster import cluster, exempt
from tests.testbed.lazycontainerd import LazyContainerd, lazy_containerd
from tests.testbed.leased import GRACE, TTL

if TYPE_CHECKING:
    import random
    from collections.abc import AsyncIterator, Iterator

    from tests.testbed.cluster import RealCluster
    from tests.testbed.images import BusyboxImage
    from tests.testbed.netcluster import NetworkCluster


@pytest.fixture
async def net(cluster: NetworkCluster, rng: random.Random) -> AsyncIterator[NetworkCluster]:
    """The module's cluster in network namespaces, whole before and after."""
    yield cluster
    await cluster.heal()
    await cluster.assert_works(rng)


@pytest.fixture(scope="session")
def session_containerd() -> Iterator[LazyContainerd]:
    """A containerd that gets its layers from a cluster; use it through `lazy`."""
    capabilities.require("root", "fuse", "overlay", "erofs", "cgroup", "runc", "containerd", "ctr-remote")
    with lazy_containerd() as running:
        yield running


@pytest.fixture
def lazy(session_containerd: LazyContainerd) -> Iterator[LazyContainerd]:
    """The session's containerd, without any image; afterwards all that the test made is removed, and has to be gone."""
    session_containerd.registry.forget()
    yield session_containerd
    session_containerd.print_log()
    session_containerd.remove_everything()
    session_containerd.assert_empty()


@pytest.fixture(scope="session")
def leased_cluster() -> Iterator[RealCluster]:
    """One node and a proxy with short leases; two runs may wait on the node, and it waits for runs when it stops."""
    capabilities.require("root", "fuse", "overlay", "erofs", "cgroup", "runc")
    flags = (f"--lease-ttl={TTL}s", "--max-queued=2", "--drain-timeout=1m", "--warm-roots=0")
    with cluster(1, afslet_flags=flags, proxy_flags=(f"--lease-ttl={TTL}s",)) as running, exempt(running):
        yield running


@pytest.fixture
def leased(leased_cluster: RealCluster, busybox_image: BusyboxImage) -> Iterator[RealCluster]:
    """That cluster, working and idle before and after."""

    async def make_whole() -> None:
        for process in reversed(leased_cluster.cluster.processes()):
            if process.popen.poll() is not None:
                await leased_cluster.restart(process)
        deadline = time.monotonic() + GRACE
        async with leased_cluster.client() as client:
            while not (await client.status())[0].summary.afslet_reachable:
                assert time.monotonic() < deadline
                await asyncio.sleep(0.05)  # the proxy looks at its nodes every second
            assert (await client.run(busybox_image.reference, ["true"])).ok

    asyncio.run(make_whole())
    yield leased_cluster
    asyncio.run(make_whole())
    leased_cluster.assert_idle()
