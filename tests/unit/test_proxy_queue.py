"""The order of runs that wait, and who gets room: by plain objects and a clock that stands."""

import asyncio
import random
from collections import Counter

import pytest

from afs.afslet.requests import Resources
from afs.core.errors import InvalidArgument, ResourceExhausted, Unavailable
from afs.proxy.dispatch import Dispatcher, Limits, Waiter
from afs.proxy.fairqueue import Entry, FairQueue
from afs.proxy.node import AfsletNode
from afs.proxy.nodes import Nodes
from tests.testbed.proxynodes import Clock, report

ONE = Resources(1000, 10)


class Bench:
    """A dispatcher over nodes of 4 CPUs; what it placed is in `placed`, in order."""

    def __init__(self, nodes: int = 1, **limits: float) -> None:
        self.clock = Clock()
        self.nodes = Nodes([f"127.0.0.1:{number + 1}" for number in range(nodes)], random.Random(0), self.clock)  # noqa: S311
        self.dispatcher = Dispatcher(self.nodes, Limits(**limits), self.clock)  # type: ignore[arg-type]
        for number, node in enumerate(self.nodes.nodes):
            self.nodes.report(node, report(f"node{number}", 4, 4096))

    def enter(self, tenant: str = "", priority: int = 0, wanted: Resources = ONE, **fields: object) -> Waiter:
        """A run that comes."""
        waiter = Waiter(wanted, tenant, priority, **fields)  # type: ignore[arg-type]
        self.dispatcher.enter(waiter)
        return waiter

    def fill(self, cpus: int = 4) -> list[Waiter]:
        """Runs that take all that a node has."""
        made = [self.enter("filler") for _ in range(cpus)]
        assert all(waiter.placement for waiter in made)
        return made

    def served(self, waiters: list[Waiter], count: int, held: list[Waiter]) -> list[Waiter]:
        """End *held* runs one after the other, and each that takes its place: the first *count* that were placed."""
        order: list[Waiter] = []
        while len(order) < count:
            before = {waiter for waiter in waiters if waiter.placement}
            self.dispatcher.leave(held.pop(0))
            new = [waiter for waiter in waiters if waiter.placement and waiter not in before]
            order += new
            held += new
        return order


def begun(waiters: list[Waiter]) -> int:
    """How many do not wait any more."""
    return sum(not waiter.waiting for waiter in waiters)


async def test_tenants_take_turns_however_many_runs_they_have() -> None:
    bench = Bench()
    held = bench.fill()
    waiting = [bench.enter("many") for _ in range(100)]
    waiting += [bench.enter(tenant) for tenant in ("few", "some") for _ in range(20)]
    order = bench.served(waiting, 60, held)
    assert Counter(waiter.tenant for waiter in order) == {"many": 20, "few": 20, "some": 20}
    for start in range(0, 60, 3):
        assert len({waiter.tenant for waiter in order[start : start + 3]}) == 3
    many = [waiter.number for waiter in order if waiter.tenant == "many"]
    assert many == sorted(many), "first come, first served"


async def test_the_tenant_that_has_less_in_use_comes_first() -> None:
    bench = Bench()
    big = bench.enter("big", wanted=Resources(3000, 10))
    other = bench.enter("other")
    waiting = [bench.enter("big") for _ in range(3)] + [bench.enter("other") for _ in range(3)]
    order = bench.served(waiting, 3, [other])
    assert [waiter.tenant for waiter in order] == ["other", "other", "other"]
    bench.dispatcher.leave(big)
    assert begun(waiting) == 6


async def test_priority_comes_before_tenants_and_time() -> None:
    bench = Bench()
    held = bench.fill()
    waiting = [bench.enter("a", priority) for priority in (0, -5, 7, 0)] + [bench.enter("b", 7)]
    order = bench.served(waiting, 5, held)
    assert [waiter.priority for waiter in order] == [7, 7, 0, 0, -5]


async def test_a_low_priority_is_served_now_and_then() -> None:
    bench = Bench(priority_ageing=10.0)
    held = bench.fill()
    low = [bench.enter("low", -2) for _ in range(3)]
    waiting, served = list(low), list[float]()
    while len(served) < 3:
        waiting.append(bench.enter("high", 0))
        bench.clock.now += 1.0
        if bench.served(waiting, 1, held)[0].tenant == "low":
            served.append(bench.clock.now - 1000)
    gaps = [after - before for before, after in zip([0, *served], served, strict=False)]
    assert all(18 <= gap <= 23 for gap in gaps), "two levels of ten seconds"


async def test_ageing_does_not_decide_between_tenants_of_one_priority() -> None:
    queue = FairQueue(1.0)
    for number in range(5):
        queue.add(Entry(ONE, "early"), float(number))
    for number in range(3):
        queue.add(Entry(ONE, "late"), 100.0 + number)
    order = [queue.next(lambda _: True, lambda _: 0.0, 200.0) for _ in range(6)]
    assert [entry.tenant for entry in order if entry] == ["early", "late"] * 3


async def test_a_large_run_lets_small_ones_pass_but_not_for_ever() -> None:
    bench = Bench(patience=10.0)
    held = bench.fill()
    large = bench.enter("large", wanted=Resources(3000, 10))
    small = [bench.enter("small") for _ in range(30)]
    assert len(bench.served(small, 5, held)) == 5, "they pass"
    bench.clock.now += 9.9
    bench.dispatcher.tick()
    assert len(bench.served(small, 2, held)) == 2
    bench.clock.now += 0.2
    bench.dispatcher.tick()
    passed = begun(small)
    # Four small ones run. One CPU is not needed by the large run: it goes on serving small ones.
    for _ in range(3):
        bench.dispatcher.leave(held.pop(0))
    assert large.placement is None
    assert begun(small) == passed + 1
    bench.dispatcher.leave(held.pop(0))
    assert large.placement is not None
    assert bench.nodes.nodes[0].reservation is None


async def test_other_nodes_are_not_held_by_a_reservation() -> None:
    bench = Bench(nodes=2, patience=1.0)
    held = bench.fill(8)
    large = bench.enter("large", wanted=Resources(4000, 10))
    small = [bench.enter("small") for _ in range(20)]
    bench.served(small, 1, held)
    bench.clock.now += 1.0
    bench.dispatcher.tick()
    (reserved,) = [node for node in bench.nodes.nodes if node.reservation is not None]
    for waiter in [waiter for waiter in held if waiter.placement and waiter.placement.node is not reserved]:
        bench.dispatcher.leave(waiter)
    assert begun(small) == 5
    for waiter in [waiter for waiter in held if waiter.placement and waiter.placement.node is reserved]:
        assert large.placement is None
        bench.dispatcher.leave(waiter)
    assert large.placement is not None
    assert large.placement.node is reserved


async def test_a_reservation_ends_with_the_run_that_it_is_for() -> None:
    bench = Bench(patience=1.0)
    held = bench.fill()
    large = bench.enter("large", wanted=Resources(4000, 10))
    small = [bench.enter("small") for _ in range(9)]
    bench.served(small, 1, held)
    bench.clock.now += 1.0
    bench.dispatcher.tick()
    bench.dispatcher.leave(held.pop(0))
    assert begun(small) == 1, "nothing is left over"
    bench.dispatcher.leave(large)
    assert begun(small) == 2


async def test_only_who_gets_room_is_woken() -> None:
    bench = Bench()
    held = bench.fill()
    waiting = [bench.enter(f"t{number % 5}") for number in range(500)]
    for waiter in waiting:
        waiter.waker = asyncio.get_running_loop().create_future()
    picks = 0
    pick = bench.nodes.pick

    def counting(*arguments: object) -> object:
        nonlocal picks
        picks += 1
        return pick(*arguments)  # type: ignore[arg-type]

    bench.nodes.pick = counting  # type: ignore[method-assign, assignment]
    bench.dispatcher.leave(held[0])
    assert (sum(waiter.waker.done() for waiter in waiting if waiter.waker), picks) == (1, 2), (
        "one is placed, and one look tells that the others do not fit"
    )
    bench.enter("t0")
    assert picks == 2


async def test_a_report_has_only_its_node_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(nodes=20)
    bench.fill(80)
    waiting = [bench.enter(wanted=Resources(1000 + number, 10)) for number in range(50)]
    looks: list[AfsletNode] = []
    open_to = AfsletNode.open_to

    def counting(node: AfsletNode, wanted: Resources) -> bool:
        looks.append(node)
        return open_to(node, wanted)

    monkeypatch.setattr(AfsletNode, "open_to", counting)
    for node in bench.nodes.nodes:
        bench.nodes.report(node, report(node.status.node_id, 4, 4096))
    assert not looks, "nothing has changed"
    used = report("node7", 5, 4096, used_cpu_cores=4)
    bench.nodes.report(bench.nodes.nodes[7], used)
    assert set(looks) == {bench.nodes.nodes[7]}
    assert len(looks) <= len(waiting) + 1
    assert [waiter for waiter in waiting if waiter.placement] == waiting[:1]


async def test_limits_name_themselves() -> None:
    bench = Bench(max_queued=3, max_queued_tenant=2)
    bench.fill()
    for _ in range(2):
        bench.enter("a")
    with pytest.raises(ResourceExhausted, match=r"^2 runs of tenant 'a' wait already: the limit per tenant is 2$"):
        bench.enter("a")
    waiter = bench.enter("b")
    with pytest.raises(ResourceExhausted, match=r"^3 runs wait already: the proxy's limit is 3$"):
        bench.enter("c")
    bench.dispatcher.leave(waiter)
    bench.enter("c")
    assert bench.dispatcher.tenants() == {"a": (2, 0), "c": (1, 0), "filler": (0, 4)}


async def test_what_can_never_run_is_not_queued() -> None:
    bench = Bench()
    bench.fill()
    with pytest.raises(InvalidArgument, match="5 CPUs and 10 MiB asked for"):
        bench.enter(wanted=Resources(5000, 10))
    bench.nodes.lost(bench.nodes.nodes[0], Unavailable("gone"))
    with pytest.raises(Unavailable, match="no afslet answers"):
        bench.enter()
    assert bench.dispatcher.queued == 0


async def test_runs_wait_for_nodes_that_went_away_but_not_for_long() -> None:
    bench = Bench(lost_grace=10.0)
    bench.fill()
    waiter = bench.enter("a")
    bench.nodes.lost(bench.nodes.nodes[0], Unavailable("gone"))
    bench.dispatcher.tick()
    bench.clock.now += 9.0
    bench.dispatcher.tick()
    assert waiter.error is None
    bench.nodes.report(bench.nodes.nodes[0], report("node0", 4, 4096))
    bench.dispatcher.tick()
    bench.nodes.lost(bench.nodes.nodes[0], Unavailable("gone"))
    for seconds in (0.0, 9.0):
        bench.clock.now += seconds
        bench.dispatcher.tick()
        assert waiter.error is None, "it was back in between"
    bench.clock.now += 1.0
    bench.dispatcher.tick()
    assert isinstance(waiter.error, Unavailable)
    bench.dispatcher.leave(waiter)
    assert bench.dispatcher.queued == 0


async def test_a_refused_run_keeps_its_place() -> None:
    bench = Bench()
    held = bench.fill()
    first, second = bench.enter("a"), bench.enter("a")
    bench.dispatcher.leave(held.pop())
    assert first.placement is not None
    bench.nodes.nodes[0].refused = True
    bench.dispatcher.put_aside(first)
    assert (bench.dispatcher.queued, second.placement) == (2, None)
    bench.dispatcher.resume(first, patient=True)
    bench.nodes.report(bench.nodes.nodes[0], report("node0", 4, 4096))
    assert (first.placement is not None, second.placement) == (True, None)


async def test_a_refused_offer_is_no_turn() -> None:
    bench = Bench()
    held = bench.fill()
    unlucky = [bench.enter("unlucky") for _ in range(2)]
    other = [bench.enter("other") for _ in range(3)]
    assert bench.served([*unlucky, *other], 1, held) == unlucky[:1]
    bench.nodes.nodes[0].refused = True
    bench.dispatcher.put_aside(unlucky[0])
    bench.dispatcher.resume(unlucky[0], patient=True)
    bench.nodes.report(bench.nodes.nodes[0], report("node0", 4, 4096))
    assert [waiter.tenant for waiter in (*unlucky, *other) if waiter.placement] == ["unlucky"]
    assert [waiter.tenant for waiter in bench.served([*unlucky, *other], 2, held)] == ["other", "unlucky"]


async def test_a_refused_offer_does_not_make_its_class_young() -> None:
    bench = Bench(priority_ageing=10.0)
    held = bench.fill()
    low = bench.enter("low", -2)
    high = [bench.enter("high", 0) for _ in range(3)]
    bench.clock.now += 21
    assert bench.served([low, *high], 1, held) == high[:1]
    bench.clock.now += 2
    assert bench.served([low, *high], 1, held) == [low]
    bench.nodes.nodes[0].refused = True
    bench.dispatcher.put_aside(low)
    bench.clock.now += 1
    bench.dispatcher.resume(low, patient=True)
    bench.nodes.report(bench.nodes.nodes[0], report("node0", 4, 4096))
    assert low.placement is not None


async def test_positions() -> None:
    bench = Bench()
    bench.fill()
    many = [bench.enter("many", wants_progress=True) for _ in range(3)]
    few = [bench.enter("few", wants_progress=True) for _ in range(2)]
    assert [waiter.position for waiter in many] == [1, 2, 3]
    assert [waiter.position for waiter in few] == [2, 4]
    urgent = bench.enter("many", 1, wants_progress=True)
    assert urgent.position == 1
    bench.dispatcher.tell_positions()
    assert [waiter.position for waiter in (urgent, *many, *few)] == [1, 2, 4, 6, 3, 5]
    bench.dispatcher.leave(urgent)
    bench.dispatcher.leave(many[0])
    bench.dispatcher.tell_positions()
    assert sorted(waiter.position for waiter in (*many[1:], *few)) == [1, 2, 3, 4]


async def test_stopping_ends_every_wait() -> None:
    bench = Bench()
    bench.fill()
    waiter = bench.enter()
    bench.dispatcher.close()
    assert isinstance(waiter.error, Unavailable)
    with pytest.raises(Unavailable, match=r"^afs_proxy is being stopped$"):
        bench.enter()


async def test_nothing_is_remembered_of_tenants_that_left() -> None:
    bench = Bench()
    for number in range(10):
        bench.dispatcher.leave(bench.enter(f"tenant{number}"))
    assert bench.dispatcher.tenants() == {}
    queue = bench.dispatcher._queue
    assert not any((queue._turns, queue._turns_given, queue._served_given))
    assert bench.dispatcher.running == 0
