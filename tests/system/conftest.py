"""Fixtures of the system tests."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.testbed import capabilities
from tests.testbed.lazycontainerd import LazyContainerd, lazy_containerd

if TYPE_CHECKING:
    import random
    from collections.abc import AsyncIterator, Iterator

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
