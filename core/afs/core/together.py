"""Several tasks that share one piece of work, and waiting for what must not be left."""

import asyncio
from collections.abc import Awaitable, Callable, Collection
from typing import Any


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
