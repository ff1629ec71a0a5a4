"""Where a layer's bytes come from: the peers that hold them, the layer's owner, or its source.

State (one event loop): ``_providers``, ``_avoided`` and ``_origins`` (:mod:`afs.layerstore.origins`) are hints; any await may
find them changed, and a wrong one costs one failed call. They go with the layer when it is evicted, as its statistics do. Discovery is asked again for the
providers of a layer that is being read when the last answer is ``_REFRESH_S`` old, or ``_SLOW_REFRESH_S`` while they are slow,
beside the reading, and when none of them gave a chunk; ``_looking`` has these questions, one at a time for a layer.

A layer that nobody has is pulled again beside the looking for somebody who has it, for its source may be away while a node
comes back. ``_placing`` is single flight by origin, and by whether the pull is passed on to the owner: one who waits for the
owner must not hold up one whom the owner told. Such a pull outlives its readers, as any pull does.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from afs.core.errors import (
    AfsError,
    DataLoss,
    DeadlineExceeded,
    Internal,
    ResourceExhausted,
    Unavailable,
)
from afs.core.singleflight import SingleFlight
from afs.discovery.client import Announcer, Peer
from afs.layerstore.copies import Copies
from afs.layerstore.directfetch import DirectFetch
from afs.layerstore.errors import LayerUnavailable
from afs.layerstore.fetching import Begun, Fetcher, Known, Wanted
from afs.layerstore.filling import Started, StartedRun
from afs.layerstore.layerstats import LayerStats
from afs.layerstore.origins import Origin, Origins
from afs.layerstore.partial import PartialLayer
from afs.layerstore.peers import Peers
from afs.layerstore.peerwatch import PeerWatch
from afs.layerstore.placement import ranked
from afs.layerstore.pull import OriginKey, Puller
from afs.layerstore.repair import Repairs
from afs.layerstore.room import Room
from afs.layerstore.runfetch import RunFetch
from afs.layerstore.scheduling import Priority, Ticket, slot_in_queue
from afs.layerstore.store import CompleteLayer, LayerStore

log = logging.getLogger(__name__)
_REFRESH_S = 5.0
_SLOW_REFRESH_S = 1.0
_LOOK_S = 0.5  # between two looks for somebody who has the layer, while it is pulled
_AVOID_S = 600.0  # a node that served wrong bytes even when told so; it may have been repaired since


@dataclass(slots=True)
class Providers:
    """Nodes that hold a layer; *complete* has the ids of those that have all of it. *located* in monotonic seconds."""

    peers: list[Peer]
    complete: frozenset[str]
    located: float = field(default_factory=time.monotonic)


class Supply:
    """*read_deadline* in seconds bounds how long a chunk may take over all tries.

    *told* says whether another node just told this one to have a layer.
    """

    def __init__(
        self,
        store: LayerStore,
        room: Room,
        puller: Puller,
        peers: Peers,
        announcer: Announcer,
        read_deadline: float,
        told: Callable[[str], bool],
    ) -> None:
        self._store = store
        self._puller = puller
        self._peers = peers
        self._announcer = announcer
        self._read_deadline = read_deadline
        self._told = told
        self._providers: dict[str, Providers] = {}
        self._origins = Origins()
        # Until when, by diff_id and id of a node that served a bad chunk.
        self._avoided: dict[str, dict[str, float]] = {}
        self._stats: dict[str, LayerStats] = {}
        self._looking: dict[str, asyncio.Task[Providers]] = {}
        self._placing: SingleFlight[tuple[OriginKey, bool], CompleteLayer | Peer | None] = SingleFlight()
        # A request that is lost without a word must leave as much time again for another one.
        self.watch = PeerWatch(announcer.me.node_id, longest=read_deadline / 2)
        self._fetcher = Fetcher(peers, self.watch, self._failed_at, self._known_now)
        copies = Copies(puller, peers, announcer, self._origins)
        self.repairs = Repairs(store, room, announcer, copies.chunk, copies.of)

    def know(self, origin: Origin) -> None:
        """Where a layer may be pulled from."""
        self._origins.know(origin)

    def origin(self, diff_id: str) -> Origin | None:
        """Where the layer is best pulled from, if anybody told."""
        return next(iter(self._origins.of(diff_id)), None)

    def stats(self, diff_id: str) -> LayerStats:
        """What is counted for the layer."""
        return self._stats.setdefault(diff_id, LayerStats())

    def fetched(self, diff_id: str) -> int:
        """Bytes of the layer that came from peers and its source."""
        stats = self._stats.get(diff_id)
        return stats.from_source + stats.from_peers.total() if stats is not None else 0

    def provide(self, diff_id: str, holders: "Providers") -> None:
        """Ask these for chunks of the layer, in this order."""
        self._providers[diff_id] = holders

    def forget(self, diff_id: str) -> None:
        """The layer was evicted, or never came."""
        self.repairs.forget(diff_id)
        self._origins.forget(diff_id)
        for hints in (self._providers, self._avoided, self._stats):
            hints.pop(diff_id, None)

    async def holders(self, diff_id: str) -> "Providers":
        """Who has the layer, complete ones first; nobody if not one of them has all of it.

        Partial holders alone are of no use: what they miss has to come from the source, and whoever pulls it has it all.
        """
        located = await self._announcer.locate([diff_id])
        complete = frozenset(node for node in located.complete.get(diff_id, ()) if not self._is_avoided(diff_id, node))
        peers = [p for p in located.layers.get(diff_id, []) if not self._is_avoided(diff_id, p.node_id)]
        return Providers(peers if complete else [], complete)

    async def place(self, origin: Origin, *, local: bool) -> CompleteLayer | Peer:
        """Have the layer pulled by its owner, or here if the owner cannot or served bad chunks; the holder."""
        me, diff_id = self._announcer.me, origin.layer.diff_id
        owner = me if local else ranked(diff_id, self._announcer.peers)[0]
        if self._is_avoided(diff_id, owner.node_id):
            owner = me
        if owner.node_id != me.node_id:
            try:
                await self._peers.ensure_layer(owner, origin.ref, origin.platform, origin.layer)
            except (Unavailable, DeadlineExceeded, ResourceExhausted, Internal, DataLoss) as error:
                # Its trouble need not be ours: its disk may be what damages the layer.
                log.warning("owner %s of layer %s: %s; pulling it here", owner.node_id, diff_id, error.line)
            else:
                return owner
        return await self.pull(origin)

    async def pull(self, origin: Origin) -> CompleteLayer:
        """The layer from its source, and announced."""
        complete = self._store.complete(origin.layer.diff_id)
        if complete is None:
            try:
                complete = await self._puller.pull(origin.ref, origin.layer)
            except AfsError:
                self._origins.failed(origin)
                raise
            self._origins.proved(origin)
            self.stats(complete.diff_id).from_source += origin.layer.blob_size
        if not self.repairs.is_damaged(complete.diff_id):
            self._announcer.hold(complete.diff_id, complete.layout.file_size, complete=True)
            await self._announcer.flush()
        return complete

    def start(self, partial: PartialLayer, index: int, ticket: Ticket) -> Started | None:
        """See :data:`~afs.layerstore.filling.Start`: :meth:`fetch`, as long as the first node answers at once."""
        diff_id, since = partial.diff_id, asyncio.get_running_loop().time()
        providers = self._providers.get(diff_id)
        if providers is None or not providers.peers or self._store.complete(diff_id) is not None:
            return None
        self._refresh(diff_id, providers, _REFRESH_S)
        peer = self._fetcher.first(index, providers.peers, providers.complete)
        if not partial.slots.take(ticket, peer.endpoint):
            return None
        wanted = Wanted(partial, index, ticket, self.stats(diff_id))
        with contextlib.ExitStack() as stack:
            stack.callback(partial.slots.give_back, ticket)
            begun = self._fetcher.begin(wanted, peer)
            if begun is None:
                return None
            slot = stack.pop_all()

        def came() -> None:
            self._fetcher.took(wanted, peer)
            self._note_came(partial, ticket)

        async def go_on(begun: Begun) -> bytes | memoryview | None:
            return await self._go_on(wanted, begun, since, slot)

        return DirectFetch(begun, self._fetcher.hedge_delay(peer), slot, go_on, came)

    def start_run(
        self, partial: PartialLayer, run: Sequence[tuple[int, Ticket]], ended: Callable[[bool], None]
    ) -> StartedRun | None:
        """See :data:`~afs.layerstore.filling.StartRun`."""
        diff_id = partial.diff_id
        providers = self._providers.get(diff_id)
        if providers is None or not providers.peers or self._store.complete(diff_id) is not None:
            return None
        self._refresh(diff_id, providers, _REFRESH_S)
        peer = self._fetcher.first(run[0][0], providers.peers, providers.complete)
        stats = self.stats(diff_id)
        with contextlib.ExitStack() as stack:
            for _, ticket in run:
                if not partial.slots.take(ticket, peer.endpoint):
                    return None
                stack.callback(partial.slots.give_back, ticket)
            exchange = self._fetcher.begin_run(partial, [index for index, _ in run], peer)
            if exchange is None:
                return None
            slots = stack.pop_all()

        def account(given_up: bool) -> None:
            for index, ticket in run:
                if partial.has(index):
                    self._fetcher.took(Wanted(partial, index, ticket, stats), peer)
                    self._note_came(partial, ticket)
            ended(given_up)

        return RunFetch(exchange, len(run) * self._fetcher.hedge_delay(peer), slots, account)

    async def _go_on(
        self, wanted: Wanted, begun: Begun, since: float, slot: contextlib.ExitStack
    ) -> bytes | memoryview | None:
        """Ask others beside or behind what was begun at *since*."""
        partial, index, ticket = wanted.partial, wanted.index, wanted.ticket
        cause = [f"layerstore {begun.peer.endpoint} does not answer"]
        try:
            async with asyncio.timeout_at(since + self._read_deadline) as limit:
                try:
                    peers, complete = self._known_now(partial.diff_id)
                    data: bytes | memoryview | None = await self._fetcher.fetch(wanted, peers, complete, begun)
                except LayerUnavailable as error:
                    slot.close()  # looking for others may take long
                    cause[0] = error.cause
                    data = await self._fetch(partial, index, ticket, limit, cause, asked=True)
        except TimeoutError:
            raise LayerUnavailable(partial.diff_id, cause[0]) from None
        self._note_came(partial, ticket)
        return data

    def _note_came(self, partial: PartialLayer, ticket: Ticket) -> None:
        if ticket.priority is not Priority.DEMAND:
            self.stats(partial.diff_id).prefetched += 1

    async def fetch(self, partial: PartialLayer, index: int, ticket: Ticket) -> bytes | memoryview | None:
        """See :data:`~afs.layerstore.filling.Fetch`: from whoever has the chunk; LayerUnavailable after the deadline."""
        cause = ["no node holds it"]
        try:
            async with asyncio.timeout(self._read_deadline) as limit:
                data = await self._fetch(partial, index, ticket, limit, cause)
        except TimeoutError:
            raise LayerUnavailable(partial.diff_id, cause[0]) from None
        self._note_came(partial, ticket)
        return data

    async def _fetch(
        self,
        partial: PartialLayer,
        index: int,
        ticket: Ticket,
        limit: asyncio.Timeout,
        cause: list[str],
        *,
        asked: bool = False,
    ) -> bytes | memoryview | None:
        """Until *limit*; *cause* becomes why it takes so long. *asked*: everybody that is known was, just now."""
        diff_id, pause, round_ = partial.diff_id, 0.05, int(asked)
        while True:
            if (complete := self._store.complete(diff_id)) is not None:  # it was pulled meanwhile
                if complete.table != partial.table:  # which may even have more chunks
                    raise DataLoss(f"layer {diff_id}: a peer described it with an index that is not its own")
                data = await asyncio.to_thread(complete.read_chunk, index)
                if data is not None:
                    return data
                cause[0] = f"chunk {index} is damaged on disk"
                self.repairs.suspect(complete)
                if await self.repairs.check(complete):
                    continue
            if not asked and (providers := self._providers.get(diff_id)) and providers.peers:
                self._refresh(diff_id, providers, _REFRESH_S)
                first = self._fetcher.first(index, providers.peers, providers.complete).endpoint
                if not round_:
                    cause[0] = "other chunks come first"
                try:
                    # Only while others are asked: looking for them and pulling may take long, and needs no memory.
                    async with slot_in_queue(partial.slots, ticket, first, limit):
                        if not round_:
                            cause[0] = f"layerstore {first} does not answer"
                        providers = self._providers.get(diff_id, providers)  # found out while it waited
                        wanted = Wanted(partial, index, ticket, self.stats(diff_id), round_)
                        return await self._fetcher.fetch(wanted, providers.peers, providers.complete)
                except LayerUnavailable as error:
                    cause[0] = error.cause
                    round_ += 1
            asked = False
            if await self._find_providers(diff_id) and not self.repairs.is_damaged(diff_id):
                continue
            await asyncio.sleep(pause)
            pause = min(pause * 2, 1.0)

    def _failed_at(self, diff_id: str, peer: Peer, bad: bool) -> None:
        """*peer* did not give a chunk of the layer: it goes last, or for a while not at all if its bytes were *bad*."""
        if bad:
            log.error("layer %s: avoiding layerstore %s", diff_id, peer.endpoint)
            self._avoided.setdefault(diff_id, {})[peer.node_id] = time.monotonic() + _AVOID_S
        if (known := self._providers.get(diff_id)) is not None and peer in known.peers:
            others = [other for other in known.peers if other != peer]
            known.peers = others if bad else [*others, peer]

    def _is_avoided(self, diff_id: str, node_id: str) -> bool:
        return self._avoided.get(diff_id, {}).get(node_id, 0.0) > time.monotonic()

    def _refresh(self, diff_id: str, providers: Providers, age: float) -> None:
        """Ask discovery again, beside what goes on, if its answer is *age* seconds old."""
        if time.monotonic() >= providers.located + age:
            self._look_again(diff_id)

    def _known_now(self, diff_id: str) -> Known:
        """See :class:`Fetcher`."""
        providers = self._providers.get(diff_id)
        if providers is None:
            return [], frozenset()
        self._refresh(diff_id, providers, _SLOW_REFRESH_S)
        return providers.peers, providers.complete

    def _look_again(self, diff_id: str) -> asyncio.Task[Providers]:
        """Who has the layer, of discovery; also what reads of it use from now on, if there is anybody."""
        task = self._looking.get(diff_id)
        if task is None:
            task = self._looking[diff_id] = asyncio.create_task(
                self._look(diff_id), name=f"providers of {diff_id[:19]}"
            )
            task.add_done_callback(lambda _: self._looking.pop(diff_id))
        return task

    async def _look(self, diff_id: str) -> Providers:
        found = await self.holders(diff_id)
        known = self._providers.get(diff_id)
        if known is not None:  # else it was evicted meanwhile
            known.located = time.monotonic()
            if found.peers:  # discovery may have started anew and know nothing yet
                self._providers[diff_id] = found
        return found

    async def close(self) -> None:
        """End what is under way."""
        for task in self._looking.values():
            task.cancel()
        await asyncio.gather(*self._looking.values(), return_exceptions=True)
        await self._placing.close(cancel=True)
        await self.repairs.close()

    async def _find_providers(self, diff_id: str) -> bool:
        """Refresh the providers; if nobody is left, have the layer pulled again. Whether that took time or gave the layer.

        Waits for ``_LOOK_S`` at most; the pull goes on.
        """
        self._providers[diff_id] = await asyncio.shield(self._look_again(diff_id))
        origin = self.origin(diff_id)
        if self._providers[diff_id].peers or origin is None:
            return False
        # A node that was itself told to have the layer does not pass that on: two nodes that see different
        # peers for a moment would wait for each other.
        local = origin.ref.is_local or self._told(diff_id)
        limit = asyncio.timeout(_LOOK_S)
        try:
            async with limit:
                placed = await self._placing.run((origin.key, local), lambda: self._place_again(origin, local=local))
        except TimeoutError:
            if not limit.expired():
                raise
            return True
        if isinstance(placed, Peer):
            self._providers[diff_id] = Providers([placed], frozenset({placed.node_id}))
        return isinstance(placed, CompleteLayer)

    async def _place_again(self, origin: Origin, *, local: bool) -> CompleteLayer | Peer | None:
        """The holder of a layer that was lost; None if it cannot be pulled from there."""
        try:
            return await self.place(origin, local=local)
        except AfsError as error:
            log.warning("layer %s cannot be pulled again: %s", origin.layer.diff_id, error.line)
            self._origins.failed(origin)
            return None
