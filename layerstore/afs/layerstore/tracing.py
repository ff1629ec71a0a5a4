"""Start traces at work: found when an image is opened, prefetched, recorded while it starts, kept and shared.

An image that is opened with a layer that is not complete here begins a *start*. Its task looks for a trace, here or at a
peer, and prefetches it; opening never waits for that. From the answer of OpenImage on the demands of readers are
recorded (:mod:`afs.layerstore.tracerecorder`), until RECORD_S have passed or the image's last user left; what was
demanded goes into the trace, which is written and announced if that changed it.

State and locks (one event loop). ``_starts`` has the starts by manifest digest. One is there as long as its image is being
opened, recorded or prefetched; those who open the image meanwhile join it, and have what it prefetches. A start that
ended for want of users is not joined any more. ``_disk`` is held for every use of the files: its waiters are served in
turn, so who looks for a trace after a recording ended finds what that wrote. ``start.trace`` is what is known so far.

Nothing here is an error to a user: a start without a trace is slower, that is all. What peers and the disk get wrong is
logged, for a peer once.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

from afs.core.errors import AfsError, DeadlineExceeded, NotFound, Unavailable
from afs.discovery.client import Announcer, Peer
from afs.layerstore.layers import Layers
from afs.layerstore.manifests import Image
from afs.layerstore.partial import PartialLayer
from afs.layerstore.peers import Peers
from afs.layerstore.room import Room
from afs.layerstore.store import CompleteLayer
from afs.layerstore.tracefiles import TraceFiles
from afs.layerstore.traceprefetch import Prefetch
from afs.layerstore.tracerecorder import Recorder
from afs.layerstore.traces import Chunk, Trace, TraceCounts, parse_trace

log = logging.getLogger(__name__)
RECORD_S = 60.0
_PEERS = 3  # that are asked for a trace
T = TypeVar("T")


@dataclass(slots=True, eq=False)
class _Start:
    """See the module. *recording* ends the recording that is under way."""

    image: str  # manifest digest
    diff_ids: frozenset[str]
    opening: int = 0
    trace: Trace | None = None
    prefetch: Prefetch | None = None
    work: asyncio.Task[None] | None = None
    recording: asyncio.TimerHandle | None = None


class Tracing:
    """Of one node. If not *enabled*, nothing is recorded, prefetched or told. *window* in seconds: see RECORD_S."""

    def __init__(
        self,
        files: TraceFiles,
        layers: Layers,
        room: Room,
        peers: Peers,
        announcer: Announcer,
        *,
        enabled: bool = True,
        window: float = RECORD_S,
    ) -> None:
        self.enabled = enabled
        self.counts = TraceCounts()
        self.recorder = Recorder()
        self._files = files
        self._layers = layers
        self._room = room
        self._peers = peers
        self._announcer = announcer
        self._window = window
        self._starts: dict[str, _Start] = {}
        self._disk = asyncio.Lock()
        self._background: set[asyncio.Task[None]] = set()
        self._blamed: set[str] = set()  # ids of nodes whose answers were logged
        if enabled:
            layers.on_demand = self.recorder.demanded
            layers.when_described(self._described)

    @property
    def kept(self) -> int:
        """How many traces are on disk."""
        return len(self._files)

    def restore(self, images: Mapping[str, Collection[str]]) -> None:
        """Announce what an earlier process left, see :meth:`TraceFiles.restore`. Blocking, at start."""
        if not self.enabled:
            return
        try:
            for image, chunks in self._files.restore(images).items():
                self._announcer.know_trace(image, chunks)
        except OSError as error:
            log.error("cannot read start traces: %s", error)

    async def close(self) -> None:
        """End all starts, and keep what was recorded so far."""
        for start in list(self._starts.values()):
            self._end(start)
        await asyncio.gather(*self._background, return_exceptions=True)

    # Opening

    @contextlib.contextmanager
    def opening(self, image: Image) -> Iterator[None]:
        """Around the opening of *image*; recording begins behind the block if it did not fail."""
        diff_ids = frozenset(layer.diff_id for layer in image.layers)
        if not self.enabled or all(isinstance(self._layers.find(diff_id), CompleteLayer) for diff_id in diff_ids):
            yield
            return
        start = self._starts.get(image.manifest_digest) or self._begin(image.manifest_digest, diff_ids)
        start.opening += 1
        try:
            yield
            self._record(start)
        finally:
            start.opening -= 1
            self._review(start)

    def _begin(self, image: str, diff_ids: frozenset[str]) -> _Start:
        start = self._starts[image] = _Start(image, diff_ids)
        start.work = asyncio.create_task(self._work(start), name=f"start of {image[:19]}")
        start.work.add_done_callback(lambda task: self._worked(start, task))
        self._background.add(start.work)
        return start

    def _described(self, diff_id: str) -> None:
        for start in self._starts.values():
            if start.prefetch is not None and diff_id in start.diff_ids:
                start.prefetch.wake()

    def review(self) -> None:
        """Leases have changed: end the starts of images that have no users any more."""
        for start in list(self._starts.values()):
            self._review(start)

    def _review(self, start: _Start) -> None:
        if start.opening == 0 and not self._needed(start):
            self._end(start)
            return
        if start.prefetch is not None:
            start.prefetch.wake()
        self._forget_ended(start)

    def _needed(self, start: _Start) -> bool:
        return start.opening > 0 or all(self._room.leases.is_needed(diff_id) for diff_id in start.diff_ids)

    def _end(self, start: _Start) -> None:
        self._starts.pop(start.image, None)
        if start.work is not None:
            start.work.cancel()
        self._finish(start)

    def _forget_ended(self, start: _Start) -> None:
        ended = start.opening == 0 and start.work is None and start.recording is None
        if ended and self._starts.get(start.image) is start:
            del self._starts[start.image]

    # Using a trace

    async def _work(self, start: _Start) -> None:
        trace = await self._find(start)
        if trace is None or not trace.chunks:
            return
        if start.trace is None:  # else a recording has just made a better one
            start.trace = trace
        self.counts.used += 1
        start.prefetch = Prefetch(
            trace,
            self._layers,
            self._room,
            self.counts,
            needed=lambda: self._needed(start),
            opening=lambda: start.opening > 0,
        )
        try:
            await start.prefetch.run()
        finally:
            start.prefetch = None

    def _worked(self, start: _Start, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("start trace of image %s: prefetching failed", start.image, exc_info=error)
        start.work = None
        self._background.discard(task)
        self._forget_ended(start)

    async def _find(self, start: _Start) -> Trace | None:
        """The image's trace, from here or from a peer; None if nobody has one."""
        async with self._disk:
            own = await self._load(start)
        return own if own is not None else await self._ask_peers(start)

    async def _ask_peers(self, start: _Start) -> Trace | None:
        located = await self._announcer.locate(traces=[start.image])
        for peer in located.traces.get(start.image, [])[:_PEERS]:
            try:
                trace = parse_trace(await self._peers.read_trace(peer, start.image), start.image, start.diff_ids)
            except NotFound:
                continue  # dropped since discovery was told
            except (Unavailable, DeadlineExceeded) as error:
                self._blame(peer, error)
            except AfsError as error:
                self.counts.refused += 1
                self._blame(peer, error)
            else:
                self.counts.from_peers += 1
                return trace
        return None

    def _blame(self, peer: Peer, error: AfsError) -> None:
        level = logging.DEBUG if peer.node_id in self._blamed else logging.WARNING
        self._blamed.add(peer.node_id)
        log.log(level, "no start trace from layerstore %s: %s", peer.endpoint, error.line)

    # Recording

    def _record(self, start: _Start) -> None:
        if start.recording is not None:
            return
        if not any(isinstance(self._layers.find(diff_id), PartialLayer) for diff_id in start.diff_ids):
            return
        if self.recorder.begin(start.image, start.diff_ids):
            start.recording = asyncio.get_running_loop().call_later(self._window, self._window_ended, start)

    def _window_ended(self, start: _Start) -> None:
        self._finish(start)
        self._forget_ended(start)

    def _finish(self, start: _Start) -> None:
        """End the recording, if there is one, and keep what it found."""
        if start.recording is None:
            return
        start.recording.cancel()
        start.recording = None
        task = asyncio.create_task(self._keep(start, self.recorder.end(start.image)), name="keep start trace")
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def _keep(self, start: _Start, demanded: Collection[Chunk]) -> None:
        """Write and announce the trace with what was demanded, if that is new here."""
        async with self._disk:
            own = await self._load(start)
            base = start.trace or own or Trace(start.image)
            merged = start.trace = self._possible(base.merged(demanded))
            if not merged.chunks or merged == own:
                return
            gone = await self._on_disk(lambda: self._files.save(merged))
        if gone is None:
            return
        if merged != base:
            self.counts.recorded += 1
        for image in gone:
            self._announcer.forget_trace(image)
        self._announcer.know_trace(merged.image, len(merged.chunks))
        await self._announcer.flush()

    def _possible(self, trace: Trace) -> Trace:
        """*trace* without the chunks that its layers do not have, as far as those are here."""
        layers = {diff_id: self._layers.find(diff_id) for diff_id in {chunk.diff_id for chunk in trace.chunks}}
        counts = {diff_id: layer.table.count for diff_id, layer in layers.items() if layer is not None}
        kept = tuple(c for c in trace.chunks if c.diff_id not in counts or c.number < counts[c.diff_id])
        if strange := len(trace.chunks) - len(kept):
            self.counts.refused += 1
            log.warning("start trace of image %s: its layers lack %d of the chunks", trace.image, strange)
        return Trace(trace.image, kept)

    # Keeping

    async def read(self, image: str) -> bytes:
        """The encoded trace of the image with that manifest digest, for a peer; NotFound if there is none."""
        data = b""
        if image in self._files:
            async with self._disk:
                data = await self._on_disk(lambda: self._files.read(image)) or b""
        if not data:
            raise NotFound(f"no start trace of image {image} here")
        return data

    def forget(self, image: str) -> None:
        """No image with that manifest digest is known here any more: its trace goes, too."""
        if image not in self._files:
            return
        self._announcer.forget_trace(image)
        task = asyncio.create_task(self._drop(image), name="drop start trace")
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def _drop(self, image: str) -> None:
        async with self._disk:
            await self._on_disk(lambda: self._files.drop(image))

    async def _load(self, start: _Start) -> Trace | None:
        """The image's trace on disk. The caller holds ``_disk``."""
        found = await self._on_disk(lambda: self._files.load(start.image, start.diff_ids))
        if start.image not in self._files:  # it was damaged
            self._announcer.forget_trace(start.image)
        return found

    async def _on_disk(self, work: Callable[[], T]) -> T | None:
        """*work* in a thread; None, and it is logged, if the disk fails. The caller holds ``_disk``."""
        working = asyncio.ensure_future(asyncio.to_thread(work))
        try:
            return await asyncio.shield(working)
        except asyncio.CancelledError:
            await asyncio.wait([working])  # a thread cannot be cancelled, and the next one must not meet it
            raise
        except OSError as error:
            log.error("start traces: %s", error)
            return None
