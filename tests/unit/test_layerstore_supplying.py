"""Layers by chain id over real gRPC: where they are found, who pulls them, and what is not believed."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import socket
import threading
from collections import Counter
from typing import TYPE_CHECKING

import pytest

from afs.core.digests import chain_ids
from afs.core.errors import DataLoss, InvalidArgument, NotFound, ResourceExhausted
from afs.core.images import host, parse_image
from afs.core.rpc import calling, channel
from afs.discovery.client import Announcer, Peer
from afs.layerstore import chains, peers, supplying
from afs.layerstore.manifests import NamedImage
from afs.layerstore.partial import PartialLayer
from afs.layerstore.peers import image_name
from afs.layerstore.store import CompleteLayer
from afs.layerstore.traces import parse_trace
from afs.proto.v1 import layerstore_pb2 as pb
from afs.proto.v1.layerstore_pb2_grpc import LayerstoreNodeStub
from tests.testbed.faults import Fault
from tests.testbed.layernodes import AMD64, OTHER, TAR, Node, Stack, World, running_world

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from afs.core.images import ImageRef, Platform
    from afs.layerstore.manifests import Image, Layer

FAIL, PULL, BEGIN = pb.SupplyLayerRequest.FAIL, pb.SupplyLayerRequest.PULL, pb.SupplyLayerRequest.BEGIN


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    """A cluster without nodes."""
    async with running_world(tmp_path) as running:
        yield running


@pytest.fixture(autouse=True)
def by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nodes are asked for images in the order of their names."""
    monkeypatch.setattr(supplying, "ranked", lambda _key, peers: sorted(peers, key=lambda peer: peer.node_id))


async def supply(
    node: Node, layer: pb.WantedLayer, missing: pb.SupplyLayerRequest.Missing.ValueType = FAIL
) -> pb.SupplyLayerResponse:
    """SupplyLayer as the snapshotter calls it."""
    async with channel(node.address) as opened:
        with calling("layerstore"):
            return await LayerstoreNodeStub(opened).SupplyLayer(pb.SupplyLayerRequest(layer=layer, missing=missing))


async def open_layers(node: Node, *layers: pb.WantedLayer, number: int = 0) -> list[pb.LocalLayer]:
    """OpenLayers as the snapshotter calls it."""
    async with channel(node.address) as opened:
        with calling("layerstore"):
            request = pb.OpenLayersRequest(layers=layers, number=number)
            return list((await LayerstoreNodeStub(opened).OpenLayers(request)).layers)


async def settled(*nodes: Node) -> None:
    """Until nothing is pulled in the background any more."""
    for node in nodes:
        while node.supplying._begun:
            await asyncio.gather(*node.supplying._begun.values())


def watch_finds(node: Node) -> list[str]:
    """Ids of the nodes that are asked for images from now on."""
    asked: list[str] = []
    find = node.peers.find_image

    async def watched(peer: Peer, chain_id: str) -> NamedImage:
        asked.append(peer.node_id)
        return await find(peer, chain_id)

    node.peers.find_image = watched  # type: ignore[method-assign]
    return asked


async def holding(world: World, name: str, stack: Stack) -> Node:
    """A node that has the image's layers and knows the image, which it did not ask of another node."""
    node = await world.node(name)
    node.hold(*stack.tars)
    await node.images.resolve(stack.ref, AMD64, here=True)
    await node.announcer.flush()
    return node


def name_of(stack: Stack) -> pb.ImageName:
    """By its tag."""
    return image_name(stack.ref, AMD64)


def pinned(stack: Stack) -> pb.ImageName:
    """By its digest."""
    return image_name(parse_image(f"{stack.ref.location}@{stack.manifest_digest}"), AMD64)


def blob_reads(world: World, stack: Stack) -> list[int]:
    """How often the registry gave each layer."""
    reads = Counter(seen.digest for seen in world.server.requests("GET .*/blobs/"))
    return [reads[layer.blob_digest] for layer in stack.layers]


def here(node: Node, stack: Stack) -> list[bool]:
    """Which layers the node has, at least partly."""
    return [node.layers.find(diff_id) is not None for diff_id in stack.diff_ids]


# What is asked for


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (pb.WantedLayer(), r"^chain_id: not a sha256 digest: ''$"),
        (pb.WantedLayer(chain_id="sha256:" + "A" * 64), "^chain_id: not a sha256 digest: 'sha256:A"),
        (pb.WantedLayer(chain_id=OTHER, parent_chain_id="x"), r"^parent_chain_id: not a sha256 digest: 'x'$"),
        (pb.WantedLayer(chain_id=OTHER, parent_chain_id=OTHER, diff_id="x"), r"^diff_id: not a sha256 digest: 'x'$"),
        (
            pb.WantedLayer(chain_id=OTHER, parent_chain_id=OTHER, diff_id=OTHER),
            f"^diff_id {OTHER} on {OTHER} does not make chain_id {OTHER}$",
        ),
        (
            pb.WantedLayer(chain_id=OTHER, diff_id=OTHER.replace("0", "1")),
            "^diff_id sha256:1+ on nothing does not make chain_id sha256:0+$",
        ),
    ],
    ids=["none", "upper", "parent", "diff_id", "pair", "bottom"],
)
async def test_what_is_asked_for_is_checked(world: World, wrong: pb.WantedLayer, message: str) -> None:
    node = await world.node("n1")
    with pytest.raises(InvalidArgument, match=message):
        await supply(node, wrong)
    with pytest.raises(InvalidArgument, match=message):
        await open_layers(node, wrong)


async def test_other_requests_that_make_no_sense(world: World) -> None:
    node = await world.node("n1")
    stack = world.add_stack("v1", "a", "b")
    with pytest.raises(InvalidArgument, match=r"^missing: 9 is none of its values$"):
        await supply(node, stack.wanted(1), 9)  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument, match=r"^layer 1: no diff_id is given$"):
        await open_layers(node, stack.wanted(0), stack.wanted(1))


# Finding


async def test_a_layer_of_an_image_that_is_known_here(world: World) -> None:
    stack = world.add_stack("v1", "a", "b")
    node, reads = await holding(world, "n1", stack), world.server.count()
    asked = watch_finds(node)
    for number, diff_id in enumerate(stack.diff_ids):
        answer = await supply(node, stack.wanted(number, pb.ImageName(image="other"), name_of(stack)))
        assert (answer.layer.chain_id, answer.layer.diff_id) == (chain_ids(stack.diff_ids)[number], diff_id)
        assert answer.layer.parent_chain_id == stack.wanted(number).parent_chain_id
        other = image_name(parse_image("other"), host())
        assert list(answer.layer.names) == [name_of(stack), other]
        complete = node.store.complete(diff_id)
        assert complete is not None
        assert answer.size_bytes == complete.layout.file_size == complete.path.stat().st_size
    assert (asked, world.server.count()) == ([], reads)


async def test_what_only_another_node_knows_is_found_without_the_registry(world: World) -> None:
    stack = world.add_stack("v1", "a", "b", "c")
    await holding(world, "n1", stack)
    two, reads = await world.node("n2"), world.server.count()
    asked = watch_finds(two)
    answer = await supply(two, stack.wanted(1))
    assert answer.layer.diff_id == stack.diff_ids[1]
    assert list(answer.layer.names) == [pinned(stack)]
    assert here(two, stack) == [False, True, False]
    assert (await supply(two, stack.wanted(2))).layer.diff_id == stack.diff_ids[2]
    assert (asked, world.server.count()) == (["n1"], reads), "it is remembered for the next layer"
    three = await world.node("n3")
    assert [peer.node_id for peer in (await _holders(three, stack, 2))] == ["n1", "n2"], "and for the next node"


async def _holders(node: Node, stack: Stack, number: int) -> list[Peer]:
    chain = chains.chain_number(chain_ids(stack.diff_ids)[number])
    return (await node.announcer.locate(chains=[chain])).chains[chain]


async def test_a_name_leads_to_the_image(world: World) -> None:
    platform = host()
    stack = world.add_stack("v1", "a", "b", platform=(platform.os, platform.architecture, platform.variant))
    one, two = await world.node("n1"), await world.node("n2")
    one.hold(*stack.tars)
    await one.announcer.flush()
    names = [pb.ImageName(image=stack.ref.location, tag=tag) for tag in ("v0", "v1", "v2")]
    answer = await supply(two, stack.wanted(1, *names), PULL)
    found = image_name(stack.ref, platform)
    assert [name.image.rpartition(":")[2] for name in answer.layer.names] == ["v1", "v0", "v2"]
    assert answer.layer.names[0] == found, "this machine's platform"
    assert blob_reads(world, stack) == [0, 0], "n1 has it"
    assert world.server.count("manifests/v2") == 0, "the second name was enough"


async def test_names_are_not_to_be_trusted(world: World, caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    caplog.set_level(logging.INFO)
    stack = world.add_stack("v1", "a", "b")
    node = await world.node("n1")
    bad = [
        pb.ImageName(),
        pb.ImageName(image="UPPER"),
        pb.ImageName(image=stack.ref.location, tag="a b"),
        pb.ImageName(image=f"oci:{tmp_path}/layout:v1"),
        pb.ImageName(image=stack.ref.location, tag="v1", os="x" * 1024),
        pb.ImageName(image=stack.ref.location, tag="v0"),
        pb.ImageName(image=stack.ref.location, tag="v0"),
    ]
    answer = await supply(node, stack.wanted(1, *bad, name_of(stack)), PULL)
    assert [name.image.rpartition(":")[2] for name in answer.layer.names] == ["v1", "v0"]
    assert [record.message.partition(":")[0] for record in caplog.records].count("passing over a name") == 5
    other = world.add_stack("v3", "c", "d")
    with pytest.raises(NotFound, match=r"^no image is known that has a layer of chain id sha256:"):
        await supply(node, other.wanted(1, *bad, pb.ImageName(image="b:ad?"), name_of(other)), PULL)
    assert world.server.count("manifests/v3") == 0, "the ninth is not looked at"


async def test_a_tag_that_moved_is_not_believed(world: World) -> None:
    before = world.add_stack("v1", "a", "b")
    one, two = await world.node("n1"), await world.node("n2")
    one.hold(*before.tars)
    await one.announcer.flush()
    after = world.add_stack("v1", "a", "c")
    with pytest.raises(NotFound, match=r"^no image is known that has a layer of chain id sha256:"):
        await supply(two, before.wanted(1, name_of(before)), PULL)
    assert here(two, before) == [False, False]
    one.hold(*after.tars)
    await one.announcer.flush()
    assert (await supply(two, after.wanted(1, name_of(before)), PULL)).layer.diff_id == after.diff_ids[1]


@pytest.mark.parametrize("knows", ["this node", "the owner"])
async def test_a_tag_that_moved_a_moment_ago_is_looked_at_again(world: World, knows: str) -> None:
    """The client read the manifest just now; the cluster believes what it knows of a tag for minutes."""
    before = world.add_stack("v1", "a", "b")
    one, two = await world.node("n1", capacity=1 << 40), await world.node("n2")
    for node in (one, two):
        await node.announcer.flush()
    await supply(two if knows == "this node" else one, before.wanted(1, name_of(before)), PULL)
    after = world.add_stack("v1", "a", "c")
    assert (await supply(two, after.wanted(1, name_of(after)), PULL)).layer.diff_id == after.diff_ids[1]


async def test_to_ask_again_is_to_believe_nobody(world: World) -> None:
    before = world.add_stack("v1", "a", "b")
    await (await holding(world, "n1", before)).announcer.flush()
    two = await world.node("n2", capacity=1 << 40)
    after = world.add_stack("v1", "a", "c")
    assert (await two.images.resolve(after.ref, AMD64, again=True)).manifest_digest == after.manifest_digest
    three = await world.node("n3", capacity=1 << 60)
    pinned_before = parse_image(f"{before.ref.location}@{before.manifest_digest}")
    requests = world.server.count()
    await three.images.resolve(pinned_before, AMD64, again=True)
    await three.images.resolve(pinned_before, AMD64, again=True)
    assert world.server.count() > requests, "nobody knew it by its digest"
    requests = world.server.count()
    await two.images.resolve(pinned_before, AMD64, again=True)
    assert world.server.count() == requests, "a digest does not move"


async def test_who_asks_again_joins_nobody_who_need_not(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    before = world.add_stack("v1", "a", "b")
    node = await world.node("n1")
    old = await node.images.resolve(before.ref, AMD64)
    after = world.add_stack("v1", "a", "c")
    node.images._ttl = -1
    begun, gate, ask, asked = asyncio.Event(), asyncio.Event(), node.images._ask_owner, list[bool]()

    async def slow(ref: ImageRef, platform: Platform, *, again: bool) -> Image:
        asked.append(again)
        if again:
            return await ask(ref, platform, again=True)
        begun.set()
        await gate.wait()
        return old  # what the owner believes

    monkeypatch.setattr(node.images, "_ask_owner", slow)
    plain = asyncio.create_task(node.images.resolve(before.ref, AMD64))
    await begun.wait()
    again = [asyncio.create_task(node.images.resolve(before.ref, AMD64, again=True)) for _ in range(2)]
    await asyncio.sleep(0)
    late = asyncio.create_task(node.images.resolve(before.ref, AMD64))
    await asyncio.sleep(0)
    gate.set()
    assert await plain is old
    assert [(await task).manifest_digest for task in (*again, late)] == [after.manifest_digest] * 3
    assert asked == [False, True]
    assert node.images.known(before.ref, AMD64).manifest_digest == after.manifest_digest


@pytest.mark.parametrize("missing", [FAIL, BEGIN])
async def test_names_are_only_for_those_who_want_a_registry_asked(
    world: World, missing: pb.SupplyLayerRequest.Missing.ValueType
) -> None:
    stack, gate = world.add_stack("v1", "a", "b"), threading.Event()
    one, two = await world.node("n1"), await world.node("n2")
    one.hold(*stack.tars)
    await one.announcer.flush()
    world.server.add(Fault("", gate=gate))
    asked = watch_finds(two)
    for _ in range(2):
        with pytest.raises(NotFound, match=r"^no image is known that has a layer of chain id sha256:"):
            await supply(two, stack.wanted(1, name_of(stack)), missing)
    assert len(two.supplying._begun) == (missing == BEGIN), "once for both calls"
    gate.set()
    await settled(two)
    assert here(two, stack) == [missing == BEGIN] * 2
    assert bool(world.server.count()) == (missing == BEGIN)
    assert (asked, blob_reads(world, stack)) == ([], [0, 0]), "n1 has the layers, and does not know the image"
    await one.images.resolve(stack.ref, AMD64, here=True)
    await one.announcer.flush()
    three, requests = await world.node("n3"), world.server.count()
    answer = await supply(three, stack.wanted(1, name_of(stack)), missing)
    assert answer.layer.diff_id == stack.diff_ids[1], "now other nodes tell"
    assert world.server.count() == requests


async def test_a_chain_that_nobody_knows(world: World) -> None:
    node = await world.node("n1")
    for missing in (FAIL, BEGIN, PULL):
        with pytest.raises(NotFound, match=f"^no image is known that has a layer of chain id {OTHER}$"):
            await supply(node, pb.WantedLayer(chain_id=OTHER, parent_chain_id=OTHER), missing)
    assert node.supplying._begun == {}


async def test_a_layer_lies_on_another_one_than_was_said(world: World) -> None:
    stack = world.add_stack("v1", "a", "b", "c")
    node = await holding(world, "n1", stack)
    ids = chain_ids(stack.diff_ids)
    with pytest.raises(NotFound, match=f"of chain id {ids[2]} lies on {ids[1]}, not on {ids[0]}$"):
        await supply(node, pb.WantedLayer(chain_id=ids[2], parent_chain_id=ids[0]))
    with pytest.raises(NotFound, match=f"of chain id {ids[2]} lies on {ids[1]}, not on nothing$"):
        await supply(node, pb.WantedLayer(chain_id=ids[2]))
    with pytest.raises(NotFound, match=f"of chain id {ids[0]} lies on nothing, not on {ids[1]}$"):
        await supply(node, pb.WantedLayer(chain_id=ids[0], parent_chain_id=ids[1]))


async def test_a_node_that_lies_or_fails_is_passed_over(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    stack, other = world.add_stack("v1", "a", "b"), world.add_stack("v2", "c")
    liar = await holding(world, "n1", stack)
    lie = NamedImage(other.ref, AMD64, await liar.images.resolve(other.ref, AMD64, here=True))
    monkeypatch.setattr(liar.images, "find", lambda _chain_id: lie)
    gone = await holding(world, "n2", stack)
    await gone.stop_serving()
    await holding(world, "n3", stack)
    four, reads = await world.node("n4"), world.server.count()
    asked = watch_finds(four)
    answer = await supply(four, stack.wanted(1))
    assert (answer.layer.diff_id, asked) == (stack.diff_ids[1], ["n1", "n2", "n3"])
    assert f"layerstore {liar.address} cannot tell about chain id {answer.layer.chain_id}: layerstore" in caplog.text
    assert f"layerstore {gone.address} cannot tell about chain id {answer.layer.chain_id}: layerstore" in caplog.text
    assert world.server.count() == reads


async def test_a_node_that_says_nothing_is_passed_over(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    stack = world.add_stack("v1", "a", "b")
    wanted, asked = stack.wanted(1), list[str]()
    with socket.create_server(("127.0.0.1", 0)) as silent:  # the kernel accepts, and nobody reads
        announcer = Announcer(world.discovery, Peer("n0", f"127.0.0.1:{silent.getsockname()[1]}", 1))
        announcer.know_chains([chains.chain_number(wanted.chain_id)])
        await announcer.flush()
        await holding(world, "n1", stack)
        two = await world.node("n2")
        find = two.peers.find_image

        async def impatient(peer: Peer, chain_id: str) -> NamedImage:
            asked.append(peer.node_id)
            monkeypatch.setattr(peers, "FIND_TIMEOUT_S", 0.2 if peer.node_id == "n0" else 30.0)
            return await find(peer, chain_id)

        two.peers.find_image = impatient  # type: ignore[method-assign]
        assert (await supply(two, wanted)).layer.diff_id == stack.diff_ids[1]
        await announcer.leave()
    assert asked == ["n0", "n1"]


async def test_of_chains_that_begin_alike_the_whole_id_decides(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (chains, supplying):
        monkeypatch.setattr(module, "chain_number", lambda _chain_id: 7)
    stack, other = world.add_stack("v1", "a", "b"), world.add_stack("v2", "c", "d")
    await holding(world, "n1", other)
    await holding(world, "n2", stack)
    three = await world.node("n3")
    asked = watch_finds(three)
    assert (await supply(three, stack.wanted(1))).layer.diff_id == stack.diff_ids[1]
    assert (await supply(three, other.wanted(1))).layer.diff_id == other.diff_ids[1]
    assert asked == ["n1", "n2", "n1"]


# A proved diff_id


@pytest.mark.parametrize("number", [0, 1], ids=["bottom", "given"])
async def test_a_diff_id_is_enough_if_somebody_has_the_layer(world: World, number: int) -> None:
    stack = world.add_stack("v1", "a", "b")
    one, two = await world.node("n1"), await world.node("n2")
    one.hold(*stack.tars)
    await one.announcer.flush()
    asked = watch_finds(two)
    answer = await supply(two, stack.wanted(number, name_of(stack), diff_id=number > 0))
    assert answer.layer.diff_id == stack.diff_ids[number]
    assert list(answer.layer.names) == [name_of(stack)]
    assert (asked, world.server.count()) == ([], 0)
    await two.layers.fill(stack.diff_ids[number], 0, 1)


@pytest.mark.parametrize("known", [True, False], ids=["peer", "name"])
async def test_a_diff_id_that_nobody_has_is_looked_for_to_be_pulled(world: World, known: bool) -> None:
    stack = world.add_stack("v1", "a", "b")
    one, two = await world.node("n1"), await world.node("n2")
    if known:
        await one.images.resolve(stack.ref, AMD64, here=True)
    asked, requests = watch_finds(two), world.server.count()
    wanted = stack.wanted(1, *([] if known else [name_of(stack)]), diff_id=True)
    with pytest.raises(NotFound, match=f"^no node has layer {stack.diff_ids[1]}$"):
        await supply(two, wanted)
    assert (asked, world.server.count()) == ([], requests)
    answer = await supply(two, wanted, PULL)
    assert asked == (["n1"] if known else [])
    assert list(answer.layer.names) == [pinned(stack) if known else name_of(stack)]
    await settled(two)
    assert blob_reads(world, stack) == [1, 1]


# Nobody has it


async def test_to_fail_is_to_pull_nothing(world: World) -> None:
    stack = world.add_stack("v1", "a", "b")
    node = await world.node("n1")
    await node.images.resolve(stack.ref, AMD64)
    requests = world.server.count()
    with pytest.raises(NotFound, match=f"^no node has layer {stack.diff_ids[1]}$"):
        await supply(node, stack.wanted(1, name_of(stack)))
    assert world.server.count() == requests
    assert node.supplying._begun == {}
    assert (blob_reads(world, stack), here(node, stack)) == ([0, 0], [False, False])
    assert node.layers._supply._origins._known == {}, "nothing is known of what is not here"


@pytest.mark.parametrize("diff_id", [False, True], ids=["chain", "diff_id"])
async def test_to_begin_is_to_pull_behind_the_call(world: World, diff_id: bool) -> None:
    stack, gate = world.add_stack("v1", "a", "b", "c"), threading.Event()
    node = await world.node("n1")
    if not diff_id:
        await node.images.resolve(stack.ref, AMD64)  # which the call waits for otherwise
    world.server.add(Fault("", gate=gate))
    wanted = stack.wanted(1, name_of(stack), diff_id=diff_id)
    for _ in range(2):
        with pytest.raises(NotFound, match=f"^no node has layer {stack.diff_ids[1]}$"):
            await supply(node, wanted, BEGIN)
    gate.set()
    await settled(node)
    assert here(node, stack) == [True] * 3
    assert blob_reads(world, stack) == [1, 1, 1]
    assert (await supply(node, wanted, BEGIN)).layer.diff_id == stack.diff_ids[1]


async def test_to_pull_is_to_have_all_of_the_image_pulled_once(world: World) -> None:
    stack = world.add_stack("v1", "a", "b", "c")
    nodes = [await world.node(name) for name in ("n1", "n2")]
    for node in nodes:
        await node.announcer.flush()  # each knows both
    wanted = [stack.wanted(number, name_of(stack)) for number in range(3)]
    answers = await asyncio.gather(*(supply(node, layer, PULL) for node in nodes for layer in wanted))
    assert [answer.layer.diff_id for answer in answers] == stack.diff_ids * 2
    await settled(*nodes)
    assert [here(node, stack) for node in nodes] == [[True] * 3] * 2
    assert blob_reads(world, stack) == [1, 1, 1]


async def test_one_call_is_enough_for_all_layers(world: World) -> None:
    stack = world.add_stack("v1", "a", "b", "c")
    node = await world.node("n1")
    await supply(node, stack.wanted(0, name_of(stack)), PULL)
    await settled(node)
    assert here(node, stack) == [True] * 3
    assert blob_reads(world, stack) == [1, 1, 1]


async def test_a_call_waits_for_its_own_layer_only(world: World, caplog: pytest.LogCaptureFixture) -> None:
    stack, gate = world.add_stack("v1", "a", "b", "c"), threading.Event()
    world.server.add(Fault(f"blobs/{stack.layers[1].blob_digest}", gate=gate, status=404))
    node = await world.node("n1")
    assert (await supply(node, stack.wanted(2, name_of(stack)), PULL)).layer.diff_id == stack.diff_ids[2]
    assert here(node, stack)[1:] == [False, True]
    gate.set()
    await settled(node)
    assert f"image {stack.ref}: layer {stack.diff_ids[1]} is not pulled: " in caplog.text
    assert here(node, stack) == [True, False, True]
    with pytest.raises(NotFound, match="stack:v1 not found"):
        await supply(node, stack.wanted(1), PULL)
    world.server.clear()
    assert (await supply(node, stack.wanted(1), PULL)).layer.diff_id == stack.diff_ids[1]


async def test_a_caller_that_goes_away_leaves_the_work_to_others(world: World) -> None:
    stack, gate = world.add_stack("v1", "a", "b"), threading.Event()
    node = await world.node("n1")
    await node.images.resolve(stack.ref, AMD64)
    world.server.add(Fault("GET .*/blobs/", gate=gate))
    begun, pull = asyncio.Event(), node.puller.pull

    async def watched(ref: ImageRef, layer: Layer) -> CompleteLayer:
        begun.set()
        return await pull(ref, layer)

    node.puller.pull = watched  # type: ignore[method-assign]
    call = asyncio.create_task(supply(node, stack.wanted(1), PULL))
    await begun.wait()
    other = asyncio.create_task(supply(node, stack.wanted(0), PULL))
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    gate.set()
    assert (await other).layer.diff_id == stack.diff_ids[0]
    await settled(node)
    assert blob_reads(world, stack) == [1, 1]
    assert here(node, stack) == [True, True]
    assert not node.leases._pins
    assert list((node.store.root / "tmp").iterdir()) == []


async def claiming(world: World, node: Node, stack: Stack) -> ImageRef:
    """The node knows another image, learnt last, which claims the layers with a blob that does not have them."""
    blob = world.builder.add_layer(b"not a tar", "plain")
    blobs = [dataclasses.replace(blob, diff_id=diff_id) for diff_id in stack.diff_ids]
    ref = parse_image(f"{world.server.address}/other:{stack.ref.tag}-claim")
    world.builder.add_image(ref.tag, blobs)
    await node.images.resolve(ref, AMD64, here=True)
    return ref


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("number", [0, 1], ids=["bottom", "above"])
async def test_an_image_that_claims_the_layers_of_another_one(world: World, known: bool, number: int) -> None:
    stack = world.add_stack("v1", "a", "b")
    node = await world.node("n1")
    if known:
        await node.images.resolve(stack.ref, AMD64)
    await claiming(world, node, stack)
    assert "other" in str(found.ref if (found := node.images.find(stack.diff_ids[0])) is not None else "")
    answer = await supply(node, stack.wanted(number, name_of(stack)), PULL)
    assert (answer.layer.diff_id, answer.layer.names[0]) == (stack.diff_ids[number], name_of(stack))
    assert world.server.count("other/blobs") == 1, "its config, when it was resolved"
    await settled(node)


async def test_an_image_that_cannot_be_pulled_is_not_the_end(world: World, caplog: pytest.LogCaptureFixture) -> None:
    stack = world.add_stack("v1", "a", "b")
    node = await world.node("n1")
    claim = await claiming(world, node, stack)
    answer = await supply(node, stack.wanted(1, image_name(claim, AMD64), name_of(stack)), PULL)
    assert (answer.layer.diff_id, answer.layer.names[0]) == (stack.diff_ids[1], name_of(stack))
    assert f"layer {stack.diff_ids[1]} cannot be pulled from {claim}: " in caplog.text
    await settled(node)
    other = world.add_stack("v2", "a", "d")
    claim = await claiming(world, node, other)
    with pytest.raises(DataLoss, match=f"^image {claim}: "):
        await supply(node, other.wanted(1, image_name(claim, AMD64)), PULL)
    await settled(node)


async def forgotten(node: Node, stack: Stack) -> None:
    """Nobody has the layers any more."""
    await settled(node)
    for diff_id in stack.diff_ids:
        if node.layers.find(diff_id) is not None:
            assert await node.room.drop(diff_id)


async def test_a_registry_that_says_nothing_delays_a_layer_once(world: World) -> None:
    """Its name came in an annotation, and is kept for every start of a container on the layer."""
    stack = world.add_stack("v1", "a", "b")
    node = await world.node("n1")
    await node.images.resolve(stack.ref, AMD64, here=True)
    with socket.create_server(("127.0.0.1", 0)) as silent:  # the kernel accepts, and nobody reads
        name = image_name(parse_image(f"127.0.0.1:{silent.getsockname()[1]}/silent:v1"), AMD64)
        wanted = [stack.wanted(number, name, diff_id=True) for number in range(2)]
        noticed = watch_failures(node, 2)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(1.0):
                await open_layers(node, *wanted)
        await asyncio.gather(*noticed)  # by the server, too
        async with asyncio.timeout(20.0):
            assert [layer.diff_id for layer in await open_layers(node, *wanted)] == stack.diff_ids
            world.clock.now += 61.0
            await forgotten(node, stack)
            assert len(await open_layers(node, *wanted)) == 2, "and what gave it goes first"
    await settled(node)


def watch_failures(node: Node, number: int) -> list[asyncio.Future[str]]:
    """The repositories that fail next."""
    failures = [asyncio.get_running_loop().create_future() for _ in range(number)]
    left, failed = iter(failures), node.supplying._experience.failed

    def watched(chain_id: str, location: str) -> None:
        next(left).set_result(location)
        failed(chain_id, location)

    node.supplying._experience.failed = watched  # type: ignore[method-assign]
    return failures


async def test_what_gave_a_layer_comes_before_what_the_caller_names(world: World) -> None:
    stack = world.add_stack("v1", "a", "b")
    node = await world.node("n1")
    await supply(node, stack.wanted(0, name_of(stack)), PULL)
    await forgotten(node, stack)
    claim = image_name(await claiming(world, node, stack), AMD64)
    requests = world.server.count("other/")
    for number in (1, 0):
        answer = await supply(node, stack.wanted(number, claim, diff_id=True), PULL)
        assert list(answer.layer.names) == [name_of(stack), claim], "each layer of the image has been pulled from there"
    await settled(node)
    assert world.server.count("other/") == requests
    await forgotten(node, stack)
    world.server.add(Fault("stack/blobs", status=404))  # now it fails, and the other one is tried
    with pytest.raises(NotFound):
        await supply(node, stack.wanted(1, claim), PULL)
    assert world.server.count("other/blobs") > 1
    await settled(node)
    world.server.clear()
    assert (await supply(node, stack.wanted(1, claim, name_of(stack)), PULL)).layer.diff_id == stack.diff_ids[1]
    await settled(node)


def test_experience_is_bounded_and_the_oldest_failure_is_tried_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supplying, "_MOST_REMEMBERED", 3)
    known = supplying._Experience()
    names = [(parse_image(f"r.example/{name}:v1"), AMD64) for name in "abcd"]
    a, b, c, d = (ref.location for ref, _ in names)

    def order() -> str:
        return "".join(ref.location[-1] for ref, _ in known.best_first(OTHER, names))

    assert order() == "abcd"
    known.failed(OTHER, a)
    known.failed(OTHER, b)
    known.worked(OTHER, d)
    assert (order(), known.proved(OTHER)) == ("dcab", d)
    known.failed(OTHER, a)
    known.failed(OTHER, d)
    assert (order(), known.proved(OTHER)) == ("cbad", None)
    known.failed(OTHER, c)
    assert order() == "badc", "of four the first is forgotten"
    known.worked(OTHER, a)
    assert order() == "abdc"
    for number in range(3):
        known.worked(f"chain {number}", a)
    assert (known.proved(OTHER), known.proved("chain 0")) == (None, a)


async def test_a_full_cache_is_nobody_s_fault(world: World) -> None:
    stack = world.add_stack("v1", "a", "b")
    node = await world.node("n1", quota=1)
    names = [name_of(stack), pb.ImageName(image=f"{stack.ref.location}@{stack.manifest_digest}")]
    with pytest.raises(ResourceExhausted, match=r"^cache of node n1 is full: "):
        await supply(node, stack.wanted(1, *names), PULL)
    await settled(node)


async def test_a_layer_that_a_peer_made_up_has_to_be_pulled(world: World) -> None:
    stack = world.add_stack("v1", "a", "b")
    await holding(world, "n1", stack)
    two = await world.node("n2")
    wanted = (await supply(two, stack.wanted(1))).layer
    partial = two.layers.find(wanted.diff_id)
    assert isinstance(partial, PartialLayer)
    partial.mark_forged()
    with pytest.raises(NotFound, match=f"^no node has layer {wanted.diff_id}$"):
        await supply(two, wanted)
    await supply(two, wanted, PULL)
    assert two.store.complete(wanted.diff_id) is not None
    await settled(two)


async def test_what_is_supplied_was_used(world: World) -> None:
    stack = world.add_stack("v1", "a", "b")
    node = await holding(world, "n1", stack)
    for number in (0, 1, 0):
        await supply(node, stack.wanted(number))
        assert node.room.status().layers[-1].diff_id == stack.diff_ids[number]


async def test_names_are_enough_without_discovery(world: World) -> None:
    stack = world.add_stack("v1", "a", "b")
    node = await world.node("n1")
    await world.stop_discovery()
    answer = await supply(node, stack.wanted(1, name_of(stack)), PULL)
    assert answer.layer.diff_id == stack.diff_ids[1]
    await settled(node)


async def test_the_end_of_the_service_ends_what_is_begun(world: World) -> None:
    stack, gate = world.add_stack("v1", "a", "b"), threading.Event()
    outer = world.stack
    async with contextlib.AsyncExitStack() as world.stack:
        node = await world.node("n1")
        await node.images.resolve(stack.ref, AMD64)
        world.server.add(Fault("GET .*/blobs/", gate=gate))
        with pytest.raises(NotFound):
            await supply(node, stack.wanted(1), BEGIN)
    world.stack = outer
    assert node.supplying._begun == {}
    assert not node.leases._pins
    gate.set()


# Opening


async def wanted_of(node: Node, stack: Stack) -> list[pb.WantedLayer]:
    """What the snapshotter knows of the layers after they were supplied."""
    return [(await supply(node, stack.wanted(number))).layer for number in range(len(stack.layers))]


async def test_what_is_here_is_opened_with_registry_and_discovery_gone(world: World) -> None:
    stack = world.add_stack("v1", "a", "b")
    one = await holding(world, "n1", stack)
    two = await world.node("n2")
    wanted = await wanted_of(two, stack)
    world.server.stop()
    await world.stop_discovery()
    for node, complete in ((one, True), (two, False)):
        layers = await open_layers(node, *wanted, wanted[0])
        assert [layer.diff_id for layer in layers] == [*stack.diff_ids, stack.diff_ids[0]]
        assert [bool(layer.path) for layer in layers] == [complete] * 3
        for layer in layers:
            found = node.layers.find(layer.diff_id)
            assert found is not None
            assert layer.size_bytes == found.layout.file_size
            assert layer.path == (str(found.path) if isinstance(found, CompleteLayer) else "")
        assert all(node.leases.is_leased(diff_id) for diff_id in stack.diff_ids)
        answers = [await supply(node, layer) for layer in wanted]
        assert [answer.layer.diff_id for answer in answers] == stack.diff_ids
        await node.stop_serving()  # the other one has nobody to ask


async def test_layers_without_an_image_are_opened_too(world: World) -> None:
    stack = world.add_stack("v1", "a", "b")
    node = await world.node("n1")
    node.hold(*stack.tars)
    world.server.stop()
    await world.stop_discovery()
    layers = await open_layers(node, *(stack.wanted(number, diff_id=True) for number in (1, 0)))
    assert [layer.diff_id for layer in layers] == stack.diff_ids[::-1]
    assert await open_layers(node) == []


async def test_opened_layers_stay_until_the_snapshotter_has_reported(world: World) -> None:
    stack = world.add_stack("v1", "a", "b")
    node = await holding(world, "n1", stack)
    wanted = await wanted_of(node, stack)
    assert not any(node.leases.is_leased(diff_id) for diff_id in stack.diff_ids), "supplied for nobody"
    await open_layers(node, *wanted, number=5)
    assert all(node.leases.is_leased(diff_id) for diff_id in stack.diff_ids)
    node.leases.connect(release := lambda _diff_ids: None)
    node.leases.report(release, in_use=[], idle=[], last_opened=5, opening=[5])
    assert all(node.leases.is_leased(diff_id) for diff_id in stack.diff_ids)
    node.leases.report(release, in_use=stack.diff_ids[:1], idle=[], last_opened=5)
    assert [node.leases.is_leased(diff_id) for diff_id in stack.diff_ids] == [True, False]


async def test_what_went_meanwhile_is_pulled_again(world: World) -> None:
    stack = world.add_stack("v1", "a", "b")
    node = await world.node("n1")
    wanted = [(await supply(node, stack.wanted(number, name_of(stack)), PULL)).layer for number in range(2)]
    await settled(node)
    for diff_id in stack.diff_ids:
        assert await node.room.drop(diff_id)
    node.images._most = 1
    await node.images.resolve(world.origin.ref, AMD64)  # and its image is forgotten
    layers = await open_layers(node, *wanted)
    assert [layer.diff_id for layer in layers] == stack.diff_ids
    await settled(node)
    assert blob_reads(world, stack) == [2, 2]


async def test_all_layers_or_none(world: World) -> None:
    stack = world.add_stack("v1", "a", "b", "c")
    node = await world.node("n1")
    node.hold(stack.tars[0])
    gate = threading.Event()
    await node.images.resolve(stack.ref, AMD64)
    world.server.add(
        Fault(f"blobs/{stack.layers[1].blob_digest}", corrupt=20),
        Fault(f"blobs/{stack.layers[2].blob_digest}", gate=gate),
    )
    wanted = [stack.wanted(number, diff_id=True) for number in range(3)]
    with pytest.raises(DataLoss):
        await open_layers(node, *wanted, number=3)
    gate.set()
    await settled(node)
    assert not node.leases._pins
    assert not any(node.leases.is_leased(diff_id) for diff_id in stack.diff_ids)
    world.server.clear()
    assert len(await open_layers(node, *wanted)) == 3


async def test_the_start_of_a_known_image_is_traced(world: World) -> None:
    one = await world.node("n1")
    one.hold(TAR)
    await one.announcer.flush()
    digests = []
    wanted = pb.WantedLayer(chain_id=world.diff_id, diff_id=world.diff_id)
    nodes = [await world.node(name) for name in ("n2", "n3")]
    for node in nodes:
        digest = (await node.images.resolve(world.origin.ref, AMD64)).manifest_digest
        await open_layers(node, wanted)
        while node.tracing._background:
            await asyncio.gather(*node.tracing._background)
        await node.layers.fill(world.diff_id, 3, 1)
        world.clock.now += 61.0  # the last user leaves
        node.tracing.review()
        await asyncio.gather(*node.tracing._background)
        trace = parse_trace(await node.tracing.read(digest), digest, [world.diff_id])
        digests.append([chunk.number for chunk in trace.chunks])
    assert digests == [[3], [3]]
    counts = nodes[1].tracing.counts
    assert (counts.recorded, counts.used, counts.from_peers, counts.prefetched_chunks) == (0, 1, 1, 1)


# What they take


async def test_usage_is_what_the_cache_counts(world: World) -> None:
    stack = world.add_stack("v1", "a", "b")
    one, two = await holding(world, "n1", stack), await world.node("n2")
    one.hold(TAR)
    await one.announcer.flush()
    await open_layers(two, pb.WantedLayer(chain_id=world.diff_id))
    await supply(two, stack.wanted(0))
    wanted = [*stack.diff_ids, world.diff_id, OTHER, "nonsense"]
    used = []
    for node in (one, two):
        async with channel(node.address) as opened:
            answer = await LayerstoreNodeStub(opened).LayerUsage(pb.LayerUsageRequest(diff_ids=wanted))
        used.append(dict(answer.used_bytes))
        assert used[-1] == {layer.diff_id: layer.used for layer in node.room.status().layers}
    assert [len(each) for each in used] == [3, 2]
    assert used[1][world.diff_id] < used[0][world.diff_id], "it is partial"
