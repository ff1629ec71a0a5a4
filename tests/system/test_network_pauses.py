"""What a node reads while links and services go away and come back in time: all of it, with nothing but a pause.

After every test all is healed, and the node must read everything again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.testbed import capabilities
from tests.testbed.netcluster import GRACE, network_cluster, until

if TYPE_CHECKING:
    import random
    from collections.abc import Iterator

    from tests.testbed.netcluster import NetworkCluster, Service
    from tests.testbed.netns import Host

pytestmark = pytest.mark.root
HOW = ["killed", pytest.param("stopped", marks=pytest.mark.slow)]
"""What becomes of a service."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[NetworkCluster]:
    """Three nodes; a chunk may take longer than the start of a service on a busy machine."""
    capabilities.require("root", "fuse", "erofs", "netns", "docker-registry")
    with network_cluster(layerstore_deadline=15.0, fused_deadline=20.0) as running:
        yield running


async def end(service: Service, how: str) -> None:
    """End it cleanly, or not."""
    if how == "killed":
        service.kill()
    else:
        await service.stop()


async def something_lost(*hosts: Host) -> None:
    """Wait until one of these hosts has sent something again, for want of an answer."""
    before = [host.tcp("RetransSegs") for host in hosts]
    await until(lambda: [host.tcp("RetransSegs") for host in hosts] != before, "something is sent again")


@pytest.mark.parametrize("where", ["peer", "reader"])
async def test_a_link_is_cut(net: NetworkCluster, rng: random.Random, where: str) -> None:
    peer, reader = net.nodes[0], net.reader
    cut = (peer if where == "peer" else reader).host
    image = await net.image(rng, peer)
    net.registry_host.cut()
    async with net.mid_read(image, rng, peer, faultless=True) as readers:
        cut.cut()
        await something_lost(peer.host, reader.host)
        net.assert_unfinished(image)
        cut.heal()
        await net.all_right(readers)


async def test_connections_are_reset(net: NetworkCluster, rng: random.Random) -> None:
    peer, reader = net.nodes[0], net.reader
    image = await net.image(rng, peer)
    net.registry_host.cut()
    async with net.mid_read(image, rng, peer, faultless=True) as readers:
        before = reader.host.tcp("EstabResets")
        peer.host.reset()
        await until(lambda: reader.host.tcp("EstabResets") > before, "a connection is reset")
        net.assert_unfinished(image)
        peer.host.heal()
        await net.all_right(readers)


@pytest.mark.parametrize("how", HOW)
async def test_the_only_holder_is_restarted(net: NetworkCluster, rng: random.Random, how: str) -> None:
    first = net.nodes[0]
    image = await net.image(rng, first)
    net.registry_host.cut()
    async with net.mid_read(image, rng, first, faultless=True) as readers:
        await end(first.layerstore, how)
        net.assert_unfinished(image)
        await net.start_service(first.layerstore)
        await net.all_right(readers)


@pytest.mark.parametrize("how", HOW)
async def test_the_layerstore_of_readers_is_restarted(net: NetworkCluster, rng: random.Random, how: str) -> None:
    first = net.nodes[0]
    image = await net.image(rng, first)
    net.registry_host.cut()
    async with net.mid_read(image, rng, first, faultless=True) as readers:
        await end(net.reader.layerstore, how)
        net.assert_unfinished(image)
        await net.start_service(net.reader.layerstore)
        await net.all_right(readers)


async def test_the_snapshotter_of_readers_is_killed(net: NetworkCluster, rng: random.Random) -> None:
    """The root is gone with it, but who has files of it open goes on reading."""
    first = net.nodes[0]
    image = await net.image(rng, first)
    net.registry_host.cut()
    async with net.mid_read(image, rng, first) as readers:
        net.snapshotter.kill()
        await readers[0].more(1, GRACE)
        net.assert_unfinished(image)
        await net.start_service(net.snapshotter)
        await net.all_right(readers)


@pytest.mark.slow
@pytest.mark.parametrize("how", HOW)
async def test_discovery_is_restarted_and_has_forgotten_all(net: NetworkCluster, rng: random.Random, how: str) -> None:
    first = net.nodes[0]
    other, image = await net.image(rng, first), await net.image(rng, first)
    net.registry_host.cut()
    async with net.mid_read(image, rng, first, faultless=True) as readers:
        await end(net.discovery, how)
        await readers[0].more(1, GRACE)
        net.assert_unfinished(image)
        await net.start_service(net.discovery)
        await net.all_right(readers)
    await net.heard_of(*net.nodes)
    async with net.reading(other, rng) as readers:
        await net.all_right(readers)
