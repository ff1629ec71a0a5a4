"""One chunk from one of several nodes: the next one on an error, a second one beside the first if that is slow.

State: nothing of its own; what is known of the nodes is in :class:`~afs.layerstore.peerwatch.PeerWatch`. The attempts for a
chunk are tasks of the fetch: when the first one has verified and written the chunk, the others are cancelled and awaited. Two
that come at once write the same bytes.
"""

import asyncio
import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from afs.core.errors import AfsError, NotFound
from afs.discovery.client import Peer
from afs.layerstore.errors import BadChunk, LayerUnavailable
from afs.layerstore.layerstats import LayerStats
from afs.layerstore.partial import PartialLayer
from afs.layerstore.peers import Peers
from afs.layerstore.peerwatch import PeerWatch
from afs.layerstore.scheduling import Priority, Ticket

log = logging.getLogger(__name__)

_Attempt = asyncio.Task[bytes | None]


@dataclass(frozen=True, slots=True)
class Wanted:
    """A chunk to fetch. *round* counts how often everybody was asked before."""

    partial: PartialLayer
    index: int
    ticket: Ticket
    stats: LayerStats
    round: int = 0


class Fetcher:
    """*failed* is told of a node that did not give a chunk, and whether its bytes were wrong."""

    def __init__(self, peers: Peers, watch: PeerWatch, failed: Callable[[str, Peer, bool], None]) -> None:
        self._peers = peers
        self._watch = watch
        self._failed = failed

    async def fetch(self, wanted: Wanted, peers: Sequence[Peer], complete: Collection[str]) -> bytes | None:
        """The chunk from one of *peers*, see :data:`~afs.layerstore.partial.Fetch`. Raises LayerUnavailable."""
        left, cause = self._watch.order(peers, complete, wanted.index), "no node holds it"
        running: dict[_Attempt, Peer] = {}
        try:
            while left or running:
                if not running:
                    self._start(wanted, left, running)
                first = next(iter(running.values()))
                if not await self._some_done(wanted, running, left, first):
                    wanted.stats.hedges += 1
                    self._start(wanted, left, running)
                for task in [task for task in running if task.done()]:
                    peer = running.pop(task)
                    if (error := task.exception()) is None:
                        if peer is not first:
                            self._watch.lost(first.endpoint)
                        return task.result()
                    if not isinstance(error, AfsError):
                        raise error
                    cause = error.line
                    self._failed(wanted.partial.diff_id, peer, isinstance(error, BadChunk))
                    wanted.stats.failovers += bool(left) and not isinstance(error, NotFound)
        finally:
            for task in running:
                task.cancel()
            if running:
                await asyncio.wait(running)
        raise LayerUnavailable(wanted.partial.diff_id, cause)

    async def _some_done(
        self, wanted: Wanted, running: dict[_Attempt, Peer], left: Sequence[Peer], first: Peer
    ) -> bool:
        """Wait for an answer; false if a reader waits, the only one asked is slow and another one could be asked too.

        Bulk fills links and disks, and would be slow for that alone: a second request would make it slower. It may
        become a demand while it is on its way, so look again.
        """
        may_hedge = len(running) == 1 and left and not self._watch.is_shunned(left[0].endpoint)
        delay = self._watch.hedge_delay(first.endpoint) if may_hedge else None
        while True:
            done, _ = await asyncio.wait(running, timeout=delay, return_when=asyncio.FIRST_COMPLETED)
            if done or wanted.ticket.priority is Priority.DEMAND:
                return bool(done)

    def _start(self, wanted: Wanted, left: list[Peer], running: dict[_Attempt, Peer]) -> None:
        peer = left.pop(0)
        task = asyncio.create_task(self._attempt(wanted, peer), name=f"chunk {wanted.index} from {peer.node_id}")
        running[task] = peer

    async def _attempt(self, wanted: Wanted, peer: Peer) -> bytes | None:
        try:
            return await self._take(wanted, peer, was_bad=False)
        except BadChunk:
            # A node compares a chunk with its table once only. Told that it was wrong it looks again, and repairs it.
            return await self._take(wanted, peer, was_bad=True)

    async def _take(self, wanted: Wanted, peer: Peer, *, was_bad: bool) -> bytes | None:
        partial, index = wanted.partial, wanted.index

        def take(data: memoryview) -> bytes | None:
            return None if partial.put(index, data) else bytes(data)

        timeout = self._watch.timeout(peer.endpoint, wanted.round)
        try:
            with self._watch.asking(peer.endpoint):
                data = await self._peers.read_chunk(
                    peer, partial.diff_id, index, take, timeout=timeout, was_bad=was_bad
                )
        except BadChunk:
            wanted.stats.bad_chunks += 1
            log.error("layer %s: layerstore %s served a bad chunk %d", partial.diff_id, peer.endpoint, index)
            raise BadChunk(partial.diff_id, index, peer.endpoint) from None
        wanted.stats.from_peers[peer.endpoint] += partial.table.chunk_range(index, partial.layout)[1]
        return data
