"""A proxy in this process, over afslets that only talk."""

from __future__ import annotations

import asyncio
import contextlib
import random
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Any

import grpc.aio

from afs.core.rpc import serving
from afs.proto.v1.runs_pb2_grpc import add_RunsServicer_to_server
from afs.proxy import idempotency
from afs.proxy.dispatch import Dispatcher, Limits
from afs.proxy.endpoints import Endpoints
from afs.proxy.forward import Forwarder
from afs.proxy.nodes import Nodes
from afs.proxy.runs import RunsService
from afs.proxy.watching import Timing, Watcher
from tests.testbed.proxynodes import Caller, TalkingNode, talking, until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


class Proxy:
    """A proxy in this process."""

    def __init__(self, dispatcher: Dispatcher, forwarder: Forwarder, outcomes: list[str]) -> None:
        self.dispatcher = dispatcher
        self.nodes = dispatcher.nodes
        self.forwarder = forwarder
        self.outcomes = outcomes
        self.address = ""

    async def queued(self, count: int) -> None:
        """Wait until so many wait."""
        await until(lambda: self.dispatcher.queued == count)


@asynccontextmanager
async def proxy(
    *nodes: TalkingNode, ttl: float = 600.0, lease_ttl: float = 15.0, **limits: Any
) -> AsyncIterator[Proxy]:
    """Serve a proxy over *nodes*, which are served as well."""
    async with AsyncExitStack() as stack:
        for node in nodes:
            await stack.enter_async_context(talking(node))
        known = Nodes((), random.Random(0))  # noqa: S311 - not for secrets
        stack.push_async_callback(known.close)
        dispatcher = Dispatcher(known, Limits(**{"feedback": 0.02, **limits}))
        outcomes: list[str] = []
        forwarder = Forwarder(dispatcher, idempotency.Runs(ttl, 100), outcomes.append, lease_ttl)
        stack.push_async_callback(forwarder.close)
        watcher = Watcher(known, Endpoints(node.address for node in nodes), Timing(0.2, 1.0, 0.05, 5.0))
        stack.push_async_callback(watcher.close)
        await watcher.start()
        ticking = asyncio.create_task(dispatcher.run())
        stack.callback(ticking.cancel)

        def register(server: grpc.aio.Server) -> None:
            server.add_generic_rpc_handlers((forwarder,))
            add_RunsServicer_to_server(RunsService(known, forwarder.runs), server)

        bound = await stack.enter_async_context(serving(["127.0.0.1:0"], register, grace_s=0.0))
        made = Proxy(dispatcher, forwarder, outcomes)
        made.address = bound[0]
        yield made
        await until(lambda: not forwarder.runs)
        assert (dispatcher.queued, dispatcher.running, dispatcher.tenants()) == (0, 0, {}), "something is left behind"


@asynccontextmanager
async def full(proxy: Proxy, node: TalkingNode, count: int = 4) -> AsyncIterator[list[Any]]:
    """Runs that take all of *node* until the block ends."""
    node.hold = True
    callers = [await (await Caller(proxy.address, tenant="filler").start()).until_accepted() for _ in range(count)]
    seen = [await node.seen.get() for _ in range(count)]
    yield seen
    for each in seen:
        each.end.set()
    for caller in callers:
        with contextlib.suppress(grpc.aio.UsageError):
            await caller.end()
