"""Start traces between nodes: recorded on one, shared through discovery, prefetched on the next, harmless when wrong."""

import asyncio
import contextlib
import io
import logging
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Any

import pytest

from afs.core.errors import NotFound
from afs.core.rpc import channel
from afs.discovery.client import Peer
from afs.layerstore import peers
from afs.layerstore.afslyr.convert import convert
from afs.layerstore.afslyr.layout import CHUNK_SIZE
from afs.layerstore.partial import PartialLayer
from afs.layerstore.peers import image_name
from afs.layerstore.traces import MAX_BYTES, Chunk, Trace, parse_trace
from afs.proto.v1 import layerstore_pb2 as pb
from afs.proto.v1.layerstore_pb2_grpc import LayerstoreNodeStub
from tests.testbed.layernodes import AMD64, LAYER_SIZE, OTHER, TAR, Node, World, running_world

LEASE_S = 61.0
"""Longer than an opened image is leased to somebody who mounts nothing."""


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    """A cluster with node n1, which has the layer of `app:v1`. Chunks 1 to 4 of it are data alone."""
    async with running_world(tmp_path) as running:
        one = await running.node("n1", capacity=1 << 40)
        path = one.store.temporary()
        convert(io.BytesIO(TAR).read, path)  # quicker than a pull in a process
        layer = one.store.commit(path, running.diff_id)
        one.room.note(layer.diff_id)
        one.announcer.hold(layer.diff_id, layer.layout.file_size, complete=True)
        await one.announcer.flush()
        yield running


async def open_image(world: World, node: Node, number: int = 0) -> str:
    """OpenImage of `app:v1` by somebody without leases; the manifest digest."""
    request = pb.OpenImageRequest(name=image_name(world.origin.ref, AMD64), number=number)
    async with channel(node.address) as opened:
        return (await LayerstoreNodeStub(opened).OpenImage(request)).image.manifest_digest


def partial_of(world: World, node: Node) -> PartialLayer:
    """The layer on a node that read it from n1."""
    found = node.layers.find(world.diff_id)
    assert isinstance(found, PartialLayer)
    return found


async def settled(node: Node) -> None:
    """Until nothing is looked for, prefetched or written any more."""
    while node.tracing._background:
        await asyncio.gather(*node.tracing._background, return_exceptions=True)


async def end_start(world: World, node: Node) -> None:
    """The last user of every image on the node leaves."""
    world.clock.now += LEASE_S
    node.tracing.review()
    await settled(node)


async def run_image(world: World, node: Node, *chunks: int) -> str:
    """Open the image, wait for what is prefetched, read some chunks and leave; the manifest digest."""
    digest = await open_image(world, node)
    await settled(node)
    for number in chunks:
        await node.layers.fill(world.diff_id, number, 1)
    await end_start(world, node)
    return digest


async def trace_of(world: World, node: Node, digest: str) -> list[int]:
    """Chunks in the node's trace of the image."""
    found = parse_trace(await node.tracing.read(digest), digest, [world.diff_id])
    return [chunk.number for chunk in found.chunks]


def watch_prefetch(node: Node) -> list[int]:
    """Chunks that will be asked for ahead, in order."""
    asked: list[int] = []
    prefetch = node.layers.prefetch

    async def watched(diff_id: str, indices: Iterable[int], at_once: int = 1) -> None:
        indices = list(indices)
        asked.extend(indices)
        await prefetch(diff_id, indices, at_once)

    node.layers.prefetch = watched  # type: ignore[method-assign]
    return asked


def recording_ended(node: Node) -> asyncio.Event:
    """Set when a recording ends."""
    ended, end = asyncio.Event(), node.tracing.recorder.end

    def watched(image: str) -> tuple[Chunk, ...]:
        ended.set()
        return end(image)

    node.tracing.recorder.end = watched  # type: ignore[method-assign]
    return ended


def demands(node: Node) -> int:
    """Chunks that readers waited for while a start was recorded."""
    return node.tracing.recorder.demanded_chunks


async def test_what_one_node_demanded_the_next_one_has_before_anybody_asks(world: World) -> None:
    two, three = await world.node("n2"), await world.node("n3")
    digest = await run_image(world, two, 3, 1, 3)
    assert await trace_of(world, two, digest) == [3, 1]
    assert (two.tracing.counts.recorded, two.tracing.counts.used, two.tracing.kept) == (1, 0, 1)
    asked = watch_prefetch(three)
    await open_image(world, three)
    await settled(three)
    assert asked == [3, 1]
    partial = partial_of(world, three)
    assert [number for number in range(1, 5) if partial.has(number)] == [1, 3]
    assert demands(three) == 0
    assert (three.tracing.counts.used, three.tracing.counts.from_peers) == (1, 1)
    assert three.tracing.counts.prefetched_chunks == 2


async def test_a_trace_converges_over_nodes(world: World) -> None:
    two, three, four = [await world.node(name) for name in ("n2", "n3", "n4")]
    digest = await run_image(world, two, 3, 1)
    await run_image(world, three, 1, 4, 3, 2)
    assert await trace_of(world, three, digest) == [3, 1, 4, 2]  # all it could tell is that 4 and 2 were missing
    assert demands(three) == 2
    await run_image(world, four, 1, 2, 3, 4)
    assert demands(four) == 0
    assert await trace_of(world, four, digest) == [3, 1, 4, 2]  # of n3, who knows more than n2
    assert four.tracing.counts.recorded == 0
    assert await trace_of(world, two, digest) == [3, 1]


async def test_a_layer_that_is_complete_here_leaves_no_trace(world: World) -> None:
    one = await world.node("n5")
    await one.layers.open(world.origin, local=True)
    digest = await open_image(world, one)
    assert not one.tracing._starts
    with pytest.raises(NotFound, match=f"^no start trace of image {digest} here$"):
        await one.tracing.read(digest)


async def test_a_start_without_demands_leaves_no_trace(world: World) -> None:
    two = await world.node("n2")
    await run_image(world, two)
    assert (two.tracing.kept, two.tracing.counts.recorded) == (0, 0)
    assert not two.tracing._starts


async def test_recording_ends_with_its_window(world: World) -> None:
    two = await world.node("n2", window=0.0)
    ended = recording_ended(two)
    await open_image(world, two)
    await ended.wait()
    await two.layers.fill(world.diff_id, 2, 1)
    await end_start(world, two)
    assert (two.tracing.kept, demands(two)) == (0, 0)


async def test_who_opens_an_image_meanwhile_joins_its_start(world: World) -> None:
    two = await world.node("n2")
    digest = await open_image(world, two)
    await two.layers.fill(world.diff_id, 2, 1)
    world.clock.now += LEASE_S - 2
    await open_image(world, two)
    await two.layers.fill(world.diff_id, 1, 1)
    world.clock.now += LEASE_S - 2  # the first user is gone by now
    two.tracing.review()
    assert len(two.tracing.recorder) == 1
    await end_start(world, two)
    assert await trace_of(world, two, digest) == [2, 1]
    assert two.tracing.counts.recorded == 1


async def test_the_snapshotter_s_report_ends_a_start(world: World) -> None:
    two = await world.node("n2")
    digest = await open_image(world, two, number=7)
    await two.layers.fill(world.diff_id, 2, 1)
    ended, updates = recording_ended(two), asyncio.Queue[pb.LeaseUpdate]()

    async def stream() -> AsyncIterator[pb.LeaseUpdate]:
        while True:
            yield await updates.get()

    async with channel(two.address) as opened:
        call = LayerstoreNodeStub(opened).Leases(stream())
        updates.put_nowait(pb.LeaseUpdate(in_use=[world.diff_id], last_opened=7))
        updates.put_nowait(pb.LeaseUpdate(idle=[world.diff_id], last_opened=7))
        await ended.wait()
        call.cancel()
    await settled(two)
    assert await trace_of(world, two, digest) == [2]


async def test_traces_survive_a_restart(world: World) -> None:
    outer = world.stack
    async with contextlib.AsyncExitStack() as world.stack:
        digest = await run_image(world, await world.node("n2"), 3, 1)
    world.stack = outer
    two, three = await world.node("n2"), await world.node("n3")
    assert await trace_of(world, two, digest) == [3, 1]
    await open_image(world, three)
    await settled(three)
    assert three.tracing.counts.prefetched_chunks == 2


async def test_what_was_recorded_is_kept_at_the_stop(world: World) -> None:
    outer = world.stack
    async with contextlib.AsyncExitStack() as world.stack:
        two = await world.node("n2")
        digest = await open_image(world, two)
        await two.layers.fill(world.diff_id, 2, 1)
    world.stack = outer
    assert await trace_of(world, await world.node("n2"), digest) == [2]


async def test_a_trace_goes_with_its_image(world: World) -> None:
    two = await world.node("n2")
    digest = await run_image(world, two, 3)
    two.images._most = 1
    await two.images.resolve(world.origins[1].ref, AMD64)
    await settled(two)
    assert two.tracing.kept == 0
    assert list(two.store.traces_dir.iterdir()) == []
    await two.announcer.flush()
    assert (await (await world.node("n3")).announcer.locate(traces=[digest])).traces == {}


async def test_switched_off_nothing_is_recorded_told_or_used(world: World) -> None:
    two = await world.node("n2")
    digest = await run_image(world, two, 3)
    three = await world.node("n3", traces=False)
    await run_image(world, three, 1)
    assert not partial_of(world, three).has(3)
    assert (three.tracing.kept, demands(three), three.tracing.counts.used) == (0, 0, 0)
    with pytest.raises(NotFound):
        await three.tracing.read(digest)
    assert not three.store.traces_dir.exists()


async def test_prefetching_begins_before_the_metadata_is_here(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    two, three = await world.node("n2"), await world.node("n3")
    digest = await run_image(world, two, 3)
    begun, ready = asyncio.Event(), asyncio.Event()
    fill, prefetch = PartialLayer.fill, three.layers.prefetch

    async def metadata_comes_later(layer: PartialLayer, *arguments: Any, **options: Any) -> None:
        await ready.wait()
        await fill(layer, *arguments, **options)

    async def told(diff_id: str, indices: Iterable[int], at_once: int = 1) -> None:
        begun.set()
        await prefetch(diff_id, indices, at_once)

    monkeypatch.setattr(PartialLayer, "fill", metadata_comes_later)
    three.layers.prefetch = told  # type: ignore[method-assign]
    opening = asyncio.create_task(open_image(world, three))
    await begun.wait()
    assert not opening.done()
    ready.set()
    assert await opening == digest
    await settled(three)
    assert partial_of(world, three).has(3)


# When it is wrong


async def test_a_peer_that_answers_nonsense_is_passed_over(world: World, caplog: pytest.LogCaptureFixture) -> None:
    two, bad, four = [await world.node(name) for name in ("n2", "n3", "n4")]
    digest = await run_image(world, two, 3)
    wrong = {
        bytes(100): "not a trace",
        bytes(MAX_BYTES + 1): f"{MAX_BYTES + 1} bytes",
        Trace(OTHER, (Chunk(world.diff_id, 1),)).encode(): f"it is that of {OTHER}",
        Trace(digest, (Chunk(OTHER, 1),)).encode(): "not the image's",
    }
    bad.announcer.know_trace(digest, 4000)
    await bad.announcer.flush()
    caplog.set_level(logging.DEBUG, "afs.layerstore.tracing")
    for answer, cause in wrong.items():

        async def read(image: str, answer: bytes = answer) -> bytes:
            return answer

        bad.tracing.read = read  # type: ignore[method-assign]
        caplog.clear()
        await run_image(world, four)
        (record,) = [r for r in caplog.records if r.message.startswith("no start trace from layerstore ")]
        assert cause in record.message
        assert record.levelno == (logging.WARNING if answer == bytes(100) else logging.DEBUG)  # told once
        assert partial_of(world, four).has(3)  # as n2 knows
        assert not partial_of(world, four).has(1)
        four.tracing._files.drop(digest)
    assert (four.tracing.counts.refused, four.tracing.counts.from_peers) == (4, 4)


async def test_nobody_waits_for_a_slow_peer(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    two, slow, four = [await world.node(name) for name in ("n2", "n3", "n4")]
    digest = await run_image(world, two, 3)
    asked, never = asyncio.Event(), asyncio.Event()

    async def read(image: str) -> bytes:
        asked.set()
        await never.wait()
        return b""

    slow.tracing.read = read  # type: ignore[method-assign]
    slow.announcer.know_trace(digest, 4000)
    await slow.announcer.flush()
    await open_image(world, four)
    await asked.wait()
    await end_start(world, four)  # gives up asking
    monkeypatch.setattr(peers, "TRACE_TIMEOUT_S", 0.1)
    await open_image(world, four)
    await settled(four)
    assert partial_of(world, four).has(3)  # from the next one
    assert four.tracing.counts.refused == 0
    never.set()


async def test_a_peer_that_is_gone_is_passed_over(world: World) -> None:
    two, gone = await world.node("n2"), await world.node("n3")
    digest = await run_image(world, two, 3)
    gone.announcer.know_trace(digest, 4000)
    await gone.announcer.flush()
    four = await world.node("n4")
    located = await four.announcer.locate(traces=[digest])
    assert [peer.node_id for peer in located.traces[digest]] == ["n3", "n2"]
    await gone.stop_serving()
    await open_image(world, four)
    await settled(four)
    assert partial_of(world, four).has(3)


async def test_chunks_that_the_layer_does_not_have_are_dropped(world: World, caplog: pytest.LogCaptureFixture) -> None:
    two, three = await world.node("n2"), await world.node("n3")
    digest = await run_image(world, two, 3)
    strange = Trace(digest, tuple(Chunk(world.diff_id, number) for number in (1 << 31, 3, 6, 2)))
    two.tracing._files.save(strange)
    asked = watch_prefetch(three)
    await run_image(world, three, 1)
    assert asked == [3, 2]
    assert await trace_of(world, three, digest) == [3, 2, 1]
    assert f"start trace of image {digest}: its layers lack 2 of the chunks" in caplog.messages


async def test_a_damaged_file_is_dropped_and_a_peer_asked(world: World, caplog: pytest.LogCaptureFixture) -> None:
    two, three = await world.node("n2"), await world.node("n3")
    digest = await run_image(world, two, 3)
    await run_image(world, three, 1)
    path = three.tracing._files._path(digest)
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    await open_image(world, three)
    await settled(three)
    assert three.tracing.counts.from_peers == 2
    assert digest not in three.announcer._traces
    assert any(message.startswith(f"dropping {path}: ") for message in caplog.messages)


async def test_a_disk_that_takes_nothing_costs_the_trace_alone(world: World, caplog: pytest.LogCaptureFixture) -> None:
    two = await world.node("n2")
    digest = await open_image(world, two)
    await two.layers.fill(world.diff_id, 2, 1)
    two.store.traces_dir.rmdir()
    await end_start(world, two)
    assert any(message.startswith("start traces: ") for message in caplog.messages)
    assert digest not in two.announcer._traces
    assert two.tracing.counts.recorded == 0


async def test_a_full_cache_is_left_to_those_who_need_it(world: World, caplog: pytest.LogCaptureFixture) -> None:
    two = await world.node("n2")
    await run_image(world, two, 3, 1, 2, 4)
    three = await world.node("n3", quota=LAYER_SIZE + 5 * CHUNK_SIZE)  # room for a layer and this one's metadata
    await three.layers.open(world.origins[1], local=True)
    caplog.set_level(logging.INFO)
    await open_image(world, three)
    await settled(three)
    assert three.tracing.counts.prefetched_chunks == 0
    assert three.evicted() == 0
    assert [message for message in caplog.messages if "no room to prefetch the other 1.0 MiB" in message]
    await three.layers.fill(world.diff_id, 3, 1)  # which is no reason to fail a reader
    assert partial_of(world, three).has(3)


async def test_prefetching_ends_with_the_last_user(world: World) -> None:
    two, three = await world.node("n2"), await world.node("n3")
    await run_image(world, two, 3, 1)
    begun, cancelled = asyncio.Event(), asyncio.Event()

    async def endless(diff_id: str, indices: Iterable[int], at_once: int = 1) -> None:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    three.layers.prefetch = endless  # type: ignore[method-assign]
    await open_image(world, three)
    await begun.wait()
    three.tracing.review()
    assert not cancelled.is_set()
    await end_start(world, three)
    assert cancelled.is_set()
    assert not three.tracing._starts


async def test_a_failed_opening_ends_its_start(world: World) -> None:
    two = await world.node("n2")
    image = await two.images.resolve(world.origin.ref, AMD64)
    with pytest.raises(NotFound), two.tracing.opening(image):
        raise NotFound("a layer")
    await settled(two)
    assert not two.tracing._starts
    assert len(two.tracing.recorder) == 0


async def test_discovery_orders_holders_by_what_they_know(world: World) -> None:
    nodes = [await world.node(name) for name in ("n2", "n3", "n4")]
    for node, chunks in zip(nodes, (5, 9, 7), strict=True):
        node.announcer.know_trace(OTHER, chunks)
        await node.announcer.flush()
    located = await nodes[0].announcer.locate(traces=[OTHER, world.diff_id])
    assert located.traces == {OTHER: [Peer(n.announcer.me.node_id, n.address, 0) for n in (nodes[1], nodes[2])]}
