"""Telling the node's snapshotter what came ahead of readers, for it to have the kernel read that before anybody asks.

State (one event loop): ``_watching`` are the connections that want to know, of which there is one. ``_untold`` has what nobody
was told yet, ``_MOST`` ranges at most: more is read as everything else is. It is told ``_PAUSE_S`` after the first of it came,
many at a time, or when somebody begins to watch.
"""

import asyncio
from collections.abc import Callable

_MOST = 16_384
_PAUSE_S = 0.01
Ranges = list[tuple[int, int]]  # (offset, bytes) in a layer file
# Tells a snapshotter of a layer.
Tell = Callable[[str, Ranges], None]


class FilledAhead:
    """See the module."""

    def __init__(self) -> None:
        self._watching: list[Tell] = []
        self._untold: dict[str, Ranges] = {}
        self._count = 0

    def came(self, diff_id: str, offset: int, length: int) -> None:
        """A part of a layer is here that no reader has asked for yet."""
        if self._count >= _MOST:
            return
        if not self._count and self._watching:
            asyncio.get_running_loop().call_later(_PAUSE_S, self._tell)
        self._untold.setdefault(diff_id, []).append((offset, length))
        self._count += 1

    def watch(self, tell: Tell) -> None:
        """Somebody wants to know."""
        self._watching.append(tell)
        self._tell()

    def left(self, tell: Tell) -> None:
        """That one is gone."""
        if tell in self._watching:
            self._watching.remove(tell)

    def forget(self, diff_id: str) -> None:
        """The layer is gone."""
        self._count -= len(self._untold.pop(diff_id, []))

    def _tell(self) -> None:
        if not self._watching:
            return
        untold, self._untold, self._count = self._untold, {}, 0
        for diff_id, ranges in untold.items():
            for tell in self._watching:
                tell(diff_id, ranges)
