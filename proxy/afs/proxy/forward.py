"""``afsletpb.Afslet`` on the proxy: find a node for each run and pass its messages on as bytes, undecoded.

A run is tried elsewhere only before a node accepted it: until then nothing has happened, and nothing but the start has been
read from the client, whose upload gRPC's flow control holds back. Each call is one task, with a second one for the client's
further messages while the run is under way; both end with the call. If the node has not ended the call, it may be clearing
up still: then a task of the Forwarder keeps the run's idempotency key until it has, or the next run would overlap.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import Any, Never, cast

import grpc
import grpc.aio
from typing_extensions import override

from afs.afslet import faults
from afs.core.errors import AfsError, Cancelled
from afs.core.rpc import CALL_ENDED, EOF, send
from afs.proto.v1 import afslet_pb2 as pb
from afs.proxy import idempotency
from afs.proxy.dispatch import Dispatcher
from afs.proxy.offer import EXECUTE, RESULT, Call, NodeFailed, QueueTimeout, failure, fault
from afs.proxy.placing import Placer, wait_limit
from afs.proxy.run import Run, queued, read_start, waiter_of
from afs.proxy.runs import until_over

log = logging.getLogger(__name__)
_STATUS = "/afsletpb.Afslet/GetRuntimeStatus"
Context = grpc.aio.ServicerContext[Any, Any]


class Forwarder(grpc.GenericRpcHandler):
    """Register it with ``server.add_generic_rpc_handlers``. *runs* are the calls under way, by the proxy's own ids.

    *count* is told how each call ended: completed, replayed, cancelled, rejected or failed. Nothing is left of a run on a node that
    has not been heard of for *lease_ttl* seconds.
    """

    def __init__(
        self,
        dispatcher: Dispatcher,
        results: idempotency.Runs,
        count: Callable[[str], None] = lambda _: None,
        lease_ttl: float = 15.0,
    ) -> None:
        self.runs: dict[str, Run] = {}
        self._dispatcher = dispatcher
        self._results = results
        self._placer = Placer(dispatcher)
        self._count = count
        self._lease_ttl = lease_ttl
        self._releasing: set[asyncio.Task[None]] = set()

    async def close(self) -> None:
        """Stop waiting for nodes that clear up; call it when no calls are left."""
        for task in self._releasing:
            task.cancel()
        await asyncio.gather(*self._releasing, return_exceptions=True)

    @override
    def service(self, handler_call_details: grpc.HandlerCallDetails) -> "grpc.RpcMethodHandler[Any, Any] | None":
        if handler_call_details.method == EXECUTE:
            return grpc.stream_stream_rpc_method_handler(self._execute)
        if handler_call_details.method == _STATUS:
            return grpc.unary_unary_rpc_method_handler(self._status)
        return None

    async def _status(self, request: bytes, context: Context) -> bytes:
        """The whole cluster as one big node: sums over the nodes that answer."""
        total = pb.GetRuntimeStatusResponse()
        for node in self._dispatcher.nodes.nodes:
            if node.reachable:
                for descriptor, value in node.status.ListFields():
                    if descriptor.type == descriptor.TYPE_INT64:
                        setattr(total, descriptor.name, getattr(total, descriptor.name) + value)
        total.queued_runs += self._dispatcher.queued
        total.ClearField("run_disk_mb")  # each node's own: a sum means nothing
        return total.SerializeToString()

    async def _execute(self, requests: AsyncIterator[bytes], context: Context) -> AsyncIterator[bytes]:
        run: Run | None = None
        outcome = "failed"
        try:
            first = await anext(requests, None)
            run = self._admit(first, context)
            async with contextlib.aclosing(self._responses(run, requests, context)) as responses:
                async for response in responses:
                    yield response
            outcome = "completed" if run.call is not None else "replayed"
        except NodeFailed as failed:
            outcome = _outcome(failed.error, run)
            _fail(context, run, failed.error, failed.result)
        except AfsError as error:
            outcome = _outcome(error, run)
            _fail(context, run, error)
        except GeneratorExit:
            outcome = "cancelled"
            raise
        except asyncio.CancelledError:
            outcome = "cancelled"
            task = asyncio.current_task()
            if run is None or run.cancelled is None or (task is not None and task.cancelling()):
                raise
            _fail(context, run, run.cancelled)  # by Runs.Cancel: the client is still there to be told
        finally:
            self._count(outcome)
            if run is not None:
                self.runs.pop(run.run_id)

    def _admit(self, first: bytes | None, context: Context) -> Run:
        start = read_start(first)
        ends, limit = wait_limit(start, context.time_remaining())
        run = Run(first or b"", start, waiter_of(start), context.peer(), ends, limit)
        self.runs[run.run_id] = run
        return run

    async def _responses(
        self, run: Run, requests: AsyncIterator[bytes], context: Context
    ) -> AsyncGenerator[bytes, None]:
        start = run.start
        assert start is not None
        key = (start.tenant, start.idempotency_key)
        if start.idempotency_key:
            async with contextlib.aclosing(self._claimed(run, key, start)) as before:
                async for message in before:
                    yield message
            if run.result:
                return
        pumping: asyncio.Task[None] | None = None
        try:
            async with contextlib.aclosing(self._placer.place(run, context)) as progress:
                async for message in progress:
                    yield message
            node, call = run.node, run.call
            assert node is not None
            assert call is not None
            run.start = None
            if start.stdin or start.tty or not start.no_upload:
                pumping = asyncio.create_task(_pump(requests, call))
            else:  # nothing follows; an afslet that does not know no_upload waits for the end of the requests
                await _half_close(call)
            yield run.accepted
            try:
                while (response := await call.read()) is not EOF:
                    data = cast("bytes", response)
                    if data[:1] == RESULT:
                        run.result = data
                    yield data
            except grpc.aio.AioRpcError as error:
                failed = failure(error, node)
                run.over = failed.spoken
                raise failed from None
            run.over = True
        finally:
            if pumping is not None:
                pumping.cancel()
            if run.call is not None:
                run.call.cancel()  # does nothing to a call that has ended
            self._dispatcher.leave(run.waiter)
            if key[1]:
                self._release(key, run)

    def _release(self, key: idempotency.Key, run: Run) -> None:
        """End this call's claim on *key*, once the node is done with the run."""
        if run.result:
            self._results.end(key, idempotency.Ended(run.accepted, run.result))
        elif run.call is None or run.node is None or run.over:
            self._results.end(key, None)
        else:
            waiting = until_over(run.node, run.node_run_id, self._lease_ttl)
            task = asyncio.create_task(waiting, name=f"end of run {run.run_id}")
            self._releasing.add(task)
            task.add_done_callback(lambda _: self._results.end(key, None))
            task.add_done_callback(self._releasing.discard)

    async def _claimed(self, run: Run, key: idempotency.Key, start: pb.StartRequest) -> AsyncGenerator[bytes, None]:
        """Wait until *key* is this call's; or, with ``run.result``, the responses of the run that it names."""
        mark = idempotency.fingerprint(start)
        while (found := self._results.begin(key, mark)) is not None:
            if isinstance(found, idempotency.Ended):
                run.result = found.result
                for message in found.replay():
                    yield message
                return
            found.add_done_callback(lambda _: run.waiter.wake())
            try:
                if start.progress:
                    yield queued()
                while not found.done():
                    if run.waiter.error is not None:
                        raise run.waiter.error
                    await run.waiter.wait(_seconds_left(run, start))
            finally:
                self._results.give_up(key, found)


def _seconds_left(run: Run, start: pb.StartRequest) -> float | None:
    """How long to wait for another call's run; QueueTimeout if no longer."""
    left = run.ends - asyncio.get_running_loop().time()
    if left <= 0:
        raise QueueTimeout(f"the run of idempotency_key {start.idempotency_key!r} did not end {run.limit}")
    return left if left != float("inf") else None


def _outcome(error: AfsError, run: Run | None) -> str:
    if isinstance(error, Cancelled):
        return "cancelled"
    return "failed" if run is not None and run.accepted else "rejected"


def _fail(context: Context, run: Run | None, error: AfsError, result: pb.Result | None = None) -> Never:
    """End the call with *error*; the trailing metadata tell what that means for the run."""
    accepted = run is not None and bool(run.accepted)
    told = fault(error, result, run.node if run is not None else None, accepted=accepted)
    context.set_trailing_metadata(faults.to_metadata(told))
    raise error from None


async def _half_close(call: Call) -> None:
    """Tell the node that nothing more follows; how a call that has ended did so is read elsewhere."""
    with contextlib.suppress(*CALL_ENDED, grpc.aio.UsageError):
        await call.done_writing()


async def _pump(requests: AsyncIterator[bytes], call: Call) -> None:
    """Pass the client's further messages on; the write waits while the node does not read, and so does the client."""
    try:
        async for request in requests:
            await send(call, request)
        await _half_close(call)
    except (*CALL_ENDED, grpc.aio.UsageError):
        # The node ended the call; its status goes to the client with the response stream.
        log.debug("the node ended the call during the upload")
