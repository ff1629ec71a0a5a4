"""Looking for damage before a reader meets it: every complete layer is read from disk and verified once after each boot, and
once per interval.

After a boot all is read from the disk again, so layers that are mounted come first, at a higher rate, beside the others. With
fs-verity they need not hurry: the kernel itself checks what they read. A layer is sealed, if it can be, by the check that
comes ``SETTLE_S`` after it came: that reads all of it, and the first run of an image is not to wait for it.

State (one event loop): ``_verified`` maps diff_ids to what is known of their last verification, mirrored in
``scrubbed.json``. A layer that comes while this runs counts as verified, for it was. One that was here before and that the
file does not know is verified now: a file that was lost costs one round. The two loops of :meth:`Scrubber.run` never verify
one layer twice at a time; :class:`~afs.layerstore.repair.Repairs` sees to that.
"""

import asyncio
import json
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass

from afs.core.errors import AfsError
from afs.core.files import write_atomic
from afs.layerstore.afslyr.layout import CHUNK_SIZE
from afs.layerstore.leases import Leases
from afs.layerstore.repair import Pause
from afs.layerstore.sealing import Sealer, is_sealed
from afs.layerstore.store import CompleteLayer, LayerStore

log = logging.getLogger(__name__)
# Seconds between two looks at what is due, at most: the clock may be set, and layers come and are mounted without an event
# for us. The first run after a boot has most of its reads behind it by then.
LOOK_S = 10.0
SETTLE_S = 60.0
RATE = 32.0  # MiB per second, at most; hashing that much is 2 % of a core
MOUNTED_RATE = 128.0  # of what is mounted and was not verified since the boot

# Verifies a layer with pauses between the chunks, seals it, and repairs it if need be; whether it is whole now.
Check = Callable[[CompleteLayer, Pause], Awaitable[bool]]


@dataclass(frozen=True, slots=True)
class _Verified:
    """*at* in seconds since the epoch; *boot* names the boot; *sealed*: the file was sealed before it was verified."""

    at: float
    boot: str
    sealed: bool


_NEVER = _Verified(0.0, "", sealed=False)


class Scrubber:
    """*interval* in seconds: how long a layer goes unverified. *boot* is the kernel's boot id.

    *now* is the time since the epoch, *rate* that of layers which nobody has mounted. *sealer* is what *check* seals with.
    """

    def __init__(
        self,
        store: LayerStore,
        leases: Leases,
        check: Check,
        interval: float,
        *,
        boot: str,
        sealer: Sealer | None = None,
        now: Callable[[], float] = time.time,
        rate: float = RATE,
    ) -> None:
        self._store = store
        self._leases = leases
        self._check = check
        self._interval = interval
        self._boot = boot
        self._sealer = sealer
        self._now = now
        self._rate = rate
        self._path = store.root / "scrubbed.json"
        self._sealed: dict[str, CompleteLayer | None] = {}  # which file the sealed one of a layer was
        loaded = self._load()
        self._verified = {diff_id: self._known(diff_id, loaded) for diff_id in store.complete_ids()}

    def _load(self) -> dict[str, _Verified]:
        try:
            found = json.loads(self._path.read_bytes())
            return {
                str(diff_id): _Verified(float(known["at"]), str(known["boot"]), bool(known["sealed"]))
                for diff_id, known in found.items()
            }
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            log.error("%s is damaged, beginning anew: %s", self._path, error)
            return {}

    def _known(self, diff_id: str, loaded: dict[str, _Verified]) -> _Verified:
        """What an earlier process left, unless somebody put another file in the place of a sealed one."""
        known = loaded.get(diff_id, _NEVER)
        return _NEVER if known.sealed and not self._is_sealed(diff_id) else known

    def _is_sealed(self, diff_id: str) -> bool:
        try:
            return is_sealed(self._store.layer_path(diff_id))
        except FileNotFoundError:
            return False

    def _save(self) -> None:
        known = {diff_id: asdict(verified) for diff_id, verified in self._verified.items()}
        try:
            write_atomic(self._path, json.dumps(known).encode(), durable=False)
        except OSError as error:  # known all the same, until a restart
            log.warning("cannot remember on disk what was scrubbed: %s", error)

    def _look(self) -> None:
        """Take note of layers that came and went."""
        new = _Verified(self._now(), self._boot, sealed=False)
        here = {diff_id: self._verified.get(diff_id, new) for diff_id in self._store.complete_ids()}
        for diff_id in [diff_id for diff_id, known in here.items() if known.sealed]:
            layer = self._store.complete(diff_id)
            if self._sealed.setdefault(diff_id, layer) is not layer:  # a repair replaced it, or it went and came again
                here[diff_id] = new
        if here != self._verified:
            self._verified = here
            self._sealed = {diff_id: layer for diff_id, layer in self._sealed.items() if self._is_guarded(diff_id)}
            self._save()

    def _is_guarded(self, diff_id: str) -> bool:
        return self._verified.get(diff_id, _NEVER).sealed

    def _is_urgent(self, diff_id: str) -> bool:
        """Whether readers may be given what was not verified since the boot."""
        known = self._verified.get(diff_id)
        unguarded = known is not None and known.boot != self._boot and not known.sealed
        return unguarded and self._leases.is_mounted(diff_id)

    def urgent(self) -> CompleteLayer | None:
        """A layer that is mounted and was not verified since the boot."""
        self._look()
        return next(
            (layer for diff_id in self._verified if self._is_urgent(diff_id) and (layer := self._find(diff_id))), None
        )

    def due(self) -> tuple[float, CompleteLayer | None]:
        """(seconds until then, the layer) that is to be verified next."""
        self._look()
        if not self._verified:
            return self._interval, None
        when = {diff_id: self._due_at(diff_id) for diff_id in self._verified}
        diff_id = min(when, key=when.__getitem__)
        delay = min(max(when[diff_id] - self._now(), 0.0), self._interval)
        return delay, self._find(diff_id)

    def _due_at(self, diff_id: str) -> float:
        known = self._verified[diff_id]
        if known.boot != self._boot:
            return min(known.at, self._now())  # the clock may have been set back
        layer = None if known.sealed or self._sealer is None else self._store.complete(diff_id)
        if layer is not None and self._sealer is not None and self._sealer.may_seal(layer):
            return known.at + min(SETTLE_S, self._interval)
        return known.at + self._interval

    def _find(self, diff_id: str) -> CompleteLayer | None:
        layer = self._store.complete(diff_id)
        if layer is None:  # its header is damaged or unreadable: nothing to verify, and no reason to come back at once
            self._verified[diff_id] = _Verified(self._now(), self._boot, sealed=False)
        return layer

    async def scrub(self, layer: CompleteLayer) -> None:
        """Verify one layer now."""
        diff_id = layer.diff_id
        whole = await self._check(layer, lambda: self._pause(diff_id))
        self._verified[diff_id] = _Verified(self._now(), self._boot, self._is_sealed(diff_id))
        self._sealed[diff_id] = self._store.complete(diff_id)
        self._save()
        log.info("scrubbed layer %s: %s", diff_id, "whole" if whole else "damaged")

    def _pause(self, diff_id: str) -> float:
        """Seconds between two chunks."""
        return CHUNK_SIZE / (1 << 20) / (MOUNTED_RATE if self._is_urgent(diff_id) else self._rate)

    async def run(self) -> None:
        """Scrub for ever; cancel it to stop."""
        async with asyncio.TaskGroup() as loops:
            loops.create_task(_for_ever(self._scrub_urgent))
            loops.create_task(_for_ever(self._scrub_due))

    async def _scrub_urgent(self) -> float:
        if (layer := self.urgent()) is None:
            return LOOK_S
        await self.scrub(layer)
        return 0.0

    async def _scrub_due(self) -> float:
        delay, layer = self.due()
        if delay <= 0 and layer is not None:
            await self.scrub(layer)
        return delay


async def _for_ever(step: Callable[[], Awaitable[float]]) -> None:
    """*step* again and again, after as many seconds as it says, ``LOOK_S`` at most."""
    while True:
        try:
            delay = await step()
        except (AfsError, OSError) as error:  # a disk that fails now may be mended when we look again
            log.error("cannot scrub: %s", error)
            delay = LOOK_S
        await asyncio.sleep(min(delay, LOOK_S))
