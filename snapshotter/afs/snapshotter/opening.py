"""What is mounted comes from the node's layerstore: images and layers that it opens, and what it knows of them.

State (one event loop): ``_asked`` has when the layerstore opened which layers last, in monotonic seconds. Whatever is opened has a number, which goes up, and is in
:meth:`LayerMounts.opening` until its layers are mounted or given up: see LeaseUpdate in layerstore.proto.
"""

import asyncio
import contextlib
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import NamedTuple, Self

from grpc import ChannelConnectivity

from afs.core.rpc import calling, channel
from afs.proto.v1 import layerstore_pb2 as pb
from afs.proto.v1.layerstore_pb2_grpc import LayerstoreNodeStub
from afs.snapshotter.layermount import MountedLayer
from afs.snapshotter.layermounts import LayerMounts

CONNECT_S = 1.5  # a layerstore that restarts is back by then
USAGE_TIMEOUT_S = 5.0
ASK_S = 5.0
_MOST_ASKED = 1000


class Opened(NamedTuple):
    """An image whose layers (bottom first) are mounted.

    *fetched* has, by diff_id, how many bytes of each had come from peers and registries before, and *now* of all.
    """

    image: pb.Image
    layers: list[MountedLayer]
    fetched: Mapping[str, int]
    now: int


class Opener:
    """Asks the layerstore at *address* (``unix:PATH``) and mounts what it answers with *mounts*."""

    def __init__(self, mounts: LayerMounts, address: str) -> None:
        self._mounts = mounts
        self._peer = f"layerstore {address}"
        self._channel = channel(address)
        self._stub = LayerstoreNodeStub(self._channel)
        self._asked: dict[tuple[str, ...], float] = {}

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self._channel.close()

    async def open_image(self, stack: contextlib.AsyncExitStack, name: pb.ImageName, *, force_local: bool) -> Opened:
        """Ask for an image and mount its layers (bottom first) until *stack* closes."""
        with self._mounts.opening() as number:
            await self._connect()
            request = pb.OpenImageRequest(name=name, force_local_fetch=force_local, number=number)
            with calling(self._peer):
                answer = await self._stub.OpenImage(request)
            self._mounts.opened(number, [layer.diff_id for layer in answer.layers])
            layers = await self._mount_layers(stack, answer.layers)
            before = {layer.diff_id: layer.fetched_before for layer in answer.layers}
            now = sum({layer.diff_id: layer.fetched for layer in answer.layers}.values())
            return Opened(answer.image, layers, before, now)

    async def open_layers(
        self, stack: contextlib.AsyncExitStack, layers: Sequence[pb.WantedLayer], timeout: float
    ) -> list[MountedLayer]:
        """Mount layers of an image, in that order, until *stack* closes; DeadlineExceeded after *timeout* seconds.

        Nobody is asked if all are mounted, from complete files or so that the layerstore said so a moment ago: that is 3 ms
        of 6 for a container's Prepare. What became complete meanwhile is mounted from its file then ``ASK_S`` later.
        """
        diff_ids = tuple(layer.diff_id for layer in layers)
        if (held := self._at_hand(diff_ids)) is not None:
            for layer in held:
                stack.push_async_callback(self._mounts.let_go, layer)
            return held
        with self._mounts.opening() as number:
            await self._connect()
            with calling(self._peer):
                request = pb.OpenLayersRequest(layers=layers, number=number)
                answer = await self._stub.OpenLayers(request, timeout=timeout)
            self._mounts.opened(number, diff_ids)
            mounted = await self._mount_layers(stack, answer.layers)
        self._note_asked(diff_ids)
        return mounted

    def _at_hand(self, diff_ids: tuple[str, ...]) -> list[MountedLayer] | None:
        asked = self._asked.get(diff_ids, -ASK_S) + ASK_S > time.monotonic()
        if not asked and not all((layer := self._mounts.find(each)) and not layer.lazy for each in diff_ids):
            return None
        return self._mounts.hold(diff_ids)

    def _note_asked(self, diff_ids: tuple[str, ...]) -> None:
        now = time.monotonic()
        if len(self._asked) >= _MOST_ASKED:
            self._asked = {key: asked for key, asked in self._asked.items() if asked + ASK_S > now}
        self._asked[diff_ids] = now

    async def supply_layer(
        self, layer: pb.WantedLayer, missing: pb.SupplyLayerRequest.Missing.ValueType, timeout: float
    ) -> pb.WantedLayer:
        """What the cluster says of a layer that it can supply; NotFound if it cannot. *timeout* in seconds."""
        request = pb.SupplyLayerRequest(layer=layer, missing=missing)
        await self._connect()
        with calling(self._peer):
            return (await self._stub.SupplyLayer(request, timeout=timeout)).layer

    async def layer_usage(self, diff_ids: Sequence[str]) -> dict[str, int]:
        """Bytes of the disk that each of these layers takes, if it is here. It does not wait for a layerstore that is away."""
        request = pb.LayerUsageRequest(diff_ids=diff_ids)
        with calling(self._peer):
            return dict((await self._stub.LayerUsage(request, timeout=USAGE_TIMEOUT_S)).used_bytes)

    async def bytes_fetched(self, diff_ids: Sequence[str]) -> int:
        """Bytes of these layers that came from peers and registries; as :meth:`layer_usage`."""
        request = pb.LayerUsageRequest(diff_ids=diff_ids)
        with calling(self._peer):
            answer = await self._stub.LayerUsage(request, timeout=USAGE_TIMEOUT_S)
        return sum(answer.fetched_bytes.values())

    def is_connected(self) -> bool:
        """Whether the layerstore could be asked now; if not, it will be tried soon."""
        return self._channel.get_state(try_to_connect=True) is ChannelConnectivity.READY

    async def _connect(self) -> None:
        # gRPC fails calls at once between two tries to connect, and a layerstore that restarts is back before the next.
        if not self.is_connected():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(CONNECT_S):
                    await self._channel.channel_ready()

    async def _mount_layers(
        self, stack: contextlib.AsyncExitStack, layers: Sequence[pb.LocalLayer]
    ) -> list[MountedLayer]:
        # An image may hold one layer several times.
        entering = (stack.enter_async_context(self._mounts.using(layer.diff_id, layer.path)) for layer in layers)
        # All of them are awaited even if one fails: what the others mounted has to be on the stack when it unwinds.
        results = await asyncio.gather(*entering, return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                raise result
        return [result for result in results if not isinstance(result, BaseException)]
