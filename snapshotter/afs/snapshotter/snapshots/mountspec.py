"""The mount that containerd makes for a snapshot: one plain bind or overlay, which every release from 1.6 to 2.4 can make."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from afs.snapshotter.overlay import in_user_namespace

# containerd changes into the directory that all lower ones are in, and gives their names relative to it, if its options
# take more than a page less 512 bytes; and mount(2) takes less than a page.
_PAGE = os.sysconf("SC_PAGESIZE")
_LONG = _PAGE - 512


@dataclass(frozen=True, slots=True)
class Mount:
    """As containerd's mount.Mount."""

    type: str
    source: str
    options: tuple[str, ...]


def bind(source: Path, *, writable: bool) -> Mount:
    """One directory."""
    return Mount("bind", str(source), ("rw" if writable else "ro", "rbind"))


def overlay(lower: Sequence[Path], upper: Path | None = None, work: Path | None = None) -> Mount:
    """*lower* (topmost first) below *upper*, or read-only without one."""
    options = list(_settings())
    if upper is not None:
        options += [f"workdir={work}", f"upperdir={upper}"]
    options.append("lowerdir=" + ":".join(map(str, lower)))
    return Mount("overlay", "overlay", tuple(options))


def is_too_long(mount: Mount) -> bool:
    """Whether containerd could not make *mount* because the names of its lower directories have too little in common."""
    total = sum(len(os.fsencode(option)) + 1 for option in mount.options)
    if total < _LONG:
        return False
    lower = mount.options[-1].removeprefix("lowerdir=").split(":")
    common = os.path.dirname(os.path.commonprefix(lower))  # noqa: RUF071 - as containerd does it
    if common not in ("", "/"):
        total -= len(lower) * (len(os.fsencode(common)) + 1)
    return total >= _PAGE


@cache
def _settings() -> tuple[str, ...]:
    found = []
    if os.path.exists("/sys/module/overlay/parameters/index"):
        # An upper directory's index is bound to its lower mounts, which are new ones after a restart.
        found.append("index=off")
    if in_user_namespace():
        found.append("userxattr")  # trusted.* is not to be had there
    return tuple(found)
