"""Images by chain id: the index of a node, what discovery knows of it, and what nodes tell each other."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from typing import TYPE_CHECKING

import pytest

from afs.core.digests import chain_ids, chained, sha256_digest
from afs.core.errors import DataLoss, InvalidArgument, NotFound
from afs.core.images import ImageRef, parse_image
from afs.core.rpc import calling, channel
from afs.discovery.client import Announcer, Peer
from afs.layerstore import chains
from afs.layerstore.chains import ChainIndex, chain_number, chains_of
from afs.layerstore.manifests import Image, Layer, NamedImage, image_key
from afs.proto.v1 import layerstore_pb2 as pb
from afs.proto.v1.layerstore_pb2_grpc import LayerstorePeerStub
from tests.testbed.layernodes import AMD64, OTHER, Node, Stack, World, running_world

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    from afs.layerstore.peers import Peers
    from tests.testbed import oci


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    """A cluster without nodes."""
    async with running_world(tmp_path) as running:
        yield running


@pytest.fixture
async def announcer(tmp_path: Path) -> AsyncIterator[Announcer]:
    """With nobody to announce to."""
    made = Announcer(f"unix:{tmp_path}/none", Peer("n1", "none", 1))
    yield made
    await made.leave()


def image(name: str, *layers: str) -> NamedImage:
    """An image of layers that are named only."""
    ref = parse_image(name)
    made = tuple(Layer(sha256_digest(text.encode()), OTHER, 1, "tar") for text in layers)
    return NamedImage(ref, AMD64, Image(image_key(str(ref), AMD64), sha256_digest(name.encode()), b"", b"", made, 0))


def top(named: NamedImage) -> str:
    """The chain id of the uppermost layer."""
    return chains_of(named.image)[-1]


# The index


def test_chain_ids_are_as_the_specification_has_them() -> None:
    one, two = sha256_digest(b"one"), sha256_digest(b"two")
    assert chained("", one) == one
    assert [chained("", one), chained(one, two)] == chain_ids([one, two])
    assert chain_number("sha256:0123456789abcdef" + 48 * "f") == 0x0123456789ABCDEF


async def test_discovery_is_told_what_no_image_here_has_any_more(announcer: Announcer) -> None:
    index = ChainIndex(announcer)
    one, two = image("one", "base", "a"), image("two", "base", "b")
    index.add(one)
    index.add(two)
    base = chain_number(chains_of(one.image)[0])
    assert announcer._chains == {base, chain_number(top(one)), chain_number(top(two))}
    assert index.find(chains_of(one.image)[0]) is two
    index.remove(two.image)
    assert announcer._chains == {base, chain_number(top(one))}
    assert index.find(chains_of(one.image)[0]) is one
    assert index.find(top(two)) is None
    index.remove(one.image)
    assert announcer._chains == set()
    assert not index._images


async def test_an_image_of_a_registry_is_better_than_a_file_of_some_node_and_one_that_was_named_best(
    announcer: Announcer,
) -> None:
    index = ChainIndex(announcer)
    first, second, file = image("one", "a"), image("two", "a"), image("docker-archive:/x.tar", "a")
    index.add(file)
    assert index.find(top(file)) is file
    index.add(first)
    index.add(second)
    index.add(image("oci:/y", "a"))
    assert index.find(top(file)) is second
    assert index.find(top(file), {first.ref.location, "elsewhere"}) is first
    assert index.find(top(file), {file.ref.location}) is file


async def test_a_stack_is_all_of_an_image(announcer: Announcer) -> None:
    index = ChainIndex(announcer)
    low, high, nothing = image("low", "a", "b"), image("high", "a", "b", "c"), image("nothing")
    for each in (low, high, nothing):
        index.add(each)
    diff_ids = [layer.diff_id for layer in high.image.layers]
    assert index.find_stack(diff_ids) is high
    assert index.find_stack(diff_ids[:2]) is low
    assert index.find_stack(diff_ids[:1]) is None
    assert index.find_stack(diff_ids[::-1]) is None
    assert index.find_stack([]) is None
    index.remove(nothing.image)


async def test_of_chain_ids_that_begin_alike_all_of_it_decides(
    announcer: Announcer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chains, "chain_number", lambda _chain_id: 7)
    index = ChainIndex(announcer)
    one, two = image("one", "a", "b"), image("two", "c", "d")
    index.add(one)
    index.add(two)
    assert (index.find(top(one)), index.find(top(two)), index.find(OTHER)) == (one, two, None)
    assert index.find_stack([layer.diff_id for layer in one.image.layers]) is one
    index.remove(one.image)
    assert announcer._chains == {7}
    assert (index.find(top(one)), index.find(top(two))) == (None, two)


# Nodes and discovery


async def known_to_discovery(node: Node, stack: Stack) -> list[list[str]]:
    """Which other nodes discovery names for each chain id."""
    numbers = [chain_number(chain_id) for chain_id in chain_ids(stack.diff_ids)]
    located = (await node.announcer.locate(chains=numbers)).chains
    return [[peer.node_id for peer in located.get(number, [])] for number in numbers]


async def test_discovery_knows_the_chains_of_known_images(world: World) -> None:
    one, two = await world.node("n1"), await world.node("n2")
    stack = world.add_stack("v1", "a", "b", "c")
    other = world.add_stack("v2", "a", "b", "d")
    await one.images.resolve(stack.ref, AMD64)
    assert await known_to_discovery(two, stack) == [["n1"]] * 3
    assert await known_to_discovery(one, stack) == [[]] * 3
    await two.images.resolve(other.ref, AMD64)
    assert await known_to_discovery(one, stack) == [["n2"], ["n2"], []]


async def test_forgotten_images_take_their_chains_with_them(world: World) -> None:
    one, two = await world.node("n1"), await world.node("n2")
    stack, other = world.add_stack("v1", "a", "b"), world.add_stack("v2", "a", "c")
    await one.images.resolve(stack.ref, AMD64)
    one.images._most = 1
    await one.images.resolve(other.ref, AMD64)
    assert await known_to_discovery(two, stack) == [["n1"], []]
    assert await known_to_discovery(two, other) == [["n1"], ["n1"]]


async def test_a_tag_that_moved_moves_its_chains(world: World) -> None:
    one, two = await world.node("n1"), await world.node("n2")
    before = world.add_stack("v1", "a", "b")
    await one.images.resolve(before.ref, AMD64)
    after = world.add_stack("v1", "a", "c")
    one.images._ttl = -1
    await one.images.resolve(after.ref, AMD64, here=True)
    assert await known_to_discovery(two, before) == [["n1"], []]
    assert await known_to_discovery(two, after) == [["n1"], ["n1"]]


async def test_chains_are_known_after_a_restart(world: World) -> None:
    outer, stack = world.stack, world.add_stack("v1", "a", "b")
    async with contextlib.AsyncExitStack() as world.stack:
        await (await world.node("n1")).images.resolve(stack.ref, AMD64)
    world.stack = outer
    one, two = await world.node("n1"), await world.node("n2")
    assert await known_to_discovery(two, stack) == [["n1"]] * 2
    found = one.images.find(chain_ids(stack.diff_ids)[1])
    assert found is not None
    assert (found.ref, found.platform, found.image.manifest_digest) == (stack.ref, AMD64, stack.manifest_digest)


async def test_what_is_found_was_used(world: World) -> None:
    node = await world.node("n1")
    stacks = [world.add_stack(tag, tag) for tag in ("v1", "v2", "v3")]
    for stack in stacks[:2]:
        await node.images.resolve(stack.ref, AMD64)
    node.images.find(stacks[0].diff_ids[0])
    node.images._most = 2
    await node.images.resolve(stacks[2].ref, AMD64)
    assert [node.images.find(stack.diff_ids[0]) is not None for stack in stacks] == [True, False, True]


# Between nodes


@contextlib.contextmanager
def answering(node: Node, monkeypatch: pytest.MonkeyPatch, answer: NamedImage) -> Iterator[None]:
    """Whatever is asked for, the node tells *answer*."""
    with monkeypatch.context() as patch:
        patch.setattr(node.images, "find", lambda _chain_id: answer)
        yield


def pinned(stack: Stack) -> ImageRef:
    """The image by its digest."""
    return parse_image(f"{stack.ref.location}@{stack.manifest_digest}")


async def find(peers: Peers, node: Node, chain_id: str) -> NamedImage:
    """Ask the node."""
    return await peers.find_image(Peer("n1", node.address, 1), chain_id)


async def test_a_node_tells_what_it_knows(world: World) -> None:
    one, two = await world.node("n1"), await world.node("n2")
    stack = world.add_stack("v1", "a", "b")
    image = await one.images.resolve(stack.ref, AMD64)
    asked = world.server.count()
    for chain_id in chain_ids(stack.diff_ids):
        found = await find(two.peers, one, chain_id)
        assert (found.ref, found.platform) == (pinned(stack), AMD64), "its tag is only what the node says"
        assert dataclasses.replace(found.image, key=image.key) == image
        assert found.image.key == image_key(str(found.ref), AMD64)
    with pytest.raises(NotFound, match=f"^no image known here has a layer of chain id {OTHER}$"):
        await find(two.peers, one, OTHER)
    assert world.server.count() == asked
    async with channel(one.address) as opened:
        with pytest.raises(InvalidArgument, match=r"^not a sha256 digest: 'x'$"), calling("layerstore"):
            await LayerstorePeerStub(opened).FindImage(pb.FindImageRequest(chain_id="x"))


async def test_a_name_that_an_index_pins_is_kept(world: World) -> None:
    one, two = await world.node("n1"), await world.node("n2")
    stack = world.add_stack("v1", "a", "b")
    index = world.builder.add_index(
        "all", {("linux", "amd64", ""): world.builder.add_image(None, _stored(world, stack))}
    )
    ref = parse_image(f"{stack.ref.location}@{index.digest}")
    image = await one.images.resolve(ref, AMD64)
    found = await find(two.peers, one, chain_ids(stack.diff_ids)[1])
    assert (found.ref, found.image) == (ref, image)


def _stored(world: World, stack: Stack) -> list[oci.Layer]:
    return [world.builder.add_layer(tar) for tar in stack.tars]


async def test_what_a_node_says_is_checked(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = await world.node("n1"), await world.node("n2")
    stack, other = world.add_stack("v1", "a", "b"), world.add_stack("v2", "c")
    wrong = NamedImage(other.ref, AMD64, await one.images.resolve(other.ref, AMD64))
    right = NamedImage(stack.ref, AMD64, await one.images.resolve(stack.ref, AMD64))
    chain_id = chain_ids(stack.diff_ids)[1]
    config = json.loads(right.image.config)
    config["rootfs"]["diff_ids"][1] = OTHER
    spoilt = dataclasses.replace(right.image, config=json.dumps(config).encode())
    lies = {
        wrong: f"^layerstore {one.address} answered {pinned(other)}, which has no layer of chain id {chain_id}$",
        right._replace(image=spoilt): "its config should be",
        right._replace(ref=pinned(other)): f"answered {stack.manifest_digest} for {pinned(other)}$",
    }
    for lie, message in lies.items():
        with answering(one, monkeypatch, lie), pytest.raises(DataLoss, match=message):
            await find(two.peers, one, chain_id)
    assert (await find(two.peers, one, chain_id)).image.manifest_digest == stack.manifest_digest
