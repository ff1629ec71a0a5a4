"""What a virtual machine boots: a Debian kernel, an initial RAM disk, and a root disk with this machine's programs.

Everything lies at the path that it has here: programs with their libraries, this virtual environment with its interpreter,
the working tree. So commands are the same inside and outside. Kernel and root disk stay in the tests' cache; what changes
from run to run, the working tree above all, goes in as a tar (`pack`) that the machine unpacks when it boots.
"""

from __future__ import annotations

import compileall
import functools
import hashlib
import importlib.metadata
import lzma
import os
import re
import shutil
import subprocess
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.testbed import build, debs

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

PROJECT = Path(__file__).resolve().parents[2]
PROGRAMS = (
    *(
        "runc",
        "crun",
        "docker-registry",
        "fusermount3",
        "mkfs.erofs",
        "mkfs.ext4",
        "kmod",
        "mount",
        "umount",
        "setpriv",
        "unshare",
    ),
    *("sh", "bash", "timeout", "tar", "cp", "findmnt", "losetup", "umoci"),
)
"""Beside those of busybox. What this machine does not have is left out."""
DATA = ("/usr/share/containers/seccomp.json",)
"""Files that programs read; as those."""
DISTRIBUTIONS = ("afs-cluster", "pytest", "pytest-asyncio", "pytest-timeout")
"""Of the virtual environment, with what they need."""

_BOOT_MODULES = ("virtio_pci", "virtio_blk", "ext4")
_STDLIB_LEFT_OUT = ("test", "tests", "idlelib", "ensurepip", "lib2to3", "tkinter", "turtledemo", "site-packages")
_DISK_MIB = 6144  # sparse
_KEEP_S = 14 * 86400.0  # of disks that nobody used: every change of the virtual environment makes one of 300 MB

_INIT = """#!/bin/busybox sh
/bin/busybox mount -t proc proc /proc
for module in $(/bin/busybox cat /modules/order); do /bin/busybox insmod "/modules/$module"; done
/bin/busybox mount -t devtmpfs devtmpfs /dev
/bin/busybox mount -t ext4 -o noinit_itable /dev/vda /root || exec /bin/busybox poweroff -f
exec /bin/busybox switch_root /root /sbin/init
"""

_INITTAB = "::once:/sbin/vm-agent\n"

# Lines of two words come in, an end mark and a script in base64; the script's output goes out as it comes, then the
# mark with its exit code. The first thing that goes out is "ready". Errors before that are on the console.
_AGENT = """#!/bin/sh
set -e
trap 'poweroff -f' EXIT
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mkdir -p /dev/pts /dev/shm
mount -t devpts devpts /dev/pts
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs tmpfs /run
mount -t cgroup2 cgroup2 /sys/fs/cgroup
hostname vm
ip link set lo up
tar xf /dev/vdb -C /
# What systemd's kmod-static-nodes.service does: the module of such a device is loaded when somebody opens it.
while read -r module name device; do
    [ "$module" != "#" ] || continue
    mkdir -p "$(dirname "/dev/$name")"
    minor=${device#*:} major=${device%:*}
    [ -e "/dev/$name" ] || mknod "/dev/$name" "${device%%[0-9]*}" "${major#?}" "$minor"
done <"/lib/modules/$(uname -r)/modules.devname"
modprobe virtio_console
exec 3<>/dev/vport0p1
set +e
cd /root
export HOME=/root PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
echo ready >&3
while read -r mark script <&3; do
    echo "$script" | base64 -d >/run/vm-script
    sh /run/vm-script </dev/null >&3 2>&1 3>&-
    echo "$mark $?" >&3
done
"""


@dataclass(frozen=True)
class Kernel:
    """A kernel image and its modules; *release* as uname(1) says it."""

    image: Path
    tree: Path
    """It has lib/modules."""
    release: str


@dataclass(frozen=True)
class Images:
    """What qemu boots; *disk* has to be protected from writes (snapshot=on)."""

    kernel: Kernel
    initrd: Path
    disk: Path


def kernel(cache_dir: Path, suite: str, package: str) -> Kernel:
    """Kernel of a Debian release, such as ("bookworm", "linux-image-cloud-amd64"): the newest signed one when it is fetched.

    15 s and 40 MB the first time, then it is the same until the cache is removed.
    """
    key = f"{suite}-{package}-{build.source_key(debs)}"
    tree = build.cached(cache_dir, "vm-kernel", key, functools.partial(_fetch_kernel, suite, package))
    (image,) = tree.glob("boot/vmlinuz-*")
    return Kernel(image, tree, image.name.removeprefix("vmlinuz-"))


def _fetch_kernel(suite: str, package: str, tree: Path) -> None:
    debs.unpack(suite, package, tree, only=r"linux-image-.*")
    if not (tree / "lib").exists():  # since Debian 13
        (tree / "lib").symlink_to("usr/lib")
    (release,) = (path.name for path in (tree / "lib/modules").iterdir())
    build.run(["depmod", "--basedir", tree, release])


def images(cache_dir: Path, booted: Kernel) -> Images:
    """Initial RAM disk and root disk for a kernel; half a minute the first time, and after a change of what is on the disk."""
    files = [*_programs(), *_interpreter(), *_virtual_environment()]
    digest = hashlib.sha256(f"{booted.tree} {booted.release}".encode())
    for path in files:
        if path.suffix == ".pyc":  # whoever imports a module for the first time makes one
            continue
        status = path.lstat()
        digest.update(f"{path} {status.st_size} {status.st_mtime_ns}\n".encode())
    key = f"{build.source_key(sys.modules[__name__], build)}-{digest.hexdigest()[:12]}"
    directory = build.cached(cache_dir, "vm-disk", key, functools.partial(_build_images, booted, files))
    os.utime(directory)
    for other in cache_dir.glob("vm-disk-*"):
        if other.stat().st_mtime < directory.stat().st_mtime - _KEEP_S:
            shutil.rmtree(other)
    return Images(booted, directory / "initrd", directory / "disk")


def _build_images(booted: Kernel, files: Sequence[Path], directory: Path) -> None:
    (directory / "initrd").write_bytes(b"".join(_initrd(booted)))
    root = directory / "root"
    for name in ("usr/bin", "usr/sbin", "usr/lib", "usr/lib64", "proc", "sys", "dev", "run", "root", "etc"):
        (root / name).mkdir(parents=True, exist_ok=True)
    for name in ("bin", "sbin", "lib", "lib64"):
        (root / name).symlink_to(f"usr/{name}")
    for name in ("tmp", "var/tmp"):
        (root / name).mkdir(parents=True)
        (root / name).chmod(0o1777)
    for path in (*files, *_libraries(files)):
        _copy(path, root)
    applets = subprocess.run(["busybox", "--list-full"], check=True, capture_output=True, text=True).stdout.split()
    for applet in applets:
        link = root / applet
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.exists():
            link.symlink_to("/usr/bin/busybox")
    for name in ("modprobe", "insmod", "lsmod"):
        (root / "usr/sbin" / name).unlink(missing_ok=True)
        (root / "usr/sbin" / name).symlink_to("/usr/bin/kmod")
    shutil.copytree(booted.tree / "lib/modules", root / "usr/lib/modules", symlinks=True)
    (root / "usr/sbin/vm-agent").write_text(_AGENT)
    (root / "usr/sbin/vm-agent").chmod(0o755)
    (root / "etc/inittab").write_text(_INITTAB)
    (root / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n")
    (root / "etc/group").write_text("root:x:0:\nnogroup:x:65534:\n")
    (root / "etc/hosts").write_text("127.0.0.1 localhost vm\n")
    options = ("-q", "-t", "ext4", "-m", "0", "-O", "^has_journal", "-E", "lazy_itable_init=1")
    build.run(["mke2fs", *options, "-d", root, directory / "disk", f"{_DISK_MIB}M"])
    shutil.rmtree(root)


def _copy(path: Path, root: Path) -> None:
    """Copy a file to the same path below `root`, a symlink with what it leads to; symlinks in its parents become directories."""
    parent = path.parent.resolve()
    target = root / parent.relative_to("/") / path.name
    if not target.is_symlink() and not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, target, follow_symlinks=False)
    if path.is_symlink():
        _copy(parent / path.readlink(), root)


def _programs() -> Iterator[Path]:
    for name in ("busybox", *PROGRAMS):
        if found := shutil.which(name):
            yield Path(found)
    yield from (Path(name) for name in DATA if os.path.exists(name))


def _interpreter() -> Iterator[Path]:
    """This Python: its program and its standard library."""
    yield Path(sys.executable).resolve()
    for directory, below, names in os.walk(Path(os.__file__).parent):
        below[:] = [name for name in below if name not in _STDLIB_LEFT_OUT and not name.startswith("config-")]
        for name in names:
            if not name.endswith(".pyc") or name.endswith(f".{sys.implementation.cache_tag}.pyc"):
                yield Path(directory, name)


def _virtual_environment() -> Iterator[Path]:
    environment = Path(sys.prefix)
    yield environment / "pyvenv.cfg"
    yield from (path for path in (environment / "bin").iterdir() if path.is_symlink())
    found: dict[str, importlib.metadata.Distribution] = {}
    _collect(DISTRIBUTIONS, found)
    files = {Path(os.path.normpath(str(part.locate()))) for one in found.values() for part in one.files or ()}
    yield from sorted(path for path in files if path.is_file())


def _collect(names: Iterable[str], found: dict[str, importlib.metadata.Distribution]) -> None:
    for name in names:
        if canonicalize_name(name) in found:
            continue
        one = found[canonicalize_name(name)] = importlib.metadata.distribution(name)
        needed = [Requirement(text) for text in one.requires or ()]
        _collect([need.name for need in needed if need.marker is None or need.marker.evaluate({"extra": ""})], found)


def _libraries(files: Iterable[Path]) -> set[Path]:
    """Every shared library that a program or library among *files* loads."""
    binaries = []
    for path in files:
        with path.open("rb") as content:
            if content.read(4) == b"\x7fELF":
                binaries.append(path)
    done = subprocess.run(["ldd", *binaries], check=False, capture_output=True, text=True)  # 1 if one of them is static
    return {Path(name) for name in re.findall(r"^\s+(?:\S+ => )?(/\S+) \(0x", done.stdout, re.MULTILINE)}


def _initrd(booted: Kernel) -> Iterator[bytes]:
    """A cpio archive (Linux Documentation/driver-api/early-userspace/buffer-format.rst)."""
    for name in ("bin", "dev", "proc", "root", "modules"):
        yield _member(name, 0o040755)
    busybox = Path(shutil.which("busybox") or "")
    yield _member("bin/busybox", 0o100755, busybox.read_bytes())
    yield _member("init", 0o100755, _INIT.encode())
    order: list[str] = []
    for name in _BOOT_MODULES:
        shown = build.run(["modprobe", "-d", booted.tree, "-S", booted.release, "--show-depends", name])
        for line in shown.splitlines():
            kind, _, module = line.strip().partition(" ")
            path = Path(module)
            plain = path.name.removesuffix(".xz")
            if kind == "builtin" or plain in order:
                continue
            data = path.read_bytes()
            yield _member(f"modules/{plain}", 0o100644, lzma.decompress(data) if path.suffix == ".xz" else data)
            order.append(plain)
    yield _member("modules/order", 0o100644, "\n".join(order).encode())
    yield _member("TRAILER!!!", 0)


def _member(name: str, mode: int, data: bytes = b"") -> bytes:
    fields = (0, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name) + 1, 0)
    header = b"070701" + b"".join(b"%08X" % field for field in fields) + name.encode() + b"\0"
    return _padded(header) + _padded(data)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)


def pack(tar: Path, extra: Mapping[Path, Path]) -> None:
    """Write a tar with the working tree, its Python compiled, and the files and directories `extra`: path inside to path here.

    A second or less; a tree that was never compiled takes three more.
    """
    listed = subprocess.run(
        ["git", "-C", PROJECT, "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        check=True,
        capture_output=True,
        text=True,
    )
    files = [PROJECT / name for name in listed.stdout.split("\0") if name and (PROJECT / name).is_file()]
    modules = [path for path in files if path.suffix == ".py"]
    for module in modules:  # there it takes 20 times as long
        compileall.compile_file(module, quiet=2)
    compiled = [
        module.parent / "__pycache__" / f"{module.stem}.{sys.implementation.cache_tag}.pyc" for module in modules
    ]
    with tarfile.open(tar, "w") as out:
        for path in (*files, *(path for path in compiled if path.exists())):
            out.add(path, path.relative_to("/"))
        for inside, here in extra.items():
            out.add(here, inside.relative_to("/"))
