"""A chunk from the first node that is asked, without a task of its own.

Nearly all chunks come so. A task, with the timeouts and the waiting for one of several answers in it, took the event loop
0.4 ms of CPU for each, as long as a chunk takes to be received, compared and written.

State (one event loop): ``_task`` is None until something is the matter: the node failed or is slow. Then it is somebody's who
can ask others, and who takes the exchange over as it is. A task may be cancelled before its first step, so it is here, not
there, that the exchange is ended and the slot given back: ``done`` is set when neither is held any more.
"""

import asyncio
import contextlib
from collections.abc import Callable, Coroutine

from afs.layerstore.fetching import Begun
from afs.layerstore.filling import Chunk

# Goes on with what was begun: gives the chunk, or raises.
GoOn = Callable[[Begun], Coroutine[None, None, Chunk]]


class DirectFetch:
    """See :class:`~afs.layerstore.filling.Started`. *slot* is closed at the end, or before.

    *go_on* is called after *patience* seconds, or an error; *came* if that was not needed.
    """

    def __init__(
        self,
        begun: Begun,
        patience: float,
        slot: contextlib.ExitStack,
        go_on: GoOn,
        came: Callable[[], None],
    ) -> None:
        loop = asyncio.get_running_loop()
        self.done: asyncio.Future[Chunk] = loop.create_future()
        self._begun = begun
        self._slot = slot
        self._go_on = go_on
        self._when_it_came = came
        self._given_up = False
        self._task: asyncio.Task[Chunk] | None = None
        self._timer = loop.call_later(patience, self._look_after)
        begun.exchange.done.add_done_callback(self._came)

    def cancel(self) -> None:
        """Give it up; ``done`` is cancelled when nobody works on the chunk any more."""
        self._given_up = True
        if self._task is not None:
            self._task.cancel()
        else:
            self._begun.exchange.cancel()

    def _came(self, came: "asyncio.Future[bytes | None]") -> None:
        self._timer.cancel()
        if self._task is not None:
            return
        failed = came.cancelled() or came.exception() is not None
        if failed and not self._given_up:
            self._look_after()
            return
        if not failed:
            self._when_it_came()
        self._end(came)

    def _look_after(self) -> None:
        self._timer.cancel()
        if self._task is None and not self._given_up:
            self._task = asyncio.create_task(self._go_on(self._begun))
            self._task.add_done_callback(self._ended)

    def _ended(self, task: "asyncio.Task[Chunk]") -> None:
        exchange = self._begun.exchange
        if exchange.done.done():
            self._end(task)
        else:
            exchange.cancel()
            exchange.done.add_done_callback(lambda _: self._end(task))

    def _end(self, ended: "asyncio.Future[bytes | None] | asyncio.Task[Chunk]") -> None:
        self._slot.close()
        if ended.cancelled():
            self.done.cancel()
        elif (error := ended.exception()) is not None:
            self.done.set_exception(error)
        else:
            self.done.set_result(ended.result())
