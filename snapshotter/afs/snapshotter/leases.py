"""Telling the layerstore which layers are mounted, so that it does not evict them, and giving idle ones up for it.

State: one stream at a time, which is the lease; see LayerstoreNode.Leases. Everything is told again on a new stream, so
nothing has to be remembered of the old one. While a report is on its way changes gather in ``mounts.changed``: what is
sent next is the newest state, not every state.
"""

import asyncio
import contextlib
import logging
from typing import TYPE_CHECKING

import grpc.aio

from afs.core.errors import AfsError
from afs.core.rpc import calling, channel
from afs.proto.v1.layerstore_pb2_grpc import LayerstoreNodeStub
from afs.snapshotter.layermounts import LayerMounts

if TYPE_CHECKING:  # a class of the stub file only
    from afs.proto.v1 import layerstore_pb2 as pb
    from afs.proto.v1.layerstore_pb2_grpc import LayerstoreNodeAsyncStub

log = logging.getLogger(__name__)
RECONNECT_S = 0.2  # after a stream that ended; connecting itself waits for the socket


async def report_mounts(address: str, mounts: LayerMounts) -> None:
    """Keep a stream to the layerstore at *address* (``unix:PATH``) for ever; cancel it to stop."""
    opened = channel(address)
    try:
        while True:
            try:
                with calling(f"layerstore {address}"):
                    await _stream(LayerstoreNodeStub(opened), mounts)
                log.info("layerstore %s ended the stream of leases", address)
            except AfsError as error:
                log.warning("no leases: %s", error.line)
            await asyncio.sleep(RECONNECT_S)
    finally:
        await opened.close()


async def _stream(stub: "LayerstoreNodeAsyncStub", mounts: LayerMounts) -> None:
    # A layerstore that restarts is waited for: its grace period is longer than that takes.
    call = stub.Leases(wait_for_ready=True)
    tasks = {asyncio.create_task(_report(call, mounts), name="report mounts")}
    try:
        async for request in call:
            task = asyncio.create_task(mounts.release(request.release), name="release layers")
            tasks.add(task)
            task.add_done_callback(tasks.discard)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _report(call: "grpc.aio.StreamStreamCall[pb.LeaseUpdate, pb.LeaseRequest]", mounts: LayerMounts) -> None:
    # A call that has ended refuses writes with errors of its own; whoever reads from it gets the status.
    with contextlib.suppress(grpc.aio.UsageError, grpc.aio.AioRpcError, asyncio.InvalidStateError):
        await call.wait_for_connection()  # which may take long, and the first report makes the layerstore believe it
        while True:
            mounts.changed.clear()
            await call.write(mounts.leases())
            await mounts.changed.wait()
