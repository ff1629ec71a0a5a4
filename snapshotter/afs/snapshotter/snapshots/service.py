"""containerd.services.snapshots.v1.Snapshots: messages in, messages out."""

from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from typing import Any

import grpc.aio
from google.protobuf.empty_pb2 import Empty
from google.protobuf.timestamp_pb2 import Timestamp
from typing_extensions import override

from afs.core.errors import InvalidArgument
from afs.proto.containerd import mount_pb2, snapshots_pb2_grpc
from afs.proto.containerd import snapshots_pb2 as pb
from afs.snapshotter.snapshots.filters import parse_filters
from afs.snapshotter.snapshots.metadata import Kind, Snapshot
from afs.snapshotter.snapshots.mountspec import Mount
from afs.snapshotter.snapshots.snapshots import Snapshots

Context = grpc.aio.ServicerContext[Any, Any]
_PER_MESSAGE = 100  # of List, as containerd's own service
_MESSAGE_BYTES = 1 << 20
_LABELS = "labels"
_KINDS = {Kind.VIEW: pb.VIEW, Kind.ACTIVE: pb.ACTIVE, Kind.COMMITTED: pb.COMMITTED}


class SnapshotsService(snapshots_pb2_grpc.SnapshotsServicer):
    """The name of the plugin, which every request has, is not looked at: one server is one snapshotter."""

    def __init__(self, snapshots: Snapshots) -> None:
        self._snapshots = snapshots

    @override
    async def Prepare(self, request: pb.PrepareSnapshotRequest, context: Context) -> pb.PrepareSnapshotResponse:
        _need(request.key, "key")
        mounts = await self._snapshots.prepare(request.key, request.parent, _check_labels(request.labels))
        return pb.PrepareSnapshotResponse(mounts=_mounts(mounts))

    @override
    async def View(self, request: pb.ViewSnapshotRequest, context: Context) -> pb.ViewSnapshotResponse:
        _need(request.key, "key")
        mounts = await self._snapshots.view(request.key, request.parent, _check_labels(request.labels))
        return pb.ViewSnapshotResponse(mounts=_mounts(mounts))

    @override
    async def Mounts(self, request: pb.MountsRequest, context: Context) -> pb.MountsResponse:
        return pb.MountsResponse(mounts=_mounts(await self._snapshots.mounts(request.key)))

    @override
    async def Commit(self, request: pb.CommitSnapshotRequest, context: Context) -> Empty:
        _need(request.name, "name")
        await self._snapshots.commit(request.name, request.key, _check_labels(request.labels), request.parent)
        return Empty()

    @override
    async def Remove(self, request: pb.RemoveSnapshotRequest, context: Context) -> Empty:
        await self._snapshots.remove(request.key)
        return Empty()

    @override
    async def Stat(self, request: pb.StatSnapshotRequest, context: Context) -> pb.StatSnapshotResponse:
        return pb.StatSnapshotResponse(info=_info(await self._snapshots.stat(request.key)))

    @override
    async def Update(self, request: pb.UpdateSnapshotRequest, context: Context) -> pb.UpdateSnapshotResponse:
        paths, given = tuple(request.update_mask.paths), dict(_check_labels(request.info.labels))
        for path in paths:
            if path != _LABELS and not path.startswith(f"{_LABELS}."):
                raise InvalidArgument(f"{path} of snapshot {request.info.name} cannot be changed")
        changed = await self._snapshots.update(request.info.name, lambda labels: _changed(labels, given, paths))
        return pb.UpdateSnapshotResponse(info=_info(changed))

    @override
    async def List(self, request: pb.ListSnapshotsRequest, context: Context) -> AsyncIterator[pb.ListSnapshotsResponse]:
        found = await self._snapshots.list(parse_filters(request.filters))
        for part in _parts(map(_info, found)):
            yield pb.ListSnapshotsResponse(info=part)

    @override
    async def Usage(self, request: pb.UsageRequest, context: Context) -> pb.UsageResponse:
        usage = await self._snapshots.usage(request.key)
        return pb.UsageResponse(size=usage.size, inodes=usage.inodes)

    @override
    async def Cleanup(self, request: pb.CleanupRequest, context: Context) -> Empty:
        await self._snapshots.cleanup()
        return Empty()


def _parts(infos: Iterable[pb.Info]) -> Iterator[list[pb.Info]]:
    """Messages of a size that clients take: labels may be long."""
    part: list[pb.Info] = []
    size = 0
    for info in infos:
        if part and (len(part) == _PER_MESSAGE or size + info.ByteSize() > _MESSAGE_BYTES):
            yield part
            part, size = [], 0
        part.append(info)
        size += info.ByteSize()
    if part:
        yield part


def _check_labels(labels: Mapping[str, str]) -> Mapping[str, str]:
    """InvalidArgument for more than a message of List could tell."""
    if (size := sum(len(key) + len(value) for key, value in labels.items())) > _MESSAGE_BYTES:
        raise InvalidArgument(f"labels of {size} characters; {_MESSAGE_BYTES} are possible")
    return labels


def _need(value: str, what: str) -> None:
    if not value:
        raise InvalidArgument(f"a snapshot needs a {what}")


def _changed(labels: Mapping[str, str], given: Mapping[str, str], paths: Sequence[str]) -> dict[str, str]:
    """The labels of a snapshot after an update; an empty value deletes one. Without *paths* all are replaced."""
    found = dict(labels) if paths else dict(given)
    for path in paths:
        if path == _LABELS:
            found = dict(given)
        else:
            key = path.removeprefix(f"{_LABELS}.")
            found[key] = given.get(key, "")
    return {key: value for key, value in found.items() if value}


def _mounts(mounts: Iterable[Mount]) -> list[mount_pb2.Mount]:
    return [mount_pb2.Mount(type=one.type, source=one.source, options=one.options) for one in mounts]


def _info(snapshot: Snapshot) -> pb.Info:
    return pb.Info(
        name=snapshot.name,
        parent=snapshot.parent,
        kind=_KINDS[snapshot.kind],
        created_at=_timestamp(snapshot.created),
        updated_at=_timestamp(snapshot.updated),
        labels=snapshot.labels,
    )


def _timestamp(ns: int) -> Timestamp:
    return Timestamp(seconds=ns // 10**9, nanos=ns % 10**9)
