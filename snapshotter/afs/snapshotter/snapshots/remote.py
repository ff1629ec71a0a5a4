"""Answering Prepare with a layer of the cluster, so that containerd neither fetches nor unpacks it.

The layer becomes a committed snapshot that containerd finds by List, under the name that :func:`remote_name` gives it.
Whatever speaks against that, the answer is an ordinary snapshot, and the reason a line in the log: a cluster that cannot
help must not keep a container from starting.

State (one event loop): ``_committing`` is single flight: clients in two namespaces may ask for one layer at once.
``_pausing`` has until when nobody is asked about the layers of an image, because the last question took all the time there is
for one: containerd has begun to fetch them by then, and would wait as long again for each. The image is known by the names that
the labels tell, or without any by the chain id of the layer below. ``_away``: the layerstore did not answer at all; nobody waits for it then until it is back.
"""

import asyncio
import enum
import hashlib
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping

from afs.core.digests import is_digest
from afs.core.errors import AfsError, AlreadyExists, DeadlineExceeded, InvalidArgument, NotFound, Unavailable
from afs.core.singleflight import SingleFlight
from afs.proto.v1 import layerstore_pb2 as pb
from afs.snapshotter.opening import Opener
from afs.snapshotter.snapshots.clusterlayer import ClusterLayer
from afs.snapshotter.snapshots.hints import Hint, read_hint
from afs.snapshotter.snapshots.metadata import Snapshot

log = logging.getLogger(__name__)
_PAUSE_S = 30.0
_MOST_PAUSES = 1000


class OnMissing(enum.Enum):
    """What to do about a layer that no node has, of an image that the labels name."""

    WAIT = "wait"
    BACKGROUND = "background"
    NEVER = "never"


_MISSING = {
    OnMissing.WAIT: pb.SupplyLayerRequest.PULL,
    OnMissing.BACKGROUND: pb.SupplyLayerRequest.BEGIN,
    OnMissing.NEVER: pb.SupplyLayerRequest.FAIL,
}


def parse_on_missing(text: str) -> OnMissing:
    """From the configuration."""
    try:
        return OnMissing(text)
    except ValueError:
        raise InvalidArgument(f"{text!r} is none of {', '.join(choice.value for choice in OnMissing)}") from None


def remote_name(chain_id: str, parent: str) -> str:
    """The name of a layer's snapshot on the one named *parent*.

    The chain id where the parent has such a name too, or none: then all namespaces share it, and it is found again if
    containerd loses its records. On a parent that was unpacked here it is another one, for List finds it by its parent.
    """
    if not parent or is_digest(parent):
        return chain_id
    return f"{chain_id}@{hashlib.sha256(parent.encode()).hexdigest()[:16]}"


Create = Callable[[str, str, ClusterLayer], Awaitable[None]]
"""Makes a committed snapshot, or finds the one that is it: (name, parent, layer); AlreadyExists for another one."""


class RemoteLayers:
    """*timeout* in seconds bounds how long a client waits; *create* makes the snapshot."""

    def __init__(self, opener: Opener, on_missing: OnMissing, timeout: float, create: Create) -> None:
        self._opener = opener
        self._missing = _MISSING[on_missing]
        self._timeout = timeout
        self._create = create
        self._committing: SingleFlight[tuple[str, ...], bool] = SingleFlight()
        self._pausing: dict[tuple[str, ...], float] = {}
        self._away = False
        self.counts: Counter[str] = Counter()  # how often: lazy, fallback

    async def commit(self, labels: Mapping[str, str], parent: Snapshot | None) -> bool:
        """Whether the layer that *labels* ask for, on *parent*, is a committed snapshot now."""
        hint = read_hint(labels, parent)
        if hint is None:
            return False
        above = "" if parent is None else parent.name
        name = remote_name(hint.chain_id, above)
        key = (name, *hint.names)  # what fails with these names need not fail with others
        done = await self._committing.run(key, lambda: self._commit(name, above, hint))
        self.counts["lazy" if done else "fallback"] += 1
        return done

    async def _commit(self, name: str, parent: str, hint: Hint) -> bool:
        now = asyncio.get_running_loop().time
        if self._away and not self._opener.is_connected():
            log.info("layer %s: not asked for, for the layerstore does not answer", hint.chain_id)
            return False
        if (until := self._pausing.get(hint.names or (hint.parent_chain_id,), 0.0)) > now():
            log.info("layer %s: not asked for, for the layer before took too long", hint.chain_id)
            self._pause(hint, now(), until)
            return False
        try:
            found = await self._opener.supply_layer(hint.message(), self._missing, self._timeout)
            self._away = False
        except NotFound as error:
            log.info("layer %s: %s; leaving it to containerd", hint.chain_id, error.line)
            return False
        except AfsError as error:
            log.warning("layer %s: %s; leaving it to containerd", hint.chain_id, error.line)
            if isinstance(error, DeadlineExceeded):
                self._pause(hint, now(), now() + _PAUSE_S)
            elif isinstance(error, Unavailable):
                self._away = True
            return False
        try:
            await self._create(name, parent, ClusterLayer.from_message(found))
        except (AlreadyExists, NotFound) as error:  # NotFound: the parent was removed meanwhile
            log.warning("layer %s: %s; leaving it to containerd", hint.chain_id, error.line)
            return False
        log.info("layer %s: from the cluster", hint.chain_id)
        return True

    def _pause(self, hint: Hint, now: float, until: float) -> None:
        if len(self._pausing) >= _MOST_PAUSES:
            self._pausing = {key: each for key, each in self._pausing.items() if each > now}
        self._pausing[hint.names or (hint.chain_id,)] = until

    async def close(self) -> None:
        """End what is under way."""
        await self._committing.close(cancel=True)
