"""One chunk from one of several nodes: the next one on an error, a second one beside the first if that is slow.

If there is no second one, others may have the chunk by now, so whoever knows is asked again and again until the first answers.

State: nothing of its own; what is known of the nodes is in :class:`~afs.layerstore.peerwatch.PeerWatch`. The attempts for a
chunk are tasks of the fetch: when the first one has verified and written the chunk, the others are cancelled and awaited. Two
that come at once write the same bytes.
"""

import asyncio
import contextlib
import functools
import logging
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

from afs.core.errors import AfsError, NotFound
from afs.core.together import ended
from afs.discovery.client import Peer
from afs.layerstore.chunkclient import Exchange, Stale, Take, wait_for
from afs.layerstore.errors import BadChunk, LayerUnavailable
from afs.layerstore.layerstats import LayerStats
from afs.layerstore.partial import PartialLayer
from afs.layerstore.peers import Peers
from afs.layerstore.peerwatch import PeerWatch
from afs.layerstore.scheduling import Priority, Ticket

log = logging.getLogger(__name__)

_LOOK_S = 0.25  # between two looks for another node while the only one is slow

_Attempt = asyncio.Task[bytes | None]
# Nodes that have some of a layer, as far as is known by now, and the ids of those that have all of it.
Known = tuple[Sequence[Peer], Collection[str]]


@dataclass(frozen=True, slots=True)
class Wanted:
    """A chunk to fetch. *round* counts how often everybody was asked before."""

    partial: PartialLayer
    index: int
    ticket: Ticket
    stats: LayerStats
    round: int = 0


class Begun:
    """A chunk that :meth:`Fetcher.begin` asked *peer* for; *end* is told how that ended."""

    def __init__(
        self, peer: Peer, exchange: Exchange[bytes | None], end: Callable[[BaseException | None], None]
    ) -> None:
        self.peer = peer
        self.exchange = exchange
        exchange.done.add_done_callback(_noting(end))


def _noting(end: Callable[[BaseException | None], None]) -> Callable[["asyncio.Future[Any]"], None]:
    def note(done: "asyncio.Future[Any]") -> None:
        error = asyncio.CancelledError() if done.cancelled() else done.exception()
        # A connection that was closed while nothing was asked says nothing of the node, as if it had been given up at once.
        end(asyncio.CancelledError() if isinstance(error, Stale) else error)

    return note


class Fetcher:
    """*failed* is told of a node that did not give a chunk, and whether its bytes were wrong.

    *known* is asked about a layer whose nodes are slow; it answers at once, and should find out more beside.
    """

    def __init__(
        self,
        peers: Peers,
        watch: PeerWatch,
        failed: Callable[[str, Peer, bool], None],
        known: Callable[[str], Known],
    ) -> None:
        self._peers = peers
        self._watch = watch
        self._failed = failed
        self._known = known

    def first(self, index: int, peers: Sequence[Peer], complete: Collection[str]) -> Peer:
        """Whom :meth:`fetch` would ask first now."""
        return self._watch.order(peers, complete, index)[0]

    def begin(self, wanted: Wanted, peer: Peer) -> Begun | None:
        """Ask *peer* now, without a task, if it answers these days and there is a connection. See :meth:`took`."""
        if self._watch.is_shunned(peer.endpoint):
            return None
        exchange = self._peers.begin_chunk(
            peer,
            wanted.partial.diff_id,
            wanted.index,
            _taker(wanted),
            timeout=self._watch.timeout(peer.endpoint, wanted.round),
        )
        return None if exchange is None else Begun(peer, exchange, self._watch.begin(peer.endpoint))

    def begin_run(self, partial: PartialLayer, indices: Sequence[int], peer: Peer) -> Exchange[object] | None:
        """Ask *peer* for several chunks in one go, as :meth:`begin`; those that are here at the end have come from it."""
        if self._watch.is_shunned(peer.endpoint):
            return None
        takes = [functools.partial(partial.put, index) for index in indices]
        timeout = self._watch.timeout(peer.endpoint, 0)
        exchange = self._peers.begin_chunks(peer, partial.diff_id, indices, takes, timeout=timeout)
        if exchange is not None:
            exchange.done.add_done_callback(_noting(self._watch.begin(peer.endpoint, len(indices))))
        return exchange

    def took(self, wanted: Wanted, peer: Peer) -> None:
        """The chunk came from *peer*."""
        length = wanted.partial.table.chunk_range(wanted.index, wanted.partial.layout)[1]
        wanted.stats.from_peers[peer.endpoint] += length

    def hedge_delay(self, peer: Peer) -> float:
        """Seconds after which :meth:`fetch` has to look after what was begun."""
        return self._watch.hedge_delay(peer.endpoint)

    async def fetch(
        self, wanted: Wanted, peers: Sequence[Peer], complete: Collection[str], begun: Begun | None = None
    ) -> bytes | None:
        """The chunk from one of *peers*, see :data:`~afs.layerstore.filling.Fetch`. Raises LayerUnavailable.

        *begun* failed, or takes longer than :meth:`hedge_delay`.
        """
        left, cause = self._watch.order(peers, complete, wanted.index), "no node holds it"
        running: dict[_Attempt, Peer] = {}
        asked: set[str] = set()
        patience = 0.0
        late = False
        if begun is not None:
            late = not begun.exchange.done.done() and wanted.ticket.priority is Priority.DEMAND
            asked.add(begun.peer.endpoint)
            left = [peer for peer in left if peer.endpoint != begun.peer.endpoint]
            running[asyncio.create_task(self._attempt(wanted, begun.peer, begun))] = begun.peer
        try:
            while left or running:
                if not running:
                    asked.add(self._start(wanted, left, running))
                first = next(iter(running.values()))
                if late or not await self._some_done(wanted, running, first, patience):
                    patience, late = _LOOK_S, False
                    if not self._may_ask(left):
                        left = self._others(wanted, asked)
                    if self._may_ask(left):
                        wanted.stats.hedges += 1
                        asked.add(self._start(wanted, left, running))
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
            await ended(running)
        raise LayerUnavailable(wanted.partial.diff_id, cause)

    async def _some_done(self, wanted: Wanted, running: Collection[_Attempt], first: Peer, patience: float) -> bool:
        """Wait for an answer; false if a reader waits, the only one asked is slow, and *patience* seconds are over.

        Bulk fills links and disks, and would be slow for that alone: a second request would make it slower. It may
        become a demand while it is on its way, so look again.
        """
        delay = max(self._watch.hedge_delay(first.endpoint), patience) if len(running) == 1 else None
        while True:
            done, _ = await asyncio.wait(running, timeout=delay, return_when=asyncio.FIRST_COMPLETED)
            if done or wanted.ticket.priority is Priority.DEMAND:
                return bool(done)

    def _may_ask(self, left: Sequence[Peer]) -> bool:
        """Whether the next node would probably answer."""
        return bool(left) and not self._watch.is_shunned(left[0].endpoint)

    def _others(self, wanted: Wanted, asked: Collection[str]) -> list[Peer]:
        """Who is left, by what is known now."""
        peers, complete = self._known(wanted.partial.diff_id)
        return self._watch.order([peer for peer in peers if peer.endpoint not in asked], complete, wanted.index)

    def _start(self, wanted: Wanted, left: list[Peer], running: dict[_Attempt, Peer]) -> str:
        """Ask the next node; its endpoint."""
        peer = left.pop(0)
        task = asyncio.create_task(self._attempt(wanted, peer), name=f"chunk {wanted.index} from {peer.node_id}")
        running[task] = peer
        return peer.endpoint

    async def _attempt(self, wanted: Wanted, peer: Peer, begun: Begun | None = None) -> bytes | None:
        try:
            if begun is not None:
                with contextlib.suppress(Stale):
                    return await self._taken(wanted, peer, wait_for(begun.exchange))
            return await self._take(wanted, peer, was_bad=False)
        except BadChunk:
            # A node compares a chunk with its table once only. Told that it was wrong it looks again, and repairs it.
            return await self._take(wanted, peer, was_bad=True)

    async def _take(self, wanted: Wanted, peer: Peer, *, was_bad: bool) -> bytes | None:
        timeout = self._watch.timeout(peer.endpoint, wanted.round)
        with self._watch.asking(peer.endpoint):
            asking = self._peers.read_chunk(
                peer, wanted.partial.diff_id, wanted.index, _taker(wanted), timeout=timeout, was_bad=was_bad
            )
            return await self._taken(wanted, peer, asking)

    async def _taken(self, wanted: Wanted, peer: Peer, asking: Awaitable[bytes | None]) -> bytes | None:
        """What came, and the accounts of it."""
        try:
            data = await asking
        except BadChunk:
            wanted.stats.bad_chunks += 1
            log.error(
                "layer %s: layerstore %s served a bad chunk %d", wanted.partial.diff_id, peer.endpoint, wanted.index
            )
            raise BadChunk(wanted.partial.diff_id, wanted.index, peer.endpoint) from None
        self.took(wanted, peer)
        return data


def _taker(wanted: Wanted) -> Take[bytes | None]:
    """What is done with the chunk: it is put in its place, or given back if the disk is full."""
    partial, index = wanted.partial, wanted.index
    return lambda data, digest: None if partial.put(index, data, digest) else bytes(data)
