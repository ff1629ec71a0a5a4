"""Telling the layerstore which layers are mounted, so that it does not evict them, and giving idle ones up for it.

State: one stream at a time, which is the lease; see LayerstoreNode.Leases. Everything is told again on a new stream, so
nothing has to be remembered of the old one. While a report is on its way changes gather in ``mounts.changed``: what is
sent next is the newest state, not every state.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator

from afs.core.errors import AfsError
from afs.core.rpc import calling, channel
from afs.proto.v1 import layerstore_pb2 as pb
from afs.proto.v1.layerstore_pb2_grpc import LayerstoreNodeStub
from afs.snapshotter.layermounts import LayerMounts

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


async def _stream(stub: "LayerstoreNodeStub", mounts: LayerMounts) -> None:
    releasing: set[asyncio.Task[None]] = set()
    try:
        # A layerstore that restarts is waited for: its grace period is longer than that takes.
        async for request in stub.Leases(_updates(mounts), wait_for_ready=True):
            task = asyncio.create_task(mounts.release(request.release), name="release layers")
            releasing.add(task)
            task.add_done_callback(releasing.discard)
    finally:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.gather(*releasing, return_exceptions=True)


async def _updates(mounts: LayerMounts) -> AsyncIterator[pb.LeaseUpdate]:
    while True:
        mounts.changed.clear()
        in_use, idle = mounts.leases()
        yield pb.LeaseUpdate(in_use=sorted(in_use), idle=sorted(idle))
        await mounts.changed.wait()
