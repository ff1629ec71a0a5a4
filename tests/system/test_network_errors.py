"""What a node reads while nobody can give it the bytes: an I/O error soon after the deadline, never wrong bytes.

After every test all is healed, and the node must read everything again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.testbed import capabilities
from tests.testbed.netcluster import flip, network_cluster

if TYPE_CHECKING:
    import random
    from collections.abc import Iterator

    from tests.testbed.netcluster import NetworkCluster

pytestmark = pytest.mark.root


@pytest.fixture(scope="module")
def cluster() -> Iterator[NetworkCluster]:
    """Three nodes; a chunk may take a second."""
    capabilities.require("root", "fuse", "erofs", "netns", "docker-registry")
    with network_cluster(layerstore_deadline=1.0, fused_deadline=1.5) as running:
        yield running


@pytest.mark.parametrize("where", ["peer", pytest.param("reader", marks=pytest.mark.slow)])
async def test_a_link_is_cut_for_longer_than_the_deadline(net: NetworkCluster, rng: random.Random, where: str) -> None:
    peer = net.nodes[0]
    image = await net.image(rng, peer)
    net.registry_host.cut()
    async with net.mid_read(image, rng, peer) as readers:
        (peer if where == "peer" else net.reader).host.cut()
        await net.all_failed(readers)


async def test_all_holders_are_killed(net: NetworkCluster, rng: random.Random) -> None:
    first, second, _ = net.nodes
    image = await net.image(rng, first, second)
    net.registry_host.cut()
    async with net.mid_read(image, rng, first, second) as readers:
        first.layerstore.kill()
        second.layerstore.kill()
        await net.all_failed(readers)


@pytest.mark.slow
async def test_the_only_holder_has_a_damaged_file(net: NetworkCluster, rng: random.Random) -> None:
    first = net.nodes[0]
    image = await net.image(rng, first)
    async with net.rooted(image):
        flip(first.complete_path(image))
        net.registry_host.cut()
        async with net.reading(image, rng) as readers:
            await net.all_failed(readers)


@pytest.mark.slow
async def test_what_is_left_of_a_layer_is_damaged(net: NetworkCluster, rng: random.Random) -> None:
    first, second, _ = net.nodes
    image = await net.image(rng, first)
    await net.hold_partly(image, second)
    flip(second.partial_path(image) / "data")
    net.registry_host.cut()
    async with net.rooted(image), net.reading(image, rng) as readers:
        first.layerstore.kill()
        await net.none_wrong(readers)
