"""One running task per key; whoever asks for the same key meanwhile gets the same result.

State: ``_tasks`` holds running tasks only. Callers await them shielded: a caller that is cancelled leaves the work to the
others, and :meth:`SingleFlight.close` ends what nobody waits for.
"""

import asyncio
import functools
from collections.abc import Awaitable, Callable, Iterator
from typing import Generic, TypeVar

K = TypeVar("K")
V = TypeVar("V")


class SingleFlight(Generic[K, V]):
    """See the module."""

    def __init__(self) -> None:
        self._tasks: dict[K, asyncio.Task[V]] = {}

    def __contains__(self, key: K) -> bool:
        """Whether work for *key* is under way."""
        return key in self._tasks

    def __iter__(self) -> Iterator[K]:
        """The keys for which work is under way."""
        return iter(self._tasks)

    async def run(self, key: K, work: Callable[[], Awaitable[V]]) -> V:
        """The result of ``work()``, or of the run of it that is already under way for *key*."""
        task = self._tasks.get(key)
        if task is None:
            task = asyncio.create_task(self._run(work), name=f"single flight {key}")
            self._tasks[key] = task
            task.add_done_callback(functools.partial(self._ended, key))
        return await asyncio.shield(task)

    def _ended(self, key: K, task: "asyncio.Task[V]") -> None:
        del self._tasks[key]
        if not task.cancelled():
            task.exception()  # retrieved: its callers may all have gone

    async def _run(self, work: Callable[[], Awaitable[V]]) -> V:
        return await work()

    async def close(self, *, cancel: bool) -> None:
        """Wait for all tasks, cancelling them first if *cancel*."""
        tasks = list(self._tasks.values())
        if cancel:
            for task in tasks:
                task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
