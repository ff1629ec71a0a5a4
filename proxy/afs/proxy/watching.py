"""Following the nodes: their status as they push it (``afs.v1.Runs.Watch``), or polled where they do not, and DNS.

State, on one event loop: one task per node, and one that resolves names. A node's task is the only one that reads its
reports; it runs as long as the node is known, and reconnects with back-off. Silence longer than some heartbeats is an end.
"""

import asyncio
import logging
from dataclasses import dataclass
from typing import Any, cast

from afs.core.errors import AfsError, Unavailable, Unimplemented
from afs.core.rpc import EOF, calling
from afs.proto.v1 import afslet_pb2 as pb
from afs.proto.v1.afslet_pb2_grpc import AfsletStub
from afs.proto.v1.runs_pb2 import WatchRequest
from afs.proto.v1.runs_pb2_grpc import RunsStub
from afs.proxy.endpoints import Endpoints
from afs.proxy.node import AfsletNode
from afs.proxy.nodes import Nodes

log = logging.getLogger(__name__)
_FIRST_PAUSE_S, _MAX_PAUSE_S = 0.1, 1.0
_POLL_TIMEOUT_S = 2.0


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds: between heartbeats, of silence until a node counts as unreachable, between polls, between looks at DNS."""

    heartbeat: float = 1.0
    silence: float = 3.0
    poll: float = 1.0
    dns: float = 5.0


class Watcher:
    """Keeps *nodes* up to date with *endpoints*; use :meth:`start` and :meth:`close`."""

    def __init__(self, nodes: Nodes, endpoints: Endpoints, timing: Timing) -> None:
        self._nodes = nodes
        self._endpoints = endpoints
        self._timing = timing
        self._tasks: dict[AfsletNode, asyncio.Task[None]] = {}
        self._heard: dict[AfsletNode, asyncio.Event] = {}  # set once the node answered or failed to
        self._polled: set[AfsletNode] = set()
        self._resolving: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Look the names up, and wait a moment for every node's first word."""
        await self.look()
        waits = [asyncio.ensure_future(event.wait()) for event in self._heard.values()]
        if waits:
            _, pending = await asyncio.wait(waits, timeout=_POLL_TIMEOUT_S)
            for wait in pending:
                wait.cancel()
        self._resolving = asyncio.create_task(self._resolve(), name="names of afslets")

    async def close(self) -> None:
        """Stop following."""
        tasks = [*self._tasks.values(), *([self._resolving] if self._resolving else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def look(self) -> None:
        """Resolve the names once: new nodes are followed, those that are gone and idle forgotten."""
        addresses = await self._endpoints.look()
        self._nodes.unresolved = list(self._endpoints.errors.values())
        self._nodes.update(addresses)
        for node in self._nodes.nodes:
            if node not in self._tasks:
                self._heard[node] = asyncio.Event()
                self._tasks[node] = asyncio.create_task(self._follow(node), name=f"afslet {node.endpoint}")
        for node in self._nodes.sweep():
            task = self._tasks.pop(node)
            task.cancel()
            await asyncio.wait([task])
            self._heard.pop(node)
            self._polled.discard(node)
            await node.channel.close()

    async def _resolve(self) -> None:
        while True:
            await asyncio.sleep(self._timing.dns)
            await self.look()

    async def refresh(self) -> None:
        """Poll the nodes that do not push."""
        await asyncio.gather(*(self._poll(node) for node in self._polled), return_exceptions=True)

    async def _follow(self, node: AfsletNode) -> None:
        pause = _FIRST_PAUSE_S
        while True:
            was_reachable = node.reachable
            try:
                await self._watch(node)
            except Unimplemented:
                pause = _FIRST_PAUSE_S
                await self._keep_polling(node)
            except AfsError as error:
                self._lost(node, error)
            pause = _FIRST_PAUSE_S if was_reachable else pause
            await asyncio.sleep(pause)
            pause = min(pause * 2, _MAX_PAUSE_S)

    def _report(self, node: AfsletNode, status: pb.GetRuntimeStatusResponse) -> None:
        self._nodes.report(node, status)
        self._heard[node].set()

    def _lost(self, node: AfsletNode, error: AfsError) -> None:
        self._nodes.lost(node, error)
        self._heard[node].set()

    async def _watch(self, node: AfsletNode) -> None:
        """Take in reports until the call ends, which is an AfsError."""
        name, silence = f"afslet {node.endpoint}", self._timing.silence
        call: Any = RunsStub(node.channel).Watch(WatchRequest(heartbeat_ms=int(self._timing.heartbeat * 1000)))
        try:
            with calling(name):
                while True:
                    async with asyncio.timeout(silence):
                        status = await call.read()
                    if status is EOF:
                        raise Unavailable(f"{name} does not answer: it ended its reports")
                    self._polled.discard(node)
                    self._report(node, cast("pb.GetRuntimeStatusResponse", status))
        except TimeoutError:
            raise Unavailable(f"{name} does not answer: silent for {silence:g} s") from None
        finally:
            call.cancel()

    async def _keep_polling(self, node: AfsletNode) -> None:
        """Until it does not answer: what comes back may be newer, and push."""
        if node not in self._polled:
            log.info("afslet %s does not push its status: polled every %g s", node.endpoint, self._timing.poll)
            self._polled.add(node)
        while True:
            if not await self._poll(node):
                return
            await asyncio.sleep(self._timing.poll)

    async def _poll(self, node: AfsletNode) -> bool:
        try:
            with calling(f"afslet {node.endpoint}"):
                request = pb.GetRuntimeStatusRequest()
                self._report(node, await AfsletStub(node.channel).GetRuntimeStatus(request, timeout=_POLL_TIMEOUT_S))
        except AfsError as error:
            self._lost(node, error)
            return False
        return True
