"""Chunks that come without a task, from files that are kept open: what is the matter is noticed all the same."""

from __future__ import annotations

import asyncio
import os
import socket
from typing import TYPE_CHECKING

import pytest

from afs.core.errors import InvalidArgument
from afs.layerstore import serving
from afs.layerstore.chunkwire import Question
from afs.layerstore.fetching import Fetcher, Wanted
from afs.layerstore.scheduling import Priority, Ticket
from tests.testbed.layernodes import Node, World, complete_of, open_partial, running_world

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path
    from typing import Any

    from afs.discovery.client import Peer
    from afs.layerstore.partial import PartialLayer


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    """A cluster without nodes."""
    async with running_world(tmp_path) as running:
        yield running


class Slow:
    """Counts chunks that needed a task."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.chunks: list[int] = []
        real = Fetcher.fetch

        async def fetch(fetcher: Fetcher, wanted: Any, *arguments: Any) -> bytes | None:
            self.chunks.append(wanted.index)
            return await real(fetcher, wanted, *arguments)

        monkeypatch.setattr(Fetcher, "fetch", fetch)


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Slow:
    """See Slow."""
    return Slow(monkeypatch)


async def nodes(world: World, holders: int = 1) -> tuple[list[Node], Node, PartialLayer]:
    """Nodes that have the layer, one that reads it and has asked each of them for a chunk, and what that has of it."""
    having = [await world.node(f"n{number}") for number in range(1, holders + 1)]
    for node in having:
        await node.layers.open(world.origin, local=True)
    reading = await world.node("reader")
    partial = await open_partial(world, reading)
    for node in having:
        for other in having:
            reading.layers._supply.watch._of(other.address).running = int(other is not node)
        await reading.layers.fill(world.diff_id, partial.missing()[0], 1)
    for node in having:
        reading.layers._supply.watch._of(node.address).running = 0
        node.service.chunks.clear()
    return having, reading, partial


def whole(world: World, node: Node, index: int) -> bytes | None:
    """What a chunk is."""
    return complete_of(node, world).read_chunk(index)


async def test_most_chunks_need_no_task(world: World, slow: Slow) -> None:
    (one,), two, partial = await nodes(world)
    slow.chunks.clear()
    missing = partial.missing()
    for index in missing:
        await two.layers.fill(world.diff_id, index, 1)
        assert partial.read(index) == whole(world, one, index)
    assert slow.chunks == []
    assert one.service.chunks == missing
    stats = two.layers.stats(world.diff_id)
    assert stats.demanded == len(missing) + 1
    assert stats.from_peers[one.address] == sum(
        partial.table.chunk_range(index, partial.layout)[1] for index in range(partial.table.count)
    )
    assert partial.slots._running == [0, 0, 0]


async def test_a_reader_is_told_by_the_thread_that_wrote_the_chunk(world: World) -> None:
    import threading

    _, two, partial = await nodes(world)
    here: list[str] = []
    index = partial.missing()[0]
    await two.layers.fill(world.diff_id, index, 1, here=lambda: here.append(threading.current_thread().name))
    (name,) = here
    assert name.startswith("answers-")


async def test_the_next_node_is_asked_when_the_first_fails(world: World, slow: Slow) -> None:
    (one, two), three, partial = await nodes(world, 2)
    slow.chunks.clear()
    index = partial.missing()[0]
    three.layers._supply.watch._of(two.address).running = 1  # so the other one is asked first
    one.service.spoil = True
    await three.layers.fill(world.diff_id, index, 1)
    assert partial.read(index) == whole(world, two, index)
    stats = three.layers.stats(world.diff_id)
    assert stats.bad_chunks == 2, "once more, told that it was wrong"
    assert slow.chunks == [index]
    assert two.service.chunks == [index]
    assert partial.slots._running == [0, 0, 0]


async def test_a_second_node_is_asked_beside_one_that_is_slow(world: World, slow: Slow) -> None:
    (one, two), three, partial = await nodes(world, 2)
    slow.chunks.clear()
    index = partial.missing()[0]
    three.layers._supply.watch._of(two.address).running = 1
    one.service.gate = asyncio.Event()
    await three.layers.fill(world.diff_id, index, 1)
    assert partial.read(index) == whole(world, two, index)
    assert three.layers.stats(world.diff_id).hedges == 1
    assert slow.chunks == [index]
    one.service.gate.set()


async def test_a_connection_that_was_closed_is_no_failure(world: World) -> None:
    (one,), two, partial = await nodes(world)
    for connection in two.peers._chunks._idle:
        connection.sock.shutdown(2)
    index = partial.missing()[0]
    seen = two.layers._supply.watch._of(one.address)
    seen.strikes, known = 1, (seen.mean, seen.deviation)
    began = two.layers._supply._fetcher.begin(
        Wanted(partial, index, Ticket(Priority.DEMAND), two.layers.stats(world.diff_id)), one.announcer.me
    )
    assert began is not None
    await asyncio.wait([began.exchange.done])
    assert (seen.strikes, seen.mean, seen.deviation, seen.running) == (1, *known, 0), "it says nothing of the node"
    seen.strikes = 0
    await two.layers.fill(world.diff_id, index, 1)
    assert partial.read(index) == whole(world, one, index)
    assert two.layers._supply.watch._of(one.address).strikes == 0
    assert two.layers.stats(world.diff_id).failovers == 0


async def test_the_end_of_a_node_waits_for_who_writes(world: World) -> None:
    (one,), two, partial = await nodes(world)
    index = partial.missing()[0]
    one.service.gate = asyncio.Event()
    filling = asyncio.create_task(two.layers.fill(world.diff_id, index, 1))
    while not one.service.chunks:  # noqa: ASYNC110 - a list
        await asyncio.sleep(0.001)
    await partial.stop()
    with pytest.raises(asyncio.CancelledError):
        await filling
    assert list(partial.fillings) == []
    assert partial.slots._running == [0, 0, 0]
    assert not partial.has(index)


async def test_a_prefetch_that_a_reader_comes_to_want_is_hurried(world: World) -> None:
    (one,), two, partial = await nodes(world)
    index = partial.missing()[0]
    one.service.gate = asyncio.Event()
    prefetching = asyncio.create_task(two.layers.prefetch(world.diff_id, [index]))
    while not one.service.chunks:  # noqa: ASYNC110 - a list
        await asyncio.sleep(0.001)
    filling = asyncio.create_task(two.layers.fill(world.diff_id, index, 1))
    await asyncio.sleep(0)
    assert partial.slots._running == [1, 0, 0]
    one.service.gate.set()
    await asyncio.gather(filling, prefetching)
    assert two.layers.stats(world.diff_id).prefetched == 0
    assert partial.slots._running == [0, 0, 0]


# Several that nobody waits for


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The chunks that are asked for in one exchange each."""
    found: list[list[int]] = []
    real = Fetcher.begin_run

    def begin_run(fetcher: Fetcher, partial: PartialLayer, indices: Any, peer: Peer) -> Any:
        exchange = real(fetcher, partial, indices, peer)
        if exchange is not None:
            found.append(list(indices))
        return exchange

    monkeypatch.setattr(Fetcher, "begin_run", begin_run)
    return found


async def begun(world: World, node: Node, holder: Node, wanted: list[int]) -> asyncio.Task[None]:
    """A prefetch of which *holder* has the first question, and does not answer before its gate is opened."""
    holder.service.gate = asyncio.Event()
    prefetching = asyncio.create_task(node.layers.prefetch(world.diff_id, wanted))
    while not holder.service.chunks:  # noqa: ASYNC110 - a list
        await asyncio.sleep(0.001)
    return prefetching


async def test_what_is_prefetched_comes_together(world: World, slow: Slow, runs: list[list[int]]) -> None:
    (one,), two, partial = await nodes(world)
    slow.chunks.clear()
    wanted = partial.missing()[:3]
    await two.layers.prefetch(world.diff_id, [*wanted, wanted[0], -1, 99])
    assert runs == [wanted]
    assert slow.chunks == []
    assert one.service.chunks == wanted
    for index in wanted:
        assert partial.read(index) == whole(world, one, index)
    stats = two.layers.stats(world.diff_id)
    assert (stats.demanded, stats.prefetched) == (1, len(wanted))
    assert stats.from_peers[one.address] == sum(
        partial.table.chunk_range(index, partial.layout)[1]
        for index in range(partial.table.count)
        if partial.has(index)
    )
    assert partial.slots._running == [0, 0, 0]
    assert two.layers._supply.watch._of(one.address).running == 0
    assert list(partial.fillings) == []


async def test_a_reader_that_joins_goes_on_when_its_chunk_is_here(
    world: World, runs: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    (one,), two, partial = await nodes(world)
    wanted = partial.missing()[:3]
    here, loop = asyncio.Event(), asyncio.get_running_loop()
    read = one.layers.read_chunk

    async def the_last_later(diff_id: str, index: int, *, was_bad: bool = False) -> bytes:
        if index == wanted[-1]:
            await here.wait()
        return await read(diff_id, index, was_bad=was_bad)

    monkeypatch.setattr(one.layers, "read_chunk", the_last_later)
    monkeypatch.setattr(one.layers, "find_chunk", lambda question: None)
    monkeypatch.setattr(two.layers._supply.watch, "hedge_delay", lambda endpoint: 60.0)
    prefetching = await begun(world, two, one, wanted)

    def told() -> None:
        loop.call_soon_threadsafe(here.set)

    filling = asyncio.create_task(two.layers.fill(world.diff_id, wanted[1], 1, here=told))
    await asyncio.sleep(0)
    assert partial.slots._running == [1, 2, 0]
    assert one.service.gate is not None
    one.service.gate.set()
    await asyncio.gather(filling, prefetching)
    assert runs == [wanted]
    assert one.service.chunks == wanted, "each once"
    assert two.layers.stats(world.diff_id).prefetched == 2
    assert partial.slots._running == [0, 0, 0]


async def test_a_reader_does_not_wait_for_a_run_that_is_slow(world: World, runs: list[list[int]]) -> None:
    (one, two), three, partial = await nodes(world, 2)
    wanted = partial.missing()[:2]
    watch = three.layers._supply.watch
    watch._of(two.address).running = 4  # so the other one is asked first
    prefetching = await begun(world, three, one, wanted)
    await three.layers.fill(world.diff_id, wanted[1], 1)
    assert runs == [wanted]
    assert partial.read(wanted[1]) == whole(world, two, wanted[1])
    assert one.service.gate is not None
    one.service.gate.set()
    await prefetching
    assert partial.has(wanted[0])
    assert partial.slots._running == [0, 0, 0]
    assert watch._of(one.address).running == 0


async def test_what_came_wrong_comes_from_another_node(world: World, runs: list[list[int]]) -> None:
    (one, two), three, partial = await nodes(world, 2)
    wanted = partial.missing()[:3]
    three.layers._supply.watch._of(two.address).running = 4
    one.service.spoil = True
    await three.layers.prefetch(world.diff_id, wanted)
    assert runs == [wanted]
    for index in wanted:
        assert partial.read(index) == whole(world, two, index)
    assert three.layers.stats(world.diff_id).bad_chunks >= 2
    assert partial.slots._running == [0, 0, 0]


async def test_the_end_of_a_node_waits_for_who_writes_several(world: World, runs: list[list[int]]) -> None:
    (one,), two, partial = await nodes(world)
    wanted = partial.missing()[:3]
    prefetching = await begun(world, two, one, wanted)
    await partial.stop()
    with pytest.raises(asyncio.CancelledError):
        await prefetching
    assert runs == [wanted]
    assert list(partial.fillings) == []
    assert partial.slots._running == [0, 0, 0]
    assert not any(map(partial.has, wanted))


async def test_nobody_asks_again_for_what_nobody_wants(world: World, slow: Slow, runs: list[list[int]]) -> None:
    (one,), two, partial = await nodes(world)
    slow.chunks.clear()
    wanted = partial.missing()[:3]
    prefetching = await begun(world, two, one, wanted)
    prefetching.cancel()
    await asyncio.wait([prefetching])
    assert runs == [wanted]
    assert list(partial.fillings) == wanted, "it goes on"
    for connection in list(two.peers._chunks._asking.values()):
        connection.sock.shutdown(socket.SHUT_RDWR)
    await partial.idle()
    assert slow.chunks == []
    assert one.service.chunks == wanted[:1]
    assert partial.slots._running == [0, 0, 0]


async def test_without_slots_for_all_each_comes_alone(world: World, runs: list[list[int]]) -> None:
    (one,), two, partial = await nodes(world)
    wanted = partial.missing()[:3]
    partial.slots._limits = (4, 2, 1)
    await two.layers.prefetch(world.diff_id, wanted)
    assert runs == []
    assert sorted(one.service.chunks) == wanted
    assert partial.slots._running == [0, 0, 0]


# At the node that has it


def found(node: Node, world: World, index: int, *, was_bad: bool = False) -> bytes | None:
    """What a thread finds."""
    range_ = node.layers.find_chunk(Question(world.diff_id, index, was_bad))
    return None if range_ is None else os.pread(range_.file.fileno(), range_.length, range_.offset)


async def test_what_was_asked_for_before_is_found_without_the_event_loop(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    (one,), two, partial = await nodes(world)
    for index in range(partial.table.count):
        assert found(one, world, index) == whole(world, one, index)
        assert found(one, world, index, was_bad=True) is None, "the event loop looks at the disk"
    assert found(one, world, partial.table.count) is None, "the event loop says what is wrong"
    with pytest.raises(InvalidArgument):
        await one.layers.read_chunk(world.diff_id, partial.table.count)
    assert found(two, world, 0) is None, "nobody asked that node yet"
    monkeypatch.setattr(serving, "LEASE_S", -1.0)
    await one.layers.read_chunk(world.diff_id, 0)
    assert found(one, world, 0) is None, "the lease may be over"


async def test_what_a_node_lacks_is_not_found(world: World) -> None:
    _, two, partial = await nodes(world)
    missing, here = partial.missing()[0], partial.metadata_chunks()[0]
    await two.layers.read_chunk(world.diff_id, here)
    assert found(two, world, here) == partial.read(here)
    assert found(two, world, missing) is None
    partial.is_forged = True
    assert found(two, world, here) is None
    partial.is_forged = False
    assert found(two, world, here) is not None
    await partial.fill(partial.missing(), two.layers._supply.fetch, Priority.DEMAND)
    await two.layers.ensure(world.origin)  # complete: the map is closed
    assert found(two, world, here) is None
    assert not two.layers._serving._open, "what was open of the partial layer is not kept"
    await two.layers.read_chunk(world.diff_id, here)
    assert found(two, world, here) == whole(world, two, here)


async def test_what_is_damaged_is_not_found(world: World) -> None:
    (one,), _, partial = await nodes(world)
    index = partial.missing()[0]
    layer = complete_of(one, world)
    offset, _ = layer.table.chunk_range(index, layer.layout)
    layer.path.chmod(0o600)
    with layer.path.open("r+b") as file:
        file.seek(offset)
        file.write(b"damaged")
    assert found(one, world, index) is None


async def test_an_evicted_layer_is_closed(world: World) -> None:
    (one,), _, _ = await nodes(world)
    (opened,) = one.layers._serving._open.values()
    fd, path = opened.fileno(), os.readlink(f"/proc/self/fd/{opened.fileno()}")
    del opened
    one.layers._detach(world.diff_id)
    assert found(one, world, 0) is None
    assert not os.path.exists(f"/proc/self/fd/{fd}") or os.readlink(f"/proc/self/fd/{fd}") != path
