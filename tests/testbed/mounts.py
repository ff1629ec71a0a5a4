"""mount(2) and umount2(2) for the testbed, which must not lean on the code under test, and the table of mounts."""

from __future__ import annotations

import ctypes
import errno
import os
import re
from dataclasses import dataclass
from pathlib import Path

MS_RDONLY = 0x1
MNT_DETACH = 0x2

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, order=True)
class Mount:
    """One line of mountinfo (Linux Documentation/filesystems/proc.rst, 3.5)."""

    target: str
    fstype: str
    source: str
    options: str
    """Of the filesystem."""
    id: int

    def describe(self) -> str:
        """The mount as mount(8) lists it, with its id."""
        return f"{self.source} on {self.target} type {self.fstype} ({self.options[:160]}) [{self.id}]"


def table() -> list[Mount]:
    """The mounts that this process sees, oldest first."""
    found = []
    for line in Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines():
        left, _, right = line.partition(" - ")
        fields, (fstype, source, options) = left.split(" "), right.split(" ", 2)
        found.append(Mount(_unescape(fields[4]), fstype, _unescape(source), _unescape(options), int(fields[0])))
    return found


def cgroups(pattern: str) -> set[Path]:
    """What matches a glob pattern below the root of any cgroup hierarchy, v1 or v2."""
    roots = [Path(mount.target) for mount in table() if mount.fstype in ("cgroup", "cgroup2")]
    while True:
        try:
            return {path for root in roots for path in root.glob(pattern)}
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENODEV):
                raise
            # A group went while we looked: look again.


def mount(source: str | Path, target: str | Path, fstype: str, options: str = "", *, read_only: bool = False) -> None:
    """Mount a filesystem.

    Raises:
        OSError: the kernel's refusal.

    """
    flags = MS_RDONLY if read_only else 0
    names = (os.fsencode(source), os.fsencode(target), fstype.encode())
    if _libc.mount(*names, ctypes.c_ulong(flags), options.encode()):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(target))


def umount(target: str | Path, *, detach: bool = False) -> None:
    """Unmount the topmost mount on a path; `detach` also when it is busy.

    Raises:
        OSError: the kernel's refusal.

    """
    if _libc.umount2(os.fsencode(target), MNT_DETACH if detach else 0):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(target))


def umount_below(directory: Path) -> list[str]:
    """Unmount everything at or below a directory, newest first, busy or not; returns what it was."""
    prefix = f"{directory}/"
    found = [mount.target for mount in table() if mount.target == str(directory) or mount.target.startswith(prefix)]
    for target in reversed(found):
        umount(target, detach=True)
    return found


def _unescape(text: str) -> str:
    """Undo mountinfo's octal escapes of space, tab, newline and backslash."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found.group(1), 8)), text)
