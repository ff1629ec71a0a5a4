"""What a node reads while peers die, lie, or cannot be reached: the right bytes, from somebody else.

After every test all is healed, and the node must read everything again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from afs.discovery.client import Peer
from afs.layerstore.placement import ranked
from tests.testbed import capabilities
from tests.testbed.netcluster import CAPACITY, flip, network_cluster

if TYPE_CHECKING:
    import random
    from collections.abc import Iterator

    from tests.testbed.netcluster import NetworkCluster, NetworkImage, Node

pytestmark = pytest.mark.root
END = [
    "killed",
    "cut off",
    pytest.param("reset", marks=pytest.mark.slow),
    pytest.param("parted", marks=pytest.mark.slow),
]
"""What becomes of a holder in mid-read."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[NetworkCluster]:
    """Three nodes; a deadline that is never reached while somebody can give the bytes."""
    capabilities.require("root", "fuse", "erofs", "netns", "docker-registry")
    with network_cluster(layerstore_deadline=15.0, fused_deadline=20.0) as running:
        yield running


def lose(net: NetworkCluster, node: Node, how: str) -> None:
    """Have the reading node lose a peer."""
    match how:
        case "killed":
            node.layerstore.kill()
        case "cut off":
            node.host.cut()
        case "reset":
            node.host.reset()
        case _:  # discovery sees it, and goes on telling of it
            net.reader.host.part_from(node.host)


async def image_owned_by(net: NetworkCluster, rng: random.Random, owner: Node) -> NetworkImage:
    """An image that nobody has, whose layer that node would pull for the others."""
    peers = [Peer(f"node{number}", "", CAPACITY) for number in range(1, len(net.nodes) + 1)]
    name = f"node{net.nodes.index(owner) + 1}"
    while True:
        image = await net.image(rng)
        if ranked(image.layer.diff_id, peers)[0].node_id == name:
            return image


async def refuse(net: NetworkCluster, node: Node) -> None:
    """Have nobody connect to a node that announces itself all the same."""
    node.layerstore.kill()  # whatever connections there are
    await net.start()
    node.host.refuse()
    await net.heard_of(node)


@pytest.mark.parametrize("how", END)
async def test_another_holder_takes_over(net: NetworkCluster, rng: random.Random, how: str) -> None:
    first, second, _ = net.nodes
    image = await net.image(rng, first)
    async with net.mid_read(image, rng, first, faultless=True) as readers:
        await net.hold(image, second)
        net.registry_host.cut()
        lose(net, first, how)
        net.assert_unfinished(image)
        await net.all_right(readers)


@pytest.mark.slow
async def test_another_holder_takes_over_from_a_slow_one(net: NetworkCluster, rng: random.Random) -> None:
    first, second, _ = net.nodes
    image = await net.image(rng, first)
    async with net.rooted(image):  # with the metadata here, and the first holder known
        first.host.slow("1mbit")  # two seconds a chunk
        await net.hold(image, second)
        net.registry_host.cut()
        async with net.reading(image, rng, faultless=True) as readers:
            await net.all_right(readers)


@pytest.mark.parametrize("how", [END[0], pytest.param(END[1], marks=pytest.mark.slow), *END[2:-1]])
async def test_the_registry_takes_over(net: NetworkCluster, rng: random.Random, how: str) -> None:
    first = net.nodes[0]
    image = await net.image(rng, first)
    async with net.mid_read(image, rng, first) as readers:
        lose(net, first, how)
        net.assert_unfinished(image)
        await net.all_right(readers)
    assert net.blob_fetches(image) == 2, "the first node's, and one for all that was missing"


async def test_a_lossy_link(net: NetworkCluster, rng: random.Random) -> None:
    peer = net.nodes[0]
    image = await net.image(rng, peer)
    net.registry_host.cut()
    before = peer.host.tcp("RetransSegs") + net.reader.host.tcp("RetransSegs")
    peer.host.lossy(3)
    async with net.reading(image, rng) as readers:
        await net.all_right(readers)
    assert peer.host.tcp("RetransSegs") + net.reader.host.tcp("RetransSegs") > before, "nothing was lost"


@pytest.mark.parametrize("others", [True, False], ids=["one of two holders", "the only holder"])
async def test_a_holder_refuses_connections(net: NetworkCluster, rng: random.Random, *, others: bool) -> None:
    first, second, _ = net.nodes
    image = await net.image(rng, first, *[second][:others])
    await refuse(net, first)
    async with net.reading(image, rng) as readers:
        await net.all_right(readers)


@pytest.mark.parametrize("how", ["cut off", pytest.param("refusing", marks=pytest.mark.slow)])
async def test_the_owner_of_a_layer_is_away_when_its_image_is_opened(
    net: NetworkCluster, rng: random.Random, how: str
) -> None:
    owner = net.nodes[0]
    image = await image_owned_by(net, rng, owner)
    if how == "refusing":
        await refuse(net, owner)
    else:
        owner.host.cut()
    async with net.reading(image, rng) as readers:
        await net.all_right(readers)


async def test_the_registry_is_cut_off_while_peers_have_everything(net: NetworkCluster, rng: random.Random) -> None:
    image = await net.image(rng, net.nodes[0])
    net.registry_host.cut()
    async with net.reading(image, rng) as readers:
        await net.all_right(readers)


@pytest.mark.slow
async def test_discovery_is_cut_off(net: NetworkCluster, rng: random.Random) -> None:
    """What is mounted goes on; a new image comes from the registry, for want of anybody known to have it."""
    first = net.nodes[0]
    other, image = await net.image(rng, first), await net.image(rng, first)
    async with net.mid_read(image, rng, first) as readers:
        net.discovery.host.cut()
        net.assert_unfinished(image)
        await net.all_right(readers)
    async with net.reading(other, rng) as readers:
        await net.all_right(readers)


@pytest.mark.parametrize("source", ["another holder", "the registry"])
async def test_a_holder_has_a_damaged_file(net: NetworkCluster, rng: random.Random, source: str) -> None:
    first, second, _ = net.nodes
    image = await net.image(rng, first)
    async with net.rooted(image):  # with the metadata here, and the first holder known
        flip(first.complete_path(image))
        if source == "another holder":
            await net.hold(image, second)
            net.registry_host.cut()
        async with net.reading(image, rng) as readers:
            await net.all_right(readers)


async def test_a_holder_of_a_part_has_a_damaged_file(net: NetworkCluster, rng: random.Random) -> None:
    first, second, _ = net.nodes
    image = await net.image(rng, first)
    await net.hold_partly(image, second)
    flip(second.partial_path(image) / "data")
    net.registry_host.cut()
    async with net.reading(image, rng) as readers:
        await net.all_right(readers)
