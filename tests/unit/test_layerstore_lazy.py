"""Reading partial layers from other nodes: who is asked, what comes when, and how a layer becomes complete on the way."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import threading
from collections import Counter
from typing import TYPE_CHECKING

import pytest

from afs.core.digests import hex_of
from afs.core.errors import AfsError, NotFound
from afs.core.rpc import channel
from afs.layerstore import describing, origins, peerwatch, readahead, supply
from afs.layerstore.afslyr.layout import CHUNK_SIZE
from afs.layerstore.chunkserver import serving_chunks
from afs.layerstore.completion import Completing, Mode
from afs.layerstore.errors import LayerUnavailable
from afs.layerstore.fillserver import serving_fills
from afs.layerstore.fillwire import FillClient
from afs.layerstore.partial import Description, PartialLayer
from afs.layerstore.peers import Peers
from afs.layerstore.scheduling import Priority, Ticket
from afs.proto.v1 import layerstore_pb2 as pb
from afs.proto.v1.layerstore_pb2_grpc import LayerstoreNodeStub
from tests.testbed.faults import Fault
from tests.testbed.layernodes import LAYER_SIZE, Node, World, complete_of, open_partial, running_world

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Collection
    from pathlib import Path

    from afs.discovery.client import Peer
    from afs.layerstore.store import CompleteLayer


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    """A cluster without nodes."""
    async with running_world(tmp_path) as running:
        yield running


async def holder(world: World, name: str = "n1") -> Node:
    """A node that has the first layer."""
    node = await world.node(name)
    await node.layers.open(world.origin, local=True)
    return node


async def settled(node: Node) -> None:
    """Wait until what the node does in the background is done."""
    while node.layers._background:
        await asyncio.gather(*node.layers._background)


async def eventually(condition: Callable[[], bool]) -> None:
    """Wait for what has no event: files, lists and logs."""
    while not condition():  # noqa: ASYNC110
        await asyncio.sleep(0.001)


# One stream for a mount


async def test_a_description_brings_what_a_mount_reads(world: World) -> None:
    one, two = await holder(world), await world.node("n2")
    one.service.gate = asyncio.Event()  # no chunk is to be asked for by itself
    partial = await open_partial(world, two)
    assert one.service.chunks == partial.metadata_chunks()
    assert two.layers.stats(world.diff_id).from_peers[one.address] == sum(
        partial.table.chunk_range(index, partial.layout)[1] for index in partial.metadata_chunks()
    )


async def test_a_partial_holder_describes_what_it_has(world: World) -> None:
    one, two = await holder(world), await world.node("n2")
    partial = await open_partial(world, two)
    partial.unmark(0)
    parts = [part async for part in one.peers.describe_layer(two.announcer.me, world.diff_id)]
    assert isinstance(parts[0], Description)
    assert [part[0] for part in parts[1:] if not isinstance(part, Description)] == partial.metadata_chunks()[1:]
    with pytest.raises(NotFound):
        await anext(one.peers.describe_layer(two.announcer.me, "sha256:" + "0" * 64))


async def test_what_a_peer_claims_makes_no_room_before_it_came(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A description of a layer that would fill the cache, and then nothing."""
    one, two = await holder(world), await world.node("n2", quota=3 * LAYER_SIZE)
    monkeypatch.setattr(describing, "AHEAD", CHUNK_SIZE)
    world.clock.now += 100.0
    other = await two.layers.open(world.origins[1], local=True)
    layer = complete_of(one, world)

    async def describe(self: Peers, peer: Peer, diff_id: str) -> AsyncIterator[Description]:
        layout = dataclasses.replace(layer.layout, meta_offset=CHUNK_SIZE)  # all of it is metadata
        monkeypatch.setattr(PartialLayer, "metadata_chunks", lambda _: list(range(layer.table.count)))
        from afs.layerstore.afslyr.layout import pack_footer, pack_header

        root = bytes.fromhex(hex_of(layer.table.root_digest))
        yield Description(layout.file_size, pack_header(layer.layout), layer.table, pack_footer(layer.layout, root))
        assert two.room.status().reserved == CHUNK_SIZE
        raise LayerUnavailable(diff_id, "no more")

    monkeypatch.setattr(Peers, "describe_layer", describe)
    await two.layers.open(world.origin, local=False)
    assert two.layers.find(other.diff_id) is other


async def test_a_node_that_says_nothing_gets_another_one_beside_it(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(describing, "_BESIDE_S", 0.01)
    one, two = await holder(world, "n1"), await holder(world, "n2")
    three = await world.node("n3")
    three.layers._supply.watch._of(two.address).running = 1  # so the other one is asked first
    one.service.silent_after = 0
    partial = await open_partial(world, three)
    assert partial.is_mountable()
    assert two.service.chunks == partial.metadata_chunks()
    assert three.layers._supply.watch._of(one.address).strikes == 1
    assert list(three.layers.stats(world.diff_id).from_peers) == [two.address]


async def test_a_node_that_falls_silent_is_left(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """It describes the layer; chunks it gives when it is asked for them."""
    monkeypatch.setattr(describing, "_SILENT_S", 0.01)
    one, two = await holder(world), await world.node("n2")
    one.service.silent_after = 1
    partial = await open_partial(world, two)
    assert partial.is_mountable()
    assert two.layers.stats(world.diff_id).demanded == 0


async def test_a_layer_that_nobody_describes_is_pulled(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(describing, "_BESIDE_S", 0.01)
    monkeypatch.setattr(describing, "_FIRST_S", 0.05)
    nodes = [await holder(world, name) for name in ("n1", "n2")]
    three = await world.node("n3", capacity=1 << 60)
    for node in nodes:
        node.service.silent_after = 0
    assert await three.layers.open(world.origin, local=False) is complete_of(three, world)


async def test_a_layer_that_is_completed_while_it_is_described_is_not_closed_below_that(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    await holder(world)
    two = await world.node("n2")
    gate, real = asyncio.Event(), PartialLayer.put_async

    async def put(self: PartialLayer, index: int, data: bytes | memoryview) -> bool:
        await gate.wait()
        return await real(self, index, data)

    monkeypatch.setattr(PartialLayer, "put_async", put)
    opening = asyncio.create_task(two.layers.open(world.origin, local=False))
    await eventually(lambda: two.layers.find(world.diff_id) is not None)
    partial = two.layers.find(world.diff_id)
    assert isinstance(partial, PartialLayer)
    complete = await two.layers._supply.pull(world.origin)
    dropping = asyncio.create_task(two.layers.completion.drop_beside(world.diff_id))
    for _ in range(10):
        await asyncio.sleep(0)
    assert two.layers._partials.is_open(partial), "chunks of it are still to come"
    gate.set()
    assert await opening is complete, "not the partial one, which is closed"
    await dropping
    assert two.store.partial_ids() == []
    descriptor = os.open(os.devnull, os.O_RDONLY)  # it may have the number that the layer's file had
    partial.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        partial.put(1, complete.read_chunk(1) or b"")
    os.close(descriptor)  # it is open


# Who is asked


async def test_a_slow_node_is_overtaken_by_another_one(world: World) -> None:
    one, two = await holder(world, "n1"), await holder(world, "n2")
    three = await world.node("n3")
    partial = await open_partial(world, three)
    three.layers._supply.watch._now = world.clock  # it stands still
    three.layers._supply.watch._of(two.address).running = 1  # so the other one is asked first
    one.service.gate = asyncio.Event()
    one.service.chunks.clear()
    two.service.chunks.clear()
    for index in (4, 3, 2, 1):  # backwards: nothing is read ahead
        await three.layers.fill(world.diff_id, index, 1)
        assert partial.read(index) == complete_of(two, world).read_chunk(index)
    stats = three.layers.stats(world.diff_id)
    assert stats.hedges == len(one.service.chunks) == 2, "it is left alone after that"
    assert two.service.chunks == [4, 3, 2, 1]
    assert stats.failovers == 0


async def test_what_nobody_waits_for_is_not_asked_for_twice(world: World) -> None:
    one, two = await holder(world, "n1"), await holder(world, "n2")
    three = await world.node("n3")
    await open_partial(world, three)
    watch = three.layers._supply.watch
    watch._of(two.address).running = 1  # so the other one is asked first
    one.service.gate = asyncio.Event()
    one.service.chunks.clear()
    two.service.chunks.clear()
    watch.hedge_delay = lambda endpoint: 0.001  # type: ignore[method-assign]
    prefetching = asyncio.create_task(three.layers.prefetch(world.diff_id, [1]))
    await eventually(lambda: one.service.chunks == [1])
    for _ in range(20):  # delays
        await asyncio.sleep(0.001)
    assert two.service.chunks == []
    await three.layers.fill(world.diff_id, 1, 1)  # now a reader waits
    assert two.service.chunks == [1]
    assert three.layers.stats(world.diff_id).hedges == 1
    await prefetching


async def test_the_next_node_is_asked_after_an_error(world: World) -> None:
    one, two = await holder(world, "n1"), await holder(world, "n2")
    three = await world.node("n3")
    partial = await open_partial(world, three)
    await one.stop_serving()
    await three.layers.fill(world.diff_id, 1, 4)
    assert [partial.has(index) for index in range(1, 5)] == [True] * 4
    assert three.layers.stats(world.diff_id).failovers >= 1
    assert three.layers.stats(world.diff_id).from_peers[two.address] >= 4 * CHUNK_SIZE


async def test_a_node_that_came_later_is_found_while_reading(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supply, "_REFRESH_S", 0.0)
    one, three = await holder(world), await world.node("n3")
    await open_partial(world, three)
    two = await holder(world, "n2")
    await three.layers.fill(world.diff_id, 1, 1)
    await asyncio.gather(*three.layers._supply._looking.values())
    await one.stop_serving()
    await three.layers.fill(world.diff_id, 2, 1)
    assert two.service.chunks[-1] == 2


async def test_a_node_that_comes_while_the_only_one_is_silent_is_asked(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supply, "_SLOW_REFRESH_S", 0.0)
    monkeypatch.setattr(peerwatch, "_LEAST_TIMEOUT_S", 60.0)  # it is not given up before
    one, three = await holder(world), await world.node("n3", deadline=60.0)
    partial = await open_partial(world, three)
    three.layers._supply.watch._now = world.clock  # it stands still
    one.service.gate = asyncio.Event()
    one.service.chunks.clear()
    filling = asyncio.create_task(three.layers.fill(world.diff_id, 1, 1))
    await eventually(lambda: one.service.chunks == [1])
    two = await holder(world, "n2")
    await filling
    assert partial.read(1) == complete_of(two, world).read_chunk(1)
    assert (one.service.chunks, two.service.chunks) == ([1], [1])
    assert three.layers.stats(world.diff_id).hedges == 1


async def test_who_comes_back_is_asked_though_the_layer_is_being_pulled(world: World) -> None:
    one, two = await holder(world), await world.node("n2", deadline=60.0)
    partial = await open_partial(world, two)
    world.server.add(Fault("blobs/", gate=(gate := threading.Event())))  # a registry that does not answer
    await one.stop_serving()
    world.directory.leave("n1", one.announcer._incarnation)
    await two.announcer.flush()
    filling = asyncio.create_task(two.layers.fill(world.diff_id, 1, 2))
    try:
        await eventually(lambda: world.reads == 2)  # one's, and this
        async with serving_chunks("127.0.0.1", one.announcer.me.chunk_port, one.service.read_chunk):
            await one.announcer.flush()
            await filling
            assert not partial.has(3)
            await two.layers.fill(world.diff_id, 3, 1)
    finally:
        gate.set()
    assert partial.read(1) == complete_of(one, world).read_chunk(1)
    assert world.reads == 2, "one pull, whoever waits for it"


async def test_readers_wait_for_nodes_that_come_back(world: World) -> None:
    one, two = await holder(world), await world.node("n2", deadline=30.0)
    partial = await open_partial(world, two)
    world.server.add(Fault("", status=404))
    await one.stop_serving()
    failed, real = asyncio.Event(), two.layers._supply._failed_at

    def failed_at(diff_id: str, peer: Peer, bad: bool) -> None:
        real(diff_id, peer, bad)
        failed.set()

    two.layers._supply._fetcher._failed = failed_at
    filling = asyncio.create_task(two.layers.fill(world.diff_id, 1, 1))
    await failed.wait()
    async with contextlib.AsyncExitStack() as stack:
        port = one.announcer.me.chunk_port
        await stack.enter_async_context(serving_chunks("127.0.0.1", port, one.service.read_chunk))
        await filling
    assert partial.read(1) == complete_of(one, world).read_chunk(1)


async def test_who_reads_from_a_silent_node_does_not_hold_up_others(world: World) -> None:
    one, three, two = await holder(world), await world.node("n3"), await world.node("n2", deadline=60.0)
    other = world.origins[1]
    await three.layers.open(other, local=True)
    silent = await open_partial(world, two)
    await two.layers.open(other, local=False)
    two.layers._partials._slots._limits, two.layers._partials._slots._most_of_one = (2, 1, 1), 1
    one.service.gate = asyncio.Event()
    one.service.chunks.clear()
    filling = asyncio.create_task(two.layers.fill(world.diff_id, 1, 3))
    await eventually(lambda: bool(one.service.chunks))
    await two.layers.fill(other.layer.diff_id, 1, 1)
    assert not any(silent.has(index) for index in (1, 2, 3))
    one.service.gate.set()
    await filling


async def test_who_waits_for_a_node_to_come_back_holds_no_slot(world: World) -> None:
    one, three, two = await holder(world), await world.node("n3"), await world.node("n2", deadline=60.0)
    other = world.origins[1]
    await three.layers.open(other, local=True)
    await open_partial(world, two)
    await two.layers.open(other, local=False)
    two.layers._partials._slots._limits = (1, 1, 1)
    await one.stop_serving()
    world.directory.leave("n1", one.announcer._incarnation)
    world.server.add(Fault("blobs/", gate=(gate := threading.Event())))  # a registry that does not answer
    filling = asyncio.create_task(two.layers.fill(world.diff_id, 1, 1))
    try:
        await eventually(lambda: world.reads == 2)  # n1's, and this
        await two.layers.fill(other.layer.diff_id, 1, 1)
        assert not filling.done()
    finally:
        gate.set()
    await filling


async def test_waiting_in_the_queue_counts_for_a_reader_and_for_nobody_else(world: World) -> None:
    one, two = await holder(world), await world.node("n2", deadline=60.0)
    partial = await open_partial(world, two)
    two.layers._partials._slots._limits = (1, 1, 1)
    one.service.gate = asyncio.Event()
    one.service.chunks.clear()
    first = asyncio.create_task(two.layers.fill(world.diff_id, 1, 1))
    await eventually(lambda: one.service.chunks == [1])
    two.layers._supply._read_deadline = 0.05
    behind = [
        asyncio.create_task(partial.fill([index], two.layers._supply.fetch, Priority.PREFETCH)) for index in (2, 3)
    ]
    with pytest.raises(LayerUnavailable, match="other chunks come first"):
        await two.layers.fill(world.diff_id, 4, 1)
    with pytest.raises(LayerUnavailable, match="other chunks come first"):
        await two.layers.fill(world.diff_id, 2, 1)  # a reader wants it, too
    assert partial.missing() == [1, 2, 3, 4]
    assert list(partial.fillings) == [1, 3], "chunk 3 has as little time, and waits"
    one.service.gate.set()
    await first
    await asyncio.wait(behind)
    await partial.idle()


async def test_connections_are_closed_when_there_are_too_many(world: World) -> None:
    nodes = [await holder(world, name) for name in ("n1", "n2", "n3")]
    peers = Peers(most=2)

    async def call(node: Node) -> None:
        with pytest.raises(NotFound):
            await peers.read_trace(node.announcer.me, world.diff_id)

    for node in nodes:
        await call(node)
    assert list(peers._connections) == [node.address for node in nodes[1:]]
    async with contextlib.aclosing(peers.describe_layer(nodes[0].announcer.me, world.diff_id)) as parts:
        assert isinstance(await anext(parts), Description)
        for node in nodes[1:]:
            await call(node)
        assert nodes[0].address in peers._connections, "it has a call under way"
        assert [part async for part in parts]
    await peers.close()


async def test_places_of_layers_that_never_came_are_forgotten(world: World) -> None:
    node = await world.node("n1")
    world.server.add(Fault("", status=404))
    for bring in (node.layers.open(world.origin, local=True), node.layers.ensure(world.origin)):
        with pytest.raises(NotFound):
            await bring
    assert node.layers._supply._origins._known == {}
    for number in range(100):  # any image can claim a layer
        layer = dataclasses.replace(world.origin.layer, blob_digest=f"sha256:{number:064}")
        node.layers._supply.know(dataclasses.replace(world.origin, layer=layer))
    assert len(node.layers._supply._origins.of(world.diff_id)) == origins._MOST


# Demands, and what comes before them


async def test_a_demand_is_told_once_and_counted(world: World) -> None:
    one, two = await holder(world), await world.node("n2")
    partial = await open_partial(world, two)
    told: Counter[int] = Counter()
    two.layers.on_demand = lambda diff_id, index: told.update([index])
    one.service.gate = asyncio.Event()
    prefetching = asyncio.create_task(two.layers.prefetch(world.diff_id, [1, 2, 2, 99, -1, 0]))
    await eventually(lambda: len(one.service.chunks) == len(partial.metadata_chunks()) + 2)
    readers = [asyncio.create_task(two.layers.fill(world.diff_id, first, 2)) for first in (2, 2, 3)]
    one.service.gate.set()
    await asyncio.gather(prefetching, *readers)
    assert told == {2: 1, 3: 1, 4: 1}
    stats = two.layers.stats(world.diff_id)
    assert (stats.demanded, stats.prefetched) == (3, 1), "a reader waited for chunk 2"
    assert sorted(one.service.chunks)[1:5] == [1, 2, 3, 4], "each once"


async def test_the_other_half_comes_behind_what_a_reader_waits_for(world: World, tmp_path: Path) -> None:
    one, two = await holder(world), await world.node("n2")
    partial = await open_partial(world, two)
    told: list[int] = []
    two.layers.on_demand = lambda diff_id, index: told.append(index)
    client = FillClient(str(tmp_path / "fill.sock"), 5.0)
    async with serving_fills(tmp_path / "fill.sock", two.layers):
        await client.ask(op="fill", diff_id=world.diff_id, first=3, count=1)
        assert partial.has(3)
        await eventually(lambda: partial.has(2))
        await client.close()
    assert told == [3, 2], "a start trace has both, for the next node prefetches without an other half"
    stats = two.layers.stats(world.diff_id)
    assert (stats.demanded, stats.prefetched) == (1, 1)
    assert not partial.has(1)
    assert sorted(one.service.chunks) == sorted([*partial.metadata_chunks(), 2, 3])


async def test_what_cannot_be_prefetched_is_no_error(world: World, caplog: pytest.LogCaptureFixture) -> None:
    one, two = await holder(world), await world.node("n2", deadline=0.1)
    await open_partial(world, two)
    await one.stop_serving()
    world.server.add(Fault("", status=404))
    await two.layers.prefetch(world.diff_id, [1, 2])
    assert f"prefetch: layer {world.diff_id} cannot be read" in caplog.text
    await two.layers.prefetch("sha256:" + "0" * 64, [1])


async def test_a_prefetch_that_is_given_up_leaves_nothing_in_the_queue(world: World) -> None:
    one, two = await holder(world), await world.node("n2", deadline=60.0)
    partial = await open_partial(world, two)
    slots = two.layers._partials._slots
    slots._limits = (2, 1, 1)
    one.service.gate = asyncio.Event()
    one.service.chunks.clear()
    prefetching = asyncio.create_task(two.layers.prefetch(world.diff_id, [1, 2, 3]))
    await eventually(lambda: one.service.chunks == [1] and len(slots._waiting[Priority.PREFETCH]) == 2)
    waiting = asyncio.create_task(partial.fill([2], two.layers._supply.fetch, Priority.COMPLETION))
    await asyncio.sleep(0)
    prefetching.cancel()
    await asyncio.wait([prefetching])
    assert list(partial.fillings) == [1, 2], "one runs, one somebody else waits for"
    filling = asyncio.create_task(two.layers.fill(world.diff_id, 3, 1))
    await eventually(lambda: one.service.chunks == [1, 3])
    one.service.gate.set()
    await asyncio.gather(waiting, filling)
    assert partial.read(3) == complete_of(one, world).read_chunk(3)
    await partial.idle()
    assert not slots._of_peer
    assert not any(slots._waiting)


async def test_whoever_reads_on_and_on_finds_it_there(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readahead, "RUN", 3)  # of the four chunks that are only data
    _, two = await holder(world), await world.node("n2")
    await open_partial(world, two)
    for index in (1, 2, 3):
        await two.layers.fill(world.diff_id, index, 1)
    await settled(two)
    assert two.layers.stats(world.diff_id).prefetched == 1
    assert two.store.complete(world.diff_id) is not None, "and with that the layer was whole"


async def test_the_statistics_are_told(world: World) -> None:
    one, two = await holder(world), await world.node("n2")
    partial = await open_partial(world, two)
    await two.layers.fill(world.diff_id, 1, 1)
    for node, complete in ((one, True), (two, False)):
        async with channel(node.address) as opened:
            (layer,) = (await LayerstoreNodeStub(opened).CacheStatus(pb.CacheStatusRequest())).layers
        assert layer.complete is complete
        assert layer.chunks == partial.table.count
        assert layer.chunks_here == (layer.chunks if complete else partial.here)
        assert layer.bytes_from_source == (world.origin.layer.blob_size if complete else 0)
        assert layer.demanded_chunks == (0 if complete else 1)
        if complete:
            continue
        assert dict(layer.bytes_from_peers) == {one.address: two.layers.stats(world.diff_id).from_peers[one.address]}
    await two.room.drop(world.diff_id)
    world.clock.now += 100.0
    assert two.layers._supply._stats == {}


# Becoming complete


async def test_a_layer_whose_readers_wanted_all_of_it_is_complete(world: World) -> None:
    one, two = await holder(world), await world.node("n2")
    partial = await open_partial(world, two)
    with partial.data_path.open("rb") as mounted:
        await two.layers.fill(world.diff_id, 0, partial.table.count)
        await settled(two)
        complete = complete_of(two, world)
        assert mounted.read() == complete.path.read_bytes() == complete_of(one, world).path.read_bytes()
    assert two.layers.find(world.diff_id) is complete
    assert two.store.partial_ids() == []
    assert (await one.announcer.locate([world.diff_id])).complete[world.diff_id] == {"n2"}
    assert await two.layers.open(world.origin, local=False) is complete, "new mounts use the file"


async def test_what_the_disk_damaged_comes_again_before_it_is_complete(world: World) -> None:
    _, two = await holder(world), await world.node("n2")
    partial = await open_partial(world, two)
    await two.layers.fill(world.diff_id, 1, 1)
    with partial.data_path.open("r+b") as file:
        file.seek(CHUNK_SIZE)
        file.write(b"damage")
    await two.layers.fill(world.diff_id, 0, partial.table.count)
    await settled(two)
    assert partial.missing() == [1]
    await two.layers.fill(world.diff_id, 1, 1)
    await settled(two)
    assert two.store.complete(world.diff_id) is not None


async def test_a_forged_layer_is_pulled_once_its_readers_wanted_all_of_it(world: World) -> None:
    good = world.forge("n1")
    _, two = await world.node("n1"), await world.node("n2")
    partial = await open_partial(world, two)
    await two.layers.fill(world.diff_id, 0, partial.table.count)
    await settled(two)
    assert complete_of(two, world).path.read_bytes() == good
    assert two.store.partial_ids() == []
    assert two.layers.stats(world.diff_id).from_source == world.origin.layer.blob_size


async def test_a_layer_known_to_be_made_up_is_never_opened_again(world: World) -> None:
    """Its source does not answer when that shows; readers go on with what they have, others get an error or the right one."""
    good = world.forge("n1")
    one, two = await world.node("n1"), await world.node("n2")
    partial = await open_partial(world, two)
    world.server.add(Fault("", status=404))
    await two.layers.fill(world.diff_id, 0, partial.table.count)
    await settled(two)
    assert partial.is_forged
    await two.announcer.flush()
    assert "n2" not in [peer.node_id for peer in (await one.announcer.locate([world.diff_id])).layers[world.diff_id]]
    for local in (False, True):
        with pytest.raises(AfsError):
            await two.layers.open(world.origin, local=local)
    with pytest.raises(AfsError):
        await two.layers.ensure(world.origin)
    with pytest.raises(NotFound, match="is not what its name says"):
        await two.layers.read_chunk(world.diff_id, 1)
    await two.layers.fill(world.diff_id, 0, 1)  # by who has it mounted
    reopened = PartialLayer.open(world.diff_id, partial.directory)
    assert reopened.is_forged, "known over a restart"
    reopened.close()
    world.server.clear()
    opened = await two.layers.open(world.origin, local=False)
    assert opened is complete_of(two, world)
    assert complete_of(two, world).path.read_bytes() == good
    assert two.store.partial_ids() == []


async def test_what_was_whole_when_the_process_ended_is_complete_after_the_next_start(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    await holder(world)
    two = await world.node("n2")
    partial = await open_partial(world, two)
    with monkeypatch.context() as patch:
        patch.setattr(two.layers.completion, "promote", nothing)
        await two.layers.fill(world.diff_id, 0, partial.table.count)
        await settled(two)
    assert two.store.complete(world.diff_id) is None
    await two.layers.completion.run()  # the mode is never: it ends after that
    assert two.store.complete(world.diff_id) is not None
    assert two.store.partial_ids() == []


async def nothing(partial: PartialLayer) -> None:
    """Instead of what would come too early."""


class Background:
    """A node that completes layers, and its snapshotter."""

    def __init__(self, world: World, node: Node) -> None:
        self.world = world
        self.node = node
        self.task = asyncio.create_task(node.layers.completion.run())
        self.stream: Callable[[Collection[str]], None] = lambda diff_ids: None  # what it is asked to release stays
        node.leases.connect(self.stream)

    def mounted(self, *diff_ids: str) -> None:
        """Report what is in use."""
        self.node.leases.report(self.stream, diff_ids, [])

    async def looked(self, times: int = 3) -> None:
        """Wait until it has looked for something to do."""
        looked, real = asyncio.Event(), self.node.layers.completion._next_partial
        left = [times]

        def look() -> PartialLayer | None:
            left[0] -= 1
            if left[0] == 0:
                looked.set()
            return real()

        self.node.layers.completion._next_partial = look  # type: ignore[method-assign]
        await looked.wait()
        self.node.layers.completion._next_partial = real  # type: ignore[method-assign]

    async def stop(self) -> None:
        """End it."""
        self.task.cancel()
        await asyncio.wait([self.task])


@contextlib.asynccontextmanager
async def completing(world: World, mode: Mode, quota: int = 1 << 40) -> AsyncIterator[tuple[Background, PartialLayer]]:
    """A node with the layer, partial, and unlimited zeal."""
    how = Completing(mode, 0, idle=5.0, look=0.001, now=world.clock)
    background = Background(world, await world.node("n2", completing=how, quota=quota))
    yield background, await open_partial(world, background.node)
    await background.stop()


async def whole(node: Node, world: World) -> CompleteLayer:
    """The layer once it is complete."""
    await eventually(lambda: node.store.complete(world.diff_id) is not None)
    return complete_of(node, world)


async def test_layers_in_use_are_completed(world: World) -> None:
    one = await holder(world)
    async with completing(world, Mode.ALWAYS) as (background, partial):
        await background.looked()
        assert partial.here == len(partial.metadata_chunks()), "nobody uses it"
        background.mounted(world.diff_id)
        assert (await whole(background.node, world)).path.read_bytes() == complete_of(one, world).path.read_bytes()
        assert background.node.layers.stats(world.diff_id).demanded == 0
        assert world.reads == 1


async def test_while_readers_wait_nothing_is_completed(world: World) -> None:
    await holder(world)
    async with completing(world, Mode.IDLE) as (background, partial):
        await background.node.layers.fill(world.diff_id, 1, 1)
        background.mounted(world.diff_id)
        await background.looked()
        assert not partial.has(2)
        world.clock.now += 5.0
        await whole(background.node, world)


async def test_completing_takes_no_room_from_others(world: World) -> None:
    await holder(world)
    async with completing(world, Mode.ALWAYS, quota=2 * LAYER_SIZE) as (background, partial):
        node = background.node
        await node.layers.open(world.origins[1], local=True)
        background.mounted(world.diff_id)
        here = partial.here
        await background.looked()
        assert here <= partial.here < partial.table.count
        world.clock.now += 100.0
        await node.room.drop(world.origins[1].layer.diff_id)
        await whole(node, world)


async def test_a_layer_that_nobody_gives_is_left_alone_for_a_while(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    one = await holder(world)
    async with completing(world, Mode.ALWAYS) as (background, partial):
        background.node.layers._supply._read_deadline = 0.1
        await one.stop_serving()
        world.server.add(Fault("", status=404))
        background.mounted(world.diff_id)
        await eventually(lambda: f"cannot complete layer {world.diff_id} now: " in caplog.text)
        await background.looked()
        assert caplog.text.count("cannot complete layer") == 1
        assert background.node.layers.completion._next_partial() is None
        world.clock.now += 31.0
        assert background.node.layers.completion._next_partial() is partial


async def test_a_mistake_of_ours_does_not_end_completing(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    await holder(world)
    async with completing(world, Mode.ALWAYS) as (background, _):
        node = background.node
        real = node.layers._supply.fetch

        async def fetch(layer: PartialLayer, index: int, ticket: Ticket) -> bytes | memoryview | None:
            raise OverflowError("too large")

        monkeypatch.setattr(node.layers._supply, "fetch", fetch)
        background.mounted(world.diff_id)
        await eventually(lambda: "OverflowError: too large" in caplog.text)
        monkeypatch.setattr(node.layers._supply, "fetch", real)
        await background.looked()
        world.clock.now += 30.0
        await whole(node, world)


async def test_never_means_never(world: World) -> None:
    node = await world.node("n1")
    await node.layers.completion.run()  # ends at once


async def test_what_takes_its_time_is_paced(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    await holder(world)
    slept: list[float] = []
    how = Completing(Mode.ALWAYS, 2 * CHUNK_SIZE, look=0.001, now=world.clock)
    node = await world.node("n2", completing=how)
    real = asyncio.sleep

    async def sleep(seconds: float) -> None:
        slept.append(seconds)
        await real(0)

    await open_partial(world, node)
    monkeypatch.setattr("afs.layerstore.completion.asyncio.sleep", sleep)
    for _ in range(3):
        await node.layers.completion._pace(CHUNK_SIZE)
    assert slept == [0.0, 0.5, 1.0]


async def test_who_was_told_to_have_the_layer_does_not_wait_behind_the_background(world: World) -> None:
    one = await holder(world)
    two = await world.node("n2")
    partial = await open_partial(world, two)
    one.service.gate = asyncio.Event()
    slow = asyncio.create_task(partial.fill([1], two.layers._supply.fetch, Priority.COMPLETION))
    ensuring = asyncio.create_task(two.layers.ensure(world.origin))
    await asyncio.sleep(0)
    one.service.gate.set()
    await asyncio.gather(slow, ensuring)
    assert Counter(one.service.chunks)[1] == 1
