"""Looking for damage before a reader meets it: every complete layer is read from disk and verified once per interval.

State: ``_verified`` maps diff_ids to the time of their last verification, in seconds since the epoch, mirrored in
``scrubbed.json``. A layer that the file does not know counts as verified when it is first seen: it was, when it came. So
a file that was lost costs one interval.
"""

import asyncio
import json
import logging
import time
from collections.abc import Awaitable, Callable

from afs.core.errors import AfsError
from afs.core.files import write_atomic
from afs.layerstore.store import CompleteLayer, LayerStore

log = logging.getLogger(__name__)
LOOK_S = 3600.0  # between two looks at what is due, at most: the clock may be set, and a layer come from elsewhere
RATE = 32.0  # MiB per second, at most; hashing that much is 2 % of a core

# Verifies a layer with that many seconds between two chunks, and repairs it if need be; whether it is whole now.
Check = Callable[[CompleteLayer, float], Awaitable[bool]]


class Scrubber:
    """*interval* in seconds: how long a layer goes unverified. *now* is the time since the epoch."""

    def __init__(
        self, store: LayerStore, check: Check, interval: float, now: Callable[[], float] = time.time, rate: float = RATE
    ) -> None:
        self._store = store
        self._check = check
        self._interval = interval
        self._now = now
        self._pause = 1 / rate
        self._path = store.root / "scrubbed.json"
        self._verified: dict[str, float] = self._load()

    def _load(self) -> dict[str, float]:
        try:
            found = json.loads(self._path.read_bytes())
            return {str(diff_id): float(when) for diff_id, when in found.items()}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, TypeError, AttributeError) as error:
            log.error("%s is damaged, beginning anew: %s", self._path, error)
            return {}

    def _save(self) -> None:
        try:
            write_atomic(self._path, json.dumps(self._verified).encode(), durable=False)
        except OSError as error:  # known all the same, until a restart
            log.warning("cannot remember on disk what was scrubbed: %s", error)

    def due(self) -> tuple[float, CompleteLayer | None]:
        """(seconds until then, the layer) that was verified longest ago."""
        here = self._store.complete_ids()
        known = {diff_id: self._verified.get(diff_id, self._now()) for diff_id in here}
        if known.keys() != self._verified.keys():
            self._verified = known
            self._save()
        if not known:
            return self._interval, None
        diff_id = min(known, key=known.__getitem__)
        delay = min(max(known[diff_id] + self._interval - self._now(), 0.0), self._interval)
        layer = self._store.complete(diff_id)
        if layer is None:  # its header is damaged or unreadable: nothing to verify, and no reason to come back at once
            self._verified[diff_id] = self._now()
        return delay, layer

    async def scrub(self, layer: CompleteLayer) -> None:
        """Verify one layer now."""
        whole = await self._check(layer, self._pause)
        self._verified[layer.diff_id] = self._now()
        self._save()
        log.info("scrubbed layer %s: %s", layer.diff_id, "whole" if whole else "damaged")

    async def run(self) -> None:
        """Scrub for ever; cancel it to stop."""
        while True:
            try:
                delay, layer = self.due()
                if delay <= 0 and layer is not None:
                    await self.scrub(layer)
            except (AfsError, OSError) as error:  # a disk that fails now may be mended when we look again
                log.error("cannot scrub: %s", error)
                delay = LOOK_S
            if delay > 0:
                await asyncio.sleep(min(delay, LOOK_S))
