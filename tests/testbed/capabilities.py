"""What this machine can do, found by trying; tests that need more are skipped, or fail where CI promised it."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import struct
import subprocess
import tempfile
import uuid
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import pytest

from tests.testbed import mounts, netns

if TYPE_CHECKING:
    from collections.abc import Callable

MEMORY_CGROUPS = (Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/unified"))


class CapabilityMissing(Exception):
    """Why something cannot be done here."""


def require(*names: str) -> None:
    """Skip the running test unless the machine has every capability of `names`; under CI=true fail it instead."""
    for name in names:
        reason = missing(name)
        if reason is None:
            continue
        unavailable(f"{name}: {reason}")


def unavailable(text: str) -> NoReturn:
    """Skip the running test for want of something; under CI=true fail it instead."""
    if os.environ.get("CI") == "true":
        pytest.fail(f"CI lacks {text}", pytrace=False)
    pytest.skip(f"needs {text}")


def have(name: str) -> bool:
    """Whether the machine has a capability; see PROBES for names."""
    return missing(name) is None


@cache
def missing(name: str) -> str | None:
    """Why a capability is missing, None if it is there; probed once per process.

    Raises:
        KeyError: no such capability.

    """
    try:
        PROBES[name]()
    except CapabilityMissing as error:
        return str(error)
    except OSError as error:
        return f"{error.strerror or error} ({errno.errorcode.get(error.errno or 0, '?')})"
    return None


def _root() -> None:
    if os.geteuid() != 0:
        raise CapabilityMissing(f"effective uid is {os.geteuid()}, not 0")
    with tempfile.TemporaryDirectory(prefix="afs-probe-") as name:
        mounts.mount("tmpfs", name, "tmpfs")  # root in a container may lack CAP_SYS_ADMIN
        mounts.umount(name)


def _fuse() -> None:
    os.close(os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC))


def _overlay() -> None:
    with tempfile.TemporaryDirectory(prefix="afs-probe-") as name:
        parts = [Path(name, part) for part in ("lower", "upper", "work", "root")]
        for part in parts:
            part.mkdir()
        lower, upper, work, root = parts
        mounts.mount("overlay", root, "overlay", f"lowerdir={lower},upperdir={upper},workdir={work}")
        mounts.umount(root)


def _erofs() -> None:
    """A mount of a file without a loop device (Linux 6.12 and later)."""
    mkfs = shutil.which("mkfs.erofs")
    if mkfs is None:
        raise CapabilityMissing("no mkfs.erofs to make an image with")
    with tempfile.TemporaryDirectory(prefix="afs-probe-") as name:
        tree, image, root = Path(name, "tree"), Path(name, "image"), Path(name, "root")
        tree.mkdir()
        root.mkdir()
        subprocess.run([mkfs, image, tree], check=True, capture_output=True)
        mounts.mount(image, root, "erofs", read_only=True)
        mounts.umount(root)


def _fsverity() -> None:
    """A file of an ext4 on a loop device, sealed (FS_IOC_ENABLE_VERITY with struct fsverity_enable_arg)."""
    with tempfile.TemporaryDirectory(prefix="afs-probe-") as name:
        image, root = Path(name, "image"), Path(name, "root")
        root.mkdir()
        with image.open("wb") as file:
            file.truncate(16 << 20)
        for command in (
            ["mkfs.ext4", "-q", "-O", "verity", "-b", "4096", str(image)],
            ["mount", "-o", "loop", str(image), str(root)],
        ):
            done = subprocess.run(command, check=False, capture_output=True, text=True)
            if done.returncode:
                raise CapabilityMissing(f"{command[0]}: {done.stderr.strip()}")
        try:
            (root / "file").write_bytes(b"sealed")
            fd = os.open(root / "file", os.O_RDONLY | os.O_CLOEXEC)
            try:
                fcntl.ioctl(fd, 0x40806685, struct.pack("=IIII112x", 1, 1, 4096, 0))
            finally:
                os.close(fd)
        finally:
            mounts.umount(root)


def _netns() -> None:
    """Network namespaces with links that can be slowed (tbf) and filtered (nftables)."""
    for name in ("ip", "tc", "nft", "nsenter", "unshare"):
        if shutil.which(name) is None:
            raise CapabilityMissing(f"no program {name}")
    try:
        with netns.hosts([1]) as hosts:
            hosts[1].slow("8mbit")
            hosts[1].lossy(1)
            hosts[1].reset()
    except AssertionError as error:
        raise CapabilityMissing(str(error)) from error


def _cgroup() -> None:
    tried = []
    for parent in MEMORY_CGROUPS:
        for limit in ("memory.limit_in_bytes", "memory.max"):
            child = parent / f"afs-probe-{uuid.uuid4().hex[:8]}"
            try:
                if limit == "memory.max" and "memory" in (parent / "cgroup.controllers").read_text().split():
                    (parent / "cgroup.subtree_control").write_text("+memory")  # as AFS does
                child.mkdir()
            except OSError as error:
                tried.append(f"{parent}: {error.strerror}")
                break
            try:
                (child / limit).write_text(str(64 << 20))
            except OSError as error:
                tried.append(f"{parent}/{limit}: {error.strerror}")
            else:
                return
            finally:
                child.rmdir()
    raise CapabilityMissing("; ".join(tried))


def _program(*names: str) -> Callable[[], None]:
    def probe() -> None:
        for name in names:
            program = shutil.which(name)
            if program is None:
                raise CapabilityMissing(f"no program {name}")
            done = subprocess.run([program, "--version"], check=False, capture_output=True)
            if done.returncode:
                raise CapabilityMissing(f"{name} --version: exit {done.returncode}")

    return probe


PROBES: dict[str, Callable[[], None]] = {
    "root": _root,
    "fuse": _fuse,
    "overlay": _overlay,
    "erofs": _erofs,
    "fsverity": _fsverity,
    "cgroup": _cgroup,
    "netns": _netns,
    "runc": _program("runc"),
    "crun": _program("crun"),
    "containerd": _program("containerd", "ctr"),
    "ctr-remote": _program("ctr-remote"),
    "systemd": _program("systemd-analyze", "systemd-tmpfiles"),
    "docker-registry": _program("docker-registry"),
    "umoci": _program("umoci"),
    "debootstrap": _program("debootstrap"),
    "gcc": _program("gcc"),
    "qemu": _program("qemu-system-x86_64", "depmod", "dpkg-deb"),
}
