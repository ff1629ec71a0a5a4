"""How a layerstore talks to discovery: it announces itself and asks who holds what.

State and locks: ``_held``/``_images``/``_traces``/``_chains`` are what this node has now, ``_sent`` what discovery was told
last. Only :meth:`Announcer.flush` sends, under ``_sending``, so heartbeats leave in the order of their sequence numbers. Between
building a heartbeat and its answer they may change; the difference to ``_sent`` then goes into the next one. Chains are many, so
they are not compared: ``_changed_chains`` has those that changed since a heartbeat was built last. One that does not arrive leaves
a gap in the sequence, and then all are told. 20,000 of them (2000 images of 10 layers) are 160 KB and 5 ms.
"""

import asyncio
import contextlib
import logging
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from afs.core.errors import AfsError
from afs.core.rpc import calling, channel
from afs.proto.v1 import discovery_pb2 as pb
from afs.proto.v1.discovery_pb2_grpc import DiscoveryStub

log = logging.getLogger(__name__)
CALL_TIMEOUT_S = 2.0


@dataclass(frozen=True, slots=True)
class Peer:
    """A live layerstore. *capacity* in bytes is its weight in placement; *chunk_port* is on the host of *endpoint*."""

    node_id: str
    endpoint: str
    capacity: int
    chunk_port: int = field(default=0, compare=False)


@dataclass(frozen=True, slots=True)
class Located:
    """Holders by diff_id (complete ones first), by image key, of traces by manifest digest (the most chunks first), by chain.

    This node is never among them. *complete* has, for every diff_id of which somebody holds every chunk, the ids of
    those nodes.
    """

    layers: dict[str, list[Peer]]
    images: dict[str, list[Peer]]
    complete: Mapping[str, frozenset[str]] = field(default_factory=dict)
    traces: Mapping[str, list[Peer]] = field(default_factory=dict)
    chains: Mapping[int, list[Peer]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Contents:
    """What a node holds: *layers* as (size, complete) by diff_id, image keys, chunks of traces by manifest digest."""

    layers: dict[str, tuple[int, bool]] = field(default_factory=dict)
    images: set[str] = field(default_factory=set)
    traces: dict[str, int] = field(default_factory=dict)


class Announcer:
    """Keeps discovery informed of one node, and knows the live peers from the answers."""

    def __init__(self, address: str, me: Peer) -> None:
        self.me = me
        self.peers: list[Peer] = [me]
        self._address = f"discovery {address}"
        self._channel = channel(address)
        self._stub = DiscoveryStub(self._channel)
        self._incarnation = secrets.randbits(63)
        self._sequence = 0
        self._full = True
        self._held: dict[str, tuple[int, bool]] = {}
        self._images: set[str] = set()
        self._traces: dict[str, int] = {}
        self._chains: set[int] = set()
        self._changed_chains: set[int] = set()
        self._sent = _Contents()
        self._sending = asyncio.Lock()
        self._interval = 1.0
        self._reachable = True

    def serve_at(self, endpoint: str, chunk_port: int = 0) -> None:
        """Peers reach this node at *endpoint*; the ports may be known only once the servers are bound."""
        self.me = Peer(self.me.node_id, endpoint, self.me.capacity, chunk_port)
        self.peers = [self.me]

    def hold(self, diff_id: str, size: int, *, complete: bool) -> None:
        """This node has (a part of) the layer now; told with the next heartbeat or :meth:`flush`."""
        self._held[diff_id] = (size, complete)

    def drop(self, diff_id: str) -> None:
        """This node no longer has the layer."""
        self._held.pop(diff_id, None)

    def forget_image(self, key: str) -> None:
        """This node cannot tell about an image any more."""
        self._images.discard(key)

    def know_image(self, key: str) -> None:
        """This node can tell what image *key* consists of."""
        self._images.add(key)

    def know_trace(self, manifest_digest: str, chunks: int) -> None:
        """This node has a start trace of *chunks* chunks of the image."""
        self._traces[manifest_digest] = chunks

    def forget_trace(self, manifest_digest: str) -> None:
        """This node has no start trace of the image any more."""
        self._traces.pop(manifest_digest, None)

    def know_chains(self, chains: Iterable[int]) -> None:
        """This node can tell images with chain ids that begin with these 8 bytes."""
        new = set(chains) - self._chains
        self._chains |= new
        self._changed_chains |= new

    def forget_chains(self, chains: Iterable[int]) -> None:
        """This node cannot any more."""
        gone = self._chains.intersection(chains)
        self._chains -= gone
        self._changed_chains |= gone

    async def flush(self) -> None:
        """Send a heartbeat now. Discovery being away is logged once and is no error: the state is soft."""
        async with self._sending:
            for _ in range(2):  # a resend request is answered at once
                if not await self._beat():
                    return

    async def _beat(self) -> bool:
        now = _Contents(dict(self._held), set(self._images), dict(self._traces))
        request = self._request(now)
        self._changed_chains.clear()
        self._sequence = request.sequence
        try:
            with calling(self._address):
                response = await self._stub.Heartbeat(request, timeout=CALL_TIMEOUT_S)
        except AfsError as error:
            self._full = True
            if self._reachable:
                log.warning("no heartbeat: %s; going on with what is known", error.line)
            self._reachable = False
            return False
        if not self._reachable:
            log.info("%s is back", self._address)
        self._reachable = True
        self._full = response.resend
        self._interval = response.interval_ms / 1000 or self._interval
        nodes = response.nodes
        self.peers = [Peer(n.node_id, n.endpoint, n.capacity_bytes, n.chunk_port) for n in nodes] or [self.me]
        if not response.resend:
            self._sent = now
        return response.resend

    def _request(self, now: _Contents) -> pb.HeartbeatRequest:
        old = _Contents() if self._full else self._sent
        layers = [item for item in now.layers.items() if old.layers.get(item[0]) != item[1]]
        traces = [item for item in now.traces.items() if old.traces.get(item[0]) != item[1]]
        chains = self._chains if self._full else self._changed_chains & self._chains
        return pb.HeartbeatRequest(
            node_id=self.me.node_id,
            endpoint=self.me.endpoint,
            chunk_port=self.me.chunk_port,
            capacity_bytes=self.me.capacity,
            incarnation=self._incarnation,
            sequence=self._sequence + 1,
            full=self._full,
            layers=[pb.HeldLayer(diff_id=diff_id, size_bytes=size, complete=full) for diff_id, (size, full) in layers],
            removed_layers=sorted(old.layers.keys() - now.layers.keys()),
            images=sorted(now.images - old.images),
            removed_images=sorted(old.images - now.images),
            traces=[pb.HeldTrace(manifest_digest=digest, chunks=chunks) for digest, chunks in traces],
            removed_traces=sorted(old.traces.keys() - now.traces.keys()),
            chains=chains,
            removed_chains=() if self._full else self._changed_chains - self._chains,
        )

    async def run(self) -> None:
        """Heartbeats for ever; cancel it to stop."""
        while True:
            await self.flush()
            await asyncio.sleep(self._interval)

    async def leave(self) -> None:
        """Say good-bye, so that nobody asks this node any more, and close the channel."""
        with contextlib.suppress(AfsError), calling(self._address):
            request = pb.HeartbeatRequest(
                node_id=self.me.node_id, endpoint=self.me.endpoint, incarnation=self._incarnation, leaving=True
            )
            await self._stub.Heartbeat(request, timeout=CALL_TIMEOUT_S)
        await self._channel.close()

    async def locate(
        self,
        diff_ids: Iterable[str] = (),
        images: Iterable[str] = (),
        traces: Iterable[str] = (),
        chains: Iterable[int] = (),
    ) -> Located:
        """Ask who holds these. With discovery away nobody is known to: the answer is empty, and it is logged."""
        try:
            with calling(self._address):
                request = pb.LocateRequest(diff_ids=diff_ids, images=images, traces=traces, chains=chains)
                response = await self._stub.Locate(request, timeout=CALL_TIMEOUT_S)
        except AfsError as error:
            log.warning("cannot locate: %s", error.line)
            return Located({}, {})
        return Located(
            {key: self._others(value) for key, value in response.layers.items()},
            {key: self._others(value) for key, value in response.images.items()},
            {key: whole for key, value in response.layers.items() if (whole := self._held_whole(value))},
            {key: self._others(value) for key, value in response.traces.items()},
            {key: self._others(value) for key, value in response.chains.items()},
        )

    def _held_whole(self, holders: pb.Holders) -> frozenset[str]:
        others = (item for item in holders.holders if item.node_id != self.me.node_id)
        return frozenset(item.node_id for item in others if item.complete)

    def _others(self, holders: pb.Holders) -> list[Peer]:
        others = (item for item in holders.holders if item.node_id != self.me.node_id)
        return [Peer(item.node_id, item.endpoint, 0, item.chunk_port) for item in others]
