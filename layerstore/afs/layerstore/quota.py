"""How much of the cache is used and promised, and which layer goes first. Plain numbers: no I/O, time is given.

State: ``_layers`` is in the order of last use, the least recent first. Two sums count against ``capacity``: what the layers
here take on disk, and what is reserved for layers under way. A reservation has two sizes, for nobody knows what a
compressed blob becomes: *least* is certain and can be refused, *likely* is a guess that only decides how much is evicted.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass


@dataclass(slots=True, eq=False)
class Reservation:
    """Room for one layer under way. Sizes in bytes; both are 0 once the layer counts as used."""

    diff_id: str
    least: int
    likely: int


@dataclass(slots=True)
class _Layer:
    used: int
    last_use: float  # seconds since the epoch, so that it means something after a restart


class Quota:
    """*capacity* in bytes."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._layers: dict[str, _Layer] = {}
        self._reservations: set[Reservation] = set()
        self._used = 0

    @property
    def used(self) -> int:
        """Bytes on disk of all layers here."""
        return self._used

    @property
    def least(self) -> int:
        """Bytes reserved for certain."""
        return sum(reservation.least for reservation in self._reservations)

    @property
    def likely(self) -> int:
        """Bytes reserved, guesses included."""
        return sum(reservation.likely for reservation in self._reservations)

    def put(self, diff_id: str, used: int, last_use: float) -> None:
        """A layer is here and takes *used* bytes. *last_use* counts if it was not known; order old ones by it."""
        known = self._layers.get(diff_id)
        if known is None:
            self._layers[diff_id] = _Layer(used, last_use)
            self._used += used
        else:
            self._used += used - known.used
            known.used = used

    def remove(self, diff_id: str) -> None:
        """The layer is gone."""
        known = self._layers.pop(diff_id, None)
        if known is not None:
            self._used -= known.used

    def touch(self, diff_id: str, now: float) -> None:
        """The layer is used: it goes last from now on."""
        known = self._layers.pop(diff_id, None)
        if known is not None:
            known.last_use = now
            self._layers[diff_id] = known

    def reserve(self, diff_id: str, least: int, likely: int) -> Reservation:
        """Promise room, whether it is there or not: :class:`~afs.layerstore.room.Room` makes it."""
        reservation = Reservation(diff_id, least, max(least, likely))
        self._reservations.add(reservation)
        return reservation

    def release(self, reservation: Reservation) -> None:
        """Take the promise back."""
        self._reservations.discard(reservation)

    def reservations(self) -> Iterable[Reservation]:
        """All promises."""
        return tuple(self._reservations)

    def __contains__(self, diff_id: str) -> bool:
        """Whether the layer counts."""
        return diff_id in self._layers

    def used_by(self, diff_id: str) -> int:
        """Bytes on disk of one layer; 0 if it is not here."""
        known = self._layers.get(diff_id)
        return known.used if known is not None else 0

    def last_use(self, diff_id: str) -> float:
        """When the layer was used last, in seconds since the epoch; 0 if it is not here."""
        known = self._layers.get(diff_id)
        return known.last_use if known is not None else 0.0

    def layers(self) -> list[str]:
        """All layers here, least recently used first."""
        return list(self._layers)

    def oldest(self, wanted: int, may_go: Callable[[str], bool]) -> list[str]:
        """The least recently used layers that *may_go*, until they make *wanted* bytes; all of them if that is too few."""
        chosen, found = [], 0
        for diff_id, layer in self._layers.items():
            if found >= wanted:
                break
            if may_go(diff_id):
                chosen.append(diff_id)
                found += layer.used
        return chosen
