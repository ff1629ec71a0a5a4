"""Several tasks that share one piece of work."""

import asyncio
from collections.abc import Awaitable, Callable


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
