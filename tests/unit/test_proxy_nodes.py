"""Nodes at the proxy: how the estimate of free room follows reports, which node is chosen, and which are not."""

import random
from collections import Counter
from collections.abc import AsyncIterator

import pytest

from afs.afslet.requests import Resources
from afs.core.errors import InvalidArgument, NotFound, Unavailable
from afs.proto.v1 import afslet_pb2 as pb
from afs.proxy.node import AfsletNode, Reservation, Room
from afs.proxy.nodes import Nodes
from afs.proxy.run import read_start
from tests.testbed.proxynodes import Clock, report

ONE = Resources(1000, 1)


@pytest.fixture
async def nodes() -> AsyncIterator[Nodes]:
    """Four nodes of 8 CPUs and 800 MiB that reported; node0 is full, node3 is empty."""
    endpoints = [f"127.0.0.1:{number}" for number in range(1, 5)]
    made = Nodes(endpoints, random.Random(0), Clock())  # noqa: S311 - not for secrets
    for number, node in enumerate(made.nodes):
        used = 8 - number * 8 // 3
        made.report(node, report(f"node{number}", 8, 800, used_cpu_cores=used, used_memory_mb=used * 100))
    yield made
    await made.close()


def chosen(nodes: Nodes, wanted: Resources = ONE, node_id: str = "", image: int = 0) -> str:
    """The id of the node that is chosen; empty if there is none."""
    node = nodes.pick(wanted, node_id, image)
    return node.status.node_id if node is not None else ""


async def test_the_emptier_of_two_is_chosen(nodes: Nodes) -> None:
    counts = Counter(chosen(nodes) for _ in range(600))
    assert set(counts) == {"node2", "node3"}  # node0 has no room, node1 always loses
    assert abs(counts["node3"] - 400) < 60  # in two of three pairs
    assert abs(counts["node2"] - 200) < 60


async def test_the_fuller_resource_decides(nodes: Nodes) -> None:
    _, cpu, memory, other = nodes.nodes
    nodes.report(cpu, report("node1", 8, 800, used_memory_mb=700))
    nodes.report(memory, report("node2", 8, 800, used_cpu_cores=4, used_memory_mb=400))
    assert (cpu.load(), memory.load()) == (0.875, 0.5)
    nodes.lost(other, Unavailable("gone"))
    assert {chosen(nodes) for _ in range(20)} == {"node2"}


async def test_among_equals_the_image_decides(nodes: Nodes) -> None:
    for number, node in enumerate(nodes.nodes):
        nodes.report(node, report(f"node{number}", 8, 800, images=[7] if number == 1 else []))
    counts = Counter(chosen(nodes, image=7) for _ in range(400))
    assert abs(counts["node1"] - 200) < 40, "each time that it is one of the two"
    nodes.report(nodes.nodes[1], report("node1", 8, 800, images=[7], used_cpu_cores=1))
    assert chosen(nodes, image=7)
    assert Counter(chosen(nodes, image=7) for _ in range(400))["node1"] == 0, "12 % fuller is no equal"


async def test_fractions_disk_and_numbers_of_runs_are_room_too(nodes: Nodes) -> None:
    node = nodes.nodes[0]
    nodes.report(node, report("node0", 8, 800, used_cpu_millis=7500, limit_disk_mb=100, limit_runs=2))
    assert chosen(nodes, Resources(500, 1), "node0") == "node0"
    assert chosen(nodes, Resources(501, 1), "node0") == ""
    assert chosen(nodes, Resources(500, 1, 101), "node0") == ""
    for _ in range(2):
        node.take(Resources(100, 1, 50))
    assert node.free().runs == 0
    assert chosen(nodes, Resources(100, 1), "node0") == ""


async def test_a_run_that_asks_for_no_disk_takes_the_nodes_default(nodes: Nodes) -> None:
    node = nodes.nodes[0]
    limits = {"limit_disk_mb": 100, "run_disk_mb": 40}
    nodes.report(node, report("node0", 8, 800, **limits))
    first, second = (node.take(Resources(100, 1)) for _ in range(2))
    assert (first.wanted, node.free().disk_mb) == (Resources(100, 1, 40), 20)
    assert chosen(nodes, Resources(100, 1), "node0") == "", "the node would refuse it"
    assert chosen(nodes, Resources(100, 1, 20), "node0") == "node0"
    nodes.report(node, report("node0", 8, 800, used_disk_mb=80, used_cpu_millis=200, **limits | {"run_disk_mb": 10}))
    assert chosen(nodes, Resources(100, 1), "node0") == "node0"
    for placement in (first, second):
        node.give_back(placement)
    assert node.mine == Room()


async def test_own_runs_and_reports_are_counted_once_each(nodes: Nodes) -> None:
    node = nodes.nodes[3]
    placement = node.take(Resources(3000, 300))
    assert node.free() == Room(5000, 500, node.limit.disk_mb, node.limit.runs - 1)
    nodes.report(node, report("node3", 8, 800))  # sent before the node knew of the run
    assert node.free().cpu_millis == 5000
    nodes.report(node, report("node3", 8, 800, used_cpu_cores=5, used_memory_mb=500, running_containers=2))
    assert node.free().cpu_millis == 3000, "somebody else has two"
    node.give_back(placement)
    assert node.free().cpu_millis == 6000
    nodes.report(node, report("node3", 8, 800, used_cpu_cores=2, used_memory_mb=200))
    assert node.free().cpu_millis == 6000


async def test_a_node_that_refused_has_no_room_until_it_reports(nodes: Nodes) -> None:
    node = nodes.nodes[3]
    node.refused = True
    assert chosen(nodes, node_id="node3") == ""
    nodes.report(node, report("node3", 8, 800))
    assert chosen(nodes, node_id="node3") == "node3"


async def test_a_named_node(nodes: Nodes) -> None:
    assert chosen(nodes, node_id="node1") == "node1"
    assert chosen(nodes, node_id="node0") == "", "it is full"
    nodes.check(ONE, "node0")
    with pytest.raises(NotFound, match=r"^no afslet that answers is node 'nobody'$"):
        nodes.check(ONE, "nobody")
    nodes.lost(nodes.nodes[1], Unavailable("gone"))
    with pytest.raises(Unavailable, match=r"^node 'node1' does not answer: gone$"):
        nodes.check(ONE, "node1")


async def test_what_never_fits(nodes: Nodes) -> None:
    for wanted in (Resources(9000, 1), Resources(1000, 801), Resources(8001, 1)):
        assert chosen(nodes, wanted) == ""
        with pytest.raises(InvalidArgument, match=r"but the largest node has 8 CPUs and 800 MiB$"):
            nodes.check(wanted)
    nodes.lost(nodes.nodes[0], Unavailable("gone"))
    nodes.check(Resources(8000, 800))
    nodes.nodes[0].limit = Room(16000, 1600, 1, 1)
    with pytest.raises(
        Unavailable, match=r"no afslet that answers has 16 CPUs and 1 MiB, and 127.0.0.1:1 does not answer"
    ):
        nodes.check(Resources(16000, 1))


async def test_nobody_answers(nodes: Nodes, caplog: pytest.LogCaptureFixture) -> None:
    for node in nodes.nodes:
        nodes.lost(node, Unavailable("gone"))
        nodes.lost(node, Unavailable("still gone"))
    with pytest.raises(Unavailable, match=r"^no afslet answers: 127.0.0.1:1: still gone; 127.0.0.1:2: still gone; "):
        nodes.check(ONE)
    assert len(caplog.records) == 4  # once each
    empty = Nodes([], random.Random(0))  # noqa: S311 - not for secrets
    with pytest.raises(Unavailable, match=r"^no afslet answers: none is configured$"):
        empty.check(ONE)
    empty.unresolved = ["dns:///afslets:1 cannot be resolved: Name or service not known"]
    with pytest.raises(Unavailable, match=r"^no afslet answers: dns:///afslets:1 cannot be resolved: "):
        empty.check(ONE)


async def test_not_every_silent_node_is_named() -> None:
    many = Nodes([f"127.0.0.1:{port}" for port in range(1, 101)], random.Random(0))  # noqa: S311 - not for secrets
    with pytest.raises(Unavailable, match=r"^no afslet answers: .*; 127.0.0.1:5: not asked yet; and 95 more$"):
        many.check(ONE)
    await many.close()


async def test_a_draining_node_takes_no_new_runs(nodes: Nodes) -> None:
    nodes.report(nodes.nodes[3], report("node3", 8, 800, draining=True))
    assert {chosen(nodes) for _ in range(50)} == {"node2"}, "the emptier of those left"
    with pytest.raises(Unavailable, match=r"^node 'node3' is draining$"):
        nodes.check(ONE, "node3")
    assert nodes.state(nodes.nodes[3]) == "draining"


async def test_a_node_that_fails_offers_in_a_row_is_avoided_for_longer_each_time(nodes: Nodes) -> None:
    clock = Clock()
    nodes._clock = clock
    node = nodes.nodes[3]
    for _ in range(2):
        nodes.failed(node, Unavailable("broken"))
    assert chosen(nodes, node_id="node3") == "node3"
    for pause in (1.0, 2.0, 4.0):
        nodes.failed(node, Unavailable("broken"))
        assert chosen(nodes, node_id="node3") == ""
        nodes.check(ONE, "node3")  # waiting for it makes sense
        assert nodes.state(node) == "avoided"
        clock.now += pause
        assert chosen(nodes, node_id="node3") == "node3"


async def test_a_node_may_fail_for_ever(nodes: Nodes) -> None:
    clock = Clock()
    nodes._clock = clock
    node = nodes.nodes[3]
    node.failures = 5000
    nodes.failed(node, Unavailable("broken"))
    assert node.avoided_until == clock.now + 60


async def test_nodes_that_names_stop_naming_go_when_they_are_idle(nodes: Nodes) -> None:
    gone, placement = nodes.nodes[3], nodes.nodes[3].take(ONE)
    changes: list[int] = []
    nodes.changed = lambda _: changes.append(1)
    (new,) = nodes.update(["127.0.0.1:1", "127.0.0.1:2", "127.0.0.1:9"])
    assert changes
    assert (new.endpoint, new.reachable) == ("127.0.0.1:9", False)
    assert {chosen(nodes) for _ in range(50)} == {"node1"}
    idle = nodes.sweep()
    assert [node.endpoint for node in idle] == ["127.0.0.1:3"]
    assert gone in nodes.nodes, "a run of ours is there"
    gone.give_back(placement)
    assert nodes.sweep() == [gone]
    for node in (*idle, gone):
        await node.channel.close()


async def test_a_node_that_is_not_named_just_now_is_not_the_request_s_fault(nodes: Nodes) -> None:
    clock = Clock()
    nodes._clock = clock
    big, large = nodes.nodes[3], Resources(16000, 1)
    nodes.report(big, report("big", 16, 800))
    nodes.update(["127.0.0.1:1", "127.0.0.1:2", "127.0.0.1:3"])
    for swept in (False, True):
        if swept:
            assert nodes.sweep() == [big]
            await big.channel.close()
        with pytest.raises(Unavailable, match=r"16 CPUs and 1 MiB, and 127.0.0.1:4 was named until a moment ago$"):
            nodes.check(large)
        with pytest.raises(Unavailable, match=r"^node 'big' is unknown, and 127.0.0.1:4 was named until"):
            nodes.check(ONE, "big")
        with pytest.raises(InvalidArgument):
            nodes.check(Resources(17000, 1))
        with pytest.raises(NotFound):
            nodes.check(ONE, "nobody")
    clock.now += 60
    with pytest.raises(InvalidArgument):
        nodes.check(large)
    with pytest.raises(NotFound):
        nodes.check(ONE, "big")
    assert nodes.sweep() == []
    assert not nodes._missing


async def test_a_replaced_node_is_missing_no_more(nodes: Nodes) -> None:
    nodes.report(nodes.nodes[3], report("node3", 16, 800))
    (new,) = nodes.update([*(node.endpoint for node in nodes.nodes[:3]), "127.0.0.1:9"])
    nodes.report(new, report("node3", 8, 800))
    with pytest.raises(InvalidArgument):
        nodes.check(Resources(16000, 1))


async def test_a_name_that_cannot_be_resolved_may_hide_a_node(nodes: Nodes) -> None:
    nodes.unresolved = ["dns:///big:1 cannot be resolved: timed out"]
    nodes.check(ONE)
    with pytest.raises(Unavailable, match=r"9 CPUs and 1 MiB, and dns:///big:1 cannot be resolved: timed out$"):
        nodes.check(Resources(9000, 1))
    with pytest.raises(Unavailable, match=r"^node 'x' is unknown, and dns:///big:1 cannot be resolved: timed out$"):
        nodes.check(ONE, "x")


async def test_a_name_that_comes_back_is_the_same_node(nodes: Nodes) -> None:
    endpoints = [node.endpoint for node in nodes.nodes]
    nodes.update(endpoints[:3])
    assert nodes.update(endpoints) == []
    assert chosen(nodes, node_id="node3") == "node3"


async def test_a_reservation_leaves_to_others_what_it_does_not_need(nodes: Nodes) -> None:
    node: AfsletNode = nodes.nodes[3]
    before = node.take(Resources(6000, 600))
    node.reservation = Reservation(Resources(7000, 1))
    assert node.open_to(Resources(1000, 1)), "the run that was there has to end anyway"
    other = node.take(Resources(1000, 1))
    assert not node.open_to(Resources(1000, 1)), "8 - 7 - 1 is nothing"
    node.give_back(other)
    assert node.open_to(Resources(1000, 1))
    node.give_back(before)
    assert node.free().fits(Resources(7000, 1))


def first(**fields: object) -> bytes:
    """A first message."""
    return pb.ExecuteRequest(start=pb.StartRequest(**fields)).SerializeToString()  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("message", "text"),
    [
        (None, "the first request must be start"),
        (b"", "the first request must be start"),
        (b"\xff\xff", "the first request is not an ExecuteRequest"),
        (pb.ExecuteRequest(file_end=pb.FileEntryEnd()).SerializeToString(), "the first request must be start"),
        (first(cpu_cores=1), "image is missing"),
        (first(image="a", memory_mb=1), "cpu_cores must be positive, not 0"),
        (first(image="a", cpu_cores=1, memory_mb=1, priority=101), "priority must be between -100 and 100, not 101"),
    ],
)
def test_bad_first_messages(message: bytes | None, text: str) -> None:
    with pytest.raises(InvalidArgument, match=f"^{text}$"):
        read_start(message)


def test_a_good_first_message() -> None:
    assert read_start(first(image="a", cpu_millis=500, memory_mb=2)).memory_mb == 2
