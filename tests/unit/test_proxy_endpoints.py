"""Addresses and names: what they mean, and what happens when DNS says something else."""

from __future__ import annotations

import random
from contextlib import AsyncExitStack

import pytest

from afs.afslet.requests import Resources
from afs.core.errors import InvalidArgument
from afs.proxy.endpoints import Endpoints, Target, parse_target, resolve
from afs.proxy.nodes import Nodes
from afs.proxy.watching import Timing, Watcher
from tests.testbed.proxynodes import TalkingNode, talking, until


@pytest.mark.parametrize(
    ("text", "name", "port"),
    [
        ("127.0.0.1:61051", "", 0),
        ("[::1]:61051", "", 0),
        ("localhost:61051", "", 0),
        ("unix:/run/afs/afslet.sock", "", 0),
        ("afslets:61051", "afslets", 61051),
        ("dns:///afslets.cluster.local:61051", "afslets.cluster.local", 61051),
        ("dns:///localhost:61051", "localhost", 61051),
    ],
)
def test_targets(text: str, name: str, port: int) -> None:
    assert parse_target(text) == Target(text, name, port)


@pytest.mark.parametrize("text", ["", "afslets", "afslets:", ":1", "afslets:x", "afslets:70000", "dns:///afslets"])
def test_what_is_no_target(text: str) -> None:
    with pytest.raises(InvalidArgument, match="not an address: "):
        parse_target(text)


async def test_a_name_s_addresses() -> None:
    assert await resolve("localhost", 7) == ["127.0.0.1:7"]
    assert await resolve("::1", 7) == ["[::1]:7"]


class Dns:
    """Names, as the test has them."""

    def __init__(self, **names: list[str]) -> None:
        self.names = names

    async def __call__(self, name: str, port: int) -> list[str]:
        if name not in self.names:
            raise OSError(-2, "Name or service not known")
        return [address if ":" in address else f"{address}:{port}" for address in self.names[name]]


async def test_addresses_are_given_once_and_the_last_known_ones_stand(caplog: pytest.LogCaptureFixture) -> None:
    dns = Dns(a=["10.0.0.1", "10.0.0.2"])
    endpoints = Endpoints(["10.0.0.2:7", "a:7", "dns:///b:7"], dns)
    assert await endpoints.look() == ["10.0.0.2:7", "10.0.0.1:7"]
    assert list(endpoints.errors) == ["dns:///b:7"]
    dns.names = {"b": ["10.0.0.3"]}
    for _ in range(2):
        assert await endpoints.look() == ["10.0.0.2:7", "10.0.0.1:7", "10.0.0.3:7"]
    assert list(endpoints.errors) == ["a:7"]
    assert len(caplog.records) == 2, "each failure once"


async def test_nodes_come_and_go_with_their_name() -> None:
    async with AsyncExitStack() as stack:
        one, two = [await stack.enter_async_context(talking(TalkingNode(f"node{number}"))) for number in (1, 2)]
        dns = Dns(afslets=[one.address])
        nodes = Nodes((), random.Random(0))  # noqa: S311 - not for secrets
        stack.push_async_callback(nodes.close)
        watcher = Watcher(nodes, Endpoints(["dns:///afslets:1"], dns), Timing(0.2, 1.0, 0.1, 0.01))
        stack.push_async_callback(watcher.close)
        await watcher.start()

        def ready() -> list[str]:
            return [node.status.node_id for node in nodes.nodes if node.usable]

        assert ready() == ["node1"]
        (node1,) = nodes.nodes
        placement = node1.take(Resources(1000, 1))
        dns.names["afslets"] = [two.address]
        await until(lambda: ready() == ["node2"])
        assert len(nodes.nodes) == 2, "node1 has a run of ours"
        assert one.watchers == 1
        node1.give_back(placement)
        await until(lambda: len(nodes.nodes) == 1)
        await until(lambda: one.watchers == 0)
        dns.names["afslets"] = [one.address, two.address]
        await until(lambda: sorted(ready()) == ["node1", "node2"])
