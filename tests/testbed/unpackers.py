"""Other implementations that unpack layers, as witnesses: umoci, containerd's overlayfs snapshotter, GNU tar."""

from __future__ import annotations

import re
import subprocess
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tests.testbed import mounts

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.testbed.containerd import Containerd


class UnpackError(Exception):
    """A witness could not unpack something; the message is the end of its output."""


@dataclass(frozen=True)
class Snapshots:
    """An image as containerd unpacked it."""

    merged: Path
    """The mounted root."""
    layers: tuple[Path, ...]
    """The directory of each layer, bottom up, with overlayfs's marks in all but the lowest one."""


def umoci(layout: Path, tag: str, into: Path) -> Path:
    """Unpack an image of gzip layers; returns `into`.

    Raises:
        UnpackError: umoci failed.

    """
    _run("umoci", "raw", "unpack", "--image", f"{layout}:{tag}", into)
    return into


def gnu_tar(tar: bytes, into: Path) -> Path:
    """Unpack one tar, without a meaning for whiteouts; returns `into`.

    Raises:
        UnpackError: tar failed.

    """
    into.mkdir()
    options = ("--numeric-owner", "--same-permissions", "--xattrs", "--xattrs-include=*", "--delay-directory-restore")
    _run("tar", "-x", "-f", "-", "-C", into, *options, stdin=tar)
    return into


@contextmanager
def containerd(daemon: Containerd, layout: Path, tag: str, at: Path) -> Iterator[Snapshots]:
    """An image of two layers at least, imported into containerd, unpacked by it and mounted at `at`.

    Raises:
        UnpackError: containerd failed.

    """
    archive = at.with_name(f"{at.name}.tar")
    _run("tar", "-c", "-f", archive, "-C", layout, ".")
    name = f"test/{at.name.lower()}"
    done = daemon.ctr_process("images", "import", "--base-name", name, archive)
    archive.unlink()
    if done.returncode:
        raise UnpackError(done.stderr[-500:])
    at.mkdir()
    daemon.ctr("images", "mount", f"{name}:{tag}", at)
    try:
        (mount,) = (mount for mount in mounts.table() if mount.target == str(at))
        (lower,) = re.findall(r"(?:^|,)lowerdir=([^,]*)", mount.options)
        yield Snapshots(at, tuple(Path(path) for path in reversed(lower.split(":"))))
    finally:
        daemon.ctr("images", "unmount", "--rm", at)


@contextmanager
def tmpfs(at: Path) -> Iterator[Path]:
    """A new tmpfs for what witnesses unpack: it has room for all attributes and times that a tar can hold, ext4 has not."""
    at.mkdir()
    mounts.mount("tmpfs", at, "tmpfs")
    try:
        yield at
    finally:
        mounts.umount_below(at)


def _run(*argv: str | Path, stdin: bytes = b"") -> None:
    done = subprocess.run([str(arg) for arg in argv], check=False, input=stdin, capture_output=True)
    if done.returncode:
        raise UnpackError(f"{argv[0]}: exit {done.returncode}: {done.stderr[-500:].decode(errors='replace')}")
