"""Telling ``afs_fused`` which chunks came ahead of readers, for it to give them to the kernel before that asks.

State (one event loop): ``_told`` has the connection that opened a layer last, which is that of the worker which serves it.
``_untold`` has what nobody was told yet, ``_MOST`` chunks at most: more is read as everything else is. It is told
``_PAUSE_S`` after the first of it came, for ``afs_fused`` wakes up for each message, or when the layer is opened.
"""

import asyncio
from collections.abc import Callable

_MOST = 16_384
_PAUSE_S = 0.01
# Tells one ``afs_fused`` of chunks of a layer.
Tell = Callable[[str, list[int]], None]


class FilledAhead:
    """See the module."""

    def __init__(self) -> None:
        self._told: dict[str, Tell] = {}
        self._untold: dict[str, list[int]] = {}
        self._count = 0

    def came(self, diff_id: str, index: int) -> None:
        """A chunk is here that no reader has asked for yet."""
        if self._count >= _MOST:
            return
        if not self._untold.get(diff_id) and diff_id in self._told:
            asyncio.get_running_loop().call_later(_PAUSE_S, self._tell, diff_id)
        self._untold.setdefault(diff_id, []).append(index)
        self._count += 1

    def opened(self, diff_id: str, tell: Tell) -> None:
        """Somebody reads the layer, and wants to know."""
        self._told[diff_id] = tell
        self._tell(diff_id)

    def _tell(self, diff_id: str) -> None:
        if (tell := self._told.get(diff_id)) is not None and (indices := self._forget_untold(diff_id)):
            tell(diff_id, indices)

    def left(self, tell: Tell) -> None:
        """That one is gone."""
        for diff_id in [diff_id for diff_id, known in self._told.items() if known == tell]:
            del self._told[diff_id]

    def forget(self, diff_id: str) -> None:
        """The layer is gone."""
        self._told.pop(diff_id, None)
        self._forget_untold(diff_id)

    def _forget_untold(self, diff_id: str) -> list[int]:
        indices = self._untold.pop(diff_id, [])
        self._count -= len(indices)
        return indices
