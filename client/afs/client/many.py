"""Many runs from one client, some at once, in bounded memory.

State: the workers share one iterator of requests and one queue of answers, both touched from the event loop only. A worker
holds its place across the whole run and across the wait for room in the queue, so what is not asked for is not started.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterable, Awaitable, Callable, Iterable
from dataclasses import dataclass

from afs.client.errors import RunError
from afs.client.events import Outcome, RunResult
from afs.client.options import RunRequest
from afs.core.errors import AfsError, InvalidArgument


@dataclass(frozen=True, slots=True)
class Completed:
    """How the request number *index* ended: a result or an error."""

    index: int
    request: RunRequest
    result: RunResult | None
    error: AfsError | None

    @property
    def outcome(self) -> Outcome:
        """Of the result, or of the fault. What could not even be sent counts as REJECTED."""
        if self.result is not None:
            return self.result.outcome
        return self.error.outcome if isinstance(self.error, RunError) else Outcome.REJECTED

    @property
    def ok(self) -> bool:
        """Whether the command ran and exited with 0."""
        return self.result is not None and self.result.ok

    def get(self) -> RunResult:
        """The result; raises the error if there is one."""
        if self.result is not None:
            return self.result
        assert self.error is not None
        raise self.error


Requests = Iterable[RunRequest] | AsyncIterable[RunRequest]


async def run_many(
    run: Callable[[RunRequest], Awaitable[RunResult]], requests: Requests, concurrency: int
) -> AsyncGenerator[Completed, None]:
    """Every request's end, in the order of the ends; at most *concurrency* runs are under way or wait to be yielded."""
    if concurrency < 1:
        raise InvalidArgument(f"concurrency must be positive, not {concurrency}")
    source = _Source(requests)
    queue: asyncio.Queue[Completed | None] = asyncio.Queue(1)
    workers = [asyncio.create_task(_work(run, source, queue)) for _ in range(concurrency)]
    ending = asyncio.create_task(_end(workers, queue))
    try:
        while (completed := await queue.get()) is not None:
            yield completed
        for worker in workers:
            if worker.done():
                worker.result()  # what is no AfsError ends it all
    finally:
        for task in (*workers, ending):
            task.cancel()
        await asyncio.wait([*workers, ending])


class _Source:
    """The requests with their numbers. An async iterator takes one question at a time: ``_asking`` is held across it."""

    def __init__(self, requests: Requests) -> None:
        self._sync = iter(requests) if isinstance(requests, Iterable) else None
        self._async = aiter(requests) if isinstance(requests, AsyncIterable) else None
        self._asking = asyncio.Lock()
        self._count = 0

    async def next(self) -> tuple[int, RunRequest] | None:
        """None at the end."""
        async with self._asking:
            request = next(self._sync, None) if self._sync is not None else None
            if self._async is not None:
                request = await anext(self._async, None)
            self._count += 1
            return None if request is None else (self._count - 1, request)


async def _end(workers: list[asyncio.Task[None]], queue: asyncio.Queue[Completed | None]) -> None:
    """Tell the reader when all have ended, or when the first one has failed."""
    await asyncio.wait(workers, return_when=asyncio.FIRST_EXCEPTION)
    await queue.put(None)


async def _work(
    run: Callable[[RunRequest], Awaitable[RunResult]], source: _Source, queue: asyncio.Queue[Completed | None]
) -> None:
    while (numbered := await source.next()) is not None:
        index, request = numbered
        try:
            completed = Completed(index, request, await run(request), None)
        except AfsError as error:
            completed = Completed(index, request, None, error)
        await queue.put(completed)
