"""The afslets that a proxy knows, and the choice between them.

State, on one event loop: one :class:`AfsletNode` per address, and for a while what those were that are not named any more. Reports come in by :meth:`Nodes.report` (see watching.py), the
addresses by :meth:`Nodes.update`; both call ``changed``, which has the queue looked at, with the node if it is only one.
Nothing here awaits but ``close``.
"""

import logging
import random
import time
from collections.abc import Callable, Collection, Iterable

import grpc.aio

from afs.afslet.requests import Resources
from afs.core.errors import AfsError, InvalidArgument, NotFound, ResourceExhausted, Unavailable
from afs.core.rpc import channel
from afs.proto.v1 import afslet_pb2 as pb
from afs.proxy.node import AfsletNode, Room

log = logging.getLogger(__name__)
_SAME_LOAD = 0.05  # nodes whose loads differ by less are equals: then the image decides
_FAILURES = 3  # in a row, until a node is avoided
_AVOID_S, _AVOID_MAX_S = 1.0, 60.0
_MAX_DOUBLINGS = 10  # more than enough for the longest pause, and no overflow
_REMEMBER_S = 60.0  # a node that is replaced is away from DNS for some time
_MAX_REASONS = 5  # in one error: it has to fit into a line, and into gRPC's metadata


class NobodyAnswers(Unavailable):
    """No afslet that might run it can be reached; trying again at once cannot help."""


class Nodes:
    """See the module. *clock* gives monotonic seconds."""

    def __init__(
        self,
        endpoints: Iterable[str],
        rng: random.Random,
        clock: Callable[[], float] = time.monotonic,
        open_channel: Callable[[str], grpc.aio.Channel] = channel,
    ) -> None:
        self.nodes: list[AfsletNode] = []
        self.unresolved: Collection[str] = ()
        self.changed: Callable[[AfsletNode | None], None] = lambda _: None
        self.total = Room(1, 1)
        self._missing: dict[str, tuple[float, AfsletNode]] = {}  # by endpoint: until when it is remembered
        self._rng = rng
        self._clock = clock
        self._open_channel = open_channel
        self.update(endpoints)

    def update(self, endpoints: Iterable[str]) -> list[AfsletNode]:
        """Know these from now on: give the new ones. Others take no new runs, and are forgotten by :meth:`sweep`."""
        wanted, known = list(endpoints), {node.endpoint: node for node in self.nodes}
        for node in self.nodes:
            if node.gone is not (gone := node.endpoint not in wanted):
                log.info("afslet %s is %s", node.endpoint, "not named any more" if gone else "named again")
                node.gone = gone
                if gone:
                    self._missing[node.endpoint] = (self._clock() + _REMEMBER_S, node)
        for endpoint in wanted:
            self._missing.pop(endpoint, None)
        new = [AfsletNode(endpoint, self._open_channel(endpoint)) for endpoint in wanted if endpoint not in known]
        self.nodes += new
        self.changed(None)
        return new

    def sweep(self) -> list[AfsletNode]:
        """Forget the nodes that are gone and have nothing of ours; whoever calls closes their channels."""
        now = self._clock()
        self._missing = {endpoint: found for endpoint, found in self._missing.items() if found[0] > now}
        idle = [node for node in self.nodes if node.gone and not node.mine.runs]
        self.nodes = [node for node in self.nodes if node not in idle]
        return idle

    async def close(self) -> None:
        """Close all channels."""
        for node in self.nodes:
            await node.channel.close()

    def report(self, node: AfsletNode, status: pb.GetRuntimeStatusResponse) -> None:
        """*node* said how it is."""
        if not node.reachable:
            log.info("afslet %s is there", node.endpoint)
        if status.draining and not node.status.draining:
            log.info("afslet %s is draining", node.endpoint)
        before = node.offered()
        node.report(status)
        if node.offered() == before:  # a heartbeat
            return
        limits = [node.limit for node in self.nodes if node.usable]
        self.total = Room(sum(room.cpu_millis for room in limits) or 1, sum(room.memory_mb for room in limits) or 1)
        self.changed(node)

    def lost(self, node: AfsletNode, error: AfsError) -> None:
        """Do not choose *node* until it reports again."""
        if node.reachable:
            log.warning("afslet %s: %s", node.endpoint, error.line)
        node.reachable, node.error = False, error.line

    def failed(self, node: AfsletNode, error: AfsError) -> None:
        """*node* answered an offer with an error that is not the request's: after some in a row it is avoided for a while."""
        node.failures += 1
        if node.failures >= _FAILURES:
            doublings = min(node.failures - _FAILURES, _MAX_DOUBLINGS)
            pause = min(_AVOID_S * 2**doublings, _AVOID_MAX_S)
            node.avoided_until = self._clock() + pause
            log.warning(
                "afslet %s failed %d offers in a row, avoided for %g s: %s",
                node.endpoint,
                node.failures,
                pause,
                error.line,
            )

    def avoided(self, node: AfsletNode) -> bool:
        """Whether it failed too often lately."""
        return node.avoided_until > self._clock()

    def state(self, node: AfsletNode) -> str:
        """In one word: unreachable, draining, avoided or ready."""
        if not node.reachable:
            return "unreachable"
        if not node.usable:
            return "draining"
        return "avoided" if self.avoided(node) else "ready"

    def pick(
        self,
        wanted: Resources,
        node_id: str = "",
        image: int = 0,
        tried: Collection[AfsletNode] = (),
        only: AfsletNode | None = None,
    ) -> AfsletNode | None:
        """The emptier of two random nodes with room (power of two choices), but for *tried*; None if there is none.

        With *only*, no other is looked at. Of two that are equally full, one on which the image ran lately.
        """
        roomy = [
            node
            for node in (self.nodes if only is None else (only,))
            if node.usable
            and (not node_id or node.status.node_id == node_id)
            and node not in tried
            and node.open_to(wanted)
            and not self.avoided(node)
        ]
        if len(roomy) < 2:
            return roomy[0] if roomy else None
        one, two = self._rng.sample(roomy, 2)
        difference = one.load() - two.load()
        if abs(difference) < _SAME_LOAD and (image in one.images) is not (image in two.images):
            return one if image in one.images else two
        return one if difference <= 0 else two

    def check(self, wanted: Resources, node_id: str = "") -> None:
        """Raise unless waiting for room makes sense.

        NobodyAnswers if no node, or not the wanted one, answers or takes runs, or if one might that is not here now;
        NotFound for an unknown *node_id*; InvalidArgument if no node could ever give *wanted*.
        """
        alive = [node for node in self.nodes if node.usable]
        if node_id:
            alive = self._named(node_id, alive)
        elif not alive:
            raise NobodyAnswers(f"no afslet answers: {self._why_nobody()}")
        able = [node for node in alive if node.could_take(wanted)]
        if able:
            return
        if not node_id:
            # A larger node that is just being restarted must not turn a run into one that can never work.
            silent = [node for node in self.nodes if not node.usable and not node.gone]
            maybe = [node for node in silent if not node.status.node_id or node.could_take(wanted)]
            if maybe:
                raise NobodyAnswers(
                    f"no afslet that answers has {wanted}, and {maybe[0].endpoint} {_why_not(maybe[0])}"
                )
            if why := self._incomplete(lambda node: node.could_take(wanted)):
                raise NobodyAnswers(f"no afslet that answers has {wanted}, and {why}")
        most = max((node.limit for node in alive), key=lambda room: (room.cpu_millis, room.memory_mb))
        disk = most.disk_mb if wanted.disk_mb else 0
        largest = Resources(most.cpu_millis, most.memory_mb, disk)
        raise InvalidArgument(f"{wanted} asked for, but the largest node has {largest}")

    def _named(self, node_id: str, alive: list[AfsletNode]) -> list[AfsletNode]:
        named = [node for node in self.nodes if node.status.node_id == node_id and not node.gone]
        if not named and any(not node.status.node_id for node in self.nodes):
            raise NobodyAnswers(f"node {node_id!r} is unknown, and not every afslet has answered yet")
        if not named and (why := self._incomplete(lambda node: node.status.node_id == node_id)):
            raise NobodyAnswers(f"node {node_id!r} is unknown, and {why}")
        if not named:
            raise NotFound(f"no afslet that answers is node {node_id!r}")
        if not (usable := [node for node in named if node in alive]):
            raise NobodyAnswers(f"node {node_id!r} {_why_not(named[0])}")
        return usable

    def _incomplete(self, wanted: Callable[[AfsletNode], bool]) -> str:
        """Why there may be a *wanted* node that is not known now; empty if there is none."""
        if self.unresolved:
            return next(iter(self.unresolved))
        now, ids = self._clock(), {node.status.node_id for node in self.nodes if not node.gone}
        for until, node in self._missing.values():
            if until > now and node.status.node_id not in ids and wanted(node):
                return f"{node.endpoint} was named until a moment ago"
        return ""

    def _why_nobody(self) -> str:
        reasons = [f"{node.endpoint}: {node.error or _why_not(node)}" for node in self.nodes if not node.gone]
        reasons = [*self.unresolved, *reasons]
        more = [f"and {len(reasons) - _MAX_REASONS} more"] if len(reasons) > _MAX_REASONS else []
        return "; ".join(reasons[:_MAX_REASONS] + more) or "none is configured"

    def no_room(self, wanted: Resources) -> ResourceExhausted:
        """What to say when nothing is free."""
        return ResourceExhausted(f"no node has {wanted} free now")


def _why_not(node: AfsletNode) -> str:
    return "is draining" if node.reachable and node.status.draining else f"does not answer: {node.error}"
