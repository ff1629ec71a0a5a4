"""The same client for code without asyncio: an event loop in a thread of its own."""

import asyncio
import concurrent.futures
import contextlib
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

from afs.client.aio import DEFAULT_PROXY, AfsClient
from afs.client.cluster import Contents, RunInfo
from afs.client.errors import RunError, run_error
from afs.client.events import Accepted, Event, Finished, Outcome, RunResult
from afs.client.many import Completed
from afs.client.options import RunOptions, RunRequest
from afs.client.retrying import DEFAULT_BACKOFF_S
from afs.client.run import Run
from afs.core.errors import Cancelled, FailedPrecondition
from afs.proto.v1 import proxy_pb2

T = TypeVar("T")


class _Loop:
    """An event loop in a thread; everything of the async client happens there.

    State: ``_closing`` is read and set under ``_lock``, and work is handed over under it, too: so nothing comes after what
    :meth:`close` ends. The lock is not held while anybody waits.
    """

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._lock = threading.Lock()
        self._closing = False
        self._thread = threading.Thread(target=self._loop.run_forever, name="afs-client", daemon=True)
        self._thread.start()

    def call(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of *work*; Ctrl-C while waiting cancels it.

        FailedPrecondition after :meth:`close`, Cancelled if that comes meanwhile.
        """
        with self._lock:
            if self._closing:
                work.close()
                raise FailedPrecondition("the client is closed")
            future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except concurrent.futures.CancelledError:
            raise Cancelled("the call was cancelled: the client was closed") from None
        except BaseException:
            future.cancel()
            raise

    def call_run(self, work: Coroutine[Any, Any, T]) -> T:
        """:meth:`call` for *work* that is part of a run: RunCancelled if the client is closed meanwhile."""
        try:
            return self.call(work)
        except RunError:
            raise
        except Cancelled:
            error = Cancelled("the run was cancelled: the client was closed")
            raise run_error(error, Finished(0, Outcome.CANCELLED, error.line)) from None

    def finish(self, work: Coroutine[Any, Any, None]) -> None:
        """:meth:`call` for *work* that ends something: closing the client has ended it already."""
        with contextlib.suppress(FailedPrecondition, Cancelled):
            self.call(work)

    def iterate(self, source: AsyncGenerator[T, None]) -> Iterator[T]:
        """What *source* yields; it is closed with this iterator."""
        asking = asyncio.Lock()  # after Ctrl-C the question that was cancelled still runs, and so cannot be closed yet
        try:
            while (item := self.call_run(_next(source, asking))) is not _END:
                yield item
        finally:
            self.finish(_close(source, asking))

    def close(self, last: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Cancel what is left, do *last* and end the thread."""
        with self._lock:
            first, self._closing = not self._closing, True
        if first:
            try:
                asyncio.run_coroutine_threadsafe(_end(last), self._loop).result()
            finally:
                self._loop.call_soon_threadsafe(self._loop.stop)
                self._thread.join()
                self._loop.close()
        else:
            self._thread.join()


_END: Any = object()


async def anext_or(source: AsyncIterator[T], default: T) -> T:
    """``anext`` as a coroutine."""
    return await anext(source, default)


async def _next(source: AsyncIterator[T], asking: asyncio.Lock) -> T:
    async with asking:
        return await anext(source, _END)


async def _close(source: AsyncGenerator[Any, None], asking: asyncio.Lock) -> None:
    async with asking:
        await source.aclose()


async def _end(last: Callable[[], Coroutine[Any, Any, None]]) -> None:
    try:
        await _settle()
    finally:
        await last()
        await _settle()


async def _settle() -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    if others:
        await asyncio.wait(others)
    await asyncio.get_running_loop().shutdown_asyncgens()


class SyncRun:
    """Blocking twin of :class:`Run`; use it with ``with``. One thread may read while another one writes."""

    def __init__(self, loop: _Loop, run: Run) -> None:
        self._loop = loop
        self._run = run

    def __enter__(self) -> Self:
        self._loop.call_run(self._run.__aenter__())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._loop.finish(self._run.__aexit__(kind, error, traceback))

    def __iter__(self) -> Iterator[Event]:
        while (event := self._loop.call_run(anext_or(self._run, _END))) is not _END:
            yield event

    @property
    def accepted(self) -> Accepted | None:
        """See :class:`Run`."""
        return self._run.accepted

    @property
    def finished(self) -> Finished | None:
        """See :class:`Run`."""
        return self._run.finished

    @property
    def run_id(self) -> str:
        """See :class:`Run`."""
        return self._run.run_id

    def write(self, data: bytes) -> None:
        """See :meth:`Run.write`."""
        self._loop.call_run(self._run.write(data))

    def close_stdin(self) -> None:
        """See :meth:`Run.close_stdin`."""
        self._loop.call_run(self._run.close_stdin())

    def resize(self, rows: int, columns: int) -> None:
        """See :meth:`Run.resize`."""
        self._loop.call_run(self._run.resize(rows, columns))

    def cancel(self, reason: str = "") -> None:
        """See :meth:`Run.cancel`."""
        self._loop.call_run(self._run.cancel(reason))

    def result(self, diff_to: Path | str | None = None) -> RunResult:
        """See :meth:`Run.result`."""
        return self._loop.call_run(self._run.result(diff_to))


class SyncAfsClient:
    """Blocking twin of :class:`~afs.client.AfsClient`; usable from several threads at once."""

    def __init__(self, address: str = DEFAULT_PROXY) -> None:
        self._client = AfsClient(address)
        self._loop = _Loop()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections and end the thread; runs under way are cancelled."""
        self._loop.close(self._client.close)

    def open(self, image: str | RunRequest, command: Sequence[str] = (), **options: Unpack[RunOptions]) -> SyncRun:
        """See :meth:`AfsClient.open`: ``with client.open(...) as run``."""
        return SyncRun(self._loop, self._client.open(image, command, **options))

    def execute(
        self, image: str | RunRequest, command: Sequence[str] = (), **options: Unpack[RunOptions]
    ) -> Iterator[Event]:
        """See :meth:`AfsClient.execute`; a generator."""
        return self._loop.iterate(self._client.execute(image, command, **options))

    def run(
        self,
        image: str | RunRequest,
        command: Sequence[str] = (),
        *,
        diff_to: Path | str | None = None,
        retries: int | None = None,
        retry_backoff: float = DEFAULT_BACKOFF_S,
        **options: Unpack[RunOptions],
    ) -> RunResult:
        """See :meth:`AfsClient.run`."""
        return self._loop.call_run(
            self._client.run(image, command, diff_to=diff_to, retries=retries, retry_backoff=retry_backoff, **options)
        )

    def map(
        self,
        requests: Iterable[RunRequest],
        *,
        concurrency: int = 32,
        retries: int | None = None,
        retry_backoff: float = DEFAULT_BACKOFF_S,
    ) -> Iterator[Completed]:
        """See :meth:`AfsClient.map`; a generator. *requests* is read in the client's own thread."""
        return self._loop.iterate(
            self._client.map(requests, concurrency=concurrency, retries=retries, retry_backoff=retry_backoff)
        )

    def runs(self) -> list[RunInfo]:
        """See :meth:`AfsClient.runs`."""
        return self._loop.call(self._client.runs())

    def cancel(self, run_id: str, reason: str = "") -> None:
        """See :meth:`AfsClient.cancel`."""
        self._loop.call(self._client.cancel(run_id, reason))

    def status(self) -> list[proxy_pb2.StatusResponse]:
        """See :meth:`AfsClient.status`."""
        return self._loop.call(self._client.status())

    def contents(self) -> Contents:
        """See :meth:`AfsClient.contents`."""
        return self._loop.call(self._client.contents())

    def reconcile(self, image: str, replicas: int, *, tag: str = "") -> proxy_pb2.ReconcileImageReplicaResponse:
        """See :meth:`AfsClient.reconcile`."""
        return self._loop.call(self._client.reconcile(image, replicas, tag=tag))
