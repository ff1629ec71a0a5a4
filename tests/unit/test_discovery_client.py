"""An announcer against a real discovery service in this process."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest
from typing_extensions import override

from afs.core.errors import InvalidArgument
from afs.core.rpc import calling, channel, serving
from afs.discovery.client import Announcer, Located, Peer
from afs.discovery.directory import Directory
from afs.discovery.server import DiscoveryService
from afs.proto.v1 import discovery_pb2 as pb
from afs.proto.v1.discovery_pb2_grpc import DiscoveryStub, add_DiscoveryServicer_to_server

A, B, C = (f"sha256:{number:064d}" for number in (1, 2, 3))


class Recording(DiscoveryService):
    """The real service, which remembers the heartbeats it got."""

    def __init__(self, directory: Directory) -> None:
        super().__init__(directory, 0.25)
        self.beats: list[pb.HeartbeatRequest] = []

    @override
    async def Heartbeat(self, request: pb.HeartbeatRequest, context: Any) -> pb.HeartbeatResponse:
        self.beats.append(request)
        return await super().Heartbeat(request, context)


@asynccontextmanager
async def discovery(address: str = "127.0.0.1:0") -> AsyncIterator[tuple[str, Recording]]:
    """A running service."""
    service = Recording(Directory(7.0))
    async with serving([address], lambda server: add_DiscoveryServicer_to_server(service, server)) as bound:
        yield bound[0], service


@asynccontextmanager
async def announcing(address: str, node_id: str = "n1", capacity: int = 1) -> AsyncIterator[Announcer]:
    """An announcer that leaves at the end."""
    announcer = Announcer(address, Peer(node_id, f"{node_id}:1", capacity))
    try:
        yield announcer
    finally:
        await announcer.leave()


async def test_a_flush_sends_what_changed() -> None:
    async with discovery() as (address, service), announcing(address) as announcer:
        announcer.hold(A, 10, complete=False)
        announcer.hold(B, 20, complete=True)
        announcer.know_image("i")
        await announcer.flush()
        announcer.hold(A, 10, complete=True)
        announcer.hold(B, 20, complete=True)
        await announcer.flush()
        announcer.drop(B)
        announcer.drop(C)
        await announcer.flush()
        await announcer.flush()
    first, second, third, fourth, last = service.beats
    assert first.full
    assert {layer.diff_id for layer in first.layers} == {A, B}
    assert list(first.images) == ["i"]
    assert not second.full
    assert [(layer.diff_id, layer.complete) for layer in second.layers] == [(A, True)]
    assert (list(third.layers), list(third.removed_layers)) == ([], [B])
    assert (list(fourth.layers), list(fourth.removed_layers), list(fourth.images)) == ([], [], [])
    assert [beat.sequence for beat in service.beats[:4]] == [1, 2, 3, 4]
    assert last.leaving


async def test_traces_are_told_as_they_change() -> None:
    async with discovery() as (address, service), announcing(address) as one, announcing(address, "n2") as two:
        one.know_trace(A, 10)
        one.know_trace(B, 20)
        await one.flush()
        one.know_trace(A, 10)
        one.know_trace(B, 21)
        await one.flush()
        one.forget_trace(A)
        one.forget_trace(C)
        await one.flush()
        await one.flush()
        located = await two.locate([C], traces=[A, B, C])
        assert located.traces == {B: [Peer("n1", "n1:1", 0)]}
        assert (await one.locate(traces=[B])).traces == {B: []}  # oneself left out
        async with channel(address) as opened:
            (node,) = (await DiscoveryStub(opened).ListNodes(pb.ListNodesRequest(include_contents=True))).nodes
        assert [(trace.manifest_digest, trace.chunks) for trace in node.traces] == [(B, 21)]
    told = [[(trace.manifest_digest, trace.chunks) for trace in beat.traces] for beat in service.beats[:4]]
    assert told == [[(A, 10), (B, 20)], [(B, 21)], [], []]
    assert [list(beat.removed_traces) for beat in service.beats[:4]] == [[], [], [A], []]


async def test_chains_are_told_as_they_change() -> None:
    low, high = 1, 2**64 - 1
    async with discovery() as (address, service), announcing(address) as one, announcing(address, "n2") as two:
        one.know_chains([low, high])
        await one.flush()
        one.know_chains([high])
        await one.flush()
        one.forget_chains([low, 5])
        one.know_chains([7])
        await one.flush()
        await one.flush()
        two.know_chains([high])
        await two.flush()
        located = await two.locate(chains=[low, high, 7])
        assert located.chains == {high: [Peer("n1", "n1:1", 0)], 7: [Peer("n1", "n1:1", 0)]}
    told = [(sorted(beat.chains), sorted(beat.removed_chains)) for beat in service.beats[:4]]
    assert told == [([low, high], []), ([], []), ([7], [low]), ([], [])]


async def test_chains_that_got_lost_are_told_again(monkeypatch: pytest.MonkeyPatch) -> None:
    async with discovery() as (address, service), announcing(address) as one, announcing(address, "n2") as two:
        one.know_chains([1, 2])
        await one.flush()
        one.know_chains([3])
        one.forget_chains([1])
        with monkeypatch.context() as patch:
            patch.setattr(service, "_directory", None)  # whatever it does fails
            await one.flush()
        one.know_chains([4])
        await one.flush()
        assert [sorted(beat.chains) for beat in service.beats] == [[1, 2], [3], [2, 3, 4]]
        assert (await two.locate(chains=[1, 2, 3, 4])).chains.keys() == {2, 3, 4}


async def test_a_heartbeat_that_was_given_up_leaves_a_gap() -> None:
    async with discovery() as (address, service), announcing(address) as one:
        one.know_chains([1])
        await one.flush()
        one.know_chains([2])
        flush = asyncio.create_task(one.flush())
        await asyncio.sleep(0)  # it has built the heartbeat, and nothing of it has left
        flush.cancel()
        await asyncio.gather(flush, return_exceptions=True)
        one.know_chains([3])
        await one.flush()
        directory = service._directory
        assert [bool(directory.chain_holders(chain, 0)) for chain in (1, 2, 3)] == [True] * 3


async def test_a_new_server_gets_everything_at_once() -> None:
    async with AsyncExitStack() as stack:
        running = AsyncExitStack()
        address, _ = await running.enter_async_context(discovery())
        announcer = await stack.enter_async_context(announcing(address))
        announcer.hold(A, 10, complete=True)
        announcer.know_trace(C, 5)
        announcer.know_chains([3])
        await announcer.flush()
        await running.aclose()
        _, service = await stack.enter_async_context(discovery(address))
        await asyncio.wait_for(announcer._channel.channel_ready(), 10)
        announcer.hold(B, 20, complete=True)
        await announcer.flush()
        assert [trace.manifest_digest for trace in service.beats[1].traces] == [C]
        assert list(service.beats[1].chains) == [3]
        assert [beat.full for beat in service.beats] == [False, True]
        assert {layer.diff_id for layer in service.beats[1].layers} == {A, B}


async def test_discovery_being_away_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    async with AsyncExitStack() as stack:
        running = AsyncExitStack()
        address, _ = await running.enter_async_context(discovery())
        announcer = await stack.enter_async_context(announcing(address))
        await announcer.flush()
        await running.aclose()
        announcer.hold(A, 10, complete=True)
        await announcer.flush()
        await announcer.flush()
        warnings = [record.message for record in caplog.records if record.levelno == logging.WARNING]
        assert len(warnings) == 1
        assert warnings[0].startswith(f"no heartbeat: discovery {address} does not answer: ")
        assert announcer.peers == [Peer("n1", "n1:1", 1)]  # what was known stays
        assert await announcer.locate([A], ["i"]) == Located({}, {})
        assert caplog.records[-1].message.startswith(f"cannot locate: discovery {address} does not answer: ")
        _, service = await stack.enter_async_context(discovery(address))
        await asyncio.wait_for(announcer._channel.channel_ready(), 10)
        await announcer.flush()
        assert caplog.records[-1].message == f"discovery {address} is back"
        assert [(beat.full, len(beat.layers)) for beat in service.beats] == [(True, 1)]


async def test_nodes_learn_of_each_other() -> None:
    async with discovery() as (address, _), announcing(address, "n1", 5) as one, announcing(address, "n2", 7) as two:
        assert one.peers == [one.me]
        await one.flush()
        await two.flush()
        assert two.peers == [Peer("n1", "n1:1", 5), Peer("n2", "n2:1", 7)]
        assert one.peers == [one.me]
        await one.flush()
        assert one.peers == two.peers
        assert one._interval == 0.25


async def test_locate_leaves_oneself_out() -> None:
    async with discovery() as (address, _), AsyncExitStack() as stack:
        nodes = [await stack.enter_async_context(announcing(address, f"n{number}")) for number in range(4)]
        for number, node in enumerate(nodes):
            node.hold(A, 10, complete=number == 2)
            node.know_image("i")
            await node.flush()
        nodes[1].hold(B, 10, complete=True)
        await nodes[1].flush()
        located = await nodes[1].locate([A, B, C], ["i", "j"])
        assert [peer.node_id for peer in located.layers[A]] == ["n2", "n0", "n3"]
        assert located.layers[B] == []
        assert C not in located.layers
        assert [peer.node_id for peer in located.images["i"]] == ["n0", "n2", "n3"]
        assert "j" not in located.images


async def test_a_node_that_leaves_is_gone_at_once() -> None:
    async with discovery() as (address, _), announcing(address, "n1") as one:
        async with announcing(address, "n2") as two:
            await two.flush()
            await one.flush()
            assert len(one.peers) == 2
        await one.flush()
        assert one.peers == [one.me]


async def test_leaving_without_discovery_is_quiet(tmp_path: object) -> None:
    async with announcing(f"unix:{tmp_path}/none"):
        pass


async def test_the_endpoint_may_come_late() -> None:
    async with discovery() as (address, service), announcing(address) as announcer:
        announcer.serve_at("127.0.0.1:7")
        assert announcer.peers == [Peer("n1", "127.0.0.1:7", 1)]
        await announcer.flush()
        assert service.beats[0].endpoint == "127.0.0.1:7"


async def test_the_service_lists_nodes_with_or_without_contents() -> None:
    async with discovery() as (address, _), announcing(address) as announcer, channel(address) as opened:
        announcer.hold(B, 2, complete=True)
        announcer.hold(A, 1, complete=False)
        await announcer.flush()
        stub = DiscoveryStub(opened)
        (node,) = (await stub.ListNodes(pb.ListNodesRequest(include_contents=True))).nodes
        assert [(layer.diff_id, layer.size_bytes, layer.complete) for layer in node.layers] == [
            (A, 1, False),
            (B, 2, True),
        ]
        (bare,) = (await stub.ListNodes(pb.ListNodesRequest())).nodes
        assert not bare.layers
        assert bare.last_seen_unix == node.last_seen_unix > 0


@pytest.mark.parametrize(
    "request_", [pb.HeartbeatRequest(node_id="n"), pb.HeartbeatRequest(endpoint="x:1")], ids=["node", "endpoint"]
)
async def test_a_heartbeat_needs_a_name_and_an_address(request_: pb.HeartbeatRequest) -> None:
    async with discovery() as (address, _), channel(address) as opened:
        with pytest.raises(InvalidArgument, match=r"^a heartbeat needs node_id and endpoint$"), calling("discovery"):
            await DiscoveryStub(opened).Heartbeat(request_)
