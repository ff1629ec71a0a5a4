"""The asyncio client."""

import asyncio
import random
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Self, Unpack

from afs.client.channels import Connections
from afs.client.cluster import Contents, Rounds, RunInfo
from afs.client.events import Event, RunResult
from afs.client.many import Completed, Requests, run_many
from afs.client.options import RunOptions, RunRequest, make_request
from afs.client.retrying import DEFAULT_BACKOFF_S, allowed_retries, is_worth_repeating, pauses
from afs.client.run import Run
from afs.core.errors import AfsError, InvalidArgument
from afs.core.rpc import calling
from afs.proto.v1 import proxy_pb2, runs_pb2

DEFAULT_PROXY = "127.0.0.1:62051"


class AfsClient:
    """A client of ``afs_proxy`` (or of one ``afslet``); usable by many tasks of one event loop at once.

    State: the connections, see :mod:`afs.client.channels`. *rng* gives chances between 0 and 1 for pauses.
    """

    def __init__(self, address: str = DEFAULT_PROXY, *, rng: Callable[[], float] = random.random) -> None:
        self._peer = f"AFS at {address}"
        self._connections = Connections(address)
        self._rng = rng

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections; runs on them are cancelled."""
        await self._connections.close()

    # Runs

    def open(self, image: str | RunRequest, command: Sequence[str] = (), **options: Unpack[RunOptions]) -> Run:
        """A run to talk with while it is under way: ``async with client.open(...) as run``; see :class:`Run`."""
        return Run(self._connections, self._peer, make_request(image, command, **options))

    async def execute(
        self, image: str | RunRequest, command: Sequence[str] = (), **options: Unpack[RunOptions]
    ) -> AsyncGenerator[Event, None]:
        """Run *command* (the image's own if empty) and yield what happens, ending with :class:`Done`.

        :class:`RunRequest` says what the options mean. Closing the iterator early cancels the run. Raises
        :class:`RunError` if the cluster could not run it; it is never tried again, since events have been given out.
        """
        async with self.open(image, command, **options) as run:
            async for event in run:
                yield event

    async def run(
        self,
        image: str | RunRequest,
        command: Sequence[str] = (),
        *,
        diff_to: Path | str | None = None,
        retries: int | None = None,
        retry_backoff: float = DEFAULT_BACKOFF_S,
        **options: Unpack[RunOptions],
    ) -> RunResult:
        """:meth:`execute` to its end, as one result. The diff goes to the file *diff_to* if given, else into the result.

        A run that ends with a retryable fault is tried again, *retries* times (2 if not given), at first about
        *retry_backoff* seconds apart; a run that ended with a result never is. Raises :class:`RunError` of the last try.
        """
        request = make_request(image, command, **options)
        if diff_to is not None:
            request = replace(request, diff_to=diff_to)
        return await self._run(request, retries, retry_backoff)

    async def _run(self, request: RunRequest, retries: int | None, backoff: float) -> RunResult:
        if request.diff_to is not None and request.diff_format == "none":
            raise InvalidArgument(f"no diff is asked for, so there is nothing for {request.diff_to}")
        if request.stdin:
            raise InvalidArgument("a run with standard input needs open(): run() has nothing to write to it")
        left = allowed_retries(request, retries)
        tries = 1
        for pause in pauses(backoff, self._rng):
            run = Run(self._connections, self._peer, request, progress=False)
            try:
                async with run:
                    result = await run.result(request.diff_to)
            except AfsError as error:
                if not left or not is_worth_repeating(error, run):
                    raise
            else:
                return result if tries == 1 else replace(result, attempts=tries)
            await asyncio.sleep(pause)
            left, tries = left - 1, tries + 1
        raise AssertionError("pauses never end")

    async def map(
        self,
        requests: Requests,
        *,
        concurrency: int = 32,
        retries: int | None = None,
        retry_backoff: float = DEFAULT_BACKOFF_S,
    ) -> AsyncGenerator[Completed, None]:
        """Run all *requests*, *concurrency* at once, and yield each as it ends; see :class:`Completed`.

        Requests are taken from the iterator when there is a place for them, so it may be endless; results wait for the
        consumer, so memory is bounded by *concurrency*. Faults are in what is yielded and end nothing but their run.
        Closing the iterator early cancels what is under way.
        """
        async with aclosing(
            run_many(lambda request: self._run(request, retries, retry_backoff), requests, concurrency)
        ) as ends:
            async for completed in ends:
                yield completed

    # The cluster

    async def runs(self) -> list[RunInfo]:
        """What is queued or under way: at a proxy all that it dispatched, at an afslet all that it has."""
        with calling(self._peer):
            answer = await self._connections.first().lists.List(runs_pb2.ListRunsRequest(), timeout=10.0)
            return [RunInfo.of(run) for run in answer.runs]

    async def cancel(self, run_id: str, reason: str = "") -> None:
        """End a run, whoever started it; who waits for it gets :class:`RunCancelled`. NotFound if it is not under way."""
        with calling(self._peer):
            request = runs_pb2.CancelRunRequest(run_id=run_id, reason=reason)
            await self._connections.first().lists.Cancel(request, timeout=10.0)

    async def status(self) -> list[proxy_pb2.StatusResponse]:
        """The cluster's layerstores and afslets."""
        with calling(self._peer):
            request = proxy_pb2.StatusRequest(include_layerstores=True, include_afslets=True)
            return [response async for response in self._connections.first().proxy.Status(request, timeout=10.0)]

    async def watch_status(self, interval: float = 1.0) -> AsyncIterator[list[proxy_pb2.StatusResponse]]:
        """:meth:`status` now, and again every *interval* seconds."""
        request = proxy_pb2.StatusRequest(
            include_layerstores=True, include_afslets=True, follow_ms=max(1, int(interval * 1000))
        )
        while True:
            rounds = Rounds()
            with calling(self._peer):
                call = self._connections.first().proxy.Status(request)
                try:
                    async for response in call:
                        if (complete := rounds.add(response)) is not None:
                            yield complete
                finally:
                    call.cancel()
            await asyncio.sleep(interval)  # a proxy that knows no follow_ms says it once

    async def contents(self) -> Contents:
        """The images and layers that the cluster's nodes have."""
        return Contents.of(await self.status())

    async def reconcile(self, image: str, replicas: int, *, tag: str = "") -> proxy_pb2.ReconcileImageReplicaResponse:
        """Have *replicas* nodes hold every layer of *image* completely."""
        with calling(self._peer):
            request = proxy_pb2.ReconcileImageReplicaRequest(image=image, tag=tag, replica=replicas)
            return await self._connections.first().proxy.ReconcileImageReplica(request)
