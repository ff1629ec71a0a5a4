"""The afslets that a proxy knows, their reported capacity, and the choice between them.

State, on one event loop: one :class:`AfsletNode` per endpoint. ``free`` is what the node last reported, less what this
proxy dispatched since and plus what came back; the next report overwrites it. It is an estimate: the node itself admits.
``_freed`` is replaced after each wake-up, so every waiter sees every release.
"""

import asyncio
import logging
import random
from collections.abc import Iterable
from dataclasses import dataclass, field

import grpc.aio

from afs.core.errors import AfsError, InvalidArgument, NotFound, ResourceExhausted, Unavailable
from afs.core.rpc import calling, channel
from afs.proto.v1 import afslet_pb2 as pb
from afs.proto.v1.afslet_pb2_grpc import AfsletStub

log = logging.getLogger(__name__)


class NobodyAnswers(Unavailable):
    """No afslet that might run it can be reached; trying again at once cannot help."""


@dataclass(slots=True)
class Room:
    """CPU in cores, memory in MiB."""

    cpus: int = 0
    memory_mb: int = 0

    def fits(self, wanted: "Room") -> bool:
        """Whether *wanted* fits into it."""
        return self.cpus >= wanted.cpus and self.memory_mb >= wanted.memory_mb

    def add(self, other: "Room", sign: int) -> None:
        """Add (1) or subtract (-1) in place."""
        self.cpus += sign * other.cpus
        self.memory_mb += sign * other.memory_mb


@dataclass(slots=True, eq=False)
class AfsletNode:
    """One afslet; *error* says why it is not reachable."""

    endpoint: str
    channel: grpc.aio.Channel
    reachable: bool = False
    error: str = "not asked yet"
    status: pb.GetRuntimeStatusResponse = field(default_factory=pb.GetRuntimeStatusResponse)
    free: Room = field(default_factory=Room)

    @property
    def limit(self) -> Room:
        """All that the node has."""
        return Room(self.status.limit_cpu_cores, self.status.limit_memory_mb)

    def load(self) -> float:
        """How full the node is: the fuller of its two resources, 0 to 1."""
        limit = self.limit
        return 1 - min(self.free.cpus / max(limit.cpus, 1), self.free.memory_mb / max(limit.memory_mb, 1))


class Nodes:
    """Polls *endpoints* every *interval* seconds."""

    def __init__(
        self, endpoints: Iterable[str], interval: float, rng: random.Random, *, lease_ttl: float | None = None
    ) -> None:
        self.nodes = [AfsletNode(endpoint, channel(endpoint, lease_ttl=lease_ttl)) for endpoint in endpoints]
        self._interval = interval
        self._rng = rng
        self._freed = asyncio.Event()

    async def close(self) -> None:
        """Close all channels."""
        for node in self.nodes:
            await node.channel.close()

    async def run(self) -> None:
        """Poll for ever; cancel it to stop."""
        while True:
            await self.poll()
            await asyncio.sleep(self._interval)

    async def poll(self) -> None:
        """Ask every node once."""
        await asyncio.gather(*(self._poll_one(node) for node in self.nodes))
        self._wake()

    async def _poll_one(self, node: AfsletNode) -> None:
        try:
            with calling(f"afslet {node.endpoint}"):
                status = await AfsletStub(node.channel).GetRuntimeStatus(pb.GetRuntimeStatusRequest(), timeout=2.0)
        except AfsError as error:
            self.mark_unreachable(node, error)
            return
        if not node.reachable:
            log.info("afslet %s is there", node.endpoint)
        node.reachable, node.error, node.status = True, "", status
        node.free = Room(status.available_cpu_cores, status.available_memory_mb)

    def mark_unreachable(self, node: AfsletNode, error: AfsError) -> None:
        """Do not choose *node* until it answers a poll again."""
        if node.reachable:
            log.warning("afslet %s: %s", node.endpoint, error.line)
        node.reachable, node.error = False, error.line

    def choose(self, wanted: Room, node_id: str) -> AfsletNode:
        """The emptier of two random nodes with room (power of two choices).

        Raises NobodyAnswers if no node, or not the wanted one, answers, NotFound for an unknown *node_id*,
        InvalidArgument if no node could ever give *wanted*, ResourceExhausted if none can now.
        """
        alive = [node for node in self.nodes if node.reachable]
        if not alive:
            why = "; ".join(f"{node.endpoint}: {node.error}" for node in self.nodes) or "none is configured"
            raise NobodyAnswers(f"no afslet answers: {why}")
        if node_id:
            named = [node for node in self.nodes if node.status.node_id == node_id]
            if not named and any(not node.status.node_id for node in self.nodes):
                raise NobodyAnswers(f"node {node_id!r} is unknown, and not every afslet has answered yet")
            if not named:
                raise NotFound(f"no afslet that answers is node {node_id!r}")
            alive = [node for node in named if node.reachable]
            if not alive:
                raise NobodyAnswers(f"node {node_id!r} does not answer: {named[0].error}")
        able = [node for node in alive if node.limit.fits(wanted)]
        if not able and not node_id:
            # A larger node that is just being restarted must not turn a run into one that can never work.
            silent = [node for node in self.nodes if not node.reachable]
            maybe = [node for node in silent if not node.status.node_id or node.limit.fits(wanted)]
            if maybe:
                raise NobodyAnswers(
                    f"no afslet that answers has {wanted.cpus} CPUs and {wanted.memory_mb} MiB, "
                    f"and {maybe[0].endpoint} does not answer: {maybe[0].error}"
                )
        if not able:
            most = max((node.limit for node in alive), key=lambda room: (room.cpus, room.memory_mb))
            raise InvalidArgument(
                f"{wanted.cpus} CPUs and {wanted.memory_mb} MiB asked for, but the largest node has "
                f"{most.cpus} CPUs and {most.memory_mb} MiB"
            )
        roomy = [node for node in able if node.free.fits(wanted)]
        if not roomy:
            raise ResourceExhausted(f"no node has {wanted.cpus} CPUs and {wanted.memory_mb} MiB free now")
        return min(self._rng.sample(roomy, min(2, len(roomy))), key=AfsletNode.load)

    def take(self, node: AfsletNode, room: Room) -> None:
        """A run was accepted."""
        node.free.add(room, -1)

    def give_back(self, node: AfsletNode, room: Room) -> None:
        """A run ended."""
        node.free.add(room, 1)
        self._wake()

    def _wake(self) -> None:
        self._freed.set()
        self._freed = asyncio.Event()

    async def room_may_be_free(self, most: float) -> bool:
        """Wait until a run ended or a report came, *most* seconds at most; whether one did."""
        try:
            return await asyncio.wait_for(self._freed.wait(), most)
        except TimeoutError:
            return False
