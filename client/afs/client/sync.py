"""The same client for code without asyncio: an event loop in a thread of its own."""

import asyncio
import threading
from collections.abc import AsyncIterator, Coroutine, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from afs.client.aio import DEFAULT_PROXY, AfsClient
from afs.client.events import Event, RunResult

T = TypeVar("T")


class SyncAfsClient:
    """Blocking twin of :class:`~afs.client.AfsClient`; usable from several threads.

    State: the loop runs in ``_thread`` until :meth:`close`; everything of the async client happens there.
    """

    def __init__(self, address: str = DEFAULT_PROXY) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="afs-client", daemon=True)
        self._thread.start()
        self._client = self._call(self._make(address))

    @staticmethod
    async def _make(address: str) -> AfsClient:
        return AfsClient(address)

    def _call(self, work: Coroutine[Any, Any, T]) -> T:
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()  # Ctrl-C while waiting: the run is cancelled too
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection and end the thread."""
        if self._loop.is_closed():
            return
        self._call(self._client.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def run(
        self,
        image: str,
        command: Sequence[str] = (),
        *,
        diff_to: Path | str | None = None,
        **options: Any,
    ) -> RunResult:
        """See :meth:`AfsClient.run`."""
        return self._call(self._client.run(image, command, diff_to=diff_to, **options))

    def execute(self, image: str, command: Sequence[str] = (), **options: Any) -> Iterator[Event]:
        """See :meth:`AfsClient.execute`; a generator."""
        events: AsyncIterator[Event] = self._client.execute(image, command, **options)
        try:
            while (event := self._call(_next(events))) is not None:
                yield event
        finally:
            self._call(_close(events))


async def _next(events: AsyncIterator[Event]) -> Event | None:
    return await anext(events, None)


async def _close(events: Any) -> None:
    await events.aclose()
