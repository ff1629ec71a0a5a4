"""From a start request to a node that accepted it: waiting for room, offering, and offering again.

A *round* is a wait for room, or offers to all nodes that had some. ``proxy_dispatch_max_retries`` limits the rounds, and
``proxy_dispatch_backoff_ms`` says how long the first wait is; each further one is twice as long. Without the former a run
waits in the queue until its time is over.
"""

import contextlib
import time
from collections.abc import AsyncGenerator
from typing import Any

import grpc.aio

from afs.core.errors import AfsError, ResourceExhausted
from afs.proto.v1 import afslet_pb2 as pb
from afs.proxy.dispatch import Dispatcher
from afs.proxy.node import AfsletNode
from afs.proxy.offer import ACCEPTED, NodeFailed, QueueTimeout, answer, blame, offer, open_call
from afs.proxy.run import Run, queued

_DEFAULT_BACKOFF_S = 0.1
_MAX_BACKOFF_S = 2.0
_BROKEN_ROUNDS = 3  # in a row, in which every node failed for other reasons than room
Context = grpc.aio.ServicerContext[Any, Any]


class Placer:
    """See the module."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        self._dispatcher = dispatcher

    async def place(self, run: Run, context: Context) -> AsyncGenerator[bytes, None]:
        """Get ``run.node``, ``run.call`` and ``run.accepted``; yields what the client is told meanwhile.

        Raises QueueTimeout, ResourceExhausted and what :meth:`Nodes.check` raises, and NodeFailed for a node's own refusal.
        """
        start, waiter, dispatcher = run.start, run.waiter, self._dispatcher
        assert start is not None
        most, tries, broken = start.proxy_dispatch_max_retries, 0, 0
        pause = start.proxy_dispatch_backoff_ms / 1000 or _DEFAULT_BACKOFF_S
        dispatcher.enter(waiter)
        patient = (
            waiter.waiting
        )  # who has waited in the queue waits for nodes that come back, who has not is told at once
        while True:
            problem: AfsError = dispatcher.nodes.no_room(waiter.wanted)
            if waiter.placement is None:
                async with contextlib.aclosing(self._wait(run, pause if most else None)) as told:
                    async for message in told:
                        yield message
            placed = waiter.placement is not None
            if placed:
                async with contextlib.aclosing(self._offers(run, context)) as told:
                    async for message in told:
                        yield message
                if run.failed is None:
                    return
                problem = run.failed.error
                broken = 0 if isinstance(problem, ResourceExhausted) else broken + 1
                if broken >= _BROKEN_ROUNDS:
                    raise run.failed
            tries += 1
            if most and tries > most:
                raise type(problem)(f"{problem.line} (tried {tries} times)")
            if placed:
                dispatcher.put_aside(waiter)
                # A node without room gets no other offer before its next report, so the run keeps its place in the queue.
                if most or not isinstance(problem, ResourceExhausted):
                    await self._rest(run, pause)
                dispatcher.resume(waiter, patient=patient)
            pause = min(pause * 2, max(_MAX_BACKOFF_S, start.proxy_dispatch_backoff_ms / 1000))

    async def _wait(self, run: Run, seconds: float | None) -> AsyncGenerator[bytes, None]:
        """Until the run is placed, or *seconds* are over."""
        waiter, told = run.waiter, -1
        end = time.monotonic() + seconds if seconds is not None else run.ends
        while waiter.placement is None:
            left = self._left(run, end)
            if left is not None and left <= 0:
                return
            if waiter.wants_progress and waiter.position != told:
                told = waiter.position
                yield queued(told, self._dispatcher.queued)
            else:
                await waiter.wait(left)

    async def _rest(self, run: Run, seconds: float) -> None:
        """Wait *seconds* outside of the queue."""
        end = time.monotonic() + seconds
        while (left := self._left(run, end)) is not None and left > 0:
            await run.waiter.wait(left)

    @staticmethod
    def _left(run: Run, end: float) -> float | None:
        """Seconds until *end*, None if there is none; raises what ends the wait."""
        if run.waiter.error is not None:
            raise run.waiter.error
        now = time.monotonic()
        if now >= run.ends:
            raise QueueTimeout(f"no node had {run.waiter.wanted} free {run.limit}")
        first = min(end, run.ends)
        return first - now if first != float("inf") else None

    async def _offers(self, run: Run, context: Context) -> AsyncGenerator[bytes, None]:
        """Offer the run to the node where it was placed, and to others with room; ``run.failed`` if none took it."""
        tried: set[AfsletNode] = set()
        while True:
            placement = run.waiter.placement
            assert placement is not None
            try:
                async with contextlib.aclosing(self._offer(run, placement.node, context)) as told:
                    async for message in told:
                        yield message
            except NodeFailed as failed:
                run.call, run.failed = None, failed
                blame(self._dispatcher.nodes, placement.node, failed)
                if not failed.retryable:
                    raise
                tried.add(placement.node)
                if not self._dispatcher.elsewhere(run.waiter, tried):
                    return
            else:
                run.failed = None
                placement.node.failures = 0
                return

    async def _offer(self, run: Run, node: AfsletNode, context: Context) -> AsyncGenerator[bytes, None]:
        waited = time.monotonic() - run.waiter.since
        metadata = (("afs-queued-us", str(int(waited * 1e6))), ("afs-owner", run.owner))
        if run.waiter.error is not None:
            raise run.waiter.error
        run.node, run.call = node, open_call(node, metadata, context.time_remaining())
        response = await offer(run.call, node, run.first)
        while response[:1] != ACCEPTED:  # it waits on the node
            if run.waiter.wants_progress:
                yield response
            response = await answer(run.call, node)
        run.accepted = response
        self._dispatcher.observe_wait(waited)


def wait_limit(start: pb.StartRequest, remaining: float | None) -> tuple[float, str]:
    """When the wait for room ends, in monotonic seconds, and whose limit that is; *remaining*: of the call's deadline.

    A little before the deadline, so that the client gets an answer instead of its own library's.
    """
    now, ends, limit = time.monotonic(), float("inf"), ""
    if remaining is not None:
        ends, limit = now + remaining - min(0.1, remaining / 10), "before the call's deadline"
    if start.queue_timeout_ms and (mine := now + start.queue_timeout_ms / 1000) < ends:
        ends, limit = mine, f"within the queue_timeout of {start.queue_timeout_ms / 1000:g} s"
    return ends, limit
