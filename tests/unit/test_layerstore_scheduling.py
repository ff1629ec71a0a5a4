"""Who comes first, who is asked, and what is read ahead: plain values, and tasks that end when a test says so."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from typing import TYPE_CHECKING

import pytest

from afs.core.errors import NotFound, Unavailable
from afs.discovery.client import Peer
from afs.layerstore.peerwatch import PeerWatch
from afs.layerstore.readahead import FIRST, MOST, RUN, ReadAhead
from afs.layerstore.scheduling import Priority, Slots, Ticket
from tests.testbed.layernodes import Clock

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

DEMAND, PREFETCH, COMPLETION = Priority


class Work:
    """Tasks that hold a slot until they are told to end."""

    def __init__(self, slots: Slots) -> None:
        self.slots = slots
        self.running: list[str] = []
        self.tickets: dict[str, Ticket] = {}
        self.tasks: dict[str, asyncio.Task[None]] = {}
        self._ends: dict[str, asyncio.Event] = {}

    async def start(self, name: str, priority: Priority, peer: str = "") -> None:
        """Have a task that wants a slot, to ask *peer*."""
        self.tickets[name], self._ends[name] = Ticket(priority), asyncio.Event()
        self.tasks[name] = asyncio.create_task(self._hold(name, peer))
        await settle()

    async def _hold(self, name: str, peer: str) -> None:
        async with self.slots.held(self.tickets[name], peer):
            self.running.append(name)
            try:
                await self._ends[name].wait()
            finally:
                self.running.remove(name)

    async def end(self, name: str) -> None:
        """Have it give its slot back."""
        self._ends[name].set()
        await self.tasks[name]
        await settle()


async def settle() -> None:
    """Let every task run until it waits."""
    for _ in range(5):
        await asyncio.sleep(0)


@pytest.fixture
async def work() -> AsyncIterator[Work]:
    """Three slots, two of them for prefetching, one of these for completing."""
    made = Work(Slots((3, 2, 1)))
    yield made
    for task in made.tasks.values():
        task.cancel()
    await asyncio.gather(*made.tasks.values(), return_exceptions=True)


async def test_a_slot_at_once_overtakes_nobody(work: Work) -> None:
    first, second, third = (Ticket(PREFETCH) for _ in range(3))
    demand = Ticket(DEMAND)
    assert work.slots.take(first, "")
    assert work.slots.take(second, "")
    assert not work.slots.take(third, ""), "that is all there is for them"
    await work.start("p1", PREFETCH)
    assert work.slots.take(demand, "")
    work.slots.give_back(demand)
    work.slots.give_back(first)
    await settle()
    assert work.running == ["p1"]
    work.slots.give_back(second)
    await work.start("p2", PREFETCH)
    await work.start("p3", PREFETCH)
    await work.end("p1")
    assert work.running == ["p2", "p3"]
    await work.start("p4", PREFETCH)
    await work.end("p2")
    assert not work.slots.take(third, ""), "p4 waited before"
    work.slots.promote(work.tickets["p4"], DEMAND)
    assert work.slots.take(demand, "")


async def test_a_slot_is_left_to_readers_whatever_is_prefetched(work: Work) -> None:
    for name in ("p1", "p2", "p3"):
        await work.start(name, PREFETCH)
    await work.start("c1", COMPLETION)
    assert work.running == ["p1", "p2"]
    await work.start("d1", DEMAND)
    await work.start("d2", DEMAND)
    assert work.running == ["p1", "p2", "d1"]
    await work.end("p1")
    assert work.running == ["p2", "d1", "d2"], "a reader goes ahead of what came earlier"
    await work.end("d1")
    assert work.running == ["p2", "d2", "p3"]
    await work.end("p2")
    await work.end("p3")
    assert work.running == ["d2", "c1"]


async def test_what_a_reader_wants_too_becomes_urgent_where_it_waits_and_where_it_runs(work: Work) -> None:
    for name in ("p1", "p2", "p3", "p4"):
        await work.start(name, PREFETCH)
    work.slots.promote(work.tickets["p4"], DEMAND)
    await settle()
    assert work.running == ["p1", "p2", "p4"]
    await work.end("p4")
    work.slots.promote(work.tickets["p1"], DEMAND)
    await settle()
    assert work.running == ["p1", "p2", "p3"], "it counts as a demand now, so another prefetch may run"
    work.slots.promote(work.tickets["p1"], COMPLETION)
    assert work.tickets["p1"].priority is DEMAND


async def test_whoever_gives_up_leaves_no_slot_taken(work: Work) -> None:
    for name in ("d1", "d2", "d3", "d4"):
        await work.start(name, DEMAND)
    for name in ("d4", "d1"):  # one waits, one runs
        work.tasks[name].cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await work.tasks[name]
    await work.start("d5", DEMAND)
    assert work.running == ["d2", "d3", "d5"]
    await work.start("d6", DEMAND)
    work.tasks["d2"].cancel()
    work.tasks["d6"].cancel()  # at the moment when it is granted
    await settle()
    await work.start("d7", DEMAND)
    assert work.running == ["d3", "d5", "d7"]


async def test_a_silent_node_does_not_take_all_slots(work: Work) -> None:
    work.slots._most_of_one = 2
    for name in ("d1", "d2", "d3"):
        await work.start(name, DEMAND, "a")
    await work.start("p1", PREFETCH, "a")
    assert work.running == ["d1", "d2"]
    await work.start("d4", DEMAND, "b")
    assert work.running == ["d1", "d2", "d4"]
    await work.end("d4")
    await work.start("p2", PREFETCH, "b")
    assert work.running == ["d1", "d2", "p2"]
    await work.end("d1")
    assert work.running == ["d2", "p2", "d3"]
    work.tasks["p1"].cancel()  # it waits
    await work.end("d2")
    await work.end("d3")
    assert work.slots._of_peer == {"b": 1}


# Reading ahead


def test_nothing_is_read_ahead_for_who_jumps_about() -> None:
    ahead = ReadAhead(1000)
    assert not any(ahead.demanded(index) for index in (500, 3, 700, 701, 90, 91, 400, 4))


def test_the_window_grows_with_what_is_read_in_sequence() -> None:
    ahead, start = ReadAhead(1000), RUN + FIRST
    found = [list(ahead.demanded(index)) for index in range(RUN)]
    assert found == [*[[]] * (RUN - 1), list(range(RUN, start))]
    got, position, sizes = set(range(start)), start, []
    while position < 1000:
        chunks = ahead.demanded(position)
        sizes.append(len(chunks))
        got |= {position, *chunks}
        position = max(got) + 1
    assert sizes[:3] == [2 * FIRST, 4 * FIRST, 8 * FIRST]
    assert max(sizes) == MOST
    assert got == set(range(1000)), "each once, and nothing behind the end"


def test_a_reader_that_waits_for_what_is_on_its_way_is_the_same_one() -> None:
    ahead = ReadAhead(100)
    for index in range(RUN):
        ahead.demanded(index)
    on_its_way, then = RUN + FIRST, RUN + 1 + 2 * FIRST
    assert ahead.demanded(RUN) == range(on_its_way, then)
    assert ahead.demanded(RUN + 1) == range(then, RUN + 2 + 4 * FIRST)


def test_several_containers_read_several_files() -> None:
    ahead = ReadAhead(1000)
    found = [ahead.demanded(start + step) for step in range(RUN) for start in (0, 300, 600)]
    assert found[-3:] == [range(start + RUN, start + RUN + FIRST) for start in (0, 300, 600)]


# Other nodes

A, B, C = (Peer(name, f"{name}:1", 1) for name in "abc")
ME = next(me for me in map(str, range(1000)) if PeerWatch(me).order([C, B, A], "abc") == [A, B, C])
"""A node that asks these three in that order, if nothing else is known of them."""


def ask(watch: PeerWatch, clock: Clock, peer: Peer, seconds: float, error: Exception | None = None) -> None:
    """One request that takes *seconds*."""
    with contextlib.suppress(Unavailable, NotFound), watch.asking(peer.endpoint):
        clock.now += seconds
        if error is not None:
            raise error


def test_the_second_request_waits_as_long_as_answers_take() -> None:
    clock = Clock()
    watch = PeerWatch(ME, clock)
    for _ in range(50):
        ask(watch, clock, A, 0.2)
        ask(watch, clock, B, 0.001)
    assert 0.2 <= watch.hedge_delay(A.endpoint) < 0.25
    assert watch.hedge_delay(B.endpoint) == 0.02, "less is noise"
    assert watch.hedge_delay(C.endpoint) == 0.1, "nothing is known"
    for _ in range(50):
        give_up(watch, clock, B, 5.0)
    assert watch.hedge_delay(B.endpoint) > 4, "what was given up would have taken longer"


def give_up(watch: PeerWatch, clock: Clock, peer: Peer, seconds: float) -> None:
    with contextlib.suppress(asyncio.CancelledError), watch.asking(peer.endpoint):
        clock.now += seconds
        raise asyncio.CancelledError


def test_a_node_that_does_not_answer_goes_last_for_a_while_and_longer_each_time() -> None:
    clock = Clock()
    watch = PeerWatch(ME, clock)
    everybody = frozenset("abc")
    ask(watch, clock, A, 0.0, Unavailable("gone"))
    assert watch.order([A, B], everybody) == [A, B], "once may happen"
    ask(watch, clock, A, 0.0, Unavailable("gone"))
    assert watch.order([A, B], everybody) == [B, A]
    clock.now += 1.1
    assert watch.order([A, B], everybody) == [A, B]
    watch.lost(A.endpoint)  # another one was quicker
    clock.now += 1.1
    assert watch.is_shunned(A.endpoint)
    clock.now += 1.0
    ask(watch, clock, A, 0.0, NotFound("not here"))  # it is there
    ask(watch, clock, A, 0.0, Unavailable("gone"))
    assert not watch.is_shunned(A.endpoint)


def test_who_has_all_of_it_and_the_least_to_do_is_asked() -> None:
    watch = PeerWatch(ME, Clock())
    assert watch.order([A, B, C], frozenset("bc")) == [B, C, A]
    with watch.asking(B.endpoint):
        assert watch.order([A, B, C], frozenset("bc")) == [C, B, A]
    assert watch.order([A, B, C], frozenset("bc")) == [B, C, A]
    with contextlib.ExitStack() as stack:
        for _ in range(5):
            stack.enter_context(watch.asking(B.endpoint))
        assert watch.order([A, B, C], frozenset("bc")) == [C, A, B], "who has a part may be less busy"


def test_not_everybody_asks_the_same_node_first() -> None:
    peers = [Peer(f"n{number}", f"n{number}:1", 1) for number in range(4)]
    everybody = frozenset(peer.node_id for peer in peers)
    by_node = Counter(PeerWatch(f"m{number}").order(peers, everybody, 7)[0].node_id for number in range(400))
    by_chunk = Counter(PeerWatch("m").order(peers, everybody, chunk)[0].node_id for chunk in range(400))
    for found in (by_node, by_chunk):
        assert found.keys() == everybody
        assert max(found.values()) < 150
    assert PeerWatch("m").order(peers, everybody, 7) == PeerWatch("m").order(peers[::-1], everybody, 7)


def test_a_slow_link_gets_more_time_with_every_round() -> None:
    clock = Clock()
    watch = PeerWatch(ME, clock)
    assert [watch.timeout(A.endpoint, n) for n in range(6)] == [2.0, 4.0, 8.0, 16.0, 30.0, 30.0]
    assert PeerWatch(ME, clock, longest=5.0).timeout(A.endpoint, 5) == 5.0, "others have to get their turn"
    ask(watch, clock, A, 5.0)
    assert watch.timeout(A.endpoint, 0) > 20.0


def test_a_node_may_be_gone_for_days() -> None:
    clock = Clock()
    watch = PeerWatch(ME, clock)
    for _ in range(2000):
        ask(watch, clock, A, 0.0, Unavailable("gone"))
    clock.now += 29.0
    assert watch.is_shunned(A.endpoint)
    clock.now += 2.0
    assert not watch.is_shunned(A.endpoint)
    assert watch.timeout(A.endpoint, 2000) == 30.0
