"""The cache of a node among others: what is evicted, leased, damaged and repaired, over real gRPC."""

from __future__ import annotations

import asyncio
import errno
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from afs.core.errors import Internal, NotFound, ResourceExhausted
from afs.core.rpc import calling, channel
from afs.layerstore import pull as pulling
from afs.layerstore import scrub
from afs.layerstore import store as storing
from afs.layerstore.afslyr.layout import CHUNK_SIZE, pack_header
from afs.layerstore.errors import CacheFull, DamagedLayer, DiskFull, LayerUnavailable
from afs.layerstore.leases import LEASE_S
from afs.layerstore.partial import Description, PartialLayer
from afs.layerstore.peers import Peers
from afs.layerstore.scrub import Scrubber
from afs.layerstore.store import CompleteLayer
from afs.layerstore.supply import Providers
from afs.layerstore.workers import Workers
from afs.proto.v1 import layerstore_pb2 as pb
from afs.proto.v1.layerstore_pb2_grpc import LayerstoreNodeStub
from tests.testbed import mounts
from tests.testbed.faults import Fault
from tests.testbed.layernodes import (
    LAYER_SIZE,
    Node,
    World,
    complete_of,
    flip,
    open_partial,
    pull,
    running_world,
    verified,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    """A cluster without nodes."""
    async with running_world(tmp_path) as running:
        yield running


def here(node: Node, world: World) -> list[int]:
    """The numbers of the layers of which the node has anything."""
    return [n for n, origin in enumerate(world.origins) if node.layers.find(origin.layer.diff_id) is not None]


# Eviction


async def test_old_layers_make_room_for_new_ones(world: World) -> None:
    node = await world.node("n1", quota=2 * LAYER_SIZE + CHUNK_SIZE)
    for number in range(4):
        await pull(world, node, number)
    assert here(node, world) == [2, 3]
    assert sorted(path.stem for path in (node.store.root / "layers").iterdir()) == sorted(
        world.origins[n].layer.diff_id[7:] for n in (2, 3)
    )
    assert list((node.store.root / "tmp").iterdir()) == []
    assert node.evicted() == 2
    await node.announcer.flush()
    other = await world.node("n2")
    located = await other.announcer.locate([origin.layer.diff_id for origin in world.origins])
    assert [n for n, o in enumerate(world.origins) if located.layers.get(o.layer.diff_id)] == [2, 3]
    node.layers.use(world.origins[2].layer.diff_id)  # a peer reads it
    world.clock.now += LEASE_S
    await pull(world, node, 0)
    assert here(node, world) == [0, 2]


async def test_a_full_cache_is_that_pull_s_error_only(world: World) -> None:
    node = await world.node("n1", quota=2 * LAYER_SIZE + CHUNK_SIZE)
    for number in (0, 1):
        await pull(world, node, number)
    for number in (0, 1):
        node.layers.use(world.origins[number].layer.diff_id)
    diff_id = world.origins[2].layer.diff_id
    with pytest.raises(ResourceExhausted, match=f"^cache of node n1 is full: layer {diff_id} needs 1.3 MiB, "):
        await node.layers.open(world.origins[2], local=True)
    with pytest.raises(CacheFull):
        await node.layers.ensure(world.origins[2])
    assert here(node, world) == [0, 1]
    assert world.server.count(world.origins[2].layer.blob_digest) == 0, "nothing was downloaded for it"
    world.clock.now += LEASE_S
    await node.layers.ensure(world.origins[2])
    assert here(node, world) == [1, 2]


async def test_a_blob_that_becomes_far_more_than_it_promised_is_stopped_on_the_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running_world(tmp_path, "gzip") as world:
        node = await world.node("n1", quota=CHUNK_SIZE)
        ended = asyncio.Event()

        async def inflate(self: Workers, job: dict[str, Any], limit: float) -> dict[str, Any]:
            Path(job["out"]).write_bytes(bytes(2 * CHUNK_SIZE))
            try:
                return await asyncio.Future()  # it would go on for ever
            finally:
                ended.set()

        monkeypatch.setattr(Workers, "run", inflate)
        monkeypatch.setattr(pulling, "_LOOK_S", 0.001)
        with pytest.raises(CacheFull):
            await node.layers.open(world.origin, local=True)
        assert ended.is_set()
        assert list((node.store.root / "tmp").iterdir()) == []


async def test_an_owner_whose_cache_is_full_is_stood_in_for(world: World) -> None:
    await world.node("n1", capacity=1 << 60, quota=CHUNK_SIZE)
    two = await world.node("n2", capacity=1)
    assert isinstance(await two.layers.open(world.origin, local=False), CompleteLayer)


async def test_partial_layers_count_as_far_as_they_are_filled_and_go_too(world: World) -> None:
    one, two = await world.node("n1"), await world.node("n2", quota=LAYER_SIZE + 3 * CHUNK_SIZE)
    await pull(world, one, 0)
    partial = await open_partial(world, two)
    (before,) = two.room.status().layers
    assert 0 < before.used < 3 * CHUNK_SIZE
    await two.layers.fill(world.diff_id, 1, 2)
    (after,) = two.room.status().layers
    assert after.used == before.used + 2 * CHUNK_SIZE
    two.layers.use(world.diff_id)  # a peer reads it
    with pytest.raises(CacheFull):
        await two.layers.open(world.origins[1], local=True)
    world.clock.now += LEASE_S
    await two.layers.open(world.origins[1], local=True)
    assert here(two, world) == [1]
    assert two.store.partial_ids() == []
    assert not partial.directory.exists()
    assert isinstance(await two.layers.open(world.origin, local=False), PartialLayer), "it may come back"


async def test_a_fill_that_nobody_waits_for_any_more_still_holds_the_layer(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = await world.node("n1"), await world.node("n2")
    await pull(world, one, 0)
    partial = await open_partial(world, two)
    reading, gate = asyncio.Event(), asyncio.Event()
    real = Peers.read_chunk

    async def read_chunk(self: Peers, *arguments: Any, **options: Any) -> Any:
        reading.set()
        await gate.wait()
        return await real(self, *arguments, **options)

    monkeypatch.setattr(Peers, "read_chunk", read_chunk)
    filling = asyncio.create_task(two.layers.fill(world.diff_id, 1, 1))
    await reading.wait()
    filling.cancel()
    await asyncio.wait([filling])
    assert not await two.room.drop(world.diff_id)
    gate.set()
    await partial.idle()
    assert partial.has(1)
    assert await two.room.drop(world.diff_id)
    assert here(two, world) == []


async def test_a_partial_layer_finds_no_room_for_its_metadata(world: World) -> None:
    one, two = await world.node("n1"), await world.node("n2", quota=LAYER_SIZE + CHUNK_SIZE)
    await pull(world, one, 0)
    await pull(world, two, 1)
    two.layers.use(world.origins[1].layer.diff_id)
    with pytest.raises(CacheFull):
        await two.layers.open(world.origin, local=False)
    assert here(two, world) == [1]
    assert list((two.store.root / "partial").iterdir()) == []


async def test_completing_from_peers_needs_room(world: World) -> None:
    one, two = await world.node("n1"), await world.node("n2", quota=LAYER_SIZE)
    await pull(world, one, 0)
    await pull(world, one, 1)
    partial = await open_partial(world, two)
    await two.layers.ensure(world.origin)
    assert here(two, world) == [0]
    assert not partial.directory.exists()
    two.layers.use(world.diff_id)
    with pytest.raises(CacheFull):
        await two.layers.ensure(world.origins[1])
    world.clock.now += LEASE_S
    await two.layers.ensure(world.origins[1])
    assert here(two, world) == [1]
    assert world.server.count(world.origins[1].layer.blob_digest) == 1, "n2 has it from n1"


async def test_a_reader_outlives_the_eviction_of_the_only_complete_copy(world: World) -> None:
    one = await world.node("n1", capacity=1 << 60, quota=LAYER_SIZE + CHUNK_SIZE)  # who pulls it again
    two = await world.node("n2")
    await pull(world, one, 0)
    partial = await open_partial(world, two)
    world.clock.now += LEASE_S
    await pull(world, one, 1)
    assert here(one, world) == [1]
    with partial.data_path.open("rb") as mounted:
        for index in range(partial.table.count):
            await two.layers.fill(world.diff_id, index, 1)
        assert mounted.read() == complete_of(one, world).path.read_bytes()
    assert here(one, world) == [0]
    assert world.reads == 2


async def test_origins_are_known_after_a_restart(world: World) -> None:
    """A partial layer that is mounted must not depend on who asked the layerstore's process before."""
    two = await world.node("n2")
    image = await two.images.resolve(world.origin.ref, world.origin.platform, here=True)
    assert image.layers[0] == world.origin.layer
    await two.images.close()
    two.layers._supply.forget(world.diff_id)
    two.layers.restore()
    assert two.layers._supply.origin(world.diff_id) == world.origin


# Leases


class NodeClient:
    """What the snapshotter does, over gRPC."""

    def __init__(self, node: Node) -> None:
        self.channel = channel(node.address)
        self.stub = LayerstoreNodeStub(self.channel)

    async def status(self) -> pb.CacheStatusResponse:
        """The cache's."""
        return await self.stub.CacheStatus(pb.CacheStatusRequest())

    async def until(self, node: Node, *, connected: bool) -> None:
        """Wait for the layerstore to see the stream or its end."""
        while node.leases.connected != connected:  # noqa: ASYNC110 - the server's side of a stream has no event
            await asyncio.sleep(0.001)


async def test_open_image_leases_until_the_mount_is_reported(world: World) -> None:
    node = await world.node("n1", quota=2 * LAYER_SIZE + CHUNK_SIZE)
    client = NodeClient(node)
    name = pb.ImageName(image=str(world.origin.ref), os="linux", architecture="amd64")
    opened = await client.stub.OpenImage(pb.OpenImageRequest(name=name, force_local_fetch=True))
    (layer,) = opened.layers
    assert node.leases.is_leased(layer.diff_id)
    call = client.stub.Leases()
    await call.write(pb.LeaseUpdate(in_use=[layer.diff_id]))
    await client.until(node, connected=True)
    await pull(world, node, 1)  # the lease of OpenImage is over
    await pull(world, node, 2)
    assert here(node, world) == [0, 2]
    status = await client.status()
    assert [(entry.diff_id, entry.leased, entry.complete) for entry in status.layers] == [
        (world.diff_id, True, True),
        (world.origins[2].layer.diff_id, False, True),
    ]
    assert status.leased_bytes == status.layers[0].used_bytes > 5 * CHUNK_SIZE
    assert status.used_bytes == sum(entry.used_bytes for entry in status.layers)
    assert (status.evicted_layers, status.capacity_bytes, status.reserved_bytes) == (1, 2 * LAYER_SIZE + CHUNK_SIZE, 0)
    assert status.snapshotter_connected
    await call.write(pb.LeaseUpdate())
    while node.leases.is_leased(world.diff_id):  # noqa: ASYNC110 - the server's side of a stream has no event
        await asyncio.sleep(0.001)
    assert [entry.diff_id for entry in (await client.status()).layers][-1] == world.diff_id, "it was in use until now"
    await pull(world, node, 3)
    assert here(node, world) == [0, 3]
    call.cancel()
    await client.until(node, connected=False)
    await client.channel.close()


async def test_the_layerstore_asks_for_idle_mounts(world: World) -> None:
    node = await world.node("n1", quota=LAYER_SIZE + CHUNK_SIZE)
    await pull(world, node, 0)
    client = NodeClient(node)
    call = client.stub.Leases()
    await call.write(pb.LeaseUpdate(idle=[world.diff_id]))
    await client.until(node, connected=True)
    while not node.leases.is_idle_mount(world.diff_id):  # noqa: ASYNC110 - as above
        await asyncio.sleep(0.001)
    pulling = asyncio.create_task(node.layers.open(world.origins[1], local=True))
    request = await call.read()
    assert isinstance(request, pb.LeaseRequest)
    assert list(request.release) == [world.diff_id]
    assert here(node, world) == [0], "not before it is unmounted"
    await call.write(pb.LeaseUpdate())
    await pulling
    assert here(node, world) == [1]
    call.cancel()
    await client.channel.close()


async def test_a_stream_that_ends_leaves_its_leases_for_the_grace_period(world: World) -> None:
    node = await world.node("n1", quota=LAYER_SIZE + CHUNK_SIZE, grace=30.0)
    world.clock.now += 30.0
    await pull(world, node, 0)
    client = NodeClient(node)
    call = client.stub.Leases()
    await call.write(pb.LeaseUpdate(in_use=[world.diff_id]))
    await client.until(node, connected=True)
    while not node.leases.is_leased(world.diff_id):  # noqa: ASYNC110 - as above
        await asyncio.sleep(0.001)
    call.cancel()
    await client.until(node, connected=False)
    world.clock.now += 29.0
    with calling("n1"), pytest.raises(CacheFull):
        await node.layers.open(world.origins[1], local=True)
    world.clock.now += 1.0
    await pull(world, node, 1)
    assert here(node, world) == [1]
    await client.channel.close()


# Damage


async def settled(node: Node) -> None:
    """Wait until what the node does in the background is done."""
    while node.layers._background:
        await asyncio.gather(*node.layers._background)


async def test_a_flipped_byte_is_never_served_and_repaired_from_a_peer(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    one, two = await world.node("n1"), await world.node("n2")
    complete = await pull(world, one, 0)
    await two.layers.ensure(world.origin)
    good = complete.read_chunk(2)
    with complete.path.open("rb") as mounted:
        flip(complete.path, 2 * CHUNK_SIZE + 12345)
        flip(complete.path, 3 * CHUNK_SIZE)
        with pytest.raises(DamagedLayer, match=f"^layer {world.diff_id}: chunk 2 is damaged on disk"):
            await one.layers.read_chunk(world.diff_id, 2, was_bad=True)
        assert world.diff_id not in one.announcer._held, "others do not come for it"
        await settled(one)
        assert await one.layers.read_chunk(world.diff_id, 2) == good
        mounted.seek(2 * CHUNK_SIZE)
        assert mounted.read(CHUNK_SIZE) == good, "in place: whoever has it open or mounted reads it"
    verified(complete.path)
    assert f"layer {world.diff_id}: chunks [2, 3] are damaged on disk" in caplog.text
    assert one.announcer._held[world.diff_id][1]
    assert world.reads == 1


async def test_what_a_node_compared_before_it_was_damaged_is_found_out_by_who_gets_it(world: World) -> None:
    one, two, three = [await world.node(name) for name in ("n1", "n2", "n3")]
    complete = await pull(world, one, 0)
    good = complete.read_chunk(2)
    await two.layers.ensure(world.origin)
    partial = await open_partial(world, three)
    flip(complete.path, 2 * CHUNK_SIZE + 12345)
    assert await one.layers.read_chunk(world.diff_id, 2) != good, "n2 has read it, and it was right"
    three.layers._supply.provide(world.diff_id, Providers([one.announcer.me], frozenset({"n1"})))
    await three.layers.fill(world.diff_id, 2, 1)
    assert partial.read(2) == good
    assert three.layers.stats(world.diff_id).bad_chunks == 1
    await settled(one)
    verified(complete.path)
    assert world.reads == 1


async def test_without_peers_it_is_repaired_from_its_source(world: World) -> None:
    node = await world.node("n1")
    complete = await pull(world, node, 0)
    flip(complete.path, CHUNK_SIZE)
    for offset in (8, complete.layout.table_offset, complete.layout.file_size - 60):  # what is in memory is right
        flip(complete.path, offset)
    other = await world.node("n2")
    parts = other.peers.describe_layer(node.announcer.me, world.diff_id)
    said = await anext(parts)
    assert isinstance(said, Description)
    assert (said.size, said.header, said.table) == (
        complete.layout.file_size,
        pack_header(complete.layout),
        complete.table,
    )
    await parts.aclose()
    with pytest.raises(DamagedLayer):
        await node.layers.read_chunk(world.diff_id, 1)
    await settled(node)
    verified(complete.path)
    assert world.reads == 2
    assert list((node.store.root / "tmp").iterdir()) == []


async def test_a_read_error_counts_as_damage(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = await world.node("n1"), await world.node("n2")
    complete = await pull(world, one, 0)
    partial = await open_partial(world, two)
    real = os.pread

    def pread(fd: int, length: int, offset: int) -> bytes:
        if offset == 0 and length == CHUNK_SIZE:
            raise OSError(errno.EIO, "Input/output error")
        return real(fd, length, offset)

    monkeypatch.setattr(os, "pread", pread)
    assert complete.read_chunk(0) is None
    assert await partial.read_async(0) is None
    monkeypatch.undo()
    assert complete.read_chunk(0) == await partial.read_async(0)


async def test_a_damaged_layer_is_not_opened_until_it_is_whole(world: World) -> None:
    node = await world.node("n1")
    complete = await pull(world, node, 0)
    flip(complete.path, CHUNK_SIZE)
    world.server.add(Fault("", status=404))
    with node.leases.pinned([world.diff_id]):  # mounted, say: it cannot go
        with pytest.raises(DamagedLayer):
            await node.layers.read_chunk(world.diff_id, 1)
        await settled(node)
        assert node.layers.repairs.count == 1
        for opening in (node.layers.open(world.origin, local=True), node.layers.ensure(world.origin)):
            with pytest.raises(DamagedLayer, match=f"^layer {world.diff_id}: a chunk is damaged on disk"):
                await opening
        world.server.clear()
    await node.layers.open(world.origin, local=True)
    verified(complete.path)
    assert node.layers.repairs.count == 0
    assert node.announcer._held[world.diff_id][1]


async def test_a_damaged_layer_that_nobody_needs_goes_if_it_cannot_be_repaired(world: World) -> None:
    node = await world.node("n1")
    complete = await pull(world, node, 0)
    flip(complete.path, CHUNK_SIZE)
    world.server.add(Fault("", status=404))
    assert not await node.layers.repairs.check(complete)
    assert here(node, world) == []
    assert node.layers.repairs.count == 0
    with pytest.raises(NotFound):
        await node.layers.read_chunk(world.diff_id, 1)
    world.server.clear()
    await pull(world, node, 0)


@pytest.fixture
def unwritable(monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk with a bad sector in every complete layer: no chunk can be repaired in place."""

    def write_chunk(self: CompleteLayer, index: int, data: bytes) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(CompleteLayer, "write_chunk", write_chunk)


@pytest.mark.usefixtures("unwritable")
async def test_a_damaged_layer_that_cannot_be_repaired_comes_anew(world: World) -> None:
    node = await world.node("n1")
    for number, bring in enumerate(("open", "open image", "ensure", "read")):
        flip((await pull(world, node, 0)).path, CHUNK_SIZE)
        node.layers.repairs.suspect(complete_of(node, world))
        if bring == "open":
            opened = [node.layers.open(world.origin, local=True) for _ in range(3)]
            assert len(set(map(id, await asyncio.gather(*opened)))) == 1
        elif bring == "open image":
            name = pb.ImageName(image=str(world.origin.ref), os="linux", architecture="amd64")
            async with channel(node.address) as opened_channel:
                request = pb.OpenImageRequest(name=name, number=1, force_local_fetch=True)
                await LayerstoreNodeStub(opened_channel).OpenImage(request)
            node.leases._handovers.clear()
        elif bring == "ensure":
            assert (await node.layers.ensure(world.origin))[1]
        else:
            with pytest.raises(DamagedLayer):  # which leases the layer, for the peer will read on
                await node.layers.read_chunk(world.diff_id, 1)
            await settled(node)
            assert here(node, world) == []
            await pull(world, node, 0)
        verified(complete_of(node, world).path)
        assert node.layers.repairs.count == 0
        assert world.reads == 1 + 2 * (number + 1), "once for the repair, which failed, and once anew"
        world.clock.now += LEASE_S


@pytest.mark.usefixtures("unwritable")
async def test_an_owner_with_a_damaged_layer_is_stood_in_for(world: World) -> None:
    one, two = await world.node("n1", capacity=1 << 60), await world.node("n2", capacity=1)
    flip((await pull(world, one, 0)).path, CHUNK_SIZE)
    with one.leases.pinned([world.diff_id]):  # mounted, say
        one.layers.repairs.suspect(complete_of(one, world))
        await one.announcer.flush()
        assert isinstance(await two.layers.open(world.origin, local=False), CompleteLayer)


async def test_damage_behind_a_running_check_is_repaired_too(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    node = await world.node("n1")
    complete = await pull(world, node, 0)
    loop, real, passed = asyncio.get_running_loop(), CompleteLayer.read_chunk, asyncio.Event()

    def read_chunk(self: CompleteLayer, index: int, *, from_disk: bool = False, verify: bool = True) -> bytes | None:
        if from_disk and index == 4 and not passed.is_set():
            flip(complete.path, CHUNK_SIZE)
            asyncio.run_coroutine_threadsafe(find_it(), loop).result()
        return real(self, index, from_disk=from_disk, verify=verify)

    async def find_it() -> None:
        with pytest.raises(DamagedLayer):
            await node.layers.read_chunk(world.diff_id, 1)
        passed.set()

    monkeypatch.setattr(CompleteLayer, "read_chunk", read_chunk)
    checking = asyncio.create_task(node.layers.repairs.check(complete))
    await passed.wait()
    await node.layers.open(world.origin, local=True)
    verified(complete.path)
    assert await checking
    assert node.layers.repairs.count == 0
    assert node.announcer._held[world.diff_id][1]


async def test_a_damaged_chunk_of_a_partial_layer_is_fetched_again(world: World) -> None:
    one, two = await world.node("n1"), await world.node("n2")
    complete = await pull(world, one, 0)
    partial = await open_partial(world, two)
    await two.layers.fill(world.diff_id, 1, 1)
    flip(partial.data_path, CHUNK_SIZE)
    with pytest.raises(DamagedLayer, match=f"^layer {world.diff_id}: chunk 1 is damaged on disk"):
        await two.layers.read_chunk(world.diff_id, 1, was_bad=True)
    assert not partial.has(1), "a reader waits from now on"
    await settled(two)
    assert await two.layers.read_chunk(world.diff_id, 1) == complete.read_chunk(1)


async def test_a_pulled_layer_that_was_damaged_is_repaired_before_a_partial_one_takes_from_it(world: World) -> None:
    one, two = await world.node("n1"), await world.node("n2")
    await pull(world, one, 0)
    partial = await open_partial(world, two)
    complete = await two.puller.pull(world.origin.ref, world.origin.layer)
    flip(complete.path, CHUNK_SIZE)
    await two.layers.fill(world.diff_id, 1, 1)
    assert partial.read(1) == complete_of(one, world).read_chunk(1)
    verified(complete.path)


async def test_a_damaged_layer_beside_a_partial_one_is_an_error_at_the_deadline(world: World) -> None:
    one = await world.node("n1")
    await pull(world, one, 0)
    two = await world.node("n2", deadline=0.2)
    partial = await open_partial(world, two)
    flip((await two.puller.pull(world.origin.ref, world.origin.layer)).path, CHUNK_SIZE)
    await one.stop_serving()
    world.server.add(Fault("", status=404))
    with pytest.raises(LayerUnavailable):
        await two.layers.fill(world.diff_id, 1, 1)
    assert not partial.has(1)
    assert not two.announcer._held.get(world.diff_id, (0, False))[1], "others do not come for it"


async def test_what_nobody_can_repair_is_an_error_to_the_reader(world: World) -> None:
    one = await world.node("n1")
    await pull(world, one, 0)
    two = await world.node("n2", deadline=0.2)
    partial = await open_partial(world, two)
    flip(complete_of(one, world).path, CHUNK_SIZE)
    world.server.add(Fault("", status=404))
    with pytest.raises(LayerUnavailable):
        await two.layers.fill(world.diff_id, 1, 1)
    assert not partial.has(1)


# Disks


async def test_a_disk_that_fails_ends_neither_scrubbing_nor_evicting(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = await world.node("n1")
    await pull(world, node, 0)
    errors: list[Exception] = [OSError(errno.EIO, "Input/output error"), Internal("rm failed")]
    again = asyncio.Event()

    def work(*_: object) -> None:
        if errors:
            raise errors.pop()
        again.set()

    async def tidy() -> None:
        if errors:
            node.room._look.set()
        work()

    monkeypatch.setattr(scrub, "LOOK_S", 0.001)
    scrubber = Scrubber(node.store, node.leases, node.layers.repairs.check, 1e9, boot="boot")

    def due() -> tuple[float, None]:
        work()
        return 1e9, None

    monkeypatch.setattr(scrubber, "due", due)
    monkeypatch.setattr(node.room, "tidy", tidy)
    for endless in (scrubber.run, node.room.run):
        node.room._look.set()
        running = asyncio.create_task(endless())
        await asyncio.wait([running, asyncio.create_task(again.wait())], return_when=asyncio.FIRST_COMPLETED)
        assert not running.done()
        running.cancel()
        await asyncio.wait([running])
        errors += [OSError(errno.EIO, "Input/output error"), Internal("rm failed")]
        again.clear()


async def test_a_read_only_disk_still_serves(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    node = await world.node("n1")
    complete = await pull(world, node, 0)

    def utime(*_: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "utime", utime)
    node.room._persisted.clear()
    assert await node.layers.read_chunk(world.diff_id, 0) == complete.read_chunk(0)


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), Internal("rm failed")], ids=repr)
async def test_files_that_cannot_be_deleted_are_no_error_of_a_pull(
    world: World, monkeypatch: pytest.MonkeyPatch, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    node = await world.node("n1", quota=2 * LAYER_SIZE + CHUNK_SIZE)
    for number in (0, 1):
        await pull(world, node, number)

    def delete(path: Path) -> None:
        raise error

    monkeypatch.setattr(storing, "delete", delete)
    await pull(world, node, 2)
    assert here(node, world) == [1, 2]
    assert len(list((node.store.root / "tmp").iterdir())) == 1, "it goes at the next start"
    assert f"cannot remove {node.store.root}/tmp/" in caplog.text


async def test_a_partial_layer_that_cannot_be_read_is_pulled_instead(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = await world.node("n1"), await world.node("n2")
    await pull(world, one, 0)
    real = Workers.run

    async def run(self: Workers, job: dict[str, Any], limit: float | None = None) -> dict[str, Any]:
        if "check" in job:
            return {"error": "[Errno 5] Input/output error", "status": "INTERNAL", "errno": errno.EIO}
        return await real(self, job, limit)

    monkeypatch.setattr(Workers, "run", run)
    complete, pulled = await two.layers.ensure(world.origin)
    assert pulled
    verified(complete.path)
    assert two.store.partial_ids() == []


# Full disks


async def test_a_reader_on_a_full_disk_pushes_idle_layers_out(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = await world.node("n1"), await world.node("n2", deadline=0.2)
    await pull(world, one, 0)
    partial = await open_partial(world, two)
    await pull(world, two, 1)
    real = os.pwrite

    def full(fd: int, data: Any, offset: int) -> int:
        if here(two, world) == [0, 1]:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", full)
    two.layers.use(world.origins[1].layer.diff_id)
    with pytest.raises(DiskFull, match=f"^layer {world.diff_id}: no space left in {two.store.root}$"):
        await two.layers.fill(world.diff_id, 1, 1)
    assert not partial.has(1)
    world.clock.now += LEASE_S
    await two.layers.fill(world.diff_id, 1, 1)
    assert partial.read(1) == complete_of(one, world).read_chunk(1)
    assert here(two, world) == [0]


async def test_a_description_on_a_full_disk_pushes_idle_layers_out(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = await world.node("n1"), await world.node("n2")
    await pull(world, one, 0)
    await pull(world, two, 1)
    real = PartialLayer.create

    def create(diff_id: str, directory: Path, said: Description) -> PartialLayer:
        if here(two, world) == [1]:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(diff_id, directory, said)

    monkeypatch.setattr(PartialLayer, "create", create)
    two.layers.use(world.origins[1].layer.diff_id)
    with pytest.raises(DiskFull, match=f"^layer {world.diff_id}: no space left in {two.store.root}$"):
        await open_partial(world, two)
    world.clock.now += LEASE_S
    await open_partial(world, two)
    assert here(two, world) == [0]


async def test_one_eviction_is_enough_for_all_who_wait_for_room(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    node = await world.node("n1")
    for number in range(3):
        await pull(world, node, number)
    assert await asyncio.gather(*(node.room.on_full_disk(CHUNK_SIZE) for _ in range(5))) == [True] * 5
    assert here(node, world) == [1, 2]
    monkeypatch.setattr(node.store, "free", lambda: 0)
    assert await asyncio.gather(*(node.room.on_full_disk(CHUNK_SIZE) for _ in range(2))) == [True] * 2
    assert here(node, world) == [], "it was not enough"


@pytest.mark.root
async def test_a_pull_into_a_full_file_system(tmp_path: Path) -> None:
    """The blob's size promised that it fits; its content does not."""
    async with running_world(tmp_path, "gzip") as world:
        root = tmp_path / "n1"
        root.mkdir()
        mounts.mount("tmpfs", root, "tmpfs", "size=2m")
        try:
            node = await world.node("n1")
            first = await pull(world, node, 0)
            node.layers.use(first.diff_id)
            diff_id = world.origins[1].layer.diff_id
            with pytest.raises(ResourceExhausted, match=f"^layer {diff_id} of .*: no space left in {root}$"):
                await node.layers.open(world.origins[1], local=True)
            assert list((root / "tmp").iterdir()) == []
            assert node.store.complete_ids() == [first.diff_id]
            assert await node.layers.read_chunk(first.diff_id, 1) == first.read_chunk(1)
            world.clock.now += LEASE_S
            await node.room.drop(first.diff_id)
            await pull(world, node, 1)
        finally:
            mounts.umount(root, detach=True)
