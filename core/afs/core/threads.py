"""Blocking work of a task: a function that is never left behind, and an iterator that is some items ahead.

State of :func:`ahead`: the iterator belongs to one thread from the first item to the end; what it made waits in a queue that the event loop
alone touches. ``room`` counts the items that may still be made: the thread takes, the task gives back. The thread is no
one of the loop's executor: it waits as long as the task is slow, and that has few.
"""

import asyncio
import contextlib
import threading
from collections.abc import AsyncGenerator, Callable, Generator, Iterator
from typing import Generic, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


async def to_its_end(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """asyncio.to_thread, but if the task is cancelled it waits first: a thread cannot be cancelled.

    So the caller may give back what *function* uses.
    """
    working = asyncio.ensure_future(asyncio.to_thread(function, *args, **kwargs))
    try:
        return await asyncio.shield(working)
    finally:
        await asyncio.wait([working])
        if not working.cancelled():
            working.exception()


class _Worker(Generic[T]):
    def __init__(self, items: Iterator[T], limit: int) -> None:
        self._items = items
        self._loop = asyncio.get_running_loop()
        self.room = threading.Semaphore(limit)
        self.stopped = False
        self.queue: asyncio.Queue[tuple[T] | None] = asyncio.Queue()
        self.ended: asyncio.Future[None] = self._loop.create_future()

    def work(self) -> None:
        error: BaseException | None = None
        try:
            self._make()
        except BaseException as caught:  # raised again in the task
            error = caught
        with contextlib.suppress(RuntimeError):  # the loop was closed without waiting for us
            self._loop.call_soon_threadsafe(self._end, error)

    def _make(self) -> None:
        while True:
            self.room.acquire()
            if self.stopped:
                if isinstance(self._items, Generator):
                    self._items.close()  # its blocks end in the thread that ran them
                return
            try:
                item = next(self._items)
            except StopIteration:
                return
            self._loop.call_soon_threadsafe(self.queue.put_nowait, (item,))

    def _end(self, error: BaseException | None) -> None:
        self.queue.put_nowait(None)
        if self.ended.done():
            return
        if error is None:
            self.ended.set_result(None)
        else:
            self.ended.set_exception(error)


async def ahead(items: Iterator[T], limit: int) -> AsyncGenerator[T, None]:
    """What *items* gives, made in a thread that is at most *limit* items ahead. Its exception is raised behind them.

    Closing this early waits for the item that is being made, and closes *items* if it is a generator.
    """
    worker = _Worker(items, limit)
    threading.Thread(target=worker.work, name="ahead", daemon=True).start()
    try:
        while (item := await worker.queue.get()) is not None:
            yield item[0]
            worker.room.release()
        await worker.ended
    finally:
        worker.stopped = True
        worker.room.release()
        # A thread cannot be cancelled, and what it reads may go away behind us.
        await asyncio.wait([worker.ended])
        if not worker.ended.cancelled():
            worker.ended.exception()
