"""Chunks that nobody waits for, several from one node in one exchange.

These share what a chunk costs the event loop beside its bytes: futures, timers, a system call or two. Each of them has a slot of its own, and is compared, written and marked as
it arrives: a reader that has come to want it goes on at once. What did not come when the exchange ends, for whatever reason, is
asked for alone (:class:`~afs.layerstore.filling.Fillings`), and that finds out what is the matter.

State (one event loop): a reader that joins starts ``_timer``. If the exchange takes much longer than usual from then on, it is
given up, so that the reader gets an answer from elsewhere.
"""

import asyncio
import contextlib
from collections.abc import Callable

from afs.layerstore.chunkclient import Exchange


class RunFetch:
    """See :class:`~afs.layerstore.filling.StartedRun`. *slots* is closed at the end, and then *ended* is called.

    *patience*: seconds that a reader waits before the exchange is given up.
    """

    def __init__(
        self,
        exchange: Exchange[object],
        patience: float,
        slots: contextlib.ExitStack,
        ended: Callable[[bool], None],
    ) -> None:
        self._exchange = exchange
        self._patience = patience
        self._slots = slots
        self._tell = ended
        self._given_up = False
        self._timer: asyncio.TimerHandle | None = None
        exchange.done.add_done_callback(self._ended)

    def cancel(self) -> None:
        """Give the chunks up for good."""
        self._given_up = True
        self._end()

    def hurry(self) -> None:
        """A reader waits for one of the chunks."""
        if self._timer is None and not self._exchange.done.done():
            self._timer = asyncio.get_running_loop().call_later(self._patience, self._end)

    def _end(self) -> None:
        if not self._exchange.done.done():  # else somebody else may be asking on its connection
            self._exchange.cancel()

    def _ended(self, _: "asyncio.Future[object]") -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._slots.close()
        self._tell(self._given_up)
