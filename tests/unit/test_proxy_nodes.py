"""Choosing a node, and what the proxy refuses before it asks one."""

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator

import pytest

from afs.core.errors import InvalidArgument, NotFound, ResourceExhausted, Unavailable
from afs.proto.v1 import afslet_pb2 as pb
from afs.proxy.forward import _start
from afs.proxy.nodes import Nodes, Room


@pytest.fixture
async def nodes() -> AsyncIterator[Nodes]:
    """Four nodes of 8 CPUs and 800 MiB that answered; node0 is full, node3 is empty."""
    made = Nodes([f"127.0.0.1:{number}" for number in range(1, 5)], 1.0, random.Random(0))  # noqa: S311 - not for secrets
    for number, node in enumerate(made.nodes):
        node.reachable = True
        node.status = pb.GetRuntimeStatusResponse(node_id=f"node{number}", limit_cpu_cores=8, limit_memory_mb=800)
        node.free = Room(number * 8 // 3, number * 800 // 3)
    yield made
    await made.close()


def chosen(nodes: Nodes, wanted: Room, node_id: str = "") -> str:
    """The id of the node that is chosen."""
    return nodes.choose(wanted, node_id).status.node_id


async def test_the_emptier_of_two_is_chosen(nodes: Nodes) -> None:
    counts = Counter(chosen(nodes, Room(1, 1)) for _ in range(600))
    assert set(counts) == {"node2", "node3"}  # node0 has no room, node1 always loses
    assert abs(counts["node3"] - 400) < 60  # in two of three pairs
    assert abs(counts["node2"] - 200) < 60


async def test_the_fuller_resource_decides(nodes: Nodes) -> None:
    cpu, memory = nodes.nodes[1], nodes.nodes[2]
    cpu.free, memory.free = Room(8, 100), Room(4, 400)
    assert (cpu.load(), memory.load()) == (0.875, 0.5)
    nodes.nodes[3].reachable = False
    assert {chosen(nodes, Room(1, 1)) for _ in range(20)} == {"node2"}


async def test_a_named_node(nodes: Nodes) -> None:
    assert chosen(nodes, Room(1, 1), "node1") == "node1"
    with pytest.raises(NotFound, match=r"^no afslet that answers is node 'nobody'$"):
        chosen(nodes, Room(1, 1), "nobody")
    with pytest.raises(ResourceExhausted, match=r"^no node has 1 CPUs and 1 MiB free now$"):
        chosen(nodes, Room(1, 1), "node0")
    nodes.mark_unreachable(nodes.nodes[1], Unavailable("gone"))
    with pytest.raises(Unavailable, match=r"^node 'node1' does not answer: gone$"):
        chosen(nodes, Room(1, 1), "node1")


async def test_what_never_fits_and_what_does_not_fit_now(nodes: Nodes) -> None:
    for wanted in (Room(9, 1), Room(1, 801)):
        with pytest.raises(InvalidArgument, match=r"but the largest node has 8 CPUs and 800 MiB$"):
            chosen(nodes, wanted)
    nodes.nodes[3].free = Room(7, 800)
    with pytest.raises(ResourceExhausted, match=r"^no node has 8 CPUs and 1 MiB free now$"):
        chosen(nodes, Room(8, 1))


async def test_nobody_answers(nodes: Nodes, caplog: pytest.LogCaptureFixture) -> None:
    for node in nodes.nodes:
        nodes.mark_unreachable(node, Unavailable("gone"))
        nodes.mark_unreachable(node, Unavailable("still gone"))
    with pytest.raises(Unavailable, match=r"^no afslet answers: 127.0.0.1:1: still gone; 127.0.0.1:2: still gone; "):
        chosen(nodes, Room(1, 1))
    assert len(caplog.records) == 4  # once each
    empty = Nodes([], 1.0, random.Random(0))  # noqa: S311 - not for secrets
    with pytest.raises(Unavailable, match=r"^no afslet answers: none is configured$"):
        empty.choose(Room(1, 1), "")


async def test_taking_and_giving_back_wakes_everybody(nodes: Nodes) -> None:
    node = nodes.nodes[3]
    nodes.take(node, Room(8, 800))
    assert node.free == Room(0, 0)
    waiting = [asyncio.create_task(nodes.room_may_be_free(60)) for _ in range(3)]
    await asyncio.sleep(0)
    nodes.give_back(node, Room(8, 800))
    await asyncio.wait_for(asyncio.gather(*waiting), 10)
    assert node.free == Room(8, 800)
    await nodes.room_may_be_free(0.001)  # nobody frees anything: the time ends it


def first(**fields: object) -> bytes:
    """A first message."""
    return pb.ExecuteRequest(start=pb.StartRequest(**fields)).SerializeToString()  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("message", "text"),
    [
        (None, "the first request must be start"),
        (b"", "the first request must be start"),
        (pb.ExecuteRequest(file_end=pb.FileEntryEnd()).SerializeToString(), "the first request must be start"),
        (first(image="a", memory_mb=1), "cpu_cores must be positive, not 0"),
        (first(cpu_cores=1, memory_mb=1), "image is missing"),
    ],
)
def test_bad_first_messages(message: bytes | None, text: str) -> None:
    with pytest.raises(InvalidArgument, match=f"^{text}$"):
        _start(message)


def test_a_good_first_message() -> None:
    assert _start(first(image="a", cpu_cores=1, memory_mb=2)).memory_mb == 2
