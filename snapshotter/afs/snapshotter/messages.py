"""Roots in the messages of the Mounts service, where paths are bytes, and as Python has them. For both sides of it."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from afs.proto.v1 import mounts_pb2 as pb


@dataclass(frozen=True, slots=True)
class MountedRoot:
    """What the user of a root is told; *lower* is topmost first, *upper* is None for a read-only root."""

    path: Path
    upper: Path | None
    lower: tuple[Path, ...]

    def message(self) -> pb.MountedRoot:
        """For the wire."""
        upper = os.fsencode(self.upper) if self.upper else b""
        return pb.MountedRoot(
            path=os.fsencode(self.path), upper=upper, lower=[os.fsencode(path) for path in self.lower]
        )

    @classmethod
    def from_message(cls, message: pb.MountedRoot) -> "MountedRoot":
        """From the wire."""
        lower = tuple(Path(os.fsdecode(path)) for path in message.lower)
        return cls(Path(os.fsdecode(message.path)), Path(os.fsdecode(message.upper)) if message.upper else None, lower)


def root_request(
    extra_dirs: Sequence[str | Path] = (),
    *,
    read_only: bool = False,
    target: str | Path = "",
    upper_dir: str | Path = "",
    proc_dev: bool = False,
    suid: bool = False,
    disk_bytes: int = 0,
    ids: tuple[int, int] | None = None,
) -> pb.MountRoot:
    """What kind of root is wanted, see MountRoot in mounts.proto; paths are absolute, *extra_dirs* topmost first.

    At most *disk_bytes* can be written to it; 0: as the disk has room. *ids*: id_first and id_count.
    """
    id_first, id_count = ids or (0, 0)
    return pb.MountRoot(
        extra_dirs=[os.fsencode(path) for path in extra_dirs],
        read_only=read_only,
        target=os.fsencode(target),
        upper_dir=os.fsencode(upper_dir),
        proc_dev=proc_dev,
        suid=suid,
        disk_bytes=disk_bytes,
        id_first=id_first,
        id_count=id_count,
    )
