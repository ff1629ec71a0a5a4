"""What a node gives, refuses and has waiting."""

from __future__ import annotations

import asyncio
import re
from typing import TYPE_CHECKING

import pytest

from afs.afslet.admission import Admission, Capacity, Reservation
from afs.afslet.requests import Resources
from afs.afslet.runs import Runs
from afs.core.errors import InvalidArgument, ResourceExhausted, Unavailable
from afs.proto.v1 import afslet_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Callable


def node(
    max_queued: int = 0, *, runs: int = 0, disk_mb: int = 0, changed: Callable[[], None] | None = None
) -> Admission:
    """4 CPUs, 1000 MiB; a run has at most 100 MiB of disk and 64 processes."""
    return Admission(Capacity(4000, 1000, disk_mb, runs, run_disk_mb=100, run_pids=64), max_queued, changed)


def queued(
    admission: Admission, cpu_millis: int, priority: int = 0, timeout_s: float | None = None
) -> asyncio.Task[Reservation]:
    """Someone who waits for CPU."""
    wanted = Resources(cpu_millis, 1)
    return asyncio.create_task(admission.reserve(wanted, priority=priority, may_wait=True, timeout_s=timeout_s))


async def turn() -> None:
    """Let every task go as far as it can."""
    for _ in range(5):
        await asyncio.sleep(0)


async def test_reservations() -> None:
    admission = node()
    first = await admission.reserve(Resources(2500, 400))
    assert (admission.available, admission.running) == (Resources(1500, 600), 1)
    second = await admission.reserve(Resources(1500, 600))
    assert (admission.available, admission.running) == (Resources(0, 0), 2)
    second.release()
    for wanted in (Resources(1501, 1), Resources(1, 601)):
        message = f"{wanted} asked for, but 1.5 CPUs and 600 MiB are free"
        with pytest.raises(ResourceExhausted, match=f"^{re.escape(message)}$"):
            await admission.reserve(wanted)
    second.release()  # again: no harm
    first.release()
    assert (admission.used, admission.running) == (Resources(), 0)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"cpu_cores": 5}, "5 CPUs and 1 MiB asked for, but this node has 4 CPUs and 1000 MiB"),
        ({"cpu_millis": 4001}, "4.001 CPUs and 1 MiB asked for, but this node has 4 CPUs and 1000 MiB"),
        ({"memory_mb": 1001}, "0 CPUs and 1001 MiB asked for, but this node has 4 CPUs and 1000 MiB"),
        ({"disk_mb": 101}, "101 MiB of disk asked for, but a run of this node has at most 100 MiB"),
        ({"pids_limit": 65}, "65 processes asked for, but a run of this node has at most 64"),
    ],
)
def test_what_never_fits(asked: dict[str, int], message: str) -> None:
    with pytest.raises(InvalidArgument, match=f"^{re.escape(message)}$"):
        node().limit.wanted(pb.StartRequest(**{"memory_mb": 1, **asked}))  # type: ignore[arg-type]


def test_defaults_are_filled_in() -> None:
    limit = node().limit
    assert limit.wanted(pb.StartRequest(cpu_cores=2, memory_mb=3)) == Resources(2000, 3, 100)
    assert limit.wanted(pb.StartRequest(cpu_cores=2, cpu_millis=10, memory_mb=3, disk_mb=7)) == Resources(10, 3, 7)
    with pytest.raises(InvalidArgument, match="needs a limit below it for each run, not 0 MiB"):
        Capacity(1000, 1, disk_mb=100)


async def test_the_status_tells_the_default_disk() -> None:
    assert Runs("node1", node().limit).status().run_disk_mb == 100


async def test_disk_and_number_of_runs() -> None:
    admission = node(disk_mb=150)
    first = await admission.reserve(Resources(1, 1, 100))
    with pytest.raises(ResourceExhausted, match="but 50 MiB of disk are free"):
        await admission.reserve(Resources(1, 1, 100))
    first.release()
    admission = node(runs=1)
    first = await admission.reserve(Resources(1, 1, 100))
    with pytest.raises(ResourceExhausted, match="but 1 runs are all that this node runs at once"):
        await admission.reserve(Resources(1, 1, 100))
    first.release()
    (await admission.reserve(Resources(1, 1, 100))).release()


async def test_nobody_waits_unless_the_node_has_a_queue() -> None:
    admission = node()
    await admission.reserve(Resources(4000, 1))
    with pytest.raises(ResourceExhausted):
        await queued(admission, 1)
    assert admission.queued == 0


async def test_first_come_first_served_and_none_is_overtaken() -> None:
    admission = node(10)
    held = await admission.reserve(Resources(3000, 1))
    large, small = queued(admission, 4000), queued(admission, 1000)
    await turn()
    assert admission.queued == 2, "1 CPU is free, but the small one came later"
    with pytest.raises(ResourceExhausted, match="but 2 runs wait for room"):
        await admission.reserve(Resources(1000, 1))
    held.release()
    (await large).release()
    (await small).release()
    assert (admission.queued, admission.running) == (0, 0)


async def test_priorities_go_first() -> None:
    admission = node(10)
    held = await admission.reserve(Resources(4000, 1))
    order: list[int] = []

    async def waiting(name: int, priority: int) -> None:
        reservation = await queued(admission, 4000, priority)
        order.append(name)
        reservation.release()

    async with asyncio.TaskGroup() as group:
        for name, priority in enumerate([0, -5, 7, 0, 7]):
            group.create_task(waiting(name, priority))
        await turn()
        held.release()
    assert order == [2, 4, 0, 3, 1]


async def test_urgent_ones_do_not_wait_behind_others() -> None:
    admission = node(10)
    held = await admission.reserve(Resources(3000, 1))
    large = queued(admission, 4000)
    await turn()
    (await admission.reserve(Resources(1000, 1), priority=1)).release()
    held.release()
    (await large).release()


async def test_a_full_queue() -> None:
    admission = node(1)
    held = await admission.reserve(Resources(4000, 1))
    waiting = queued(admission, 1)
    await turn()
    with pytest.raises(ResourceExhausted, match=re.escape("but 0 CPUs and 999 MiB are free, and 1 runs wait already")):
        await queued(admission, 1)
    held.release()
    (await waiting).release()


async def test_who_waited_long_enough_leaves() -> None:
    admission = node(10)
    held = await admission.reserve(Resources(3000, 1))
    large, small = queued(admission, 4000, timeout_s=0.01), queued(admission, 1000)
    with pytest.raises(ResourceExhausted, match=r"no room for 4 CPUs and 1 MiB within 0\.01 s"):
        await large
    (await small).release()  # nobody is before it any more
    held.release()
    assert (admission.queued, admission.running, admission.used) == (0, 0, Resources())


async def test_who_goes_while_waiting_leaves_nothing() -> None:
    admission = node(10)
    held = await admission.reserve(Resources(3000, 1))
    gone, late, small = queued(admission, 4000), queued(admission, 4000), queued(admission, 1000)
    await turn()
    gone.cancel()
    await turn()
    assert admission.queued == 2
    late.cancel()
    (await small).release()
    last = queued(admission, 4000)
    await turn()
    held.release()
    last.cancel()  # it has its room, and does not know it yet
    await turn()
    assert last.cancelled()
    assert (admission.queued, admission.running, admission.used) == (0, 0, Resources())


async def test_positions() -> None:
    admission = node(10)
    held = await admission.reserve(Resources(4000, 1))
    told: list[tuple[int, int]] = []
    before = queued(admission, 4000)
    await turn()
    one = asyncio.create_task(
        admission.reserve(Resources(4000, 1), may_wait=True, moved=lambda *where: told.append(where))
    )
    await turn()
    after = queued(admission, 4000, priority=-1)
    await turn()
    before.cancel()
    await turn()
    assert told == [(2, 2), (2, 3), (1, 2)]
    held.release()
    (await one).release()
    (await after).release()


async def test_a_node_that_refuses() -> None:
    changes: list[None] = []
    admission = node(10, changed=lambda: changes.append(None))
    held = await admission.reserve(Resources(4000, 1))
    waiting = queued(admission, 1)
    await turn()
    changes.clear()
    admission.refuse("node n is draining")
    assert changes
    for refused in (waiting, queued(admission, 1)):
        with pytest.raises(Unavailable, match="node n is draining"):
            await refused
    held.release()
    admission.refuse("")
    (await admission.reserve(Resources(4000, 1))).release()
