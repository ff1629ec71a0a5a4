"""Fixtures of the system tests."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    import random
    from collections.abc import AsyncIterator

    from tests.testbed.netcluster import NetworkCluster


@pytest.fixture
async def net(cluster: NetworkCluster, rng: random.Random) -> AsyncIterator[NetworkCluster]:
    """The module's cluster in network namespaces, whole before and after."""
    yield cluster
    await cluster.heal()
    await cluster.assert_works(rng)
