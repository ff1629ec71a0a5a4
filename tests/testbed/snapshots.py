"""containerd's side of the snapshots API, for tests that speak to a snapshotter's socket themselves, and its mounts."""

from __future__ import annotations

import subprocess
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Self

import grpc

from afs.proto.containerd import snapshots_pb2 as pb
from afs.proto.containerd.snapshots_pb2_grpc import SnapshotsStub
from tests.testbed import mounts as mounting

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path
    from types import TracebackType

    from afs.proto.containerd.mount_pb2 import Mount

REF = "containerd.io/snapshot.ref"
"""The label with which containerd says what it is about to unpack: a chain id."""
_TIMEOUT = 60.0


class Snapshots:
    """A client that blocks; errors are grpc.RpcError with the status.

    Args:
        socket: of the snapshotter.
        snapshotter: the name in requests.
        namespace: of containerd, which it sends along.

    """

    def __init__(self, socket: Path, snapshotter: str = "afs", namespace: str = "testbed") -> None:
        self._channel = grpc.insecure_channel(f"unix:{socket}")
        self._stub = SnapshotsStub(self._channel)
        self._name = snapshotter
        self._options: dict[str, Any] = {"timeout": _TIMEOUT, "metadata": (("containerd-namespace", namespace),)}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._channel.close()

    def prepare(self, key: str, parent: str = "", labels: Mapping[str, str] | None = None) -> list[Mount]:
        """An active snapshot and its mounts."""
        request = pb.PrepareSnapshotRequest(snapshotter=self._name, key=key, parent=parent, labels=labels)
        return list(self._stub.Prepare(request, wait_for_ready=True, **self._options).mounts)

    def view(self, key: str, parent: str = "", labels: Mapping[str, str] | None = None) -> list[Mount]:
        """A read-only snapshot and its mounts."""
        request = pb.ViewSnapshotRequest(snapshotter=self._name, key=key, parent=parent, labels=labels)
        return list(self._stub.View(request, wait_for_ready=True, **self._options).mounts)

    def mounts(self, key: str) -> list[Mount]:
        """The mounts of an active snapshot or a view."""
        return list(self._stub.Mounts(pb.MountsRequest(snapshotter=self._name, key=key), **self._options).mounts)

    def commit(self, name: str, key: str, labels: Mapping[str, str] | None = None) -> None:
        """Make an active snapshot a committed one."""
        request = pb.CommitSnapshotRequest(snapshotter=self._name, name=name, key=key, labels=labels)
        self._stub.Commit(request, **self._options)

    def remove(self, key: str) -> None:
        """Remove a snapshot that none is based on."""
        self._stub.Remove(pb.RemoveSnapshotRequest(snapshotter=self._name, key=key), **self._options)

    def stat(self, key: str) -> pb.Info:
        """What is known of a snapshot."""
        return self._stub.Stat(pb.StatSnapshotRequest(snapshotter=self._name, key=key), **self._options).info

    def usage(self, key: str) -> tuple[int, int]:
        """Bytes and inodes of a snapshot without its parents."""
        found = self._stub.Usage(pb.UsageRequest(snapshotter=self._name, key=key), **self._options)
        return found.size, found.inodes

    def infos(self, *filters: str) -> dict[str, pb.Info]:
        """All snapshots that a filter matches, by name; all there are without a filter."""
        request = pb.ListSnapshotsRequest(snapshotter=self._name, filters=filters)
        answers = self._stub.List(request, wait_for_ready=True, **self._options)
        return {info.name: info for answer in answers for info in answer.info}

    def cleanup(self) -> None:
        """Free what removed snapshots left."""
        self._stub.Cleanup(pb.CleanupRequest(snapshotter=self._name), **self._options)


@contextmanager
def mounted(mounts: Sequence[Mount], target: Path) -> Iterator[Path]:
    """Mount what a snapshotter answered at an empty directory, as containerd's clients do for a moment."""
    target.mkdir(exist_ok=True)
    done = 0
    try:
        for mount in mounts:
            options, kind = ",".join(mount.options), ["-t", mount.type] if mount.type != "bind" else []
            argv = ["mount", *kind, *(["-o", options] if options else []), mount.source, str(target)]
            subprocess.run(argv, check=True, capture_output=True)
            done += 1
        yield target
    finally:
        for _ in range(done):
            mounting.umount(target)
