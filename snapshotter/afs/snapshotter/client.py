"""The asking side of the Mounts service, for afslet and afs_mount."""

import contextlib
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc.aio

from afs.core.errors import ResourceExhausted, Unavailable
from afs.core.rpc import EOF, calling, channel
from afs.proto.v1 import mounts_pb2 as pb
from afs.proto.v1.mounts_pb2_grpc import MountsStub
from afs.snapshotter.messages import MountedRoot
from afs.snapshotter.scratchfs import lost_writes


class Hold:
    """One call of Mounts.Hold: an image and its roots, as long as the call lives."""

    def __init__(self, call: "grpc.aio.StreamStreamCall[Any, Any]", peer: str) -> None:
        self._call = call
        self._peer = peer
        self._lazy = False
        self.bytes_fetched = 0
        """Of the image, from peers and registries, since it was opened: as last told."""
        self._asking = False
        self._limited: set[Path] = set()  # roots with disk_bytes

    async def open(self, image: pb.OpenImage) -> pb.OpenedImage:
        """Have the image's layers mounted."""
        return self._opened(await self._ask(pb.HoldRequest(open=image)))

    async def open_and_mount(self, image: pb.OpenImage, wanted: pb.MountRoot) -> tuple[pb.OpenedImage, MountedRoot]:
        """:meth:`open` and :meth:`mount` in one exchange."""
        answer = await self._ask(pb.HoldRequest(open=image, mount=wanted))
        return self._opened(answer), self._mounted(answer, wanted)

    def _opened(self, answer: pb.HoldResponse) -> pb.OpenedImage:
        self._lazy, self.bytes_fetched = answer.opened.lazy, answer.opened.bytes_fetched
        return answer.opened

    async def mount(self, wanted: pb.MountRoot | None = None) -> MountedRoot:
        """Have a root mounted; *wanted* comes from :func:`~afs.snapshotter.messages.root_request`."""
        wanted = wanted or pb.MountRoot()
        return self._mounted(await self._ask(pb.HoldRequest(mount=wanted)), wanted)

    def _mounted(self, answer: pb.HoldResponse, wanted: pb.MountRoot) -> MountedRoot:
        root = MountedRoot.from_message(answer.mounted)
        if wanted.disk_bytes:
            self._limited.add(root.path)
        return root

    async def unmount(self, root: MountedRoot, *, then: pb.MountRoot | None = None) -> MountedRoot | None:
        """Have *root* unmounted and removed, and then another one mounted, if one is wanted."""
        self._limited.discard(root.path)
        answer = await self._ask(pb.HoldRequest(unmount=pb.UnmountRoot(path=os.fsencode(root.path)), mount=then))
        return self._mounted(answer, then) if then is not None else None

    async def check(self, *, written: bool = True) -> None:
        """Unavailable or ResourceExhausted if what ran on the image cannot be trusted.

        That is if a read of its layers failed since it was opened, or if something was *written* to a root of limited size
        and was lost, or could not be written although it should have fit: the disk is damaged, or was filled by others.
        """
        for root in self._limited if written else ():
            if why := lost_writes(root):
                raise Unavailable(f"what was written to {root} could not all be kept: {why}")
        if not self._lazy and not (written and self._limited):
            return
        faults = (await self._ask(pb.HoldRequest(check=pb.CheckReads()))).faults
        self.bytes_fetched = faults.bytes_fetched
        if faults.layers:
            raise Unavailable(f"layer {faults.layers[0]} could not be read during the run")
        if written and faults.disk_full:
            raise ResourceExhausted("the node's disk was full during the run")

    async def _ask(self, request: pb.HoldRequest) -> pb.HoldResponse:
        self._asking = True
        try:
            with calling(self._peer):
                # A failed call refuses further writes with an error of its own; the status comes with the read.
                with contextlib.suppress(grpc.aio.UsageError, grpc.aio.AioRpcError):
                    await self._call.write(request)
                answer = await self._call.read()
        finally:
            self._asking = False
        if not isinstance(answer, pb.HoldResponse):
            raise Unavailable(f"{self._peer} ended the call")
        return answer

    @property
    def lost(self) -> bool:
        """Whether the call has ended, and with it all that was mounted."""
        return self._call.done()

    def when_lost(self, callback: Callable[[], object]) -> None:
        """Call *callback* on the event loop as soon as the call has ended: the snapshotter stopped, or died.

        Not if something is being asked just then: who asks gets the error, which may say more.
        """

        def ended(_: object) -> None:
            if not self._asking:
                callback()

        self._call.add_done_callback(ended)

    def loss(self) -> Unavailable:
        """The error for work that needed what was mounted."""
        return Unavailable(f"{self._peer} went away while a root of it was in use")

    def cancel(self) -> None:
        """End the call at once, whatever is under way; what was mounted goes soon."""
        self._call.cancel()

    async def release(self) -> None:
        """Give everything back; on return it is unmounted and removed."""
        with calling(self._peer):
            if not self._call.done():
                await self._call.done_writing()
                while await self._call.read() is not EOF:
                    pass


class Mounts:
    """A channel to the snapshotter of this node; *address* is ``unix:PATH``, *lease_ttl* as :func:`~afs.core.rpc.channel` has it."""

    def __init__(self, address: str, *, lease_ttl: float | None = None) -> None:
        self._peer = f"snapshotter {address}"
        self._channel = channel(address, lease_ttl=lease_ttl)
        self._stub = MountsStub(self._channel)

    async def close(self) -> None:
        """Close the channel; calls on it end."""
        await self._channel.close()

    def hold(self) -> Hold:
        """A new call of Mounts.Hold, for the caller to release."""
        return Hold(self._stub.Hold(), self._peer)

    @contextlib.asynccontextmanager
    async def holding(self) -> AsyncIterator[Hold]:
        """A hold that is released at the end of the block, whatever ends it."""
        hold = self.hold()
        try:
            yield hold
        finally:
            await hold.release()

    async def attach(self, image: pb.OpenImage, wanted: pb.MountRoot) -> MountedRoot:
        """Have a root mounted at its target that stays until :meth:`detach`; *wanted* comes from :func:`~afs.snapshotter.messages.root_request`."""
        with calling(self._peer):
            return MountedRoot.from_message(await self._stub.Attach(pb.AttachRequest(open=image, mount=wanted)))

    async def detach(self, target: str | Path) -> Path | None:
        """Unmount an attached root; the upper directory that stays, if it has one."""
        with calling(self._peer):
            answer = await self._stub.Detach(pb.DetachRequest(target=os.fsencode(target)))
        return Path(os.fsdecode(answer.kept_upper)) if answer.kept_upper else None

    async def stats(self) -> pb.StatsResponse:
        """What is mounted."""
        with calling(self._peer):
            return await self._stub.Stats(pb.StatsRequest())
