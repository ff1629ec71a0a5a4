"""Where layers may be pulled from.

State (one event loop): hints; a wrong one costs one failed pull. An image can claim any diff_id, so what is new goes last,
behind what may be better; one that proved right goes first, and one that failed last.
"""

from dataclasses import dataclass

from afs.core.images import ImageRef, Platform
from afs.layerstore.manifests import Layer
from afs.layerstore.pull import OriginKey, origin_key

_MOST = 16  # of one layer: any image can claim it


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a layer came from: enough to have it pulled again."""

    ref: ImageRef
    platform: Platform
    layer: Layer

    @property
    def key(self) -> OriginKey:
        """See :func:`afs.layerstore.pull.origin_key`."""
        return origin_key(self.ref, self.layer)


class Origins:
    """Of all layers, the best first."""

    def __init__(self) -> None:
        self._known: dict[str, dict[OriginKey, Origin]] = {}

    def of(self, diff_id: str) -> list[Origin]:
        """All of a layer."""
        return list(self._known.get(diff_id, {}).values())

    def know(self, origin: Origin) -> None:
        """The layer may be pulled from there."""
        known = self._known.setdefault(origin.layer.diff_id, {})
        if len(known) >= _MOST and origin.key not in known:
            del known[next(reversed(known))]  # the one that failed, or was told, last
        known[origin.key] = origin

    def proved(self, origin: Origin) -> None:
        """The layer came from there."""
        known = self._known.get(origin.layer.diff_id, {})
        self._known[origin.layer.diff_id] = {origin.key: origin, **known}

    def failed(self, origin: Origin) -> None:
        """The layer did not come from there."""
        known = self._known.get(origin.layer.diff_id, {})
        if origin.key in known:
            known[origin.key] = known.pop(origin.key)

    def forget(self, diff_id: str) -> None:
        """The layer is gone."""
        self._known.pop(diff_id, None)
