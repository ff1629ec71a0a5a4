"""Several tasks that share one piece of work, and waiting for what must not be left."""

import asyncio
from collections.abc import Awaitable, Callable, Collection, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


async def together(work: Callable[[], Awaitable[None]], count: int) -> None:
    """Run *work* in *count* tasks and wait for all; raises what the first one raises, when the others have ended."""

    async def run() -> None:
        await work()

    tasks = [asyncio.create_task(run()) for _ in range(count)]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


async def ended(futures: Collection["asyncio.Future[Any]"]) -> None:
    """Wait until all *futures* are done, however often the waiter is cancelled meanwhile; raises CancelledError then.

    For what somebody works on in a thread, which cannot be cancelled.
    """
    cancelled: asyncio.CancelledError | None = None
    while left := [future for future in futures if not future.done()]:
        try:
            await asyncio.wait(left)
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        raise cancelled


class Unstopped:
    """Work that goes on to its end if whoever waits for it is cancelled. Its errors are the waiter's, if there is one."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()

    async def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Await *work*."""
        return await asyncio.shield(self.begin(work))

    def begin(self, work: Coroutine[Any, Any, T]) -> "asyncio.Task[T]":
        """Begin *work*, for which nobody need wait."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: "asyncio.Task[Any]") -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # retrieved: nobody may wait for it any more

    async def close(self) -> None:
        """Wait for all of it, and for what that begins."""
        while self._tasks:
            await asyncio.gather(*self._tasks, return_exceptions=True)
