"""What is mounted on this machine, from /proc/self/mountinfo (proc_pid_mountinfo(5)), and taking it down."""

import errno
import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path

from afs.core import syscalls

log = logging.getLogger(__name__)
_ESCAPE = re.compile(r"\\([0-7]{3})")
_ESCAPED = re.compile(r"[\s\\#]")  # what the kernel shows of a source as an octal number, and more


@dataclass(frozen=True, slots=True)
class MountPoint:
    """One line of mountinfo."""

    target: str
    fstype: str
    source: str
    root: str
    """The directory of the file system that is mounted: ``/`` but for bind mounts."""
    device: str
    """major:minor of the file system; all mounts of one share it."""


def _unescape(field: str) -> str:
    return _ESCAPE.sub(lambda match: chr(int(match[1], 8)), field)


def _parse(line: str) -> MountPoint:
    before, _, after = line.partition(" - ")
    device, root, target = before.split(" ")[2:5]
    fstype, source = after.split(" ")[:2]
    return MountPoint(_unescape(target), fstype, _unescape(source), _unescape(root), device)


def list_mounts(below: str = "/") -> list[MountPoint]:
    """The mounts at or below directory *below*, in the order they were made: unmount them backwards."""
    prefix = below.rstrip("/") + "/"
    found = []
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape", newline="\n") as lines:
        for line in lines:
            mount = _parse(line)
            if mount.target == below or mount.target.startswith(prefix):
                found.append(mount)
    return found


def mounts_from(source: str) -> list[MountPoint]:
    """The mounts with that *source*, oldest first. Lines of others are not taken apart, which is 80% of the work."""
    if _ESCAPED.search(source):
        return [mount for mount in list_mounts() if mount.source == source]
    table, wanted = Path("/proc/self/mountinfo").read_bytes(), f" {source} ".encode(errors="surrogateescape")
    if wanted not in table:
        return []
    lines = [line.decode(errors="surrogateescape") for line in table.split(b"\n") if wanted in line]
    return [mount for line in lines if (mount := _parse(line)).source == source]


def unmount(target: str) -> None:
    """Unmount *target*. A busy one is detached: it leaves the tree at once and goes when its last user does.

    Not being mounted is no error: the wanted state is reached.
    """
    try:
        syscalls.umount(target)
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.ENOENT):
            return
        if error.errno not in (errno.EBUSY, errno.ENOTCONN, errno.EIO):
            raise
        log.info("detaching %s, which is in use: %s", target, error.strerror)
        syscalls.umount(target, syscalls.MNT_DETACH)


def unmount_below(directory: str | Path) -> int:
    """Unmount all that is mounted at or below *directory*, newest first; returns how many."""
    targets = [mount.target for mount in list_mounts(os.path.realpath(directory))]
    for target in reversed(targets):
        unmount(target)
    return len(targets)


def boot_id() -> str:
    """Differs from boot to boot (random(4)); no mount outlives one."""
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
